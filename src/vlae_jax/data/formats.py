"""Files of images: .npz archives and idx files, read and checked."""

import contextlib
import gzip
import importlib.util
import math
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from vlae_jax.errors import UserError
from vlae_jax.files import replace_file

Parts = tuple[np.ndarray, np.ndarray]
"""Training images and test images."""


class Source(NamedTuple):
    """A place that holds a data set: the function that reads it, and its name for people."""

    read: Callable[[], Parts]
    description: str


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


def npz_source(path: Path) -> Source:
    """An .npz file as a place to read a data set from."""
    return Source(lambda: _read_npz(path), str(path))


def _read_npz(path: Path) -> Parts:
    # TypeError: a lone array under this name. RuntimeError: encrypted, or an unknown compression.
    broken = (OSError, ValueError, EOFError, TypeError, RuntimeError, BadZipFile, zlib.error)
    unreadable = f"{path} is not a readable .npz file; delete it and make it again"
    with one_line_error(unreadable, *broken), np.load(path, allow_pickle=False) as archive:
        keys = sorted(archive.files)
        parts = [archive[key] for key in ("x_train", "x_test") if key in keys]
    if len(parts) < 2:
        raise UserError(f"{path} needs the keys x_train and x_test; it has {keys or 'none'}")
    return checked_parts((parts[0], parts[1]), path)


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
    return checked_parts((_read_idx(train), _read_idx(test)), train.parent)


def checked_parts(parts: Parts, path: Path | str) -> Parts:
    """Both parts with a channel axis, or a UserError that says what is wrong with them."""
    keys = ("x_train", "x_test")
    train, test = (one_part(key, part, path) for key, part in zip(keys, parts, strict=True))
    require_one_shape(train.shape[1:], test.shape[1:], path)
    return train, test


def one_part(key: str, images: np.ndarray, path: Path | str) -> np.ndarray:
    """One part of a data set, checked, with a channel axis."""
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
        raise UserError(f"{path}: images of one shape are needed, got {one} and {other}")


def write_npz(target: Path, parts: Parts) -> None:
    """Write both parts, whole or not at all."""
    replace_file(target, lambda file: np.savez_compressed(file, x_train=parts[0], x_test=parts[1]))
