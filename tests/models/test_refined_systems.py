"""Systems whose Gaussian is refined variationally, on a linear model, where all is closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Linear, digits, linear_config, untrained
from problems import assert_close

from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.errors import UserError
from vlae_jax.runs.config import InferenceConfig
from vlae_jax.training.objective import loss_fn

pytestmark = pytest.mark.usefixtures("quick_compile")

IMAGES = digits().test[:4]
REFINED = {"refine": "variational", "refine_steps": 40, "refine_samples": 8}


def infer_all(trained):
    """Means, covariances and amortization losses of the first images."""

    def one(key, pixels):
        inference = trained.infer(key, pixels).inference
        posterior = inference.posterior
        return posterior.mean, posterior.covariance(), inference.amortization_loss, inference.flags

    return jax.jit(jax.vmap(one))(fixed_keys(len(IMAGES)), IMAGES)


@pytest.mark.parametrize("method", ["vae", "vae_full", "vlae"])
def test_any_encoders_gaussian_is_led_to_the_exact_posterior(method):
    """And the encoder learns by what its own is away from it: a divergence, or an energy."""
    trained = untrained(linear_config(method))
    truth = Linear(trained, IMAGES)
    means, covariances, losses, flags = infer_all(trained.with_inference(**REFINED))
    np.testing.assert_allclose(means, truth.modes, atol=1e-3)
    np.testing.assert_allclose(
        covariances, np.broadcast_to(np.linalg.inv(truth.precision), covariances.shape), atol=1e-4
    )
    assert np.all(flags["converged"]) and np.all(flags["is_pd"])
    if method == "vlae":
        np.testing.assert_allclose(losses, truth.decrements(truth.guesses), rtol=1e-3)
    if method == "vae":
        bound, _ = truth.mean_field_elbo()
        np.testing.assert_allclose(losses, truth.log_prob() - bound, rtol=1e-3)


def test_a_held_posterior_teaches_the_encoder_by_its_loss_and_the_decoder_by_the_bound():
    """At the exact posterior the bound is the evidence: the decoder's gradient is that of it."""
    trained = untrained(linear_config("vae")).with_inference(**REFINED)
    keys = fixed_keys(len(IMAGES))
    _, grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        trained.params, trained, IMAGES, keys
    )
    assert float(jnp.abs(grads["mean"]["kernel"][...]).max()) > 0
    assert float(jnp.abs(grads["log_std"]["kernel"][...]).max()) > 0

    def evidence(params):
        model = trained.with_params(params).model
        kernel, bias = model.head.kernel[...], model.head.bias[...]
        covariance = kernel.T @ kernel + jnp.exp(model.log_var) * jnp.eye(kernel.shape[1])
        xs = IMAGES.reshape(len(IMAGES), -1) / 16 - trained.preprocessor.mean
        return -jnp.mean(jax.scipy.stats.multivariate_normal.logpdf(xs, bias, covariance))

    exact = jax.grad(evidence)(trained.params)["head"]["bias"][...]
    # One sample an image estimates it: with the bias it varies about the exact one.
    cosine = jnp.vdot(exact, grads["head"]["bias"][...]) / (
        jnp.linalg.norm(exact) * jnp.linalg.norm(grads["head"]["bias"][...])
    )
    assert cosine > 0.8


def test_a_matrix_free_posterior_is_for_training_alone():
    """Its gradient of the decoder varies about that of the evidence; measurements do not see it."""
    trained = untrained(linear_config("vlae"))
    sampled = trained.with_inference(search="scaled", posterior="matrix_free")
    exact = trained.with_inference(search="scaled")
    keys = fixed_keys(len(IMAGES))
    infer = jax.jit(jax.vmap(lambda trained, *one: trained.infer(*one).posterior, (None, 0, 0)))
    assert_close(infer(sampled, keys, IMAGES), infer(exact, keys, IMAGES))
    (_, (metrics, _)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        sampled.params, sampled, IMAGES, keys
    )
    assert metrics["is_solved"] == 1
    assert all(np.any(grads[part]["kernel"][...]) for part in ("mean", "log_std", "head"))
    with pytest.raises(UserError, match="choose posterior exact"):
        trained.with_inference(posterior="matrix_free", gradient="unroll")
    with pytest.raises(UserError, match="choose --objective elbo"):
        sampled.with_config("training", train_samples=2)


def test_what_cannot_be_refined_or_inferred_is_refused():
    with pytest.raises(UserError, match="moves a Gaussian, which vae_iaf has not"):
        InferenceConfig("vae_iaf", refine="variational")
    with pytest.raises(UserError, match="even"):
        InferenceConfig("vae", refine="variational", refine_samples=3)
    trained = untrained(linear_config("vae"))
    with pytest.raises(UserError, match="needs a network of its own"):
        trained.with_inference(method="vae_hf")
    changed = trained.with_inference(method="vlae", steps=3)
    assert changed.config.inference == dataclasses.replace(
        trained.config.inference, method="vlae", steps=3
    )
