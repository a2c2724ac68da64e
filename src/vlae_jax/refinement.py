"""Mode search: from a first guess towards the maximum of one example's log joint."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int

from vlae_jax.densities import LogDensity
from vlae_jax.expansions import (
    Expansion,
    MatrixFreeExpansion,
    Quadratic,
    depend_on_data,
    exact_expansion,
)
from vlae_jax.factor import Factor, factorize
from vlae_jax.search_steps import (
    Evaluate,
    Local,
    hold_value,
    line_search_step,
    look_by_factor,
    look_by_products,
    look_by_scale,
    promises_more_than_rounding,
    trust_region_step,
)

Damping = Literal["paper", "line_search", "trust_region"]
Solver = Literal["auto", "cholesky", "cg"]

TOLERANCE = 1e-2
"""Newton decrement in nats, the estimated distance below the maximum, that counts as converged."""
SHORTFALL = 0.1
"""Share of the Newton decrement that a direction found by conjugate gradients may miss."""
_CG_LATENT = 24
"""Latent dimensions from which conjugate gradients cost less than forming the precision."""


class RefinementInfo(NamedTuple):
    """Path and result of one example's search. It carries no gradients."""

    iterates: Float[Array, "steps_and_one latent"]
    """The points visited, from the first guess to the mode. A search that ended early repeats its
    last point."""
    log_joint: Float[Array, " steps_and_one"]
    """The log joint at each of the `iterates`, nats."""
    newton_decrement: Float[Array, ""]
    """½ gᵀP⁻¹g at the mode, nats: how far it lies below the maximum of its quadratic model. P is
    the precision of the repair where that of the expansion is not positive definite; NaN where
    neither can be factored."""
    converged: Bool[Array, ""]
    """True in two cases: the decrement, plus a bound on the effect of rounding the point, is below
    0.01 nats and P is positive definite without a repair (at a minimum the gradient vanishes too);
    or `certify_kink` has certified a kink. A step without gain does not count as convergence."""
    is_pd: Bool[Array, ""]
    """Whether the precision at the mode was positive definite, before any repair."""
    steps_used: Int[Array, ""]
    """Number of steps that moved the point."""
    is_kink: Bool[Array, ""]
    """Whether `certify_kink` has certified the point to be a maximum at which the gradient jumps,
    as can happen with ReLU networks. False unless that function was called."""

    @property
    def is_mode(self) -> Bool[Array, ""]:
        """Whether the point is a maximum at which the gradient vanishes."""
        return self.converged & ~self.is_kink


