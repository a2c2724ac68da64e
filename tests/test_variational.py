"""The variational Gaussian against linear decoders, and optima found by quadrature and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from problems import (
    FINITE_DIFFERENCE,
    INDEFINITE,
    LATENT,
    assert_close,
    central_differences,
    flatten,
    indefinite_kernel,
    linear_gaussian,
    random_vector,
)

from vlae_jax import (
    DiagonalPosterior,
    GaussianPosterior,
    exact_expansion,
    infer_posterior,
    poisson,
    standard_normal,
    variational_refine,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)

# ---------------------------------------------------------------- linear decoders


@functools.partial(jax.jit, static_argnames=("num_samples", "num_steps", "size"))
def refine_linear(problem, start, *, num_samples, num_steps, size):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        return variational_refine(
            exact_expansion(problem.log_joint),
            start,
            KEY,
            num_steps=num_steps,
            num_samples=num_samples,
            step_size=size,
            mean_step_size=size,
        )


@pytest.mark.parametrize("num_samples", [2, 6])
def test_the_posterior_of_a_linear_decoder_is_left_as_it_is(dtype, num_samples):
    """However few the samples; the ELBO of each step is the evidence."""
    problem, truth = linear_gaussian(0, dtype, per_pixel=True)
    chol = np.linalg.cholesky(np.linalg.inv(truth.covariance))
    start = GaussianPosterior(jnp.asarray(truth.mode, dtype), jnp.asarray(chol, dtype))
    refined, info = refine_linear(problem, start, num_samples=num_samples, num_steps=3, size=0.5)
    assert_close(refined, jax.tree.map(np.asarray, start))
    assert_close(info.elbo, np.full(4, truth.log_evidence))
    assert info.converged and info.is_pd
    assert info.smoothed_decrement < 1e-8 and info.precision_decrement < 1e-8


@pytest.mark.parametrize("num_samples", [2, 6])
def test_one_full_step_finds_the_posterior_of_a_linear_decoder(dtype, num_samples):
    """From any Gaussian."""
    problem, truth = linear_gaussian(1, dtype, per_pixel=False)
    start = DiagonalPosterior(random_vector(5, LATENT, dtype), jnp.asarray([1.0, -1.0, 0.5], dtype))
    refined, info = refine_linear(problem, start, num_samples=num_samples, num_steps=1, size=1.0)
    assert_close(refined.mean, truth.mode, rtol=1e-4 if dtype is jnp.float32 else None)
    assert_close(
        refined.covariance(), truth.covariance, rtol=1e-4 if dtype is jnp.float32 else None
    )
    assert info.converged and info.steps_used == 1
    assert info.decrements[0] > 0.01


# ---------------------------------------------------------------- the optimum


def counts(z):
    """Skewed and steep: a rate that is exponential in z, of as many counts as dimensions."""
    mixing = jnp.asarray([[1.5, 0.8], [-0.6, 1.0]], z.dtype)[: z.size, : z.size]
    x = jnp.asarray([1.0, 4.0], z.dtype)[: z.size]
    return poisson(x, mixing @ z) + standard_normal(z)


@jax.jit
def counts_on(points):
    return jax.vmap(counts)(points)


def quadrature_elbo(mean, covariance) -> float:
    """By Gauss and Hermite, of 40 points a dimension, in float64."""
    dim, chol = len(mean), np.linalg.cholesky(covariance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    noise = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    weights = functools.reduce(np.multiply.outer, [weights / np.sqrt(2 * np.pi)] * dim).ravel()
    values = np.asarray(counts_on(jnp.asarray(mean + noise @ chol.T)))
    log_det = 2 * np.sum(np.log(np.diag(chol)))
    return weights @ values + 0.5 * (dim * np.log(2 * np.pi * np.e) + log_det)


def best_gaussian(dim):
    """Mean and covariance of largest ELBO, and that ELBO."""

    def unpack(params):
        chol = np.zeros((dim, dim))
        chol[np.tril_indices(dim)] = params[dim:]
        chol[np.diag_indices(dim)] = np.exp(np.diag(chol))
        return params[:dim], chol @ chol.T

    found = scipy.optimize.minimize(
        lambda params: -quadrature_elbo(*unpack(params)),
        np.zeros(dim + dim * (dim + 1) // 2),
        options={"gtol": 1e-7},
    )
    return *unpack(found.x), -found.fun


def moments(posterior):
    chol = np.asarray(posterior.chol_precision)
    return np.asarray(posterior.mean), np.linalg.inv(chol @ chol.T)


@functools.partial(jax.jit, static_argnames=("num_steps", "num_samples", "size"))
def refine_counts(start, *, num_steps, num_samples, size):
    """From Laplace's posterior, found from the start's mean, or from the start itself."""
    expand = exact_expansion(counts)
    if not isinstance(start, GaussianPosterior):
        start, _ = infer_posterior(expand, start, num_steps=10)
    sizes = {"step_size": size, "mean_step_size": size}
    return start, *variational_refine(
        expand, start, KEY, num_steps=num_steps, num_samples=num_samples, **sizes
    )


@pytest.mark.parametrize("dim", [1, 2])
def test_the_optimum_is_that_of_quadrature(x64, dim):
    """And lies apart from Laplace's posterior. It is found to rounding, for its samples."""
    mean, covariance, best = best_gaussian(dim)
    start, refined, info = refine_counts(jnp.zeros(dim), num_steps=40, num_samples=4000, size=0.7)
    assert info.converged
    assert info.smoothed_decrement < 1e-20 and info.precision_decrement < 1e-20
    error = np.sqrt(2 * info.sampling_error)  # in standard deviations of the posterior
    assert 1e-3 < error < 0.02
    found_mean, found_covariance = moments(refined)
    off = np.linalg.solve(np.linalg.cholesky(covariance), found_mean - mean)
    assert np.linalg.norm(off) < 5 * error
    assert_close(found_covariance, covariance, rtol=0.05)
    assert best - 2e-4 < quadrature_elbo(found_mean, found_covariance) < best + 1e-6
    assert_close(info.elbo[-1], best, rtol=0.02)
    assert quadrature_elbo(*moments(start)) < best - 0.01


