"""The posterior composes: any library's decoder gives the same one, and bridges keep the truth."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import optimistix as optx
import pytest
import scipy.stats
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from problems import (
    DIM,
    FINITE_DIFFERENCE,
    HIDDEN,
    LATENT,
    Network,
    assert_close,
    central_differences,
    decode,
    flatten,
    random_layers,
    random_vector,
    run_in_subprocess,
)

from vlae_jax import (
    DiagonalPosterior,
    GaussianPosterior,
    bernoulli,
    elbo,
    exact_expansion,
    infer_posterior,
    laplace_posterior,
    newton_refine,
    standard_normal,
)
from vlae_jax.interop import numpyro_log_joint, optimistix_refine, to_numpyro

pytestmark = pytest.mark.usefixtures("quick_compile")


def polish(expand, mode):
    """Two full Newton steps: a search stops where rounding hides what is left, 1e-8 away."""
    for _ in range(2):
        _, grad, precision = expand(mode)
        mode = mode + jnp.linalg.solve(precision, grad)
    return mode


# ---------------------------------------------------------------- five libraries, one posterior

WIDTHS = (HIDDEN, HIDDEN, DIM)
X = jnp.asarray(np.arange(DIM) % 2, jnp.float32)
Z_INIT = random_vector(0, LATENT, jnp.float32)


def plain_jax(layers):
    return layers, functools.partial(lambda layers, z: decode(layers, "tanh", z)), lambda tree: tree


def flax_nnx(layers):
    class Decoder(nnx.Module):
        def __init__(self, rngs):
            sizes = (LATENT, *WIDTHS)
            self.layers = nnx.List(
                nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)
            )

        def __call__(self, z):
            for layer in self.layers[:-1]:
                z = jnp.tanh(layer(z))
            return self.layers[-1](z)

    decoder = Decoder(nnx.Rngs(0))
    for layer, (kernel, bias) in zip(decoder.layers, layers, strict=True):
        layer.kernel[...], layer.bias[...] = kernel, bias
    return (
        decoder,
        lambda decoder, z: decoder(z),
        lambda tree: [(layer.kernel[...], layer.bias[...]) for layer in tree.layers],
    )


def flax_linen(layers):
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, z):
            for k, width in enumerate(WIDTHS[:-1]):
                z = jnp.tanh(nn.Dense(width, name=str(k))(z))
            return nn.Dense(WIDTHS[-1], name="2")(z)

    params = {str(k): {"kernel": w, "bias": b} for k, (w, b) in enumerate(layers)}
    return (
        {"params": params},
        Decoder().apply,
        lambda tree: [(tree["params"][k]["kernel"], tree["params"][k]["bias"]) for k in "012"],
    )


def equinox(layers):
    class Decoder(eqx.Module):
        layers: list[eqx.nn.Linear]

        def __call__(self, z):
            for layer in self.layers[:-1]:
                z = jnp.tanh(layer(z))
            return self.layers[-1](z)

    keys = jax.random.split(jax.random.key(0), len(layers))
    linear = [
        eqx.nn.Linear(*kernel.shape, key=key) for (kernel, _), key in zip(layers, keys, strict=True)
    ]
    decoder = eqx.tree_at(
        lambda model: [leaf for layer in model.layers for leaf in (layer.weight, layer.bias)],
        Decoder(linear),
        [leaf for kernel, bias in layers for leaf in (kernel.T, bias)],
    )
    return (
        decoder,
        lambda decoder, z: decoder(z),
        lambda tree: [(layer.weight.T, layer.bias) for layer in tree.layers],
    )


def haiku(layers):
    def forward(z):
        for k, width in enumerate(WIDTHS[:-1]):
            z = jnp.tanh(hk.Linear(width, name=f"layer_{k}")(z))
        return hk.Linear(WIDTHS[-1], name="layer_2")(z)

    apply = hk.without_apply_rng(hk.transform(forward)).apply
    params = {f"layer_{k}": {"w": w, "b": b} for k, (w, b) in enumerate(layers)}
    return (
        params,
        apply,
        lambda tree: [(tree[f"layer_{k}"]["w"], tree[f"layer_{k}"]["b"]) for k in range(3)],
    )


@functools.cache
def posterior_and_slope(library):
    """Mean, factor, and the ELBO's gradient with respect to the weights in the common layout."""
    weights, apply, common = library(
        jax.tree.map(lambda w: 0.7 * w, random_layers(0, (LATENT, *WIDTHS), jnp.float32))
    )

    @jax.jit
    def run(weights):
        def infer(weights):
            def log_joint(z):
                return bernoulli(X, apply(weights, z)) + standard_normal(z)

            # Without a line search: near a mode rounding decides which step length is the best.
            posterior, _ = infer_posterior(
                exact_expansion(log_joint), Z_INIT, num_steps=4, damping="paper"
            )
            return elbo(jax.random.key(0), log_joint, posterior, num_samples=3), posterior

        (_, posterior), slope = jax.value_and_grad(infer, has_aux=True)(weights)
        return posterior, common(slope)

    return run(weights)


