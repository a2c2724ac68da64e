"""How far off the usual estimates of log p(x) are: `python -m experiments.estimators RUNS`.

Every estimate is measured on the same test images of the same decoder. RUNS are run folders, or
folders of them as `python -m experiments NAME` makes. A run on record is not measured again; that
of others becomes the evaluation in its run folder. `make report` sets the tables of
docs/estimators.md from the record.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from scipy.stats import chi2

from experiments.report import ESTIMATES
from experiments.report import ESTIMATORS as LABELS
from vlae_jax.analysis.estimation import anneal_log_prob, effort_for
from vlae_jax.analysis.evaluation import describe, measure, metrics_of
from vlae_jax.commands.uses import images_of_run
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.saved import load
from vlae_jax.models.trained import Keys, Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, as_gaussian
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.methods import find_method
from vlae_jax.runs.metrics import mean_metric
from vlae_jax.runs.storage import write_atomically

RECORD = ESTIMATES


class Estimator(NamedTuple):
    """One way to estimate log p(x) of a trained decoder."""

    evaluation: Mapping[str, Any]
    """Choices of the evaluation."""
    inference: Mapping[str, Any] = {}
    """Choices of the inference, where it is not the system's own."""


LAPLACE = {"method": "vlae", "steps": 20, "refine": "none"}
REFINED = {**LAPLACE, "refine": "variational", "refine_steps": 8, "refine_samples": 16}
ESTIMATORS = {
    "own": Estimator({"proposal": "posterior"}),
    "laplace": Estimator({"proposal": "posterior"}, LAPLACE),
    "refined": Estimator({"proposal": "posterior"}, REFINED),
    "auto": Estimator({"proposal": "auto", "evaluation_budget": 1.0}),
}
REFERENCE = "auto"
SIMULATED = 400
"""Images drawn by the model, for the coverage of posteriors."""


_COMPILATIONS: list[tuple[float, float]] = []
"""Beginning and end of everything that JAX has traced or compiled; traces are nested."""


def _note_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile"):
        now = time.monotonic()
        _COMPILATIONS.append((now - duration_secs, now))


def timed(function: Callable[[], Any], images: int) -> tuple[Any, float]:
    """The result of a function, and its milliseconds an image without tracing and compilation."""
    _COMPILATIONS.clear()
    began = time.monotonic()
    result = function()
    spent, reached = time.monotonic() - began, began
    for start, end in sorted(_COMPILATIONS):
        spent -= max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return result, 1e3 * spent / images


def examine(run: Path, *, images: int, annealed: int, samples: int, data_dir: str | None) -> dict:
    """Measure one run by every estimator."""
    trained = load(run).with_config("evaluation", importance_samples=samples)
    test = images_of_run(trained, data_dir, "name the folder of its images").test[:images]
    found: dict[str, dict[str, np.ndarray]] = {}
    covered: dict[str, float | None] = {}
    shares: dict[str, dict[str, float]] = {}
    spent: dict[str, float] = {}
    inferred_in: dict[str, float] = {}
    for name, estimator in ESTIMATORS.items():
        chosen = trained.with_config("evaluation", **estimator.evaluation)
        if estimator.inference:
            chosen = chosen.with_inference(**estimator.inference)
        found[name], spent[name] = timed(
            functools.partial(measure, chosen, test, what=f"{run.name}, {LABELS[name]}"),
            len(test),
        )
        metrics = metrics_of(chosen.config.evaluation, found[name])
        shares[name] = {metric.name: metric.value for metric in metrics}
        if name != REFERENCE:
            covered[name], inferred_in[name] = timed(functools.partial(coverage, chosen), SIMULATED)
        else:
            # As `vlae_jax evaluate` would.
            seconds = {"evaluation": 1e-3 * spent[name] * len(test)}
            RunFolder(run).write_results(describe(chosen, metrics, seconds=seconds))
            RunFolder(run).write_per_image(found[name])
    chains, spent["ais"] = timed(lambda: anneal(trained, test[:annealed]), annealed)
    reference = found[REFERENCE]["log_prob"]
    return {
        "dataset": trained.provenance.dataset,
        "run": run.name,
        "training_seconds": trained.provenance.seconds,
        "images": len(test),
        "samples": samples,
        "reference": average(reference),
        "estimators": {
            name: {
                "log_prob_less_reference": average(values["log_prob"] - reference),
                "elbo": average(values["elbo"]),
                "elbo_less_reference": average(values["elbo"] - reference),
                "unreliable": shares[name]["unreliable"],
                "annealed": shares[name].get("annealed", 0.0),
                "milliseconds": spent[name],
            }
            for name, values in found.items()
        },
        "coverage": covered,
        "inference_milliseconds": inferred_in,
        "ais": {
            "images": annealed,
            "less_reference": average(chains["log_prob"] - reference[:annealed]),
            "standard_error": float(np.sqrt(np.mean(chains["error"] ** 2))),
            "milliseconds": spent["ais"],
        },
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "jax": jax.__version__,
    }


