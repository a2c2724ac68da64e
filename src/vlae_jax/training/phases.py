"""The phases of a training run: first the network as a plain VAE, then the system itself."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlae_jax.models.saved import arrays_of
from vlae_jax.parallel import processes
from vlae_jax.runs.checkpoints import CheckpointInfo
from vlae_jax.training.step import Trainer, TrainState

_LATEST = 2 / 3
"""Share of the epochs, or minutes, after which a change that is left to the run takes place."""
_FIRST_TRIAL, _TRIALS_APART = 2, 1.5
"""Epochs before the first trial, and the ratio of those before one and the next."""
_TRIALS_AN_EPOCH, _LEAST_STEPS = 16, 8
"""A trial takes twice an epoch's steps divided by the first number, but at least the second."""
_TRIAL_BATCHES = 2
"""Batches of validation images on which trials measure the bound."""


class Phases:
    """What trains when, and with `--pretrain auto` the decision when that changes."""

    def __init__(self, trainer: Trainer) -> None:
        pretrain = trainer.trained.config.training.pretrain
        self.last = trainer
        self.is_auto = pretrain == "auto"
        self.change: int | None = None
        """Number of steps of the first phase; None while that is not decided."""
        if not self.is_auto:
            self.change = int(pretrain) * trainer.steps_per_epoch
        self._first = trainer.pretrainer() if pretrain else trainer
        self._next_trial = _FIRST_TRIAL
        self._then: tuple[float, float] | None = None

    def of(self, step: int) -> Trainer:
        """The trainer that does the step after so many."""
        return self._first if self.change is None or step < self.change else self.last

    def restored(self, info: CheckpointInfo) -> None:
        """Take over the decision that a checkpoint holds."""
        if self.is_auto:
            self.change = info.changed_at

    def trees_like(self, state: TrainState, info: CheckpointInfo) -> dict[str, Any]:
        """Trees of the shape that a checkpoint has, from any state.

        The phases sum up different metrics and may store modes, and differ in nothing else.
        """
        self.restored(info)
        last_step = max(0, round(info.epoch * self.last.steps_per_epoch) - 1)
        trainer = self.of(last_step)
        return trees_of(trainer, trainer.taken_over(state))

    def decide(self, state: TrainState, step: int, seconds: float) -> None:
        """At the end of an epoch: change now, if that is left to the run and seems best.

        The system's own bound is measured before and after some of its steps, on a copy of the
        state. The change takes place when they raise it faster per second than the steps of the VAE
        have since the last trial; at the latest after two thirds of the epochs or minutes.

        Args:
            state: The state of the training.
            step: Number of steps done.
            seconds: Time spent training so far.
        """
        if self.change is not None:
            return
        training = self.last.trained.config.training
        epoch = step // self.last.steps_per_epoch
        minutes = training.minutes or np.inf
        late = epoch >= _LATEST * training.epochs or seconds >= _LATEST * 60 * minutes
        if late or (epoch >= self._next_trial and self._wins(state, seconds)):
            self.change = step
        if epoch >= self._next_trial:
            self._next_trial = int(np.ceil(_TRIALS_APART * epoch))

    def _wins(self, state: TrainState, seconds: float) -> bool:
        trainer, entered = self.last, time.monotonic()
        trial = jax.tree.map(jnp.copy, trainer.taken_over(state))
        arguments = trainer.feed.arguments(int(state.step))
        count = max(_LEAST_STEPS, trainer.steps_per_epoch // _TRIALS_AN_EPOCH)
        bounds, took = [self._bound(trial)], 0.0
        # The first half compiles, and takes the encoder to its new task, which is gained but once.
        for _ in range(2):
            began = time.monotonic()
            for _ in range(count):
                trial, loss = trainer.step(trial, *next(arguments))
                loss.block_until_ready()
            took = time.monotonic() - began
            bounds.append(self._bound(trial))
        gained = (bounds[2] - bounds[1]) / took
        left = seconds + time.monotonic() - entered
        then, self._then = self._then, (bounds[0], left)
        if then is None:
            return False
        needed = (bounds[0] - then[0]) / max(seconds - then[1], 1e-9)
        return bool(processes.from_first(float(gained > needed)))

    def _bound(self, state: TrainState) -> float:
        metrics = self.last.validate(state.params, num_batches=_TRIAL_BATCHES)
        return metrics.get("objective", metrics["elbo"])


def trees_of(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """The trees of a checkpoint: the model, which can be read alone, and the training state."""
    model = arrays_of(trainer.trained.with_params(state.params))
    preprocessor = trainer.placement.put(model["preprocessor"])
    return {
        "model": {**model, "preprocessor": preprocessor},
        "training": state.besides_params(),
    }
