"""The comparison of imputers: its measures against a normal distribution, its table as recorded."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from builders import doubles, linear_config, untrained
from scipy.stats import norm

from vlae_jax.data.sets import dataset_from_arrays

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("studies")


def test_measures_of_a_correct_prediction_are_those_of_the_normal():
    from experiments.missing import Prediction, measure

    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(400, 50)), 0.7
    rows = mean + std * rng.normal(size=mean.shape)
    hidden = rng.random(mean.shape) < 0.5
    predicted = Prediction(mean, norm(mean, std).logpdf(rows), norm(mean, std).cdf(rows))
    found = measure(predicted, rows, hidden)
    error = 3 / np.sqrt(hidden.sum())
    assert abs(found["rmse"] - std) < error
    assert abs(found["log_density"] + norm(0, std).entropy()) < error
    assert abs(found["inside_50"] - 0.5) < error and abs(found["inside_90"] - 0.9) < error
    too_wide = Prediction(mean, norm(mean, 2 * std).logpdf(rows), norm(mean, 2 * std).cdf(rows))
    assert measure(too_wide, rows, hidden)["inside_50"] > 0.75
    assert measure(Prediction(mean), rows, hidden).keys() == {"rmse"}


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [True, False])
def test_predictions_of_a_linear_model_are_the_conditional_normal(quick_compile, weighted):
    from experiments.missing import by_model

    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(50, 4))
    config = linear_config("ppca", latent=2, preprocess="auto", test_images=None)
    training = dataclasses.replace(config.training, batch_size=8)
    config = dataclasses.replace(config, training=training)
    trained = untrained(config, dataset_from_arrays(rows))
    model, preprocessor = trained.model, trained.preprocessor
    kernel, bias = doubles(model.head.kernel, model.head.bias)
    mean, scale = doubles(preprocessor.mean, preprocessor.scale)
    covariance = kernel.T @ kernel + np.exp(np.float64(model.log_var)) * np.eye(4)
    mean, covariance = mean + scale * bias, covariance * scale * scale[:, None]
    hidden = np.zeros((3, 4), bool)
    hidden[:, 1] = hidden[0, 3] = True
    found = by_model(trained, rows[:3], hidden, laplace=True, weighted=weighted)
    for i, gone in enumerate(hidden):
        gain = np.linalg.solve(covariance[np.ix_(~gone, ~gone)], covariance[np.ix_(~gone, gone)]).T
        center = mean[gone] + gain @ (rows[i] - mean)[~gone]
        rest = covariance[np.ix_(gone, gone)] - gain @ covariance[np.ix_(~gone, gone)]
        truth = norm(center, np.sqrt(np.diag(rest)))
        np.testing.assert_allclose(found.mean[i, gone], center, atol=0.1)
        np.testing.assert_allclose(
            found.log_density[i, gone], truth.logpdf(rows[i, gone]), atol=0.15
        )
        np.testing.assert_allclose(found.rank[i, gone], truth.cdf(rows[i, gone]), atol=0.05)


def test_the_page_shows_the_record():
    from experiments.missing import RECORD, table

    page = (ROOT / "docs" / "missing.md").read_text()
    printed = page.split("<!-- table: missing -->\n")[1].split("\n<!-- end -->")[0]
    assert printed == table(json.loads(RECORD.read_text()))
