"""The trained model as a value: made from a configuration and data, saved, loaded and used.

An example, an image or the row of a table, is called by its pixels until it is preprocessed: an
array of the shape `Provenance.image_shape`, of any rank.

A `Trained` holds arrays with a static structure, but no data set and no optimizer. The steps from
an image to its posterior are defined in `Trained.infer`: noise → x → observation → inference.
Training, evaluation and all uses call it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, PRNGKeyArray

from vlae_jax.affine_head import WhitenedHead
from vlae_jax.data.dataset import Dataset, has_missing
from vlae_jax.data.preprocessing import Preprocessor
from vlae_jax.densities import LogDensity
from vlae_jax.errors import UserError
from vlae_jax.models.arithmetic import in_full
from vlae_jax.models.autoencoder import Observation, VariationalAutoencoder
from vlae_jax.models.laplace import refine
from vlae_jax.models.likelihoods import Group
from vlae_jax.models.systems import Inference, find_system
from vlae_jax.posterior import Posterior
from vlae_jax.runs.config import Config
from vlae_jax.runs.methods import find_method

Pixels = Num[Array, "..."]
"""One example before preprocessing: pixels (height, width, channel), or numbers of any shape."""


class Keys(NamedTuple):
    """The random keys of one example, one for each purpose; its key is split only here."""

    noise: PRNGKeyArray
    """Key for the noise of preprocessing: dequantization, or Bernoulli draws."""
    inference: PRNGKeyArray
    """Key for the draws that the system makes on the way to its posterior."""
    refinement: PRNGKeyArray
    """Key for the samples that refine the posterior."""
    bound: PRNGKeyArray
    """Key for the samples of the posterior in bounds and estimates."""
    divergence: PRNGKeyArray
    """Key for samples for KL(q ‖ p) and for moments, if they have no closed form."""
    use: PRNGKeyArray
    """Key for other draws of evaluation and uses: output noise, chains, starts."""

    @classmethod
    def split(cls, key: PRNGKeyArray) -> "Keys":
        """Split an example's key into the keys for each purpose."""
        return cls(*jax.random.split(key, len(cls._fields)))


