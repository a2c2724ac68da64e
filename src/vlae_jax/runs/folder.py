"""The folder of one run: the file for each of its contents, and their reading and writing."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from vlae_jax.errors import UserError
from vlae_jax.files import is_partial, undone
from vlae_jax.runs.config import Config
from vlae_jax.runs.seals import is_whole, sealed, without_seal
from vlae_jax.runs.storage import (
    as_folder,
    in_bucket,
    is_bucket,
    read_bytes,
    read_json,
    write_atomically,
    writing,
)

_LOCK = ".lock"
_UNKNOWN_OPTION = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names for a field that a dataclass does not have."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the reading and writing of all but checkpoints and pictures."""

    path: Path

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> "RunFolder":
        """The run folder of that name, local or gs://BUCKET/FOLDER.

        Raises:
            UserError: If it is a URL of another kind, or its bucket cannot be used.
        """
        return cls(as_folder(folder))

    @property
    def checkpoints(self) -> Path:
        """Orbax's folder: the best checkpoint by validation ELBO and the last ones."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: training means and validation results."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """The metrics measured on the test set."""
        return self.path / "results.json"

    @property
    def snapshots(self) -> Path:
        """Arrays from which the pictures are drawn."""
        return self.path / "snapshots.npz"

    @property
    def per_image(self) -> Path:
        """The metrics of each test image."""
        return self.path / "per_image.npz"

    @property
    def gaps(self) -> Path:
        """The gaps between bound and log-likelihood that `vlae_jax gap` measured."""
        return self.path / "gaps.json"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self._config.is_file()

    def require_there(self) -> None:
        """Check that nobody has taken the run away that is going on here.

        Raises:
            UserError: If it is gone.
        """
        if not self.exists():
            raise UserError(
                f"{self.path} was removed or emptied while the run was going on, which cannot be "
                "saved there; start it again"
            )

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other processes out of a local run folder, as long as this one lives.

        The folder is made if need be, and taken away again if nothing came of it. A process that
        has died holds nothing. Buckets have no locks.

        Raises:
            UserError: If another process works there, or the folder cannot be written.
        """
        if in_bucket(self.path) or (self.path.exists() and not self.path.is_dir()):
            yield
            return
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, blocking=False, is_singleton=True)
            try:
                lock.acquire()
            except Timeout:
                raise UserError(
                    f"another process works in {self.path}; wait until it has ended, or choose "
                    "another run folder"
                ) from None

        def leave() -> None:
            lock.release()
            with contextlib.suppress(OSError):  # others may have removed them, or begun to use them
                if made and {entry.name for entry in self.path.iterdir()} <= {_LOCK}:
                    shutil.rmtree(self.path, ignore_errors=True)
                    for path in made[1:]:
                        path.rmdir()

        with undone(leave):
            yield

    def create(self, config: Config, *, overwrite: bool) -> None:
        """Make the folder and write its config.json.

        Args:
            config: The configuration of the run.
            overwrite: Delete a run that is there.

        Raises:
            UserError: If something is there already, or nothing can be written there.
        """
        if is_bucket(self.path):
            raise UserError(f"{self.path} is a whole bucket; name a folder in it")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a folder; choose another --run-dir")
        if self.path.exists() and any(
            entry.name != _LOCK and not is_partial(entry, of=self._config)
            for entry in self.path.iterdir()
        ):
            if not self._config.exists():
                raise UserError(
                    f"{self.path} holds files that are no run; choose another --run-dir"
                )
            if not overwrite:
                raise UserError(
                    f"{self.path} already holds a run: --resume continues it, --overwrite deletes "
                    "it, --run-dir PATH puts the new one elsewhere"
                )
        with writing(self.path):
            if in_bucket(self.path):
                if self.path.exists():
                    self.path.rmtree()  # type: ignore[attr-defined]
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                for entry in self.path.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name != _LOCK:
                        entry.unlink()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write config.json."""
        self._write_json(self._config, dataclasses.asdict(config))

    def read_config(self) -> Config:
        """The configuration the run was started with.

        Raises:
            UserError: If there is no run here, or its config.json cannot be read.
        """
        if not self._config.is_file():
            raise UserError(f"{self.path} is no run folder: it has no config.json")
        content = read_json(self._config)
        try:
            return TypeAdapter(Config).validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            if first["type"] in _UNKNOWN_OPTION:
                raise UserError(
                    f"{self._config}: this version has no option {where}: the run was made by "
                    "another version of vlae_jax; use that one, or train again"
                ) from None
            raise UserError(f"{self._config}: {where}: {first['msg']}") from None

    def require_continuable(self, config: Config) -> None:
        """Check that a configuration can continue the run that is here.

        Raises:
            UserError: If there is none, it was trained with another configuration, or its
                metrics.jsonl is damaged.
        """
        self.read_metrics()
        if differences := config.differences(self.read_config()):
            raise UserError(
                f"{self.path} was trained with another configuration: {'; '.join(differences)}"
            )

    def metrics_log(self) -> "MetricsLog":
        """metrics.jsonl, to be continued where it ends now."""
        return MetricsLog(self.metrics)

    def drop_metrics_after(self, step: int) -> None:
        """Remove the records of steps after `step`, which is about to be repeated.

        Raises:
            UserError: If metrics.jsonl is damaged or cannot be written.
        """
        if not self.metrics.exists():
            return
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        text = "".join(map(_line, kept))
        write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order; none where there is no such file.

        A last line that a crash has cut short is left out.

        Raises:
            UserError: If the file is damaged in another way, or cannot be read.
        """
        if not self.metrics.exists():
            return []
        *lines, last = read_bytes(self.metrics).split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is None:
                raise UserError(
                    f"{self.metrics} is damaged: line {number} is no whole record of a step; "
                    "take the line out, or the whole file away"
                )
            records.append(record)
        cut_short = _record(last)
        return records if cut_short is None else [*records, cut_short]

    def best_step(self) -> int | None:
        """The step with the best logged validation bound; None if there is none.

        Raises:
            UserError: If metrics.jsonl is damaged.
        """
        return max((r["step"] for r in self.read_metrics() if r.get("best")), default=None)

    def write_results(self, results: Mapping[str, Any], choice: str = "") -> None:
        """Write results.json, or results-CHOICE.json for another way to infer than the run's."""
        self._write_json(_named(self.results, choice), results)

    def write_snapshots(self, arrays: Mapping[str, Any]) -> None:
        """Write snapshots.npz."""
        write_atomically(self.snapshots, lambda file: np.savez_compressed(file, **arrays))

    def write_gaps(self, gaps: Mapping[str, Any]) -> None:
        """Write gaps.json."""
        self._write_json(self.gaps, gaps)

    def write_per_image(self, arrays: Mapping[str, Any], choice: str = "") -> None:
        """Write per_image.npz, or per_image-CHOICE.npz for another way to infer than the run's."""
        path = _named(self.per_image, choice)
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        text = sealed(json.dumps(_plain(content), indent=2)) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def _named(path: Path, choice: str) -> Path:
    return path.with_name(f"{path.stem}-{choice}{path.suffix}") if choice else path


class MetricsLog:
    """metrics.jsonl while a run adds to it.

    On a disk each line is written at once. An object in a bucket cannot be added to: there the
    lines wait for `save`, which writes the whole file again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = read_bytes(path).decode() if in_bucket(path) and path.exists() else ""
        self._waiting: list[str] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        line = _line(record)
        if in_bucket(self._path):
            self._waiting.append(line)
            return
        with writing(self._path), self._path.open("a") as file:
            file.write(line)

    def save(self) -> None:
        """Write the waiting lines; called before a checkpoint, whose steps must be logged."""
        if self._waiting:
            text = self._saved + "".join(self._waiting)
            write_atomically(self._path, lambda file: file.write(text.encode()))
            self._saved, self._waiting = text, []


def _line(record: Mapping[str, Any]) -> str:
    return sealed(json.dumps(_plain(record))) + "\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """The record that a line of metrics.jsonl holds, or None if it holds none, or a damaged one."""
    try:
        record = json.loads(line) if is_whole(line) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool)
    return without_seal(record) if is_step else None


def _plain(value: Any) -> Any:
    """The value in standard JSON's types: numpy scalars unwrapped, numbers not finite as null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, PurePath) else value
