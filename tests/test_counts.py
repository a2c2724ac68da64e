"""Log probabilities of counts against scipy, exact sums and sums over the support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from problems import (
    FINITE_DIFFERENCE,
    TOLERANCES,
    assert_close,
    assert_values,
    central_differences,
    each,
    random_vector,
    rounded,
)

from vlae_jax import (
    exact_expansion,
    gauss_newton_expansion,
    negative_binomial,
    poisson,
    standard_normal,
    zero_inflated_negative_binomial,
    zero_inflated_negative_binomial_fisher,
    zero_inflated_poisson,
    zero_inflated_poisson_fisher,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_poisson_is_scipys(dtype):
    counts = [0, 1, 2, 7, 100, 10_000]
    log_rates = [-1e4, -30, -1, 0, 0.7, 4, 9, 20]
    arrays, (x, log_rate) = rounded(dtype, *np.meshgrid(counts, log_rates))
    expected = x * log_rate - np.exp(log_rate) - scipy.special.gammaln(x + 1)
    sane = log_rate > -100  # scipy's own exp(log_rate) is 0 below
    assert_close(expected[sane], scipy.stats.poisson.logpmf(x, np.exp(log_rate))[sane], rtol=1e-10)
    rounding = np.finfo(np.float64).eps * (x * np.abs(log_rate) + scipy.special.gammaln(x + 1))
    # No more is lost than what the rounding of log(rate / x) makes of the slope x - rate.
    allowed = 3 * np.finfo(dtype).eps * np.abs(x - np.exp(log_rate)) * np.log(x + 2)
    error = np.abs(np.float64(each(poisson)(*arrays)) - expected)
    assert np.all(error <= allowed + 30 * rounding + TOLERANCES[np.dtype(dtype)] * np.abs(expected))


def test_large_counts_keep_their_digits_in_float32():
    """At a million the terms are of 10⁷ nats, the log probability of ten."""
    x = np.array([10_000, 123_456, 1_000_000, 4_000_000])
    (counts, log_rate), (_, exact) = rounded(np.float32, x, np.log(x) + 2 / np.sqrt(x))
    expected = scipy.stats.poisson.logpmf(x, np.exp(exact))
    np.testing.assert_allclose(each(poisson)(counts, log_rate), expected, atol=3e-3)
    density = each(negative_binomial)
    np.testing.assert_allclose(density(counts, log_rate, -30.0), expected, atol=3e-3)
    for dispersion in (1e-3, 0.5, 20):
        expected = scipy.stats.nbinom.logpmf(
            x, 1 / dispersion, 1 / (1 + dispersion * np.exp(exact))
        )
        actual = density(counts, log_rate, np.log(dispersion))
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_poisson_takes_integers_and_sums_over_pixels(dtype):
    x, log_rate = np.array([0, 3, 1, 12]), random_vector(3, 4, dtype)
    expected = np.sum(scipy.stats.poisson.logpmf(x, np.exp(np.float64(log_rate))))
    assert_close(poisson(jnp.asarray(x, jnp.uint8), log_rate), expected)
    assert_close(poisson(jnp.asarray(x, dtype), log_rate), expected)


def test_poisson_sums_to_one(dtype):
    log_rates = jnp.asarray([-3, 0, 1.5, 3.5], dtype)[:, None]
    log_probs = each(poisson)(jnp.arange(120, dtype=dtype), log_rates)
    assert_close(jnp.sum(jnp.exp(log_probs), axis=1), np.ones(4))


def test_an_overflowing_rate_has_probability_zero():
    """exp(1000) is no number of either precision: the value says so, and is not NaN."""
    value = poisson(jnp.array([3.0, 1]), jnp.array([1000.0, 0]))
    assert value == -jnp.inf


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_no_count_gives_nan(wrong):
    x, zero = jnp.array([3.0, wrong]), jnp.zeros(2)
    assert jnp.isnan(poisson(x, zero))
    assert jnp.isnan(negative_binomial(x, zero, 0.0))
    assert jnp.isnan(zero_inflated_poisson(x, jnp.zeros(4)))


# ---------------------------------------------------------------- negative binomial


def exact_negative_binomial(x, log_mean, log_dispersion):
    """In float64, Γ(x + 1/α) αˣ / Γ(1/α) as the product of 1 + jα, which has a limit at α = 0."""
    odds = log_mean + log_dispersion
    product = np.vectorize(lambda x, a: np.sum(np.log1p(np.arange(x) * np.exp(a))))
    small = np.exp(log_mean) * (1 - np.exp(np.minimum(odds, 0)) / 2)
    large = np.logaddexp(odds, 0) / np.exp(log_dispersion.clip(min=-600))
    zero = np.where(odds < -20, small, large)
    return (
        product(x, log_dispersion)
        + x * (log_mean - np.logaddexp(odds, 0))
        - scipy.special.gammaln(x + 1)
        - zero
    )


GRID = np.meshgrid(
    [0, 1, 2, 7, 11, 100, 10_000],
    [-50, -5, -1, 0, 0.7, 4, 9, 14, 20, 60],
    [-1000, -100, -50, -20, -10, -5, -3, -2.4, -2.2, -1, 0, 0.3, 3, 10, 50],
)


def test_negative_binomial_is_exact_from_the_poisson_limit_to_the_widest(dtype):
    arrays, (x, log_mean, log_dispersion) = rounded(dtype, *GRID)
    expected = exact_negative_binomial(x, log_mean, log_dispersion)
    sane = (log_dispersion > -3) & (log_dispersion < 4) & (log_mean > -6) & (log_mean < 15)
    n, mean = np.exp(-log_dispersion[sane]), np.exp(log_mean[sane])
    scipys = scipy.stats.nbinom.logpmf(x[sane], n, 1 / (1 + mean / n))
    np.testing.assert_allclose(expected[sane], scipys, rtol=1e-8, atol=1e-8)
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    actual = np.float64(each(negative_binomial)(*arrays))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_negative_binomial_is_poissons_mixture_over_gamma_rates(x64):
    """Gauss-Laguerre quadrature over the rate, of shape 1/α and mean μ."""
    mean, dispersion = 3.7, 0.4
    node, weight = scipy.special.roots_genlaguerre(80, 1 / dispersion - 1)
    x = np.arange(30)
    mixture = scipy.stats.poisson.pmf(x[:, None], node * mean * dispersion) @ weight
    expected = np.log(mixture / np.sum(weight))
    actual = each(negative_binomial)(jnp.asarray(x), np.log(mean), np.log(dispersion))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_negative_binomial_without_dispersion_is_poisson(dtype):
    x = jnp.asarray([0, 1, 5, 400], dtype)
    log_rate = jnp.asarray([-2, 0.3, 9, 6], dtype)
    expected = np.sum(scipy.stats.poisson.logpmf(np.float64(x), np.exp(np.float64(log_rate))))
    for log_dispersion in (-jnp.inf, -1000.0, jnp.full(4, -100)):
        assert_close(negative_binomial(x, log_rate, log_dispersion), expected)


def test_negative_binomial_sums_to_one_with_its_mean_and_variance(x64):
    x = np.arange(4000)
    for log_mean, log_dispersion in ((1.0, -5.0), (3.0, 0.2), (2.0, -80.0)):
        probabilities = np.exp(each(negative_binomial)(jnp.asarray(x), log_mean, log_dispersion))
        mean, dispersion = np.exp(log_mean), np.exp(log_dispersion)
        assert_close(np.sum(probabilities), np.float64(1))
        assert_close(probabilities @ x, mean)
        assert_close(probabilities @ (x - mean) ** 2, mean + dispersion * mean**2, rtol=1e-8)


def test_negative_binomial_has_float32_derivatives(x64):
    """In both arguments, first and second: the same formula in float64, held to differences."""
    x, log_mean, log_dispersion = (np.ravel(array) for array in GRID)
    near = (np.abs(log_mean) < 10) & (np.abs(log_dispersion) < 25) & (x > 0)
    x, log_mean, log_dispersion = x[near], log_mean[near], log_dispersion[near]

    def slopes(x, m, a):
        """The score in the log mean, and minus the curvature: (x - μ)/(1 + αμ), W by hand."""
        mean, dispersion = np.exp(m), np.exp(a)
        spread = 1 + dispersion * mean
        return (x - mean) / spread, mean * (1 + dispersion * x) / spread**2

    density = each(negative_binomial)
    first = jax.grad(lambda x, m, a: jnp.sum(density(x, m, a)), 1)
    second = jax.grad(lambda x, m, a: -jnp.sum(first(x, m, a)), 1)
    arrays, exact = rounded(np.float32, x, log_mean, log_dispersion)
    score, curvature = slopes(*exact)
    scale = np.sqrt(np.exp(exact[1]) / (1 + np.exp(exact[1] + exact[2])))
    np.testing.assert_array_less(np.abs(first(*arrays) - score) / (np.abs(score) + scale), 2e-6)
    np.testing.assert_allclose(second(*arrays), curvature, rtol=2e-6)


def test_derivative_in_the_dispersion_survives_its_limit():
    """For α → 0 it is α times ½ ((x - μ)² - x), to the digits of float32."""
    x, log_mean = np.array([0, 1, 3, 50]), np.log([0.5, 2, 3, 40])

    def density(log_dispersion):
        return negative_binomial(x, jnp.asarray(log_mean, jnp.float32), log_dispersion)

    expected = 0.5 * np.sum((x - np.exp(log_mean)) ** 2 - x)
    slope = jax.jit(jax.grad(density))
    for log_dispersion in (-20.0, -40.0, -80.0):
        np.testing.assert_allclose(
            slope(log_dispersion) / np.exp(log_dispersion), expected, rtol=2e-3
        )


# ---------------------------------------------------------------- more zeros


def inflated(x, log_prob, zero_logit):
    """log(π 1[x = 0] + (1 - π) p(x)), as it stands."""
    pi = scipy.special.expit(zero_logit)
    return np.log(pi * (x == 0) + (1 - pi) * np.exp(log_prob))


def test_zero_inflated_poisson_is_the_mixture(dtype):
    arrays, (x, log_rate, zero_logit) = rounded(
        dtype, *np.meshgrid([0, 1, 4, 60], [-3, 0, 1.5, 4], [-25, -4, 0, 3, 12])
    )
    actual = each(lambda x, m, k: zero_inflated_poisson(x, jnp.append(m, k)))(*arrays)
    expected = inflated(x, scipy.stats.poisson.logpmf(x, np.exp(log_rate)), zero_logit)
    assert_values(actual, expected, np.maximum(x, 1e-2))


def test_zero_inflated_negative_binomial_is_the_mixture(dtype):
    arrays, (x, log_mean, zero_logit, log_dispersion) = rounded(
        dtype, *np.meshgrid([0, 1, 4, 60], [-3, 1.5, 4], [-25, 0, 12], [-2, 0, 3])
    )
    density = each(lambda x, m, k, a: zero_inflated_negative_binomial(x, jnp.append(m, k), a))
    n = np.exp(-log_dispersion)
    base = scipy.stats.nbinom.logpmf(x, n, 1 / (1 + np.exp(log_mean) / n))
    assert_values(density(*arrays), inflated(x, base, zero_logit), np.maximum(x, 1e-2))


def test_heads_of_a_zero_inflated_density_are_means_and_then_logits(dtype):
    x, log_rate, zero_logit = np.array([0, 3, 0, 1]), *(random_vector(s, 4, dtype) for s in (1, 2))
    base = scipy.stats.poisson.logpmf(x, np.exp(np.float64(log_rate)))
    expected = np.sum(inflated(x, base, np.float64(zero_logit)))
    assert_close(zero_inflated_poisson(x, jnp.append(log_rate, zero_logit)), expected)


def test_a_zero_that_is_certain_costs_nothing_and_one_that_is_not_its_logit():
    """A count behind a certain zero costs the logit; a zero far below a large rate as well."""
    eta = jnp.array([1.0, 5, 12, 1e4, -1e4, -50])
    value, slope = jax.value_and_grad(zero_inflated_poisson, 1)(jnp.array([0, 2, 0]), eta)
    expected = -50 - np.exp(5.0) + 2 * 5 - np.log(2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, [0, 2 - np.exp(5.0), 0, 0, 0, 1], atol=1e-5)


ETAS = np.array([(m, k) for m in (-4.0, -0.5, 1.2, 3.0) for k in (-8.0, -1.0, 0.4, 5.0)])
FISHERS = {
    "poisson": (zero_inflated_poisson, zero_inflated_poisson_fisher, 120),
    "negative binomial": (
        lambda x, eta: zero_inflated_negative_binomial(x, eta, 0.3),
        lambda eta: zero_inflated_negative_binomial_fisher(eta, 0.3),
        2500,
    ),
    "negative binomial near its limit": (
        lambda x, eta: zero_inflated_negative_binomial(x, eta, -30.0),
        lambda eta: zero_inflated_negative_binomial_fisher(eta, -30.0),
        120,
    ),
}


@pytest.mark.parametrize("name", FISHERS)
def test_fisher_blocks_are_the_mean_outer_products_of_the_score(x64, name):
    """Summed over the support, with scores by finite differences."""
    density, fisher, top = FISHERS[name]
    x = jnp.arange(top, dtype=float)[:, None]

    @jax.jit
    @jax.vmap
    def log_probs(eta):
        return jax.vmap(density, (0, None))(x, eta)

    score = central_differences(lambda shift: log_probs(ETAS + shift), jnp.zeros(2))
    probabilities = np.exp(log_probs(ETAS))
    assert_close(np.sum(probabilities, axis=1), np.ones(len(ETAS)), rtol=1e-8)
    truth = np.einsum("ex,exi,exj->eij", probabilities, score, score)
    # All in one vector, means first: the blocks end on the last axis.
    blocks = np.moveaxis(np.asarray(fisher(jnp.asarray(ETAS.T.ravel()))), -1, 0)
    for block, expected in zip(blocks, truth, strict=True):
        assert_close(block, expected, rtol=10 * FINITE_DIFFERENCE)
        np.testing.assert_allclose(np.diagonal(block), np.diagonal(expected), rtol=1e-4)


def test_fisher_blocks_stay_finite_and_positive_definite_at_extremes():
    """In float32, far beyond any fit: no diagonal is negative and no determinant below rounding."""
    log_mean, zero_logit, log_dispersion = (
        np.ravel(a).astype(np.float32)
        for a in np.meshgrid([-1e4, -30, -1, 2, 30, 80], [-1e4, -30, 0, 30, 1e4], [-1e4, -5, 0, 80])
    )
    eta = jnp.asarray(np.append(log_mean, zero_logit))
    for blocks in (
        zero_inflated_poisson_fisher(eta),
        zero_inflated_negative_binomial_fisher(eta, jnp.asarray(log_dispersion)),
    ):
        assert np.all(np.isfinite(blocks))
        (mean, cross), (crossed, logit) = np.float64(blocks)
        np.testing.assert_array_equal(cross, crossed)
        assert np.all(mean >= 0) and np.all(logit >= 0)
        assert np.all(mean * logit - cross**2 >= -1e-6 * mean * logit - 1e-40)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_blocks_make_gauss_newton_positive_definite_where_the_hessian_is_not(x64, chunk_size):
    """JᵀFJ + I, F summed over the support; J by finite differences of a smooth decoder."""
    dim, latent = 4, 3
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(latent, 2 * dim)))
    bias = jnp.array([2.0, 2.5, 2.5, 0, -7, -12, -1, 0])
    x, z = jnp.array([0, 0, 12, 0]), jnp.array([0.2, -0.1, 0.3])

    def decode(z):
        return jnp.tanh(z @ kernel) + bias

    expand = gauss_newton_expansion(
        decode,
        lambda eta: zero_inflated_poisson(x, eta),
        fisher=zero_inflated_poisson_fisher,
        chunk_size=chunk_size,
    )
    exact = exact_expansion(
        lambda z: zero_inflated_poisson(x, decode(z)) + standard_normal(z), chunk_size=chunk_size
    )
    quadratic, truth = jax.jit(expand)(z), jax.jit(exact)(z)
    assert_close(quadratic[:2], truth[:2])
    assert np.linalg.eigvalsh(truth.precision)[0] < 0 < np.linalg.eigvalsh(quadratic.precision)[0]
    support = np.arange(80.0)
    information = np.zeros((2 * dim, 2 * dim))
    for i, center in enumerate(np.asarray(decode(z)).reshape(2, dim).T):

        def log_probs(eta):
            return inflated(support, scipy.stats.poisson.logpmf(support, np.exp(eta[0])), eta[1])

        steps = 1e-5 * np.eye(2)
        score = [(log_probs(center + e) - log_probs(center - e)) / 2e-5 for e in steps]
        block = np.einsum("x,ix,jx->ij", np.exp(log_probs(center)), score, score)
        information[np.ix_([i, dim + i], [i, dim + i])] = block
    jacobian = central_differences(decode, z)
    expected = jacobian.T @ information @ jacobian + np.eye(latent)
    assert_close(quadratic.precision, expected, rtol=1e-5)
    assert_close(expand.products(z).times(z), quadratic.precision @ z)
