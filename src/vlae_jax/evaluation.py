"""The one reading of the test images: ELBO, importance-weighted log-likelihood, diagnostics."""

import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.bounds import importance_weighted_log_prob
from vlae_jax.experiment import Experiment, map_images
from vlae_jax.preprocessing import fixed_keys
from vlae_jax.progress import ProgressLine

_PACKAGES = ("vlae-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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


def evaluate(experiment: Experiment, params: Any) -> list[Figure]:
    """Measure a model on the test images.

    Every image counts once, with noise that depends on its number alone, so that a second
    evaluation gives the same figures.

    Args:
        experiment: What the model belongs to; its evaluation section says how much to do.
        params: The parameters to measure.

    Returns:
        The figures, in nats per image where nothing else is said.
    """
    config = experiment.config.evaluation
    images = experiment.dataset.test[: config.test_images]

    def one(given: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        params, head = given
        noise_key, sample_key = jax.random.split(key)
        x, log_det = experiment.preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        inference = experiment.system(model, x)
        log_prob, info = importance_weighted_log_prob(
            sample_key,
            model.log_joint(x, head),
            inference.posterior,
            num_samples=config.importance_samples,
            chunk_size=config.chunk_size,
        )
        kl = inference.posterior.kl_to_standard_normal()
        return {
            "log_det": log_det,
            "log_prob": log_prob,
            "elbo": info.elbo,
            "kl": kl,
            "reconstruction": info.elbo + kl,
            "ess": info.ess,
            "log_prob_sampling_error": info.standard_error,
            **inference.flags,
        }

    measure = map_images(one, images, fixed_keys(len(images)), batch_size=config.evaluation_batch)
    with ProgressLine("evaluating", len(images)) as progress:
        began = time.monotonic()

        def show(done: int) -> None:
            progress.update(done, f"{done / (time.monotonic() - began):.1f} images/s")

        head = jax.jit(lambda params: experiment.merge(params).whitened_head())(params)
        measured = measure((params, head), show)
    return _figures(experiment, measured)


def describe(experiment: Experiment, figures: list[Figure], **more: Any) -> dict[str, Any]:
    """The content of results.json: the figures with all that they depend on."""
    config = experiment.config
    return {
        "run": {
            "dataset": experiment.dataset.name,
            "source": experiment.dataset.source,
            "fingerprint": experiment.dataset.fingerprint,
            "method": config.inference.method,
            "steps": config.inference.steps,
            "seed": config.training.seed,
            "epochs": config.training.epochs,
        },
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
    log_prob, log_det = measured["log_prob"], measured["log_det"]
    bits = experiment.preprocessor.bits_per_dim(jnp.asarray(log_prob), jnp.asarray(log_det))
    figures = [
        _mean("log_prob", log_prob, "nats", samples),
        _mean("elbo", measured["elbo"], "nats", samples),
        _mean("inference_gap", log_prob - measured["elbo"], "nats", samples),
        _mean("kl", measured["kl"], "nats"),
        _mean("reconstruction", measured["reconstruction"], "nats", samples),
    ]
    if bits is not None:
        figures.append(_mean("bits_per_dim", np.asarray(bits), "bits/dim", samples))
    figures += [
        _mean("ess", measured["ess"], "samples", samples),
        _mean("log_prob_sampling_error", measured["log_prob_sampling_error"], "nats", samples),
        _mean("not_finite", ~np.isfinite(log_prob), "share"),
    ]
    if "converged" in measured:
        figures += [
            _mean("unconverged", ~measured["converged"], "share"),
            _mean("not_positive_definite", ~measured["is_pd"], "share"),
            _mean("newton_decrement", measured["newton_decrement"], "nats"),
        ]
    return figures


def _mean(name: str, values: np.ndarray, unit: str, samples: int | None = None) -> Figure:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    return Figure(name, float(np.mean(values)) if n else float("nan"), error, unit, n, samples)
