"""The latent variable models of counts: evidence, residuals and loadings against known truths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from experiments import gllvm
from experiments import gllvm_model as model

pytestmark = pytest.mark.usefixtures("quick_compile")


def problem(latent, dispersion):
    params = gllvm.truth(4, dispersion)
    params["loadings"] = params["loadings"][: model.free_loadings(latent, 4)]
    params = jax.tree.map(jnp.asarray, params)
    return params, (jnp.asarray([0, 3, 1, 9]), jnp.asarray([0.7]))


def log_joint(params, row, z):
    """By scipy, of one row, at points (..., latent)."""
    counts, covariates = map(np.asarray, row)
    kernel = np.asarray(model.loadings(params))
    mean = np.exp(params["intercept"] + covariates @ params["coefficients"] + z @ kernel)
    law = scipy.stats.poisson(mean)
    if "log_dispersion" in params:
        size = np.exp(-np.asarray(params["log_dispersion"]))
        law = scipy.stats.nbinom(size, size / (size + mean))
    return np.sum(law.logpmf(counts), -1) + np.sum(scipy.stats.norm.logpdf(z), -1)


@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("dispersion", [None, 0.5], ids=["poisson", "negative binomial"])
def test_quadrature_is_scipys_integral_and_laplace_is_near(x64, latent, dispersion):
    params, row = problem(latent, dispersion)
    axis = np.linspace(-6, 6, 121 if latent == 2 else 2001)
    points = np.stack(np.meshgrid(*[axis] * latent), -1).reshape(-1, latent)
    density = np.exp(log_joint(params, row, points))
    exact = np.log(np.sum(density) * (axis[1] - axis[0]) ** latent)
    by_quadrature, laplace = jax.jit(
        lambda row: (gllvm.quadrature(params, row, latent), model.infer(params, *row)[0])
    )(row)
    np.testing.assert_allclose(by_quadrature, exact, rtol=1e-6)
    assert 1e-6 < abs(laplace - exact) < 0.1


def test_loadings_are_triangular_and_signs_change_nothing_but_the_diagonal(x64):
    params = {"intercept": jnp.zeros(4), "loadings": jnp.array([-1.0, 2, 3, 4, 2, 5, 6])}
    kernel = model.loadings(params)
    np.testing.assert_array_equal(kernel, [[-1, 2, 3, 4], [0, 2, 5, 6]])
    positive = model.loadings(model.with_positive_diagonal(params))
    np.testing.assert_array_equal(positive, [[1, -2, -3, -4], [0, 2, 5, 6]])


def test_residuals_of_the_true_model_are_standard_normal(x64):
    """At draws of the posterior, which Laplace's is nearly; of a wrong model they are not."""
    params = gllvm.truth(6, 0.5)
    rows = gllvm.simulate(np.random.default_rng(0), params, 200)
    table, params = jax.tree.map(jnp.asarray, (rows, params))
    noise = gllvm.residuals(jax.random.key(0), params, table)
    assert noise.shape == (200, 6)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    del params["log_dispersion"]
    wrong = gllvm.residuals(jax.random.key(0), params, table)
    assert scipy.stats.kstest(wrong.ravel(), "norm").pvalue < 1e-4
