"""The trained model as a value: made from a configuration and data, saved, loaded and used.

A `Trained` holds arrays with a static structure, and no data set and no optimizer. What follows
from one image is spelled once, in `Trained.infer`: noise → x → observation → inference. Training,
evaluation and every use call it.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from vlae_jax.affine_head import WhitenedHead
from vlae_jax.data.preprocessing import Preprocessor, fit_preprocessor, fixed_keys
from vlae_jax.data.sets import Dataset
from vlae_jax.densities import LogDensity
from vlae_jax.errors import UserError
from vlae_jax.models.arithmetic import in_full
from vlae_jax.models.autoencoder import Observation, VariationalAutoencoder
from vlae_jax.models.ppca import fit_ppca
from vlae_jax.models.systems import Inference, find_head, find_system, refine
from vlae_jax.parallel.mapping import map_images
from vlae_jax.parallel.placement import Placement
from vlae_jax.parallel.processes import is_first
from vlae_jax.posterior import Posterior
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints, Restored
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.methods import find_method

Pixels = UInt8[Array, "height width channel"]

_PROGRESS = ("step", "epoch", "seconds")
"""Fields of `Provenance` that change while a model is trained."""


class Keys(NamedTuple):
    """The random keys of one example, one for each purpose: nothing else splits its key."""

    noise: PRNGKeyArray
    """What preprocessing adds: dequantization, or Bernoulli draws."""
    inference: PRNGKeyArray
    """What the system draws on the way to its posterior."""
    refinement: PRNGKeyArray
    """Samples that the posterior is refined by."""
    bound: PRNGKeyArray
    """Samples of the posterior, in bounds and estimates."""
    divergence: PRNGKeyArray
    """Samples for KL(q ‖ p) and for moments, where they are not known in closed form."""
    use: PRNGKeyArray
    """What a use draws besides: output noise, chains, starts."""

    @classmethod
    def split(cls, key: PRNGKeyArray) -> "Keys":
        """The keys that come from an example's one."""
        return cls(*jax.random.split(key, len(cls._fields)))


