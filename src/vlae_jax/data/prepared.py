"""Directories that tensorflow-datasets has prepared: reading them, and preparing one."""

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlae_jax.data.formats import Parts, brief, one_line_error, one_part, require_one_shape
from vlae_jax.data.stored import BATCH
from vlae_jax.errors import UserError

KNOWN_DATASETS = ("digits", "mnist", "fashion_mnist", "omniglot", "svhn", "cifar10")
"""Data sets that `load_dataset` finds without a folder of the user's."""
TFDS_NAMES = {name: name for name in KNOWN_DATASETS[1:]} | {"svhn": "svhn_cropped"}


# Errors that a damaged or foreign directory, or a missing decoder, has been seen to raise.
_TFDS_ERRORS = (ImportError, OSError, ValueError, LookupError, RuntimeError)


def cache_dir() -> Path:
    """The cache folder: $VLAE_JAX_CACHE, else $XDG_CACHE_HOME/vlae_jax, else ~/.cache/vlae_jax."""
    if own := os.environ.get("VLAE_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlae_jax"


def may_be_idx(name: str) -> bool:
    """Whether a data set of that name may come as idx files."""
    return name in ("mnist", "fashion_mnist") or name not in KNOWN_DATASETS


def cannot_download(name: str, reason: str) -> str:
    """The line for a user whose data set cannot be downloaded: why, and the ways out."""
    files = f"{name}.npz (x_train, x_test: uint8)" + (
        " or the idx files" if may_be_idx(name) else ""
    )
    return (
        f"{name} is not in the cache and cannot be downloaded: {reason}. "
        "Either, on a machine with a network, pip install 'vlae-jax[train,prepare]' and run "
        f"`vlae_jax prepare {name}`; or put {files} in a folder and pass --data-dir; "
        f"or copy {name}.npz, made elsewhere, into the cache folder {cache_dir()}"
    )


def download(name: str, scratch: Path) -> Any:
    """Download and prepare a data set in the folder `scratch`; returns its builder."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(TFDS_NAMES[name], data_dir=scratch)
    except ImportError as error:
        raise UserError(cannot_download(name, brief(error))) from error
    if host := unresolved_host(builder.url_infos or {}):
        raise UserError(cannot_download(name, f"the host name {host} does not resolve"))
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except Exception as error:  # its own (download, checksum, extraction) are in private modules
        raise UserError(cannot_download(name, brief(error))) from error
    return builder


def unresolved_host(urls: Iterable[str]) -> str | None:
    """The first host that has no address: found at once, where ten retries would take minutes."""
    if urllib.request.getproxies().keys() - {"no"}:
        return None  # the proxy resolves names; "no" lists the hosts it is not for
    for host in sorted({urllib.parse.urlsplit(url).hostname or "" for url in urls}):
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            return host
    return None


def read_prepared(name: str, folder: Path) -> Parts:
    """Read both parts of a prepared directory."""
    return read_builder(name, open_builder(folder), folder)


def open_builder(folder: Path) -> Any:
    """The tensorflow-datasets builder of a prepared directory."""
    with one_line_error(f"cannot read {folder} (pip install 'vlae-jax[tfds]')", ImportError):
        import tensorflow_datasets as tfds
    with one_line_error(f"cannot read {folder}", *_TFDS_ERRORS):
        return tfds.builder_from_directory(folder)


def read_builder(name: str, builder: Any, folder: Path) -> Parts:
    """Read both parts that a builder has prepared."""
    train, test = (
        PreparedPart(name, builder, split, folder).read_all() for split in ("train", "test")
    )
    require_one_shape(train.shape[1:], test.shape[1:], folder)
    return Parts(train, test)


class PreparedPart:
    """The images of one split that a builder has prepared, read without TensorFlow."""

    def __init__(self, name: str, builder: Any, split: str, folder: Path) -> None:
        self._key, self._folder = f"x_{split}", folder
        self._convert = reduce_omniglot if name == "omniglot" else np.asarray
        self._what = (
            f"cannot read the {split} split of {folder} (it must be in the array_record format)"
        )
        with one_line_error(self._what, *_TFDS_ERRORS):
            self._source = builder.as_data_source(split=split)
            self._length = len(self._source)

    def __len__(self) -> int:
        return self._length

    def read(self, places: np.ndarray) -> np.ndarray:
        """The images at these places: uint8 (k, height, width, channel)."""
        with one_line_error(self._what, *_TFDS_ERRORS):
            examples = self._source.__getitems__([int(place) for place in places])
            images = self._convert(np.stack([example["image"] for example in examples]))
        return one_part(self._key, images, self._folder)

    def read_all(self) -> np.ndarray:
        """All images of the split."""
        starts = range(0, len(self), BATCH)
        batches = [self.read(np.arange(i, min(i + BATCH, len(self)))) for i in starts]
        with one_line_error(self._what, *_TFDS_ERRORS):
            return np.concatenate(batches)


def reduce_omniglot(images: np.ndarray) -> np.ndarray:
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
