"""One training step: its noise, optimizer and images, and the state that it must not change."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    Linear,
    digits,
    linear_config,
    small_config,
    tiny_config,
    tiny_images,
    untrained,
)

from vlae_jax.data.sets import dataset_from_arrays
from vlae_jax.runs.config import DataConfig, TrainingConfig
from vlae_jax.runs.methods import METHODS, Method
from vlae_jax.training.batches import epoch_order
from vlae_jax.training.objective import Aside
from vlae_jax.training.step import Trainer, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compile")


def steps_of(trainer, count):
    """So many steps from the first on: each one's state and loss."""
    state, arguments = trainer.init(), trainer.feed.arguments(0)
    for _ in range(count):
        state, loss = trainer.step(trainer.without_sums(state), *next(arguments))
        yield state, float(loss)


@pytest.fixture
def watched(monkeypatch):
    """A function that trains on identical images and returns the mean of x in each step."""
    monkeypatch.setitem(METHODS, "spy", Method("spy", "builders:spy", "#000000", has_steps=False))

    def watch(kind, count, pixel=100):
        config = dataclasses.replace(
            tiny_config("spy", learning_rate=1e-30, epochs=count),
            data=DataConfig(preprocess=kind),
        )
        images = np.full((36, 4, 3, 1), pixel, np.uint8)
        dataset = dataset_from_arrays(images)
        trainer = Trainer(untrained(config, dataset), dataset)
        assert trainer.steps_per_epoch == 4
        states = steps_of(trainer, count)
        return np.array([float(state.sums["seen"]) for state, _ in states]), trainer

    return watch


def test_every_step_and_every_image_has_noise_of_its_own(watched):
    """Bernoulli draws of one pixel: their mean and their spread over steps are known."""
    found, _ = watched("dynamic_binary", 80)
    share, draws = 100 / 255, 8 * 12
    variance = share * (1 - share) / draws
    assert abs(found.mean() - share) < 5 * np.sqrt(variance / 80)
    assert abs(found.var() / variance - 1) < 5 * np.sqrt(2 / 80)
    epochs = found.reshape(20, 4)
    assert (np.ptp(epochs, axis=1) > 0).all(), "also within an epoch"


def test_static_binary_images_are_drawn_once(watched):
    """Each epoch sees all of them but the order's rest: none here, and so the same bits."""
    found, trainer = watched("static_binary", 12)
    epochs = found.reshape(3, 4).mean(axis=1)
    assert len(trainer.dataset.train) == 32
    np.testing.assert_allclose(epochs, epochs[0], rtol=1e-6)
    share = 100 / 255
    assert 0 < abs(epochs[0] - share) < 5 * np.sqrt(share * (1 - share) / (32 * 12))
    assert not np.array_equal(found[:4], found[4:8]), "in another order"
    dynamic, _ = watched("dynamic_binary", 12)
    assert len(np.unique(dynamic.reshape(3, 4).mean(axis=1))) == 3


def test_black_and_white_stay_what_they_are(watched):
    for kind in ("static_binary", "dynamic_binary"):
        np.testing.assert_array_equal(watched(kind, 2, pixel=255)[0], 1)
        np.testing.assert_array_equal(watched(kind, 2, pixel=0)[0], 0)


