"""Samples of Laplace posteriors whose precision is not differentiated, against those that are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    FINITE_DIFFERENCE,
    LATENT,
    Network,
    assert_close,
    central_differences,
    flatten,
    random_layers,
    random_vector,
)

from vlae_jax import (
    elbo,
    exact_expansion,
    gauss_newton_expansion,
    infer_posterior,
    laplace_sample,
    newton_refine,
)
from vlae_jax.conjugate_gradients import log_det_by_solve, solve_scaled

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZE, PROBES = 12, 4000
NETWORK = Network("tanh", "bernoulli")
SOLVERS = ("cg", "cholesky")


# ---------------------------------------------------------------- conjugate gradients


def system(seed):
    """A precision, a guess of its inverse's diagonal, and right-hand sides of covariance P."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    precision = np.eye(SIZE) + 3 * root @ root.T
    scale = np.exp(0.3 * rng.normal(size=SIZE)) / np.diag(precision)
    rhs = rng.normal(size=(PROBES, SIZE)) @ np.linalg.cholesky(precision).T
    return precision, scale, rhs


@functools.partial(jax.jit, static_argnames=("tolerance", "max_products"))
def solve(precision, scale, rhs, guess, *, tolerance, max_products):
    def one(rhs, guess):
        return solve_scaled(
            lambda v: precision @ v,
            rhs,
            scale=scale,
            tolerance=tolerance,
            max_products=max_products,
            guess=(guess, precision @ guess),
        )

    return jax.vmap(one)(rhs, guess)


def test_a_solution_is_called_solved_where_its_residual_is_small_and_there_alone(x64):
    precision, scale, rhs = system(0)
    rhs = rhs[:200]
    for most in (4, 8, 40):
        found = solve(precision, scale, rhs, 0 * rhs, tolerance=0.1, max_products=most)
        residual = rhs - found.solution @ precision
        size = np.sqrt(np.sum(scale * residual**2, axis=1) / np.sum(scale * rhs**2, axis=1))
        np.testing.assert_array_equal(found.is_solved, size <= 0.1)
        assert np.all(found.num_products <= most)
        assert (most == 40) == np.all(found.is_solved)
    exact = solve(precision, scale, rhs, 0 * rhs, tolerance=1e-9, max_products=40).solution
    assert_close(exact, np.linalg.solve(precision, rhs.T).T, rtol=1e-7)


def test_a_good_guess_and_nothing_to_solve_take_no_product(x64):
    precision, scale, rhs = system(0)
    guess = -3 * np.linalg.solve(precision, rhs[:5].T).T
    options = {"tolerance": 1e-6, "max_products": 9}
    found = solve(precision, scale, rhs[:5], guess, **options)
    assert_close(found.solution, guess / -3)
    nothing = solve(precision, scale, 0 * rhs[:5], guess, **options)
    assert_close(nothing.solution, 0 * guess)
    for each in (found, nothing):
        assert np.all(each.is_solved) and np.all(each.num_products == 0)


@pytest.mark.parametrize("bad", ["concave", "nan"])
def test_what_cannot_be_solved_is_said(bad):
    matrix = -np.eye(SIZE) if bad == "concave" else np.full((SIZE, SIZE), np.nan)
    rhs = jnp.ones((1, SIZE))
    found = solve(jnp.asarray(matrix), jnp.ones(SIZE), rhs, 0 * rhs, tolerance=0.1, max_products=9)
    assert not found.is_solved[0] and np.all(np.isfinite(found.solution))
    unknown = solve(jnp.eye(SIZE), jnp.ones(SIZE), np.nan * rhs, rhs, tolerance=0.1, max_products=9)
    assert not unknown.is_solved[0]


def test_the_steps_of_a_solution_estimate_the_log_determinant(x64):
    """Each one is a quadratic form known by eigenvalues; their mean is log det P."""
    precision, scale, rhs = system(1)
    solved = solve(precision, scale, rhs, 0 * rhs, tolerance=1e-9, max_products=40)
    found = jax.jit(jax.vmap(log_det_by_solve, in_axes=(0, None)))(solved, jnp.asarray(scale))
    root = np.sqrt(scale)
    values, vectors = np.linalg.eigh(root[:, None] * precision * root)
    weights = ((root * rhs) @ vectors) ** 2
    assert_close(found, weights @ (np.log(values) / values) - np.sum(np.log(scale)), rtol=1e-6)
    error = np.std(found) / np.sqrt(PROBES)
    assert_close(np.mean(found), np.linalg.slogdet(precision)[1], standard_error=error)
    assert error < 0.2


