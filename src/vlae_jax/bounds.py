"""What is maximised and reported: ELBO, Laplace evidence, importance-weighted log-likelihood."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.expansions import Expansion
from vlae_jax.factor import factorize
from vlae_jax.posterior import LOG_2PI, EvaluablePosterior, Posterior


class ImportanceInfo(NamedTuple):
    """How far to trust one example's importance-weighted estimate."""

    ess: Float[Array, ""]
    """Effective sample size (Σw)²/Σw²: between 1 and K, and K when q is the posterior."""
    standard_error: Float[Array, ""]
    """Of the log estimate, by the delta method, nats. Itself an estimate from the same weights."""
    elbo: Float[Array, ""]
    """Mean log weight: the K-sample estimate of the ELBO, nats."""
    largest: Float[Array, " tail_and_one"]
    """The largest log weights, descending: what the tail's shape (Pareto k) is fitted to, and the
    one below it. NaN first."""


def tail_size(num_samples: int) -> int:
    """How many of K weights make up the tail: a fifth of a few, 3 √K of many.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling.
    """
    return int(3 * math.sqrt(num_samples)) if num_samples > 225 else num_samples // 5


def elbo(
    key: PRNGKeyArray, log_joint: LogDensity, posterior: Posterior, *, num_samples: int = 1
) -> Float[Array, ""]:
    """Monte Carlo ELBO of one example: the mean of log p(x, z) - log q(z) over samples of q.

    Nothing is replaced by a closed form, on purpose: the noise of log q cancels that of log p,
    and where q is the posterior every single sample gives log p(x).

    Args:
        key: Random key; sample k uses `fold_in(key, k)`.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The approximate posterior q.
        num_samples: Samples averaged.

    Returns:
        A lower bound on log p(x) in expectation, nats.

    Gradients:
        Flow through the parameters and, by reparametrisation, through the posterior.

    References:
        Kingma and Welling (2014); Rezende, Mohamed and Wierstra (2014).
    """
    _require_samples("num_samples", num_samples)
    return jnp.mean(_log_weights(key, jnp.arange(num_samples), log_joint, posterior))


def laplace_evidence(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> Float[Array, ""]:
    """Laplace's estimate of log p(x): log p(x, mode) + (d/2) log 2π - ½ log det P.

    The ELBO of the local quadratic model. Exact for a linear decoder with Gaussian noise; otherwise
    an approximation and no bound.

    Args:
        expand: Expansion of one example's log joint.
        mode: Its mode, shape (latent,).
        repair: See `laplace_posterior`.

    Returns:
        Nats. NaN where the precision is neither positive definite nor repaired.

    Gradients:
        Flow through `mode` and the parameters.
    """
    quadratic, factor = factorize(expand, mode, repair)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(factor.chol)))
    evidence = quadratic.value + 0.5 * mode.size * LOG_2PI - half_log_det
    return jnp.where(factor.is_finite, evidence, jnp.nan)


