"""What a configuration builds: data, preprocessing, network and inference system."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlae_jax.affine_head import WhitenedHead
from vlae_jax.config import Config
from vlae_jax.data import Dataset, load_dataset
from vlae_jax.distributed import DATA, Placement
from vlae_jax.errors import UserError
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.networks import in_full
from vlae_jax.ppca import fit_ppca
from vlae_jax.preprocessing import Preprocessor, fit_preprocessor, fixed_keys
from vlae_jax.systems import System, find_system


class Experiment(NamedTuple):
    """Everything that training and evaluation need, made from a `Config` alone."""

    config: Config
    dataset: Dataset
    preprocessor: Preprocessor
    system: System
    graphdef: Any
    """The network's structure; `merge` joins it with parameters."""
    initial_params: Any

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set; the rest of an epoch's images wait for the next."""
        return len(self.dataset.train) // self.config.training.batch_size

    def merge(self, params: Any) -> VariationalAutoencoder:
        """The model with these parameters, in float32 throughout: for all that is measured."""
        return in_full(self.merge_for_training(params))

    def merge_for_training(self, params: Any) -> VariationalAutoencoder:
        """The same in the precision that it is trained in."""
        return nnx.merge(self.graphdef, params)

    def whitened_head(self, params: Any) -> WhitenedHead | None:
        """The model's `whitened_head`, factored once for all images; what `log_joint` takes."""
        return jax.jit(lambda params: self.merge(params).whitened_head())(params)


def build_experiment(config: Config) -> Experiment:
    """Read the data, fit the preprocessing, initialise the network.

    Raises:
        UserError: If the data or the system cannot be had, or do not fit the configuration.
    """
    spec = find_system(config.inference.method)
    data = config.data
    dataset = load_dataset(
        data.dataset,
        data.data_dir,
        validation_fraction=data.validation_fraction,
        stream=data.stream,
    )
    if config.training.batch_size > len(dataset.train):
        raise UserError(
            f"batch_size {config.training.batch_size} is larger than the training set: "
            f"{dataset.name} has {len(dataset.train)} images after validation is split off"
        )
    wanted, there = config.evaluation.test_images, len(dataset.test)
    if wanted is not None and wanted > there:
        raise UserError(f"test_images is {wanted}, but {dataset.name} has only {there} test images")
    preprocessor = fit_preprocessor(
        dataset.train,
        kind=data.preprocess,
        levels=dataset.levels,
        logit_lambda=data.logit_lambda,
        standardize=data.standardize,
    )
    if data.preprocess == "static_binary":
        assert isinstance(dataset.train, np.ndarray)  # DataConfig refuses to stream them
        dataset = dataset._replace(
            train=_binarize_once(preprocessor, dataset.train, dataset.levels)
        )
    model = VariationalAutoencoder(
        preprocessor.dim,
        latent=config.model.latent,
        hidden=config.model.hidden,
        activation=config.model.activation,
        likelihood=config.likelihood,
        variance=np.asarray(preprocessor.variance),
        per_pixel=config.model.variance == "per_pixel",
        min_std=config.model.min_std,
        posterior_head=spec.head and functools.partial(spec.head, config),
        network=config.model.network,
        channels=config.model.channels,
        image_shape=preprocessor.image_shape,
        precision=config.model.precision,
        rngs=nnx.Rngs(config.training.seed),
    )
    if config.inference.method == "ppca":
        assert isinstance(dataset.train, np.ndarray)  # Config refuses to stream them
        _set_to_ppca(model, preprocessor, dataset.train)
    graphdef, params = nnx.split(model)
    system = spec.build(config.inference)
    return Experiment(config, dataset, preprocessor, system, graphdef, params)


def map_images(
    function: Callable[..., Any],
    images: np.ndarray,
    *arrays: Any,
    batch_size: int,
    placement: Placement | None = None,
) -> Callable[..., Any]:
    """Prepare to apply a one-image function to every image of a set, in batches of one shape.

    The last batch is filled up with repeated images, whose results are dropped: every image
    counts once, whatever the batch size.

    Args:
        function: (params, pixels, *items) → any pytree of arrays; traced once.
        images: (n, height, width, channel).
        arrays: More arrays with n rows, one row given to each call (keys, say).
        batch_size: Images at once; a little more if it takes that to give each device as many.
        placement: Split each batch along `data`, with parameters that are placed already; every
            process must then call, and gets all the results. By default one device does all.

    Returns:
        (params, on_batch) → the pytree with numpy leaves of n rows. `on_batch(done)`, if given,
        is called with the number of images finished.
    """
    n = len(images)
    batch_size = min(batch_size, n)
    if placement:
        batch_size += -batch_size % placement.mesh.shape[DATA]
    starts = range(0, n, batch_size)
    rows = np.minimum(np.arange(len(starts) * batch_size), n - 1).reshape(-1, batch_size)
    compiled = jax.jit(
        jax.vmap(function, in_axes=(None,) + (0,) * (1 + len(arrays))),
        out_shardings=placement and placement.replicated,
    )

    def run(params: Any, on_batch: Callable[[int], None] | None = None) -> Any:
        results = []
        for start, row in zip(starts, rows, strict=True):
            items = (images[row], *(array[row] for array in arrays))
            if placement:
                items = placement.put(items, placement.rows)
            batch = compiled(params, *items)
            results.append(jax.device_get(batch))
            if on_batch:
                on_batch(min(start + batch_size, n))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *results)

    return run


def _set_to_ppca(
    model: VariationalAutoencoder, preprocessor: Preprocessor, images: np.ndarray
) -> None:
    """Give a model without hidden layers the weights that maximise the likelihood of images."""

    def to_model_space(_, pixels, key):
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


def _binarize_once(preprocessor: Preprocessor, images: np.ndarray, levels: int) -> np.ndarray:
    """Training pixels as black or white, so that drawing them again changes nothing."""

    def draw(_, pixels, key):
        return jnp.uint8(preprocessor.apply(key, pixels)[0])

    bits = map_images(draw, images, fixed_keys(len(images)), batch_size=4096)(None)
    return bits.reshape(images.shape) * np.uint8(levels - 1)
