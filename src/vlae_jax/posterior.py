"""Posteriors over the latent of one example: the protocols they follow, and the Gaussian ones."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity, standard_normal
from vlae_jax.expansions import Expansion
from vlae_jax.factor import Factor, factorize

LOG_2PI = math.log(2 * math.pi)


@runtime_checkable
class Posterior(Protocol):
    """Protocol of every approximate posterior q(z | x): the method that the bounds require."""

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw one reparameterized sample, (latent,), with its log density in nats."""
        ...


@runtime_checkable
class EvaluablePosterior(Posterior, Protocol):
    """Protocol of a posterior that can also evaluate its density at any point."""

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        ...


@runtime_checkable
class SymmetricPosterior(EvaluablePosterior, Protocol):
    """Protocol of a posterior whose density is symmetric about a center, for antithetic pairs."""

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 center - z of `z`, (latent,), which has the density of `z`."""
        ...


@runtime_checkable
class ClosedFormPosterior(EvaluablePosterior, Protocol):
    """Protocol of a posterior with moments and KL divergence in closed form: the Gaussians."""

    mean: Float[Array, " latent"]

    def kl_to_standard_normal(self) -> Float[Array, ""]:
        """KL(q ‖ N(0, I)), nats."""
        ...

    def covariance(self) -> Float[Array, "latent latent"]:
        """The covariance, (latent, latent)."""
        ...


def require_symmetric(posterior: Posterior, purpose: str) -> SymmetricPosterior:
    """Check that a posterior is symmetric and return it.

    Raises:
        ValueError: While tracing, if the posterior has no `reflect`.
    """
    if not isinstance(posterior, SymmetricPosterior):
        raise ValueError(
            f"{purpose} needs a posterior that is symmetric about a center, with `log_prob` and "
            f"`reflect`, as Gaussians and Student-t have; {type(posterior).__name__} is not"
        )
    return posterior


def kl_to_prior(
    key: PRNGKeyArray,
    posterior: Posterior,
    log_prior: LogDensity | None = None,
    *,
    num_samples: int,
) -> Float[Array, ""]:
    """KL(q ‖ p(z)), nats: in closed form where there is one, otherwise a mean over samples.

    Args:
        key: Random key; unused where there is a closed form.
        posterior: q.
        log_prior: z → log p(z), nats; by default that of N(0, I).
        num_samples: Samples averaged.
    """
    if log_prior is None and isinstance(posterior, ClosedFormPosterior):
        return posterior.kl_to_standard_normal()
    zs, log_q = jax.vmap(posterior.sample_and_log_prob)(jax.random.split(key, num_samples))
    return jnp.mean(log_q - jax.vmap(log_prior or standard_normal)(zs))


def mean_and_covariance(
    key: PRNGKeyArray, posterior: Posterior, *, num_samples: int
) -> tuple[Float[Array, " latent"], Float[Array, "latent latent"]]:
    """Mean (latent,) and covariance (latent, latent) of q: exact where known, else over samples.

    Args:
        key: Random key; unused where the moments are known.
        posterior: q.
        num_samples: Samples averaged; at least 2.
    """
    if isinstance(posterior, ClosedFormPosterior):
        return posterior.mean, posterior.covariance()
    zs, _ = jax.vmap(posterior.sample_and_log_prob)(jax.random.split(key, num_samples))
    return jnp.mean(zs, axis=0), jnp.cov(zs, rowvar=False).reshape(zs.shape[1], zs.shape[1])


class GaussianPosterior(NamedTuple):
    """The Gaussian N(mean, precision⁻¹), its full precision stored as a Cholesky factor."""

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
            Flow through mean and factor (reparameterization). The log density is computed from ε,
            so it has the gradient of the entropy and no score term.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + solve_factor(self.chol_precision, noise, transpose=True)
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = self.chol_precision.T @ (z - self.mean)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 mean - z of `z`, (latent,)."""
        return 2 * self.mean - z

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
        return solve_factor(self.chol_precision, identity)

    def _log_normalizer(self) -> Float[Array, ""]:
        log_det_chol = jnp.sum(jnp.log(jnp.diagonal(self.chol_precision)))
        return log_det_chol - 0.5 * self.mean.size * LOG_2PI


class DiagonalPosterior(NamedTuple):
    """N(mean, diag(exp(log_std))²): the amortized posterior of a plain VAE."""

    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw z = mean + std ε, (latent,), with its log density in nats; reparameterized."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        z = self.mean + jnp.exp(self.log_std) * noise
        return z, self._log_normalizer() - 0.5 * noise @ noise

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density at `z`, (latent,), in nats."""
        whitened = (z - self.mean) * jnp.exp(-self.log_std)
        return self._log_normalizer() - 0.5 * whitened @ whitened

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image 2 mean - z of `z`, (latent,)."""
        return 2 * self.mean - z

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


def as_gaussian(posterior: GaussianPosterior | DiagonalPosterior) -> GaussianPosterior:
    """Convert a Gaussian to the form with the Cholesky factor of its precision."""
    if isinstance(posterior, DiagonalPosterior):
        return GaussianPosterior(posterior.mean, jnp.diag(jnp.exp(-posterior.log_std)))
    return posterior


def laplace_posterior(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> GaussianPosterior:
    """The Laplace approximation N(mode, precision⁻¹), the precision taken from `expand` at `mode`.

    Args:
        expand: Expansion of one example's log joint.
        mode: The point of expansion, shape (latent,); normally from `newton_refine`.
        repair: Expansion whose precision replaces one that is not positive definite; for example
            `gauss_newton_expansion`.

    Returns:
        The posterior. Where the precision is not positive definite and not repaired, the factor
        is NaN, for this example alone.

    Gradients:
        Flow into the mean, and through the precision into `mode` and the parameters. A NaN factor
        contributes none.

    References:
        Park, Kim and Kim (2019), equation 12; Tierney and Kadane (1986).
    """
    _, factor = factorize(expand, mode, repair)
    return posterior_from_factor(mode, factor)


def posterior_from_factor(mode: Float[Array, " latent"], factor: Factor) -> GaussianPosterior:
    """N(mode, precision⁻¹); the factor is NaN where the factorization failed, to show it."""
    return GaussianPosterior(mode, jnp.where(factor.is_finite, factor.chol, jnp.nan))


def solve_factor(
    chol: Float[Array, "latent latent"], rhs: Float[Array, "latent ..."], *, transpose: bool = False
) -> Float[Array, "latent ..."]:
    """Solve L v = rhs for the lower factor L of a precision, or Lᵀ v = rhs with `transpose`."""
    return solve_triangular(chol, rhs, lower=True, trans=1 if transpose else 0)
