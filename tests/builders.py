"""Small configurations, data sets and models of the application's tests, and the truth about them.

Images are scikit-learn's digits, 8 x 8 with 17 levels, or a few random ones: nothing is downloaded.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PRNGKeyArray
from scipy.stats import multivariate_normal

from vlae_jax.commands.main import main
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.data.sets import Dataset, load_dataset
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.initial import initialize
from vlae_jax.models.saved import arrays_of
from vlae_jax.models.systems import Inference, vae
from vlae_jax.models.trained import Inferred, Keys, Trained
from vlae_jax.runs.checkpoints import Checkpoints
from vlae_jax.runs.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
)
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.step import Trainer, TrainState


@functools.cache
def digits() -> Dataset:
    """1,294 images to train on, 144 for validation and 359 for the test."""
    return load_dataset("digits")


def small_config(method: str = "vlae", **sections: Any) -> Config:
    """A network that learns something of the digits in seconds."""
    defaults = {
        "model": ModelConfig(latent=3, hidden=(16,)),
        "inference": InferenceConfig(method=method, steps=2),
        "training": TrainingConfig(epochs=4, learning_rate=1e-2),
        "evaluation": EvaluationConfig(8, "posterior", test_images=16),
    }
    return Config(**{**defaults, **sections})


def tiny_config(method: str = "vae", **training: Any) -> Config:
    """For `tiny_images`: a step compiles and an epoch runs as quickly as any."""
    return Config(
        model=ModelConfig(latent=2, hidden=(8,)),
        inference=InferenceConfig(method=method, steps=1),
        training=TrainingConfig(
            **{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, **training}
        ),
        evaluation=EvaluationConfig(30, "posterior", chunk_size=10, evaluation_batch=4),
    )


def tiny_images(seed: int, count: int, shape: tuple[int, ...] = (4, 3, 1)) -> np.ndarray:
    """Random images of 256 levels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def untrained(config: Config, dataset: Dataset | None = None) -> Trained:
    """The model that training with this configuration starts from; of the digits by default."""
    return initialize(config, dataset or digits())


def inferred_by(
    system: Callable[[Observation, PRNGKeyArray], Inference], at: Observation, key: PRNGKeyArray
) -> Inferred:
    """What `Trained.infer` gives, for an x that was never pixels."""
    keys = Keys.split(key)
    return Inferred(keys, jnp.zeros(()), at, system(at, keys.inference))


def doubles(*arrays: Any) -> list[np.ndarray]:
    """Arrays, or parameters, in float64."""
    return [np.asarray(array[...], np.float64) for array in arrays]


def linear_config(
    method: str = "vlae", *, latent: int = 3, preprocess: str = "raw", **evaluation: Any
) -> Config:
    """Without hidden layers the decoder is affine: probabilistic PCA of the digits. No epochs."""
    return Config(
        data=DataConfig(preprocess=preprocess),
        model=ModelConfig(latent=latent, hidden=()),
        inference=InferenceConfig(method=method, steps=1),
        training=TrainingConfig(epochs=0),
        evaluation=EvaluationConfig(
            **{
                "importance_samples": 20,
                "proposal": "posterior",
                "chunk_size": 7,
                "test_images": 50,
                **evaluation,
            }
        ),
    )


