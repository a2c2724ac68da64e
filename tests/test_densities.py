"""Log densities against scipy, exact arithmetic, quadrature and finite differences."""

import decimal
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from problems import (
    DIM,
    FINITE_DIFFERENCE,
    LATENT,
    TOLERANCES,
    assert_close,
    assert_values,
    central_differences,
    each,
    flatten,
    random_vector,
    rounded,
)

from vlae_jax import (
    GaussianPosterior,
    bernoulli,
    categorical,
    discretized_logistic,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    infer_posterior,
    multivariate_normal,
    negative_binomial,
    poisson,
    shifted_expansion,
    standard_normal,
    student_t,
    student_t_fisher,
    zero_inflated_negative_binomial,
    zero_inflated_poisson,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


# ---------------------------------------------------------------- Gaussians


def test_standard_normal_is_scipys(dtype):
    z = random_vector(0, LATENT, dtype)
    expected = scipy.stats.multivariate_normal.logpdf(np.float64(z), np.zeros(LATENT))
    assert_close(standard_normal(z), expected)


@pytest.mark.parametrize("size", [1, LATENT])
def test_multivariate_normal_is_scipys_and_the_posteriors(dtype, size):
    z, mean = random_vector(6, size, dtype), random_vector(7, size, dtype)
    chol = (
        np.tril(np.random.default_rng(8).normal(size=(size, size)), -1)
        + np.diag([0.3, 2, 7])[:size, :size]
    )
    chol = jnp.asarray(chol, dtype)
    covariance = np.linalg.inv(np.float64(chol) @ np.float64(chol).T)
    truth = scipy.stats.multivariate_normal(np.float64(mean), covariance)
    assert_close(multivariate_normal(z, mean, chol), np.float64(truth.logpdf(np.float64(z))))
    posterior = GaussianPosterior(mean, chol)
    assert_close(multivariate_normal(z, mean, chol), np.float64(posterior.log_prob(z)))
    # Nothing is subtracted: far out the square remains, to its relative precision.
    far = jnp.asarray(np.full(size, 1e4), dtype)
    assert_close(multivariate_normal(far, mean, chol), truth.logpdf(np.float64(far)))


@pytest.mark.parametrize("per_pixel", [False, True])
def test_gaussian_is_scipys(dtype, per_pixel):
    x, mean = random_vector(1, DIM, dtype), random_vector(2, DIM, dtype)
    log_var = random_vector(3, DIM, dtype) if per_pixel else jnp.asarray(-1.3, dtype)
    scale = np.exp(0.5 * np.float64(log_var))
    expected = np.sum(scipy.stats.norm.logpdf(np.float64(x), np.float64(mean), scale))
    assert_close(gaussian(x, mean, log_var), expected)


def test_gaussian_slope_in_a_shared_log_variance_sums_over_pixels(dtype):
    """d/ds log N = ½ Σ ((x - m)² e⁻ˢ - 1)."""
    x, mean = random_vector(1, DIM, dtype), random_vector(2, DIM, dtype)
    log_var = jnp.asarray(-1.3, dtype)
    squares = (np.float64(x) - np.float64(mean)) ** 2
    expected = 0.5 * np.sum(squares * np.exp(-np.float64(log_var)) - 1)
    assert_close(jax.grad(gaussian, argnums=2)(x, mean, log_var), expected)


def test_gaussian_heteroscedastic_is_scipys(dtype):
    """All means first, then all log variances."""
    x, mean, log_var = (random_vector(seed, DIM, dtype) for seed in (1, 2, 3))
    scale = np.exp(0.5 * np.float64(log_var))
    expected = np.sum(scipy.stats.norm.logpdf(np.float64(x), np.float64(mean), scale))
    assert_close(gaussian_heteroscedastic(x, jnp.append(mean, log_var)), expected)


def test_gaussian_heteroscedastic_is_scipys_at_extremes(dtype):
    arrays, (x, mean, log_var) = rounded(
        dtype, *np.meshgrid([-1e4, 0, 0.3, 1e4], [-1e4, 0, 0.3], [-20, -1, 0, 30])
    )
    actual = each(lambda x, mean, s: gaussian_heteroscedastic(x, jnp.append(mean, s)))(*arrays)
    assert_values(actual, scipy.stats.norm.logpdf(x, mean, np.exp(0.5 * log_var)))


# ---------------------------------------------------------------- binary and categorical


def test_bernoulli_is_scipys(dtype):
    logits = 3 * random_vector(4, DIM, dtype)
    x = jnp.asarray(np.arange(DIM) % 2, dtype)
    rate = scipy.special.expit(np.float64(logits))
    assert_close(bernoulli(x, logits), np.sum(scipy.stats.bernoulli.logpmf(np.int64(x), rate)))


def test_bernoulli_sums_to_one_over_all_binary_vectors(dtype):
    logits = 2 * random_vector(5, 4, dtype)
    vectors = jnp.asarray(list(itertools.product([0, 1], repeat=4)), dtype)
    log_probs = jax.vmap(bernoulli, in_axes=(0, None))(vectors, logits)
    assert_close(jnp.sum(jnp.exp(log_probs)), np.float64(1))


def test_saturated_logits_keep_value_and_gradient(dtype):
    """A wrong and certain pixel costs its logit, and its slope is x - 1[logit > 0]."""
    logits = jnp.asarray([1e4, -1e4, 1e4, -1e4], dtype)
    x = jnp.asarray([0, 1, 1, 0], dtype)
    value, slope = jax.value_and_grad(bernoulli, argnums=1)(x, logits)
    assert_close(value, np.float64(-2e4))
    assert_close(slope, np.array([-1.0, 1, 0, 0]))


@pytest.mark.parametrize("shape", [(), (DIM,), (2, DIM)], ids=str)
@pytest.mark.parametrize("index", [np.uint8, np.int32])
def test_categorical_is_scipys_of_shaped_and_flat_logits(dtype, shape, index):
    """As many classes as a byte can index, and pixels of any shape."""
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.integers(0, 256, shape), index)
    logits = jnp.asarray(3 * rng.normal(size=(*shape, 256)), dtype)
    probabilities = scipy.special.softmax(np.float64(logits), axis=-1)
    one_hot = np.eye(256)[np.int64(x)]
    expected = np.sum(scipy.stats.multinomial.logpmf(one_hot, 1, probabilities))
    assert_close(categorical(x, logits), expected)
    assert_close(categorical(x, logits.ravel()), expected)


