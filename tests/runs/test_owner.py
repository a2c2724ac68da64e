"""A run folder has one owner: other processes are refused, and a dead one holds nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from builders import records, tiny_config, tiny_images, tiny_mapping
from commandline import refused, run

from vlae_jax.errors import UserError
from vlae_jax.runs.folder import RunFolder

HOLDS = """
import sys, time
from pathlib import Path
from vlae_jax.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).owned():
    print("mine", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(folder):
    """Another process owns the folder; it is killed in the end."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "mine\n"
        yield
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_another_process_is_refused_until_the_first_has_died(tmp_path, capsys):
    """By every command that writes there, also with --overwrite; nothing there is touched."""
    run = RunFolder(tmp_path / "run")
    run.create(tiny_config(), overwrite=False)
    np.savez(run.path / "kept.npz", one=1)
    before = sorted(run.path.iterdir())
    with held(run.path):
        for command in (
            ("train", "--run-dir", run.path, "--overwrite"),
            ("evaluate", run.path),
            ("gap", run.path),
        ):
            assert "another process works in" in refused(capsys, *command)
        with pytest.raises(UserError, match="another process works in"), run.owned():
            pass
    assert sorted(path for path in run.path.iterdir() if path.name != ".lock") == before
    with run.owned(), run.owned():  # a command holds it while `fit` does
        run.create(tiny_config(), overwrite=True)
    assert not (run.path / "kept.npz").exists()


def test_a_folder_that_nothing_came_of_is_taken_away(tmp_path):
    run = RunFolder(tmp_path / "runs" / "new")
    with pytest.raises(ZeroDivisionError), run.owned():
        raise ZeroDivisionError
    assert not run.path.exists()
    with run.owned():
        run.create(tiny_config(), overwrite=False)
    assert run.exists()


def test_fit_owns_its_folder(tmp_path):
    from vlae_jax import fit

    with held(tmp_path / "run"), pytest.raises(UserError, match="another process works in"):
        fit(tiny_config(epochs=0), tiny_mapping(), run_dir=tmp_path / "run")


@contextlib.contextmanager
def at_work(folder, *command):
    """The command in a process of its own, halted once it owns the folder; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlae_jax", *map(str, command)],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline, owned = time.monotonic() + 300, False
    try:
        while not owned:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
            try:
                with RunFolder(folder).owned() if folder.exists() else contextlib.nullcontext():
                    pass
            except UserError:
                owned = True
        process.send_signal(signal.SIGSTOP)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_real_processes_own_a_run_folder_and_leave_it_when_they_are_killed(
    tmp_path, capsys, quick_compile
):
    """Two trainings; training and evaluation; two evaluations; each the other way round too."""
    folder = tmp_path / "run"
    np.savez(tmp_path / "mine.npz", x_train=tiny_images(0, 40), x_test=tiny_images(1, 8))
    train = (
        *("train", "--data-dir", tmp_path / "mine.npz", "--run-dir", folder, "--method", "vae"),
        *("--hidden", "8", "--latent", "2", "--batch-size", "8", "--epochs", "1"),
        *("--importance-samples", "4", "--proposal", "posterior"),
    )
    run(*train)
    capsys.readouterr()
    logged = records(RunFolder(folder))
    commands = {"train": (*train, "--resume"), "evaluate": ("evaluate", folder)}
    for first in commands.values():
        with at_work(folder, *first):
            for second in commands.values():
                assert "another process works in" in refused(capsys, *second)
        assert records(RunFolder(folder)) == logged
    run("evaluate", folder, "--importance-samples", "5")  # the killed ones hold nothing
