"""Measurement of the gap between a trained model's ELBO and log p(x), and of its accuracy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.annealing import (
    AnnealingInfo,
    reverse_annealed_importance_sampling,
    strict_lower_bound,
)
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.densities import LogDensity
from vlae_jax.errors import UserError
from vlae_jax.gaps import Estimate, best_in_family, estimate_elbo, inference_gaps
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.trained import Inferred, Pixels, Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior
from vlae_jax.progress import counting
from vlae_jax.runs.gap_config import GapConfig
from vlae_jax.runs.metrics import Metric, mean_metric
from vlae_jax.variational import variational_refine

_MEASURED = (
    "log_prob_ais",
    "best_in_family_elbo",
    "converged_elbo",
    "amortized_elbo",
    "approximation_gap",
    "amortization_gap",
    "non_convergence_gap",
    "ais_sampling_error",
    "ais_acceptance",
)
_SIMULATED = ("bdmc_lower", "bdmc_upper", "bdmc_gap")


def measure_gaps(
    trained: Trained, images: np.ndarray, options: GapConfig
) -> tuple[list[Metric], dict[str, np.ndarray]]:
    """Split the distance between the ELBO and log p(x), image by image.

    log p(x) is bounded from below by annealed importance sampling on the images. On images drawn by
    the model itself, for which an exact posterior sample is known, it is also bounded from above.
    The best posterior of the family is searched for each image.

    Args:
        trained: The model.
        images: uint8, (n, height, width, channel); the first `options.images` are used.
        options: Amount of work.

    Returns:
        Metrics, means over images in nats, and the values of each image, (images,) each:
        log_prob_ais, best_in_family_elbo, amortized_elbo, the three gaps; converged_elbo and
        non_convergence_gap for systems that search a mode; bdmc_lower, bdmc_upper and bdmc_gap on
        simulated images.

    Raises:
        UserError: If there are fewer images than asked for.

    References:
        Cremer, Li and Duvenaud (2018); Wu, Burda, Salakhutdinov and Grosse (2017); Grosse,
        Ghahramani and Adams (2015).
    """
    if options.images > len(images):
        raise UserError(f"images is {options.images}, but there are only {len(images)}")
    images = images[: options.images]
    real = functools.partial(_split_gap, options)
    simulated = functools.partial(_bound_on_simulated, options)
    on_test = map_images(real, images, fixed_keys(len(images)), batch_size=options.batch)
    blank = np.zeros((options.simulated_images, 1, 1, 1), np.uint8)
    on_drawn = map_images(simulated, blank, fixed_keys(len(blank)), batch_size=options.batch)
    trained = trained.for_examples(images).factored()
    with counting("gaps on test images", len(images)) as show:
        measured = on_test(trained, show)
    with counting("bounds on simulated images", len(blank)) as show:
        drawn = on_drawn(trained, show)
    metrics = [
        mean_metric(name, measured[name], options.elbo_samples if "elbo" in name else None)
        for name in _MEASURED
        if name in measured
    ]
    metrics += [mean_metric(name, drawn[name], split="simulated") for name in _SIMULATED]
    return metrics, {**measured, **drawn}


def _split_gap(
    options: GapConfig, trained: Trained, pixels: Pixels, key: PRNGKeyArray
) -> dict[str, Array]:
    """Measure the gaps of one image, and the bounds that they are differences of."""
    inferred = trained.infer(key, pixels)
    inference, log_joint = inferred.inference, inferred.log_joint
    laplace = _converged(inferred.at, inference.iterates[-1], options)
    chains_key, family_key = jax.random.split(inferred.keys.use)
    log_prob, annealing = _lower_bound(chains_key, log_joint, _start(laplace, options), options)
    best = _best_of_family(inferred, family_key, options)

    def bound(posterior: Posterior) -> Estimate:
        # All bounds use one key, so that common noise cancels in their differences.
        return estimate_elbo(
            inferred.keys.bound, log_joint, posterior, num_samples=options.elbo_samples
        )

    amortized, best_bound = bound(inference.posterior), bound(best)
    converged = bound(laplace) if "converged" in inference.flags else None
    gaps = inference_gaps(
        Estimate(log_prob, annealing.standard_error), best_bound, amortized, converged
    )
    measured = {
        "log_prob_ais": log_prob,
        "best_in_family_elbo": best_bound.value,
        "amortized_elbo": amortized.value,
        "approximation_gap": gaps.approximation.value,
        "amortization_gap": gaps.amortization.value,
        "ais_sampling_error": annealing.standard_error,
        "ais_acceptance": annealing.acceptance,
    }
    if converged is not None and gaps.non_convergence is not None:
        measured["converged_elbo"] = converged.value
        measured["non_convergence_gap"] = gaps.non_convergence.value
    return measured


def _best_of_family(inferred: Inferred, key: PRNGKeyArray, options: GapConfig) -> Posterior:
    """Search the posterior of largest ELBO in the system's family.

    For Gaussians it uses variational Newton steps, with a diagonal precision if the system's is
    diagonal; for flows it uses Adam.
    """
    posterior = inferred.posterior
    if not isinstance(posterior, GaussianPosterior | DiagonalPosterior):
        return best_in_family(
            key,
            inferred.log_joint,
            posterior,
            num_steps=options.flow_steps,
            num_samples=options.flow_samples,
        )
    expand, repair = inferred.at.expansions()
    best, _ = variational_refine(
        expand,
        posterior,
        key,
        num_steps=options.family_steps,
        num_samples=options.family_samples,
        repair=repair,
        family="diagonal" if isinstance(posterior, DiagonalPosterior) else "full",
        chunk_size=options.family_samples // 2,
    )
    return best


def _bound_on_simulated(
    options: GapConfig, trained: Trained, _: Array, key: PRNGKeyArray
) -> dict[str, Array]:
    """Bound log p(x) from below and above, for one image that the model draws."""
    model = trained.model
    prior_key, x_key, forward_key, reverse_key = jax.random.split(key, 4)
    z_exact = model.prior.draw(prior_key)
    offset = trained.preprocessor.log_units()
    at = model.at(model.draw(x_key, z_exact), head=trained.head, offset=offset)
    start = _start(_converged(at, at.mean, options), options)
    lower, forward = _lower_bound(forward_key, at.log_joint, start, options)
    upper, _info = reverse_annealed_importance_sampling(
        reverse_key,
        at.log_joint,
        start,
        z_exact,
        num_temperatures=options.temperatures,
        num_chains=options.chains,
        num_leapfrog=options.leapfrog,
        step_size=forward.step_size,
        adapt=False,
    )
    return {"bdmc_lower": lower, "bdmc_upper": upper, "bdmc_gap": upper - lower}


def _lower_bound(
    key: PRNGKeyArray, log_joint: LogDensity, start: Posterior, options: GapConfig
) -> tuple[Array, AnnealingInfo]:
    return strict_lower_bound(
        key,
        log_joint,
        start,
        num_temperatures=options.temperatures,
        num_chains=options.chains,
        num_leapfrog=options.leapfrog,
    )


def _converged(at: Observation, z: Array, options: GapConfig) -> GaussianPosterior:
    """The Laplace posterior at the end of a long mode search from z."""
    expand, repair = at.expansions()
    posterior, _ = infer_posterior(
        expand, z, num_steps=options.search_steps, gradient="stop", repair=repair
    )
    return posterior


def _start(laplace: GaussianPosterior, options: GapConfig) -> Any:
    if options.start == "laplace":
        return laplace
    latent = laplace.mean.size
    return GaussianPosterior(jnp.zeros(latent), jnp.eye(latent))