def test_a_seed_is_that_of_the_weights_of_the_order_and_of_the_noise():
    """Each by itself: from the same weights, and with images whose order is nothing."""
    dataset = dataset_from_arrays(np.full((36, 4, 3, 1), 100, np.uint8))
    first, second = (untrained(tiny_config(seed=seed), dataset) for seed in (0, 1))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, second.params)
    chex.assert_trees_all_equal(first.params, untrained(tiny_config(seed=0), dataset).params)
    losses = [
        next(steps_of(Trainer(trained, dataset), 1))[1]
        for trained in (first, first, second.with_params(first.params))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_microbatches_add_up_to_the_gradient_of_the_whole_batch():
    config = small_config("vae")
    moments, losses = [], []
    for count in (None, 1, 8):
        training = dataclasses.replace(config.training, microbatches=count)
        trained = untrained(dataclasses.replace(config, training=training))
        state, loss = next(steps_of(Trainer(trained, digits()), 1))
        # Adam's first moment: a tenth of the gradient.
        moments.append(jax.device_get(optax.tree.get(state.opt_state, "mu")))
        losses.append(loss)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    for found in moments[1:]:
        chex.assert_trees_all_close(found, moments[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatches", [None, 2])
def test_stored_modes_are_where_the_last_search_for_each_image_ended(monkeypatch, microbatches):
    """The first starts at the encoder's mean, the others at the end of the one before.

    What is stored in the row of an image is of that image: its encoder's mean, halved in each
    search, which is better each time as the decoder sees nothing of z. The seventh batch also holds
    images that the first epoch left over.
    """
    walker = Method("walker", "builders:walker", "#000000")
    monkeypatch.setitem(METHODS, "vlae", walker)
    config = tiny_config("vlae", learning_rate=1e-30, modes="stored", microbatches=microbatches)
    dataset = dataset_from_arrays(tiny_images(0, 40))
    config = dataclasses.replace(config, data=DataConfig(preprocess="raw"))
    trained = untrained(config, dataset)
    blind = jax.tree.map(jnp.copy, trained.params)
    blind["head"]["kernel"][...] = jnp.zeros_like(blind["head"]["kernel"][...])
    trained = trained.with_params(blind)
    states = steps_of(Trainer(trained, dataset), 7)
    last = [jax.device_get(state.modes) for state, _ in states][-1]

    def mean(pixels):
        return trained.observe(jax.random.key(0), pixels)[2].mean

    means = jax.vmap(mean)(dataset.train)
    orders = [epoch_order(config.training, epoch, 36) for epoch in (0, 1)]
    seen = np.concatenate([orders[0].ravel(), orders[1][:3].ravel()])
    searches = np.bincount(seen, minlength=36)
    assert set(searches) == {0, 1, 2} or set(searches) == {1, 2}
    expected = np.where(searches[:, None] > 0, means * 0.5 ** searches[:, None], np.nan)
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-6)


def test_a_stored_mode_that_is_worse_than_the_encoders_mean_is_not_used():
    """Of a decoder that sees nothing of z the better one is nearer to zero."""
    dataset = dataset_from_arrays(tiny_images(0, 40))
    trained = untrained(tiny_config("vlae"), dataset)
    blind = jax.tree.map(jnp.copy, trained.params)
    blind["head"]["kernel"][...] = jnp.zeros_like(blind["head"]["kernel"][...])
    trained, key = trained.with_params(blind), jax.random.key(0)
    mean = trained.observe(key, dataset.train[0])[2].mean
    for start, used in ((mean / 2, mean / 2), (2 * mean, mean), (mean * jnp.nan, mean)):
        np.testing.assert_array_equal(
            trained.infer(key, dataset.train[0], start=start).at.start, used
        )


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    """Of the epoch, and of the seed."""
    config = TrainingConfig(batch_size=128, seed=3)
    first, second = (epoch_order(config, epoch, 1294) for epoch in (0, 1))
    other = epoch_order(dataclasses.replace(config, seed=4), 0, 1294)
    for order in (first, second, other):
        assert order.shape == (10, 128)
        assert len(np.unique(order)) == order.size
        assert order.min() >= 0 and order.max() < 1294
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, epoch_order(config, 0, 1294))


# ---------------------------------------------------------------- the optimizer


def updates(config, grads, total=100):
    """The optimizer's updates for a given sequence of gradients."""
    optimizer = make_optimizer(config, total)
    state, found = optimizer.init(jnp.zeros_like(grads[0])), []
    for gradient in grads:
        update, state = optimizer.update(jnp.asarray(gradient), state, jnp.zeros_like(gradient))
        found.append(np.asarray(update))
    return np.array(found)


def test_the_learning_rate_follows_its_schedule():
    def sizes(count, **training):
        ones = np.ones((count, 3), np.float32)
        return -updates(TrainingConfig(learning_rate=0.1, **training), ones, count)[:, 0]

    np.testing.assert_allclose(sizes(4), 0.1, rtol=1e-4)
    warm = sizes(6, warmup_steps=4)
    np.testing.assert_allclose(warm, [0, 0.025, 0.05, 0.075, 0.1, 0.1], atol=1e-6)
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(sizes(10, schedule="cosine"), cosine, rtol=1e-3)


def test_the_gradient_is_clipped_before_adam_sees_it():
    """Checked by hand for three gradients: far above the norm, below it, and above it again."""
    grads = np.array([[30.0, -40.0], [0.2, 0.1], [3.0, 4.0]], np.float32)
    rate, norm, first, second, tiny = 0.1, 1.0, 0.9, 0.999, 1e-8
    mean, square, expected = np.zeros(2), np.zeros(2), []
    for step, gradient in enumerate(np.float64(grads), start=1):
        clipped = gradient * min(1.0, norm / np.linalg.norm(gradient))
        mean = first * mean + (1 - first) * clipped
        square = second * square + (1 - second) * clipped**2
        unbiased = mean / (1 - first**step), square / (1 - second**step)
        expected.append(-rate * unbiased[0] / (np.sqrt(unbiased[1]) + tiny))
    found = updates(TrainingConfig(learning_rate=rate, clip_norm=norm), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_weight_decay_takes_its_share_of_the_decoders_matrices_alone():
    """Without a gradient a step of Adam is 0, and what is left is the decay."""
    params = untrained(tiny_config()).params
    optimizer = make_optimizer(TrainingConfig(learning_rate=0.1, weight_decay=0.5), 10)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    decayed = set()
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True
    ):
        is_equal = np.array_equal(old, new)
        np.testing.assert_allclose(new, old if is_equal else 0.95 * old, rtol=1e-6)
        if not is_equal:
            decayed.add(jax.tree_util.keystr(path))
    assert decayed and all("features" in name or "['head']" in name for name in decayed)
    assert all("kernel" in name for name in decayed)


def test_the_schedule_of_a_training_spans_all_its_epochs(monkeypatch):
    """With a loss of slope one each step moves a weight by the learning rate."""

    def slope_of_one(params, *_):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        return total, Aside({"elbo": -total}, jnp.zeros((8, 2)))

    monkeypatch.setattr("vlae_jax.training.step.loss_fn", slope_of_one)
    dataset = dataset_from_arrays(tiny_images(0, 36))
    config = tiny_config(schedule="cosine", epochs=3, learning_rate=0.1)
    trainer = Trainer(untrained(config, dataset), dataset)
    biases = [np.asarray(trainer.trained.params["mean"]["bias"][...])]
    biases += [np.asarray(state.params["mean"]["bias"][...]) for state, _ in steps_of(trainer, 12)]
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(12) / 12))
    np.testing.assert_allclose(-np.diff(biases, axis=0)[:, 0], expected, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- the compiled step


@pytest.fixture(scope="module")
def tiny_trainer(quick_compile):
    dataset = dataset_from_arrays(tiny_images(0, 40))
    return Trainer(untrained(tiny_config(), dataset), dataset)


def test_a_step_of_resident_images_asks_nothing_of_the_host(tiny_trainer):
    """Neither sends nor fetches, from the second one of an epoch on."""
    arguments = tiny_trainer.feed.arguments(0)
    state, _ = tiny_trainer.step(tiny_trainer.init(), *next(arguments))
    with jax.transfer_guard("disallow"):
        state, loss = tiny_trainer.step(state, *next(arguments))
        loss.block_until_ready()
    assert int(state.step) == 2 and np.isfinite(float(loss))


def test_a_bad_step_changes_nothing_but_its_own_record(tiny_trainer):
    good = tiny_trainer.init()
    before = good._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, good.params))
    kept = jax.tree.map(np.array, before)
    after, _ = tiny_trainer.step(before, *next(tiny_trainer.feed.arguments(0)))
    assert int(after.bad_step) == 0
    chex.assert_trees_all_equal(after._replace(bad_step=kept.bad_step), kept)


def test_validation_has_the_same_noise_each_time(tiny_trainer):
    params = tiny_trainer.trained.params
    first = tiny_trainer.validate(params)
    assert first == tiny_trainer.validate(params)
    assert "objective" not in first


def test_validation_measures_the_bound_that_is_trained():
    """Of 300 samples: log p(x) of the validation images, near enough; the ELBO lies far below."""
    training = TrainingConfig(objective="iwae", train_samples=300)
    trained = untrained(dataclasses.replace(linear_config("vae"), training=training))
    found = Trainer(trained, digits()).validate(trained.params)
    linear = Linear(trained, digits().validation)
    expected, std = linear.mean_field_elbo()
    assert abs(found["objective"] - linear.log_prob().mean()) < 0.1
    error = np.sqrt(np.mean(std**2) / (144 * 300))
    assert abs(found["elbo"] - expected.mean()) < 5 * error
    assert linear.log_prob().mean() - expected.mean() > 0.5
