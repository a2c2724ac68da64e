"""Uses of the posterior: codes, reconstructions, samples, missing pixels, outlier scores.

Each is a function of an experiment, parameters and images, uint8 (n, height, width, channel), that
maps a pure function of one image over them. The noise of preprocessing (dequantisation, Bernoulli
draws) depends on an image's place alone, so that a second call gives the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8
from sklearn.metrics import roc_auc_score

from vlae_jax.data import mean_image
from vlae_jax.evaluation import measure
from vlae_jax.experiment import Experiment, map_images
from vlae_jax.inference import infer_posterior
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.posterior import DiagonalPosterior, Posterior, mean_and_covariance
from vlae_jax.preprocessing import fixed_keys
from vlae_jax.progress import counting

OUTLYING = {
    "log_prob": -1,
    "bits_per_dim": 1,
    "elbo": -1,
    "newton_decrement": 1,
    "pareto_k": 1,
}
"""Scores of how outlying an image is, with the sign that makes more of it more outlying."""
COVERAGES = (0.5, 0.9)
"""Probabilities of the predictive intervals whose coverage `impute` measures."""
_MOMENT_SAMPLES = 2000

Pixels = UInt8[Array, "height width channel"]
Arrays = dict[str, np.ndarray]


def encode(experiment: Experiment, params: Any, images: np.ndarray) -> Arrays:
    """The moments of each image's posterior.

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        images: uint8, (n, height, width, channel).

    Returns:
        mean (n, latent) and covariance (n, latent, latent), exact for Gaussian posteriors and over
        2,000 samples for flows; the system's flags, (n,) each: converged, is_pd and
        newton_decrement (nats) where it searches a mode.
    """

    def one(params: Any, pixels: Pixels, key: PRNGKeyArray) -> dict[str, Array]:
        x, sample_key = _seen(experiment, pixels, key)
        inference = experiment.system(experiment.merge(params), x, sample_key)
        mean, covariance = mean_and_covariance(
            sample_key, inference.posterior, num_samples=_MOMENT_SAMPLES
        )
        return {"mean": mean, "covariance": covariance, **inference.flags}

    return _map("encoding", experiment, one, params, images)


def reconstruct(
    experiment: Experiment, params: Any, images: np.ndarray, *, every_step: bool = False
) -> Arrays:
    """The expected image where each image's posterior is centred, in [0, 1].

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        images: uint8, (n, height, width, channel).
        every_step: Also decode every point of the search, from the encoder's guess on.

    Returns:
        images, as the model saw them (dequantised for logit, drawn for binary), and
        reconstructions, both (n, height, width, channel); squared_error (n,), the mean over
        pixels; with `every_step` also steps (n, T + 1, height, width, channel).
    """
    preprocessor = experiment.preprocessor

    def one(params: Any, pixels: Pixels, key: PRNGKeyArray) -> dict[str, Array]:
        x, sample_key = _seen(experiment, pixels, key)
        model = experiment.merge(params)
        iterates = experiment.system(model, x, sample_key).iterates
        iterates = iterates if every_step else iterates[-1:]
        steps = jax.vmap(lambda z: preprocessor.to_pixels(model.reconstruct(z)))(iterates)
        seen = preprocessor.to_pixels(x)
        found = {
            "images": seen,
            "reconstructions": steps[-1],
            "squared_error": jnp.mean((steps[-1] - seen) ** 2),
        }
        return {**found, "steps": steps} if every_step else found

    return _map("reconstructing", experiment, one, params, images)


def sample(
    experiment: Experiment,
    params: Any,
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    draws: bool = False,
) -> Arrays:
    """Decode samples of the prior.

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        count: How many; the i-th is the same whatever the count.
        seed: Seeds them.
        temperature: The standard deviation of z: 1 for the prior itself, less for images closer to
            the middle of what the model knows.
        draws: Also draw from p(x | z), with the output's noise.

    Returns:
        z (count, latent); expected (count, height, width, channel) in [0, 1], the picture of the
        expected x given z; with `draws` also draws, of the same shape.
    """
    preprocessor, root = experiment.preprocessor, jax.random.key(seed)

    def one(params: Any, index: Array) -> dict[str, Array]:
        prior_key, noise_key = jax.random.split(jax.random.fold_in(root, index))
        model = experiment.merge(params)
        z = temperature * jax.random.normal(prior_key, (experiment.config.model.latent,))
        found = {"z": z, "expected": preprocessor.to_pixels(model.reconstruct(z))}
        if draws:
            found["draws"] = preprocessor.to_pixels(model.draw(noise_key, z))
        return found

    batch_size = experiment.config.evaluation.evaluation_batch
    run = map_images(one, np.arange(count), batch_size=batch_size)
    with counting("sampling", count) as show:
        return run(params, show)


def missing_at_random(shape: tuple[int, ...], share: float, *, seed: int) -> np.ndarray:
    """Choose pixels to hide, as many in each image, all channels of a pixel together.

    Args:
        shape: (n, height, width, channel).
        share: Of the pixels of an image, above 0 and below 1; rounded to at least one pixel, hidden
            and left.
        seed: Seeds the choice, which is another one for each image.

    Returns:
        Booleans of that shape.
    """
    n, height, width, _ = shape
    size = height * width
    hidden = min(max(round(share * size), 1), size - 1)
    order = np.random.default_rng(seed).random((n, size)).argsort(axis=1)
    return np.broadcast_to((order < hidden).reshape(n, height, width, 1), shape)


def missing_box(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> np.ndarray:
    """Hide one rectangle in every image.

    Args:
        shape: (n, height, width, channel).
        box: (top, left, height, width) in pixels, from 0; cut off at the edge of the image.

    Returns:
        Booleans of that shape.
    """
    top, left, height, width = box
    missing = np.zeros(shape, bool)
    missing[:, top : top + height, left : left + width] = True
    return missing


class Imputation(NamedTuple):
    """Images with their missing pixels filled in."""

    arrays: Arrays
    """images (n, height, width, channel), in [0, 1]: expected pixels where they are missing and
    what the model saw elsewhere; std, of the same shape, the predictive standard deviation, 0
    where nothing is missing; the moments of the posterior given the pixels that are there, mean
    (n, latent) and covariance (n, latent, latent); converged, is_pd, newton_decrement (n,)."""
    errors: Arrays
    """Against the pixels under the mask, for where they are known, (n,) each, by NAME for the
    posterior and encoder_NAME for the encoder alone: squared_error and squared_error_x, the means
    over missing pixels in pixel and in model space; for a Gaussian output coverage_50 and
    coverage_90, the share of missing pixels inside the central predictive interval. And
    num_missing, what the means are over."""


def impute(
    experiment: Experiment,
    params: Any,
    images: np.ndarray,
    missing: np.ndarray,
    *,
    num_steps: int = 20,
    num_samples: int = 200,
) -> Imputation:
    """Fill in missing pixels by the Laplace posterior given the others, for any trained model.

    The likelihood sums over observed pixels only, which integrates the others out. Its mode is
    searched from where the encoder puts the image with the training mean in the holes. Beside it
    stands the encoder alone: its own posterior of that image, or the point it gives where only its
    mean was trained (vlae).

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        images: uint8, (n, height, width, channel); what they hold where pixels are missing counts
            for the errors alone.
        missing: Booleans of the same shape.
        num_steps: Newton steps of the search.
        num_samples: Samples of the predictive distribution per image, at least 2.

    Raises:
        ValueError: If `missing` has another shape, or there are too few samples.
    """
    if missing.shape != images.shape:
        raise ValueError(f"missing must have shape {images.shape}, got {missing.shape}")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")

    def one(
        given: Any, pixels: Pixels, key: PRNGKeyArray, missing: Bool[Array, "height width channel"]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        params, mean = given
        return _impute_image(experiment, params, mean, pixels, missing, key, num_steps, num_samples)

    given = (params, _training_mean(experiment))
    return Imputation(*_map("imputing", experiment, one, given, images, missing))


def _impute_image(
    experiment: Experiment,
    params: Any,
    mean: Float[Array, " dim"],
    pixels: Pixels,
    missing: Bool[Array, "height width channel"],
    key: PRNGKeyArray,
    num_steps: int,
    num_samples: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """`impute` of one image: what is filled in, and how wrong it is."""
    x, key = _seen(experiment, pixels, key)
    model, observed = experiment.merge(params), ~missing.reshape(-1)
    start, amortized = _encoder_alone(experiment, model, jnp.where(observed, x, mean), key)
    expand, repair = model.expansions(x, observed=observed)
    posterior, info = infer_posterior(
        expand, start, num_steps=num_steps, gradient="stop", repair=repair
    )
    predicted = _predict(experiment, model, posterior, key, num_samples)
    beside = _predict(experiment, model, amortized, key, num_samples)
    filled = {
        "images": jnp.where(missing, predicted.pixels, experiment.preprocessor.to_pixels(x)),
        "std": jnp.where(missing, predicted.std, 0.0),
        "mean": posterior.mean,
        "covariance": posterior.covariance(),
        "converged": info.converged,
        "is_pd": info.is_pd,
        "newton_decrement": info.newton_decrement,
    }
    errors = {
        "num_missing": jnp.sum(missing),
        **_errors(experiment, model, predicted, x, missing, ""),
        **_errors(experiment, model, beside, x, missing, "encoder_"),
    }
    return filled, errors


def _encoder_alone(
    experiment: Experiment,
    model: VariationalAutoencoder,
    x: Float[Array, " dim"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, " latent"], Posterior]:
    """Where the encoder puts x, and the posterior that it was trained to give."""
    if model.posterior_head is not None:
        inference = experiment.system(model, x, key)
        return inference.iterates[-1], inference.posterior
    mean, log_std = model.encode(x)
    if experiment.config.inference.method == "vlae":
        log_std = jnp.full_like(log_std, -jnp.inf)  # never trained: the mean is all it gives
    return mean, DiagonalPosterior(mean, log_std)


class _Prediction(NamedTuple):
    """The distribution of an image given a posterior over z."""

    pixels: Float[Array, "height width channel"]
    """Expected, in [0, 1]."""
    std: Float[Array, "height width channel"]
    mean: Float[Array, " dim"]
    """Expected in model space."""
    draws: Float[Array, "sample dim"]
    """In model space, with the output's noise."""


