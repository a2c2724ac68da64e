"""Priors of the shipped model: a mixture that learns, against the closed forms of linear models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import digits, doubles, linear_config, small_config, untrained
from flax import nnx
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

from vlae_jax.analysis.evaluation import measure
from vlae_jax.analysis.uses import sample
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.errors import UserError
from vlae_jax.models.laplace import vlae
from vlae_jax.models.trained import Keys
from vlae_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")


def with_mixture(config, components=3):
    model = dataclasses.replace(config.model, prior="mixture", prior_components=components)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def trained():
    """A linear decoder of the digits, whose prior has three components apart from each other."""
    config = with_mixture(linear_config("vlae", latent=2, importance_samples=500, chunk_size=500))
    config = dataclasses.replace(
        config, inference=dataclasses.replace(config.inference, steps=8, damping="line_search")
    )
    made = untrained(config)
    model = made.model_as_trained
    model.head.kernel[...] = jax.random.normal(jax.random.key(0), model.head.kernel.shape) * 0.3
    model.prior.logits[...] = jnp.array([0.3, -0.5, 1.0])
    model.prior.means[...] = jnp.array([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
    model.prior.log_stds[...] = jnp.log(jnp.array([[0.5, 1.0], [0.7, 0.4], [1.2, 0.6]]))
    return made.with_params(nnx.split(model)[1])


def components(trained):
    prior = trained.model.prior
    logits, means, log_stds = doubles(prior.logits, prior.means, prior.log_stds)
    return softmax(logits), means, np.exp(log_stds)


@pytest.mark.slow
def test_the_estimate_of_log_p_is_that_of_a_mixture_of_factor_models(trained):
    """log p(x) = log Σ πₖ N(x; W mₖ + b, W Sₖ Wᵀ + σ²I); the ELBO is below it, the KL above 0."""
    images = digits().test[:30]
    found = measure(trained, images)
    kernel, bias = doubles(trained.model.head.kernel, trained.model.head.bias)
    noise = float(np.exp(np.float64(trained.model.log_var)))
    keys = jax.vmap(lambda key: Keys.split(key).noise)(fixed_keys(len(images)))
    xs = np.float64(jax.vmap(trained.preprocessor.apply)(keys, images)[0])
    weights, means, stds = components(trained)
    parts = [
        np.log(weight)
        + multivariate_normal(
            mean @ kernel + bias, kernel.T @ np.diag(std**2) @ kernel + noise * np.eye(64)
        ).logpdf(xs)
        for weight, mean, std in zip(weights, means, stds, strict=True)
    ]
    truth = logsumexp(parts, axis=0)
    error = np.sqrt((1 / found["ess"] - 1 / 500).clip(0))
    assert (np.abs(found["log_prob"] - truth) < 5 * error + 1e-3).all()
    assert (found["elbo"] < truth + 0.05).all()
    assert found["kl"].mean() > 0.5


def test_samples_have_the_moments_of_the_mixture(trained):
    found = sample(trained, 4000, seed=0, temperature=1.0)["z"]
    weights, means, stds = components(trained)
    mean = weights @ means
    variance = weights @ (stds**2 + means**2) - mean**2
    assert (np.abs(found.mean(axis=0) - mean) < 5 * np.sqrt(variance / 4000)).all()
    assert (np.abs(found.var(axis=0) / variance - 1) < 0.15).all()
    centers = sample(trained, 200, seed=0, temperature=0.0)["z"]
    assert len(np.unique(centers.round(4), axis=0)) == 3


def test_the_precision_is_positive_definite_between_two_components():
    """Two narrow ones, with a decoder that sees nothing and so leaves the prior alone."""
    trained = untrained(with_mixture(linear_config("vlae", latent=2), components=2))
    model = trained.model_as_trained
    for leaf in (model.head.kernel, model.mean.kernel, model.mean.bias):
        leaf[...] = jnp.zeros_like(leaf[...])
    model.prior.means[...] = jnp.array([[3.0, 0.0], [-3.0, 0.0]])
    model.prior.log_stds[...] = jnp.full((2, 2), jnp.log(0.5))
    at = model.at(jnp.zeros(64))
    expand, repair = at.expansions()
    z = jnp.array([0.1, 0.2])
    found = jax.jit(expand)(z)
    assert repair is None
    assert np.linalg.eigvalsh(-jax.hessian(at.log_joint)(z)).min() < 0
    np.testing.assert_allclose(found.precision, 4 * np.eye(2), atol=1e-4)
    np.testing.assert_allclose(found.grad, jax.grad(at.log_joint)(z), rtol=1e-4, atol=1e-4)
    times = expand.products(z).times
    np.testing.assert_allclose(jax.vmap(times)(jnp.eye(2)), found.precision, atol=1e-3)
    config = dataclasses.replace(trained.config.inference, steps=0)
    inference = vlae(at, jax.random.key(0), config)
    assert inference.flags["is_pd"]
    np.testing.assert_allclose(inference.posterior.chol_precision, 2 * np.eye(2), atol=1e-4)


def test_every_parameter_of_a_prior_learns():
    config = with_mixture(small_config("vae"))
    trained = untrained(config)
    trainer = Trainer(trained, digits())
    state, _ = trainer.step(trainer.init(), *next(trainer.feed.arguments(0)))
    moved = jax.tree.map(
        lambda new, old: bool(jnp.all(new != old)), state.params["prior"], trained.params["prior"]
    )
    assert jax.tree.leaves(moved) and all(jax.tree.leaves(moved))


def test_a_linear_fit_has_a_normal_prior():
    with pytest.raises(UserError, match="--prior normal"):
        with_mixture(linear_config("ppca"))
