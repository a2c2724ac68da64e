"""Samples of the Laplace posterior whose gradients need no derivative of the precision matrix."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vlae_jax.conjugate_gradients import log_det_by_solve, solve_scaled
from vlae_jax.expansions import MatrixFreeExpansion, depend_on_data, without_gradients
from vlae_jax.factor import factorize
from vlae_jax.inference import Gradient
from vlae_jax.posterior import LOG_2PI, solve_factor
from vlae_jax.refinement import Solver

_CG_LATENT = 64
"""Latent dimensions from which conjugate gradients cost less than forming the precision."""


class LaplaceSample(NamedTuple):
    """One sample of the Laplace posterior N(mode, P⁻¹)."""

    z: Float[Array, " latent"]
    """The sample, (latent,)."""
    log_q: Float[Array, ""]
    """Its log density, nats; by conjugate gradients an estimate, with that of ½ log det P."""
    mode: Float[Array, " latent"]
    """The posterior's center."""
    log_det: Float[Array, ""]
    """log det P, or an estimate of it. It carries no gradients."""
    is_solved: Bool[Array, ""]
    """Whether P could be factored, or conjugate gradients have met the tolerance. Only then the
    sample has the posterior's covariance."""
    num_products: Int[Array, ""]
    """Number of products with P that conjugate gradients took for the sample."""

    def sample_and_log_prob(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        """Return the sample with its log density; the same whatever the key."""
        return self.z, self.log_q


def laplace_sample(
    key: PRNGKeyArray,
    expand: MatrixFreeExpansion,
    mode: Float[Array, " latent"],
    *,
    scale: Float[Array, " latent"] | None = None,
    gradient: Gradient = "implicit",
    solver: Solver = "auto",
    tolerance: float = 0.1,
    max_products: int = 30,
) -> LaplaceSample:
    """Draw a sample of N(mode, P⁻¹) at a fraction of the price of differentiating P.

    Reverse mode passes two products with P where `laplace_posterior` differentiates the matrix
    through all columns of the decoder's Jacobian. With solver "cg" the matrix is not formed in
    forward mode either: for a noise b with covariance P, the solution s of P s = b has covariance
    P⁻¹. Conjugate gradients give s, and from their coefficients an estimate of log det P. A product
    costs one forward and one backward pass of the decoder, and the memory does not grow with the
    latent dimensions times the decoder.

    Args:
        key: Random key.
        expand: Expansion of one example's log joint, with products; with solver "cg" also with a
            noise, as `gauss_newton_expansion` and `affine_head_expansion` have.
        mode: Mode of the log joint, shape (latent,).
        scale: Positive guess of the diagonal of P⁻¹, (latent,), which saves products: an encoder's
            variances. By default ones.
        gradient: How the mode is differentiated: see `infer_posterior`. "unroll" takes the
            gradients that `mode` brings along.
        solver: "cholesky" forms P and factors it. "cg" has conjugate gradients solve for the
            sample and again in reverse mode. "auto" takes "cg" from 64 latent dimensions on.
        tolerance: With "cg", size of the residual of P s = b, relative to that of b, at which s
            counts as solved. Both are measured in units of their standard deviation by `scale`.
        max_products: With "cg", the largest number of products of each solve.

    Returns:
        The sample. It is a `Posterior` of that sample alone, so that `elbo` with one sample takes
        it. NaN where P could not be factored, or the noise not be drawn.

    Raises:
        ValueError: While tracing, for an unknown `gradient` or `solver`, a wrong shape, tolerance
            or count, or an expansion that lacks what the solver needs.

    Gradients:
        Flow through `expand`. They are not those of the one sample but have the same mean, over
        keys: a small change dP moves the sample by -½ P⁻¹ dP s, which keeps the covariance P⁻¹
        and needs no derivative of a factor, and ½ log det P changes by ½ sᵀ dP s. So gradients of
        E[f(z)] and of the ELBO are unbiased, with "cg" as far as its solutions are exact. `scale`
        has none.

    References:
        Papandreou and Yuille (2010), Gaussian sampling by local perturbations; Hutchinson (1990), A
        stochastic estimator of the trace of the influence matrix.
    """
    _require(expand, mode, gradient, solver, tolerance, max_products)
    scale = jax.lax.stop_gradient(jnp.ones_like(mode) if scale is None else scale)
    if scale.shape != mode.shape:
        raise ValueError(f"scale must have the shape of the mode, {mode.shape}, got {scale.shape}")
    if gradient != "unroll":
        mode = jax.lax.stop_gradient(mode)
    mode = depend_on_data(lambda z: expand.products(z).value, mode)
    held = cast(MatrixFreeExpansion, without_gradients(expand, mode))
    if solver == "cholesky" or (solver == "auto" and mode.size < _CG_LATENT):
        drawn = _draw_by_factor(key, held, jax.lax.stop_gradient(mode))
    else:
        drawn = _draw_by_products(
            key, held, jax.lax.stop_gradient(mode), scale, tolerance, max_products
        )
    s, log_det = jax.lax.stop_gradient((drawn.s, drawn.log_det))

    live = expand.products(mode)
    moved = live.times(s)
    center, drift, turn = mode, jnp.zeros_like(mode), gradient_alone(moved)
    if gradient == "implicit":
        drift = gradient_alone(live.grad)
        shift = drawn.divide(drift)
        center = mode + shift
        # The precision at the moving mode. Where it is constant in z, nothing of this is left, and
        # one solve of reverse mode serves the mode and the sample.
        turn += jax.jvp(lambda z: held.products(z).times(s), (mode,), (shift,))[1]
    z = jax.lax.stop_gradient(mode + s) + gradient_alone(mode) + drawn.divide(drift - 0.5 * turn)
    square = jax.lax.stop_gradient(s @ moved)
    log_q = 0.5 * (log_det - mode.size * LOG_2PI - square + s @ turn)
    return LaplaceSample(z, log_q, center, log_det, drawn.is_solved, drawn.num_products)


def gradient_alone(value: Array) -> Array:
    """Zero, with the derivative of `value`."""
    return value - jax.lax.stop_gradient(value)


class _Drawn(NamedTuple):
    """A draw s of N(0, P⁻¹), usable within one trace."""

    s: Float[Array, " latent"]
    log_det: Float[Array, ""]
    divide: Callable[[Float[Array, " latent"]], Float[Array, " latent"]]
    """v → P⁻¹ v. It is given zeros, and needed for their tangents and cotangents."""
    is_solved: Bool[Array, ""]
    num_products: Int[Array, ""]


def _draw_by_factor(
    key: PRNGKeyArray, held: MatrixFreeExpansion, mode: Float[Array, " latent"]
) -> _Drawn:
    _, factor = factorize(held, mode)
    chol = factor.chol
    normals = jax.random.normal(key, mode.shape, mode.dtype)
    s = jnp.where(factor.is_finite, solve_factor(chol, normals, transpose=True), jnp.nan)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(chol)))

    def divide(rhs: Array) -> Array:
        return cho_solve((chol, True), rhs)

    return _Drawn(s, log_det, divide, factor.is_finite, jnp.zeros((), int))


