"""Preprocessing against float64 numpy, automatic differentiation and the definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlae_jax.data.preprocessing import KINDS, Preprocessor, fit_preprocessor, fixed_keys
from vlae_jax.data.stored import value_counts

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPE = (3, 4, 2)


def random_images(n: int, levels: int = 256, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Images whose pixels have different means, with both extreme values among them."""
    rng = np.random.default_rng(1)
    means = rng.uniform(0, levels, shape)
    images = np.clip(rng.normal(means, levels / 6, (n, *shape)), 0, levels - 1).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, levels - 1
    return images


def apply_to_all(preprocessor: Preprocessor, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jax.jit(jax.vmap(preprocessor.apply))(fixed_keys(len(images)), images)


@pytest.mark.parametrize(
    ("levels", "logit_lambda", "standardize"), [(17, 0.05, False), (256, 1e-6, True)]
)
def test_log_det_equals_that_of_the_jacobian(x64, levels, logit_lambda, standardize):
    """A key fixes the noise, so dx/dpixel = dx/dy / levels."""
    images = random_images(20, levels)
    preprocessor = fit_preprocessor(
        images, kind="logit", levels=levels, logit_lambda=logit_lambda, standardize=standardize
    )
    key = jax.random.key(0)
    pixels = jnp.asarray(images[0], float)
    jacobian = jax.jacobian(lambda p: preprocessor.apply(key, p)[0])(pixels)
    jacobian = jacobian.reshape(preprocessor.dim, preprocessor.dim)
    expected = jnp.linalg.slogdet(jacobian)[1] + preprocessor.dim * math.log(levels)
    np.testing.assert_allclose(preprocessor.apply(key, pixels)[1], expected, rtol=1e-12)


def test_float32_agrees_with_float64():
    """At the black and the white end too, where 1 - s is as small as λ."""
    pixels = np.repeat(np.uint8([0, 1, 127, 254, 255]), 2000).reshape(100, 100, 1)
    preprocessor = fit_preprocessor(pixels[None], kind="logit", standardize=False)
    x, log_det = preprocessor.apply(jax.random.key(3), pixels)
    noise = np.asarray(jax.random.uniform(jax.random.key(3), (10000,)), np.float64) + 2.0**-24
    s = 1e-6 + (1 - 2e-6) * (pixels.reshape(-1) + noise) / 256
    expected = np.log(s) - np.log1p(-s) - np.asarray(preprocessor.mean, np.float64)
    np.testing.assert_allclose(x, expected, atol=4e-6)
    expected_det = np.sum(math.log(1 - 2e-6) - np.log(s) - np.log1p(-s))
    np.testing.assert_allclose(log_det, expected_det, rtol=1e-6)


@pytest.mark.parametrize(
    ("pixel", "noise", "gap"),
    [(0, 0, 2**-32), (0, 1 - 2**-23, 2**-8), (255, 0, 2**-8), (255, 1 - 2**-23, 2**-32)],
)
def test_extreme_noise_stays_inside_the_unit_interval(monkeypatch, pixel, noise, gap):
    """The smallest and the largest draw of jax.random.uniform; gap: from y to the nearer end."""
    monkeypatch.setattr(
        jax.random, "uniform", lambda _, shape, dtype: jnp.full(shape, noise, dtype)
    )
    images = np.full((1, 2, 2, 1), pixel, np.uint8)
    preprocessor = fit_preprocessor(images, kind="logit", logit_lambda=1e-30, standardize=False)
    x, log_det = preprocessor.apply(jax.random.key(0), images[0])
    np.testing.assert_allclose(jnp.abs(x + preprocessor.mean), math.log(1 / gap - 1), rtol=1e-5)
    np.testing.assert_allclose(log_det, -4 * math.log(gap * (1 - gap)), rtol=1e-5)


@pytest.mark.parametrize("levels", [17, 256])
def test_a_uniform_density_costs_log2_levels(levels):
    """Uniform in y: log p(y) = log p(x) + log|dx/dy| = 0."""
    images = random_images(5, levels)
    preprocessor = fit_preprocessor(images, kind="logit", levels=levels)
    _, log_det = apply_to_all(preprocessor, images)
    np.testing.assert_array_equal(
        preprocessor.bits_per_dim(-log_det, log_det), np.full(5, np.float32(math.log2(levels)))
    )


def test_bits_per_dim_does_not_depend_on_the_standardization():
    """The same density of y, seen through two scales: only its Jacobian moves."""
    images = random_images(30)
    bits = []
    for standardize in (False, True):
        preprocessor = fit_preprocessor(images, kind="logit", standardize=standardize)
        x, log_det = apply_to_all(preprocessor, images)
        sd = 2 / preprocessor.scale
        log_prob = jax.scipy.stats.norm.logpdf(x, 0, sd).sum(axis=1)
        bits.append(preprocessor.bits_per_dim(log_prob, log_det))
    np.testing.assert_allclose(bits[0], bits[1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["raw", "static_binary", "dynamic_binary"])
def test_bits_per_dim_is_undefined_without_dequantization(kind):
    preprocessor = fit_preprocessor(random_images(5), kind=kind)
    x, log_det = preprocessor.apply(jax.random.key(0), random_images(1)[0])
    assert log_det == 0
    assert preprocessor.bits_per_dim(jnp.zeros(()), log_det) is None
    assert x.shape == (preprocessor.dim,) == (24,)


def test_to_pixels_gives_back_the_dequantized_pixel(x64):
    images = random_images(50)
    preprocessor = fit_preprocessor(images, kind="logit")
    x, _ = apply_to_all(preprocessor, images)
    pixels = jax.vmap(preprocessor.to_pixels)(x)
    assert pixels.shape == images.shape
    np.testing.assert_array_equal(np.floor(256 * pixels), images)


def test_raw_is_centered_and_inverts():
    images = random_images(50)
    preprocessor = fit_preprocessor(images, kind="raw")
    x, _ = apply_to_all(preprocessor, images)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x.var(axis=0), preprocessor.variance, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(preprocessor.to_pixels)(x), images / np.float32(255), atol=1e-6
    )


def test_standardized_training_data_has_mean_0_and_std_1():
    """To sampling error of the noise, which the fit integrates out."""
    images = random_images(4000)
    preprocessor = fit_preprocessor(images, kind="logit")
    x, _ = apply_to_all(preprocessor, images)
    standard_error = np.sqrt(preprocessor.variance / len(images))
    assert np.max(np.abs(x.mean(axis=0)) / standard_error) < 4
    np.testing.assert_allclose(x.var(axis=0), preprocessor.variance, rtol=0.15)
    np.testing.assert_allclose(jnp.sqrt(x.var(axis=0).mean()), 1, atol=0.01)
    np.testing.assert_allclose(preprocessor.variance.mean(), 1, rtol=1e-5)


@pytest.mark.parametrize("logit_lambda", [1e-6, 0.05])
def test_fitted_moments_are_integrals_over_the_noise(logit_lambda):
    """One image per pixel value; the noise by a fine midpoint rule in float64."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    preprocessor = fit_preprocessor(
        values, kind="logit", logit_lambda=logit_lambda, standardize=False
    )
    noise = (np.arange(20000) + 0.5) / 20000
    s = logit_lambda + (1 - 2 * logit_lambda) * (np.arange(256)[:, None] + noise) / 256
    logit = np.log(s) - np.log1p(-s)
    np.testing.assert_allclose(preprocessor.mean, logit.mean(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(preprocessor.variance, logit.var(axis=1), rtol=1e-3)


@pytest.mark.parametrize("kind", ["static_binary", "dynamic_binary"])
def test_binary_draws_have_the_pixel_as_their_mean(kind):
    image = np.array([0, 16, 4, 8], np.uint8).reshape(2, 2, 1)
    preprocessor = fit_preprocessor(np.stack([image, image]), kind=kind, levels=17)
    x, _ = apply_to_all(preprocessor, np.repeat(image[None], 4000, axis=0))
    assert preprocessor.binary and set(np.unique(x)) == {0.0, 1.0}
    probability = np.array([0, 1, 0.25, 0.5])
    np.testing.assert_array_equal(x.mean(axis=0)[:2], [0, 1])
    np.testing.assert_allclose(x.mean(axis=0), probability, atol=4 * 0.5 / math.sqrt(4000))
    np.testing.assert_allclose(preprocessor.variance, probability * (1 - probability), atol=1e-7)
    np.testing.assert_array_equal(preprocessor.to_pixels(x[0]), x[0].reshape(2, 2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_jit_vmap_and_a_loop_agree(kind):
    """The preprocessor is a pytree: it may be an argument of the compiled function."""
    images = random_images(4)
    levels = 0 if kind == "standardize" else 256
    images = images if levels else images.astype(np.float32)
    preprocessor = fit_preprocessor(images, kind=kind, levels=levels)
    compiled = jax.jit(lambda p, keys, batch: jax.vmap(p.apply)(keys, batch))
    x, log_det = compiled(preprocessor, fixed_keys(4), images)
    for i, image in enumerate(images):
        single = preprocessor.apply(fixed_keys(9)[i], image)
        np.testing.assert_allclose(x[i], single[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(log_det[i], single[1], rtol=1e-5)
    assert x.dtype == log_det.dtype == jnp.float32
    assert log_det.shape == (4,)
    assert compiled._cache_size() == 1


def test_keys_replay_and_differ_between_images():
    keys = jax.random.key_data(fixed_keys(10))
    np.testing.assert_array_equal(keys[:4], jax.random.key_data(fixed_keys(4)))
    assert len(np.unique(keys, axis=0)) == 10


def test_fitting_does_not_depend_on_the_chunks_or_the_order(monkeypatch):
    images = random_images(23)
    whole = fit_preprocessor(images, kind="logit")
    monkeypatch.setattr("vlae_jax.data.stored.BATCH", 7)
    monkeypatch.setattr("vlae_jax.data.stored._COUNTED", 7 * 5)
    in_chunks = fit_preprocessor(images[::-1], kind="logit")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(in_chunks), strict=True):
        np.testing.assert_array_equal(one, other)


def test_values_are_counted_at_each_pixel(monkeypatch):
    images = random_images(23)
    monkeypatch.setattr("vlae_jax.data.stored.BATCH", 7)
    monkeypatch.setattr("vlae_jax.data.stored._COUNTED", 7 * 5)
    values = np.arange(256)
    expected = (images.reshape(23, -1, 1) == values).sum(axis=0)
    np.testing.assert_array_equal(value_counts(images), expected)


def test_a_constant_pixel_has_no_negative_variance():
    """Rounding alone would give some of these 256 values a variance of -1e-16."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(7, axis=0)
    assert jnp.all(fit_preprocessor(images, kind="raw").variance >= 0)


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (random_images(2), {"kind": "logits"}, "kind must be one of"),
        (random_images(2) / 255, {"kind": "logit"}, "images must be uint8"),
        (random_images(2)[0], {"kind": "logit"}, "images must be uint8"),
        (random_images(2)[:0], {"kind": "logit"}, "images must be uint8"),
        (random_images(2), {"kind": "logit", "levels": 17}, "below levels=17, got 255"),
    ],
)
def test_wrong_images_are_refused(images, options, said):
    with pytest.raises(ValueError, match=said):
        fit_preprocessor(images, **options)


def test_a_batch_is_refused():
    images = random_images(2)
    with pytest.raises(ValueError, match="vmap the batch"):
        fit_preprocessor(images, kind="raw").apply(jax.random.key(0), images)
