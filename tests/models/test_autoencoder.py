"""The shipped model: its densities, expansions and initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from vlae_jax.expansions import exact_expansion
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.networks import ACTIVATIONS, PIECEWISE_LINEAR

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 40


def make_model(*, hidden=(7, 9), latent=3, likelihood="gaussian", activation="relu", **more):
    return VariationalAutoencoder(
        DIM,
        latent=latent,
        hidden=hidden,
        activation=activation,
        likelihood=likelihood,
        variance=np.linspace(0.5, 1.5, DIM),
        rngs=nnx.Rngs(0),
        **more,
    )


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (DIM,))


def test_the_log_joint_is_prior_plus_likelihood(x):
    model, z = make_model(per_pixel=True), jnp.array([0.3, -1.0, 2.0])
    std = np.exp(0.5 * np.asarray(model.log_var))
    likelihood = stats.norm(np.asarray(model.decode(z)), std).logpdf(np.asarray(x)).sum()
    truth = likelihood + stats.norm.logpdf(np.asarray(z)).sum()
    np.testing.assert_allclose(jax.jit(model.at(x).log_joint)(z), truth, rtol=1e-5)

    model = make_model(likelihood="bernoulli")
    bits = (x > 0).astype(jnp.float32)
    probability = 1 / (1 + np.exp(-np.asarray(model.decode(z))))
    truth = stats.bernoulli(probability).logpmf(np.asarray(bits)).sum()
    truth += stats.norm.logpdf(np.asarray(z)).sum()
    np.testing.assert_allclose(jax.jit(model.at(bits).log_joint)(z), truth, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_is_not_observed_is_left_out(x, likelihood, activation):
    """The log joint of some pixels is that of a model of these alone; the rest may be anything."""
    more = {"per_pixel": True} if likelihood == "gaussian" else {}
    model, z = make_model(likelihood=likelihood, activation=activation, **more), jnp.ones(3)
    observed = jnp.arange(DIM) % 3 > 0
    x = x if likelihood == "gaussian" else (x > 0).astype(jnp.float32)
    eta, kept = np.asarray(model.decode(z)), np.asarray(observed)
    if likelihood == "gaussian":
        parts = stats.norm(eta, np.exp(0.5 * np.asarray(model.log_var))).logpdf(np.asarray(x))
    else:
        parts = stats.bernoulli(1 / (1 + np.exp(-eta))).logpmf(np.asarray(x))
    truth = parts[kept].sum() + stats.norm.logpdf(np.asarray(z)).sum()
    x = jnp.where(observed, x, jnp.nan)
    at = model.at(x, observed=observed)
    log_joint, (expand, repair) = at.log_joint, at.expansions()
    np.testing.assert_allclose(log_joint(z), truth, rtol=1e-5)
    assert (repair is None) is (activation == "relu")
    exact = jax.jit(exact_expansion(log_joint))(z)
    found = jax.jit(expand)(z)
    for name in ("value", "grad", "precision"):
        scale = np.max(np.abs(getattr(exact, name)))
        np.testing.assert_allclose(
            getattr(found, name), getattr(exact, name), rtol=1e-4, atol=1e-5 * scale
        )


def test_a_whitened_head_of_all_pixels_is_not_for_some(x):
    model = make_model()
    with pytest.raises(ValueError, match="not both"):
        model.at(x, head=model.whitened_head(), observed=x > 0)


def test_draws_have_the_density_of_the_output(x):
    model, z, count = make_model(per_pixel=True), jnp.ones(3), 2000
    draw = jax.vmap(model.draw, in_axes=(0, None))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), count), z))
    variance = np.exp(np.asarray(model.log_var))
    error = np.sqrt(variance / count)
    assert (np.abs(draws.mean(axis=0) - model.decode(z)) < 5 * error).all()
    assert (np.abs(draws.var(axis=0) - variance) < 5 * np.sqrt(2 / count) * variance).all()
    model = make_model(likelihood="bernoulli")
    draw = jax.vmap(model.draw, in_axes=(0, None))
    draws = np.asarray(draw(jax.random.split(jax.random.key(2), count), z))
    expected = np.asarray(model.reconstruct(z))
    error = np.sqrt(expected * (1 - expected) / count)
    assert set(np.unique(draws)) == {0, 1}
    assert (np.abs(draws.mean(axis=0) - expected) < 5 * error).all()


@pytest.mark.parametrize("per_pixel", [False, True])
def test_the_whitened_head_gives_the_same_log_joint(x, per_pixel):
    model, z = make_model(hidden=(7, 5), per_pixel=per_pixel), jnp.array([0.3, -1.0, 2.0])
    head = model.whitened_head()
    assert head.factor.shape == (7, 7)  # the decoder takes the widths reversed
    with_head, without = model.at(x, head=head).log_joint, model.at(x).log_joint
    np.testing.assert_allclose(with_head(z), without(z), rtol=1e-5)


def test_there_is_a_whitened_head_only_where_it_saves_something():
    assert make_model(hidden=(64, 7)).whitened_head() is None
    assert make_model(hidden=(7,), likelihood="bernoulli").whitened_head() is None


@pytest.mark.parametrize(
    ("activation", "hidden", "per_pixel"),
    [
        *((activation, (7, 9), True) for activation in sorted(ACTIVATIONS)),
        *(("relu", hidden, False) for hidden in ((7, 9), (64, 64), ())),
        ("tanh", (64, 64), False),
    ],
)
def test_expansions_are_exact_whether_or_not_compression_pays(x, hidden, per_pixel, activation):
    model = make_model(hidden=hidden, per_pixel=per_pixel, activation=activation)
    z = jnp.array([0.3, -1.0, 2.0])
    expand, repair = model.at(x).expansions()
    truth = jax.jit(exact_expansion(model.at(x).log_joint))(z)
    for found, true in zip(jax.jit(expand)(z), truth, strict=True):
        np.testing.assert_allclose(found, true, rtol=2e-4, atol=2e-4)
    smooth = activation not in PIECEWISE_LINEAR and hidden != ()
    assert (repair is not None) == smooth
    if repair is not None:
        assert np.linalg.eigvalsh(jax.jit(repair)(z).precision).min() > 0.99


def test_bernoulli_expansions_are_exact(x):
    model = make_model(likelihood="bernoulli")
    bits = (x > 0).astype(jnp.float32)
    z = jnp.array([0.3, -1.0, 2.0])
    truth = jax.jit(exact_expansion(model.at(bits).log_joint))(z)
    for found, true in zip(jax.jit(model.at(bits).expansions()[0])(z), truth, strict=True):
        np.testing.assert_allclose(found, true, rtol=2e-4, atol=2e-4)


def test_the_output_variance_starts_from_the_data_and_keeps_its_floor():
    np.testing.assert_allclose(np.exp(make_model().log_var), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(make_model(per_pixel=True).log_var), np.linspace(0.5, 1.5, DIM), rtol=1e-5
    )
    model = make_model(min_std=0.01)
    model.scaled_log_var[...] = jnp.float32(-100.0)
    np.testing.assert_allclose(np.exp(0.5 * model.log_var), 0.01, rtol=1e-5)
    # Constant pixels start above the floor, where the variance can still learn.
    black = VariationalAutoencoder(
        4,
        latent=1,
        hidden=(),
        activation="relu",
        likelihood="gaussian",
        variance=np.zeros(4),
        per_pixel=True,
        min_std=0.01,
        rngs=nnx.Rngs(0),
    )
    assert (np.exp(0.5 * black.log_var) > 0.01).all()


def test_the_decoder_takes_the_hidden_widths_reversed():
    model = make_model(hidden=(7, 9))
    assert [layer.kernel.shape for layer in model.features.layers] == [(3, 9), (9, 7)]
    assert [layer.kernel.shape for layer in model.encoder.layers] == [(DIM, 7), (7, 9)]


def test_the_decoder_starts_near_the_datas_mean():
    model = make_model(hidden=(300, 300), latent=50)
    zs = jax.random.normal(jax.random.key(1), (100, 50))
    assert jnp.abs(jax.jit(jax.vmap(model.decode))(zs)).max() < 0.5
