"""Log densities against scipy and their own definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from problems import DIM, LATENT, assert_close, random_vector

from vlae_jax import bernoulli, gaussian, standard_normal

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_standard_normal_is_scipys(dtype):
    z = random_vector(0, LATENT, dtype)
    expected = scipy.stats.multivariate_normal.logpdf(np.float64(z), np.zeros(LATENT))
    assert_close(standard_normal(z), expected)


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
