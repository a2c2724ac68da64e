"""The decision when a run goes on from a plain VAE to its own system."""

import shutil
from types import SimpleNamespace

import chex
import jax.numpy as jnp
import pytest
from builders import last_state, tiny_config, tiny_mapping, untrained

from vlae_jax.data.supplied import as_dataset
from vlae_jax.runs.checkpoints import Checkpoints
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.loop import fit
from vlae_jax.training.phases import Phases
from vlae_jax.training.step import TrainState

EPOCH, TRIAL = 10.0, 8
"""Seconds of an epoch of the VAE, and of the second half of a trial, whose steps take one each."""


class Clocked:
    """A trainer of the system whose steps take a second each, and gain what a test says.

    Its bound is that of the VAE so far. The first half of a trial gains 100 nats.
    """

    steps_per_epoch = 16

    def __init__(self, gained, **training):
        self.gained, self.level, self.now, self.steps = gained, 0.0, 0.0, 0
        config = tiny_config("vlae", pretrain="auto", **training)
        self.trained = SimpleNamespace(config=config)
        self.feed = SimpleNamespace(arguments=self.arguments)

    def pretrainer(self):
        return "vae"

    def arguments(self, step):
        self.steps = 0
        while True:
            yield (step,)

    def taken_over(self, state):
        return state

    def step(self, state, _):
        self.now += 1
        self.steps += 1
        return state, jnp.zeros(())

    def validate(self, params, num_batches):
        halves = {0: 0.0, TRIAL: 100.0, 2 * TRIAL: 100.0 + self.gained}
        bound = self.level + halves[self.steps]
        if self.steps == 2 * TRIAL:
            self.steps = 0
        return {"elbo": bound}


@pytest.mark.parametrize(
    ("gained", "training", "change"),
    [
        # Nats a second, of trials: 0.25, 0.125, 0.025. Of the VAE since the last trial: 0.2 after 3
        # epochs, 0.075 after 5, 0.015 after 8.
        (2.0, {"epochs": 30}, 3),
        (1.0, {"epochs": 30}, 5),
        (0.2, {"epochs": 30}, 8),
        (0.0, {"epochs": 30}, 20),
        (float("nan"), {"epochs": 12}, 8),
        (0.0, {"epochs": 30, "minutes": 1.5}, 4),
        (2.0, {"epochs": 3}, 2),
    ],
)
def test_a_run_changes_when_its_own_steps_raise_its_bound_faster(
    monkeypatch, gained, training, change
):
    """Trials after 2, 3, 5, 8, ... epochs; the first only sets the mark.

    The VAE gains 8 nats in the first epoch, and half as much in each as in the one before. What the
    first half of a trial gains does not count. After two thirds of the time the change takes place.
    """
    trainer = Clocked(gained, **training)
    monkeypatch.setattr("vlae_jax.training.phases.time.monotonic", lambda: trainer.now)
    phases, state = Phases(trainer), TrainState(*[jnp.zeros((), jnp.int32)] * 6)
    for epoch in range(1, 31):
        trainer.now += EPOCH
        trainer.level += 2.0 ** (4 - epoch)
        assert phases.of(16 * epoch - 1) == "vae"
        phases.decide(state, 16 * epoch, trainer.now)
        if phases.change is not None:
            break
    assert phases.change == 16 * change
    assert phases.of(16 * change - 1) == "vae" and phases.of(16 * change) is trainer


@pytest.mark.slow
def test_a_run_that_chose_its_change_is_that_of_a_change_told(make_trainer, tmp_path, capsys):
    """Of three epochs two pass as a VAE; it is resumed from before and from after the change."""
    chosen, told = (tiny_config("vlae", epochs=3, pretrain=which) for which in ("auto", 2))
    dataset = as_dataset(tiny_mapping(), told.data)
    trainer = make_trainer(untrained(told, dataset), dataset)
    fit(told, tiny_mapping(), run_dir=tmp_path / "told")
    whole = last_state(trainer, RunFolder(tmp_path / "told"))
    fit(chosen, tiny_mapping(), run_dir=tmp_path / "auto")
    assert "pretrained for 2 epochs; now vlae" in capsys.readouterr().err
    auto = RunFolder(tmp_path / "auto")
    chex.assert_trees_all_equal(last_state(trainer, auto), whole)
    steps = Checkpoints(auto.checkpoints, read_only=True).steps()
    assert len(steps) >= 2
    shutil.rmtree(auto.checkpoints / str(steps[-1]))
    fit(chosen, tiny_mapping(), run_dir=auto.path, resume=True)
    chex.assert_trees_all_equal(last_state(trainer, auto), whole)
