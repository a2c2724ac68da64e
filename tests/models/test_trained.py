"""The trained model as a value: saved, loaded, moved, and used inside other programs."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    Linear,
    digits,
    linear_config,
    tiny_config,
    tiny_images,
    tiny_mapping,
    untrained,
)
from problems import assert_close

from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.data.sets import dataset_from_arrays
from vlae_jax.errors import UserError
from vlae_jax.models.initial import begun_from, initialize
from vlae_jax.models.saved import load, save
from vlae_jax.models.trained import Keys
from vlae_jax.runs.config import DataConfig, ModelConfig
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.loop import fit

pytestmark = pytest.mark.usefixtures("quick_compile")

IMAGES = tiny_images(0, 40)
DATASET = dataset_from_arrays(IMAGES)


def assert_the_same(found, expected):
    """Assert exact equality of arrays, structure, and the fields that `==` does not compare."""
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert dataclasses.asdict(found.provenance) == dataclasses.asdict(expected.provenance)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("method", ["vae", "vlae", "vae_iaf", "vae_full"])
@pytest.mark.parametrize("preprocess", ["logit", "dynamic_binary"])
def test_what_is_saved_is_loaded_bit_for_bit(method, preprocess, tmp_path):
    config = dataclasses.replace(tiny_config(method), data=DataConfig(preprocess=preprocess))
    trained = untrained(config, DATASET)
    # Fresh biases are all zero, which a loader could make up by itself.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), trained.params
    )
    progress = dataclasses.replace(trained.provenance, step=12, epoch=1.5, seconds=3.25)
    trained = dataclasses.replace(trained.with_params(params), provenance=progress)
    save(trained, tmp_path / "run")
    assert_the_same(load(tmp_path / "run"), trained)
    with pytest.raises(UserError, match="already holds a run"):
        save(trained, tmp_path / "run")
    other = trained.with_params(jax.tree.map(jnp.zeros_like, params))
    save(other, tmp_path / "run", overwrite=True)
    assert_the_same(load(tmp_path / "run"), other)


def test_a_factored_model_is_saved_without_what_follows_from_its_parameters(tmp_path):
    trained = untrained(linear_config())
    factored = trained.factored()
    assert factored.head is not None and trained.head is None
    save(factored, tmp_path / "run")
    assert_the_same(load(tmp_path / "run"), trained)


def test_loading_touches_neither_training_images_nor_the_optimizer(tmp_path, monkeypatch):
    """Loading works after the training state is deleted and the folder moved."""
    fitted = fit(tiny_config(), tiny_mapping(), run_dir=tmp_path / "run")
    moved = RunFolder(shutil.move(tmp_path / "run", tmp_path / "moved"))
    kept = [*moved.checkpoints.glob("*/training")]
    assert kept
    for folder in kept:
        shutil.rmtree(folder)

    def refuse(*_, **__):
        raise AssertionError("loading asked for it")

    for name in (
        *("vlae_jax.data.sets.load_dataset", "vlae_jax.data.supplied.load_dataset"),
        *("vlae_jax.data.sets.dataset_from_arrays", "vlae_jax.models.initial.fit_preprocessor"),
        *("optax.adam", "vlae_jax.training.step.make_optimizer"),
    ):
        monkeypatch.setattr(name, refuse)
    assert_the_same(load(moved.path), fitted)


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="is no run folder") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- use


@pytest.mark.parametrize("method", ["vae", "vlae", "vae_iaf"])
def test_inference_under_jit_and_vmap_is_that_of_a_loop(method):
    """The model is an argument of `jit`, so one program serves all models of its structure."""
    trained, keys = untrained(tiny_config(method), DATASET), fixed_keys(3)

    def outcome(trained, key, pixels):
        inferred = trained.infer(key, pixels)
        z, log_q = inferred.posterior.sample_and_log_prob(inferred.keys.bound)
        inference = inferred.inference
        return (
            *(inferred.x, inferred.log_det, inference.iterates, inference.amortization_loss),
            *(z, log_q, inferred.log_joint(z), inference.flags),
        )

    traces = []

    @jax.jit
    def batched(trained, keys, images):
        traces.append(1)
        return jax.vmap(outcome, in_axes=(None, 0, 0))(trained, keys, images)

    found = batched(trained, keys, IMAGES[:3])
    alone = jax.jit(outcome)
    singles = [alone(trained, key, image) for key, image in zip(keys, IMAGES[:3], strict=True)]
    looped = jax.tree.map(lambda *parts: np.stack(parts), *singles)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    moved = trained.with_params(jax.tree.map(lambda leaf: 1.1 * leaf, trained.params))
    longer = dataclasses.replace(trained.provenance, step=7)
    again = batched(dataclasses.replace(moved, provenance=longer), keys, IMAGES[:3])
    assert len(traces) == 1
    assert not np.allclose(again[2], found[2])


def test_a_factored_head_gives_the_same_log_joint_and_goes_with_its_parameters():
    trained = untrained(linear_config())
    factored, key, pixels = trained.factored(), fixed_keys(1)[0], digits().test[0]

    @jax.jit
    def values(trained):
        return jax.vmap(trained.infer(key, pixels).log_joint)(jnp.eye(3))

    assert_close(values(factored), np.asarray(values(trained)))
    assert factored.with_params(trained.params).head is None


def test_what_is_not_observed_is_not_looked_at():
    """The encoder sees the training mean there, which is zero in x of raw pixels."""
    trained, key = untrained(linear_config()), fixed_keys(1)[0]
    pixels, missing = digits().test[0].copy(), np.zeros((8, 8, 1), bool)
    missing[2:4] = True
    _, _, at = trained.observe(key, pixels, missing=missing)
    pixels[2:4] = 16 - pixels[2:4]
    _, _, other = trained.observe(key, pixels, missing=missing)
    np.testing.assert_array_equal(at.mean, other.mean)
    z = jnp.ones(3)
    assert at.log_joint(z) == other.log_joint(z)
    linear = Linear(trained, np.where(missing, 0, pixels)[None])
    linear.xs[:, missing.ravel()] = 0
    kernel, bias = trained.model.mean.kernel[...], trained.model.mean.bias[...]
    assert_close(at.mean, (linear.xs @ np.float64(kernel) + np.float64(bias))[0])


def test_every_purpose_has_random_numbers_of_its_own():
    keys = Keys.split(jax.random.key(0))
    drawn = np.array([jax.random.uniform(key) for key in keys])
    assert len(np.unique(drawn)) == len(Keys._fields) == 6
    trained, pixels = untrained(tiny_config(), DATASET), IMAGES[0]
    inferred = trained.infer(jax.random.key(3), pixels)
    expected = Keys.split(jax.random.key(3))
    for found, key in zip(inferred.keys, expected, strict=True):
        assert jnp.all(jax.random.key_data(found) == jax.random.key_data(key))
    x, log_det = trained.preprocessor.apply(expected.noise, pixels)
    np.testing.assert_array_equal(inferred.x, x)
    assert inferred.log_det == log_det


def test_another_choice_is_checked_as_the_first_was():
    trained = untrained(tiny_config(), DATASET)
    changed = trained.with_config("evaluation", importance_samples=7)
    assert changed.config.evaluation.importance_samples == 7
    assert changed.config.evaluation.chunk_size == trained.config.evaluation.chunk_size
    assert changed.config.training == trained.config.training
    assert changed.params is trained.params
    with pytest.raises(UserError, match="importance_samples must be at least 1"):
        trained.with_config("evaluation", importance_samples=0)


# ---------------------------------------------------------------- how it is made


@pytest.mark.parametrize("kind", ["logit", "raw", "dynamic_binary"])
def test_the_preprocessing_knows_the_training_images_alone(kind):
    config = dataclasses.replace(tiny_config(), data=DataConfig(preprocess=kind))
    expected = initialize(config, DATASET).preprocessor
    for part, is_seen in (("validation", False), ("test", False), ("train", True)):
        images = tiny_images(9, len(getattr(DATASET, part))) // 2
        found = initialize(config, DATASET._replace(**{part: images})).preprocessor
        # Binary images are not centered, but their mean stands in for what is missing.
        same = np.array_equal(found.mean + found.average, expected.mean + expected.average)
        assert same is not is_seen
        if not is_seen:
            chex.assert_trees_all_equal(found, expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="batch_size 64 is larger than the training set"):
        initialize(tiny_config(batch_size=64), DATASET)
    evaluation = dataclasses.replace(tiny_config().evaluation, test_images=5)
    with pytest.raises(UserError, match="test_images is 5, but arrays has only 4"):
        initialize(dataclasses.replace(tiny_config(), evaluation=evaluation), DATASET)


# ---------------------------------------------------------------- beginning with another model


def test_a_model_begins_with_what_another_one_shares():
    """The flow that the other has not begins as usual; everything else is the other's."""
    source = untrained(tiny_config("vae", seed=5), DATASET)
    fresh = untrained(tiny_config("vae_hf"), DATASET)
    begun = begun_from(fresh, source)
    own, theirs, found = (dict(trained.params) for trained in (fresh, source, begun))
    chex.assert_trees_all_equal(found.pop("posterior_head"), own.pop("posterior_head"))
    chex.assert_trees_all_equal(found, theirs)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(own, theirs)


def test_a_model_of_other_sizes_or_other_images_is_refused():
    fresh = untrained(tiny_config(), DATASET)
    wider = dataclasses.replace(tiny_config(), model=ModelConfig(latent=2, hidden=(9,)))
    with pytest.raises(UserError, match=r"encoder.* has shape \(9,\) in that run, and \(8,\) here"):
        begun_from(fresh, untrained(wider, DATASET))
    deeper = dataclasses.replace(tiny_config(), model=ModelConfig(latent=2, hidden=(8, 8)))
    with pytest.raises(UserError, match="model options"):
        begun_from(untrained(deeper, DATASET), fresh)
    others = dataset_from_arrays(tiny_images(9, 40))
    with pytest.raises(UserError, match="the same images"):
        begun_from(fresh, untrained(tiny_config(), others))
