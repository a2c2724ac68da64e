"""Models of tables and images of measurements: densities in their own units, and gaps."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from builders import doubles, linear_config, tiny_config, untrained
from scipy.stats import multivariate_normal

import vlae_jax
from vlae_jax.analysis.evaluation import evaluate
from vlae_jax.analysis.imputation import impute, missing_at_random
from vlae_jax.analysis.uses import encode, reconstruct, rows_for, sample, score
from vlae_jax.data.sets import dataset_from_arrays
from vlae_jax.errors import UserError
from vlae_jax.models.initial import initialize
from vlae_jax.runs.config import Config, DataConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


def table(rows: int = 60, seed: int = 0) -> np.ndarray:
    """Correlated columns of different units."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, 2)) @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(rows, 5))
    return mixed * [1.0, 20.0, 0.01, 5.0, 300.0] + [0.0, 100.0, 3.0, -40.0, 1000.0]


def with_gaps(rows: np.ndarray, share: float = 0.4) -> np.ndarray:
    """The rows with entries missing at random, in each at least one and not all."""
    return np.where(missing_at_random(rows.shape, share, seed=3), np.nan, rows)


def own_units(trained) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the rows under a model without hidden layers, in their own units."""
    model = trained.model
    kernel, bias = doubles(model.head.kernel, model.head.bias)
    mean, scale = doubles(trained.preprocessor.mean, trained.preprocessor.scale)
    noise = np.exp(np.float64(model.log_var))
    covariance = kernel.T @ kernel + noise * np.eye(len(bias))
    return mean + scale * bias, covariance * scale * scale[:, None]


def log_normal(row: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The log density of the entries of a row that are there, nats."""
    there = ~np.isnan(row)
    std = np.sqrt(np.diag(covariance))[there]
    correlation = covariance[np.ix_(there, there)] / std / std[:, None]
    scaled = (row - mean)[there] / std
    return multivariate_normal(np.zeros(len(std)), correlation).logpdf(scaled) - np.log(std).sum()


def ppca(rows: np.ndarray, method: str = "ppca"):
    config = linear_config(latent=2, preprocess="auto", test_images=None)
    variance = "per_pixel" if method == "fa" else "shared"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, variance=variance),
        inference=dataclasses.replace(config.inference, method=method),
        training=dataclasses.replace(config.training, batch_size=8),
    )
    return untrained(config, dataset_from_arrays(rows))


@pytest.mark.parametrize("method", ["ppca", "fa"])
def test_log_prob_of_rows_is_that_of_their_own_units(method):
    """Exact for a linear decoder: every importance weight is p(x), whatever is missing."""
    trained = ppca(table(), method)
    mean, covariance = own_units(trained)
    new = table(12, seed=1)
    for rows in (new, with_gaps(new)):
        expected = [log_normal(row, mean, covariance) for row in rows]
        found = score(trained, rows)
        np.testing.assert_allclose(found["log_prob"], expected, rtol=1e-4, atol=2e-3)
        np.testing.assert_allclose(found["elbo"], expected, rtol=1e-4, atol=2e-3)


def test_missing_entries_are_imputed_by_the_conditional_normal():
    trained = ppca(table())
    mean, covariance = own_units(trained)
    gappy = with_gaps(table(3, seed=1))
    filled = impute(trained, gappy, num_samples=4000, draws=7).arrays
    assert filled["draws"].shape == (3, 7, 5)
    for i, row in enumerate(gappy):
        gone = np.isnan(row)
        gain = np.linalg.solve(covariance[np.ix_(~gone, ~gone)], covariance[np.ix_(~gone, gone)]).T
        expected = mean[gone] + gain @ (row - mean)[~gone]
        rest = covariance[np.ix_(gone, gone)] - gain @ covariance[np.ix_(~gone, gone)]
        std = np.sqrt(np.diag(rest))
        error = 4 * std / np.sqrt(4000)
        assert (np.abs(filled["rows"][i, gone] - expected) < error).all()
        np.testing.assert_allclose(filled["std"][i, gone], std, rtol=0.06)
        np.testing.assert_allclose(filled["rows"][i, ~gone], row[~gone], rtol=1e-5)
        assert (filled["std"][i, ~gone] == 0).all()
        assert (np.abs(filled["quantiles"][i, 1, gone] - expected + 0.6745 * std) < error * 2).all()
        assert (np.abs(filled["quantiles"][i, 4, gone] - expected - 1.6449 * std) < error * 3).all()


