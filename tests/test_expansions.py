"""Expansions against finite differences, numpy's JᵀWJ, and each other where they must agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    DIM,
    FINITE_DIFFERENCE,
    HIDDEN,
    INDEFINITE,
    LATENT,
    LIKELIHOODS,
    Network,
    assert_close,
    central_differences,
    features,
    flatten,
    indefinite_kernel,
    kink_margin,
    random_layers,
    random_vector,
)

from vlae_jax import (
    affine_head_expansion,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    standard_normal,
)
from vlae_jax.affine_head import compress_affine_gaussian

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def expand_all(activation):
    """Compiled once: (weights, z) → {likelihood: (exact, Gauss-Newton)}."""

    def expand(layers, z):
        networks = {name: Network(activation, name) for name in LIKELIHOODS}
        return {
            name: (network.exact(layers)(z), network.gauss_newton(layers)(z))
            for name, network in networks.items()
        }

    return jax.jit(expand)


@functools.partial(jax.jit, static_argnames=("activation", "exact"))
def affine_head(layers, log_var, x, z, *, activation, exact=False):
    """The expansion at `z` of a Gaussian decoder, its last layer compressed."""
    hidden = functools.partial(features, layers, activation)
    return affine_head_expansion(hidden, *layers[-1], log_var, x, exact=exact)(z)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_exact_expansion_equals_finite_differences(x64, activation):
    layers, z = random_layers(0), random_vector(0, LATENT)
    assert kink_margin(layers, z) > 1e-3

    def log_joints(z):
        return jnp.stack([Network(activation, name).log_joint(layers, z) for name in LIKELIHOODS])

    values, grads = log_joints(z), central_differences(log_joints, z)
    hessians = central_differences(jax.jacobian(log_joints), z)
    expansions = expand_all(activation)(layers, z)
    for i, name in enumerate(LIKELIHOODS):
        exact, _ = expansions[name]
        assert_close(exact.value, np.asarray(values[i]))
        assert_close(exact.grad, grads[i], rtol=FINITE_DIFFERENCE)
        assert_close(exact.precision, -hessians[i], rtol=FINITE_DIFFERENCE)


def test_exact_equals_gauss_newton_for_a_relu_decoder(x64):
    """Gaussian, Bernoulli, categorical and Poisson likelihoods, in their natural parameters."""
    for seed in range(5):
        expansions = expand_all("relu")(random_layers(seed), random_vector(seed, LATENT))
        for exact, gauss_newton in expansions.values():
            assert_close(gauss_newton, exact)


def test_gauss_newton_differs_for_a_smooth_decoder_but_is_positive_definite(x64):
    """Value and gradient agree; the precision is at least the prior's."""
    for seed in range(5):
        expansions = expand_all("tanh")(random_layers(seed), random_vector(seed, LATENT))
        for exact, gauss_newton in expansions.values():
            assert_close(gauss_newton[:2], exact[:2])
            assert jnp.max(jnp.abs(gauss_newton.precision - exact.precision)) > 1e-2
            assert jnp.min(jnp.linalg.eigvalsh(gauss_newton.precision)) > 1 - 1e-9