@runtime_checkable
class Optimizer(Protocol):
    """An optax gradient transformation, or any object with the same two functions."""

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
    until_converged: bool = False,
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by damped steps z + α (P + λI)⁻¹∇ log p(x, z).

    With the Gauss-Newton precision of a ReLU decoder the full step leads to the closed-form
    posterior mean of the local linear model (probabilistic PCA). Depending on `expand`, the search
    is Newton's method, Fisher scoring or iteratively reweighted least squares.

    Args:
        expand: Expansion of one example's log joint.
        z_init: First guess, shape (latent,).
        num_steps: Steps T; 0 returns `z_init`.
        damping: "line_search" takes the best of α ∈ {0, 1/8, 1/4, 1/2, 1}; if none of them gains
            enough, it also tries α down to 2⁻¹⁴, and if these do not either, the next step has a
            larger ridge λ. "trust_region" (Levenberg-Marquardt) has α = 1 and takes only steps
            that raise the log joint, with a larger λ after each rejected step. In both the log
            joint never falls, and λ returns to 0 as steps succeed. "paper" takes
            α = 0.5/(t + 1), λ = 0.
        repair: Expansion whose precision is used for a step where that of `expand` is not
            positive definite. Without it such a step follows the gradient, and the next has a
            larger ridge; with damping "paper" such a step does not move.
        solver: How P⁻¹∇ is found. "cholesky" forms and factors P. "cg" (conjugate gradients)
            multiplies by P without forming it, until the direction has 90 % of the Newton
            decrement. That share is guaranteed for P ≥ I, as of a Gauss-Newton precision with a
            standard normal prior; where the search is differentiated, "cg" solves to rounding.
            Where P is indefinite it stops at the first direction of negative curvature, and needs
            no repair. "auto" takes "cg" if `expand` has products, z has at least 24 dimensions and
            damping is not "paper", whose steps should be exactly those of the paper.
        until_converged: Stop after the first step that began with a Newton decrement below 0.01
            nats, or when no further step can gain more than rounding; `num_steps` is then the
            largest number of steps. A batch under `vmap` takes as many as its slowest example.

    Returns:
        The mode (latent,) and the `RefinementInfo`.

    Raises:
        ValueError: While tracing, for a wrong `num_steps`, `damping` or shape.

    Gradients:
        Flow through every step into `z_init` and the parameters, with step sizes held constant.
        JAX cannot differentiate a search `until_converged` in reverse mode. `infer_posterior` has
        cheaper gradients, which work with such a search.

    References:
        Park, Kim and Kim (2019), section 3.1 and algorithm 1; Levenberg (1944); Marquardt (1963);
        Nocedal and Wright (2006), Numerical optimization, chapters 3 and 4.
    """
    search = newton_search(
        expand,
        z_init,
        num_steps=num_steps,
        damping=damping,
        repair=repair,
        solver=solver,
        shortfall=None,
        until_converged=until_converged,
    )
    return search.mode, search_info(search, *factorize(expand, search.mode, repair))


class Search(NamedTuple):
    """The result of a mode search, without the curvature at its end."""

    mode: Float[Array, " latent"]
    iterates: Float[Array, "steps latent"]
    """The point at which each step began."""
    log_joint: Float[Array, " steps"]
    """The log joint at each of the `iterates`, nats."""
    num_taken: int | Int[Array, ""]
    """Number of steps taken; later rows of `iterates` and `log_joint` are undefined."""


class _State(NamedTuple):
    """The state of a Newton search between two steps."""

    z: Float[Array, " latent"]
    ridge: Float[Array, ""]
    is_done: Bool[Array, ""]


def newton_search(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    num_steps: int,
    damping: Damping,
    repair: Expansion | None,
    solver: Solver,
    shortfall: float | None,
    until_converged: bool,
) -> Search:
    """Run the search of `newton_refine` without the expansion at the mode, left to the caller.

    `shortfall` is the share of the Newton decrement that a direction found by conjugate gradients
    may miss. None solves to rounding, as reverse mode through the search needs: it assumes that
    every direction is the exact solution.
    """
    _require_steps(num_steps)
    if damping not in get_args(Damping):
        raise ValueError(f"damping must be one of {get_args(Damping)}, got {damping!r}")
    z_init = depend_on_data(lambda z: expand(z).value, z_init)
    if shortfall is None:
        shortfall = 10 * float(jnp.finfo(z_init.dtype).eps)
    if _choose(solver, expand, z_init.size, damping) == "cg":
        matrix_free = cast(MatrixFreeExpansion, expand)
        look = functools.partial(look_by_products, matrix_free, shortfall)
    else:
        look = functools.partial(look_by_factor, expand, repair)
    return _search(look, hold_value(expand, z_init), z_init, num_steps, damping, until_converged)


def _search(
    look: Callable[[Array, Array], Local],
    evaluate: Evaluate,
    z_init: Float[Array, " latent"],
    num_steps: int,
    damping: Damping,
    until_converged: bool = False,
) -> Search:
    """Run steps in the directions of `look`, of lengths by `damping`."""
    move = line_search_step if damping == "line_search" else trust_region_step

    def step(state: Any, t: Array) -> Any:
        z, ridge, _ = state
        local = look(z, ridge)
        if damping == "paper":
            length = 0.5 / (t + 1).astype(z.dtype)
            moved = z + length * jnp.where(local.is_newton, local.direction, 0.0)
        else:
            moved, ridge = move(evaluate, z, local, ridge)
        is_there = local.is_pd & (state.ridge == 0)
        is_there &= 0.5 * local.grad @ local.direction <= TOLERANCE
        is_stuck = ~promises_more_than_rounding(local) & jnp.all(moved == z)
        return _State(moved, ridge, is_there | is_stuck), (z, local.value)

    first = _State(z_init, jnp.zeros_like(z_init[0]), jnp.zeros_like(z_init[0]) > 0)
    if until_converged:
        return _search_until_done(step, first, num_steps)
    last, (iterates, values) = jax.lax.scan(step, first, jnp.arange(num_steps))
    return Search(last.z, iterates, values, num_steps)


def _search_until_done(step: Callable, first: _State, num_steps: int) -> Search:
    """Run at most `num_steps` steps, and none after one that sets `is_done`."""
    rows = jnp.zeros((num_steps, 1), first.z.dtype)
    iterates = rows + jnp.zeros_like(first.z)[None]
    values = rows[:, 0] + jnp.zeros_like(first.ridge)[None]

    def goes_on(carry: Any) -> Array:
        t, state, _, _ = carry
        return (t < num_steps) & ~state.is_done

    def advance(carry: Any) -> Any:
        t, state, iterates, values = carry
        state, (z, value) = step(state, t)
        return t + 1, state, iterates.at[t].set(z), values.at[t].set(value)

    carry = (jnp.asarray(0), first, iterates, values)
    num_taken, last, iterates, values = jax.lax.while_loop(goes_on, advance, carry)
    return Search(last.z, iterates, values, num_taken)


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


def scaled_refine(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    scale: Float[Array, " latent"],
    num_steps: int,
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by steps along the gradient times `scale`, without any curvature.

    A step costs one gradient and the evaluations of its line search, that of `newton_refine`: the
    log joint never falls. The closer `scale` is to the posterior's variances, the further a step
    leads; the variances of a trained encoder are such a guess that costs nothing.

    Args:
        expand: Expansion of one example's log joint; only the `RefinementInfo` needs its precision.
        z_init: First guess, shape (latent,).
        scale: Positive guess of the posterior's variances, shape (latent,).
        num_steps: Steps T; 0 returns `z_init`.

    Returns:
        The mode (latent,) and the `RefinementInfo`. Its decrement and flags come from the precision
        at the mode, which the compiler removes if they are not used.

    Raises:
        ValueError: While tracing, for a wrong `num_steps` or shape.

    Gradients:
        Flow through every step into `z_init`, `scale` and the parameters, with step sizes held
        constant.
    """
    search = scaled_search(expand, z_init, scale=scale, num_steps=num_steps)
    return search.mode, search_info(search, *factorize(expand, search.mode))


