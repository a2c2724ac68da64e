"""The training loop of all systems: epochs, log, checkpoints, resumption."""

import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

from vlae_jax.data.dataset import Dataset
from vlae_jax.data.supplied import as_dataset
from vlae_jax.errors import RunFailure, Stopped, UserError
from vlae_jax.models.initial import begun_from, initialize
from vlae_jax.models.saved import facts_of, load
from vlae_jax.models.trained import Trained
from vlae_jax.parallel import processes
from vlae_jax.parallel.placement import Placement
from vlae_jax.progress import ProgressLine
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.phases import Phases, trees_of
from vlae_jax.training.step import Trainer, TrainState


class MetricWriter(Protocol):
    """Protocol of a writer that gets all scalars of metrics.jsonl too, as one for TensorBoard."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Log one value."""
        ...


class FitOptions(NamedTuple):
    """Options of logging and checkpoints; none of them changes the numbers of a run."""

    log_every: int = 20
    checkpoint_every: int = 500
    writer: MetricWriter | None = None


def fit(
    config: Config,
    data: Any = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    options: FitOptions | None = None,
    placement: Placement | None = None,
) -> Trained:
    """Train a model, with progress on stderr, and return the model of the best checkpoint.

    With a run folder everything is kept there, and an interrupted run can be resumed. Without one,
    checkpoints are kept in a temporary folder until training is over.

    Args:
        config: The experiment; `runs.presets.default_config` has defaults for each data set.
        data: The training data. A loaded data set; its name, or None for the one that the
            configuration names; training images of pixels, uint8 of shape (n, height, width) or
            (n, height, width, channel); a table of numbers, (n, dim), or a data frame of pandas or
            Polars; images of measurements, floats; or a mapping with one of these as "x_train" and
            test examples as "x_test". NaN marks a missing entry, or true in the masks
            "missing_train" and "missing_test" of a mapping. Part of the training examples is set
            aside for validation (`config.data.validation_fraction`).
        run_dir: Folder of the run, local or gs://BUCKET/FOLDER, for `load` and the commands.
        resume: Continue the run in `run_dir` from its last checkpoint.
        overwrite: Delete a run that is in `run_dir`.
        options: Options of logging and checkpoints.
        placement: The devices; by default all. With several processes every process must call
            `fit` with the same shared folder; only the first process writes.

    Raises:
        UserError: If configuration, data and folder do not fit each other, nothing can be written,
            or another process works in the folder.
        RunFailure: If the loss is not finite; the message names the step, and the checkpoints stay.
        Stopped: After SIGINT or SIGTERM, with everything saved.
        Unreadable: If the last checkpoint is undamaged but cannot be read.
    """
    if run_dir is None:
        if resume:
            raise UserError("to resume needs the run_dir of the run that is to go on")
        with tempfile.TemporaryDirectory(prefix="vlae_jax-") as folder:
            return fit(
                config, data, run_dir=Path(folder) / "run", options=options, placement=placement
            )
    run = RunFolder.at(run_dir)
    with processes.held_by_first(run.owned()):
        dataset = processes.together(lambda: as_dataset(data, config.data))
        if config.data.dataset != dataset.name:
            named = dataclasses.replace(config.data, dataset=dataset.name)
            config = dataclasses.replace(config, data=named)
        config = config.for_data(pixels=dataset.levels > 0)
        if resume:
            run.require_continuable(config)
        # The folder of the images may differ between machines; their fingerprint is compared.
        same = dataclasses.replace(config.data, data_dir=None)
        chosen = (dataclasses.replace(config, data=same), run.path, resume)
        processes.require_equal("the configuration", repr(chosen))
        processes.require_equal("the data", dataset.fingerprint)
        placement = placement or Placement.of()
        placement.require_even(config.training.batch_size, config.training.microbatches)
        trained = processes.together(lambda: initialize(config, dataset))
        source = config.training.init_from
        if source and not (resume and Checkpoints(run.checkpoints).steps()):
            trained = processes.together(lambda: begun_from(trained, load(source)))
        processes.on_first(
            lambda: run.write_config(config) if resume else run.create(config, overwrite=overwrite)
        )
        _train(Trainer(trained, dataset, placement), run, resume, options or FitOptions())
        return load(run.path, placement)


