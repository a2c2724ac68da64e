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
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.flows import FlowPosterior
from vlae_jax.models.trained import Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.parallel.placement import SAMPLES, Placement
from vlae_jax.parallel.processes import is_first
from vlae_jax.posterior import (
    DiagonalPosterior,
    GaussianPosterior,
    Posterior,
    heavy_tailed,
    kl_to_standard_normal,
    widened,
)
from vlae_jax.progress import counting
from vlae_jax.runs.config import EvaluationConfig
from vlae_jax.runs.methods import find_method
from vlae_jax.runs.metrics import UNRELIABLE_K, Metric, mean_metric

_SMALLEST_TAIL = 5
_SAMPLED = frozenset(
    {
        *("log_prob", "elbo", "inference_gap", "reconstruction", "bits_per_dim", "ess"),
        "log_prob_sampling_error",
    }
)
"""Metrics that depend on the number of importance samples."""
_REPORTED = (
    *("log_prob", "elbo", "inference_gap", "kl", "reconstruction", "bits_per_dim", "ess"),
    *("log_prob_sampling_error", "unreliable", "not_finite", "unconverged"),
    *("not_positive_definite", "newton_decrement"),
)
"""Metrics of a results file, in its order."""
_PACKAGES = (
    *("vlae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("arviz-stats", "blackjax"),
)


class Evaluation(NamedTuple):
    """What was measured on images."""

    metrics: list[Metric]
    per_image: dict[str, np.ndarray]
    """The same quantities image by image, (n,) each: for paired comparisons and histograms."""


def evaluate(
    trained: Trained, images: np.ndarray, *, placement: Placement | None = None
) -> Evaluation:
    """Measure a model on images, those of the test set say.

    Every image counts once, with noise that depends on its place among them alone, so that a
    second evaluation gives the same numbers.

    Args:
        trained: The model; the evaluation section of its configuration says how much to do.
        images: uint8 (n, height, width, channel), of the shape and levels it was trained on.
        placement: See `measure`.

    Returns:
        The metrics, in nats per image where nothing else is said, and the values behind them.
    """
    measured = measure(trained, images, placement=placement)
    return Evaluation(_metrics(trained.config.evaluation, measured), measured)


def measure(
    trained: Trained,
    images: np.ndarray,
    *,
    what: str = "evaluating",
    placement: Placement | None = None,
) -> dict[str, np.ndarray]:
    """Measure a model on images, image by image.

    Args:
        trained: The model; the evaluation section of its configuration says how much to do.
        images: uint8 (n, height, width, channel), of the shape and levels it was trained on. The
            noise of each depends on its place among them alone.
        what: What to call this on the line that shows progress.
        placement: Devices to spread the work over, images first, then the samples of each chunk;
            every process must then call, with a model it has whole. By default one device.

    Returns:
        (n,) each, nats where nothing else is said: log_prob, elbo, inference_gap, kl,
        reconstruction, log_det (of the preprocessing), ess (samples), log_prob_sampling_error,
        pareto_k; bits_per_dim where the preprocessing has one; the system's flags.
    """
    config = trained.config.evaluation
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

    def one(trained: Trained, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        keys, log_joint, posterior = inferred.keys, inferred.log_joint, inferred.posterior
        proposal = _proposal(config, posterior)
        log_prob, info = weigh(keys.bound, log_joint, proposal)
        bound = info.elbo
        if proposal is not posterior:
            bound = weigh(keys.bound, log_joint, posterior)[1].elbo
        kl = kl_to_standard_normal(keys.divergence, posterior, num_samples=config.chunk_size)
        return {
            "log_det": inferred.log_det,
            "log_prob": log_prob,
            "elbo": bound,
            "kl": kl,
            "reconstruction": bound + kl,
            "ess": info.ess,
            "largest_weights": info.largest,
            "log_prob_sampling_error": info.standard_error,
            **inferred.inference.flags,
        }

    run = map_images(
        one,
        images,
        fixed_keys(len(images)),
        batch_size=config.evaluation_batch,
        placement=spread,
    )
    with counting(what, len(images), quiet=not is_first()) as show:
        given = trained.factored()
        measured = run(spread.put(jax.device_get(given)) if spread else given, show)
    largest = measured.pop("largest_weights")
    measured["pareto_k"] = pareto_k(largest, config.importance_samples)
    bits = trained.preprocessor.bits_per_dim(measured["log_prob"], measured["log_det"])
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
    return heavy_tailed(posterior, config.proposal_df)


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


def describe(
    trained: Trained, metrics: list[Metric], *, seconds: dict[str, float] | None = None, **more: Any
) -> dict[str, Any]:
    """The content of results.json: the metrics with all that they depend on.

    The noise of an image, its dequantization or binarization and its samples, depends on its place
    among the test images alone (`preprocessing.fixed_keys`): no seed of the evaluation need be
    told.

    Args:
        trained: The model.
        metrics: What was measured.
        seconds: Time spent, by what on, besides that of the training.
        more: More entries.
    """
    config, made_from = trained.config, trained.provenance
    method = find_method(config.inference.method)
    return {
        "run": {
            "dataset": made_from.dataset,
            "source": made_from.source,
            "fingerprint": made_from.fingerprint,
            "method": config.inference.method,
            "label": method.label,
            "steps": config.inference.num_steps,
            "objective": config.training.objective,
            "precision": config.model.precision,
            "proposal": config.evaluation.proposal,
            "seed": config.training.seed,
            "epochs": config.training.epochs,
        },
        "config": dataclasses.asdict(config),
        "metrics": [metric._asdict() for metric in metrics],
        "checkpoint": {"step": made_from.step, "epoch": made_from.epoch},
        "seconds": {"training": made_from.seconds, **(seconds or {})},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.default_backend()}",
        **more,
    }


def _metrics(config: EvaluationConfig, measured: Mapping[str, np.ndarray]) -> list[Metric]:
    samples = config.importance_samples
    shapes = measured["pareto_k"]
    found = {
        **measured,
        "unreliable": np.where(np.isnan(shapes), np.nan, shapes > UNRELIABLE_K),
        "not_finite": ~np.isfinite(measured["log_prob"]),
    }
    if "converged" in measured:
        found |= {
            "unconverged": ~measured["converged"],
            "not_positive_definite": ~measured["is_pd"],
        }
    return [
        mean_metric(name, found[name], samples if name in _SAMPLED else None)
        for name in _REPORTED
        if name in found
    ]
