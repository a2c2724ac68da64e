"""Conjugate gradients that stop once a bound on the missing Newton decrement is small."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_NEGLIGIBLE = 1e-2
"""Newton decrement, nats, that counts as converged: the solver need not resolve a smaller one."""


def conjugate_gradients(
    times: Callable[[Float[Array, " latent"]], Float[Array, " latent"]],
    rhs: Float[Array, " latent"],
    *,
    shortfall: float,
) -> Float[Array, " latent"]:
    """Solve P v = rhs until at most a given share of the decrement ½ rhsᵀP⁻¹rhs is missing.

    The missing part is bounded from above by Gauss-Radau quadrature, from the coefficients of the
    iteration and from 1 as a lower bound of the eigenvalues of P. If P has smaller eigenvalues, the
    loop may end early; v is still a direction of ascent. If P shows negative curvature, the loop
    ends with the v found so far; in the first iteration, with rhs divided by the absolute value of
    that curvature.

    Args:
        times: v → P v.
        rhs: The right-hand side, (latent,).
        shortfall: The share of the decrement that may be missing. A missing part of this share of
            0.01 nats is always accepted.

    References:
        Meurant and Tichý (2013), On computing quadrature-based bounds for the A-norm of the error
        in conjugate gradients, for the bound; Nash (2000) for truncation.
    """
    one = jnp.ones_like(rhs[0])
    square = rhs @ rhs
    zero = jnp.zeros_like(rhs)
    first = _Krylov(zero, rhs, rhs, square, one, square > 0, 0 * square)

    def advance(state: _Krylov) -> _Krylov:
        product = times(state.search)
        curvature = state.search @ product
        is_convex = curvature > 0
        size = state.square / jnp.where(curvature == 0, 1.0, jnp.abs(curvature))
        solution = state.solution + size * state.search
        residual = state.residual - size * product
        square = residual @ residual
        ratio = square / state.square
        excess = jnp.maximum(state.radau - size, jnp.finfo(rhs.dtype).tiny)
        radau = excess / (excess + ratio)
        missing = 0.5 * radau * square
        enough = missing <= jnp.maximum(shortfall * 0.5 * (rhs @ solution), _NEGLIGIBLE * shortfall)
        steps = state.steps + 1
        go_on = is_convex & ~enough & (steps < 2 * rhs.size)
        keep = is_convex | ((state.steps == 0) & jnp.isfinite(size))
        return _Krylov(
            solution=jnp.where(keep, solution, state.solution),
            residual=residual,
            search=residual + ratio * state.search,
            square=square,
            radau=radau,
            go_on=go_on,
            steps=steps,
        )

    return jax.lax.while_loop(lambda state: state.go_on, advance, first).solution


class _Krylov(NamedTuple):
    """The state of conjugate gradients."""

    solution: Float[Array, " latent"]
    residual: Float[Array, " latent"]
    search: Float[Array, " latent"]
    square: Float[Array, ""]
    """Squared norm of the residual."""
    radau: Float[Array, ""]
    """Coefficient whose product with `square` bounds the squared error in the norm of P."""
    go_on: Bool[Array, ""]
    steps: Float[Array, ""]
