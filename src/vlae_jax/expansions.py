"""Expansions: second-order models of one example's log joint around a point.

An expansion is a pure function from z to a `Quadratic`. Refinement, posterior and evidence take
one and never ask where it came from, so a faster curvature is one more function in this room,
tested equal to `exact_expansion`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from vlae_jax.densities import LogDensity, standard_normal


class Quadratic(NamedTuple):
    """One example's log joint to second order at a point z."""

    value: Float[Array, ""]
    """log p(x, z), nats."""
    grad: Float[Array, " latent"]
    """Gradient of the log joint."""
    precision: Float[Array, "latent latent"]
    """Minus its Hessian, or a positive-definite stand-in for it."""


class Products(NamedTuple):
    """The same without the matrix, for use within one trace."""

    value: Float[Array, ""]
    grad: Float[Array, " latent"]
    times: Callable[[Float[Array, " latent"]], Float[Array, " latent"]]
    """v → precision @ v."""


Expansion = Callable[[Float[Array, " latent"]], Quadratic]
"""z → `Quadratic`. One that also has a method `products`, z → `Products`, can be searched by
conjugate gradients."""


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixFreeExpansion:
    """An `Expansion` that can also multiply by its precision without forming it."""

    quadratic: Callable[[Float[Array, " latent"]], Quadratic]
    products: Callable[[Float[Array, " latent"]], Products]

    def __call__(self, z: Float[Array, " latent"]) -> Quadratic:
        """The quadratic at z."""
        return self.quadratic(z)


def exact_expansion(log_joint: LogDensity, *, chunk_size: int | None = None) -> MatrixFreeExpansion:
    """Expand any log joint by `jax.grad` and `jax.hessian`: the reference truth.

    For a piecewise-linear (ReLU) decoder with a likelihood in its natural parameter this equals
    `gauss_newton_expansion` almost everywhere, at several times the cost.

    Args:
        log_joint: z of shape (latent,) → log p(x, z), a scalar in nats. Closes over x and the
            parameters.
        chunk_size: Columns of the Hessian computed at once, to bound the memory; all by default.
            Reverse mode then computes them again instead of keeping what led to them.

    Returns:
        A function of z, shape (latent,), giving the value in nats, the gradient (latent,) and
        the precision -∇²log p(x, z), (latent, latent). Away from a mode the precision may be
        indefinite; it is returned as it is.

    Raises:
        ValueError: While tracing, if z is not one-dimensional, `log_joint` not scalar or
            `chunk_size` below 1.

    Gradients:
        Flow through z and through everything `log_joint` closes over.

    References:
        Park, Kim and Kim (2019), Variational Laplace Autoencoders, ICML.
    """

    def quadratic(z: Float[Array, " latent"]) -> Quadratic:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            if chunk_size is not None:
                return _by_columns(products(z), z, chunk_size)
            value, grad = jax.value_and_grad(log_joint)(z)
            return Quadratic(value, grad, -jax.hessian(log_joint)(z))

    def products(z: Float[Array, " latent"]) -> Products:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            (value, grad), push = jax.linearize(jax.value_and_grad(log_joint), z)
            return Products(value, grad, lambda v: -push(v)[1])

    return MatrixFreeExpansion(quadratic, products)


