"""The Gaussian of largest ELBO, by Newton steps on averages over its own samples.

Laplace's Gaussian is centered at the mode, with the curvature of the log joint there. Where the log
joint is not quadratic, the Gaussian of largest ELBO has another mean and is wider. It satisfies
E[∇ log p(x, z)] = 0 and precision = E[-∇² log p(x, z)], with expectations under itself.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vlae_jax.expansions import Expansion, Quadratic, depend_on_data, held_constant
from vlae_jax.factor import Factor, factorize
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, as_gaussian

VariationalGradient = Literal["stop", "unroll"]
VariationalFamily = Literal["full", "diagonal"]

_CONVERGED = 1e-2
"""Decrement in nats, of mean or precision, below which each counts as converged."""


class VariationalInfo(NamedTuple):
    """Path and result of one example's refinement. It carries no gradients.

    All numbers are averages over the samples that the refinement itself has used; `sampling_error`
    estimates the effect of their choice.
    """

    elbo: Float[Array, " steps_and_one"]
    """The ELBO, nats, of the given posterior and after each step."""
    decrements: Float[Array, " steps_and_one"]
    """The smoothed decrement of the given posterior and after each step, nats."""
    smoothed_decrement: Float[Array, ""]
    """½ ḡᵀP⁻¹ḡ of the returned posterior, ḡ the mean gradient: the gain, in nats, that moving the
    mean would bring. It vanishes at the optimum even where the log joint has kinks."""
    precision_decrement: Float[Array, ""]
    """¼ ‖L⁻¹P̄L⁻ᵀ - I‖², P̄ the mean precision of the log joint: the gain, in nats, that changing
    the precision LLᵀ would bring, to second order."""
    sampling_error: Float[Array, ""]
    """Loss, in nats, due to the error that the choice of samples causes in the mean: the
    expectation of ½ ḡᵀP⁻¹ḡ where the true ḡ is zero, estimated from the spread of the pairs.
    Infinite for a single pair."""
    converged: Bool[Array, ""]
    """Whether both decrements are below 0.01 nats and the mean precision is positive definite
    without a repair. A step without gain does not count as convergence."""
    is_pd: Bool[Array, ""]
    """Whether the mean precision at the end was positive definite, before any repair."""
    steps_used: Int[Array, ""]
    """Number of accepted steps. The others lowered the ELBO and were retried at half length."""


class _Point(NamedTuple):
    """A Gaussian, with averages over its samples."""

    posterior: GaussianPosterior
    pairs: Float[Array, " pair"]
    """Estimate of the ELBO from each pair of samples, nats."""
    grad: Float[Array, " latent"]
    excess: Float[Array, "latent latent"]
    """L⁻¹P̄L⁻ᵀ - I: the mean precision P̄ minus the Gaussian's own LLᵀ, in units of the latter. For
    the diagonal family, its diagonal alone."""
    whole_excess: Float[Array, "latent latent"]
    """L⁻¹P̄L⁻ᵀ - I with all its entries, for the diagonal family too."""
    repaired: Float[Array, "latent latent"]
    """The `excess` with P̄ that of the repair; equal to `excess` where there is no repair."""
    decrement: Float[Array, ""]
    precision_decrement: Float[Array, ""]
    sampling_error: Float[Array, ""]


def variational_refine(
    expand: Expansion,
    posterior: GaussianPosterior | DiagonalPosterior,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    num_samples: int,
    step_size: float = 0.5,
    mean_step_size: float = 0.5,
    repair: Expansion | None = None,
    gradient: VariationalGradient = "stop",
    family: VariationalFamily = "full",
    chunk_size: int | None = None,
) -> tuple[GaussianPosterior, VariationalInfo]:
    """Move a Gaussian, such as Laplace's, towards the full-covariance Gaussian of largest ELBO.

    Each step averages gradient ḡ and precision P̄ of the log joint over samples
    mean ± L⁻ᵀε of the current Gaussian, whose precision is P = LLᵀ, and takes
    P ← (1 - ρ) P + ρ P̄ and then mean ← mean + ρ' P⁻¹ḡ. The ε are drawn once, so the iteration is
    deterministic and converges to rounding. Antithetic pairs make it exact for a quadratic log
    joint: its true posterior is a fixed point, for any number of samples.

    A step is accepted if the ELBO on these samples falls by no more than the standard error of the
    change, over pairs. Otherwise it is retried at half the length; lengths grow back by doubling.
    The part of the ELBO that is quadratic with precision P̄ is taken in closed form, so that the
    comparison has no sampling noise for a quadratic log joint. It uses the values of the expansions
    that the next step needs. With a single pair (`num_samples` 2) there is no standard error, and
    the ELBO must not fall at all.

    The average contains only the curvature that the expansion has, without that of a ReLU decoder's
    kinks, or without the residual term of Gauss-Newton. The mean is then still optimal for its
    precision, and the precision nearly optimal.

    Args:
        expand: Expansion of one example's log joint. Gauss-Newton keeps P̄ positive definite.
        posterior: The start, of one example: that of `infer_posterior`, or of an encoder.
        key: Random key, for the ε.
        num_steps: Number of steps; 0 only evaluates the given posterior.
        num_samples: Samples S per step, even; S (`num_steps` + 1) expansions in all.
        step_size: ρ, in (0, 1].
        mean_step_size: ρ', in (0, 1].
        repair: Expansion whose mean precision replaces that of `expand` in a step that would
            otherwise make the precision indefinite. It doubles the number of expansions. Without it
            such a step adds ½ρ²(P̄ - P)P⁻¹(P̄ - P), which keeps the precision positive definite: a
            Gaussian that is too narrow then loses at most half its precision per step.
        gradient: "stop" holds the posterior constant. At the optimum that gives the gradient of the
            ELBO: d ELBO/dθ = E[∂ log p(x, z)/∂θ] with the samples held constant, since moving the
            posterior gains nothing to first order. "unroll" differentiates the steps, with the
            choice of their lengths held constant.
        family: "diagonal" keeps the precision diagonal, for a mean-field posterior; the given one
            must then be diagonal, for example a `DiagonalPosterior`. Its precision follows the
            diagonal of P̄, and the steps of its mean use all of P̄.
        chunk_size: Samples expanded at once, to bound the memory; all by default.

    Returns:
        The posterior after the last accepted step, and the `VariationalInfo`. It is finite if the
        given posterior is and its samples have finite expansions; otherwise the given posterior is
        returned unchanged, and `converged` is false.

    Raises:
        ValueError: While tracing, for a wrong count, step size, `gradient` or shape.

    Gradients:
        None with "stop". With "unroll" they flow into `posterior` and whatever `expand` closes
        over, and are finite if all expansions on the way are.

    References:
        Opper and Archambeau (2009), The variational Gaussian approximation revisited; Khan and Rue
        (2023), The Bayesian learning rule; Lin, Schmidt and Khan (2020), Handling the
        positive-definite constraint in the Bayesian learning rule.
    """
    _check(num_steps, num_samples, gradient, family, chunk_size)
    _check_sizes(step_size=step_size, mean_step_size=mean_step_size)
    mean, chol = as_gaussian(posterior)
    if gradient == "stop":
        mean, chol = jax.lax.stop_gradient((mean, chol))
        expand = held_constant(expand, mean)
        repair = None if repair is None else held_constant(repair, mean)
    mean = depend_on_data(lambda z: expand(z).value, mean)
    # Adding zeros, which the compiler removes, marks the carry of the scan as varying over devices
    # with the data, as `jax.shard_map` requires.
    start = GaussianPosterior(mean, chol + jnp.zeros_like(mean)[:, None])
    noise = jax.random.normal(key, (num_samples // 2, mean.size), mean.dtype)

    def look(trial: GaussianPosterior) -> _Point:
        return _look(trial, noise, expand, repair, family, chunk_size)

    def step(carry: Any, index: Array) -> tuple[Any, Any]:
        point, trial, length = carry
        seen = look(trial)
        accept = (index == 0) | _is_no_loss(seen.pairs, point.pairs)
        point = jax.tree.map(lambda new, old: jnp.where(accept, new, old), seen, point)
        length = jnp.where(accept, jnp.minimum(2 * length, 1.0), 0.5 * length)
        sizes = length * step_size, length * mean_step_size
        trial = _move(point, *sizes, family=family, is_repaired=repair is not None)
        return (point, trial, length), (jnp.mean(point.pairs), point.decrement, accept)

    nowhere = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) + jnp.zeros_like(mean[0]),
        jax.eval_shape(look, start),
    )
    carry = (nowhere, start, jnp.ones_like(mean[0]))
    with jax.default_matmul_precision("highest"):
        (point, _, _), path = jax.lax.scan(step, carry, jnp.arange(num_steps + 1))
    return point.posterior, _sum_up(point, path)


def _look(
    posterior: GaussianPosterior,
    noise: Float[Array, "pair latent"],
    expand: Expansion,
    repair: Expansion | None,
    family: VariationalFamily,
    chunk_size: int | None,
) -> _Point:
    """Average expansions over mirrored samples of a Gaussian."""
    mean, chol = posterior
    offsets = solve_triangular(chol, noise.T, lower=True, trans=1).T
    points = mean[None] + jnp.concatenate([offsets, -offsets])
    value, grad, precision = _sweep(expand, points, chunk_size)
    whole = _excess(chol, precision)
    excess = _within(family, whole)
    pairs = _pair(value) + _known_part(posterior, offsets, _pair(precision)) + posterior.entropy()
    repaired = excess
    if repair is not None:
        repaired = _within(family, _excess(chol, _sweep(repair, points, chunk_size).precision))
    grads = solve_triangular(chol, _pair(grad).T, lower=True)
    spread = jnp.sum(jnp.var(grads, axis=1))
    return _Point(
        posterior,
        pairs,
        jnp.mean(grad, axis=0),
        excess,
        whole,
        repaired,
        decrement=0.5 * jnp.sum(jnp.mean(grads, axis=1) ** 2),
        precision_decrement=0.25 * jnp.sum(excess**2),
        sampling_error=0.5 * spread / (len(noise) - 1) if len(noise) > 1 else spread + jnp.inf,
    )


def _known_part(
    posterior: GaussianPosterior,
    offsets: Float[Array, "pair latent"],
    precisions: Float[Array, "pair latent latent"],
) -> Float[Array, " pair"]:
    """Correction of each pair's value that replaces a quadratic part by its expectation.

    It is a control variate. The quadratic has the mean precision of the other pairs, so the
    expectation of the sum is unchanged; a single pair has to use its own precision.
    """
    covariance, count = posterior.covariance(), len(offsets)

    def missed(offset: Array, precision: Array) -> Array:
        return 0.5 * (offset @ precision @ offset - jnp.sum(covariance * precision))

    by_all = jax.vmap(missed, in_axes=(0, None))(offsets, jnp.mean(precisions, axis=0))
    if count == 1:
        return by_all
    return (count * by_all - jax.vmap(missed)(offsets, precisions)) / (count - 1)


def _excess(
    chol: Float[Array, "latent latent"], precisions: Float[Array, "sample latent latent"]
) -> Float[Array, "latent latent"]:
    """Return L⁻¹P̄L⁻ᵀ - I, with P̄ the mean of the precisions."""
    half = solve_triangular(chol, jnp.mean(precisions, axis=0), lower=True)
    whitened = solve_triangular(chol, half.T, lower=True)
    return 0.5 * (whitened + whitened.T) - jnp.eye(len(chol), dtype=chol.dtype)


def _within(
    family: VariationalFamily, excess: Float[Array, "latent latent"]
) -> Float[Array, "latent latent"]:
    """The part of an excess that the family can represent: all of it, or its diagonal."""
    return excess if family == "full" else jnp.diag(jnp.diagonal(excess))


def _pair(array: Float[Array, "twice_pairs ..."]) -> Float[Array, "pairs ..."]:
    one, other = jnp.split(array, 2)
    return 0.5 * (one + other)


def _sweep(
    expand: Expansion, points: Float[Array, "sample latent"], chunk_size: int | None
) -> Quadratic:
    if chunk_size is None:
        return jax.vmap(expand)(points)
    return jax.lax.map(expand, points, batch_size=min(chunk_size, len(points)))


def _is_no_loss(new: Float[Array, " pair"], old: Float[Array, " pair"]) -> Bool[Array, ""]:
    """Whether the ELBO has not fallen by more than its standard error; false if not finite."""
    change = jax.lax.stop_gradient(new - old)
    noise = jnp.std(change) / max(change.size - 1, 1) ** 0.5
    rounding = 8 * jnp.finfo(new.dtype).eps * jnp.mean(jnp.abs(jax.lax.stop_gradient(old)))
    return jnp.mean(change) >= -(noise + rounding)


def _move(
    point: _Point,
    step_size: Float[Array, ""],
    mean_step_size: Float[Array, ""],
    family: VariationalFamily,
    is_repaired: bool,
) -> GaussianPosterior:
    """Return the Gaussian after a step of these lengths.

    In units of the current precision the new one is I + ρE, with E the excess. Where that is not
    positive definite, I + ρE + ½ρ²E² is, which agrees to first order in ρ.
    """
    mean, chol = point.posterior
    identity = jnp.eye(mean.size, dtype=mean.dtype)
    stretch = step_size * point.excess
    instead = step_size * point.repaired if is_repaired else stretch + 0.5 * stretch @ stretch
    # Where neither can be factored, the factor is the identity and the precision stays unchanged.
    factor = _factorize(identity + stretch, identity + instead)
    metric = chol = chol @ factor.chol
    if family == "diagonal":
        # With the diagonal alone, steps along correlated dimensions would add up to be too long.
        metric = (
            point.posterior.chol_precision
            @ _factorize(identity + point.whole_excess, identity + instead).chol
        )
    step = solve_triangular(metric, point.grad, lower=True)
    step = solve_triangular(metric, step, lower=True, trans=1)
    step = jnp.where(jnp.all(jnp.isfinite(step)), step, 0.0)
    return GaussianPosterior(mean + mean_step_size * step, chol)


def _factorize(
    precision: Float[Array, "latent latent"], instead: Float[Array, "latent latent"]
) -> Factor:
    """Factor the first precision, or the second where the first is not positive definite."""

    def at_hand(precision: Array) -> Expansion:
        return lambda z: Quadratic(jnp.zeros_like(z[0]), z, precision)

    return factorize(at_hand(precision), precision[0], at_hand(instead))[1]


def _sum_up(
    point: _Point,
    path: tuple[Float[Array, " steps"], Float[Array, " steps"], Bool[Array, " steps"]],
) -> VariationalInfo:
    elbo, decrements, accepted = path
    whitened = point.excess + jnp.eye(len(point.excess), dtype=point.excess.dtype)
    is_pd = _factorize(whitened, whitened).is_pd
    is_small = (point.decrement <= _CONVERGED) & (point.precision_decrement <= _CONVERGED)
    info = VariationalInfo(
        elbo=elbo,
        decrements=decrements,
        smoothed_decrement=point.decrement,
        precision_decrement=point.precision_decrement,
        sampling_error=point.sampling_error,
        converged=is_small & is_pd,
        is_pd=is_pd,
        steps_used=jnp.sum(accepted[1:]),
    )
    return jax.lax.stop_gradient(info)


def _check(
    num_steps: int, num_samples: int, gradient: str, family: str, chunk_size: int | None
) -> None:
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    if num_samples < 2 or num_samples % 2:
        raise ValueError(
            f"num_samples must be even and at least 2, as samples come in pairs, got {num_samples}"
        )
    if gradient not in get_args(VariationalGradient):
        raise ValueError(
            f"gradient must be one of {get_args(VariationalGradient)}, got {gradient!r}"
        )
    if family not in get_args(VariationalFamily):
        raise ValueError(f"family must be one of {get_args(VariationalFamily)}, got {family!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_sizes(**sizes: float) -> None:
    for name, size in sizes.items():
        if not 0 < size <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {size}")
