"""Bridges to other libraries: numpyro's models and distributions, Optimistix's mode searches.

This module is not needed to use those libraries together with this one: functions of z can be
passed to them directly (see `examples/`). Each library is imported by the function that uses it and
comes with the `interop` extra; `import vlae_jax` never imports this module.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from vlae_jax.densities import LogDensity
from vlae_jax.expansions import depend_on_data, exact_expansion
from vlae_jax.factor import factorize
from vlae_jax.inference import at_implicit_mode
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior
from vlae_jax.refinement import RefinementInfo, Search, search_info

if TYPE_CHECKING:
    from numpyro.distributions import Distribution
    from optimistix import AbstractMinimiser


def to_numpyro(posterior: GaussianPosterior | DiagonalPosterior) -> "Distribution":
    """Convert a posterior to a numpyro distribution, for models, guides, KLs and transforms.

    numpyro's `MultivariateNormal` keeps a lower factor S of the covariance, whichever matrix it is
    built from, and S is not the inverse of our factor L of the precision (L⁻ᵀ is upper). From
    `precision_matrix=` it would refactor the product LLᵀ, whose condition number is that of L
    squared. S⁻¹ is instead the triangle of a QR decomposition of Lᵀ with its columns reversed, and
    is inverted by one triangular solve: where a float32 L has a condition number of 1000 that is
    a hundred times as accurate.

    Args:
        posterior: The posterior of one example, or of a batch returned by `vmap`: leading axes, the
            same in both fields, become the distribution's batch shape. (A distribution that is
            itself returned by `vmap` does not know its batch shape; use `promote_batch_shape` of
            `numpyro.distributions.batch_util`.)

    Returns:
        A `MultivariateNormal`, or for a `DiagonalPosterior` a `Normal(...).to_event(1)`. Inside
        `jit` a NaN factor stays NaN, without affecting other examples.

    Raises:
        ImportError: Without numpyro.
        TypeError: For any other posterior.
        ValueError: By numpyro's validation, for a NaN factor outside `jit`.

    Gradients:
        Flow into the mean and the factor.
    """
    with _needed_from_the_extra():
        import numpyro.distributions as dist

    if isinstance(posterior, DiagonalPosterior):
        return dist.Normal(posterior.mean, jnp.exp(posterior.log_std)).to_event(1)
    if not isinstance(posterior, GaussianPosterior):
        raise TypeError(
            f"posterior must be a GaussianPosterior or a DiagonalPosterior, got {type(posterior)}"
        )
    factors = jnp.vectorize(_scale_tril, signature="(n,n)->(n,n)")
    return dist.MultivariateNormal(posterior.mean, scale_tril=factors(posterior.chol_precision))


def _scale_tril(chol_precision: Float[Array, "latent latent"]) -> Float[Array, "latent latent"]:
    """Return the lower triangular S with S Sᵀ = (LLᵀ)⁻¹.

    With J the reversal of order and Lᵀ J = Q R, LLᵀ = (JRJ)ᵀ(JRJ) and JRJ is lower: S⁻¹ up to the
    signs of its rows.
    """
    triangle = jnp.linalg.qr(chol_precision.T[:, ::-1], mode="r")[::-1, ::-1]
    triangle *= jnp.sign(jnp.diagonal(triangle))[:, None]
    return solve_triangular(triangle, jnp.eye(len(triangle), dtype=triangle.dtype), lower=True)


class FlatModel(NamedTuple):
    """A numpyro model with its data, as functions of one flat vector z."""

    log_joint: LogDensity
    """z of shape (latent,) → log p(data, z), nats, as a density of the unconstrained z."""
    z_init: Float[Array, " latent"]
    """Start of the search: the given values, or zeros, numpyro's feasible point."""
    constrain: Callable[[Float[Array, " latent"]], dict[str, Array]]
    """z → the value of every latent site on its own support, by name."""


