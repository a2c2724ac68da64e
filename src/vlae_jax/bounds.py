"""Bounds and estimates of log p(x): ELBO, Laplace evidence, importance-weighted log-likelihood."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.expansions import Expansion
from vlae_jax.factor import factorize
from vlae_jax.posterior import LOG_2PI, EvaluablePosterior, Posterior, require_symmetric


class ImportanceInfo(NamedTuple):
    """Diagnostics of one example's importance-weighted estimate."""

    ess: Float[Array, ""]
    """Effective sample size (Σw)²/Σw²: between 1 and the number of weights, which is K, or K/2 for
    antithetic pairs. It reaches that number when q is the posterior."""
    standard_error: Float[Array, ""]
    """Standard error of the log estimate, by the delta method, nats; estimated from the same
    weights."""
    elbo: Float[Array, ""]
    """Mean log weight of single samples, with or without pairs: the K-sample estimate of the ELBO
    of q, nats."""
    largest: Float[Array, " tail_and_one"]
    """The largest log weights, descending: the tail, whose shape (Pareto k) is fitted, and the next
    smaller weight. NaN comes first. For antithetic samples each is the log of a pair's mean weight,
    and the tail holds `tail_size(K // 2)` of the K/2 weights."""


def tail_size(num_samples: int) -> int:
    """Number of the K weights that make up the tail: K / 5 for K up to 225, 3 √K above.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling.
    """
    return int(3 * math.sqrt(num_samples)) if num_samples > 225 else num_samples // 5


def elbo(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_samples: int = 1,
    antithetic: bool = False,
) -> Float[Array, ""]:
    """Monte Carlo ELBO of one example: the mean of log p(x, z) - log q(z) over samples of q.

    No term is replaced by a closed form, deliberately: the sampling noise of log q cancels that of
    log p, and where q is the posterior every single sample gives log p(x).

    Args:
        key: Random key; sample k uses `fold_in(key, k)`.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The approximate posterior q.
        num_samples: Samples averaged.
        antithetic: Take samples in pairs z and 2 center - z, for which q must be symmetric. Pair k
            uses `fold_in(key, k)`; `num_samples` counts both members of a pair, and is even. Terms
            that are odd in z about the center of q then average out exactly.

    Returns:
        A lower bound on log p(x) in expectation, nats.

    Raises:
        ValueError: While tracing, for a wrong `num_samples`, or with `antithetic` a posterior that
            is not symmetric (a flow).

    Gradients:
        Flow through the parameters and, by reparameterization, through the posterior.

    References:
        Kingma and Welling (2014); Rezende, Mohamed and Wierstra (2014).
    """
    index = jnp.arange(_count_draws(num_samples, antithetic))
    return jnp.mean(_log_weights(key, index, log_joint, posterior, antithetic)[1])


