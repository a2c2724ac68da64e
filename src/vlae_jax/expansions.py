"""Expansions: second-order models of one example's log joint around a point.

An expansion is a pure function from z to a `Quadratic`. Refinement, posterior and evidence accept
any expansion, so a faster way to compute curvature is one more function in this module, tested
against `exact_expansion`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity, standard_normal
from vlae_jax.information import Information, checked_information, diagonal_noise, weigh


class Quadratic(NamedTuple):
    """One example's log joint to second order at a point z."""

    value: Float[Array, ""]
    """log p(x, z), nats."""
    grad: Float[Array, " latent"]
    """Gradient of the log joint."""
    precision: Float[Array, "latent latent"]
    """Minus the Hessian of the log joint, or a positive-definite approximation of it."""


class Products(NamedTuple):
    """A `Quadratic` whose precision is a function instead of a matrix; usable within one trace."""

    value: Float[Array, ""]
    grad: Float[Array, " latent"]
    times: Callable[[Float[Array, " latent"]], Float[Array, " latent"]]
    """v → precision @ v."""
    noise: Callable[[PRNGKeyArray], Float[Array, " latent"]] | None = None
    """key → a random vector of mean zero whose covariance is the precision, or None where it is
    not known how to draw one."""


Expansion = Callable[[Float[Array, " latent"]], Quadratic]
"""z → `Quadratic`. An expansion with a method `products`, z → `Products`, also allows mode searches
by conjugate gradients."""


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixFreeExpansion:
    """An `Expansion` that can also multiply by its precision without forming it."""

    quadratic: Callable[[Float[Array, " latent"]], Quadratic]
    products: Callable[[Float[Array, " latent"]], Products]

    def __call__(self, z: Float[Array, " latent"]) -> Quadratic:
        """Return the quadratic at z."""
        return self.quadratic(z)