def importance_weighted_log_prob(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_samples: int,
    chunk_size: int = 500,
    place: Callable[[Int[Array, " chunk"]], Int[Array, " chunk"]] | None = None,
) -> tuple[Float[Array, ""], ImportanceInfo]:
    """Estimate log p(x) by the log of the mean of K importance weights p(x, z) / q(z), z ~ q.

    Samples stream through in chunks, of which three sums each are kept, and the largest weights
    of all. Sample k uses `fold_in(key, k)`: the chunking changes rounding only.

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The proposal q; its support must cover the posterior's.
        num_samples: K.
        chunk_size: Samples held at once.
        place: Identity on the numbers of a chunk's samples that says where they are: a
            `jax.lax.with_sharding_constraint` spreads each chunk over devices.

    Returns:
        The estimate in nats, a lower bound on log p(x) in expectation, and `ImportanceInfo`.
        A weight that is NaN makes the estimate NaN.

    Gradients:
        Those of the K-sample bound, by reparametrisation.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, equation 8.
    """
    _require_samples("num_samples", num_samples)
    _require_samples("chunk_size", chunk_size)
    chunk_size = min(chunk_size, num_samples)
    num_chunks = -(-num_samples // chunk_size)
    kept = min(tail_size(num_samples) + 1, num_samples)

    def add_up(largest, chunk):
        index = chunk * chunk_size + jnp.arange(chunk_size)
        if place is not None:
            index = place(index)
        weights = _log_weights(key, index, log_joint, posterior)
        counts = index < num_samples
        sums = (
            jax.nn.logsumexp(weights, where=counts),
            jax.nn.logsumexp(2 * weights, where=counts),
            jnp.sum(weights, where=counts),
        )
        candidates = jnp.concatenate([largest, jnp.where(counts, weights, -jnp.inf)])
        # A NaN with the sign of what inf - inf gives would rank below all numbers, and be lost.
        candidates = jnp.where(jnp.isnan(candidates), jnp.nan, candidates)
        return jax.lax.top_k(jax.lax.stop_gradient(candidates), kept)[0], sums

    # A zero made from a weight, which the compiler drops, makes them vary over devices as it does.
    first = _log_weights(key, jnp.arange(1), log_joint, posterior)
    none_yet = jnp.full(kept, -jnp.inf, first.dtype) + jnp.zeros_like(first)
    largest, sums = jax.lax.scan(add_up, none_yet, jnp.arange(num_chunks))
    log_sums, log_sums_squares, totals = sums
    log_sum, log_sum_squares = jax.nn.logsumexp(log_sums), jax.nn.logsumexp(log_sums_squares)
    ess = jnp.exp(2 * log_sum - log_sum_squares)
    relative_variance = jnp.maximum(1 / ess - 1 / num_samples, 0.0)
    info = ImportanceInfo(ess, jnp.sqrt(relative_variance), jnp.sum(totals) / num_samples, largest)
    return log_sum - jnp.log(num_samples), info


def iwae_bound(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_samples: int,
    doubly_reparameterized: bool = False,
) -> Float[Array, ""]:
    """The K-sample bound of importance-weighted autoencoders, as a training objective.

    One sample makes it the ELBO. All samples are held at once, as their gradient needs them;
    `importance_weighted_log_prob` streams.

    Args:
        key: Random key; sample k uses `fold_in(key, k)`.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The proposal q.
        num_samples: K.
        doubly_reparameterized: The gradient with respect to q that does not lose its signal as K
            grows. The score of q is dropped and the path through z weighted by the square of the
            normalised weights; unbiased all the same. What `log_joint` closes over gets the usual
            gradient. Costs one more evaluation of the weights. Needs a posterior with `log_prob`.

    Returns:
        A lower bound on log p(x) in expectation, nats, tighter the larger K.

    Raises:
        ValueError: While tracing, for a wrong `num_samples` or a posterior without `log_prob`.

    References:
        Burda, Grosse and Salakhutdinov (2016), equation 8; Tucker, Lawson, Gu and Maddison (2019),
        Doubly reparameterized gradient estimators for Monte Carlo objectives, equation 8.
    """
    _require_samples("num_samples", num_samples)
    index = jnp.arange(num_samples)
    if not doubly_reparameterized:
        weights = _log_weights(key, index, log_joint, posterior)
        return jax.nn.logsumexp(weights) - math.log(num_samples)
    if not isinstance(posterior, EvaluablePosterior):
        raise ValueError(
            "a doubly reparameterized gradient needs a posterior with log_prob, which "
            f"{type(posterior).__name__} lacks"
        )
    constant = jax.lax.stop_gradient(posterior)

    def draw(k):
        return posterior.sample_and_log_prob(jax.random.fold_in(key, k))[0]

    def log_weight(z):
        return log_joint(z) - constant.log_prob(z)

    zs = jax.vmap(draw)(index)
    weights = jax.lax.stop_gradient(jax.vmap(log_weight)(zs))
    shares = jax.nn.softmax(weights)
    # The same samples, whose paths carry one factor of the share; the sum below carries another.
    held = jax.lax.stop_gradient(zs)
    zs = held + shares[:, None] * (zs - held)
    surrogate = shares @ jax.vmap(log_weight)(zs)
    bound = jax.nn.logsumexp(weights) - math.log(num_samples)
    return bound + surrogate - jax.lax.stop_gradient(surrogate)


def _log_weights(key, index, log_joint, posterior):
    def log_weight(k):
        z, log_q = posterior.sample_and_log_prob(jax.random.fold_in(key, k))
        return log_joint(z) - log_q

    return jax.vmap(log_weight)(index)


def _require_samples(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
