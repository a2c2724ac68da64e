"""The Gaussian of largest ELBO, by Newton steps on averages over its own samples.

Laplace's Gaussian sits at the mode and is as narrow as the log joint is sharp there; where the
log joint is no quadratic the best Gaussian is elsewhere and wider. It satisfies
E[∇ log p(x, z)] = 0 and precision = E[-∇² log p(x, z)], averages under itself.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vlae_jax.expansions import Expansion, Quadratic, depend_on_data
from vlae_jax.factor import Factor, factorize
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, as_gaussian

VariationalGradient = Literal["stop", "unroll"]
VariationalFamily = Literal["full", "diagonal"]

_CONVERGED = 1e-2
"""Nats below which neither mean nor precision is worth another step."""


class VariationalInfo(NamedTuple):
    """How one example's refinement went. Carries no gradients.

    All numbers are of the samples that the refinement itself has used; how far these speak for all
    others is `sampling_error`.
    """

    elbo: Float[Array, " steps_and_one"]
    """The ELBO, nats, of the posterior given and after each step."""
    decrements: Float[Array, " steps_and_one"]
    """The smoothed decrement of each of these, nats."""
    smoothed_decrement: Float[Array, ""]
    """½ ḡᵀP⁻¹ḡ of the posterior returned, ḡ the mean gradient: nats to be had by moving the mean.
    It vanishes at the optimum even where the log joint has kinks."""
    precision_decrement: Float[Array, ""]
    """¼ ‖L⁻¹P̄L⁻ᵀ - I‖², P̄ the mean precision of the log joint: nats to be had by changing the
    precision LLᵀ, to second order."""
    sampling_error: Float[Array, ""]
    """Nats that the mean may be off by for the choice of samples: the expectation of ½ ḡᵀP⁻¹ḡ where
    the true ḡ is zero, as the pairs' own spread tells it. Infinite for a single pair."""
    converged: Bool[Array, ""]
    """Both decrements are below 0.01 nats, and the mean precision is PD, unrepaired. Gaining
    nothing is no convergence."""
    is_pd: Bool[Array, ""]
    """Whether the mean precision at the end was positive definite, before any repair."""
    steps_used: Int[Array, ""]
    """Steps that were taken. The others would have lost, and were tried again at half length."""