# ---------------------------------------------------------------- steps that are too long


@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_elbo_does_not_fall_where_full_steps_would_overshoot(x64, num_samples):
    """From far below, where the rates say nothing: a Newton step there goes beyond all bounds."""
    start = GaussianPosterior(jnp.full(2, -6.0), jnp.eye(2))
    _, refined, info = refine_counts(start, num_steps=30, num_samples=num_samples, size=1.0)
    assert info.steps_used < 30  # some were refused
    # A pair has no standard error to fall by.
    assert np.all(np.diff(info.elbo) >= (-1e-12 if num_samples == 2 else -0.05))
    assert info.converged
    assert quadrature_elbo(*moments(refined)) > best_gaussian(2)[2] - 0.5


def test_lack_of_progress_is_no_convergence(x64):
    """Where no step gains, the Gaussian stays where it is, and is flagged."""
    start = GaussianPosterior(jnp.zeros(2), jnp.eye(2))

    def expand(z):  # promises what its value never keeps
        quadratic = exact_expansion(standard_normal)(z)
        return quadratic._replace(grad=quadratic.grad + 1.0)

    refined, info = jax.jit(
        lambda start: variational_refine(expand, start, KEY, num_steps=2, num_samples=4)
    )(start)
    assert not info.converged and info.smoothed_decrement > 0.3
    assert info.steps_used == 0
    assert_close(refined, jax.tree.map(np.asarray, start))


# ---------------------------------------------------------------- indefinite precisions


@functools.partial(jax.jit, static_argnames=("num_steps", "repaired"))
def refine_indefinite(xs, *, num_steps, repaired):
    """Narrow Gaussians at 0, where the second example's precision is indefinite."""
    problem, kernel = INDEFINITE["student_t"], indefinite_kernel()
    start = GaussianPosterior(jnp.zeros(LATENT), 20 * jnp.eye(LATENT))

    def refine(x):
        return variational_refine(
            exact_expansion(functools.partial(problem.log_joint, kernel, x)),
            start,
            KEY,
            num_steps=num_steps,
            num_samples=4,
            repair=problem.stand_in(kernel, x) if repaired else None,
        )

    return jax.vmap(refine)(xs)


def good_and_bad():
    problem = INDEFINITE["student_t"]
    return jnp.asarray(np.stack([problem.good_x, problem.bad_x]))


