"""Evaluation against the closed form of a linear model, image by image."""

import jax
import numpy as np
import pytest
from arviz_stats.base import array_stats
from builders import Linear, digits, linear_config, untrained
from problems import assert_close

from vlae_jax.analysis.estimation import pareto_k
from vlae_jax.analysis.evaluation import describe, evaluate, metrics_of
from vlae_jax.bounds import tail_size
from vlae_jax.runs.config import Config, EvaluationConfig, InferenceConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

IMAGES = digits().test[:50]


def linear_model(method="vlae", **evaluation):
    return untrained(linear_config(method, **evaluation))


def by_name(trained):
    return {metric.name: metric for metric in evaluate(trained, IMAGES).metrics}


def per_image(trained):
    return evaluate(trained, IMAGES).per_image


@pytest.fixture(scope="module")
def linear():
    return linear_model()


@pytest.fixture(scope="module")
def truth(linear):
    return Linear(linear, IMAGES).log_prob()


@pytest.fixture(scope="module")
def linear_metrics(linear, quick_compile):
    return by_name(linear)


def test_a_linear_decoder_is_evaluated_exactly(truth, linear_metrics):
    metrics = linear_metrics
    for name in ("log_prob", "elbo"):
        np.testing.assert_allclose(metrics[name].value, truth.mean(), rtol=1e-5)
        error = truth.std(ddof=1) / np.sqrt(50)
        np.testing.assert_allclose(metrics[name].standard_error, error, rtol=1e-4)
    np.testing.assert_allclose(metrics["inference_gap"].value, 0, atol=1e-3)
    np.testing.assert_allclose(metrics["ess"].value, 20, rtol=1e-4)
    assert metrics["unconverged"].value == metrics["not_positive_definite"].value == 0
    assert metrics["not_finite"].value == 0


def test_a_search_without_steps_has_not_converged():
    """The Newton decrement is the distance in nats between the encoder's guess and the mode."""
    config = linear_config()
    config = Config(
        config.data, config.model, InferenceConfig(steps=0), evaluation=config.evaluation
    )
    trained = untrained(config)
    linear, found = Linear(trained, IMAGES), evaluate(trained, IMAGES)
    metrics = {metric.name: metric.value for metric in found.metrics}
    decrements = linear.decrements(linear.guesses)
    assert decrements.min() > 0.01
    assert metrics["unconverged"] == 1 and metrics["not_positive_definite"] == 0
    assert_close(found.per_image["newton_decrement"], decrements, rtol=1e-3)
    assert_close(np.float64(metrics["newton_decrement"]), decrements.mean(), rtol=1e-3)


def test_shares_are_those_of_the_images_that_have_what_they_count(linear, monkeypatch):
    """The share of unreliable images leaves out those of unknown k̂; other shares count all."""
    some = np.array([-3.0, -2.0, np.nan, -np.inf])
    measured = {
        "log_prob": some,
        "elbo": some - 1,
        "pareto_k": np.array([0.1, 0.8, np.nan, 0.9]),
        "converged": np.array([True, False, False, False]),
        "is_pd": np.array([True, True, False, True]),
    }
    monkeypatch.setattr("vlae_jax.analysis.evaluation.measure", lambda *_, **__: measured)
    metrics = by_name(linear)
    for name, share, images in (
        ("unreliable", 2 / 3, 3),
        ("unconverged", 3 / 4, 4),
        ("not_positive_definite", 1 / 4, 4),
        ("not_finite", 1 / 2, 4),
    ):
        assert metrics[name].value == pytest.approx(share), name
        assert (metrics[name].images, metrics[name].unit) == (images, "share")
    assert (metrics["log_prob"].value, metrics["log_prob"].images) == (-2.5, 2)


def test_the_bound_of_an_amortized_gaussian_is_the_evidence_less_its_divergence():
    """The bound, the spread of its samples and log p(x) all have closed forms here."""
    trained = linear_model("vae", importance_samples=2000, chunk_size=500)
    linear, found = Linear(trained, IMAGES), evaluate(trained, IMAGES)
    expected, std = linear.mean_field_elbo()
    assert (linear.log_prob() - expected > 5 * std / np.sqrt(2000)).all()
    assert_close(found.per_image["elbo"], expected, standard_error=std / np.sqrt(2000))
    error = found.per_image["log_prob_sampling_error"]
    assert (error < 0.3).all()
    assert_close(found.per_image["log_prob"], linear.log_prob(), standard_error=error)
    assert "unconverged" not in {metric.name for metric in found.metrics}


def test_metrics_do_not_depend_on_batch_and_chunk(linear_metrics):
    other = by_name(linear_model(evaluation_batch=23, chunk_size=20))
    for name, metric in linear_metrics.items():
        # Twenty samples have no tail to judge an image by.
        images = 0 if name == "unreliable" else 50
        assert metric.images == other[name].images == images
        np.testing.assert_allclose(metric.value, other[name].value, rtol=1e-4, atol=1e-4)


