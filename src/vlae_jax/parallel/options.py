"""The options that choose devices and processes."""

import dataclasses
import os

from vlae_jax.errors import LARGEST_COUNT, require, require_types

_FEWEST_THREADS = 4


def keep_threads_awake(devices: int = 1) -> None:
    """Let XLA start enough threads; call it before JAX starts.

    It starts one a core. On one or two cores all of them have been seen to sleep for good while the
    main thread waited for their result. Each virtual device may block one more, while it waits for
    the others.

    Args:
        devices: Number of virtual devices.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    wanted = _FEWEST_THREADS * devices
    if (devices > 1 or cores < wanted) and _threads() < wanted:
        os.environ["NPROC"] = str(wanted)


def _threads() -> int:
    given = os.environ.get("NPROC", "")
    return int(given) if given.isdigit() else 0


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Devices and processes of a command. A run may continue on others than it began with."""

    coordinator: str | None = None
    """HOST:PORT of process 0. Not needed on TPU VMs, GKE, Slurm and Open MPI."""
    processes: int | None = None
    """Number of processes; 1 is this process alone."""
    process_id: int | None = None
    """Number of this process, from 0."""
    timeout: int = 60
    """Seconds to wait for the other processes at the start."""
    devices: int | None = None
    """Number of devices that each process uses, by default all; on a CPU they are virtual."""
    shard_parameters: bool = False
    """Split parameters and optimizer state over all devices, each along an axis that the number of
    devices divides: a device stores only its part, and gathers the others for each step."""

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("processes", "devices", "timeout"):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= LARGEST_COUNT,
                f"distributed.{name} must be at least 1 and at most {LARGEST_COUNT}, got {value}",
            )
        count = self.processes if self.processes is not None else LARGEST_COUNT
        require(
            self.process_id is None or 0 <= self.process_id < count,
            f"distributed.process-id must be from 0 to distributed.processes - 1, "
            f"got {self.process_id}",
        )
        port = (self.coordinator or "host:1").rpartition(":")[2]
        require(
            ":" in (self.coordinator or "host:1") and port.isdigit() and 0 < int(port) < 65536,
            f"distributed.coordinator must be HOST:PORT, got {self.coordinator!r}",
        )
