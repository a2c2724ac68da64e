"""The ways a run ends early, each with one line for the user and its own exit code."""

import signal


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