def test_raw_pixels_have_no_bits_per_dimension_and_dequantized_ones_do(linear_metrics):
    assert "bits_per_dim" not in linear_metrics
    config = Config(
        model=ModelConfig(latent=2, hidden=(8,)),
        evaluation=EvaluationConfig(10, "posterior"),
    )
    bits = by_name(untrained(config))["bits_per_dim"].value
    # An untrained model is no better than writing out 17 levels a pixel, and not absurdly worse.
    assert 2 < bits < np.log2(17)


def test_results_say_what_they_depend_on(linear, linear_metrics):
    described = describe(linear, [*linear_metrics.values()], seconds={"evaluation": 1})
    assert described["run"]["dataset"] == "digits"
    assert described["run"]["fingerprint"] == digits().fingerprint
    assert described["versions"]["jax"] == jax.__version__
    assert described["seconds"] == {"training": 0, "evaluation": 1}
    assert all(metric["split"] == "test" for metric in described["metrics"])


# ---------------------------------------------------------------- proposals


@pytest.fixture(scope="module")
def with_its_posterior(quick_compile):
    return per_image(linear_model(importance_samples=200, chunk_size=50))


def test_an_unknown_k_counts_neither_as_reliable_nor_as_unreliable():
    """Whether of the estimate or of that by the own posterior beside it."""
    unknown, known = np.full(2, np.nan), np.array([0.9, 0.1])
    for shapes, share in ((unknown, np.nan), (known, 0.5)):
        measured = {"log_prob": np.zeros(2), "pareto_k": shapes, "own_pareto_k": shapes}
        found = {m.name: m.value for m in metrics_of(EvaluationConfig(20), measured)}
        np.testing.assert_equal([found["unreliable"], found["own_unreliable"]], [share, share])


def test_annealing_replaces_the_estimate_and_not_that_of_the_own_posterior():
    """Which has a fifth of the samples, and says so."""
    shapes = np.array([0.9, 0.8, 0.1, 0.2])
    measured = {"pareto_k": shapes, "own_pareto_k": shapes, "annealed": shapes == 0.9}
    measured |= dict.fromkeys(("log_prob", "own_log_prob"), np.zeros(4))
    metrics = metrics_of(EvaluationConfig(500), measured)
    found = {metric.name: metric for metric in metrics}
    shares = [found[name].value for name in ("unreliable", "own_unreliable", "annealed")]
    np.testing.assert_array_equal(shares, [1 / 4, 1 / 2, 1 / 4])
    assert (found["log_prob"].samples, found["own_log_prob"].samples) == (500, 100)


@pytest.mark.parametrize("proposal", ["widened", "student_t"])
def test_another_proposal_finds_the_same_log_prob_and_leaves_the_bound(
    truth, with_its_posterior, proposal
):
    """Within its own sampling error of the closed form, image by image."""
    found = per_image(linear_model(importance_samples=200, chunk_size=50, proposal=proposal))
    error = found["log_prob_sampling_error"]
    assert (error > 0.005).all() and (error < 0.1).all()
    assert_close(found["log_prob"], truth, standard_error=error)
    assert (found["ess"] < 199).all()
    assert (found["pareto_k"] < 0.7).all()
    for name in ("elbo", "kl", "reconstruction"):
        assert_close(found[name], with_its_posterior[name])
    assert_close(with_its_posterior["log_prob"], truth)
    assert (with_its_posterior["pareto_k"] < 0.7).all()


@pytest.mark.parametrize("proposal", ["posterior", "widened", "student_t"])
def test_a_flow_is_evaluated_with_every_proposal(proposal):
    """Another base under the same flow; the random encoder's is good enough for many samples."""
    trained = linear_model("vae_iaf", importance_samples=1000, chunk_size=500, proposal=proposal)
    found, truth = per_image(trained), Linear(trained, IMAGES).log_prob()
    error = found["log_prob_sampling_error"]
    assert (error < 0.3).all()
    assert_close(found["log_prob"], truth, standard_error=error)
    assert (found["elbo"] < truth).all()


# ---------------------------------------------------------------- the weights' tail


def largest_of(log_weights):
    """The values of `ImportanceInfo.largest`, by sorting: (n, K) → (n, tail + 1)."""
    kept = tail_size(log_weights.shape[1]) + 1
    return np.sort(log_weights, axis=1)[:, ::-1][:, :kept]


def pareto_weights(shape, count, samples):
    """Log of U⁻ᵏ, whose tail is exactly of shape k."""
    return -shape * np.log(np.random.default_rng(0).uniform(size=(count, samples)))


@pytest.mark.parametrize("samples", [25, 100, 225, 226, 5000])
def test_pareto_k_from_the_largest_weights_is_that_of_all(samples):
    """arviz_stats takes negated log weights; with the wrong sign every k̂ would look excellent."""
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
