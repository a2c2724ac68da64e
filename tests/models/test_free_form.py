"""The Gaussian that the Jacobians of encoder and decoder define, against exact covariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Linear, digits, linear_config, tiny_config, untrained
from flax import nnx

from vlae_jax.errors import UserError
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.free_form import FreeFormPosterior, free_form_vae
from vlae_jax.posterior import GaussianPosterior
from vlae_jax.runs.config import InferenceConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM, LATENT, COUNT = 12, 3, 20_000
KEY = jax.random.key(0)
CONFIG = InferenceConfig(method="vae_fif")


def bent(likelihood, hidden=(7, 9)):
    """A network at its initial weights, with an output that depends on z, and an example."""
    model = VariationalAutoencoder(
        DIM,
        latent=LATENT,
        hidden=hidden,
        activation="tanh",
        likelihood=likelihood,
        variance=np.linspace(0.5, 1.5, DIM),
        per_pixel=likelihood == "gaussian",
        rngs=nnx.Rngs(0),
    )
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
    x = jax.random.normal(KEY, (DIM,))
    return model, x if likelihood == "gaussian" else (x > 0).astype(jnp.float32)


@pytest.fixture(scope="module")
def linear():
    """The probabilistic PCA of the digits, whose encoder is optimal."""
    trained = untrained(linear_config("ppca"))
    return trained.with_inference(method="vae_fif"), Linear(trained, digits().test[:5])


def test_of_a_linear_model_with_an_optimal_encoder_it_is_the_posterior(linear):
    trained, truth = linear
    run = jax.jit(lambda at: free_form_vae(at, KEY, CONFIG))
    for x, mode in zip(truth.xs, truth.modes, strict=True):
        found = run(trained.model.at(jnp.asarray(x, jnp.float32)))._replace(for_training=None)
        assert isinstance(found.posterior, GaussianPosterior) and found.flags["is_pd"]
        chol = np.float64(found.posterior.chol_precision)
        assert np.array_equal(chol, np.tril(chol))
        np.testing.assert_allclose(found.posterior.mean, mode, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(chol @ chol.T, truth.precision, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_samples_of_training_have_the_exact_covariance(likelihood, masked):
    """Also where the encoder is far from optimal, and where a part of x is not observed."""
    model, x = bent(likelihood)
    observed = jnp.arange(DIM) % 3 > 0 if masked else None

    @jax.jit
    def run(model):
        at = model.at(x, observed=observed)
        exact = free_form_vae(at, KEY, CONFIG).posterior
        draw = jax.vmap(FreeFormPosterior(at).sample_and_log_prob)
        return exact, draw(jax.random.split(KEY, COUNT))[0]

    exact, zs = run(model)
    chol = np.float64(exact.chol_precision)
    whitened = (np.float64(zs) - np.float64(exact.mean)) @ chol
    assert (np.abs(whitened.mean(axis=0)) < 5 / np.sqrt(COUNT)).all()
    error = np.sqrt((1 + np.eye(LATENT)) / COUNT)
    assert (np.abs(np.cov(whitened.T) - np.eye(LATENT)) < 5 * error).all()


def test_the_gradient_of_the_density_is_that_of_the_log_determinant(linear):
    """For a linear model with an optimal encoder, by the mean over many vectors."""
    trained, truth = linear
    x = jnp.asarray(truth.xs[0], jnp.float32)

    def entropy(params, key):
        at = trained.with_params(params).model.at(x)
        return -FreeFormPosterior(at).sample_and_log_prob(key)[1]

    def exact(params):
        at = trained.with_params(params).model.at(x)
        return free_form_vae(at, KEY, CONFIG).posterior.entropy()

    draws = jax.jit(jax.vmap(jax.grad(entropy), in_axes=(None, 0)))(
        trained.params, jax.random.split(KEY, 4000)
    )
    slopes = jax.jit(jax.grad(exact))(trained.params)
    for name in (("head", "kernel"), ("scaled_log_var",), ("mean", "kernel")):
        found, expected = draws, slopes
        for part in name:
            found, expected = found[part], expected[part]
        found, expected = np.float64(found[...]), np.float64(expected[...])
        error = found.std(axis=0) / np.sqrt(len(found))
        scale = np.abs(np.float64(slopes["head"]["kernel"][...])).max()
        assert (np.abs(found.mean(axis=0) - expected) < 5 * error + 2e-3 * scale).all(), name
    assert np.abs(np.float64(slopes["head"]["kernel"][...])).max() > 0.01


def test_the_encoder_learns_the_gain_of_kalmans_filter(linear):
    """At the optimal encoder its own gradient vanishes: no other has a smaller tr(P Cov z)."""
    trained, truth = linear
    x = jnp.asarray(truth.xs[0], jnp.float32)

    def expected(params, key):
        at = trained.with_params(params).model.at(x)
        return at.log_joint(FreeFormPosterior(at).sample_and_log_prob(key)[0])

    def slope(params):
        keys = jax.random.split(KEY, 4000)
        return jax.vmap(jax.grad(expected), in_axes=(None, 0))(params, keys)["mean"]["kernel"][...]

    def worse(params):
        """With an encoder whose Jacobian is a tenth too large."""
        kernel = params["mean"]["kernel"][...]
        changed = jax.tree.map(lambda leaf: leaf, params)
        changed["mean"]["kernel"][...] = 1.1 * kernel
        return changed

    run = jax.jit(slope)
    for params, vanishes in ((trained.params, True), (worse(trained.params), False)):
        found = np.float64(run(params))
        away = np.abs(found.mean(axis=0)) / (found.std(axis=0) / np.sqrt(len(found)))
        assert (away.max() < 5) == vanishes


def test_other_objectives_need_a_density():
    config = tiny_config("vae_fif")
    training = dataclasses.replace(config.training, objective="iwae")
    with pytest.raises(UserError, match="trains on the ELBO"):
        dataclasses.replace(config, training=training)
