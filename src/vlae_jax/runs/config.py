"""What the user chooses, as frozen dataclasses that check themselves when built."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from vlae_jax.errors import require
from vlae_jax.runs.methods import find_method

Preprocess = Literal["logit", "raw", "static_binary", "dynamic_binary"]
Proposal = Literal["auto", "posterior", "widened", "student_t"]
Activation = Literal["relu", "leaky_relu", "softplus", "tanh", "elu", "gelu"]
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
    stream: bool = False
    """Leave the training images on disk and read each batch as it is needed (validation and test
    images are held in memory): from a directory that tensorflow-datasets has prepared in the
    array_record format. Needs the stream extra."""

    def __post_init__(self) -> None:
        require(
            not (self.stream and self.preprocess == "static_binary"),
            "static_binary draws all training images once and keeps them in memory: leave --stream "
            "out, or choose --preprocess dynamic_binary",
        )
        require(
            0.0 < self.logit_lambda < 0.5,
            f"logit_lambda must lie between 0 and 0.5, got {self.logit_lambda}",
        )
        require(
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks multiply in while they train. bfloat16: operands of products rounded, in
    the encoder, in flows and in all derivatives; parameters, sums, the decoder's value and all of
    the inference stay float32. Everything measured, validation included, is float32 throughout."""

    def __post_init__(self) -> None:
        require(self.latent >= 1, f"latent must be at least 1, got {self.latent}")
        require(
            all(width >= 1 for width in self.hidden),
            f"hidden widths must be at least 1, got {self.hidden}",
        )
        require(
            all(count >= 1 for count in self.channels),
            f"channels must be at least 1, got {self.channels}",
        )
        require(
            self.network != "conv" or len(self.channels) >= 1,
            "network conv needs at least one number of channels, one for each convolution",
        )
        require(self.min_std > 0, f"min_std must be positive, got {self.min_std}")


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How the posterior is found."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    method: str = "vlae"
    """vlae: mode search and Laplace posterior. vae: amortised diagonal Gaussian.
    vae_full: amortised Gaussian with full covariance. vae_hf, vae_iaf, vae_planar: Householder,
    inverse autoregressive, planar flows. sa_vae: diagonal Gaussian, refined by gradient ascent.
    ppca: probabilistic PCA in closed form."""
    steps: int = 4
    """T: mode-search steps (vlae), ascent steps (sa_vae), or steps of the flow."""
    search: Literal["newton", "gradient"] = "newton"
    """vlae: closed-form local-linear (Newton) steps, or gradient ascent of the log joint."""
    damping: Literal["line_search", "paper"] = "line_search"
    """vlae: step lengths; line_search never lowers the log joint, paper is 0.5 / (t + 1)."""
    solver: Literal["auto", "cholesky", "cg"] = "auto"
    """vlae: how a step's direction is found: by factoring the precision, or by conjugate gradients
    that never form it (at least 90 % of the Newton decrement). auto takes cg from 24 latent
    dimensions on, except for the steps of the paper."""
    gradient: Literal["auto", "implicit", "stop", "unroll"] = "auto"
    """vlae, sa_vae: how parameters see what the steps find, in training.
    implicit: by the implicit function theorem (vlae). stop: not at all. unroll: through the steps.
    With implicit and stop the encoder learns to start there: by its excess energy (vlae) or its KL
    divergence (sa_vae), in nats. auto: implicit for vlae, unroll for sa_vae."""
    curvature: Literal["exact", "gauss_newton"] = "exact"
    """vlae: the precision. exact is the Hessian, repaired by Gauss-Newton, and counted, where it is
    not positive definite."""
    ascent_rate: float = 1e-3
    """sa_vae, and vlae with search gradient: step size of the ascent."""
    ascent_momentum: float = 0.5
    """The same: momentum."""
    ascent_clip: float | None = None
    """The same: clip the gradient of an image to this norm."""
    refine: Literal["none", "variational"] = "none"
    """variational: the system's Gaussian is moved on by variational Newton steps, towards the
    full-covariance Gaussian of largest ELBO. For systems whose posterior is a Gaussian."""
    refine_steps: int = 4
    """With --refine: how many."""
    refine_samples: int = 8
    """With --refine: samples of each step, an even number."""
    flow_width: int | None = None
    """vae_iaf: width of the masked networks, at least latent; by default that of the first hidden
    layer."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"steps must be at least 0, got {self.steps}")
        require(self.ascent_rate > 0, f"ascent_rate must be positive, got {self.ascent_rate}")
        require(
            0 <= self.ascent_momentum < 1,
            f"ascent_momentum must be at least 0 and below 1, got {self.ascent_momentum}",
        )
        require(
            self.ascent_clip is None or self.ascent_clip > 0,
            f"ascent_clip must be positive, got {self.ascent_clip}",
        )
        require(
            self.flow_width is None or self.flow_width >= 1,
            f"flow_width must be at least 1, got {self.flow_width}",
        )
        require(
            self.steps >= 1 or not find_method(self.method).is_flow,
            f"{self.method} needs at least one step; without any it is vae",
        )
        require(
            self.refine_steps >= 1,
            f"refine_steps must be at least 1, got {self.refine_steps}; --refine none takes none",
        )
        require(
            self.refine_samples >= 2 and self.refine_samples % 2 == 0,
            f"refine_samples must be even and at least 2, got {self.refine_samples}",
        )
        require(
            self.refine == "none" or not find_method(self.method).is_flow,
            f"refine variational moves a Gaussian, which {self.method} has not",
        )
        require(
            not (self.method == "sa_vae" and self.gradient == "implicit"),
            "gradient implicit needs a mode, which sa_vae does not search: choose unroll or stop",
        )

    @property
    def label(self) -> str:
        """The method's name in tables and pictures."""
        return find_method(self.method).label

    @property
    def num_steps(self) -> int | None:
        """T, or None where the method takes no steps."""
        return self.steps if find_method(self.method).has_steps else None


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    epochs: int = 20
    """Passes over the training images."""
    patience: int | None = None
    """Stop after so many epochs without a better validation bound; by default never."""
    minutes: float | None = None
    """Stop after so many minutes of training, at the end of an epoch; by default never."""
    batch_size: int = 128
    """Images in one step."""
    microbatches: int | None = None
    """Compute each step in so many parts of the batch, one after the other, and add their gradients
    up in order: the same run bit for bit on any number of devices that divides it. Every device
    holds the gradients of all parts. By default all images of a device at once, the fastest."""
    learning_rate: float = 5e-4
    """Adam's step size."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run; cosine ends at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm."""
    objective: Literal["elbo", "iwae", "dreg", "evidence"] = "elbo"
    """What is maximised. elbo. iwae: the importance-weighted bound of --train-samples samples.
    dreg: the same with the doubly reparameterised gradient. evidence: Laplace's estimate of
    log p(x), without samples (vlae)."""
    train_samples: int = 1
    """Posterior samples per image in the objective."""
    seed: int = 0
    """Seeds the initial weights, the order of the images and every sample."""

    def __post_init__(self) -> None:
        for name in ("epochs", "warmup_steps", "seed"):
            require(
                getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}"
            )
        require(self.seed < 2**32, f"seed must be below 2**32, got {self.seed}")
        for name in ("batch_size", "train_samples"):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        require(
            self.microbatches is None
            or (self.microbatches >= 1 and self.batch_size % self.microbatches == 0),
            f"microbatches must divide batch_size {self.batch_size}, got {self.microbatches}",
        )
        require(
            self.patience is None or self.patience >= 1,
            f"patience must be at least 1, got {self.patience}",
        )
        require(
            self.minutes is None or self.minutes > 0,
            f"minutes must be positive, got {self.minutes}",
        )
        require(
            0 < self.learning_rate < math.inf,
            f"learning_rate must be positive, got {self.learning_rate}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be positive, got {self.clip_norm}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The final reading of the test set."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    importance_samples: int = 5000
    """K of the importance-weighted log-likelihood."""
    proposal: Proposal = "auto"
    """Where importance samples come from. auto: a Student-t around the best Gaussian that can be
    found for each image's decoder, in antithetic pairs, whatever system was trained: the one to
    compare systems by; where Pareto k says that it does not suffice, more samples, then annealing.
    posterior: the system's own. widened: that with wider standard deviations. student_t: that with
    heavier tails."""
    evaluation_budget: float = 1.0
    """auto: how much may be done where the first estimate does not suffice, as a multiple of the
    work of all first estimates."""
    proposal_scale: float = 1.2
    """widened: the factor on standard deviations."""
    proposal_df: float = 5.0
    """student_t: degrees of freedom."""
    chunk_size: int = 500
    """Importance samples held in memory at once, per image."""
    test_images: int | None = None
    """Evaluate only the first so many test images."""
    evaluation_batch: int = 16
    """Test images evaluated at once."""

    def __post_init__(self) -> None:
        for name in ("importance_samples", "chunk_size", "evaluation_batch"):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        for name in ("proposal_scale", "proposal_df"):
            require(
                0 < getattr(self, name) < math.inf,
                f"{name} must be positive, got {getattr(self, name)}",
            )
        require(
            0 <= self.evaluation_budget < math.inf,
            f"evaluation_budget must be at least 0, got {self.evaluation_budget}",
        )
        require(
            self.test_images is None or self.test_images >= 1,
            f"test_images must be at least 1, got {self.test_images}",
        )


@dataclasses.dataclass(frozen=True)
class GapConfig:
    """How much work goes into measuring the gaps."""

    images: int = 50
    """The first so many test images."""
    simulated_images: int = 20
    """Images drawn from the model, on which log p(x) is also bounded from above."""
    temperatures: int = 300
    """Annealed importance sampling: steps from the start to the posterior."""
    chains: int = 8
    """Annealed importance sampling: chains an image."""
    leapfrog: int = 10
    """Leapfrog steps of one HMC transition."""
    start: Literal["laplace", "prior"] = "laplace"
    """Where the chains start: laplace, the Laplace posterior at a converged mode; or prior."""
    family_steps: int = 500
    """Steps of Adam that search the best posterior of the family."""
    family_samples: int = 16
    """Samples in each of them."""
    elbo_samples: int = 2000
    """Samples of each ELBO."""
    search_steps: int = 50
    """Steps after which a mode search counts as converged."""
    batch: int = 10
    """Images at once."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 2 if field.name in ("elbo_samples", "temperatures") else 1
            require(
                isinstance(value, str) or value >= least,
                f"{field.name} must be at least {least}, got {value}",
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
        require(
            not (self.model.likelihood == "bernoulli" and not self.binary),
            "a bernoulli likelihood needs binary images, but preprocess is "
            f"{self.data.preprocess!r}: choose static_binary or dynamic_binary, or a gaussian",
        )
        method, objective = self.inference.method, self.training.objective
        require(
            objective != "evidence" or method == "vlae",
            f"objective evidence is Laplace's, which vlae has and {method} has not",
        )
        require(
            objective != "dreg" or not find_method(method).is_flow,
            f"objective dreg needs the density of any point, which {method} has only of its own "
            "samples: choose iwae",
        )
        width, latent = self.inference.flow_width, self.model.latent
        require(
            method != "vae_iaf" or width is None or width >= latent,
            f"flow_width must be at least latent, or the flow loses sight of dimensions: got "
            f"{width} for {latent}",
        )
        if method == "ppca":
            require(
                not self.data.stream,
                "ppca is fitted to all training images at once: leave --stream out",
            )
            require(
                self.likelihood == "gaussian" and self.model.variance == "shared",
                "ppca has a gaussian output of one variance: choose --preprocess logit or raw "
                "and --variance shared",
            )
            require(
                self.model.network == "mlp"
                and self.model.hidden == ()
                and self.training.epochs == 0,
                "ppca is fitted in closed form: it has no hidden layers (--hidden) and no "
                "convolutions (--network mlp), and takes --epochs 0",
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
        steps = self.inference.num_steps
        parts = [self.data.dataset]
        parts += [] if self.model.network == "mlp" else [self.model.network]
        parts += [] if self.model.precision == "float32" else [self.model.precision]
        parts.append(self.inference.method)
        parts += [] if steps is None else [f"T{steps}"]
        objective = self.training.objective
        if objective != "elbo":
            count = "" if objective == "evidence" else str(self.training.train_samples)
            parts.append(objective + count)
        return "-".join([*parts, f"seed{self.training.seed}"])

    def differences(self, saved: "Config") -> list[str]:
        """What keeps this configuration from continuing a run made with `saved`.

        The evaluation, and where the data lie, on disk or in memory, may change; so may how long to
        train, unless the learning rate depends on it.
        """
        free = {"data.data_dir", "data.stream"}
        if self.training.schedule == "constant":
            free |= {"training.epochs", "training.patience", "training.minutes"}
        mine, theirs = _flat(self), _flat(saved)
        return [
            f"{name} is {mine[name]}, was {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
            and name not in free
            and not name.startswith("evaluation.")
        ]


def _flat(config: Config) -> dict[str, object]:
    return {
        f"{section}.{name}": tuple(value) if isinstance(value, list) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