@pytest.mark.parametrize("library", [flax_nnx, flax_linen, equinox, haiku])
def test_the_same_weights_give_the_same_posterior_and_gradient(library):
    posterior, slope = posterior_and_slope(library)
    expected_posterior, expected_slope = posterior_and_slope(plain_jax)
    assert np.all(np.isfinite(flatten(expected_posterior)))
    assert np.linalg.norm(flatten(expected_slope)) > 0.1
    assert_close(posterior, expected_posterior)
    assert_close(flatten(slope), np.asarray(flatten(expected_slope)))


# ---------------------------------------------------------------- numpyro models

FEATURES = np.random.default_rng(1).normal(size=(12, 2))
COUNTS = np.random.default_rng(2).poisson(2.0, 12)


def counts_model(features, counts, *, shape=2.0):
    """A positive and an interval site: both move to the real line with a log-Jacobian."""
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 0.5).to_event(1))
    base = numpyro.sample("base", dist.Gamma(shape, 1.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 2.0))
    rate = base + share * jnp.exp(features @ weights)
    numpyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def counts_log_joint(z, shape):
    """The same by scipy's formulas: sites in the order of their names, with the Jacobians."""
    log_base, logit_share, weights = z[0], z[1], z[2:]
    base, share = np.exp(log_base), 2.0 / (1.0 + np.exp(-logit_share))
    rate = base + share * np.exp(FEATURES @ weights)
    return (
        scipy.stats.poisson.logpmf(COUNTS, rate).sum()
        + scipy.stats.norm.logpdf(weights, 0.0, 0.5).sum()
        + scipy.stats.gamma.logpdf(base, shape)
        + scipy.stats.uniform.logpdf(share, 0.0, 2.0)
        + log_base  # d base / d log base
        + np.log(share * (1.0 - share / 2.0))  # d share / d logit
    )


def test_the_log_density_of_a_numpyro_model_and_its_parameters_are_scipys(x64):
    log_joint, z_init, constrain = numpyro_log_joint(counts_model, FEATURES, COUNTS, shape=3.0)
    np.testing.assert_array_equal(z_init, np.zeros(4))
    for seed in range(3):
        z = np.asarray(random_vector(seed, 4))
        assert_close(log_joint(z), counts_log_joint(z, 3.0))
        values = constrain(z)
        expected = {"base": np.exp(z[0]), "share": 2 / (1 + np.exp(-z[1])), "weights": z[2:]}
        assert_close(values, expected)


