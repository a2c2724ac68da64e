"""The one training loop: objective, jitted step, epochs, checkpoints, resumption."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlae_jax import distributed
from vlae_jax.bounds import elbo, iwae_bound
from vlae_jax.checkpoints import Checkpoints, Notes
from vlae_jax.config import TrainingConfig
from vlae_jax.distributed import Placement
from vlae_jax.errors import RunFailure, Stopped, UserError
from vlae_jax.experiment import Experiment, map_images
from vlae_jax.feeding import make_feed
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.posterior import kl_to_standard_normal
from vlae_jax.preprocessing import fixed_keys
from vlae_jax.progress import ProgressLine
from vlae_jax.run_folder import RunFolder
from vlae_jax.systems import System

_VALIDATION_BATCH = 256


class TrainState(NamedTuple):
    """All that changes while training. A checkpoint of it continues bit for bit."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    """Steps done."""
    sums: dict[str, Float[Array, ""]]
    """Batch means of the metrics, added up since they were last logged."""
    summed: Int[Array, ""]
    """Steps in `sums`."""
    bad_step: Int[Array, ""]
    """First step whose loss or gradient was not finite, else -1. From there on nothing changes."""


class MetricWriter(Protocol):
    """A second place for scalars beside metrics.jsonl: TensorBoard event files."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Log one value."""
        ...


class FitOptions(NamedTuple):
    """How a run is kept, none of which changes its numbers."""

    log_every: int = 20
    checkpoint_every: int = 500
    writer: MetricWriter | None = None


