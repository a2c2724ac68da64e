"""Imputation of missing pixels, or entries, by the posterior given the observed ones."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlae_jax.analysis.uses import Arrays, map_with_progress, name_of_examples
from vlae_jax.data.dataset import has_missing
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import Observation, VariationalAutoencoder
from vlae_jax.models.systems import find_system, flags_of
from vlae_jax.models.trained import Pixels, Trained
from vlae_jax.posterior import DiagonalPosterior, Posterior
from vlae_jax.variational import variational_refine

Missing = Bool[Array, "..."]

COVERAGES = (0.5, 0.9)
"""Probabilities of the predictive intervals whose coverage `impute` measures."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of the quantiles that `impute` gives for measurements."""


def missing_at_random(shape: tuple[int, ...], share: float, *, seed: int) -> np.ndarray:
    """Choose pixels to hide at random, equally many in each image, with all channels of a pixel.

    Args:
        shape: (n, height, width, channel), or (n, dim) for the entries of a table.
        share: Share of the pixels of an image, above 0 and below 1; rounded so that at least one
            pixel is hidden and at least one is left.
        seed: Seed of the choice, which differs between images.

    Returns:
        Booleans of the given shape, true for hidden pixels.
    """
    n, *places = shape[:3]
    size = math.prod(places)
    hidden = min(max(round(share * size), 1), size - 1)
    order = np.random.default_rng(seed).random((n, size)).argsort(axis=1)
    each = (order < hidden).reshape(n, *places, *(1,) * (len(shape) - 3))
    return np.broadcast_to(each, shape)