def anneal(trained: Trained, images: np.ndarray) -> dict[str, np.ndarray]:
    """Estimate log p(x) of every image by annealing alone, with its standard error."""
    effort = effort_for(trained.config.evaluation.importance_samples)

    def one(trained: Trained, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        inferred = trained.infer(key, pixels)
        # Independent of the annealing that "auto" may have done for the same image.
        use = jax.random.fold_in(inferred.keys.use, 2)
        inferred = inferred._replace(keys=inferred.keys._replace(use=use))
        log_prob, error = anneal_log_prob(inferred, effort)
        return {"log_prob": log_prob, "error": error}

    run = map_images(one, images, fixed_keys(len(images)), batch_size=16)
    return run(trained.factored())


def coverage(trained: Trained) -> float | None:
    """How often the region of 90 % of a posterior holds the z that an image was drawn with.

    Over images that the model draws, of z from the prior, it is 0.9 if posteriors are exact. None
    for flows, which have no such region.
    """

    def one(trained: Trained, _: Array, key: PRNGKeyArray) -> Array:
        z_key, x_key, key = jax.random.split(key, 3)
        z = jax.random.normal(z_key, (trained.config.model.latent,))
        at = trained.model.at(trained.model.draw(x_key, z), head=trained.head)
        posterior = trained.infer_at(at, Keys.split(key)).posterior
        assert isinstance(posterior, GaussianPosterior | DiagonalPosterior)
        mean, chol = as_gaussian(posterior)
        return jnp.sum((chol.T @ (z - mean)) ** 2)

    if find_method(trained.config.inference.method).is_flow:
        return None
    blank = np.zeros((SIMULATED, 1, 1, 1), np.uint8)
    run = map_images(one, blank, fixed_keys(SIMULATED), batch_size=20)
    inside = chi2.ppf(0.9, trained.config.model.latent)
    return float(np.mean(run(trained.factored()) <= inside))


def average(values: np.ndarray) -> list[float | None]:
    """Mean over the images with a finite value, and its standard error."""
    metric = mean_metric("log_prob", values)
    return [metric.value, metric.standard_error]


def runs_in(folders: Iterable[Path]) -> list[Path]:
    """The run folders named, and those inside of the folders named."""
    found = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        found += [folder] if (folder / "config.json").exists() else inside
    return found


def _record() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def _write(record: list[dict[str, Any]]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(RECORD, lambda file: file.write(text.encode()))


def main() -> None:
    """Parse the command line, measure what is not on record, and keep it."""
    jax.monitoring.register_event_duration_secs_listener(_note_compilation)
    parser = argparse.ArgumentParser(prog="python -m experiments.estimators", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--images", type=int, default=100, help="the first test images")
    parser.add_argument("--annealed", type=int, default=50, help="those annealed as well")
    parser.add_argument("--samples", type=int, default=5000, help="K")
    parser.add_argument("--data-dir", help="folder of the runs' images, if they have moved")
    given = parser.parse_args()
    runs = runs_in(given.runs)
    if not runs:
        parser.error(f"no run folder in {', '.join(map(str, given.runs))}")
    for run in runs:
        dataset = load(run).provenance.dataset
        if any((row["dataset"], row["run"]) == (dataset, run.name) for row in _record()):
            continue
        row = examine(
            run,
            images=given.images,
            annealed=min(given.annealed, given.images),
            samples=given.samples,
            data_dir=given.data_dir,
        )
        _write([*_record(), row])
        auto, own = row["estimators"]["auto"], row["estimators"]["own"]
        print(
            f"{dataset} {run.name}: log p(x) {row['reference'][0]:.2f}, own posterior "
            f"{own['log_prob_less_reference'][0]:+.2f}; unreliable {100 * own['unreliable']:.0f} "
            f"% -> {100 * auto['unreliable']:.0f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