# ---------------------------------------------------------------- noise and samples


@pytest.mark.parametrize("name", ["gauss_newton", "affine_head"])
def test_noise_has_the_precision_as_its_covariance(linear_gaussian, name):
    problem, truth = linear_gaussian

    @jax.jit
    def draw(problem, keys):
        products = problem.expansions()[name].products(problem.z_init)
        return jax.vmap(products.noise)(keys)

    noise = np.float64(draw(problem, jax.random.split(jax.random.key(0), PROBES)))
    root = np.linalg.cholesky(truth.covariance)  # whitens the noise from the right
    check_standard_normal(noise @ root)


def check_standard_normal(values):
    """Means 0 and covariance the identity, each within five standard errors."""
    count = len(values)
    assert_close(np.mean(values, axis=0), np.zeros(LATENT), standard_error=count**-0.5)
    second = values.T @ values / count
    error = np.sqrt((1 + np.eye(LATENT)) / count)
    assert_close(second, np.eye(LATENT), standard_error=error)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_exact_posterior_of_a_linear_decoder(linear_gaussian, solver):
    """By log densities as well: by Cholesky every sample gives log p(x), by products their mean."""
    problem, truth = linear_gaussian

    @jax.jit
    def draw(problem, mode, keys):
        def one(key):
            expand = problem.expansions()["affine_head"]
            sample = laplace_sample(key, expand, mode, solver=solver, tolerance=1e-3)
            return sample, elbo(key, problem.log_joint, sample)

        return jax.vmap(one)(keys)

    mode = jnp.asarray(truth.mode, problem.x.dtype)
    samples, bounds = draw(problem, mode, jax.random.split(jax.random.key(1), PROBES))
    assert np.all(samples.is_solved)
    check_standard_normal(
        (np.float64(samples.z) - mode) @ np.linalg.inv(np.linalg.cholesky(truth.covariance)).T
    )
    if solver == "cholesky":
        assert_close(bounds, np.full(PROBES, truth.log_evidence), rtol=1e-4)
    error = np.std(bounds) / np.sqrt(PROBES) + 1e-6 * abs(truth.log_evidence)
    assert_close(np.mean(bounds), truth.log_evidence, standard_error=error)


@functools.partial(jax.jit, static_argnames=("make", "solver", "max_products"))
def draw_one(z, *, make, solver, max_products=30):
    expand, options = make(), {"tolerance": 1e-3, "max_products": max_products}
    return laplace_sample(jax.random.key(0), expand, z, solver=solver, **options)


def softmax():
    return Network("relu", "categorical").gauss_newton(random_layers(0))


def saddle():
    return exact_expansion(lambda z: z @ z)


def bowl():
    return gauss_newton_expansion(lambda z: z, lambda eta: -jnp.arange(1.0, 4.0) @ eta**2)


def test_too_few_products_are_told():
    z = jnp.zeros(LATENT)
    sample = draw_one(z, make=bowl, solver="cg", max_products=1)
    assert not sample.is_solved and sample.num_products == 1
    assert np.all(np.isfinite(sample.z)) and np.isfinite(sample.log_q)
    assert draw_one(z, make=bowl, solver="cg", max_products=3).is_solved


def test_what_cannot_be_drawn_is_nan_and_told(x64):
    """A W that is not diagonal, without a noise of its own; a precision that is not definite."""
    z = random_vector(0, LATENT)
    for make, solver in ((softmax, "cg"), (saddle, "cholesky")):
        sample = draw_one(z, make=make, solver=solver)
        assert np.all(np.isnan(sample.z)) and not sample.is_solved
    assert draw_one(z, make=softmax, solver="auto").is_solved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "none"}, "gradient must be one of"),
        ({"solver": "lu"}, "solver must be one of"),
        ({"scale": jnp.ones(2)}, "scale must have the shape of the mode"),
        ({"tolerance": 0.0}, "tolerance must lie between 0 and 1"),
        ({"max_products": 0}, "max_products be at least 1"),
        ({"expand": lambda z: None}, "needs an expansion with a method `products`"),
        ({"expand": exact_expansion(lambda z: -z @ z), "solver": "cg"}, "cannot draw noise"),
    ],
)
def test_a_wrong_call_says_what_is_wanted(options, message):
    expand = gauss_newton_expansion(lambda z: z, lambda eta: -eta @ eta)
    call = {"expand": expand, "mode": jnp.zeros(LATENT), **options}
    with pytest.raises(ValueError, match=message):
        laplace_sample(jax.random.key(0), **call)