def missing_box(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> np.ndarray:
    """Hide one rectangle in every image.

    Args:
        shape: (n, height, width, channel).
        box: (top, left, height, width) in pixels, from 0; clipped at the edge of the image.

    Returns:
        Booleans of the given shape, true for hidden pixels.
    """
    top, left, height, width = box
    missing = np.zeros(shape, bool)
    missing[:, top : top + height, left : left + width] = True
    return missing


class Imputation(NamedTuple):
    """Images with their missing pixels filled in."""

    arrays: Arrays
    """images (n, height, width, channel), in [0, 1]: expected values of missing pixels, and the
    model's input elsewhere; std, of the same shape, the predictive standard deviation, 0 for
    observed pixels; the moments of the posterior given the observed pixels, mean (n, latent) and
    covariance (n, latent, latent); converged, is_pd, newton_decrement (n,). For a table rows in
    place of images. For measurements, in their own units, also quantiles (n, 5, ...), at the levels
    `QUANTILES`, and draws (n, `draws`, ...), both equal to the input where it is observed."""
    errors: Arrays
    """Errors relative to the true values of missing pixels, meaningful where these are known, (n,)
    each, by NAME for the posterior and encoder_NAME for the encoder alone: squared_error and
    squared_error_x, the means over missing pixels in pixel and in model space; for a Gaussian
    output coverage_50 and coverage_90, the share of missing pixels inside the central predictive
    interval. And num_missing, the number of missing values in each mean."""


def impute(
    trained: Trained,
    images: np.ndarray,
    missing: np.ndarray | None = None,
    *,
    num_steps: int = 20,
    num_samples: int = 200,
    refine: bool = False,
    draws: int = 0,
) -> Imputation:
    """Fill in missing pixels by the Laplace posterior given the others, for any trained model.

    The likelihood sums over observed pixels only, which integrates the others out. The mode is
    searched from the encoder's output for the image with missing pixels set to the training mean.
    For comparison the result also has the errors of the encoder alone: of its own posterior for
    that image, or of its mean if only that was trained (vlae).

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel), or measurements (n, ...); the values of missing
            pixels are used for the errors alone.
        missing: Booleans of the same shape. Entries that are NaN are missing anyway, and by default
            they alone.
        num_steps: Newton steps of the search.
        num_samples: Samples of the predictive distribution per image, at least 2.
        refine: Refine the Laplace posterior towards the Gaussian of largest ELBO, by the number of
            variational Newton steps in the inference section of the configuration.
        draws: For measurements, the number of samples to return.

    Raises:
        ValueError: If the shape of `missing` is not that of `images`, or there are too few samples.
    """
    unknown = np.isnan(images) if has_missing(images) else np.zeros(images.shape, bool)
    missing = unknown if missing is None else missing
    if missing.shape != images.shape:
        raise ValueError(f"missing must have shape {images.shape}, got {missing.shape}")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    if not 0 <= draws <= num_samples:
        raise ValueError(f"draws must be from 0 to num_samples={num_samples}, got {draws}")
    sizes = _Sizes(num_steps, num_samples, draws)
    filled = map_with_progress(
        "imputing", trained, _impute_image, images, missing | unknown, sizes=sizes, refine=refine
    )
    return Imputation(*filled)


class _Sizes(NamedTuple):
    """The amounts of work and of output of `impute`."""

    steps: int
    samples: int
    draws: int


def _impute_image(
    trained: Trained,
    pixels: Pixels,
    key: PRNGKeyArray,
    missing: Missing,
    *,
    sizes: _Sizes,
    refine: bool,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Impute one image: return the arrays and the errors of an `Imputation`, without axis n."""
    keys, _, at = trained.observe(key, pixels, missing=missing)
    start, amortized = _encoder_alone(trained, at, keys.inference)
    expand, repair = at.expansions()
    posterior, info = infer_posterior(
        expand, start, num_steps=sizes.steps, gradient="stop", repair=repair
    )
    flags = flags_of(info)
    if refine:
        config = trained.config.inference
        posterior, refined = variational_refine(
            expand,
            posterior,
            keys.refinement,
            num_steps=config.refine_steps,
            num_samples=config.refine_samples,
            repair=repair,
        )
        flags = flags_of(refined)
    predicted = _predict(trained, at.model, posterior, keys.use, sizes.samples)
    beside = _predict(trained, at.model, amortized, keys.use, sizes.samples)
    truth = trained.preprocessor.to_pixels(at.x)
    filled = {
        name_of_examples(trained): jnp.where(missing, predicted.pixels, truth),
        "std": jnp.where(missing, predicted.std, 0.0),
        "mean": posterior.mean,
        "covariance": posterior.covariance(),
        **flags,
    }
    if not trained.preprocessor.levels:
        drawn = jax.vmap(trained.preprocessor.to_pixels)(predicted.draws)
        quantiles = jnp.quantile(drawn, jnp.asarray(QUANTILES), axis=0)
        filled["quantiles"] = jnp.where(missing, quantiles, truth)
        if sizes.draws:
            filled["draws"] = jnp.where(missing, drawn[: sizes.draws], truth)
    known = missing & ~jnp.isnan(truth) if trained.preprocessor.incomplete else missing
    errors = {
        "num_missing": jnp.sum(known),
        **_errors(trained, at, predicted, known, ""),
        **_errors(trained, at, beside, known, "encoder_"),
    }
    return filled, errors


def _encoder_alone(
    trained: Trained, at: Observation, key: PRNGKeyArray
) -> tuple[Float[Array, " latent"], Posterior]:
    """The center and the posterior that the encoder gives without search or refinement."""
    method = trained.config.inference.method
    if at.model.posterior_head is not None:
        inference = find_system(method)(at, key, trained.config.inference)
        return inference.iterates[-1], inference.posterior
    if method == "vlae":  # its log_std is never trained, only the mean can be used
        return at.mean, DiagonalPosterior(at.mean, jnp.full_like(at.log_std, -jnp.inf))
    return at.mean, at.guess


class _Prediction(NamedTuple):
    """The predictive distribution of an image, given a posterior over z."""

    pixels: Float[Array, "..."]
    """Expected pixels, in [0, 1], or measurements in their own units."""
    std: Float[Array, "..."]
    mean: Float[Array, " dim"]
    """Expected x, in model space."""
    draws: Float[Array, "sample dim"]
    """Samples in model space, with the output's noise."""


def _predict(
    trained: Trained,
    model: VariationalAutoencoder,
    posterior: Posterior,
    key: PRNGKeyArray,
    num_samples: int,
) -> _Prediction:
    to_pixels = trained.preprocessor.to_pixels

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
    trained: Trained, at: Observation, predicted: _Prediction, missing: Missing, prefix: str
) -> dict[str, Array]:
    """Errors of a prediction on the missing pixels, and the coverage of its intervals, by name."""
    hidden = missing.reshape(-1)

    def average(values: Array) -> Array:
        return jnp.sum(values, where=hidden) / jnp.maximum(jnp.sum(hidden), 1)

    truth = trained.preprocessor.to_pixels(at.x)
    found = {
        "squared_error": average(((predicted.pixels - truth) ** 2).reshape(-1)),
        "squared_error_x": average((predicted.mean - at.x) ** 2),
    }
    # Intervals of binary pixels are not informative.
    if at.model.likelihood not in ("bernoulli", "categorical"):
        for probability in COVERAGES:
            inside = _inside(predicted.draws, at.x, probability)
            found[f"coverage_{100 * probability:.0f}"] = average(inside)
    return {prefix + name: value for name, value in found.items()}


def _inside(
    draws: Float[Array, "sample dim"], x: Float[Array, " dim"], probability: float
) -> Float[Array, " dim"]:
    """Whether x lies in the central interval of its draws, by its rank among them, from 0 to 1.

    One more draw would have each of the sample + 1 ranks with equal probability. A rank at an end
    of the interval counts with the fraction of it that is inside, so that the expected coverage of
    a correct prediction is exactly the given probability.
    """
    ranks = len(draws) + 1
    low = jnp.sum(draws < x, axis=0) / ranks
    start, stop = (1 - probability) / 2, (1 + probability) / 2
    overlap = jnp.minimum(low + 1 / ranks, stop) - jnp.maximum(low, start)
    return ranks * jnp.maximum(overlap, 0.0)
