"""Mode search: from a first guess towards the maximum of one example's log joint."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int

from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.densities import LogDensity
from vlae_jax.expansions import (
    Expansion,
    MatrixFreeExpansion,
    Quadratic,
    depend_on_data,
    exact_expansion,
)
from vlae_jax.factor import Factor, factorize

Damping = Literal["paper", "line_search", "trust_region"]
Solver = Literal["auto", "cholesky", "cg"]

SHORTFALL = 0.1
"""Share of the Newton decrement that conjugate gradients may leave out."""
_CG_LATENT = 24
"""Dimensions from which conjugate gradients cost less than forming the precision."""
_STEP_SIZES = (1.0, 0.5, 0.25, 0.125)
_STALLED = 1e-2


class RefinementInfo(NamedTuple):
    """How one example's search went. Carries no gradients."""

    path: Float[Array, "steps_and_one latent"]
    """The points visited, from the first guess to the mode."""
    log_joint: Float[Array, " steps_and_one"]
    """The log joint at each of them, nats."""
    newton_decrement: Float[Array, ""]
    """½ gᵀP⁻¹g at the mode: how far below its local maximum it lies, nats. P is that of the repair
    where its own is not PD; NaN where there is none."""
    converged: Bool[Array, ""]
    """The decrement, or a line search's last gain, is below 0.01 nats, and P is PD, unrepaired: a
    minimum has no gradient either. The gain counts
    only where rounding of the log joint would not hide it: below 84,000 nats in float32."""
    is_pd: Bool[Array, ""]
    """Whether the precision at the mode was positive definite, before any repair."""
    steps_used: Int[Array, ""]
    """Steps that moved the point."""


@runtime_checkable
class Optimizer(Protocol):
    """An optax gradient transformation, or anything with the same two functions."""

    init: Callable[..., Any]
    update: Callable[..., Any]