class Linear:
    """p(x) and p(z | x) of a model without hidden layers, by numpy in float64."""

    def __init__(self, trained: Trained, images: np.ndarray) -> None:
        model = trained.model
        self.kernel, self.bias = doubles(model.head.kernel, model.head.bias)
        self.noise = float(np.exp(np.float64(model.log_var)))
        self.preprocessor = trained.preprocessor
        self.mean = np.asarray(self.preprocessor.mean, np.float64)
        self.levels, self.shape = trained.provenance.levels, trained.provenance.image_shape
        self.pixels = images
        self.xs = self.as_x(images)
        self.latent, self.dim = self.kernel.shape
        self.covariance = self.kernel.T @ self.kernel + self.noise * np.eye(self.dim)
        self.precision = np.eye(self.latent) + self.kernel @ self.kernel.T / self.noise
        kernel, bias = doubles(model.mean.kernel, model.mean.bias)
        self.guesses = self.xs @ kernel + bias
        kernel, bias = doubles(model.log_std.kernel, model.log_std.bias)
        self.log_stds = self.xs @ kernel + bias
        self.modes = self.modes_of(self.xs)

    def as_x(self, images: np.ndarray) -> np.ndarray:
        """The images as the model sees them, with the noise of all that is measured."""
        if self.preprocessor.kind == "raw":
            return images.reshape(len(images), -1) / (self.levels - 1) - self.mean
        noise = jax.vmap(lambda key: Keys.split(key).noise)(fixed_keys(len(images)))
        return np.float64(jax.vmap(self.preprocessor.apply)(noise, images)[0])

    def modes_of(self, xs: np.ndarray) -> np.ndarray:
        """The posterior means."""
        pulls = (xs - self.bias) @ self.kernel.T / self.noise
        return np.linalg.solve(self.precision, pulls.T).T

    def log_prob(self, xs: np.ndarray | None = None) -> np.ndarray:
        """log N(x; b, WᵀW + σ²I), nats."""
        density = multivariate_normal(self.bias, self.covariance)
        return density.logpdf(self.xs if xs is None else xs)

    def decrements(self, zs: np.ndarray) -> np.ndarray:
        """Nats by which the log joint at each image's z lies below that at its mode."""
        moved = zs - self.modes
        return 0.5 * np.einsum("ni,ij,nj->n", moved, self.precision, moved)

    def mean_field_elbo(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of log p(x, z) - log q(z) under the encoder's Gaussian q."""
        # log p(z | x) - log q(z) is a quadratic in the standard normal that z is made of.
        std, moved = np.exp(self.log_stds), self.guesses - self.modes
        quadratic = np.eye(self.latent) - std[:, :, None] * self.precision * std[:, None, :]
        slope = std * (moved @ self.precision)
        log_det = np.linalg.slogdet(self.precision)[1] + 2 * self.log_stds.sum(axis=1)
        trace = np.trace(quadratic, axis1=1, axis2=2)
        kl = self.decrements(self.guesses) - 0.5 * (trace + log_det)
        variance = 0.5 * (quadratic**2).sum(axis=(1, 2)) + (slope**2).sum(axis=1)
        return self.log_prob() - kl, np.sqrt(variance)

    def decode(self, zs: np.ndarray) -> np.ndarray:
        return zs @ self.kernel + self.bias

    def pictures(self, zs: np.ndarray) -> np.ndarray:
        """The expected images, in [0, 1]; of raw pixels alone."""
        return np.clip(self.decode(zs) + self.mean, 0, 1).reshape(*zs.shape[:-1], *self.shape)


def records(run: RunFolder, split: str | None = None) -> list[dict[str, Any]]:
    """All that a run has logged, or that of a split, but times."""
    lines = run.read_metrics()
    times = ("seconds", "images_per_second")
    return [
        {name: line[name] for name in line if name not in times}
        for line in lines
        if split in (None, line["split"])
    ]


def refused(capsys: Any, *arguments: object) -> str:
    """The one line a wrong command gets, its exit code checked."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("vlae_jax: error: ")]
    return line


@contextlib.contextmanager
def one_trainer_a_configuration() -> Iterator[Callable[..., Trainer]]:
    """So that a run and those that repeat or resume it compile one step.

    Gives the function that makes trainers, here and in `fit`.
    """
    trainers: dict[Any, Trainer] = {}

    def trainer(trained: Trained, dataset: Dataset, placement: Any = None) -> Trainer:
        # All else follows from these.
        key = (trained.config, dataset.fingerprint, dataset.name, type(dataset.train))
        if key not in trainers:
            trainers[key] = Trainer(trained, dataset, placement)
        return trainers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlae_jax.training.loop.Trainer", trainer)
        yield trainer


def like(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint of its training holds: the structure to restore into."""
    state = trainer.init()
    model = arrays_of(trainer.trained.with_params(state.params))
    return {"model": model, "training": state.besides_params()}


def last_state(trainer: Trainer, run: RunFolder) -> TrainState:
    """The state of the newest checkpoint."""
    wanted = like(trainer)
    restored = Checkpoints(run.checkpoints, read_only=True).restore_last(lambda _: wanted)
    return TrainState(params=restored.trees["model"]["params"], **restored.trees["training"])


def spy(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """A system like the plain VAE's that also tells the mean of the x it is shown."""
    found = vae(at, key, config)
    return found._replace(flags={"seen": jnp.mean(at.x)})


def walker(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """A system like the plain VAE's whose search goes half the way to zero."""
    found = vae(at, key, config)
    return found._replace(iterates=jnp.stack([at.start, at.start / 2]))


def tiny_mapping() -> dict[str, Any]:
    """Arrays to train on, as `fit` takes them: 40 images, of which 4 become validation."""
    return {"x_train": tiny_images(0, 40), "x_test": tiny_images(1, 6)}
