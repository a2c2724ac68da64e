"""Gaussian posteriors against scipy, numpyro and closed forms by plain inverses in numpy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import pytest
import scipy.stats
from problems import (
    FINITE_DIFFERENCE,
    INDEFINITE,
    LATENT,
    Network,
    assert_close,
    central_differences,
    flatten,
    indefinite_kernel,
    random_layers,
    random_vector,
)

from vlae_jax import (
    DiagonalPosterior,
    GaussianPosterior,
    Posterior,
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    infer_posterior,
    laplace_posterior,
    standard_normal,
)
from vlae_jax.posterior import (
    heavy_tailed,
    kl_to_standard_normal,
    mean_and_covariance,
    widened,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

KINDS = ["gaussian", "diagonal"]


def make(kind, dtype=float):
    """A posterior, and its mean and covariance in float64 numpy."""
    mean = random_vector(0, LATENT, dtype)
    if kind == "diagonal":
        log_std = 0.7 * random_vector(1, LATENT, dtype)
        return DiagonalPosterior(mean, log_std), np.diag(np.exp(2 * np.float64(log_std)))
    chol = np.tril(np.random.default_rng(2).normal(size=(LATENT, LATENT)))
    chol = jnp.asarray(chol - np.diag(np.diag(chol)) + np.diag([0.5, 1.5, 3.0]), dtype)
    return GaussianPosterior(mean, chol), np.linalg.inv(np.float64(chol) @ np.float64(chol).T)


@jax.jit
def everything(posterior, z):
    """Each closed form of a posterior, and numpyro's word on two of them."""
    if isinstance(posterior, GaussianPosterior):
        chol = posterior.chol_precision
        peer = numpyro.distributions.MultivariateNormal(
            posterior.mean, precision_matrix=chol @ chol.T
        )
    else:
        peer = numpyro.distributions.Normal(posterior.mean, jnp.exp(posterior.log_std)).to_event()
    ours = {
        "log_prob": posterior.log_prob(z),
        "entropy": posterior.entropy(),
        "kl": posterior.kl_to_standard_normal(),
        "covariance": posterior.covariance(),
    }
    return ours, peer.log_prob(z)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_equal_scipy_and_numpyro(dtype, kind):
    posterior, covariance = make(kind, dtype)
    z, mean = random_vector(4, LATENT, dtype), np.float64(posterior.mean)
    ours, by_numpyro = everything(posterior, z)
    truth = scipy.stats.multivariate_normal(mean, covariance)
    assert_close(ours["log_prob"], truth.logpdf(np.float64(z)))
    assert_close(ours["log_prob"], np.float64(by_numpyro))
    assert_close(ours["entropy"], truth.entropy())
    assert_close(ours["covariance"], covariance)
    log_det = np.linalg.slogdet(covariance)[1]
    kl = 0.5 * (np.trace(covariance) + mean @ mean - LATENT - log_det)
    assert_close(ours["kl"], kl)