def test_categorical_sums_to_one_over_all_outcomes(dtype):
    logits = 2 * random_vector(5, 3 * 4, dtype)
    outcomes = jnp.asarray(list(itertools.product(range(4), repeat=3)))
    log_probs = jax.vmap(categorical, in_axes=(0, None))(outcomes, logits)
    assert_close(jnp.sum(jnp.exp(log_probs)), np.float64(1))


def test_categorical_of_two_classes_is_bernoulli(x64):
    x, logits = jnp.arange(DIM) % 2, 3 * random_vector(4, DIM)
    both = jnp.stack([jnp.zeros(DIM), logits], axis=1)
    assert_close(categorical(x, both), bernoulli(x.astype(float), logits))


def test_categorical_at_extremes(dtype):
    """A certain and wrong class costs the difference of the logits."""
    logits = jnp.asarray([[1e4, -1e4, 0], [1e4, -1e4, 0]], dtype)
    value, slope = jax.value_and_grad(categorical, argnums=1)(jnp.array([1, 0]), logits)
    assert_close(value, np.float64(-2e4))
    assert_close(slope, np.array([[-1.0, 1, 0], [0, 0, 0]]))


@pytest.mark.parametrize("wrong", [-1, 3, 1000])
def test_a_class_that_is_not_there_gives_nan(wrong):
    logits = jnp.zeros((2, 3))
    assert jnp.isnan(categorical(jnp.array([0, wrong]), logits))
    assert jnp.isfinite(categorical(jnp.array([0, 2]), logits))
    # Nor does an index of few bits wrap around to one that is there.
    assert jnp.isnan(categorical(jnp.array([0, -1], jnp.int8), jnp.zeros((2, 256))))


