"""The training objective of models for which it has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from builders import Linear, digits, inferred_by, linear_config, small_config, untrained
from flax import nnx
from problems import assert_close

from vlae_jax import elbo
from vlae_jax.bounds import iwae_bound
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.autoencoder import VariationalAutoencoder
from vlae_jax.models.laplace import vlae
from vlae_jax.models.systems import vae
from vlae_jax.models.trained import Keys
from vlae_jax.runs.config import InferenceConfig, ModelConfig
from vlae_jax.training.objective import loss_fn, objective

pytestmark = pytest.mark.usefixtures("quick_compile")

KINDS = ["elbo", "iwae", "dreg", "evidence"]
METRICS = {"elbo", "kl", "reconstruction", "amortization_loss"}


def linear_model(dim=12):
    """Probabilistic PCA with an untrained encoder, and log p(x) of some x."""
    rng = np.random.default_rng(0)
    model = VariationalAutoencoder(
        dim,
        latent=3,
        hidden=(),
        activation="relu",
        likelihood="gaussian",
        variance=np.full(dim, 0.8),
        rngs=nnx.Rngs(0),
    )
    model.head.kernel[...] = jnp.asarray(rng.normal(size=(3, dim)), jnp.float32)
    xs = jnp.asarray(2 * rng.normal(size=(5, dim)), jnp.float32)
    kernel = np.asarray(model.head.kernel[...], np.float64)
    covariance = kernel.T @ kernel + np.exp(np.float64(model.log_var)) * np.eye(dim)
    return model, xs, scipy.stats.multivariate_normal(cov=covariance).logpdf(xs)


def by_search(at, key):
    return vlae(at, key, InferenceConfig(steps=1))


def by_encoder(at, key):
    return vae(at, key, InferenceConfig())


def test_every_objective_is_the_evidence_of_a_linear_model():
    """Of five images; the posterior is exact. What is trained stands beside the ELBO."""
    model, xs, evidence = linear_model()

    @jax.jit
    @jax.vmap
    def run(x, key):
        inferred = inferred_by(by_search, model.at(x), key)
        return {kind: objective(inferred, kind=kind, num_samples=3) for kind in KINDS}

    for kind, (value, metrics) in run(xs, jax.random.split(jax.random.key(0), 5)).items():
        assert_close(value + metrics["amortization_loss"], evidence)
        assert_close(metrics["elbo"], evidence)
        assert_close(metrics["reconstruction"], np.asarray(metrics["elbo"] + metrics["kl"]))
        flags = {"converged", "is_pd", "newton_decrement"}
        assert set(metrics) == METRICS | flags | ({"objective"} if kind != "elbo" else set())
        if kind != "elbo":
            assert_close(metrics["objective"], evidence)


@pytest.mark.parametrize("kind", ["iwae", "dreg"])
def test_an_importance_weighted_objective_stands_beside_the_elbo_of_its_samples(kind):
    """The objective lies above the ELBO, and the ELBO shown beside it has no gradient."""
    model, xs, _ = linear_model()
    x, key = xs[0], jax.random.key(0)
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        def shown(params):
            inferred = inferred_by(by_encoder, nnx.merge(graphdef, params).at(x), key)
            value, metrics = objective(inferred, kind=kind, num_samples=4)
            return metrics["elbo"], (value, metrics)

        slope, (value, metrics) = jax.grad(shown, has_aux=True)(params)
        at, drawn = nnx.merge(graphdef, params).at(x), Keys.split(key).bound
        bounds = (
            elbo(drawn, at.log_joint, at.guess, num_samples=4),
            iwae_bound(drawn, at.log_joint, at.guess, num_samples=4),
        )
        return value, metrics, bounds, at.guess.kl_to_standard_normal(), slope

    value, metrics, (bound, weighted), kl, slope = run(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))
    assert set(metrics) == METRICS | {"objective"}
    assert_close(metrics["elbo"], np.asarray(bound))
    assert_close(metrics["objective"], np.asarray(weighted))
    assert_close(metrics["kl"], np.asarray(kl))
    assert value == metrics["objective"] > metrics["elbo"] + 0.1


def test_the_loss_is_minus_the_mean_evidence_and_what_the_encoder_loses():
    """Of a linear decoder, whose bound is exact and whose encoder starts off by a known energy."""
    trained, pixels = untrained(linear_config()), digits().train[:30]
    linear = Linear(trained, pixels)
    loss, (metrics, _) = jax.jit(loss_fn)(trained.params, trained, pixels, fixed_keys(30))
    lost = linear.decrements(linear.guesses)
    assert lost.mean() > 0.01
    assert_close(loss, -(linear.log_prob() - lost).mean())
    assert_close(metrics["elbo"], linear.log_prob().mean())
    assert_close(metrics["amortization_loss"], lost.mean(), rtol=1e-3)


def test_every_image_of_a_batch_has_noise_of_its_own():
    """The mean of one image's single-sample bounds is as near the truth as their number says."""
    trained, count = untrained(linear_config("vae")), 4000
    pixels = np.repeat(digits().train[:1], count, axis=0)
    loss, _ = jax.jit(loss_fn)(trained.params, trained, pixels, fixed_keys(count))
    expected, std = (values[0] for values in Linear(trained, pixels[:1]).mean_field_elbo())
    assert_close(loss, -expected, standard_error=std / count**0.5)


@pytest.mark.parametrize("gradient", ["implicit", "stop", "unroll"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_every_gradient_and_activation_gives_finite_updates_to_every_weight(gradient, activation):
    config = small_config(
        inference=InferenceConfig(steps=1, gradient=gradient),
        model=ModelConfig(latent=3, hidden=(16,), activation=activation),
    )
    trained = untrained(config)
    differentiate = jax.jit(jax.grad(lambda *given: loss_fn(*given)[0]))
    grads = differentiate(trained.params, trained, digits().train[:8], fixed_keys(8))
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(jnp.isfinite(value).all() for value in flat.values())
    # A Laplace posterior has no use for the encoder's own spread; all else must learn.
    untouched = {name for name, value in flat.items() if not jnp.any(value)}
    assert untouched == {name for name in flat if "log_std" in name}


def test_training_looks_at_its_own_section_of_the_configuration():
    """The kind of bound and its samples: more samples, a tighter bound."""
    trained, pixels = untrained(linear_config("vae")), digits().train[:30]
    found = {}
    for samples in (1, 500):
        asked = trained.with_config("training", objective="iwae", train_samples=samples)
        found[samples] = jax.jit(loss_fn)(asked.params, asked, pixels, fixed_keys(30))[0]
    truth = Linear(trained, pixels).log_prob().mean()
    assert abs(found[500] + truth) < 0.1 < found[1] + truth
