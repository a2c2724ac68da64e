"""Training end to end on small real images: it learns, replays, resumes and fails as it says."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from problems import assert_close, flip_a_bit

from vlae_jax import elbo
from vlae_jax.bounds import iwae_bound
from vlae_jax.errors import RunFailure, Unreadable, UserError
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.systems import find_system
from vlae_jax.models.trained import Experiment, build_experiment
from vlae_jax.parallel.mapping import map_images
from vlae_jax.runs.checkpoints import Checkpoints, Notes
from vlae_jax.runs.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
)
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.batches import epoch_order
from vlae_jax.training.loop import FitOptions, fit
from vlae_jax.training.objective import loss_fn, objective
from vlae_jax.training.step import Trainer, TrainState, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = [
    *("--method", "vae", "--steps", "2", "--hidden", "16", "--latent", "3"),
    *("--epochs", "4", "--batch-size", "128", "--learning-rate", "0.01"),
    *("--importance-samples", "8", "--test-images", "16"),
]


def small_config(method="vlae", **sections):
    defaults = {
        "model": ModelConfig(latent=3, hidden=(16,)),
        "inference": InferenceConfig(method=method, steps=2),
        "training": TrainingConfig(epochs=4, learning_rate=1e-2),
        "evaluation": EvaluationConfig(importance_samples=8, test_images=16),
    }
    return Config(**{**defaults, **sections})


@pytest.fixture(scope="module", autouse=True)
def one_trainer_an_experiment():
    """So that a run and those that resume it compile one step."""
    trainers = {}

    def trainer(experiment, placement=None):
        # A trainer keeps its experiment, whose id no other one can get.
        if id(experiment) not in trainers:
            trainers[id(experiment)] = Trainer(experiment)
        return trainers[id(experiment)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlae_jax.training.Trainer", trainer)
        yield trainer


def train(config, folder, *, resume=False):
    """A run, new or resumed, of a new experiment."""
    experiment, run = build_experiment(config), RunFolder(Path(folder))
    if not resume:
        run.create(config, overwrite=False)
    fit(experiment, run, resume=resume, options=FitOptions())
    return experiment, run


def last_state(experiment, run):
    like = Trainer(experiment).init()
    return Checkpoints(run.checkpoints, read_only=True).restore_last(like).state


def records(run, split):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def command(folder, *more):
    """Arguments of a run of `small_config("vae")`."""
    return ["train", "--run-dir", str(folder), *SMALL, *more]


def start(*arguments, **options):
    """The program in a process of its own, which compiles as quickly as this one does."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlae_jax", *arguments],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        text=True,
        **options,
    )


class Finished(NamedTuple):
    """A run to its end, for tests that leave it as it is."""

    experiment: Experiment
    run: RunFolder
    state: TrainState
    """Its last."""


