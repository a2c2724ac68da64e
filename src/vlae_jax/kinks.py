"""Certificates for modes on a kink, where the gradient jumps and no Newton decrement vanishes.

The log joint of a ReLU decoder is piecewise smooth. Its maximum may lie where two pieces meet, each
rising towards the other. The gradient does not vanish there, but a convex combination of the
gradients nearby does (0 is in Goldstein's ε-subdifferential), and no point nearby is higher.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity
from vlae_jax.posterior import GaussianPosterior
from vlae_jax.refinement import TOLERANCE, RefinementInfo

_NUM_ITERATIONS = 500
"""Iterations of the search for the shortest convex combination of gradients."""


class KinkCheck(NamedTuple):
    """Evidence from a small sphere around a point on whether it is a maximum at a kink."""

    least_decrement: Float[Array, ""]
    """The least ½ hᵀP⁻¹h over convex combinations h of the gradients, nats: an estimate, from these
    gradients, of the gain left nearby. At most the Newton decrement of the point."""
    rise: Float[Array, ""]
    """Difference between the highest log joint on the sphere and that at the center, nats; 0 if no
    point is higher."""


def check_kink(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: GaussianPosterior,
    *,
    num_points: int = 64,
    radius: float = 0.1,
) -> KinkCheck:
    """Check whether a convex combination of the gradients around a mode nearly vanishes.

    Where the quadratic model describes the log joint well, such a combination vanishes only within
    `radius` standard deviations of the maximum, thus at most ½ radius² nats below it.

    Args:
        key: Random key.
        log_joint: z of shape (latent,) → log p(x, z), a scalar in nats.
        posterior: The mode and the Cholesky factor of the precision, which defines distances here,
            as `infer_posterior` gives them.
        num_points: Points on the sphere, in pairs of opposite ones: an even number, more for more
            latent dimensions. Each costs one gradient.
        radius: Radius of the sphere, in standard deviations of the posterior.

    Returns:
        The `KinkCheck`; NaN where the factor is NaN.

    Raises:
        ValueError: While tracing, for an odd or too small `num_points` or a `radius` that is not
            positive.

    Gradients:
        None.

    References:
        Goldstein (1977), Optimization of Lipschitz continuous functions; Burke, Lewis and Overton
        (2005), A robust gradient sampling algorithm for nonsmooth, nonconvex optimization.
    """
    if num_points < 2 or num_points % 2:
        raise ValueError(f"num_points must be even and at least 2, got {num_points}")
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    mode, chol = jax.lax.stop_gradient(posterior)
    noise = jax.random.normal(key, (num_points // 2, mode.size), mode.dtype)
    noise = radius * noise / jnp.linalg.norm(noise, axis=1, keepdims=True)
    offsets = solve_triangular(chol, noise.T, lower=True, trans=1).T
    offsets = jnp.concatenate([jnp.zeros_like(mode)[None], offsets, -offsets])
    values, grads = jax.vmap(lambda offset: jax.value_and_grad(log_joint)(mode + offset))(offsets)
    whitened = solve_triangular(chol, grads.T, lower=True).T
    shortest = _shortest_combination(whitened)
    check = KinkCheck(0.5 * shortest @ shortest, jnp.max(values) - values[0])
    return jax.lax.stop_gradient(check)


def certify_kink(
    key: PRNGKeyArray,
    log_joint: LogDensity,
    posterior: GaussianPosterior,
    info: RefinementInfo,
    *,
    num_points: int = 64,
    radius: float = 0.1,
) -> RefinementInfo:
    """Distinguish a mode on a kink from a search that has not converged.

    Args:
        key: See `check_kink`.
        log_joint: See `check_kink`.
        posterior: See `check_kink`.
        info: The `RefinementInfo` of the search.
        num_points: See `check_kink`.
        radius: See `check_kink`.

    Returns:
        `info` with `is_kink` and `converged` set where the decrement is not small but the least
        decrement of nearby gradients is below 0.01 nats, no point nearby is higher by more than
        0.01 nats, and the precision is positive definite without a repair. An example then has
        either `info.is_mode` or `info.is_kink`, or neither if it has not converged. A missing
        certificate is no proof of failure: more points, or a larger radius, may find one.

    Raises:
        ValueError: While tracing, for arguments that `check_kink` rejects.

    Gradients:
        None.
    """
    check = check_kink(key, log_joint, posterior, num_points=num_points, radius=radius)
    stays = (check.least_decrement <= TOLERANCE) & (check.rise <= TOLERANCE)
    is_kink = stays & info.is_pd & ~info.converged
    return info._replace(converged=info.converged | is_kink, is_kink=is_kink)


def _shortest_combination(vectors: Float[Array, "points latent"]) -> Float[Array, " latent"]:
    """Approximate the shortest of the convex combinations by pairwise Frank-Wolfe steps.

    Each step shifts weight from the vector that lengthens the combination most to the one that
    shortens it most. The result is always a convex combination, so its length is an upper bound.

    References:
        Lacoste-Julien and Jaggi (2015), On the global linear convergence of Frank-Wolfe
        optimization variants.
    """
    # The vectors are scaled to order one, so that their squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(vectors))
    scale = jnp.where(largest > 0, largest, 1.0)
    scaled = vectors / scale
    with jax.default_matmul_precision("highest"):
        gram = scaled @ scaled.T
    shortest = jnp.argmin(jnp.diagonal(gram))
    weights = jax.nn.one_hot(shortest, len(gram), dtype=gram.dtype)

    def shift(_: Array, carry: Any) -> Any:
        weights, slope = carry
        gains = jnp.argmin(slope)
        loses = jnp.argmax(jnp.where(weights > 0, slope, -jnp.inf))
        curvature = gram[gains, gains] + gram[loses, loses] - 2 * gram[gains, loses]
        wanted = (slope[loses] - slope[gains]) / jnp.where(curvature > 0, curvature, 1.0)
        amount = jnp.clip(wanted, 0.0, weights[loses])
        weights = weights.at[gains].add(amount).at[loses].add(-amount)
        return weights, slope + amount * (gram[gains] - gram[loses])

    weights, _ = jax.lax.fori_loop(0, _NUM_ITERATIONS, shift, (weights, gram[shortest]))
    return scale * (weights @ scaled)
