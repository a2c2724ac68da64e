"""Atomic writing of local files: a file is replaced as a whole or not at all.

Also where a signal ends the process on the spot: what is unfinished then is undone first.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_PARTIAL = ".partial"
_undo: dict[object, Callable[[], object]] = {}


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """A body that must not be left half done: `undo` follows it, or comes before a signal's end."""
    _undo[key := object()] = undo
    try:
        yield
    finally:
        try:
            undo()
        finally:
            del _undo[key]


def undo_unfinished() -> None:
    """Undo what is unfinished, the latest first: the process is about to end without unwinding."""
    for undo in reversed([*_undo.values()]):
        with contextlib.suppress(Exception):
            undo()


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file's content atomically: readers, also after a crash, see the old or the new.

    Args:
        path: The file. Its folder must exist.
        write: Writes the content into an open file.

    Raises:
        OSError: If it cannot be written; the old content stays.
    """
    # Several processes may write the same file at once, so each has its own partial file.
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")

    def remove() -> None:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

    with undone(remove):
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)


def is_partial(path: Path, of: Path) -> bool:
    """Whether `path` is a partial file that a crash while writing the file `of` may leave."""
    return path.name.startswith(f"{of.name}.") and path.name.endswith(_PARTIAL)
