"""Priors p(z) of the shipped model: the standard normal, and a mixture of Gaussians that learns."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import gaussian_mixture, gaussian_mixture_precision, standard_normal

_FIRST_SPREAD = 0.6
"""Standard deviation of the first means; with that of the components the variance is 1."""


class Prior(Protocol):
    """Protocol of a prior over z."""

    is_standard: bool
    """Whether it is N(0, I), for which divergences from Gaussians have closed forms."""

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log p(z), nats."""
        ...

    def precision(self, z: Float[Array, " latent"]) -> Float[Array, "latent latent"]:
        """A positive definite curvature, for where minus the Hessian of log p(z) is none."""
        ...

    def draw(self, key: PRNGKeyArray, temperature: float = 1.0) -> Float[Array, " latent"]:
        """Draw z, (latent,), with the spread about the nearest center times `temperature`."""
        ...


class StandardNormal(nnx.Module):
    """N(0, I)."""

    is_standard = True

    def __init__(self, latent: int) -> None:
        self.latent = latent

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log p(z), nats."""
        return standard_normal(z)

    def precision(self, z: Float[Array, " latent"]) -> Float[Array, "latent latent"]:
        """The identity."""
        return jnp.eye(self.latent, dtype=z.dtype)

    def draw(self, key: PRNGKeyArray, temperature: float = 1.0) -> Float[Array, " latent"]:
        """Draw z, (latent,), with the standard deviation `temperature`."""
        return temperature * jax.random.normal(key, (self.latent,))


class MixturePrior(nnx.Module):
    """A mixture of Gaussians with diagonal covariances; weights, means and variances are learned.

    References:
        Dilokthanakul et al. (2016), Deep unsupervised clustering with Gaussian mixture variational
        autoencoders; Tomczak and Welling (2018), VAE with a VampPrior, whose components are free
        here.
    """

    is_standard = False

    def __init__(self, latent: int, components: int, rngs: nnx.Rngs) -> None:
        means = jax.random.normal(rngs.params(), (components, latent))
        self.logits = nnx.Param(jnp.zeros(components))
        self.means = nnx.Param(_FIRST_SPREAD * means)
        self.log_stds = nnx.Param(
            jnp.full((components, latent), 0.5 * jnp.log1p(-(_FIRST_SPREAD**2)))
        )

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log p(z), nats."""
        return gaussian_mixture(z, self.logits[...], self.means[...], self.log_stds[...])

    def precision(self, z: Float[Array, " latent"]) -> Float[Array, "latent latent"]:
        """The mean precision of the components that z may belong to."""
        return gaussian_mixture_precision(z, self.logits[...], self.means[...], self.log_stds[...])

    def draw(self, key: PRNGKeyArray, temperature: float = 1.0) -> Float[Array, " latent"]:
        """Draw z, (latent,); `temperature` multiplies the components' standard deviations."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.logits[...])
        mean, log_std = self.means[component], self.log_stds[component]
        return mean + temperature * jnp.exp(log_std) * jax.random.normal(noise_key, mean.shape)
