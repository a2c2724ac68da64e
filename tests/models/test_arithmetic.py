"""Networks that multiply in bfloat16: how far they may be off, and what they must not touch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from builders import digits, doubles, untrained
from flax import nnx
from jax import lax
from problems import assert_close

from vlae_jax import exact_expansion, infer_posterior
from vlae_jax.models.arithmetic import FULL, Rounded, arithmetic, in_full
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.flows import HouseholderFlow, InverseAutoregressiveFlow, PlanarFlow
from vlae_jax.models.networks import ConvEncoder, Doubling
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")

UNIT = 2.0**-9
"""Half the distance of 1 to the next bfloat16: the relative error of rounding to it."""
PRODUCT = (1 + UNIT) ** 3 - 1
"""Relative error of each term where both operands and the sum are rounded once."""
SLACK = 1 + 1e-3
"""For float32 sums of a hundred terms."""
LATENT, WIDTHS, DIM = 3, (7, 6), 11
"""All different from each other and from the batch, so that a shape tells which product it is."""


def assert_rounded(found, expected, error):
    """Within the error of rounding, and not so close that nothing was rounded."""
    found = np.asarray(found)
    assert found.dtype == np.float32
    off = np.abs(np.float64(found) - expected)
    assert np.all(off <= SLACK * error)
    assert np.max(off) > 1e-2 * np.max(error)


def make_model(precision, *, activation="relu", loud=10.0):
    model = VariationalAutoencoder(
        DIM,
        latent=LATENT,
        hidden=tuple(reversed(WIDTHS)),
        activation=activation,
        likelihood="gaussian",
        variance=np.linspace(0.5, 1.5, DIM),
        precision=precision,
        rngs=nnx.Rngs(0),
    )
    model.head.kernel[...] *= loud
    return model


@pytest.mark.parametrize("derivatives_only", [False, True])
def test_a_product_and_its_derivatives_are_off_by_the_rounding_of_bfloat16(derivatives_only):
    """The value only where it is asked for; what goes into a derivative always."""
    dot = arithmetic("bfloat16", derivatives_only=derivatives_only).dot_general
    keys = jax.random.split(jax.random.key(0), 5)
    x, x_dot = jax.random.normal(keys[0], (2, 128, 50))
    w, w_dot = jax.random.normal(keys[1], (2, 50, 40))
    pull_back = jax.random.normal(keys[2], (128, 40))

    def product(x, w):
        return dot(x, w, (((1,), (0,)), ((), ())))

    @jax.jit
    def run(x, w, x_dot, w_dot, pull_back):
        value, tangent = jax.jvp(product, (x, w), (x_dot, w_dot))
        return value, tangent, *jax.vjp(product, x, w)[1](pull_back)

    value, tangent, to_x, to_w = run(x, w, x_dot, w_dot, pull_back)
    x, w, x_dot, w_dot, pull_back = doubles(x, w, x_dot, w_dot, pull_back)
    sizes = [np.abs(array) for array in (x, w, x_dot, w_dot, pull_back)]
    x_size, w_size, x_dot_size, w_dot_size, pull_back_size = sizes
    if derivatives_only:
        assert_close(value, x @ w)
    else:
        assert_rounded(value, x @ w, PRODUCT * x_size @ w_size)
    error = PRODUCT * (x_dot_size @ w_size + x_size @ w_dot_size)
    assert_rounded(tangent, x_dot @ w + x @ w_dot, error)
    assert_rounded(to_x, pull_back @ w.T, PRODUCT * pull_back_size @ w_size.T)
    assert_rounded(to_w, x.T @ pull_back, PRODUCT * x_size.T @ pull_back_size)


def test_the_encoder_and_the_decoders_jacobian_keep_to_the_bound_of_their_layers():
    """Reference and bound by numpy in float64: an error passes on by |W|, and each layer adds."""
    model, full = make_model("bfloat16"), make_model("float32")
    x = jax.random.normal(jax.random.key(0), (DIM,))
    z = jnp.array([0.3, -1.0, 2.0])
    features = jax.jit(model.encoder)(x)
    expected, size, error = np.float64(x), np.abs(np.float64(x)), np.zeros(DIM)
    for layer in model.encoder.layers:
        kernel, bias = doubles(layer.kernel[...], layer.bias[...])
        error = (size + error) @ np.abs(kernel) * PRODUCT + error @ np.abs(kernel)
        expected = np.maximum(expected @ kernel + bias, 0.0)
        size = np.abs(expected)
    assert_rounded(features, expected, error)

    value, jacobian = jax.jit(lambda z: (model.features(z), jax.jacfwd(model.features)(z)))(z)
    np.testing.assert_array_equal(value, jax.jit(full.features)(z))
    hidden, expected, size = np.float64(z), np.eye(LATENT), np.eye(LATENT)
    for layer in model.features.layers:
        kernel, bias = doubles(layer.kernel[...], layer.bias[...])
        hidden = np.maximum(hidden @ kernel + bias, 0.0)
        expected = expected @ kernel * (hidden > 0)
        size = size @ np.abs(kernel) * (hidden > 0)
    assert_rounded(jacobian.T, expected, ((1 + UNIT) ** 6 - 1) * size)


def test_convolutions_round_too():
    """3 x 3 pixels around every second one; a doubling is a product of matrices."""
    side, colors, channels = 7, 2, 3
    encode = ConvEncoder(
        (side, side, colors),
        (channels,),
        (),
        "relu",
        arithmetic=arithmetic("bfloat16"),
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (side, side, colors))
    (kernel,) = doubles(encode.convolutions[0].kernel[...])

    def convolved(x, kernel):
        planes = [
            sum(
                scipy.signal.correlate2d(x[..., a], kernel[..., a, b], mode="same")[::2, ::2]
                for a in range(colors)
            )
            for b in range(channels)
        ]
        return np.stack(planes, axis=-1).reshape(-1)

    (x_double,) = doubles(x)
    error = PRODUCT * convolved(np.abs(x_double), np.abs(kernel))
    found = jax.jit(encode)(x.reshape(-1))
    assert_rounded(found, np.maximum(convolved(x_double, kernel), 0.0), error)
    double = Doubling(2, 1, (4, 4), arithmetic=arithmetic("bfloat16"), rngs=nnx.Rngs(0))
    assert isinstance(double.blocks.dot_general, Rounded)


def dots(text):
    """The operands of every product of matrices in a lowered program."""
    pattern = r"stablehlo\.dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)"
    return [tuple(part.split("x") for part in pair) for pair in re.findall(pattern, text)]


def small_model(precision, method="vlae"):
    return untrained(
        Config(
            model=ModelConfig(latent=LATENT, hidden=tuple(reversed(WIDTHS)), precision=precision),
            inference=InferenceConfig(method=method, steps=1),
            training=TrainingConfig(batch_size=4),
        )
    )


@pytest.mark.slow
def test_a_training_step_multiplies_networks_in_bfloat16_and_the_rest_in_float32():
    """By its lowered program, before a compiler for any device has seen it."""
    trainer = Trainer(small_model("bfloat16"), digits())
    state = trainer.init()
    lowered = trainer.step.lower(state, *next(trainer.feed.arguments(0)))
    text = lowered.as_text()
    operands = dots(text)
    types = {(left[-1], right[-1]) for left, right in operands}
    assert types == {("bf16", "bf16"), ("f32", "f32")}
    # The Gram matrix of the output layer, what it multiplies, and JᵀJ: of 6 and 3.
    short = [[side[:-1] for side in pair] for pair in operands if pair[0][-1] == "bf16"]
    assert short
    assert not any(["6", "6"] in pair for pair in short)
    assert not any(left == right == ["4", "3", "6"] for left, right in short)
    factored = [line for line in text.splitlines() if re.search("potrf|cholesky|trsm|triang", line)]
    assert factored
    assert all("bf16" not in line and "f32" in line for line in factored)

    state, loss = lowered.compile()(state, *next(trainer.feed.arguments(0)))
    assert state.bad_step == -1  # so loss and gradient were finite
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.sums, loss)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
        assert jnp.all(jnp.isfinite(leaf))


def test_float32_is_what_it_was_without_the_option():
    plain = nnx.graphdef(make_model("float32"))
    assert plain == nnx.graphdef(in_full(make_model("bfloat16")))
    assert plain != nnx.graphdef(make_model("bfloat16"))
    assert tuple(FULL) == (lax.dot_general, lax.conv_general_dilated)
    trainer = Trainer(small_model("float32", method="vae"), digits())
    state = trainer.init()
    text = trainer.step.lower(state, *next(trainer.feed.arguments(0))).as_text()
    assert "bf16" not in text and dots(text)


def test_the_log_joint_is_float32s_and_the_precision_positive_definite():
    """Off by no more than a Jacobian whose entries are off by the error of two layers.

    Searches of this loud decoder end at kinks, with and without rounding, and equally high.
    """
    rounded, full = make_model("bfloat16", loud=100.0), make_model("float32", loud=100.0)
    x = jax.random.normal(jax.random.key(0), (DIM,))
    zs = jax.random.normal(jax.random.key(1), (20, LATENT))

    @jax.jit
    @jax.vmap
    def run(z):
        values = [model.at(x).expansions()[0](z) for model in (rounded, full)]
        infos = [
            infer_posterior(model.at(x).expansions()[0], z, num_steps=20)[1]
            for model in (rounded, full)
        ]
        return values, infos, jax.jacfwd(full.features)(z)

    (found, truth), (info, exact), jacobians = run(zs)
    np.testing.assert_array_equal(found.value, truth.value)
    assert np.all(info.is_pd)
    gained = exact.log_joint[:, -1] - exact.log_joint[:, 0]
    lost = exact.log_joint[:, -1] - info.log_joint[:, -1]
    assert np.all(lost < 0.1 + 0.02 * gained)
    assert np.all(np.diff(info.log_joint) >= 0)
    first, second = (np.abs(np.float64(layer.kernel[...])) for layer in rounded.features.layers)
    (kernel,) = doubles(full.head.kernel[...])
    gram = np.abs(kernel @ kernel.T) * np.exp(-float(full.log_var))
    error = (1 + UNIT) ** 6 - 1
    alive = np.any(np.asarray(jacobians) != 0, axis=2)
    for z_alive, short, exact in zip(alive, found.precision, truth.precision, strict=True):
        size = first @ second * z_alive
        bound = ((1 + error) ** 2 - 1) * size @ gram @ size.T
        assert np.all(np.abs(np.float64(short) - np.float64(exact)) <= SLACK * bound + 1e-4)
    assert np.max(np.abs(found.precision - truth.precision)) > 1e-4


def test_the_hessian_of_a_smooth_network_is_not_rounded_and_its_repair_is():
    rounded, full = (make_model(name, activation="tanh") for name in ("bfloat16", "float32"))
    x, z = jax.random.normal(jax.random.key(0), (DIM,)), jnp.array([0.3, -1.0, 2.0])

    @jax.jit
    def run(z):
        expand, repair = rounded.at(x).expansions()
        others = full.at(x).expansions()[1](z), repair(z)
        return expand(z), exact_expansion(full.at(x).log_joint)(z), others

    found, truth, (repair, rounded_repair) = run(z)
    assert_close(found, truth)
    assert np.max(np.abs(repair.precision - rounded_repair.precision)) > 1e-4


@pytest.mark.parametrize("kind", [HouseholderFlow, InverseAutoregressiveFlow, PlanarFlow])
def test_flows_of_rounded_networks_know_their_own_density(kind):
    """Whatever the networks say, the log determinant is that of the map they make."""
    more = {"width": 16} if kind is InverseAutoregressiveFlow else {}
    flows = [
        kind(4, 8, 3, arithmetic=arithmetic(name), rngs=nnx.Rngs(0), **more)
        for name in ("bfloat16", "float32")
    ]
    z, context = jax.random.normal(jax.random.key(0), (4,)), jnp.linspace(-2.0, 2.0, 8)

    @jax.jit
    def run(z):
        mapped, log_det = flows[0](z, context)
        jacobian = jax.jacfwd(lambda z: flows[0](z, context)[0])(z)
        return mapped, log_det, jnp.linalg.slogdet(jacobian)[1], flows[1](z, context)[0]

    mapped, log_det, expected, unrounded = run(z)
    np.testing.assert_allclose(log_det, expected, atol=1e-5)
    assert 0 < jnp.max(jnp.abs(mapped - unrounded)) < 0.05


def test_what_is_measured_is_measured_in_float32():
    model = small_model("bfloat16")
    trained, measured = model.model_as_trained, model.model
    assert isinstance(trained.encoder.layers[0].dot_general, Rounded)
    assert nnx.graphdef(measured) == small_model("float32").graphdef
    for mine, theirs in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(nnx.state(measured)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_a_run_tells_its_precision_and_is_not_continued_in_another():
    short = Config(model=ModelConfig(precision="bfloat16"))
    assert short.run_name == "digits-bfloat16-vlae-T4-seed0"
    (difference,) = short.differences(dataclasses.replace(short, model=ModelConfig()))
    assert difference == "model.precision is bfloat16, was float32"
    with pytest.raises(ValueError, match="float32"):
        arithmetic("float16")
