"""log p(x) of any decoder, whatever system trained it: a proposal made for each image.

An importance-weighted estimate is low by what its proposal misses. With each system's own posterior
as the proposal, systems with a poor posterior are measured too low, by 10 to 100 nats. Here every
image gets the best Gaussian that can be had for its decoder: the mode is searched from where the
system's posterior is centered, and the Laplace posterior there is refined by variational Newton
steps. Its Student-t is the proposal, of antithetic pairs. Pareto k̂ tells for which images that does
not suffice: these are estimated by annealing, as far as the budget goes. (Four times the samples
cost more and help fewer of them: a heavy tail stays heavy.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from arviz_stats.base import array_stats
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlae_jax.annealing import strict_lower_bound
from vlae_jax.bounds import ImportanceInfo, importance_weighted_log_prob
from vlae_jax.densities import LogDensity
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import Observation
from vlae_jax.models.trained import Inferred
from vlae_jax.posterior import GaussianPosterior
from vlae_jax.proposals import heavy_tailed
from vlae_jax.runs.metrics import UNRELIABLE_K
from vlae_jax.variational import variational_refine


class Effort(NamedTuple):
    """How much work goes into one image's estimate."""

    search_steps: int
    """Newton steps of the mode search."""
    refine_steps: int
    """Variational Newton steps."""
    refine_samples: int
    """Samples of each of them."""
    importance_samples: int
    """K: evaluations of the log joint, in antithetic pairs."""

    def cost(self, latent: int) -> int:
        """Evaluations of the log joint that this is worth, an expansion counted as `latent`."""
        expansions = self.search_steps + self.refine_samples * (self.refine_steps + 1)
        return self.importance_samples + latent * expansions


_PILOTS = 16
_NEGLIGIBLE_SPREAD = 0.1
"""Nats between the log weights of the pilots below which a Gaussian needs no heavier tails."""
DF = 8.0
"""Degrees of freedom of the Student-t: tails that a Gaussian's weights cannot outrun, in a body
that is nearly Gaussian."""
_EXPANDED_AT_ONCE = 8
_SMALLEST_TAIL = 5


class Annealing(NamedTuple):
    """How much one image is annealed."""

    temperatures: int
    chains: int
    leapfrog: int
    """Leapfrog steps of each transition."""

    @property
    def cost(self) -> int:
        """Evaluations of the log joint that this is worth; a gradient is three."""
        return self.chains * self.temperatures * (3 * self.leapfrog + 1)


ANNEALING = Annealing(100, 16, 5)


def effort_for(num_samples: int) -> Effort:
    """The work on every image, for K importance samples."""
    return Effort(20, 8, 16, num_samples + num_samples % 2)


