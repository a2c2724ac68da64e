"""Annealed importance sampling: log p(x) of one example between two stochastic bounds.

Importance sampling needs a proposal close to the posterior. Annealing constructs its own, so its
estimate can judge the posteriors of all systems without depending on any of them. Transitions are
Hamiltonian Monte Carlo (HMC) by blackjax, from the `train` extra; `import vlae_jax` never imports
this module.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc import hmc
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.expansions import depend_on_data
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior

TARGET_ACCEPTANCE = 0.65
"""Mean acceptance at which HMC moves farthest per gradient evaluation (Beskos et al., 2013)."""
_ADAPTATION = 0.1
"""Change of the log step size per unit of difference from the target acceptance."""
_JITTER = 0.2
"""Largest random relative change of a step size; without it paths may return to their start."""
_STEEPNESS = 4.0


class AnnealingInfo(NamedTuple):
    """Diagnostics of one example's annealed estimate. They carry no gradients."""

    ess: Float[Array, ""]
    """Effective number of chains (Σw)²/Σw²: between 1 and their number; 0 where all have failed."""
    standard_error: Float[Array, ""]
    """Standard error of the log estimate, by the delta method over chains, nats. It is estimated
    from the same weights, so it misses modes that no chain has visited; infinite for one chain."""
    acceptance: Float[Array, ""]
    """Mean probability of acceptance, over chains and temperatures; 0 without any transition."""
    step_size: Float[Array, " transitions"]
    """Step size at each temperature between the first and the last, in the order of rising β."""
    num_failed: Int[Array, ""]
    """Number of chains that met a log joint that is not finite; their weight is 0."""
    is_finite: Bool[Array, ""]
    """Whether at least one chain has not failed: otherwise the estimate is an infinite bound."""


def annealed_importance_sampling(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    start: Posterior,
    *,
    num_temperatures: int,
    num_chains: int,
    num_leapfrog: int = 10,
    step_size: float | Float[Array, "..."] = 0.5,
    adapt: bool | Bool[Array, ""] = True,
) -> tuple[Float[Array, ""], AnnealingInfo]:
    """Estimate log p(x) by chains annealed from `start` to the posterior: a stochastic lower bound.

    A chain starts at a sample of `start` and passes through the densities ∝ start^(1-β) p(x, z)^β,
    with β on a sigmoidal schedule from 0 to 1. It gathers log w = Σ Δβ log(p(x, z) / start(z)), and
    moves by one HMC transition at each β between. The mean of w over chains has the expectation
    p(x); its log is below log p(x) in expectation, and exceeds it by b nats with a probability of
    at most exp(-b). Only the running sums are kept: memory does not grow with the temperatures.

    The chains move in coordinates in which a Gaussian `start` is N(0, I), which is HMC with the
    covariance of `start` as its inverse mass matrix. The Laplace posterior thus preconditions the
    moves, and step sizes are in its standard deviations.

    With `adapt`, the step size follows the mean acceptance of the chains at earlier temperatures
    (Robbins and Monro's rule, towards 0.65; Wu et al. adapt in a similar way). A chain then depends
    on its past also through the step size, so the bound holds only approximately: the more chains
    share the step size and the slower it changes, the better. For a strict bound, run again with
    another key, `adapt=False` and `step_size=info.step_size` of the first run.

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), nats. Where it is not finite the density
            counts as zero, which can only lower the estimate.
        start: The distribution that chains start from, with a `log_prob`: the Laplace posterior, an
            encoder's posterior, or the prior as `DiagonalPosterior(zeros, zeros)`. Its support must
            cover that of the posterior.
        num_temperatures: Number of steps of β; 1 is importance sampling.
        num_chains: Number of chains. They run in parallel, so memory grows with their number.
        num_leapfrog: Gradients per transition; one more evaluates the weight.
        step_size: First guess for all transitions, or one for each, (num_temperatures - 1,), in the
            order of rising β. Steps are varied at random by up to a fifth.
        adapt: Whether to adapt the step sizes, by one factor for all transitions still to come.

    Returns:
        The estimate in nats and `AnnealingInfo`. Never NaN: a chain that fails has weight 0, and
        the estimate is -inf where all chains have failed.

    Raises:
        ValueError: While tracing, for a wrong count or shape.

    Gradients:
        None.

    References:
        Neal (2001), Annealed importance sampling; Grosse, Ghahramani and Adams (2015), Sandwiching
        the marginal likelihood using bidirectional Monte Carlo; Wu, Burda, Salakhutdinov and Grosse
        (2017), On the quantitative analysis of decoder-based generative models.
    """
    _require_at_least_one(
        num_temperatures=num_temperatures, num_chains=num_chains, num_leapfrog=num_leapfrog
    )
    start_key, run_key = jax.random.split(key)

    def sample(chain: Array) -> Array:
        return start.sample_and_log_prob(jax.random.fold_in(start_key, chain))[0]

    origins = jax.vmap(sample)(jnp.arange(num_chains))
    return _anneal(
        run_key,
        log_joint,
        start,
        origins,
        _schedule(num_temperatures),
        num_leapfrog,
        _step_sizes(step_size, num_temperatures, origins.dtype),
        adapt,
    )


