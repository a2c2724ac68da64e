"""The gap between the ELBO and log p(x), split into its causes.

A part is lost because the family of posteriors is too small, the rest because inference does not
find the best of the family. log p(x) comes from `vlae_jax.annealing`, which does not depend on the
families compared. This module needs optax, from the `train` extra; `import vlae_jax` never imports
it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior


class Estimate(NamedTuple):
    """A quantity estimated by sampling, with its error, for one example or an array of them."""

    value: Float[Array, "..."]
    """The estimate, nats."""
    standard_error: Float[Array, "..."]
    """Standard error of sampling, nats."""


class Gaps(NamedTuple):
    """The gap between log p(x) and the ELBO, in nats, and its parts; one `Estimate` each.

    `inference` = `approximation` + `amortization`.
    """

    inference: Estimate
    """log p(x) - ELBO(q): the whole gap."""
    approximation: Estimate
    """log p(x) - ELBO(q*), q* the best of the family: the loss due to the choice of family."""
    amortization: Estimate
    """ELBO(q*) - ELBO(q): the loss due to inference within the family."""
    non_convergence: Estimate | None
    """ELBO(q̂) - ELBO(q), q̂ the result of the same inference run to convergence: the part of
    `amortization` that more steps would regain. It is negative where more steps lower the ELBO,
    which is not largest at the mode of the log joint. None for inference without such steps."""


def inference_gaps(
    log_prob: Estimate, best: Estimate, amortized: Estimate, converged: Estimate | None = None
) -> Gaps:
    """Split the distance from an ELBO to log p(x).

    The standard errors are combined as those of independent estimates: use a different key for each
    argument.

    Args:
        log_prob: log p(x), from annealing for example. If it is a lower bound, `inference` and
            `approximation` are lower bounds too.
        best: ELBO of the posterior from `best_in_family`. If that search has not found the best,
            `approximation` is too large and `amortization` too small.
        amortized: ELBO of the posterior that inference gives.
        converged: ELBO of the Laplace posterior at the converged mode, if `amortized` is the ELBO
            after a few steps.

    Returns:
        The `Gaps`, in nats, of the shape of the arguments. Sampling can make a small gap negative.

    References:
        Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders,
        section 3.
    """
    return Gaps(
        inference=_subtract(log_prob, amortized),
        approximation=_subtract(log_prob, best),
        amortization=_subtract(best, amortized),
        non_convergence=None if converged is None else _subtract(converged, amortized),
    )


def estimate_elbo(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_samples: int,
    chunk_size: int = 500,
) -> Estimate:
    """Estimate the ELBO of one example with its standard error; the value is `elbo` of that key.

    Args:
        key: Random key; sample k uses `fold_in(key, k)`.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: The approximate posterior q.
        num_samples: Samples averaged, at least 2.
        chunk_size: Samples held at once.

    Returns:
        The `Estimate` in nats; not finite if a single sample is not.

    Raises:
        ValueError: While tracing, for a wrong count.

    Gradients:
        Flow as those of `elbo`; memory then grows with `num_samples`.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 to have an error, got {num_samples}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def log_weight(k: Array) -> Array:
        z, log_q = posterior.sample_and_log_prob(jax.random.fold_in(key, k))
        return log_joint(z) - log_q

    index = jnp.arange(num_samples)
    weights = jax.lax.map(log_weight, index, batch_size=min(chunk_size, num_samples))
    return Estimate(jnp.mean(weights), jnp.std(weights, ddof=1) / num_samples**0.5)


