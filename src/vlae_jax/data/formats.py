"""Files of arrays: .npz and .npy, idx files, CSV and Parquet; and the check of what they hold."""

import contextlib
import gzip
import importlib.util
import math
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from vlae_jax.data.tables import TABLE_FILES, Table, numbers_of, read_table
from vlae_jax.errors import UserError
from vlae_jax.files import replace_file


class Parts(NamedTuple):
    """Training and test examples: images, or the rows of a table."""

    train: np.ndarray
    test: np.ndarray | None
    """None where they come as one, of which a part is to be set aside."""
    columns: tuple[str, ...] | None = None
    """Names of a table's columns, where it has any."""


class Source(NamedTuple):
    """A place that holds a data set: the function that reads it, and its name for people."""

    read: Callable[[], Parts]
    description: str
    is_pictures: bool = False
    """Whether the examples are picture files, which can be resized."""


_CHANNELS = (1, 3)
"""Gray and color, which the pictures of a report can show."""


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def one_line_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the given kinds of exception into a UserError that opens with `what`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {brief(error)}") from error


def brief(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


def file_source(path: Path) -> Source | None:
    """A file as a place to read a data set from; None if its ending is unknown."""
    readers = {".npz": _read_npz, ".npy": _read_npy, **dict.fromkeys(TABLE_FILES, _read_table)}
    read = readers.get(path.suffix.lower())
    return read and Source(lambda: read(path), str(path))


ENDINGS = (".npz", ".npy", ".csv", ".parquet")
"""Endings of the files that hold a data set of the user's."""
# TypeError: a lone array under this name. RuntimeError: encrypted, or an unknown compression.
_BROKEN = (OSError, ValueError, EOFError, TypeError, RuntimeError, BadZipFile, zlib.error)


def _read_npz(path: Path) -> Parts:
    unreadable = f"{path} is not a readable .npz file; delete it and make it again"
    with one_line_error(unreadable, *_BROKEN), np.load(path, allow_pickle=False) as archive:
        keys = sorted(archive.files)
        arrays = {key: archive[key] for key in keys if key in ("x", "x_train", "x_test", "columns")}
    names = arrays.pop("columns", None)
    columns = None if names is None else tuple(map(str, names))
    alone = arrays[next(iter(arrays))] if len(arrays) == 1 and "x_test" not in arrays else None
    if alone is not None and alone.ndim == 2:
        return checked_parts(Parts(alone, None, columns), path)
    if not {"x_train", "x_test"} <= set(arrays):
        raise UserError(
            f"{path} needs the keys x_train and x_test; it has {keys or 'none'}; one table alone "
            "may be named x"
        )
    return checked_parts(Parts(arrays["x_train"], arrays["x_test"], columns), path)


def _read_npy(path: Path) -> Parts:
    with one_line_error(f"{path} is not a readable .npy file", *_BROKEN):
        array = np.asarray(np.load(path, allow_pickle=False))
    return checked_parts(Parts(array, None), path)


def _read_table(path: Path) -> Parts:
    values, columns = read_table(path)
    return checked_parts(Parts(values, None, columns), path)


def _read_idx(path: Path) -> np.ndarray:
    """Read images of an idx3-ubyte file: (n, height, width), uint8."""
    opener = gzip.open if path.suffix == ".gz" else open
    unreadable = one_line_error(f"{path} is not a readable idx file", OSError, EOFError, zlib.error)
    with unreadable, opener(path, "rb") as file:
        content = file.read()
    if len(content) < 16 or content[:4] != b"\x00\x00\x08\x03":
        raise UserError(
            f"{path} is not an idx file of images: it must open with the bytes 00 00 08 03"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=3, offset=4))
    if len(content) - 16 != math.prod(shape):
        raise UserError(
            f"{path} is truncated or damaged: {len(content) - 16} bytes of pixels, "
            f"but {' x '.join(map(str, shape))} were announced"
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape)


def read_idx_pair(train: Path, test: Path) -> Parts:
    """Read the training and the test images of two idx files, checked."""
    return checked_parts(Parts(_read_idx(train), _read_idx(test)), train.parent)


def checked_parts(parts: Parts, path: Path | str) -> Parts:
    """Parts of one kind and shape, images with a channel axis, or a UserError that says why not."""
    given = {"x_train": parts.train, "x_test": parts.test}
    keyed = {key: array for key, array in given.items() if array is not None}
    columns = parts.columns
    if any(is_image(array) for array in keyed.values()):
        train, *test = (one_part(key, array, path) for key, array in keyed.items())
    else:
        train, *test = (
            numbers_of(key, Table(array, columns), path) for key, array in keyed.items()
        )
    for other in test:
        require_one_shape(train.shape[1:], other.shape[1:], path)
    if columns and (train.ndim != 2 or len(columns) != train.shape[1]):
        raise UserError(
            f"{path}: {len(columns)} names of columns do not fit x_train of shape {train.shape}"
        )
    return Parts(train, test[0] if test else None, columns)


def is_image(array: np.ndarray) -> bool:
    """Whether an array is taken as images of integer pixels: uint8, unless it is a table."""
    return array.dtype == np.uint8 and array.ndim != 2


def one_part(key: str, images: np.ndarray, path: Path | str) -> np.ndarray:
    """One part of a set of images, uint8, checked, with a channel axis."""
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {key} must be uint8 (pixels 0 to 255), got {images.dtype}")
    if images.ndim not in (3, 4):
        raise UserError(
            f"{path}: {key} must have shape (n, height, width) or (n, height, width, channel), "
            f"got {images.shape}"
        )
    if images.size == 0:
        raise UserError(
            f"{path}: {key} is empty, its shape is {images.shape}; at least one image is needed"
        )
    images = images if images.ndim == 4 else images[..., None]
    channels = images.shape[3]
    if channels not in _CHANNELS and images.shape[1] in _CHANNELS:
        raise UserError(
            f"{path}: {key} of shape {images.shape} has its channels first; they must come last: "
            "transpose it by np.moveaxis(x, 1, 3)"
        )
    if channels not in _CHANNELS:
        raise UserError(
            f"{path}: {key} must have 1 channel or 3, got {channels} in shape {images.shape}"
        )
    return images


def require_one_shape(one: tuple[int, ...], other: tuple[int, ...], path: Path | str) -> None:
    """Refuse parts whose images differ in shape."""
    if one != other:
        what = "images of one shape" if len(one) == 3 else "rows of one length"
        raise UserError(f"{path}: {what} are needed, got {one} and {other}")


def write_npz(target: Path, parts: Parts) -> None:
    """Write both parts, whole or not at all."""
    arrays: dict[str, Any] = {"x_train": parts[0], "x_test": parts[1]}
    replace_file(target, lambda file: np.savez_compressed(file, **arrays))
