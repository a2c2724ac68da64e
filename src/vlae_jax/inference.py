"""The whole inference of one example: first guess → mode → precision → posterior."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from vlae_jax.expansions import (
    Expansion,
    Quadratic,
    depend_on_data,
    without_gradients,
)
from vlae_jax.factor import Factor, factorize
from vlae_jax.posterior import GaussianPosterior, posterior_from_factor
from vlae_jax.refinement import (
    SHORTFALL,
    Damping,
    RefinementInfo,
    Solver,
    newton_search,
    search_info,
)

Gradient = Literal["implicit", "stop", "unroll"]


def infer_posterior(
    expand: Expansion,
    z_init: Float[Array, " latent"],
    *,
    num_steps: int,
    damping: Damping = "line_search",
    gradient: Gradient = "implicit",
    repair: Expansion | None = None,
    solver: Solver = "auto",
    until_converged: bool = False,
) -> tuple[GaussianPosterior, RefinementInfo]:
    """Refine `z_init` to a mode of the log joint and take the Laplace posterior there.

    Args:
        expand: Expansion of one example's log joint; closes over the example and parameters.
        z_init: First guess, shape (latent,): an encoder's mean, or zeros.
        num_steps: Steps T of the search; with `until_converged` the largest number of them.
        damping: See `newton_refine`.
        gradient: How the mode μ is differentiated with respect to what `expand` closes over. The
            precision is differentiated in all three cases.

            - "implicit": dμ = P⁻¹ d∇ log p(x, μ), the derivative of one Newton step from μ. At a
              mode, with P the exact Hessian, that is the implicit function theorem. Memory does
              not grow with T. Where P is not positive definite, μ is constant, as with "stop".
            - "stop": μ is constant.
            - "unroll": differentiate the search. Only this one gives `z_init` a gradient.
        repair: Expansion whose precision replaces one that is not positive definite.
        solver: Linear solver for the steps of the search; see `newton_refine`. The precision at the
            mode is always formed, and factored once.
        until_converged: Stop the search once it has converged; see `newton_refine`. Not available
            with "unroll".

    Returns:
        The posterior and the `RefinementInfo`. Where the precision at the mode is neither positive
        definite nor repaired, the factor is NaN for this example alone and `info.is_pd` false.

    Raises:
        ValueError: While tracing, for an unknown `gradient`, for an unrolled search without a fixed
            number of steps, or for arguments that `newton_refine` rejects.

    References:
        Park, Kim and Kim (2019), algorithm 1 (gradient "unroll").
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {get_args(Gradient)}, got {gradient!r}")
    if until_converged and gradient == "unroll":
        raise ValueError(
            "a search until_converged cannot be differentiated step by step: choose gradient "
            "'implicit' or 'stop', or a fixed number of steps"
        )

    def curvature(z: Array) -> tuple[Quadratic, Factor]:
        return factorize(expand, z, repair)

    searched, searched_repair, shortfall = expand, repair, None
    if gradient != "unroll":
        z_init = depend_on_data(lambda z: expand(z).value, jax.lax.stop_gradient(z_init))
        searched, shortfall = without_gradients(expand, z_init), SHORTFALL
        searched_repair = None if repair is None else without_gradients(repair, z_init)
    search = newton_search(
        searched,
        z_init,
        num_steps=num_steps,
        damping=damping,
        repair=searched_repair,
        solver=solver,
        shortfall=shortfall,
        until_converged=until_converged,
    )
    if gradient == "implicit":
        mode, (quadratic, factor) = at_implicit_mode(curvature, search.mode)
    else:
        mode, (quadratic, factor) = search.mode, curvature(search.mode)
    return posterior_from_factor(mode, factor), search_info(search, quadratic, factor)


def at_implicit_mode(
    curvature: Callable[[Array], tuple[Quadratic, Factor]], mode: Float[Array, " latent"]
) -> tuple[Float[Array, " latent"], tuple[Quadratic, Factor]]:
    """Return the mode and the curvature there, the mode with its implicit derivative.

    That derivative is with respect to what `curvature` closes over, of any order. One evaluation of
    the curvature gives the value, the factor for the solve and, linearized, the whole first
    derivative.
    """
    # `jax.closure_convert` leaves behind what cannot have a derivative, as counts; under nested
    # transformations that escapes its trace.
    closed, shapes = jax.make_jaxpr(curvature, return_shape=True)(mode)
    # What is closed over may not be reachable from the functions below, or tracers leak.
    jaxpr, consts, tree = closed.jaxpr, closed.consts, jax.tree.structure(shapes)
    is_float = [jnp.issubdtype(const.dtype, jnp.floating) for const in consts]

    def split(consts: list[Any]) -> tuple[list[Any], list[Any]]:
        floats = [const for const, flag in zip(consts, is_float, strict=True) if flag]
        return floats, [const for const, flag in zip(consts, is_float, strict=True) if not flag]

    def pure(mode: Array, floats: list[Any], others: list[Any]) -> Any:
        left = {True: iter(floats), False: iter(others)}
        whole = ClosedJaxpr(jaxpr, [next(left[flag]) for flag in is_float])
        return jax.tree.unflatten(tree, jaxpr_as_fun(whole)(mode))

    @jax.custom_jvp
    def followed(mode: Array, floats: list[Any], others: list[Any]) -> Array:
        """The mode itself, with its derivatives: those of the derivative below are taken by it."""
        return mode

    @jax.custom_jvp
    def at_mode(mode: Array, floats: list[Any], others: list[Any]) -> Any:
        return mode, pure(mode, floats, others)

    @at_mode.defjvp
    def at_mode_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        mode, floats, others = primals
        mode = followed(mode, floats, others)
        at, push = jax.linearize(lambda z, floats: pure(z, floats, others), mode, floats)
        _, factor = at
        quadratic_dot, _ = push(jnp.zeros_like(mode), tangents[1])
        step = cho_solve((factor.chol, True), quadratic_dot.grad)
        # With the factor of a repaired precision the step is not the derivative of the mode, and
        # training with it was seen to diverge.
        mode_dot = jnp.where(factor.is_pd, step, 0.0)
        return (mode, at), (mode_dot, push(mode_dot, tangents[1]))

    @followed.defjvp
    def followed_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
        (mode, _), (mode_dot, _) = at_mode_jvp(primals, tangents)
        return mode, mode_dot

    return at_mode(mode, *split(consts))
