"""Every public core function under the modes in which JAX refuses what it otherwise lets pass."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import DIM, LATENT
from test_contract import CASES as CONTRACT
from test_contract import Case, arguments, total

import vlae_jax
from vlae_jax import Quadratic, elbo, exact_expansion, infer_posterior

pytestmark = pytest.mark.usefixtures("quick_compile")

# What optax promotes is its own affair.
CASES = [case for case in CONTRACT if case.name != "gradient_refine"]
REFUSALS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


@contextlib.contextmanager
def everything_refused():
    with REFUSALS["rank promotion"](), REFUSALS["dtype promotion"]():
        yield


def differentiated(case: Case) -> Any:
    """The case's values, and the gradient of all of them together, for two examples at once."""

    def scalar(row):
        value = case.call(row)
        return total(value), value

    return jax.vmap(jax.grad(scalar, has_aux=True))


def stacked(dtype: type) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arguments(s, dtype) for s in range(2)))


@pytest.mark.parametrize("width", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_promoted(case, width):
    """In ranks or dtypes, forward or in reverse; float32 where float64 is the default, too."""
    with jax.enable_x64(True):
        given = jax.eval_shape(lambda: stacked(width))
        with everything_refused():
            jax.eval_shape(differentiated(case), given)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_number_is_nan_and_no_tracer_leaks(case):
    """Where nothing has failed, debugging for NaN must not stop in numbers that are not used."""
    with jax.checking_leaks():
        jax.eval_shape(case.call, arguments(0))
    with jax.debug_nans(True):
        values = jax.jit(case.call)(arguments(0))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values))


@pytest.mark.parametrize("until_converged", [False, True])
@pytest.mark.parametrize("damping", ["line_search", "trust_region"])
def test_a_search_that_must_leave_a_saddle_passes_too(damping, until_converged):
    """No factor, a ridge, the second row of lengths: what the contract's cases may not meet."""

    def search(z):
        expand = exact_expansion(lambda z: 100 * jnp.sum(jnp.cos(3 * z)) - 0.5 * z @ z)
        return infer_posterior(
            expand, z, num_steps=8, damping=damping, until_converged=until_converged
        )

    with everything_refused(), jax.debug_nans(True), jax.checking_leaks():
        _, info = jax.jit(search)(jnp.array([0.9, 1.1]))
    assert info.steps_used > 1 and np.all(np.isfinite(info.log_joint))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, bool])
def test_observations_may_be_integers(kind):
    x, eta = jnp.ones(DIM, kind), jnp.linspace(-1, 1, DIM)
    with everything_refused():
        for log_prob in (vlae_jax.bernoulli, vlae_jax.poisson):
            whole = log_prob(x, eta)
            assert whole == log_prob(jnp.ones(DIM), eta)
            assert jax.grad(log_prob, argnums=1)(x, eta).dtype == eta.dtype


def test_the_modes_are_not_vacuous():
    """They refuse what they are there to refuse."""
    with everything_refused():
        with pytest.raises(ValueError, match="rank_promotion"):
            exact_expansion(lambda z: jnp.sum(jnp.eye(LATENT) * z))(jnp.ones(LATENT))
        with pytest.raises(Exception, match="dtype promotion"):
            elbo(
                jax.random.key(0),
                lambda z: z @ z * jnp.ones((), int),
                vlae_jax.DiagonalPosterior(jnp.ones(LATENT), jnp.ones(LATENT)),
            )
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(lambda z: Quadratic(z, z, jnp.log(z)))(-jnp.ones(()))
