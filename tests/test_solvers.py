"""Conjugate gradients against the factorization, and columns in chunks against all at once."""

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
    MatrixFreeExpansion,
    exact_expansion,
    gauss_newton_expansion,
    infer_posterior,
    newton_refine,
)
from vlae_jax.affine_head import (
    compress_affine_gaussian,
    whiten_affine_head,
    whitened_affine_gaussian,
)
from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.refinement import SHORTFALL

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZE = 30
NETWORK = Network("tanh", "bernoulli")


def precisions(count: int, smallest: float) -> np.ndarray:
    """Symmetric matrices, eigenvalues from `smallest` to 10⁴ as those of a trained decoder."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.normal(size=(count, SIZE, SIZE)))[0]
    eigenvalues = smallest + 10 ** rng.uniform(-2, 4, size=(count, SIZE)) - 0.01
    eigenvalues[:, 0] = smallest
    return bases * eigenvalues[:, None, :] @ np.swapaxes(bases, 1, 2)


@functools.partial(jax.jit, static_argnames="shortfall")
@functools.partial(jax.vmap, in_axes=(0, 0, None))
def solve(precision, rhs, shortfall):
    return conjugate_gradients(lambda v: precision @ v, rhs, shortfall=shortfall)


@pytest.mark.parametrize("shortfall", [SHORTFALL, 1e-2, 1e-6])
def test_the_promised_share_of_the_decrement_is_held(x64, shortfall):
    """For the smallest eigenvalue that the bound supposes, 1, and for larger ones."""
    for smallest in (1.0, 3.0):
        matrices = precisions(200, smallest)
        rhs = 100 * np.random.default_rng(1).normal(size=(200, SIZE))
        found = solve(matrices, rhs, shortfall)
        exact = np.linalg.solve(matrices, rhs[..., None])[..., 0]
        # The decrement of a direction under its own quadratic model: gᵀv - ½ vᵀPv.
        held = np.einsum("bi,bi->b", rhs, found)
        held -= 0.5 * np.einsum("bi,bij,bj->b", found, matrices, found)
        decrement = 0.5 * np.einsum("bi,bi->b", rhs, exact)
        assert np.all(held >= (1 - shortfall) * decrement)
        assert np.all(held <= decrement * (1 + 1e-10))


def test_the_loop_ends_early_where_it_may(x64):
    """A tenth may be missing: fewer products than dimensions, by far."""
    products = []

    def times(precision, v):
        jax.debug.callback(lambda: products.append(1))
        return precision @ v

    precision = precisions(1, 1.0)[0]
    rhs = precision @ np.ones(SIZE)
    conjugate_gradients(functools.partial(times, precision), jnp.asarray(rhs), shortfall=0.1)
    jax.effects_barrier()
    assert 0 < len(products) <= SIZE // 2


def test_negative_curvature_ends_the_loop_with_a_direction_of_ascent(x64):
    matrices = precisions(200, 1.0)
    matrices -= np.linspace(2, 2000, 200)[:, None, None] * np.eye(SIZE)
    rhs = np.random.default_rng(2).normal(size=(200, SIZE))
    found = solve(matrices, rhs, 1e-6)
    assert np.all(np.isfinite(found))
    assert np.all(np.einsum("bi,bi->b", rhs, found) > 0)
    concave = -4 * np.eye(SIZE)[None]
    assert_close(solve(concave, rhs[:1], 0.1), rhs[:1] / 4)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_nothing_to_solve_gives_no_direction(bad):
    matrix = np.float32(precisions(1, 1.0))
    found = solve(matrix, jnp.full((1, SIZE), bad), 0.1)
    assert_close(found, np.zeros((1, SIZE)))
    found = solve(np.full_like(matrix, np.nan), jnp.ones((1, SIZE)), 0.1)
    assert_close(found, np.zeros((1, SIZE)))


@pytest.mark.parametrize("make", [NETWORK.exact, NETWORK.gauss_newton], ids=["exact", "GN"])
def test_products_are_those_of_the_matrix(x64, make):
    layers, z, v = random_layers(0), random_vector(0, LATENT), random_vector(1, LATENT)

    @jax.jit
    def both(layers, z, v):
        expand = make(layers)
        products = expand.products(z)
        return (products.value, products.grad, products.times(v)), expand(z)

    products, quadratic = both(layers, z, v)
    assert_close(products, (quadratic.value, quadratic.grad, quadratic.precision @ v))


@pytest.mark.parametrize("damping", ["paper", "line_search", "trust_region"])
def test_both_solvers_find_the_same_mode(x64, damping):
    """Where the search has ended; the iterates may differ."""
    layers, z_init = random_layers(4), 0.3 * random_vector(4, LATENT)

    @jax.jit
    def modes(layers, z_init):
        expand = NETWORK.gauss_newton(layers)
        return [
            newton_refine(expand, z_init, num_steps=60, damping=damping, solver=solver)
            for solver in ("cholesky", "cg")
        ]

    (one, first), (other, second) = modes(layers, z_init)
    assert first.converged and second.converged
    if damping == "paper":
        # Its steps halve ever less: after 60 of them the first error has a factor of 0.07.
        assert_close(other, one, rtol=1e-3)
    else:
        assert_close(other, one, rtol=1e-6)
        assert np.all(np.diff(second.log_joint) >= 0)


def test_unrolled_gradient_through_conjugate_gradients_equals_differences(x64):
    arguments = (random_layers(10), 0.5 * random_vector(10, LATENT))

    def chain(arguments):
        layers, z_init = arguments
        posterior, _ = infer_posterior(
            NETWORK.gauss_newton(layers),
            z_init,
            num_steps=3,
            damping="paper",
            gradient="unroll",
            solver="cg",
        )
        numbers = flatten((posterior.mean, posterior.chol_precision))
        return numbers @ jnp.cos(jnp.arange(numbers.size))

    gradient = jax.jit(jax.grad(chain))(arguments)
    assert_close(flatten(gradient), central_differences(chain, arguments), rtol=1e-5)


def test_the_solver_is_checked():
    plain = lambda z: exact_expansion(lambda z: -z @ z)(z)  # noqa: E731
    z = jnp.zeros(LATENT)
    with pytest.raises(ValueError, match="products"):
        newton_refine(plain, z, num_steps=1, solver="cg")
    with pytest.raises(ValueError, match="'auto', 'cholesky', 'cg'"):
        newton_refine(plain, z, num_steps=1, solver="lu")
    # Without products `auto` still works, whatever the size.
    mode, _ = newton_refine(plain, jnp.ones(40), num_steps=1)
    assert_close(mode, np.zeros(40))


def test_any_expansion_can_be_given_products(x64):
    """A diagonal one, of the user's own making."""
    weights = jnp.arange(1.0, 41.0)
    target = random_vector(0, 40)

    def log_joint(z):
        return -0.5 * weights @ (z - target) ** 2

    products = exact_expansion(log_joint).products
    expand = MatrixFreeExpansion(exact_expansion(log_joint), products)
    mode, info = newton_refine(expand, jnp.zeros(40), num_steps=30, solver="cg")
    assert info.converged
    assert_close(mode, target, rtol=1e-2)


