"""Training end to end on small real images: learning, reproducibility, resumption and failures."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    Linear,
    digits,
    last_state,
    like,
    linear_config,
    records,
    small_config,
    tiny_config,
    tiny_images,
    tiny_mapping,
    untrained,
)
from problems import assert_close, flip_a_bit

from vlae_jax.commands.main import main
from vlae_jax.data.supplied import as_dataset
from vlae_jax.errors import RunFailure, Unreadable, UserError
from vlae_jax.models.trained import Trained
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints
from vlae_jax.runs.config import ModelConfig
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.loop import FitOptions, fit
from vlae_jax.training.step import Trainer, TrainState

pytestmark = pytest.mark.usefixtures("make_trainer")

SMALL = [
    *("--method", "vae", "--steps", "2", "--hidden", "16", "--latent", "3"),
    *("--epochs", "4", "--batch-size", "128", "--learning-rate", "0.01"),
    *("--importance-samples", "8", "--proposal", "posterior", "--test-images", "16"),
]
TINY = as_dataset(tiny_mapping(), tiny_config().data)


class Finished(NamedTuple):
    """A finished run, for tests that do not change it."""

    trainer: Trainer
    run: RunFolder
    trained: Trained
    """What `fit` returned."""
    state: TrainState
    """Its last."""


def finish(make_trainer, config, data, folder, **more):
    trained = fit(config, data, run_dir=folder, **more)
    # As it is named in a run.
    dataset = digits() if data is digits() else as_dataset(data, config.data)
    named = dataclasses.replace(config.data, dataset=dataset.name)
    config = dataclasses.replace(config, data=named)
    trainer, run = make_trainer(untrained(config, dataset), dataset), RunFolder(folder)
    return Finished(trainer, run, trained, last_state(trainer, run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_trainer):
    """A VLAE of the digits."""
    return finish(make_trainer, small_config(), digits(), tmp_path_factory.mktemp("vlae") / "run")


@pytest.fixture(scope="module")
def finished_vae(tmp_path_factory, make_trainer):
    """A VAE of the digits, which compiles faster, for tests that need no VLAE."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    return finish(make_trainer, small_config("vae"), digits(), folder)


@pytest.fixture
def copied(finished_vae, tmp_path):
    """The run of a VAE, to be changed."""
    return RunFolder(shutil.copytree(finished_vae.run.path, tmp_path / "run"))


def resume(finished, run, **options):
    """Go on with a run as `fit` does; its last state."""
    config = finished.trainer.trained.config
    fit(config, digits(), run_dir=run.path, resume=True, options=FitOptions(**options))
    return last_state(finished.trainer, run)


# ---------------------------------------------------------------- it learns


def learned(finished, *, gain, method):
    """Assert that every epoch was better than the one before, and that every weight has moved."""
    elbos = [record["elbo"] for record in records(finished.run, "validation")]
    assert len(elbos) == 4
    assert elbos == sorted(elbos)
    assert elbos[-1] > elbos[0] + gain
    initial = finished.trainer.trained.params
    moved = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), finished.state.params, initial)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(moved)}
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    unmoved = {name for name in flat if method == "vlae" and "log_std" in name}
    assert {name for name, has_moved in flat.items() if not has_moved} == unmoved


@pytest.mark.parametrize("method", ["vae", "vlae"])
def test_training_raises_the_validation_elbo(request, method):
    finished = request.getfixturevalue("finished_vae" if method == "vae" else "finished")
    learned(finished, gain=5, method=method)


@pytest.mark.slow
def test_training_raises_the_validation_elbo_of_a_convolutional_network(make_trainer, tmp_path):
    model = ModelConfig(latent=3, hidden=(16,), network="conv", channels=(4, 4))
    found = finish(make_trainer, small_config(model=model), digits(), tmp_path / "run")
    learned(found, gain=3, method="vlae")


def test_what_is_validated_are_the_validation_images(tmp_path):
    """The ELBO of probabilistic PCA is log p(x), which scipy gives for each validation image."""
    trained = fit(linear_config("ppca"), digits(), run_dir=tmp_path / "run")
    (record,) = records(RunFolder(tmp_path / "run"), "validation")
    truth = Linear(trained, digits().validation).log_prob().mean()
    assert abs(record["elbo"] - truth) < 1e-4 * abs(truth)
    assert abs(Linear(trained, digits().train).log_prob().mean() - truth) > 1e-2 * abs(truth)


