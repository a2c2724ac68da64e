"""Cholesky factors whose values and gradients stay finite for any precision matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlae_jax.expansions import Expansion, Quadratic


class Factor(NamedTuple):
    """A Cholesky factor with finite values and derivatives, whatever the precision was."""

    chol: Float[Array, "latent latent"]
    """Lower factor of the precision or of its repair; the identity where `is_finite` is false."""
    is_pd: Bool[Array, ""]
    """Whether the precision itself, before any repair, was positive definite."""
    is_finite: Bool[Array, ""]
    """Whether the precision or its repair could be factored."""


def factorize(
    expand: Expansion, z: Float[Array, " latent"], repair: Expansion | None = None
) -> tuple[Quadratic, Factor]:
    """Expand at `z` and factor the precision, or that of `repair` where the first is not PD."""
    quadratic = expand(z)
    chol, is_pd = _safe_factor(quadratic.precision)
    if repair is None:
        return quadratic, Factor(chol, is_pd, is_pd)
    repaired, is_repaired = _safe_factor(repair(z).precision)
    return quadratic, Factor(jnp.where(is_pd, chol, repaired), is_pd, is_pd | is_repaired)


def _safe_factor(
    precision: Float[Array, "latent latent"],
) -> tuple[Float[Array, "latent latent"], Bool[Array, ""]]:
    chol, is_pd = _safe_cholesky(0.5 * (precision + precision.T))
    return chol, is_pd > 0


def _cholesky(matrix: Float[Array, "latent latent"]) -> Float[Array, "latent latent"]:
    return jnp.linalg.cholesky(matrix, symmetrize_input=False)


@jax.custom_jvp
def _safe_cholesky(
    matrix: Float[Array, "latent latent"],
) -> tuple[Float[Array, "latent latent"], Float[Array, ""]]:
    """Return the factor and 1, or, where there is none, the identity without gradient and 0.

    A plain Cholesky of an indefinite matrix gives NaN, and NaN gradients even behind a `where`.
    The flag is a float because `jax.shard_map` does not accept symbolic zero tangents of booleans.
    """
    chol = _cholesky(matrix)
    is_pd = jnp.all(jnp.isfinite(chol))
    safe = jnp.where(is_pd, chol, jnp.eye(len(matrix), dtype=matrix.dtype))
    return safe, is_pd.astype(matrix.dtype)


@_safe_cholesky.defjvp
def _safe_cholesky_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (matrix,), (matrix_dot,) = primals, tangents
    chol, is_pd = _safe_cholesky(matrix)
    safe = jnp.where(is_pd > 0, matrix, jnp.eye(len(matrix), dtype=matrix.dtype))
    _, chol_dot = jax.jvp(_cholesky, (safe,), (jnp.where(is_pd > 0, matrix_dot, 0.0),))
    return (chol, is_pd), (chol_dot, jnp.zeros_like(is_pd))
