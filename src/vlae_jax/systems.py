"""Inference systems: each one function from a model and one example to a posterior.

A new system is one more function here and one more entry in `SYSTEMS`; training, evaluation and
report treat all alike.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.config import Config, InferenceConfig, nearest
from vlae_jax.errors import UserError
from vlae_jax.flows import (
    FlowPosterior,
    HouseholderFlow,
    InverseAutoregressiveFlow,
    PlanarFlow,
)
from vlae_jax.inference import infer_posterior
from vlae_jax.models import VariationalAutoencoder
from vlae_jax.networks import FULL, Arithmetic, arithmetic
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior
from vlae_jax.refinement import gradient_refine


class Inference(NamedTuple):
    """What a system finds out about one example."""

    posterior: Posterior
    """Can be sampled, with a log density."""
    amortization_loss: Float[Array, ""]
    """Nats subtracted from the ELBO in training, to teach the encoder what the ELBO does not."""
    iterates: Float[Array, "steps_and_one latent"]
    """Where the posterior was centred, from the encoder's guess on."""
    flags: dict[str, Array]
    """Diagnostics by name, averaged over images: `converged`, `is_pd`, ..."""


System = Callable[[VariationalAutoencoder, Float[Array, " dim"], PRNGKeyArray], Inference]


def vae(model: VariationalAutoencoder, x: Float[Array, " dim"], key: PRNGKeyArray) -> Inference:
    """The amortised diagonal Gaussian (Kingma and Welling, 2014)."""
    posterior = DiagonalPosterior(*model.encode(x))
    return _amortized(posterior, posterior.mean)


def full_covariance_vae(
    model: VariationalAutoencoder, x: Float[Array, " dim"], key: PRNGKeyArray
) -> Inference:
    """The amortised Gaussian with a full covariance, its precision factor from the encoder."""
    features = model.encoder(x)
    mean, log_std = model.mean(features), model.log_std(features)
    assert model.posterior_head is not None
    return _amortized(GaussianPosterior(mean, model.posterior_head(features, log_std)), mean)


def flow_vae(
    model: VariationalAutoencoder, x: Float[Array, " dim"], key: PRNGKeyArray
) -> Inference:
    """An amortised diagonal Gaussian bent by a flow that sees the encoder's features.

    References:
        Rezende and Mohamed (2015), planar; Tomczak and Welling (2016), Householder; Kingma et al.
        (2016), inverse autoregressive.
    """
    features = model.encoder(x)
    base = DiagonalPosterior(model.mean(features), model.log_std(features))
    flow = model.posterior_head
    assert flow is not None
    centre, _ = flow(base.mean, features)
    return _amortized(FlowPosterior(base, features, flow), centre)


def _amortized(posterior: Posterior, centre: Float[Array, " latent"]) -> Inference:
    """What the encoder says is all there is: no steps, no loss beside the bound."""
    return Inference(posterior, jnp.zeros(()), centre[None], {})


def semi_amortized_vae(
    model: VariationalAutoencoder,
    x: Float[Array, " dim"],
    key: PRNGKeyArray,
    config: InferenceConfig,
    optimizer: optax.GradientTransformation | None = None,
) -> Inference:
    """The encoder's diagonal Gaussian, refined by gradient ascent of this example's ELBO.

    The KL divergence is in closed form, the reconstruction by one fresh sample a step; a step
    follows the clipped gradient with momentum. With gradient "unroll" the training ELBO is
    differentiated through all steps, second derivatives included. With "stop" it sees the refined
    posterior as a constant, and the encoder learns by KL(q₀ ‖ q_T). `optimizer` replaces that of
    the configuration.

    References:
        Kim, Wiseman, Miller, Sontag and Rush (2018), Semi-amortized variational autoencoders.
    """
    initial = DiagonalPosterior(*model.encode(x))
    log_likelihood = model.log_likelihood(x)
    optimizer = optimizer or ascent_optimizer(config)

    def negative_elbo(posterior: DiagonalPosterior, key: PRNGKeyArray) -> Float[Array, ""]:
        z, _ = posterior.sample_and_log_prob(key)
        return posterior.kl_to_standard_normal() - log_likelihood(model.decode(z))

    def step(carry, step_key):
        posterior, state = carry
        grads = jax.grad(negative_elbo)(posterior, step_key)
        updates, state = optimizer.update(grads, state, posterior)
        return (optax.apply_updates(posterior, updates), state), posterior.mean

    stop = config.gradient == "stop"
    start = jax.lax.stop_gradient(initial) if stop else initial
    # No sample of a bound has so large a number: what they draw from the same key is independent.
    step_keys = jax.random.split(jax.random.fold_in(key, 2**32 - 1), config.steps)
    (refined, _), means = jax.lax.scan(step, (start, optimizer.init(start)), step_keys)
    iterates = jnp.concatenate([means, refined.mean[None]])
    if not stop:
        return Inference(refined, jnp.zeros(()), iterates, {})
    refined = jax.lax.stop_gradient(refined)
    return Inference(refined, _diagonal_kl(initial, refined), iterates, {})


def _diagonal_kl(q: DiagonalPosterior, p: DiagonalPosterior) -> Float[Array, ""]:
    """KL(q ‖ p), nats."""
    ratio = jnp.exp(2 * (q.log_std - p.log_std))
    distance = (q.mean - p.mean) ** 2 * jnp.exp(-2 * p.log_std)
    return 0.5 * jnp.sum(ratio + distance - 1 - jnp.log(ratio))


