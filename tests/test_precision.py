"""What reduced-precision matrix products, as accelerators make them, do to a precision matrix.

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

from vlae_jax import affine_head_expansion, gauss_newton_expansion, gaussian

MANTISSA_BITS = {"bfloat16": 8, "tf32": 11}
"""The leading one included."""


def round_mantissa(x: jax.Array, bits: int) -> jax.Array:
    fraction, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.round(jnp.ldexp(fraction, bits)), exponent - bits)


def run(closed: ClosedJaxpr, arguments: Any, bits: int, *, obey: bool) -> list[jax.Array]:
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
            results = run(inner, operands, bits, obey=obey)
        else:
            if equation.primitive is lax.dot_general_p:
                asked = equation.params["precision"]
                if not (obey and asked == (lax.Precision.HIGHEST, lax.Precision.HIGHEST)):
                    operands = [round_mantissa(operand, bits) for operand in operands]
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def problem():
    """A decoder with little noise that leaves some latent directions to the prior."""
    rng = np.random.default_rng(0)
    latent, hidden, dim = 10, 40, 60
    first = rng.normal(size=(latent, 4)) @ rng.normal(size=(4, hidden))
    kernel, bias = rng.normal(size=(hidden, dim)), rng.normal(size=dim)
    arrays = (first, kernel, bias, rng.normal(size=dim), rng.normal(size=latent))
    return [jnp.asarray(array, jnp.float32) for array in arrays]


LOG_VAR = float(np.log(1e-2))


def affine_head(first, kernel, bias, x, z):
    return affine_head_expansion(lambda z: jnp.tanh(z @ first), kernel, bias, LOG_VAR, x)(z)


def explicit(first, kernel, bias, x, z):
    def decode(z):
        return jnp.tanh(z @ first) @ kernel + bias

    return gauss_newton_expansion(decode, lambda eta: gaussian(x, eta, LOG_VAR))(z)


@functools.cache
def smallest_eigenvalues(expansion: Any, format: str) -> tuple[float, float, float]:
    """Of the precision: in float64, in low precision as asked, in low precision throughout."""
    arrays = problem()
    program = jax.make_jaxpr(lambda *arrays: expansion(*arrays).precision)(*arrays)
    found = [run(program, arrays, MANTISSA_BITS[format], obey=obey)[0] for obey in (True, False)]
    with jax.enable_x64(True):
        exact = expansion(*(jnp.asarray(array, jnp.float64) for array in arrays)).precision
    matrices = (exact, *found)
    return tuple(
        float(np.linalg.eigvalsh(0.5 * (np.float64(m) + np.float64(m).T))[0]) for m in matrices
    )


@pytest.mark.parametrize("expansion", [affine_head, explicit])
@pytest.mark.parametrize("format", MANTISSA_BITS)
def test_the_precision_asks_for_full_products(expansion, format):
    """Its smallest eigenvalue is the prior's 1, far below the largest; with products at the
    accelerator's default it is lost."""
    exact, as_asked, throughout = smallest_eigenvalues(expansion, format)
    assert abs(exact - 1) < 1e-6
    assert abs(as_asked - 1) < 0.1
    assert abs(throughout - 1) > 1


def test_in_bfloat16_the_precision_would_be_indefinite():
    _, _, throughout = smallest_eigenvalues(affine_head, "bfloat16")
    assert throughout < 0