def numpyro_log_joint(
    model: Callable[..., Any],
    *args: Any,
    init_values: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FlatModel:
    """Return the log density of a numpyro model as a function of a flat unconstrained z.

    Sites with a bounded support are mapped to the whole real line by numpyro's own bijections, with
    their log-Jacobians in the density. This is the space in which numpyro's NUTS and
    `AutoLaplaceApproximation` work. Dimensions are ordered by the names of the sites.

    Args:
        model: A function with numpyro's primitives. Its latent sites must be continuous.
        *args: Positional arguments of the model, observations included.
        init_values: The value of every latent site at which the search starts, by name, each on
            its own support. By default zeros of the unconstrained space, where the density of
            some models is 0.
        **kwargs: Keyword arguments of the model.

    Returns:
        The `FlatModel`, whose `log_joint` goes to `exact_expansion`.

    Raises:
        ImportError: Without numpyro.
        ValueError: If the model has no latent site, or `init_values` are not those of its latent
            sites.
        RuntimeError: If the density at `z_init` is not finite (checked only outside `jit`); then
            give a start by `init_values`.

    Gradients:
        Flow through z and the arguments.
    """
    with _needed_from_the_extra():
        from numpyro.infer import init_to_feasible, init_to_value
        from numpyro.infer.util import initialize_model

    latent = _latent_sites(model, args, kwargs)
    if not latent:
        raise ValueError("the model has no latent site: each of its samples is observed")
    if init_values is not None and set(init_values) != latent:
        raise ValueError(
            f"init_values must have a value for each of {sorted(latent)}, got {sorted(init_values)}"
        )
    start = init_to_feasible if init_values is None else init_to_value(values=dict(init_values))
    found = initialize_model(
        jax.random.key(0),  # the feasible point does not depend on it
        model,
        init_strategy=start,
        model_args=args,
        model_kwargs=kwargs,
        validate_grad=False,
    )
    z_init, unravel = ravel_pytree(found.param_info.z)
    return FlatModel(
        log_joint=lambda z: -found.potential_fn(unravel(z)),
        z_init=z_init,
        constrain=lambda z: found.postprocess_fn(unravel(z)),
    )


def _latent_sites(model: Callable[..., Any], args: Any, kwargs: Any) -> set[str]:
    from numpyro.handlers import seed, trace

    sites = trace(seed(model, jax.random.key(0))).get_trace(*args, **kwargs)
    return {
        name for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]
    }


def optimistix_refine(
    log_joint: LogDensity,
    z_init: Float[Array, " latent"],
    *,
    solver: "AbstractMinimiser",
    max_steps: int = 256,
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by a minimizer of Optimistix, until the minimizer reports convergence.

    Under `vmap` the batch takes as many steps as its slowest example, unlike `newton_refine` with a
    fixed number of steps.

    Args:
        log_joint: z of shape (latent,) → log p(x, z), a scalar in nats.
        z_init: First guess, shape (latent,).
        solver: An Optimistix minimizer, such as `optimistix.BFGS(rtol=1e-6, atol=1e-6)`. It is
            given -log p(x, z).
        max_steps: Largest number of steps, after which the search ends unconverged.

    Returns:
        The mode (latent,) and the `RefinementInfo`. A solver does not expose its iterates, so
        `iterates` and `log_joint` have two rows, for the first guess and the mode. `steps_used` is
        the solver's own count of its steps, rejected ones included. `converged` requires both that
        the solver reports success and a Newton decrement (by the exact Hessian) below 0.01 nats.
        No error is raised for an example that fails.

    Raises:
        ImportError: Without Optimistix.
        ValueError: While tracing, for a wrong `max_steps` or shape.

    Gradients:
        Flow implicitly, to first order, into whatever `log_joint` closes over, and not into
        `z_init`: dμ = P⁻¹ d∇ log p(x, μ) for the mode μ, P being minus the Hessian. They are
        correct where `converged`, and zero where P is not positive definite. The search is never
        differentiated: Optimistix's own implicit adjoint raises an error for the whole batch when
        one example's Hessian is singular.

    References:
        Nocedal and Wright (2006), Numerical Optimization, for the solvers; Rader, Lyons and Kidger
        (2024), Optimistix: modular optimization in JAX and Equinox.
    """
    with _needed_from_the_extra():
        import optimistix

    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    z_init = depend_on_data(log_joint, jax.lax.stop_gradient(z_init))
    pure, closed_over = jax.closure_convert(log_joint, z_init)
    held = jax.lax.stop_gradient(closed_over)  # so that differentiation never enters the search

    def held_log_joint(z: Array) -> Array:
        return pure(z, *held)

    found = optimistix.minimise(
        lambda z, held: -pure(z, *held), solver, z_init, held, max_steps=max_steps, throw=False
    )
    mode = jax.lax.stop_gradient(found.value)
    search = Search(mode, z_init[None], held_log_joint(z_init)[None], num_taken=1)
    expand = exact_expansion(log_joint)
    mode, (quadratic, factor) = at_implicit_mode(lambda z: factorize(expand, z), mode)
    info = search_info(search, quadratic, factor)
    info = info._replace(
        converged=info.converged & (found.result == optimistix.RESULTS.successful),
        steps_used=found.stats["num_steps"],
    )
    return mode, info


@contextlib.contextmanager
def _needed_from_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise ImportError(
            f"this needs {library}: pip install 'vlae-jax[interop]'", name=library
        ) from error