def strict_lower_bound(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    start: Posterior,
    *,
    num_temperatures: int,
    num_chains: int,
    num_leapfrog: int = 10,
) -> tuple[Float[Array, ""], AnnealingInfo]:
    """Estimate log p(x) as `annealed_importance_sampling` does, a bound in expectation.

    Other chains, half as many, find the step sizes first; chains that adapt their own would not
    give a strict bound.

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        start: The distribution that chains start from.
        num_temperatures: Number of steps of β.
        num_chains: Number of chains.
        num_leapfrog: Gradients per transition.

    Returns:
        The estimate in nats and `AnnealingInfo`.

    Raises:
        ValueError: While tracing, for a wrong count.

    Gradients:
        None.
    """
    anneal = functools.partial(
        annealed_importance_sampling,
        log_joint=log_joint,
        start=start,
        num_temperatures=num_temperatures,
        num_leapfrog=num_leapfrog,
    )
    pilot_key, key = jax.random.split(key)
    _, pilot = anneal(pilot_key, num_chains=-(-num_chains // 2))
    return anneal(key, num_chains=num_chains, step_size=pilot.step_size, adapt=False)


def reverse_annealed_importance_sampling(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    start: Posterior,
    z_exact: Float[Array, " latent"],
    *,
    num_temperatures: int,
    num_chains: int,
    num_leapfrog: int = 10,
    step_size: float | Float[Array, "..."] = 0.5,
    adapt: bool | Bool[Array, ""] = True,
) -> tuple[Float[Array, ""], AnnealingInfo]:
    """Bound log p(x) from above, by chains annealed from an exact posterior sample to `start`.

    The chains of `annealed_importance_sampling` run backwards. The mean of their 1/w has the
    expectation 1/p(x); minus its log is above log p(x) in expectation. An exact posterior sample is
    at hand for simulated data, z ~ p(z) and then x ~ p(x | z). How far apart the two bounds are
    there says how far to trust the lower one for real data.

    Args:
        key: Random key.
        log_joint: See `annealed_importance_sampling`.
        start: The distribution that the forward chains start from; the reverse chains end there.
        z_exact: A sample of the posterior, (latent,); all chains start there.
        num_temperatures: See `annealed_importance_sampling`.
        num_chains: See `annealed_importance_sampling`. More chains do not replace more exact
            samples.
        num_leapfrog: See `annealed_importance_sampling`.
        step_size: See `annealed_importance_sampling`; `info.step_size` of a forward run can be
            passed unchanged.
        adapt: See `annealed_importance_sampling`: here too the bound is then approximate. The
            adaptation starts at β = 1.

    Returns:
        The estimate in nats and `AnnealingInfo`, of the weights 1/w; its standard error does not
        include the choice of `z_exact`. Never NaN: a chain that fails has weight 0, which can only
        raise the estimate, and the estimate is +inf where all chains have failed.

    Raises:
        ValueError: While tracing, for a wrong count or shape.

    Gradients:
        None.

    References:
        Grosse, Ghahramani and Adams (2015); Wu, Burda, Salakhutdinov and Grosse (2017).
    """
    _require_at_least_one(
        num_temperatures=num_temperatures, num_chains=num_chains, num_leapfrog=num_leapfrog
    )
    log_inverse, info = _anneal(
        key,
        log_joint,
        start,
        jnp.broadcast_to(z_exact, (num_chains, *z_exact.shape)),
        _schedule(num_temperatures)[::-1],
        num_leapfrog,
        _step_sizes(step_size, num_temperatures, z_exact.dtype)[::-1],
        adapt,
    )
    return -log_inverse, info._replace(step_size=info.step_size[::-1])


class _Chains(NamedTuple):
    """The state of all chains between two temperatures; the first axis of arrays is the chain."""

    offset: Float[Array, "chains latent"]
    log_weight: Float[Array, " chains"]
    failed: Bool[Array, " chains"]
    log_factor: Float[Array, ""]
    """Log of the factor by which adaptation has changed the step sizes given."""


def _anneal(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    start: Any,
    origins: Array,
    betas: np.ndarray,
    num_leapfrog: int,
    step_sizes: Array,
    adapt: bool | Array,
) -> tuple[Array, AnnealingInfo]:
    """Run chains from `origins` along `betas` and return the log of the mean of their weights.

    The weights belong to the path in the direction it is run: with falling β they are 1/w.
    """
    origins = jax.vmap(lambda z: depend_on_data(log_joint, z))(origins)
    num_chains, latent = origins.shape
    dtype = origins.dtype
    # Rounded before the differences are taken, so that these add up to 1 exactly.
    betas = np.asarray(betas, dtype)
    deltas = np.diff(betas)
    stretch = _whitening(start)
    kernel = hmc.build_kernel()

    def log_density(offset: Array, origin: Array, beta: Array) -> Any:
        """Return the annealed log density at one point, and log p(x, z) - log start(z)."""
        z = origin + stretch(offset)
        joint, reference = log_joint(z), start.log_prob(z)
        joint = jnp.where(jnp.isfinite(joint), joint, -jnp.inf)
        return (1 - beta) * reference + beta * joint, joint - reference

    def move(key: PRNGKeyArray, offset: Array, origin: Array, beta: Array, step_size: Array) -> Any:
        """Return the log ratio at one chain's point, and the point after one HMC transition."""
        kernel_key, jitter_key = jax.random.split(key)
        step_size *= jax.random.uniform(jitter_key, (), dtype, 1 - _JITTER, 1 + _JITTER)
        (value, log_ratio), slope = jax.value_and_grad(log_density, has_aux=True)(
            offset, origin, beta
        )
        state, info = kernel(
            kernel_key,
            hmc.HMCState(offset, value, slope),
            lambda offset: log_density(offset, origin, beta)[0],
            step_size,
            jnp.ones(latent, dtype),
            num_leapfrog,
        )
        return log_ratio, state.position, info.acceptance_rate

    def step(chains: Any, given: Any) -> tuple[Any, Any]:
        index, beta, delta, step_size = given
        keys = jax.random.split(jax.random.fold_in(key, index), num_chains)
        step_size *= jnp.exp(chains.log_factor)
        log_ratio, offset, acceptance = jax.vmap(move, in_axes=(0, 0, 0, None, None))(
            keys, chains.offset, origins, beta, step_size
        )
        chains = _weigh(chains._replace(offset=offset), delta * log_ratio)
        # A failed chain may never move again, so its acceptance must not steer the step size.
        acceptance = jnp.sum(jnp.where(chains.failed, 0.0, acceptance))
        acceptance /= jnp.maximum(jnp.sum(~chains.failed), 1)
        change = jnp.where(adapt, _ADAPTATION * (acceptance - TARGET_ACCEPTANCE), 0.0)
        chains = chains._replace(log_factor=chains.log_factor + change)
        return chains, (acceptance, step_size)

    chains = _Chains(
        offset=jnp.zeros_like(origins),
        log_weight=jnp.zeros(num_chains, dtype),
        failed=jnp.zeros(num_chains, bool),
        log_factor=jnp.zeros((), dtype),
    )
    given = (np.arange(len(deltas) - 1), betas[1:-1], deltas[:-1], step_sizes)
    chains, (acceptance, step_sizes) = jax.lax.scan(step, chains, given)
    _, log_ratio = jax.vmap(log_density, in_axes=(0, 0, None))(chains.offset, origins, betas[-1])
    chains = _weigh(chains, deltas[-1] * log_ratio)

    log_weights = jnp.where(chains.failed, -jnp.inf, chains.log_weight)
    log_sum = jax.nn.logsumexp(log_weights)
    is_finite = jnp.isfinite(log_sum)
    weights = jnp.exp(log_weights - log_sum)
    ess = jnp.where(is_finite, jnp.sum(weights) ** 2 / jnp.sum(weights**2), 0.0)
    # The sample variance of the weights, divided by the square of their mean and their number.
    variance = jnp.maximum(num_chains / ess - 1, 0.0) / max(num_chains - 1, 1)
    known = is_finite & (num_chains > 1)
    info = AnnealingInfo(
        ess=ess,
        standard_error=jnp.where(known, jnp.sqrt(variance), jnp.inf),
        acceptance=jnp.sum(acceptance) / max(len(acceptance), 1),
        step_size=step_sizes,
        num_failed=jnp.sum(chains.failed),
        is_finite=is_finite,
    )
    return jax.lax.stop_gradient((log_sum - np.log(num_chains).astype(dtype), info))


def _weigh(chains: _Chains, increment: Float[Array, " chains"]) -> _Chains:
    failed = chains.failed | ~jnp.isfinite(increment)
    log_weight = chains.log_weight + jnp.where(failed, 0.0, increment)
    return chains._replace(log_weight=log_weight, failed=failed)


def _whitening(start: Any) -> Callable[[Array], Array]:
    """The linear map from offsets in which a Gaussian `start` has unit covariance."""
    if isinstance(start, GaussianPosterior):
        identity = jnp.eye(start.mean.size, dtype=start.chol_precision.dtype)
        scale = solve_triangular(start.chol_precision, identity, lower=True, trans=1)
        return lambda offset: scale @ offset
    if isinstance(start, DiagonalPosterior):
        std = jnp.exp(start.log_std)
        return lambda offset: std * offset
    return lambda offset: offset


def _schedule(num_temperatures: int) -> np.ndarray:
    """The β from 0 to 1, closest together at both ends, where the density changes fastest."""
    sigmoid = 1 / (1 + np.exp(-np.linspace(-_STEEPNESS, _STEEPNESS, num_temperatures + 1)))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


def _step_sizes(step_size: Any, num_temperatures: int, dtype: Any) -> Float[Array, " transitions"]:
    step_size = jnp.asarray(step_size, dtype)
    if step_size.shape not in ((), (num_temperatures - 1,)):
        raise ValueError(
            f"step_size must be a scalar or have shape (num_temperatures - 1,), got "
            f"{step_size.shape} for {num_temperatures} temperatures"
        )
    return jnp.broadcast_to(step_size, (num_temperatures - 1,))


def _require_at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
