"""Atomic writing of local files: a file is replaced as a whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

_PARTIAL = ".partial"


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
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_partial(path: Path, of: Path) -> bool:
    """Whether `path` is a partial file that a crash while writing the file `of` may leave."""
    return path.name.startswith(f"{of.name}.") and path.name.endswith(_PARTIAL)
