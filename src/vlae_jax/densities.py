"""Scalar log densities of one example, in nats and summed over dimensions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]
"""A point → its log density in nats, a scalar. Closes over everything else."""


def standard_normal(z: Float[Array, " latent"]) -> Float[Array, ""]:
    """Log density of N(0, I) at `z`, in nats: the prior of every shipped model."""
    return -0.5 * (z @ z + z.size * math.log(2 * math.pi))


def gaussian(
    x: Float[Array, " dim"], mean: Float[Array, " dim"], log_var: Float[Array, "..."]
) -> Float[Array, ""]:
    """Log density of N(mean, diag(exp(log_var))) at `x`, in nats.

    Args:
        x: Where to evaluate, shape (dim,).
        mean: Shape (dim,).
        log_var: Log variance; a scalar when all dimensions share it, or shape (dim,).
    """
    log_var = jnp.broadcast_to(log_var, mean.shape)
    scaled = (x - mean) ** 2 * jnp.exp(-log_var)
    return -0.5 * jnp.sum(scaled + log_var + math.log(2 * math.pi))


def bernoulli(x: Float[Array, " dim"], logits: Float[Array, " dim"]) -> Float[Array, ""]:
    """Log probability of the binary vector `x` under independent Bernoullis, in nats.

    Args:
        x: Zeros and ones, shape (dim,).
        logits: Log odds of a one, shape (dim,). Saturated logits keep their gradient.
    """
    return jnp.sum(x * logits - jax.nn.softplus(logits))