def newton_refine(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    num_steps: int,
    damping: Damping = "line_search",
    repair: Expansion | None = None,
    solver: Solver = "auto",
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by damped steps z + α P⁻¹∇ log p(x, z).

    With the Gauss-Newton precision of a ReLU decoder the full step is the closed-form posterior
    mean of the local linear model (probabilistic PCA); it is Newton's method, Fisher scoring or
    IRLS as `expand` has it.

    Args:
        expand: Expansion of one example's log joint.
        z_init: First guess, shape (latent,).
        num_steps: Steps T; 0 returns `z_init`.
        damping: "line_search" takes the best of α ∈ {0, 1/8, 1/4, 1/2, 1}, so the log joint never
            falls; "paper" takes α = 0.5/(t + 1); "trust_region" (Levenberg-Marquardt) solves with
            P + λI and accepts only what raises the log joint.
        repair: Expansion whose precision is used for a step where that of `expand` is not
            positive definite. Without it such a step does not move.
        solver: How P⁻¹∇ is found. "cholesky" forms and factors P. "cg" multiplies by P without
            forming it, until the direction provably holds 90 % of the Newton decrement (for
            P ≥ I: a Gauss-Newton precision with a standard normal prior; to rounding where the
            search is differentiated); where P is indefinite it stops at the first direction of
            negative curvature, and needs no repair. "auto"
            takes "cg" where `expand` has products, z has at least 24 dimensions and damping is
            not "paper", whose steps are meant to be those of the paper.

    Returns:
        The mode (latent,) and the `RefinementInfo`.

    Raises:
        ValueError: While tracing, for a wrong `num_steps`, `damping` or shape.

    Gradients:
        Flow through every step into `z_init` and the parameters, with step sizes held constant.
        `infer_posterior` has cheaper ways.

    References:
        Park, Kim and Kim (2019), section 3.1 and algorithm 1; Levenberg (1944); Marquardt (1963).
    """
    search = newton_search(
        expand,
        z_init,
        num_steps=num_steps,
        damping=damping,
        repair=repair,
        solver=solver,
        shortfall=None,
    )
    return search.mode, search_info(search, *factorize(expand, search.mode, repair))


class Search(NamedTuple):
    """A mode search before anything is known of the curvature where it ended."""

    mode: Float[Array, " latent"]
    path: Float[Array, "steps latent"]
    """Where each step began."""
    log_joint: Float[Array, " steps"]
    """The log joint there, nats."""
    stalls_at_modes: bool
    """Whether a step that gains nothing means that there is nothing to gain nearby."""


def newton_search(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    num_steps: int,
    damping: Damping,
    repair: Expansion | None,
    solver: Solver,
    shortfall: float | None,
) -> Search:
    """`newton_refine` without its last expansion, for callers that need that one themselves.

    A search that is differentiated, as if its directions were exact, needs them to rounding:
    `shortfall` None.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if damping not in get_args(Damping):
        raise ValueError(f"damping must be one of {get_args(Damping)}, got {damping!r}")
    z_init = depend_on_data(lambda z: expand(z).value, z_init)
    if shortfall is None:
        shortfall = 10 * float(jnp.finfo(z_init.dtype).eps)
    if _choose(solver, expand, z_init.size, damping) == "cg":
        matrix_free = cast(MatrixFreeExpansion, expand)
        look = functools.partial(_by_products, matrix_free, shortfall)
    else:
        look = functools.partial(_by_factor, expand, repair)

    def step(carry, t):
        z, ridge = carry
        local = look(z, ridge)
        if damping == "paper":
            next_z = z + (0.5 / (t + 1)).astype(z.dtype) * local.direction
        elif damping == "line_search":
            next_z = _best_on_ray(expand, z, local)
        else:
            next_z, ridge = _trust_or_retry(expand, z, local, ridge)
        return (next_z, ridge), (z, local.value)

    carry = (z_init, jnp.zeros_like(z_init[0]))
    (mode, _), (path, values) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    # A trust region also refuses steps that were only too long.
    return Search(mode, path, values, stalls_at_modes=damping == "line_search")


class _Local(NamedTuple):
    """What a step knows of where it begins."""

    value: Float[Array, ""]
    grad: Float[Array, " latent"]
    direction: Float[Array, " latent"]
    """(P + ridge I)⁻¹ grad, or close to it."""


def _choose(solver: Solver, expand: Expansion, latent: int, damping: Damping) -> Solver:
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
    has_products = hasattr(expand, "products")
    if solver == "cg" and not has_products:
        raise ValueError(
            "solver 'cg' needs an expansion with a method `products`, as those of vlae_jax have "
            "and `MatrixFreeExpansion` gives to any other; or use solver='cholesky'"
        )
    if solver == "auto":
        pays = has_products and latent >= _CG_LATENT and damping != "paper"
        return "cg" if pays else "cholesky"
    return solver


def _by_factor(
    expand: Expansion,
    repair: Expansion | None,
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> _Local:
    """Form the precision and factor it."""
    ridge_matrix = ridge * jnp.eye(z.size, dtype=z.dtype)
    quadratic, factor = factorize(
        _add_ridge(expand, ridge_matrix),
        z,
        None if repair is None else _add_ridge(repair, ridge_matrix),
    )
    direction = jnp.where(factor.is_finite, cho_solve((factor.chol, True), quadratic.grad), 0.0)
    return _Local(quadratic.value, quadratic.grad, direction)


def _by_products(
    expand: MatrixFreeExpansion,
    shortfall: float,
    z: Float[Array, " latent"],
    ridge: Float[Array, ""],
) -> _Local:
    """Multiply by the precision until the direction is good enough."""
    value, grad, times = expand.products(z)

    def ridged(v):
        return times(v) + ridge * v

    def solve(matvec, rhs):
        return conjugate_gradients(matvec, rhs, shortfall=shortfall)

    direction = jax.lax.custom_linear_solve(ridged, grad, solve, symmetric=True)
    return _Local(value, grad, direction)


def gradient_refine(
    log_joint: LogDensity,
    z_init: Float[Array, " latent"],
    *,
    optimizer: Optimizer,
    num_steps: int,
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by first-order steps of any optax optimizer.

    Args:
        log_joint: z of shape (latent,) → log p(x, z), a scalar in nats.
        z_init: First guess, shape (latent,).
        optimizer: An optax gradient transformation. It is given the gradient of -log p(x, z),
            which optax minimises.
        num_steps: Steps T; 0 returns `z_init`.

    Returns:
        The mode (latent,) and the `RefinementInfo`; its decrement and flags come from the exact
        Hessian at the mode, which the compiler drops where they are not used.

    Raises:
        ValueError: While tracing, for a wrong `num_steps` or shape.

    Gradients:
        Flow through every step, as far as the optimizer is differentiable.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    z_init = depend_on_data(log_joint, z_init)

    def energy(z):
        return -log_joint(z)

    wants_value = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(optimizer.update).parameters.values()
    )

    def step(carry, _):
        z, state = carry
        value, grad = jax.value_and_grad(energy)(z)
        extra = {"value": value, "grad": grad, "value_fn": energy} if wants_value else {}
        update, state = optimizer.update(grad, state, z, **extra)
        return (z + update, state), (z, -value)

    state = optimizer.init(z_init)
    (mode, _), (path, values) = jax.lax.scan(step, (z_init, state), length=num_steps)
    search = Search(mode, path, values, stalls_at_modes=False)
    return mode, search_info(search, *factorize(exact_expansion(log_joint), mode))


def _add_ridge(expand: Expansion, ridge: Float[Array, "latent latent"]) -> Expansion:
    def ridged(z):
        quadratic = expand(z)
        return quadratic._replace(precision=quadratic.precision + ridge)

    return ridged


def _best_on_ray(expand, z, local):
    """The best of a few step lengths, all tried in one batch; 0 is among them."""
    value, direction = local.value, local.direction
    sizes = jnp.asarray(_STEP_SIZES, z.dtype)
    tried = jax.lax.stop_gradient(jax.vmap(lambda size: expand(z + size * direction).value)(sizes))
    tried = jnp.where(jnp.isnan(tried), -jnp.inf, tried)
    best = jnp.argmax(tried)
    size = jnp.where(tried[best] > value, sizes[best], 0.0)
    # A direction that is not taken may be infinite.
    return z + size * jnp.where(size > 0, direction, 0.0)


def _trust_or_retry(expand, z, local, ridge):
    """Accept a step that keeps at least a little of its promise; else stay, and damp more."""
    direction = local.direction
    promised = 0.5 * (local.grad @ direction + ridge * direction @ direction)
    gained = expand(z + direction).value - local.value
    accept = gained > 1e-4 * promised
    lowered = jnp.where(gained > 0.75 * promised, ridge / 10, ridge)
    # A first ridge: the curvature along the step that went too far; or, where the precision had
    # no factor and there was no step, what keeps the next one at about unit length.
    square = direction @ direction
    along = local.grad @ direction / jnp.where(square > 0, square, 1.0)
    scale = jnp.where(square > 0, along, jnp.sqrt(local.grad @ local.grad))
    raised = jnp.maximum(10 * ridge, scale)
    ridge = jax.lax.stop_gradient(jnp.where(accept, lowered, raised))
    return jnp.where(accept, z + direction, z), ridge


def search_info(search: Search, quadratic: Quadratic, factor: Factor) -> RefinementInfo:
    """Sum up a search, given the expansion at its mode and the factor of its precision."""
    step = cho_solve((factor.chol, True), quadratic.grad)
    decrement = jnp.where(factor.is_finite, 0.5 * quadratic.grad @ step, jnp.nan)
    path = jnp.concatenate([search.path, search.mode[None]])
    values = jnp.append(search.log_joint, quadratic.value)
    converged = decrement <= _STALLED
    if search.stalls_at_modes and values.size > 1:
        # Where rounding hides a gain of that size, gaining nothing says nothing.
        is_resolved = jnp.finfo(values.dtype).eps * jnp.abs(values[-1]) <= _STALLED
        converged |= is_resolved & (values[-1] - values[-2] <= _STALLED)
    moved = jnp.any(path[1:] != path[:-1], axis=1)
    info = RefinementInfo(
        path=path,
        log_joint=values,
        newton_decrement=decrement,
        converged=converged & jnp.isfinite(decrement) & factor.is_pd,
        is_pd=factor.is_pd,
        steps_used=jnp.sum(moved),
    )
    return jax.lax.stop_gradient(info)
