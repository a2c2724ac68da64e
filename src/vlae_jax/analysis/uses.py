"""Uses of the posterior: codes, reconstructions, samples, outlier scores.

Most functions here take a trained model and examples of the kind and shape it was trained on:
images, uint8 (n, height, width, channel) in [0, levels), or rows of a table (n, dim) and other
measurements, floats with NaN for missing entries (`rows_for` takes data frames). They map a pure
function of one example over them, and call an example an image. The noise of preprocessing
(dequantization, Bernoulli draws) depends only on an image's index, so that a second call gives the
same result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from sklearn.metrics import roc_auc_score

from vlae_jax.analysis.evaluation import measure
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.data.supplied import fitting
from vlae_jax.data.tables import as_table
from vlae_jax.errors import UserError
from vlae_jax.models.trained import Pixels, Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.posterior import mean_and_covariance
from vlae_jax.progress import counting
from vlae_jax.runs.metrics import QUANTITIES

_MOMENT_SAMPLES = 2000

SCORES = ("log_prob", "bits_per_dim", "elbo", "newton_decrement", "pareto_k")
"""Names of the outlier scores; `QUANTITIES` has label, unit and outlying end of each."""

Arrays = dict[str, np.ndarray]


def encode(trained: Trained, images: np.ndarray) -> Arrays:
    """Compute the mean and covariance of each image's posterior.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), or measurements (n, ...).

    Returns:
        mean (n, latent) and covariance (n, latent, latent), exact for Gaussian posteriors and from
        2,000 samples for flows; the system's flags, (n,) each: converged, is_pd and
        newton_decrement (nats) if it searches a mode.
    """
    return map_with_progress("encoding", trained, _encode, images)


def _encode(trained: Trained, pixels: Pixels, key: PRNGKeyArray) -> dict[str, Array]:
    inferred = trained.infer(key, pixels)
    mean, covariance = mean_and_covariance(
        inferred.keys.divergence, inferred.posterior, num_samples=_MOMENT_SAMPLES
    )
    return {"mean": mean, "covariance": covariance, **inferred.inference.flags}


def reconstruct(trained: Trained, images: np.ndarray, *, every_step: bool = False) -> Arrays:
    """Decode the center of each image's posterior to the expected image.

    Pixels are in [0, 1], measurements in their own units.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), or measurements (n, ...).
        every_step: Also decode every point of the search, from the encoder's guess on.

    Returns:
        images, the model's inputs (dequantized for logit, drawn for binary), or for a table rows;
        and reconstructions, both of the shape of `images`; squared_error (n,), the mean over the
        entries that are there; with `every_step` also steps (n, T + 1, ...).
    """
    return map_with_progress("reconstructing", trained, _reconstruct, images, every_step=every_step)


def _reconstruct(
    trained: Trained, pixels: Pixels, key: PRNGKeyArray, *, every_step: bool
) -> dict[str, Array]:
    inferred = trained.infer(key, pixels)
    to_pixels, model = trained.preprocessor.to_pixels, inferred.at.model
    iterates = inferred.inference.iterates
    iterates = iterates if every_step else iterates[-1:]
    steps = jax.vmap(lambda z: to_pixels(model.reconstruct(z)))(iterates)
    seen = to_pixels(inferred.x)
    observed = None if inferred.at.observed is None else ~jnp.isnan(seen)
    found = {
        name_of_examples(trained): seen,
        "reconstructions": steps[-1],
        "squared_error": jnp.mean((steps[-1] - seen) ** 2, where=observed),
    }
    return {**found, "steps": steps} if every_step else found


def decode(trained: Trained, codes: np.ndarray) -> np.ndarray:
    """Decode latent vectors to the expected example.

    Args:
        trained: The model.
        codes: (n, latent).

    Returns:
        (n, ...): expected pixels in [0, 1], or measurements in their own units.

    Raises:
        UserError: If the codes are not of that shape.
    """
    latent = trained.config.model.latent
    codes = np.asarray(codes, np.float32)
    if codes.ndim != 2 or codes.shape[1] != latent or not len(codes):
        raise UserError(f"codes must have shape (n, {latent}), got {codes.shape}")
    batch_size = trained.config.evaluation.evaluation_batch
    run = map_images(_decode, codes, batch_size=batch_size, options={})
    with counting("decoding", len(codes)) as show:
        return run(trained, show)


def _decode(trained: Trained, z: Array) -> Array:
    return trained.preprocessor.to_pixels(trained.model.reconstruct(z))


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
        count: Number of samples; the i-th does not depend on it.
        seed: Seed of the samples.
        temperature: Factor on the standard deviation of z, or of the components of its prior: 1
            for the prior itself, less for more typical images.
        draws: Also draw from p(x | z), with the output's noise.

    Returns:
        z (count, latent); expected (count, height, width, channel) in [0, 1], the expected x given
        z, converted to pixels, or for measurements (count, ...) in their own units; with `draws`
        also draws, of the same shape.
    """
    root = jax.random.key(seed)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, jnp.arange(count))
    batch_size = trained.config.evaluation.evaluation_batch
    options = {"temperature": temperature, "draws": draws}
    run = map_images(_sample, np.arange(count), keys, batch_size=batch_size, options=options)
    with counting("sampling", count) as show:
        return run(trained, show)