def ascent_optimizer(config: InferenceConfig) -> optax.GradientTransformation:
    """Gradient steps with momentum, clipped by the norm of one example's gradient."""
    clip = [optax.clip_by_global_norm(config.ascent_clip)] if config.ascent_clip else []
    return optax.chain(*clip, optax.sgd(config.ascent_rate, momentum=config.ascent_momentum))


def vlae(
    model: VariationalAutoencoder,
    x: Float[Array, " dim"],
    key: PRNGKeyArray,
    config: InferenceConfig,
) -> Inference:
    """The Laplace posterior at a mode searched from the encoder's mean (Park et al., 2019).

    Unless the search is unrolled the ELBO cannot see the encoder, which then learns to start near
    the mode μ by the excess energy of its guess, ½ (z₀ - μ)ᵀ P (z₀ - μ) nats.
    """
    z_init, _ = model.encode(x)
    expand, repair = model.expansions(x)
    if config.curvature == "gauss_newton" and repair is not None:
        expand, repair = repair, None
    gradient = "implicit" if config.gradient == "auto" else config.gradient
    # With no steps there is nothing to unroll, and the ELBO reaches the encoder directly.
    gradient = "unroll" if config.steps == 0 else gradient
    start, steps, iterates = z_init, config.steps, None
    if config.search == "gradient":
        optimizer = ascent_optimizer(config)
        start, found = gradient_refine(
            model.log_joint(x), z_init, optimizer=optimizer, num_steps=config.steps
        )
        steps, iterates = 0, found.iterates
    posterior, info = infer_posterior(
        expand,
        start,
        num_steps=steps,
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
    return Inference(
        posterior, amortization_loss, info.iterates if iterates is None else iterates, flags
    )


def probabilistic_pca(
    model: VariationalAutoencoder, x: Float[Array, " dim"], key: PRNGKeyArray
) -> Inference:
    """The exact posterior of a linear decoder: one Newton step from anywhere ends at the mode.

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis.
    """
    return vlae(model, x, key, InferenceConfig(steps=1, solver="cholesky"))


class FullCovarianceHead(nnx.Module):
    """The Cholesky factor of an amortised Gaussian's precision, from the encoder's features."""

    def __init__(
        self, latent: int, features: int, *, arithmetic: Arithmetic = FULL, rngs: nnx.Rngs
    ) -> None:
        # Starts close to a diagonal, as the plain VAE does. One dimension has nothing below it,
        # which initializers that divide by the number of outputs do not stand.
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
        """The factor L, with precision L Lᵀ: unit lower triangular, times diag(1 / std)."""
        latent = log_std.size
        unit = jnp.eye(latent, dtype=log_std.dtype)
        unit = unit.at[jnp.tril_indices(latent, -1)].set(self.lower(features))
        return unit * jnp.exp(-log_std)


HeadMaker = Callable[[Config, int, nnx.Rngs], nnx.Module]
"""Configuration and the number of the encoder's features → what the posterior needs besides."""


def _full_covariance_head(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    return FullCovarianceHead(
        config.model.latent, features, arithmetic=arithmetic(config.model.precision), rngs=rngs
    )


def _flow(
    kind: Callable[..., nnx.Module], config: Config, features: int, rngs: nnx.Rngs, **more: int
) -> nnx.Module:
    multiply = arithmetic(config.model.precision)
    latent, steps = config.model.latent, config.inference.steps
    return kind(latent, features, steps, arithmetic=multiply, rngs=rngs, **more)


def _householder(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    return _flow(HouseholderFlow, config, features, rngs)


def _planar(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    return _flow(PlanarFlow, config, features, rngs)


def _inverse_autoregressive(config: Config, features: int, rngs: nnx.Rngs) -> nnx.Module:
    # A narrower network would not see all dimensions.
    width = config.inference.flow_width or max((config.model.latent, *config.model.hidden[:1]))
    return _flow(InverseAutoregressiveFlow, config, features, rngs, width=width)


class SystemSpec(NamedTuple):
    """How a configuration becomes a system."""

    build: Callable[[InferenceConfig], System]
    head: HeadMaker | None = None
    """Makes the part of the network that only this system has."""


def _with_config(function: Callable[..., Inference]) -> Callable[[InferenceConfig], System]:
    return lambda config: functools.partial(function, config=config)


SYSTEMS: dict[str, SystemSpec] = {
    "vae": SystemSpec(lambda config: vae),
    "vae_full": SystemSpec(lambda config: full_covariance_vae, _full_covariance_head),
    "vae_hf": SystemSpec(lambda config: flow_vae, _householder),
    "vae_iaf": SystemSpec(lambda config: flow_vae, _inverse_autoregressive),
    "vae_planar": SystemSpec(lambda config: flow_vae, _planar),
    "sa_vae": SystemSpec(_with_config(semi_amortized_vae)),
    "vlae": SystemSpec(_with_config(vlae)),
    "ppca": SystemSpec(lambda config: probabilistic_pca),
}


def find_system(method: str) -> SystemSpec:
    """The system of that name.

    Raises:
        UserError: If there is none.
    """
    if method not in SYSTEMS:
        raise UserError(f"unknown method {method!r}{nearest(method, SYSTEMS)}")
    return SYSTEMS[method]
