"""A signal ends a command in order: its exit code, no traceback, nothing half done left behind."""

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlae_jax import files
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.storage import write_atomically

STARTS = """
import os, signal, sys
import vlae_jax_command as program
class Main:
    '''In place of the package, whose import a signal interrupts.'''
    def __getattr__(self, name):
        os.kill(os.getpid(), {number})
        raise AssertionError("still alive")
sys.modules["vlae_jax.commands.main"] = Main()
program.main()
"""
DROPS = """
import sys, threading
import vlae_jax_command as program
class Dropping:
    def __del__(self):
        raise ZeroDivisionError
class Main:
    def main(self):
        Dropping() if sys.argv[1] == "main" else run_and_wait(threading.Thread(target=Dropping))
def run_and_wait(thread):
    thread.start()
    thread.join()
sys.modules["vlae_jax.commands.main"] = Main()
program.main()
"""
WRITES = """
import os, sys
from pathlib import Path
import vlae_jax_command as program
from vlae_jax.commands import main
from vlae_jax.progress import ProgressLine
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.storage import write_atomically
folder = Path(sys.argv[1])
def half(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), {number})
    raise AssertionError("still alive")
class Writing:
    def run(self):
        with ProgressLine("x", 1), RunFolder(folder / "new" / "run").owned():
            write_atomically(folder / "kept.json", half)
main.parse = lambda argv: Writing()
program.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("code", [STARTS, WRITES], ids=["while importing", "while writing"])
def test_a_signal_ends_it_with_its_code_and_undoes_what_is_half_done(tmp_path, number, code):
    (tmp_path / "kept.json").write_text("{}")
    finished = subprocess.run(
        [sys.executable, "-c", code.format(number=int(number)), tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 128 + number, finished.stderr
    assert finished.stderr == f"vlae_jax: stopped by {number.name}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert (tmp_path / "kept.json").read_text() == "{}"


@pytest.mark.parametrize("thread", ["main", "other"])
def test_what_cannot_be_raised_is_printed_of_the_main_thread_alone(thread):
    """The storage layer's threads print tracebacks of what it raises in the main thread too."""
    finished = subprocess.run(
        [sys.executable, "-c", DROPS, thread], capture_output=True, text=True, check=True
    )
    assert ("ZeroDivisionError" in finished.stderr) == (thread == "main"), finished.stderr


def test_nothing_that_was_finished_is_undone(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.owned():
        write_atomically(run.path / "one.json", lambda file: file.write(b"{}"))
    undone = []
    with files.undone(lambda: undone.append("inner")):
        pass
    files.undo_unfinished()
    assert undone == ["inner"]
    assert (run.path / "one.json").read_text() == "{}"


def test_what_is_unfinished_is_undone_from_the_inside_out_even_where_one_fails():
    undone = []

    def inner():
        undone.append("inner")
        raise RuntimeError

    def body():
        with files.undone(lambda: undone.append("outer")), files.undone(inner):
            files.undo_unfinished()
            assert undone == ["inner", "outer"]

    with pytest.raises(RuntimeError):
        body()
    files.undo_unfinished()
    assert undone == ["inner", "outer"] * 2, "each once more on leaving, and then no more"


def test_both_ways_in_start_with_the_handlers():
    import vlae_jax_command
    from vlae_jax import __main__ as module

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"vlae_jax": "vlae_jax_command:main"}
    assert module.main is vlae_jax_command.main
