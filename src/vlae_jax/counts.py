"""Log probabilities of counts, in nats and summed over dimensions.

The Poisson and the negative binomial are concave in the log of their mean. The zero-inflated ones
are not concave in the decoder's output; for them a function with the suffix `_fisher` gives the
blocks of the Fisher information, to be passed to `gauss_newton_expansion(..., fisher=...)`.

All are computed as deviances, from differences of logs, so that in float32 the error at a count of
a million is a thousandth of a nat, where the sum of the usual terms is off by a whole one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Num

LogProbability = Callable[[Array, Array], Array]
"""Counts, log means → log probabilities, each for itself."""


def poisson(x: Num[Array, " dim"], log_rate: Float[Array, " dim"]) -> Float[Array, ""]:
    """Log probability of the counts `x` under independent Poissons, in nats, -log x! included.

    Args:
        x: Counts 0, 1, 2, ..., shape (dim,), integers or floats.
        log_rate: Log expected counts, shape (dim,). Where exp(log_rate) overflows (above 88 in
            float32) the value is -inf, and its derivatives are not finite.

    Returns:
        A scalar; NaN if a count is negative or NaN.
    """
    return jnp.sum(_poisson(jnp.asarray(x, log_rate.dtype), log_rate))


def negative_binomial(
    x: Num[Array, " dim"], log_mean: Float[Array, " dim"], log_dispersion: Float[Array, "..."]
) -> Float[Array, ""]:
    """Log probability of the counts `x` under independent negative binomials, in nats.

    With mean μ and dispersion α the variance is μ + α μ²: a Poisson whose rate has a gamma
    distribution of shape 1/α, and for α → 0 the Poisson itself, here without loss of digits and to
    α = 0 (a log dispersion of -inf has no derivative; -100 is as good). It is concave in
    `log_mean`, but not in `log_mean` and `log_dispersion` together.

    Args:
        x: Counts 0, 1, 2, ..., shape (dim,), integers or floats.
        log_mean: Log expected counts, shape (dim,). Where exp(log_mean) overflows the value may be
            -inf, and its derivatives not finite.
        log_dispersion: Log α; a scalar or shape (dim,). scipy's `nbinom` has n = 1/α and
            p = 1/(1 + α μ).

    Returns:
        A scalar; NaN if a count is negative or NaN.

    References:
        Lawless (1987), Negative binomial and mixed Poisson regression; Loader (2000), Fast and
        accurate computation of binomial probabilities, for the deviance form.
    """
    return jnp.sum(_negative_binomial(jnp.asarray(x, log_mean.dtype), log_mean, log_dispersion))


def zero_inflated_poisson(
    x: Num[Array, " dim"], eta: Float[Array, " twice_dim"]
) -> Float[Array, ""]:
    """Log probability of counts that are zero with probability π, or else Poisson, in nats.

    It is not concave in `eta`.

    Args:
        x: Counts 0, 1, 2, ..., shape (dim,), integers or floats.
        eta: All log rates, then all logits of π, shape (2 dim,). Where exp(log rate) overflows,
            derivatives are not finite.

    Returns:
        A scalar; NaN if a count is negative or NaN.

    Raises:
        ValueError: While tracing, if `eta` is not twice as long as `x`.

    References:
        Lambert (1992), Zero-inflated Poisson regression.
    """
    return _zero_inflated(x, eta, _poisson)


def zero_inflated_poisson_fisher(eta: Float[Array, " twice_dim"]) -> Float[Array, "2 2 dim"]:
    """Fisher information of `zero_inflated_poisson` in `eta`, a 2 × 2 block for each dimension.

    Args:
        eta: All log rates, then all logits of π, shape (2 dim,).

    Returns:
        Blocks of (log rate, logit), shape (2, 2, dim).
    """
    log_rate, zero_logit = jnp.split(eta, 2)
    rate = jnp.exp(log_rate)
    return _zero_inflated_fisher(rate, rate, zero_logit)


def zero_inflated_negative_binomial(
    x: Num[Array, " dim"], eta: Float[Array, " twice_dim"], log_dispersion: Float[Array, "..."]
) -> Float[Array, ""]:
    """Log probability of counts that are zero with probability π, or else negative binomial.

    It is not concave in `eta`.

    Args:
        x: Counts 0, 1, 2, ..., shape (dim,), integers or floats.
        eta: All log means (of the negative binomial), then all logits of π, shape (2 dim,).
        log_dispersion: Log of its dispersion, as in `negative_binomial`; a scalar or (dim,).

    Returns:
        A scalar in nats; NaN if a count is negative or NaN.

    Raises:
        ValueError: While tracing, if `eta` is not twice as long as `x`.
    """
    return _zero_inflated(
        x, eta, functools.partial(_negative_binomial, log_dispersion=log_dispersion)
    )


def zero_inflated_negative_binomial_fisher(
    eta: Float[Array, " twice_dim"], log_dispersion: Float[Array, "..."]
) -> Float[Array, "2 2 dim"]:
    """Fisher information of `zero_inflated_negative_binomial` in `eta`, 2 × 2 for each dimension.

    Args:
        eta: All log means, then all logits of π, shape (2 dim,).
        log_dispersion: As in `zero_inflated_negative_binomial`.

    Returns:
        Blocks of (log mean, logit), shape (2, 2, dim).
    """
    log_mean, zero_logit = jnp.split(eta, 2)
    information = _information(log_mean, log_dispersion)
    return _zero_inflated_fisher(information, _energy_of_zero(log_mean, log_dispersion), zero_logit)


def _poisson(x: Array, log_rate: Array) -> Array:
    log_x = jnp.log(jnp.where(x > 0, x, 1.0))
    excess = log_rate - log_x
    deviance = x * (_scaled_expm1(jnp.zeros_like(x), excess) - excess)
    log_peak = -0.5 * (math.log(2 * math.pi) + log_x) - _stirling_error(log_x)
    return _by_count(x, log_peak - deviance, -jnp.exp(log_rate))


def _negative_binomial(x: Array, log_mean: Array, log_dispersion: Float[Array, "..."]) -> Array:
    log_dispersion = jnp.broadcast_to(jnp.asarray(log_dispersion, log_mean.dtype), log_mean.shape)
    return _negative_binomials(x, log_mean, log_dispersion)


@jax.custom_jvp
def _negative_binomials(x: Array, log_mean: Array, log_dispersion: Array) -> Array:
    """Log of the probability where the mean equals x, less the deviance of the mean there is."""
    log_x = jnp.log(jnp.where(x > 0, x, 1.0))
    log_odds = log_x + log_dispersion
    deviance = x * _deviance(log_mean - log_x, log_odds)
    log_peak = (
        -0.5 * (math.log(2 * math.pi) + log_x + jax.nn.softplus(log_odds))
        + _stirling_error(jnp.logaddexp(log_x, -log_dispersion))
        - _stirling_error(-log_dispersion)
        - _stirling_error(log_x)
    )
    return _by_count(x, log_peak - deviance, -_energy_of_zero(log_mean, log_dispersion))


@functools.partial(_negative_binomials.defjvp, symbolic_zeros=True)
def _negative_binomials_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The slope in the log mean, in closed form.

    Programs that differentiate it again, as expansions do, compile several times faster by it.
    """
    (x, log_mean, log_dispersion), (_, mean_dot, dispersion_dot) = primals, tangents
    value, tangent = _negative_binomials(*primals), jnp.zeros_like(log_mean)
    if type(dispersion_dot) is not SymbolicZero:
        value, tangent = jax.jvp(
            lambda a: _negative_binomials.fun(x, log_mean, a), (log_dispersion,), (dispersion_dot,)
        )
    if type(mean_dot) is not SymbolicZero:
        rest = _complement(log_mean + log_dispersion)
        tangent += (x * rest - _information(log_mean, log_dispersion)) * mean_dot
    return value, tangent


