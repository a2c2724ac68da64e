"""The configuration of a run: frozen dataclasses that check themselves when built.

The sections of a configuration stay together, in more than 400 lines: most of them are what --help
says of each option.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlae_jax.errors import require, require_counts, require_positive, require_seed, require_types
from vlae_jax.runs.likelihoods import LIKELIHOODS, as_text, parse
from vlae_jax.runs.methods import find_method

if TYPE_CHECKING:  # options and files are texts; in Python other forms are turned into one
    Likelihood = str | Sequence[tuple[str, int]] | Mapping[str, str | Sequence[str] | None]
else:
    Likelihood = str

Preprocess = Literal[
    "auto", "logit", "raw", "static_binary", "dynamic_binary", "standardize", "none"
]
Proposal = Literal["auto", "posterior", "widened", "student_t"]
Activation = Literal["relu", "leaky_relu", "softplus", "tanh", "elu", "gelu"]
_FORBID: dict[str, Any] = {"extra": "forbid"}
"""Makes pydantic refuse a config.json with an option that is unknown here."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images or tables, and how they become vectors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, omniglot, svhn, cifar10;
    or NAME for your own NAME.npz, .npy, .csv or .parquet in --data-dir, or pictures in it."""
    data_dir: str | None = None
    """Folder with NAME.npz, .npy, .csv or .parquet, idx files or a prepared tensorflow-datasets
    directory, or pictures, with or without folders of classes; or one such file."""
    levels: int | None = None
    """How many values a pixel may take, from 0: 256 for 8 bits, 2 for black and white. By default
    256, and 17 for digits; images that use only the lowest of them are asked about."""
    resize: tuple[int, int] | None = None
    """Height and width to bring a folder of pictures to, in training and in all uses: each is
    scaled to cover them, and what protrudes is cut off. By default their own, which must agree."""
    preprocess: Preprocess = "auto"
    """logit: uniform dequantization, then logit.
    raw: centered pixels in [0, 1].
    static_binary, dynamic_binary: Bernoulli draws of the pixels, once or anew at each step.
    standardize: tables by the mean and standard deviation of each column, images of measurements by
    the mean of each entry and one standard deviation (log p(x) stays in the data's own units).
    none: as they are. auto: logit for pixels (uint8 images), standardize for all else."""
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
        require_types(self)
        require(
            not (self.stream and self.preprocess == "static_binary"),
            "static_binary draws all training images once and keeps them in memory: leave --stream "
            "out, or choose --preprocess dynamic_binary",
        )
        require(
            self.levels is None or 2 <= self.levels <= 256,
            f"levels must be from 2 to 256, got {self.levels}",
        )
        require(
            self.levels is None or not self.stream,
            "levels are those of the streamed data set: leave --levels out, or --stream",
        )
        require_counts(self, "resize")
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
    prior: Literal["normal", "mixture"] = "normal"
    """normal: N(0, I). mixture: a mixture of Gaussians with diagonal covariances, which learns."""
    prior_components: int = 10
    """mixture: the number of Gaussians."""
    network: Literal["mlp", "conv"] = "mlp"
    """mlp: fully connected. conv: convolutions between the image and the hidden layers, for any
    size of image, gray or in color."""
    channels: tuple[int, ...] = (32, 64)
    """conv: the encoder's channels after each convolution, which halves the image (the decoder
    takes them reversed)."""
    hidden: tuple[int, ...] = (500, 500)
    """Widths of the hidden layers, encoder and decoder alike (the decoder takes them reversed)."""
    activation: Activation = "relu"
    """Nonlinearity. For relu and leaky_relu, piecewise linear, the Gauss-Newton precision is the
    exact Hessian."""
    likelihood: Likelihood = "auto"
    """Output density: gaussian, student_t, bernoulli, categorical, poisson, negative_binomial,
    zero_inflated_poisson, zero_inflated_negative_binomial or discretized_logistic; or one for each
    group of columns, in their order as poisson:3,gaussian:5, or by name as
    poisson:visits+falls,gaussian. auto takes bernoulli for binary preprocessing, else gaussian."""
    variance: Literal["shared", "per_pixel", "heteroscedastic"] = "shared"
    """Gaussian output: one learned variance, or one for each pixel or column (so too the scale of
    student_t and discretized_logistic). heteroscedastic: the decoder gives each its own."""
    student_df: float = 5.0
    """student_t: degrees of freedom."""
    min_std: float = 1e-3
    """Gaussian output: floor of the learned standard deviation, or of a learned scale.
    Without one a constant pixel would drive it to 0."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the networks' products in training. bfloat16: operands of products are rounded, in
    the encoder, in flows and in all derivatives; parameters, sums, the decoder's value and all of
    the inference stay float32. Measurements, validation included, are in float32 throughout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "likelihood", as_text(self.likelihood))
        require_types(self)
        require_counts(self, "latent", "prior_components", "hidden", "channels")
        require(
            self.network != "conv" or len(self.channels) >= 1,
            "network conv needs at least one number of channels, one for each convolution",
        )
        require_positive(self, "min_std", "student_df")


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """The inference system and its settings."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    method: str = "vlae"
    """vlae: mode search and Laplace posterior. vae: amortized diagonal Gaussian.
    vae_full: amortized Gaussian with full covariance. vae_hf, vae_iaf, vae_planar: Householder,
    inverse autoregressive, planar flows. sa_vae: diagonal Gaussian, refined by gradient ascent.
    vae_fif: Gaussian with full covariance, by products with the networks' Jacobians.
    vae_iter: diagonal Gaussian, refined by a network that reads the ELBO's gradient.
    ppca: probabilistic PCA in closed form. fa: factor analysis."""
    steps: int = 4
    """T: mode-search steps (vlae), ascent steps (sa_vae), steps of the network (vae_iter) or of the
    flow."""
    search: Literal["newton", "scaled", "gradient"] = "newton"
    """vlae: the steps. newton: closed-form, local-linear. scaled: along the gradient times the
    encoder's variances, which costs no Jacobian. gradient: ascent of the log joint."""
    posterior: Literal["exact", "matrix_free"] = "exact"
    """vlae: how training differentiates its sample of the posterior. exact: through the precision.
    matrix_free: by two products with the Gauss-Newton precision, an unbiased gradient at a fraction
    of the price; from 64 latent dimensions on conjugate gradients find the sample, too. All
    measurements take the exact posterior."""
    damping: Literal["line_search", "paper"] = "line_search"
    """vlae: step lengths; line_search never lowers the log joint, paper is 0.5 / (t + 1)."""
    solver: Literal["auto", "cholesky", "cg"] = "auto"
    """vlae: how a step's direction is found: by factoring the precision, or by conjugate gradients
    that never form it (at least 90 % of the Newton decrement). auto takes cg from 24 latent
    dimensions on, except for the steps of the paper."""
    gradient: Literal["auto", "implicit", "stop", "unroll"] = "auto"
    """vlae, sa_vae: how training differentiates what the steps find.
    implicit: by the implicit function theorem (vlae). stop: not at all. unroll: through the steps.
    With implicit and stop the encoder learns to start where the steps end: by its excess energy
    (vlae) or its KL divergence (sa_vae), in nats. auto: unroll for sa_vae, implicit for vlae, but
    stop with --search scaled, whose steps end too far from the mode for it."""
    encoder_loss: Literal["distance", "elbo"] = "distance"
    """What the encoder learns by where the steps are not unrolled. distance: that of --gradient.
    elbo: the ELBO of its own guess, as in a VAE, with the decoder held constant."""
    curvature: Literal["exact", "gauss_newton"] = "exact"
    """vlae: the precision. exact is the Hessian, repaired by Gauss-Newton, and counted, where it is
    not positive definite. For a likelihood that is not log-concave (student_t, zero-inflated,
    variance heteroscedastic) both take its Fisher information instead of its Hessian."""
    ascent_rate: float = 1e-3
    """sa_vae, and vlae with search gradient: step size of the ascent."""
    ascent_momentum: float = 0.5
    """Momentum of that ascent."""
    ascent_clip: float | None = None
    """Largest norm of an image's gradient in that ascent; by default any."""
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
        require_types(self)
        require_counts(self, "steps", least=0)
        require_counts(self, "flow_width")
        require_positive(self, "ascent_rate", "ascent_clip")
        require(
            0 <= self.ascent_momentum < 1,
            f"ascent_momentum must be at least 0 and below 1, got {self.ascent_momentum}",
        )
        require(
            self.steps >= 1 or not find_method(self.method).is_flow,
            f"{self.method} needs at least one step; without any it is vae",
        )
        require_counts(self, "refine_steps", "refine_samples")
        require(
            self.refine_samples % 2 == 0,
            f"refine_samples must be even, as samples come in pairs, got {self.refine_samples}",
        )
        require(
            self.refine == "none" or not find_method(self.method).is_flow,
            f"refine variational moves a Gaussian, which {self.method} has not",
        )
        require(
            self.posterior == "exact"
            or (self.method == "vlae" and self.refine == "none" and self.gradient != "unroll"),
            "posterior matrix_free is one sample of vlae, without the matrix that --refine and "
            "gradient unroll need: choose posterior exact",
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
    """The optimization."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    epochs: int = 20
    """Passes over the training images."""
    pretrain: int | Literal["auto"] = 0
    """Train the network as a plain VAE in so many of the first epochs, and then go on as --method.
    The optimizer goes on as it is; the best checkpoint is chosen among the later epochs.
    auto: change when short trials raise the bound of --method faster than the steps of the VAE, and
    at the latest after two thirds of --epochs or --minutes. It depends on the clock, so that two
    runs may change at different epochs."""
    init_from: str | None = None
    """Folder of a run on the same images, whose parameters training begins with. What the network
    of --method has besides begins as usual."""
    modes: Literal["encoder", "stored"] = "encoder"
    """vlae: where the search for an image starts in training. encoder: at the encoder's mean.
    stored: where it ended in the last epoch, if that is better; one latent vector per training
    image is then part of the training state."""
    patience: int | None = None
    """Stop after this many epochs without a better validation bound; by default never."""
    minutes: float | None = None
    """Stop at the end of an epoch after this many minutes of training; by default never."""
    batch_size: int = 128
    """Images in one training step."""
    microbatches: int | None = None
    """Split the batch into this many parts, computed one after the other, and add up their
    gradients in order: the run is then equal bit for bit on any number of devices that divides it.
    Every device holds the gradients of all parts. By default a device takes all its images at once,
    which is the fastest."""
    learning_rate: float = 5e-4
    """Adam's step size."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The course of the learning rate over the run; cosine ends at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled decay of the decoder's weight matrices (AdamW): a step takes off this share of them
    times the learning rate. A regularization for decoders that overfit."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; by default any."""
    objective: Literal["elbo", "iwae", "dreg", "evidence"] = "elbo"
    """The objective that training maximizes. elbo. iwae: the importance-weighted bound of
    --train-samples samples. dreg: that bound with the doubly reparameterized gradient. evidence:
    Laplace's estimate of log p(x), without samples (vlae)."""
    train_samples: int = 1
    """Posterior samples per image in the objective."""
    seed: int = 0
    """Seeds the initial weights, the order of the images and every sample."""

    def __post_init__(self) -> None:
        require_types(self)
        require_seed(self.seed)
        require_counts(self, "epochs", "warmup_steps", least=0)
        if self.pretrain != "auto":
            require_counts(self, "pretrain", least=0)
        require(
            self.pretrain in (0, "auto") or int(self.pretrain) < self.epochs,
            f"pretrain {self.pretrain} leaves no epoch of {self.epochs} to the method itself",
        )
        require_counts(self, "batch_size", "microbatches", "train_samples", "patience")
        require_positive(self, "minutes", "learning_rate", "clip_norm")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay must be at least 0 and finite, got {self.weight_decay}",
        )
        require(
            self.microbatches is None or self.batch_size % self.microbatches == 0,
            f"microbatches must divide batch_size {self.batch_size}, got {self.microbatches}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on the test set."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    importance_samples: int = 5000
    """K of the importance-weighted log-likelihood."""
    proposal: Proposal = "auto"
    """Where importance samples come from. auto: a Student-t around the best Gaussian that can be
    found for each image's decoder, in antithetic pairs, whatever system was trained: the one to
    compare systems by; where Pareto k says that it does not suffice, annealing.
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
    """Evaluate only this many test images, the first ones; by default all."""
    evaluation_batch: int = 16
    """Test images evaluated at once."""

    def __post_init__(self) -> None:
        require_types(self)
        require_counts(self, "importance_samples", "chunk_size", "test_images", "evaluation_batch")
        require_positive(self, "proposal_scale", "proposal_df")
        require(
            0 <= self.evaluation_budget < math.inf,
            f"evaluation_budget must be at least 0 and finite, got {self.evaluation_budget}",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """All choices of one run. Saved as config.json in its run folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    inference: InferenceConfig = InferenceConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require_types(self)
        require(
            "bernoulli" not in self.densities or self.data.preprocess not in ("logit", "raw"),
            "a bernoulli likelihood needs binary images, but preprocess is "
            f"{self.data.preprocess!r}: choose static_binary or dynamic_binary, or a gaussian",
        )
        counted = [d for d in self.densities if LIKELIHOODS[d].values in ("counts", "classes")]
        require(
            not counted or self.data.preprocess in ("auto", "none", "standardize"),
            f"a {counted[0] if counted else ''} likelihood needs whole numbers as they are, but "
            f"preprocess is {self.data.preprocess!r}: choose none or auto",
        )
        method, objective = self.inference.method, self.training.objective
        require(
            objective != "evidence" or method == "vlae",
            f"objective evidence is Laplace's, which vlae has and {method} has not",
        )
        require(
            objective == "elbo" or find_method(method).has_density_in_training,
            f"{method} trains on the ELBO: the density of its samples is not known then",
        )
        require(
            method != "vae_fif" or self.likelihood in ("gaussian", "bernoulli"),
            f"vae_fif is for a gaussian or bernoulli likelihood, got {self.likelihood}",
        )
        require(
            self.inference.posterior == "exact"
            or (objective == "elbo" and self.training.train_samples == 1),
            "posterior matrix_free trains on the ELBO of one sample: choose --objective elbo and "
            "--train-samples 1, or posterior exact",
        )
        correlated = set(self.densities) & {
            *("categorical", "zero_inflated_poisson", "zero_inflated_negative_binomial")
        }
        require(
            self.inference.posterior == "exact" or not correlated,
            f"posterior matrix_free needs a likelihood whose outputs vary independently, which "
            f"{', '.join(sorted(correlated))} is not: choose --posterior exact",
        )
        require(
            objective != "dreg" or not find_method(method).is_flow,
            f"objective dreg needs the density of any point, which {method} has only of its own "
            "samples: choose iwae",
        )
        searches = method == "vlae" and self.inference.steps > 0
        require(
            self.training.modes == "encoder" or (searches and self.inference.gradient != "unroll"),
            "modes stored are starts of the search of vlae, whose encoder learns beside it: choose "
            "--method vlae, at least one step, and --gradient implicit or stop",
        )
        width, latent = self.inference.flow_width, self.model.latent
        require(
            method != "vae_iaf" or width is None or width >= latent,
            f"flow_width must be at least latent, or the flow loses sight of dimensions: got "
            f"{width} for {latent}",
        )
        entry = find_method(method)
        if entry.fit is not None:
            require(
                not self.data.stream,
                f"{method} is fitted to all training images at once: leave --stream out",
            )
            one = "variance" if entry.variance == "shared" else "variance a pixel"
            require(
                self.likelihood == "gaussian"
                and self.model.variance == entry.variance
                and self.model.prior == "normal",
                f"{method} has a normal prior and a gaussian output of one {one}: choose "
                f"--preprocess logit or raw (standardize for measurements), --variance "
                f"{entry.variance} and --prior normal",
            )
            require(
                self.model.network == "mlp"
                and self.model.hidden == ()
                and self.training.epochs == 0,
                f"{method} is fitted to all images at once: it has no hidden layers (--hidden) "
                "and no convolutions (--network mlp), and takes --epochs 0",
            )

    def for_data(self, *, pixels: bool) -> "Config":
        """The configuration with preprocessing ``auto`` resolved for the kind of data.

        Raises:
            UserError: If the preprocessing is not for that kind.
        """
        chosen = self.data.preprocess
        if chosen == "auto":
            values = {LIKELIHOODS[density].values for density in self.densities}
            counted: Preprocess = "none" if values <= {"counts", "classes"} else "logit"
            measured: Preprocess = "standardize" if "numbers" in values else "none"
            chosen = counted if pixels else measured
            data = dataclasses.replace(self.data, preprocess=chosen)
            return dataclasses.replace(self, data=data)
        require(
            pixels or chosen in ("standardize", "none"),
            f"preprocess {chosen} is for pixels (uint8 images), and the data are a table or "
            "measurements: choose standardize or none",
        )
        require(
            not pixels or chosen != "standardize",
            "preprocess standardize is for tables and measurements, and the data are pixels (uint8 "
            "images): choose logit or raw, or give them as floats",
        )
        return self

    @property
    def binary(self) -> bool:
        """Whether the model sees binary images."""
        return self.data.preprocess in ("static_binary", "dynamic_binary")

    @property
    def likelihood(self) -> str:
        """The output density, with ``auto`` resolved, as a text; see `runs.likelihoods`."""
        if self.model.likelihood != "auto":
            return as_text(self.model.likelihood)
        return "bernoulli" if self.binary else "gaussian"

    @property
    def densities(self) -> tuple[str, ...]:
        """The names of all output densities."""
        return tuple(name for name, _ in parse(self.likelihood))

    @property
    def run_name(self) -> str:
        """A folder name made of the run's main choices."""
        steps = self.inference.num_steps
        parts = [self.data.dataset]
        parts += [] if self.model.network == "mlp" else [self.model.network]
        parts += [] if self.model.prior == "normal" else [f"mixture{self.model.prior_components}"]
        parts += [] if self.model.precision == "float32" else [self.model.precision]
        parts.append(self.inference.method)
        parts += [] if steps is None else [f"T{steps}"]
        parts += [f"pretrain{self.training.pretrain}"] if self.training.pretrain else []
        parts += ["stored"] if self.training.modes == "stored" else []
        objective = self.training.objective
        if objective != "elbo":
            count = "" if objective == "evidence" else str(self.training.train_samples)
            parts.append(objective + count)
        return "-".join([*parts, f"seed{self.training.seed}"])

    def differences(self, saved: "Config") -> list[str]:
        """List the choices that keep this configuration from continuing a run made with `saved`.

        The evaluation and the place of the data may change. So may the length of the training,
        unless the learning rate depends on it.
        """
        free = {"data.data_dir", "data.stream"}
        if self.data.preprocess == "auto":  # depends on the data, which must be the same
            free.add("data.preprocess")
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
