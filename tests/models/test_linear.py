"""Probabilistic PCA and factor analysis against scikit-learn, scipy and plain linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import digits, doubles, untrained
from problems import assert_close
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA, FactorAnalysis

from vlae_jax.analysis.evaluation import evaluate
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.errors import UserError
from vlae_jax.models.linear import fit_factor_analysis, fit_ppca
from vlae_jax.models.trained import Keys
from vlae_jax.runs.presets import default_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def sklearn_score(xs, latent):
    """Mean log density of the maximum-likelihood model, nats.

    scikit-learn divides by n - 1 where maximum likelihood divides by n: it is shown the data a
    little closer to their mean.
    """
    mean = xs.mean(axis=0)
    shrunk = mean + np.sqrt((len(xs) - 1) / len(xs)) * (xs - mean)
    return PCA(latent, svd_solver="full").fit(shrunk).score(xs)


def score(xs, kernel, bias, variance):
    covariance = kernel.T @ kernel + variance * np.eye(len(bias))
    return multivariate_normal(bias, covariance).logpdf(xs).mean()


FITS = pytest.mark.parametrize("fit", [fit_ppca, fit_factor_analysis])


@pytest.fixture
def xs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 3)) @ rng.normal(size=(3, 6)) + rng.normal(size=(300, 6)) + 2.0


def test_the_likelihood_is_that_of_scikit_learn(xs):
    for latent in (1, 3, 5):
        fitted = fit_ppca(xs, latent)
        assert fitted.kernel.shape == (latent, 6)
        found = score(xs, fitted.kernel, fitted.bias, fitted.variance)
        assert_close(found, sklearn_score(xs, latent))


@FITS
def test_the_posterior_is_exact_and_diagonal(xs, fit):
    fitted = fit(xs, 3)
    precision = np.eye(3) + (fitted.kernel / fitted.variance) @ fitted.kernel.T
    covariance = np.linalg.inv(precision)
    assert_close(np.diag(fitted.posterior_std**2), covariance)
    assert_close(fitted.posterior_kernel, (fitted.kernel / fitted.variance).T @ covariance)


def test_the_variance_keeps_its_floor_and_the_rest_fits_it(xs):
    """Directions with less variance than the floor are left out of the decoder."""
    fitted = fit_ppca(xs, 5, min_variance=2.0)
    np.testing.assert_array_equal(fitted.variance, 2.0)
    values = np.linalg.eigvalsh(np.cov(xs.T, bias=True))[:0:-1]
    assert_close(np.sum(fitted.kernel**2, axis=1), np.maximum(values - 2.0, 0.0))
    precision = np.eye(5) + fitted.kernel @ fitted.kernel.T / 2.0
    assert_close(np.diag(fitted.posterior_std**2), np.linalg.inv(precision))


@pytest.mark.parametrize("latent", [0, 7])
@FITS
def test_more_latents_than_pixels_are_refused(xs, latent, fit):
    with pytest.raises(UserError, match=f"latent dimensions for 6 pixels or columns, got {latent}"):
        fit(xs, latent)


def test_as_many_latents_as_pixels_leave_factor_analysis_nothing_to_explain(xs):
    """Its covariance is then the sample's; probabilistic PCA would have no noise left."""
    fitted = fit_factor_analysis(xs, 6)
    found = fitted.kernel.T @ fitted.kernel + np.diag(fitted.variance)
    assert_close(found, np.cov(xs.T, bias=True), rtol=1e-3)
    with pytest.raises(UserError, match="from 1 to 5 latent dimensions for 6"):
        fit_ppca(xs, 6)


def test_factor_analysis_is_fitted_to_a_stationary_point(xs):
    """There the diagonals of sample and model covariance agree, a variance for each pixel."""
    scaled = xs * np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    fitted = fit_factor_analysis(scaled, 3)
    found = np.sum(fitted.kernel**2, axis=0) + fitted.variance
    assert_close(found, scaled.var(axis=0), rtol=1e-4)
    assert score(scaled, fitted.kernel, fitted.bias, fitted.variance) > score(
        scaled, *fit_ppca(scaled, 3)[:3]
    )
    assert (fit_factor_analysis(scaled, 3, min_variance=2.0).variance >= 2.0).all()


@FITS
def test_fewer_images_than_latent_dimensions_are_refused(xs, fit):
    with pytest.raises(UserError, match="more images than latent dimensions, got 3 for 4"):
        fit(xs[:3], 4)


def test_the_likelihood_of_factor_analysis_is_that_of_scikit_learn(xs):
    scaled = xs * np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    fitted = fit_factor_analysis(scaled, 1)
    sklearn = FactorAnalysis(1, tol=1e-8, max_iter=10_000, svd_method="lapack").fit(scaled)
    found = score(scaled, fitted.kernel, fitted.bias, fitted.variance)
    np.testing.assert_allclose(found, sklearn.score(scaled), atol=1e-5)


@pytest.mark.slow
def test_log_p_of_a_factor_analysis_is_that_of_scikit_learn():
    """As evaluated for test images, by importance samples from the exact posterior."""
    config = default_config(method="fa")
    trained, images = untrained(config), digits().test[:20]
    apply = jax.vmap(trained.preprocessor.apply)

    def in_model_space(pixels, keys):
        return np.asarray(apply(keys, jnp.asarray(pixels))[0], np.float64)

    xs = in_model_space(digits().train, fixed_keys(len(digits().train)))
    noise_keys = jax.vmap(lambda key: Keys.split(key).noise)(fixed_keys(len(images)))
    sklearn = FactorAnalysis(16, tol=1e-6, max_iter=10_000, svd_method="lapack")
    truth = sklearn.fit(xs).score_samples(in_model_space(images, noise_keys))
    chosen = trained.with_config(
        "evaluation", proposal="posterior", importance_samples=10, test_images=20
    )
    found = evaluate(chosen, images).per_image
    np.testing.assert_allclose(found["log_prob"].mean(), truth.mean(), atol=1e-4)
    np.testing.assert_allclose(found["elbo"], truth, atol=2e-3)


def test_a_model_is_made_as_the_fitted_one_of_its_training_images():
    """Decoder, variance, and an encoder that gives the exact posterior, in float32."""
    trained, train = untrained(default_config(method="ppca")), digits().train
    model = trained.model
    apply = jax.vmap(trained.preprocessor.apply)
    xs = np.asarray(apply(fixed_keys(len(train)), jnp.asarray(train))[0], np.float64)
    kernel, bias = doubles(model.head.kernel, model.head.bias)
    variance = float(np.exp(np.float64(model.log_var)))
    assert_close(np.float32(score(xs, kernel, bias, variance)), sklearn_score(xs, 16))

    guess = jax.vmap(lambda x: model.at(x).guess)(jnp.asarray(xs[:20], jnp.float32))
    covariance = np.linalg.inv(np.eye(16) + kernel @ kernel.T / variance)
    assert_close(guess.mean, (xs[:20] - bias) @ kernel.T @ covariance / variance)
    assert_close(np.exp(2 * guess.log_std[0]), np.diag(covariance))
