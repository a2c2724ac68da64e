"""Variational Laplace Autoencoders in JAX: functional, with exact Hessians.

Most names here are pure functions of one example, for use inside your own `jit`, `vmap`, `grad` and
`scan`; they need only jax and jaxtyping.

The shipped model is trained and used through `fit`, `load`, `save` and `Config`, or in the form of
scikit-learn through `VLAE`. These need the `train` extra and are imported on first access. The
subpackages behind them (`data`, `models`, `training`, `analysis`, ...) need it too, and are
imported by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlae_jax.affine_head import affine_head_expansion
from vlae_jax.bounds import (
    ImportanceInfo,
    elbo,
    importance_weighted_log_prob,
    iwae_bound,
    laplace_evidence,
)
from vlae_jax.counts import (
    negative_binomial,
    poisson,
    zero_inflated_negative_binomial,
    zero_inflated_negative_binomial_fisher,
    zero_inflated_poisson,
    zero_inflated_poisson_fisher,
)
from vlae_jax.densities import (
    LogDensity,
    bernoulli,
    categorical,
    discretized_logistic,
    gaussian,
    gaussian_heteroscedastic,
    gaussian_heteroscedastic_fisher,
    gaussian_mixture,
    gaussian_mixture_precision,
    multivariate_normal,
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
from vlae_jax.matrix_free import LaplaceSample, laplace_sample
from vlae_jax.posterior import DiagonalPosterior, GaussianPosterior, Posterior, laplace_posterior
from vlae_jax.proposals import (
    MixturePosterior,
    SkewedPosterior,
    StudentTPosterior,
    heavy_tailed,
    widened,
)
from vlae_jax.refinement import RefinementInfo, gradient_refine, newton_refine, scaled_refine
from vlae_jax.variational import VariationalInfo, variational_refine

if TYPE_CHECKING:
    from vlae_jax.estimator import VLAE as VLAE
    from vlae_jax.models.saved import load as load
    from vlae_jax.models.saved import save as save
    from vlae_jax.models.trained import Trained as Trained
    from vlae_jax.runs.config import Config as Config
    from vlae_jax.runs.presets import default_config as default_config
    from vlae_jax.training.loop import fit as fit

__version__ = "0.1.0"

APPLICATION = {
    "Config": "vlae_jax.runs.config",
    "Trained": "vlae_jax.models.trained",
    "VLAE": "vlae_jax.estimator",
    "default_config": "vlae_jax.runs.presets",
    "fit": "vlae_jax.training.loop",
    "load": "vlae_jax.models.saved",
    "save": "vlae_jax.models.saved",
}
"""Names that need the `train` extra, each with the module that defines it."""

__all__ = [
    "DiagonalPosterior",
    "Expansion",
    "GaussianPosterior",
    "ImportanceInfo",
    "KinkCheck",
    "LaplaceSample",
    "LogDensity",
    "MatrixFreeExpansion",
    "MixturePosterior",
    "Posterior",
    "Products",
    "Quadratic",
    "RefinementInfo",
    "SkewedPosterior",
    "StudentTPosterior",
    "VariationalInfo",
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
    "gaussian_mixture",
    "gaussian_mixture_precision",
    "gradient_refine",
    "heavy_tailed",
    "importance_weighted_log_prob",
    "infer_posterior",
    "iwae_bound",
    "laplace_evidence",
    "laplace_posterior",
    "laplace_sample",
    "multivariate_normal",
    "negative_binomial",
    "newton_refine",
    "poisson",
    "scaled_refine",
    "shifted_expansion",
    "standard_normal",
    "student_t",
    "student_t_fisher",
    "variational_refine",
    "widened",
    "zero_inflated_negative_binomial",
    "zero_inflated_negative_binomial_fisher",
    "zero_inflated_poisson",
    "zero_inflated_poisson_fisher",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *APPLICATION})


def __getattr__(name: str) -> Any:
    if name not in APPLICATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(APPLICATION[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"vlae_jax.{name} needs {error.name}: pip install 'vlae-jax[train]'"
        ) from error
