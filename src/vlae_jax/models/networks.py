"""Feature extractors (Flax NNX) of one example: fully connected, and convolutional for images.

Convolutions have stride 2, without pooling or normalization: with ReLU all networks here are
piecewise linear, and no example depends on others in its batch.

Parameters and outputs are float32 with every `Precision`; see the module `arithmetic`.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlae_jax.errors import UserError
from vlae_jax.models.arithmetic import FULL, Arithmetic

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
}
PIECEWISE_LINEAR = frozenset({"relu", "leaky_relu"})
_LECUN = nnx.initializers.lecun_normal()  # the default of Flax's own layers


# Convolutional networks are deeper. With an initializer that halves the signal at every layer their
# VAE learns to ignore the latent, on the digits permanently; this one keeps the signal's size
# through ReLU.
_HE = nnx.initializers.he_normal()


class MLP(nnx.Module):
    """Fully connected hidden layers with an activation after each; the identity if there are none.

    Args:
        in_size: Length of the input.
        widths: Widths of the hidden layers.
        activation: A key of `ACTIVATIONS`.
        arithmetic: The functions by which layers multiply.
        kernel_init: Initializer of the kernels.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        in_size: int,
        widths: Sequence[int],
        activation: str,
        *,
        arithmetic: Arithmetic = FULL,
        kernel_init: nnx.Initializer = _LECUN,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = (in_size, *widths)
        self.layers = nnx.List(
            nnx.Linear(a, b, kernel_init=kernel_init, dot_general=arithmetic.dot_general, rngs=rngs)
            for a, b in itertools.pairwise(sizes)
        )
        self.activation = activation
        self.out_size = sizes[-1]
        self.piecewise_linear = activation in PIECEWISE_LINEAR or not widths

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """Return the last hidden layer's output, (out_size,), for x of shape (in_size,)."""
        for layer in self.layers:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class ConvEncoder(nnx.Module):
    """Convolutions that each halve the image, then fully connected hidden layers.

    Args:
        image_shape: (height, width, channel).
        channels: Channels after each convolution.
        hidden: Widths of the fully connected layers; there may be none.
        activation: A key of `ACTIVATIONS`; it follows every layer.
        arithmetic: The functions by which layers multiply.
        rngs: Random streams for the initial weights.

    Raises:
        UserError: If the image is too small for that many halvings.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int],
        hidden: Sequence[int],
        activation: str,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        height, width = halvings(image_shape, len(channels))[-1]
        convolve = arithmetic.conv_general_dilated
        counts = (image_shape[-1], *channels)
        self.convolutions = nnx.List(
            nnx.Conv(
                a, b, (3, 3), strides=2, kernel_init=_HE, conv_general_dilated=convolve, rngs=rngs
            )
            for a, b in itertools.pairwise(counts)
        )
        flat = height * width * counts[-1]
        self.dense = MLP(
            flat, hidden, activation, arithmetic=arithmetic, kernel_init=_HE, rngs=rngs
        )
        self.image_shape = tuple(image_shape)
        self.activation = activation
        self.out_size = self.dense.out_size

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, " out"]:
        """Return features (out_size,) of x (dim,), an image in the order height, width, channel."""
        image = x.reshape(self.image_shape)
        for convolution in self.convolutions:
            image = ACTIVATIONS[self.activation](convolution(image))
        return self.dense(image.reshape(-1))


class ConvDecoder(nnx.Module):
    """The reverse of `ConvEncoder`, except for the last doubling, which is the output layer.

    Args:
        latent: Dimensions of z.
        hidden: Widths of the fully connected layers, in this order; there may be none. One more
            layer leads from them to the coarsest feature map.
        channels: Channels of the feature maps in the encoder's order: the first is that of the
            finest map, which is the output, the last that of the coarsest.
        image_shape: (height, width, channel) of the image that the output layer makes.
        activation: A key of `ACTIVATIONS`; it follows every layer.
        arithmetic: The functions by which layers multiply.
        rngs: Random streams for the initial weights.

    Raises:
        UserError: If the image is too small for that many halvings.
    """

    def __init__(
        self,
        latent: int,
        hidden: Sequence[int],
        channels: Sequence[int],
        image_shape: Sequence[int],
        activation: str,
        *,
        arithmetic: Arithmetic = FULL,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = halvings(image_shape, len(channels))[:0:-1]  # from coarse to fine
        counts = tuple(reversed(channels))
        self.map_shape = (*sizes[0], counts[0])
        widths = (*hidden, math.prod(self.map_shape))
        self.dense = MLP(
            latent, widths, activation, arithmetic=arithmetic, kernel_init=_HE, rngs=rngs
        )
        self.doublings = nnx.List(
            Doubling(a, b, size, arithmetic=arithmetic, rngs=rngs)
            for (a, b), size in zip(itertools.pairwise(counts), sizes[1:], strict=True)
        )
        self.activation = activation
        self.out_channels = counts[-1]
        self.piecewise_linear = activation in PIECEWISE_LINEAR

    def __call__(
        self, z: Float[Array, " latent"]
    ) -> Float[Array, "half_height half_width channels"]:
        """Return the finest feature map: half the image's sides, rounded up, and `out_channels`."""
        image = self.dense(z).reshape(self.map_shape)
        for double in self.doublings:
            image = ACTIVATIONS[self.activation](double(image))
        return image