# ---------------------------------------------------------------- gradients


@functools.partial(jax.jit, static_argnames=("solver", "gradient"))
def gradients(layers, mode, keys, *, solver, gradient):
    """Of one-sample ELBOs at a mode with respect to all weights; of `infer_posterior` without."""

    def bound(layers, key):
        expand = NETWORK.gauss_newton(layers)
        if solver is None:
            posterior, _ = infer_posterior(expand, mode, num_steps=0, gradient=gradient)
        else:
            posterior = laplace_sample(
                key, expand, mode, solver=solver, gradient=gradient, tolerance=1e-6
            )
        return elbo(key, functools.partial(NETWORK.log_joint, layers), posterior)

    each = jax.vmap(jax.grad(bound), in_axes=(None, 0))(layers, keys)
    return jax.vmap(flatten)(each)


@functools.cache
def a_mode():
    layers = random_layers(0)
    return layers, newton_refine(NETWORK.gauss_newton(layers), jnp.zeros(LATENT), num_steps=20)[0]


@pytest.mark.parametrize("gradient", ["implicit", "stop"])
def test_gradients_are_unbiased(x64, gradient):
    """Against those through the Cholesky factor, where W and the decoder bend with z."""
    layers, mode = a_mode()
    split = functools.partial(jax.random.split, num=PROBES)
    exact = gradients(layers, mode, split(jax.random.key(1)), solver=None, gradient=gradient)
    for solver in SOLVERS:
        keys = split(jax.random.key(2))
        found = gradients(layers, mode, keys, solver=solver, gradient=gradient)
        assert np.all(np.any(found != 0, axis=1))
        variance = (np.var(exact, axis=0) + np.var(found, axis=0)) / PROBES
        error = np.sqrt(variance) + 1e-12
        assert_close(np.mean(found, axis=0), np.mean(exact, axis=0), standard_error=error)
        # As precise as those: the test would pass with noise alone.
        assert np.sum(np.var(found, axis=0)) < 1.2 * np.sum(np.var(exact, axis=0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_one_dimension_the_gradient_is_that_of_the_sample(x64, solver):
    """There it can move in one way only, mode + s √(P₀ / P), and log √P by ½ s² dP, on average."""
    network, layers = Network("relu", "bernoulli"), random_layers(2, (1, 4, 7))

    def search(layers, z):
        """The mode by full Newton steps, to rounding; the precision is the Hessian."""
        expand = network.gauss_newton(layers)
        for _ in range(3):
            _, grad, precision = expand(z)
            z = z + grad / precision[0]
        return z, expand(z).precision[0, 0]

    settle = jax.jit(search)
    mode = jnp.zeros(1)
    for _ in range(5):
        mode, precision = settle(layers, mode)

    @jax.jit
    def draw(layers):
        expand, options = network.gauss_newton(layers), {"tolerance": 1e-9, "max_products": 5}
        sample = laplace_sample(jax.random.key(0), expand, mode, solver=solver, **options)
        return jnp.append(sample.z, sample.log_q)

    s = draw(layers)[0] - mode[0]

    def moved(layers):
        there, precision_there = search(layers, mode)
        z = there[0] + s * jnp.sqrt(precision / precision_there)
        return jnp.stack([z, 0.5 * precision_there * s**2])

    found = jax.vmap(flatten)(jax.jit(jax.jacrev(draw))(layers))
    expected = central_differences(moved, layers)
    for one, other in zip(found, expected, strict=True):
        assert np.max(np.abs(other)) > 1e-3
        assert_close(one, other, rtol=FINITE_DIFFERENCE)
