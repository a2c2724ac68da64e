"""Training end to end on small real images: it learns, replays, resumes and fails as it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from problems import assert_close

from vlae_jax import cli, elbo
from vlae_jax.bounds import iwae_bound
from vlae_jax.checkpoints import Checkpoints, Notes
from vlae_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
)
from vlae_jax.errors import RunFailure, UserError
from vlae_jax.experiment import build_experiment, map_images
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.run_folder import RunFolder
from vlae_jax.systems import find_system
from vlae_jax.training import FitOptions, Trainer, fit, loss_fn, make_optimizer, objective

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = [
    *("--hidden", "16", "--latent", "3", "--epochs", "4"),
    *("--importance-samples", "8", "--test-images", "16"),
]


def small_config(**sections):
    defaults = {
        "model": ModelConfig(latent=3, hidden=(16,)),
        "training": TrainingConfig(epochs=2),
        "evaluation": EvaluationConfig(importance_samples=8, test_images=16),
    }
    return Config(**{**defaults, **sections})


def train(config, folder, *, resume=False, **options):
    run = RunFolder(Path(folder))
    if not resume:
        run.create(config, overwrite=False)
    experiment = build_experiment(config)
    fit(experiment, run, resume=resume, options=FitOptions(**options))
    return experiment, run


def last_state(experiment, run):
    like = Trainer(experiment).init()
    return Checkpoints(run.checkpoints, read_only=True).restore_last(like).state


def records(run, split):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def command(folder, *more):
    """Arguments of a run like `small_config()`, for longer."""
    return ["train", "--run-dir", str(folder), *SMALL, *more]


def start(*arguments, **options):
    """The program in a process of its own, which compiles as quickly as this one does."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlae_jax", *arguments],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compile):
    """A short run and its last state, for tests that leave the run as it is."""
    experiment, run = train(small_config(), tmp_path_factory.mktemp("finished") / "run")
    return experiment, run, last_state(experiment, run)


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be changed."""
    return RunFolder(shutil.copytree(finished[1].path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("method", "network", "gain"), [("vae", "mlp", 5), ("vlae", "mlp", 5), ("vlae", "conv", 3)]
)
def test_training_raises_the_validation_elbo(tmp_path, method, network, gain):
    config = small_config(
        model=ModelConfig(latent=3, hidden=(16,), network=network, channels=(8, 8)),
        inference=InferenceConfig(method=method, steps=2),
        training=TrainingConfig(epochs=4, learning_rate=1e-2, patience=1),
    )
    experiment, run = train(config, tmp_path / "run")
    elbos = [record["elbo"] for record in records(run, "validation")]
    assert len(elbos) == 4
    assert elbos == sorted(elbos)
    assert elbos[-1] > elbos[0] + gain

    moved = jax.tree.map(
        lambda new, old: bool(jnp.any(new != old)),
        last_state(experiment, run).params,
        build_experiment(config).initial_params,  # training has given its own away
    )
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(moved)}
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    unmoved = {name for name in flat if method == "vlae" and "log_std" in name}
    assert {name for name, has_moved in flat.items() if not has_moved} == unmoved


@pytest.mark.parametrize("gradient", ["implicit", "stop", "unroll"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_every_gradient_and_activation_gives_finite_updates_to_every_weight(gradient, activation):
    config = small_config(
        inference=InferenceConfig(steps=2, gradient=gradient),
        model=ModelConfig(latent=3, hidden=(16,), activation=activation),
    )
    experiment = build_experiment(config)
    xs = jax.random.normal(jax.random.key(0), (8, experiment.preprocessor.dim))
    keys = jax.random.split(jax.random.key(1), 8)
    differentiate = jax.jit(jax.grad(lambda p: loss_fn(p, experiment, xs, keys)[0]))
    grads = differentiate(experiment.initial_params)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(jnp.isfinite(value).all() for value in flat.values())
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    untrained = {name for name, value in flat.items() if not jnp.any(value)}
    assert untrained == {name for name in flat if "log_std" in name}


def test_the_loss_is_minus_the_mean_objective_of_single_images():
    experiment = build_experiment(small_config(inference=InferenceConfig(method="vae")))
    params = experiment.initial_params
    xs = jax.random.normal(jax.random.key(0), (5, experiment.preprocessor.dim))
    keys = jax.random.split(jax.random.key(1), 5)
    loss = jax.jit(lambda xs, keys: loss_fn(params, experiment, xs, keys)[0])
    whole = loss(xs, keys)
    singles = [loss(xs[i : i + 1], keys[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(whole, np.mean(singles), rtol=1e-5)


KINDS = ["elbo", "iwae", "dreg", "evidence"]
METRICS = {"elbo", "kl", "reconstruction", "amortization_loss"}


def linear_model(dim=12):
    """Probabilistic PCA with an encoder that knows nothing of it, and log p(x) of some x."""
    rng = np.random.default_rng(0)
    model = VariationalAutoencoder(
        dim,
        latent=3,
        hidden=(),
        activation="relu",
        likelihood="gaussian",
        variance=np.full(dim, 0.8),
        rngs=nnx.Rngs(0),
    )
    model.head.kernel[...] = jnp.asarray(rng.normal(size=(3, dim)), jnp.float32)
    xs = jnp.asarray(2 * rng.normal(size=(5, dim)), jnp.float32)
    kernel = np.asarray(model.head.kernel[...], np.float64)
    covariance = kernel.T @ kernel + np.exp(np.float64(model.log_var)) * np.eye(dim)
    return model, xs, scipy.stats.multivariate_normal(cov=covariance).logpdf(xs)


def test_every_objective_is_the_evidence_of_a_linear_model():
    """Of five images; the posterior is exact. What is trained stands beside the ELBO."""
    model, xs, evidence = linear_model()
    system = find_system("vlae").build(InferenceConfig(steps=1))

    @jax.jit
    @jax.vmap
    def run(x, key):
        return {kind: objective(model, system, x, key, kind=kind, num_samples=3) for kind in KINDS}

    for kind, (value, metrics) in run(xs, jax.random.split(jax.random.key(0), 5)).items():
        assert_close(value + metrics["amortization_loss"], evidence)
        assert_close(metrics["elbo"], evidence)
        assert_close(metrics["reconstruction"], np.asarray(metrics["elbo"] + metrics["kl"]))
        flags = {"converged", "is_pd", "newton_decrement"}
        assert set(metrics) == METRICS | flags | ({"objective"} if kind != "elbo" else set())
        if kind != "elbo":
            assert_close(metrics["objective"], evidence)


@pytest.mark.parametrize("kind", ["iwae", "dreg"])
def test_an_importance_weighted_objective_stands_beside_the_elbo_of_its_samples(kind):
    """Above it; and no gradient comes from what is only shown."""
    model, xs, _ = linear_model()
    x, key, system = xs[0], jax.random.key(0), find_system("vae").build(InferenceConfig())
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        def shown(params):
            model = nnx.merge(graphdef, params)
            value, metrics = objective(model, system, x, key, kind=kind, num_samples=4)
            return metrics["elbo"], (value, metrics)

        slope, (value, metrics) = jax.grad(shown, has_aux=True)(params)
        model = nnx.merge(graphdef, params)
        posterior, log_joint = system(model, x, key).posterior, model.log_joint(x)
        bounds = (
            elbo(key, log_joint, posterior, num_samples=4),
            iwae_bound(key, log_joint, posterior, num_samples=4),
        )
        return value, metrics, bounds, posterior.kl_to_standard_normal(), slope

    value, metrics, (bound, weighted), kl, slope = run(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))
    assert set(metrics) == METRICS | {"objective"}
    assert_close(metrics["elbo"], np.asarray(bound))
    assert_close(metrics["objective"], np.asarray(weighted))
    assert_close(metrics["kl"], np.asarray(kl))
    assert value == metrics["objective"] > metrics["elbo"] + 0.1


def never_better(epochs, patience):
    """Steps too small to change a weight: the first epoch's validation bound stays the best."""
    return small_config(
        inference=InferenceConfig(method="vae"),
        training=TrainingConfig(epochs=epochs, learning_rate=1e-30, patience=patience),
    )


