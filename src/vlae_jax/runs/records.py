"""Finished runs as records: what a run folder holds, read whole and checked."""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlae_jax.errors import UserError
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.methods import METHODS
from vlae_jax.runs.storage import as_folder, read_bytes, read_json, resolved

Curve = tuple[np.ndarray, np.ndarray]
_IMAGE = "height, width, 1 or 3"
_SNAPSHOTS = {
    "data": f"(n, {_IMAGE})",
    "reconstructions": f"(n, steps + 1, {_IMAGE})",
    "step_log_joint": "(n, steps + 1)",
    "step_error": "(n, steps + 1)",
    "prior_samples": f"(m, {_IMAGE})",
    "interpolations": f"(pairs, points, {_IMAGE})",
    "covariances": "(k, latent, latent)",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The content of a run folder; a file that is not there is None or empty."""

    path: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    """The records of metrics.jsonl."""
    results: dict[str, Any] | None
    snapshots: dict[str, np.ndarray]
    per_image: dict[str, np.ndarray]
    """One value for each test image, (n,) each."""
    gaps: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The name in the results, otherwise that of the folder."""
        return str(self._described("name") or resolved(self.path).name)

    @property
    def method(self) -> str:
        """The inference system as the configuration names it."""
        return str(self.setting("inference", "method") or "?")

    @property
    def label(self) -> str:
        """The inference system as tables and pictures name it, with an objective beside the ELBO.

        A run may come from a newer version whose systems are not known here, so the label in the
        results comes first.
        """
        known = METHODS.get(self.method)
        label = str(self._described("label") or (known.label if known else self.method))
        objective = str(self.setting("training", "objective") or "elbo")
        if objective == "elbo":
            return label
        name = {"iwae": "IWAE", "dreg": "DReG"}.get(objective, objective)
        samples = self.setting("training", "train_samples")
        return f"{label} ({name})" if objective == "evidence" else f"{label} ({name}, {samples})"

    @property
    def steps(self) -> int | None:
        """T, or None where the system takes no steps."""
        steps = self._described("steps", self.setting("inference", "steps"))
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        known = METHODS.get(self.method)
        return steps if whole and (known is None or known.has_steps) else None

    @property
    def system(self) -> str:
        """The system with its T."""
        return self.label if self.steps is None else f"{self.label}, T = {self.steps}"

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return str(self.setting("data", "dataset") or "?")

    @property
    def subject(self) -> str:
        """Data set and system, for the titles of pictures."""
        return f"{self.dataset} · {self.system}"

    @property
    def seed(self) -> Any:
        """The seed of the training."""
        return self.setting("training", "seed")

    @property
    def fingerprint(self) -> Any:
        """The fingerprint of the images, None where it is not on record."""
        return self._described("fingerprint")

    @property
    def checkpoint(self) -> Mapping[str, Any] | None:
        """The chosen checkpoint, with its validation metrics where they are on record."""
        validation = [record for record in self.log if record.get("split") == "validation"]
        chosen = (self.results or {}).get("checkpoint")
        if isinstance(chosen, dict):
            step = chosen.get("step")
            validation = [record for record in validation if record.get("step") == step]
        else:
            validation = [record for record in validation if record.get("best")]
        return validation[-1] if validation else chosen if isinstance(chosen, dict) else None

    @property
    def gap(self) -> dict[str, Any] | None:
        """Log p(x) less ELBO; None where they come from different numbers of images."""
        given = self.metric("inference_gap")
        elbo, log_prob = self.metric("elbo"), self.metric("log_prob")
        if given is not None or elbo is None or log_prob is None:
            return given
        if elbo.get("images") != log_prob.get("images"):
            return None
        value = number(log_prob.get("value")) - number(elbo.get("value"))
        return {"value": value, "unit": "nats"}

    def setting(self, section: str, name: str) -> Any:
        """One value of the configuration, None if it is not there."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    def metric(self, name: str) -> dict[str, Any] | None:
        """The test metric of that name; of several, the one with the most samples."""
        metrics = [
            metric
            for metric in (self.results or {}).get("metrics", [])
            if metric["name"] == name and metric.get("split", "test") == "test"
        ]
        return max(metrics, key=lambda metric: number(metric.get("samples"), 0.0), default=None)

    def gap_metric(self, name: str) -> tuple[float, float]:
        """Value and standard error of one metric in gaps.json, NaN if it is not there."""
        for metric in (self.gaps or {}).get("metrics", []):
            if metric["name"] == name:
                return number(metric.get("value")), number(metric.get("standard_error"))
        return math.nan, math.nan

    def series(self, split: str, name: str, against: str = "epoch") -> Curve:
        """One logged metric against epochs or seconds, at the points where both are finite."""
        records = [record for record in self.log if record.get("split") == split]
        points = np.array([(number(r.get(against)), number(r.get(name))) for r in records])
        points = points.reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        points = points[np.argsort(points[:, 0], kind="stable")]
        return points[:, 0], points[:, 1]

    def _described(self, name: str, otherwise: Any = None) -> Any:
        described = (self.results or {}).get("run")
        return described.get(name, otherwise) if isinstance(described, dict) else otherwise


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run folder whole.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    folder = RunFolder.at(run_dir)
    if not folder.path.is_dir():
        raise UserError(f"no run folder at {folder.path}: give a folder that training wrote")
    if not folder.exists():
        raise UserError(
            f"{folder.path} is not a run folder, it has no config.json: give a folder that "
            "training wrote"
        )
    return Run(
        folder.path,
        read_json(folder.path / "config.json"),
        _read_log(folder),
        _read_metrics(folder.results, "evaluate the run again"),
        _read_arrays(folder.snapshots, _check_snapshots),
        _read_arrays(folder.per_image, _check_per_image),
        _read_metrics(folder.gaps, "measure the gaps again"),
    )


def read_runs(run_dirs: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read run folders, a folder given twice only once.

    Raises:
        UserError: If none is given, there is no such run, or one of the files is damaged.
    """
    folders: dict[Path, str | os.PathLike[str]] = {}
    for run_dir in run_dirs:
        folders.setdefault(resolved(as_folder(run_dir)), run_dir)
    if not folders:
        raise UserError("no run to report on: give one or more folders that training wrote")
    return [read_run(run_dir) for run_dir in folders.values()]


def _read_metrics(path: Path, remedy: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_json(path)
    metrics = content.get("metrics")
    if not isinstance(metrics, list) or not all(
        isinstance(metric, dict) and isinstance(metric.get("name"), str) for metric in metrics
    ):
        raise UserError(f"{path} must hold 'metrics', a list of objects with a name: {remedy}")
    return content


def _read_log(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the records; of a step written twice, as by a resumed run, the later one counts."""
    records = {(str(line.get("split")), line["step"]): line for line in folder.read_metrics()}
    return list(records.values())


def _read_arrays(
    path: Path, check: Callable[[Path, Mapping[str, np.ndarray]], None]
) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    content = io.BytesIO(read_bytes(path))
    try:
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # A damaged archive raises from zipfile, zlib or numpy, each with exceptions of its own.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a numpy archive: evaluate again") from error
    check(path, arrays)
    return {name: array for name, array in arrays.items() if array.size}


def _check_snapshots(path: Path, snapshots: Mapping[str, np.ndarray]) -> None:
    for name, shape in _SNAPSHOTS.items():
        array = snapshots.get(name)
        if array is None:
            continue
        ok = array.ndim == shape.count(",") + 1 and array.dtype.kind in "fiu"
        if "1 or 3" in shape:
            ok = ok and array.shape[-1] in (1, 3)
        if name == "covariances":
            ok = ok and array.shape[1] == array.shape[2]
        if not ok:
            raise UserError(f"{path}: {name} must have shape {shape}, got {array.shape}")


def _check_per_image(path: Path, values: Mapping[str, np.ndarray]) -> None:
    lengths = {len(array) if array.ndim == 1 else -1 for array in values.values()}
    numbers = all(array.dtype.kind in "fiub" for array in values.values())
    if len(lengths) > 1 or -1 in lengths or not numbers:
        raise UserError(
            f"{path} must hold one number a test image under each name: evaluate the run again"
        )


def number(value: Any, otherwise: float = math.nan) -> float:
    """Take a number from JSON; null and everything else that is no float becomes NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return otherwise
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return otherwise