class Inferred(NamedTuple):
    """One example with its inferred posterior, valid within the trace that created it."""

    keys: Keys
    log_det: Float[Array, ""]
    """log|dx/dy| of the preprocessing, nats."""
    at: Observation
    """The model at the example."""
    inference: Inference

    def in_training(self) -> "Inferred":
        """The same with the posterior as training samples it, and without exact diagnostics."""
        posterior = self.inference.for_training
        if posterior is None:
            return self
        return self._replace(inference=self.inference._replace(posterior=posterior, flags={}))

    @property
    def x(self) -> Float[Array, " dim"]:
        """The example in model space, after preprocessing."""
        return self.at.x

    @property
    def log_joint(self) -> LogDensity:
        """The function from z (latent,) to log p(x, z), nats."""
        return self.at.log_joint

    @property
    def posterior(self) -> Posterior:
        """The system's approximate posterior."""
        return self.inference.posterior


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The data that a model was trained on, and the length of its training."""

    dataset: str
    """Name of the data set."""
    source: str
    """Origin of its images, as a text for users."""
    fingerprint: str
    """Fingerprint of all its images; see `data.sets.Dataset`."""
    levels: int
    """Number of values that a pixel may take; 0 for data that are no pixels."""
    image_shape: tuple[int, ...]
    """Shape of an example: (height, width, channel), or (dim,) for the row of a table."""
    columns: tuple[str, ...] | None = None
    """Names of a table's columns, where it had any."""
    incomplete: bool = False
    """Whether the data had missing entries: then the encoder also sees which are missing."""
    groups: tuple[Group, ...] = ()
    """The output density of each group of columns; none for that of the configuration."""
    # The fields below are not compared, so that models that differ only in the length of their
    # training have equal pytree structures.
    step: int = dataclasses.field(default=0, compare=False)
    """Number of training steps that led to the parameters."""
    epoch: float = dataclasses.field(default=0.0, compare=False)
    """Number of passes over the training images in these steps."""
    seconds: float = dataclasses.field(default=0.0, compare=False)
    """Training time in seconds."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["preprocessor", "params", "head"],
    meta_fields=["config", "graphdef", "provenance"],
)
@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with everything needed to use it, as a pytree: pass it to `jit` as an argument.

    `fit`, `load` and `initialize` create one.
    """

    config: Config
    preprocessor: Preprocessor
    params: Any
    graphdef: Any
    """The network's structure, which `flax.nnx.merge` joins with the parameters."""
    provenance: Provenance
    head: WhitenedHead | None = None
    """The output layer, factored for evaluations at many z, or None; set by `factored`."""

    @property
    def model(self) -> VariationalAutoencoder:
        """The network with float32 products throughout, for all measurements."""
        return in_full(self.model_as_trained)

    @property
    def model_as_trained(self) -> VariationalAutoencoder:
        """The network with products in the precision of its training."""
        return nnx.merge(self.graphdef, self.params)

    def infer(
        self,
        key: PRNGKeyArray,
        pixels: Pixels,
        *,
        start: Float[Array, " latent"] | None = None,
        training: bool = False,
    ) -> Inferred:
        """Infer the posterior of one image; a pure function, for `jax.vmap` over keys and images.

        Args:
            key: Random key of this example; see `Keys`.
            pixels: One example, of the shape and kind of those of the training.
            start: Where a search for the mode may start, (latent,). It starts there if that is
                finite and has a larger log joint than the encoder's mean, else at the latter.
            training: Multiply in the precision of the training, and take the posterior that the
                configuration names for it; otherwise float32, and the exact posterior.
        """
        keys, log_det, at = self.observe(key, pixels, training=training)
        if start is not None:
            known = jnp.where(jnp.isfinite(start), start, at.mean)
            is_better = at.log_joint(known) > at.log_joint(at.mean)
            at = at._replace(start=jnp.where(is_better, known, at.mean))
        return Inferred(keys, log_det, at, self.infer_at(at, keys, training=training))

    def infer_at(self, at: Observation, keys: Keys, *, training: bool = False) -> Inference:
        """Infer the posterior of an observation, which may be one that the model drew itself."""
        config = self.config.inference
        if not training:
            config = dataclasses.replace(config, posterior="exact")
        inference = find_system(config.method)(at, keys.inference, config)
        if config.refine == "variational":
            inference = refine(at, inference, keys.refinement, config)
        return inference

    def observe(
        self,
        key: PRNGKeyArray,
        pixels: Pixels,
        *,
        missing: Array | None = None,
        training: bool = False,
    ) -> tuple[Keys, Float[Array, ""], Observation]:
        """Preprocess one image and bind the model to it, without inference.

        Args:
            key: Random key of this example; see `Keys`.
            pixels: One example, of the shape and kind of those of the training.
            missing: Booleans of the same shape: entries to ignore. The encoder gets the training
                mean in their place. By default those that are NaN, where the preprocessor is told
                that there may be any (`for_examples`).
            training: Multiply in the precision of the training; otherwise in float32.

        Returns:
            The example's keys, log|dx/dy| of the preprocessing in nats, and the observation.
        """
        keys = Keys.split(key)
        x, log_det = self.preprocessor.apply(keys.noise, pixels)
        model = self.model_as_trained if training else self.model
        preprocessor = self.preprocessor
        if missing is None and not preprocessor.incomplete:
            head, offset = None if training else self.head, preprocessor.log_units()
            return keys, log_det, model.at(x, head=head, offset=offset)
        observed = ~jnp.isnan(x) if missing is None else ~missing.reshape(-1)
        if missing is not None and preprocessor.incomplete:
            observed = observed & ~jnp.isnan(x)
        offset = preprocessor.log_units(observed)
        at = model.at(x, observed=observed, fill=preprocessor.average, offset=offset)
        return keys, log_det, at

    def for_examples(self, *parts: np.ndarray) -> "Trained":
        """Return a copy that takes NaN for missing entries if these examples have any, else self.

        It is slower: what a complete example lets the model skip must be done.
        """
        if self.preprocessor.incomplete or not any(has_missing(part) for part in parts):
            return self
        changed = dataclasses.replace(self.preprocessor, incomplete=True)
        return dataclasses.replace(self, preprocessor=changed)

    def describe(self, dataset: Dataset) -> str:
        """What its data are taken for, in words: kind, size, preprocessing and likelihood."""
        words = {"standardize": "centered, and divided by one standard deviation"}
        if self.preprocessor.is_table:
            words = {"standardize": "measurements standardized per column"}
        kind = self.preprocessor.kind
        preprocessing = {"none": "as they are", **words}.get(kind, kind)
        return f"{dataset.description}, {preprocessing}; likelihood {self.config.likelihood}"

    def with_inference(self, **changes: Any) -> "Trained":
        """Return a copy with other inference settings: a method, its steps, a refinement.

        Any method that needs no network of its own can replace the trained one; for example,
        `method="vlae"` gives the Laplace posterior of a VAE.

        Raises:
            UserError: If the settings are invalid, or need a network that the model lacks.
        """
        changed = self.with_config("inference", **changes)
        method, trained_with = changed.config.inference.method, self.config.inference.method
        if find_method(method).head not in (None, find_method(trained_with).head):
            raise UserError(
                f"method {method} needs a network of its own, which a run of {trained_with} lacks"
            )
        return changed

    def factored(self) -> "Trained":
        """Return a copy with the output layer factored once for all images, where that pays off."""
        return dataclasses.replace(self, head=_whitened_head(self))

    def with_params(self, params: Any) -> "Trained":
        """Return a copy with other parameters, and without a factored output layer."""
        return dataclasses.replace(self, params=params, head=None)

    def with_config(self, section: str, **changes: Any) -> "Trained":
        """Return a copy with changed fields in one section of the configuration.

        Raises:
            UserError: If the new values are invalid.
        """
        changed = dataclasses.replace(getattr(self.config, section), **changes)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, **{section: changed})
        )


@jax.jit
def _whitened_head(trained: Trained) -> WhitenedHead | None:
    return trained.model.whitened_head()