def exact_expansion(log_joint: LogDensity, *, chunk_size: int | None = None) -> MatrixFreeExpansion:
    """Expand any log joint by `jax.grad` and `jax.hessian`: the reference for other expansions.

    For a piecewise-linear (ReLU) decoder with a likelihood in its natural parameter this equals
    `gauss_newton_expansion` almost everywhere, at several times the cost.

    Args:
        log_joint: z of shape (latent,) → log p(x, z), a scalar in nats. Closes over x and the
            parameters.
        chunk_size: Columns of the Hessian computed at once, to bound the memory; all by default.
            Reverse mode then recomputes them instead of storing intermediate values.

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
    fisher: Callable[[Float[Array, " out"]], Information] | None = None,
    prior_precision: Callable[[Float[Array, " latent"]], Float[Array, "latent latent"]]
    | None = None,
    noise: Callable[[PRNGKeyArray, Float[Array, " out"]], Float[Array, " out"]] | None = None,
    chunk_size: int | None = None,
) -> MatrixFreeExpansion:
    """Expand log p(x | decode(z)) + log p(z) with the decoder linearized: JᵀWJ + prior precision.

    W is minus the Hessian of the log likelihood with respect to the decoder's output, J the
    Jacobian of the decoder. For a concave log likelihood and prior the precision is positive
    definite by construction. For a piecewise linear decoder it is minus the exact Hessian almost
    everywhere. For a log likelihood that is not concave (a learned variance per pixel, Student-t),
    give its Fisher information as W.

    Args:
        decode: z of shape (latent,) → η of shape (out,), the likelihood's natural parameter
            (a Gaussian's mean, a Bernoulli's logits).
        log_likelihood: η → log p(x | η), a scalar in nats. Closes over x.
        log_prior: z → log p(z), a scalar in nats.
        fisher: η → the likelihood's Fisher information at η, used as W: its diagonal, (out,); or,
            where η holds several outputs a dimension, all of the first, then all of the second, its
            blocks, (outputs, outputs, dim); or a tuple of these, for consecutive parts of η. See
            `densities` and `counts` for the likelihoods that need one.
        prior_precision: z → a positive definite curvature of the prior, (latent, latent), used in
            place of minus the Hessian of a log prior that is not concave.
        noise: (key, η) → a random vector (out,) of mean zero and covariance W, for
            `laplace_sample`. By default √W times standard normals, for a diagonal W; a W that is
            not diagonal then gives NaN.
        chunk_size: Columns of the precision computed at once, each by one forward and one backward
            pass; the Jacobian is then never stored, for reverse mode neither. By default the whole
            Jacobian is formed, in one pass.

    Returns:
        A function of z giving the value in nats, the exact gradient (latent,), and the
        Gauss-Newton precision (latent, latent).

    Raises:
        ValueError: While tracing, if z or η is not one-dimensional, a density not scalar, the
            Fisher information of another shape or `chunk_size` below 1; or, with its size, if the
            Jacobian of one example exceeds the device's memory.

    Gradients:
        Flow through z and through everything the three functions close over.

    References:
        Park, Kim and Kim (2019), section 3.2, for the Gaussian and the Bernoulli; Martens (2020),
        New insights and perspectives on the natural gradient method, for the general form.
    """

    def log_joint(z: Float[Array, " latent"]) -> Float[Array, ""]:
        return log_likelihood(decode(z)) + log_prior(z)

    def prior_curvature(z: Array) -> Array:
        return -jax.hessian(log_prior)(z) if prior_precision is None else prior_precision(z)

    def weight(eta: Array) -> Partial:
        """Return the product with W."""
        if eta.ndim != 1:
            raise ValueError(f"decode must return shape (out,), got {eta.shape}")
        if fisher is not None:
            return Partial(weigh, checked_information(fisher(eta), eta.size))
        return Partial(_minus, jax.linearize(jax.grad(log_likelihood), eta)[1])

    # By default accelerators multiply float32 in reduced precision, too low for a Cholesky factor.
    def quadratic(z: Float[Array, " latent"]) -> Quadratic:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            if chunk_size is not None:
                return _by_columns(products(z), z, chunk_size)
            value, grad = jax.value_and_grad(log_joint)(z)
            eta, push = jax.linearize(decode, z)
            _require_memory(z, eta.size)
            fit = _sandwich(jax.vmap(push)(_basis(z)), weight(eta))
            return Quadratic(value, grad, fit + prior_curvature(z))

    def products(z: Float[Array, " latent"]) -> Products:
        z = depend_on_data(log_joint, z)
        with jax.default_matmul_precision("highest"):
            eta, push = jax.linearize(decode, z)
            times_fit = weight(eta)
            pull = jax.linear_transpose(push, z)
            # One linearization serves gradient and products; a derivative of both enters it once.
            fit, slope = jax.value_and_grad(log_likelihood)(eta)
            (prior, prior_grad), push_prior = jax.linearize(jax.value_and_grad(log_prior), z)
            value, grad = fit + prior, pull(slope)[0] + prior_grad
            if prior_precision is None:
                times_prior = Partial(lambda v: -push_prior(v)[1])
            else:
                times_prior = Partial(jnp.matmul, prior_precision(z))

            def draw(key: PRNGKeyArray) -> Array:
                of_fit, of_prior = jax.random.split(key)
                if noise is not None:
                    score = noise(of_fit, eta)
                else:
                    score = diagonal_noise(of_fit, times_fit, eta)
                return pull(score)[0] + diagonal_noise(of_prior, times_prior, z)

            def times(vector: Array) -> Array:
                return pull(times_fit(push(vector)))[0] + times_prior(vector)

            return Products(value, grad, times, draw)

    return MatrixFreeExpansion(quadratic, products)


def shifted_expansion(expand: Expansion, *, floor: float = 1.0) -> Expansion:
    """Return an expansion whose precision is shifted, where needed, to be positive definite.

    It adds the smallest multiple of the identity that brings the smallest eigenvalue up to `floor`.
    It needs only the expansion, so it works for any log joint: pass `shifted_expansion(expand)` as
    `repair=` to `infer_posterior`, `newton_refine` or `laplace_posterior`. Applied to
    `gauss_newton_expansion` it repairs precisions that are positive definite in exact arithmetic
    and not after rounding, where the eigenvalues differ by more than the number format resolves.

    Args:
        expand: Expansion of one example's log joint.
        floor: The smallest eigenvalue allowed, positive. The precision of the prior N(0, I) has 1:
            with it no direction becomes wider than under the prior. Where rounding hides
            eigenvalues of this size, the floor is the smallest that it does not hide: latent × 8
            machine epsilons times the largest.

    Returns:
        An expansion with unchanged value and gradient. A precision above the floor is unchanged to
        the bit; one that is not finite stays so, and the factorization flags it.

    Raises:
        ValueError: If `floor` is not positive.

    Gradients:
        Flow as those of `expand`: the shift is held constant, so that they stay finite where
        eigenvalues coincide.

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
    """Check `z` and return it, made to depend on everything that `log_joint` closes over.

    Inside `jax.shard_map` the gradient with respect to a z that is equal on all devices is silently
    summed over devices. Adding a zero derived from the data marks z as varying with the data; the
    compiler removes the addition.

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


def held_constant(function: Callable[..., Any], *like: Any) -> Callable[..., Any]:
    """Return the function with everything it closes over held constant.

    Reverse mode then never enters what the function closes over, unlike with the gradient of its
    result stopped.

    Args:
        function: A function of arrays.
        like: Arguments, or pytrees, of the shapes and types it will be called with.
    """
    pure, closed_over = jax.closure_convert(function, *like)
    constants = jax.lax.stop_gradient(closed_over)
    return lambda *arguments: pure(*arguments, *constants)


def without_gradients(expand: Expansion, z: Float[Array, " latent"]) -> Expansion:
    """Return the expansion with everything it closes over held constant.

    Gradients are stopped here instead of at the mode, so that reverse mode never traverses what is
    done with it, a search for example.
    """
    quadratic = held_constant(expand, z)
    if not hasattr(expand, "products"):
        return quadratic

    def multiply(z: Array, v: Array) -> tuple[Array, Array, Array]:
        value, grad, times, _ = expand.products(z)
        return value, grad, times(v)

    def draw(z: Array, key: PRNGKeyArray) -> Array:
        noise = expand.products(z).noise
        return jnp.full_like(z, jnp.nan) if noise is None else noise(key)

    held = held_constant(multiply, z, z)

    def products(z: Array) -> Products:
        value, grad, _ = held(z, z)
        times = jax.linearize(lambda v: held(z, v)[2], z)[1]
        return Products(value, grad, times, lambda key: held_constant(draw, z, key)(z, key))

    return MatrixFreeExpansion(quadratic, products)


def _basis(z: Float[Array, " latent"]) -> Float[Array, "latent latent"]:
    """The unit vectors, marked as varying over devices like z; see `depend_on_data`."""
    return jnp.eye(z.size, dtype=z.dtype) + jnp.zeros_like(z)[None]


def _by_columns(products: Products, z: Float[Array, " latent"], chunk_size: int) -> Quadratic:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    basis = _basis(z)
    columns = jax.lax.map(jax.checkpoint(products.times), basis, batch_size=min(chunk_size, z.size))
    return Quadratic(products.value, products.grad, columns)


def _require_memory(z: Float[Array, " latent"], out: int) -> None:
    """Raise a clear error for a Jacobian that does not fit in memory, before allocating it."""
    needed, there = z.size * out * z.dtype.itemsize, _memory_bytes()
    if there is not None and needed > there:
        raise ValueError(
            f"the Jacobian of one example, {z.size} latent dimensions by {out} outputs, takes "
            f"{needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f} GiB of memory; bound it "
            "by chunk_size=, the number of columns held at once"
        )


def _memory_bytes() -> int | None:
    """Memory of the first device in bytes, or None where it is unknown."""
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
    """Return JᵀWJ, with a derivative rule that uses the symmetry of W to save one product with W.

    `weigh` multiplies by W. It is a pytree of everything it depends on, so that the derivative rule
    can differentiate it.
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
    """Shift of all eigenvalues that raises the smallest to `floor`, or to the level of rounding."""
    identity = jnp.eye(len(precision), dtype=precision.dtype)
    safe = jnp.where(jnp.all(jnp.isfinite(precision)), precision, identity)
    # The matrix is scaled to order one, so that squares of its entries neither overflow nor vanish.
    scale = jnp.maximum(jnp.max(jnp.abs(safe)), 1.0)
    eigenvalues = scale * jnp.linalg.eigvalsh(safe / scale)
    rounding = 8 * len(precision) * jnp.finfo(precision.dtype).eps
    target = jnp.maximum(floor, rounding * jnp.max(jnp.abs(eigenvalues)))
    return jnp.maximum(target - eigenvalues[0], 0.0)
