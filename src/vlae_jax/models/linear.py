"""Linear decoders of maximum likelihood: probabilistic PCA and factor analysis.

Their posteriors are Gaussian and their log p(x) is known, which makes them the floor that a system
must beat, and the oracle that its measures are held to.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse.linalg import eigsh

from vlae_jax.errors import UserError

_MOST_ROUNDS = 10_000
_SMALL_GAIN = 1e-9
_DENSE_DIM = 64
"""Columns up to which all eigenvectors are found faster than a few of them."""


class LinearModel(NamedTuple):
    """The model p(x | z) = N(kernelᵀ z + bias, diag(variance)), p(z) = N(0, I), and its posterior.

    z is rotated so that the posterior's covariance is diagonal.
    """

    kernel: np.ndarray
    """Weights of the decoder, (latent, dim)."""
    bias: np.ndarray
    """Bias of the decoder, (dim,)."""
    variance: np.ndarray
    """Of the noise, (dim,): equal for all pixels in probabilistic PCA."""
    posterior_kernel: np.ndarray
    """Weights of the posterior mean, (x - bias) @ posterior_kernel for every x, (dim, latent)."""
    posterior_std: np.ndarray
    """Standard deviations of the posterior, equal for every x, (latent,)."""


def fit_ppca(xs: np.ndarray, latent: int, *, min_variance: float = 0.0) -> LinearModel:
    """Fit the model by the eigenvectors of the covariance, in float64.

    Args:
        xs: Examples, (n, dim).
        latent: Dimensions of z, below dim.
        min_variance: Floor of the noise variance.

    Raises:
        UserError: If `latent` is not below dim, or there are too few examples.

    References:
        Tipping and Bishop (1999), Probabilistic principal component analysis, equations 7, 8.
    """
    bias, covariance = _moments(xs, latent, "ppca", most=xs.shape[1] - 1)
    values, vectors = np.linalg.eigh(covariance)
    dim = len(bias)
    noise = max(float(values[: dim - latent].mean()), min_variance)
    values, vectors = values[: -latent - 1 : -1], vectors[:, : -latent - 1 : -1]
    scales = np.sqrt(np.maximum(values - noise, 0.0))
    return _with_posterior(scales[:, None] * vectors.T, bias, np.full(dim, noise))


def fit_factor_analysis(xs: np.ndarray, latent: int, *, min_variance: float = 0.0) -> LinearModel:
    """Fit the model with one noise variance a pixel, in float64.

    Given the variances, the best decoder has a closed form; given the decoder, the variances are
    what it leaves of the pixels' own. The two alternate until the mean log likelihood gains less
    than 1e-9 nats. A round needs the covariance alone, so that its time does not grow with the
    number of examples.

    Args:
        xs: Examples, (n, dim).
        latent: Dimensions of z, at most dim.
        min_variance: Floor of the noise variances.

    Raises:
        UserError: If `latent` is above dim, or there are too few examples.

    References:
        Barber (2012), Bayesian reasoning and machine learning, algorithm 21.1.
    """
    bias, covariance = _moments(xs, latent, "fa", most=xs.shape[1])
    own, dim = np.diag(covariance), len(bias)
    variance, before = np.maximum(own, min_variance), -np.inf
    start = np.full(dim, dim**-0.5)
    for _ in range(_MOST_ROUNDS):
        scale = np.sqrt(variance)
        scaled = covariance / np.outer(scale, scale)
        if dim <= max(_DENSE_DIM, latent):
            values, vectors = (part[..., -latent:] for part in np.linalg.eigh(scaled))
        else:
            values, vectors = eigsh(scaled, latent, v0=start, which="LA")
        excess = np.maximum(values - 1.0, 0.0)
        kernel = np.sqrt(excess)[:, None] * vectors.T * scale
        likelihood = -0.5 * (
            np.sum(np.log(variance)) + np.trace(scaled) + np.sum(np.log1p(excess) - excess)
        )
        if likelihood - before < _SMALL_GAIN:
            break
        before, variance = likelihood, np.maximum(own - np.sum(kernel**2, axis=0), min_variance)
    return _with_posterior(kernel, bias, variance)


def _with_posterior(kernel: np.ndarray, bias: np.ndarray, variance: np.ndarray) -> LinearModel:
    """Rotate z so that the posterior's precision, I + kernel Ψ⁻¹ kernelᵀ, is diagonal."""
    gram = (kernel / variance) @ kernel.T
    values, rotation = np.linalg.eigh(gram)
    values, kernel = values[::-1], rotation.T[::-1] @ kernel
    total = 1.0 + np.maximum(values, 0.0)
    return LinearModel(
        kernel=kernel,
        bias=bias,
        variance=variance,
        posterior_kernel=(kernel / variance).T / total,
        posterior_std=total**-0.5,
    )


def _moments(
    xs: np.ndarray, latent: int, method: str, *, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the examples, (dim,) and (dim, dim), for so many latent dimensions.

    Raises:
        UserError: If there are too many of these for the pixels or for the examples.
    """
    n, dim = xs.shape
    if not 1 <= latent <= most:
        raise UserError(
            f"{method} takes from 1 to {most} latent dimensions for {dim} pixels or columns, got "
            f"{latent}"
        )
    if latent >= n:
        raise UserError(f"{method} needs more images than latent dimensions, got {n} for {latent}")
    mean = xs.mean(axis=0, dtype=np.float64)
    centered = xs - mean
    return mean, centered.T @ centered / n
