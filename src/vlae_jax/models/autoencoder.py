"""The shipped model (Flax NNX): encoder and decoder networks with their output density.

Every method takes one example; `at` binds an example to the model. A model is a pytree: pass it
through `jax.jit` and `jax.grad` as an argument (`nnx.split` / `nnx.merge`), never by closing over
it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlae_jax.affine_head import (
    WhitenedHead,
    affine_head_expansion,
    whiten_affine_head,
    whitened_affine_gaussian,
)
from vlae_jax.densities import LogDensity
from vlae_jax.errors import UserError
from vlae_jax.expansions import Expansion, exact_expansion, gauss_newton_expansion
from vlae_jax.models.arithmetic import Precision, arithmetic, in_full
from vlae_jax.models.likelihoods import Group, Output, Parameter
from vlae_jax.models.networks import MLP, ConvDecoder, ConvEncoder, Doubling
from vlae_jax.models.priors import MixturePrior, Prior, StandardNormal
from vlae_jax.posterior import DiagonalPosterior, Posterior, kl_to_prior

# Adam moves every parameter by about the learning rate per step. The log variance changes more
# during training than a weight, and delays convergence, so it is stored in a larger unit.
_LOG_VAR_RATE = 10.0


class VariationalAutoencoder(nnx.Module):
    """An encoder, a prior p(z), and p(x | z) by a decoder that ends in an affine layer.

    Args:
        dim: Pixels times channels, the length of x.
        latent: Dimensions of z.
        prior_components: Gaussians in the prior, a mixture that is learned; by default the prior is
            N(0, I).
        hidden: Widths of the encoder's hidden layers; the decoder takes them reversed.
        activation: A key of `ACTIVATIONS`.
        likelihood: The density of all entries, "gaussian" with a learned variance or "bernoulli" by
            logits for example, or the groups of entries that share one.
        variance: The variance of x per entry, (dim,), where output variances start.
        average: The mean of x per entry, (dim,), where the decoder starts; zeros by default.
        per_pixel: Learn one output variance per entry; otherwise one for all of a group, starting
            at the mean.
        min_std: Floor of the output standard deviation, in the units of x.
        posterior_head: A function that makes the module for a posterior with more than mean and log
            standard deviation (a flow, for example), from the number of the encoder's features and
            random streams.
        network: "mlp", or "conv": convolutions between the image and the hidden layers.
        channels: With "conv", the encoder's channels after each convolution, which halves the
            image; the decoder takes them reversed.
        image_shape: With "conv", (height, width, channel), the order of x.
        mask_input: Whether the encoder also sees which entries are observed, as ones and zeros: as
            further inputs, with "conv" as further channels.
        precision: Precision of the products in the networks. With "bfloat16" the hidden layers of
            the encoder multiply in it, and so do the derivatives of the decoder's hidden layers:
            Jacobians, and the gradients of all parameters. The decoder's value, from which the log
            joint is computed, the output layers of both, and all that is computed from them stay
            float32; see `arithmetic.arithmetic`.
        rngs: Random streams for the initial weights.

    Raises:
        ValueError: If `network` or `precision` is not known, or "conv" is given without the shape
            of the image.
        UserError: If the image is too small for that many halvings.
    """

    def __init__(
        self,
        dim: int,
        *,
        latent: int,
        prior_components: int | None = None,
        hidden: Sequence[int],
        activation: str,
        likelihood: str | tuple[Group, ...],
        variance: np.ndarray,
        average: np.ndarray | None = None,
        per_pixel: bool = False,
        min_std: float = 1e-3,
        posterior_head: Callable[[int, nnx.Rngs], nnx.Module] | None = None,
        network: Literal["mlp", "conv"] = "mlp",
        channels: Sequence[int] = (),
        image_shape: Sequence[int] = (),
        mask_input: bool = False,
        precision: Precision = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        if network not in ("mlp", "conv"):
            raise ValueError(f"network must be 'mlp' or 'conv', got {network!r}")
        if network == "conv" and (math.prod(image_shape) != dim or len(image_shape) != 3):
            raise ValueError(
                f"network 'conv' needs the image_shape (height, width, channel) of x ({dim},), "
                f"got {tuple(image_shape)}"
            )
        groups = (Group(likelihood),) if isinstance(likelihood, str) else likelihood
        self.output = output = Output(groups, dim)
        out, seen_size = sum(output.sizes), output.seen_size
        if network == "conv" and (len(groups) > 1 or seen_size != dim):
            raise UserError(
                "network conv has one density for all entries, which is not categorical"
            )
        encoding = arithmetic(precision)
        decoding = arithmetic(precision, derivatives_only=True)
        self.encoder: MLP | ConvEncoder
        self.features: MLP | ConvDecoder
        self.head: nnx.Linear | Doubling
        self.mask_shape = tuple(image_shape) or (dim,) if mask_input else None
        twice = 2 if mask_input else 1
        masks = dim if mask_input else 0
        if network == "conv":
            seen_shape = (*image_shape[:2], twice * image_shape[2])
            self.encoder = ConvEncoder(
                seen_shape, channels, hidden, activation, arithmetic=encoding, rngs=rngs
            )
        else:
            self.encoder = MLP(
                seen_size + masks, hidden, activation, arithmetic=encoding, rngs=rngs
            )
        self.mean = nnx.Linear(self.encoder.out_size, latent, rngs=rngs)
        self.log_std = nnx.Linear(self.encoder.out_size, latent, rngs=rngs)
        widths = tuple(reversed(hidden))
        # The decoder starts close to the data's mean. With larger initial weights the noise of the
        # samples makes a VAE learn to ignore the latent first.
        quiet = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        if network == "conv":
            self.features = ConvDecoder(
                latent, widths, channels, image_shape, activation, arithmetic=decoding, rngs=rngs
            )
            height, width, colors = image_shape
            maps = colors * groups[0].outputs
            self.head = Doubling(
                self.features.out_channels, maps, (height, width), kernel_init=quiet, rngs=rngs
            )
        else:
            self.features = MLP(latent, widths, activation, arithmetic=decoding, rngs=rngs)
            self.head = nnx.Linear(self.features.out_size, out, kernel_init=quiet, rngs=rngs)
        self.min_std = min_std
        self._start(np.zeros(dim) if average is None else average, variance, per_pixel)
        # Made last, so that the other weights start from equal values in all systems.
        self.posterior_head: Any = posterior_head and posterior_head(self.encoder.out_size, rngs)
        self.prior: Prior = StandardNormal(latent)
        if prior_components is not None:
            self.prior = MixturePrior(latent, prior_components, rngs)

    def _start(self, average: np.ndarray, variance: np.ndarray, per_pixel: bool) -> None:
        """Start at the mean of x: biases of the output layer, and parameters of the densities."""
        etas = []
        for index, (group, mean, own) in enumerate(self.output.parts(average, variance)):
            is_shared = not per_pixel and group.parameter != "log_dispersion"
            own = np.full_like(own, np.mean(own)) if is_shared else own
            eta, spread = group.start(mean, np.maximum(own, 4.0 * self.min_std**2))
            etas.append(eta)
            if group.parameter is not None:
                spread = spread[0] if is_shared else spread
                scaled = nnx.Param(jnp.asarray(spread / _LOG_VAR_RATE, jnp.float32))
                setattr(self, self._name(index), scaled)
        if not any(eta.any() for eta in etas):
            return
        if isinstance(self.head, Doubling):  # one bias for each map and place in a 2 × 2 block
            maps = etas[0].reshape(len(etas[0]), -1, self.head.out_channels // len(etas[0]))
            bias, start = self.head.blocks.bias, np.tile(maps.mean(axis=1).reshape(-1), 4)
        else:
            bias, start = self.head.bias, np.concatenate([eta.reshape(-1) for eta in etas])
        assert bias is not None
        bias[...] = jnp.asarray(start, jnp.float32)

    def _name(self, index: int) -> str:
        """The attribute that holds the parameter of a group."""
        groups = self.output.groups
        return f"scaled_{groups[index].parameter}" + (f"_{index}" if len(groups) > 1 else "")

    @property
    def likelihood(self) -> str:
        """The density of all entries, or mixed."""
        return self.output.name

    @property
    def parameters(self) -> list[Parameter]:
        """The learned parameter of each group, not below its floor: a scalar or (columns,)."""
        found: list[Parameter] = []
        for index, group in enumerate(self.output.groups):
            if group.parameter is None:
                found.append(None)
                continue
            scaled = getattr(self, self._name(index))[...]
            found.append(jnp.maximum(_LOG_VAR_RATE * scaled, group.floor(self.min_std)))
        return found

    @property
    def log_var(self) -> Float[Array, "..."]:
        """Log output variance of a gaussian: a scalar or (dim,), never below the floor."""
        (log_var,) = self.parameters
        assert log_var is not None
        return log_var

    def set_log_var(self, log_var: float | np.ndarray) -> None:
        """Set the log output variance: a scalar or (dim,), as it was initialized."""
        getattr(self, self._name(0))[...] = jnp.asarray(log_var / _LOG_VAR_RATE, jnp.float32)

    def at(
        self,
        x: Float[Array, " dim"],
        *,
        observed: Bool[Array, " dim"] | None = None,
        fill: Float[Array, " dim"] | None = None,
        head: WhitenedHead | None = None,
        offset: Float[Array, ""] | None = None,
    ) -> "Observation":
        """Bind the model to one example: the encoder's guess, the log joint and its expansion.

        Args:
            x: The example, (dim,).
            observed: Mask of the observed pixels, (dim,); all by default. The others are left out
                of the likelihood, and so integrated out; their values in x are not used.
            fill: Values for the encoder in place of the others, (dim,); zeros by default.
            head: The result of `whitened_head`; with it the log joint is equal up to rounding and
                does not touch the data dimension.
            offset: Nats added to the log likelihood, the log-Jacobian of the map from the data's
                units to those of x; None for none, so that densities are those of x.

        Raises:
            ValueError: If `head`, which is for all pixels, is given together with `observed`.
        """
        if head is not None and observed is not None:
            raise ValueError("a whitened head holds all pixels: give head or observed, not both")
        seen = x
        if observed is not None:
            seen = jnp.where(observed, x, jnp.zeros_like(x) if fill is None else fill)
        features = self.encode(seen, observed)
        mean, log_std = self.mean(features), self.log_std(features)
        return Observation(self, x, seen, features, mean, log_std, mean, observed, head, offset)

    def encode(
        self, seen: Float[Array, " dim"], observed: Bool[Array, " dim"] | None = None
    ) -> Float[Array, " features"]:
        """The encoder's last hidden layer, (features,).

        Args:
            seen: The example with values in place of what is not observed, (dim,).
            observed: As in `at`; read by networks that were trained on incomplete data.
        """
        shown = self.output.see(seen, observed)
        if self.mask_shape is not None:
            mask = jnp.ones_like(seen) if observed is None else observed.astype(seen.dtype)
            if shown.size == mask.size:
                shown, mask = shown.reshape(self.mask_shape), mask.reshape(self.mask_shape)
            shown = jnp.concatenate([shown, mask], axis=-1).reshape(-1)
        return self.encoder(shown)

    def decode(self, z: Float[Array, " latent"]) -> Float[Array, " out"]:
        """What the density is given, (out,): the Gaussian's mean, or the Bernoulli's logits.

        Densities with several numbers an entry have all of the first, then all of the second.
        """
        eta = self.head(self.features(z))
        outputs = self.output.groups[0].outputs
        if isinstance(self.head, Doubling) and outputs > 1:
            eta = jnp.moveaxis(eta.reshape(*eta.shape[:2], outputs, -1), 2, 0)
        return eta.reshape(-1)

    def reconstruct(self, z: Float[Array, " latent"]) -> Float[Array, " dim"]:
        """The expected x given z, in model space; of a categorical x the most probable class."""
        return self.output.expected(self.decode(z), self.parameters)

    def draw(self, key: PRNGKeyArray, z: Float[Array, " latent"]) -> Float[Array, " dim"]:
        """Draw a sample of p(x | z), (dim,), in model space."""
        return self.output.draw(key, self.decode(z), self.parameters)

    def whitened_head(self) -> WhitenedHead | None:
        """Factor the output layer for evaluations at many z; None where that saves nothing."""
        if self.likelihood != "gaussian" or not isinstance(self.head, nnx.Linear):
            return None
        if self.head.out_features <= self.head.in_features:
            return None
        return whiten_affine_head(self.head.kernel[...], self.log_var)


class Observation(NamedTuple):
    """One example bound to the model, with the functions that inference needs.

    `VariationalAutoencoder.at` creates it, inside the trace that uses it.
    """

    model: VariationalAutoencoder
    x: Float[Array, " dim"]
    seen: Float[Array, " dim"]
    """The example as the encoder sees it, with values in place of what is not observed."""
    features: Float[Array, " features"]
    """The encoder's last hidden layer."""
    mean: Float[Array, " latent"]
    """The encoder's mean."""
    log_std: Float[Array, " latent"]
    """The encoder's log standard deviation."""
    start: Float[Array, " latent"]
    """Where a search for the mode starts: the encoder's mean, unless another place is known."""
    observed: Bool[Array, " dim"] | None
    """Mask of the observed pixels; None for all."""
    head: WhitenedHead | None
    offset: Float[Array, ""] | None = None
    """Nats added to the log likelihood: the log-Jacobian to the data's own units."""

    @property
    def guess(self) -> DiagonalPosterior:
        """The encoder's diagonal Gaussian."""
        return DiagonalPosterior(self.mean, self.log_std)

    def log_likelihood(self, eta: Float[Array, " out"]) -> Float[Array, ""]:
        """Log p(x | decoder's output), nats, summed over the observed entries."""
        model = self.model
        value = model.output.log_prob(self.x, eta, model.parameters, self.observed)
        return value if self.offset is None else value + self.offset

    @property
    def log_joint(self) -> LogDensity:
        """The function from z (latent,) to log p(x, z), nats."""
        model = self.model
        if self.head is None or not isinstance(model.head, nnx.Linear):
            decode: Callable[[Array], Array] = model.decode
            log_likelihood: LogDensity = self.log_likelihood
        else:
            decode = model.features
            log_likelihood = whitened_affine_gaussian(
                self.head,
                model.head.bias[...],  # type: ignore[index]
                model.log_var,
                self.x,
            )
            if self.offset is not None:
                return lambda z: log_likelihood(decode(z)) + self._log_prior(z)
        return lambda z: log_likelihood(decode(z)) + model.prior.log_prob(z)

    def kl_to_prior(
        self, key: PRNGKeyArray, posterior: Posterior, *, num_samples: int
    ) -> Float[Array, ""]:
        """KL(q ‖ p(z)), nats: in closed form where there is one, otherwise a mean over samples."""
        prior = self.model.prior
        log_prior = None if prior.is_standard else prior.log_prob
        return kl_to_prior(key, posterior, log_prior, num_samples=num_samples)

    def _log_prior(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """The log prior with the offset, for likelihoods that are computed elsewhere."""
        prior = self.model.prior.log_prob(z)
        return prior if self.offset is None else prior + self.offset

    def expansions(self) -> tuple[Expansion, Expansion | None]:
        """Return the exact expansion of the log joint, and its Gauss-Newton repair or None.

        For piecewise-linear activations the Gauss-Newton form is the exact Hessian, so it is used
        and needs no repair. With a fully connected output layer and a Gaussian likelihood the data
        dimension is compressed away where that costs less. That is not done for a part of the
        pixels, as the projection would differ for every example. Rounded products would spoil some
        terms in the Hessian of a smooth network, so that Hessian is computed in float32, whatever
        the precision.

        Where the density is not log-concave in the decoder's output, its Fisher information takes
        the place of its Hessian, and the mean precision of its components that of a mixture as the
        prior: no repair that changes from step to step disturbs the training.
        """
        model, head, prior = self.model, self.model.head, self.model.prior
        smooth = not model.features.piecewise_linear
        full = in_full(model) if smooth else model
        curvature = None if prior.is_standard else prior.precision
        if (
            model.likelihood == "gaussian"
            and self.observed is None
            and isinstance(head, nnx.Linear)
        ):
            affine = (head.kernel[...], head.bias[...], model.log_var, self.x)  # type: ignore[index]
            expand = functools.partial(
                affine_head_expansion, log_prior=self._log_prior, prior_precision=curvature
            )
            if smooth and curvature is None:
                return expand(full.features, *affine, exact=True), expand(model.features, *affine)
            return expand(model.features, *affine), None
        fisher = None if model.output.is_log_concave else self._fisher
        gauss_newton = gauss_newton_expansion(
            model.decode,
            self.log_likelihood,
            prior.log_prob,
            fisher=fisher,
            prior_precision=curvature,
        )
        if smooth and fisher is None and curvature is None:
            exact = exact_expansion(self._replace(model=full, head=None).log_joint)
            return exact, gauss_newton
        return gauss_newton, None

    def _fisher(self, eta: Float[Array, " out"]) -> tuple[Float[Array, "k k n"], ...]:
        model = self.model
        return model.output.information(self.x, eta, model.parameters, self.observed)
