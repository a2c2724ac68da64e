"""What is measured on test images: ELBO, importance-weighted log-likelihood, diagnostics."""

import dataclasses
import functools
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from arviz_stats.base import array_stats
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.bounds import importance_weighted_log_prob
from vlae_jax.config import EvaluationConfig
from vlae_jax.distributed import SAMPLES, Placement, is_first
from vlae_jax.experiment import Experiment, map_images
from vlae_jax.flows import FlowPosterior
from vlae_jax.posterior import (
    DiagonalPosterior,
    GaussianPosterior,
    Posterior,
    heavy_tailed,
    kl_to_standard_normal,
    widened,
)
from vlae_jax.preprocessing import fixed_keys
from vlae_jax.progress import counting

UNRELIABLE_K = 0.7
"""Pareto k̂ above which an importance-weighted estimate is not to be relied on."""
_SMALLEST_TAIL = 5
_PACKAGES = (
    *("vlae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("arviz-stats", "blackjax"),
)


class Figure(NamedTuple):
    """One number of a results file, with all that is needed to read it."""

    name: str
    value: float
    standard_error: float | None
    """Over images."""
    unit: str
    images: int
    """Images the value is a mean over; those without a finite value are left out."""
    samples: int | None = None
    """Posterior samples per image."""
    split: str = "test"


class Evaluation(NamedTuple):
    """What was measured on the test images."""

    figures: list[Figure]
    per_image: dict[str, np.ndarray]
    """The same quantities image by image, (n,) each: for paired comparisons and histograms."""


def evaluate(experiment: Experiment, params: Any, placement: Placement | None = None) -> Evaluation:
    """Measure a model on the test images.

    Every image counts once, with noise that depends on its number alone, so that a second
    evaluation gives the same figures.

    Args:
        experiment: What the model belongs to; its evaluation section says how much to do.
        params: The parameters to measure.
        placement: See `measure`.

    Returns:
        The figures, in nats per image where nothing else is said, and the values behind them.
    """
    images = experiment.dataset.test[: experiment.config.evaluation.test_images]
    measured = measure(experiment, params, images, placement=placement)
    return Evaluation(_figures(experiment, measured), measured)


def measure(
    experiment: Experiment,
    params: Any,
    images: np.ndarray,
    *,
    what: str = "evaluating",
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """What `evaluate` reads off the test images, image by image, of any images.

    Args:
        experiment: What the model belongs to; its evaluation section says how much to do.
        params: The parameters to measure.
        images: uint8 (n, height, width, channel), of the shape and levels of the data set. The
            noise of each depends on its place among them alone.
        what: What to call this on the line that shows progress.
        placement: Devices to spread the work over, images first, then the samples of each chunk;
            every process must then call, with parameters it has whole. By default one device.

    Returns:
        (n,) each, nats where nothing else is said: log_prob, elbo, inference_gap, kl,
        reconstruction, log_det (of the preprocessing), ess (samples), log_prob_sampling_error,
        pareto_k; bits_per_dim where the preprocessing has one; the system's flags.
    """
    config = experiment.config.evaluation
    spread = placement and placement.for_batch(min(config.evaluation_batch, len(images)))
    chunk_size, place = config.chunk_size, None
    if spread and (splits := spread.mesh.shape[SAMPLES]) > 1:
        chunk_size = max(splits, chunk_size - chunk_size % splits)
        place = spread.split_samples

    weigh = functools.partial(
        importance_weighted_log_prob,
        num_samples=config.importance_samples,
        chunk_size=chunk_size,
        place=place,
    )

    def one(given: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        params, head = given
        noise_key, sample_key = jax.random.split(key)
        x, log_det = experiment.preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        log_joint = model.log_joint(x, head)
        inference = experiment.system(model, x, sample_key)
        posterior = inference.posterior
        proposal = _proposal(config, posterior)
        log_prob, info = weigh(sample_key, log_joint, proposal)
        bound = info.elbo
        if proposal is not posterior:
            bound = weigh(sample_key, log_joint, posterior)[1].elbo
        kl = kl_to_standard_normal(sample_key, posterior, num_samples=config.chunk_size)
        return {
            "log_det": log_det,
            "log_prob": log_prob,
            "elbo": bound,
            "kl": kl,
            "reconstruction": bound + kl,
            "ess": info.ess,
            "largest_weights": info.largest,
            "log_prob_sampling_error": info.standard_error,
            **inference.flags,
        }

    run = map_images(
        one,
        images,
        fixed_keys(len(images)),
        batch_size=config.evaluation_batch,
        placement=spread,
    )
    with counting(what, len(images), quiet=not is_first()) as show:
        given = (params, experiment.whitened_head(params))
        measured = run(spread.put(jax.device_get(given)) if spread else given, show)
    largest = measured.pop("largest_weights")
    measured["pareto_k"] = pareto_k(largest, config.importance_samples)
    bits = experiment.preprocessor.bits_per_dim(measured["log_prob"], measured["log_det"])
    if bits is not None:
        measured["bits_per_dim"] = np.asarray(bits)
    measured["inference_gap"] = measured["log_prob"] - measured["elbo"]
    return measured


def _proposal(config: EvaluationConfig, posterior: Posterior) -> Posterior:
    """What importance samples are drawn from. A flow's is its own, with another base."""
    if config.proposal == "posterior":
        return posterior
    if isinstance(posterior, FlowPosterior):
        return posterior._replace(base=_proposal(config, posterior.base))
    assert isinstance(posterior, GaussianPosterior | DiagonalPosterior)
    if config.proposal == "widened":
        return widened(posterior, config.proposal_scale)
    return heavy_tailed(posterior, config.proposal_freedom)


def pareto_k(largest: np.ndarray, num_samples: int) -> np.ndarray:
    """The shape k̂ of the importance weights' tail, image by image.

    Below 0.7 the estimate can be relied on; above, the weights have no useful variance and it is
    too low. A tail without any spread, as of a proposal that is the posterior, has -inf.

    Args:
        largest: The largest log weights of each image, descending, (n, tail + 1), with the one
            below the tail last: `ImportanceInfo.largest`.
        num_samples: K, of which they are the largest.

    Returns:
        (n,). NaN where fewer than 25 samples leave no tail, or a weight in it is zero or no number.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
    """
    shapes = np.full(len(largest), np.nan)
    if largest.shape[1] <= _SMALLEST_TAIL:
        return shapes
    for i, weights in enumerate(np.asarray(largest, np.float64)):
        # Only differences count, and float32 rounds them to this.
        resolution = np.finfo(np.float32).eps * max(1.0, abs(weights[0]))
        if np.isfinite(weights[0]) and weights[0] - weights[-1] <= 8 * resolution:
            shapes[i] = -np.inf
        elif np.isfinite(weights).all():
            # The fit looks at the tail and at the value below it, not at the others.
            rest = np.full(num_samples - len(weights), weights[-1])
            # Equal weights next to the tail make it divide by zero on the way to a finite shape.
            with np.errstate(divide="ignore", invalid="ignore"):
                _, shapes[i] = array_stats.psislw(-np.concatenate([weights, rest]))
    return shapes


def describe(experiment: Experiment, figures: list[Figure], **more: Any) -> dict[str, Any]:
    """The content of results.json: the figures with all that they depend on.

    The noise of an image, its dequantisation or binarisation and its samples, depends on its number
    alone (`preprocessing.fixed_keys`), so that no seed of the evaluation need be told.
    """
    config = experiment.config
    return {
        "run": {
            "dataset": experiment.dataset.name,
            "source": experiment.dataset.source,
            "fingerprint": experiment.dataset.fingerprint,
            "method": config.inference.method,
            "label": config.inference.label,
            "steps": config.inference.num_steps,
            "objective": config.training.objective,
            "precision": config.model.precision,
            "proposal": config.evaluation.proposal,
            "seed": config.training.seed,
            "epochs": config.training.epochs,
        },
        "config": dataclasses.asdict(config),
        "figures": [figure._asdict() for figure in figures],
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.default_backend()}",
        **more,
    }


def _figures(experiment: Experiment, measured: Mapping[str, np.ndarray]) -> list[Figure]:
    samples = experiment.config.evaluation.importance_samples
    figures = [
        mean_figure("log_prob", measured["log_prob"], "nats", samples),
        mean_figure("elbo", measured["elbo"], "nats", samples),
        mean_figure("inference_gap", measured["inference_gap"], "nats", samples),
        mean_figure("kl", measured["kl"], "nats"),
        mean_figure("reconstruction", measured["reconstruction"], "nats", samples),
    ]
    if "bits_per_dim" in measured:
        figures.append(mean_figure("bits_per_dim", measured["bits_per_dim"], "bits/dim", samples))
    shapes, errors = measured["pareto_k"], measured["log_prob_sampling_error"]
    unreliable = np.where(np.isnan(shapes), np.nan, shapes > UNRELIABLE_K)
    figures += [
        mean_figure("ess", measured["ess"], "samples", samples),
        mean_figure("log_prob_sampling_error", errors, "nats", samples),
        mean_figure("unreliable", unreliable, "share"),
        mean_figure("not_finite", ~np.isfinite(measured["log_prob"]), "share"),
    ]
    if "converged" in measured:
        figures += [
            mean_figure("unconverged", ~measured["converged"], "share"),
            mean_figure("not_positive_definite", ~measured["is_pd"], "share"),
            mean_figure("newton_decrement", measured["newton_decrement"], "nats"),
        ]
    return figures


def mean_figure(
    name: str, values: np.ndarray, unit: str, samples: int | None = None, *, split: str = "test"
) -> Figure:
    """The mean over the images whose value is finite, with its standard error.

    Args:
        name: What it is.
        values: One number an image, (n,).
        unit: "nats", "bits/dim", "share", ...
        samples: Posterior samples an image, where they matter.
        split: The images.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    value = float(np.mean(values)) if n else float("nan")
    return Figure(name, value, error, unit, n, samples, split)
