"""The folder of one run: which file holds what, and how each is written without halves."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from vlae_jax.errors import UserError
from vlae_jax.runs.config import Config
from vlae_jax.runs.storage import as_folder, in_bucket, is_bucket, writing


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the reading and writing of what is not a checkpoint or a picture."""

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
        """The figures measured on the test set."""
        return self.path / "results.json"

    @property
    def snapshots(self) -> Path:
        """Arrays that the pictures are drawn from."""
        return self.path / "snapshots.npz"

    @property
    def per_image(self) -> Path:
        """The same figures test image by test image."""
        return self.path / "per_image.npz"

    @property
    def gaps(self) -> Path:
        """Where the bound loses its nats, as `vlae_jax gap` measured it."""
        return self.path / "gaps.json"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self._config.is_file()

    def create(self, config: Config, *, overwrite: bool) -> None:
        """Make the folder and write its config.json; an older run goes only if `overwrite`.

        Raises:
            UserError: If something is there already, or nothing can be written there.
        """
        if is_bucket(self.path):
            raise UserError(f"{self.path} is a whole bucket; name a folder in it")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a folder; choose another --run-dir")
        if self.path.exists() and any(
            entry.name != _unfinished(self._config).name for entry in self.path.iterdir()
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
                if self.path.exists():
                    shutil.rmtree(self.path)
                self.path.mkdir(parents=True)
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
        try:
            return TypeAdapter(Config).validate_json(self._config.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise UserError(f"{self._config}: {where}: {first['msg']}") from None
        except OSError as error:
            raise UserError(f"{self._config} cannot be read: {error.strerror}") from None

    def require_continuable(self, config: Config) -> None:
        """Check that a configuration can continue the run that is here.

        Raises:
            UserError: If there is none, or it was trained with another configuration.
        """
        if differences := config.differences(self.read_config()):
            raise UserError(
                f"{self.path} was trained with another configuration: {'; '.join(differences)}"
            )

    def metrics_log(self) -> "MetricsLog":
        """metrics.jsonl, to be continued where it ends now."""
        return MetricsLog(self.metrics)

    def drop_metrics_after(self, step: int) -> None:
        """Forget what was logged after `step`, which is about to be repeated."""
        if not self.metrics.exists():
            return
        kept = [
            line for line in self.metrics.read_text().splitlines() if _record(line)["step"] <= step
        ]
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def best_step(self) -> int | None:
        """The step whose validation ELBO was the best, as logged; None if nothing was."""
        if not self.metrics.exists():
            return None
        records = [_record(line) for line in self.metrics.read_text().splitlines()]
        return max((r["step"] for r in records if r.get("best")), default=None)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json."""
        self._write_json(self.results, results)

    def write_snapshots(self, arrays: Mapping[str, Any]) -> None:
        """Write snapshots.npz."""
        write_atomically(self.snapshots, lambda file: np.savez_compressed(file, **arrays))

    def write_gaps(self, gaps: Mapping[str, Any]) -> None:
        """Write gaps.json."""
        self._write_json(self.gaps, gaps)

    def write_per_image(self, arrays: Mapping[str, Any]) -> None:
        """Write per_image.npz."""
        write_atomically(self.per_image, lambda file: np.savez_compressed(file, **arrays))

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        text = json.dumps(_plain(content), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


class MetricsLog:
    """metrics.jsonl while it grows.

    On a disk each line is written at once. An object in a bucket cannot be added to: there the
    lines wait for `save`, which writes all of them anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = path.read_text() if in_bucket(path) and path.exists() else ""
        self._waiting: list[str] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        line = json.dumps(_plain(record)) + "\n"
        if in_bucket(self._path):
            self._waiting.append(line)
            return
        with writing(self._path), self._path.open("a") as file:
            file.write(line)

    def save(self) -> None:
        """Write what waits. Before a checkpoint is: it must not know more than the file does."""
        if self._waiting:
            text = self._saved + "".join(self._waiting)
            write_atomically(self._path, lambda file: file.write(text.encode()))
            self._saved, self._waiting = text, []


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    if in_bucket(path):
        content = io.BytesIO()
        write(content)
        with writing(path):
            path.write_bytes(content.getvalue())
        return
    partial = _unfinished(path)
    try:
        with writing(path):
            with partial.open("wb") as file:
                write(file)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".partial")


def _record(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; one cut short by a crash counts as after every step."""
    try:
        return {"step": math.inf, **json.loads(line)}
    except (ValueError, TypeError):
        return {"step": math.inf}


def _plain(value: Any) -> Any:
    """JSON as everyone reads it: numpy scalars unwrapped, what is not finite as null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, PurePath) else value