class _Point(NamedTuple):
    """A Gaussian, and what its samples say of it."""

    posterior: GaussianPosterior
    pairs: Float[Array, " pair"]
    """The ELBO as each pair of samples has it, nats."""
    grad: Float[Array, " latent"]
    excess: Float[Array, "latent latent"]
    """L⁻¹P̄L⁻ᵀ - I: by what the mean precision P̄ exceeds the Gaussian's own LLᵀ, in its units."""
    whole_excess: Float[Array, "latent latent"]
    """The same with all its entries, where the family keeps those of the diagonal alone."""
    repaired: Float[Array, "latent latent"]
    """The same of the repair's mean precision; of the log joint's where there is no repair."""
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
    """Move a Gaussian, Laplace's say, towards the full-covariance Gaussian of largest ELBO.

    Each step averages gradient ḡ and precision P̄ of the log joint over samples
    mean ± L⁻ᵀε of the Gaussian at hand, whose precision is P = LLᵀ, and takes
    P ← (1 - ρ) P + ρ P̄ and then mean ← mean + ρ' P⁻¹ḡ. The ε are drawn once: the iteration is
    deterministic and converges to rounding. Antithetic pairs make it exact for a quadratic log
    joint, of which the true posterior is left as it is, however few the samples.

    A step is taken where the ELBO of these samples falls by no more than the standard error of the
    change, over pairs; otherwise it is tried again at half the length, and lengths grow back by
    doubling. The part of the ELBO that is quadratic with precision P̄ enters in closed form, so
    that this judgement is free of noise for a quadratic; its values are those of the expansions
    that the next step needs. A single pair, `num_samples` 2, judges poorly: it has no standard
    error, and may not fall at all.

    Curvature that the expansion leaves out is left out of the average: that of a ReLU decoder's
    kinks, or the residual term of Gauss-Newton. The mean is then still the best for its precision,
    and the precision nearly so.

    Args:
        expand: Expansion of one example's log joint. Gauss-Newton keeps P̄ positive definite.
        posterior: Where to start, of one example: `infer_posterior`'s, or an encoder's.
        key: Random key, for the ε.
        num_steps: Steps; 0 only looks.
        num_samples: Samples S a step, even. S (`num_steps` + 1) expansions in all.
        step_size: ρ, in (0, 1].
        mean_step_size: ρ', in (0, 1].
        repair: Expansion whose mean precision is taken for a step that with that of `expand` would
            not leave the precision positive definite. Costs as many expansions again. Without it
            such a step adds ½ρ²(P̄ - P)P⁻¹(P̄ - P), which does: a Gaussian that is too narrow for
            where it is widens, by at most half its precision a step.
        gradient: "stop" holds the posterior constant. At the optimum that is the gradient of the
            ELBO: d ELBO/dθ = E[∂ log p(x, z)/∂θ], samples held, since moving the posterior gains
            nothing to first order. "unroll" differentiates the steps, with the choice of their
            lengths held constant.
        family: "diagonal" keeps a diagonal precision, that of a mean-field posterior; it must be
            given one, a `DiagonalPosterior` say. Its precision follows the diagonal of P̄, and its
            mean takes steps by all of P̄.
        chunk_size: Samples expanded at once, to bound the memory; all by default.

    Returns:
        The posterior, always that of the last step taken, and the `VariationalInfo`. Finite where
        the posterior given is and its samples have finite expansions; where not, it is returned as
        it came, and `converged` is false.

    Raises:
        ValueError: While tracing, for a wrong count, step size, `gradient` or shape.

    Gradients:
        With "stop", none. With "unroll", into `posterior` and whatever `expand` closes over; finite
        where all expansions that were met are.

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
        expand = _held(expand, mean)
        repair = None if repair is None else _held(repair, mean)
    mean = depend_on_data(lambda z: expand(z).value, mean)
    # Zeros that the compiler drops: under `jax.shard_map` all that is carried varies as data do.
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
    """Average over mirrored samples of a Gaussian."""
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
    """What each pair's values have of a quadratic, exchanged for its expectation.

    The quadratic is that of the other pairs' mean precision, so the sum keeps its expectation. A
    single pair can only take its own.
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
    """L⁻¹P̄L⁻ᵀ - I of the mean precision P̄."""
    half = solve_triangular(chol, jnp.mean(precisions, axis=0), lower=True)
    whitened = solve_triangular(chol, half.T, lower=True)
    return 0.5 * (whitened + whitened.T) - jnp.eye(len(chol), dtype=chol.dtype)


def _within(
    family: VariationalFamily, excess: Float[Array, "latent latent"]
) -> Float[Array, "latent latent"]:
    """The part of an excess that the family can follow."""
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
    """Whether an ELBO has not fallen, by what its pairs can tell. Never where it is not finite."""
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
    """Where a step of these lengths leads, in units of the Gaussian at hand.

    I + ρE, E the excess, is the new precision there. Where that is not positive definite,
    I + ρE + ½ρ²E² is, and agrees to first order in ρ.
    """
    mean, chol = point.posterior
    identity = jnp.eye(mean.size, dtype=mean.dtype)
    stretch = step_size * point.excess
    instead = step_size * point.repaired if is_repaired else stretch + 0.5 * stretch @ stretch
    # Its factor is the identity where there is none: the precision then stays.
    factor = _factorize(identity + stretch, identity + instead)
    metric = chol = chol @ factor.chol
    if family == "diagonal":
        # Dimensions that depend on each other would be moved too far, each as if it were alone.
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
    """The factor of a precision at hand, or else of the other."""

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


def _held(expand: Expansion, z: Float[Array, " latent"]) -> Expansion:
    """The same expansion with all that it closes over held constant: reverse mode never enters."""
    pure, closed_over = jax.closure_convert(expand, z)
    constants = jax.lax.stop_gradient(closed_over)
    return lambda z: pure(z, *constants)


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