def test_a_log_line_is_the_mean_of_the_steps_since_the_last_one(tmp_path):
    """Every third step and at the end of an epoch, of four."""
    logged = {}
    for every in (1, 3):
        run = RunFolder(tmp_path / str(every))
        fit(tiny_config(), TINY, run_dir=run.path, options=FitOptions(log_every=every))
        logged[every] = {record["step"]: record for record in records(run, "train")}
    assert list(logged[1]) == list(range(1, 9)) and list(logged[3]) == [3, 4, 6, 8]
    for before, step in itertools.pairwise([0, *logged[3]]):
        for name in ("elbo", "kl", "reconstruction"):
            singles = [logged[1][single][name] for single in range(before + 1, step + 1)]
            assert_close(np.float32(logged[3][step][name]), np.float32(np.mean(singles)))


@pytest.mark.parametrize(("objective", "best"), [("elbo", 3), ("iwae", 1)])
def test_the_best_checkpoint_is_that_of_the_bound_that_is_trained(
    objective, best, tmp_path, monkeypatch
):
    """Where the two bounds rank three epochs in opposite orders."""
    bounds = iter([(-30.0, -10.0), (-29.0, -11.0), (-28.0, -12.0)])

    def validate(self, params):
        found = dict(zip(("elbo", "objective"), next(bounds), strict=True))
        if objective == "elbo":
            del found["objective"]
        return {**found, "kl": 1.0, "reconstruction": 1.0}

    monkeypatch.setattr(Trainer, "validate", validate)
    config = tiny_config(objective=objective, train_samples=2, epochs=3)
    trained = fit(config, TINY, run_dir=tmp_path / "run")
    assert trained.provenance.step == 4 * best and trained.provenance.epoch == best
    expected = {"elbo": [True, True, True], "iwae": [True, False, False]}[objective]
    run = RunFolder(tmp_path / "run")
    assert [record["best"] for record in records(run, "validation")] == expected
    assert run.best_step() == 4 * best


def never_better(epochs, patience):
    """Steps too small to change a weight: the first epoch's validation bound stays the best."""
    return tiny_config(epochs=epochs, learning_rate=1e-30, patience=patience)


def test_patience_ends_a_run_so_many_epochs_after_the_best(make_trainer, tmp_path, capsys):
    """And a run that was broken off in between ends at the same place in the same state."""
    whole = finish(make_trainer, never_better(9, 2), TINY, tmp_path / "whole")
    validations = records(whole.run, "validation")
    assert [record["epoch"] for record in validations] == [1, 2, 3]
    assert [record["best"] for record in validations] == [True, False, False]
    assert "stopped: no better validation bound in 2 epochs" in capsys.readouterr().err

    folder = tmp_path / "broken"
    broken = finish(make_trainer, never_better(2, 2), TINY, folder)
    assert "stopped" not in capsys.readouterr().err
    broken = finish(make_trainer, never_better(9, 2), TINY, folder, resume=True)
    assert [record["epoch"] for record in records(broken.run, "validation")] == [1, 2, 3]
    chex.assert_trees_all_equal(broken.state, whole.state)

    before = broken.run.metrics.read_text()
    fit(never_better(9, 2), TINY, run_dir=folder, resume=True)
    assert broken.run.metrics.read_text() == before, "and is not begun again"


