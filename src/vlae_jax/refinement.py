"""Mode search: from a first guess towards the maximum of one example's log joint."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int

from vlae_jax.curvature import (
    Expansion,
    Factor,
    Quadratic,
    depend_on_data,
    exact_expansion,
    factorize,
)
from vlae_jax.densities import LogDensity

Damping = Literal["paper", "line_search", "trust_region"]

_STEP_SIZES = (1.0, 0.5, 0.25, 0.125)
_STALLED = 1e-2


class RefinementInfo(NamedTuple):
    """How one example's search went. Carries no gradients."""

    path: Float[Array, "steps_and_one latent"]
    """The points visited, from the first guess to the mode."""
    log_joint: Float[Array, " steps_and_one"]
    """The log joint at each of them, nats."""
    newton_decrement: Float[Array, ""]
    """½ gᵀP⁻¹g at the mode: how far below its local maximum it lies, nats. NaN if P is not PD."""
    converged: Bool[Array, ""]
    """The decrement, or a line search's last gain, is below 0.01 nats, and P is PD."""
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
    search = newton_search(expand, z_init, num_steps=num_steps, damping=damping, repair=repair)
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
) -> Search:
    """`newton_refine` without its last expansion, for callers that need that one themselves."""
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if damping not in get_args(Damping):
        raise ValueError(f"damping must be one of {get_args(Damping)}, got {damping!r}")
    z_init = depend_on_data(lambda z: expand(z).value, z_init)
    identity = jnp.eye(z_init.size, dtype=z_init.dtype)

    def step(carry, t):
        z, ridge = carry
        ridged = _add_ridge(expand, ridge * identity)
        quadratic, factor = factorize(
            ridged, z, None if repair is None else _add_ridge(repair, ridge * identity)
        )
        direction = jnp.where(factor.is_finite, cho_solve((factor.chol, True), quadratic.grad), 0.0)
        if damping == "paper":
            next_z = z + (0.5 / (t + 1)).astype(z.dtype) * direction
        elif damping == "line_search":
            next_z = _best_on_ray(expand, z, direction, quadratic.value)
        else:
            next_z, ridge = _trust_or_retry(expand, z, direction, quadratic, ridge)
        return (next_z, ridge), (z, quadratic.value)

    carry = (z_init, jnp.zeros_like(z_init[0]))
    (mode, _), (path, values) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    # A trust region also refuses steps that were only too long.
    return Search(mode, path, values, stalls_at_modes=damping == "line_search")


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


def _best_on_ray(expand, z, direction, value):
    """The best of a few step lengths, all tried in one batch; 0 is among them."""
    sizes = jnp.asarray(_STEP_SIZES, z.dtype)
    tried = jax.lax.stop_gradient(jax.vmap(lambda size: expand(z + size * direction).value)(sizes))
    tried = jnp.where(jnp.isnan(tried), -jnp.inf, tried)
    best = jnp.argmax(tried)
    size = jnp.where(tried[best] > value, sizes[best], 0.0)
    return z + size * direction


def _trust_or_retry(expand, z, direction, quadratic, ridge):
    """Accept a step that keeps at least a little of its promise; else stay, and damp more."""
    promised = 0.5 * (quadratic.grad @ direction + ridge * direction @ direction)
    gained = expand(z + direction).value - quadratic.value
    scale = jnp.trace(quadratic.precision) / z.size
    accept = gained > 1e-4 * promised
    lowered = jnp.where(gained > 0.75 * promised, ridge / 10, ridge)
    raised = jnp.maximum(10 * ridge, 0.1 * jnp.abs(scale))
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
        converged |= values[-1] - values[-2] <= _STALLED
    moved = jnp.any(path[1:] != path[:-1], axis=1)
    info = RefinementInfo(
        path=path,
        log_joint=values,
        newton_decrement=decrement,
        converged=converged & factor.is_finite,
        is_pd=factor.is_pd,
        steps_used=jnp.sum(moved),
    )
    return jax.lax.stop_gradient(info)
