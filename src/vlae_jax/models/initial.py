"""The model before training: preprocessing fitted, network initialized, linear decoders fitted."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.data.dataset import Dataset, has_missing
from vlae_jax.data.preprocessing import Preprocessor, fit_preprocessor, fixed_keys
from vlae_jax.errors import UserError, require
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.columns import groups_of, is_continuous
from vlae_jax.models.linear import LinearModel
from vlae_jax.models.systems import find_head, find_linear_fit
from vlae_jax.models.trained import Provenance, Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.parallel.placement import memory_of
from vlae_jax.runs.config import Config


def initialize(config: Config, dataset: Dataset) -> Trained:
    """Fit the preprocessing to the training images and initialize the network.

    Linear decoders (ppca, fa) are already fitted here.

    Raises:
        UserError: If data and configuration do not fit each other, or the memory.
    """
    config = config.for_data(pixels=dataset.levels > 0)
    if config.training.batch_size > len(dataset.train):
        what = "rows" if len(dataset.train.shape) == 2 else "images"
        raise UserError(
            f"batch_size {config.training.batch_size} is larger than the training set: "
            f"{dataset.name} has {len(dataset.train)} {what} after validation is split off; choose "
            "a smaller --batch-size"
        )
    dataset.first_test_images(config.evaluation.test_images)
    learned_from = (dataset.train, dataset.validation)
    incomplete = any(isinstance(p, np.ndarray) and has_missing(p) for p in learned_from)
    if incomplete and find_linear_fit(config.inference.method):
        raise UserError(
            f"{config.inference.method} is fitted in closed form to complete data, and entries are "
            "missing: choose another --method, or leave out what is incomplete"
        )
    groups = groups_of(config, dataset)
    continuous = is_continuous(groups, math.prod(dataset.train.shape[1:]))
    preprocessor = fit_preprocessor(
        dataset.train,
        kind=config.data.preprocess,  # type: ignore[arg-type]  # for_data resolves auto
        levels=dataset.levels,
        logit_lambda=config.data.logit_lambda,
        standardize=config.data.standardize,
        continuous=continuous,
        incomplete=incomplete,
    )
    provenance = Provenance(
        dataset.name,
        dataset.source,
        dataset.fingerprint,
        dataset.levels,
        tuple(preprocessor.image_shape),
        dataset.columns,
        incomplete,
        groups,
    )
    variance, average = np.asarray(preprocessor.variance), np.asarray(preprocessor.average)
    _require_memory(nnx.eval_shape(lambda: build_network(config, provenance, variance)))
    model = build_network(config, provenance, variance, average)
    if fit_linear := find_linear_fit(config.inference.method):
        assert isinstance(dataset.train, np.ndarray)  # Config refuses to stream them
        _set_to_linear(model, preprocessor, dataset.train, fit_linear)
    graphdef, params = nnx.split(model)
    return Trained(config, preprocessor, params, graphdef, provenance)


def _require_memory(model: VariationalAutoencoder) -> None:
    """Refuse a network whose training cannot fit into memory, before any of it is taken.

    On one device there are its parameters to begin with, those in training, and Adam's two moments.
    Several devices may share all but the first.
    """
    leaves = jax.tree.leaves(nnx.state(model))
    copies = 4 if jax.device_count() == 1 else 1
    needed = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    present = memory_of(jax.local_devices()[0])
    require(
        needed <= present,
        f"a network of {sum(leaf.size for leaf in leaves)} parameters takes {needed / 1e9:.4g} GB "
        f"of memory in training, and there are {present / 1e9:.4g} GB: choose smaller --hidden, "
        "--channels or --latent",
    )


def begun_from(trained: Trained, source: Trained) -> Trained:
    """Return an untrained model with the parameters of another one, where both have them.

    Raises:
        UserError: If the other was trained on other images, or its networks have other sizes.
    """
    if source.provenance.fingerprint != trained.provenance.fingerprint or (
        source.preprocessor.kind != trained.preprocessor.kind
    ):
        raise UserError(
            f"init_from: that run was trained on {source.provenance.source}, preprocessed as "
            f"{source.preprocessor.kind}; it must be the same images, preprocessed alike"
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(trained.params)
    found = dict(jax.tree_util.tree_leaves_with_path(source.params))
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if path in found and found[path].shape != leaf.shape:
            raise UserError(
                f"init_from: {name} has shape {found[path].shape} in that run, and {leaf.shape} "
                "here; choose the model options of that run"
            )
        if path not in found and not name.startswith(("posterior_head", "prior")):
            raise UserError(f"init_from: that run has no {name}; choose its model options")
    return trained.with_params(
        jax.tree.unflatten(structure, [found.get(path, leaf) for path, leaf in paths])
    )


def build_network(
    config: Config,
    provenance: Provenance,
    variance: np.ndarray,
    average: np.ndarray | None = None,
) -> VariationalAutoencoder:
    """The network of a configuration, with its initial weights.

    Args:
        config: The configuration.
        provenance: The data: their shape and the groups of their columns, and whether the encoder
            also sees which entries are missing.
        variance: Of each entry in model space, (dim,): where the output variance starts.
        average: Mean of each entry in model space, (dim,): where the decoder starts.

    Raises:
        UserError: If network conv is to see the rows of a table.
    """
    shape = provenance.image_shape
    if config.model.network == "conv" and len(shape) != 3:
        raise UserError("network conv is for images, and the data are a table: choose mlp")
    head = find_head(config.inference.method)
    return VariationalAutoencoder(
        math.prod(shape),
        latent=config.model.latent,
        prior_components=config.model.prior_components if config.model.prior == "mixture" else None,
        hidden=config.model.hidden,
        activation=config.model.activation,
        likelihood=provenance.groups or config.likelihood,
        variance=variance,
        average=average,
        per_pixel=config.model.variance == "per_pixel",
        min_std=config.model.min_std,
        posterior_head=head and functools.partial(head, config),
        network=config.model.network,
        channels=config.model.channels,
        image_shape=shape,
        mask_input=provenance.incomplete,
        precision=config.model.precision,
        rngs=nnx.Rngs(config.training.seed),
    )


def _set_to_linear(
    model: VariationalAutoencoder,
    preprocessor: Preprocessor,
    images: np.ndarray,
    fit_linear: Callable[..., LinearModel],
) -> None:
    """Set a model without hidden layers to the weights that maximize the likelihood of images."""

    def to_model_space(_: None, pixels: Array, key: PRNGKeyArray) -> Array:
        return preprocessor.apply(key, pixels)[0]

    assert isinstance(model.head, nnx.Linear)
    xs = map_images(to_model_space, images, fixed_keys(len(images)), batch_size=4096)(None)
    fitted = fit_linear(xs, model.head.in_features, min_variance=model.min_std**2)
    for linear, kernel, bias in (
        (model.head, fitted.kernel, fitted.bias),
        (model.mean, fitted.posterior_kernel, -fitted.bias @ fitted.posterior_kernel),
        (model.log_std, np.zeros_like(fitted.posterior_kernel), np.log(fitted.posterior_std)),
    ):
        linear.kernel[...] = jnp.asarray(kernel, jnp.float32)
        linear.bias[...] = jnp.asarray(bias, jnp.float32)  # type: ignore[index]
    shape = model.log_var.shape
    model.set_log_var(np.log(fitted.variance if shape else fitted.variance[0]))
