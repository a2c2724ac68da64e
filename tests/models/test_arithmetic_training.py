"""The effect of an accelerator's reduced-precision matrix products on a precision matrix.

The products are emulated: operands rounded to the mantissa of bfloat16 or TF32, sums in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from problems import assert_close

from vlae_jax import (
    affine_head_expansion,
    exact_expansion,
    gauss_newton_expansion,
    gaussian,
    standard_normal,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

MANTISSA_BITS = {"bfloat16": 8, "tf32": 11}
"""The leading one included."""


def round_mantissa(x: jax.Array, bits: int) -> jax.Array:
    fraction, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.round(jnp.ldexp(fraction, bits)), exponent - bits)


def run(closed: ClosedJaxpr, arguments: Any, *, bits: int, obey: bool) -> list[jax.Array]:
    """Evaluate a program, each product in low precision; with `obey`, unless it asked for more."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            results = run(inner, operands, bits=bits, obey=obey)
        else:
            if equation.primitive is lax.dot_general_p:
                asked = equation.params["precision"]
                if not (obey and asked == (lax.Precision.HIGHEST, lax.Precision.HIGHEST)):
                    operands = [round_mantissa(operand, bits) for operand in operands]
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def problems(count: int = 8):
    """Decoders with more latent dimensions than hidden units, and little noise: eigenvalues from
    1 to 10⁶. Arrays with a leading axis of `count`."""
    return [jnp.stack(arrays) for arrays in zip(*map(problem, range(count)), strict=True)]


def problem(seed: int):
    rng = np.random.default_rng(seed)
    latent, hidden, dim = 30, 20, 60
    first = 0.3 * rng.normal(size=(latent, 30)) @ rng.normal(size=(30, hidden))
    kernel, bias = rng.normal(size=(hidden, dim)), rng.normal(size=dim)
    arrays = (first, kernel, bias, rng.normal(size=dim), rng.normal(size=latent))
    return [jnp.asarray(array, jnp.float32) for array in arrays]


LOG_VAR = float(np.log(1e-2))


def gram(first, kernel, bias, x, z):
    def hidden(z):
        return jax.nn.relu(z @ first)

    return affine_head_expansion(hidden, kernel, bias, LOG_VAR, x, form="gram")(z)


def explicit(first, kernel, bias, x, z):
    def decode(z):
        return jax.nn.relu(z @ first) @ kernel + bias

    return gauss_newton_expansion(decode, lambda eta: gaussian(x, eta, LOG_VAR))(z)


def exact(first, kernel, bias, x, z):
    def log_joint(z):
        mean = jax.nn.relu(z @ first) @ kernel + bias
        return gaussian(x, mean, LOG_VAR) + standard_normal(z)

    return exact_expansion(log_joint)(z)


def smallest(matrices: jax.Array) -> np.ndarray:
    matrices = np.float64(matrices)
    return np.linalg.eigvalsh(0.5 * (matrices + np.swapaxes(matrices, 1, 2)))[:, 0]


@functools.cache
def smallest_eigenvalues(expand: Any, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each precision, products in low precision: unless they asked for more, and throughout."""
    program = jax.make_jaxpr(lambda *arrays: expand(*arrays).precision)(*problem(0))

    @jax.jit
    @jax.vmap
    def emulate(arrays):
        bits = MANTISSA_BITS[format]
        return [run(program, arrays, bits=bits, obey=obey)[0] for obey in (True, False)]

    obeyed, ignored = emulate(problems())
    return smallest(obeyed), smallest(ignored)


@pytest.mark.parametrize("expand", [gram, explicit, exact])
def test_the_smallest_eigenvalue_is_the_priors(x64, expand):
    arrays = [jnp.asarray(array, jnp.float64) for array in problems()]
    precisions = jax.jit(jax.vmap(lambda *arrays: expand(*arrays).precision))(*arrays)
    assert_close(smallest(precisions), np.ones(8), rtol=1e-6)


@pytest.mark.parametrize("expand", [gram, explicit, exact])
@pytest.mark.parametrize("format", MANTISSA_BITS)
def test_the_precision_asks_for_full_products(expand, format):
    """The remaining error is the rounding of eigenvalues of 10⁶ in float32."""
    as_asked, _ = smallest_eigenvalues(expand, format)
    assert_close(as_asked, np.ones(8), rtol=0.15)


def test_bfloat16_throughout_would_lose_positive_definite_precisions():
    """Where the smallest eigenvalue is 1. TF32, three bits longer, would keep it here."""
    for expand in (gram, exact):
        _, throughout = smallest_eigenvalues(expand, "bfloat16")
        assert np.any(throughout < 0) and np.all(np.abs(throughout - 1) > 0.2)
    assert np.all(np.abs(smallest_eigenvalues(gram, "tf32")[1] - 1) < 0.15)
