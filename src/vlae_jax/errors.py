"""Exceptions that end a run early, each with a one-line message and its own exit code."""

import dataclasses
import difflib
import functools
import math
import signal
import typing
from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter

LARGEST_COUNT = 2**31 - 1
"""Largest count that is accepted: counts are 32-bit integers on devices."""


class UserError(Exception):
    """A mistake in the user's choices or data.

    Its message is one line that says what was wrong, what is wanted, and what to do. The command
    line prints it without a traceback and exits with code 2.
    """


class RunFailure(Exception):
    """A numerical failure of a correctly configured run; exit code 1."""


class Unreadable(Exception):
    """Undamaged data could not be read, perhaps only for now; exit code 75: try again later."""


class Stopped(Exception):
    """The run was stopped by a signal after saving everything; exit code 128 + signal."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, all saved")
        self.number = number


def require(ok: bool, message: str) -> None:
    """Check a condition on the user's choices.

    Raises:
        UserError: With the message, if the condition `ok` is false.
    """
    if not ok:
        raise UserError(message)


def require_types(choices: Any) -> None:
    """Check that each field of a frozen dataclass has a value of its type, and none beside it.

    What means the same is brought to the type: numbers of numpy, a whole number for a float, a list
    for a tuple, and a path for a text. A truth value is no number, and no text is.

    Raises:
        UserError: If a field has another value, such as a word that is none of its words.
    """
    from pydantic import ValidationError

    for name, adapter in _types_of(choices.__class__).items():
        given = getattr(choices, name)
        try:
            value = adapter.validate_python(_plain(given), strict=True)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(each["msg"] for each in error.errors()))
            raise UserError(f"{name}: {wanted}, got {given!r}") from None
        object.__setattr__(choices, name, value)


@functools.cache
def _types_of(cls: Any) -> "dict[str, TypeAdapter[Any]]":
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(cls)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, PurePath):
        return str(value)
    is_scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def require_counts(choices: object, *names: str, least: int = 1) -> None:
    """Check that each named field is None or a whole number from `least` to `LARGEST_COUNT`.

    A field may also hold several of them.

    Raises:
        UserError: If a field is out of range.
    """
    for name in names:
        value = getattr(choices, name)
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        require(all(v >= least for v in each), f"{name} must be at least {least}, got {value}")
        require(
            all(v <= LARGEST_COUNT for v in each),
            f"{name} must be at most {LARGEST_COUNT}, got {value}",
        )


def require_positive(choices: object, *names: str) -> None:
    """Check that each named field is None or a finite number above 0.

    Raises:
        UserError: If a field is out of range.
    """
    for name in names:
        value = getattr(choices, name)
        require(
            value is None or 0 < value < math.inf,
            f"{name} must be positive and finite, got {value}",
        )


def require_seed(seed: int) -> None:
    """Check that a number can seed JAX's and numpy's generators alike: from 0 to 2**32 - 1.

    Raises:
        UserError: If it cannot.
    """
    require(0 <= seed < 2**32, f"seed must be from 0 to 2**32 - 1, got {seed}")


def one_line(error: Exception, length: int = 200) -> str:
    """The message of an error, or else its type, on one line of about `length` at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= length:
        return text
    # The storage layer states the cause at the end.
    return f"{text[: length // 2]} ... {text[-length // 2 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """List the known names, after the most similar one: ``; did you mean 'x'? Known: x, y``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}"