# ---------------------------------------------------------------- discretized logistic


def exact_logistic(x, mean, log_scale, low, high, levels):
    """The log probability of a level in 60 digits: a difference of two logistic functions."""
    with decimal.localcontext(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        number = decimal.Decimal
        half = (number(high) - number(low)) / (levels - 1) / 2
        scale = number(log_scale).exp()
        below = (number(x) - half - number(mean)) / scale
        above = (number(x) + half - number(mean)) / scale

        def sigmoid(u):
            return 1 / (1 + (-u).exp())

        if x == low:
            probability = sigmoid(above)
        elif x == high:
            probability = sigmoid(-below)
        elif below + above > 0:  # the smaller tail on both sides, or digits would be lost
            probability = sigmoid(-below) - sigmoid(-above)
        else:
            probability = sigmoid(above) - sigmoid(below)
        return float(probability.ln())


RANGES = {"unit": (0.0, 1.0, 256), "symmetric": (-1.0, 1.0, 256), "bytes": (0.0, 255.0, 256)}


@pytest.mark.parametrize("name", [*RANGES, "few levels"])
def test_discretized_logistic_is_exact_far_into_the_tails(dtype, name):
    low, high, levels = {**RANGES, "few levels": (0.0, 1.0, 5)}[name]
    grid = np.linspace(low, high, levels, dtype=dtype)[[0, 1, levels // 2, -2, -1]]
    span = high - low
    means = [low, low + 0.4 * span, high + 0.01 * span, -30 * span, 1e4 * span]
    log_scales = np.log(span) + np.array([-10, -5, -3, 0, 5])
    arrays, truths = rounded(dtype, *np.meshgrid(grid, means, log_scales))
    density = each(lambda *a: discretized_logistic(*a, low=low, high=high, levels=levels))
    # Rounded pixels are still pixels: their bins are those of the exact levels.
    nearest = low + span / (levels - 1) * np.round((truths[0] - low) / span * (levels - 1))
    expected = np.vectorize(exact_logistic)(nearest, *truths[1:], low, high, levels)
    offset = np.abs(truths[0] - truths[1]) / np.exp(truths[2])
    assert_values(density(*arrays), expected, np.maximum(offset, 1))


def test_discretized_logistic_is_scipys(x64):
    x, mean = jnp.arange(256) / 255, 0.3 + jnp.linspace(-0.2, 0.2, 256)
    for log_scale in (-3.0, jnp.linspace(-3, 0, 256)):
        logistic = scipy.stats.logistic(np.asarray(mean), np.exp(log_scale))
        edges = np.asarray(x)[:, None] + np.array([-0.5, 0.5]) / 255
        edges[0, 0], edges[-1, 1] = -np.inf, np.inf
        expected = np.sum(np.log(logistic.cdf(edges[:, 1]) - logistic.cdf(edges[:, 0])))
        assert_close(discretized_logistic(x, mean, log_scale), expected, rtol=1e-9)


@pytest.mark.parametrize("name", RANGES)
def test_discretized_logistic_sums_to_one(dtype, name):
    low, high, levels = RANGES[name]
    span = high - low
    x = jnp.linspace(low, high, levels, dtype=dtype)
    means = low + span * np.array([0, 0.4003, 1.2, 1e4])
    log_scales = np.log(span) + np.array([-10.0, -5, -3, 0, 5])
    density = each(lambda *a: discretized_logistic(*a, low=low, high=high, levels=levels))
    arrays, _ = rounded(dtype, *np.meshgrid(means, log_scales))
    log_probs = density(x, *(array[..., None] for array in arrays))
    total = jnp.sum(jnp.exp(log_probs), axis=-1)
    # With all mass in one or two bins, the rounding of (x - mean) / scale is what there is.
    resolution = np.finfo(dtype).eps * np.max(np.abs(x)) / np.exp(np.min(log_scales))
    assert np.all(np.abs(total - 1) < 4 * resolution + TOLERANCES[np.dtype(dtype)])


def test_a_pixel_in_other_units_gives_nan():
    mean = jnp.full(3, 0.5)
    bytes_ = jnp.array([0, 255, 7], jnp.uint8)
    assert jnp.isnan(discretized_logistic(bytes_, mean, 0.0))
    assert jnp.isnan(discretized_logistic(jnp.array([-1.0, 0, 1]), mean, 0.0))
    assert jnp.isfinite(discretized_logistic(bytes_, mean, 0.0, high=255))


# ---------------------------------------------------------------- Student-t


def test_student_t_is_scipys(dtype):
    """Near and far, from Cauchy to almost Gaussian."""
    arrays, truths = rounded(
        dtype,
        *np.meshgrid(
            [-1e30, -1e4, -2, 0, 0.3, 1, 3, 1e6],
            [0, 0.3, -50],
            [-10, -1, 0, 5],
            [1, 3, 39, 41, 1e6],
        ),
    )
    x, loc, log_scale, df = truths
    expected = scipy.stats.t.logpdf(x, df, loc, np.exp(log_scale))
    # Far out scipy squares more than there is; by hand, the tail's leading power and what is left.
    far = np.abs(x) >= 1e4
    scaled = np.where(far, np.abs(x - loc), 1) / np.exp(log_scale)
    log_peak = scipy.special.gammaln((df + 1) / 2) - scipy.special.gammaln(df / 2)
    log_peak -= 0.5 * np.log(np.pi * df) + log_scale
    tail = np.log(scaled**2 / df) + np.log1p(df / scaled**2)
    expected = np.where(far, log_peak - 0.5 * (df + 1) * tail, expected)
    assert_values(each(student_t)(*arrays), expected)


def test_student_t_broadcasts_scale_and_df_over_pixels(dtype):
    x, loc, log_scale = (random_vector(seed, DIM, dtype) for seed in (1, 2, 3))
    x64, loc64, scale64 = np.float64(x), np.float64(loc), np.exp(np.float64(log_scale))
    expected = np.sum(scipy.stats.t.logpdf(x64, 3, loc64, scale64))
    assert_close(student_t(x, loc, log_scale, 3), expected)
    df = jnp.linspace(1, 60, DIM, dtype=dtype)
    expected = np.sum(scipy.stats.t.logpdf(x64, np.float64(df), loc64, scale64))
    assert_close(student_t(x, loc, log_scale, df), expected)
    expected = np.sum(scipy.stats.t.logpdf(x64, np.float64(df), loc64))
    assert_close(student_t(x, loc, 0.0, df), expected)


# ---------------------------------------------------------------- quadrature


def half_circle(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Angles of (-π/2, π/2) and Gauss-Legendre weights: x = tan θ integrates over the line."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return nodes * np.pi / 2, weights * np.pi / 2


@pytest.mark.parametrize("df", [1.0, 3.0, 50.0])
def test_student_t_integrates_to_one_and_its_fisher_is_minus_the_mean_hessian(x64, df):
    """x = loc + scale √ν tan θ makes both integrands smooth."""
    angle, weight = half_circle()
    loc, log_scale = 0.7, -1.2
    stretch = np.exp(log_scale) * np.sqrt(df)
    x = loc + stretch * np.tan(angle)
    weight = weight * stretch / np.cos(angle) ** 2

    def density(x, loc):
        return student_t(x[None], loc[None], log_scale, df)

    log_probs, curvatures = jax.jit(
        jax.vmap(lambda x, loc: (density(x, loc), jax.hessian(density, 1)(x, loc)), (0, None))
    )(x, loc)
    probabilities = weight * np.exp(log_probs)
    assert_close(np.sum(probabilities), np.float64(1))
    truth = -np.sum(probabilities * curvatures)
    assert np.max(curvatures) > 0  # it is not concave
    assert_close(student_t_fisher(jnp.full(4, loc), log_scale, df), np.full(4, truth))


def test_heteroscedastic_fisher_is_minus_the_mean_hessian(x64):
    """Gauss-Hermite quadrature over x is exact: the Hessian is quadratic in it."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    mean, log_var = np.array([0.3, -4]), np.array([-1.4, 2])
    eta = jnp.asarray(np.append(mean, log_var))
    pairs = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    xs = jnp.asarray(mean + np.exp(0.5 * log_var) * pairs)
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)
    hessians = jax.jit(jax.vmap(lambda x: jax.hessian(gaussian_heteroscedastic, 1)(x, eta)))(xs)
    truth = -np.einsum("k,kij->ij", weights, hessians)
    assert_close(jnp.diag(gaussian_heteroscedastic_fisher(eta)), truth)
    log_probs = jax.vmap(gaussian_heteroscedastic, (0, None))(xs, eta)
    base = scipy.stats.norm.logpdf(pairs).sum(axis=1) - 0.5 * np.sum(log_var)
    assert_close(np.sum(weights * np.exp(log_probs - base)), np.float64(1))


def test_multivariate_normal_integrates_to_one(x64):
    mean, chol = jnp.array([0.5, -1]), jnp.array([[1.5, 0], [-0.8, 0.7]])
    axis = np.linspace(-12, 12, 241)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    log_probs = jax.jit(jax.vmap(lambda z: multivariate_normal(z, mean, chol)))(grid)
    assert_close(np.sum(np.exp(log_probs)) * (axis[1] - axis[0]) ** 2, np.float64(1))


# ---------------------------------------------------------------- derivatives


class Case(NamedTuple):
    """A density as a function of its real arguments, an x closed over where it is discrete."""

    log_prob: Callable
    arguments: tuple
    extremes: list
    """Arguments at which value, gradient and Hessian must be finite in float32."""


PIXELS = np.array([0, 1, 100, 254, 255]) / 255
COUNTS = np.array([0, 1, 5, 100, 10_000])
CLASSES = np.array([0, 1, 2, 2, 1])
FIVE = np.linspace(-1.3, 0.9, 5)
ONES = np.ones(5)
FAR = np.array([-1e4, -30, 0, 30, 1e4])

DENSITIES = {
    "standard_normal": Case(standard_normal, (FIVE,), [(FAR,)]),
    "multivariate_normal": Case(
        multivariate_normal,
        (FIVE, FIVE[::-1], np.tril(np.full((5, 5), 0.3)) + np.eye(5)),
        [(FAR, FAR[::-1], np.diag(np.exp([-10, -3, 0, 3, 10.0])))],
    ),
    "gaussian": Case(
        gaussian, (FIVE, 0.5 * FIVE**2, FIVE), [(FAR, FAR[::-1], -20 * ONES), (FAR, ONES, 30.0)]
    ),
    "gaussian_heteroscedastic": Case(
        gaussian_heteroscedastic,
        (FIVE, np.append(FIVE**2, FIVE)),
        [(FAR, np.append(FAR[::-1], -20 * ONES)), (FAR, np.append(FIVE, 30 * ONES))],
    ),
    "bernoulli": Case(
        lambda logits: bernoulli(CLASSES % 2, logits), (2 * FIVE,), [(FAR,), (-FAR,)]
    ),
    "categorical": Case(
        lambda logits: categorical(jnp.asarray(CLASSES), logits),
        (np.outer(FIVE, [1.0, -2, 0.5]).ravel(),),
        [(np.outer(FAR, [1, -1, 0]).ravel(),), (np.zeros(15),)],
    ),
    "poisson": Case(
        lambda log_rate: poisson(COUNTS, log_rate),
        (FIVE,),
        [(FAR.clip(max=80),), (80 * ONES,)],
    ),
    "negative_binomial": Case(
        lambda log_mean, log_dispersion: negative_binomial(COUNTS, log_mean, log_dispersion),
        (FIVE, np.array([-30, -3, -1, 0, 1])),
        [
            (log_mean.clip(max=80), log_dispersion * ONES)
            for log_mean in (FAR, FAR[::-1], FIVE, np.log(COUNTS.clip(1)))
            for log_dispersion in (-1e4, -80, -10, -2.3, 10, 80, 1e4, 0)
        ],
    ),
    "zero_inflated_poisson": Case(
        lambda eta: zero_inflated_poisson(COUNTS, eta),
        (np.append(FIVE, FIVE[::-1]),),
        [
            (np.append(log_rate.clip(max=80), zero_logit),)
            for log_rate in (FAR, FAR[::-1], 80 * ONES)
            for zero_logit in (FAR, FAR[::-1], 0 * ONES)
        ],
    ),
    "zero_inflated_negative_binomial": Case(
        lambda eta: zero_inflated_negative_binomial(COUNTS, eta, np.array([-1e4, -30, -1, 2, 80])),
        (np.append(FIVE, FIVE[::-1]),),
        [
            (np.append(log_mean.clip(max=80), zero_logit),)
            for log_mean in (FAR, FAR[::-1], 80 * ONES)
            for zero_logit in (FAR, FAR[::-1], 0 * ONES)
        ],
    ),
    "discretized_logistic": Case(
        lambda mean, log_scale: discretized_logistic(PIXELS, mean, log_scale),
        (FIVE, FIVE - 3),
        [
            (mean, log_scale * ONES)
            for mean in (FAR, FAR[::-1], PIXELS)
            for log_scale in (-10.0, 0.0, 20.0)
        ],
    ),
    "student_t": Case(
        student_t,
        (FIVE, 3 * FIVE**2 - 2, FIVE, 1.5 + ONES),
        [
            (far, loc, log_scale * ONES, df * ONES)
            for far, loc in ((FAR, FAR[::-1]), (1e26 * FAR, ONES), (FIVE, FIVE))
            for log_scale in (-10.0, 10.0)
            for df in (0.5, 3, 41, 1e6)
        ],
    ),
}
CONCAVE = {
    "standard_normal": 0,
    "multivariate_normal": 0,
    "gaussian": 1,
    "bernoulli": 0,
    "categorical": 0,
    "poisson": 0,
    "negative_binomial": 0,
    "discretized_logistic": 0,
}
"""The argument that is the decoder's output, or the latent."""


@pytest.mark.parametrize("name", DENSITIES)
def test_gradients_equal_finite_differences(x64, name):
    case = DENSITIES[name]
    arguments = tuple(jnp.asarray(argument, float) for argument in case.arguments)
    gradient = jax.jit(jax.grad(case.log_prob, range(len(arguments))))(*arguments)
    expected = central_differences(lambda arguments: case.log_prob(*arguments), arguments)
    assert_close(flatten(gradient), expected, rtol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("name", DENSITIES)
def test_extreme_arguments_give_finite_values_gradients_and_hessians(name):
    """In float32, and in every argument."""
    case = DENSITIES[name]

    @jax.jit
    def expand(arguments):
        flat, unravel = jax.flatten_util.ravel_pytree(arguments)

        def log_prob(flat):
            return case.log_prob(*unravel(flat))

        value, gradient = jax.value_and_grad(log_prob)(flat)
        return value, gradient, jax.hessian(log_prob)(flat)

    for arguments in case.extremes:
        arguments = tuple(jnp.asarray(argument, jnp.float32) for argument in arguments)
        for number in expand(arguments):
            assert np.all(np.isfinite(number)), f"{arguments}\n{number}"


@pytest.mark.parametrize("name", CONCAVE)
def test_log_concave_in_the_decoders_output(x64, name):
    """The Hessian has no positive eigenvalue, at moderate arguments and at the extremes."""
    case, place = DENSITIES[name], CONCAVE[name]
    curvature = jax.jit(jax.hessian(case.log_prob, place))
    for arguments in (case.arguments, *case.extremes):
        hessian = curvature(*(jnp.asarray(argument, float) for argument in arguments))
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert eigenvalues[-1] <= 1e-12 * np.max(np.abs(eigenvalues))
    assert eigenvalues[0] < 0 or name in ("discretized_logistic", "categorical")


def test_student_t_tail_is_convex_with_the_right_slope_and_curvature(dtype):
    """-(ν + 1) r / (ν + r²) and its derivative at a distance r, to the last decades."""
    distance = jnp.asarray([1e4, 1e8, 1e15], dtype)

    def density(loc):
        return student_t(jnp.zeros(1, dtype), loc[None], 0.0, 3.0)

    @jax.jit
    @jax.vmap
    def differentiate(loc):
        return jax.grad(density)(loc), jax.hessian(density)(loc)

    slope, curvature = differentiate(distance)
    r = np.float64(distance)
    assert_values(slope * distance, -4 / (3 / r**2 + 1))
    assert_values(curvature * distance**2, -4 * (3 / r**2 - 1) / (3 / r**2 + 1) ** 2)


# ---------------------------------------------------------------- wrong calls

WRONG_CALLS = {
    "one-hot classes": (lambda: categorical(jnp.eye(3)[0], jnp.zeros((3, 3))), "integer.*one-hot"),
    "logits of other pixels": (
        lambda: categorical(jnp.zeros(4, int), jnp.zeros((5, 3))),
        r"\(4, 'classes'\).*\(5, 3\)",
    ),
    "classes first": (
        lambda: categorical(jnp.zeros(4, int), jnp.zeros((3, 4))),
        r"\(4, 'classes'\).*\(3, 4\)",
    ),
    "a logit a pixel": (lambda: categorical(jnp.zeros(4, int), jnp.zeros(4)), "at least 2"),
    "no variances": (
        lambda: gaussian_heteroscedastic(jnp.zeros(4), jnp.zeros(4)),
        r"\(8,\).*\(4,\)",
    ),
    "one level": (
        lambda: discretized_logistic(jnp.zeros(4), jnp.zeros(4), 0.0, levels=1),
        "levels=1",
    ),
    "range upside down": (
        lambda: discretized_logistic(jnp.zeros(4), jnp.zeros(4), 0.0, low=1, high=-1),
        "high above low",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_while_tracing(name):
    call, text = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(call)


# ---------------------------------------------------------------- priors


def test_any_gaussian_prior_gives_the_exact_posterior_of_a_linear_decoder(linear_gaussian):
    """Prior N(m, C), decoder Az + b: precision C⁻¹ + AᵀA/σ², mode by the normal equations."""
    problem, _ = linear_gaussian
    dtype = problem.x.dtype
    mean = random_vector(8, LATENT, dtype)
    chol = jnp.tril(0.4 * jnp.ones((LATENT, LATENT))).astype(dtype) + jnp.eye(LATENT, dtype=dtype)

    @jax.jit
    def infer(problem, mean, chol):
        def log_prior(z):
            return multivariate_normal(z, mean, chol)

        expand = gauss_newton_expansion(problem.decode, problem.log_likelihood, log_prior)
        return infer_posterior(expand, problem.z_init, num_steps=1)

    posterior, info = infer(problem, mean, chol)
    kernel, bias, log_var, x, _ = jax.tree.map(np.float64, problem)
    noise = np.broadcast_to(np.exp(log_var), x.shape)
    prior_precision = np.float64(chol) @ np.float64(chol).T
    precision = prior_precision + kernel / noise @ kernel.T
    slope = prior_precision @ np.float64(mean) + kernel / noise @ (x - bias)
    assert_close(posterior.mean, np.linalg.solve(precision, slope))
    assert_close(posterior.covariance(), np.linalg.inv(precision))
    assert info.converged and info.is_pd


def test_a_mixture_prior_finds_its_modes_and_flags_the_saddle_between(x64):
    """Two Gaussians at ±3 seen through noise: the posterior density by quadrature is the truth."""
    noise, x = 2.0, 0.0

    def log_prior(z):
        center = jnp.full(1, 3.0)
        both = [multivariate_normal(z, side * center, jnp.eye(1)) for side in (1, -1)]
        return jnp.logaddexp(*both) - np.log(2)

    @jax.jit
    @jax.vmap
    def infer(z_init):
        expand = gauss_newton_expansion(
            lambda z: z, lambda eta: gaussian(jnp.full(1, x), eta, 2 * np.log(noise)), log_prior
        )
        plain = infer_posterior(expand, z_init, num_steps=20)
        return plain, infer_posterior(
            expand, z_init, num_steps=20, repair=shifted_expansion(expand, floor=0.5)
        )

    (posterior, info), (repaired, repaired_info) = infer(jnp.array([[2.0], [-1.5], [0.0]]))
    z = np.linspace(0, 9, 90_001)
    density = scipy.stats.norm.pdf(z, 3) + scipy.stats.norm.pdf(z, -3)
    density *= scipy.stats.norm.pdf(x, z, noise)
    top = np.argmax(density)
    curvature = -np.diff(np.log(density[top - 20 : top + 21 : 20]), 2)[0] / (20 * 1e-4) ** 2
    np.testing.assert_allclose(posterior.mean[:2, 0], [z[top], -z[top]], atol=1e-4)
    np.testing.assert_allclose(posterior.chol_precision[:2, 0, 0] ** 2, curvature, rtol=1e-3)
    # Between them the log joint is convex.
    np.testing.assert_array_equal(info.is_pd, [True, True, False])
    np.testing.assert_array_equal(jnp.isnan(posterior.chol_precision[:, 0, 0]), [0, 0, 1])
    np.testing.assert_array_equal(repaired_info.is_pd, info.is_pd)
    assert_close(repaired.chol_precision[2, 0, 0] ** 2, np.float64(0.5))


# ---------------------------------------------------------------- densities of a decoder


def test_fisher_information_makes_gauss_newton_positive_definite_where_the_hessian_is_not(x64):
    """Through a ReLU decoder: JᵀFJ + I, J by finite differences, against an indefinite Hessian."""
    kernel = jnp.asarray([[1.0, -2], [0.5, 1], [-1.5, 0.7]])
    z = random_vector(5, LATENT)
    bias = jnp.array([0.3, -2]) - z @ kernel
    log_scale, df = -1.5, 3.0

    def decode(z):
        return jax.nn.leaky_relu(z @ kernel + bias, 0.7)

    fitted = decode(z)
    likelihoods = {
        "heteroscedastic": (
            lambda eta: gaussian_heteroscedastic(fitted[:1] + 3, eta),
            gaussian_heteroscedastic_fisher,
            jnp.array([jnp.exp(-fitted[1]), 0.5]),
        ),
        "student_t": (
            lambda eta: student_t(fitted + 0.7, eta, log_scale, df),
            lambda eta: student_t_fisher(eta, log_scale, df),
            np.full(2, (df + 1) / (df + 3) * np.exp(-2 * log_scale)),
        ),
    }
    jacobian = central_differences(decode, z)
    for log_likelihood, fisher, weights in likelihoods.values():
        expand = gauss_newton_expansion(decode, log_likelihood, fisher=fisher)
        exact = exact_expansion(lambda z, f=log_likelihood: f(decode(z)) + standard_normal(z))
        gauss_newton, truth = jax.jit(expand)(z), jax.jit(exact)(z)
        assert_close(gauss_newton[:2], truth[:2])
        expected = (jacobian.T * weights) @ jacobian + np.eye(LATENT)
        assert_close(gauss_newton.precision, expected, rtol=FINITE_DIFFERENCE)
        assert np.linalg.eigvalsh(gauss_newton.precision)[0] > 1 - 1e-9
        assert np.linalg.eigvalsh(truth.precision)[0] < 0