# ---------------------------------------------------------------- from Python


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, make_trainer):
    """A run of a few random images, from a mapping of arrays."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return finish(make_trainer, tiny_config(), tiny_mapping(), folder)


@pytest.mark.slow
@pytest.mark.parametrize("modes", ["encoder", "stored"])
def test_a_run_begins_as_a_vae_and_goes_on_as_the_system(make_trainer, tmp_path, modes):
    """The first epochs are those of a VAE, to the bit; broken off in either phase, the run is the
    unbroken one, also from the checkpoint between the two.
    """
    config = tiny_config("vlae", epochs=3, pretrain=2, modes=modes)
    whole = finish(make_trainer, config, tiny_mapping(), tmp_path / "whole")
    plain = finish(make_trainer, tiny_config(epochs=2), tiny_mapping(), tmp_path / "plain")
    logged, beside = (records(found.run, "validation") for found in (whole, plain))
    assert ["converged" in record for record in logged] == [False, False, True]
    assert (whole.state.modes is not None) == (modes == "stored")
    for name in ("step", "elbo", "kl"):
        assert [r[name] for r in logged[:2]] == [r[name] for r in beside]
    assert (
        Checkpoints(whole.run.checkpoints)
        .restore_best(lambda _: {"model": like(whole.trainer)["model"]})
        .step
        == logged[-1]["step"]
    )

    def resumed(run):
        again = finish(make_trainer, config, tiny_mapping(), run, resume=True)
        chex.assert_trees_all_equal(again.state, whole.state)

    stopped = dataclasses.replace(
        config, training=dataclasses.replace(config.training, minutes=1e-9)
    )
    fit(stopped, tiny_mapping(), run_dir=tmp_path / "first")
    assert len(records(RunFolder(tmp_path / "first"), "validation")) == 1
    resumed(tmp_path / "first")
    change = logged[1]["step"]
    run = RunFolder(shutil.copytree(whole.run.path, tmp_path / "between"))
    kept = Checkpoints(run.checkpoints, read_only=True).steps()
    assert change in kept
    for step in kept:
        if step > change:
            shutil.rmtree(run.checkpoints / str(step))
    resumed(run.path)


@pytest.mark.slow
def test_patience_rests_while_a_run_is_pretrained(tmp_path):
    """Nothing gets better after the first epoch of either phase, which starts anew."""
    config = tiny_config("vlae", epochs=4, pretrain=3, patience=1, learning_rate=1e-30)
    fit(config, tiny_mapping(), run_dir=tmp_path / "run")
    logged = records(RunFolder(tmp_path / "run"), "validation")
    assert [record["epoch"] for record in logged] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another_and_is_resumed_without_it(
    make_trainer, tiny, tmp_path
):
    source = shutil.copytree(tiny.run.path, tmp_path / "source")
    config = tiny_config("vlae", epochs=2, modes="stored", init_from=str(source))
    begun = fit(
        dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=0)),
        tiny_mapping(),
    )
    chex.assert_trees_all_equal(begun.params, tiny.trained.params)
    whole = finish(make_trainer, config, tiny_mapping(), tmp_path / "whole")
    half = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=1))
    fit(half, tiny_mapping(), run_dir=tmp_path / "half")
    shutil.rmtree(source)
    again = finish(make_trainer, config, tiny_mapping(), tmp_path / "half", resume=True)
    chex.assert_trees_all_equal(again.state, whole.state)
    with pytest.raises(UserError, match="source"):
        fit(config, tiny_mapping(), run_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_fit_takes_arrays_a_mapping_and_a_data_set_and_needs_no_folder(tiny, tmp_path, monkeypatch):
    """The test images, which arrays alone do not have, change nothing; and no folder is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrays = tiny_mapping()
    for data in (arrays, arrays["x_train"], arrays["x_train"][..., 0], TINY):
        found = fit(tiny_config(), data)
        chex.assert_trees_all_equal(found.params, tiny.trained.params)
        chex.assert_trees_all_equal(found.preprocessor, tiny.trained.preprocessor)
        assert found.provenance.step == tiny.trained.provenance.step > 0
        assert found.config.data.dataset == found.provenance.dataset == "arrays"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["digits", None])
def test_fit_takes_the_name_of_a_data_set_or_that_of_the_configuration(name):
    config = linear_config("ppca")
    if name:
        other = dataclasses.replace(config.data, dataset="mnist")
        config = dataclasses.replace(config, data=other)
    found = fit(config, name)
    assert found.config.data.dataset == found.provenance.dataset == "digits"
    assert found.provenance.fingerprint == digits().fingerprint


def test_levels_are_those_that_are_given():
    arrays = {"x_train": tiny_images(0, 40) % 5, "levels": 5}
    config = dataclasses.replace(tiny_config(epochs=0), data=linear_config().data)
    found = fit(config, arrays)
    assert found.provenance.levels == 5
    x, _ = found.preprocessor.apply(jax.random.key(0), np.full((4, 3, 1), 4, np.uint8))
    assert_close(x + found.preprocessor.mean, np.ones(12))


def test_a_run_of_arrays_is_resumed_in_python(make_trainer, tiny, tmp_path):
    """After one epoch of two, to the state of the unbroken run; not on other images."""
    folder = tmp_path / "run"
    fit(tiny_config(epochs=1), tiny_mapping(), run_dir=folder)
    others = {**tiny_mapping(), "x_train": tiny_images(7, 40)}
    with pytest.raises(UserError, match="not those the run was started with"):
        fit(tiny_config(), others, run_dir=folder, resume=True)
    again = finish(make_trainer, tiny_config(), tiny_mapping(), folder, resume=True)
    chex.assert_trees_all_equal(again.state, tiny.state)
    chex.assert_trees_all_equal(again.trained.params, tiny.trained.params)


