"""Variational Laplace Autoencoders in JAX: functional, with exact Hessians.

The names here are pure functions of one example, for use inside your own `jit`, `vmap`, `grad` and
`scan`; they need jax and jaxtyping alone. The rooms that train and report (`models`, `training`,
`evaluation`, ...) are imported by name and need the `train` extra.
"""

from vlae_jax.affine_head import affine_head_expansion
from vlae_jax.bounds import (
    ImportanceInfo,
    elbo,
    importance_weighted_log_prob,
    iwae_bound,
    laplace_evidence,
)
from vlae_jax.densities import (
    LogDensity,
    bernoulli,
    categorical,
    discretized_logistic,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    multivariate_normal,
    poisson,
    standard_normal,
    student_t,
    student_t_fisher,
)
from vlae_jax.expansions import (
    Expansion,
    MatrixFreeExpansion,
    Products,
    Quadratic,
    exact_expansion,
    gauss_newton_expansion,
    shifted_expansion,
)
from vlae_jax.inference import infer_posterior
from vlae_jax.kinks import KinkCheck, certify_kink, check_kink
from vlae_jax.posterior import (
    DiagonalPosterior,
    GaussianPosterior,
    Posterior,
    StudentTPosterior,
    heavy_tailed,
    laplace_posterior,
    widened,
)
from vlae_jax.refinement import RefinementInfo, gradient_refine, newton_refine

__version__ = "0.1.0"

__all__ = [
    "DiagonalPosterior",
    "Expansion",
    "GaussianPosterior",
    "ImportanceInfo",
    "KinkCheck",
    "LogDensity",
    "MatrixFreeExpansion",
    "Posterior",
    "Products",
    "Quadratic",
    "RefinementInfo",
    "StudentTPosterior",
    "affine_head_expansion",
    "bernoulli",
    "categorical",
    "certify_kink",
    "check_kink",
    "discretized_logistic",
    "elbo",
    "exact_expansion",
    "gauss_newton_expansion",
    "gaussian",
    "gaussian_heteroscedastic",
    "gaussian_heteroscedastic_fisher",
    "gradient_refine",
    "heavy_tailed",
    "importance_weighted_log_prob",
    "infer_posterior",
    "iwae_bound",
    "laplace_evidence",
    "laplace_posterior",
    "multivariate_normal",
    "newton_refine",
    "poisson",
    "shifted_expansion",
    "standard_normal",
    "student_t",
    "student_t_fisher",
    "widened",
]