def best_in_family(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: Posterior,
    *,
    num_steps: int,
    num_samples: int,
    learning_rate: float = 0.1,
) -> Any:
    """Maximize the ELBO of one example over the local parameters of its posterior's family.

    The search runs Adam with a cosine decay to 0, on fresh samples in every step, and skips steps
    whose gradient is not finite. Parameters are relative to the given posterior (see
    `local_parameters`), so steps are in its standard deviations: a posterior that is off by n of
    them takes at least 2 n / `learning_rate` steps. For a Gaussian family the gradient flows only
    through the samples; its noise vanishes at the optimum if the family contains the true posterior
    (Roeder et al., 2017).

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), nats.
        posterior: Start of the search: a `DiagonalPosterior`, a `GaussianPosterior`, or any other
            type that `local_parameters` accepts.
        num_steps: Steps of Adam.
        num_samples: Samples per step. The comparison at the end takes 16 times as many.
        learning_rate: Learning rate of the first steps.

    Returns:
        A posterior of the same type. Its ELBO is no lower than that of the given posterior, both on
        the same fresh samples: if the search gains nothing, the given one is returned unchanged.

    Raises:
        TypeError: For a family that `local_parameters` does not accept.
        ValueError: While tracing, for a wrong count.

    Gradients:
        None.

    References:
        Cremer, Li and Duvenaud (2018), section 5.1; Roeder, Wu and Duvenaud (2017), Sticking the
        landing.
    """
    for name, count in {"num_steps": num_steps, "num_samples": num_samples}.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    posterior = jax.lax.stop_gradient(posterior)
    family = local_parameters(posterior)
    search_key, judge_key = jax.random.split(key)
    # A sample with a gradient that is not finite skips one step instead of ending the search.
    optimizer = optax.apply_if_finite(
        optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps)),
        max_consecutive_errors=num_steps,
    )

    def loss(params: Any, key: PRNGKeyArray) -> Array:
        searched = family.rebuild(params)
        held = family.rebuild(jax.lax.stop_gradient(params))

        def log_weight(key: PRNGKeyArray) -> Array:
            z, log_q = searched.sample_and_log_prob(key)
            return log_joint(z) - (held.log_prob(z) if family.has_density else log_q)

        return -jnp.mean(jax.vmap(log_weight)(jax.random.split(key, num_samples)))

    def step(carry: Any, index: Array) -> tuple[Any, None]:
        params, state = carry
        slope = jax.grad(loss)(params, jax.random.fold_in(search_key, index))
        updates, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (family.params, optimizer.init(family.params))
    (params, _), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
    found = family.rebuild(params)

    def judge(posterior: Posterior) -> Array:
        bound, _ = estimate_elbo(
            judge_key, log_joint, posterior, num_samples=16 * num_samples, chunk_size=num_samples
        )
        return jnp.where(jnp.isnan(bound), -jnp.inf, bound)

    better = judge(found) > judge(posterior)
    chosen = jax.tree.map(lambda one, other: jnp.where(better, one, other), found, posterior)
    return jax.lax.stop_gradient(chosen)


class Family(NamedTuple):
    """The free parameters of one example's posterior."""

    params: Any
    """A tree of arrays, all zero for the given posterior."""
    rebuild: Callable[[Any], Any]
    """A function from such a tree to a posterior of the given type."""
    has_density: bool
    """Whether `log_prob` of any z costs no more than sampling does."""


def local_parameters(posterior: Any) -> Family:
    """Return the parameters that are free for each example, relative to a posterior, in its units.

    - `DiagonalPosterior`: the mean in standard deviations, and log standard deviations.
    - `GaussianPosterior`: z = mean + L⁻ᵀ(m + Aε), with m and an upper triangular A, its diagonal
      as a logarithm and the rest times the root of the dimension. L⁻ᵀA is upper, so L A⁻ᵀ is the
      new lower factor of the precision; the ELBO of a log joint that is concave in z is concave in
      m and A (Challis and Barber, 2013).
    - A NamedTuple with fields `base` and `context`, such as a normalizing flow conditioned on
      features of the encoder: the parameters of `base`, by these rules, and `context` itself. Its
      other fields are shared by all examples and stay unchanged.

    Raises:
        TypeError: For a posterior of any other type.

    References:
        Challis and Barber (2013), Gaussian Kullback-Leibler approximate inference, JMLR 14.
    """
    if isinstance(posterior, DiagonalPosterior):
        return _diagonal(posterior)
    if isinstance(posterior, GaussianPosterior):
        return _gaussian(posterior)
    if {"base", "context"} <= set(getattr(posterior, "_fields", ())):
        return _conditional(posterior)
    raise TypeError(f"no rule for the local parameters of a {type(posterior).__name__}")


def _diagonal(posterior: DiagonalPosterior) -> Family:
    def rebuild(params: Any) -> Any:
        shift, log_scale = params
        mean = posterior.mean + jnp.exp(posterior.log_std) * shift
        return DiagonalPosterior(mean, posterior.log_std + log_scale)

    zeros = jnp.zeros_like(posterior.mean)
    return Family((zeros, zeros), rebuild, has_density=True)


def _gaussian(posterior: GaussianPosterior) -> Family:
    mean, chol = posterior

    def rebuild(params: Any) -> Any:
        shift, log_diagonal, strict = params
        # Adam moves all entries by equal amounts: unscaled, the off-diagonal ones of a row together
        # would outweigh mean and diagonal.
        strict = jnp.triu(strict, 1) / mean.size**0.5
        scale = jnp.diag(jnp.exp(log_diagonal)) + strict
        shift = solve_triangular(chol, shift, lower=True, trans=1)
        return GaussianPosterior(mean + shift, solve_triangular(scale, chol.T, lower=False).T)

    zeros = jnp.zeros_like(mean)
    return Family((zeros, zeros, jnp.zeros_like(chol)), rebuild, has_density=True)


def _conditional(posterior: Any) -> Family:
    base = local_parameters(posterior.base)

    def rebuild(params: Any) -> Any:
        base_params, shift = params
        context = jax.tree.map(jnp.add, posterior.context, shift)
        return posterior._replace(base=base.rebuild(base_params), context=context)

    shift = jax.tree.map(jnp.zeros_like, posterior.context)
    return Family((base.params, shift), rebuild, has_density=False)


def _subtract(one: Estimate, other: Estimate) -> Estimate:
    error = jnp.hypot(one.standard_error, other.standard_error)
    return Estimate(one.value - other.value, error)
