"""The variational Gaussian against linear decoders, and optima found by quadrature and scipy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from problems import (
    FINITE_DIFFERENCE,
    INDEFINITE,
    LATENT,
    Network,
    assert_close,
    central_differences,
    flatten,
    indefinite_kernel,
    linear_gaussian,
    random_layers,
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
    assert not refine_linear(problem, start, num_samples=2, num_steps=0, size=1.0)[1].converged


# ---------------------------------------------------------------- the optimum


def counts(z):
    """Skewed and steep: a rate that is exponential in z, of as many counts as dimensions."""
    mixing = jnp.asarray([[1.5, 0.8], [-0.6, 1.0]], z.dtype)[: z.size, : z.size]
    x = jnp.asarray([1.0, 4.0], z.dtype)[: z.size]
    return poisson(x, mixing @ z) + standard_normal(z)


def quadrature_elbo(mean, chol_covariance) -> float:
    """By Gauss and Hermite, of 40 points a dimension, in float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    dim = len(mean)
    noise = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    weights = functools.reduce(np.multiply.outer, [weights] * dim).ravel() / (2 * np.pi) ** (
        dim / 2
    )
    values = counts_on(jnp.asarray(mean + noise @ chol_covariance.T))
    entropy = 0.5 * dim * np.log(2 * np.pi * np.e)
    return float(weights @ values) + entropy + np.sum(np.log(np.diag(chol_covariance)))


@jax.jit
def counts_on(points):
    return jax.vmap(counts)(points)


def best_gaussian(dim):
    """Mean and covariance of largest ELBO, and that ELBO."""

    def unpack(params):
        chol = np.zeros((dim, dim))
        chol[np.tril_indices(dim)] = params[dim:]
        chol[np.diag_indices(dim)] = np.exp(np.diag(chol))
        return params[:dim], chol

    found = scipy.optimize.minimize(
        lambda params: -quadrature_elbo(*unpack(params)),
        np.zeros(dim + dim * (dim + 1) // 2),
        options={"gtol": 1e-7},
    )
    mean, chol = unpack(found.x)
    return mean, chol @ chol.T, -found.fun


@functools.partial(jax.jit, static_argnames=("num_steps", "num_samples", "size"))
def refine_counts(start, *, num_steps, num_samples, size):
    return variational_refine(
        exact_expansion(counts),
        start,
        KEY,
        num_steps=num_steps,
        num_samples=num_samples,
        step_size=size,
        mean_step_size=size,
    )


@pytest.mark.parametrize("dim", [1, 2])
def test_the_optimum_is_that_of_quadrature(x64, dim):
    """And lies apart from Laplace's posterior, below whose ELBO it never falls."""
    mean, covariance, best = best_gaussian(dim)
    start, _ = infer_posterior(exact_expansion(counts), jnp.zeros(dim), num_steps=20)
    refined, info = refine_counts(start, num_steps=12, num_samples=4000, size=0.7)
    assert info.converged
    error = np.sqrt(2 * info.sampling_error)  # in standard deviations of the posterior
    assert 0 < error < 0.02
    off = np.linalg.solve(np.linalg.cholesky(covariance), refined.mean - mean)
    assert np.linalg.norm(off) < 5 * error
    assert_close(refined.covariance(), covariance, rtol=0.05)
    reached = quadrature_elbo(np.asarray(refined.mean), np.linalg.cholesky(refined.covariance()))
    assert best - 2e-4 < reached < best + 1e-6
    assert_close(info.elbo[-1], best, rtol=0.02)
    before = quadrature_elbo(np.asarray(start.mean), np.linalg.cholesky(start.covariance()))
    assert before < best - 0.01


def test_the_iteration_converges_to_rounding(x64):
    """With its samples held, whose error does not show in the decrements."""
    start, _ = infer_posterior(exact_expansion(counts), jnp.zeros(2), num_steps=20)
    _, info = refine_counts(start, num_steps=40, num_samples=8, size=0.7)
    assert info.smoothed_decrement < 1e-20 and info.precision_decrement < 1e-20
    assert info.sampling_error > 1e-4


# ---------------------------------------------------------------- steps that are too long


@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_elbo_does_not_fall_where_full_steps_would_overshoot(x64, num_samples):
    """From far below, where the rates say nothing: a Newton step there goes beyond all bounds."""
    start = GaussianPosterior(jnp.full(2, -6.0), jnp.eye(2))
    first, _ = refine_counts(start, num_steps=1, num_samples=num_samples, size=1.0)
    refined, info = refine_counts(start, num_steps=30, num_samples=num_samples, size=1.0)
    steps = np.diff(info.elbo)
    assert info.steps_used < 30  # some were refused
    # A pair has no standard error to fall by.
    assert np.all(steps >= (-1e-12 if num_samples == 2 else -0.05))
    assert info.converged and np.all(np.isfinite(flatten(first)))
    _, _, best = best_gaussian(2)
    reached = quadrature_elbo(np.asarray(refined.mean), np.linalg.cholesky(refined.covariance()))
    assert best - 0.5 < reached


def test_lack_of_progress_is_no_convergence(x64):
    """A log joint that can only fall beyond the samples at hand stays where it is, flagged."""
    start = GaussianPosterior(jnp.zeros(2), jnp.eye(2))

    def expand(z):  # promises what its value never keeps
        quadratic = exact_expansion(standard_normal)(z)
        return quadratic._replace(grad=quadratic.grad + 1.0)

    refined, info = variational_refine(expand, start, KEY, num_steps=2, num_samples=4)
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
            num_samples=8,
            repair=problem.stand_in(kernel, x) if repaired else None,
        )

    return jax.vmap(refine)(xs)


