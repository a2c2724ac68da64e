"""Examples to the vectors a model sees, with the log-Jacobian that leads back to their units.

Everything takes one example; `jax.vmap` over examples is the caller's business.
"""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vlae_jax.data.stored import StoredImages, value_counts

Kind = Literal["logit", "raw", "static_binary", "dynamic_binary", "standardize", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PIXEL_KINDS = frozenset({"logit", "raw", "static_binary", "dynamic_binary"})
"""Kinds that take pixels alone."""

_EVALUATION_SEED = 20190613  # an arbitrary number, fixed so that an evaluation can be repeated


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "scale", "variance", "average"],
    meta_fields=["kind", "levels", "logit_lambda", "image_shape", "incomplete"],
)
@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Maps one example to a vector x of shape (dim,), and back. A pytree.

    An example has the shape `image_shape`, of any rank: (height, width, channel) for images, (dim,)
    for the row of a table.

    With y = (pixel + u) / levels in (0, 1), u uniform, and p = pixel / (levels - 1):

    - logit: x = (logit(λ + (1 - 2λ) y) - mean) / scale.
    - raw: x = p - mean.
    - static_binary, dynamic_binary: x is 0 or 1, 1 with probability p. The two differ only in the
      keys the caller gives: for an image the same each time (`fixed_keys`), or fresh at each step.

    For measurements:

    - standardize: x = (entry - mean) / scale, in a table by the mean and standard deviation of each
      column, in images by the mean of each entry and one standard deviation for all.
    - none: x is the entry itself. Also for pixels, as counts from 0 to levels - 1.

    `fit_preprocessor` makes one.
    """

    mean: Array
    """Subtracted from the pixels, (dim,): their training mean; zeros for binary images."""
    scale: Array
    """Divides the pixels, a scalar: one standard deviation for all of them, or 1. With standardize
    a vector (dim,)."""
    variance: Array
    """Variance of x over the training images and the noise, (dim,)."""
    average: Array
    """Mean of x over the training images and the noise, (dim,): zeros where x is centered."""
    kind: Kind
    levels: int
    """How many values a pixel may take; 0 for data that are no pixels."""
    logit_lambda: float
    image_shape: tuple[int, ...]
    incomplete: bool = False
    """Whether NaN marks missing entries: they are NaN in x too, and not in the log-Jacobian."""

    @property
    def binary(self) -> bool:
        """Whether x is 0 or 1."""
        return self.kind in ("static_binary", "dynamic_binary")

    @property
    def is_table(self) -> bool:
        """Whether an example is the row of a table."""
        return len(self.image_shape) == 1

    @property
    def dim(self) -> int:
        """Pixels times channels, or columns."""
        return math.prod(self.image_shape)

    def apply(self, key: Array, pixels: Array) -> tuple[Array, Array]:
        """Turn one image into x, with the log-Jacobian of the map.

        Args:
            key: For the dequantization noise or the Bernoulli draw; raw does not use it.
            pixels: `image_shape`, 0 to levels - 1.

        Returns:
            x, (dim,), in the default floating type; and log|dx/dy|, a scalar in nats, summed over
            the entries that are there. The latter is 0 where there is no dequantized pixel y: raw,
            none and binary.

        Raises:
            ValueError: If `pixels` is not of shape `image_shape`.
        """
        if pixels.shape != self.image_shape:
            raise ValueError(
                f"pixels must have shape {self.image_shape}, got {pixels.shape}; vmap the batch."
            )
        dtype = jnp.result_type(float)
        flat = jnp.asarray(pixels, dtype).reshape(-1)
        if self.kind == "logit":
            return self._logit(_open_uniform(key, self.dim).astype(dtype), flat)
        if self.kind == "standardize":
            return (flat - self.mean) / self.scale, self._sum(-jnp.log(self.scale), flat)
        if self.kind == "none":
            return flat, jnp.zeros((), dtype)
        proportion = flat / (self.levels - 1)
        if self.binary:
            drawn = jax.random.bernoulli(key, proportion).astype(dtype)
            proportion = jnp.where(jnp.isnan(flat), flat, drawn) if self.incomplete else drawn
        return proportion - self.mean, jnp.zeros((), dtype)

    def _logit(self, noise: Array, pixels: Array) -> tuple[Array, Array]:
        # s and 1 - s, each from its own end: subtracting would leave 1 - s one digit at λ = 1e-6.
        below, above = pixels + noise, (self.levels - 1 - pixels) + (1 - noise)
        stretch = 1 - 2 * self.logit_lambda
        log_s = jnp.log(self.logit_lambda + stretch * below / self.levels)
        log_rest = jnp.log(self.logit_lambda + stretch * above / self.levels)
        x = (log_s - log_rest - self.mean) / self.scale
        if self.incomplete:
            each = math.log(stretch) - log_s - log_rest - jnp.log(self.scale)
            return x, self._sum(each, pixels)
        log_det = jnp.sum(math.log(stretch) - log_s - log_rest) - self.dim * jnp.log(self.scale)
        return x, log_det

    def log_units(self, observed: Array | None = None) -> Array | None:
        """Nats to add to log p(x) for the density of measurements in their own units.

        Args:
            observed: Mask of the entries that count, booleans (dim,); all by default.

        Returns:
            A scalar; None where densities are those of x.
        """
        if self.kind != "standardize":
            return None
        return jnp.sum(-jnp.log(self.scale), where=observed)

    def _sum(self, terms: Array, entries: Array) -> Array:
        """The sum of the terms of the entries that are there."""
        return jnp.sum(terms, where=~jnp.isnan(entries) if self.incomplete else None)

    def to_pixels(self, x: Array) -> Array:
        """The example of one x (dim,): `image_shape`, for pixels in [0, 1], clipped.

        For logit the dequantized pixels y; for binary images x may be a probability. Measurements
        are in their own units.
        """
        pixels = x * self.scale + self.mean
        if not self.levels:
            return pixels.reshape(self.image_shape)
        if self.kind == "none":
            pixels = pixels / (self.levels - 1)
        if self.kind == "logit":
            pixels = (jax.nn.sigmoid(pixels) - self.logit_lambda) / (1 - 2 * self.logit_lambda)
        return jnp.clip(pixels, 0, 1).reshape(self.image_shape)

    def bits_per_dim(self, log_prob: Array, log_det: Array) -> Array | None:
        """Bits per dimension of the original pixels, from nats per image in model space.

        log p(x) + log|dx/dy| is the log density of the dequantized pixels y in [0, 1]^dim, where a
        pixel value is a cell of side 1 / levels. On average over the noise this bounds from above
        the bits that the integer pixels cost. A uniform density gives log2(levels).

        None where there is no such number. raw: a density at undequantized points can be made as
        high as one likes, by narrow peaks on the values that occur. binary: the model gives
        probabilities of the binary images, not of the original pixels.

        Args:
            log_prob: log p(x) in nats, any shape.
            log_det: From `apply`, of the same shape.
        """
        if self.kind != "logit":
            return None
        return math.log2(self.levels) - (log_prob + log_det) / (self.dim * math.log(2))


def fit_preprocessor(
    images: np.ndarray | StoredImages,
    *,
    kind: Kind,
    levels: int = 256,
    logit_lambda: float = 1e-6,
    standardize: bool = True,
    continuous: np.ndarray | None = None,
    incomplete: bool = False,
) -> Preprocessor:
    """Fit a preprocessor to training examples.

    Means and variances are exact expectations over the noise, in float64, so no seed enters; nor
    does the order of the images, or whether they are in memory. Missing entries do not count.

    Args:
        images: Pixels, uint8 (n, height, width, channel), 0 to levels - 1, or floats of those
            values with NaN for missing pixels; with `levels` 0 measurements, floats (n, dim) or (n,
            height, width, channel).
        kind: See `Preprocessor`.
        levels: How many values a pixel may take; 0 for measurements.
        logit_lambda: λ, between 0 and 0.5; logit only.
        standardize: Divide by the root of the mean variance of the pixels; logit only.
        continuous: With kind standardize, the entries to standardize, booleans (dim,); all by
            default. The others stay as they are.
        incomplete: Whether examples may have missing entries; then they are NaN in x.

    Raises:
        ValueError: If the kind is not known or does not fit, or the examples are not as described
            or there are none.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if not levels:
        fitted = _fit_measurements(images, kind, continuous, incomplete)
        return dataclasses.replace(fitted, logit_lambda=logit_lambda)
    is_masked = incomplete and images.dtype.kind == "f"
    if (
        (images.dtype != np.uint8 and not is_masked)
        or len(images.shape) != 4
        or math.prod(images.shape) == 0
    ):
        raise ValueError(
            f"images must be uint8 (n, height, width, channel), got {images.dtype} {images.shape}."
        )
    if kind == "standardize":
        raise ValueError("standardize is for measurements; of pixels take logit, raw or none.")
    counts = value_counts(images)
    if (highest := np.flatnonzero(counts.any(axis=0))[-1]) >= levels:
        raise ValueError(f"pixels must lie below levels={levels}, got {highest}.")
    # A pixel that is missing in every image has neither mean nor variance, and needs none.
    shares = counts[:, :levels] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mean, square = (shares @ table for table in _moments(kind, levels, logit_lambda))
    # Rounding can leave a constant pixel's variance just below 0.
    variance = np.maximum(square - mean**2, 0)
    scale = math.sqrt(variance.mean()) if kind == "logit" and standardize else 1.0
    shift = mean if kind in ("logit", "raw") else np.zeros_like(mean)
    return Preprocessor(
        mean=jnp.asarray(shift, float),
        scale=jnp.asarray(scale, float),
        variance=jnp.asarray(variance / scale**2, float),
        average=jnp.asarray(mean - shift, float),
        kind=kind,
        levels=levels,
        logit_lambda=logit_lambda,
        image_shape=images.shape[1:],
        incomplete=incomplete,
    )


