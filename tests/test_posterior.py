"""Gaussian posteriors against scipy, numpyro and closed forms by plain inverses in numpy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import pytest
import scipy.special
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
    MixturePosterior,
    Posterior,
    SkewedPosterior,
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    infer_posterior,
    iwae_bound,
    laplace_posterior,
    standard_normal,
)
from vlae_jax.posterior import kl_to_prior, mean_and_covariance
from vlae_jax.proposals import heavy_tailed, widened

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
def test_sample_gradients_are_reparameterized(x64, kind):
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
    centered = np.asarray(z) - np.asarray(posterior.mean)
    products = np.einsum("ni,nj->nij", centered, centered)
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


@pytest.mark.parametrize("kind", [*KINDS, "student_t"])
def test_the_mirror_image_of_a_point_is_as_likely_and_as_far(x64, kind):
    posterior = heavy_tailed(make("gaussian")[0], 4.0) if kind == "student_t" else make(kind)[0]
    z = random_vector(4, LATENT)
    mirrored = posterior.reflect(z)
    assert_close(mirrored + z, 2 * np.asarray(posterior.mean))
    one, other = jax.jit(jax.vmap(posterior.log_prob))(jnp.stack([z, mirrored]))
    assert_close(one, np.asarray(other))


# ---------------------------------------------------------------- skewed


def lopsided(z):
    """A log joint with most of its mass on one side, and none far out on the other."""
    return jnp.sum(standard_normal(z) + 2.0 * z - jnp.exp(z))


GRID = np.linspace(-9, 9, 4001)[:, None]


@jax.jit
def skew(keys, base):
    """Samples and their densities; the bounds key by key; and the density on the grid."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        skewed = SkewedPosterior(base, lopsided)
        z, log_q = jax.vmap(skewed.sample_and_log_prob)(keys)
        log_p = jax.vmap(lopsided)(z)
        return {
            "z": z,
            "log_q": log_q,
            "log_prob": jax.vmap(skewed.log_prob)(z),
            "log_weight": log_p - log_q,
            "grid": jax.vmap(skewed.log_prob)(jnp.asarray(GRID, z.dtype)),
            "base": jax.vmap(base.log_prob)(jnp.asarray(GRID, z.dtype)),
            "log_joint": jax.vmap(lopsided)(jnp.asarray(GRID, z.dtype)),
            "bound": jax.vmap(
                lambda key: iwae_bound(key, lopsided, base, num_samples=2, antithetic=True)
            )(keys),
        }


@pytest.mark.parametrize("kind", [*KINDS, "student_t"])
def test_the_skewed_density_integrates_to_one_and_its_elbo_is_the_antithetic_bound(dtype, kind):
    """The bound of two samples, by quadrature; above the ELBO of the base."""
    base = GaussianPosterior(jnp.asarray([0.2], dtype), jnp.asarray([[1.3]], dtype))
    if kind == "diagonal":
        base = DiagonalPosterior(base.mean, -jnp.log(base.chol_precision[0]))
    if kind == "student_t":
        base = heavy_tailed(base, 9.0)
    keys = jax.random.split(jax.random.key(0), 4000)
    seen = {name: np.float64(a) for name, a in skew(keys, base).items()}
    assert_close(seen["log_q"], seen["log_prob"], rtol=1e-5)
    grid = GRID[:, 0]
    q, skewed = np.exp(seen["base"]), np.exp(seen["grid"])
    assert_close(np.trapezoid(skewed, grid), 1.0, rtol=1e-3 if kind == "student_t" else 1e-5)
    assert np.max(np.abs(skewed - q)) > 0.05
    mirrored = np.interp(0.4 - grid, grid, seen["log_joint"])
    both = np.logaddexp(seen["log_joint"], mirrored) - np.log(2) - seen["base"]
    inside = np.abs(grid) < 8  # where the mirror image is on the grid
    bound = np.trapezoid((q * both)[inside], grid[inside])
    plain = np.trapezoid((q * (seen["log_joint"] - seen["base"]))[inside], grid[inside])
    assert bound > plain + 0.01
    for name in ("log_weight", "bound"):
        error = np.std(seen[name]) / np.sqrt(len(keys))
        assert_close(np.mean(seen[name]), bound, standard_error=error)
    mean = np.trapezoid(skewed * grid, grid)
    error = np.std(seen["z"]) / np.sqrt(len(keys))
    assert_close(np.mean(seen["z"]), mean, standard_error=error)
    assert abs(mean - 0.2) > 3 * error


def test_skewing_keeps_half_of_what_is_impossible_on_both_sides():
    """No NaN where neither a point nor its mirror image is possible; and a NaN shows."""
    base = DiagonalPosterior(jnp.zeros(1), jnp.zeros(1))
    nowhere = SkewedPosterior(base, lambda z: jnp.full_like(z[0], -jnp.inf))
    assert_close(nowhere.log_prob(jnp.ones(1)), np.float32(base.log_prob(jnp.ones(1))))
    spoiled = SkewedPosterior(base, lambda z: jnp.full_like(z[0], jnp.nan))
    assert np.isnan(spoiled.sample_and_log_prob(jax.random.key(0))[1])


