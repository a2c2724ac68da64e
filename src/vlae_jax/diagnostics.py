"""Looks into a trained model, as arrays for the report to draw."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.experiment import Experiment, map_images
from vlae_jax.posterior import mean_and_covariance
from vlae_jax.preprocessing import fixed_keys

_SHOWN_IMAGES = 10
_SEARCHED_IMAGES = 250
_PRIOR_SAMPLES = 64
_MOMENT_SAMPLES = 2000
_INTERPOLATIONS, _INTERPOLATION_STEPS = 6, 9


def take_snapshots(experiment: Experiment, params: Any) -> dict[str, np.ndarray]:
    """What the report's pictures show of a model, for the first test images.

    Returns:
        Of the first few images, in [0, 1]: data (n, h, w, c), and reconstructions
        (n, steps + 1, h, w, c) from each point of the mode search; covariances
        (n, latent, latent) of their posteriors. Of more of them: step_log_joint (m, steps + 1),
        nats, and step_error (m, steps + 1), the root mean squared error of the reconstruction in
        model space. Expected images: prior_samples (k, h, w, c), and interpolations
        (pairs, points, h, w, c) on the line between two images' posterior means.
    """
    preprocessor = experiment.preprocessor
    images = experiment.dataset.test[:_SEARCHED_IMAGES]

    def decode(model: Any, z: Array) -> Array:
        return preprocessor.to_pixels(model.reconstruct(z))

    def search(params: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        noise_key, sample_key = jax.random.split(key)
        x, _ = preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        iterates = experiment.system(model, x, sample_key).iterates
        residuals = jax.vmap(model.reconstruct)(iterates) - x
        return {
            "step_log_joint": jax.vmap(model.log_joint(x))(iterates),
            "step_error": jnp.sqrt(jnp.mean(residuals**2, axis=1)),
        }

    def look(params: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        noise_key, sample_key = jax.random.split(key)
        x, _ = preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        inference = experiment.system(model, x, sample_key)
        mean, covariance = mean_and_covariance(
            sample_key, inference.posterior, num_samples=_MOMENT_SAMPLES
        )
        return {
            "data": preprocessor.to_pixels(x),
            "reconstructions": jax.vmap(lambda z: decode(model, z))(inference.iterates),
            "covariances": covariance,
            "means": mean,
        }

    keys = fixed_keys(len(images))
    searched = map_images(search, images, keys, batch_size=_SHOWN_IMAGES)(params)
    shown = images[: max(_SHOWN_IMAGES, 2 * _INTERPOLATIONS)]
    looks = map_images(look, shown, keys[: len(shown)], batch_size=_SHOWN_IMAGES)(params)
    means = looks.pop("means")

    @jax.jit
    def decode_all(params: Any, zs: Array) -> Array:
        model = experiment.merge(params)
        return jax.vmap(lambda z: decode(model, z))(zs)

    key = jax.random.key(experiment.config.training.seed)
    prior = jax.random.normal(key, (_PRIOR_SAMPLES, means.shape[1]))
    pairs = len(means) // 2
    weights = np.linspace(0, 1, _INTERPOLATION_STEPS)[:, None]
    lines = (1 - weights) * means[:pairs, None] + weights * means[pairs : 2 * pairs, None]
    between = decode_all(params, lines.reshape(-1, means.shape[1]))
    return {
        **searched,
        **{name: values[:_SHOWN_IMAGES] for name, values in looks.items()},
        "prior_samples": np.asarray(decode_all(params, prior)),
        "interpolations": np.asarray(between).reshape(*lines.shape[:2], *between.shape[1:]),
    }
