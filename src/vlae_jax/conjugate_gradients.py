"""Conjugate gradients that stop once a bound on the missing Newton decrement is small."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


class Solved(NamedTuple):
    """The result of `solve_scaled`."""

    solution: Float[Array, " latent"]
    is_solved: Bool[Array, ""]
    """Whether the residual has become as small as wanted."""
    num_products: Int[Array, ""]
    """Number of products with P."""
    square: Float[Array, ""]
    """Squared norm of the first residual."""
    lengths: Float[Array, " most"]
    """Length α of each step; 1 where none was made."""
    ratios: Float[Array, " most"]
    """Ratio β of the squared residuals after and before each step; 0 for the last one."""


def solve_scaled(
    times: Callable[[Float[Array, " latent"]], Float[Array, " latent"]],
    rhs: Float[Array, " latent"],
    *,
    scale: Float[Array, " latent"],
    tolerance: float,
    max_products: int,
    guess: tuple[Float[Array, " latent"], Float[Array, " latent"]] | None = None,
) -> Solved:
    """Solve P v = rhs by conjugate gradients, preconditioned by a guess of P⁻¹'s diagonal.

    The loop ends once the residual is at most `tolerance` times rhs, both in the norm √(rᵀ S r) of
    S = diag(scale), after `max_products` products, or at a direction of no positive curvature. A
    right-hand side of zeros needs no product.

    Args:
        times: v → P v, for a symmetric positive definite P.
        rhs: The right-hand side, (latent,).
        scale: Positive, (latent,).
        tolerance: Size of the residual relative to that of `rhs`.
        max_products: The largest number of products.
        guess: A vector s and its product P s; the search starts at the best multiple of s. By
            default at zeros.

    References:
        Saad (2003), Iterative methods for sparse linear systems, algorithm 9.1.
    """
    start, residual = jnp.zeros_like(rhs), rhs
    if guess is not None:
        vector, product = guess
        curvature = vector @ product
        share = jnp.where(curvature > 0, vector @ rhs / jnp.where(curvature > 0, curvature, 1), 0)
        start, residual = share * vector, rhs - share * product
    square = residual @ (scale * residual)
    limit = tolerance**2 * (rhs @ (scale * rhs))
    none = jnp.zeros(max_products, rhs.dtype) + 0 * square
    first = _Scaled(start, residual, scale * residual, square, square > limit, 0, none + 1, none)

    def goes_on(state: _Scaled) -> Array:
        return state.goes_on

    def advance(state: _Scaled) -> _Scaled:
        product = times(state.search)
        curvature = state.search @ product
        is_convex = curvature > 0
        length = jnp.where(is_convex, state.square / jnp.where(is_convex, curvature, 1.0), 0.0)
        residual = state.residual - length * product
        descent = scale * residual
        square = residual @ descent
        ratio = square / state.square
        goes_on = is_convex & (square > limit) & (state.steps + 1 < max_products)
        return _Scaled(
            solution=state.solution + length * state.search,
            residual=residual,
            search=descent + ratio * state.search,
            square=square,
            goes_on=goes_on,
            steps=state.steps + 1,
            lengths=state.lengths.at[state.steps].set(jnp.where(is_convex, length, 1.0)),
            ratios=state.ratios.at[state.steps].set(jnp.where(goes_on, ratio, 0.0)),
        )

    last = jax.lax.while_loop(goes_on, advance, first)
    return Solved(
        solution=last.solution,
        is_solved=last.square <= limit,
        num_products=jnp.asarray(last.steps),
        square=square,
        lengths=last.lengths,
        ratios=last.ratios,
    )


class _Scaled(NamedTuple):
    """The state of preconditioned conjugate gradients."""

    solution: Float[Array, " latent"]
    residual: Float[Array, " latent"]
    search: Float[Array, " latent"]
    square: Float[Array, ""]
    """Squared norm of the residual."""
    goes_on: Bool[Array, ""]
    steps: int | Int[Array, ""]
    lengths: Float[Array, " most"]
    ratios: Float[Array, " most"]


def log_det_by_solve(solved: Solved, scale: Float[Array, " latent"]) -> Float[Array, ""]:
    """Estimate log det P from the solution of P v = b for a random b of mean 0 and covariance P.

    With S = diag(scale), A = S^½ P S^½ and c = S^½ b, E[cᵀ A⁻¹ log(A) c] = tr log A =
    log det P + Σ log scale. The steps of conjugate gradients from zeros are those of Lanczos'
    iteration from c, and give the quadratic form by Gauss quadrature. So the estimate costs nothing
    beside the solution, and varies the less the better `scale` is.

    Args:
        solved: The result of `solve_scaled` without a `guess`.
        scale: The scale it was given, (latent,).

    Returns:
        The estimate; unbiased but for what the quadrature misses, which falls with the tolerance.

    References:
        Golub and Meurant (2010), Matrices, moments and quadrature; Ubaru, Chen and Saad (2017),
        Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, for probes of covariance I.
    """
    lengths, ratios = solved.lengths, solved.ratios
    before = jnp.concatenate([jnp.zeros_like(ratios[:1]), (ratios / lengths)[:-1]])
    diagonal, squares = 1 / lengths + before, ratios / lengths**2
    # log(λ) / λ = ∫ 1 / (λ + eˣ) - 1 / (λ (1 + eˣ)) dx; the trapezoidal rule converges
    # exponentially, here to 1e-6.
    shifts = jnp.exp(jnp.arange(-_NODES, _NODES + 1).astype(scale.dtype))

    def resolvent(shift: Array) -> Array:
        """The first entry of the inverse of the shifted tridiagonal matrix, by fractions."""
        below = jnp.ones_like(shift)
        for j in reversed(range(len(lengths))):
            below = diagonal[j] + shift - squares[j] / below
        return 1 / below

    terms = resolvent(shifts) - resolvent(jnp.zeros_like(shifts[:1])) / (1 + shifts)
    return solved.square * jnp.sum(terms) - jnp.sum(jnp.log(scale))


_NODES = 20
"""Integer points x of the trapezoidal rule on each side of 0."""
