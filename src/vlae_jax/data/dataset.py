"""A data set as a value: examples in three parts, and what they are."""

from typing import NamedTuple

import numpy as np

from vlae_jax.data.stored import StoredImages
from vlae_jax.errors import UserError


def has_missing(array: np.ndarray) -> bool:
    """Whether an array has NaN, which marks a missing entry."""
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def without(key: str, array: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
    """The array with NaN where a mask says that an entry is missing.

    Raises:
        UserError: If the mask is not of booleans of the shape of the array.
    """
    assert array is not None
    if mask is None:
        return array
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape not in (array.shape, array.shape[:-1]):
        raise UserError(
            f"data: the missing entries of {key} must be booleans of its shape {array.shape}, got "
            f"{mask.dtype} {mask.shape}"
        )
    mask = mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))
    return np.where(mask, np.nan, array).astype(np.promote_types(array.dtype, np.float32))


class Dataset(NamedTuple):
    """Examples in three parts, the rows of each array.

    Images of pixels are uint8 (n, height, width, channel), or with missing pixels float32 with NaN
    in their place. Tables are floats (n, dim) and images of measurements floats (n, height, width,
    channel), with NaN for missing entries.
    """

    name: str
    train: np.ndarray | StoredImages
    """On disk where they were asked to be streamed."""
    validation: np.ndarray
    """Set aside from the training images by a permutation that is the same in every run."""
    test: np.ndarray
    levels: int
    """How many values a pixel may take, from 0: 256, or 17 for digits. 0 for data that are no
    pixels."""
    source: str
    """A description of the images' origin, for people."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of shapes and pixels, before validation is set aside."""
    columns: tuple[str, ...] | None = None
    """Names of a table's columns, where it has any."""

    @property
    def incomplete(self) -> bool:
        """Whether a training, validation or test example has missing entries."""
        parts = (self.train, self.validation, self.test)
        return any(isinstance(part, np.ndarray) and has_missing(part) for part in parts)

    @property
    def description(self) -> str:
        """The kind and size of the data in words: ``table of 569 rows and 30 columns``."""
        count = sum(map(len, (self.train, self.validation)))
        count += 0 if self.test is self.validation else len(self.test)
        shape = self.train.shape[1:]
        if len(shape) == 1:
            words = f"table of {count} rows and {shape[0]} columns"
        else:
            kind = "images of pixels" if self.levels else "images of measurements"
            words = f"{count} {kind}, {' x '.join(map(str, shape))}"
        if not self.incomplete:
            return words
        parts = [p for p in (self.train, self.validation, self.test) if isinstance(p, np.ndarray)]
        share = sum(np.isnan(p).sum() for p in parts) / sum(p.size for p in parts)
        return f"{words}, {100 * share:.2g} % of the entries missing"

    def first_test_images(self, count: int | None) -> np.ndarray:
        """The first `count` test images, or all where it is None.

        Raises:
            UserError: If there are fewer.
        """
        if count is not None and count > len(self.test):
            raise UserError(
                f"test_images is {count}, but {self.name} has only {len(self.test)} test images"
            )
        return self.test[:count]
