"""Fisher information in a decoder's output, as diagonals and blocks: products and noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Information = Float[Array, "..."] | tuple[Float[Array, "..."], ...]
"""Fisher information in a decoder's output: a diagonal, blocks, or a tuple of these for parts."""


def checked_information(information: Information, out: int) -> tuple[Array, ...]:
    """The parts of an information for `out` outputs.

    Raises:
        ValueError: If its shape does not fit.
    """
    parts = information if isinstance(information, tuple) else (information,)
    sizes = [_outputs(part) for part in parts]
    if sum(sizes) != out or any(
        part.ndim not in (1, 3) or (part.ndim == 3 and len(part) != part.shape[1]) for part in parts
    ):
        raise ValueError(
            f"fisher must return its diagonal, {(out,)}, or blocks (outputs, outputs, dim) with "
            f"outputs × dim = {out}, got {' and '.join(str(part.shape) for part in parts)}"
        )
    return parts


def _outputs(part: Array) -> int:
    """How many outputs a diagonal, or blocks, of the information belong to."""
    return part.shape[0] * part.shape[-1] if part.ndim == 3 else part.size


def weigh(information: tuple[Array, ...], tangent: Float[Array, " out"]) -> Float[Array, " out"]:
    """The product of an information with a vector, (out,)."""
    start, weighted = 0, []
    for part in information:
        own = tangent[start : start + _outputs(part)]
        start += own.size
        if part.ndim == 1:
            weighted.append(part * own)
        else:
            weighted.append(jnp.sum(part * own.reshape(len(part), -1), axis=1).ravel())
    return weighted[0] if len(weighted) == 1 else jnp.concatenate(weighted)


def diagonal_noise(key: PRNGKeyArray, times: Callable[[Array], Array], like: Any) -> Array:
    """Draw normals with the covariance that `times` multiplies by; NaN if it is not diagonal."""
    normals = jax.random.normal(key, like.shape, like.dtype)
    diagonal = times(jnp.ones_like(normals))
    error = jnp.max(jnp.abs(times(normals) - diagonal * normals), initial=0.0)
    allowed = 1e3 * jnp.finfo(normals.dtype).eps * jnp.max(jnp.abs(diagonal), initial=0.0)
    return jnp.where(error <= allowed, jnp.sqrt(diagonal) * normals, jnp.nan)
