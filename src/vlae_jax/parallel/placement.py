"""The placement of arrays on devices in training and evaluation."""

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.errors import UserError

DATA, SAMPLES = "data", "samples"


_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""What a container may use, in its own view, by both versions of Linux's interface."""
_SMALLEST_SHARDED = 4096
"""Elements below which a parameter is not worth sharding."""


def memory_of(device: Any) -> float:
    """Bytes of memory of a device; of a CPU, those of the machine or the container.

    Infinite where nothing tells.
    """
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("bytes_limit", math.inf))
    found = math.inf
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found = min(found, float(limit.read_text()))
    return found


class Placement:
    """A layout of devices, and the placement of arrays on them.

    Batches are split along the mesh axis `data`, importance samples along `samples`. Parameters and
    optimizer state are whole on every device or, if `shard_parameters`, each split among all of
    them, and gathered when they are used.
    """

    def __init__(self, mesh: Mesh, *, shard_parameters: bool = False) -> None:
        self.mesh = mesh
        self.shard_parameters = shard_parameters
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(DATA))
        """Splits the first axis of an array along `data`."""
        self.columns = NamedSharding(mesh, PartitionSpec(None, DATA))
        """Splits the second axis of an array along `data`."""

    @classmethod
    def of(cls, devices: Any = None, *, shard_parameters: bool = False) -> "Placement":
        """All devices of all processes, or those given, along `data`."""
        found = np.asarray(jax.devices() if devices is None else devices)
        # Explicit axes, JAX's default, would want the sharding of every intermediate array.
        mesh = Mesh(found.reshape(-1, 1), (DATA, SAMPLES), axis_types=(AxisType.Auto,) * 2)
        return cls(mesh, shard_parameters=shard_parameters)

    @classmethod
    def here(cls) -> "Placement":
        """The first device of this process alone."""
        return cls.of(jax.local_devices()[:1])

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def require_even(self, batch_size: int, microbatches: int | None = None) -> None:
        """Check that the devices can share a batch evenly: its images, or its microbatches.

        Raises:
            UserError: If they cannot.
        """
        name, count = "batch_size", batch_size
        if microbatches is not None:
            name, count = "microbatches", microbatches
        if count % self.size:
            raise UserError(
                f"{name} {count} cannot be split evenly over {self.size} devices; choose "
                "a multiple, or fewer with --distributed.devices"
            )

    @property
    def in_flight(self) -> int:
        """The number of programs that may be started before the first has ended.

        Virtual devices share the threads of one processor: a second program can occupy threads that
        the last device of the first one needs, and then both wait forever.
        """
        here = self.mesh.local_devices
        return 0 if len(here) > 1 and here[0].platform == "cpu" else 2

    def for_batch(self, batch: int) -> "Placement":
        """The same devices for batches of a given size.

        As many as divide the size lie along `data`, the others along `samples`.
        """
        rows = math.gcd(batch, self.size)
        mesh = Mesh(
            self.mesh.devices.reshape(rows, -1),
            (DATA, SAMPLES),
            axis_types=(AxisType.Auto,) * 2,
        )
        return Placement(mesh, shard_parameters=self.shard_parameters)

    def of_parameters(self, tree: Any) -> Any:
        """The sharding of each parameter: whole, or split along its longest divisible axis.

        Raises:
            UserError: If parameters are to be split and no axis is divisible.
        """
        found = jax.tree.map(lambda leaf: self._of_parameter(leaf.shape), tree)
        if (
            self.shard_parameters
            and self.size > 1
            and all(s == self.replicated for s in jax.tree.leaves(found))
        ):
            raise UserError(
                f"no parameter has an axis that {self.size} devices could share: choose --hidden "
                "widths that are multiples, or leave --distributed.shard-parameters out"
            )
        return found

    def _of_parameter(self, shape: tuple[int, ...]) -> NamedSharding:
        can_be = [axis for axis, length in enumerate(shape) if length % self.size == 0]
        if (
            not self.shard_parameters
            or self.size == 1
            or not can_be
            or math.prod(shape) < _SMALLEST_SHARDED
        ):
            return self.replicated
        longest = max(can_be, key=lambda axis: shape[axis])
        axes = [None] * longest + [(DATA, SAMPLES)]
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, tree: Any, shardings: Any = None) -> Any:
        """Place arrays of which every process has a whole copy; without communication.

        Args:
            tree: Arrays; random keys too.
            shardings: One for all arrays, or a tree of them; by default whole on every device.
        """
        if shardings is None or isinstance(shardings, NamedSharding):
            one = shardings or self.replicated
            return jax.tree.map(lambda leaf: _put(leaf, one), tree)
        return jax.tree.map(_put, tree, shardings)

    def whole(self, tree: Any) -> Any:
        """Gather arrays that may be split over devices into numpy; every process must call this."""
        gather = jax.jit(lambda tree: tree, out_shardings=self.replicated)
        return jax.device_get(gather(tree))

    def split_rows(self, array: Array) -> Array:
        """Inside jit: keep the first axis split along `data`."""
        return jax.lax.with_sharding_constraint(array, self.rows)

    def split_samples(self, array: Array) -> Array:
        """Inside jit: split the first axis along `samples`, if that divides it."""
        splits = self.mesh.shape[SAMPLES]
        if splits == 1 or array.shape[0] % splits:
            return array
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(self.mesh, PartitionSpec(SAMPLES))
        )

    def mean_of_shards(
        self,
        function: Callable[..., Any],
        whole: Any,
        *rows: Array | PRNGKeyArray | None,
        microbatches: int | None = None,
    ) -> tuple[Any, Any]:
        """Inside jit: apply a function to the rows of each device, and average over devices.

        Each device's loops end when its own rows are done, and gradients are summed once. XLA's own
        partitioner would ask all devices in every pass of a loop whether to go on, and would sum
        gradients in parts, inside the loops of reverse mode too.

        Args:
            function: (whole, *rows) → a tree of means over its rows, and a tree of arrays with a
                row for each.
            whole: A tree that every device has whole.
            rows: Arrays split along `data`, or None.
            microbatches: Split the rows of all devices into this many parts, a multiple of the
                number of devices. Each device takes its parts one after the other, and all are
                added up in order: the sum is equal bit for bit on any number of devices.

        Returns:
            The means of all rows, whole, and the arrays of all rows, split along `data`.
        """

        def here(whole: Any, *rows: Any) -> tuple[Any, Any]:
            if microbatches is None:
                means, each = function(whole, *rows)
                return jax.lax.pmean(means, DATA), each
            count = microbatches // self.mesh.shape[DATA]
            parts = jax.tree.map(lambda array: array.reshape(count, -1, *array.shape[1:]), rows)
            found, each = _one_by_one(lambda part: function(whole, *part), parts, count)
            every = jax.lax.all_gather(found, DATA, tiled=True)
            means = _by_itself(lambda tree: jax.tree.map(lambda a: jnp.mean(a, 0), tree), every)
            return means, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), each)

        split = (PartitionSpec(), *(PartitionSpec(DATA) for _ in rows))
        # Checked, JAX would sum the gradients of `whole` over the devices by itself.
        found = PartitionSpec(), PartitionSpec(DATA)
        apart = jax.shard_map(
            here, mesh=self.mesh, in_specs=split, out_specs=found, check_vma=False
        )
        return apart(whole, *rows)

    def gathered(self, tree: Any) -> Any:
        """Inside jit: gather split arrays, whole on every device."""
        if not self.shard_parameters:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)


def _one_by_one(function: Callable[[Any], Any], parts: Any, count: int) -> Any:
    """Like `jax.lax.map`, compiled to the same program for any count.

    A compiler that knows that a loop has one pass merges it with the code around it, which rounds
    differently; so the count is hidden from it.
    """

    def of(index: Array) -> Any:
        return function(jax.tree.map(lambda array: array[index], parts))

    shapes = jax.eval_shape(of, jnp.zeros((), jnp.int32))
    room = jax.tree.map(lambda shape: jnp.zeros((count, *shape.shape), shape.dtype), shapes)
    end = jax.lax.optimization_barrier(jnp.asarray(count, jnp.int32))

    def advance(state: tuple[Array, Any]) -> tuple[Array, Any]:
        index, found = state
        one = of(index)
        return index + 1, jax.tree.map(lambda all_, new: all_.at[index].set(new), found, one)

    _, found = jax.lax.while_loop(
        lambda state: state[0] < end, advance, (jnp.zeros((), jnp.int32), room)
    )
    return found


def _by_itself(function: Callable[[Any], Any], tree: Any) -> Any:
    """Inside jit: apply a function without merging it with the code before or after it."""
    return jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(tree)))


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