def test_the_posterior_of_a_numpyro_model_is_that_of_its_automatic_guide(x64):
    """And of scipy's density: its inverse Hessian by finite differences at the mode."""

    @jax.jit
    def by_us():
        log_joint, z_init, _ = numpyro_log_joint(counts_model, FEATURES, COUNTS)
        expand = exact_expansion(log_joint)
        return infer_posterior(expand, z_init, num_steps=20, damping="trust_region")

    posterior, info = by_us()
    assert info.converged and info.is_pd and info.newton_decrement < 1e-12

    # Another search and another Hessian of numpyro's own density.
    @jax.jit
    def by_numpyro():
        guide = AutoLaplaceApproximation(counts_model)
        settling = optax.adam(optax.exponential_decay(0.1, 60, 0.5))
        optimizer = numpyro.optim.optax_to_numpyro(settling)
        svi = SVI(counts_model, guide, optimizer, Trace_ELBO())
        state = svi.init(jax.random.key(0), FEATURES, COUNTS)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, FEATURES, COUNTS), state, length=800)
        found = guide.get_transform(svi.get_params(state))
        return found.loc, found.scale_tril @ found.scale_tril.T

    mean, covariance = by_numpyro()
    assert_close(posterior.mean, np.asarray(mean), rtol=1e-5)
    assert_close(posterior.covariance(), np.asarray(covariance), rtol=1e-5)

    step = 1e-3
    offsets = step * np.eye(4)
    mode = np.asarray(posterior.mean)
    hessian = np.array(
        [
            [
                sum(
                    s * t * counts_log_joint(mode + s * a + t * b, 2.0)
                    for s in (-1, 1)
                    for t in (-1, 1)
                )
                / (4 * step**2)
                for a in offsets
            ]
            for b in offsets
        ]
    )
    assert_close(posterior.covariance(), np.linalg.inv(-hessian), rtol=1e-5)


@pytest.mark.slow
def test_a_numpyro_model_composes_with_vmap_and_grad_over_its_arguments(x64):
    """The mode of each of three data sets, and how it moves with a prior's parameter."""
    counts = jnp.asarray(np.random.default_rng(4).poisson(2.0, (3, 12)))

    def expand(shape, counts):
        model = numpyro_log_joint(counts_model, FEATURES, counts, shape=shape)
        return exact_expansion(model.log_joint), model.z_init

    def mode(shape, counts):
        found, _ = infer_posterior(*expand(shape, counts), num_steps=20, damping="trust_region")
        return found.mean, found.mean

    def moved(shape):
        return jax.vmap(lambda counts, mode: polish(expand(shape, counts)[0], mode))(counts, modes)

    slope = jax.jit(jax.vmap(jax.jacobian(mode, has_aux=True), in_axes=(None, 0)))
    slopes, modes = slope(2.0, counts)
    assert_close(slopes, central_differences(moved, 2.0)[..., 0], rtol=FINITE_DIFFERENCE)


# ---------------------------------------------------------------- numpyro distributions


@pytest.fixture
def gaussian_posterior(dtype):
    """Correlated, of unequal scales; and its mean and covariance by float64 numpy."""
    rng = np.random.default_rng(5)
    chol = np.tril(rng.normal(size=(4, 4)), -1) + np.diag([0.5, 1.0, 2.0, 4.0])
    posterior = GaussianPosterior(*(jnp.asarray(a, dtype) for a in (rng.normal(size=4), chol)))
    mean, chol = (np.asarray(a, np.float64) for a in posterior)
    return posterior, mean, np.linalg.inv(chol @ chol.T)


def test_the_numpyro_posterior_has_the_mean_covariance_and_density_of_scipy(gaussian_posterior):
    posterior, mean, covariance = gaussian_posterior
    converted = to_numpyro(posterior)
    assert isinstance(converted, dist.MultivariateNormal) and converted.batch_shape == ()
    assert_close(converted.mean, mean)
    assert_close(converted.covariance_matrix, covariance)
    assert np.all(np.diagonal(converted.scale_tril) > 0)
    np.testing.assert_array_equal(np.triu(converted.scale_tril, 1), 0)
    z = mean + np.random.default_rng(6).normal(size=(5, 4))
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(z)
    assert_close(converted.log_prob(jnp.asarray(z, posterior.mean.dtype)), expected)


