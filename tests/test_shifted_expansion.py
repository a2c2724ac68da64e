"""The repair for any log joint: matrices of known eigenvalues, and indefinite problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    FINITE_DIFFERENCE,
    INDEFINITE,
    LATENT,
    assert_close,
    central_differences,
    indefinite_kernel,
)

from vlae_jax import (
    Quadratic,
    exact_expansion,
    infer_posterior,
    laplace_posterior,
    newton_refine,
    shifted_expansion,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

SPECTRA = {
    "above the floor": [1.5, 2, 40],
    "at the floor": [1.0, 1, 1],
    "positive, below the floor": [0.25, 2, 40],
    "indefinite": [-3, 2, 40],
    "negative definite": [-5, -4, -0.5],
    "zero": [0, 0, 0],
    "three equal": [-2, -2, -2],
    "two equal": [-2, -2, 7],
}
UNTOUCHED = [name for name, spectrum in SPECTRA.items() if min(spectrum) >= 1]


def rotation(seed: int, size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def matrices(dtype) -> jax.Array:
    """One of each spectrum; those of equal eigenvalues are diagonal, so that they stay equal."""
    stacked = []
    for seed, spectrum in enumerate(SPECTRA.values()):
        basis = rotation(seed, 3) if len(set(spectrum)) > 1 else np.eye(3)
        matrix = (basis * np.array(spectrum)) @ basis.T
        stacked.append(0.5 * (matrix + matrix.T))
    return jnp.asarray(np.stack(stacked), dtype)


def constant(precision):
    """An expansion whose precision is the same everywhere."""

    def expand(z):
        return Quadratic(-0.5 * z @ precision @ z, -precision @ z, precision)

    return expand


@functools.partial(jax.jit, static_argnames="floor")
def shift(batch, floor=1.0):
    """The expansions of a batch of matrices, as they are and shifted."""
    z = jnp.arange(1, batch.shape[-1] + 1, dtype=batch.dtype)
    return jax.vmap(
        lambda precision: (
            constant(precision)(z),
            shifted_expansion(constant(precision), floor=floor)(z),
        )
    )(batch)


@pytest.mark.parametrize("floor", [1.0, 0.5, 10.0])
def test_the_smallest_eigenvalue_is_lifted_to_the_floor(dtype, floor):
    before, after = shift(matrices(dtype), floor)
    for i, spectrum in enumerate(SPECTRA.values()):
        lift = max(floor - min(spectrum), 0.0)
        expected = np.float64(before.precision[i]) + lift * np.eye(3)
        assert_close(after.precision[i], expected)
        assert_close(
            np.linalg.eigvalsh(after.precision[i]), np.sort(np.array(spectrum, float)) + lift
        )


def test_value_gradient_and_what_is_above_the_floor_keep_their_bits(dtype):
    """In one batch with those that are lifted, and with some that are not finite."""
    batch = matrices(dtype)
    broken = jnp.stack([jnp.full((3, 3), jnp.nan), jnp.eye(3).at[0, 1].set(jnp.inf)]).astype(dtype)
    before, after = shift(jnp.concatenate([batch, broken]))
    np.testing.assert_array_equal(after.value, before.value)
    np.testing.assert_array_equal(after.grad, before.grad)
    for i, name in enumerate(SPECTRA):
        same = np.array_equal(after.precision[i], before.precision[i])
        assert same == (name in UNTOUCHED), name
    assert not np.any(np.all(np.isfinite(after.precision[len(SPECTRA) :]), axis=(1, 2)))


def test_what_is_not_finite_is_flagged_and_not_repaired():
    """And the one beside it is."""

    @jax.jit
    @jax.vmap
    def infer(precision):
        expand = constant(precision)
        return infer_posterior(expand, jnp.ones(3), num_steps=2, repair=shifted_expansion(expand))

    broken = [jnp.full((3, 3), jnp.nan), jnp.diag(jnp.array([1.0, jnp.inf, 1]))]
    posterior, info = infer(jnp.stack([*broken, -jnp.eye(3)]))
    np.testing.assert_array_equal(info.is_pd, [False, False, False])
    finite = np.all(np.isfinite(posterior.chol_precision), axis=(1, 2))
    np.testing.assert_array_equal(finite, [False, False, True])
    assert not np.any(info.converged[:2])


def test_gradients_hold_the_shift_constant_and_are_finite_where_eigenvalues_meet(x64):
    """Through the factor, against differences of the same matrix with its shift held."""
    batch = matrices(float)

    def weigh(chol):
        return jnp.sum(chol * jnp.sin(1 + jnp.arange(9.0).reshape(3, 3)))

    @jax.jit
    @jax.grad
    def slope(batch):
        def one(precision):
            expand = constant(precision)
            repair = shifted_expansion(expand)
            return weigh(laplace_posterior(expand, jnp.zeros(3), repair=repair).chol_precision)

        return jnp.sum(jax.vmap(one)(batch))

    slopes = slope(batch)
    for i, spectrum in enumerate(SPECTRA.values()):
        # A factor is repaired where there is none, not where it is merely below the floor.
        lift = 1 - min(spectrum) if min(spectrum) <= 0 else 0.0

        def held(precision, lift=lift):
            lifted = 0.5 * (precision + precision.T) + lift * jnp.eye(3)
            return weigh(jnp.linalg.cholesky(lifted))

        expected = central_differences(held, batch[i]).reshape(3, 3)
        assert_close(slopes[i], expected, rtol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("size", [1, 2, 8, 50])
def test_badly_scaled_precisions_are_factored_in_float32(size):
    """Eigenvalues of both signs over 20 decades, entries to 1e30: none fails, none shifts idly."""
    rng = np.random.default_rng(size)
    count = 4000 // size
    spectra = rng.choice([-1, 1], (count, size)) * 10 ** rng.uniform(-10, 10, (count, size))
    spectra *= 10 ** rng.uniform(-20, 20, (count, 1))
    bases = np.linalg.qr(rng.normal(size=(count, size, size)))[0]
    # Some are badly scaled by their axes, not by their eigenvectors.
    bases[::3] = np.eye(size)
    batch = jnp.asarray((bases * spectra[:, None]) @ np.swapaxes(bases, 1, 2), jnp.float32)

    @jax.jit
    @jax.grad
    def slope(batch):
        def one(precision):
            expand = constant(precision)
            repair = shifted_expansion(expand)
            chol = laplace_posterior(expand, jnp.zeros(size), repair=repair).chol_precision
            return jnp.sum(jnp.log(jnp.diagonal(chol)))

        return jnp.sum(jax.vmap(one)(batch))

    _, after = shift(batch)
    lifted = np.asarray(after.precision, np.float64)
    assert np.all(np.isfinite(np.linalg.cholesky(after.precision)))
    assert np.all(np.isfinite(slope(batch)))
    largest = np.max(np.abs(spectra), axis=1)
    target = np.maximum(1.0, 8 * size * np.finfo(np.float32).eps * largest)
    smallest = np.linalg.eigvalsh(lifted)[:, 0]
    needless = np.min(spectra, axis=1) - target  # what was above the target before stays there
    assert np.all(smallest <= np.maximum(needless, 0) + 2 * target)


@pytest.mark.slow
@pytest.mark.parametrize("name", INDEFINITE)
def test_repairs_the_inference_of_indefinite_examples_alone(name):
    """A batch of one example that needs it and two that do not, in float32."""
    problem, kernel = INDEFINITE[name], indefinite_kernel().astype(jnp.float32)
    z_init = jnp.zeros(LATENT)

    def expand_and_repair(kernel, x):
        expand = exact_expansion(functools.partial(problem.log_joint, kernel, x))
        return expand, shifted_expansion(expand)

    def infer(x, is_repaired):
        expand, repair = expand_and_repair(kernel, x)
        options = {"num_steps": 4, "repair": repair if is_repaired else None}
        return (
            infer_posterior(expand, z_init, **options),
            newton_refine(expand, z_init, damping="trust_region", **options)[1],
            laplace_posterior(expand, z_init, repair=options["repair"]),
        )

    def objective(kernel, x):
        expand, repair = expand_and_repair(kernel, x)
        posterior, _ = infer_posterior(expand, z_init, num_steps=4, repair=repair)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in posterior)

    @jax.jit
    def everything(xs):
        plain, repaired = (
            jax.vmap(functools.partial(infer, is_repaired=way))(xs) for way in (False, True)
        )
        return plain, repaired, jax.vmap(jax.grad(objective), (None, 0))(kernel, xs)

    xs = jnp.asarray(np.stack([problem.good_x, problem.bad_x, problem.good_x]), jnp.float32)
    plain, repaired, slopes = everything(xs)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((repaired, slopes)))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(repaired), strict=True):
        np.testing.assert_array_equal(one[::2], other[::2])
    assert np.all(np.isnan(plain[2].chol_precision[1]))
    for info in (repaired[0][1], repaired[1]):
        assert info.steps_used[1] > 0
        assert np.all(np.diff(info.log_joint[1]) >= 0)
        assert info.log_joint[1, -1] > info.log_joint[1, 0] + 1
    chol = np.float64(repaired[2].chol_precision[1])
    assert_close(jnp.float32(np.linalg.eigvalsh(chol @ chol.T)[0]), np.float64(1))


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan")])
def test_a_floor_that_is_not_positive_is_refused(floor):
    with pytest.raises(ValueError, match="floor must be positive"):
        shifted_expansion(constant(jnp.eye(2)), floor=floor)
