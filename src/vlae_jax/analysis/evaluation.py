"""Evaluation on test images: ELBO, importance-weighted log-likelihood, diagnostics."""

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.analysis.estimation import (
    ANNEALING,
    Effort,
    anneal_log_prob,
    effort_for,
    estimate_log_prob,
    is_doubtful,
    pareto_k,
    within_budget,
)
from vlae_jax.bounds import ImportanceInfo, importance_weighted_log_prob
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
)
from vlae_jax.progress import counting
from vlae_jax.proposals import heavy_tailed, widened
from vlae_jax.runs.config import EvaluationConfig
from vlae_jax.runs.methods import find_method
from vlae_jax.runs.metrics import Metric, mean_metric

_ELBO_SHARE = 5
"""With proposal auto the number of samples for log p(x) is divided by this for the ELBO, as single
samples vary less than importance weights."""
_SAMPLED = frozenset(
    {
        *("log_prob", "elbo", "inference_gap", "reconstruction", "bits_per_dim", "ess"),
        "log_prob_sampling_error",
    }
)
"""Metrics that depend on the number of importance samples."""
_OWN = "own_"
"""Begins the names of what the system's own posterior gives as the proposal."""
_REPORTED = (
    *("log_prob", "elbo", "inference_gap", "kl", "reconstruction", "bits_per_dim", "ess"),
    *("log_prob_sampling_error", "unreliable", "annealed", "not_finite", "unconverged"),
    *("not_positive_definite", "newton_decrement", "own_log_prob", "own_unreliable"),
)
"""Metrics in a results file, in the order of that file."""
_PACKAGES = (
    *("vlae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("arviz-stats", "blackjax"),
)


class Evaluation(NamedTuple):
    """The result of an evaluation on images."""

    metrics: list[Metric]
    per_image: dict[str, np.ndarray]
    """The values of each image, (n,) per quantity, for paired comparisons and histograms."""


def evaluate(
    trained: Trained, images: np.ndarray, *, placement: Placement | None = None
) -> Evaluation:
    """Evaluate a model on images, usually those of the test set.

    Every image counts once. Its noise depends only on its index, so that a second evaluation gives
    the same numbers.

    Args:
        trained: The model; the evaluation section of its configuration sets the amount of work.
        images: uint8 (n, height, width, channel), of the shape and levels it was trained on, or
            measurements (n, ...).
        placement: See `measure`.

    Returns:
        The metrics, in nats per image unless stated otherwise, and the values of each image.
    """
    measured = measure(trained, images, placement=placement)
    return Evaluation(metrics_of(trained.config.evaluation, measured), measured)


def measure(
    trained: Trained,
    images: np.ndarray,
    *,
    what: str = "evaluating",
    placement: Placement | None = None,
    keys: Array | None = None,
) -> dict[str, np.ndarray]:
    """Measure a model on images, image by image.

    Args:
        trained: The model; the evaluation section of its configuration sets the amount of work.
        images: uint8 (n, height, width, channel), of the shape and levels it was trained on, or
            measurements (n, ...). The noise of each depends only on its index.
        what: Label of the progress line.
        placement: Devices to spread the work over, images first, then the samples of each chunk;
            every process must then call, with all of the model's arrays. By default one device.
        keys: Random keys of the images, (n,); by default `fixed_keys`, by their indices.

    Returns:
        Arrays of shape (n,), in nats unless stated otherwise (densities of pixels in model space,
        those of measurements in their own units): log_prob, elbo, inference_gap, kl,
        reconstruction, log_det (of the preprocessing), ess (samples), log_prob_sampling_error,
        pareto_k; bits_per_dim if the preprocessing defines it; the system's flags. With proposal
        auto also annealed, whether log_prob comes from annealing; and own_log_prob, own_ess,
        own_log_prob_sampling_error and own_pareto_k, from a fifth as many samples of the system's
        own posterior.
    """
    trained = trained.for_examples(images)
    config = trained.config.evaluation
    spread = placement and placement.for_batch(min(config.evaluation_batch, len(images)))
    keys = fixed_keys(len(images)) if keys is None else keys
    measured = _first_pass(trained, images, keys, what, spread)
    if config.proposal == "auto":
        _anneal_doubtful(trained, images, keys, measured, spread)
    log_prob, log_det = (jnp.asarray(measured[name]) for name in ("log_prob", "log_det"))
    bits = trained.preprocessor.bits_per_dim(log_prob, log_det)
    if bits is not None:
        measured["bits_per_dim"] = np.asarray(bits)
    measured["inference_gap"] = measured["log_prob"] - measured["elbo"]
    return measured


def _first_pass(
    trained: Trained, images: np.ndarray, keys: Array, what: str, spread: Placement | None
) -> dict[str, np.ndarray]:
    """Measure all quantities of every image, with the same number of samples for each."""
    config = trained.config.evaluation
    chunk_size, place = _chunks(config, spread)
    measured = _map(
        what, trained, _measure_one, images, keys, spread, chunk_size=chunk_size, place=place
    )
    if config.proposal == "auto":
        measured = _with_pareto_k(measured, _elbo_samples(config), _OWN)
    return _with_pareto_k(measured, _weights(config, effort_for(config.importance_samples)))


def _measure_one(
    trained: Trained,
    pixels: Array,
    key: PRNGKeyArray,
    *,
    chunk_size: int,
    place: Callable[[Array], Array] | None,
) -> dict[str, Array]:
    config = trained.config.evaluation
    weigh = functools.partial(importance_weighted_log_prob, chunk_size=chunk_size, place=place)
    inferred = trained.infer(key, pixels)
    keys, log_joint, posterior = inferred.keys, inferred.log_joint, inferred.posterior
    samples = config.importance_samples
    if config.proposal == "auto":
        log_prob, info = estimate_log_prob(
            inferred, effort_for(samples), chunk_size=chunk_size, place=place
        )
        own_log_prob, own = weigh(
            keys.bound, log_joint, posterior, num_samples=_elbo_samples(config)
        )
        bound, beside = own.elbo, _named(_OWN, _of_weights(own_log_prob, own))
    else:
        beside, proposal = {}, _proposal(config, posterior)
        log_prob, info = weigh(keys.bound, log_joint, proposal, num_samples=samples)
        bound = info.elbo
        if proposal is not posterior:
            bound = weigh(keys.bound, log_joint, posterior, num_samples=samples)[1].elbo
    kl = inferred.at.kl_to_prior(keys.divergence, posterior, num_samples=config.chunk_size)
    return {
        "log_det": inferred.log_det,
        "elbo": bound,
        "kl": kl,
        "reconstruction": bound + kl,
        **_of_weights(log_prob, info),
        **beside,
        **inferred.inference.flags,
    }


def _elbo_samples(config: EvaluationConfig) -> int:
    """The samples of the system's own posterior beside proposal auto."""
    return -(-config.importance_samples // _ELBO_SHARE)


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _anneal_doubtful(
    trained: Trained,
    images: np.ndarray,
    keys: Array,
    measured: dict[str, np.ndarray],
    spread: Placement | None,
) -> None:
    """Replace unreliable estimates of log p(x) in `measured`, as far as the budget allows."""
    config = trained.config.evaluation
    effort = effort_for(config.importance_samples)
    budget = config.evaluation_budget * effort.cost(trained.config.model.latent) * len(images)
    measured["annealed"] = np.zeros(len(images), bool)
    rows = within_budget(_doubtful(measured), ANNEALING.cost, budget)
    if not len(rows):
        return
    found = _map("annealing", trained, _anneal_one, images[rows], keys[rows], spread)
    for name, values in found.items():
        measured[name][rows] = values
    measured["annealed"][rows] = True


def _anneal_one(trained: Trained, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
    effort = effort_for(trained.config.evaluation.importance_samples)
    log_prob, error = anneal_log_prob(trained.infer(key, pixels), effort)
    return {"log_prob": log_prob, "log_prob_sampling_error": error}


def _map(
    what: str,
    trained: Trained,
    function: Callable[..., Any],
    images: np.ndarray,
    keys: Array,
    spread: Placement | None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Apply a module's own function of one image to images, each with its key."""
    run = map_images(
        function,
        images,
        keys,
        batch_size=trained.config.evaluation.evaluation_batch,
        placement=spread,
        options=options,
    )
    with counting(what, len(images), quiet=not is_first()) as show:
        given = trained.factored()
        return run(spread.put(jax.device_get(given)) if spread else given, show)


def _chunks(
    config: EvaluationConfig, spread: Placement | None
) -> tuple[int, Callable[[Array], Array] | None]:
    """The number of importance samples held at once, and the function that places them, or None."""
    if spread is None or (splits := spread.mesh.shape[SAMPLES]) == 1:
        return config.chunk_size, None
    return max(splits, config.chunk_size - config.chunk_size % splits), spread.split_samples


def _weights(config: EvaluationConfig, effort: Effort) -> int:
    """The number of independent weights of an estimate; an antithetic pair counts as one."""
    auto = config.proposal == "auto"
    return effort.importance_samples // 2 if auto else config.importance_samples


def _of_weights(log_prob: Array, info: ImportanceInfo) -> dict[str, Array]:
    return {
        "log_prob": log_prob,
        "ess": info.ess,
        "largest_weights": info.largest,
        "log_prob_sampling_error": info.standard_error,
    }


def _with_pareto_k(
    measured: dict[str, np.ndarray], num_weights: int, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Return `measured` with pareto_k in place of the largest weights, to which it is fitted."""
    largest = f"{prefix}largest_weights"
    rest = {name: values for name, values in measured.items() if name != largest}
    return {**rest, f"{prefix}pareto_k": pareto_k(measured[largest], num_weights)}


def _doubtful(measured: Mapping[str, np.ndarray]) -> np.ndarray:
    """Indices of the images whose estimate is unreliable, the worst first."""
    shapes = measured["pareto_k"]
    worst_first = np.argsort(-shapes, kind="stable")
    return worst_first[is_doubtful(shapes[worst_first])]


def _proposal(config: EvaluationConfig, posterior: Posterior) -> Posterior:
    """The proposal of importance sampling; for a flow, the flow with the base replaced."""
    if config.proposal == "posterior":
        return posterior
    if isinstance(posterior, FlowPosterior):
        return posterior._replace(base=_proposal(config, posterior.base))
    assert isinstance(posterior, GaussianPosterior | DiagonalPosterior)
    if config.proposal == "widened":
        return widened(posterior, config.proposal_scale)
    return heavy_tailed(posterior, config.proposal_df)


def describe(
    trained: Trained, metrics: list[Metric], *, seconds: dict[str, float] | None = None, **more: Any
) -> dict[str, Any]:
    """The content of results.json: the metrics with all that they depend on.

    The noise of an image, its dequantization or binarization and its samples, depends only on its
    index among the test images (`preprocessing.fixed_keys`), so no seed of the evaluation is
    recorded.

    Args:
        trained: The model.
        metrics: The metrics of the evaluation.
        seconds: Time spent besides training, by the name of the activity.
        more: Additional entries.
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


def metrics_of(config: EvaluationConfig, measured: Mapping[str, np.ndarray]) -> list[Metric]:
    """The metrics of a results file, from what `measure` has measured with this configuration."""
    shapes = measured["pareto_k"]
    annealed = measured.get("annealed", np.zeros(len(shapes), bool))
    found = {
        **measured,
        "unreliable": _unreliable(shapes, annealed),
        "not_finite": ~np.isfinite(measured["log_prob"]),
    }
    if "converged" in measured:
        found |= {
            "unconverged": ~measured["converged"],
            "not_positive_definite": ~measured["is_pd"],
        }
    drawn = dict.fromkeys(_SAMPLED, config.importance_samples)
    if "own_pareto_k" in measured:
        found["own_unreliable"] = _unreliable(measured["own_pareto_k"])
        drawn["own_log_prob"] = _elbo_samples(config)
    return [mean_metric(name, found[name], drawn.get(name)) for name in _REPORTED if name in found]


def _unreliable(shapes: np.ndarray, is_replaced: np.ndarray | bool = False) -> np.ndarray:
    """1 where an estimate is unreliable, else 0; NaN for an unknown k̂, which says neither."""
    doubtful = is_doubtful(shapes) & np.logical_not(is_replaced)
    return np.where(np.isnan(shapes), np.nan, doubtful)
