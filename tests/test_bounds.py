"""Bounds against the evidence of linear decoders, quadrature, and plain sums over samples."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import scipy.special
from problems import LATENT, TOLERANCES, assert_close, flatten, random_vector

from vlae_jax import (
    DiagonalPosterior,
    GaussianPosterior,
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    importance_weighted_log_prob,
    laplace_evidence,
    laplace_posterior,
    newton_refine,
    standard_normal,
)
from vlae_jax.bounds import iwae_bound

pytestmark = pytest.mark.usefixtures("quick_compile")

# ---------------------------------------------------------------- linear decoders


@jax.jit
def bound_linear(keys, problem):
    """One step, then every bound, by each expansion and over several keys."""
    bounds, evidences = {}, {}
    for name, expand in problem.expansions().items():
        mode, _ = newton_refine(expand, problem.z_init, num_steps=1)
        posterior = laplace_posterior(expand, mode)
        bounds[name] = jax.vmap(lambda key, q=posterior: elbo(key, problem.log_joint, q))(keys)
        evidences[name] = laplace_evidence(expand, mode)
    weighted = [
        importance_weighted_log_prob(
            keys[0], problem.log_joint, posterior, num_samples=num_samples, chunk_size=25
        )
        for num_samples in (1, 64)
    ]
    return bounds, evidences, *weighted


def test_every_single_sample_gives_the_evidence_of_a_linear_decoder(linear_gaussian):
    """The posterior is exact, so p(x, z) / q(z) is p(x), whatever z."""
    problem, truth = linear_gaussian
    keys = jax.random.split(jax.random.key(0), 16)
    bounds, evidences, (log_prob, _), _ = bound_linear(keys, problem)
    for name in problem.expansions():
        for bound in bounds[name]:
            assert_close(bound, truth.log_evidence)
        assert_close(evidences[name], truth.log_evidence)
    assert_close(log_prob, truth.log_evidence)


def test_exact_weights_have_full_sample_size_and_no_standard_error(linear_gaussian):
    """The error's square is a difference of two roundings of the size of log p(x)."""
    problem, truth = linear_gaussian
    keys = jax.random.split(jax.random.key(0), 16)
    for num_samples, (log_prob, info) in zip((1, 64), bound_linear(keys, problem)[2:], strict=True):
        assert_close(log_prob, truth.log_evidence)
        assert_close(info.elbo, truth.log_evidence)
        assert_close(info.ess, np.float64(num_samples), rtol=10 * TOLERANCES[log_prob.dtype])
        rounding = np.finfo(log_prob.dtype).eps * abs(truth.log_evidence)
        assert info.standard_error < 3 * np.sqrt(rounding / num_samples)


# ---------------------------------------------------------------- a posterior that does not fit


def log_joint(z):
    """Not normalized, not Gaussian, and separable: its evidence is a product of integrals."""
    return standard_normal(z) - jnp.sum(jnp.log(jnp.cosh(z - 0.5)))


def true_log_evidence() -> float:
    grid = np.linspace(-12, 12, 20_001)
    density = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi) / np.cosh(grid - 0.5)
    return LATENT * float(np.log(np.trapezoid(density, grid)))


def proposal(dtype=float):
    """Wide enough that the weights have a variance, away from the mode."""
    return DiagonalPosterior(jnp.full(LATENT, 0.4, dtype), jnp.full(LATENT, 0.1, dtype))


NUM_SAMPLES = 30
KEY = jax.random.key(5)


@jax.jit
def weigh_samples(key):
    """Naively, by the ELBO, and streaming in chunks; sample k uses `fold_in(key, k)`."""

    def log_weight(k):
        z, _ = proposal().sample_and_log_prob(jax.random.fold_in(key, k))
        return log_joint(z) - proposal().log_prob(z)

    streamed = [
        importance_weighted_log_prob(
            key, log_joint, proposal(), num_samples=NUM_SAMPLES, chunk_size=chunk_size
        )
        for chunk_size in (1, 7, NUM_SAMPLES, 100)
    ]
    logs = jax.vmap(log_weight)(jnp.arange(NUM_SAMPLES))
    return logs, elbo(key, log_joint, proposal(), num_samples=NUM_SAMPLES), streamed


