"""One step of a mode search: its direction, its length, and the ridge of the next step.

A step begins at z with a ridge λ ≥ 0 and has the direction (P + λI)⁻¹∇ log p(x, z). The ridge is
carried from step to step. It grows while steps gain less than predicted, which shortens the next
one and turns it towards the gradient, and falls back to zero as steps succeed. A search that does
not move in one step therefore tries a different direction in the next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float

from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.expansions import Expansion, MatrixFreeExpansion, Quadratic, held_constant
from vlae_jax.factor import factorize

Evaluate = Callable[[Float[Array, " latent"]], Float[Array, ""]]

_LENGTHS = ((1.0, 0.5, 0.25, 0.125), (2.0**-5, 2.0**-8, 2.0**-11, 2.0**-14))
"""Trial lengths of a line search. The second row is tried only where the first gains too little."""
_SUFFICIENT = 1e-4
"""Share of the gain predicted by the slope below which a step counts as failed (Armijo's rule)."""
_RIDGE_FACTOR = 10.0


class Local(NamedTuple):
    """The log joint around the point where a step begins, and the direction of the step."""

    value: Float[Array, ""]
    grad: Float[Array, " latent"]
    direction: Float[Array, " latent"]
    """(P + ridge I)⁻¹ grad, exact or by conjugate gradients; a multiple of grad where P + ridge I
    could not be factored."""
    is_newton: Bool[Array, ""]
    """Whether a factor was found, of P + ridge I or of its repair."""
    is_pd: Bool[Array, ""]
    """Whether P + ridge I was positive definite without a repair. Conjugate gradients do not check
    this: with them it is true where the log joint is finite."""


class Moved(NamedTuple):
    """The point that a step leads to, and the ridge of the next step."""

    z: Float[Array, " latent"]
    ridge: Float[Array, ""]


def look_by_factor(
    expand: Expansion,
    repair: Expansion | None,
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> Local:
    """Find the direction of a step by forming the precision and factoring it."""
    quadratic, factor = factorize(
        _add_ridge(expand, ridge), z, None if repair is None else _add_ridge(repair, ridge)
    )
    grad = quadratic.grad
    newton = cho_solve((factor.chol, True), grad)
    # Without a factor the step follows the gradient, also a direction of ascent. It is as long as
    # a Newton step would be for the absolute value of the curvature along it.
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
    """Find the direction of a step by conjugate gradients, without forming the precision."""
    value, grad, times, _ = expand.products(z)

    def ridged(v: Array) -> Array:
        return times(v) + ridge * v

    def solve(matvec: Callable[[Array], Array], rhs: Array) -> Array:
        return conjugate_gradients(matvec, rhs, shortfall=shortfall)

    direction = jax.lax.custom_linear_solve(ridged, grad, solve, symmetric=True)
    is_found = jnp.isfinite(value)
    return Local(value, grad, direction, is_found, is_found)


def look_by_scale(
    expand: Expansion,
    scale: Float[Array, " latent"],
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> Local:
    """Take the scaled gradient as the direction: the precision is guessed to be diag(1 / scale)."""
    value, grad = value_and_grad(expand, z)
    is_found = jnp.isfinite(value)
    return Local(value, grad, scale * grad / (1 + ridge * scale), is_found, is_found)


def value_and_grad(
    expand: Expansion, z: Float[Array, " latent"]
) -> tuple[Float[Array, ""], Float[Array, " latent"]]:
    """Return the log joint and its gradient, without the precision where that can be avoided."""
    local = getattr(expand, "products", expand)(z)
    return local.value, local.grad


def hold_value(expand: Expansion, z: Float[Array, " latent"]) -> Evaluate:
    """Return the log joint as a function of z, with everything `expand` closes over held constant.

    This keeps derivatives out of the line search, whose `while_loop` has no reverse mode.
    """
    value = held_constant(lambda z: expand(z).value, z)
    return lambda z: value(jax.lax.stop_gradient(z))


def line_search_step(
    evaluate: Evaluate, z: Float[Array, " latent"], local: Local, ridge: Float[Array, ""]
) -> Moved:
    """Move along the direction by the best of a few trial lengths, 0 included.

    The lengths of a row of `_LENGTHS` are tried in one batch. Under `vmap` the second row costs
    nothing if no example of the batch needs it.
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
    # A rejected direction may be infinite, and 0 times infinity is NaN.
    return Moved(z + length * jnp.where(length > 0, local.direction, 0.0), next_ridge)


def trust_region_step(
    evaluate: Evaluate, z: Float[Array, " latent"], local: Local, ridge: Float[Array, ""]
) -> Moved:
    """Accept a step with at least a small share of its predicted gain; else enlarge the ridge."""
    value, grad, direction = jax.lax.stop_gradient((local.value, local.grad, local.direction))
    promised = 0.5 * (grad @ direction + ridge * (direction @ direction))
    reached = evaluate(z + direction)
    accept = reached > value + _SUFFICIENT * promised
    next_ridge = _next_ridge(
        local, ridge, raise_it=~accept, lower_it=reached > value + 0.75 * promised
    )
    return Moved(jnp.where(accept, z + local.direction, z), next_ridge)


def promises_more_than_rounding(local: Local) -> Bool[Array, ""]:
    """Whether the predicted gain of the direction exceeds the rounding error of the log joint."""
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
    # The first ridge is the curvature along the failed step; without a direction, the norm of the
    # gradient, which gives the next step about unit length.
    curvature = jnp.where(square > 0, slope / jnp.where(square > 0, square, 1.0), _safe_norm(grad))
    largest = jnp.finfo(ridge.dtype).max ** 0.5
    raised = jnp.clip(jnp.maximum(_RIDGE_FACTOR * ridge, curvature), 0.0, largest)
    raised = jnp.where(jnp.isfinite(raised), raised, ridge)
    lowered = ridge / _RIDGE_FACTOR
    lowered = jnp.where(lowered > 1e-4 * curvature, lowered, 0.0)
    changed = jnp.where(lower_it, lowered, ridge)
    changed = jnp.where(raise_it | ~local.is_newton, raised, changed)
    # A gain below rounding cannot judge the step, so the ridge is reset to zero.
    changed = jnp.where(promises_more_than_rounding(local), changed, 0.0)
    return jax.lax.stop_gradient(changed).astype(ridge.dtype)


def _add_ridge(expand: Expansion, ridge: Float[Array, ""]) -> Expansion:
    def ridged(z: Array) -> Quadratic:
        quadratic = expand(z)
        identity = jnp.eye(z.size, dtype=z.dtype)
        return quadratic._replace(precision=quadratic.precision + ridge * identity)

    return ridged


def _safe_norm(vector: Float[Array, " latent"]) -> Float[Array, ""]:
    """The Euclidean norm, held constant, computed so that squares do not overflow."""
    vector = jax.lax.stop_gradient(vector)
    largest = jnp.max(jnp.abs(vector))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum((vector / scale) ** 2))
