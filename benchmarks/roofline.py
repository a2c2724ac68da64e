"""Seconds of arithmetic, memory and communication that a chip's published peaks allow.

A prediction, and a lower bound on the time: every unit at its peak, nothing waiting for anything
but the network, no factorization, no elementwise work.
"""

import itertools
import math
from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip and its links."""

    name: str
    flops: float
    """A second, of bfloat16 products."""
    memory: float
    """Bytes a second, from and to HBM."""
    capacity: float
    """Bytes of HBM."""
    link: float
    """Bytes a second, one way over one link."""
    hop: float
    """Seconds a message takes over one link, however short."""
    ring: int
    """Chips along an axis from which on its ends are linked too."""
    cycle: float
    """Seconds."""


TPU_V5E = Chip(
    name="TPU v5e",
    flops=197e12,
    memory=819e9,
    capacity=16e9,
    link=1600e9 / 8 / 4,
    hop=1e-6,
    ring=16,
    # Four units of 128 × 128 multiply-adds make 197 TFLOP/s.
    cycle=4 * 128 * 128 * 2 / 197e12,
)
"""197 TFLOP/s, 16 GB at 819 GB/s and 1600 Gbit/s between chips (four links):
https://cloud.google.com/tpu/docs/v5e. A hop of about 1 µs, and axes shorter than 16 without a link
between their ends: https://jax-ml.github.io/scaling-book/sharding/."""

SLICES = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)} | {
    256: (16, 16)
}
"""Chips of a TPU v5e slice, and how they lie."""


class Seconds(NamedTuple):
    """The time of one training step, by what takes it."""

    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        """Arithmetic and memory at the same time, communication after them."""
        return max(self.compute, self.memory) + self.communication

    @property
    def bound_by(self) -> str:
        """The name of the longest of the three."""
        return max(zip(self, self._fields, strict=True))[1]


def ring_bytes(size: float, devices: int) -> float:
    """Bytes that each of n devices sends to sum an array of `size` bytes: 2 (n - 1)/n times it."""
    return 2 * (devices - 1) / devices * size


def all_reduce_seconds(chip: Chip, shape: tuple[int, ...], size: float) -> float:
    """Summing an array over all chips of a slice: the slower of bandwidth and latency.

    Rings along every axis at once; where an axis is too short to be closed, one direction of it.
    A message crosses each axis twice, once to reduce and once to spread.

    Args:
        chip: Its links.
        shape: Chips along each axis of the slice.
        size: Bytes of the array on each chip.
    """
    links, hops = 0, 0
    for length in shape:
        if length > 1:
            closed = length >= chip.ring
            links += 2 if closed else 1
            hops += length // 2 if closed else length - 1
    if not links:
        return 0.0
    bandwidth = ring_bytes(size, math.prod(shape)) / (links * chip.link)
    return max(bandwidth, 2 * hops * chip.hop)


def crossing(points: list[tuple[float, float, float]]) -> float | None:
    """The batch from which arithmetic takes longer than memory.

    Args:
        points: (batch, seconds of arithmetic, seconds of memory), rising in batch; straight lines
            between them, and the last one goes on.

    Returns:
        The batch, or None if arithmetic never takes longer.
    """
    if points[0][1] >= points[0][2]:
        return points[0][0]
    excess = [(batch, compute - memory) for batch, compute, memory in points]
    for (start, below), (end, above) in itertools.pairwise(excess):
        last = end == excess[-1][0]
        if above >= 0 or (last and above > below):
            return start + (end - start) * -below / (above - below)
    return None
