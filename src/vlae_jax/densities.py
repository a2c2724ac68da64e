"""Scalar log densities of one example, in nats and summed over dimensions.

Those of counts are in `counts`. All here but two are concave in the decoder's output, so their
Gauss-Newton precision is always positive definite. For the two that are not, a function with the
suffix `_fisher` gives the diagonal of the Fisher information, to be passed to
`gauss_newton_expansion(..., fisher=...)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Bool, Float, Int, Num

LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]
"""A point → its log density in nats, a scalar. Closes over everything else."""


def standard_normal(z: Float[Array, " latent"]) -> Float[Array, ""]:
    """Log density of N(0, I) at `z`, in nats: the prior of every shipped model."""
    return -0.5 * (z @ z + z.size * math.log(2 * math.pi))


def multivariate_normal(
    z: Float[Array, " latent"],
    mean: Float[Array, " latent"],
    chol_precision: Float[Array, "latent latent"],
) -> Float[Array, ""]:
    """Log density of N(mean, (L Lᵀ)⁻¹) at `z`, in nats; for any Gaussian prior, for example.

    Args:
        z: Where to evaluate, shape (latent,).
        mean: Shape (latent,).
        chol_precision: Lower triangular L with a positive diagonal, L Lᵀ the precision, as in
            `GaussianPosterior`. For a covariance C, `jnp.linalg.cholesky(jnp.linalg.inv(C))`.
    """
    whitened = chol_precision.T @ (z - mean)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(chol_precision)))
    return half_log_det - 0.5 * (whitened @ whitened + z.size * math.log(2 * math.pi))


def gaussian_mixture(
    z: Float[Array, " latent"],
    logits: Float[Array, " component"],
    means: Float[Array, "component latent"],
    log_stds: Float[Array, "component latent"],
) -> Float[Array, ""]:
    """Log density of a mixture of Gaussians with diagonal covariances at `z`, in nats.

    It is not concave between components that lie apart. `gaussian_mixture_precision` gives a
    curvature that is positive definite everywhere.

    Args:
        z: Where to evaluate, shape (latent,).
        logits: Unnormalized log weights of the components, (component,).
        means: Means of the components, (component, latent).
        log_stds: Log standard deviations of the components, (component, latent).
    """
    return jax.nn.logsumexp(_joint_with_components(z, logits, means, log_stds))


def gaussian_mixture_precision(
    z: Float[Array, " latent"],
    logits: Float[Array, " component"],
    means: Float[Array, "component latent"],
    log_stds: Float[Array, "component latent"],
) -> Float[Array, "latent latent"]:
    """Mean precision of a mixture's components, weighted by how likely `z` belongs to each.

    The quadratic with this curvature and the slope of the log density at z is nowhere above the log
    density: a step that maximizes it never loses. It is minus the Hessian without the covariance of
    the components' slopes, as in the EM algorithm.

    Args:
        z: Where to evaluate, shape (latent,).
        logits: Unnormalized log weights of the components, (component,).
        means: Means of the components, (component, latent).
        log_stds: Log standard deviations of the components, (component, latent).

    References:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM
        algorithm.
    """
    responsibility = jax.nn.softmax(_joint_with_components(z, logits, means, log_stds))
    return jnp.diag(responsibility @ jnp.exp(-2 * log_stds))


def _joint_with_components(
    z: Float[Array, " latent"],
    logits: Float[Array, " component"],
    means: Float[Array, "component latent"],
    log_stds: Float[Array, "component latent"],
) -> Float[Array, " component"]:
    """Log density of `z` and each component of a mixture together, nats."""
    given = jax.vmap(lambda mean, log_std: gaussian(z, mean, 2 * log_std))(means, log_stds)
    return jax.nn.log_softmax(logits) + given


def gaussian(
    x: Float[Array, " dim"], mean: Float[Array, " dim"], log_var: Float[Array, "..."]
) -> Float[Array, ""]:
    """Log density of N(mean, diag(exp(log_var))) at `x`, in nats.

    Args:
        x: Where to evaluate, shape (dim,).
        mean: Shape (dim,).
        log_var: Log variance; a scalar when all dimensions share it, or shape (dim,).
    """
    log_var = jnp.broadcast_to(log_var, mean.shape)
    scaled = (x - mean) ** 2 * jnp.exp(-log_var)
    return -0.5 * jnp.sum(scaled + log_var + math.log(2 * math.pi))


def bernoulli(
    x: Num[Array, " dim"] | Bool[Array, " dim"], logits: Float[Array, " dim"]
) -> Float[Array, ""]:
    """Log probability of the binary vector `x` under independent Bernoullis, in nats.

    Args:
        x: Zeros and ones, shape (dim,), of any dtype.
        logits: Log odds of a one, shape (dim,). Saturated logits keep their gradient.
    """
    x = jnp.asarray(x, logits.dtype)
    return jnp.sum(x * logits - jax.nn.softplus(logits))


def categorical(x: Int[Array, "..."], logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Log probability of `x`, each entry one of several classes, in nats.

    Args:
        x: Class indices 0, 1, ..., of any integer type and any shape: (dim,), or () for one label.
        logits: Unnormalized log probabilities, the classes of an entry on the last axis: the shape
            of `x` and then (classes,); or the same numbers flat, as a decoder gives them.

    Returns:
        A scalar; NaN if an index is not that of a class.

    Raises:
        ValueError: While tracing, if `x` is not of integers or `logits` does not fit its shape.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"x must hold integer class indices, got {x.dtype}; argmax a one-hot x")
    classes = logits.size // max(x.size, 1)
    if classes < 2 or logits.shape not in ((*x.shape, classes), (x.size * classes,)):
        raise ValueError(
            f"logits must have shape {(*x.shape, 'classes')} with at least 2 classes, or be flat, "
            f"got {logits.shape}"
        )
    log_probs = jax.nn.log_softmax(logits.reshape(*x.shape, classes))
    index = x.astype(jnp.int32)  # a narrow integer type may not hold the value of `classes`
    # A negative index would count from the end; one too large is filled with NaN.
    index = jnp.where(index < 0, classes, index)
    return jnp.sum(jnp.take_along_axis(log_probs, index[..., None], axis=-1, mode="fill"))


def discretized_logistic(
    x: Num[Array, " dim"],
    mean: Float[Array, " dim"],
    log_scale: Float[Array, "..."],
    *,
    low: float = 0.0,
    high: float = 1.0,
    levels: int = 256,
) -> Float[Array, ""]:
    """Log probability of pixels under logistic distributions rounded to the pixels' levels, nats.

    A level takes the probability between the midpoints to its neighbors; the lowest and the
    highest also take the tails beyond them, so that all levels sum to one. Log-concave in `mean`.

    Args:
        x: Pixels on `levels` equally spaced values from `low` to `high`, shape (dim,).
        mean: Means of the logistic distributions, in the units of x, shape (dim,).
        log_scale: Log of their scale s, which is √3/π standard deviations; a scalar or (dim,).
        low: Value of the lowest level.
        high: Value of the highest level: 1 for pixels in [0, 1], 255 for unscaled bytes.
        levels: Number of levels, at least 2.

    Returns:
        A scalar; NaN if a pixel lies outside of all bins, as with pixels in other units.

    Raises:
        ValueError: While tracing, if `high` is not above `low` or there are fewer than two levels.

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow;
        Salimans et al. (2017), PixelCNN++.
    """
    if not (levels >= 2 and high > low):
        raise ValueError(
            f"levels must be at least 2 and high above low, got {levels=}, {low=}, {high=}"
        )
    x = jnp.asarray(x, mean.dtype)
    width = (high - low) / (levels - 1)
    precision = jnp.exp(-log_scale)
    below = (x - 0.5 * width - mean) * precision
    above = (x + 0.5 * width - mean) * precision
    # σ(above) - σ(below) = σ(above) σ(-below) (1 - exp(below - above)), which never cancels.
    is_lowest, is_highest = x < low + 0.5 * width, x > high - 0.5 * width
    log_prob = (
        jnp.where(is_highest, 0.0, jax.nn.log_sigmoid(above))
        + jnp.where(is_lowest, 0.0, jax.nn.log_sigmoid(-below))
        + jnp.where(is_lowest | is_highest, 0.0, jnp.log(-jnp.expm1(-width * precision)))
    )
    is_pixel = (x > low - 0.5 * width) & (x < high + 0.5 * width)
    return jnp.sum(jnp.where(is_pixel, log_prob, jnp.nan))


def gaussian_heteroscedastic(
    x: Float[Array, " dim"], eta: Float[Array, " twice_dim"]
) -> Float[Array, ""]:
    """Log density of N(mean, diag(exp(log_var))) at `x`, both from the decoder, in nats.

    It is not concave in `eta`: minus its Hessian is indefinite wherever a pixel differs from its
    mean.

    Args:
        x: Where to evaluate, shape (dim,).
        eta: All means, then all log variances, shape (2 dim,).

    Raises:
        ValueError: While tracing, if `eta` is not twice as long as `x`.
    """
    if eta.shape != (2 * x.size,):
        raise ValueError(
            f"eta must hold a mean and a log variance a pixel, {(2 * x.size,)}, got {eta.shape}"
        )
    mean, log_var = jnp.split(eta, 2)
    return gaussian(x, mean, log_var)


def gaussian_heteroscedastic_fisher(
    eta: Float[Array, " twice_dim"],
) -> Float[Array, " twice_dim"]:
    """Fisher information of `gaussian_heteroscedastic` in `eta`, diagonal: exp(-log_var), then ½.

    Args:
        eta: All means, then all log variances, shape (2 dim,).
    """
    _, log_var = jnp.split(eta, 2)
    return jnp.concatenate([jnp.exp(-log_var), jnp.full_like(log_var, 0.5)])


def student_t(
    x: Float[Array, " dim"],
    loc: Float[Array, " dim"],
    log_scale: Float[Array, "..."],
    df: float | Float[Array, "..."],
) -> Float[Array, ""]:
    """Log density of independent Student-t variables at `x`, in nats; its tails are heavy.

    It is not concave in `loc`, but convex where `loc` is more than √df scales from x.

    Args:
        x: Where to evaluate, shape (dim,).
        loc: Centers, shape (dim,).
        log_scale: Log of the scale, which multiplies a standard t; a scalar or shape (dim,).
        df: Degrees of freedom, positive; a scalar or shape (dim,).
    """
    scaled = (x - loc) * jnp.exp(-log_scale) / jnp.sqrt(df)
    # log(1 + s²) is computed from s or 1/s, whichever is small, so that neither the value nor a
    # derivative overflows.
    is_far = jnp.abs(scaled) > 1
    far = jnp.where(is_far, scaled, 1.0)
    near = jnp.where(is_far, 1 / far, scaled)
    log1p_square = jnp.log1p(near**2) + 2 * jnp.log(jnp.abs(far))
    log_peak = _log_gamma_half_step(df / 2) - 0.5 * jnp.log(df * math.pi) - log_scale
    return jnp.sum(log_peak - 0.5 * (df + 1) * log1p_square)


def student_t_fisher(
    loc: Float[Array, " dim"],
    log_scale: Float[Array, "..."],
    df: float | Float[Array, "..."],
) -> Float[Array, " dim"]:
    """Fisher information of `student_t` in `loc`, diagonal: (ν + 1) / ((ν + 3) scale²), (dim,).

    Args:
        loc: Centers, shape (dim,); only their shape matters.
        log_scale: Log of the scale, which multiplies a standard t; a scalar or shape (dim,).
        df: Degrees of freedom ν, positive; a scalar or shape (dim,).
    """
    information = (df + 1) / (df + 3) * jnp.exp(-2 * log_scale)
    return jnp.broadcast_to(information, loc.shape)


def _log_gamma_half_step(a: float | Float[Array, "..."]) -> Float[Array, "..."]:
    """Log Γ(a + ½) - log Γ(a), by a series for large a.

    There the direct difference cancels: its error in float32 is 0.5 nats at a million.

    References:
        NIST Digital Library of Mathematical Functions, 5.11(i) for the two series.
    """
    is_large = jnp.asarray(a) > 20
    large, small = jnp.where(is_large, a, 20.0), jnp.where(is_large, 20.0, a)
    step = 1 / large
    series = step * (-1 / 8 + step**2 * (1 / 192 + step**2 * (-1 / 640 + step**2 * 17 / 14336)))
    return jnp.where(is_large, 0.5 * jnp.log(large) + series, gammaln(small + 0.5) - gammaln(small))
