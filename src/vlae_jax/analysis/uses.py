"""Uses of the posterior: codes, reconstructions, samples, outlier scores.

Each is a function of a trained model and images, uint8 (n, height, width, channel), that maps a
pure function of one image over them. The noise of preprocessing (dequantization, Bernoulli draws)
depends on an image's place alone, so that a second call gives the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from sklearn.metrics import roc_auc_score

from vlae_jax.analysis.evaluation import measure
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.trained import Pixels, Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.posterior import mean_and_covariance
from vlae_jax.progress import counting
from vlae_jax.runs.metrics import QUANTITIES

_MOMENT_SAMPLES = 2000

SCORES = ("log_prob", "bits_per_dim", "elbo", "newton_decrement", "pareto_k")
"""What images are scored by; `QUANTITIES` has names, units and the outlying end of each."""

Arrays = dict[str, np.ndarray]


def encode(trained: Trained, images: np.ndarray) -> Arrays:
    """The moments of each image's posterior.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel).

    Returns:
        mean (n, latent) and covariance (n, latent, latent), exact for Gaussian posteriors and over
        2,000 samples for flows; the system's flags, (n,) each: converged, is_pd and
        newton_decrement (nats) where it searches a mode.
    """

    def one(trained: Trained, pixels: Pixels, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        mean, covariance = mean_and_covariance(
            inferred.keys.divergence, inferred.posterior, num_samples=_MOMENT_SAMPLES
        )
        return {"mean": mean, "covariance": covariance, **inferred.inference.flags}

    return map_with_progress("encoding", trained, one, images)


def reconstruct(trained: Trained, images: np.ndarray, *, every_step: bool = False) -> Arrays:
    """The expected image where each image's posterior is centered, in [0, 1].

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel).
        every_step: Also decode every point of the search, from the encoder's guess on.

    Returns:
        images, as the model saw them (dequantized for logit, drawn for binary), and
        reconstructions, both (n, height, width, channel); squared_error (n,), the mean over
        pixels; with `every_step` also steps (n, T + 1, height, width, channel).
    """

    def one(trained: Trained, pixels: Pixels, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        to_pixels, model = trained.preprocessor.to_pixels, inferred.at.model
        iterates = inferred.inference.iterates
        iterates = iterates if every_step else iterates[-1:]
        steps = jax.vmap(lambda z: to_pixels(model.reconstruct(z)))(iterates)
        seen = to_pixels(inferred.x)
        found = {
            "images": seen,
            "reconstructions": steps[-1],
            "squared_error": jnp.mean((steps[-1] - seen) ** 2),
        }
        return {**found, "steps": steps} if every_step else found

    return map_with_progress("reconstructing", trained, one, images)


def sample(
    trained: Trained,
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    draws: bool = False,
) -> Arrays:
    """Decode samples of the prior.

    Args:
        trained: The model.
        count: How many; the i-th is the same whatever the count.
        seed: Seeds them.
        temperature: The standard deviation of z: 1 for the prior itself, less for images closer to
            the middle of what the model knows.
        draws: Also draw from p(x | z), with the output's noise.

    Returns:
        z (count, latent); expected (count, height, width, channel) in [0, 1], the picture of the
        expected x given z; with `draws` also draws, of the same shape.
    """
    root = jax.random.key(seed)

    def one(trained: Trained, index: Array) -> dict[str, Array]:
        prior_key, noise_key = jax.random.split(jax.random.fold_in(root, index))
        model, to_pixels = trained.model, trained.preprocessor.to_pixels
        z = temperature * jax.random.normal(prior_key, (trained.config.model.latent,))
        found = {"z": z, "expected": to_pixels(model.reconstruct(z))}
        if draws:
            found["draws"] = to_pixels(model.draw(noise_key, z))
        return found

    batch_size = trained.config.evaluation.evaluation_batch
    run = map_images(one, np.arange(count), batch_size=batch_size)
    with counting("sampling", count) as show:
        return run(trained, show)


def score(trained: Trained, images: np.ndarray, *, what: str = "scoring") -> Arrays:
    """How outlying each image is, (n,) each.

    log_prob and elbo (nats, model space), bits_per_dim (of the pixels, where the preprocessing has
    it), newton_decrement (nats, where the system searches a mode: how far from one its steps have
    left it) and pareto_k (how badly the posterior fits). The first three have K importance samples
    of the configuration's evaluation section. `QUANTITIES` says which end is the outlying one.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), preprocessed as the training images were.
        what: What to call this on the line that shows progress.
    """
    measured = measure(trained, images, what=what)
    return {name: measured[name] for name in SCORES if name in measured}


def auroc(inliers: Arrays, outliers: Arrays) -> dict[str, float]:
    """The probability that an outlier scores as more outlying than an inlier, ties by half.

    Args:
        inliers: From `score`.
        outliers: From `score`, by the same model.

    Returns:
        By the names of the scores: 0.5 for a score that tells nothing, 1 for one that separates
        the two sets. A score that is not a number counts as most outlying; one that is never a
        number in either set is left out.
    """
    found = {}
    for name in SCORES:
        if name not in inliers or name not in outliers:
            continue
        sign = QUANTITIES[name].outlying
        values = sign * np.concatenate([inliers[name], outliers[name]]).astype(np.float64)
        if np.isnan(values).all():
            continue
        # Only the order counts, and infinities have no other way in.
        _, ranks = np.unique(np.where(np.isnan(values), np.inf, values), return_inverse=True)
        is_outlier = np.arange(len(values)) >= len(inliers[name])
        found[name] = float(roc_auc_score(is_outlier, ranks))
    return found


def map_with_progress(
    what: str, trained: Trained, function: Any, images: np.ndarray, *arrays: Any
) -> Any:
    """Apply (trained, pixels, key, *items) → arrays to every image, showing how far it is.

    Args:
        what: What to call this on the line that shows progress.
        trained: Handed to every call.
        function: Of one image; the keys are `fixed_keys`.
        images: uint8, (n, height, width, channel).
        arrays: More arrays with n rows, one row for each call.
    """
    batch_size = trained.config.evaluation.evaluation_batch
    keys = fixed_keys(len(images))
    run = map_images(function, images, keys, *arrays, batch_size=batch_size)
    with counting(what, len(images)) as show:
        return run(trained, show)