def _predict(
    experiment: Experiment,
    model: VariationalAutoencoder,
    posterior: Posterior,
    key: PRNGKeyArray,
    num_samples: int,
) -> _Prediction:
    to_pixels = experiment.preprocessor.to_pixels

    def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
        sample_key, noise_key = jax.random.split(key)
        z, _ = posterior.sample_and_log_prob(sample_key)
        return model.reconstruct(z), model.draw(noise_key, z)

    means, draws = jax.vmap(draw)(jax.random.split(key, num_samples))
    mean = jnp.mean(means, axis=0)
    if model.likelihood == "bernoulli":
        probability = to_pixels(mean)
        return _Prediction(probability, jnp.sqrt(probability * (1 - probability)), mean, draws)
    pictures = jax.vmap(to_pixels)(draws)
    return _Prediction(jnp.mean(pictures, axis=0), jnp.std(pictures, axis=0, ddof=1), mean, draws)


def _errors(
    experiment: Experiment,
    model: VariationalAutoencoder,
    predicted: _Prediction,
    x: Float[Array, " dim"],
    missing: Bool[Array, "height width channel"],
    prefix: str,
) -> dict[str, Array]:
    """How far a prediction is from x on the missing pixels, and how often its intervals hold x."""
    hidden = missing.reshape(-1)

    def average(values: Array) -> Array:
        return jnp.sum(values, where=hidden) / jnp.maximum(jnp.sum(hidden), 1)

    truth = experiment.preprocessor.to_pixels(x)
    found = {
        "squared_error": average(((predicted.pixels - truth) ** 2).reshape(-1)),
        "squared_error_x": average((predicted.mean - x) ** 2),
    }
    # Of a binary pixel an interval says nothing.
    if model.likelihood == "gaussian":
        for probability in COVERAGES:
            inside = _inside(predicted.draws, x, probability)
            found[f"coverage_{100 * probability:.0f}"] = average(inside)
    return {prefix + name: value for name, value in found.items()}


