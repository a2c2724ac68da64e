"""The gaps of a trained run: what its bound loses, on real images, and how well that is known."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vlae_jax.annealing import (
    AnnealingInfo,
    annealed_importance_sampling,
    reverse_annealed_importance_sampling,
)
from vlae_jax.config import GapConfig
from vlae_jax.densities import LogDensity
from vlae_jax.errors import UserError
from vlae_jax.evaluation import Figure, mean_figure
from vlae_jax.experiment import Experiment, map_images
from vlae_jax.gaps import Estimate, best_in_family, estimate_elbo, inference_gaps
from vlae_jax.inference import infer_posterior
from vlae_jax.posterior import GaussianPosterior, Posterior
from vlae_jax.preprocessing import fixed_keys
from vlae_jax.progress import counting

_FIGURES = (
    "log_prob_ais",
    "best_in_family_elbo",
    "converged_elbo",
    "amortised_elbo",
    "approximation_gap",
    "amortisation_gap",
    "non_convergence_gap",
    "ais_sampling_error",
)
_SIMULATED = ("bdmc_lower", "bdmc_upper", "bdmc_gap")


def measure_gaps(
    experiment: Experiment, params: Any, options: GapConfig
) -> tuple[list[Figure], dict[str, np.ndarray]]:
    """Split the distance between the ELBO and log p(x), image by image.

    log p(x) is bounded from below by annealed importance sampling on test images; on images that
    the model itself has drawn, whose exact posterior sample is known, also from above. The best
    posterior of the family is searched for each image.

    Args:
        experiment: What the model belongs to.
        params: Its parameters.
        options: How much to do.

    Returns:
        Figures, means over images in nats, and the values behind them, (images,) each:
        log_prob_ais, best_in_family_elbo, amortised_elbo, the three gaps; converged_elbo and
        non_convergence_gap for systems that search a mode; bdmc_lower, bdmc_upper and bdmc_gap on
        simulated images.

    Raises:
        UserError: If there are fewer test images than asked for.

    References:
        Cremer, Li and Duvenaud (2018); Wu, Burda, Salakhutdinov and Grosse (2017); Grosse,
        Ghahramani and Adams (2015).
    """
    there = len(experiment.dataset.test)
    if options.images > there:
        raise UserError(f"images is {options.images}, but there are only {there} test images")
    images = experiment.dataset.test[: options.images]

    def real(given: Any, pixels: Array, key: PRNGKeyArray) -> dict[str, Array]:
        params, head = given
        noise_key, key = jax.random.split(key)
        x, _ = experiment.preprocessor.apply(noise_key, pixels)
        model = experiment.merge(params)
        log_joint = model.log_joint(x, head)
        inference = experiment.system(model, x, key)
        laplace = _converged(model, x, inference.iterates[-1], options)
        keys = jax.random.split(key, 4)
        log_prob, annealing = _lower_bound(keys[0], log_joint, _start(laplace, options), options)
        best = best_in_family(
            keys[1],
            log_joint,
            inference.posterior,
            num_steps=options.family_steps,
            num_samples=options.family_samples,
        )

        def bound(key: PRNGKeyArray, posterior: Posterior) -> Estimate:
            return estimate_elbo(key, log_joint, posterior, num_samples=options.elbo_samples)

        # One key for all bounds: what they share of the noise leaves their differences.
        amortized, best_bound = bound(keys[2], inference.posterior), bound(keys[2], best)
        searches = "converged" in inference.flags
        converged = bound(keys[2], laplace) if searches else None
        gaps = inference_gaps(
            Estimate(log_prob, annealing.standard_error), best_bound, amortized, converged
        )
        measured = {
            "log_prob_ais": log_prob,
            "best_in_family_elbo": best_bound.value,
            "amortised_elbo": amortized.value,
            "approximation_gap": gaps.approximation.value,
            "amortisation_gap": gaps.amortization.value,
            "ais_sampling_error": annealing.standard_error,
            "ais_acceptance": annealing.acceptance,
        }
        if converged is not None and gaps.non_convergence is not None:
            measured["converged_elbo"] = converged.value
            measured["non_convergence_gap"] = gaps.non_convergence.value
        return measured

    def simulated(given: Any, _: Array, key: PRNGKeyArray) -> dict[str, Array]:
        params, head = given
        model = experiment.merge(params)
        prior_key, x_key, *keys = list(jax.random.split(key, 4))
        z_exact = jax.random.normal(prior_key, (experiment.config.model.latent,))
        x = model.draw(x_key, z_exact)
        log_joint = model.log_joint(x, head)
        start = _start(_converged(model, x, model.encode(x)[0], options), options)
        lower, forward = _lower_bound(keys[0], log_joint, start, options)
        upper, _info = reverse_annealed_importance_sampling(
            keys[1],
            log_joint,
            start,
            z_exact,
            num_temperatures=options.temperatures,
            num_chains=options.chains,
            num_leapfrog=options.leapfrog,
            step_size=forward.step_size,
            adapt=False,
        )
        return {"bdmc_lower": lower, "bdmc_upper": upper, "bdmc_gap": upper - lower}

    head = experiment.whitened_head(params)
    on_test = map_images(real, images, fixed_keys(len(images)), batch_size=options.batch)
    blank = np.zeros((options.simulated_images, 1, 1, 1), np.uint8)
    on_drawn = map_images(simulated, blank, fixed_keys(len(blank)), batch_size=options.batch)
    with counting("gaps on test images", len(images)) as show:
        measured = on_test((params, head), show)
    with counting("bounds on simulated images", len(blank)) as show:
        drawn = on_drawn((params, head), show)
    figures = [
        mean_figure(name, measured[name], "nats", options.elbo_samples if "elbo" in name else None)
        for name in _FIGURES
        if name in measured
    ]
    figures.append(mean_figure("ais_acceptance", measured["ais_acceptance"], "share"))
    figures += [mean_figure(name, drawn[name], "nats", split="simulated") for name in _SIMULATED]
    return figures, {**measured, **drawn}


def _lower_bound(
    key: PRNGKeyArray, log_joint: LogDensity, start: Posterior, options: GapConfig
) -> tuple[Array, AnnealingInfo]:
    """Anneal with step sizes that other chains, half as many, have found.

    Chains that adapt their own give no bound.
    """
    anneal = functools.partial(
        annealed_importance_sampling,
        log_joint=log_joint,
        start=start,
        num_temperatures=options.temperatures,
        num_leapfrog=options.leapfrog,
    )
    pilot_key, key = jax.random.split(key)
    _, pilot = anneal(pilot_key, num_chains=-(-options.chains // 2))
    return anneal(key, num_chains=options.chains, step_size=pilot.step_size, adapt=False)


def _converged(model: Any, x: Array, z: Array, options: GapConfig) -> GaussianPosterior:
    """The Laplace posterior where a long search from z ends."""
    expand, repair = model.expansions(x)
    posterior, _ = infer_posterior(
        expand, z, num_steps=options.search_steps, gradient="stop", repair=repair
    )
    return posterior


def _start(laplace: GaussianPosterior, options: GapConfig) -> Any:
    if options.start == "laplace":
        return laplace
    latent = laplace.mean.size
    return GaussianPosterior(jnp.zeros(latent), jnp.eye(latent))