def best_gaussian(
    at: Observation, start: Float[Array, " latent"], key: PRNGKeyArray, effort: Effort
) -> GaussianPosterior:
    """The full-covariance Gaussian closest to the posterior: Laplace's, then refined.

    Args:
        at: The model at the example.
        start: Where to begin the search, (latent,).
        key: For the samples of the refinement.
        effort: How much to do.
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


class _Chosen(NamedTuple):
    """A Gaussian, or the Student-t of the same mean and scale."""

    gaussian: GaussianPosterior
    is_gaussian: Bool[Array, ""]

    def sample_and_log_prob(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        """One sample of the one chosen, and its log density in nats."""
        z, _ = heavy_tailed(self.gaussian, DF).sample_and_log_prob(key)
        # From the Student-t's normal noise, which is then drawn once.
        light, _ = self.gaussian.sample_and_log_prob(jax.random.split(key)[0])
        z = jnp.where(self.is_gaussian, light, z)
        return z, self.log_prob(z)

    def log_prob(self, z: Float[Array, " latent"]) -> Float[Array, ""]:
        """Log density of the one chosen at z, nats."""
        heavy = heavy_tailed(self.gaussian, DF)
        return jnp.where(self.is_gaussian, self.gaussian.log_prob(z), heavy.log_prob(z))

    def reflect(self, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """The mirror image of z."""
        return self.gaussian.reflect(z)


def _with_fitting_tails(
    key: PRNGKeyArray, log_joint: LogDensity, gaussian: GaussianPosterior
) -> _Chosen:
    """The Gaussian itself where it is all but the posterior, so that a linear decoder is exact.

    A few pilot samples decide, which the estimate does not use.
    """
    zs, log_q = jax.vmap(gaussian.sample_and_log_prob)(jax.random.split(key, _PILOTS))
    spread = jnp.ptp(jax.vmap(log_joint)(zs) - log_q)
    return _Chosen(gaussian, spread < _NEGLIGIBLE_SPREAD)


def estimate_log_prob(
    inferred: Inferred,
    effort: Effort,
    *,
    chunk_size: int,
    place: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, ""], ImportanceInfo]:
    """Estimate log p(x) of one example with a proposal made for it.

    Args:
        inferred: From `Trained.infer`; of the system's posterior only the center is used.
        effort: How much to do.
        chunk_size: Importance samples held at once.
        place: See `importance_weighted_log_prob`.

    Returns:
        Nats, a lower bound of log p(x) in expectation, and what its weights say of it: `elbo` is
        that of the proposal.
    """
    refine_key, sample_key = jax.random.split(jax.random.fold_in(inferred.keys.use, 0))
    start = inferred.inference.iterates[-1]
    gaussian = best_gaussian(inferred.at, start, refine_key, effort)
    sample_key, pilot_key = jax.random.split(sample_key)
    return importance_weighted_log_prob(
        sample_key,
        inferred.log_joint,
        _with_fitting_tails(pilot_key, inferred.log_joint, gaussian),
        num_samples=effort.importance_samples,
        chunk_size=chunk_size,
        place=place,
        antithetic=True,
    )


def anneal_log_prob(
    inferred: Inferred, effort: Effort
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate log p(x) of one example by chains annealed from the proposal made for it.

    Args:
        inferred: From `Trained.infer`.
        effort: That of the proposal.

    Returns:
        Nats, a lower bound of log p(x) in expectation; and its standard error over chains.
    """
    refine_key, key = jax.random.split(jax.random.fold_in(inferred.keys.use, 1))
    start = best_gaussian(inferred.at, inferred.inference.iterates[-1], refine_key, effort)
    log_prob, info = strict_lower_bound(
        key,
        inferred.log_joint,
        start,
        num_temperatures=ANNEALING.temperatures,
        num_chains=ANNEALING.chains,
        num_leapfrog=ANNEALING.leapfrog,
    )
    return log_prob, info.standard_error


def within_budget(wanted: np.ndarray, cost: int, budget: float) -> np.ndarray:
    """The first of the images wanted that a budget pays for.

    Args:
        wanted: Indices of images.
        cost: Of each.
        budget: To spend.
    """
    return wanted[: int(budget // cost)]


def is_doubtful(shapes: np.ndarray) -> np.ndarray:
    """Whether each k̂ shows that its estimate is unreliable; false for NaN, an unknown k̂."""
    return shapes > UNRELIABLE_K


def pareto_k(largest: np.ndarray, num_samples: int) -> np.ndarray:
    """The shape k̂ of the tail of the importance weights, for each image.

    Below 0.7 the estimate is reliable; above, the variance of the weights is too large and the
    estimate too low. A tail without any spread, as with the posterior as the proposal, has -inf.

    Args:
        largest: The largest log weights of each image, descending, (n, tail + 1), with the one
            below the tail last: `ImportanceInfo.largest`.
        num_samples: K, the number of all weights.

    Returns:
        An array (n,). NaN where fewer than 25 samples leave no tail, or a weight in the tail is
        zero or NaN.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
    """
    shapes = np.full(len(largest), np.nan)
    if largest.shape[1] <= _SMALLEST_TAIL:
        return shapes
    for i, weights in enumerate(np.asarray(largest, np.float64)):
        # Only differences of log weights matter; this is their rounding in float32.
        resolution = np.finfo(np.float32).eps * max(1.0, abs(weights[0]))
        if np.isfinite(weights[0]) and weights[0] - weights[-1] <= 8 * resolution:
            shapes[i] = -np.inf
        elif np.isfinite(weights).all():
            # The fit uses only the tail and the value below it, so the others can be filled in.
            rest = np.full(num_samples - len(weights), weights[-1])
            # Equal weights next to the tail cause harmless divisions by zero in the fit.
            with np.errstate(divide="ignore", invalid="ignore"):
                _, shapes[i] = array_stats.psislw(-np.concatenate([weights, rest]))
    return shapes