def laplace_evidence(
    expand: Expansion, mode: Float[Array, " latent"], *, repair: Expansion | None = None
) -> Float[Array, ""]:
    """Laplace's estimate of log p(x): log p(x, mode) + (d/2) log 2π - ½ log det P.

    It is the log evidence of the quadratic model around the mode: exact for a linear decoder with
    Gaussian noise, otherwise an approximation and not a bound.

    Args:
        expand: Expansion of one example's log joint.
        mode: Mode of the log joint, shape (latent,).
        repair: See `laplace_posterior`.

    Returns:
        The estimate in nats; NaN where the precision is neither positive definite nor repaired.

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
    antithetic: bool = False,
) -> tuple[Float[Array, ""], ImportanceInfo]:
    """Estimate log p(x) by the log of the mean of K importance weights p(x, z) / q(z), z ~ q.

    Samples are processed in chunks, of which only the log weights are kept, two numbers a sample.
    Sample k uses `fold_in(key, k)`, so the chunk size changes rounding only.

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The proposal q; its support must cover the posterior's.
        num_samples: K.
        chunk_size: Samples held at once.
        place: A function that returns the indices of a chunk's samples unchanged and may constrain
            their placement: `jax.lax.with_sharding_constraint` spreads each chunk over devices.
        antithetic: Take samples in pairs z and 2 center - z, for which q must be symmetric. K and
            `chunk_size` still count evaluations, and K is even; pair k uses `fold_in(key, k)`, and
            `place` is given the indices of a chunk's pairs, half as many. Effective sample size,
            standard error and largest weights are those of the K/2 mean weights of pairs, which are
            independent and have a lighter tail.

    Returns:
        The estimate in nats, a lower bound on log p(x) in expectation, and `ImportanceInfo`.
        A weight that is NaN makes the estimate NaN.

    Raises:
        ValueError: While tracing, for a wrong count, or with `antithetic` a posterior that is not
            symmetric (a flow).

    Gradients:
        Flow as those of the K-sample bound, by reparameterization.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, equation 8;
        Geweke (1988), Antithetic acceleration of Monte Carlo integration in Bayesian inference.
    """
    count = _count_draws(num_samples, antithetic)
    _require_samples("chunk_size", chunk_size)
    chunk_size = min(max(chunk_size // 2, 1) if antithetic else chunk_size, count)
    num_chunks = -(-count // chunk_size)
    kept = min(tail_size(count) + 1, count)

    def weigh(chunk: Array) -> tuple[Array, Array]:
        index = chunk * chunk_size + jnp.arange(chunk_size)
        if place is not None:
            index = place(index)
        return _log_weights(key, index, log_joint, posterior, antithetic)

    weights, means = jax.tree.map(
        lambda chunks: chunks.ravel()[:count], jax.lax.map(weigh, jnp.arange(num_chunks))
    )
    # `top_k` ranks a NaN with the sign bit set, as inf - inf gives, below all numbers.
    ranked = jax.lax.stop_gradient(jnp.where(jnp.isnan(weights), jnp.nan, weights))
    largest = jax.lax.top_k(ranked, kept)[0]
    log_sum, log_sum_squares = jax.nn.logsumexp(weights), jax.nn.logsumexp(2 * weights)
    ess = jnp.exp(2 * log_sum - log_sum_squares)
    relative_variance = jnp.maximum(1 / ess - 1 / count, 0.0)
    info = ImportanceInfo(ess, jnp.sqrt(relative_variance), jnp.mean(means), largest)
    return log_sum - jnp.log(count), info


def iwae_bound(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_samples: int,
    doubly_reparameterized: bool = False,
    antithetic: bool = False,
) -> Float[Array, ""]:
    """The K-sample bound of importance-weighted autoencoders, as a training objective.

    With one sample it is the ELBO. All samples are held in memory at once, as the gradient needs
    them; `importance_weighted_log_prob` processes them in chunks.

    Args:
        key: Random key; sample k uses `fold_in(key, k)`.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The proposal q.
        num_samples: K.
        doubly_reparameterized: Use the gradient estimator with respect to q whose signal-to-noise
            ratio does not fall as K grows. It drops the score of q and weights the path through z
            by the square of the normalized weights, and is unbiased. What `log_joint` closes over
            gets the usual gradient. It costs one more evaluation of the weights, and needs a
            posterior with `log_prob`.
        antithetic: Take samples in pairs z and 2 center - z, for which q must be symmetric. Pair k
            uses `fold_in(key, k)`; K counts both members of a pair, and is even. K = 2 gives the
            ELBO of `SkewedPosterior`.

    Returns:
        A lower bound on log p(x) in expectation, nats, tighter the larger K.

    Raises:
        ValueError: While tracing, for a wrong `num_samples`, a posterior without `log_prob`, or
            with `antithetic` one that is not symmetric (a flow).

    References:
        Burda, Grosse and Salakhutdinov (2016), equation 8; Tucker, Lawson, Gu and Maddison (2019),
        Doubly reparameterized gradient estimators for Monte Carlo objectives, equation 8.
    """
    index = jnp.arange(_count_draws(num_samples, antithetic))
    if not doubly_reparameterized:
        weights, _ = _log_weights(key, index, log_joint, posterior, antithetic)
        return jax.nn.logsumexp(weights) - math.log(index.size)
    if not isinstance(posterior, EvaluablePosterior):
        raise ValueError(
            "a doubly reparameterized gradient needs a posterior with log_prob, which "
            f"{type(posterior).__name__} lacks"
        )
    constant = jax.lax.stop_gradient(posterior)

    def draw(k: Array) -> Array:
        return posterior.sample_and_log_prob(jax.random.fold_in(key, k))[0]

    def log_weight(z: Array) -> Array:
        return log_joint(z) - constant.log_prob(z)

    zs = jax.vmap(draw)(index)
    if antithetic:
        zs = jnp.concatenate([zs, jax.vmap(require_symmetric(posterior, _ANTITHETIC).reflect)(zs)])
    weights = jax.lax.stop_gradient(jax.vmap(log_weight)(zs))
    shares = jax.nn.softmax(weights)
    # These equal the samples, but their gradient is scaled by one factor of the normalized weight;
    # the sum below contributes the second factor.
    held = jax.lax.stop_gradient(zs)
    moved = shares[:, None] * (zs - held)
    if antithetic:
        # The normalized weight of a sample falls where that of its mirror image rises. Between
        # independent samples such terms drop out of the gradient; a pair shares its noise.
        moved -= jnp.roll(moved, index.size, axis=0)
    surrogate = shares @ jax.vmap(log_weight)(held + moved)
    bound = jax.nn.logsumexp(weights) - math.log(num_samples)
    return bound + surrogate - jax.lax.stop_gradient(surrogate)


_ANTITHETIC = "antithetic=True"


def _log_weights(
    key: PRNGKeyArray,
    index: Int[Array, " draw"],
    log_joint: LogDensity,
    posterior: Posterior,
    antithetic: bool,
) -> tuple[Float[Array, " draw"], Float[Array, " draw"]]:
    """Return the log of the mean weight and the mean log weight of each draw, or of its pair."""
    mirror = require_symmetric(posterior, _ANTITHETIC) if antithetic else None

    def log_weight(k: Array) -> tuple[Array, Array]:
        z, log_q = posterior.sample_and_log_prob(jax.random.fold_in(key, k))
        if mirror is None:
            weight = log_joint(z) - log_q
            return weight, weight
        one, other = jax.vmap(log_joint)(jnp.stack([z, mirror.reflect(z)])) - log_q
        return jnp.logaddexp(one, other) - math.log(2), 0.5 * (one + other)

    return jax.vmap(log_weight)(index)


def _count_draws(num_samples: int, antithetic: bool) -> int:
    """Number of draws from q that give `num_samples` evaluations of the weights."""
    if antithetic and (num_samples < 2 or num_samples % 2):
        raise ValueError(
            "num_samples must be even with antithetic=True, which takes samples in pairs and "
            f"counts both of each, got {num_samples}"
        )
    _require_samples("num_samples", num_samples)
    return num_samples // 2 if antithetic else num_samples


def _require_samples(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