def gauss_newton_expansion(
    decode: Callable[[Float[Array, " latent"]], Float[Array, " out"]],
    log_likelihood: LogDensity,
    log_prior: LogDensity = standard_normal,
    *,
    fisher: Callable[[Float[Array, " out"]], Float[Array, " out"]] | None = None,
    chunk_size: int | None = None,
) -> MatrixFreeExpansion:
    """Expand log p(x | decode(z)) + log p(z) with the decoder linearized: JᵀWJ + prior precision.

    W is minus the Hessian of the log likelihood with respect to the decoder's output, J the
    Jacobian of the decoder. For a concave log likelihood and prior the precision is positive
    definite by form. It is the exact Hessian wherever the decoder is piecewise linear. For a log
    likelihood that is not concave (a learned variance per pixel, Student-t), give its Fisher
    information as W.

    Args:
        decode: z of shape (latent,) → η of shape (out,), the likelihood's natural parameter
            (a Gaussian's mean, a Bernoulli's logits).
        log_likelihood: η → log p(x | η), a scalar in nats. Closes over x.
        log_prior: z → log p(z), a scalar in nats.
        fisher: η → the diagonal of the likelihood's Fisher information at η, (out,), to take for
            W. See `densities` for those that need one.
        chunk_size: Columns of the precision computed at once, each by one pass forward and one
            back; the Jacobian is then never held, nor kept for reverse mode. By default it is
            formed, in one pass.

    Returns:
        A function of z giving the value in nats, the exact gradient (latent,), and the
        Gauss-Newton precision (latent, latent).

    Raises:
        ValueError: While tracing, if z or η is not one-dimensional, a density not scalar or
            `chunk_size` below 1; or, with its size, if the Jacobian of one example exceeds the
            device's memory.

    Gradients:
        Flow through z and through everything the three functions close over.

    References:
        Park, Kim and Kim (2019), section 3.2, for the Gaussian and the Bernoulli; Martens (2020),
        New insights and perspectives on the natural gradient method, for the general form.
    """

    def log_joint(z: Float[Array, " latent"]) -> Float[Array, ""]:
        return log_likelihood(decode(z)) + log_prior(z)

    def linearized(z: Array) -> tuple[Array, Array, Callable[[Array], Array], Partial]:
        """The value, the gradient, the decoder's tangent map and the product with W."""
        value, grad = jax.value_and_grad(log_joint)(z)
        eta, push = jax.linearize(decode, z)
        if eta.ndim != 1:
            raise ValueError(f"decode must return shape (out,), got {eta.shape}")
        if fisher is not None:
            return value, grad, push, Partial(jnp.multiply, fisher(eta))
        slope_push = jax.linearize(jax.grad(log_likelihood), eta)[1]
        return value, grad, push, Partial(_minus, slope_push)

    # Accelerators multiply float32 in reduced precision unless asked; a Cholesky needs better.
    def quadratic(z: Float[Array, " latent"]) -> Quadratic:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            if chunk_size is not None:
                return _by_columns(products(z), z, chunk_size)
            value, grad, push, weigh = linearized(z)
            _require_memory(z, jax.eval_shape(push, z).size)
            basis = _basis(z)
            fit = _sandwich(jax.vmap(push)(basis), weigh)
            return Quadratic(value, grad, fit - jax.hessian(log_prior)(z))

    def products(z: Float[Array, " latent"]) -> Products:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            value, grad, push, weigh = linearized(z)
            pull = jax.linear_transpose(push, z)
            prior_push = jax.linearize(jax.grad(log_prior), z)[1]
            return Products(value, grad, lambda v: pull(weigh(push(v)))[0] - prior_push(v))

    return MatrixFreeExpansion(quadratic, products)