def _inside(
    draws: Float[Array, "sample dim"], x: Float[Array, " dim"], probability: float
) -> Float[Array, " dim"]:
    """Whether x lies in the central interval of its draws, by its rank among them.

    One more draw has each of the sample + 1 ranks equally often. A rank that an end of the interval
    cuts counts by its part inside, so that on average the probability comes out exactly.
    """
    ranks = len(draws) + 1
    low = jnp.sum(draws < x, axis=0) / ranks
    start, stop = (1 - probability) / 2, (1 + probability) / 2
    overlap = jnp.minimum(low + 1 / ranks, stop) - jnp.maximum(low, start)
    return ranks * jnp.maximum(overlap, 0.0)


def _training_mean(experiment: Experiment) -> Float[Array, " dim"]:
    """The mean of x over the training images."""
    if not experiment.preprocessor.binary:
        return jnp.zeros(experiment.preprocessor.dim)
    dataset = experiment.dataset
    return jnp.asarray(mean_image(dataset.train).reshape(-1) / (dataset.levels - 1), float)


def score(
    experiment: Experiment, params: Any, images: np.ndarray, *, what: str = "scoring"
) -> Arrays:
    """How outlying each image is, by the names of `OUTLYING`, (n,) each.

    log_prob and elbo (nats, model space), bits_per_dim (of the pixels, where the preprocessing has
    it), newton_decrement (nats, where the system searches a mode: how far from one its steps have
    left it) and pareto_k (how badly the posterior fits). The first three have K importance samples
    of the experiment's evaluation section.

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        images: uint8, (n, height, width, channel), preprocessed as the training images were.
        what: What to call this on the line that shows progress.
    """
    measured = measure(experiment, params, images, what=what)
    return {name: measured[name] for name in OUTLYING if name in measured}


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
    for name, sign in OUTLYING.items():
        if name not in inliers or name not in outliers:
            continue
        values = sign * np.concatenate([inliers[name], outliers[name]]).astype(np.float64)
        if np.isnan(values).all():
            continue
        # Only the order counts, and infinities have no other way in.
        _, ranks = np.unique(np.where(np.isnan(values), np.inf, values), return_inverse=True)
        is_outlier = np.arange(len(values)) >= len(inliers[name])
        found[name] = float(roc_auc_score(is_outlier, ranks))
    return found


def _seen(experiment: Experiment, pixels: Pixels, key: PRNGKeyArray) -> tuple[Array, PRNGKeyArray]:
    """One image as the model sees it, as in evaluation, and a key for what is drawn besides."""
    noise_key, sample_key = jax.random.split(key)
    return experiment.preprocessor.apply(noise_key, pixels)[0], sample_key


def _map(
    what: str,
    experiment: Experiment,
    function: Callable[..., Any],
    given: Any,
    images: np.ndarray,
    *arrays: Any,
) -> Any:
    batch_size = experiment.config.evaluation.evaluation_batch
    keys = fixed_keys(len(images))
    run = map_images(function, images, keys, *arrays, batch_size=batch_size)
    with counting(what, len(images)) as show:
        return run(given, show)
