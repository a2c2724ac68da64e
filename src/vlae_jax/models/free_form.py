"""A full-covariance Gaussian at the cost of a diagonal one, by products with Jacobians.

If the encoder's mean f(x) is the mean of the posterior of the linearized decoder, its Jacobian is
F = P⁻¹ Gᵀ C. G is the decoder's Jacobian, P = I + Gᵀ W G the posterior's precision, W minus the
Hessian of the log likelihood with respect to the decoder's output η, and C its mixed derivative
with respect to η and x (for a Gaussian W = C = 1 / σ²). The encoder then holds all that a sample
and the gradient of log|P| need, and nothing has to be factored:

- Matheron's rule corrects a sample of the prior by what it predicts wrong:
  z = f(x) + ε₂ + F C⁻¹ (W^½ ε₁ - W G ε₂), whose covariance is P⁻¹. Of all F this one makes
  tr(P Cov z) least, so that the reconstruction alone teaches it to the encoder.
- ½ d log|P| = tr(F C⁻¹ W^½ d(W^½ G)), estimated by one vector.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.expansions import Quadratic
from vlae_jax.factor import factorize
from vlae_jax.matrix_free import gradient_alone
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.systems import Inference
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior
from vlae_jax.runs.config import InferenceConfig


class FreeFormPosterior(NamedTuple):
    """Samples of the posterior for training: one product with either network's Jacobian.

    The log density has the value of the encoder's diagonal Gaussian, which learns the variances of
    the samples: on average it is too low by what the correlations are worth. Its gradient is that
    of the log determinant of the full covariance, as far as the encoder is optimal.
    """

    at: Observation

    def sample_and_log_prob(
        self, key: PRNGKeyArray
    ) -> tuple[Float[Array, " latent"], Float[Array, ""]]:
        """Draw a sample, (latent,), with its log density in nats."""
        at, (x_key, z_key) = self.at, jax.random.split(key)
        prior = jax.random.normal(z_key, at.mean.shape, at.mean.dtype)
        noise = jax.random.normal(x_key, at.x.shape, at.x.dtype)
        eta, moved = jax.jvp(at.model.decode, (at.mean,), (prior,))
        weight, mixed = _curvatures(at, eta)
        root = _safe_sqrt(weight)
        wrong = _divided(root * noise - weight * moved, mixed)
        shift = prior + jax.jvp(_encode(at), (at.seen,), (wrong,))[1]
        row = jax.lax.stop_gradient(jax.vjp(_encode(at), at.seen)[1](prior)[0])
        held = jax.lax.stop_gradient(_divided(root, mixed))
        minus_half_log_det = -jnp.sum(row * held * root * moved)
        spread = DiagonalPosterior(jnp.zeros_like(shift), at.log_std)
        fit = spread.log_prob(jax.lax.stop_gradient(shift))
        value = jax.lax.stop_gradient(-spread.entropy())
        return at.mean + shift, value - gradient_alone(minus_half_log_det) - gradient_alone(fit)


def free_form_vae(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer the full-covariance Gaussian that the Jacobians of encoder and decoder define.

    Training samples it without forming a matrix. Everything else uses its exact covariance.

    References:
        Sorrenson et al. (2024), Lifting architectural constraints of injective flows, and
        Sorrenson et al. (2025), Beyond diagonal covariance: flexible posterior VAEs via free-form
        injective flows, for the volume term by one product with either Jacobian; Matheron's rule:
        Journel and Huijbregts (1978), Mining geostatistics. The sample is the package's own.
    """
    decode = at.model.decode
    forward = jax.jacrev(_encode(at))(at.seen)
    weight, mixed = _curvatures(at, decode(at.mean))
    forward = _divided(forward, mixed) * _safe_sqrt(weight)
    backward = _safe_sqrt(weight)[:, None] * jax.jacfwd(decode)(at.mean)
    left = jnp.eye(at.mean.size, dtype=at.mean.dtype) - forward @ backward
    covariance = left @ left.T + forward @ forward.T
    # In reversed order, so that the inverse of the factor is a lower factor of the precision.
    _, factor = factorize(
        lambda z: Quadratic(jnp.zeros(()), z, covariance[::-1, ::-1]), jnp.zeros_like(at.mean)
    )
    upper = factor.chol[::-1, ::-1]
    chol = solve_triangular(upper, jnp.eye(at.mean.size, dtype=upper.dtype)).T
    posterior = GaussianPosterior(at.mean, chol)
    flags = {"is_pd": factor.is_pd}
    return Inference(posterior, jnp.zeros(()), at.mean[None], flags, FreeFormPosterior(at))


def _encode(at: Observation) -> Callable[[Float[Array, " dim"]], Float[Array, " latent"]]:
    return lambda seen: at.model.mean(at.model.encode(seen, at.observed))


def _curvatures(
    at: Observation, eta: Float[Array, " dim"]
) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
    """Minus the second derivatives of the log likelihood in η, and the mixed ones in η and x."""

    def slope(eta: Array, x: Array) -> Array:
        return jax.grad(at._replace(x=x).log_likelihood)(eta)

    ones = jnp.ones_like(eta)
    return (
        -jax.jvp(lambda eta: slope(eta, at.x), (eta,), (ones,))[1],
        jax.jvp(lambda x: slope(eta, x), (at.x,), (ones,))[1],
    )


def _divided(values: Float[Array, "... dim"], mixed: Float[Array, " dim"]) -> Array:
    """Divide by the mixed derivatives: 0 where these are, as for what is not observed."""
    return jnp.where(mixed == 0, 0.0, values / jnp.where(mixed == 0, 1.0, mixed))


def _safe_sqrt(weight: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """The root with a finite derivative everywhere."""
    return jnp.where(weight > 0, jnp.sqrt(jnp.where(weight > 0, weight, 1.0)), 0.0)
