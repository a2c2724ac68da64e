"""Devices and processes, as the user chooses them."""

import dataclasses
import math

from vlae_jax.errors import require


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Devices and processes of a command. No part of a run: it may continue on others."""

    coordinator: str | None = None
    """HOST:PORT of process 0. Not needed on TPU VMs, GKE, Slurm and Open MPI."""
    processes: int | None = None
    """How many processes there are; 1 joins no others."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 60
    """Seconds to wait for the others at the start."""
    devices: int | None = None
    """Devices that each process uses, by default all; on a CPU so many virtual ones."""
    shard_parameters: bool = False
    """Split parameters and optimiser state over all devices, each along an axis that their number
    divides: a device stores its part alone, and gathers the others for the time of a step."""

    def __post_init__(self) -> None:
        for name in ("processes", "devices", "timeout"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"distributed.{name} must be at least 1, got {value}"
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