def shifted_expansion(expand: Expansion, *, floor: float = 1.0) -> Expansion:
    """The same expansion with its precision lifted, where it must be, to be positive definite.

    Adds the least multiple of the identity that brings the smallest eigenvalue up to `floor`. It
    needs nothing but the expansion, so it repairs any log joint: hand
    `shifted_expansion(expand)` as `repair=` to `infer_posterior`, `newton_refine` or
    `laplace_posterior`. Around `gauss_newton_expansion` it repairs what is positive definite by
    form and not by rounding, where eigenvalues lie further apart than the precision resolves.

    Args:
        expand: Expansion of one example's log joint.
        floor: The smallest eigenvalue a precision is left with, positive. 1 is that of the prior
            N(0, I): no direction ends up wider than the prior had it. Where rounding hides
            eigenvalues of this size, the smallest that it does not hide is taken: latent × 8
            machine epsilons of the largest.

    Returns:
        An expansion of the same value and gradient. A precision that is above the floor keeps its
        bits; one that is not finite stays so, and is flagged where it is factored.

    Raises:
        ValueError: If `floor` is not positive.

    Gradients:
        Those of `expand`: the shift is held constant, so they are finite where eigenvalues meet.

    References:
        Nocedal and Wright (2006), Numerical optimization, section 3.4.
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")

    def shifted(z: Float[Array, " latent"]) -> Quadratic:
        quadratic = expand(z)
        shift = _least_shift(jax.lax.stop_gradient(quadratic.precision), floor)
        identity = jnp.eye(z.size, dtype=shift.dtype)
        return quadratic._replace(precision=quadratic.precision + shift * identity)

    return shifted


def depend_on_data(log_joint: LogDensity, z: Float[Array, " latent"]) -> Float[Array, " latent"]:
    """Return `z`, checked, and made to depend on whatever `log_joint` closes over.

    Inside `jax.shard_map` the gradient with respect to a z that is the same on every device is
    silently summed over devices. Adding a zero derived from the data makes z vary with the data;
    the compiler removes the rest.

    Raises:
        ValueError: While tracing, if `z` is no float vector or `log_joint` is not scalar.
    """
    if z.ndim != 1:
        raise ValueError(
            f"z must have shape (latent,), got {z.shape}; jax.vmap over the batch of examples"
        )
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ValueError(f"z must be a float array, got {z.dtype}; convert it before the call")
    value = log_joint(z)
    if jnp.shape(value) != ():
        raise ValueError(
            f"the log joint must be a scalar, got shape {jnp.shape(value)}; sum it over pixels, "
            "and jax.vmap over the batch of examples"
        )
    return z + jnp.zeros_like(value).astype(z.dtype)


def _basis(z: Float[Array, " latent"]) -> Float[Array, "latent latent"]:
    """The unit vectors, varying over devices as z does: see `depend_on_data`."""
    return jnp.eye(z.size, dtype=z.dtype) + jnp.zeros_like(z)[None]


def _by_columns(products: Products, z: Float[Array, " latent"], chunk_size: int) -> Quadratic:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    basis = _basis(z)
    columns = jax.lax.map(jax.checkpoint(products.times), basis, batch_size=min(chunk_size, z.size))
    return Quadratic(products.value, products.grad, columns)


def _require_memory(z: Float[Array, " latent"], out: int) -> None:
    """Refuse a Jacobian that cannot fit, before the allocator does in words of its own."""
    needed, there = z.size * out * z.dtype.itemsize, _memory_bytes()
    if there is not None and needed > there:
        raise ValueError(
            f"the Jacobian of one example, {z.size} latent dimensions by {out} outputs, takes "
            f"{needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f} GiB of memory; bound it "
            "by chunk_size=, the number of columns held at once"
        )


def _memory_bytes() -> int | None:
    """Memory of the first device, as far as it can be known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return stats.get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _minus(push: Callable[[Array], Array], tangent: Array) -> Array:
    return -push(tangent)


@jax.custom_jvp
def _sandwich(
    jacobian_t: Float[Array, "latent out"], weigh: Partial
) -> Float[Array, "latent latent"]:
    """JᵀWJ. Told that W is symmetric, its derivative multiplies by W once less.

    `weigh` is a pytree of all that it depends on, as a derivative rule needs it.
    """
    return jacobian_t @ jax.vmap(weigh)(jacobian_t).T


@_sandwich.defjvp
def _sandwich_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (jacobian_t, weigh), (jacobian_t_dot, weigh_dot) = primals, tangents
    weighted, weighted_dot = jax.jvp(
        lambda weigh: jax.vmap(weigh)(jacobian_t), (weigh,), (weigh_dot,)
    )
    half = jacobian_t_dot @ weighted.T
    return jacobian_t @ weighted.T, half + half.T + jacobian_t @ weighted_dot.T


def _least_shift(precision: Float[Array, "latent latent"], floor: float) -> Float[Array, ""]:
    """What to add to all eigenvalues for the smallest to be `floor`, or more than rounding."""
    identity = jnp.eye(len(precision), dtype=precision.dtype)
    safe = jnp.where(jnp.all(jnp.isfinite(precision)), precision, identity)
    # Scaled to order one, its squares neither overflow nor vanish.
    scale = jnp.maximum(jnp.max(jnp.abs(safe)), 1.0)
    eigenvalues = scale * jnp.linalg.eigvalsh(safe / scale)
    rounding = 8 * len(precision) * jnp.finfo(precision.dtype).eps
    target = jnp.maximum(floor, rounding * jnp.max(jnp.abs(eigenvalues)))
    return jnp.maximum(target - eigenvalues[0], 0.0)
