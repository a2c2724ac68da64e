"""Trained models in folders: written, and read without their data or any state of the training."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlae_jax.data.preprocessing import Preprocessor
from vlae_jax.models.initial import build_network
from vlae_jax.models.likelihoods import Group
from vlae_jax.models.trained import Provenance, Trained
from vlae_jax.parallel.placement import Placement
from vlae_jax.parallel.processes import is_first
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints, Restored
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder

_PROGRESS = ("step", "epoch", "seconds")
"""Fields of `Provenance` that change while a model is trained."""


def save(trained: Trained, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a trained model into a run folder, for `load` and all commands on runs.

    Args:
        trained: The model.
        folder: A local folder, or gs://BUCKET/FOLDER. It must not hold a run yet.
        overwrite: Delete a run that is in the folder.

    Raises:
        UserError: If the folder is already in use, or cannot be written.
    """
    run = RunFolder.at(folder)
    run.create(trained.config, overwrite=overwrite)
    checkpoints = Checkpoints(run.checkpoints)
    step = trained.provenance.step
    made = trained.provenance
    info = CheckpointInfo(made.seconds, made.epoch, step, float("-inf"), facts_of(trained))
    checkpoints.save(step, {"model": arrays_of(trained)}, info)
    checkpoints.close()


def load(folder: str | os.PathLike[str], placement: Placement | None = None) -> Trained:
    """Read the model of the best checkpoint of a run folder, from that folder alone.

    Neither a data set nor the state of the training is read. If the best checkpoint is damaged or
    missing, another one is used, and a line on stderr names it.

    Args:
        folder: A folder written by training or `save`, local or gs://BUCKET/FOLDER.
        placement: Devices for the parameters; by default the first device of this process.

    Raises:
        UserError: If there is no such run, it is of another version, or no readable checkpoint is
            left.
        Unreadable: If it is undamaged but cannot be read for now.
    """
    run = RunFolder.at(folder)
    config = run.read_config()
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    placement = placement or Placement.here()
    best = run.best_step()

    def like(info: CheckpointInfo) -> dict[str, Any]:
        arrays = arrays_of(_blueprint(config, info.model))
        shardings = {
            "params": placement.of_parameters(arrays["params"]),
            "preprocessor": jax.tree.map(lambda _: placement.replicated, arrays["preprocessor"]),
        }
        return {"model": jax.tree.map(_placed, arrays, shardings)}

    restored = checkpoints.restore_best(like)
    if best not in (None, restored.step) and not restored.damaged:
        restored.damaged.append(
            f"the best checkpoint, {best}, is missing; using checkpoint {restored.step} instead"
        )
    for line in restored.damaged if is_first() else ():
        print(f"vlae_jax: {line}", file=sys.stderr)
    return _from_checkpoint(config, restored)


def facts_of(trained: Trained) -> dict[str, Any]:
    """The description of a model that a checkpoint stores beside its arrays, as JSON values."""
    made_from = dataclasses.asdict(trained.provenance)
    return {name: value for name, value in made_from.items() if name not in _PROGRESS}


def arrays_of(trained: Trained) -> dict[str, Any]:
    """The arrays of a model that a checkpoint stores: parameters, and those of preprocessing."""
    fields = ("mean", "scale", "variance", "average")
    return {
        "params": trained.params,
        "preprocessor": {name: getattr(trained.preprocessor, name) for name in fields},
    }


def _from_checkpoint(config: Config, restored: Restored) -> Trained:
    info, arrays = restored.info, restored.trees["model"]
    blueprint = _blueprint(config, info.model)
    return dataclasses.replace(
        blueprint,
        params=arrays["params"],
        preprocessor=dataclasses.replace(blueprint.preprocessor, **arrays["preprocessor"]),
        provenance=dataclasses.replace(
            blueprint.provenance, step=restored.step, epoch=info.epoch, seconds=info.seconds
        ),
    )


def _blueprint(config: Config, described: Mapping[str, Any]) -> Trained:
    """The model with shapes in place of arrays, from the description in a checkpoint."""
    lists = {name: tuple(value) for name, value in described.items() if isinstance(value, list)}
    if "groups" in lists:
        described_groups = (
            {**group, "columns": tuple(group["columns"])} for group in lists["groups"]
        )
        lists["groups"] = tuple(Group(**group) for group in described_groups)
    provenance = Provenance(**{**described, **lists})  # JSON has no tuples
    dim = math.prod(provenance.image_shape)
    vector, scalar = (jax.ShapeDtypeStruct(shape, jnp.dtype(float)) for shape in ((dim,), ()))
    preprocessor = Preprocessor(
        mean=vector,  # type: ignore[arg-type]
        scale=vector if config.data.preprocess == "standardize" else scalar,  # type: ignore[arg-type]
        variance=vector,  # type: ignore[arg-type]
        average=vector,  # type: ignore[arg-type]
        kind=config.data.preprocess,  # type: ignore[arg-type]  # a run's is never auto
        levels=provenance.levels,
        logit_lambda=config.data.logit_lambda,
        image_shape=provenance.image_shape,
        incomplete=provenance.incomplete,
    )
    model = nnx.eval_shape(lambda: build_network(config, provenance, np.ones(dim)))
    graphdef, params = nnx.split(model)
    return Trained(config, preprocessor, params, graphdef, provenance)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
