"""The programs that are timed: the package's own functions, batched, and their JAX baselines."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlae_jax.bounds import elbo, importance_weighted_log_prob
from vlae_jax.densities import gaussian, standard_normal
from vlae_jax.expansions import Expansion, exact_expansion, gauss_newton_expansion
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.systems import vlae
from vlae_jax.posterior import GaussianPosterior
from vlae_jax.runs.config import InferenceConfig


class Sizes(NamedTuple):
    """One point of the benchmark: the decoder latent-hidden-hidden-dim, and how it is used."""

    dim: int = 784
    latent: int = 50
    hidden: int = 500
    batch: int = 128
    steps: int = 4
    images: int = 16
    """Images at once in a log-likelihood."""
    samples: int = 5000
    """Importance samples K an image."""
    chunk: int = 500


class ExplicitJacobian(VariationalAutoencoder):
    """The same model, its curvature JᵀWJ from the whole decoder's Jacobian J (dim, latent)."""

    def expansions(self, x: jax.Array) -> tuple[Expansion, Expansion | None]:
        """Gauss-Newton, nothing compressed."""
        return gauss_newton_expansion(self.decode, self.log_likelihood(x)), None


class ExactHessian(VariationalAutoencoder):
    """The same model, its curvature from `jax.hessian`."""

    def expansions(self, x: jax.Array) -> tuple[Expansion, Expansion | None]:
        """Forward over reverse through the whole decoder."""
        return exact_expansion(self.log_joint(x)), None


CURVATURES: dict[str, type[VariationalAutoencoder]] = {
    "gram": VariationalAutoencoder,
    "jacobian": ExplicitJacobian,
    "hessian": ExactHessian,
}
"""gram is what the package does by itself for a Gaussian of this shape."""


class Problem(NamedTuple):
    """Weights and data of given sizes."""

    sizes: Sizes
    graphdefs: dict[str, Any]
    """The structure of each model of `CURVATURES`, which all share the parameters."""
    params: Any
    xs: jax.Array
    """(batch, dim), drawn from the model, so that there is a mode to find."""
    keys: jax.Array

    def model(self, curvature: str, params: Any) -> VariationalAutoencoder:
        """The model with these parameters."""
        return nnx.merge(self.graphdefs[curvature], params)


def build_problem(sizes: Sizes) -> Problem:
    """Random weights, and images drawn from them."""
    graphdefs = {}
    for name, kind in CURVATURES.items():
        model = kind(
            sizes.dim,
            latent=sizes.latent,
            hidden=(sizes.hidden, sizes.hidden),
            activation="relu",
            likelihood="gaussian",
            variance=np.full(sizes.dim, 0.1),
            rngs=nnx.Rngs(0),
        )
        model.head.kernel[...] *= 10.0  # a decoder that has learned something
        graphdefs[name], params = nnx.split(model)
    key_z, key_x, key = jax.random.split(jax.random.key(1), 3)
    zs = jax.random.normal(key_z, (sizes.batch, sizes.latent))
    noise = jnp.exp(0.5 * model.log_var) * jax.random.normal(key_x, (sizes.batch, sizes.dim))
    xs = jax.vmap(model.decode)(zs) + noise
    return Problem(sizes, graphdefs, params, xs, jax.random.split(key, sizes.batch))


def training_gradient(
    problem: Problem, curvature: str, gradient: Any, damping: Any, solver: Any
) -> Callable[..., Any]:
    """(params, xs, keys) → what training minimises, and its gradient; encoder included."""
    config = InferenceConfig(
        steps=problem.sizes.steps, gradient=gradient, damping=damping, solver=solver
    )

    def loss(params, xs, keys):
        def one(x, key):
            model = problem.model(curvature, params)
            inference = vlae(model, x, key, config)
            bound = elbo(key, model.log_joint(x), inference.posterior)
            return bound - inference.amortization_loss

        return -jnp.mean(jax.vmap(one)(xs, keys))

    return jax.value_and_grad(loss)


def posteriors(problem: Problem, curvature: str, damping: Any, solver: Any) -> Callable[..., Any]:
    """(params, xs) → the Laplace posterior of each image; nothing is differentiated."""

    def one(params, x):
        model = problem.model(curvature, params)
        z_init, _ = model.encode(x)
        expand, repair = model.expansions(x)
        posterior, _ = infer_posterior(
            expand,
            z_init,
            num_steps=problem.sizes.steps,
            damping=damping,
            repair=repair,
            solver=solver,
        )
        return posterior

    return jax.vmap(one, in_axes=(None, 0))


def log_probs(problem: Problem) -> Callable[..., Any]:
    """(params, head, xs, means, precisions, keys) → log p(x) of each image by importance sampling.

    `head` is the whitened output layer, or None to decode every sample to the pixels.
    """
    sizes = problem.sizes

    def one(params, head, x, mean, precision, key):
        posterior = GaussianPosterior(mean, jnp.linalg.cholesky(precision))
        estimate, info = importance_weighted_log_prob(
            key,
            problem.model("gram", params).log_joint(x, head),
            posterior,
            num_samples=sizes.samples,
            chunk_size=sizes.chunk,
        )
        return estimate, info.standard_error

    return jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))


class ConvolutionalDecoder(NamedTuple):
    """z → 28 × 28 pixels by two transposed convolutions; (dense, first, second) are its weights."""

    latent: int
    channels: int = 32

    def init(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """Random weights of He's scale."""
        keys = jax.random.split(key, 3)
        shapes = (
            (self.latent, 7 * 7 * self.channels),
            (4, 4, self.channels, self.channels),
            (4, 4, self.channels, 1),
        )
        fans = (self.latent, 4 * self.channels, 4 * self.channels)
        return tuple(
            jax.random.normal(key, shape) * np.sqrt(2 / fan)
            for key, shape, fan in zip(keys, shapes, fans, strict=True)
        )

    def decode(self, weights: tuple[jax.Array, ...], z: jax.Array) -> jax.Array:
        """The mean of the pixels, (784,)."""
        dense, *kernels = weights
        image = jax.nn.relu(z @ dense).reshape(1, 7, 7, self.channels)
        for i, kernel in enumerate(kernels):
            image = jax.nn.relu(image) if i else image
            image = jax.lax.conv_transpose(image, kernel, (2, 2), "SAME")
        return image.reshape(-1)


def convolutional_step(
    decoder: ConvolutionalDecoder, curvature: str, chunk_size: int | None, steps: int
) -> Callable[..., Any]:
    """(weights, xs, keys) → the one-sample ELBO's gradient, the search starting from zeros."""

    def loss(weights, xs, keys):
        def one(x, key):
            decode = functools.partial(decoder.decode, weights)

            def log_likelihood(eta):
                return gaussian(x, eta, jnp.log(0.1))

            def log_joint(z):
                return log_likelihood(decode(z)) + standard_normal(z)

            if curvature == "hessian":
                expand = exact_expansion(log_joint, chunk_size=chunk_size)
            else:
                expand = gauss_newton_expansion(decode, log_likelihood, chunk_size=chunk_size)
            posterior, _ = infer_posterior(expand, jnp.zeros(decoder.latent), num_steps=steps)
            return elbo(key, log_joint, posterior)

        return -jnp.mean(jax.vmap(one)(xs, keys))

    return jax.grad(loss)