def finish(method, folders):
    experiment, run = train(small_config(method), folders.mktemp(method) / "run")
    return Finished(experiment, run, last_state(experiment, run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compile, one_trainer_an_experiment):
    return finish("vlae", tmp_path_factory)


@pytest.fixture(scope="module")
def finished_vae(tmp_path_factory, quick_compile, one_trainer_an_experiment):
    """It compiles sooner, for what is the same with either method."""
    return finish("vae", tmp_path_factory)


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be changed."""
    return RunFolder(shutil.copytree(finished.run.path, tmp_path / "run"))


def learned(run, state, initial_params, *, gain, method):
    """Every epoch was better than the one before, and every weight has moved."""
    elbos = [record["elbo"] for record in records(run, "validation")]
    assert len(elbos) == 4
    assert elbos == sorted(elbos)
    assert elbos[-1] > elbos[0] + gain
    moved = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), state.params, initial_params)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(moved)}
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    unmoved = {name for name in flat if method == "vlae" and "log_std" in name}
    assert {name for name, has_moved in flat.items() if not has_moved} == unmoved


@pytest.mark.parametrize("method", ["vae", "vlae"])
def test_training_raises_the_validation_elbo(request, method):
    finished = request.getfixturevalue("finished_vae" if method == "vae" else "finished")
    # Training has given the first parameters of its own experiment away.
    initial = build_experiment(finished.experiment.config).initial_params
    learned(finished.run, finished.state, initial, gain=5, method=method)


def test_training_raises_the_validation_elbo_of_a_convolutional_network(tmp_path):
    config = small_config(
        model=ModelConfig(latent=3, hidden=(16,), network="conv", channels=(4, 4))
    )
    experiment, run = train(config, tmp_path / "run")
    initial = build_experiment(config).initial_params
    learned(run, last_state(experiment, run), initial, gain=3, method="vlae")


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
    experiment = build_experiment(small_config("vae"))
    params = experiment.initial_params
    xs = jax.random.normal(jax.random.key(0), (5, experiment.preprocessor.dim))
    keys = jax.random.split(jax.random.key(1), 5)
    loss = jax.jit(lambda xs, keys: loss_fn(params, experiment, xs, keys)[0])
    whole = loss(xs, keys)
    singles = [loss(xs[i : i + 1], keys[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(whole, np.mean(singles), rtol=1e-5)


def test_microbatches_add_up_to_the_gradient_of_the_whole_batch():
    config = small_config("vae")
    moments, losses = [], []
    for count in (None, 1, 8):
        training = dataclasses.replace(config.training, microbatches=count)
        trainer = Trainer(build_experiment(dataclasses.replace(config, training=training)))
        state, loss = trainer.step(trainer.init(), *next(trainer.feed.arguments(0)))
        # Adam's first moment: a tenth of the gradient.
        moments.append(jax.device_get(optax.tree.get(state.opt_state, "mu")))
        losses.append(float(loss))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    for found in moments[1:]:
        chex.assert_trees_all_close(found, moments[0], rtol=1e-4, atol=1e-6)


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


def test_the_same_seed_replays_a_run_and_another_does_not(finished, finished_vae, tmp_path):
    """Of the two methods one each."""
    again = last_state(*train(small_config(), tmp_path / "again"))
    chex.assert_trees_all_equal(finished.state, again)
    seed = TrainingConfig(epochs=4, learning_rate=1e-2, seed=1)
    other = last_state(*train(small_config("vae", training=seed), tmp_path / "other"))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(finished_vae.state.params, other.params)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    config = TrainingConfig(batch_size=128, seed=3)
    first, second = (epoch_order(config, epoch, 1294) for epoch in (0, 1))
    assert first.shape == (10, 128)
    assert len(np.unique(first)) == first.size
    assert first.min() >= 0 and first.max() < 1294
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, epoch_order(config, 0, 1294))


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_equals_the_unbroken_run(finished_vae, tmp_path):
    """SIGKILL, wherever it falls, loses only the steps since the last complete checkpoint.

    Of a VAE; another test resumes the other method.
    """
    broken = RunFolder(tmp_path / "broken")
    options = FitOptions(checkpoint_every=3, log_every=1)
    every = ("--checkpoint-every", "3", "--log-every", "1")
    process = start(
        *command(broken.path, *every), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted = int(np.random.default_rng(time.time_ns()).integers(4, 30))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        # A checkpoint gets its number for a name when it is complete.
        saved = any(path.name.isdigit() for path in broken.checkpoints.glob("*"))
        if saved and broken.metrics.read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "ended before it was killed"
    assert Checkpoints(broken.checkpoints, read_only=True).steps(), "killed before a checkpoint"
    assert broken.read_config() == finished_vae.run.read_config()

    fit(finished_vae.experiment, broken, resume=True, options=options)
    found = last_state(finished_vae.experiment, broken)
    chex.assert_trees_all_equal(found.params, finished_vae.state.params)
    chex.assert_trees_all_equal(found.opt_state, finished_vae.state.opt_state)
    steps = [record["step"] for record in records(broken, "train")]
    assert steps == sorted(set(steps))
    strip = ("elbo", "kl", "step", "best")
    assert [[record[name] for name in strip] for record in records(broken, "validation")] == [
        [record[name] for name in strip] for record in records(finished_vae.run, "validation")
    ]


@contextlib.contextmanager
def signalled(number, metrics):
    """Send this process a signal once the run inside has logged a line more."""

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def refuse(*_):
        raise AssertionError("the run does not handle the signal")

    before, is_over = lines(), threading.Event()

    def send():
        while lines() <= before:
            if is_over.wait(0.01):
                return
        os.kill(os.getpid(), number)

    previous = signal.signal(number, refuse)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        is_over.set()
        sender.join()
        signal.signal(number, previous)


@pytest.mark.slow
def test_a_signal_saves_and_leaves_and_the_run_can_be_resumed(tmp_path, monkeypatch, capsys):
    """Stopped by SIGINT, resumed, stopped by SIGTERM, and resumed to its end; of a VAE."""
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr("vlae_jax.experiment.build_experiment", functools.cache(build_experiment))
    evaluated = []
    monkeypatch.setattr(cli, "_evaluate_and_report", lambda _, run, *__: evaluated.append(run.path))
    for number, resume in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        long = command(run.path, "--epochs", "100000", "--log-every", "1", *resume)
        with signalled(number, run.metrics), pytest.raises(SystemExit) as stopped:
            cli.main(long)
        err = capsys.readouterr().err
        assert stopped.value.code == 128 + number, err
        assert "Traceback" not in err
        assert f"stopped by {number.name}" in err and "--resume continues" in err
        steps = Checkpoints(run.checkpoints, read_only=True).steps()
        logged = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
        assert steps[-1] == logged[-1], "the last step done is the one saved"

    epochs = int(records(run, "train")[-1]["epoch"]) + 1
    cli.main(command(run.path, "--epochs", str(epochs), "--resume"))
    assert records(run, "validation")[-1]["epoch"] == epochs
    assert evaluated == [run.path]


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path):
    config = small_config(training=TrainingConfig(epochs=50, learning_rate=1e18))
    run = RunFolder(tmp_path / "run")
    run.create(config, overwrite=False)
    experiment = build_experiment(config)
    with pytest.raises(RunFailure, match=r"not finite at step \d+; .*learning-rate"):
        fit(experiment, run, resume=False, options=FitOptions(checkpoint_every=1, log_every=2))
    good = last_state(experiment, run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params))


def test_a_bad_step_changes_nothing_but_its_own_record(finished_vae, one_trainer_an_experiment):
    trainer = one_trainer_an_experiment(finished_vae.experiment)
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, finished_vae.state.params)
    before = trainer.init()._replace(params=poisoned)
    kept = jax.tree.map(np.array, before)
    after, _ = trainer.step(before, *next(trainer.feed.arguments(0)))
    assert int(after.bad_step) == 0
    chex.assert_trees_all_equal(after._replace(bad_step=kept.bad_step), kept)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, copied):
    """And training goes on from there to where it had been before."""
    experiment = finished.experiment
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    damage(copied.checkpoints / str(newest))
    like = Trainer(experiment).init()
    restored = Checkpoints(copied.checkpoints).restore_last(like)
    assert restored.step < newest
    assert f"checkpoint {newest} is damaged" in restored.damaged[0]
    assert f"using checkpoint {restored.step} instead" in restored.damaged[0]

    fit(experiment, copied, resume=True, options=FitOptions())
    chex.assert_trees_all_equal(last_state(experiment, copied), finished.state)


@pytest.mark.parametrize("seed", range(12))
def test_one_changed_bit_is_noticed(finished, copied, seed):
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    changed = flip_a_bit(copied.checkpoints / str(newest), np.random.default_rng(seed))
    checkpoints = Checkpoints(copied.checkpoints)
    restored = checkpoints.restore_last(Trainer(finished.experiment).init())
    assert restored.step < newest, changed
    assert f"checkpoint {newest} is damaged" in restored.damaged[0]
    # Out of the way of the run that goes on, but not lost.
    assert newest not in checkpoints.steps()
    assert (copied.checkpoints / f"damaged-{newest}").is_dir()


def test_what_cannot_be_read_for_now_is_not_taken_for_damaged(finished, copied, monkeypatch):
    monkeypatch.setattr("vlae_jax.checkpoints._PAUSES", (0.0, 0.0))
    checkpoints, like = Checkpoints(copied.checkpoints), Trainer(finished.experiment).init()
    steps, read, failures = checkpoints.steps(), checkpoints._manager.restore, [2]

    def restore(*arguments, **more):
        failures[0] -= 1
        if failures[0] >= 0:
            raise ConnectionResetError("Connection reset by peer")
        return read(*arguments, **more)

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    restored = checkpoints.restore_last(like)
    assert restored.step == max(steps) and not restored.damaged
    failures[0] = 1000
    with pytest.raises(Unreadable, match=r"undamaged but cannot be read: Connection reset.*again"):
        checkpoints.restore_last(like)
    assert checkpoints.steps() == steps


def test_half_a_checkpoint_is_none(finished, copied):
    """What a process leaves that is killed in the middle of a save."""
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    half = copied.checkpoints / f"{newest}.orbax-checkpoint-tmp"
    (copied.checkpoints / str(newest)).rename(half)
    (half / "sha256.json").unlink()
    shutil.rmtree(half / "notes")
    fit(finished.experiment, copied, resume=True, options=FitOptions())
    chex.assert_trees_all_equal(last_state(finished.experiment, copied), finished.state)
    assert not half.exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "config.json.partial").write_text("{")
    run.create(finished.experiment.config, overwrite=False)
    run.metrics.write_text('{"split": "train", "step": 2, "elbo": 0.0}\n{"split": "tr')
    fit(finished.experiment, run, resume=True, options=FitOptions())
    chex.assert_trees_all_equal(last_state(finished.experiment, run), finished.state)
    steps = [record["step"] for record in records(run, "train")]
    assert steps == [record["step"] for record in records(finished.run, "train")]


def test_training_never_sees_a_test_image(finished, tmp_path):
    blind = finished.experiment.dataset._replace(test=None)
    run = RunFolder(tmp_path / "run")
    run.create(finished.experiment.config, overwrite=False)
    experiment = finished.experiment._replace(dataset=blind)
    fit(experiment, run, resume=False, options=FitOptions())
    chex.assert_trees_all_equal(last_state(experiment, run), finished.state)


def test_no_readable_checkpoint_is_an_error_of_one_line(finished, copied):
    for step in copied.checkpoints.iterdir():
        damage(step)
    like = Trainer(finished.experiment).init()
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
        experiment = build_experiment(small_config("vae", data=DataConfig(preprocess=kind)))
        key = jax.random.key(step)
        x, _ = experiment.preprocessor.apply(key, experiment.dataset.train[0])
        return np.asarray(x)

    assert set(np.unique(first_batch("static_binary", 0))) <= {0.0, 1.0}
    np.testing.assert_array_equal(first_batch("static_binary", 0), first_batch("static_binary", 1))
    assert not np.array_equal(first_batch("dynamic_binary", 0), first_batch("dynamic_binary", 1))
