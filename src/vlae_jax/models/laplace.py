"""Systems with a Laplace posterior: at a searched mode, matrix-free, of linear models, refined."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.expansions import Expansion, MatrixFreeExpansion, without_gradients
from vlae_jax.inference import Gradient, infer_posterior
from vlae_jax.matrix_free import gradient_alone, laplace_sample
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.systems import Inference, ascent_optimizer, flags_of, shortfall
from vlae_jax.posterior import LOG_2PI, DiagonalPosterior, GaussianPosterior
from vlae_jax.refinement import RefinementInfo, gradient_refine, newton_refine, scaled_refine
from vlae_jax.runs.config import InferenceConfig
from vlae_jax.variational import variational_refine


def vlae(
    at: Observation,
    key: PRNGKeyArray,
    config: InferenceConfig,
) -> Inference:
    """Infer the Laplace posterior at a mode, searched from the encoder's mean (Park et al., 2019).

    Training may start the search elsewhere, where the last search for the image ended.

    Unless the search is unrolled, the ELBO has no gradient to the encoder. The encoder then learns
    to start near the mode μ from the amortization loss ½ (z₀ - μ)ᵀ P (z₀ - μ) nats, the excess
    energy of its guess z₀ in the quadratic model; where its standard deviations are used as well,
    from the KL divergence of its guess to the posterior; or, with encoder_loss "elbo", as the
    encoder of a VAE. With posterior "matrix_free" the posterior is one sample of it.
    """
    expand, repair = at.expansions()
    if repair is not None and (
        config.curvature == "gauss_newton" or config.posterior == "matrix_free"
    ):
        expand, repair = repair, None
    # The implicit derivative is that of a mode. Scaled steps end too far below it: with them
    # training came to reward the distance and diverged.
    auto: Gradient = "stop" if config.search == "scaled" else "implicit"
    gradient: Gradient = auto if config.gradient == "auto" else config.gradient
    # Without steps unrolling is free, and gives the encoder the gradient of the ELBO directly.
    gradient = "unroll" if config.steps == 0 else gradient
    start, steps, iterates = at.start, config.steps, None
    if config.search != "newton":
        start, found = _first_order_search(at, expand, config)
        steps, iterates = 0, found.iterates
    if config.posterior == "matrix_free":
        return _matrix_free(at, key, config, gradient, (expand, start, steps, iterates))
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
    elif config.encoder_loss == "elbo":
        amortization_loss = shortfall(at, key, posterior)
    else:
        amortization_loss = _distance(at, posterior, spread=config.search == "scaled")
    iterates = info.iterates if iterates is None else iterates
    return Inference(posterior, amortization_loss, iterates, flags_of(info))


def _first_order_search(
    at: Observation, expand: Expansion, config: InferenceConfig
) -> tuple[Float[Array, " latent"], RefinementInfo]:
    """Search the mode by gradients alone."""
    if config.search == "scaled":
        scale = jnp.exp(2 * at.log_std)
        return scaled_refine(expand, at.start, scale=scale, num_steps=config.steps)
    optimizer = ascent_optimizer(config)
    return gradient_refine(at.log_joint, at.start, optimizer=optimizer, num_steps=config.steps)


def _matrix_free(
    at: Observation,
    key: PRNGKeyArray,
    config: InferenceConfig,
    gradient: Gradient,
    searched: tuple[Expansion, Float[Array, " latent"], int, Any],
) -> Inference:
    """Go on to a sample of the Laplace posterior, and train mean and spread of the encoder."""
    expand, start, steps, iterates = searched
    assert isinstance(expand, MatrixFreeExpansion)
    of_sample, of_guess = jax.random.split(key)
    held = cast(MatrixFreeExpansion, without_gradients(expand, at.mean))
    mode = start if gradient == "unroll" else jax.lax.stop_gradient(start)
    if iterates is None:
        mode, found = newton_refine(
            held, mode, num_steps=steps, damping=config.damping, solver=config.solver
        )
        iterates = found.iterates
    scale = jnp.exp(2 * at.log_std)
    sample = laplace_sample(of_sample, expand, mode, scale=scale, gradient=gradient)
    if config.encoder_loss == "elbo":
        loss = shortfall(at, of_guess, sample)
    else:
        # KL(guess ‖ posterior), its energy and trace by one product for one sample of the guess.
        z, log_q = at.guess.sample_and_log_prob(of_guess)
        moved = z - mode
        pull = jax.lax.stop_gradient(held.products(mode).times(moved))
        energy = 0.5 * jax.lax.stop_gradient(moved @ pull)
        energy += gradient_alone(moved) @ pull
        loss = log_q + energy + 0.5 * (mode.size * LOG_2PI - sample.log_det)
    flags = {"is_solved": sample.is_solved, "products": sample.num_products}
    return Inference(sample, loss, iterates, flags)


def _distance(at: Observation, posterior: GaussianPosterior, *, spread: bool) -> Float[Array, ""]:
    """Nats by which the encoder's guess is off: the energy ½ (m - μ)ᵀ P (m - μ) of its mean m.

    With `spread` also ½ tr(PS) - ½ log|PS| - d/2, S its covariance. The sum is the KL divergence of
    the guess to the posterior.
    """
    mean, chol = jax.lax.stop_gradient(posterior)
    energy = 0.5 * jnp.sum((chol.T @ (at.mean - mean)) ** 2)
    if not spread:
        return energy
    scaled = chol.T * jnp.exp(at.log_std)
    log_det = jnp.sum(jnp.log(jnp.diagonal(chol)) + at.log_std)
    return energy + 0.5 * (jnp.sum(scaled**2) - at.mean.size) - log_det


def linear_gaussian(at: Observation, key: PRNGKeyArray, config: InferenceConfig) -> Inference:
    """Infer the exact posterior of a linear decoder; one Newton step from any z gives the mode.

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis.
    """
    return vlae(at, key, InferenceConfig(steps=1, solver="cholesky"))


def refine(
    at: Observation, inference: Inference, key: PRNGKeyArray, config: InferenceConfig
) -> Inference:
    """Move a system's Gaussian towards the one of largest ELBO, by variational Newton steps.

    With gradient "unroll" the objective is differentiated through the steps. Otherwise the
    posterior is held constant. At the optimum that gives the gradient of the ELBO with respect to
    the decoder. The encoder then learns from an amortization loss: the KL divergence from its guess
    to the posterior, or, where only its mean is trained (vlae), the excess energy of that mean; or
    with encoder_loss "elbo" the ELBO of its guess.

    References:
        Opper and Archambeau (2009), The variational Gaussian approximation revisited.
    """
    expand, repair = at.expansions()
    unroll = config.gradient == "unroll"
    given = inference.posterior
    assert isinstance(given, GaussianPosterior | DiagonalPosterior)  # InferenceConfig checks this
    posterior, info = variational_refine(
        expand,
        given,
        key,
        num_steps=config.refine_steps,
        num_samples=config.refine_samples,
        repair=repair,
        gradient="unroll" if unroll else "stop",
    )
    loss = inference.amortization_loss
    if not unroll and config.encoder_loss == "elbo":
        loss = shortfall(at, key, posterior)
    elif not unroll:
        is_used = config.method != "vlae" or config.search == "scaled"
        loss = _distance(at, posterior, spread=is_used)
    iterates = jnp.concatenate([inference.iterates, posterior.mean[None]])
    return Inference(posterior, loss, iterates, flags_of(info))
