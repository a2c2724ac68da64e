"""The mistakes of the published code, made on purpose as systems beside those of the package.

`python -m experiments repairs` compares SA-VAE and IAF with and without each of them. This module
itself is `vlae_jax` with these systems added: `python -m experiments.repairs train ...`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from vlae_jax.commands.main import main
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.flows import FlowPosterior
from vlae_jax.models.systems import Inference, ascent_optimizer, flow_vae, semi_amortized_vae
from vlae_jax.runs.config import InferenceConfig
from vlae_jax.runs.methods import METHODS

BATCH = 64
CLIP = 5.0


def descending() -> optax.GradientTransformation:
    """Reverse the ascent, which was given the gradient of the loss."""
    return optax.scale(-1.0)


def batch_mean() -> optax.GradientTransformation:
    """Divide the gradient of each image by the batch, as the mean loss of a batch does."""
    return optax.scale(1.0 / BATCH)


def inverted_clip(clip: float = CLIP) -> optax.GradientTransformation:
    """Divide by the square of the norm, so that a longer gradient gives a shorter step."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        square = optax.tree.norm(grads) ** 2
        scale = jnp.where(square > clip, clip / square, 1.0)
        return jax.tree.map(lambda grad: scale * grad, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def sa_vae_descending(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """SA-VAE that descends its bound."""
    return _wrong_ascent(at, key, config, descending())


def sa_vae_batch_mean(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """SA-VAE with its rate divided by the batch."""
    return _wrong_ascent(at, key, config, batch_mean())


def sa_vae_inverted_clip(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """SA-VAE with its clipping inverted."""
    return _wrong_ascent(at, key, config, inverted_clip())


def sa_vae_all_three(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """SA-VAE with all three mistakes."""
    return _wrong_ascent(at, key, config, batch_mean(), inverted_clip(), descending())


def _wrong_ascent(
    at: Observation,
    key: PRNGKeyArray,
    config: InferenceConfig,
    *mistakes: optax.GradientTransformation,
) -> Inference:
    optimizer = optax.chain(*mistakes, ascent_optimizer(config))
    return semi_amortized_vae(at, key, config, optimizer)


def vae_iaf_blind(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """An autoregressive flow whose masks shut the context out: one map for all images."""
    inference = flow_vae(at, key, config)
    assert isinstance(inference.posterior, FlowPosterior)
    blind = jnp.zeros_like(inference.posterior.context)
    return inference._replace(posterior=inference.posterior._replace(context=blind))


WRONG = {
    **{
        name: METHODS["sa_vae"]._replace(system=f"experiments.repairs:{name}")
        for name in (
            "sa_vae_descending",
            "sa_vae_batch_mean",
            "sa_vae_inverted_clip",
            "sa_vae_all_three",
        )
    },
    "vae_iaf_blind": METHODS["vae_iaf"]._replace(system="experiments.repairs:vae_iaf_blind"),
}

if __name__ == "__main__":
    METHODS.update(WRONG)
    main()
