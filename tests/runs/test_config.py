"""Defaults that depend on one another, presets, and the names of runs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vlae_jax.commands.main import parse
from vlae_jax.errors import UserError
from vlae_jax.runs.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
)
from vlae_jax.runs.methods import METHODS
from vlae_jax.runs.presets import PRESETS, default_config


def test_sizes_are_the_papers_and_smaller_for_digits():
    small = Config(
        model=ModelConfig(latent=16, hidden=(200, 200)),
        training=TrainingConfig(epochs=120, batch_size=64, learning_rate=1e-3),
    )
    assert default_config() == default_config("digits") == small
    assert default_config("mnist") == Config(data=DataConfig(dataset="mnist"))
    assert default_config("mnist", "sa_vae").inference == InferenceConfig(method="sa_vae")


@pytest.mark.parametrize("dataset", [None, "digits", "mnist"])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_ppca_has_no_hidden_layers_and_no_epochs_by_default(dataset, preset):
    config = default_config(dataset, "ppca", preset)
    assert config.model.hidden == () and config.training.epochs == 0
    assert config.model.latent == (16 if preset is None and dataset != "mnist" else 50)


PUBLISHED = Config(
    data=DataConfig(dataset="mnist", preprocess="logit", logit_lambda=1e-6, standardize=True),
    model=ModelConfig(latent=50, hidden=(500, 500), activation="relu", variance="shared"),
    inference=InferenceConfig(
        method="vlae", steps=4, damping="paper", solver="cholesky", gradient="unroll"
    ),
    training=TrainingConfig(epochs=2000, batch_size=128, learning_rate=5e-4, objective="elbo"),
    evaluation=EvaluationConfig(importance_samples=5000, proposal="posterior"),
)
"""The picture in the authors' README, and nothing else."""


def test_the_preset_is_the_published_settings():
    assert default_config(preset="paper-screenshot") == PUBLISHED
    assert parse(["train", "--preset", "paper-screenshot"]).config == PUBLISHED
    assert parse(["train", "--preset=paper-screenshot"]).config == PUBLISHED


def test_the_command_line_changes_what_a_preset_says():
    given = ["train", "--preset", "paper-screenshot", "--dataset=omniglot", "--method", "vae"]
    changed = parse([*given, "--epochs", "3", "--hidden", "20"]).config
    assert changed == dataclasses.replace(
        PUBLISHED,
        data=dataclasses.replace(PUBLISHED.data, dataset="omniglot"),
        model=dataclasses.replace(PUBLISHED.model, hidden=(20,)),
        inference=dataclasses.replace(PUBLISHED.inference, method="vae"),
        training=dataclasses.replace(PUBLISHED.training, epochs=3),
    )
    # Digits have no defaults of their own beside a preset's.
    digits = default_config("digits", preset="paper-screenshot")
    assert digits == dataclasses.replace(
        PUBLISHED, data=dataclasses.replace(PUBLISHED.data, dataset="digits")
    )


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'paper'; did you mean 'paper-screenshot'"):
        default_config(preset="paper")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits-vlae-T4-seed0"),
        ({"inference": InferenceConfig(method="vae")}, "digits-vae-seed0"),
        ({"inference": InferenceConfig(method="vae_full", steps=9)}, "digits-vae_full-seed0"),
        ({"inference": InferenceConfig(method="sa_vae", steps=8)}, "digits-sa_vae-T8-seed0"),
        ({"inference": InferenceConfig(method="vae_iaf", steps=2)}, "digits-vae_iaf-T2-seed0"),
        ({"data": DataConfig(dataset="mnist")}, "mnist-vlae-T4-seed0"),
        ({"training": TrainingConfig(seed=3)}, "digits-vlae-T4-seed3"),
        (
            {"training": TrainingConfig(objective="iwae", train_samples=5)},
            "digits-vlae-T4-iwae5-seed0",
        ),
    ],
)
def test_a_run_is_named_after_its_main_choices(changes, name):
    assert Config(**changes).run_name == name


def test_every_system_has_a_label_of_its_own():
    labels = {method: InferenceConfig(method=method, steps=1).label for method in METHODS}
    assert len(set(labels.values())) == len(METHODS)
    assert not set(labels.values()) & set(METHODS)


SECTIONS = [DataConfig, ModelConfig, InferenceConfig, TrainingConfig, EvaluationConfig]


@pytest.mark.parametrize(
    ("section", "name"),
    [(cls, field.name) for cls in (*SECTIONS, Config) for field in dataclasses.fields(cls)],
)
def test_a_value_of_another_type_is_refused_in_one_line(section, name):
    """In Python too, where no command line has read it."""
    for value in (object(), 1.5j):
        with pytest.raises(UserError, match=f"^{name}[: ]") as caught:
            section(**{name: value})
        assert "\n" not in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (InferenceConfig, {"search": "newtonian"}),
        (InferenceConfig, {"steps": 1.5}),
        (InferenceConfig, {"steps": True}),
        (InferenceConfig, {"steps": "3"}),
        (InferenceConfig, {"method": None}),
        (TrainingConfig, {"pretrain": "often"}),
        (TrainingConfig, {"learning_rate": "1e-3"}),
        (TrainingConfig, {"modes": "stored "}),
        (ModelConfig, {"hidden": 8}),
        (ModelConfig, {"hidden": (8, 4.5)}),
        (EvaluationConfig, {"proposal": "prior"}),
    ],
)
def test_what_only_looks_like_a_choice_is_refused(section, wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        section(**wrong)


def test_what_means_the_same_is_brought_to_its_type():
    given = ModelConfig(latent=np.int64(3), hidden=[np.int32(8), 4], min_std=np.float32(0.5))
    assert given == ModelConfig(latent=3, hidden=(8, 4), min_std=0.5)
    assert type(given.latent) is int and hash(given) == hash(
        ModelConfig(3, hidden=(8, 4), min_std=0.5)
    )
    assert type(TrainingConfig(learning_rate=1).learning_rate) is float
    assert DataConfig(data_dir=Path("images")).data_dir == "images"