def _by_count(x: Array, positive: Array, zero: Array) -> Array:
    return jnp.where(x > 0, positive, jnp.where(x == 0, zero, jnp.nan))


def _deviance(excess: Array, log_odds: Array) -> Array:
    """Deviance δ → log(1 + p (exp(δ) - 1)) / p - δ of one count, p = σ(log odds).

    Exchanging p with 1 - p and δ with -δ multiplies it by p / (1 - p), so p ≤ ½ is all there is.
    """
    is_flipped = log_odds > 0
    log_scale = jnp.where(is_flipped, -log_odds, 0.0)
    excess, small_odds = (jnp.where(is_flipped, -a, a) for a in (excess, log_odds))
    softplus = jax.nn.softplus
    # Where p exp(δ) is not small the logarithm is a difference of two softplus; that of a positive
    # number y as y + softplus(-y), whose second derivative keeps its digits.
    is_far = (excess > 1) & (small_odds + excess > 0)
    far = small_odds + excess + softplus(-small_odds - excess) - softplus(small_odds)
    far *= 1 + jnp.exp(jnp.where(is_far, -log_odds, 0.0))
    near_excess = jnp.where(is_far, 0.0, excess)
    near = _scaled_expm1(log_scale, near_excess)
    near *= _log1p_ratio(_scaled_expm1(-softplus(-small_odds), near_excess))
    return jnp.where(is_far, far, near) - jnp.exp(log_scale) * excess


def _information(log_mean: Array, log_dispersion: Float[Array, "..."]) -> Array:
    """A negative binomial's Fisher information in the log mean: μ / (1 + α μ)."""
    log_odds = log_mean + log_dispersion
    is_large = log_odds > 0
    rest = _complement(log_odds)
    small = jnp.exp(jnp.where(is_large, 0.0, log_mean)) * rest
    large = jnp.exp(-jnp.where(is_large, log_dispersion, 0.0)) * (1 - rest)
    return jnp.where(is_large, large, small)


