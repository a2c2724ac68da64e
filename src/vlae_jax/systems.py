"""Inference systems: each one function from a model and one example to a posterior.

A new system is one more function here and one more entry in `SYSTEMS`; training, evaluation and
report treat all alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlae_jax.config import InferenceConfig, nearest
from vlae_jax.errors import UserError
from vlae_jax.inference import infer_posterior
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.posterior import DiagonalPosterior, Posterior


class Inference(NamedTuple):
    """What a system finds out about one example."""

    posterior: Posterior
    """Can be sampled, with a log density."""
    amortization_loss: Float[Array, ""]
    """Nats subtracted from the ELBO in training, to teach the encoder what the ELBO does not."""
    path: Float[Array, "steps_and_one latent"]
    """Means from the encoder's to the posterior's."""
    flags: dict[str, Array]
    """Diagnostics by name, averaged over images: `converged`, `is_pd`, ..."""


System = Callable[[VariationalAutoencoder, Float[Array, " dim"]], Inference]


def vae(model: VariationalAutoencoder, x: Float[Array, " dim"]) -> Inference:
    """The amortised diagonal Gaussian (Kingma and Welling, 2014)."""
    mean, log_std = model.encode(x)
    return Inference(DiagonalPosterior(mean, log_std), jnp.zeros(()), mean[None], {})


def vlae(
    model: VariationalAutoencoder, x: Float[Array, " dim"], config: InferenceConfig
) -> Inference:
    """The Laplace posterior at a mode searched from the encoder's mean (Park et al., 2019).

    Unless the search is unrolled the ELBO cannot see the encoder, which then learns to start near
    the mode μ by the excess energy of its guess, ½ (z₀ - μ)ᵀ P (z₀ - μ) nats.
    """
    z_init, _ = model.encode(x)
    expand, repair = model.expansions(x)
    if config.curvature == "gauss_newton" and repair is not None:
        expand, repair = repair, None
    # With no steps there is nothing to unroll, and the ELBO reaches the encoder directly.
    gradient = "unroll" if config.steps == 0 else config.gradient
    posterior, info = infer_posterior(
        expand,
        z_init,
        num_steps=config.steps,
        damping=config.damping,
        gradient=gradient,
        repair=repair,
        solver=config.solver,
    )
    if gradient == "unroll":
        amortization_loss = jnp.zeros(())
    else:
        mode, chol = jax.lax.stop_gradient(posterior)
        amortization_loss = 0.5 * jnp.sum((chol.T @ (z_init - mode)) ** 2)
    flags = {
        "converged": info.converged,
        "is_pd": info.is_pd,
        "newton_decrement": info.newton_decrement,
    }
    return Inference(posterior, amortization_loss, info.path, flags)


SYSTEMS: dict[str, Callable[[InferenceConfig], System]] = {
    "vae": lambda config: vae,
    "vlae": lambda config: lambda model, x: vlae(model, x, config),
}


def build_system(config: InferenceConfig) -> System:
    """The system `config.method` names.

    Raises:
        UserError: If there is none of that name.
    """
    if config.method not in SYSTEMS:
        raise UserError(f"unknown method {config.method!r}{nearest(config.method, SYSTEMS)}")
    return SYSTEMS[config.method](config)