def test_samples_of_the_numpyro_posterior_have_its_moments(gaussian_posterior):
    posterior, mean, covariance = gaussian_posterior
    draws = np.asarray(to_numpyro(posterior).sample(jax.random.key(0), (20_000,)), np.float64)
    variances = np.diagonal(covariance)
    assert_close(draws.mean(0), mean, standard_error=np.sqrt(variances / len(draws)))
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / len(draws))
    assert_close(np.cov(draws.T), covariance, standard_error=spread)


def test_the_diagonal_posterior_converts_too(dtype):
    posterior = DiagonalPosterior(*(random_vector(s, 4, dtype) for s in range(2)))
    converted = to_numpyro(posterior)
    z = random_vector(2, 4, dtype)
    mean, std = np.float64(posterior.mean), np.exp(np.float64(posterior.log_std))
    assert converted.event_shape == (4,)
    assert_close(converted.log_prob(z), scipy.stats.norm(mean, std).logpdf(np.float64(z)).sum())
    assert_close(converted.variance, std**2)


def test_conversion_composes_with_jit_vmap_and_grad(x64):
    factors = jax.vmap(jnp.diag)(jnp.exp(0.3 * jax.random.normal(jax.random.key(0), (6, 4))))
    factors += jnp.tril(jax.random.normal(jax.random.key(1), (6, 4, 4)), -1)
    posteriors = GaussianPosterior(jax.random.normal(jax.random.key(2), (6, 4)), factors)
    z = jax.random.normal(jax.random.key(3), (6, 4))

    def log_prob(posterior, z):
        return to_numpyro(posterior).log_prob(z)

    inside = jax.jit(jax.vmap(log_prob))(posteriors, z)
    assert_close(inside, np.asarray(jax.vmap(GaussianPosterior.log_prob)(posteriors, z)))
    outside = jax.jit(to_numpyro)(posteriors)
    assert outside.batch_shape == (6,)
    assert_close(outside.log_prob(z), np.asarray(inside))

    one = jax.tree.map(lambda array: array[0], posteriors)
    slope = jax.jit(jax.grad(log_prob))(one, z[0])
    lower = one._replace(chol_precision=np.tril(slope.chol_precision))
    expected = jax.grad(lambda posterior: posterior.log_prob(z[0]))(one)
    assert_close(slope.mean, np.asarray(expected.mean))
    assert_close(lower.chol_precision, np.tril(expected.chol_precision))


def test_an_ill_conditioned_float32_factor_keeps_its_accuracy():
    """Refactoring the precision, of condition number 1e8, has no Cholesky in float32."""
    rng = np.random.default_rng(7)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    chol = np.linalg.cholesky((rotation * np.logspace(0, 8, 6)) @ rotation.T).astype(np.float32)
    posterior = GaussianPosterior(jnp.zeros(6), jnp.asarray(chol))
    precision = np.float64(chol) @ np.float64(chol).T
    assert np.linalg.cond(precision) > 1e7
    covariance = np.linalg.inv(precision)
    assert_close(to_numpyro(posterior).covariance_matrix, covariance)


def test_a_missing_factor_stays_missing():
    factors = jnp.stack([jnp.eye(3), jnp.full((3, 3), jnp.nan)])

    @jax.jit
    def log_probs(posteriors):
        return to_numpyro(posteriors).log_prob(jnp.zeros(3))

    good, missing = log_probs(GaussianPosterior(jnp.zeros((2, 3)), factors))
    assert_close(good, np.float64(standard_normal(jnp.zeros(3))))
    assert np.isnan(missing)
    with pytest.raises(ValueError, match="invalid scale_tril"):  # numpyro's own check
        to_numpyro(GaussianPosterior(jnp.zeros((2, 3)), factors))


def test_no_other_posterior_converts():
    with pytest.raises(TypeError, match="GaussianPosterior or a DiagonalPosterior, got"):
        to_numpyro(standard_normal)


# ---------------------------------------------------------------- optimistix