def _train(trainer: Trainer, run: RunFolder, resume: bool, options: FitOptions) -> None:
    """Train in an existing run folder."""
    checkpoints = Checkpoints(run.checkpoints)
    phases = Phases(trainer)
    state = phases.of(0).init()
    info = CheckpointInfo(0.0, 0.0, None, float("-inf"), facts_of(trainer.trained))
    damaged: list[str] = []
    if resume:
        if restored := checkpoints.restore_last(lambda info: phases.trees_like(state, info)):
            state = TrainState(
                params=restored.trees["model"]["params"], **restored.trees["training"]
            )
            info, damaged = restored.info, restored.damaged
            phases.restored(info)
            require_same_images(info.model["fingerprint"], trainer.dataset)
        processes.on_first(lambda: run.drop_metrics_after(restored.step if restored else -1))
    start = int(state.step)
    loop = _Loop(phases, run, checkpoints, options, info)
    what = f"{trainer.dataset.name} {trainer.trained.config.inference.method}"
    quiet = not processes.is_first()
    with (
        ProgressLine(what, trainer.total_steps, start=start, quiet=quiet) as progress,
        _signals() as received,
    ):
        if trainer.trained.provenance.levels == 0 or trainer.dataset.incomplete:
            progress.say(trainer.trained.describe(trainer.dataset))
        if resume:
            for line in damaged:
                progress.say(line)
            progress.say(f"resuming at step {start} of {trainer.total_steps}")
        try:
            loop.run(state, progress, received)
        finally:
            loop.metrics.save()
            # Also after a failure nothing may be left half done behind the caller's back.
            checkpoints.close()
        if received:  # while the last checkpoint was saved
            raise Stopped(received[0], trainer.total_steps)


