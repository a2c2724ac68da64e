"""Looks into a trained model, as arrays for the report to draw."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.experiment import Experiment, map_images
from vlae_jax.preprocessing import fixed_keys

_IMAGES = 10
_PRIOR_SAMPLES = 64


def take_snapshots(experiment: Experiment, params: Any) -> dict[str, np.ndarray]:
    """What the report's pictures show of a model, for the first test images.

    Returns:
        data (n, h, w, c), and reconstructions (n, steps + 1, h, w, c) from each point of the mode
        search, in [0, 1]; step_log_joint (n, steps + 1), nats; prior_samples (m, h, w, c), the
        expected image of each; covariances (n, latent, latent) of the posteriors.
    """
    preprocessor = experiment.preprocessor
    images = experiment.dataset.test[:_IMAGES]

    def one(params: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        noise_key, _ = jax.random.split(key)
        x, _ = preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        inference = experiment.system(model, x)
        return {
            "data": preprocessor.to_pixels(x),
            "reconstructions": jax.vmap(lambda z: preprocessor.to_pixels(model.reconstruct(z)))(
                inference.path
            ),
            "step_log_joint": jax.vmap(model.log_joint(x))(inference.path),
            "covariances": inference.posterior.covariance(),
        }

    snapshots = map_images(one, images, fixed_keys(len(images)), batch_size=_IMAGES)(params)

    @jax.jit
    def sample_prior(params: Any, key: PRNGKeyArray) -> Array:
        model = experiment.merge(params)
        shape = (_PRIOR_SAMPLES, experiment.config.model.latent)
        zs = jax.random.normal(key, shape)
        return jax.vmap(lambda z: preprocessor.to_pixels(model.reconstruct(z)))(zs)

    key = jax.random.key(experiment.config.training.seed)
    return {**snapshots, "prior_samples": np.asarray(sample_prior(params, key))}
