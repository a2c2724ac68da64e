"""The command line: arguments become a command, the command runs, errors become exit codes."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO, cast

import jax
import tyro

from vlae_jax.commands.arguments import Folder
from vlae_jax.commands.train import Evaluate, Train
from vlae_jax.commands.uses import Encode, Gap, Impute, Reconstruct, Sample, Score
from vlae_jax.data.formats import ENDINGS
from vlae_jax.errors import RunFailure, Stopped, Unreadable, UserError, one_line
from vlae_jax.parallel.options import keep_threads_awake
from vlae_jax.parallel.processes import require_platform
from vlae_jax.runs.presets import default_config
from vlae_jax.runs.storage import resolved

_CHOICES = ("dataset", "method", "preset")
"""Options of `train` whose values change the defaults of its other options."""


class Command(Protocol):
    """A command with its arguments."""

    def run(self) -> None:
        """Run the command."""
        ...


@dataclasses.dataclass(frozen=True)
class Report:
    """Print the results of runs side by side and draw their pictures and report.html again."""

    run_dirs: tyro.conf.Positional[tuple[Folder, ...]]
    """Run folders."""
    output: Folder = Path("comparison")
    """Folder for the pictures that compare several runs, and the page with all of them."""

    def run(self) -> None:
        """Print the table and draw the pictures and pages."""
        from vlae_jax.report import write_comparison, write_report

        if not self.run_dirs:
            raise UserError("name at least one run folder")
        write_report(self.run_dirs)
        if len({resolved(path) for path in self.run_dirs}) > 1:
            page, *_ = write_comparison(self.run_dirs, self.output)
            print(f"comparison: {page}")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download a data set by tensorflow-datasets and keep it as a small uint8 file."""

    dataset: tyro.conf.Positional[str]
    """Name of the data set."""
    data_dir: str | None = None
    """With --check: look for the data in this folder or file, as training would."""
    check: bool = False
    """Download nothing; the exit code tells whether the data can be read:
    0 now, 3 with the tfds extra, 4 after a download."""
    stream: bool = False
    """Keep the files that train --stream reads instead; with --check, look for those."""

    def run(self) -> None:
        """Prepare the data set; with --check, exit with the code for its availability."""
        from vlae_jax.data import sets

        if self.check:
            sys.exit(int(sets.availability(self.dataset, self.data_dir, stream=self.stream)))
        ready = sets.prepare_dataset(self.dataset, stream=self.stream)
        print(f"{self.dataset} is ready: {ready}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, 1 (failed run, or output that could not be printed), 2 (wrong use), 75 (worth
    trying again: another process died, or a checkpoint could not be read for now) or 128 + signal.

    Args:
        argv: The words after the program's name; by default those of this process.
    """
    keep_threads_awake()
    _secure_streams()
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        if isinstance(command, Encode | Gap | Impute | Reconstruct | Sample | Score):
            require_platform()  # training and evaluation may have to join other processes first
        command.run()
        sys.stdout.flush()
        if failure := getattr(sys.stdout, "failure", None):
            raise RunFailure(f"the work is done, but its output cannot be printed: {failure}")
    except UserError as error:
        _leave(error, 2)
    except RunFailure as error:
        _leave(error, 1)
    except Unreadable as error:
        _leave(error, os.EX_TEMPFAIL)
    except Stopped as stopped:
        print(f"vlae_jax: {stopped}; --resume continues", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        _leave(_lacks_memory(error), 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _leave(_lacks_memory(error), 1)
    except OSError as error:  # of a file that others have removed, or a disk that fails
        _leave(RunFailure(f"{error.filename or 'the system'}: {error.strerror or error}"), 1)


def _lacks_memory(error: Exception) -> RunFailure:
    return RunFailure(
        f"the memory does not suffice ({one_line(error)}); less is needed with a smaller "
        "--hidden, --channels, --batch-size, --evaluation-batch or --chunk-size, more "
        "--microbatches, or fewer --images"
    )


class _Output:
    """A text stream whose reader may leave: what is written after that is lost without an error.

    So `vlae_jax train | head` trains to its end, and keeps everything in its run folder. What else
    keeps it from being written, as a full disk, waits in `failure` until the work is done.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, also to nobody."""
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, also to nobody."""
        with self._without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error.strerror or str(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _secure_streams() -> None:
    """Let no closed or narrow stream end a command: its work counts, not what it prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            stream = _Output(stream)
        setattr(sys, name, stream)


def parse(argv: Sequence[str]) -> Command:
    """The command that these words ask for.

    Raises:
        UserError: If an argument is out of range.
        SystemExit: If there is no such command or option, or --help is asked for.
    """
    dataset, method, preset = (_last_value(argv, f"--{name}") for name in _CHOICES)
    dataset = dataset or name_of_file(_last_value(argv, "--data-dir"))
    train = Train(default_config(dataset, method, preset), preset)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Impute, tyro.conf.subcommand("impute")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Gap, tyro.conf.subcommand("gap")]
    )
    return tyro.cli(
        cast("type[Command]", commands),
        args=argv,
        prog="vlae_jax",
        description="Variational Laplace Autoencoders: train, evaluate, report, and use.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def name_of_file(data_dir: str | None) -> str | None:
    """The name of the data set in a file that is given without one: that of the file."""
    path = Path(data_dir or "").expanduser()
    is_set = path.suffix.lower() in ENDINGS and path.is_file()
    return path.stem if is_set else None


def _last_value(argv: Sequence[str], option: str) -> str | None:
    """The last value given for an option, found before the defaults that depend on it are known."""
    value = None
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _leave(error: Exception, code: int) -> None:
    print(f"vlae_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