def test_a_table_is_trained_saved_loaded_and_used(tmp_path):
    rows = table(40)
    names = ("a", "b", "c", "d", "e")
    frame = pa.table(dict(zip(names, rows.T, strict=True)))
    trained = vlae_jax.fit(tiny_config("vae"), frame)
    assert trained.config.data.preprocess == "standardize"
    assert trained.provenance.columns == names
    vlae_jax.save(trained, tmp_path / "model")
    loaded = vlae_jax.load(tmp_path / "model")
    assert loaded.provenance == trained.provenance
    new = rows_for(loaded, frame.slice(0, 4).select(["e", "d", "c", "b", "a"]))
    np.testing.assert_allclose(new, rows[:4])
    for one, other in zip(
        *(encode(model, new).values() for model in (trained, loaded)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert reconstruct(loaded, new)["reconstructions"].shape == (4, 5)
    drawn = sample(loaded, 300, seed=0, draws=True)["draws"]
    # Trained for a moment, the model still knows where each column lies and how it spreads.
    assert (np.abs(drawn.mean(axis=0) - rows.mean(axis=0)) < rows.std(axis=0)).all()
    assert {metric.name for metric in evaluate(loaded, new).metrics} >= {"elbo", "log_prob"}
    with pytest.raises(UserError, match="data has no column 'a'"):
        rows_for(loaded, frame.select(["b"]))


def test_images_of_measurements_train_with_convolutions_and_gaps():
    images = np.random.default_rng(0).normal(5.0, 2.0, (24, 4, 4, 1)).astype(np.float32)
    images[:, 0, 0] = np.nan
    images[1:, 0, 0] = 3.0
    images[:, 1, 1][::2] = np.nan
    config = tiny_config("vae", epochs=1)
    model = ModelConfig(latent=2, hidden=(8,), network="conv", channels=(2,))
    trained = vlae_jax.fit(dataclasses.replace(config, model=model), images)
    assert trained.provenance.incomplete
    assert np.isfinite(score(trained, images[:4])["elbo"]).all()


def test_the_encoder_is_told_what_is_missing():
    """A model of incomplete data sees the mask: the fill value observed is another example."""
    gappy = with_gaps(table())
    trained = initialize(tiny_config("vae"), dataset_from_arrays(gappy))
    row = np.asarray(table(1, seed=2)[0], np.float32)
    blank = row.copy()
    blank[2] = np.nan
    filled = row.copy()
    filled[2] = trained.preprocessor.mean[2]
    codes = encode(trained, np.stack([blank, filled]))["mean"]
    assert np.abs(codes[0] - codes[1]).max() > 1e-4
    complete = initialize(tiny_config("vae"), dataset_from_arrays(table(), gappy))
    assert complete.model.encoder.layers[0].kernel.shape[0] == 5
    assert trained.model.encoder.layers[0].kernel.shape[0] == 10


@pytest.mark.parametrize(
    ("config", "data", "said"),
    [
        (
            Config(data=DataConfig(preprocess="logit")),
            table(),
            "logit is for pixels .* standardize",
        ),
        (
            Config(data=DataConfig(preprocess="standardize")),
            np.zeros((9, 4, 4), np.uint8),
            "standardize is for tables",
        ),
        (tiny_config("vae", batch_size=64), table(), "has 54 rows after validation"),
        (tiny_config("vae"), np.ones((40, 2)), "column 0 .from 0. is constant"),
        (tiny_config("vae"), np.ones((40, 2, 2)), "images are all equal"),
        (
            dataclasses.replace(tiny_config("vae"), model=ModelConfig(network="conv")),
            table(),
            "network conv is for images",
        ),
    ],
)
def test_data_that_do_not_fit_the_choices_are_refused(tmp_path, config, data, said):
    with pytest.raises(UserError, match=said) as caught:
        vlae_jax.fit(config, data, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_linear_fits_need_complete_data():
    with pytest.raises(UserError, match="ppca is fitted in closed form to complete data"):
        ppca(with_gaps(table()))
