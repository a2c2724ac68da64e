"""Convolutional networks: their layers, all sizes of images, and the model made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import untrained
from flax import nnx
from problems import FINITE_DIFFERENCE, assert_close, central_differences

from vlae_jax import exact_expansion
from vlae_jax.errors import UserError
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.networks import ConvEncoder, Doubling, halvings
from vlae_jax.runs.config import Config, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

LATENT = 3


def make_model(image_shape, *, channels=(3, 4), hidden=(5, 6), latent=LATENT, **more):
    """A model in the default precision, with output weights large enough for visible curvature."""
    dim = int(np.prod(image_shape))
    options = {"network": "conv", "activation": "relu", "likelihood": "gaussian", **more}
    model = VariationalAutoencoder(
        dim,
        latent=latent,
        hidden=hidden,
        channels=channels,
        image_shape=image_shape,
        variance=np.linspace(0.5, 1.5, dim),
        rngs=nnx.Rngs(0),
        **options,
    )
    structure, params = nnx.split(model)
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf.astype(float), params))


def loud(model):
    model.head.blocks.kernel[...] *= 10.0
    return model


@pytest.mark.parametrize("crop", [0, 1])
def test_a_doubling_is_a_transposed_convolution_of_stride_two(x64, crop):
    """Pixel a of the block at corner p is 2p + a - 1, and cell c reaches it by tap 2p + a - 2c."""
    height, width, cells, colors = 3, 2, 4, 5
    size = (2 * height - crop, 2 * width - crop)
    double = Doubling(cells, colors, size, rngs=nnx.Rngs(0))
    kernel = np.asarray(double.blocks.kernel[...]).reshape(2, 2, cells, 2, 2, colors)
    taps = np.zeros((4, 4, cells, colors))
    for i, j, a, b in np.ndindex(2, 2, 2, 2):
        taps[2 + a - 2 * i, 2 + b - 2 * j] = kernel[i, j, :, a, b]
    coarse = jax.random.normal(jax.random.key(0), (height, width, cells))
    # JAX slides its kernel over the spread-out cells; a tap is then met from its other end.
    expected = jax.lax.conv_transpose(
        coarse[None], taps[::-1, ::-1], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_close(double(coarse), expected[0, : size[0], : size[1]])


def test_a_convolution_sees_three_by_three_pixels_around_its_own():
    """So x is read in the order height, width, channel, and every pixel is read."""
    height, width, colors = 7, 4, 2
    encode = ConvEncoder((height, width, colors), (3,), (), "tanh", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (height * width * colors,))
    slopes = jax.jit(jax.jacobian(encode))(x).reshape(4, 2, 3, height, width, colors)
    row, column = np.arange(height), np.arange(width)
    # Flax pads what is odd at both ends, and what is even at the far one.
    rows = np.abs(row - 2 * np.arange(4)[:, None]) <= 1
    columns = np.abs(column - 2 * np.arange(2)[:, None] - 1) <= 1
    seen = rows[:, None, None, :, None, None] & columns[None, :, None, None, :, None]
    np.testing.assert_array_equal(slopes != 0, np.broadcast_to(seen, slopes.shape))


@pytest.mark.parametrize(
    ("image_shape", "channels"),
    [
        ((28, 28, 1), (3, 4, 5)),  # 14, 7, 4
        ((32, 32, 3), (3, 4)),
        ((8, 8, 1), (3, 4, 5)),  # 4, 2, 1
        ((7, 10, 2), (3, 4)),
        ((5, 3, 1), (3,)),
    ],
)
def test_every_pixel_reaches_the_code_and_is_reached_by_it(image_shape, channels):
    model = loud(make_model(image_shape, channels=channels, activation="tanh"))
    x = jax.random.normal(jax.random.key(0), (np.prod(image_shape),))
    z = jnp.array([0.3, -1.0, 2.0])

    def encode(x):
        return model.at(x).mean, model.at(x).log_std

    @jax.jit
    def run(x, z):
        return encode(x), model.decode(z), jax.jacrev(encode)(x), push(z)

    push = jax.jacfwd(model.decode)
    (mean, log_std), eta, slopes, jacobian = run(x, z)
    assert mean.shape == log_std.shape == z.shape
    assert eta.shape == x.shape
    for slope in slopes:
        assert jnp.all(jnp.any(slope != 0, axis=0))
    assert jnp.all(jnp.any(jacobian != 0, axis=1))


def test_the_output_is_in_the_order_height_width_channel():
    model = make_model((4, 6, 3), channels=(3,))
    model.head.blocks.kernel[...] *= 0.0
    model.head.blocks.bias[...] = jnp.tile(jnp.arange(3.0), 4)
    image = model.decode(jnp.ones(LATENT)).reshape(4, 6, 3)
    np.testing.assert_array_equal(image, np.broadcast_to(np.arange(3.0), (4, 6, 3)))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_expansions_are_exact(x64, activation, likelihood):
    """Of a ReLU decoder by Gauss-Newton alone; of a smooth one with a repair that is PD."""
    more = {"per_pixel": True} if likelihood == "gaussian" else {}
    model = loud(make_model((5, 6, 2), activation=activation, likelihood=likelihood, **more))
    x = jax.random.normal(jax.random.key(0), (60,))
    x = (x > 0).astype(float) if likelihood == "bernoulli" else x
    z = jnp.array([0.3, -1.0, 2.0])
    log_joint, (expand, repair) = model.at(x).log_joint, model.at(x).expansions()
    assert model.whitened_head() is None

    @jax.jit
    def run(z):
        stand_in = expand(z) if repair is None else repair(z)
        truth = exact_expansion(log_joint)(z)
        eta, push = model.decode(z), jax.jacobian(model.decode)(z)
        return expand(z), truth, stand_in, eta, push

    found, truth, stand_in, eta, jacobian = run(z)
    assert_close(found, truth)
    assert_close(
        -found.precision,
        central_differences(jax.grad(log_joint), z),
        rtol=FINITE_DIFFERENCE,
    )
    assert (repair is None) == (activation == "relu")
    probability = jax.nn.sigmoid(eta)
    weight = jnp.exp(-model.log_var) if more else probability * (1 - probability)
    assert_close(stand_in.precision, (jacobian.T * weight) @ jacobian + jnp.eye(LATENT))


def test_a_relu_decoder_is_affine_between_its_kinks(x64):
    model = loud(make_model((5, 6, 2)))
    z, step = jnp.array([0.3, -1.0, 2.0]), 1e-4 * jnp.array([1.0, 2.0, -1.0])
    before, here, after = jax.jit(jax.vmap(model.decode))(jnp.stack([z - step, z, z + step]))
    assert jnp.abs(after - before).max() > 1e-6
    assert_close(after + before, 2 * here)


def test_the_decoder_starts_near_the_datas_mean_with_its_features_alive():
    """He's kernels keep the mean square of z, 1, as far as the output layer, which takes 1 %."""
    model = make_model((16, 16, 3), channels=(32, 64), hidden=(100,), latent=50)
    zs = jax.random.normal(jax.random.key(1), (20, 50))
    etas = jax.jit(jax.vmap(model.decode))(zs)
    assert 0.05 < jnp.sqrt(jnp.mean(etas**2)) < 0.15


def conv_model(**model):
    """On the 8 x 8 digits."""
    return untrained(Config(model=ModelConfig(network="conv", **model)))


def test_sides_halve_rounding_up():
    assert halvings((28, 9, 1), 3) == [(28, 9), (14, 5), (7, 3), (4, 2)]


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (functools.partial(conv_model, channels=(4,) * 4), "8 x 8 can be halved 3 times"),
        (functools.partial(ModelConfig, network="conv", channels=()), "at least one number"),
        (functools.partial(ModelConfig, channels=(4, 0)), "channels must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(refuse, message):
    with pytest.raises(UserError, match=message) as error:
        refuse()
    assert "\n" not in str(error.value)


def test_a_convolutional_network_needs_to_know_its_image():
    with pytest.raises(ValueError, match="needs the image_shape"):
        make_model((5, 12))
    with pytest.raises(ValueError, match="'mlp' or 'conv'"):
        make_model((5, 6, 2), network="resnet")


def test_the_run_folder_says_which_network_it_is():
    config = Config(model=ModelConfig(network="conv"))
    assert config.run_name == "digits-conv-vlae-T4-seed0"
    assert Config().run_name == "digits-vlae-T4-seed0"