def _fit_measurements(
    examples: np.ndarray | StoredImages,
    kind: Kind,
    continuous: np.ndarray | None,
    incomplete: bool,
) -> Preprocessor:
    if kind in PIXEL_KINDS:
        raise ValueError(f"{kind} is for pixels; of measurements take standardize or none.")
    if not isinstance(examples, np.ndarray) or examples.dtype.kind != "f" or not examples.size:
        raise ValueError(f"examples must be floats, got {examples.dtype} {examples.shape}.")
    flat = examples.reshape(len(examples), -1)
    mean = np.asarray(np.nanmean(flat, 0, np.float64))
    variance = np.asarray(np.nanvar(flat, 0, np.float64))
    shift, scale = np.zeros_like(mean), np.ones_like(mean)
    if kind == "standardize":
        which = np.ones(mean.shape, bool) if continuous is None else continuous
        one = variance if examples.ndim == 2 else np.full_like(variance, variance.mean())
        shift, scale = np.where(which, mean, 0.0), np.where(which, np.sqrt(one), 1.0)
    return Preprocessor(
        mean=jnp.asarray(shift, float),
        scale=jnp.asarray(scale if kind == "standardize" else 1.0, float),
        variance=jnp.asarray(variance / scale**2, float),
        average=jnp.asarray((mean - shift) / scale, float),
        kind=kind,
        levels=0,
        logit_lambda=0.0,
        image_shape=examples.shape[1:],
        incomplete=incomplete,
    )