GOOD = tiny_images(0, 40)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (GOOD.astype(np.int64), {}, "uint8"),
        (GOOD[None], {}, "shape|height"),
        (GOOD[:0], {}, "no images|at least"),
        (GOOD[:1], {}, "one or more|at least"),
        (GOOD[:8], {}, "batch_size 8 is larger than the training set"),
        ({"x_test": GOOD}, {}, "must hold 'x_train'"),
        ({"x_train": GOOD, "labels": GOOD}, {}, "holds 'x_train', 'labels'"),
        ({"x_train": GOOD, "x_test": GOOD[:, :2]}, {}, "shape"),
        ({"x_train": GOOD, "levels": 17}, {}, "below levels=17"),
        ("digitz", {}, "unknown data set 'digitz'"),
        (GOOD, {"resume": True}, "needs the run_dir"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(data, options, message):
    with pytest.raises(UserError, match=message) as error:
        fit(tiny_config(), data, **options)
    assert "\n" not in str(error.value)


def test_fit_runs_outside_the_main_thread(tiny):
    """Where Python allows no signal handlers."""
    found, before = [], signal.getsignal(signal.SIGINT)

    def run():
        try:
            found.append(fit(tiny_config(), TINY))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert isinstance(found[0], Trained), found[0]
    chex.assert_trees_all_equal(found[0].params, tiny.trained.params)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_handled_as_before_once_training_is_over(tmp_path):
    handled = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(tiny_config(), TINY)
    with pytest.raises(RunFailure):
        fit(tiny_config(learning_rate=1e30, epochs=9), TINY)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handled


# ---------------------------------------------------------------- it replays and resumes


def test_the_same_seed_replays_a_run(make_trainer, finished, tmp_path):
    again = finish(make_trainer, small_config(), digits(), tmp_path / "again")
    chex.assert_trees_all_equal(again.state, finished.state)
    assert records(again.run) == records(finished.run)


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


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_equals_the_unbroken_run(finished_vae, tmp_path):
    """SIGKILL, wherever it falls, loses only the steps since the last complete checkpoint.

    Of a VAE; another test resumes the other method.
    """
    broken = RunFolder(tmp_path / "broken")
    every = ("--checkpoint-every", "3", "--log-every", "1")
    process = start(
        *command(broken.path, *every), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seed = time.time_ns()
    print(f"killed as seed {seed} has it")
    wanted = int(np.random.default_rng(seed).integers(4, 30))
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

    found = resume(finished_vae, broken, checkpoint_every=3, log_every=1)
    chex.assert_trees_all_equal(found.params, finished_vae.state.params)
    chex.assert_trees_all_equal(found.opt_state, finished_vae.state.opt_state)
    steps = [record["step"] for record in records(broken, "train")]
    assert steps == sorted(set(steps))
    assert records(broken, "validation") == records(finished_vae.run, "validation")


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
    evaluated = []
    monkeypatch.setattr(
        "vlae_jax.commands.train._evaluate_and_report",
        lambda trained, images, run, placement: evaluated.append(run.path),
    )
    for number, resume in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        long = command(run.path, "--epochs", "100000", "--log-every", "1", *resume)
        with signalled(number, run.metrics), pytest.raises(SystemExit) as stopped:
            main(long)
        err = capsys.readouterr().err
        assert stopped.value.code == 128 + number, err
        assert "Traceback" not in err
        assert f"stopped by {number.name}" in err and "--resume continues" in err
        steps = Checkpoints(run.checkpoints, read_only=True).steps()
        logged = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
        assert steps[-1] == logged[-1], "the last step done is the one saved"

    epochs = int(records(run, "train")[-1]["epoch"]) + 1
    main(command(run.path, "--epochs", str(epochs), "--resume"))
    assert records(run, "validation")[-1]["epoch"] == epochs
    assert evaluated == [run.path]


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(
    make_trainer, tmp_path
):
    config, run = tiny_config(epochs=50, learning_rate=1e18), RunFolder(tmp_path / "run")
    options = FitOptions(checkpoint_every=1, log_every=2)
    with pytest.raises(RunFailure, match=r"not finite at step \d+; .*learning-rate"):
        fit(config, TINY, run_dir=run.path, options=options)
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset="arrays"))
    good = last_state(make_trainer(untrained(named, TINY), TINY), run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.params))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path):
    """And training goes on from there to where it had been before; of a VLAE."""
    copied = RunFolder(shutil.copytree(finished.run.path, tmp_path / "run"))
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    damage(copied.checkpoints / str(newest))
    wanted = like(finished.trainer)
    restored = Checkpoints(copied.checkpoints).restore_last(lambda _: wanted)
    assert restored.step < newest
    assert f"checkpoint {newest} is damaged" in restored.damaged[0]
    assert f"using checkpoint {restored.step} instead" in restored.damaged[0]
    chex.assert_trees_all_equal(resume(finished, copied), finished.state)


