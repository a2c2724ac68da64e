"""Small problems with known answers, the truths they are held to, and the one comparison."""

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.flatten_util import ravel_pytree

from vlae_jax import (
    Expansion,
    Quadratic,
    affine_head_expansion,
    bernoulli,
    categorical,
    discretized_logistic,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    gaussian_heteroscedastic,
    poisson,
    standard_normal,
    student_t,
)

LATENT, HIDDEN, DIM = 3, 5, 7
"""All different, so that a transposed matrix cannot pass."""

# Rounding of some hundred operations on well-conditioned numbers.
TOLERANCES = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}
FINITE_DIFFERENCE = 1e-6
"""What central differences in float64 reach, relative to the largest derivative."""


def assert_close(actual, expected, *, rtol=None, standard_error=None):
    """Every number of one tree is that of the other, up to rounding or to sampling noise.

    The error allowed in an array is relative to its largest entry, and follows from the dtype of
    `actual`; or it is five standard errors. NaN is never close.
    """
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape, f"{one.shape} is not {other.shape}"
        if standard_error is not None:
            allowed = 5.0 * np.asarray(standard_error)
        else:
            relative = TOLERANCES.get(one.dtype, 0.0) if rtol is None else rtol
            allowed = relative * (np.max(np.abs(other), initial=0.0) or 1.0)
        error = np.abs(one.astype(np.float64) - other.astype(np.float64))
        assert np.all(error <= allowed), f"off by {np.max(error)}:\n{one}\nis not\n{other}"


def each(density: Callable) -> Callable:
    """A density of vectors as one of scalars, over arrays of them, compiled."""

    def one(*scalars):
        return density(*(jnp.reshape(scalar, (1,)) for scalar in scalars))

    return jax.jit(jnp.vectorize(one))


def assert_values(actual, expected, terms=1.0):
    """Every value for itself, relative to it or to the largest of the terms it is a sum of."""
    assert np.all(np.isfinite(expected))
    actual = np.asarray(actual)
    allowed = TOLERANCES[actual.dtype] * np.maximum(np.abs(expected), terms)
    error = np.abs(actual.astype(np.float64) - expected)
    assert np.all(error <= allowed), f"off by {np.max(error / allowed)} times the tolerance"


def rounded(dtype, *arrays):
    """Arrays in `dtype`, broadcast together, and the same numbers in float64 for the truth."""
    arrays = np.broadcast_arrays(*(np.asarray(array, dtype) for array in arrays))
    return [jnp.asarray(array) for array in arrays], [np.float64(array) for array in arrays]


def central_differences(function: Callable, point: Any, step: float = 1e-5) -> np.ndarray:
    """The derivative of `function` with respect to the flattened `point`, on the last axis."""
    assert jax.config.jax_enable_x64, "finite differences need float64"
    flat, unravel = ravel_pytree(point)
    offsets = step * jnp.eye(flat.size)
    evaluate = jax.jit(jax.vmap(lambda moved: function(unravel(moved))))
    slopes = (evaluate(flat + offsets) - evaluate(flat - offsets)) / (2 * step)
    return np.moveaxis(np.asarray(slopes), 0, -1)


def flatten(tree: Any) -> jax.Array:
    """All numbers of a tree in one vector, as `central_differences` orders them."""
    return ravel_pytree(tree)[0]


# ---------------------------------------------------------------- probabilistic PCA


class LinearGaussian(NamedTuple):
    """p(z) = N(0, I), p(x | z) = N(z @ kernel + bias, exp(log_var)): all is known exactly."""

    kernel: jax.Array
    bias: jax.Array
    log_var: jax.Array
    x: jax.Array
    z_init: jax.Array

    def decode(self, z):
        return z @ self.kernel + self.bias

    def log_likelihood(self, eta):
        return gaussian(self.x, eta, self.log_var)

    def log_joint(self, z):
        return self.log_likelihood(self.decode(z)) + standard_normal(z)

    def expansions(self) -> dict[str, Expansion]:
        return {
            "exact": exact_expansion(self.log_joint),
            "gauss_newton": gauss_newton_expansion(self.decode, self.log_likelihood),
            "affine_head": affine_head_expansion(
                lambda z: z, self.kernel, self.bias, self.log_var, self.x
            ),
        }


class Truth(NamedTuple):
    """What float64 numpy and scipy say of a `LinearGaussian`."""

    log_evidence: np.float64
    mode: np.ndarray
    covariance: np.ndarray


def linear_gaussian(seed: int, dtype: type, per_pixel: bool) -> tuple[LinearGaussian, Truth]:
    rng = np.random.default_rng(seed)
    problem = LinearGaussian(
        kernel=rng.normal(size=(LATENT, DIM)),
        bias=rng.normal(size=DIM),
        log_var=rng.uniform(-1.5, 0.5, DIM if per_pixel else ()),
        x=2.0 * rng.normal(size=DIM),
        z_init=rng.normal(size=LATENT),
    )
    # The truth is that of the rounded numbers.
    problem = jax.tree.map(lambda array: np.asarray(array, dtype), problem)
    kernel, bias, log_var, x, _ = jax.tree.map(np.float64, problem)
    noise = np.diag(np.exp(np.broadcast_to(log_var, DIM)))
    log_evidence = scipy.stats.multivariate_normal.logpdf(x, bias, kernel.T @ kernel + noise)
    covariance = np.linalg.inv(kernel @ np.linalg.inv(noise) @ kernel.T + np.eye(LATENT))
    mode = covariance @ kernel @ np.linalg.inv(noise) @ (x - bias)
    truth = Truth(np.float64(log_evidence), mode, covariance)
    return jax.tree.map(jnp.asarray, problem), truth