def objective(
    model: VariationalAutoencoder,
    system: System,
    x: Float[Array, " dim"],
    key: PRNGKeyArray,
    *,
    kind: str = "elbo",
    num_samples: int = 1,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What training maximises for one example, and the metrics beside it, all in nats.

    The objective is a bound, or an estimate, of log p(x) less the system's amortisation loss. The
    metrics hold the ELBO itself, KL(q ‖ p), and their sum, the expected reconstruction
    log-likelihood, besides the system's flags as numbers; with another objective than the ELBO
    that too.
    """
    inference = system(model, x, key)
    log_joint, posterior = model.log_joint(x), inference.posterior
    constant = jax.lax.stop_gradient(posterior)
    if kind == "elbo":
        value = bound = elbo(key, log_joint, posterior, num_samples=num_samples)
    else:
        if kind == "evidence":
            # At a mode the Laplace evidence is log p(x, z) - log q(z).
            mode = posterior.mean  # type: ignore[attr-defined]
            value = log_joint(mode) - posterior.log_prob(mode)  # type: ignore[attr-defined]
        else:
            value = iwae_bound(
                key,
                log_joint,
                posterior,
                num_samples=num_samples,
                doubly_reparameterized=kind == "dreg",
            )
        bound = jax.lax.stop_gradient(elbo(key, log_joint, constant, num_samples=num_samples))
    kl = kl_to_standard_normal(key, constant, num_samples=num_samples)
    metrics = {
        "elbo": bound,
        "kl": kl,
        "reconstruction": bound + kl,
        "amortization_loss": inference.amortization_loss,
        **({} if kind == "elbo" else {"objective": value}),
        **{name: flag.astype(bound.dtype) for name, flag in inference.flags.items()},
    }
    return value - inference.amortization_loss, metrics


def loss_fn(
    params: Any,
    experiment: Experiment,
    xs: Float[Array, "batch dim"],
    keys: PRNGKeyArray,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The batch mean to be minimised, nats per image: the only minus sign in the project."""
    training = experiment.config.training

    def one(x, key):
        return objective(
            experiment.merge_for_training(params),
            experiment.system,
            x,
            key,
            kind=training.objective,
            num_samples=training.train_samples,
        )

    values, metrics = jax.vmap(one)(xs, keys)
    return -jnp.mean(values), jax.tree.map(jnp.mean, metrics)


def make_optimizer(
    config: TrainingConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Adam, with the configured schedule, warm-up and clipping."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total_steps, warmup + 1))
    elif warmup:
        rate = optax.linear_schedule(0.0, peak, warmup)
    else:
        rate = optax.constant_schedule(peak)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.with_extra_args_support(optax.chain(*clip, optax.adam(rate)))


def initial_state(experiment: Experiment, placement: Placement) -> TrainState:
    """The state before the first step, placed; also what a checkpoint is restored into."""
    state = _first_state(experiment)
    return placement.put(state, placement.of_parameters(state))


def _first_state(experiment: Experiment) -> TrainState:
    config = experiment.config.training
    optimizer = make_optimizer(config, experiment.steps_per_epoch * config.epochs)
    params = experiment.initial_params
    batch = jnp.zeros((1, experiment.preprocessor.dim))
    keys = jax.random.split(jax.random.key(config.seed), 1)
    shapes = jax.eval_shape(lambda: loss_fn(params, experiment, batch, keys)[1])
    return TrainState(
        params=jax.tree.map(jnp.copy, params),  # the step gives its arguments away
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        sums=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        summed=jnp.zeros((), jnp.int32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


class Trainer:
    """The compiled pieces of one experiment's training: first state, step, validation.

    Args:
        experiment: What to train.
        placement: The devices; by default all there are.

    Raises:
        UserError: If the devices cannot share a batch evenly.
    """

    def __init__(self, experiment: Experiment, placement: Placement | None = None) -> None:
        config = experiment.config.training
        self.experiment = experiment
        self.placement = placement = placement or Placement.of()
        placement.require_even(config.batch_size, config.microbatches)
        self.steps_per_epoch = experiment.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.epochs
        self._optimizer = make_optimizer(config, self.total_steps)
        self._root = jax.random.key(config.seed)
        self.feed = make_feed(experiment.dataset.train, config, placement)
        shardings = placement.of_parameters(_first_state(experiment))
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(shardings, placement.replicated)
        )
        validation = experiment.dataset.validation
        self._validate = map_images(
            self._validate_one,
            validation,
            fixed_keys(len(validation)),
            batch_size=_VALIDATION_BATCH,
            placement=placement,
        )

    def init(self) -> TrainState:
        """The state before the first step."""
        return initial_state(self.experiment, self.placement)

    def without_sums(self, state: TrainState) -> TrainState:
        """The same state, about to add up its metrics afresh."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.sums)
        sums, summed = self.placement.put((zeros, np.zeros((), np.int32)))
        return state._replace(sums=sums, summed=summed)

    def _step(self, state: TrainState, *arguments: Array) -> tuple[TrainState, Float[Array, ""]]:
        pixels = self.feed.pixels(state.step, *arguments)
        keys = jax.random.split(jax.random.fold_in(self._root, state.step))
        noise_keys, sample_keys = (jax.random.split(key, pixels.shape[0]) for key in keys)
        apply = jax.vmap(self.experiment.preprocessor.apply)

        def loss_and_grads(
            params: Any, pixels: Array, noise_keys: PRNGKeyArray, sample_keys: PRNGKeyArray
        ) -> Any:
            xs, _ = apply(noise_keys, pixels)
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            return differentiate(params, self.experiment, xs, sample_keys)

        (loss, metrics), grads = self.placement.mean_of_shards(
            loss_and_grads,
            self.placement.gathered(state.params),
            *(pixels, noise_keys, sample_keys),
            microbatches=self.experiment.config.training.microbatches,
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
            bad_step=bad_step,
        )
        new = jax.tree.map(lambda new, old: jnp.where(bad_step < 0, new, old), new, state)
        return new._replace(bad_step=bad_step), loss

    def _validate_one(self, params: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        noise_key, sample_key = jax.random.split(key)
        x, _ = self.experiment.preprocessor.apply(noise_key, pixels)
        model = self.experiment.merge(self.placement.gathered(params))
        training = self.experiment.config.training
        kind = "iwae" if training.objective in ("iwae", "dreg") else "elbo"
        samples = training.train_samples if kind == "iwae" else 1
        _, metrics = objective(
            model, self.experiment.system, x, sample_key, kind=kind, num_samples=samples
        )
        return metrics

    def validate(self, params: Any) -> dict[str, float]:
        """Mean metrics on the validation images; the noise is the same each time."""
        return jax.tree.map(lambda values: float(np.mean(values)), self._validate(params))


def fit(
    experiment: Experiment,
    run: RunFolder,
    *,
    resume: bool,
    options: FitOptions,
    placement: Placement | None = None,
) -> None:
    """Train, logging to and saving in the run folder.

    Of several processes all must call, with one folder that they share; the first alone logs.

    Args:
        experiment: What to train.
        run: An existing run folder.
        resume: Continue from the last checkpoint in it, whatever devices saved it; from the
            beginning where the run was ended before there was one.
        options: How to log and save.
        placement: The devices; by default all there are.

    Raises:
        RunFailure: If the loss is not finite; the message names the step, the checkpoints stay.
        Stopped: After SIGINT or SIGTERM, everything saved.
        UserError: If `resume` finds damaged checkpoints alone or other data, or nothing can be
            written.
        Unreadable: If the last checkpoint is undamaged and cannot be read all the same.
    """
    trainer = Trainer(experiment, placement)
    checkpoints = Checkpoints(run.checkpoints)
    state = trainer.init()
    notes = Notes(0.0, experiment.dataset.fingerprint, None, float("-inf"))
    damaged: list[str] = []
    if resume:
        if restored := checkpoints.restore_last(state):
            state, notes, damaged = restored.state, restored.notes, restored.damaged
            require_same_images(notes, experiment)
        distributed.on_first(lambda: run.drop_metrics_after(restored.step if restored else -1))
    start = int(state.step)
    loop = _Loop(trainer, run, checkpoints, options, notes)
    what = f"{experiment.dataset.name} {experiment.config.inference.method}"
    quiet = not distributed.is_first()
    with (
        ProgressLine(what, trainer.total_steps, start=start, quiet=quiet) as progress,
        _signals() as received,
    ):
        if resume:
            for line in damaged:
                progress.say(line)
            progress.say(f"resuming at step {start} of {trainer.total_steps}")
        try:
            loop.run(state, progress, received)
        finally:
            loop.metrics.save()
    checkpoints.close()


class _Loop:
    """One call of `fit`: what it counts between a step and the next log line."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        checkpoints: Checkpoints,
        options: FitOptions,
        notes: Notes,
    ) -> None:
        self.trainer, self.metrics, self.checkpoints = trainer, run.metrics_log(), checkpoints
        self.options = options
        self.notes = notes
        self.began = time.monotonic()
        self.logged = (self.began, 0)
        self.saved = -1

    def run(self, state: TrainState, progress: ProgressLine, received: list[int]) -> None:
        trainer, options = self.trainer, self.options
        step = int(state.step)
        in_flight: list[Array] = []
        arguments, enough = trainer.feed.arguments(step), None
        self.logged = (time.monotonic(), step)
        self.saved = step if step else -1
        while step < trainer.total_steps and not (enough := self._enough(step)):
            state, loss = trainer.step(state, *next(arguments))
            step += 1
            # A short queue keeps the device busy, and signals and failures at most so far behind.
            in_flight.append(loss)
            if len(in_flight) > trainer.placement.in_flight:
                in_flight.pop(0).block_until_ready()
            epoch_ends = step % trainer.steps_per_epoch == 0
            if step % options.log_every == 0 or epoch_ends:
                state = self._log(state, step, progress)
            if (epoch_ends and self._validate(state, step, progress)) or (
                step - self.saved >= options.checkpoint_every
            ):
                self._save(state, step)
            if number := distributed.stop_signal(step, received):
                self._save(state, step)
                self.checkpoints.close()
                raise Stopped(number, step)
        if step == 0:
            self._validate(state, step, progress)
        self._save(state, step)
        if enough:
            progress.say(f"stopped: {enough}")

    def _enough(self, step: int) -> str | None:
        """Say why to stop before the last epoch, if there is a reason."""
        config, each = self.trainer.experiment.config.training, self.trainer.steps_per_epoch
        patience, best = config.patience, self.notes.best_step
        if step == 0 or step % each:
            return None
        if patience is not None and best is not None and step - best >= patience * each:
            return f"no better validation bound in {patience} epochs"
        if config.minutes is None:
            return None
        # All processes must stop at the same step: one clock decides.
        if distributed.from_first(self._notes().seconds) >= 60 * config.minutes:
            return f"{config.minutes:g} minutes of training are over"
        return None

    def _log(self, state: TrainState, step: int, progress: ProgressLine) -> TrainState:
        sums, count = jax.device_get((state.sums, state.summed))
        means = {name: float(total / count) for name, total in sums.items()}
        self._checked(state)
        now = time.monotonic()
        then, step_then = self.logged
        batch = self.trainer.experiment.config.training.batch_size
        rate = batch * (step - step_then) / max(now - then, 1e-9)
        self.logged = (now, step)
        self._record("train", step, {**means, "images_per_second": rate})
        epochs = self.trainer.experiment.config.training.epochs
        epoch = -(-step // self.trainer.steps_per_epoch)
        progress.update(step, f"epoch {epoch}/{epochs}  {_summary(means)}  {rate:.0f} images/s")
        return self.trainer.without_sums(state)

    def _validate(self, state: TrainState, step: int, progress: ProgressLine) -> bool:
        """Log the validation metrics; whether they are the best so far."""
        began = time.monotonic()
        metrics = self.trainer.validate(self._checked(state).params)
        # What is trained for chooses, where it is a bound on log p(x); the ELBO otherwise.
        bound = metrics.get("objective", metrics["elbo"])
        # A bound that is not finite can never be the best.
        value = bound if np.isfinite(bound) else float("-inf")
        is_best = value > self.notes.best_bound
        if is_best:
            self.notes = self.notes._replace(best_step=step, best_bound=value)
        self._record("validation", step, {**metrics, "best": is_best})
        epoch = step // self.trainer.steps_per_epoch
        mark = "  (best)" if is_best else ""
        progress.say(f"epoch {epoch}: validation {_summary(metrics)}{mark}")
        # Validation is no training time: the next rate must not count it.
        then, step_then = self.logged
        self.logged = (then + time.monotonic() - began, step_then)
        return is_best

    def _save(self, state: TrainState, step: int) -> None:
        if step != self.saved:
            distributed.on_first(self.metrics.save)
            self.checkpoints.save(step, self._checked(state), self._notes())
            self.saved = step

    def _checked(self, state: TrainState) -> TrainState:
        bad_step = int(state.bad_step)
        if bad_step >= 0:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            good = f"the last good checkpoint is step {max(kept)}" if kept else "no checkpoint yet"
            raise RunFailure(
                f"the loss or its gradient was not finite at step {bad_step}; {good}. "
                "Try a smaller --learning-rate or --clip-norm"
            )
        return state

    def _notes(self) -> Notes:
        seconds = self.notes.seconds + time.monotonic() - self.began
        return self.notes._replace(seconds=seconds)

    def _record(self, split: str, step: int, values: dict[str, Any]) -> None:
        epoch = step / self.trainer.steps_per_epoch
        seconds = self._notes().seconds
        if not distributed.is_first():
            return
        record = {"split": split, "step": step, "epoch": epoch, **values, "seconds": seconds}
        self.metrics.append(record)
        if self.options.writer:
            for name, value in values.items():
                self.options.writer.add_scalar(f"{split}/{name}", float(value), step)


def _summary(metrics: dict[str, Any]) -> str:
    names = {"elbo": "ELBO", "kl": "KL", "reconstruction": "reconstruction"}
    return "  ".join(f"{label} {metrics[name]:.2f}" for name, label in names.items())


def require_same_images(notes: Notes, experiment: Experiment) -> None:
    """Check that a checkpoint was trained on the experiment's images.

    Raises:
        UserError: If not.
    """
    if notes.fingerprint != experiment.dataset.fingerprint:
        raise UserError(
            f"the images of {experiment.dataset.name} are not those the run was started with; "
            "give their old place with --data-dir, or start a new run"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one acts at once.

    Among several processes JAX itself takes SIGTERM, and tells all of them when to stop.
    """
    received: list[int] = []
    if not distributed.is_alone():
        before = signal.signal(signal.SIGINT, distributed.interrupt_all)
        try:
            yield received
        finally:
            signal.signal(signal.SIGINT, before)
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