NETWORK = Network("tanh", "bernoulli")
SOLVER = optx.BFGS(rtol=1e-9, atol=1e-9)


@functools.partial(jax.jit, static_argnames="max_steps")
def search(layers, z_init, max_steps=200):
    log_joint = functools.partial(NETWORK.log_joint, layers)
    return optimistix_refine(log_joint, z_init, solver=SOLVER, max_steps=max_steps)


def test_optimistix_finds_the_mode_that_newton_finds(x64):
    layers = random_layers(1)
    z_init = random_vector(1, LATENT)
    mode, info = search(layers, z_init)
    expand = NETWORK.exact(layers)
    expected, newton = jax.jit(
        lambda z: newton_refine(expand, z, num_steps=30, damping="trust_region")
    )(z_init)
    assert newton.converged and newton.newton_decrement < 1e-12
    assert_close(mode, np.asarray(expected), rtol=1e-7)
    assert info.converged and info.is_pd and info.newton_decrement < 1e-12
    assert 1 < info.steps_used < 200


def test_the_report_of_an_optimistix_search_has_its_start_and_its_mode(x64):
    layers, z_init = random_layers(1), random_vector(1, LATENT)
    mode, info = search(layers, z_init)
    np.testing.assert_array_equal(info.iterates, np.stack([z_init, mode]))
    ends = jax.vmap(functools.partial(NETWORK.log_joint, layers))(info.iterates)
    assert_close(info.log_joint, np.asarray(ends))
    assert info.log_joint[1] > info.log_joint[0] + 0.1


def test_an_unfinished_search_is_not_called_converged(x64):
    """Neither by the solver's word, though little is left to gain, nor by the decrement alone."""
    layers = random_layers(1)
    mode, _ = search(layers, random_vector(1, LATENT))
    _, near = search(layers, mode + 1e-3, max_steps=1)
    assert near.newton_decrement < 1e-3 and near.steps_used == 1 and not near.converged
    _, far = search(layers, mode + 3.0, max_steps=1)
    assert far.newton_decrement > 0.1 and not far.converged


def test_one_failing_example_of_a_batch_fails_alone(x64):
    """A log joint without maximum, one that is NaN, and one with curvature: under one vmap."""

    def infer(kind):
        def log_joint(z):
            rising = jnp.sum(z)
            return jnp.where(kind == 0, standard_normal(z), jnp.where(kind == 1, rising, jnp.nan))

        return optimistix_refine(log_joint, jnp.ones(2), solver=SOLVER, max_steps=20)

    mode, info = jax.jit(jax.vmap(infer))(jnp.arange(3))
    np.testing.assert_array_equal(info.converged, [True, False, False])
    np.testing.assert_array_equal(info.is_pd, [True, False, False])
    assert np.max(np.abs(mode[0])) < 1e-6


def test_a_solver_that_stops_too_early_does_not_convince(x64):
    """It calls any point a success; the Newton decrement does not."""
    careless = optx.BFGS(rtol=1e3, atol=1e3)

    @jax.jit
    def infer(z_init):
        return optimistix_refine(lambda z: standard_normal(0.1 * z), z_init, solver=careless)

    _, info = infer(jnp.full(LATENT, 5.0))
    assert info.steps_used < 5
    assert info.newton_decrement > 0.01 and not info.converged


def test_the_implicit_gradient_of_an_optimistix_mode_is_that_of_central_differences(x64):
    layers, z_init = random_layers(1), random_vector(1, LATENT)
    direction = jnp.array([1.0, -2.0, 0.5])
    slope = flatten(jax.jit(jax.grad(lambda layers: search(layers, z_init)[0] @ direction))(layers))
    assert np.max(np.abs(slope)) > 0.1
    mode, _ = search(layers, z_init)
    expected = central_differences(
        lambda layers: polish(NETWORK.exact(layers), mode) @ direction, layers
    )
    assert_close(slope, expected, rtol=FINITE_DIFFERENCE)
    forward = jax.jit(jax.jacfwd(lambda layers: search(layers, z_init)[0] @ direction))(layers)
    assert_close(flatten(forward), np.asarray(slope))


