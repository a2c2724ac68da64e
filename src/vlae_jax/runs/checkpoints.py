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

from vlae_jax.errors import Unreadable, UserError, one_line
from vlae_jax.parallel.processes import is_first, on_first
from vlae_jax.runs.storage import absolute, in_bucket

_KEPT = 2
"""How many of the last checkpoints stay, besides the best one."""
_ROOM = 1.5
"""Free space to ask for, in sizes of the state, and beside them in bytes: files have headers and
metadata too, and each takes whole blocks."""
_ROOM_BESIDE = 2**20
_DIGESTS = "sha256.json"
_COMMITTED, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
_ASIDE = "damaged-"
_INFO = "info"
_OLD_INFO = "notes"
"""Name of that item in checkpoints from before version 0.1.0."""
_NO_TREE = ""
"""Stands for files that belong to no tree."""
_PAUSES = (1.0, 4.0)
"""Seconds before another try to read what is undamaged."""


_TRIES = 5
"""How often a checkpoint that could not be written whole is removed."""


class CheckpointInfo(NamedTuple):
    """The part of a checkpoint that is stored as JSON, beside its arrays."""

    seconds: float
    """Time spent training so far."""
    epoch: float
    """Passes over the training images so far."""
    best_step: int | None
    """The step of the best validation ELBO so far; None before the first."""
    best_bound: float
    """The best validation ELBO, nats."""
    model: dict[str, Any]
    """Images and structure of the model, as `models.trained.describe` gives them."""
    changed_at: int | None = None
    """The step at which the run went on from a plain VAE to its own system, once that is known."""


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
        # Orbax logs tracebacks of its threads, and raises the same errors, reported in one line.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.folder = absolute(folder)
        self.best_step: int | None = None
        self._saving_step = -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepBestAndLast(self),
            read_only=read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        with _one_line_error(f"{folder} cannot be opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, trees: Mapping[str, Any], info: CheckpointInfo) -> None:
        """Save in the background; a step saved already is left as it is.

        The training step donates its state's memory, so what is saved is a copy.

        Args:
            step: Steps done.
            trees: Trees of arrays by name: each is stored, and can be restored, by itself.
            info: What is stored as JSON beside them.

        Raises:
            UserError: If it cannot be written, or an earlier one could not be.
        """
        on_first(lambda: self._require_space(trees))
        self.best_step = info.best_step
        with self._saving(f"checkpoint {step} cannot be written to {self.folder}"):
            # An earlier save still needs `_saving_step`, when it writes its digests.
            self._manager.wait_until_finished()
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
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Return once everything saved is on disk.

        Raises:
            UserError: If it could not be written.
        """
        with self._saving(f"a checkpoint could not be written to {self.folder}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is saved, and close the folder.

        Raises:
            UserError: If something could not be saved.
        """
        try:
            self.wait()
        except UserError:
            with contextlib.suppress(Exception):  # the same once more
                self._manager.close()
            self._remove_partial()  # again: its threads had not ended
            raise
        self._manager.close()

    def restore_last(self, like: Like) -> Restored | None:
        """Restore the newest undamaged checkpoint; newer, damaged ones are moved aside.

        Args:
            like: What to restore: trees of the same structure, shapes and types by name, as a
                function of the checkpoint's info. Other trees are not looked at.

        Returns:
            The checkpoint, with a line for each damaged one; None if none was ever completed.

        Raises:
            UserError: If every checkpoint is damaged, or fits another kind of model.
            Unreadable: If an undamaged one cannot be read for now.
        """
        if not self.steps():
            return None
        restored = self._restore(self.steps()[::-1], like)
        # Training is about to reach these steps again, and to save them.
        newer = [step for step in self.steps() if step > restored.step]
        on_first(lambda: self._move_aside(newer))
        self._manager.reload()
        return restored

    def restore_best(self, like: Like) -> Restored:
        """Restore the checkpoint with the best validation bound, or else the newest readable one.

        Args:
            like: As for `restore_last`.

        Raises:
            UserError: If there is no readable one.
            Unreadable: If an undamaged one cannot be read for now.
        """
        best = self._best()
        others = [step for step in self.steps()[::-1] if step not in best]
        return self._restore([*best, *others], like)

    def _write_digests(self) -> None:
        """Write the digest of each file of a checkpoint, just before orbax declares it complete."""
        if is_first():
            # In a bucket, where nothing can be renamed, the folder has its final name already.
            unfinished = [*self.folder.glob(f"{self._saving_step}.orbax-checkpoint-tmp*")]
            folder = unfinished[0] if unfinished else self.folder / str(self._saving_step)
            (folder / _DIGESTS).write_text(json.dumps(_digests(folder)))

    def _require_undamaged(self, step: int, names: Collection[str]) -> None:
        """Check the files of the named items against their digests."""
        folder = self.folder / str(step)
        if not (folder / _DIGESTS).exists():
            raise UserError(f"{_DIGESTS}, a part of every complete one, is missing")
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
        # Checked first, since the storage layer reports a full disk in many tracebacks.
        needed = _ROOM_BESIDE + _ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with _one_line_error(f"{self.folder} cannot be written"):
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"no space left for a checkpoint in {self.folder}: {free / 1e6:.1f} MB free, "
                f"{needed / 1e6:.1f} MB needed; make room, then --resume"
            )

    @contextlib.contextmanager
    def _saving(self, failure: str) -> Iterator[None]:
        """Leave no half checkpoint behind a save that fails."""
        try:
            with _one_line_error(failure):
                yield
        except UserError:
            self._remove_partial()
            raise

    def _remove_partial(self) -> None:
        # In a bucket a checkpoint without commit_success.txt does not count, and is replaced.
        if is_first() and not in_bucket(self.folder):
            for _ in range(_TRIES):  # threads of the storage layer may still write there
                for partial in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(partial, ignore_errors=True)
                time.sleep(0.1)

    def _best(self) -> list[int]:
        """The best step according to the newest readable checkpoint, as a list of at most one."""
        for step in self.steps()[::-1]:
            with contextlib.suppress(Exception):  # a damaged one, which `_restore` will report
                best = self._read_info(step).best_step
                return [best] if best in self.steps() else []
        return []

    def _restore(self, steps: Iterable[int], like: Like) -> Restored:
        damaged: list[str] = []
        for step in steps:
            if damage := self._damage(step, (_INFO, _NO_TREE)):
                damaged.append(damage)
                continue
            info = self._read_info(step)
            wanted = like(info)
            if damage := self._damage(step, [*wanted]):
                damaged.append(damage)
                continue
            trees = self._read(step, wanted)
            if damaged:
                damaged[-1] += f"; using checkpoint {step} instead"
            return Restored(trees, info, step, damaged)
        reason = f": {'; '.join(damaged)}" if damaged else ""
        raise UserError(f"{self.folder} holds no readable checkpoint{reason}")

    def _damage(self, step: int, names: Collection[str]) -> str | None:
        """A line on what is damaged of the named items; None for nothing.

        The first process decides for all, since all must read one checkpoint together.
        """
        try:
            on_first(functools.partial(self._require_undamaged, step, names))
        except UserError as error:
            return f"checkpoint {step} is damaged ({one_line(error)})"
        return None

    def _read_info(self, step: int) -> CheckpointInfo:
        if (self.folder / str(step) / _OLD_INFO).exists():
            raise UserError(
                f"checkpoint {step} in {self.folder} was written by vlae_jax before 0.1.0, whose "
                "runs cannot be read by this version: train again, or use the old version"
            )
        found = self._composite(step, {_INFO: ocp.args.JsonRestore()})[_INFO]
        try:
            return CheckpointInfo(**found)
        except TypeError as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} was written by another version of vlae_jax "
                f"({one_line(error)}): use that one, or train again"
            ) from None

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
                raise UserError(f"{failure}: {one_line(error)}") from None
            except Exception as error:  # of orbax's storage layer, which may be of any kind
                if pause is None:
                    raise Unreadable(f"{failure}: {one_line(error)}; try again") from None
                time.sleep(pause)
        raise AssertionError


def _tree_of(name: str) -> str:
    """The tree whose file this is, by its name in the checkpoint's folder."""
    first, _, rest = name.partition("/")
    return first if rest else _NO_TREE


def _digests(folder: Path, trees: Collection[str] | None = None) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint by its name there; only of some trees, if given."""
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
    """All files below a folder; by hand, since recursive patterns do not work in buckets."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _without_time(metadata: Path) -> bytes:
    """Orbax's metadata of a checkpoint, without the time that it adds on completion."""
    try:
        noted = json.loads(metadata.read_text())
        return json.dumps({**noted, "commit_timestamp_nsecs": None}, sort_keys=True).encode()
    except (TypeError, ValueError):
        return b""


class _KeepBestAndLast(policies.PreservationPolicy):
    """Orbax's rule for deleting checkpoints: keep the best one and the last ones."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        last = {info.step for info in checkpoints[-_KEPT:]}
        return [info.step in last | {self._checkpoints.best_step} for info in checkpoints]


@contextlib.contextmanager
def _one_line_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of orbax or its storage layer, which may be of any kind
        raise UserError(f"{what}: {one_line(error)}") from None