def _complement(log_odds: Array) -> Array:
    """1 - p, whose derivative -p (1 - p) keeps its digits where p is small too."""
    p_or_rest = jax.nn.sigmoid(jnp.where(log_odds > 0, -log_odds, log_odds))
    return jnp.where(log_odds > 0, p_or_rest, 1 - p_or_rest)


def _energy_of_zero(log_mean: Array, log_dispersion: Array) -> Array:
    """Minus the log of a negative binomial's probability of zero: log(1 + α μ) / α."""
    log_odds = log_mean + log_dispersion
    is_large = log_odds > 0
    small = jnp.exp(jnp.where(is_large, 0.0, log_mean))
    small *= _log1p_ratio(jnp.exp(jnp.where(is_large, 0.0, log_odds)))
    large = (log_odds + jax.nn.softplus(-log_odds)) * jnp.exp(
        -jnp.where(is_large, log_dispersion, 0.0)
    )
    return jnp.where(is_large, large, small)


def _scaled_expm1(log_scale: Array, y: Array) -> Array:
    """exp(log_scale) (exp(y) - 1), where exp(y) alone may overflow.

    The derivative of `jnp.expm1` is 1 + expm1, which for y << 0 has no digits left.
    """
    is_small = jnp.abs(y) < 1
    small, large = jnp.where(is_small, y, 0.0), jnp.where(is_small, 0.0, y)
    scale = jnp.exp(log_scale)
    return jnp.where(is_small, scale * jnp.expm1(small), jnp.exp(log_scale + large) - scale)


def _log1p_ratio(y: Array) -> Array:
    """log(1 + y) / y; near 0 by its series, so that no derivative divides rounding by y."""
    is_small = jnp.abs(y) < 0.01
    small, large = jnp.where(is_small, y, 0.0), jnp.where(is_small, 1.0, y)
    series = jnp.polyval(jnp.asarray([(-1) ** k / (k + 1) for k in range(8)][::-1], y.dtype), small)
    return jnp.where(is_small, series, jnp.log1p(large) / large)


def _stirling_error(log_y: Array) -> Array:
    """Log Γ(y) less Stirling's (y - ½) log y - y + ½ log 2π, for any log y.

    References:
        NIST Digital Library of Mathematical Functions, 5.11.1 for the series.
    """
    is_large = log_y > math.log(10)
    inverse = jnp.exp(-jnp.where(is_large, log_y, math.log(10)))
    coefficients = [-691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12]
    series = inverse * jnp.polyval(jnp.asarray(coefficients, log_y.dtype), inverse**2)
    log_small = jnp.where(is_large, 0.0, log_y)
    small = jnp.exp(log_small)
    direct = gammaln(1 + small) - (small + 0.5) * log_small + small - 0.5 * math.log(2 * math.pi)
    return jnp.where(is_large, series, direct)


def _zero_inflated(
    x: Num[Array, " dim"], eta: Float[Array, " twice_dim"], log_prob: LogProbability
) -> Float[Array, ""]:
    if eta.shape != (2 * x.size,):
        raise ValueError(
            f"eta must hold a log mean and a zero logit a dimension, {(2 * x.size,)}, got "
            f"{eta.shape}"
        )
    x = jnp.asarray(x, eta.dtype)
    log_mean, zero_logit = jnp.split(eta, 2)
    log_zero = log_prob(jnp.zeros_like(x), log_mean)
    softplus = jax.nn.softplus
    # Both are log(π + (1 - π) p₀), one without cancellation for likely zeros, one for unlikely.
    zero = jnp.where(
        zero_logit > 0,
        softplus(log_zero - zero_logit) - softplus(-zero_logit),
        jnp.logaddexp(zero_logit, log_zero) - softplus(zero_logit),
    )
    return jnp.sum(_by_count(x, log_prob(x, log_mean) - softplus(zero_logit), zero))


def _zero_inflated_fisher(
    information: Float[Array, " dim"],
    energy: Float[Array, " dim"],
    zero_logit: Float[Array, " dim"],
) -> Float[Array, "2 2 dim"]:
    """Blocks from the information ι in the log mean without inflation, and -log p₀.

    The score of a zero in the log mean is -ι there, for both distributions.
    """
    # The probability that a zero is one of the added, and that it is not.
    added, own = jax.nn.sigmoid(zero_logit + energy), jax.nn.sigmoid(-zero_logit - energy)
    inflation, rest = jax.nn.sigmoid(zero_logit), jax.nn.sigmoid(-zero_logit)
    mean = rest * information * (1 - added * information * jnp.exp(-energy))
    cross = -inflation * own * information
    logit = inflation * rest * added * -jnp.expm1(-energy)
    return jnp.stack([jnp.stack([mean, cross]), jnp.stack([cross, logit])])
