"""Progress of long computations: a live line on a terminal, plain lines elsewhere."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlae_jax.files import undone

_PLAIN_SECONDS = 10.0
_SILENT = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Show no progress inside the context."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


class ProgressLine:
    """A context manager that shows progress through `total` steps, of which `start` are done.

    With `quiet` nothing is printed; that is for all processes but the first.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self._what, self._total, self._start = what, total, start
        quiet = quiet or _SILENT.get()
        self._console = Console(file=stream or sys.stderr, highlight=False, quiet=quiet)
        self._began = self._printed = time.monotonic()
        self._live: Progress | None = None
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn(self._what),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                transient=True,
            )
            # A signal in between must not leave the terminal without its cursor.
            self._ends.enter_context(undone(self._live.stop))
            self._live.start()
            self._task = self._live.add_task(
                self._what, total=self._total, completed=self._start, text=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def update(self, done: int, text: str) -> None:
        """Show that `done` steps of the total are finished, followed by `text`."""
        if self._live:
            self._live.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_SECONDS:
            self._printed = now
            rate = (done - self._start) / (now - self._began)
            left = f"{_clock((self._total - done) / rate)} left" if rate > 0 else ""
            self.say(f"{self._what} {done}/{self._total}  {text}  {left}".rstrip())

    def say(self, text: str) -> None:
        """Print a line that stays on the screen above the progress line."""
        (self._live.console if self._live else self._console).print(
            text, markup=False, soft_wrap=True
        )


@contextlib.contextmanager
def counting(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show progress through `total` images; yields a function to call with the number finished."""
    with ProgressLine(what, total, quiet=quiet) as progress:
        began = time.monotonic()

        def show(done: int) -> None:
            progress.update(done, f"{done / (time.monotonic() - began):.1f} images/s")

        yield show


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
