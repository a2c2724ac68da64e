"""The whole inference of one example: first guess → mode → precision → posterior."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
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

    That derivative is with respect to what `curvature` closes over. One evaluation of the curvature
    gives the value, the factor for the solve and, linearized, the whole derivative.
    """
    pure, closed_over = jax.closure_convert(curvature, mode)

    @jax.custom_jvp
    def at_mode(mode: Array, closed_over: Any) -> tuple[Array, tuple[Quadratic, Factor]]:
        return mode, pure(mode, *closed_over)

    @at_mode.defjvp
    def at_mode_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        mode, closed_over = primals
        _, closed_over_dot = tangents
        at, push = jax.linearize(lambda z, consts: pure(z, *consts), mode, closed_over)
        (_, factor) = at
        quadratic_dot, _ = push(jnp.zeros_like(mode), closed_over_dot)
        step = cho_solve((factor.chol, True), quadratic_dot.grad)
        # With the factor of a repaired precision the step is not the derivative of the mode, and
        # training with it was seen to diverge.
        mode_dot = jnp.where(factor.is_pd, step, 0.0)
        return (mode, at), (mode_dot, push(mode_dot, closed_over_dot))

    return at_mode(mode, closed_over)
