"""Checkpoints of a run: the best by validation ELBO and the last ones, kept by orbax."""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vlae_jax import distributed
from vlae_jax.errors import Unreadable, UserError
from vlae_jax.folders import absolute, in_bucket

State = TypeVar("State")

_KEPT = 2
_ROOM = 1.5  # times the size of the state, for what is stored around it
_DIGESTS = "sha256.json"
_COMMITTED, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
_ASIDE = "damaged-"
_PAUSES = (1.0, 4.0)
"""Seconds before another try to read what is undamaged."""


class Notes(NamedTuple):
    """What a checkpoint tells about its run, besides the state."""

    seconds: float
    """Time spent training so far."""
    fingerprint: str
    """Of the images trained on."""
    best_step: int | None
    """The step of the best validation ELBO so far, if there was one."""
    best_bound: float
    """That ELBO, nats."""


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: Any
    notes: Notes
    step: int
    damaged: list[str]
    """A line for each newer or better checkpoint that could not be read."""


class Checkpoints:
    """The checkpoints of one run folder, one per step."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        # Orbax logs tracebacks of its threads; what they mean is raised too, and told in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
        self.folder = absolute(folder)
        self.best_step: int | None = None
        self._saving_step = -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepBestAndLast(self),
            read_only=read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        with _one_line(f"{folder} cannot be opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, notes: Notes) -> None:
        """Save in the background; a step saved already is left as it is.

        The training step donates its state's memory, so what is saved is a copy.

        Raises:
            UserError: If it cannot be written, or an earlier one could not be.
        """
        distributed.on_first(lambda: self._require_space(state))
        self.best_step = notes.best_step
        with self._saving(f"checkpoint {step} cannot be written to {self.folder}"):
            self._manager.wait_until_finished()  # for whose digests the other step is kept
            self._saving_step = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)),
                    notes=ocp.args.JsonSave(notes._asdict()),
                ),
            )

    def steps(self) -> list[int]:
        """The steps there are checkpoints of."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Return once everything saved is on disk.

        Raises:
            UserError: If it could not be written.
        """
        with self._saving(f"a checkpoint could not be written to {self.folder}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the folder."""
        self.wait()
        self._manager.close()

    def restore_last(self, like: Any) -> Restored | None:
        """The newest undamaged checkpoint; newer ones are moved aside, and named.

        Args:
            like: A state of the same structure, shapes and types.

        Returns:
            None where no checkpoint was ever completed.

        Raises:
            UserError: If all there are are damaged, or one that is not cannot be read.
        """
        if not self.steps():
            return None
        restored = self._restore(self.steps()[::-1], like)
        # The run is about to come to these steps again.
        newer = [step for step in self.steps() if step > restored.step]
        distributed.on_first(lambda: self._move_aside(newer))
        self._manager.reload()
        return restored

    def restore_best(self, like: Any) -> Restored:
        """The checkpoint with the highest validation ELBO, else the newest readable one.

        Raises:
            UserError: If there is none, or one that is undamaged cannot be read.
        """
        best = self._noted_best()
        others = [step for step in self.steps()[::-1] if step not in best]
        return self._restore([*best, *others], like)

    def _write_digests(self) -> None:
        """Keep a digest of each file of the checkpoint that is about to be declared complete."""
        if distributed.is_first():
            # In a bucket, where nothing can be renamed, it has its name from the beginning.
            unfinished = [*self.folder.glob(f"{self._saving_step}.orbax-checkpoint-tmp*")]
            folder = unfinished[0] if unfinished else self.folder / str(self._saving_step)
            (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))

    def _require_undamaged(self, step: int) -> None:
        folder = self.folder / str(step)
        if not (folder / _DIGESTS).exists():
            raise UserError(f"{_DIGESTS}, without which none is complete, is missing")
        try:
            expected = json.loads((folder / _DIGESTS).read_text())
            found = _digests(folder)
            changed = sorted(name for name in expected if found.get(name) != expected[name])
        except (AttributeError, TypeError, ValueError):
            changed = [_DIGESTS]
        if changed:
            raise UserError(f"{changed[0]} is not what was written")

    def _move_aside(self, steps: Iterable[int]) -> None:
        for step in steps:
            if in_bucket(self.folder):
                self._manager.delete(step)
            else:
                shutil.rmtree(self.folder / f"{_ASIDE}{step}", ignore_errors=True)
                (self.folder / str(step)).rename(self.folder / f"{_ASIDE}{step}")

    def _require_space(self, state: Any) -> None:
        if in_bucket(self.folder):
            return
        # Asked first, since the storage layer reports a full disk in many tracebacks.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < _ROOM * needed:
            raise UserError(
                f"no space left for a checkpoint in {self.folder}: {free / 1e6:.1f} MB free, "
                f"{_ROOM * needed / 1e6:.1f} MB needed; make room, then --resume"
            )

    @contextlib.contextmanager
    def _saving(self, failure: str) -> Iterator[None]:
        """Leave no half checkpoint behind a save that fails."""
        try:
            with _one_line(failure):
                yield
        except UserError:
            # In a bucket one without its commit_success.txt is none, and is written over.
            if distributed.is_first() and not in_bucket(self.folder):
                for partial in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(partial, ignore_errors=True)
            raise

    def _noted_best(self) -> list[int]:
        """The best step, as the newest checkpoint that can tell it has noted."""
        for step in self.steps()[::-1]:
            with contextlib.suppress(Exception):  # a damaged one, which _restore will name
                notes = self._manager.restore(
                    step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())
                )["notes"]
                return [notes["best_step"]] if notes["best_step"] in self.steps() else []
        return []

    def _restore(self, steps: Iterable[int], like: Any) -> Restored:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged: list[str] = []
        for step in steps:
            try:
                # One process looks and all believe it: reading is done by all together.
                distributed.on_first(functools.partial(self._require_undamaged, step))
            except UserError as error:
                damaged.append(f"checkpoint {step} is damaged ({_first_line(error)})")
                continue
            found = self._read(step, target)
            if damaged:
                damaged[-1] += f"; using checkpoint {step} instead"
            return Restored(found["state"], Notes(**found["notes"]), step, damaged)
        reason = f": {'; '.join(damaged)}" if damaged else ""
        raise UserError(f"{self.folder} holds no readable checkpoint{reason}")

    def _read(self, step: int, target: Any) -> Any:
        what = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), notes=ocp.args.JsonRestore()
        )
        failure = f"checkpoint {step} in {self.folder} is undamaged but cannot be read"
        for pause in (*_PAUSES, None):
            try:
                return self._manager.restore(step, args=what)
            except ValueError as error:
                raise UserError(f"{failure}: {_first_line(error)}") from None
            except Exception as error:  # orbax raises what its storage layer does
                if pause is None:
                    raise Unreadable(f"{failure}: {_first_line(error)}; try again") from None
                time.sleep(pause)
        raise AssertionError


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by its name in the folder."""
    found = {}
    for file in _files(folder):
        if file.name not in (_DIGESTS, _COMMITTED):
            if file.name == _METADATA and file.parent == folder:
                digest = hashlib.sha256(_without_time(file))
            else:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
            found[str(file)[len(str(folder)) + 1 :]] = digest.hexdigest()
    return found


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder. Buckets know no pattern for that."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _without_time(metadata: Path) -> bytes:
    """What orbax notes of a checkpoint, but for the time that it adds when all is complete."""
    try:
        noted = json.loads(metadata.read_text())
        return json.dumps({**noted, "commit_timestamp_nsecs": None}, sort_keys=True).encode()
    except (TypeError, ValueError):
        return b""


class _KeepBestAndLast(policies.PreservationPolicy):
    """Which checkpoints orbax must not delete: the best one and the last ones."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        last = {info.step for info in checkpoints[-_KEPT:]}
        return [info.step in last | {self._checkpoints.best_step} for info in checkpoints]


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and its storage layer raise every kind
        raise UserError(f"{what}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # The cause stands at the end of what the storage layer says.
    return text if len(text) <= 160 else f"{text[:60]} ... {text[-95:]}"
