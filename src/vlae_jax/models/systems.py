"""Inference systems: each a function from a model bound to one example to a posterior.

A new system is one more function, here or elsewhere, and one more entry in `runs.methods`;
training, evaluation and report treat all systems alike. Every system takes the model at an example,
a random key, and the inference section of the configuration.
"""

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.expansions import (
    held_constant,
)
from vlae_jax.models.arithmetic import FULL, Arithmetic, arithmetic
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.flows import (
    FlowPosterior,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    PlanarFlow,
)
from vlae_jax.posterior import (
    DiagonalPosterior,
    GaussianPosterior,
    Posterior,
)
from vlae_jax.refinement import RefinementInfo
from vlae_jax.runs.config import Config, InferenceConfig
from vlae_jax.runs.methods import find_method
from vlae_jax.variational import VariationalInfo


class Inference(NamedTuple):
    """The result of a system for one example."""

    posterior: Posterior
    """The approximate posterior, which can be sampled with its log density."""
    amortization_loss: Float[Array, ""]
    """Nats subtracted from the training objective, to train those parts of the encoder that the
    ELBO has no gradient for."""
    iterates: Float[Array, "steps_and_one latent"]
    """Center of the posterior at each step, from the encoder's guess on."""
    flags: dict[str, Array]
    """Diagnostics by name, averaged over images: `converged`, `is_pd`, ..."""
    for_training: Posterior | None = None
    """The posterior as training samples it, where that costs less than the exact one."""


System = Callable[[Observation, PRNGKeyArray, InferenceConfig], Inference]