def test_streaming_equals_the_naive_sums_for_any_chunk_size(x64):
    """The same samples, by their keys; estimate, sample size, error, ELBO and tail by formulas."""
    logs, bound, streamed = weigh_samples(jax.random.key(3))
    weights = np.exp(np.asarray(logs))
    relative_variance = np.mean((weights / np.mean(weights) - 1) ** 2) / NUM_SAMPLES
    assert_close(bound, np.mean(logs))
    for estimate, info in streamed:
        assert_close(estimate, np.log(np.mean(weights)))
        assert_close(info.ess, np.sum(weights) ** 2 / np.sum(weights**2))
        assert_close(info.standard_error, np.sqrt(relative_variance))
        assert_close(info.elbo, np.mean(logs))
        # A fifth of the weights, and the next.
        assert_close(info.largest, np.sort(logs)[: -(NUM_SAMPLES // 5) - 2 : -1])


@jax.jit
def weigh_spoiled(key, sample, value, shift=0.0):
    """Ten samples in chunks of four, the weight of one of them replaced."""
    z_bad, _ = proposal().sample_and_log_prob(jax.random.fold_in(key, sample))

    def spoiled(z):
        is_bad = jnp.all(jnp.abs(z - z_bad) < 1e-9)
        return jnp.where(is_bad, value, log_joint(z) + shift)

    return importance_weighted_log_prob(key, spoiled, proposal(), num_samples=10, chunk_size=4)


def test_samples_beyond_the_last_do_not_count(x64):
    """The eleventh and twelfth fill the last chunk: their NaN changes no number."""
    key = jax.random.key(3)
    clean = weigh_spoiled(key, 99, 0.0)
    for sample in (10, 11):
        assert_close(weigh_spoiled(key, sample, np.nan), clean)


@pytest.mark.parametrize("value", [np.nan, np.copysign(np.nan, -1), np.inf])
def test_a_weight_that_is_not_finite_shows_in_the_estimate(x64, value):
    """And is the largest of them, whatever sign a NaN has."""
    for sample in (0, 9):
        estimate, info = weigh_spoiled(jax.random.key(3), sample, value)
        assert not np.isfinite(estimate)
        np.testing.assert_equal(np.isfinite(info.largest), [False, True, True])
        np.testing.assert_array_equal(info.largest[0], np.abs(value))


def test_a_weight_of_zero_is_no_failure(x64):
    key = jax.random.key(3)
    estimate, info = weigh_spoiled(key, 9, -np.inf)
    logs = np.asarray(weigh_samples(key)[0])
    assert_close(estimate, scipy.special.logsumexp(logs[:9]) - np.log(10))
    assert info.ess < 9


def test_streaming_neither_overflows_nor_underflows(x64):
    """Weights of e^±2000."""
    key = jax.random.key(3)
    expected, _ = weigh_spoiled(key, 99, 0.0)
    for shift in (-2000.0, 2000.0):
        assert_close(weigh_spoiled(key, 99, 0.0, shift)[0] - shift, expected)


def test_bounds_lie_below_the_evidence_and_tighten_with_samples(x64):
    """The mean over many keys; one sample's bound is the ELBO, and the bias falls by about 1/K."""
    truth, num_keys = true_log_evidence(), 8192

    @jax.jit
    @jax.vmap
    def estimate(key):
        weigh = functools.partial(importance_weighted_log_prob, key, log_joint, proposal())
        return weigh(num_samples=1)[0], weigh(num_samples=16, chunk_size=16)

    one, (sixteen, info) = estimate(jax.random.split(jax.random.key(5), num_keys))
    error = {name: np.std(a) / np.sqrt(num_keys) for name, a in [("one", one), ("16", sixteen)]}
    gap = truth - np.mean(one)
    assert gap > 10 * error["one"]
    assert_close(np.mean(info.elbo), np.mean(one), standard_error=np.hypot(*error.values()))
    assert -5 * error["16"] < truth - np.mean(sixteen) < gap / 8 + 5 * error["16"]


def test_many_samples_find_the_evidence_within_their_own_standard_error(x64):
    estimate, info = jax.jit(
        lambda key: importance_weighted_log_prob(key, log_joint, proposal(), num_samples=20_000)
    )(jax.random.key(7))
    assert info.standard_error < 0.01
    assert_close(estimate, np.asarray(true_log_evidence()), standard_error=info.standard_error)


# ---------------------------------------------------------------- antithetic samples


@jax.jit
def weigh_pairs(key):
    """Each pair's weights by its densities, and all that is made of them."""
    q, half = proposal(), NUM_SAMPLES // 2

    def log_weights(k):
        z, _ = q.sample_and_log_prob(jax.random.fold_in(key, k))
        pair = jnp.stack([z, 2 * q.mean - z])
        return jax.vmap(lambda z: log_joint(z) - q.log_prob(z))(pair)

    def placed(index):
        sizes.append(index.size)
        return index

    sizes = []
    options = {"num_samples": NUM_SAMPLES, "antithetic": True}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        streamed = [
            importance_weighted_log_prob(
                key, log_joint, q, **options, chunk_size=chunk_size, place=placed
            )
            for chunk_size in (1, 8, 100)
        ]
        bounds = (
            elbo(key, log_joint, q, **options),
            iwae_bound(key, log_joint, q, **options),
            iwae_bound(key, log_joint, q, **options, doubly_reparameterized=True),
        )
    assert sizes == [1, 4, half]
    return jax.vmap(log_weights)(jnp.arange(half)), bounds, streamed


def test_antithetic_estimates_are_those_of_pairs(x64):
    """Weights averaged over a pair count as one, in all but the ELBO; K counts both of each."""
    logs, (bound, weighted, doubly), streamed = weigh_pairs(jax.random.key(3))
    weights = np.mean(np.exp(np.asarray(logs)), axis=1)
    half = NUM_SAMPLES // 2
    relative_variance = np.mean((weights / np.mean(weights) - 1) ** 2) / half
    assert_close(bound, np.mean(logs))
    assert_close(weighted, np.log(np.mean(weights)))
    assert_close(doubly, np.log(np.mean(weights)))
    for estimate, info in streamed:
        assert_close(estimate, np.log(np.mean(weights)))
        assert_close(info.ess, np.sum(weights) ** 2 / np.sum(weights**2))
        assert_close(info.standard_error, np.sqrt(relative_variance))
        assert_close(info.elbo, np.mean(logs))
        # A fifth of the pairs, and the next.
        assert_close(info.largest, np.sort(np.log(weights))[: -(half // 5) - 2 : -1])


def test_antithetic_bounds_lie_between_the_elbo_and_the_evidence(x64):
    """The ELBO's expectation stays, and two samples that mirror each other bound tighter."""
    num_keys = 8192

    @jax.jit
    @jax.vmap
    def bounds(key):
        options = {"num_samples": 2, "antithetic": True}
        return (
            elbo(key, log_joint, proposal()),
            elbo(key, log_joint, proposal(), **options),
            importance_weighted_log_prob(key, log_joint, proposal(), **options)[0],
        )

    one, pair, weighted = (np.asarray(a) for a in bounds(jax.random.split(KEY, num_keys)))
    assert_close(np.mean(pair), np.mean(one), standard_error=np.std(pair - one) / num_keys**0.5)
    assert np.all(weighted >= pair)
    error = np.std(weighted) / num_keys**0.5
    assert np.mean(pair) + 10 * error < np.mean(weighted) < true_log_evidence() + 5 * error


class Samples(NamedTuple):
    """What only samples are known of, as of a flow."""

    base: DiagonalPosterior

    def sample_and_log_prob(self, key):
        return self.base.sample_and_log_prob(key)


@pytest.mark.parametrize("estimate", [elbo, iwae_bound, importance_weighted_log_prob])
def test_antithetic_samples_need_pairs_and_a_center(estimate):
    q = proposal(jnp.float32)
    with pytest.raises(ValueError, match=r"symmetric.*Samples is not"):
        estimate(KEY, log_joint, Samples(q), num_samples=2, antithetic=True)
    for num_samples in (0, 3):
        with pytest.raises(ValueError, match=f"num_samples must be even.*got {num_samples}"):
            estimate(KEY, log_joint, q, num_samples=num_samples, antithetic=True)


# ---------------------------------------------------------------- importance-weighted training


@jax.jit
def iwae_bounds(key):
    """Of one sample, of many, and of many with the other gradient."""
    return (
        iwae_bound(key, log_joint, proposal(), num_samples=1),
        elbo(key, log_joint, proposal()),
        iwae_bound(key, log_joint, proposal(), num_samples=NUM_SAMPLES),
        iwae_bound(
            key, log_joint, proposal(), num_samples=NUM_SAMPLES, doubly_reparameterized=True
        ),
    )


def test_the_iwae_bound_is_the_log_of_the_mean_weight(x64):
    """Of the ELBO's samples; the gradient that is asked for changes no value."""
    key = jax.random.key(3)
    one, bound, many, doubly = iwae_bounds(key)
    assert_close(one, np.asarray(bound))
    weights = np.exp(np.asarray(weigh_samples(key)[0]))
    assert_close(many, np.log(np.mean(weights)))
    assert_close(doubly, np.asarray(many))


@functools.partial(jax.jit, static_argnames=("doubly", "antithetic"))
def iwae_gradients(keys, problem, posterior, *, doubly, antithetic=False):
    """One a key, with respect to the model's parameters and to those of q."""

    def bound(problem, posterior, key):
        return iwae_bound(
            key,
            problem.log_joint,
            posterior,
            num_samples=4 if antithetic else 5,
            doubly_reparameterized=doubly,
            antithetic=antithetic,
        )

    return jax.vmap(jax.grad(bound, argnums=(0, 1)), in_axes=(None, None, 0))(
        problem, posterior, keys
    )


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_doubly_reparameterized_gradient_is_unbiased(x64, antithetic):
    """The same for the model key by key; for q on average over keys, and with less noise."""
    problem, truth = problems.linear_gaussian(0, float, per_pixel=False)
    wrong = DiagonalPosterior(jnp.asarray(truth.mode) + 0.3, jnp.full(LATENT, -0.5))
    keys = jax.random.split(jax.random.key(1), 20_000)
    plain, doubly = (
        iwae_gradients(keys, problem, wrong, doubly=doubly, antithetic=antithetic)
        for doubly in (False, True)
    )
    assert_close(doubly[0], jax.tree.map(np.asarray, plain[0]))
    for one, other in zip(doubly[1], plain[1], strict=True):
        assert np.all(np.std(one, axis=0) < np.std(other, axis=0))
        error = np.std(one - other, axis=0) / np.sqrt(len(keys))
        assert_close(np.mean(one, axis=0), np.mean(other, axis=0), standard_error=error)


def test_the_doubly_reparameterized_gradient_vanishes_at_the_posterior(x64):
    """All weights are equal there, for every key; the plain gradient keeps the noise of a score."""
    problem, truth = problems.linear_gaussian(0, float, per_pixel=False)
    chol = np.linalg.cholesky(np.linalg.inv(truth.covariance))
    posterior = GaussianPosterior(jnp.asarray(truth.mode), jnp.asarray(chol))
    keys = jax.random.split(jax.random.key(1), 100)
    _, plain = iwae_gradients(keys, problem, posterior, doubly=False)
    _, doubly = iwae_gradients(keys, problem, posterior, doubly=True)
    assert np.max(np.abs(flatten(doubly))) < 1e-10
    assert np.min(np.std(plain.mean, axis=0)) > 0.1


def test_the_doubly_reparameterized_gradient_needs_log_prob():
    unknown = Samples(proposal(jnp.float32))
    bound = functools.partial(iwae_bound, jax.random.key(0), log_joint, unknown)
    assert np.isfinite(bound(num_samples=2))
    with pytest.raises(ValueError, match="log_prob, which Samples lacks"):
        bound(num_samples=2, doubly_reparameterized=True)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        bound(num_samples=0)


# ---------------------------------------------------------------- Laplace


def test_laplace_evidence_is_the_formula(x64):
    """log p(x, mode) + (d/2) log 2π - ½ log det P, by numpy, where it is not exact."""
    mode = random_vector(8, LATENT)
    evidence = jax.jit(lambda mode: laplace_evidence(exact_expansion(log_joint), mode))(mode)
    tanh = np.tanh(np.asarray(mode) - 0.5)
    precision = np.diag(1 + 1 - tanh**2)
    value = float(log_joint(mode))
    expected = value + 0.5 * LATENT * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    assert_close(evidence, np.asarray(expected))


def test_laplace_evidence_is_nan_unless_the_precision_is_positive_definite(x64):
    saddle = exact_expansion(lambda z: 0.5 * (z[0] ** 2 - z[1] ** 2 - z[2] ** 2))
    repair = gauss_newton_expansion(lambda z: z, lambda eta: -0.5 * eta @ eta)
    assert np.isnan(laplace_evidence(saddle, jnp.zeros(LATENT)))
    repaired = laplace_evidence(saddle, jnp.zeros(LATENT), repair=repair)
    assert_close(repaired, 0.5 * LATENT * np.log(2 * np.pi) - 0.5 * LATENT * np.log(2.0))


def test_a_nan_factor_makes_every_bound_nan():
    @jax.jit
    def bounds(chol):
        posterior, key = GaussianPosterior(jnp.zeros(LATENT), chol), jax.random.key(0)
        return (
            elbo(key, standard_normal, posterior),
            importance_weighted_log_prob(key, standard_normal, posterior, num_samples=4),
        )

    assert np.all(np.isnan(flatten(bounds(jnp.full((LATENT, LATENT), jnp.nan)))))
    assert np.all(np.isfinite(flatten(bounds(jnp.eye(LATENT)))))
