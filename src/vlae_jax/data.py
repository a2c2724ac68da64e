"""Named image sets as uint8 arrays: from the cache, a given folder or a download; never replaced.

Only `prepare_dataset` needs TensorFlow, and only while tensorflow-datasets prepares a download;
what it leaves is a plain .npz file, or a directory of array_record files to stream from.
Everything else here is numpy.
"""

import contextlib
import enum
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import textwrap
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from vlae_jax.config import nearest
from vlae_jax.errors import UserError

KNOWN_DATASETS = ("digits", "mnist", "fashion_mnist", "omniglot", "svhn", "cifar10")
"""Names that `load_dataset` knows without a folder of the user's."""

_TFDS_NAMES = {name: name for name in KNOWN_DATASETS[1:]} | {"svhn": "svhn_cropped"}
# The same split in every run, whatever its seed, so that runs can be compared.
_SPLIT_SEED = 0
_BATCH = 1000  # examples held decoded at once: an Omniglot drawing is 33 kB before it is reduced
_COUNTED = 2**22  # pixels counted at once

# What reading a damaged or foreign directory has been seen to raise, and a missing decoder.
_TFDS_ERRORS = (ImportError, OSError, ValueError, LookupError, RuntimeError)

Parts = tuple[np.ndarray, np.ndarray]  # train images, test images


class StoredImages:
    """Images that stay on disk, uint8 (n, height, width, channel): indexing reads them.

    Of each there are 4 bytes in memory, its place on disk. Several threads may read at once.

    Args:
        read: Places on disk, (k,) → images (k, height, width, channel).
        places: Those of these images, (n,).
        image_shape: (height, width, channel).
        value_counts: What the function `value_counts` gives of them.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        places: np.ndarray,
        image_shape: tuple[int, ...],
        value_counts: np.ndarray,
    ) -> None:
        self._read, self._places = read, places
        self.shape = (len(places), *image_shape)
        self.dtype = np.dtype(np.uint8)
        self.value_counts = value_counts

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Read the images at an array of indices.

        Raises:
            UserError: If they cannot be read.
        """
        return self._read(self._places[rows])


class Dataset(NamedTuple):
    """Images in three parts, each uint8 of shape (n, height, width, channel)."""

    name: str
    train: np.ndarray | StoredImages
    """On disk still if they were asked to be streamed."""
    validation: np.ndarray
    """Set aside from the training images by a permutation that is the same in every run."""
    test: np.ndarray
    levels: int
    """How many values a pixel may take, from 0: 256, or 17 for digits."""
    source: str
    """Where the images came from, for people."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of shapes and pixels, before validation is set aside."""


class Availability(enum.IntEnum):
    """What it takes to read a data set. The numbers are exit codes of `prepare --check`."""

    READABLE = 0
    NEEDS_TFDS = 3
    NEEDS_DOWNLOAD = 4


class _Source(NamedTuple):
    """A place that holds a data set: what reads it, and how to name it to people."""

    read: Callable[[], Parts]
    description: str


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    validation_fraction: float = 0.1,
    stream: bool = False,
) -> Dataset:
    """Load an image set by name.

    digits comes with scikit-learn; it has no official split and is split at random, one fifth to
    test. Any other name is looked for in `data_dir` alone if that is given: in a single .npz file,
    or in a folder as NAME.npz, as idx files (mnist, fashion_mnist and your own names) or as a
    directory that tensorflow-datasets prepared in the array_record format. Without `data_dir` it
    is read from the cache, and downloaded into it when missing. An .npz file holds x_train and
    x_test, uint8, (n, height, width) or (n, height, width, channel).

    With `stream` the training images stay on disk. It takes a directory that tensorflow-datasets
    prepared in the array_record format, in `data_dir` or the cache. All of it is read once, for the
    fingerprint and the statistics; the images, their order and the fingerprint are the same as
    without. Validation and test images are held in memory.

    Args:
        name: One of `KNOWN_DATASETS`, or a name of your own for what `data_dir` holds.
        data_dir: Where to look, or None for the cache and then a download.
        validation_fraction: Share of the training images set aside for validation, between 0 and 1.
        stream: Leave the training images on disk.

    Raises:
        UserError: If the name is not known, nothing fits in `data_dir`, the images are not as
            described above, a part is empty, or a download is needed and cannot be done.
    """
    if stream:
        return _stream(name, data_dir, validation_fraction)
    if name == "digits":
        _refuse_file_for_digits(data_dir)
        described = "scikit-learn load_digits, split at random"
        return _split(name, _digits(), 17, described, validation_fraction)
    source = _find(name, data_dir)
    if source is None and data_dir is not None:
        raise UserError(_nothing_fits(name, _path(data_dir)))
    if source is None:
        source = _npz_source(prepare_dataset(name))
    return _split(name, source.read(), 256, source.description, validation_fraction)


