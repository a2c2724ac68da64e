"""Named image sets as uint8 arrays: from the cache, a given folder or a download; never replaced.

Only `prepare_dataset` needs TensorFlow, and only while tensorflow-datasets prepares a download;
what it leaves is a plain .npz file. Everything else here is numpy.
"""

import contextlib
import enum
import functools
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

# What reading a damaged or foreign directory has been seen to raise, and a missing decoder.
_TFDS_ERRORS = (ImportError, OSError, ValueError, LookupError, RuntimeError)

Parts = tuple[np.ndarray, np.ndarray]  # train images, test images


class Dataset(NamedTuple):
    """Images in three parts, each uint8 of shape (n, height, width, channel)."""

    name: str
    train: np.ndarray
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
    name: str, data_dir: str | Path | None = None, *, validation_fraction: float = 0.1
) -> Dataset:
    """Load an image set by name.

    digits comes with scikit-learn; it has no official split and is split at random, one fifth to
    test. Any other name is looked for in `data_dir` alone if that is given: in a single .npz file,
    or in a folder as NAME.npz, as idx files (mnist, fashion_mnist and your own names) or as a
    directory that tensorflow-datasets prepared in the array_record format. Without `data_dir` it
    is read from the cache, and downloaded into it when missing. An .npz file holds x_train and
    x_test, uint8, (n, height, width) or (n, height, width, channel).

    Args:
        name: One of `KNOWN_DATASETS`, or a name of your own for what `data_dir` holds.
        data_dir: Where to look, or None for the cache and then a download.
        validation_fraction: Share of the training images set aside for validation, between 0 and 1.

    Raises:
        UserError: If the name is not known, nothing fits in `data_dir`, the images are not as
            described above, a part is empty, or a download is needed and cannot be done.
    """
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


def is_available(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether `load_dataset` would find the data here, without a download.

    Looks at names of files only, so a broken file still counts. Imports neither TensorFlow nor
    tensorflow-datasets.
    """
    if name == "digits":
        return _installed("sklearn") and not (data_dir and _path(data_dir).is_file())
    return _find(name, data_dir) is not None


def availability(name: str, data_dir: str | Path | None = None) -> Availability:
    """What it takes to read the data here. Imports neither TensorFlow nor tensorflow-datasets.

    Raises:
        UserError: If nothing will do: the name is not known, or `data_dir` does not hold the set.
    """
    if is_available(name, data_dir):
        return Availability.READABLE
    if name == "digits":
        _refuse_file_for_digits(data_dir)
    if data_dir is None:
        _require_preparable(name)
        return Availability.NEEDS_DOWNLOAD
    if _prepared_folder(name, _path(data_dir)) is not None:
        return Availability.NEEDS_TFDS
    raise UserError(_nothing_fits(name, _path(data_dir)))


def prepare_dataset(name: str) -> Path:
    """Download a known set with tensorflow-datasets and keep it in the cache as NAME.npz.

    Needs a network and TensorFlow. A set that is in the cache already is left as it is. Omniglot
    is inverted (bright ink on black) and reduced to 28 x 28; its split is the official one, by
    alphabet.

    Returns:
        The .npz file, with keys x_train and x_test.

    Raises:
        UserError: If the name is not known, TensorFlow is missing, or downloading or writing fails.
    """
    _require_preparable(name)
    target = _cached_file(name)
    if target.is_file():
        return target
    for module in ("tensorflow_datasets", "tensorflow"):
        if not _installed(module):
            raise UserError(_cannot_download(name, f"{module} is not installed"))
    scratch = target.with_suffix(".tfds")
    unwritable = f"cannot write to the cache (VLAE_JAX_CACHE names another folder) {target.parent}"
    with _one_line_error(unwritable, OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
    parts = _download(name, scratch)
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


def _prepared_folder(name: str, root: Path) -> Path | None:
    wanted = _TFDS_NAMES.get(name)
    found = []
    for pattern in ("", "*/", f"{wanted}/*/"):
        for file in root.glob(f"{pattern}dataset_info.json"):
            about = _read_json(file)
            if wanted is not None and about.get("name") == wanted:
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
    if tfds_name := _TFDS_NAMES.get(name):
        wanted.append(f"a prepared tensorflow-datasets directory {tfds_name}/")
        if not _installed("tensorflow_datasets"):
            wanted[-1] += " (readable once you pip install 'vlae-jax[tfds]')"
    held = ", ".join(sorted(file.name for file in root.glob("*.npz"))) or "none"
    unknown = "" if name in KNOWN_DATASETS else f"; not a known name{nearest(name, KNOWN_DATASETS)}"
    return (
        f"no {name} in data_dir {root}: looked for {', '.join(wanted)}; "
        f".npz files there: {held}{unknown}"
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
    for key, images in zip(("x_train", "x_test"), parts, strict=True):
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
    train, test = (images if images.ndim == 4 else images[..., None] for images in parts)
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{path}: images of one shape are needed, got {train.shape[1:]} and {test.shape[1:]}"
        )
    return train, test


def _split(
    name: str, parts: Parts, levels: int, source: str, validation_fraction: float
) -> Dataset:
    train, test = parts
    num_validation = round(validation_fraction * len(train))
    if not 0 < num_validation < len(train):
        raise UserError(
            f"validation_fraction {validation_fraction} of {len(train)} training images leaves "
            f"{num_validation} for validation and {len(train) - num_validation} for training; "
            "both need one or more"
        )
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


def _fixed_permutation(n: int) -> np.ndarray:
    # RandomState: numpy promises that its stream never changes; a Generator's may.
    return np.random.RandomState(_SPLIT_SEED).permutation(n)


# tensorflow-datasets


def _download(name: str, scratch: Path) -> Parts:
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
    return _read_builder(name, builder, scratch)


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
    with _one_line_error(f"cannot read {folder} (pip install 'vlae-jax[tfds]')", ImportError):
        import tensorflow_datasets as tfds
    with _one_line_error(f"cannot read {folder}", *_TFDS_ERRORS):
        builder = tfds.builder_from_directory(folder)
    return _read_builder(name, builder, folder)


def _read_builder(name: str, builder: Any, folder: Path) -> Parts:
    """Read what a builder has prepared, without TensorFlow."""
    convert = _reduce_omniglot if name == "omniglot" else np.asarray
    parts = []
    for split in ("train", "test"):
        what = f"cannot read the {split} split of {folder} (it must be in the array_record format)"
        with _one_line_error(what, *_TFDS_ERRORS):
            batches = [convert(images) for images in _batches(builder.as_data_source(split=split))]
            parts.append(np.concatenate(batches))
    return _checked((parts[0], parts[1]), folder)


def _batches(source: Any) -> Iterator[np.ndarray]:
    for start in range(0, len(source), _BATCH):
        examples = source.__getitems__(list(range(start, min(start + _BATCH, len(source)))))
        yield np.stack([example["image"] for example in examples])


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