# ---------------------------------------------------------------- networks

Layers = list[tuple[jax.Array, jax.Array]]

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "softplus": jax.nn.softplus}


def random_layers(seed: int, sizes=(LATENT, HIDDEN, HIDDEN, DIM), dtype: type = float) -> Layers:
    """Kernels (in, out) of He's scale, and biases that keep units away from their kinks."""
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / a), dtype),
            jnp.asarray(0.5 * rng.normal(size=b), dtype),
        )
        for a, b in itertools.pairwise(sizes)
    ]


def random_vector(seed: int, size: int, dtype: type = float) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, size]).normal(size=size), dtype)


def features(layers: Layers, activation: str, z: jax.Array) -> jax.Array:
    for kernel, bias in layers[:-1]:
        z = ACTIVATIONS[activation](z @ kernel + bias)
    return z


def decode(layers: Layers, activation: str, z: jax.Array) -> jax.Array:
    kernel, bias = layers[-1]
    return features(layers, activation, z) @ kernel + bias


def kink_margin(layers: Layers, points: jax.Array) -> float:
    """The smallest distance of any ReLU's input from 0 at any of the points."""
    margin = np.inf
    for kernel, bias in layers[:-1]:
        points = points @ kernel + bias
        margin = min(margin, float(jnp.min(jnp.abs(points))))
        points = jax.nn.relu(points)
    return margin


class Likelihood(NamedTuple):
    """A log density of x given η in its natural parameter, and an x to use it on."""

    log_prob: Callable
    x: np.ndarray


LIKELIHOODS = {
    "gaussian": Likelihood(
        lambda x, eta: gaussian(x, eta, -0.7), np.array([0.3, -1, 2, 0.5, -0.2, 1.1, -2])
    ),
    "gaussian_per_pixel": Likelihood(
        lambda x, eta: gaussian(x, eta, jnp.linspace(-1, 1, DIM).astype(eta.dtype)),
        np.array([0.3, -1, 2, 0.5, -0.2, 1.1, -2]),
    ),
    "bernoulli": Likelihood(bernoulli, np.array([1.0, 0, 0, 1, 1, 0, 1])),
    "categorical": Likelihood(lambda x, eta: categorical(x.astype(int), eta), np.array(4)),
    "poisson": Likelihood(poisson, np.array([0.0, 3, 1, 0, 2, 0, 5])),
    "discretized_logistic": Likelihood(
        lambda x, eta: discretized_logistic(x, eta, -1.0, levels=6),
        np.array([0, 0.2, 1, 0.6, 0.4, 1, 0.8]),
    ),
}


class Network(NamedTuple):
    """One example of a decoder network with a likelihood, as functions of its weights."""

    activation: str
    likelihood: str

    def decode(self, layers, z):
        return decode(layers, self.activation, z)

    def log_likelihood(self, eta):
        log_prob, x = LIKELIHOODS[self.likelihood]
        return log_prob(jnp.asarray(x, eta.dtype), eta)

    def log_joint(self, layers, z):
        return self.log_likelihood(self.decode(layers, z)) + standard_normal(z)

    def exact(self, layers) -> Expansion:
        return exact_expansion(functools.partial(self.log_joint, layers))

    def gauss_newton(self, layers) -> Expansion:
        return gauss_newton_expansion(functools.partial(self.decode, layers), self.log_likelihood)


# ---------------------------------------------------------------- indefinite precisions


class Indefinite(NamedTuple):
    """A log joint whose exact precision depends on x: positive definite for one, not the other."""

    log_joint: Callable
    stand_in: Callable
    good_x: np.ndarray
    bad_x: np.ndarray


def _heteroscedastic() -> Indefinite:
    """The Fisher information of (mean, log variance), diag(1/variance, 1/2), is the stand-in."""

    def log_joint(kernel, x, z):
        return gaussian_heteroscedastic(x, z @ kernel) + standard_normal(z)

    def stand_in(kernel, x):
        def expand(z):
            log_var = jnp.split(z @ kernel, 2)[1]
            fisher = jnp.concatenate([jnp.exp(-log_var), jnp.full_like(log_var, 0.5)])
            quadratic = exact_expansion(lambda z: log_joint(kernel, x, z))(z)
            identity = jnp.eye(z.size, dtype=z.dtype)
            return Quadratic(
                quadratic.value, quadratic.grad, (kernel * fisher) @ kernel.T + identity
            )

        return expand

    # At z = 0 the mean is 0 and x = 0 fits it.
    return Indefinite(log_joint, stand_in, np.zeros(4), np.array([4.0, -5, 1, -1]))


def _student_t() -> Indefinite:
    def log_joint(kernel, x, z):
        return student_t(x, z @ kernel, 0.0, 3.0) + standard_normal(z)

    def stand_in(kernel, x):
        def information(eta):  # (ν + 1) / (ν + 3) a dimension
            return -0.5 * (4 / 6) * eta @ eta

        return gauss_newton_expansion(lambda z: z @ kernel, information)

    return Indefinite(log_joint, stand_in, np.zeros(8), np.full(8, 4.0))


INDEFINITE = {"heteroscedastic": _heteroscedastic(), "student_t": _student_t()}


def indefinite_kernel() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=(LATENT, 8)))


# ---------------------------------------------------------------- other processes


def flip_a_bit(folder: Path, rng: np.random.Generator) -> Path:
    """Change one bit of one file somewhere in a checkpoint that says more than when it was made."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    marks = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = [file for file in files if file.name not in marks]
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    return file


def run_in_subprocess(code: str, *, timeout: float, **environment: str) -> str:
    """Run Python code beside the tests, in a fresh interpreter with a time limit; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
