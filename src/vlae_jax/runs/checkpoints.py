"""Checkpoints of a run: the best by validation ELBO and the last ones, kept by orbax."""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vlae_jax.errors import Unreadable, UserError
from vlae_jax.parallel.processes import is_first, on_first
from vlae_jax.runs.storage import absolute, in_bucket

_KEPT = 2
_ROOM = 1.5  # times the size of the state, for what is stored around it
_DIGESTS = "sha256.json"
_COMMITTED, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
_ASIDE = "damaged-"
_INFO, _OLD_INFO = "info", "notes"
_NO_TREE = ""
"""Stands for files that belong to no tree."""
_PAUSES = (1.0, 4.0)
"""Seconds before another try to read what is undamaged."""


class CheckpointInfo(NamedTuple):
    """What a checkpoint says in words, besides its arrays."""

    seconds: float
    """Time spent training so far."""
    epoch: float
    """Passes over the training images so far."""
    best_step: int | None
    """The step of the best validation ELBO so far, if there was one."""
    best_bound: float
    """That ELBO, nats."""
    model: dict[str, Any]
    """What the model is made for, as `models.trained.describe` has it."""


class Restored(NamedTuple):
    """A checkpoint read back."""

    trees: dict[str, Any]
    """The trees of arrays that were asked for, by name."""
    info: CheckpointInfo
    step: int
    damaged: list[str]
    """A line for each newer or better checkpoint that could not be read."""


Like = Callable[[CheckpointInfo], Mapping[str, Any]]
"""A checkpoint's info → the trees to restore, by name: their structure, shapes and types."""


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

    def save(self, step: int, trees: Mapping[str, Any], info: CheckpointInfo) -> None:
        """Save in the background; a step saved already is left as it is.

        The training step donates its state's memory, so what is saved is a copy.

        Args:
            step: Steps done.
            trees: Trees of arrays by name: each is stored, and can be restored, by itself.
            info: What is said besides.

        Raises:
            UserError: If it cannot be written, or an earlier one could not be.
        """
        on_first(lambda: self._require_space(trees))
        self.best_step = info.best_step
        with self._saving(f"checkpoint {step} cannot be written to {self.folder}"):
            self._manager.wait_until_finished()  # for whose digests the other step is kept
            self._saving_step = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    info=ocp.args.JsonSave(info._asdict()),
                    **{
                        name: ocp.args.StandardSave(jax.tree.map(jnp.copy, tree))
                        for name, tree in trees.items()
                    },
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

    def restore_last(self, like: Like) -> Restored | None:
        """The newest undamaged checkpoint; newer ones are moved aside, and named.

        Args:
            like: What to restore: trees of the same structure, shapes and types by name, as a
                function of the checkpoint's info. Other trees are not looked at.

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
        on_first(lambda: self._move_aside(newer))
        self._manager.reload()
        return restored

    def restore_best(self, like: Like) -> Restored:
        """The checkpoint with the highest validation ELBO, else the newest readable one.

        Args:
            like: As for `restore_last`.

        Raises:
            UserError: If there is none, or one that is undamaged cannot be read.
        """
        best = self._noted_best()
        others = [step for step in self.steps()[::-1] if step not in best]
        return self._restore([*best, *others], like)

    def _write_digests(self) -> None:
        """Keep a digest of each file of the checkpoint that is about to be declared complete."""
        if is_first():
            # In a bucket, where nothing can be renamed, it has its name from the beginning.
            unfinished = [*self.folder.glob(f"{self._saving_step}.orbax-checkpoint-tmp*")]
            folder = unfinished[0] if unfinished else self.folder / str(self._saving_step)
            (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))

    def _require_undamaged(self, step: int, names: Collection[str]) -> None:
        """Check the files of these trees, and those of no tree."""
        folder = self.folder / str(step)
        if not (folder / _DIGESTS).exists():
            raise _Damaged(f"{_DIGESTS}, without which none is complete, is missing")
        try:
            expected = {
                name: digest
                for name, digest in json.loads((folder / _DIGESTS).read_text()).items()
                if _tree_of(name) in names
            }
            found = _digests(folder, names)
            changed = sorted(name for name in expected if found.get(name) != expected[name])
        except (AttributeError, TypeError, ValueError):
            changed = [_DIGESTS]
        if changed:
            raise _Damaged(f"{changed[0]} is not what was written")

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
            if is_first() and not in_bucket(self.folder):
                for partial in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(partial, ignore_errors=True)
            raise

    def _noted_best(self) -> list[int]:
        """The best step there is, as the newest checkpoint whose info can be read has it."""
        for step in self.steps()[::-1]:
            with contextlib.suppress(Exception):  # a damaged one, which _restore will name
                best = self._read_info(step).best_step
                return [best] if best in self.steps() else []
        return []

    def _restore(self, steps: Iterable[int], like: Like) -> Restored:
        damaged: list[str] = []
        for step in steps:
            try:
                # One process looks and all believe it: reading is done by all together.
                on_first(functools.partial(self._require_undamaged, step, (_INFO, _NO_TREE)))
                info = self._read_info(step)
                wanted = like(info)
                on_first(functools.partial(self._require_undamaged, step, [*wanted]))
            except _Damaged as error:
                damaged.append(f"checkpoint {step} is damaged ({_first_line(error)})")
                continue
            trees = self._read(step, wanted)
            if damaged:
                damaged[-1] += f"; using checkpoint {step} instead"
            return Restored(trees, info, step, damaged)
        reason = f": {'; '.join(damaged)}" if damaged else ""
        raise UserError(f"{self.folder} holds no readable checkpoint{reason}")

    def _read_info(self, step: int) -> CheckpointInfo:
        if (self.folder / str(step) / _OLD_INFO).exists():
            raise UserError(
                f"checkpoint {step} in {self.folder} was written by vlae_jax before 0.1.0, whose "
                "runs cannot be read by this version: train again, or use the old version"
            )
        found = self._composite(step, {_INFO: ocp.args.JsonRestore()})[_INFO]
        return CheckpointInfo(**found)

    def _read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        targets = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
            for name, tree in wanted.items()
        }
        found = self._composite(step, targets)
        return {name: found[name] for name in wanted}

    def _composite(self, step: int, what: Mapping[str, Any]) -> Any:
        """Restore these items, trying again where the storage does not answer."""
        failure = f"checkpoint {step} in {self.folder} is undamaged but cannot be read"
        for pause in (*_PAUSES, None):
            try:
                return self._manager.restore(step, args=ocp.args.Composite(**what))
            except ValueError as error:
                raise UserError(f"{failure}: {_first_line(error)}") from None
            except Exception as error:  # orbax raises what its storage layer does
                if pause is None:
                    raise Unreadable(f"{failure}: {_first_line(error)}; try again") from None
                time.sleep(pause)
        raise AssertionError


class _Damaged(UserError):
    """What a checkpoint holds is not what was written."""


def _tree_of(name: str) -> str:
    """The tree whose file this is, by its name in the checkpoint's folder."""
    first, _, rest = name.partition("/")
    return first if rest else _NO_TREE


def _digests(folder: Path, trees: Collection[str] | None = None) -> dict[str, str]:
    """The SHA-256 of the files of a checkpoint, by name in its folder; of these trees, or all."""
    found = {}
    for file in _files(folder):
        name = str(file)[len(str(folder)) + 1 :]
        if trees is not None and _tree_of(name) not in trees:
            continue
        if file.name not in (_DIGESTS, _COMMITTED):
            if file.name == _METADATA and file.parent == folder:
                digest = hashlib.sha256(_without_time(file))
            else:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
            found[name] = digest.hexdigest()
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