class Inferred(NamedTuple):
    """What is known of one example, within the trace that asked for it."""

    keys: Keys
    log_det: Float[Array, ""]
    """log|dx/dy| of the preprocessing, nats."""
    at: Observation
    """The model at the example."""
    inference: Inference

    @property
    def x(self) -> Float[Array, " dim"]:
        """The example as the model sees it."""
        return self.at.x

    @property
    def log_joint(self) -> LogDensity:
        """Z (latent,) → log p(x, z), nats."""
        return self.at.log_joint

    @property
    def posterior(self) -> Posterior:
        """The system's approximate posterior."""
        return self.inference.posterior


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a model was trained on, and for how long."""

    dataset: str
    """Name of the data set."""
    source: str
    """Where its images came from, for people."""
    fingerprint: str
    """Of all its images; see `data.sets.Dataset`."""
    levels: int
    """How many values a pixel may take."""
    image_shape: tuple[int, ...]
    """(height, width, channel)."""
    # Models of one structure stay one kind of pytree however long they were trained.
    step: int = dataclasses.field(default=0, compare=False)
    """Training steps that led to the parameters."""
    epoch: float = dataclasses.field(default=0.0, compare=False)
    """Passes over the training images that they are."""
    seconds: float = dataclasses.field(default=0.0, compare=False)
    """Time spent on them."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["preprocessor", "params", "head"],
    meta_fields=["config", "graphdef", "provenance"],
)
@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with all that is needed to use it. A pytree: pass it through `jit` as an argument.

    `training.fit` and `load` make one.
    """

    config: Config
    preprocessor: Preprocessor
    params: Any
    graphdef: Any
    """The network's structure, which `flax.nnx.merge` joins with the parameters."""
    provenance: Provenance
    head: WhitenedHead | None = None
    """The output layer, factored for evaluations at many z; `factored` fills it in."""

    @property
    def model(self) -> VariationalAutoencoder:
        """The network in float32 throughout: for all that is measured."""
        return in_full(self.model_as_trained)

    @property
    def model_as_trained(self) -> VariationalAutoencoder:
        """The network in the precision that it is trained in."""
        return nnx.merge(self.graphdef, self.params)

    def infer(self, key: PRNGKeyArray, pixels: Pixels, *, training: bool = False) -> Inferred:
        """Go from one image to its posterior. Pure: `jax.vmap` over keys and images.

        Args:
            key: Random key of this example; see `Keys`.
            pixels: Integers of shape (height, width, channel).
            training: Multiply in the precision that the model is trained in.
        """
        keys, log_det, at = self.observe(key, pixels, training=training)
        config = self.config.inference
        inference = find_system(config.method)(at, keys.inference, config)
        if config.refine == "variational":
            inference = refine(at, inference, keys.refinement, config)
        return Inferred(keys, log_det, at, inference)

    def observe(
        self,
        key: PRNGKeyArray,
        pixels: Pixels,
        *,
        missing: Array | None = None,
        training: bool = False,
    ) -> tuple[Keys, Float[Array, ""], Observation]:
        """Go from one image to the model bound to it: `infer` before the inference.

        Args:
            key: Random key of this example; see `Keys`.
            pixels: Integers of shape (height, width, channel).
            missing: Booleans of the same shape: pixels that are not looked at. The encoder sees the
                training mean in their place.
            training: Multiply in the precision that the model is trained in.

        Returns:
            The example's keys, log|dx/dy| of the preprocessing in nats, and the observation.
        """
        keys = Keys.split(key)
        x, log_det = self.preprocessor.apply(keys.noise, pixels)
        model = self.model_as_trained if training else self.model
        if missing is None:
            return keys, log_det, model.at(x, head=None if training else self.head)
        observed = ~missing.reshape(-1)
        return keys, log_det, model.at(x, observed=observed, fill=self.preprocessor.average)

    def with_inference(self, **changes: Any) -> "Trained":
        """The same with another way to infer: a method, its steps, a refinement.

        Any method that needs no network of its own may take the place of the one trained: the
        Laplace posterior (`method="vlae"`) of a VAE, say.

        Raises:
            UserError: If the choice is refused, or needs a network that the model lacks.
        """
        changed = self.with_config("inference", **changes)
        method, trained_with = changed.config.inference.method, self.config.inference.method
        if find_method(method).head not in (None, find_method(trained_with).head):
            raise UserError(
                f"method {method} needs a network of its own, which a run of {trained_with} lacks"
            )
        return changed

    def factored(self) -> "Trained":
        """The same with the output layer factored once for all images, where that pays."""
        head = jax.jit(lambda trained: trained.model.whitened_head())(self)
        return dataclasses.replace(self, head=head)

    def with_params(self, params: Any) -> "Trained":
        """The same with other parameters; what was factored of the old ones goes."""
        return dataclasses.replace(self, params=params, head=None)

    def with_config(self, section: str, **changes: Any) -> "Trained":
        """The same with another choice in one section of the configuration: how it is used.

        Raises:
            UserError: If the choice is refused.
        """
        changed = dataclasses.replace(getattr(self.config, section), **changes)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, **{section: changed})
        )


def initialize(config: Config, dataset: Dataset) -> Trained:
    """Fit the preprocessing to the training images and initialize the network.

    Probabilistic PCA is fitted here, in closed form.

    Raises:
        UserError: If data and configuration do not fit each other.
    """
    if config.training.batch_size > len(dataset.train):
        raise UserError(
            f"batch_size {config.training.batch_size} is larger than the training set: "
            f"{dataset.name} has {len(dataset.train)} images after validation is split off"
        )
    dataset.first_test_images(config.evaluation.test_images)
    preprocessor = fit_preprocessor(
        dataset.train,
        kind=config.data.preprocess,
        levels=dataset.levels,
        logit_lambda=config.data.logit_lambda,
        standardize=config.data.standardize,
    )
    model = _network(config, preprocessor.image_shape, np.asarray(preprocessor.variance))
    if config.inference.method == "ppca":
        assert isinstance(dataset.train, np.ndarray)  # Config refuses to stream them
        _set_to_ppca(model, preprocessor, dataset.train)
    graphdef, params = nnx.split(model)
    provenance = Provenance(
        dataset.name,
        dataset.source,
        dataset.fingerprint,
        dataset.levels,
        tuple(preprocessor.image_shape),
    )
    return Trained(config, preprocessor, params, graphdef, provenance)


