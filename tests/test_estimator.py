"""The scikit-learn form, against scikit-learn's own checks and linear models."""

import pickle

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from vlae_jax import VLAE
from vlae_jax.runs.config import Config

pytestmark = pytest.mark.usefixtures("quick_compile")

WINE = load_wine().data
LINEAR = VLAE(hidden_layer_sizes=(), max_iter=2, random_state=0)
NETWORK = VLAE(
    hidden_layer_sizes=(8,), n_steps=2, max_iter=2, n_importance_samples=50, random_state=0
)
SINGLE = (
    "float32, and one program for each size of batch: a row alone differs in the last digits, by "
    "less than 1e-4 (test_rows_do_not_depend_on_their_company)"
)
OF_TRAINING = {
    "check_dict_unchanged",
    "check_estimators_overwrite_params",
    "check_estimators_pickle",
    "check_fit_idempotent",
    "check_methods_sample_order_invariance",
    "check_transformer_n_iter",
}


@parametrize_with_checks(
    [LINEAR],
    expected_failed_checks=lambda estimator: {"check_methods_subset_invariance": SINGLE},
    xfail_strict=False,
)
def test_scikit_learn_checks_a_linear_model(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([NETWORK])
def test_scikit_learn_checks_a_network(estimator, check):
    """By those that depend on the training; each of them trains several times."""
    if check.func.__name__ not in OF_TRAINING:
        pytest.skip("the linear model passes it in the same lines of code")
    check(estimator)


@pytest.mark.parametrize("data", [WINE, load_digits().data[:600]], ids=["wine", "digits"])
def test_without_hidden_layers_it_is_factor_analysis(data):
    data = data[:, data.std(axis=0) > 0.1]
    train, test = data[::2], data[1::2]
    ours = VLAE(3, hidden_layer_sizes=()).fit(train)
    scaled = StandardScaler().fit(train)
    theirs = FactorAnalysis(3, tol=1e-9, max_iter=20_000, svd_method="lapack")
    theirs.fit(scaled.transform(train))
    expected = theirs.score_samples(scaled.transform(test)) - np.log(scaled.scale_).sum()
    np.testing.assert_allclose(ours.score_samples(test).mean(), expected.mean(), atol=1e-4)
    np.testing.assert_allclose(ours.score(test), expected.mean(), atol=1e-4)
    codes = theirs.transform(scaled.transform(test))
    decoded = scaled.inverse_transform(codes @ theirs.components_ + theirs.mean_)
    found = ours.inverse_transform(ours.transform(test))
    assert np.abs((found - decoded) / scaled.scale_).max() < 2e-2


def test_one_variance_makes_it_pca():
    data = (WINE - WINE.mean(0)) / WINE.std(0)
    ours = VLAE(3, hidden_layer_sizes=(), variance="shared", preprocess="none").fit(data)
    theirs = PCA(3).fit(data)
    # scikit-learn divides the covariance by n - 1, the maximum of the likelihood by n.
    n = len(data)
    theirs.explained_variance_ *= (n - 1) / n
    theirs.noise_variance_ *= (n - 1) / n
    np.testing.assert_allclose(ours.score_samples(data), theirs.score_samples(data), atol=1e-4)
    means, covariances = ours.posterior(data)
    assert means.shape == (len(data), 3) and covariances.shape == (len(data), 3, 3)


def test_missing_entries_get_their_conditional_distribution():
    model = VLAE(2, hidden_layer_sizes=(), random_state=0).fit(WINE)
    made = model.trained_.model
    kernel = np.asarray(made.head.kernel[...], np.float64)
    covariance = kernel.T @ kernel + np.diag(np.exp(np.asarray(made.log_var[...], np.float64)))
    bias = np.asarray(made.head.bias[...], np.float64)
    scale = np.asarray(model.trained_.preprocessor.scale, np.float64)
    shift = np.asarray(model.trained_.preprocessor.mean, np.float64)
    rows = WINE[:4].copy()
    rows[:, [1, 5, 9]] = np.nan
    filled, std = model.impute(rows, return_std=True)
    missing = np.isnan(rows)
    np.testing.assert_array_equal(filled[~missing], rows[~missing])
    assert (std[~missing] == 0).all()
    for row, got, spread, gone in zip(rows, filled, std, missing, strict=True):
        x = (row - shift) / scale - bias
        gain = covariance[np.ix_(gone, ~gone)] @ np.linalg.inv(covariance[np.ix_(~gone, ~gone)])
        mean = gain @ x[~gone] + bias[gone]
        rest = covariance[np.ix_(gone, gone)] - gain @ covariance[np.ix_(~gone, gone)]
        np.testing.assert_allclose((got[gone] - shift[gone]) / scale[gone], mean, atol=0.25)
        np.testing.assert_allclose(spread[gone] / scale[gone], np.diag(rest) ** 0.5, rtol=0.2)


@pytest.fixture(scope="module")
def network(quick_compile):
    return clone(NETWORK).fit(WINE)


def test_rows_do_not_depend_on_their_company(network):
    order = np.random.default_rng(0).permutation(len(WINE))
    for method in (network.transform, network.score_samples):
        whole = method(WINE)
        np.testing.assert_allclose(method(WINE[order]), whole[order], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(method(WINE[7:8]), whole[7:8], rtol=1e-4, atol=1e-4)


def test_a_copy_by_pickle_is_the_same_model(network):
    copy = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(copy.transform(WINE), network.transform(WINE))
    np.testing.assert_array_equal(copy.score_samples(WINE), network.score_samples(WINE))
    assert list(network.get_feature_names_out()) == ["vlae0", "vlae1"]


def test_a_seed_repeats_a_fit_and_a_sample(network):
    again = clone(NETWORK).fit(WINE)
    np.testing.assert_array_equal(again.transform(WINE), network.transform(WINE))
    drawn = network.sample(500, random_state=1)
    np.testing.assert_array_equal(drawn, again.sample(500, random_state=1))
    assert drawn.shape == (500, WINE.shape[1])
    # Two epochs: the model is little more than the mean and the variance of each column.
    assert np.abs(drawn.mean(0) - WINE.mean(0)).max() < (0.5 * WINE.std(0)).max()


def test_it_works_in_pipelines_and_searches():
    pipe = make_pipeline(StandardScaler(), VLAE(hidden_layer_sizes=(), random_state=0))
    search = GridSearchCV(pipe, {"vlae__n_components": [2, 4]}, cv=3).fit(WINE)
    assert search.best_params_ == {"vlae__n_components": 2}
    theirs = GridSearchCV(FactorAnalysis(), {"n_components": [2, 4]}, cv=3)
    assert theirs.fit(StandardScaler().fit_transform(WINE)).best_params_ == {"n_components": 2}


@pytest.mark.slow
def test_a_network_learns_what_no_linear_model_can():
    """A noisy curve, whose log density is an integral over one dimension."""
    rng = np.random.default_rng(0)
    z, std = rng.normal(size=(1200, 1)), 0.1
    data = np.concatenate([z, np.exp(z)], axis=1) + std * rng.normal(size=(1200, 2))
    train, test = data[:1000], data[1000:]
    grid = np.linspace(-6, 6, 4001)
    curve = np.stack([grid, np.exp(grid)], axis=1)
    given = norm(curve, std).logpdf(test[:, None]).sum(axis=2)
    truth = logsumexp(given + norm.logpdf(grid), axis=1).mean() + np.log(grid[1] - grid[0])
    linear = FactorAnalysis(1).fit(train).score(test)
    network = VLAE(1, hidden_layer_sizes=(32, 32), max_iter=60, learning_rate_init=3e-3)
    found = network.set_params(random_state=0).fit(train).score(test)
    assert linear + 1.0 < found < truth + 0.1
    assert found > truth - 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance": "per_pixel"}, "variance must be one of"),
        ({"method": "nuts"}, "nuts"),
        ({"activation": "sine"}, "activation"),
        ({"validation_fraction": 1.5}, "validation_fraction must lie between 0 and 1"),
        ({"n_components": 0}, "latent must be at least 1"),
        ({"hidden_layer_sizes": "wide"}, "hidden"),
        ({"hidden_layer_sizes": 0}, "hidden must be at least 1"),
        ({"image_shape": (3, 3, 1)}, "image_shape must be"),
        ({"likelihood": "poisson"}, "needs counts"),
    ],
)
def test_bad_parameters_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        clone(NETWORK).set_params(**changes).fit(WINE)
    assert "\n" not in str(caught.value)


def test_whatever_has_no_parameter_comes_from_the_configuration():
    base = Config()
    model = clone(LINEAR).set_params(config=base)
    assert clone(model).config == base
    assert model.fit(WINE).trained_.config.evaluation.proposal == "posterior"
