"""One step of a mode search: its direction, its length, and the ridge the next one starts with.

A step begins at z with a ridge λ ≥ 0 and looks along (P + λI)⁻¹∇ log p(x, z). The ridge is the
search's memory: it grows while steps gain less than they promise, which shortens the next one and
turns it towards the gradient, and falls back to zero as steps succeed. So a search that does not
move in one step tries something else in the next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float

from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.expansions import Expansion, MatrixFreeExpansion, Quadratic
from vlae_jax.factor import factorize

Evaluate = Callable[[Float[Array, " latent"]], Float[Array, ""]]

_LENGTHS = ((1.0, 0.5, 0.25, 0.125), (2.0**-5, 2.0**-8, 2.0**-11, 2.0**-14))
"""Trial lengths of a line search. The second row is tried only where the first gains too little."""
_SUFFICIENT = 1e-4
"""Share of the gain promised by the slope below which a step counts as failed (Armijo's rule)."""
_RIDGE_FACTOR = 10.0


class Local(NamedTuple):
    """What a step knows of the point where it begins."""

    value: Float[Array, ""]
    grad: Float[Array, " latent"]
    direction: Float[Array, " latent"]
    """(P + ridge I)⁻¹ grad, or nearly; a multiple of grad where that matrix has no factor."""
    is_newton: Bool[Array, ""]
    """Whether there was a factor, P's own or that of its repair."""
    is_pd: Bool[Array, ""]
    """Whether P + ridge I itself was positive definite, as far as the step could see."""


class Moved(NamedTuple):
    """What a step leaves to the next."""

    z: Float[Array, " latent"]
    ridge: Float[Array, ""]


def look_by_factor(
    expand: Expansion,
    repair: Expansion | None,
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> Local:
    """Form the precision and factor it."""
    quadratic, factor = factorize(
        _add_ridge(expand, ridge), z, None if repair is None else _add_ridge(repair, ridge)
    )
    grad = quadratic.grad
    newton = cho_solve((factor.chol, True), grad)
    # Where there is no factor the gradient is a direction of ascent too; its length is that of a
    # Newton step if the curvature along it, whatever its sign, were positive.
    curvature = _safe_norm(quadratic.precision @ grad)
    size = _safe_norm(grad)
    scaled = jnp.where(curvature > 0, size, 1.0) / jnp.where(
        curvature > 0, curvature, jnp.where(size > 0, size, 1.0)
    )
    direction = jnp.where(factor.is_finite, newton, jax.lax.stop_gradient(scaled) * grad)
    return Local(quadratic.value, grad, direction, factor.is_finite, factor.is_pd)


def look_by_products(
    expand: MatrixFreeExpansion,
    shortfall: float,
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> Local:
    """Multiply by the precision until the direction is good enough."""
    value, grad, times = expand.products(z)

    def ridged(v: Array) -> Array:
        return times(v) + ridge * v

    def solve(matvec: Callable[[Array], Array], rhs: Array) -> Array:
        return conjugate_gradients(matvec, rhs, shortfall=shortfall)

    direction = jax.lax.custom_linear_solve(ridged, grad, solve, symmetric=True)
    is_found = jnp.isfinite(value)
    return Local(value, grad, direction, is_found, is_found)


def hold_value(expand: Expansion, z: Float[Array, " latent"]) -> Evaluate:
    """The log joint as a function of z, with everything `expand` closes over held constant.

    A loop of no fixed length has no reverse mode; one that no derivative enters needs none.
    """
    value, closed_over = jax.closure_convert(lambda z: expand(z).value, z)
    held = jax.lax.stop_gradient(closed_over)
    return lambda z: value(jax.lax.stop_gradient(z), *held)


def line_search_step(
    evaluate: Evaluate, z: Float[Array, " latent"], local: Local, ridge: Float[Array, ""]
) -> Moved:
    """Move by the best of a few lengths of the direction; 0 is among them.

    The lengths of a row are tried in one batch. Under `vmap` the second row costs nothing where
    no example of the batch needs it.
    """
    slope = jax.lax.stop_gradient(local.grad @ local.direction)
    value, direction = jax.lax.stop_gradient((local.value, local.direction))
    table = jnp.asarray(_LENGTHS, z.dtype)
    is_visible = promises_more_than_rounding(local)

    def is_enough(length: Array, best: Array) -> Array:
        return best > value + _SUFFICIENT * length * slope

    def goes_on(state: Any) -> Array:
        row, length, best = state
        return (row == 0) | ((row < len(_LENGTHS)) & is_visible & ~is_enough(length, best))

    def try_row(state: Any) -> Any:
        row, length, best = state
        lengths = jax.lax.dynamic_index_in_dim(table, row, keepdims=False)
        tried = jax.vmap(lambda length: evaluate(z + length * direction))(lengths)
        tried = jnp.where(jnp.isnan(tried), -jnp.inf, tried)
        index = jnp.argmax(tried)
        is_better = tried[index] > best
        length = jnp.where(is_better, lengths[index], length)
        return row + 1, length, jnp.where(is_better, tried[index], best)

    first = (0, jnp.zeros_like(value), value)
    _, length, best = jax.lax.while_loop(goes_on, try_row, first)
    succeeded = is_enough(length, best)
    next_ridge = _next_ridge(
        local, ridge, raise_it=~succeeded, lower_it=succeeded & (length >= 0.5)
    )
    # A direction that is not taken may be infinite.
    return Moved(z + length * jnp.where(length > 0, local.direction, 0.0), next_ridge)


def trust_region_step(
    evaluate: Evaluate, z: Float[Array, " latent"], local: Local, ridge: Float[Array, ""]
) -> Moved:
    """Accept a step that keeps at least a little of its promise; else stay, with a larger ridge."""
    value, grad, direction = jax.lax.stop_gradient((local.value, local.grad, local.direction))
    promised = 0.5 * (grad @ direction + ridge * (direction @ direction))
    reached = evaluate(z + direction)
    accept = reached > value + _SUFFICIENT * promised
    next_ridge = _next_ridge(
        local, ridge, raise_it=~accept, lower_it=reached > value + 0.75 * promised
    )
    return Moved(jnp.where(accept, z + local.direction, z), next_ridge)


def promises_more_than_rounding(local: Local) -> Bool[Array, ""]:
    """Whether the gain that the direction promises could be seen in the value of the log joint."""
    value, promised = jax.lax.stop_gradient((local.value, 0.5 * local.grad @ local.direction))
    return promised > 16 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def _next_ridge(
    local: Local,
    ridge: Float[Array, ""],
    *,
    raise_it: Bool[Array, ""],
    lower_it: Bool[Array, ""],
) -> Float[Array, ""]:
    grad, direction = jax.lax.stop_gradient((local.grad, local.direction))
    square, slope = direction @ direction, grad @ direction
    # The first ridge is the curvature along the step that went too far; where there was no step,
    # what gives the next one about unit length.
    curvature = jnp.where(square > 0, slope / jnp.where(square > 0, square, 1.0), _safe_norm(grad))
    largest = jnp.finfo(ridge.dtype).max ** 0.5
    raised = jnp.clip(jnp.maximum(_RIDGE_FACTOR * ridge, curvature), 0.0, largest)
    raised = jnp.where(jnp.isfinite(raised), raised, ridge)
    lowered = ridge / _RIDGE_FACTOR
    lowered = jnp.where(lowered > 1e-4 * curvature, lowered, 0.0)
    changed = jnp.where(lower_it, lowered, ridge)
    changed = jnp.where(raise_it | ~local.is_newton, raised, changed)
    # A step too small to be seen has nothing to teach: begin again, without a ridge.
    changed = jnp.where(promises_more_than_rounding(local), changed, 0.0)
    return jax.lax.stop_gradient(changed).astype(ridge.dtype)


def _add_ridge(expand: Expansion, ridge: Float[Array, ""]) -> Expansion:
    def ridged(z: Array) -> Quadratic:
        quadratic = expand(z)
        identity = jnp.eye(z.size, dtype=z.dtype)
        return quadratic._replace(precision=quadratic.precision + ridge * identity)

    return ridged


def _safe_norm(vector: Float[Array, " latent"]) -> Float[Array, ""]:
    """The Euclidean norm without overflow of its squares, and without a derivative."""
    vector = jax.lax.stop_gradient(vector)
    largest = jnp.max(jnp.abs(vector))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum((vector / scale) ** 2))
