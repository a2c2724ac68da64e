"""Evaluation against the closed form of a linear model, image by image."""

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from vlae_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
)
from vlae_jax.diagnostics import take_snapshots
from vlae_jax.evaluation import describe, evaluate
from vlae_jax.experiment import build_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")


def linear_experiment(method="vlae", **evaluation):
    """Without hidden layers the decoder is affine: probabilistic PCA on real images."""
    config = Config(
        data=DataConfig(preprocess="raw"),
        model=ModelConfig(latent=3, hidden=()),
        inference=InferenceConfig(method=method, steps=1),
        evaluation=EvaluationConfig(
            **{"importance_samples": 20, "chunk_size": 7, "test_images": 50, **evaluation}
        ),
    )
    return build_experiment(config)


def by_name(experiment):
    figures = evaluate(experiment, experiment.initial_params)
    return {figure.name: figure for figure in figures}


@pytest.fixture(scope="module")
def linear():
    return linear_experiment()


@pytest.fixture(scope="module")
def linear_figures(linear, quick_compile):
    return by_name(linear)


def closed_form(experiment):
    """log N(x; b, WᵀW + σ²I) of each test image, float64."""
    model = experiment.merge(experiment.initial_params)
    kernel = np.asarray(model.head.kernel[...], np.float64)
    bias = np.asarray(model.head.bias[...], np.float64)
    noise = float(np.exp(np.float64(model.log_var)))
    pixels = experiment.dataset.test[:50].reshape(50, -1) / (experiment.dataset.levels - 1)
    xs = pixels - np.asarray(experiment.preprocessor.mean, np.float64)
    covariance = kernel.T @ kernel + noise * np.eye(kernel.shape[1])
    return multivariate_normal(bias, covariance).logpdf(xs)


def test_a_linear_decoder_is_evaluated_exactly(linear, linear_figures):
    truth, figures = closed_form(linear), linear_figures
    for name in ("log_prob", "elbo"):
        np.testing.assert_allclose(figures[name].value, truth.mean(), rtol=1e-5)
        error = truth.std(ddof=1) / np.sqrt(50)
        np.testing.assert_allclose(figures[name].standard_error, error, rtol=1e-4)
    np.testing.assert_allclose(figures["inference_gap"].value, 0, atol=1e-3)
    np.testing.assert_allclose(figures["ess"].value, 20, rtol=1e-4)
    assert figures["unconverged"].value == figures["not_positive_definite"].value == 0
    assert figures["not_finite"].value == 0


def test_the_amortised_bound_lies_below_the_closed_form():
    experiment = linear_experiment("vae", importance_samples=500)
    truth = closed_form(experiment).mean()
    figures = by_name(experiment)
    assert figures["elbo"].value < figures["log_prob"].value < truth + 0.1
    assert "unconverged" not in figures


def test_figures_do_not_depend_on_batch_and_chunk(linear_figures):
    other = by_name(linear_experiment(evaluation_batch=23, chunk_size=20))
    for name, figure in linear_figures.items():
        assert figure.images == other[name].images == 50
        np.testing.assert_allclose(figure.value, other[name].value, rtol=1e-4, atol=1e-4)


def test_raw_pixels_have_no_bits_per_dimension_and_dequantised_ones_do(linear_figures):
    assert "bits_per_dim" not in linear_figures
    config = Config(
        model=ModelConfig(latent=2, hidden=(8,)),
        evaluation=EvaluationConfig(importance_samples=10, test_images=20),
    )
    experiment = build_experiment(config)
    bits = by_name(experiment)["bits_per_dim"].value
    # An untrained model is no better than writing out 17 levels a pixel, and not absurdly worse.
    assert 2 < bits < np.log2(17)


def test_results_say_what_they_depend_on(linear, linear_figures):
    described = describe(linear, [*linear_figures.values()], seconds={"training": 1})
    assert described["run"]["dataset"] == "digits"
    assert described["run"]["fingerprint"] == linear.dataset.fingerprint
    assert described["versions"]["jax"] == jax.__version__
    assert described["seconds"] == {"training": 1}
    assert all(figure["split"] == "test" for figure in described["figures"])


def test_snapshots_show_the_data_and_every_step(linear):
    snapshots = take_snapshots(linear, linear.initial_params)
    images = linear.dataset.test[:10] / 16
    np.testing.assert_allclose(snapshots["data"], images, atol=1e-6)
    assert snapshots["reconstructions"].shape == (10, 2, 8, 8, 1)
    assert snapshots["prior_samples"].shape[1:] == (8, 8, 1)
    # One full step of a linear model lands on the mode, whatever the encoder said.
    assert (np.diff(snapshots["step_log_joint"]) > 0).all()
    model = linear.merge(linear.initial_params)
    kernel = np.asarray(model.head.kernel[...], np.float64)
    precision = np.eye(3) + kernel @ kernel.T / float(np.exp(model.log_var))
    for covariance in snapshots["covariances"]:
        np.testing.assert_allclose(covariance, np.linalg.inv(precision), atol=1e-5)