@jax.jit
def draw(keys, posterior):
    z, log_q = jax.vmap(posterior.sample_and_log_prob)(keys)
    log_p = jax.vmap(standard_normal)(z)
    return z, log_q, jax.vmap(posterior.log_prob)(z), log_q - log_p


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_mean_and_the_covariance(x64, kind):
    """And the mean log ratio to N(0, I) is the divergence."""
    num_samples = 20_000
    posterior, covariance = make(kind)
    z, _, _, log_ratio = draw(jax.random.split(jax.random.key(0), num_samples), posterior)
    variances = np.diag(covariance)
    assert_close(
        np.mean(z, axis=0),
        np.asarray(posterior.mean),
        standard_error=np.sqrt(variances / num_samples),
    )
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / num_samples)
    assert_close(np.cov(z.T), covariance, standard_error=spread)
    assert_close(
        np.mean(log_ratio),
        np.asarray(posterior.kl_to_standard_normal()),
        standard_error=np.std(log_ratio) / np.sqrt(num_samples),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_density_that_comes_with_a_sample_is_its_log_prob(x64, kind):
    posterior, _ = make(kind)
    _, log_q, log_prob, _ = draw(jax.random.split(jax.random.key(1), 100), posterior)
    assert_close(log_q, np.asarray(log_prob))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_gradients_are_reparametrised(x64, kind):
    """Differences at a fixed key, of the sample and of its log density; no score in the latter."""
    posterior, _ = make(kind)

    def drawn(posterior):
        return flatten(posterior.sample_and_log_prob(jax.random.key(2)))

    jacobian = jax.jit(jax.jacrev(drawn))(posterior)
    expected = central_differences(drawn, posterior)
    assert_close(jax.vmap(flatten)(jacobian), expected, rtol=FINITE_DIFFERENCE)
    np.testing.assert_array_equal(jacobian.mean, np.vstack([np.eye(LATENT), np.zeros(LATENT)]))


# ---------------------------------------------------------------- proposals


@jax.jit
def weigh_tails(keys, posterior, points, df):
    """The Student-t in a Gaussian's place: densities at points, and samples with theirs."""
    proposal = heavy_tailed(posterior, df)
    z, log_q = jax.vmap(proposal.sample_and_log_prob)(keys)
    return jax.vmap(proposal.log_prob)(points), z, log_q, jax.vmap(proposal.log_prob)(z)


@pytest.mark.parametrize("kind", KINDS)
def test_the_heavy_tailed_proposal_is_scipys_student_t(dtype, kind):
    """Of the Gaussian's mean, and of its covariance as the scale matrix."""
    posterior, scale = make(kind, dtype)
    mean = np.float64(posterior.mean)
    points = jnp.stack([100.0**far * random_vector(far, LATENT, dtype) for far in range(3)])
    keys = jax.random.split(jax.random.key(3), 100)
    for df in (1.0, 5.0):
        truth = scipy.stats.multivariate_t(mean, scale, df=df)
        log_prob, z, log_q, log_prob_z = weigh_tails(keys, posterior, points, df)
        assert {a.dtype for a in (log_prob, z, log_q)} == {jnp.dtype(dtype)}
        assert_close(log_prob, truth.logpdf(np.float64(points)))
        assert_close(log_q, truth.logpdf(np.float64(z)))
        assert_close(log_prob_z, np.asarray(log_q))


def test_heavy_tailed_samples_have_the_moments_of_a_student_t(x64):
    """Mean, and covariance ν / (ν - 2) times the scale; and q's mean ratio to it is 1."""
    num_samples, df = 40_000, 10.0
    posterior, scale = make("gaussian")
    keys = jax.random.split(jax.random.key(0), num_samples)
    _, z, log_t, _ = weigh_tails(keys, posterior, jnp.zeros((3, LATENT)), df)
    expected = df / (df - 2) * scale
    error = np.sqrt(np.diag(expected) / num_samples)
    assert_close(np.mean(z, axis=0), np.asarray(posterior.mean), standard_error=error)
    centred = np.asarray(z) - np.asarray(posterior.mean)
    products = np.einsum("ni,nj->nij", centred, centred)
    error = np.std(products, axis=0) / np.sqrt(num_samples)
    assert_close(np.mean(products, axis=0), expected, standard_error=error)
    truth = scipy.stats.multivariate_normal(np.asarray(posterior.mean), scale)
    ratios = np.exp(truth.logpdf(z) - np.asarray(log_t))
    error = np.std(ratios) / np.sqrt(num_samples)
    assert_close(np.mean(ratios), 1.0, standard_error=error)


@pytest.mark.parametrize("kind", KINDS)
def test_widening_multiplies_standard_deviations_and_nothing_else(x64, kind):
    posterior, covariance = make(kind)
    wide, z = widened(posterior, 1.5), random_vector(4, LATENT)
    assert type(wide) is type(posterior)
    ours, _ = everything(wide, z)
    truth = scipy.stats.multivariate_normal(np.asarray(posterior.mean), 1.5**2 * covariance)
    assert_close(ours["log_prob"], truth.logpdf(z))
    assert_close(ours["covariance"], truth.cov)


class Sampler(NamedTuple):
    """What only samples are known of."""

    base: Posterior

    def sample_and_log_prob(self, key):
        return self.base.sample_and_log_prob(key)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_divergence_are_exact_where_known_and_sampled_elsewhere(x64, kind):
    posterior, covariance = make(kind)
    key, num_samples, repeats = jax.random.key(4), 50, 400

    @jax.jit
    def exactly(posterior):
        kl = kl_to_standard_normal(key, posterior, num_samples=num_samples)
        return kl, *mean_and_covariance(key, posterior, num_samples=num_samples)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def sampled(key, posterior):
        kl = kl_to_standard_normal(key, Sampler(posterior), num_samples=num_samples)
        return kl, *mean_and_covariance(key, Sampler(posterior), num_samples=num_samples)

    known = exactly(posterior)
    assert_close(known[1:], (np.asarray(posterior.mean), covariance))
    assert_close(known[0], np.asarray(posterior.kl_to_standard_normal()))
    estimates = sampled(jax.random.split(key, repeats), posterior)
    for estimate, truth in zip(estimates, known, strict=True):
        error = np.std(estimate, axis=0) / np.sqrt(repeats)
        assert_close(np.mean(estimate, axis=0), np.asarray(truth), standard_error=error)


def test_sampled_moments_of_one_dimension_have_two_axes(x64):
    """As those of many do."""
    one = Sampler(DiagonalPosterior(jnp.ones(1), jnp.zeros(1)))
    mean, covariance = mean_and_covariance(jax.random.key(0), one, num_samples=10)
    assert mean.shape == (1,) and covariance.shape == (1, 1)


def test_laplace_posterior_takes_mode_and_precision_as_they_are(x64):
    precision = np.array([[2.0, 0.3, -0.1], [0.3, 1.0, 0.2], [-0.1, 0.2, 3.0]])
    mode = random_vector(5, LATENT)
    expand = exact_expansion(lambda z: -0.5 * z @ precision @ z)
    posterior = jax.jit(lambda mode: laplace_posterior(expand, mode))(mode)
    np.testing.assert_array_equal(posterior.mean, mode)
    assert_close(posterior.chol_precision, np.linalg.cholesky(precision))


# ---------------------------------------------------------------- indefinite precisions


@pytest.fixture(params=INDEFINITE)
def batch(request, x64):
    """Three examples, of which the second has an indefinite precision, and how to infer."""
    problem, kernel = INDEFINITE[request.param], indefinite_kernel()
    x = jnp.asarray(np.stack([problem.good_x, problem.bad_x, problem.good_x + 0.01]))

    def infer(kernel, x, repaired):
        log_joint = functools.partial(problem.log_joint, kernel, x)
        expand, repair = exact_expansion(log_joint), problem.stand_in(kernel, x)
        repair = repair if repaired else None
        posterior, info = infer_posterior(expand, jnp.zeros(LATENT), num_steps=0, repair=repair)
        return posterior, info, elbo(jax.random.key(0), log_joint, posterior)

    return infer, kernel, x, problem


def test_an_indefinite_precision_gives_nan_for_that_example_alone(batch):
    infer, kernel, x, _ = batch
    posterior, info, bound = jax.jit(jax.vmap(lambda x: infer(kernel, x, False)))(x)
    np.testing.assert_array_equal(info.is_pd, [True, False, True])
    assert np.all(np.isnan(posterior.chol_precision[1]))
    assert np.all(np.isfinite(posterior.chol_precision[::2]))
    np.testing.assert_array_equal(np.isnan(bound), [False, True, False])
    np.testing.assert_array_equal(np.isnan(info.newton_decrement), [False, True, False])


def test_a_repair_gives_finite_values_and_gradients_through_the_batch(batch):
    """And the repaired factor is that of the stand-in, the flag still telling of it."""
    infer, kernel, x, problem = batch

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(kernel):
        posterior, info, bound = jax.vmap(lambda x: infer(kernel, x, True))(x)
        return jnp.sum(bound), (posterior, info, bound)

    gradient, (posterior, info, bound) = differentiate(kernel)
    np.testing.assert_array_equal(info.is_pd, [True, False, True])
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
    assert np.all(np.isfinite(bound)) and np.all(np.isfinite(info.newton_decrement))
    stand_in = problem.stand_in(kernel, x[1])(jnp.zeros(LATENT)).precision
    assert_close(posterior.chol_precision[1], np.linalg.cholesky(stand_in))


def test_gauss_newton_repairs_a_smooth_decoder(x64):
    """The same network linearised; where the exact precision is positive definite it stays."""
    network, z = Network("tanh", "bernoulli"), jnp.zeros(LATENT)

    @jax.jit
    def both(layers):
        exact, gauss_newton = network.exact(layers), network.gauss_newton(layers)
        repaired = laplace_posterior(exact, z, repair=gauss_newton).chol_precision
        return exact(z).precision, gauss_newton(z).precision, repaired

    outcomes = set()
    for seed in range(8):
        exact, gauss_newton, repaired = both(random_layers(seed))
        is_pd = bool(np.linalg.eigvalsh(exact)[0] > 0)
        outcomes.add(is_pd)
        assert_close(repaired, np.linalg.cholesky(exact if is_pd else gauss_newton))
    assert outcomes == {True, False}


def test_gradients_of_the_other_examples_do_not_see_a_nan_factor(x64):
    """Reverse mode through a batch in which one factor is NaN and is masked by the caller."""
    problem, kernel = INDEFINITE["student_t"], indefinite_kernel()

    def entropies(kernel, x):
        def one(x):
            expand = exact_expansion(functools.partial(problem.log_joint, kernel, x))
            return laplace_posterior(expand, jnp.zeros(LATENT)).entropy()

        entropy = jax.vmap(one)(x)
        return jnp.sum(jnp.where(jnp.isnan(entropy), 0.0, entropy))

    differentiate = jax.jit(jax.grad(entropies))
    good = jnp.asarray(problem.good_x)
    with_bad = differentiate(kernel, jnp.stack([good, jnp.asarray(problem.bad_x)]))
    assert_close(with_bad, 0.5 * np.asarray(differentiate(kernel, jnp.stack([good, good]))))


def test_a_stand_in_that_is_not_positive_definite_either_stays_nan(x64):
    convex = exact_expansion(lambda z: 0.5 * z @ z)
    concave = gauss_newton_expansion(lambda z: z, lambda eta: -0.5 * eta @ eta)
    z = random_vector(6, LATENT)
    assert np.all(np.isnan(laplace_posterior(convex, z, repair=convex).chol_precision))
    repaired = laplace_posterior(convex, z, repair=concave).chol_precision
    assert_close(repaired, np.sqrt(2) * np.eye(LATENT))
