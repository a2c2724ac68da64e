"""What the user chooses, as frozen dataclasses that check themselves when built."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from vlae_jax.errors import UserError

Preprocess = Literal["logit", "raw", "static_binary", "dynamic_binary"]
Activation = Literal["relu", "leaky_relu", "softplus", "tanh", "elu", "gelu"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names there are, the most similar one first: ``; did you mean 'x'? ...``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


_FORBID: dict[str, Any] = {"extra": "forbid"}  # a file with an unknown option is no config


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become vectors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, omniglot, svhn, cifar10;
    or NAME for your own NAME.npz in --data-dir."""
    data_dir: str | None = None
    """Folder with NAME.npz, idx files or a prepared tensorflow-datasets directory;
    or one .npz file."""
    preprocess: Preprocess = "logit"
    """logit: uniform dequantisation, then logit.
    raw: centred pixels in [0, 1].
    static_binary, dynamic_binary: Bernoulli draws of the pixels, once or anew at each step."""
    logit_lambda: float = 1e-6
    """Pixels are squeezed to [lambda, 1 - lambda] before the logit."""
    standardize: bool = True
    """With logit: also divide by one standard deviation (the log-Jacobian accounts for it)."""
    validation_fraction: float = 0.1
    """Share of the training images set aside to choose the checkpoint."""

    def __post_init__(self) -> None:
        _require(
            0.0 < self.logit_lambda < 0.5,
            f"logit_lambda must lie between 0 and 0.5, got {self.logit_lambda}",
        )
        _require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder and decoder networks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    latent: int = 50
    """Dimensions of the latent space."""
    network: Literal["mlp", "conv"] = "mlp"
    """mlp: fully connected. conv: convolutions between the image and the hidden layers, for any
    size of image, grey or in colour."""
    channels: tuple[int, ...] = (32, 64)
    """conv: the encoder's channels after each convolution, which halves the image (the decoder
    takes them reversed)."""
    hidden: tuple[int, ...] = (500, 500)
    """Widths of the hidden layers, encoder and decoder alike (the decoder takes them reversed)."""
    activation: Activation = "relu"
    """Nonlinearity. For relu and leaky_relu, piecewise linear, the Gauss-Newton precision is the
    exact Hessian."""
    likelihood: Literal["auto", "gaussian", "bernoulli"] = "auto"
    """Output density; auto takes bernoulli for binary preprocessing, else gaussian."""
    variance: Literal["shared", "per_pixel"] = "shared"
    """Gaussian output: one learned variance, or one for each pixel."""
    min_std: float = 1e-3
    """Gaussian output: floor of the learned standard deviation.
    Without one a constant pixel would drive it to 0."""

    def __post_init__(self) -> None:
        _require(self.latent >= 1, f"latent must be at least 1, got {self.latent}")
        _require(
            all(width >= 1 for width in self.hidden),
            f"hidden widths must be at least 1, got {self.hidden}",
        )
        _require(
            all(count >= 1 for count in self.channels),
            f"channels must be at least 1, got {self.channels}",
        )
        _require(
            self.network != "conv" or len(self.channels) >= 1,
            "network conv needs at least one number of channels, one for each convolution",
        )
        _require(self.min_std > 0, f"min_std must be positive, got {self.min_std}")


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How the posterior is found."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    method: str = "vlae"
    """vlae: mode search and Laplace posterior. vae: amortised diagonal Gaussian."""
    steps: int = 4
    """vlae: mode-search steps T from the encoder's mean."""
    damping: Literal["line_search", "paper"] = "line_search"
    """vlae: step lengths; line_search never lowers the log joint, paper is 0.5 / (t + 1)."""
    solver: Literal["auto", "cholesky", "cg"] = "auto"
    """vlae: how a step's direction is found: by factoring the precision, or by conjugate gradients
    that never form it (at least 90 % of the Newton decrement). auto takes cg from 24 latent
    dimensions on, except for the steps of the paper."""
    gradient: Literal["implicit", "stop", "unroll"] = "implicit"
    """vlae: how parameters see the mode in training.
    implicit: by the implicit function theorem. stop: not at all. unroll: through the steps.
    With implicit and stop the encoder learns the mode, by its excess energy in nats."""
    curvature: Literal["exact", "gauss_newton"] = "exact"
    """vlae: the precision. exact is the Hessian, repaired by Gauss-Newton, and counted, where it is
    not positive definite."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, f"steps must be at least 0, got {self.steps}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images in one step."""
    learning_rate: float = 5e-4
    """Adam's step size."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run; cosine ends at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm."""
    elbo_samples: int = 1
    """Posterior samples per image in the training ELBO."""
    seed: int = 0
    """Seeds the initial weights, the order of the images and every sample."""

    def __post_init__(self) -> None:
        for name in ("epochs", "warmup_steps", "seed"):
            _require(
                getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}"
            )
        for name in ("batch_size", "elbo_samples"):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _require(
            0 < self.learning_rate < math.inf,
            f"learning_rate must be positive, got {self.learning_rate}",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be positive, got {self.clip_norm}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The final reading of the test set."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    importance_samples: int = 5000
    """K of the importance-weighted log-likelihood."""
    chunk_size: int = 500
    """Importance samples held in memory at once, per image."""
    test_images: int | None = None
    """Evaluate only the first so many test images."""
    evaluation_batch: int = 16
    """Test images evaluated at once."""

    def __post_init__(self) -> None:
        for name in ("importance_samples", "chunk_size", "evaluation_batch"):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _require(
            self.test_images is None or self.test_images >= 1,
            f"test_images must be at least 1, got {self.test_images}",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment, whole. Saved as config.json in its run folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    inference: InferenceConfig = InferenceConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        _require(
            not (self.model.likelihood == "bernoulli" and not self.binary),
            "a bernoulli likelihood needs binary images, but preprocess is "
            f"{self.data.preprocess!r}: choose static_binary or dynamic_binary, or a gaussian",
        )

    @property
    def binary(self) -> bool:
        """Whether the model sees binary images."""
        return self.data.preprocess in ("static_binary", "dynamic_binary")

    @property
    def likelihood(self) -> Literal["gaussian", "bernoulli"]:
        """The output density, with ``auto`` resolved."""
        if self.model.likelihood != "auto":
            return self.model.likelihood
        return "bernoulli" if self.binary else "gaussian"

    @property
    def run_name(self) -> str:
        """A folder name that tells the run's main choices."""
        inference = self.inference
        steps = "" if inference.method == "vae" else f"-T{inference.steps}"
        network = "" if self.model.network == "mlp" else f"-{self.model.network}"
        return f"{self.data.dataset}{network}-{inference.method}{steps}-seed{self.training.seed}"

    def differences(self, saved: "Config") -> list[str]:
        """What keeps this configuration from continuing a run made with `saved`.

        The evaluation, and where the data lie, may change; so may the number of epochs, unless the
        learning rate depends on it.
        """
        free = {"data.data_dir"}
        if self.training.schedule == "constant":
            free.add("training.epochs")
        mine, theirs = _flat(self), _flat(saved)
        return [
            f"{name} is {mine[name]}, was {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
            and name not in free
            and not name.startswith("evaluation.")
        ]


def default_config(dataset: str) -> Config:
    """The defaults for a data set: the paper's sizes, smaller ones for the 8 x 8 digits."""
    config = Config(data=DataConfig(dataset=dataset))
    if dataset != "digits":
        return config
    return dataclasses.replace(
        config,
        model=ModelConfig(latent=16, hidden=(200, 200)),
        training=TrainingConfig(epochs=120, batch_size=64, learning_rate=1e-3),
    )


def _flat(config: Config) -> dict[str, object]:
    return {
        f"{section}.{name}": tuple(value) if isinstance(value, list) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