def save(trained: Trained, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a trained model into a folder that `load` and all commands on runs read.

    Args:
        trained: The model.
        folder: Local, or gs://BUCKET/FOLDER. It must not hold a run yet.
        overwrite: Delete a run that is there.

    Raises:
        UserError: If something is there already, or nothing can be written there.
    """
    run = RunFolder.at(folder)
    run.create(trained.config, overwrite=overwrite)
    checkpoints = Checkpoints(run.checkpoints)
    step = trained.provenance.step
    made = trained.provenance
    info = CheckpointInfo(made.seconds, made.epoch, step, float("-inf"), describe(trained))
    checkpoints.save(step, {"model": arrays_of(trained)}, info)
    checkpoints.close()


def load(folder: str | os.PathLike[str], placement: Placement | None = None) -> Trained:
    """Read the model of a run folder, that of its best checkpoint. Needs nothing but the folder.

    No data set is read, and nothing of the training's state. What is used in place of a damaged or
    missing checkpoint is said on stderr.

    Args:
        folder: What training or `save` wrote: local, or gs://BUCKET/FOLDER.
        placement: Devices that the parameters are placed on; by default the first one here.

    Raises:
        UserError: If there is no such run, it is of another version, or nothing readable is left.
        Unreadable: If it is undamaged and cannot be read for now.
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


def describe(trained: Trained) -> dict[str, Any]:
    """What a checkpoint says of the model besides its arrays, as JSON holds it."""
    made_from = dataclasses.asdict(trained.provenance)
    return {name: value for name, value in made_from.items() if name not in _PROGRESS}


def arrays_of(trained: Trained) -> dict[str, Any]:
    """What a checkpoint holds of the model: parameters, and the preprocessing's arrays."""
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
    """The model with shapes in the place of arrays, from what a checkpoint says of it."""
    provenance = Provenance(
        **{**described, "image_shape": tuple(described["image_shape"])}  # JSON has lists alone
    )
    dim = math.prod(provenance.image_shape)
    vector, scalar = (jax.ShapeDtypeStruct(shape, jnp.dtype(float)) for shape in ((dim,), ()))
    preprocessor = Preprocessor(
        mean=vector,  # type: ignore[arg-type]
        scale=scalar,  # type: ignore[arg-type]
        variance=vector,  # type: ignore[arg-type]
        average=vector,  # type: ignore[arg-type]
        kind=config.data.preprocess,
        levels=provenance.levels,
        logit_lambda=config.data.logit_lambda,
        image_shape=provenance.image_shape,
    )
    model = nnx.eval_shape(lambda: _network(config, provenance.image_shape, np.ones(dim)))
    graphdef, params = nnx.split(model)
    return Trained(config, preprocessor, params, graphdef, provenance)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _network(
    config: Config, image_shape: tuple[int, ...], variance: np.ndarray
) -> VariationalAutoencoder:
    head = find_head(config.inference.method)
    return VariationalAutoencoder(
        math.prod(image_shape),
        latent=config.model.latent,
        hidden=config.model.hidden,
        activation=config.model.activation,
        likelihood=config.likelihood,
        variance=variance,
        per_pixel=config.model.variance == "per_pixel",
        min_std=config.model.min_std,
        posterior_head=head and functools.partial(head, config),
        network=config.model.network,
        channels=config.model.channels,
        image_shape=image_shape,
        precision=config.model.precision,
        rngs=nnx.Rngs(config.training.seed),
    )


def _set_to_ppca(
    model: VariationalAutoencoder, preprocessor: Preprocessor, images: np.ndarray
) -> None:
    """Give a model without hidden layers the weights that maximize the likelihood of images."""

    def to_model_space(_: None, pixels: Array, key: PRNGKeyArray) -> Array:
        return preprocessor.apply(key, pixels)[0]

    assert isinstance(model.head, nnx.Linear)
    xs = map_images(to_model_space, images, fixed_keys(len(images)), batch_size=4096)(None)
    fitted = fit_ppca(xs, model.head.in_features, min_variance=model.min_std**2)
    for linear, kernel, bias in (
        (model.head, fitted.kernel, fitted.bias),
        (model.mean, fitted.posterior_kernel, -fitted.bias @ fitted.posterior_kernel),
        (model.log_std, np.zeros_like(fitted.posterior_kernel), np.log(fitted.posterior_std)),
    ):
        linear.kernel[...] = jnp.asarray(kernel, jnp.float32)
        linear.bias[...] = jnp.asarray(bias, jnp.float32)  # type: ignore[index]
    model.set_log_var(np.log(fitted.variance))
