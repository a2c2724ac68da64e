"""The compiled pieces of training: state, optimizer, step, validation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlae_jax.data.dataset import Dataset
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.trained import Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.parallel.placement import Placement
from vlae_jax.runs.config import Config, TrainingConfig
from vlae_jax.training.batches import Feed, binarized_once, make_feed
from vlae_jax.training.objective import loss_fn, objective

_VALIDATION_BATCH = 256


class TrainState(NamedTuple):
    """Everything that changes during training; resuming from it reproduces a run bit for bit."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    """Number of steps done."""
    sums: dict[str, Float[Array, ""]]
    """Sums of the batch means of the metrics since they were last logged."""
    summed: Int[Array, ""]
    """Number of steps in `sums`."""
    bad_step: Int[Array, ""]
    """First step whose loss or gradient was not finite, or -1. From that step on the state does not
    change."""
    modes: Float[Array, "images latent"] | None = None
    """With stored modes: where the last search for each training image ended, NaN before the first
    one."""

    def besides_params(self) -> dict[str, Any]:
        """All fields but the parameters, by name, and without modes if none are stored."""
        fields = self._replace(params=None)._asdict()
        return {name: value for name, value in fields.items() if value is not None}


def make_optimizer(
    config: TrainingConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Make Adam with the configured schedule, warm-up, clipping and decay of weights."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total_steps, warmup + 1))
    elif warmup:
        rate = optax.linear_schedule(0.0, peak, warmup)
    else:
        rate = optax.constant_schedule(peak)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    adam = optax.adam(rate)
    if config.weight_decay:
        adam = optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_decaying)
    return optax.with_extra_args_support(optax.chain(*clip, adam))


def _is_decaying(params: Any) -> Any:
    """Whether each leaf is a weight matrix of the decoder."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return name.startswith(("['features']", "['head']")) and "['kernel']" in name

    return jax.tree_util.tree_map_with_path(decays, params)


def _shapes_of_metrics(trained: Trained) -> dict[str, jax.ShapeDtypeStruct]:
    is_pixels = trained.preprocessor.levels and not trained.preprocessor.incomplete
    batch = jnp.zeros((1, *trained.preprocessor.image_shape), jnp.uint8 if is_pixels else float)
    keys = jax.random.split(jax.random.key(0), 1)
    return jax.eval_shape(lambda: loss_fn(trained.params, trained, batch, keys)[1].metrics)


def _no_modes(config: Config, num_images: int) -> np.ndarray | None:
    if config.training.modes != "stored":
        return None
    return np.full((num_images, config.model.latent), np.nan, np.float32)


class Trainer:
    """The compiled pieces of one training run: first state, step, validation.

    Args:
        trained: The model with its initial parameters.
        dataset: The images.
        placement: The devices; by default all.
        feed: Another trainer's, of the same images, to hold them once.

    Raises:
        UserError: If a batch cannot be split evenly over the devices.
    """

    def __init__(
        self,
        trained: Trained,
        dataset: Dataset,
        placement: Placement | None = None,
        feed: Feed | None = None,
    ) -> None:
        config = trained.config.training
        self.trained, self.dataset = trained, dataset
        self.placement = placement = placement or Placement.of()
        placement.require_even(config.batch_size, config.microbatches)
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        """Number of whole batches in the training set; an epoch omits the images left over."""
        self.total_steps = self.steps_per_epoch * config.epochs
        self._optimizer = make_optimizer(config, self.total_steps)
        self._root = jax.random.key(config.seed)
        if feed is None:
            images = binarized_once(trained.preprocessor, dataset.train)
            feed = make_feed(images, config, placement)
        self.feed = feed
        self._sums = _shapes_of_metrics(trained)
        self._shardings = placement.of_parameters(jax.eval_shape(self._first_state))
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(self._shardings, placement.replicated)
        )
        self._validate = map_images(
            self._validate_one,
            dataset.validation,
            fixed_keys(len(dataset.validation)),
            batch_size=_VALIDATION_BATCH,
            placement=placement,
        )

    def init(self) -> TrainState:
        """Make the state before the first step."""
        return self.placement.put(self._first_state(), self._shardings)

    def _first_state(self) -> TrainState:
        params = jax.tree.map(jnp.copy, self.trained.params)  # the step donates its arguments
        return TrainState(
            params=params,
            opt_state=self._optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
            sums=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._sums),
            summed=jnp.zeros((), jnp.int32),
            modes=_no_modes(self.trained.config, len(self.dataset.train)),  # type: ignore[arg-type]
            bad_step=jnp.full((), -1, jnp.int32),
        )

    def pretrainer(self) -> "Trainer":
        """Return the trainer of the same network as a plain VAE, with the same images."""
        training = self.trained.config.training
        objective = "elbo" if training.objective == "evidence" else training.objective
        plain = self.trained.with_config("training", objective=objective, modes="encoder")
        plain = plain.with_inference(method="vae", refine="none")
        return Trainer(plain, self.dataset, self.placement, self.feed)

    def without_sums(self, state: TrainState) -> TrainState:
        """Return the state with the sums of its metrics reset to zero."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._sums)
        sums, summed = self.placement.put((zeros, np.zeros((), np.int32)))
        return state._replace(sums=sums, summed=summed)

    def taken_over(self, state: TrainState) -> TrainState:
        """Return the state of another trainer of the same network as one of this trainer."""
        modes = _no_modes(self.trained.config, len(self.dataset.train))
        if modes is not None and state.modes is None:
            state = state._replace(
                modes=self.placement.put(modes, self.placement.of_parameters(modes))
            )
        return self.without_sums(state._replace(modes=None if modes is None else state.modes))

    def _step(self, state: TrainState, *arguments: Array) -> tuple[TrainState, Float[Array, ""]]:
        pixels, rows = self.feed.batch(state.step, *arguments)
        keys = jax.random.split(jax.random.fold_in(self._root, state.step), pixels.shape[0])

        def loss_and_grads(params: Any, *arguments: Any) -> tuple[Any, Array | None]:
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, aside), grads = differentiate(params, self.trained, *arguments)
            return (loss, aside.metrics, grads), None if state.modes is None else aside.modes

        (loss, metrics, grads), ends = self.placement.mean_of_shards(
            loss_and_grads,
            self.placement.gathered(state.params),
            *(pixels, keys, None if state.modes is None else state.modes[rows]),
            microbatches=self.trained.config.training.microbatches,
        )
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        new = TrainState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            step=state.step + 1,
            sums=jax.tree.map(jnp.add, state.sums, metrics),
            summed=state.summed + 1,
            modes=None if state.modes is None else state.modes.at[rows].set(ends),
            bad_step=bad_step,
        )
        new = jax.tree.map(lambda new, old: jnp.where(bad_step < 0, new, old), new, state)
        return new._replace(bad_step=bad_step), loss

    def _validate_one(self, params: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        training = self.trained.config.training
        kind = "iwae" if training.objective in ("iwae", "dreg") else "elbo"
        samples = training.train_samples if kind == "iwae" else 1
        trained = self.trained.with_params(self.placement.gathered(params))
        _, metrics = objective(trained.infer(key, pixels), kind=kind, num_samples=samples)
        return metrics

    def validate(self, params: Any, num_batches: int | None = None) -> dict[str, float]:
        """Return the mean metrics on the validation images, with the same noise in every call.

        Args:
            params: Parameters of the network.
            num_batches: Take only the images of so many first batches; by default all.
        """
        found = self._validate(params, num_batches=num_batches)
        return jax.tree.map(lambda values: float(np.mean(values)), found)
