"""Probabilistic PCA: the maximum-likelihood linear decoder, in closed form."""

from typing import NamedTuple

import numpy as np

from vlae_jax.errors import UserError


class LinearModel(NamedTuple):
    """The model p(x | z) = N(kernelᵀ z + bias, variance I), p(z) = N(0, I), and its posterior."""

    kernel: np.ndarray
    """Weights of the decoder, (latent, dim)."""
    bias: np.ndarray
    """Bias of the decoder, (dim,)."""
    variance: float
    posterior_kernel: np.ndarray
    """Weights of the posterior mean, (x - bias) @ posterior_kernel for every x, (dim, latent)."""
    posterior_std: np.ndarray
    """Standard deviations of the posterior, which is diagonal and equal for every x, (latent,)."""


def fit_ppca(xs: np.ndarray, latent: int, *, min_variance: float = 0.0) -> LinearModel:
    """Fit the model by the eigenvectors of the covariance, in float64.

    Args:
        xs: Examples, (n, dim).
        latent: Dimensions of z, below dim.
        min_variance: Floor of the noise variance.

    Raises:
        UserError: If `latent` is not below dim.

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis, equations 7, 8.
    """
    n, dim = xs.shape
    if not 1 <= latent < dim:
        raise UserError(f"ppca needs fewer latent dimensions than pixels, got {latent} of {dim}")
    bias = xs.mean(axis=0, dtype=np.float64)
    centered = xs - bias
    values, vectors = np.linalg.eigh(centered.T @ centered / n)
    noise = max(float(values[: dim - latent].mean()), min_variance)
    values, vectors = values[: -latent - 1 : -1], vectors[:, : -latent - 1 : -1]
    scales = np.sqrt(np.maximum(values - noise, 0.0))
    total = scales**2 + noise
    return LinearModel(
        kernel=scales[:, None] * vectors.T,
        bias=bias,
        variance=noise,
        posterior_kernel=vectors * (scales / total),
        posterior_std=np.sqrt(noise / total),
    )
