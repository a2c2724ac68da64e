"""What lacks in the machine is one line and an exit code: disk, folder, memory, device, output."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from builders import tiny_config, tiny_images
from commandline import refused

from vlae_jax import fit
from vlae_jax.commands import main as program
from vlae_jax.data.supplied import as_dataset
from vlae_jax.errors import UserError
from vlae_jax.models.initial import initialize
from vlae_jax.models.saved import save
from vlae_jax.parallel import placement
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.loop import FitOptions

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, quick_compile):
    """An untrained model in a run folder, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    config = tiny_config().for_data(pixels=True)
    save(initialize(config, as_dataset(tiny_images(0, 40), config.data)), folder)
    return folder


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own in a folder."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB with 60 kB left."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as folder:
        free = shutil.disk_usage(folder).free
        (folder / "filling").write_bytes(bytes(free - 60_000))
        yield folder


@pytest.fixture
def read_only(saved, tmp_path):
    with mounted(tmp_path / "mounted", "--bind", "-o", "ro", str(saved)) as folder:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield folder


def test_a_disk_too_full_for_a_checkpoint_is_noticed_before_it_is_written(small_disk):
    with pytest.raises(UserError, match="no space left for a checkpoint"):
        fit(tiny_config(), tiny_images(0, 40), run_dir=small_disk / "run")
    assert not [*(small_disk / "run" / "checkpoints").iterdir()]


SAVES = """
import sys
from pathlib import Path
import jax.numpy as jnp
import vlae_jax_command as program
from vlae_jax.commands import main
from vlae_jax.runs import checkpoints
checkpoints._ROOM = checkpoints._ROOM_BESIDE = 0
class Saving:
    def run(self):
        saved = checkpoints.Checkpoints(Path(sys.argv[1]))
        arrays = {f"array {number}": jnp.ones(100) for number in range(50)}
        try:
            saved.save(1, {"model": arrays}, checkpoints.CheckpointInfo(0, 0, None, 0, {}))
        finally:
            saved.close()
main.parse = lambda argv: Saving()
program.main()
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_line(small_disk):
    """Many threads of the storage layer fail then, each with a traceback."""
    (small_disk / "checkpoints").mkdir()
    with (small_disk / "filling").open("ab") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 20_000))
    finished = subprocess.run(
        [sys.executable, "-c", SAVES, small_disk / "checkpoints"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("vlae_jax: error: ") and "No space left on device" in line
    assert not [*(small_disk / "checkpoints").iterdir()], "half a checkpoint"


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "sample", "impute", "score"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    read_only, capsys, monkeypatch, verb
):
    monkeypatch.setattr("vlae_jax.commands.uses._Use.load", lambda self: pytest.fail("has begun"))
    more = ("--missing", "0.5") if verb == "impute" else ()
    assert "cannot be written; choose --output" in refused(capsys, verb, read_only, *more)


@pytest.mark.parametrize("verb", ["evaluate", "gap", "train"])
def test_a_run_folder_that_cannot_be_written_is_refused(read_only, capsys, monkeypatch, verb):
    monkeypatch.setattr("vlae_jax.models.saved.load", lambda *_: pytest.fail("has begun"))
    at = ("--run-dir", read_only, "--overwrite") if verb == "train" else (read_only,)
    assert "cannot be written: Read-only file system" in refused(capsys, verb, *at)


def test_what_is_on_a_read_only_disk_can_be_used_with_an_output_elsewhere(read_only, tmp_path):
    from commandline import run

    run("sample", read_only, "--output", tmp_path / "samples.npz", "--count", "3")
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["z"].shape == (3, 2)


def test_a_run_whose_folder_is_removed_ends_and_makes_no_other(tmp_path):
    run, is_over = RunFolder(tmp_path / "run"), threading.Event()

    def remove():
        while not run.metrics.exists() and not is_over.wait(0.01):
            pass
        while run.path.exists() and not is_over.is_set():
            shutil.rmtree(run.path, ignore_errors=True)
            time.sleep(0.01)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        with pytest.raises(UserError, match=r"was removed|cannot be written: No such file"):
            fit(
                tiny_config(epochs=3000),
                tiny_images(0, 40),
                run_dir=run.path,
                options=FitOptions(log_every=1, checkpoint_every=1),
            )
    finally:
        is_over.set()
        remover.join()
    assert not run.exists()


def test_a_run_whose_config_is_gone_is_not_saved_any_more(tmp_path):
    """As where the folder was removed between two lines of the log, and made again by a save."""
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="was removed or emptied while the run was going on"):
        run.require_there()
    run.create(tiny_config(), overwrite=False)
    run.require_there()


def test_memory_is_that_of_the_machine_or_its_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(placement, "_CGROUP_LIMITS", (limit, tmp_path / "none"))
    (device,) = jax.devices()[:1]
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert total <= placement.memory_of(device) <= 1.1 * total
    for text, found in (("max\n", placement.memory_of(device)), ("123456\n", 123456)):
        limit.write_text(text)
        assert placement.memory_of(device) == found


@pytest.mark.parametrize("enough", [True, False])
def test_a_network_that_cannot_fit_is_refused_before_the_run_begins(tmp_path, monkeypatch, enough):
    """4 x 4 bytes for each of the parameters of 12-8-2 encoder and decoder."""
    encoder, decoder = 12 * 8 + 8 + 2 * (8 * 2 + 2), 2 * 8 + 8 + 8 * 12 + 12
    least = 16 * (encoder + decoder + 1)
    monkeypatch.setattr("vlae_jax.models.initial.memory_of", lambda _: least - (not enough))
    run, images = tmp_path / "run", tiny_images(0, 40)
    if enough:
        initialize(tiny_config(), as_dataset(images, tiny_config().data))
        return
    with pytest.raises(UserError, match=f"{encoder + decoder + 1} parameters takes .* choose"):
        fit(tiny_config(epochs=0), images, run_dir=run)
    assert not run.exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError("no more"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_does_not_suffice_is_one_line(capsys, monkeypatch, error):
    assert "the memory does not suffice (" in failed(capsys, monkeypatch, error)


def test_an_error_of_the_system_is_one_line(capsys, monkeypatch):
    assert failed(capsys, monkeypatch, OSError(5, "Input/output error", "disk")) == (
        "vlae_jax: error: disk: Input/output error"
    )


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    wrong = jax.errors.JaxRuntimeError("INTERNAL: something else")
    monkeypatch.setattr(program, "parse", lambda argv: Failing(wrong))
    with pytest.raises(jax.errors.JaxRuntimeError):
        program.main([])


class Failing:
    def __init__(self, error):
        self.error = error

    def run(self):
        raise self.error


def failed(capsys, monkeypatch, error):
    """The one line with which a command ends on an error that is none of its user's."""
    monkeypatch.setattr(program, "parse", lambda argv: Failing(error))
    with pytest.raises(SystemExit) as stopped:
        program.main([])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "gap"])
def test_a_platform_that_is_not_there_is_one_line_for_uses_too(saved, verb):
    finished = subprocess.run(
        [sys.executable, "-m", "vlae_jax", verb, saved],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("vlae_jax: error: JAX finds no device for JAX_PLATFORMS=cuda")