def scaled_search(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    scale: Float[Array, " latent"],
    num_steps: int,
) -> Search:
    """Run the search of `scaled_refine` without the expansion at the mode, left to the caller."""
    _require_steps(num_steps)
    if scale.shape != z_init.shape:
        raise ValueError(f"scale must have the shape of z, {z_init.shape}, got {scale.shape}")
    z_init = depend_on_data(lambda z: expand(z).value, z_init)
    look = functools.partial(look_by_scale, expand, scale)
    return _search(look, hold_value(expand, z_init), z_init, num_steps, "line_search")


def _require_steps(num_steps: int) -> None:
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")


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
            which optax minimizes.
        num_steps: Steps T; 0 returns `z_init`.

    Returns:
        The mode (latent,) and the `RefinementInfo`. Its decrement and flags come from the exact
        Hessian at the mode, which the compiler removes if they are not used.

    Raises:
        ValueError: While tracing, for a wrong `num_steps` or shape.

    Gradients:
        Flow through every step, as far as the optimizer is differentiable.
    """
    _require_steps(num_steps)
    z_init = depend_on_data(log_joint, z_init)

    def energy(z: Array) -> Array:
        return -log_joint(z)

    wants_value = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(optimizer.update).parameters.values()
    )

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        z, state = carry
        value, grad = jax.value_and_grad(energy)(z)
        extra = {"value": value, "grad": grad, "value_fn": energy} if wants_value else {}
        update, state = optimizer.update(grad, state, z, **extra)
        return (z + update, state), (z, -value)

    state = optimizer.init(z_init)
    (mode, _), (iterates, values) = jax.lax.scan(step, (z_init, state), length=num_steps)
    search = Search(mode, iterates, values, num_steps)
    return mode, search_info(search, *factorize(exact_expansion(log_joint), mode))


def search_info(search: Search, quadratic: Quadratic, factor: Factor) -> RefinementInfo:
    """Build the `RefinementInfo` of a search from the expansion and factor at its mode."""
    mode, grad = search.mode, quadratic.grad
    step = cho_solve((factor.chol, True), grad)
    decrement = jnp.where(factor.is_finite, 0.5 * grad @ step, jnp.nan)
    # The mode is rounded to half a unit in its last place; this bounds the effect on the decrement.
    rounding = jnp.finfo(mode.dtype).eps * (factor.chol.T @ mode)
    is_small = decrement + 0.5 * rounding @ rounding <= TOLERANCE
    is_taken = jnp.arange(len(search.log_joint)) < search.num_taken
    iterates = jnp.where(is_taken[:, None], search.iterates, mode[None])
    iterates = jnp.concatenate([iterates, mode[None]])
    values = jnp.where(is_taken, search.log_joint, quadratic.value)
    info = RefinementInfo(
        iterates=iterates,
        log_joint=jnp.append(values, quadratic.value),
        newton_decrement=decrement,
        converged=is_small & factor.is_pd & jnp.isfinite(quadratic.value),
        is_pd=factor.is_pd,
        steps_used=jnp.sum(jnp.any(iterates[1:] != iterates[:-1], axis=1)),
        is_kink=jnp.zeros_like(factor.is_pd),
    )
    return jax.lax.stop_gradient(info)