def value_counts(images: np.ndarray | StoredImages) -> np.ndarray:
    """How many of the images have each value at each pixel: int64 (dim, 256).

    Statistics that are made of it are exact, whatever the order of the images.
    """
    if isinstance(images, StoredImages):
        return images.value_counts
    counts = np.zeros((math.prod(images.shape[1:]), 256), np.int64)
    for start in range(0, len(images), _BATCH):
        _add_value_counts(counts, images[start : start + _BATCH])
    return counts


def mean_image(images: np.ndarray | StoredImages) -> np.ndarray:
    """The mean of each pixel over the images, 0 to levels - 1: (height, width, channel)."""
    if isinstance(images, StoredImages):
        mean = images.value_counts @ np.arange(256) / len(images)
        return mean.reshape(images.shape[1:])
    return images.mean(axis=0)


def _add_value_counts(counts: np.ndarray, images: np.ndarray) -> None:
    if len(images) == 0:
        return
    flat = images.reshape(len(images), -1)
    width = max(1, _COUNTED // len(flat))
    for start in range(0, flat.shape[1], width):
        block = flat[:, start : start + width]
        codes = block + 256 * np.arange(block.shape[1])
        found = np.bincount(codes.reshape(-1), minlength=256 * block.shape[1])
        counts[start : start + width] += found.reshape(-1, 256)


def is_available(name: str, data_dir: str | Path | None = None, *, stream: bool = False) -> bool:
    """Whether `load_dataset` would find the data here, without a download.

    Looks at names of files only, so a broken file still counts. Imports neither TensorFlow nor
    tensorflow-datasets.
    """
    if stream:
        return _stored(name, data_dir) is not None and not _lacking_to_stream()
    if name == "digits":
        return _installed("sklearn") and not (data_dir and _path(data_dir).is_file())
    return _find(name, data_dir) is not None


def availability(
    name: str, data_dir: str | Path | None = None, *, stream: bool = False
) -> Availability:
    """What it takes to read the data here. Imports neither TensorFlow nor tensorflow-datasets.

    Raises:
        UserError: If nothing will do: the name is not known, or `data_dir` does not hold the set.
    """
    if stream:
        _refuse_to_stream_digits(name)
    if is_available(name, data_dir, stream=stream):
        return Availability.READABLE
    if name == "digits":
        _refuse_file_for_digits(data_dir)
    if _stored(name, data_dir) is not None and (stream or data_dir is not None):
        return Availability.NEEDS_TFDS
    if data_dir is None:
        _require_preparable(name)
        return Availability.NEEDS_DOWNLOAD
    lacking = _nothing_to_stream if stream else _nothing_fits
    raise UserError(lacking(name, _path(data_dir)))


def prepare_dataset(name: str, *, stream: bool = False) -> Path:
    """Download a known set with tensorflow-datasets and keep it in the cache as NAME.npz.

    Needs a network and TensorFlow. A set that is in the cache already is left as it is. Omniglot
    is inverted (bright ink on black) and reduced to 28 x 28; its split is the official one, by
    alphabet.

    Args:
        name: One of `KNOWN_DATASETS`, but digits.
        stream: Keep the directory of array_record files, which can be streamed, instead.

    Returns:
        The .npz file, with keys x_train and x_test; or the directory.

    Raises:
        UserError: If the name is not known, TensorFlow is missing, or downloading or writing fails.
    """
    _require_preparable(name)
    there = _stored(name, None) if stream else _cached_file(name)
    if there is not None and there.exists():
        return there
    for module in ("tensorflow_datasets", "tensorflow"):
        if not _installed(module):
            raise UserError(_cannot_download(name, f"{module} is not installed"))
    cache = cache_dir()
    scratch = cache / f"{name}.tfds"
    unwritable = f"cannot write to the cache (VLAE_JAX_CACHE names another folder) {cache}"
    with _one_line_error(unwritable, OSError):
        cache.mkdir(parents=True, exist_ok=True)
    builder = _download(name, scratch)
    if stream:
        # Its own folder holds nothing but finished versions: what was downloaded stays behind.
        target = cache / _TFDS_NAMES[name] / Path(builder.data_dir).name
        with _one_line_error(unwritable, OSError):
            target.parent.mkdir(exist_ok=True)
            os.replace(builder.data_dir, target)
    else:
        target = _cached_file(name)
        parts = _read_builder(name, builder, scratch)
        with _one_line_error(unwritable, OSError):
            _write_npz(target, parts)
    shutil.rmtree(scratch, ignore_errors=True)
    return target


def cache_dir() -> Path:
    """The cache folder: $VLAE_JAX_CACHE, else $XDG_CACHE_HOME/vlae_jax, else ~/.cache/vlae_jax."""
    if own := os.environ.get("VLAE_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlae_jax"


# Where to look


def _find(name: str, data_dir: str | Path | None) -> _Source | None:
    if data_dir is None:
        cached = _cached_file(name)
        return _npz_source(cached) if name in KNOWN_DATASETS and cached.is_file() else None
    root = _path(data_dir)
    if root.is_file():
        fits = root.suffix == ".npz" and not _named_for_another(name, root)
        return _npz_source(root) if fits else None
    if (root / f"{name}.npz").is_file():
        return _npz_source(root / f"{name}.npz")
    return _find_idx(name, root) or _find_prepared(name, root)


def _find_idx(name: str, root: Path) -> _Source | None:
    if not _may_be_idx(name):
        return None
    folders = [root / name] + ([] if _named_for_another(name, root) else [root])
    for folder in folders:
        train, test = (_idx_file(folder, part) for part in ("train", "t10k"))
        if train and test:
            return _Source(functools.partial(_read_idx_pair, train, test), f"idx files in {folder}")
    return None


def _idx_file(folder: Path, part: str) -> Path | None:
    names = (f"{part}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find_prepared(name: str, root: Path) -> _Source | None:
    folder = _prepared_folder(name, root)
    if folder is None or not _installed("tensorflow_datasets"):
        return None
    return _Source(lambda: _read_prepared(name, folder), f"tensorflow-datasets directory {folder}")


def _stored(name: str, data_dir: str | Path | None) -> Path | None:
    """The prepared directory that can be streamed."""
    return _prepared_folder(name, cache_dir() if data_dir is None else _path(data_dir))


def _prepared_folder(name: str, root: Path) -> Path | None:
    wanted = _TFDS_NAMES.get(name, name)
    found = []
    for pattern in ("", "*/", f"{glob.escape(wanted)}/*/"):
        for file in root.glob(f"{pattern}dataset_info.json"):
            about = _read_json(file)
            if about.get("name") == wanted:
                version = [int(part) for part in re.findall(r"\d+", str(about.get("version")))]
                found.append((version, file.parent))
    return max(found)[1] if found else None


def _named_for_another(name: str, path: Path) -> bool:
    # The pixels do not say what they are: a file's or folder's name is the only sign of a mix-up.
    return path.stem.replace("-", "_") in set(KNOWN_DATASETS) - {name}


def _may_be_idx(name: str) -> bool:
    return name in ("mnist", "fashion_mnist") or name not in KNOWN_DATASETS


def _path(data_dir: str | Path) -> Path:
    return Path(data_dir).expanduser()


def _cached_file(name: str) -> Path:
    return cache_dir() / f"{name}.npz"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# What to say when it is not there


def _nothing_fits(name: str, root: Path) -> str:
    if not root.exists():
        return f"data_dir {root} does not exist; give a folder or an .npz file that holds {name}"
    if root.is_file():
        return f"data_dir {root} is not an .npz file of {name}; give a folder or an .npz file"
    wanted = [f"{name}.npz"]
    if _may_be_idx(name):
        wanted.append(
            "idx files (train-images-idx3-ubyte and t10k-images-idx3-ubyte, .gz or not, "
            f"directly or in {name}/)"
        )
    wanted.append(f"a prepared tensorflow-datasets directory {_TFDS_NAMES.get(name, name)}/")
    if not _installed("tensorflow_datasets"):
        wanted[-1] += " (readable once you pip install 'vlae-jax[tfds]')"
    held = ", ".join(sorted(file.name for file in root.glob("*.npz"))) or "none"
    unknown = "" if name in KNOWN_DATASETS else f"; not a known name{nearest(name, KNOWN_DATASETS)}"
    return (
        f"no {name} in data_dir {root}: looked for {', '.join(wanted)}; "
        f".npz files there: {held}{unknown}"
    )


def _nothing_to_stream(name: str, root: Path) -> str:
    tfds_name = _TFDS_NAMES.get(name, name)
    return (
        f"no {name} that can be streamed in {root}: that takes a directory {tfds_name}/ which "
        f"tensorflow-datasets has prepared; make one with tfds.builder({tfds_name!r}, data_dir=...)"
        ".download_and_prepare(file_format='array_record'), or leave --stream out"
    )


def _lacking_to_stream() -> list[str]:
    modules = ("tensorflow_datasets", "array_record", "grain")
    return [module for module in modules if not _installed(module)]


def _refuse_to_stream_digits(name: str) -> None:
    if name == "digits":
        raise UserError(
            "digits comes with scikit-learn and is always in memory; leave --stream out"
        )


def _cannot_download(name: str, reason: str) -> str:
    files = f"{name}.npz (x_train, x_test: uint8)" + (
        " or the idx files" if _may_be_idx(name) else ""
    )
    return (
        f"{name} is not in the cache and cannot be downloaded: {reason}. "
        "Either, on a machine with a network, pip install 'vlae-jax[train,prepare]' and run "
        f"`vlae_jax prepare {name}`; or put {files} in a folder and pass --data-dir; "
        f"or copy {name}.npz, made elsewhere, into the cache folder {cache_dir()}"
    )


def _refuse_file_for_digits(data_dir: str | Path | None) -> None:
    if data_dir is not None and _path(data_dir).is_file():
        raise UserError(
            f"digits comes with scikit-learn and is not read from {data_dir}; "
            "leave data_dir out, or name the data set that the file holds"
        )


def _require_preparable(name: str) -> None:
    if name == "digits":
        raise UserError("digits comes with scikit-learn: there is nothing to prepare")
    if name not in KNOWN_DATASETS:
        raise UserError(
            f"unknown data set {name!r}{nearest(name, KNOWN_DATASETS)}; "
            f"for your own images put {name}.npz in a folder and give it as data_dir (--data-dir)"
        )


@contextlib.contextmanager
def _one_line_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the given kinds of exception into a UserError that opens with `what`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


# Reading


def _digits() -> Parts:
    if not _installed("sklearn"):
        raise UserError("digits comes with scikit-learn: pip install scikit-learn")
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[..., None]
    order = _fixed_permutation(len(images))
    num_test = len(images) // 5
    return images[order[num_test:]], images[order[:num_test]]


def _npz_source(path: Path) -> _Source:
    return _Source(lambda: _read_npz(path), str(path))


def _read_npz(path: Path) -> Parts:
    # TypeError: a lone array under this name. RuntimeError: encrypted, or an unknown compression.
    broken = (OSError, ValueError, EOFError, TypeError, RuntimeError, BadZipFile, zlib.error)
    unreadable = f"{path} is not a readable .npz file; delete it and make it again"
    with _one_line_error(unreadable, *broken), np.load(path, allow_pickle=False) as archive:
        keys = sorted(archive.files)
        parts = [archive[key] for key in ("x_train", "x_test") if key in keys]
    if len(parts) < 2:
        raise UserError(f"{path} needs the keys x_train and x_test; it has {keys or 'none'}")
    return _checked((parts[0], parts[1]), path)


def _read_idx(path: Path) -> np.ndarray:
    """Read images of an idx3-ubyte file: (n, height, width), uint8."""
    opener = gzip.open if path.suffix == ".gz" else open
    unreadable = _one_line_error(
        f"{path} is not a readable idx file", OSError, EOFError, zlib.error
    )
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


def _read_idx_pair(train: Path, test: Path) -> Parts:
    return _checked((_read_idx(train), _read_idx(test)), train.parent)


def _checked(parts: Parts, path: Path) -> Parts:
    """Both parts with a channel axis, or a UserError that says what is wrong with them."""
    keys = ("x_train", "x_test")
    train, test = (_one_part(key, part, path) for key, part in zip(keys, parts, strict=True))
    _require_one_shape(train.shape[1:], test.shape[1:], path)
    return train, test


def _one_part(key: str, images: np.ndarray, path: Path) -> np.ndarray:
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
    return images if images.ndim == 4 else images[..., None]


def _require_one_shape(one: tuple[int, ...], other: tuple[int, ...], path: Path) -> None:
    if one != other:
        raise UserError(f"{path}: images of one shape are needed, got {one} and {other}")


def _count_validation(num_train: int, validation_fraction: float) -> int:
    count = round(validation_fraction * num_train)
    if not 0 < count < num_train:
        raise UserError(
            f"validation_fraction {validation_fraction} of {num_train} training images leaves "
            f"{count} for validation and {num_train - count} for training; both need one or more"
        )
    return count


def _split(
    name: str, parts: Parts, levels: int, source: str, validation_fraction: float
) -> Dataset:
    train, test = parts
    num_validation = _count_validation(len(train), validation_fraction)
    order = _fixed_permutation(len(train))
    digest = hashlib.sha256()
    for images in parts:
        digest.update(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
    return Dataset(
        name=name,
        train=train[order[num_validation:]],
        validation=train[order[:num_validation]],
        test=test,
        levels=levels,
        source=source,
        fingerprint=digest.hexdigest()[:16],
    )


def _stream(name: str, data_dir: str | Path | None, validation_fraction: float) -> Dataset:
    """What `_split` makes of the same images, in one pass that keeps only the others."""
    _refuse_to_stream_digits(name)
    if lacking := _lacking_to_stream():
        raise UserError(f"--stream needs {' and '.join(lacking)}: pip install 'vlae-jax[stream]'")
    folder = _stored(name, data_dir)
    if folder is None and data_dir is not None:
        raise UserError(_nothing_to_stream(name, _path(data_dir)))
    folder = folder or prepare_dataset(name, stream=True)
    builder = _open_builder(folder)
    stored, test = (_PreparedPart(name, builder, part, folder) for part in ("train", "test"))
    count = len(stored)
    num_validation = _count_validation(count, validation_fraction)
    order = _fixed_permutation(count).astype(np.int32 if count < 2**31 else np.int64)
    rank = np.empty_like(order)
    rank[order] = np.arange(count, dtype=order.dtype)
    digest = hashlib.sha256()
    for start in range(0, count, _BATCH):
        images = stored.read(np.arange(start, min(start + _BATCH, count)))
        if start == 0:
            shape = images.shape[1:]
            digest.update(repr((count, *shape)).encode())
            validation = np.empty((num_validation, *shape), np.uint8)
            counts = np.zeros((math.prod(shape), 256), np.int64)
        _require_one_shape(shape, images.shape[1:], folder)
        digest.update(np.ascontiguousarray(images).data)
        ranks = rank[start : start + len(images)]
        is_set_aside = ranks < num_validation
        validation[ranks[is_set_aside]] = images[is_set_aside]
        _add_value_counts(counts, images[~is_set_aside])
    tests = test.read_all()
    _require_one_shape(shape, tests.shape[1:], folder)
    digest.update(repr(tests.shape).encode())
    digest.update(np.ascontiguousarray(tests).data)
    return Dataset(
        name=name,
        train=StoredImages(stored.read, order[num_validation:].copy(), shape, counts),
        validation=validation,
        test=tests,
        levels=256,
        source=f"tensorflow-datasets directory {folder}, streamed",
        fingerprint=digest.hexdigest()[:16],
    )


def _fixed_permutation(n: int) -> np.ndarray:
    # RandomState: numpy promises that its stream never changes; a Generator's may.
    return np.random.RandomState(_SPLIT_SEED).permutation(n)


# tensorflow-datasets


def _download(name: str, scratch: Path) -> Any:
    """The builder, once it has downloaded and prepared."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(_TFDS_NAMES[name], data_dir=scratch)
    except ImportError as error:
        raise UserError(_cannot_download(name, _brief(error))) from error
    if host := _unresolved_host(builder.url_infos or {}):
        raise UserError(_cannot_download(name, f"the host name {host} does not resolve"))
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except Exception as error:  # its own (download, checksum, extraction) are in private modules
        raise UserError(_cannot_download(name, _brief(error))) from error
    return builder


def _unresolved_host(urls: Iterable[str]) -> str | None:
    """The first host without an address, found at once where ten retries would take minutes."""
    if urllib.request.getproxies().keys() - {"no"}:
        return None  # the proxy resolves names; "no" lists the hosts it is not for
    for host in sorted({urllib.parse.urlsplit(url).hostname or "" for url in urls}):
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            return host
    return None


def _read_prepared(name: str, folder: Path) -> Parts:
    return _read_builder(name, _open_builder(folder), folder)


def _open_builder(folder: Path) -> Any:
    with _one_line_error(f"cannot read {folder} (pip install 'vlae-jax[tfds]')", ImportError):
        import tensorflow_datasets as tfds
    with _one_line_error(f"cannot read {folder}", *_TFDS_ERRORS):
        return tfds.builder_from_directory(folder)


def _read_builder(name: str, builder: Any, folder: Path) -> Parts:
    train, test = (
        _PreparedPart(name, builder, split, folder).read_all() for split in ("train", "test")
    )
    _require_one_shape(train.shape[1:], test.shape[1:], folder)
    return train, test


class _PreparedPart:
    """The images of one split that a builder has prepared, read without TensorFlow."""

    def __init__(self, name: str, builder: Any, split: str, folder: Path) -> None:
        self._key, self._folder = f"x_{split}", folder
        self._convert = _reduce_omniglot if name == "omniglot" else np.asarray
        self._what = (
            f"cannot read the {split} split of {folder} (it must be in the array_record format)"
        )
        with _one_line_error(self._what, *_TFDS_ERRORS):
            self._source = builder.as_data_source(split=split)
            self._length = len(self._source)

    def __len__(self) -> int:
        return self._length

    def read(self, places: np.ndarray) -> np.ndarray:
        """The images at these places: uint8 (k, height, width, channel)."""
        with _one_line_error(self._what, *_TFDS_ERRORS):
            examples = self._source.__getitems__([int(place) for place in places])
            images = self._convert(np.stack([example["image"] for example in examples]))
        return _one_part(self._key, images, self._folder)

    def read_all(self) -> np.ndarray:
        """All of them."""
        starts = range(0, len(self), _BATCH)
        batches = [self.read(np.arange(i, min(i + _BATCH, len(self)))) for i in starts]
        with _one_line_error(self._what, *_TFDS_ERRORS):
            return np.concatenate(batches)


def _reduce_omniglot(images: np.ndarray) -> np.ndarray:
    """White paper (n, 105, 105[, channel]) to bright ink on black (n, 28, 28, 1), area-averaged."""
    area = _area_average(105, 28)
    # The drawings are 1-bit: decoders give ink 0, paper 1 or 255, with or without a channel axis.
    ink = (images.reshape(*images.shape[:3], -1)[..., 0] == 0).astype(np.float64)
    return np.rint(255 * (area @ ink @ area.T)).astype(np.uint8)[..., None]


def _area_average(size: int, reduced: int) -> np.ndarray:
    """Matrix (reduced, size) that averages `size` pixels over `reduced` equal cells."""
    width = size / reduced
    left = width * np.arange(reduced)[:, None]
    pixel = np.arange(size)
    return np.clip(np.minimum(left + width, pixel + 1) - np.maximum(left, pixel), 0, None) / width


def _write_npz(target: Path, parts: Parts) -> None:
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, x_train=parts[0], x_test=parts[1])
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