def fixed_keys(n: int) -> Array:
    """Keys of shape (n,) from a fixed seed; the i-th one does not depend on `n`.

    They serve validation and test noise and static binary images, so that an evaluation can be
    repeated.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(_EVALUATION_SEED), jnp.arange(n)
    )


def _open_uniform(key: Array, dim: int) -> Array:
    # JAX draws multiples of 2^-23 in [0, 1). Half a step more is exact in float32, never 0 or 1.
    return jax.random.uniform(key, (dim,), jnp.float32) + 2.0**-24


def _moments(kind: Kind, levels: int, logit_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x and of x² given the pixel's value, before centering: (levels,) each."""
    if kind == "logit":
        return _logit_moments(levels, logit_lambda)
    if kind == "none":
        return np.arange(levels, dtype=float), np.arange(levels, dtype=float) ** 2
    proportion = np.arange(levels) / (levels - 1)
    return proportion, proportion**2 if kind == "raw" else proportion


def _logit_moments(levels: int, logit_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    # Gauss-Legendre over l = logit(s), not over the noise: smooth there, so exact to rounding.
    edges = logit_lambda + (1 - 2 * logit_lambda) * np.arange(levels + 1) / levels
    edges = np.log(edges) - np.log(edges[::-1])  # 1 - s is s read backwards
    node, weight = np.polynomial.legendre.leggauss(64)
    low, high = edges[:-1, None], edges[1:, None]
    logit = (low + high) / 2 + (high - low) / 2 * node
    mass = weight * (high - low) / 2 / (4 * np.cosh(logit / 2) ** 2)  # ds = sigmoid'(l) dl
    mass *= levels / (1 - 2 * logit_lambda)
    return (mass * logit).sum(axis=1), (mass * logit**2).sum(axis=1)