def test_the_precision_has_second_derivatives(x64):
    """Its own rule of differentiation can be differentiated again."""
    layers, z = random_layers(2), random_vector(2, LATENT)
    weights = np.random.default_rng(0).normal(size=(LATENT, LATENT))

    def number(z):
        return jnp.sum(weights * NETWORK.gauss_newton(layers)(z).precision)

    slope = jax.grad(number)
    assert_close(jax.jit(slope)(z), central_differences(number, z), rtol=FINITE_DIFFERENCE)
    assert_close(
        jax.jit(jax.hessian(number))(z), central_differences(slope, z), rtol=FINITE_DIFFERENCE
    )


# ---------------------------------------------------------------- columns in chunks


@pytest.mark.parametrize("make", [NETWORK.exact, NETWORK.gauss_newton], ids=["exact", "GN"])
@pytest.mark.parametrize("chunk_size", [1, 2, LATENT, 100])
def test_chunks_of_columns_change_nothing(x64, make, chunk_size):
    layers, z = random_layers(0), random_vector(0, LATENT)
    decode = functools.partial(NETWORK.decode, layers)
    chunked = {
        NETWORK.exact: lambda layers: exact_expansion(
            functools.partial(NETWORK.log_joint, layers), chunk_size=chunk_size
        ),
        NETWORK.gauss_newton: lambda layers: gauss_newton_expansion(
            functools.partial(NETWORK.decode, layers),
            NETWORK.log_likelihood,
            chunk_size=chunk_size,
        ),
    }[make]
    assert decode(z).ndim == 1
    weights = np.random.default_rng(0).normal(size=(LATENT, LATENT))

    def number(expand, z):
        quadratic = expand(z)
        return jnp.sum(weights * quadratic.precision), quadratic

    def of_layers(make, layers):
        return number(make(layers), z)

    differentiate = functools.partial(jax.value_and_grad, has_aux=True)
    for_chunks = jax.jit(differentiate(functools.partial(of_layers, chunked)))(layers)
    at_once = jax.jit(differentiate(functools.partial(of_layers, make)))(layers)
    assert_close(for_chunks, at_once)