def test_gauss_newton_is_the_formula_in_numpy(x64):
    """JᵀWJ + prior precision; W = p(1 - p), J by finite differences, another prior than N(0, I)."""
    layers, z = random_layers(3), random_vector(3, LATENT)
    prior_precision = np.diag([1.0, 2, 3]) + 0.5
    network = Network("tanh", "bernoulli")
    decode = functools.partial(network.decode, layers)
    expand = gauss_newton_expansion(
        decode, network.log_likelihood, lambda z: -0.5 * z @ prior_precision @ z
    )
    jacobian = central_differences(decode, z)
    rate = 1 / (1 + np.exp(-np.asarray(decode(z))))
    expected = jacobian.T @ np.diag(rate * (1 - rate)) @ jacobian + prior_precision
    assert_close(jax.jit(expand)(z).precision, expected, rtol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("exact", [False, True])
def test_affine_head_equals_exact_for_relu_features(x64, exact):
    noises = {"gaussian": -0.7, "gaussian_per_pixel": jnp.linspace(-1, 1, DIM)}
    for seed in range(3):
        layers, z = random_layers(seed), random_vector(seed, LATENT)
        truths = expand_all("relu")(layers, z)
        for name, log_var in noises.items():
            x = jnp.asarray(LIKELIHOODS[name].x)
            ours = affine_head(layers, log_var, x, z, activation="relu", exact=exact)
            assert_close(ours, truths[name][0])


def test_affine_head_is_exact_for_smooth_features_when_asked(x64):
    x = jnp.asarray(LIKELIHOODS["gaussian"].x)
    for seed in range(3):
        layers, z = random_layers(seed), random_vector(seed, LATENT)
        exact, gauss_newton = expand_all("tanh")(layers, z)["gaussian"]
        assert_close(affine_head(layers, -0.7, x, z, activation="tanh", exact=True), exact)
        assert_close(affine_head(layers, -0.7, x, z, activation="tanh"), gauss_newton)


@pytest.mark.parametrize("exact", [False, True])
def test_affine_head_gradients_equal_finite_differences_in_everything(x64, exact):
    """Into z, weights, noise and data, of value, gradient and precision together."""
    x, log_var = jnp.asarray(LIKELIHOODS["gaussian"].x), jnp.linspace(-1, 1, DIM)
    arguments = (random_layers(5), log_var, x, random_vector(5, LATENT))

    def mixed(arguments):
        numbers = flatten(affine_head(*arguments, activation="tanh", exact=exact))
        return numbers @ jnp.sin(jnp.arange(numbers.size, dtype=float))

    gradient = flatten(jax.jit(jax.grad(mixed))(arguments))
    assert_close(gradient, central_differences(mixed, arguments), rtol=FINITE_DIFFERENCE)


def test_affine_head_takes_another_prior(x64):
    """N(0, 9 I) instead of N(0, I) takes 8/9 from the diagonal of the precision."""
    layers, z, x = random_layers(3), random_vector(3, LATENT), random_vector(3, DIM)

    @jax.jit
    def expand(z):
        hidden = functools.partial(features, layers, "relu")
        wide = {"log_prior": lambda z: standard_normal(z / 3)}
        return affine_head_expansion(hidden, *layers[-1], 0.0, x, **wide)(z)

    wide, narrow = expand(z), affine_head(layers, 0.0, x, z, activation="relu")
    assert_close(narrow.precision - wide.precision, 8 / 9 * np.eye(LATENT))
    assert_close(narrow.grad - wide.grad, np.asarray(-8 / 9 * z))


@pytest.mark.parametrize("per_pixel", [False, True])
def test_compressed_likelihood_is_the_gaussian(dtype, per_pixel):
    kernel, bias = random_layers(4, (HIDDEN, DIM), dtype)[0]
    a, x = random_vector(4, HIDDEN, dtype), random_vector(4, DIM, dtype)
    log_var = jnp.linspace(-1, 1, DIM, dtype=dtype) if per_pixel else jnp.asarray(0.4, dtype)
    compressed = jax.jit(lambda a: compress_affine_gaussian(kernel, bias, log_var, x)(a))
    assert_close(compressed(a), np.float64(gaussian(x, a @ kernel + bias, log_var)))


def test_compressed_likelihood_has_the_gaussians_gradients(x64):
    """In the head's weights, the noise, the data and the features."""
    arguments = (
        *random_layers(4, (HIDDEN, DIM))[0],
        jnp.linspace(-1, 1, DIM),
        random_vector(4, DIM),
        random_vector(4, HIDDEN),
    )

    def compressed(kernel, bias, log_var, x, a):
        return compress_affine_gaussian(kernel, bias, log_var, x)(a)

    def direct(kernel, bias, log_var, x, a):
        return gaussian(x, a @ kernel + bias, log_var)

    everywhere = range(len(arguments))
    gradients = jax.jit(jax.grad(compressed, everywhere))(*arguments)
    assert_close(gradients, jax.jit(jax.grad(direct, everywhere))(*arguments))


@pytest.mark.parametrize("name", INDEFINITE)
def test_exact_expansion_returns_an_indefinite_precision_as_it_is(x64, name):
    problem, kernel, z = INDEFINITE[name], indefinite_kernel(), jnp.zeros(LATENT)

    @jax.jit
    def expand(x, z):
        exact = exact_expansion(functools.partial(problem.log_joint, kernel, x))
        return exact(z), problem.stand_in(kernel, x)(z).precision

    for x, is_pd in [(problem.good_x, True), (problem.bad_x, False)]:
        exact, stand_in = expand(x, z)
        slopes = central_differences(lambda z, x=x: expand(x, z)[0].grad, z)
        assert_close(exact.precision, -slopes, rtol=FINITE_DIFFERENCE)
        assert (np.linalg.eigvalsh(exact.precision)[0] > 0) == is_pd
        assert np.linalg.eigvalsh(stand_in)[0] > 0.99
