"""Gaussian posteriors over the latent of one example, as NamedTuples of arrays."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.curvature import Expansion, Factor, factorize

LOG_2PI = math.log(2 * math.pi)


@runtime_checkable
class Posterior(Protocol):
    """What bounds and systems ask of an approximate posterior q(z | x)."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """One reparametrised sample, (latent,), and its log density in nats."""
        ...

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, nats."""
        ...

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)), nats."""
        ...

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, for inspection."""
        ...


class GaussianPosterior(NamedTuple):
    """N(mean, precision⁻¹) with the full precision held as its Cholesky factor, never inverted."""

    mean: Float[Array, " latent"]
    chol_precision: Float[Array, "latent latent"]
    """Lower L with precision = L Lᵀ."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + L⁻ᵀε; under `vmap` over keys all samples share one triangular solve.

        Returns:
            The sample, (latent,), and its log density in nats.

        Gradients:
            Flow through mean and factor (reparametrisation). The log density is written in ε, so
            it carries the gradient of the entropy and no score.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + _solve(self.chol_precision, noise, transpose=True)
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = self.chol_precision.T @ (z - self.mean)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def entropy(self) -> Float[Array, ""]:
        """Differential entropy, nats."""
        return 0.5 * self.mean.size - self._log_normalizer()

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)) in closed form, nats."""
        scale = self._scale_t()
        trace = jnp.sum(scale**2)
        return -self.entropy() + 0.5 * (trace + self.mean @ self.mean + self.mean.size * LOG_2PI)

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance L⁻ᵀL⁻¹, for inspection."""
        scale = self._scale_t()
        return scale.T @ scale

    def _scale_t(self) -> Float[Array, "latent latent"]:
        identity = jnp.eye(self.mean.size, dtype=self.chol_precision.dtype)
        return _solve(self.chol_precision, identity)

    def _log_normalizer(self) -> Float[Array, ""]:
        log_det_chol = jnp.sum(jnp.log(jnp.diagonal(self.chol_precision)))
        return log_det_chol - 0.5 * self.mean.size * LOG_2PI


class DiagonalPosterior(NamedTuple):
    """N(mean, diag(exp(log_std))²): the amortised posterior of a plain VAE."""

    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + std ε, (latent,), with its log density in nats; reparametrised."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + jnp.exp(self.log_std) * noise
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = (z - self.mean) * jnp.exp(-self.log_std)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def entropy(self) -> Float[Array, ""]:
        """Differential entropy, nats."""
        return 0.5 * self.mean.size - self._log_normalizer()

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)) in closed form, nats."""
        trace = jnp.sum(jnp.exp(2 * self.log_std))
        return -self.entropy() + 0.5 * (trace + self.mean @ self.mean + self.mean.size * LOG_2PI)

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, a diagonal matrix, for inspection."""
        return jnp.diag(jnp.exp(2 * self.log_std))

    def _log_normalizer(self) -> Float[Array, ""]:
        return -jnp.sum(self.log_std) - 0.5 * self.mean.size * LOG_2PI


def laplace_posterior(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> GaussianPosterior:
    """The Laplace approximation N(mode, precision⁻¹), the precision taken from `expand` at `mode`.

    Args:
        expand: Expansion of one example's log joint.
        mode: Where to expand; normally from `newton_refine`. Shape (latent,).
        repair: Expansion whose precision replaces one that is not positive definite
            (`gauss_newton_expansion`, say).

    Returns:
        The posterior. Where the precision is not positive definite and not repaired, the factor
        is NaN, for this example alone.

    Gradients:
        Flow into the mean, and through the precision into `mode` and the parameters. None come
        from a NaN factor.

    References:
        Park, Kim and Kim (2019), equation 12; Tierney and Kadane (1986).
    """
    _, factor = factorize(expand, mode, repair)
    return posterior_from_factor(mode, factor)


def posterior_from_factor(mode: Float[Array, " latent"], factor: Factor) -> GaussianPosterior:
    """N(mode, precision⁻¹), its factor NaN where there is none: a failure stays visible."""
    return GaussianPosterior(mode, jnp.where(factor.is_finite, factor.chol, jnp.nan))


def _solve(
    chol: Float[Array, "latent latent"], rhs: Float[Array, "latent ..."], *, transpose: bool = False
) -> Float[Array, "latent ..."]:
    return solve_triangular(chol, rhs, lower=True, trans=1 if transpose else 0)
