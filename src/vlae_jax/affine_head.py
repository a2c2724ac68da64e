"""Gaussian decoders that end in an affine layer, at a cost independent of the data dimension."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlae_jax.densities import LogDensity, gaussian, standard_normal
from vlae_jax.expansions import MatrixFreeExpansion, exact_expansion, gauss_newton_expansion

Noise = Callable[[PRNGKeyArray, Array], Array]


def affine_head_expansion(
    features: Callable[[Float[Array, " latent"]], Float[Array, " hidden"]],
    kernel: Float[Array, "hidden dim"],
    bias: Float[Array, " dim"],
    log_var: Float[Array, "..."],
    x: Float[Array, " dim"],
    *,
    log_prior: LogDensity = standard_normal,
    prior_precision: Callable[[Float[Array, " latent"]], Float[Array, "latent latent"]]
    | None = None,
    exact: bool = False,
    form: Literal["auto", "gram", "explicit"] = "auto",
) -> MatrixFreeExpansion:
    """Expand a Gaussian decoder that ends in an affine layer, without the data dimension.

    The Gram form of the precision is Aᵀ G A + prior precision, with A the Jacobian of the features
    and G the Gram matrix of the last layer. It equals the form by the Jacobian of the whole
    decoder, and needs only matrices of the hidden width. Call this function outside loops: G and
    the projected data are computed here, once, and closed over.

    Args:
        features: z of shape (latent,) → the last hidden layer's output, (hidden,).
        kernel: Last layer's weights, (hidden, dim).
        bias: Last layer's bias, (dim,).
        log_var: Log noise variance; a scalar or shape (dim,).
        x: The example, (dim,).
        log_prior: z → log p(z), nats.
        prior_precision: As in `gauss_newton_expansion`; not used with `exact`.
        exact: Take the Hessian of the log joint. The default linearizes the features, which is
            the same almost everywhere if they are piecewise linear.
        form: "gram"; "explicit", by the Jacobian of the whole decoder; or "auto", the one of the
            two that costs less for these sizes (`gram_is_cheaper`).

    Returns:
        A function of z with the value, gradient and precision that `exact_expansion` describes.

    Raises:
        ValueError: For an unknown `form`, and wherever `exact_expansion` raises one.

    Gradients:
        Flow through z, the parameters and x.
    """
    if form not in ("auto", "gram", "explicit"):
        raise ValueError(f"form must be 'auto', 'gram' or 'explicit', got {form!r}")
    hidden, dim = kernel.shape

    def build(
        decode: Callable[[Array], Array], log_likelihood: LogDensity, noise: Noise | None = None
    ) -> MatrixFreeExpansion:
        if exact:
            return exact_expansion(lambda z: log_likelihood(decode(z)) + log_prior(z))
        return gauss_newton_expansion(
            decode, log_likelihood, log_prior, prior_precision=prior_precision, noise=noise
        )

    def noise(key: PRNGKeyArray, _: Array) -> Array:
        normals = jax.random.normal(key, bias.shape, bias.dtype)
        return kernel @ (jnp.exp(-0.5 * log_var) * normals)

    gram = build(features, compress_affine_gaussian(kernel, bias, log_var, x), noise)
    explicit = build(lambda z: features(z) @ kernel + bias, lambda eta: gaussian(x, eta, log_var))

    def choose(z: Float[Array, " latent"]) -> MatrixFreeExpansion:
        if form == "auto":
            return gram if gram_is_cheaper(z.size, hidden, dim) else explicit
        return gram if form == "gram" else explicit

    return MatrixFreeExpansion(lambda z: choose(z).quadratic(z), lambda z: choose(z).products(z))


def gram_is_cheaper(latent: int, hidden: int, dim: int) -> bool:
    """Whether the Gram form (A and GA) needs fewer multiply-adds than the explicit one (J, JᵀJ).

    Both are counted per latent dimension.
    """
    return hidden**2 + hidden * latent < dim * hidden + dim * latent


def compress_affine_gaussian(
    kernel: Float[Array, "hidden dim"],
    bias: Float[Array, " dim"],
    log_var: Float[Array, "..."],
    x: Float[Array, " dim"],
) -> LogDensity:
    """Return log N(x; a @ kernel + bias, exp(log_var)) as a function of the features `a` alone.

    The square is expanded once: log N = constant + cᵀa - ½ aᵀGa with the Gram matrix G = K Λ Kᵀ
    (hidden, hidden) and c = K Λ (x - bias). Evaluating the result never touches the data dimension.
    Where `kernel` and `log_var` are shared over a vmapped batch, G is computed once for all of it.

    Args:
        kernel: Last layer's weights, (hidden, dim).
        bias: Last layer's bias, (dim,).
        log_var: Log noise variance; a scalar or shape (dim,).
        x: The example, (dim,).

    Returns:
        a of shape (hidden,) → log p(x | a), nats. In float32 the expanded square cancels: values
        agree with the direct form to about 1e-7 of |x - bias|²/variance. Use them to search and
        to compare, the direct form to report.
    """
    with jax.default_matmul_precision("highest"):
        noise_precision = jnp.broadcast_to(jnp.exp(-log_var), bias.shape)
        weighted = kernel * noise_precision[None]
        gram = weighted @ kernel.T
        projected = weighted @ (x - bias)
        constant = gaussian(x, bias, log_var)

    def log_likelihood(a: Float[Array, " hidden"]) -> Float[Array, ""]:
        return constant + a @ projected - _half_square(gram, a)

    return log_likelihood


class WhitenedHead(NamedTuple):
    """The QR factors of an affine Gaussian head, which turn its squared error into |R a - d|²."""

    factor: Float[Array, "rank hidden"]
    """R, upper triangular."""
    basis: Float[Array, "dim rank"]
    """Q, orthonormal columns; Q R is the whitened kernel, transposed."""


def whiten_affine_head(
    kernel: Float[Array, "hidden dim"], log_var: Float[Array, "..."]
) -> WhitenedHead:
    """Factor a last layer once for all examples and samples, by a QR of a (dim, hidden) matrix.

    It is meant for evaluation: to differentiate it needs dim ≥ hidden and a kernel of full rank.

    Args:
        kernel: Last layer's weights, (hidden, dim).
        log_var: Log noise variance; a scalar or shape (dim,).
    """
    scale = jnp.broadcast_to(jnp.exp(-0.5 * log_var), kernel.shape[1:])
    with jax.default_matmul_precision("highest"):
        basis, factor = jnp.linalg.qr((kernel * scale[None]).T)
    return WhitenedHead(factor, basis)


def whitened_affine_gaussian(
    head: WhitenedHead,
    bias: Float[Array, " dim"],
    log_var: Float[Array, "..."],
    x: Float[Array, " dim"],
) -> LogDensity:
    """The log likelihood of features `a` under N(x; a @ kernel + bias, exp(log_var)).

    With e the whitened x - bias, |e - Q R a|² = |R a - d|² + |e - Q d|², d = Qᵀe. The last term
    depends on the example only, so each sample costs work of the hidden width. Unlike in
    `compress_affine_gaussian` nothing cancels: values agree with the direct form to rounding.

    Args:
        head: `whiten_affine_head` of the kernel and `log_var`.
        bias: Last layer's bias, (dim,).
        log_var: Log noise variance; a scalar or shape (dim,).
        x: The example, (dim,).

    Returns:
        a of shape (hidden,) → log p(x | a), nats.
    """
    factor, basis = head
    with jax.default_matmul_precision("highest"):
        whitened = (x - bias) * jnp.exp(-0.5 * log_var)
        target = whitened @ basis
        outside = whitened - basis @ target
        constant = gaussian(x, x, log_var) - 0.5 * outside @ outside

    def log_likelihood(a: Float[Array, " hidden"]) -> Float[Array, ""]:
        residual = factor @ a - target
        return constant - 0.5 * residual @ residual

    return log_likelihood


@jax.custom_jvp
def _half_square(
    gram: Float[Array, "hidden hidden"], a: Float[Array, " hidden"]
) -> Float[Array, ""]:
    """Return ½ aᵀGa, with a derivative rule that uses the symmetry of G.

    A Hessian product then costs one product G v, where JAX would compute ½(G v + Gᵀv).
    """
    return 0.5 * a @ (gram @ a)


@_half_square.defjvp
def _half_square_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (gram, a), (gram_dot, a_dot) = primals, tangents
    slope = a @ gram  # in this order a batch needs no transposed copies
    return 0.5 * a @ slope, slope @ a_dot + 0.5 * a @ (gram_dot @ a)
