"""Evaluation against the closed form of a linear model, image by image."""

import jax
import numpy as np
import pytest
from arviz_stats.base import array_stats
from problems import assert_close
from scipy.stats import multivariate_normal

from vlae_jax.analysis.evaluation import describe, evaluate, pareto_k
from vlae_jax.bounds import tail_size
from vlae_jax.models.trained import build_experiment
from vlae_jax.runs.config import Config, DataConfig, EvaluationConfig, InferenceConfig, ModelConfig

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
    figures, _ = evaluate(experiment, experiment.initial_params)
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
        # Twenty samples have no tail to judge an image by.
        images = 0 if name == "unreliable" else 50
        assert figure.images == other[name].images == images
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


# ---------------------------------------------------------------- proposals


def per_image(experiment):
    return evaluate(experiment, experiment.initial_params).per_image


@pytest.fixture(scope="module")
def with_its_posterior(quick_compile):
    return per_image(linear_experiment(importance_samples=200, chunk_size=50))


@pytest.mark.parametrize("proposal", ["widened", "student_t"])
def test_another_proposal_finds_the_same_log_prob_and_leaves_the_bound(
    linear, with_its_posterior, proposal
):
    """Within its own sampling error of the closed form, image by image."""
    found = per_image(linear_experiment(importance_samples=200, chunk_size=50, proposal=proposal))
    error = found["log_prob_sampling_error"]
    assert (error > 0.005).all() and (error < 0.1).all()
    assert_close(found["log_prob"], closed_form(linear), standard_error=error)
    assert (found["ess"] < 199).all()
    assert (found["pareto_k"] < 0.7).all()
    for name in ("elbo", "kl", "reconstruction"):
        assert_close(found[name], with_its_posterior[name])
    assert_close(with_its_posterior["log_prob"], closed_form(linear))
    assert (with_its_posterior["pareto_k"] < 0.7).all()


@pytest.mark.parametrize("proposal", ["posterior", "widened", "student_t"])
def test_a_flow_is_evaluated_with_every_proposal(proposal):
    """Another base under the same flow; the random encoder's is good enough for many samples."""
    experiment = linear_experiment(
        "vae_iaf", importance_samples=1000, chunk_size=500, proposal=proposal
    )
    found = per_image(experiment)
    error = found["log_prob_sampling_error"]
    assert (error < 0.3).all()
    assert_close(found["log_prob"], closed_form(experiment), standard_error=error)
    assert (found["elbo"] < found["log_prob"]).all()


# ---------------------------------------------------------------- the weights' tail


def largest_of(log_weights):
    """What `ImportanceInfo.largest` holds, by sorting: (n, K) → (n, tail + 1)."""
    kept = tail_size(log_weights.shape[1]) + 1
    return np.sort(log_weights, axis=1)[:, ::-1][:, :kept]


def pareto_weights(shape, count, samples):
    """Log of U⁻ᵏ, whose tail is exactly of shape k."""
    return -shape * np.log(np.random.default_rng(0).uniform(size=(count, samples)))


@pytest.mark.parametrize("samples", [25, 100, 225, 226, 5000])
def test_pareto_k_from_the_largest_weights_is_that_of_all(samples):
    """arviz_stats takes the negated log weights: with the sign wrong all looks excellent."""
    log_weights = pareto_weights(0.6, 3, samples) - 700
    truth = [array_stats.psislw(-weights)[1] for weights in log_weights]
    assert_close(pareto_k(largest_of(log_weights), samples), np.array(truth))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_pareto_k_recovers_the_shape_of_known_weights(shape):
    """The mean of several tails of 948 weights, each known to (1 + k) / √948."""
    log_weights = pareto_weights(shape, 8, 100_000)
    assert abs(np.mean(pareto_k(largest_of(log_weights), 100_000)) - shape) < 0.1


def test_pareto_k_of_weights_without_a_tail():
    """Constant up to float32's rounding: the proposal is the posterior. Too few: no tail."""
    rounding = 700 * np.finfo(np.float32).eps * np.random.default_rng(0).normal(size=(2, 5000))
    log_weights = np.concatenate([np.full((1, 5000), -3.0), -700 + rounding])
    np.testing.assert_array_equal(pareto_k(largest_of(log_weights), 5000), -np.inf)
    few = pareto_weights(0.6, 2, 24)
    np.testing.assert_array_equal(pareto_k(largest_of(few), 24), np.nan)


def test_pareto_k_of_rounded_weights_is_small_and_warns_of_nothing(recwarn):
    """Many equal weights, as of a nearly exact posterior in float32."""
    noise = np.random.default_rng(0).normal(size=(20, 5000))
    found = pareto_k(largest_of(np.round(6 * noise) * np.spacing(np.float32(700))), 5000)
    assert (found < 0.3).all()
    assert not recwarn.list


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pareto_k_is_nan_where_a_weight_is_not_a_number(value):
    largest = largest_of(pareto_weights(0.6, 2, 100))
    largest[0, -1 if value == -np.inf else 0] = value
    np.testing.assert_array_equal(np.isnan(pareto_k(largest, 100)), [True, False])
