"""Local files: each is written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

_PARTIAL = ".partial"


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Give a file new content in one step: a reader or a crash sees the old or the new one, whole.

    Args:
        path: The file. Its folder must exist.
        write: Writes the content into an open file.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    # Several processes may prepare one cache at once: each has a file of its own.
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_partial(path: Path, of: Path) -> bool:
    """Whether a file is what a crash may leave of writing another one."""
    return path.name.startswith(f"{of.name}.") and path.name.endswith(_PARTIAL)
