"""The training steps that `benchmarks.scaling` looks at, for devices that need not be there."""

import os
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from benchmarks.roofline import SLICES
from vlae_jax.data.sets import Dataset, dataset_from_arrays
from vlae_jax.models.initial import initialize
from vlae_jax.models.trained import Trained
from vlae_jax.parallel.placement import Placement
from vlae_jax.runs.config import Config, DataConfig, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.training.step import Trainer

METHODS = ("vae", "vlae", "sa_vae", "vae_iaf")
BATCH = 128
"""Images a chip."""
IMAGES = {784: (54_000, 28, 28, 1), 3072: (45_000, 32, 32, 3)}
"""MNIST's and CIFAR10's training images, validation split off."""
SWEEP = (4, 16, 64, 256, 1024)
FOREIGN = re.compile(r"stablehlo\.custom_call @([\w.$]+)")
KNOWN = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"}
"""Custom calls that are no calls: marks for the partitioner."""


class Case(NamedTuple):
    """A program to compile."""

    method: str
    dim: int = 784
    network: Literal["mlp", "conv"] = "mlp"
    chips: int = 1
    batch: int = BATCH
    shard_parameters: bool = False

    @property
    def system(self) -> str:
        """The system that is trained, in words."""
        return f"{self.method} {'conv ' if self.network == 'conv' else ''}{self.dim}"

    @property
    def name(self) -> str:
        """All of it in words."""
        split = ", parameters split" if self.shard_parameters else ""
        return f"{self.system}, {self.chips} x {self.batch}{split}"


SYSTEMS = [
    *(Case(method, dim) for dim in (784, 3072) for method in METHODS),
    *(Case(method, 784, "conv") for method in METHODS),
]
CASES = [
    *SYSTEMS,
    *(case._replace(chips=8) for case in SYSTEMS if case.network == "mlp"),
    *(Case(method, chips=chips) for chips in (64, 256) for method in ("vae", "vlae")),
    *(Case("vlae", chips=chips, shard_parameters=True) for chips in (8, 256)),
    *(Case(method, batch=batch) for batch in SWEEP for method in ("vae", "vlae")),
]


class OnPaper(Placement):
    """A placement on devices that are not there: arrays become their shapes and shardings."""

    def put(self, tree: Any, shardings: Any = None) -> Any:
        """Describe what would be placed."""
        if shardings is None or isinstance(shardings, jax.sharding.Sharding):
            one = shardings or self.replicated
            return jax.tree.map(lambda leaf: _shape(leaf, one), tree)
        return jax.tree.map(_shape, tree, shardings)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def build(
    case: Case, *, hidden: Sequence[int] = (500, 500), latent: int = 50
) -> tuple[Trained, Dataset]:
    """The untrained model of a case, with noise in place of images: as many as it would have."""
    config = Config(
        data=DataConfig(dataset="noise"),
        model=ModelConfig(network=case.network, hidden=tuple(hidden), latent=latent),
        inference=InferenceConfig(method=case.method),
        training=TrainingConfig(batch_size=case.chips * case.batch),
    )
    images = np.random.default_rng(0).integers(0, 256, IMAGES[case.dim], np.uint8)
    return untrained(config, images)


def untrained(config: Config, images: np.ndarray) -> tuple[Trained, Dataset]:
    """A model that is to be trained on these images, its preprocessing fitted to a few of them."""
    few = images[: max(300, 2 * config.training.batch_size)]
    dataset = dataset_from_arrays(few, few[:10])
    return initialize(config, dataset), dataset._replace(train=images)


def lower(case: Case, trained: Trained, dataset: Dataset, devices: Sequence[Any]) -> Any:
    """The training step as it would run on these devices, lowered for them."""
    placement = OnPaper.of(devices, shard_parameters=case.shard_parameters)
    trainer = Trainer(trained, dataset, placement)
    return trainer.step.lower(trainer.init(), *next(trainer.feed.arguments(0)))


def exported(trained: Trained, dataset: Dataset) -> jax.export.Exported:
    """The training step on one device, lowered for TPUs on whatever machine this is."""
    trainer = Trainer(trained, dataset, OnPaper.of(jax.local_devices()[:1]))
    arguments = (trainer.init(), *next(trainer.feed.arguments(0)))
    return jax.export.export(trainer.step, platforms=["tpu"])(*arguments)


def foreign_calls(stablehlo: str) -> set[str]:
    """The calls of a lowered program to anything but operations of StableHLO, as to a library."""
    return set(FOREIGN.findall(stablehlo)) - KNOWN


def tpu_devices(chips: int) -> list[Any]:
    """The chips of a TPU v5e slice, to compile for."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock is taken, nor left
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    from jax.experimental import topologies

    rows, columns = SLICES[chips]
    host = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    name = f"v5e:{rows}x{columns}"
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **host).devices)


def low_rank_images(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Pictures with something to learn in them: ten random patterns, mixed and squashed."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(count, 10)) @ rng.normal(size=(10, int(np.prod(shape))))
    return np.uint8(255 / (1 + np.exp(-mixed))).reshape(count, *shape)
