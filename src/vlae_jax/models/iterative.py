"""Iterative amortized inference: a network that reads an estimate and its gradient, and betters it.

Marino, Yue and Mandt (2018), Iterative amortized inference.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.expansions import held_constant
from vlae_jax.models.arithmetic import FULL, Arithmetic, arithmetic
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.systems import Inference, one_sample_bound
from vlae_jax.posterior import DiagonalPosterior
from vlae_jax.runs.config import Config, InferenceConfig

# A step keeps σ(3) = 0.95 of an estimate at first.
_OPEN_GATE = 3.0


class IterativeHead(nnx.Module):
    """The network of one step, λ ← g ∘ λ + (1 - g) ∘ f, for the mean and log std λ of a posterior.

    f and the gate g read λ, the gradient of the ELBO with respect to it, each brought to mean 0 and
    standard deviation 1, and the encoder's features.
    """

    def __init__(
        self,
        latent: int,
        features: int,
        width: int,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        dot = arithmetic.dot_general
        quiet = nnx.initializers.normal(0.1 * width**-0.5)
        open_gate = nnx.initializers.constant(_OPEN_GATE)
        self.hidden = nnx.Linear(4 * latent + features, width, dot_general=dot, rngs=rngs)
        self.update = nnx.Linear(width, 2 * latent, kernel_init=quiet, dot_general=dot, rngs=rngs)
        self.gate = nnx.Linear(
            width, 2 * latent, kernel_init=quiet, bias_init=open_gate, dot_general=dot, rngs=rngs
        )

    def __call__(
        self,
        estimate: Float[Array, " twice_latent"],
        gradient: Float[Array, " twice_latent"],
        features: Float[Array, " features"],
    ) -> Float[Array, " twice_latent"]:
        """The next estimate."""
        seen = [jax.nn.standardize(estimate), jax.nn.standardize(gradient), features]
        hidden = jax.nn.elu(self.hidden(jnp.concatenate(seen)))
        gate = jax.nn.sigmoid(self.gate(hidden))
        return gate * estimate + (1 - gate) * self.update(hidden)


def iterative_vae(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer a diagonal Gaussian: the encoder's, bettered T times by the same network.

    A gradient that goes into the network is that of a one-sample ELBO, and is held constant. The
    decoder learns from the ELBO of the last estimate; encoder and network learn from the sum over
    all estimates. The amortization loss contains the others: the nats by which their ELBOs are
    below that of the last, with the decoder held constant.

    References:
        Marino, Yue and Mandt (2018), Iterative amortized inference.
    """
    bound = held_constant(one_sample_bound(at), at.guess, key)

    def step(estimate: DiagonalPosterior, key: PRNGKeyArray) -> tuple[DiagonalPosterior, Any]:
        own, gradient = jax.value_and_grad(bound)(estimate, key)
        pair = jnp.concatenate(estimate), jax.lax.stop_gradient(jnp.concatenate(gradient))
        better = at.model.posterior_head(*pair, at.features)
        return DiagonalPosterior(*jnp.split(better, 2)), (estimate.mean, own)

    keys = jax.random.split(key, config.steps + 1)
    last, (means, bounds) = jax.lax.scan(step, at.guess, keys[:-1])
    shortfall = jnp.sum(jax.lax.stop_gradient(bound(last, keys[-1])) - bounds)
    return Inference(last, shortfall, jnp.concatenate([means, last.mean[None]]), {})


def iterative_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the head of `iterative_vae`."""
    latent = config.model.latent
    width = max((2 * latent, *config.model.hidden[:1]))
    multiply = arithmetic(config.model.precision)
    return IterativeHead(latent, features, width, arithmetic=multiply, rngs=rngs)