def test_patience_ends_a_run_so_many_epochs_after_the_best(tmp_path, capsys):
    """And a run that was broken off in between ends at the same place in the same state."""
    experiment, run = train(never_better(9, 2), tmp_path / "whole")
    validations = records(run, "validation")
    assert [record["epoch"] for record in validations] == [1, 2, 3]
    assert [record["best"] for record in validations] == [True, False, False]
    assert "stopped: no better validation bound in 2 epochs" in capsys.readouterr().err

    _, broken = train(never_better(2, 2), tmp_path / "broken")
    assert "stopped" not in capsys.readouterr().err
    train(never_better(9, 2), broken.path, resume=True)
    assert [record["epoch"] for record in records(broken, "validation")] == [1, 2, 3]
    chex.assert_trees_all_equal(last_state(experiment, broken), last_state(experiment, run))

    before = broken.metrics.read_text()
    train(never_better(9, 2), broken.path, resume=True)
    assert broken.metrics.read_text() == before, "and is not begun again"


def test_the_same_seed_replays_a_run_and_another_does_not(finished, tmp_path):
    *_, first = finished
    again = last_state(*train(small_config(), tmp_path / "again"))
    other = last_state(
        *train(small_config(training=TrainingConfig(epochs=2, seed=1)), tmp_path / "other")
    )
    chex.assert_trees_all_equal(first, again)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, other.params)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    trainer = Trainer(build_experiment(small_config()))
    first, second = np.asarray(trainer.order(0)), np.asarray(trainer.order(1))
    assert first.shape == (trainer.steps_per_epoch, 128)
    assert len(np.unique(first)) == first.size
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, trainer.order(0))


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_equals_the_unbroken_run(tmp_path):
    """SIGKILL, wherever it falls, loses only the steps since the last complete checkpoint.

    Of a VAE, which compiles sooner; another test resumes the other method.
    """
    config = small_config(
        inference=InferenceConfig(method="vae"),
        training=TrainingConfig(epochs=4, batch_size=64, learning_rate=1e-3),
    )
    whole, whole_run = train(config, tmp_path / "whole")

    broken = tmp_path / "broken"
    metrics, checkpoints = broken / "metrics.jsonl", broken / "checkpoints"
    every = ("--method", "vae", "--checkpoint-every", "3", "--log-every", "1")
    process = start(*command(broken, *every), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = int(np.random.default_rng(time.time_ns()).integers(4, 50))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        # A checkpoint gets its number for a name when it is complete.
        saved = any(path.name.isdigit() for path in checkpoints.glob("*"))
        if saved and metrics.read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "ended before it was killed"
    assert Checkpoints(checkpoints, read_only=True).steps(), "killed before the first checkpoint"

    resumed = start(
        *command(broken, *every, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    run = RunFolder(broken)
    expected, found = last_state(whole, whole_run), last_state(whole, run)
    chex.assert_trees_all_equal(found.params, expected.params)
    chex.assert_trees_all_equal(found.opt_state, expected.opt_state)
    steps = [record["step"] for record in records(run, "train")]
    assert steps == sorted(set(steps))
    strip = ("elbo", "kl", "step", "best")
    assert [[record[name] for name in strip] for record in records(run, "validation")] == [
        [record[name] for name in strip] for record in records(whole_run, "validation")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_run_can_be_resumed(tmp_path, number):
    """Of a VAE, which compiles sooner; the method does not matter."""
    folder, method = tmp_path / "run", ("--method", "vae")
    process = start(
        *command(folder, *method, "--epochs", "100000", "--log-every", "1"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metrics.exists(), "training never began"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "--resume continues" in err

    steps = Checkpoints(folder / "checkpoints", read_only=True).steps()
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == logged[-1], "the last step done is the one saved"
    epochs = str(steps[-1] // 20 + 1)
    cli.main(command(folder, *method, "--epochs", epochs, "--resume"))
    assert (folder / "results.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path):
    config = small_config(training=TrainingConfig(epochs=50, learning_rate=1e18))
    run = RunFolder(tmp_path / "run")
    run.create(config, overwrite=False)
    experiment = build_experiment(config)
    with pytest.raises(RunFailure, match=r"not finite at step \d+; .*learning-rate"):
        fit(experiment, run, resume=False, options=FitOptions(checkpoint_every=1, log_every=2))
    good = last_state(experiment, run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params))


def test_a_bad_step_changes_nothing_but_its_own_record():
    experiment = build_experiment(small_config(inference=InferenceConfig(method="vae")))
    trainer = Trainer(experiment)
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, experiment.initial_params)
    before = trainer.init()._replace(params=poisoned)
    kept = jax.tree.map(np.array, before)
    after, _ = trainer.step(before, trainer.images, trainer.order(0))
    assert int(after.bad_step) == 0
    chex.assert_trees_all_equal(after._replace(bad_step=kept.bad_step), kept)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, copied):
    """And training goes on from there to where it had been before."""
    experiment, _, whole = finished
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    damage(copied.checkpoints / str(newest))
    like = Trainer(experiment).init()
    restored = Checkpoints(copied.checkpoints).restore_last(like)
    assert restored.step < newest
    assert f"checkpoint {newest} is damaged" in restored.damaged[0]
    assert f"using checkpoint {restored.step} instead" in restored.damaged[0]

    train(small_config(), copied.path, resume=True)
    chex.assert_trees_all_equal(last_state(experiment, copied), whole)


def test_no_readable_checkpoint_is_an_error_of_one_line(finished, copied):
    for step in copied.checkpoints.iterdir():
        damage(step)
    like = Trainer(finished[0]).init()
    with pytest.raises(UserError, match=r"no readable checkpoint.*damaged") as error:
        Checkpoints(copied.checkpoints, read_only=True).restore_best(like)
    assert "\n" not in str(error.value)


def damage(checkpoint):
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_the_best_checkpoint_and_the_last_two_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    best_step, best_bound = None, -np.inf
    for step, bound in enumerate([-9.0, -2.0, -5.0, -4.0, -3.0], start=1):
        if bound > best_bound:
            best_step, best_bound = step, bound
        notes = Notes(float(step), "data", best_step, best_bound)
        checkpoints.save(step, {"w": jnp.full(3, float(step))}, notes)
    checkpoints.close()
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps() == [2, 4, 5]
    like = {"w": jnp.zeros(3)}
    best, last = reader.restore_best(like), reader.restore_last(like)
    assert (best.step, last.step) == (2, 5)
    np.testing.assert_array_equal(best.state["w"], 2.0)
    assert last.notes == Notes(5.0, "data", 2, -2.0)


def test_map_images_counts_every_image_once_whatever_the_batch():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    for batch_size in (1, 3, 7, 100):
        total = map_images(
            lambda scale, image, offset: scale * image.sum() + offset,
            images,
            np.arange(7),
            batch_size=batch_size,
        )
        expected = 2 * images.reshape(7, -1).sum(1) + np.arange(7)
        np.testing.assert_array_equal(total(2), expected)


def test_the_learning_rate_follows_its_schedule():
    grads = {"w": jnp.ones(3)}

    def update_sizes(config, steps):
        optimizer = make_optimizer(config, steps)
        state = optimizer.init(grads)
        sizes = []
        for _ in range(steps):
            update, state = optimizer.update(grads, state, grads)
            sizes.append(-float(update["w"][0]))
        return np.array(sizes)

    constant = update_sizes(TrainingConfig(learning_rate=0.1), 4)
    np.testing.assert_allclose(constant, 0.1, rtol=1e-4)
    warm = update_sizes(TrainingConfig(learning_rate=0.1, warmup_steps=4), 6)
    np.testing.assert_allclose(warm, [0, 0.025, 0.05, 0.075, 0.1, 0.1], atol=1e-6)
    cosine = update_sizes(TrainingConfig(learning_rate=0.1, schedule="cosine"), 10)
    np.testing.assert_allclose(cosine, 0.05 * (1 + np.cos(np.pi * np.arange(10) / 10)), rtol=1e-3)


def test_static_binarisation_gives_the_same_image_each_time_and_dynamic_does_not():
    def first_batch(kind, step):
        experiment = build_experiment(
            small_config(data=DataConfig(preprocess=kind), inference=InferenceConfig(method="vae"))
        )
        key = jax.random.key(step)
        x, _ = experiment.preprocessor.apply(key, experiment.dataset.train[0])
        return np.asarray(x)

    assert set(np.unique(first_batch("static_binary", 0))) <= {0.0, 1.0}
    np.testing.assert_array_equal(first_batch("static_binary", 0), first_batch("static_binary", 1))
    assert not np.array_equal(first_batch("dynamic_binary", 0), first_batch("dynamic_binary", 1))
