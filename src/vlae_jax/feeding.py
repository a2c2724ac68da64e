"""What each training step sees: the order of the images, and how their pixels reach the devices."""

import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from jaxtyping import Array, Int, UInt8

from vlae_jax.config import TrainingConfig
from vlae_jax.distributed import Placement


def epoch_order(config: TrainingConfig, epoch: int, num_images: int) -> np.ndarray:
    """Which images each step of an epoch sees: a function of seed and epoch alone.

    Every process draws the same. The rest of the images, less than a batch, waits for the next
    epoch's order.

    Returns:
        Indices, int32 (steps, batch).
    """
    steps = num_images // config.batch_size
    shuffled = np.random.default_rng([config.seed, epoch]).permutation(num_images)
    used = shuffled[: steps * config.batch_size]
    return used.astype(np.int32).reshape(steps, config.batch_size)


class Feed(Protocol):
    """A way for images to reach the training step."""

    def arguments(self, start: int) -> Iterator[tuple[Array, ...]]:
        """What `pixels` takes, for every step from `start` on, without end."""
        ...

    def pixels(
        self, step: Int[Array, ""], *arguments: Array
    ) -> UInt8[Array, "batch height width channel"]:
        """A step's images, split along the batch. Traced inside the step."""
        ...


class ResidentImages:
    """All images on every device; each step picks its rows there, and the host sends none."""

    def __init__(self, images: np.ndarray, config: TrainingConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement
        self._count = len(images)
        self._steps = len(images) // config.batch_size
        self._images = placement.put(images)

    def arguments(self, start: int) -> Iterator[tuple[Array, ...]]:
        """The images, and the order of an epoch with each device's columns on it."""
        first, skipped = divmod(start, self._steps)
        for epoch in itertools.count(first):
            order = epoch_order(self._config, epoch, self._count)
            placed = self._placement.put(order, self._placement.columns)
            for _ in range(skipped, self._steps):
                yield self._images, placed
            skipped = 0

    def pixels(
        self, step: Int[Array, ""], *arguments: Array
    ) -> UInt8[Array, "batch height width channel"]:
        """The rows that the order names."""
        images, order = arguments
        return self._placement.split_rows(images[order[step % self._steps]])