class Doubling(nnx.Module):
    """A transposed convolution of stride 2 and 4 × 4 kernels, as one matrix product.

    Each corner of the coarse grid is surrounded by 2 × 2 cells, and the 2 × 2 pixels of the finer
    grid there are an affine map of these cells. With a matrix product the gradient of the kernel is
    a matrix product too: on a CPU the gradient of a Jacobian, most of a training step, is then five
    to twenty times as fast as by `lax.conv_transpose`, or by a convolution before the
    rearrangement.

    Args:
        in_channels: Channels of a cell.
        out_channels: Channels of a pixel.
        out_size: (height, width) of the finer grid: twice the coarser, or one less, cropped.
        arithmetic: The functions by which it multiplies.
        kernel_init: Initializer; a kernel's fan-in is 4 cells.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        out_size: tuple[int, int],
        *,
        arithmetic: Arithmetic = FULL,
        kernel_init: nnx.Initializer = _HE,
        rngs: nnx.Rngs,
    ) -> None:
        self.blocks = nnx.Linear(
            4 * in_channels,
            4 * out_channels,
            kernel_init=kernel_init,
            dot_general=arithmetic.dot_general,
            rngs=rngs,
        )
        self.out_channels = out_channels
        self.out_size = out_size

    def __call__(
        self, cells: Float[Array, "height width in"]
    ) -> Float[Array, "out_height out_width out"]:
        """Return the finer grid."""
        around = jnp.pad(cells, ((1, 1), (1, 1), (0, 0)))
        corners = (around[:-1, :-1], around[:-1, 1:], around[1:, :-1], around[1:, 1:])
        blocks = self.blocks(jnp.concatenate(corners, axis=-1))
        rows, columns, _ = blocks.shape
        pixels = blocks.reshape(rows, columns, 2, 2, self.out_channels).swapaxes(1, 2)
        height, width = self.out_size
        pixels = pixels.reshape(2 * rows, 2 * columns, self.out_channels)
        return pixels[1 : 1 + height, 1 : 1 + width]  # the first corner's block starts outside


def halvings(image_shape: Sequence[int], stages: int) -> list[tuple[int, int]]:
    """Height and width of an image, and after each of the stages that halve it, rounding up.

    Raises:
        UserError: If a stage would have to halve a side of one pixel.
    """
    height, width = image_shape[:2]
    most = (min(height, width) - 1).bit_length()
    if stages > most:
        raise UserError(
            f"{stages} convolutional stages are too many: images of {height} x {width} can be "
            f"halved {most} times; give --channels fewer numbers, or choose --network mlp"
        )
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(stages + 1)]