def vae(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer the amortized diagonal Gaussian (Kingma and Welling, 2014)."""
    return _amortized(at.guess, at.mean)


def full_covariance_vae(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer an amortized Gaussian with a full covariance, its precision factor by the encoder."""
    factor = at.model.posterior_head(at.features, at.log_std)
    return _amortized(GaussianPosterior(at.mean, factor), at.mean)


def flow_vae(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer an amortized diagonal Gaussian, mapped by a flow with the encoder's features.

    References:
        Rezende and Mohamed (2015), planar; Tomczak and Welling (2016), Householder; Kingma et al.
        (2016), inverse autoregressive.
    """
    flow = at.model.posterior_head
    center, _ = flow(at.mean, at.features)
    return _amortized(FlowPosterior(at.guess, at.features, flow), center)


def _amortized(posterior: Posterior, center: Float[Array, " latent"]) -> Inference:
    """The result of inference by the encoder alone: no steps, and no amortization loss."""
    return Inference(posterior, jnp.zeros(()), center[None], {})


def semi_amortized_vae(
    at: Observation,
    key: PRNGKeyArray,
    config: InferenceConfig,
    optimizer: optax.GradientTransformation | None = None,
) -> Inference:
    """Infer the encoder's diagonal Gaussian, refined by gradient ascent on this example's ELBO.

    The KL divergence is in closed form, and the reconstruction is estimated by one fresh sample per
    step; a step follows the clipped gradient with momentum. With gradient "unroll" the training
    ELBO is differentiated through all steps, second derivatives included. With "stop" the refined
    posterior is held constant, and the encoder learns by KL(q₀ ‖ q_T), or with encoder_loss "elbo"
    by the ELBO of q₀. `optimizer` replaces that of the configuration.

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-amortized variational autoencoders;
        Krishnan, Liang and Hoffman (2018), On the challenges of learning with inference networks on
        sparse, high-dimensional data ("stop" with encoder_loss "elbo").
    """
    initial = at.guess
    optimizer = optimizer or ascent_optimizer(config)
    bound = one_sample_bound(at)

    def step(carry: Any, step_key: PRNGKeyArray) -> tuple[Any, Array]:
        posterior, state = carry
        grads = jax.grad(lambda *arguments: -bound(*arguments))(posterior, step_key)
        updates, state = optimizer.update(grads, state, posterior)
        return (optax.apply_updates(posterior, updates), state), posterior.mean

    stop = config.gradient == "stop"
    start = jax.lax.stop_gradient(initial) if stop else initial
    step_keys = jax.random.split(key, config.steps)
    (refined, _), means = jax.lax.scan(step, (start, optimizer.init(start)), step_keys)
    iterates = jnp.concatenate([means, refined.mean[None]])
    if not stop:
        return Inference(refined, jnp.zeros(()), iterates, {})
    refined = jax.lax.stop_gradient(refined)
    if config.encoder_loss == "elbo":
        loss = shortfall(at, key, refined)
    else:
        loss = _diagonal_kl(initial, refined)
    return Inference(refined, loss, iterates, {})


def one_sample_bound(
    at: Observation,
) -> Callable[[Posterior, PRNGKeyArray], Float[Array, ""]]:
    """Return the ELBO, nats, from one sample; KL(q ‖ N(0, I)) of a Gaussian is in closed form."""

    def bound(posterior: Posterior, key: PRNGKeyArray) -> Float[Array, ""]:
        z, _ = posterior.sample_and_log_prob(key)
        divergence = at.kl_to_prior(key, posterior, num_samples=1)
        return at.log_likelihood(at.model.decode(z)) - divergence

    return bound


def shortfall(at: Observation, key: PRNGKeyArray, found: Posterior) -> Float[Array, ""]:
    """Nats by which the ELBO of the encoder's guess is below that of the posterior found.

    The encoder alone gets a gradient: that of the ELBO of its guess.
    """
    bound = one_sample_bound(at)
    best = jax.lax.stop_gradient(bound(found, key))
    return best - held_constant(bound, at.guess, key)(at.guess, key)


def _diagonal_kl(q: DiagonalPosterior, p: DiagonalPosterior) -> Float[Array, ""]:
    """KL(q ‖ p) of two diagonal Gaussians, nats."""
    ratio = jnp.exp(2 * (q.log_std - p.log_std))
    distance = (q.mean - p.mean) ** 2 * jnp.exp(-2 * p.log_std)
    return 0.5 * jnp.sum(ratio + distance - 1 - jnp.log(ratio))


def ascent_optimizer(config: InferenceConfig) -> optax.GradientTransformation:
    """The optimizer of gradient searches: momentum, with each example's gradient norm clipped."""
    clip = [optax.clip_by_global_norm(config.ascent_clip)] if config.ascent_clip else []
    return optax.chain(*clip, optax.sgd(config.ascent_rate, momentum=config.ascent_momentum))


def flags_of(info: RefinementInfo | VariationalInfo) -> dict[str, Array]:
    """The diagnostics of a search, or of a refinement, whose decrement is the smoothed one."""
    if isinstance(info, RefinementInfo):
        decrement = info.newton_decrement
    else:
        decrement = info.smoothed_decrement
    return {"converged": info.converged, "is_pd": info.is_pd, "newton_decrement": decrement}


class FullCovarianceHead(nnx.Module):
    """A layer from the encoder's features to the Cholesky factor of a Gaussian's precision."""

    def __init__(
        self, latent: int, features: int, *, arithmetic: Arithmetic = FULL, rngs: nnx.Rngs
    ) -> None:
        # The factor starts close to diagonal, like the plain VAE. With one latent dimension there
        # are no outputs, and initializers that divide by their number would fail.
        quiet = nnx.initializers.normal(0.1 * features**-0.5)
        self.lower = nnx.Linear(
            features,
            latent * (latent - 1) // 2,
            kernel_init=quiet,
            dot_general=arithmetic.dot_general,
            rngs=rngs,
        )

    def __call__(
        self, features: Float[Array, " features"], log_std: Float[Array, " latent"]
    ) -> Float[Array, "latent latent"]:
        """Return the factor L of the precision L Lᵀ: unit lower triangular, times diag(1 / std)."""
        latent = log_std.size
        unit = jnp.eye(latent, dtype=log_std.dtype)
        unit = unit.at[jnp.tril_indices(latent, -1)].set(self.lower(features))
        return unit * jnp.exp(-log_std)


def full_covariance_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the head of `full_covariance_vae`."""
    return FullCovarianceHead(
        config.model.latent, features, arithmetic=arithmetic(config.model.precision), rngs=rngs
    )


def householder_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the head of `flow_vae` with Householder reflections."""
    return _flow(HouseholderFlow, config, features, rngs)


def planar_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the head of `flow_vae` with planar flows."""
    return _flow(PlanarFlow, config, features, rngs)


def inverse_autoregressive_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the head of `flow_vae` with inverse autoregressive flows."""
    # A network narrower than `latent` would not depend on all dimensions.
    width = config.inference.flow_width or max((config.model.latent, *config.model.hidden[:1]))
    return _flow(InverseAutoregressiveFlow, config, features, rngs, width=width)


def _flow(
    kind: Callable[..., nnx.Module], config: Config, features: int, rngs: nnx.Rngs, **more: int
) -> nnx.Module:
    multiply = arithmetic(config.model.precision)
    latent, steps = config.model.latent, config.inference.steps
    return kind(latent, features, steps, arithmetic=multiply, rngs=rngs, **more)


def find_system(method: str) -> System:
    """Return the function of the system with that name.

    Raises:
        UserError: If there is no such system.
    """
    return pkgutil.resolve_name(find_method(method).system)


def find_linear_fit(method: str) -> Callable[..., Any] | None:
    """Return the function that fits a system's linear decoder to all images, or None.

    Raises:
        UserError: If there is no such system.
    """
    fit = find_method(method).fit
    return None if fit is None else pkgutil.resolve_name(fit)


def find_head(method: str) -> Callable[[Config, int, nnx.Rngs], nnx.Module] | None:
    """Return the function that makes a system's own part of the network, or None.

    Raises:
        UserError: If there is no such system.
    """
    head = find_method(method).head
    return None if head is None else pkgutil.resolve_name(head)
