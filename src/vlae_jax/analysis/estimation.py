"""Estimates of log p(x) for a decoder trained by any system, with a proposal made for each image.

An importance-weighted estimate is too low where its proposal misses posterior mass. With each
system's own posterior as the proposal, systems with a poor posterior are measured too low, by 10 to
100 nats. Here a full-covariance Gaussian is fitted to every image: the mode is searched from the
center of the system's posterior, and the Laplace posterior there is refined by variational Newton
steps. The proposal is the Student-t with its mean and scale, in antithetic pairs. Pareto k̂ shows
for which images that does not suffice. They are estimated again with more steps and samples, and
those that remain by annealing, as far as the budget allows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.annealing import annealed_importance_sampling
from vlae_jax.bounds import ImportanceInfo, importance_weighted_log_prob
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.trained import Inferred
from vlae_jax.posterior import GaussianPosterior, heavy_tailed
from vlae_jax.variational import variational_refine


class Effort(NamedTuple):
    """Amount of work for one image's estimate."""

    search_steps: int
    """Number of Newton steps of the mode search."""
    refine_steps: int
    """Number of variational Newton steps."""
    refine_samples: int
    """Samples per variational Newton step."""
    importance_samples: int
    """K, the number of importance samples, in antithetic pairs."""

    def cost(self, latent: int) -> int:
        """Cost in evaluations of the log joint, with an expansion counted as `latent` of them."""
        expansions = self.search_steps + self.refine_samples * (self.refine_steps + 1)
        return self.importance_samples + latent * expansions


DF = 8.0
"""Degrees of freedom of the Student-t: nearly Gaussian in the center, with heavier tails."""
_EXPANDED_AT_ONCE = 8
TEMPERATURES, CHAINS, LEAPFROG = 100, 16, 5


def first_effort(num_samples: int) -> Effort:
    """The effort for the first estimate of every image, with K importance samples."""
    return Effort(20, 8, 16, num_samples + num_samples % 2)


def second_effort(first: Effort) -> Effort:
    """The larger effort for images whose first estimate is unreliable."""
    return Effort(40, 24, 32, 4 * first.importance_samples)


def annealing_cost() -> int:
    """Cost of annealing one image, in evaluations of the log joint; a gradient counts as three."""
    return CHAINS * TEMPERATURES * (3 * LEAPFROG + 1)


def best_gaussian(
    at: Observation, start: Float[Array, " latent"], key: PRNGKeyArray, effort: Effort
) -> GaussianPosterior:
    """Fit a full-covariance Gaussian to the posterior: the Laplace posterior, then refined.

    Args:
        at: The model bound to the example.
        start: Start of the mode search, (latent,).
        key: Random key for the samples of the refinement.
        effort: Amount of work.
    """
    expand, repair = at.expansions()
    laplace, _ = infer_posterior(
        expand, start, num_steps=effort.search_steps, gradient="stop", repair=repair
    )
    refined, _ = variational_refine(
        expand,
        laplace,
        key,
        num_steps=effort.refine_steps,
        num_samples=effort.refine_samples,
        repair=repair,
        chunk_size=_EXPANDED_AT_ONCE,
    )
    return refined


def estimate_log_prob(
    inferred: Inferred,
    effort: Effort,
    *,
    attempt: int,
    chunk_size: int,
    place: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, ""], ImportanceInfo]:
    """Estimate log p(x) of one example by importance sampling with a proposal made for it.

    Args:
        inferred: The result of `Trained.infer`; only the center of its posterior is used.
        effort: Amount of work.
        attempt: Number that varies the random key: each gives an independent estimate.
        chunk_size: Importance samples held at once.
        place: See `importance_weighted_log_prob`.

    Returns:
        The estimate in nats, a lower bound of log p(x) in expectation, and its `ImportanceInfo`,
        whose `elbo` is that of the Student-t.
    """
    refine_key, sample_key = jax.random.split(jax.random.fold_in(inferred.keys.use, attempt))
    start = inferred.inference.iterates[-1]
    gaussian = best_gaussian(inferred.at, start, refine_key, effort)
    return importance_weighted_log_prob(
        sample_key,
        inferred.log_joint,
        heavy_tailed(gaussian, DF),
        num_samples=effort.importance_samples,
        chunk_size=chunk_size,
        place=place,
        antithetic=True,
    )


def anneal_log_prob(
    inferred: Inferred, effort: Effort, *, attempt: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate log p(x) of one example by chains annealed from the proposal made for it.

    Separate chains find the step sizes, so that the estimate is a bound in expectation.

    Args:
        inferred: The result of `Trained.infer`.
        effort: Amount of work for the proposal.
        attempt: Number that varies the random key: each gives an independent estimate.

    Returns:
        The estimate in nats, a lower bound of log p(x) in expectation; and its standard error over
        chains.
    """
    refine_key, pilot_key, key = jax.random.split(jax.random.fold_in(inferred.keys.use, attempt), 3)
    start = best_gaussian(inferred.at, inferred.inference.iterates[-1], refine_key, effort)
    _, pilot = annealed_importance_sampling(
        pilot_key,
        inferred.log_joint,
        start,
        num_temperatures=TEMPERATURES,
        num_chains=CHAINS // 2,
        num_leapfrog=LEAPFROG,
    )
    log_prob, info = annealed_importance_sampling(
        key,
        inferred.log_joint,
        start,
        num_temperatures=TEMPERATURES,
        num_chains=CHAINS,
        num_leapfrog=LEAPFROG,
        step_size=pilot.step_size,
        adapt=False,
    )
    return log_prob, info.standard_error


def within_budget(wanted: np.ndarray, cost: int, budget: float) -> tuple[np.ndarray, float]:
    """Return as many of the first indices as a budget allows, and the remaining budget.

    Args:
        wanted: Indices of images.
        cost: Cost per image.
        budget: Budget in the units of `cost`.
    """
    affordable = wanted[: max(0, int(budget // cost))]
    return affordable, budget - cost * len(affordable)