class _Loop:
    """The loop of one call of `fit`, with its times of logging and saving."""

    def __init__(
        self,
        phases: Phases,
        run: RunFolder,
        checkpoints: Checkpoints,
        options: FitOptions,
        info: CheckpointInfo,
    ) -> None:
        self.phases, self.metrics, self.checkpoints = phases, run.metrics_log(), checkpoints
        self.run_folder = run
        self.trainer = phases.last
        self.options = options
        self.info = info
        self.began = time.monotonic()
        self.logged = (self.began, 0)
        self.saved = -1

    def run(self, state: TrainState, progress: ProgressLine, received: list[int]) -> None:
        options = self.options
        step = int(state.step)
        trainer = self.trainer = self.phases.of(step)
        in_flight: list[Array] = []
        arguments, enough = trainer.feed.arguments(step), None
        self.logged = (time.monotonic(), step)
        self.saved = step if step else -1
        while step < trainer.total_steps and not (enough := self._enough(step)):
            if step and step == self.phases.change:
                trainer = self.trainer = self.phases.last
                state = self._change(trainer, state, progress)
            state, loss = trainer.step(state, *next(arguments))
            step += 1
            # A short queue of steps keeps the device busy, and limits how late signals and failures
            # are noticed.
            in_flight.append(loss)
            if len(in_flight) > trainer.placement.in_flight:
                in_flight.pop(0).block_until_ready()
            epoch_ends = step % trainer.steps_per_epoch == 0
            if step % options.log_every == 0 or epoch_ends:
                state = self._log(state, step, progress)
            is_best = epoch_ends and self._validate(state, step, progress)
            if epoch_ends:
                self.phases.decide(state, step, self._noted().seconds)
                self.info = self.info._replace(changed_at=self.phases.change)
            if is_best or step - self.saved >= options.checkpoint_every:
                self._save(state, step)
            if number := processes.stop_signal(step, received):
                self._save(state, step)
                raise Stopped(number, step)
        if step == 0:
            self._validate(state, step, progress)
        self._save(state, step)
        if enough:
            progress.say(f"stopped: {enough}")

    def _change(self, trainer: Trainer, state: TrainState, progress: ProgressLine) -> TrainState:
        """Go on from the first phase as the system; its own bound chooses the best checkpoint."""
        config = trainer.trained.config
        progress.say(
            f"pretrained for {int(state.step) // trainer.steps_per_epoch} epochs; "
            f"now {config.inference.method}"
        )
        self.info = self.info._replace(best_step=None, best_bound=float("-inf"))
        return trainer.taken_over(state)

    def _enough(self, step: int) -> str | None:
        """Return the reason to stop before the last epoch, or None."""
        config, each = self.trainer.trained.config.training, self.trainer.steps_per_epoch
        patience, best = config.patience, self.info.best_step
        if step == 0 or step % each:
            return None
        change = self.phases.change
        is_last = change is not None and step > change
        if patience and is_last and best is not None and step - best >= patience * each:
            return f"no better validation bound in {patience} epochs"
        if config.minutes is None:
            return None
        # All processes must stop at the same step, so the clock of the first decides.
        if processes.from_first(self._noted().seconds) >= 60 * config.minutes:
            return f"{config.minutes:g} minutes of training are over"
        return None

    def _log(self, state: TrainState, step: int, progress: ProgressLine) -> TrainState:
        sums, count = jax.device_get((state.sums, state.summed))
        means = {name: float(total / count) for name, total in sums.items()}
        self._checked(state)
        now = time.monotonic()
        then, step_then = self.logged
        batch = self.trainer.trained.config.training.batch_size
        rate = batch * (step - step_then) / max(now - then, 1e-9)
        self.logged = (now, step)
        self._record("train", step, {**means, "images_per_second": rate})
        epochs = self.trainer.trained.config.training.epochs
        epoch = -(-step // self.trainer.steps_per_epoch)
        progress.update(step, f"epoch {epoch}/{epochs}  {_summary(means)}  {rate:.0f} images/s")
        return self.trainer.without_sums(state)

    def _validate(self, state: TrainState, step: int, progress: ProgressLine) -> bool:
        """Log the validation metrics and return whether they are the best so far."""
        began = time.monotonic()
        metrics = self.trainer.validate(self._checked(state).params)
        # The best checkpoint is chosen by the training objective, if that is a bound on log p(x);
        # otherwise by the ELBO.
        bound = metrics.get("objective", metrics["elbo"])
        # A bound that is not finite can never be the best.
        value = bound if np.isfinite(bound) else float("-inf")
        is_best = value > self.info.best_bound
        if is_best:
            self.info = self.info._replace(best_step=step, best_bound=value)
        self._record("validation", step, {**metrics, "best": is_best})
        epoch = step // self.trainer.steps_per_epoch
        mark = "  (best)" if is_best else ""
        progress.say(f"epoch {epoch}: validation {_summary(metrics)}{mark}")
        # The next rate of images per second must not include the time of validation.
        then, step_then = self.logged
        self.logged = (then + time.monotonic() - began, step_then)
        return is_best

    def _save(self, state: TrainState, step: int) -> None:
        if step != self.saved:
            processes.on_first(self.run_folder.require_there)
            processes.on_first(self.metrics.save)
            trees = trees_of(self.trainer, self._checked(state))
            epoch = step / self.trainer.steps_per_epoch
            self.checkpoints.save(step, trees, self._noted()._replace(epoch=epoch))
            self.saved = step

    def _checked(self, state: TrainState) -> TrainState:
        bad_step = int(state.bad_step)
        if bad_step >= 0:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            good = f"the last good checkpoint is step {max(kept)}" if kept else "no checkpoint yet"
            raise RunFailure(
                f"the loss or its gradient was not finite at step {bad_step}; {good}. "
                "Try a smaller --learning-rate or --clip-norm"
            )
        return state

    def _noted(self) -> CheckpointInfo:
        seconds = self.info.seconds + time.monotonic() - self.began
        return self.info._replace(seconds=seconds)

    def _record(self, split: str, step: int, values: dict[str, Any]) -> None:
        epoch = step / self.trainer.steps_per_epoch
        seconds = self._noted().seconds
        if not processes.is_first():
            return
        record = {"split": split, "step": step, "epoch": epoch, **values, "seconds": seconds}
        self.metrics.append(record)
        if self.options.writer:
            for name, value in values.items():
                self.options.writer.add_scalar(f"{split}/{name}", float(value), step)


def _summary(metrics: dict[str, Any]) -> str:
    names = {"elbo": "ELBO", "kl": "KL", "reconstruction": "reconstruction"}
    return "  ".join(f"{label} {metrics[name]:.2f}" for name, label in names.items())


def require_same_images(fingerprint: str, dataset: Dataset) -> None:
    """Check that a model was trained on the images of a data set.

    Args:
        fingerprint: Fingerprint of the images that the model was trained on.
        dataset: The data set.

    Raises:
        UserError: If the fingerprints differ.
    """
    if fingerprint != dataset.fingerprint:
        raise UserError(
            f"the images of {dataset.name} are not those the run was started with; "
            "give their old place with --data-dir, or start a new run"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of ending; a second one acts at once.

    With several processes JAX itself handles SIGTERM, and tells all processes when to stop.
    """
    received: list[int] = []
    if not processes.is_alone() and threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, processes.interrupt_all)
        try:
            yield received
        finally:
            signal.signal(signal.SIGINT, before)
        return
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
