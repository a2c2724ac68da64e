"""The shipped networks (Flax NNX): ReLU MLP encoder and decoder with their output density.

Every method takes one example. A model is a pytree: pass it through `jax.jit` and `jax.grad` as an
argument (`nnx.split` / `nnx.merge`), never by closing over it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlae_jax.curvature import (
    Expansion,
    WhitenedHead,
    affine_head_expansion,
    exact_expansion,
    gauss_newton_expansion,
    whiten_affine_head,
    whitened_affine_gaussian,
)
from vlae_jax.densities import LogDensity, bernoulli, gaussian, standard_normal

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
}
# Adam moves a parameter by its learning rate a step, whatever the gradient. The log variance has
# further to go than a weight, and everything waits for it, so its unit is larger.
_LOG_VAR_RATE = 10.0

PIECEWISE_LINEAR = frozenset({"relu", "leaky_relu"})


class MLP(nnx.Module):
    """Fully connected hidden layers, an activation after each; the identity if there are none."""

    def __init__(
        self, in_size: int, widths: Sequence[int], activation: str, *, rngs: nnx.Rngs
    ) -> None:
        sizes = (in_size, *widths)
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.activation = activation
        self.out_size = sizes[-1]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The last hidden layer's output, (out_size,), for x of shape (in_size,)."""
        for layer in self.layers:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class VariationalAutoencoder(nnx.Module):
    """p(z) = N(0, I), p(x | z) by a decoder that ends in an affine layer, and an encoder.

    Args:
        dim: Pixels, the length of x.
        latent: Dimensions of z.
        hidden: Widths of the encoder's hidden layers; the decoder takes them reversed.
        activation: A key of `ACTIVATIONS`.
        likelihood: "gaussian" with a learned variance, or "bernoulli" by logits.
        variance: The data's variance per pixel, (dim,), where the output variance starts.
        per_pixel: Learn one output variance per pixel; else one for all, starting at the mean.
        min_std: Floor of the output standard deviation, in the units of x.
        posterior_head: Makes what the posterior needs besides mean and log standard deviation (a
            flow, say), from the number of the encoder's features and random streams.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        latent: int,
        hidden: Sequence[int],
        activation: str,
        likelihood: Literal["gaussian", "bernoulli"],
        variance: np.ndarray,
        per_pixel: bool = False,
        min_std: float = 1e-3,
        posterior_head: Callable[[int, nnx.Rngs], nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder = MLP(dim, hidden, activation, rngs=rngs)
        self.mean = nnx.Linear(self.encoder.out_size, latent, rngs=rngs)
        self.log_std = nnx.Linear(self.encoder.out_size, latent, rngs=rngs)
        self.features = MLP(latent, tuple(reversed(hidden)), activation, rngs=rngs)
        # The decoder starts close to the data's mean. A louder start, sampled through, teaches a
        # VAE to shut the latent off first.
        quiet = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.head = nnx.Linear(self.features.out_size, dim, kernel_init=quiet, rngs=rngs)
        self.likelihood = likelihood
        self.min_std = min_std
        if likelihood == "gaussian":
            start = variance if per_pixel else np.mean(variance)
            start = np.log(np.maximum(start, 4.0 * min_std**2))
            self.scaled_log_var = nnx.Param(jnp.asarray(start / _LOG_VAR_RATE, jnp.float32))
        # Made last, so that the rest starts alike in all systems.
        self.posterior_head: Any = posterior_head and posterior_head(self.encoder.out_size, rngs)

    @property
    def log_var(self) -> Float[Array, "..."]:
        """Log output variance: a scalar or (dim,), never below the floor."""
        floor = 2.0 * float(np.log(self.min_std))
        return jnp.maximum(_LOG_VAR_RATE * self.scaled_log_var[...], floor)

    def set_log_var(self, log_var: float) -> None:
        """Set the log output variance that all pixels share."""
        self.scaled_log_var[...] = jnp.asarray(log_var / _LOG_VAR_RATE, jnp.float32)

    def encode(
        self, x: Float[Array, " dim"]
    ) -> tuple[Float[Array, " latent"], Float[Array, " latent"]]:
        """The encoder's mean and log standard deviation, (latent,) each."""
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_std(hidden)

    def decode(self, z: Float[Array, " latent"]) -> Float[Array, " dim"]:
        """The likelihood's natural parameter: the Gaussian's mean, or the Bernoulli's logits."""
        return self.head(self.features(z))

    def reconstruct(self, z: Float[Array, " latent"]) -> Float[Array, " dim"]:
        """The expected x given z, in model space."""
        eta = self.decode(z)
        return jax.nn.sigmoid(eta) if self.likelihood == "bernoulli" else eta

    def draw(self, key: PRNGKeyArray, z: Float[Array, " latent"]) -> Float[Array, " dim"]:
        """A sample of p(x | z), (dim,), in model space."""
        eta = self.decode(z)
        if self.likelihood == "bernoulli":
            return jax.random.bernoulli(key, jax.nn.sigmoid(eta)).astype(eta.dtype)
        return eta + jnp.exp(0.5 * self.log_var) * jax.random.normal(key, eta.shape, eta.dtype)

    def log_likelihood(
        self, x: Float[Array, " dim"], observed: Bool[Array, " dim"] | None = None
    ) -> LogDensity:
        """The function from the decoder's output (dim,) to log p(x | output), nats.

        Args:
            x: The example, (dim,).
            observed: Which of its pixels are seen, (dim,). The others are left out of the sum, and
                so integrated out: what x holds there is not looked at. All, by default.
        """
        log_var = None if self.likelihood == "bernoulli" else self.log_var
        if observed is None:
            return lambda eta: bernoulli(x, eta) if log_var is None else gaussian(x, eta, log_var)
        x = jnp.where(observed, x, 0.0)

        def log_likelihood(eta: Float[Array, " dim"]) -> Float[Array, ""]:
            if log_var is None:
                terms = jax.vmap(bernoulli)(x[:, None], eta[:, None])
            else:
                each = jnp.broadcast_to(log_var, x.shape)
                terms = jax.vmap(gaussian)(x[:, None], eta[:, None], each)
            return jnp.sum(terms, where=observed)

        return log_likelihood

    def log_joint(
        self,
        x: Float[Array, " dim"],
        head: WhitenedHead | None = None,
        *,
        observed: Bool[Array, " dim"] | None = None,
    ) -> LogDensity:
        """The function from z (latent,) to log p(x, z), nats.

        Args:
            x: The example, (dim,).
            head: What `whitened_head` gave; with it the function is the same up to rounding and
                does not touch the data dimension.
            observed: See `log_likelihood`.

        Raises:
            ValueError: If `head`, which is that of all pixels, is given with `observed`.
        """
        if head is not None and observed is not None:
            raise ValueError("a whitened head holds all pixels: give head or observed, not both")
        if head is None:
            decode: Callable[[Array], Array] = self.decode
            log_likelihood = self.log_likelihood(x, observed)
        else:
            decode = self.features
            log_likelihood = whitened_affine_gaussian(
                head,
                self.head.bias[...],  # type: ignore[index]
                self.log_var,
                x,
            )
        return lambda z: log_likelihood(decode(z)) + standard_normal(z)

    def whitened_head(self) -> WhitenedHead | None:
        """The output layer, factored for evaluations at many z; None where that saves nothing."""
        if self.likelihood != "gaussian" or self.head.out_features <= self.features.out_size:
            return None
        return whiten_affine_head(self.head.kernel[...], self.log_var)

    def expansions(
        self, x: Float[Array, " dim"], *, observed: Bool[Array, " dim"] | None = None
    ) -> tuple[Expansion, Expansion | None]:
        """The exact expansion of the log joint, and its Gauss-Newton repair where that differs.

        For piecewise-linear activations the Gauss-Newton form is the exact Hessian, so it is
        taken and there is nothing to repair. The data dimension is compressed away where that
        costs less; a projection of some of the pixels would be another for every example.

        Args:
            x: The example, (dim,).
            observed: See `log_likelihood`.
        """
        smooth = self.features.activation not in PIECEWISE_LINEAR and self.features.layers
        if self.likelihood == "gaussian" and observed is None:
            expand = functools.partial(
                affine_head_expansion,
                self.features,
                self.head.kernel[...],
                self.head.bias[...],  # type: ignore[index]
                self.log_var,
                x,
            )
            return (expand(exact=True), expand()) if smooth else (expand(), None)
        gauss_newton = gauss_newton_expansion(self.decode, self.log_likelihood(x, observed))
        if not smooth:
            return gauss_newton, None
        return exact_expansion(self.log_joint(x, observed=observed)), gauss_newton
