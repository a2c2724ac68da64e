"""The programs that are timed: the package's own functions, batched, and their JAX baselines."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlae_jax.affine_head import WhitenedHead
from vlae_jax.bounds import elbo, importance_weighted_log_prob
from vlae_jax.densities import gaussian, standard_normal
from vlae_jax.expansions import Expansion, exact_expansion, gauss_newton_expansion
from vlae_jax.inference import infer_posterior
from vlae_jax.models.autoencoder import Observation, VariationalAutoencoder
from vlae_jax.models.laplace import vlae
from vlae_jax.models.systems import find_system
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


class ByJacobian(Observation):
    """An observation with the curvature JᵀWJ from the whole decoder's Jacobian J (dim, latent)."""

    def expansions(self) -> tuple[Expansion, Expansion | None]:
        """Gauss-Newton, nothing compressed."""
        return gauss_newton_expansion(self.model.decode, self.log_likelihood), None


class ByHessian(Observation):
    """An observation with the curvature from `jax.hessian`."""

    def expansions(self) -> tuple[Expansion, Expansion | None]:
        """Forward over reverse through the whole decoder."""
        return exact_expansion(self.log_joint), None


CURVATURES: dict[str, type[Observation]] = {
    "gram": Observation,
    "jacobian": ByJacobian,
    "hessian": ByHessian,
}
"""gram is what the package does by itself for a Gaussian of this shape."""


class Problem(NamedTuple):
    """Weights and data of given sizes."""

    sizes: Sizes
    graphdef: Any
    """The network's structure."""
    params: Any
    xs: jax.Array
    """(batch, dim), drawn from the model, so that there is a mode to find."""
    keys: jax.Array

    def model(self, params: Any) -> VariationalAutoencoder:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)

    def at(self, params: Any, x: jax.Array, curvature: str) -> Observation:
        """The model at one image, with the curvature of that name."""
        return CURVATURES[curvature](*self.model(params).at(x))


def build_problem(sizes: Sizes) -> Problem:
    """Random weights, and images drawn from them."""
    model = VariationalAutoencoder(
        sizes.dim,
        latent=sizes.latent,
        hidden=(sizes.hidden, sizes.hidden),
        activation="relu",
        likelihood="gaussian",
        variance=np.full(sizes.dim, 0.1),
        rngs=nnx.Rngs(0),
    )
    assert isinstance(model.head, nnx.Linear)
    model.head.kernel[...] *= 10.0  # a decoder that has learned something
    key_z, key_x, key = jax.random.split(jax.random.key(1), 3)
    zs = jax.random.normal(key_z, (sizes.batch, sizes.latent))
    noise = jnp.exp(0.5 * model.log_var) * jax.random.normal(key_x, (sizes.batch, sizes.dim))
    xs = jax.vmap(model.decode)(zs) + noise
    return Problem(sizes, *nnx.split(model), xs, jax.random.split(key, sizes.batch))


def training_gradient(
    problem: Problem, curvature: str, gradient: Any, damping: Any, solver: Any
) -> Callable[..., Any]:
    """(params, xs, keys) → what training minimizes, and its gradient; encoder included."""
    config = InferenceConfig(
        steps=problem.sizes.steps, gradient=gradient, damping=damping, solver=solver
    )

    def loss(params: Any, xs: jax.Array, keys: jax.Array) -> jax.Array:
        def one(x: jax.Array, key: jax.Array) -> jax.Array:
            at = problem.at(params, x, curvature)
            inference = vlae(at, key, config)
            return elbo(key, at.log_joint, inference.posterior) - inference.amortization_loss

        return -jnp.mean(jax.vmap(one)(xs, keys))

    return jax.value_and_grad(loss)


def posteriors(problem: Problem, curvature: str, damping: Any, solver: Any) -> Callable[..., Any]:
    """(params, xs) → the Laplace posterior of each image; nothing is differentiated."""

    def one(params: Any, x: jax.Array) -> GaussianPosterior:
        at = problem.at(params, x, curvature)
        expand, repair = at.expansions()
        posterior, _ = infer_posterior(
            expand,
            at.mean,
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

    def one(
        params: Any,
        head: WhitenedHead | None,
        x: jax.Array,
        mean: jax.Array,
        precision: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        posterior = GaussianPosterior(mean, jnp.linalg.cholesky(precision))
        estimate, info = importance_weighted_log_prob(
            key,
            problem.model(params).at(x, head=head).log_joint,
            posterior,
            num_samples=sizes.samples,
            chunk_size=sizes.chunk,
        )
        return estimate, info.standard_error

    return jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))


class Network(NamedTuple):
    """A network of the package, whose systems are compared."""

    shape: tuple[int, int, int]
    """Height, width and channels of an image."""
    latent: int
    hidden: tuple[int, ...]
    channels: tuple[int, ...] = ()
    """Of a convolutional network; none for a fully connected one."""
    batch: int = 128


def system_step(
    network: Network, inference: InferenceConfig
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What training minimizes, with its gradient, as a function, and arguments for it.

    The images are draws of a decoder that has learned something. The encoder's variances are those
    of the start, one: what a trained encoder would spare is not counted.
    """
    dim = int(np.prod(network.shape))
    model = VariationalAutoencoder(
        dim,
        latent=network.latent,
        hidden=network.hidden,
        activation="relu",
        likelihood="gaussian",
        variance=np.full(dim, 0.1),
        network="conv" if network.channels else "mlp",
        channels=network.channels,
        image_shape=network.shape,
        rngs=nnx.Rngs(0),
    )
    last = model.head if isinstance(model.head, nnx.Linear) else model.head.blocks
    last.kernel[...] *= 10.0
    key_z, key_x, key = jax.random.split(jax.random.key(1), 3)
    zs = jax.random.normal(key_z, (network.batch, network.latent))
    xs = jax.vmap(model.decode)(zs)
    xs += jnp.exp(0.5 * model.log_var) * jax.random.normal(key_x, xs.shape)
    graphdef, params = nnx.split(model)
    system = find_system(inference.method)

    def loss(params: Any, xs: jax.Array, keys: jax.Array) -> jax.Array:
        def one(x: jax.Array, key: jax.Array) -> jax.Array:
            at = nnx.merge(graphdef, params).at(x)
            found = system(at, key, inference)
            return elbo(key, at.log_joint, found.posterior) - found.amortization_loss

        return -jnp.mean(jax.vmap(one)(xs, keys))

    return jax.value_and_grad(loss), (params, xs, jax.random.split(key, network.batch))


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

    def loss(weights: tuple[jax.Array, ...], xs: jax.Array, keys: jax.Array) -> jax.Array:
        def one(x: jax.Array, key: jax.Array) -> jax.Array:
            decode = functools.partial(decoder.decode, weights)

            def log_likelihood(eta: jax.Array) -> jax.Array:
                return gaussian(x, eta, jnp.log(0.1))

            def log_joint(z: jax.Array) -> jax.Array:
                return log_likelihood(decode(z)) + standard_normal(z)

            if curvature == "hessian":
                expand = exact_expansion(log_joint, chunk_size=chunk_size)
            else:
                expand = gauss_newton_expansion(decode, log_likelihood, chunk_size=chunk_size)
            posterior, _ = infer_posterior(expand, jnp.zeros(decoder.latent), num_steps=steps)
            return elbo(key, log_joint, posterior)

        return -jnp.mean(jax.vmap(one)(xs, keys))

    return jax.grad(loss)
