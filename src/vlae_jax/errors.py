"""The ways a run ends early, each with one line for the user and its own exit code."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for or supplied.

    Its message is one line that says what was wrong, what is wanted, and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class RunFailure(Exception):
    """Something went wrong in the numbers of a run that was asked for correctly; exit code 1."""


class Unreadable(Exception):
    """Something that is there could not be read for now; exit code 75, worth trying again."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with everything saved; exit code 128 + signal."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, all saved")
        self.number = number


def require(ok: bool, message: str) -> None:
    """Check a choice of the user's.

    Raises:
        UserError: With the message, if it is not `ok`.
    """
    if not ok:
        raise UserError(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names there are, the most similar one first: ``; did you mean 'x'? ...``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}"
