"""The model of experiments.gllvm: an ordination of counts, with standard errors.

Row i, column j: x ~ NB(exp(intercept_j + covariates_i · coefficients_j + z_i · loadings_j), α_j),
z_i ~ N(0, I). The parameters maximize the summed Laplace evidence, through implicit modes, and its
Hessian gives their standard errors. Loadings are triangular with a positive diagonal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import vlae_jax as vl

SOLVER = optx.BFGS(rtol=1e-4, atol=1e-4)
Params = dict[str, Array]
"""intercept (columns,), coefficients (covariates, columns), the free loadings, and for the negative
binomial log_dispersion (columns,)."""


def free_loadings(latent: int, columns: int) -> int:
    """How many loadings are free: those on and above the diagonal."""
    return latent * columns - latent * (latent - 1) // 2


def loadings(params: Params) -> Array:
    """(latent, columns), zero below the diagonal, from the numbers on and above it."""
    columns, latent = len(params["intercept"]), 1
    while free_loadings(latent, columns) < len(params["loadings"]):
        latent += 1
    above = np.triu_indices(latent, m=columns)
    return jnp.zeros((latent, columns)).at[above].set(params["loadings"])


def with_positive_diagonal(params: Params) -> Params:
    """The same model with every latent variable's sign such that its diagonal loading is positive.

    During the search signs are free: with exponentials on the diagonal it would stop at zero
    wherever the start has a sign wrong.
    """
    kernel = loadings(params)
    signs = jnp.sign(jnp.diagonal(kernel))[:, None]
    above = np.triu_indices(len(kernel), m=kernel.shape[1])
    return {**params, "loadings": (signs * kernel)[above]}


def expansion(params: Params, counts: Array, covariates: Array) -> vl.Expansion:
    """Of one row's log joint; exact, since the predictor is linear in z."""
    shift, kernel = params["intercept"] + covariates @ params["coefficients"], loadings(params)

    def log_likelihood(eta: Array) -> Array:
        if "log_dispersion" in params:
            return vl.negative_binomial(counts, eta, params["log_dispersion"])
        return vl.poisson(counts, eta)

    return vl.gauss_newton_expansion(lambda z: z @ kernel + shift, log_likelihood)


def infer(
    params: Params, counts: Array, covariates: Array
) -> tuple[Array, vl.GaussianPosterior, vl.RefinementInfo]:
    """Laplace's evidence and posterior of one row."""
    expand = expansion(params, counts, covariates)
    start = jnp.zeros(len(loadings(params)))
    posterior, info = vl.infer_posterior(expand, start, num_steps=8)
    return vl.laplace_evidence(expand, posterior.mean), posterior, info


def loss(params: Params, table: tuple[Array, Array]) -> Array:
    """Minus the log likelihood of all rows, nats."""
    return -jnp.sum(jax.vmap(infer, (None, 0, 0))(params, *table)[0])


def fit(
    table: tuple[Array, Array], dispersed: bool = True, latent: int = 2
) -> tuple[Params, Params, Array]:
    """Parameters of largest likelihood, and their standard errors by the observed information."""
    counts, covariates = table
    columns = counts.shape[1]
    start = {
        "intercept": jnp.log(jnp.mean(counts, axis=0) + 0.1),
        "coefficients": jnp.zeros((covariates.shape[1], columns)),
        "loadings": jnp.full(free_loadings(latent, columns), 0.1),
    }
    if dispersed:
        start["log_dispersion"] = jnp.full(columns, -1.0)
    found = optx.minimise(loss, SOLVER, start, table, max_steps=500, throw=False)
    params = with_positive_diagonal(found.value)
    flat, unravel = ravel_pytree(params)
    information = jax.hessian(lambda flat: loss(unravel(flat), table))(flat)
    errors = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(information)))
    return params, unravel(errors), found.result == optx.RESULTS.successful