@pytest.mark.parametrize("repaired", [False, True])
def test_an_indefinite_mean_precision_is_flagged_and_finite(x64, repaired):
    problem = INDEFINITE["student_t"]
    xs = jnp.asarray(np.stack([problem.good_x, problem.bad_x]))
    for num_steps in (0, 1, 3):
        posterior, info = refine_indefinite(xs, num_steps=num_steps, repaired=repaired)
        assert np.all(np.isfinite(flatten(posterior)))
        assert np.all(np.isfinite(info.elbo)) and np.all(np.isfinite(info.decrements))
        if num_steps == 0:
            np.testing.assert_array_equal(info.is_pd, [True, False])
            assert not np.any(info.converged)


def ridge(z):
    """Two modes, at -2 and 2; the precision between them is negative, on average over a narrow q."""
    return jnp.logaddexp(-0.5 * (z[0] - 2) ** 2, -0.5 * (z[0] + 2) ** 2)


@jax.jit
def refine_ridge(start):
    return variational_refine(exact_expansion(ridge), start, KEY, num_steps=20, num_samples=2000)


def test_a_gaussian_too_narrow_for_where_it_is_widens(x64):
    """Until the mean precision is positive: mirrored samples keep it between the modes."""
    posterior, info = refine_ridge(GaussianPosterior(jnp.zeros(1), 10 * jnp.eye(1)))
    assert_close(posterior.mean, np.zeros(1), rtol=1e-8)
    assert info.is_pd and info.converged
    assert 1 < posterior.covariance()[0, 0] < 5  # the variance of both modes together


def test_a_factor_that_is_not_finite_stays_visible(x64):
    start = GaussianPosterior(jnp.zeros(1), jnp.full((1, 1), jnp.nan))
    posterior, info = refine_ridge(start)
    assert np.all(np.isnan(posterior.chol_precision)) and not info.converged and not info.is_pd


# ---------------------------------------------------------------- gradients and memory

NETWORK = Network("tanh", "gaussian")


def refine_network(layers, z, **options):
    return variational_refine(
        NETWORK.gauss_newton(layers),
        GaussianPosterior(z, 1.5 * jnp.eye(LATENT)),
        KEY,
        num_steps=2,
        num_samples=4,
        **options,
    )


def test_unrolled_gradients_are_those_of_differences_and_stopped_ones_zero(x64):
    point = random_layers(0), random_vector(1, LATENT)

    def outcome(point, gradient):
        return flatten(refine_network(*point, gradient=gradient)[0])

    unrolled = jax.jit(jax.jacrev(functools.partial(outcome, gradient="unroll")))(point)
    expected = central_differences(functools.partial(outcome, gradient="unroll"), point)
    assert_close(jax.vmap(flatten)(unrolled), expected, rtol=10 * FINITE_DIFFERENCE)
    stopped = jax.jit(jax.jacrev(functools.partial(outcome, gradient="stop")))(point)
    assert not np.any(flatten(stopped))


def test_samples_expanded_in_chunks_give_the_same(x64):
    layers, z = random_layers(0), random_vector(1, LATENT)
    whole = jax.jit(refine_network)(layers, z)
    chunked = jax.jit(functools.partial(refine_network, chunk_size=3))(layers, z)
    assert_close(chunked, jax.tree.map(np.asarray, whole))
