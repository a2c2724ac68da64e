"""Batches of the training steps: the order of the images, and their way to the devices."""

import functools
import itertools
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num, PRNGKeyArray

from vlae_jax.data.preprocessing import Preprocessor, fixed_keys
from vlae_jax.data.stored import StoredImages
from vlae_jax.parallel.mapping import map_images
from vlae_jax.parallel.placement import Placement
from vlae_jax.runs.config import TrainingConfig

_THREADS, _BATCHES_AHEAD = 4, 8
_LANES = 128
"""Bytes in a row of a TPU's memory tile."""


def epoch_order(config: TrainingConfig, epoch: int, num_images: int) -> np.ndarray:
    """Draw the images of each step of an epoch, as a function of seed and epoch alone.

    Every process draws the same order. The images left over, fewer than a batch, are not used in
    this epoch.

    Returns:
        Indices, int32 (steps, batch).
    """
    steps = num_images // config.batch_size
    shuffled = np.random.default_rng([config.seed, epoch]).permutation(num_images)
    used = shuffled[: steps * config.batch_size]
    return used.astype(np.int32).reshape(steps, config.batch_size)


class Batch(NamedTuple):
    """The images of one training step, split along the batch."""

    pixels: Num[Array, "batch ..."]
    rows: Int[Array, " batch"]
    """Which of the training images they are."""


class Feed(Protocol):
    """Protocol of a source of images for the training step."""

    def arguments(self, start: int) -> Iterator[tuple[Array, ...]]:
        """Yield the arguments of `batch` for every step from `start` on, without end."""
        ...

    def batch(self, step: Int[Array, ""], *arguments: Array) -> Batch:
        """Return a step's images; it is traced inside the step."""
        ...


class ResidentImages:
    """A `Feed` with all images on every device; each step selects its rows there."""

    def __init__(self, images: np.ndarray, config: TrainingConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement
        self._count = len(images)
        self._steps = len(images) // config.batch_size
        self._shape = images.shape[1:]
        rows = images.reshape(self._count, -1)
        # A TPU can select rows of whole tiles in place. For images of three axes, or rows that end
        # within a tile, it may copy all of them into another layout in every step.
        self._images = placement.put(np.pad(rows, ((0, 0), (0, -rows.shape[1] % _LANES))))

    def arguments(self, start: int) -> Iterator[tuple[Array, ...]]:
        """Yield the images, and the order of an epoch with its columns split over the devices."""
        first, skipped = divmod(start, self._steps)
        for epoch in itertools.count(first):
            order = epoch_order(self._config, epoch, self._count)
            placed = self._placement.put(order, self._placement.columns)
            for _ in range(skipped, self._steps):
                yield self._images, placed
            skipped = 0

    def batch(self, step: Int[Array, ""], *arguments: Array) -> Batch:
        """Select the rows of a step by the epoch's order."""
        images, order = arguments
        rows = order[step % self._steps]
        pixels = self._placement.split_rows(images[rows])
        return Batch(pixels[:, : math.prod(self._shape)].reshape(-1, *self._shape), rows)


class StreamedImages:
    """A `Feed` from disk; each process reads its rows of the next batches in the background.

    The order is that of `ResidentImages`, and a step's images depend only on its number, so no
    state is needed to resume. The next eight batches and the orders of two epochs are in memory.
    """

    def __init__(self, images: StoredImages, config: TrainingConfig, placement: Placement) -> None:
        self._images, self._sharding, self._put = images, placement.rows, placement.put
        self._steps = len(images) // config.batch_size
        self._shape = (config.batch_size, *images.shape[1:])
        shards = placement.rows.addressable_devices_indices_map(self._shape)
        every = np.arange(config.batch_size)
        rows = {device: every[index[0]] for device, index in shards.items() if index}
        self._rows = np.unique(np.concatenate(list(rows.values())))
        self._shards = {device: np.searchsorted(self._rows, own) for device, own in rows.items()}
        # Batches before and after an epoch's end may be read at the same time.
        self._orders = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, config, num_images=len(images))
        )
        self._lock = threading.Lock()

    def read(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the images of a step's batch that belong to this process's devices.

        Returns:
            These images, and the rows of all images of the batch.

        Raises:
            UserError: If the rows cannot be read.
        """
        epoch, row = divmod(step, self._steps)
        with self._lock:  # one thread draws an order while the others wait for it
            order = self._orders(epoch)
        return self._images[order[row, self._rows]], order[row]

    def arguments(self, start: int) -> Iterator[tuple[Array, ...]]:
        """Yield each step's images, the rows of each device on that device.

        The transfer overlaps with computation, as training starts a step before the previous one is
        done.
        """
        grain = _import_grain()
        steps = grain.MapDataset.range(start, sys.maxsize).map(self.read)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
        batches = iter(steps.to_iter_dataset(options))
        try:
            for images, order in batches:
                yield self._place(images), self._put(order, self._sharding)
        finally:
            batches.close()

    def _place(self, batch: np.ndarray) -> Array:
        parts = [jax.device_put(batch[rows], device) for device, rows in self._shards.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)

    def batch(self, step: Int[Array, ""], *arguments: Array) -> Batch:
        """Return the images, which `arguments` has placed on the devices."""
        return Batch(*arguments)


def _import_grain() -> Any:
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # grain warns of a profiler that some jaxlib builds lack
    try:
        import grain
    finally:
        logging.set_verbosity(before)
    return grain


def make_feed(
    images: np.ndarray | StoredImages, config: TrainingConfig, placement: Placement
) -> Feed:
    """Make the `Feed` for training images in memory or on disk."""
    if isinstance(images, StoredImages):
        return StreamedImages(images, config, placement)
    return ResidentImages(images, config, placement)


def binarized_once(
    preprocessor: Preprocessor, images: np.ndarray | StoredImages
) -> np.ndarray | StoredImages:
    """Binarize training images once for static_binary preprocessing, and return them.

    Their pixels are then 0 or the highest level, and drawing them again in a step does not change
    them. For other kinds of preprocessing the images are returned unchanged.
    """
    if preprocessor.kind != "static_binary":
        return images
    assert isinstance(images, np.ndarray)  # DataConfig refuses to stream them

    def draw(_: None, pixels: Array, key: PRNGKeyArray) -> Array:
        return jnp.uint8(preprocessor.apply(key, pixels)[0])

    bits = map_images(draw, images, fixed_keys(len(images)), batch_size=4096)(None)
    return bits.reshape(images.shape) * np.uint8(preprocessor.levels - 1)