def _draw_by_products(
    key: PRNGKeyArray,
    held: MatrixFreeExpansion,
    mode: Float[Array, " latent"],
    scale: Float[Array, " latent"],
    tolerance: float,
    max_products: int,
) -> _Drawn:
    at = held.products(mode)
    solve = functools.partial(
        solve_scaled, scale=scale, tolerance=tolerance, max_products=max_products
    )
    noise = cast(Callable[[PRNGKeyArray], Array], at.noise)(key)
    solved = solve(at.times, noise)
    s = jnp.where(jnp.isfinite(noise), solved.solution, jnp.nan)
    product = at.times(s)

    def divide(rhs: Array) -> Array:
        def solve_from_sample(times: Callable[[Array], Array], rhs: Array) -> Array:
            # In the quadratic model of the log joint its gradient at the sample is -P s.
            return solve(times, rhs, guess=(s, product)).solution

        return jax.lax.custom_linear_solve(at.times, rhs, solve_from_sample, symmetric=True)

    log_det = log_det_by_solve(solved, scale)
    return _Drawn(s, log_det, divide, solved.is_solved, solved.num_products)


def _require(
    expand: MatrixFreeExpansion,
    mode: Float[Array, " latent"],
    gradient: Gradient,
    solver: Solver,
    tolerance: float,
    max_products: int,
) -> None:
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {get_args(Gradient)}, got {gradient!r}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
    if not 0 < tolerance < 1 or max_products < 1:
        raise ValueError(
            "tolerance must lie between 0 and 1 and max_products be at least 1, got "
            f"{tolerance} and {max_products}"
        )
    if not hasattr(expand, "products"):
        raise ValueError(
            "laplace_sample needs an expansion with a method `products`, as those of vlae_jax have "
            "and `MatrixFreeExpansion` gives to any other"
        )
    by_products = solver == "cg" or (solver == "auto" and mode.size >= _CG_LATENT)
    if by_products and expand.products(mode).noise is None:
        raise ValueError(
            "this expansion cannot draw noise with the covariance of its precision: take "
            "gauss_newton_expansion or affine_head_expansion, give its `Products` a noise, or "
            "choose solver 'cholesky'"
        )