def test_the_posterior_at_an_optimistix_mode_has_the_right_gradient(x64):
    """Through the mode and the precision, vmapped; nothing reaches the first guess."""
    layers, z_inits = random_layers(1), jnp.stack([random_vector(s, LATENT) for s in (1, 2)])

    def entropies(layers, modes):
        posteriors = jax.vmap(lambda z: laplace_posterior(NETWORK.exact(layers), z))(modes)
        return jnp.sum(jax.vmap(GaussianPosterior.entropy)(posteriors))

    def searched(layers, z_inits):
        return entropies(layers, jax.vmap(lambda z: search(layers, z)[0])(z_inits))

    slope, to_first_guess = jax.jit(jax.grad(searched, argnums=(0, 1)))(layers, z_inits)
    modes = jax.vmap(lambda z: search(layers, z)[0])(z_inits)
    expected = central_differences(
        lambda layers: entropies(
            layers, jax.vmap(lambda z: polish(NETWORK.exact(layers), z))(modes)
        ),
        layers,
    )
    assert_close(flatten(slope), expected, rtol=FINITE_DIFFERENCE)
    np.testing.assert_array_equal(to_first_guess, 0)


def test_an_optimistix_search_without_curvature_gives_no_gradient(x64):
    """A linear log joint: the search gives up, and its end does not move with the slope."""

    def end(slope):
        mode, _ = optimistix_refine(
            lambda z: slope * jnp.sum(z), jnp.ones(2), solver=SOLVER, max_steps=5
        )
        return jnp.sum(mode)

    assert jax.jit(jax.grad(end))(1.0) == 0 and jax.grad(end)(1.0) == 0


def test_optimistix_refine_refuses_wrong_calls():
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        optimistix_refine(standard_normal, jnp.ones(2), solver=SOLVER, max_steps=0)
    with pytest.raises(ValueError, match=r"z must have shape \(latent,\)"):
        optimistix_refine(standard_normal, jnp.ones((2, 2)), solver=SOLVER)


# ---------------------------------------------------------------- optional libraries


def test_a_missing_library_is_told_in_one_line_with_its_extra():
    code = """
import sys
sys.modules["numpyro"] = sys.modules["optimistix"] = None
import jax.numpy as jnp
from vlae_jax import DiagonalPosterior, interop, standard_normal
for call in [
    lambda: interop.to_numpyro(DiagonalPosterior(jnp.zeros(2), jnp.zeros(2))),
    lambda: interop.numpyro_log_joint(lambda: None),
    lambda: interop.optimistix_refine(standard_normal, jnp.zeros(2), solver=None),
]:
    try:
        call()
    except ImportError as error:
        print(error)
"""
    lines = run_in_subprocess(code, timeout=60).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "this needs numpyro",
        "this needs numpyro",
        "this needs optimistix",
    ]
    assert all(line.endswith("pip install 'vlae-jax[interop]'") for line in lines)


def test_a_numpyro_model_may_be_given_its_start():
    """Its density is 0 at numpyro's feasible point."""

    def model(y):
        t = numpyro.sample("t", dist.Normal(0, 10))
        numpyro.sample("y", dist.Uniform(t - 1, t + 1), obs=y)

    y = jnp.array([5.0, 5.3])
    flat = numpyro_log_joint(model, y, init_values={"t": 5.1})
    assert_close(flat.z_init, np.array([5.1]))
    assert np.isfinite(flat.log_joint(flat.z_init))
    with pytest.raises(ValueError, match=r"init_values.*'t'.*'s'"):
        numpyro_log_joint(model, y, init_values={"s": 5.1})


def test_a_numpyro_model_without_latent_sites_is_refused():
    with pytest.raises(ValueError, match="no latent site"):
        numpyro_log_joint(lambda y: numpyro.sample("y", dist.Normal(0, 1), obs=y), jnp.ones(2))
