"""The mathematics on a GPU or TPU: what it gives there is what the CPU gives.

Accelerators multiply float32 in shorter formats unless asked; what feeds a Cholesky factor asks.
`python -m benchmarks.accelerator` runs these on a machine that has one; elsewhere they are skipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import features, random_layers

from vlae_jax import (
    affine_head_expansion,
    elbo,
    gaussian,
    importance_weighted_log_prob,
    infer_posterior,
    standard_normal,
    variational_refine,
)

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs a GPU or a TPU"),
]

SIZES = (20, 200, 200, 784)


def on(platform: str, function, *arguments):
    """The results of a jitted function on one kind of device, as numpy arrays."""
    device = jax.local_devices(backend=platform)[0]
    return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


def here_and_on_the_cpu(function, *arguments):
    return on(jax.default_backend(), function, *arguments), on("cpu", function, *arguments)


@pytest.fixture(scope="module")
def given():
    """A ReLU decoder, 16 images that it has drawn, and their latents, from which searches start."""
    layers = jax.device_get(random_layers(0, SIZES, jnp.float32))
    rng = np.random.default_rng(0)
    zs = rng.normal(size=(16, SIZES[0])).astype(np.float32)
    kernel, bias = layers[-1]
    means = np.asarray(jax.vmap(lambda z: features(layers, "relu", z) @ kernel + bias)(zs))
    xs = means + 0.5 * rng.normal(size=means.shape).astype(np.float32)
    return layers, xs, zs


def expansion(layers, x):
    return affine_head_expansion(
        lambda z: features(layers, "relu", z), *layers[-1], jnp.float32(np.log(0.25)), x
    )


def log_joint(layers, x):
    kernel, bias = layers[-1]

    def value(z):
        mean = features(layers, "relu", z) @ kernel + bias
        return gaussian(x, mean, jnp.float32(np.log(0.25))) + standard_normal(z)

    return value


def test_expansions_are_those_of_the_cpu(given):
    def expand(layers, xs, zs):
        return jax.vmap(lambda x, z: expansion(layers, x)(z))(xs, zs)

    there, here = here_and_on_the_cpu(expand, *given)
    for name in ("grad", "precision"):
        scale = np.abs(getattr(here, name)).max()
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), atol=1e-4 * scale)
    np.testing.assert_allclose(there.value, here.value, rtol=1e-4)


def test_searches_end_as_high_as_on_the_cpu(given):
    def search(layers, xs, zs):
        def one(x, z):
            return infer_posterior(expansion(layers, x), z + 1.0, num_steps=10)[1]

        return jax.vmap(one)(xs, zs)

    there, here = here_and_on_the_cpu(search, *given)
    assert np.all(there.is_pd)
    gained = here.log_joint[:, -1] - here.log_joint[:, 0]
    assert np.all(there.log_joint[:, -1] > here.log_joint[:, -1] - 0.1 - 0.01 * gained)


def test_bounds_agree_within_their_noise(given):
    def bounds(layers, xs, zs):
        def one(key, x, z):
            posterior, _ = infer_posterior(expansion(layers, x), z, num_steps=10)
            refined, _ = variational_refine(
                expansion(layers, x), posterior, key, num_steps=4, num_samples=8
            )
            joint = log_joint(layers, x)
            bound = elbo(key, joint, refined, num_samples=500)
            log_prob, info = importance_weighted_log_prob(key, joint, refined, num_samples=2000)
            return bound, log_prob, info.standard_error

        return jax.vmap(one)(jax.random.split(jax.random.key(0), len(xs)), xs, zs)

    (bound, log_prob, error), (bound_here, log_prob_here, error_here) = here_and_on_the_cpu(
        bounds, *given
    )
    assert np.all(np.isfinite(bound)) and np.all(bound < log_prob + 1.0)
    assert np.all(np.abs(log_prob - log_prob_here) < 6 * (error + error_here) + 0.1)
    assert abs(np.mean(bound - bound_here)) < 0.5


def test_gradients_through_the_mode_are_those_of_the_cpu(given):
    def slope(layers, xs, zs):
        def loss(layers):
            def one(x, z):
                posterior, _ = infer_posterior(expansion(layers, x), z, num_steps=4)
                return elbo(jax.random.key(0), log_joint(layers, x), posterior)

            return jnp.mean(jax.vmap(one)(xs, zs))

        return jax.grad(loss)(layers)

    there, here = here_and_on_the_cpu(slope, *given)
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other) + 1e-6