@pytest.fixture(scope="module")
def wanted(finished_vae):
    """What to restore of its checkpoints."""
    return like(finished_vae.trainer)


@pytest.mark.parametrize("seed", range(12))
def test_one_changed_bit_is_noticed(wanted, copied, seed):
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    changed = flip_a_bit(copied.checkpoints / str(newest), np.random.default_rng(seed))
    checkpoints = Checkpoints(copied.checkpoints)
    restored = checkpoints.restore_last(lambda _: wanted)
    assert restored.step < newest, changed
    assert f"checkpoint {newest} is damaged" in restored.damaged[0]
    # Out of the way of the run that goes on, but not lost.
    assert newest not in checkpoints.steps()
    assert (copied.checkpoints / f"damaged-{newest}").is_dir()


def test_what_cannot_be_read_for_now_is_not_taken_for_damaged(wanted, copied, monkeypatch):
    monkeypatch.setattr("vlae_jax.runs.checkpoints._PAUSES", (0.0, 0.0))
    checkpoints = Checkpoints(copied.checkpoints)
    steps, read, failures = checkpoints.steps(), checkpoints._manager.restore, [2]

    def restore(*arguments, **more):
        failures[0] -= 1
        if failures[0] >= 0:
            raise ConnectionResetError("Connection reset by peer")
        return read(*arguments, **more)

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    restored = checkpoints.restore_last(lambda _: wanted)
    assert restored.step == max(steps) and not restored.damaged
    failures[0] = 1000
    with pytest.raises(Unreadable, match=r"undamaged but cannot be read: Connection reset.*again"):
        checkpoints.restore_last(lambda _: wanted)
    assert checkpoints.steps() == steps


def test_half_a_checkpoint_is_none(finished_vae, copied):
    """A process killed in the middle of a save leaves an incomplete checkpoint, to be ignored."""
    newest = max(Checkpoints(copied.checkpoints, read_only=True).steps())
    half = copied.checkpoints / f"{newest}.orbax-checkpoint-tmp"
    (copied.checkpoints / str(newest)).rename(half)
    (half / "sha256.json").unlink()
    shutil.rmtree(half / "info")
    chex.assert_trees_all_equal(resume(finished_vae, copied), finished_vae.state)
    assert not half.exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished_vae, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "config.json.partial").write_text("{")
    run.create(finished_vae.trainer.trained.config, overwrite=False)
    run.metrics.write_text('{"split": "train", "step": 2, "elbo": 0.0}\n{"split": "tr')
    chex.assert_trees_all_equal(resume(finished_vae, run), finished_vae.state)
    assert records(run) == records(finished_vae.run)


def test_training_never_sees_a_test_image(make_trainer, tiny, tmp_path):
    """Other test images lead to the same state and the same preprocessing."""
    others = {**tiny_mapping(), "x_test": tiny_images(5, 9)}
    found = finish(make_trainer, tiny_config(), others, tmp_path / "run")
    assert found.trainer is not tiny.trainer
    chex.assert_trees_all_equal(found.state, tiny.state)
    chex.assert_trees_all_equal(found.trained.preprocessor, tiny.trained.preprocessor)
    assert found.trained.provenance.fingerprint != tiny.trained.provenance.fingerprint


def test_no_readable_checkpoint_is_an_error_of_one_line(wanted, copied):
    for step in copied.checkpoints.iterdir():
        damage(step)
    with pytest.raises(UserError, match=r"no readable checkpoint.*damaged") as error:
        Checkpoints(copied.checkpoints, read_only=True).restore_best(lambda _: wanted)
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
        info = CheckpointInfo(float(step), step / 2, best_step, best_bound, {"name": "data"})
        checkpoints.save(step, {"model": {"w": jnp.full(3, float(step))}}, info)
    checkpoints.close()
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps() == [2, 4, 5]
    best, last = (
        restore(lambda _: {"model": {"w": jnp.zeros(3)}})
        for restore in (reader.restore_best, reader.restore_last)
    )
    assert (best.step, last.step) == (2, 5)
    np.testing.assert_array_equal(best.trees["model"]["w"], 2.0)
    assert last.info == CheckpointInfo(5.0, 2.5, 2, -2.0, {"name": "data"})
