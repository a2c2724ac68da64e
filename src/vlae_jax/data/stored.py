"""Images that stay on disk, and the statistics of images that are exact in any order."""

import math
from collections.abc import Callable

import numpy as np

BATCH = 1000
"""Examples decoded at once: an Omniglot drawing is 33 kB before it is reduced."""
_COUNTED = 2**22
"""Pixels counted at once."""


class StoredImages:
    """Images that stay on disk, uint8 (n, height, width, channel): indexing reads them.

    In memory each takes 4 bytes: its place on disk. Several threads may read at once.

    Args:
        read: Places on disk, (k,) → images (k, height, width, channel).
        places: Those of these images, (n,).
        image_shape: (height, width, channel).
        value_counts: Their value counts; see the function `value_counts`.
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


def value_counts(images: np.ndarray | StoredImages) -> np.ndarray:
    """Count the images with each value at each pixel: int64 (dim, 256). NaN is not counted.

    Statistics computed from the counts are exact in any order of the images.
    """
    if isinstance(images, StoredImages):
        return images.value_counts
    counts = np.zeros((math.prod(images.shape[1:]), 256), np.int64)
    for start in range(0, len(images), BATCH):
        add_value_counts(counts, images[start : start + BATCH])
    return counts


def mean_image(images: np.ndarray | StoredImages) -> np.ndarray:
    """The mean of each pixel over the images, 0 to levels - 1: (height, width, channel)."""
    if isinstance(images, StoredImages):
        mean = images.value_counts @ np.arange(256) / len(images)
        return mean.reshape(images.shape[1:])
    return images.mean(axis=0)


def add_value_counts(counts: np.ndarray, images: np.ndarray) -> None:
    """Add the value counts of these images to `counts`, (dim, 256), in place."""
    if len(images) == 0:
        return
    flat = images.reshape(len(images), -1)
    width = max(1, _COUNTED // len(flat))
    for start in range(0, flat.shape[1], width):
        block = flat[:, start : start + width]
        codes = block + 256 * np.arange(block.shape[1])
        if codes.dtype.kind == "f":  # with NaN for missing pixels
            codes = codes[~np.isnan(codes)].astype(np.int64)
        found = np.bincount(codes.reshape(-1), minlength=256 * block.shape[1])
        counts[start : start + width] += found.reshape(-1, 256)