def test_chunks_bound_the_memory_of_a_wide_decoder():
    """Temporary bytes of value and gradient, as the compiler plans them."""
    latent, width = 64, 4096
    scale = jnp.ones(width)

    def temporary(chunk_size):
        def trace(scale, z):
            expand = gauss_newton_expansion(
                lambda z: jnp.tanh(scale * jnp.tile(z, width // latent)),
                lambda eta: -0.5 * eta @ eta,
                chunk_size=chunk_size,
            )
            return jnp.trace(expand(z).precision)

        compiled = jax.jit(jax.grad(trace)).lower(scale, jnp.ones(latent)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    jacobian = latent * width * 4
    assert temporary(4) < jacobian < temporary(None)


def test_a_jacobian_that_cannot_fit_is_refused_with_its_size():
    def decode(z):
        return jnp.broadcast_to(z[0], (2**44,))

    expand = gauss_newton_expansion(decode, lambda eta: -0.5 * eta @ eta)
    with pytest.raises(ValueError, match=r"4 latent dimensions by .* GiB.*chunk_size"):
        jax.eval_shape(expand, jnp.zeros(4))


# ---------------------------------------------------------------- the affine head


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("sizes", [(4, 9), (9, 4)], ids=["tall", "wide"])
def test_the_whitened_head_is_the_gaussian_in_float64(x64, per_pixel, sizes):
    hidden, dim = sizes
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(hidden, dim)), rng.normal(size=dim)
    log_var = rng.uniform(-2, 1, dim if per_pixel else ())
    x, a = 3 * rng.normal(size=dim), rng.normal(size=hidden)
    variance = np.exp(np.broadcast_to(log_var, dim))
    square = np.sum((x - a @ kernel - bias) ** 2 / variance)
    expected = -0.5 * (square + np.sum(np.log(2 * np.pi * variance)))
    head = whiten_affine_head(jnp.asarray(kernel), log_var)
    assert head.factor.shape == (min(sizes), hidden)
    whitened = whitened_affine_gaussian(head, jnp.asarray(bias), log_var, jnp.asarray(x))
    assert_close(whitened(jnp.asarray(a)), expected)
    compressed = compress_affine_gaussian(jnp.asarray(kernel), jnp.asarray(bias), log_var, x)
    assert_close(compressed(jnp.asarray(a)), expected)


def test_the_whitened_head_does_not_cancel_in_float32():
    """A residual a thousand times smaller than the data: the expanded square loses it."""
    rng = np.random.default_rng(1)
    hidden, dim = 20, 50
    kernel, a = rng.normal(size=(hidden, dim)), rng.normal(size=hidden)
    log_var, bias = np.log(1e-6), np.zeros(dim)
    x = a @ kernel + 1e-3 * rng.normal(size=dim)
    single = [jnp.asarray(array, jnp.float32) for array in (kernel, bias, log_var, x, a)]
    kernel, bias, log_var, x, a = [np.float64(array) for array in single]
    square = np.sum((x - a @ kernel - bias) ** 2) / np.exp(log_var)
    expected = -0.5 * (square + dim * (np.log(2 * np.pi) + log_var))
    head = whiten_affine_head(single[0], single[2])
    found = whitened_affine_gaussian(head, *single[1:4])(single[4])
    expanded = compress_affine_gaussian(*single[:4])(single[4])
    assert abs(found - expected) < 0.2 < abs(expanded - expected)