def test_an_indefinite_mean_precision_is_flagged_for_its_example_alone(x64):
    _, info = refine_indefinite(good_and_bad(), num_steps=0, repaired=False)
    np.testing.assert_array_equal(info.is_pd, [True, False])
    assert not np.any(info.converged)


@pytest.mark.parametrize("repaired", [False, True])
def test_steps_from_an_indefinite_mean_precision_are_finite_and_gain(x64, repaired):
    posterior, info = refine_indefinite(good_and_bad(), num_steps=2, repaired=repaired)
    assert np.all(np.isfinite(flatten(posterior)))
    assert np.all(np.isfinite(info.elbo)) and np.all(np.isfinite(info.decrements))
    assert np.all(info.elbo[:, -1] > info.elbo[:, 0] + 0.1)
    assert np.all(info.steps_used > 0)


def between_modes(z):
    """Two modes, at -2 and 2; between them the precision is negative."""
    return jnp.logaddexp(-0.5 * (z[0] - 2) ** 2, -0.5 * (z[0] + 2) ** 2)


@jax.jit
def refine_between(start):
    expand = exact_expansion(between_modes)
    return variational_refine(expand, start, KEY, num_steps=15, num_samples=2000)


def test_a_gaussian_too_narrow_for_where_it_is_widens(x64):
    """Until the mean precision is positive: mirrored samples keep it between the modes."""
    posterior, info = refine_between(GaussianPosterior(jnp.zeros(1), 10 * jnp.eye(1)))
    assert abs(posterior.mean[0]) < 1e-10
    assert info.is_pd and info.converged
    grid = np.linspace(-12, 12, 4001)
    values = np.logaddexp(-0.5 * (grid - 2) ** 2, -0.5 * (grid + 2) ** 2)

    def loss(std):
        return -np.trapezoid(scipy.stats.norm.pdf(grid, 0, std) * values, grid) - np.log(std)

    best = scipy.optimize.minimize_scalar(loss, bounds=(1.0, 4.0), method="bounded").x
    assert_close(1 / posterior.chol_precision[0, 0], best, rtol=0.05)


def test_a_factor_that_is_not_finite_stays_visible(x64):
    start = GaussianPosterior(jnp.zeros(1), jnp.full((1, 1), jnp.nan))
    posterior, info = refine_between(start)
    assert np.all(np.isnan(posterior.chol_precision)) and not info.converged and not info.is_pd


# ---------------------------------------------------------------- gradients and memory


def refine_smooth(point, **options):
    """Of a log joint with a parameter, and from a mean."""
    parameter, mean = point

    def log_joint(z):
        return standard_normal(z) - jnp.exp(parameter) * jnp.sum(jnp.log(jnp.cosh(z - parameter)))

    start = GaussianPosterior(mean, jnp.asarray([[1.5, 0.0], [0.4, 1.2]]))
    expand = exact_expansion(log_joint)
    return variational_refine(expand, start, KEY, num_steps=2, num_samples=4, **options)


POINT = 0.3, np.array([1.2, -0.7])


def test_unrolled_gradients_are_those_of_differences_and_stopped_ones_zero(x64):
    point = jax.tree.map(jnp.asarray, POINT)

    def outcome(point, gradient="unroll"):
        return flatten(refine_smooth(point, gradient=gradient)[0])

    @jax.jit
    def differentiate(point):
        stopped = functools.partial(outcome, gradient="stop")
        return jax.jacrev(outcome)(point), jax.jvp(stopped, (point,), (point,))[1]

    unrolled, stopped = differentiate(point)
    expected = central_differences(outcome, point)
    assert_close(jax.vmap(flatten)(unrolled), expected, rtol=FINITE_DIFFERENCE)
    assert np.all(np.any(expected[[0, 1, 2, 4, 5]] != 0, axis=1))
    assert not np.any(stopped)


def test_samples_expanded_in_chunks_give_the_same(x64):
    @jax.jit
    def both(point):
        return refine_smooth(point), refine_smooth(point, chunk_size=3)

    whole, chunked = both(jax.tree.map(jnp.asarray, POINT))
    assert_close(chunked, jax.tree.map(np.asarray, whole))
