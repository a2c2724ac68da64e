"""Arithmetic of layers: products in float32, or with operands rounded to bfloat16."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, DTypeLike

Precision = Literal["float32", "bfloat16"]
"""Format of the operands of matrix products and convolutions in networks."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix product, or a convolution, of operands rounded to a shorter format.

    The hardware sums in float32. The result and the gradients have the dtype of the operands before
    rounding. Only operands of products are rounded, those in reverse and forward mode included.
    """

    product: Callable[..., Array]
    """`lax.dot_general` or `lax.conv_general_dilated`."""
    dtype: DTypeLike
    """Format that operands are rounded to."""
    derivatives_only: bool = False
    """Whether to round only in derivatives and leave the value unrounded."""

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the product; further arguments are passed on to `product`."""

        def full(lhs: Array, rhs: Array) -> Array:
            return self.product(lhs, rhs, *args, **kwargs)

        # A precision given for float32 products must not apply to products of rounded operands.
        plain = {**kwargs, "precision": lax.Precision.DEFAULT}

        def rounded(lhs: Array, rhs: Array) -> Array:
            short = lhs.astype(self.dtype), rhs.astype(self.dtype)
            return self.product(*short, *args, **plain).astype(lhs.dtype)

        def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
            (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
            terms = [
                rounded(*factors)
                for factors, tangent in (((lhs_dot, rhs), lhs_dot), ((lhs, rhs_dot), rhs_dot))
                if not isinstance(tangent, SymbolicZero)
            ]
            value = product(lhs, rhs)
            return value, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(value)

        if not self.derivatives_only:
            return rounded(lhs, rhs)
        product = jax.custom_jvp(full)
        product.defjvp(derivative, symbolic_zeros=True)
        return product(lhs, rhs)


class Arithmetic(NamedTuple):
    """The functions by which layers multiply and convolve, as arguments of Flax's layers."""

    dot_general: Callable[..., Array] = lax.dot_general
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated


FULL = Arithmetic()
"""Arithmetic in the dtype of the arrays, without rounding."""


def arithmetic(precision: Precision, *, derivatives_only: bool = False) -> Arithmetic:
    """Return the functions by which the layers of a network multiply.

    Args:
        precision: "float32" leaves products to JAX. "bfloat16" rounds the operands of every
            product, in the derivatives too, to 8 significant bits; sums, biases, activations,
            parameters and outputs stay float32.
        derivatives_only: With "bfloat16", round only in derivatives. A decoder needs this. If its
            value were rounded, the log joint would jump by about 0.1 nats between nearby z (MNIST),
            and ReLUs near their kink would take the wrong side: a line search would stop at jumps
            instead of modes and report convergence, which here means less than 0.01 nats. Rounded
            derivatives give a Jacobian whose entries are each off by about 1 in 500. Its square,
            summed in float32, stays positive definite.

    Raises:
        ValueError: If the precision is unknown.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    if precision == "float32":
        return FULL
    return Arithmetic(*(Rounded(product, jnp.bfloat16, derivatives_only) for product in FULL))


ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def in_full(network: ModuleT) -> ModuleT:
    """Return a copy of a network that does not round; the network itself if it does not anyway."""
    if not any(_rounding(module) for _, module in nnx.iter_modules(network)):
        return network
    copy = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(copy):
        for name, rounded in _rounding(module).items():
            setattr(module, name, rounded.product)
    return copy


def _rounding(module: nnx.Module) -> dict[str, Rounded]:
    """The rounding functions of this one layer, by name."""
    there = {name: getattr(module, name, None) for name in Arithmetic._fields}
    return {name: value for name, value in there.items() if isinstance(value, Rounded)}