def test_a_skewed_posterior_of_a_partial_passes_through_transformations(x64):
    def joint(scale, z):
        return lopsided(scale * z)

    @jax.jit
    @jax.vmap
    def build(scale):
        base = DiagonalPosterior(jnp.zeros(1), jnp.zeros(1))
        return SkewedPosterior(base, jax.tree_util.Partial(joint, scale))

    scales = jnp.asarray([0.5, 2.0])
    batch = build(scales)
    log_probs = jax.vmap(lambda q: q.log_prob(jnp.ones(1)))(batch)
    here, there = np.exp([[float(joint(s, x * jnp.ones(1))) for s in scales] for x in (1, -1)])
    expected = np.log(2 * here / (here + there)) + scipy.stats.norm.logpdf(1)
    assert_close(log_probs, expected)


def test_only_the_symmetric_is_skewed():
    skewed = SkewedPosterior(Sampler(make("diagonal", jnp.float32)[0]), lopsided)
    with pytest.raises(ValueError, match=r"symmetric.*Sampler is not"):
        jax.eval_shape(skewed.sample_and_log_prob, jax.random.key(0))


# ---------------------------------------------------------------- mixtures


def mixture(dtype, *, centered):
    """Of a Gaussian, a diagonal and a Student-t, and their densities by scipy."""
    mean, log_weights = jnp.asarray([0.5, -1, 2], dtype), jnp.asarray([0.3, -0.4, 1.0], dtype)
    gaussian, covariance = make("gaussian", dtype)
    diagonal, variances = make("diagonal", dtype)
    wide = heavy_tailed(diagonal._replace(mean=-mean), 9.0)
    components = (gaussian, diagonal._replace(mean=mean), wide)
    center = jnp.asarray([1.0, 2.0, -1.0], dtype) if centered else None
    means = [np.float64(c.mean if center is None else center) for c in components]
    truths = [
        scipy.stats.multivariate_normal(means[0], covariance),
        scipy.stats.multivariate_normal(means[1], variances),
        scipy.stats.multivariate_t(means[2], variances, df=9.0),
    ]
    shares = scipy.special.softmax(np.float64(log_weights))
    covariances = [covariance, variances, variances * 9 / 7]
    return MixturePosterior(components, log_weights, center), shares, truths, means, covariances


@jax.jit
def draw_mixture(keys, posterior, points):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        z, log_q = jax.vmap(posterior.sample_and_log_prob)(keys)
        return z, log_q, jax.vmap(posterior.log_prob)(points)


@pytest.mark.parametrize("centered", [False, True])
def test_a_mixture_is_scipys(dtype, centered):
    """Densities, at samples and elsewhere, and the mean and the second moments of samples."""
    posterior, shares, truths, means, covariances = mixture(dtype, centered=centered)
    num_samples = 8000
    points = jnp.stack([10.0**far * random_vector(far, LATENT, dtype) for far in range(3)])
    z, log_q, log_prob = draw_mixture(
        jax.random.split(jax.random.key(0), num_samples), posterior, points
    )
    z, points = np.float64(z), np.float64(points)

    def density(at):
        logs = [
            np.log(share) + truth.logpdf(at) for share, truth in zip(shares, truths, strict=True)
        ]
        return scipy.special.logsumexp(logs, axis=0)

    assert_close(log_prob, density(points))
    assert_close(log_q, density(z))
    mean = np.sum(shares[:, None] * np.array(means), axis=0)
    assert_close(np.mean(z, axis=0), mean, standard_error=np.std(z, axis=0) / num_samples**0.5)
    seconds = [np.outer(m, m) + c for m, c in zip(means, covariances, strict=True)]
    products = np.einsum("ni,nj->nij", z, z)
    error = np.std(products, axis=0) / num_samples**0.5
    second = np.sum(shares[:, None, None] * np.array(seconds), axis=0)
    assert_close(np.mean(products, axis=0), second, standard_error=error)


def test_a_mixture_is_symmetric_about_a_center_that_its_components_share():
    posterior, *_ = mixture(jnp.float32, centered=True)
    z = random_vector(4, LATENT, jnp.float32)
    assert_close(posterior.log_prob(posterior.reflect(z)), np.float32(posterior.log_prob(z)))
    off_center, *_ = mixture(jnp.float32, centered=False)
    weigh = functools.partial(elbo, jax.random.key(0), standard_normal, num_samples=2)
    assert jax.eval_shape(functools.partial(weigh, posterior, antithetic=True)).shape == ()
    with pytest.raises(ValueError, match=r"center.*antithetic=False"):
        jax.eval_shape(functools.partial(weigh, off_center, antithetic=True))
    with pytest.raises(ValueError, match="MixturePosterior is not"):
        posterior._replace(components=(off_center,), log_weights=jnp.zeros(1)).log_prob(z)
    with pytest.raises(ValueError, match=r"3 components and log weights of shape \(2,\)"):
        posterior._replace(log_weights=jnp.zeros(2)).log_prob(z)
    with pytest.raises(ValueError, match="at least one component"):
        MixturePosterior((), jnp.zeros(0)).log_prob(z)


# ---------------------------------------------------------------- only samples


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
        kl = kl_to_prior(key, posterior, num_samples=num_samples)
        return kl, *mean_and_covariance(key, posterior, num_samples=num_samples)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def sampled(key, posterior):
        kl = kl_to_prior(key, Sampler(posterior), num_samples=num_samples)
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
    """The same network linearized; where the exact precision is positive definite it stays."""
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
