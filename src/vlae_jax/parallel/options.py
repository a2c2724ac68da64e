"""The options that choose devices and processes."""

import dataclasses
import math

from vlae_jax.errors import LARGEST_COUNT, require


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
        for name in ("processes", "devices", "timeout"):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= LARGEST_COUNT,
                f"distributed.{name} must be at least 1 and at most {LARGEST_COUNT}, got {value}",
            )
        count = self.processes if self.processes is not None else math.inf
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