def _sample(
    trained: Trained, _: Array, key: PRNGKeyArray, *, temperature: float, draws: bool
) -> dict[str, Array]:
    prior_key, noise_key = jax.random.split(key)
    model, to_pixels = trained.model, trained.preprocessor.to_pixels
    z = model.prior.draw(prior_key, temperature)
    found = {"z": z, "expected": to_pixels(model.reconstruct(z))}
    if draws:
        found["draws"] = to_pixels(model.draw(noise_key, z))
    return found


def score(
    trained: Trained, images: np.ndarray, *, what: str = "scoring", keys: Array | None = None
) -> Arrays:
    """Compute the outlier scores of images, (n,) each.

    The scores are log_prob and elbo (nats, in model space for pixels and in the data's own units
    for measurements), bits_per_dim (of the pixels, if the
    preprocessing defines it), newton_decrement (nats, if the system searches a mode: the remaining
    distance from it) and pareto_k (larger for a worse fit of the posterior). The first three use
    the number of importance samples K in the configuration's evaluation section. `QUANTITIES` has
    the outlying end of each score.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), in the format of the training images.
        what: Label of the progress line.
        keys: Random keys of the images, (n,); by default by their indices.
    """
    measured = measure(trained, images, what=what, keys=keys)
    return {name: measured[name] for name in SCORES if name in measured}


def auroc(inliers: Arrays, outliers: Arrays) -> dict[str, float]:
    """The probability that an outlier scores as more outlying than an inlier; ties count half.

    Args:
        inliers: Scores of inliers, from `score`.
        outliers: Scores of outliers, from `score` with the same model.

    Returns:
        A probability for each score, by name: 0.5 for a score without information, 1 for one that
        separates the two sets. NaN values count as most outlying; a score that is NaN for all
        images of both sets is left out.
    """
    found = {}
    for name in SCORES:
        if name not in inliers or name not in outliers:
            continue
        sign = QUANTITIES[name].outlying
        values = sign * np.concatenate([inliers[name], outliers[name]]).astype(np.float64)
        if np.isnan(values).all():
            continue
        # Only the order matters, and `roc_auc_score` does not accept infinities.
        _, ranks = np.unique(np.where(np.isnan(values), np.inf, values), return_inverse=True)
        is_outlier = np.arange(len(values)) >= len(inliers[name])
        found[name] = float(roc_auc_score(is_outlier, ranks))
    return found


def rows_for(trained: Trained, data: Any) -> np.ndarray:
    """Examples for a model of measurements, from a data frame or an array.

    Args:
        trained: The model.
        data: A data frame of pandas or Polars, whose columns are put in the model's order by name,
            or an array of numbers (n, ...), or one example.

    Returns:
        Floats (n, ...), NaN where an entry is missing.

    Raises:
        UserError: If a column is missing or is not of numbers, or the shape does not fit.
    """
    made_from = trained.provenance
    return fitting(as_table(data, "data"), made_from.image_shape, made_from.columns, "data")


def name_of_examples(trained: Trained) -> str:
    """The name of the array of examples in results: images, or rows of a table."""
    return "rows" if trained.preprocessor.is_table else "images"


def map_with_progress(
    what: str, trained: Trained, function: Any, images: np.ndarray, *arrays: Any, **options: Any
) -> Any:
    """Apply a function of (trained, pixels, key, an item of each array) to every image.

    Args:
        what: Label of the progress line.
        trained: The model, passed to every call.
        function: A module's own function of one image; the keys are `fixed_keys`.
        images: uint8, (n, height, width, channel), or measurements (n, ...).
        arrays: More arrays with n rows, of which each call gets one.
        options: Hashable keyword arguments of the function.
    """
    batch_size = trained.config.evaluation.evaluation_batch
    keys = fixed_keys(len(images))
    run = map_images(function, images, keys, *arrays, batch_size=batch_size, options=options)
    with counting(what, len(images)) as show:
        return run(trained.for_examples(images), show)
