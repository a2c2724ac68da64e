"""Generalized linear latent variable models of counts, measured: docs/gllvm.md.

python -m experiments.gllvm simulate      (coverage; writes docs/images/gllvm.png)
python -m experiments.gllvm evidence      (Laplace and ELBO of a row beside quadrature)

The model is that of experiments/gllvm_model.py. Figures go to experiments/gllvm.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.stats
from jax.scipy.linalg import solve_triangular
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import vlae_jax as vl
from experiments import gllvm_model as model
from experiments.report import IMAGES
from vlae_jax.report.style import BLUE, DPI, INK, ORANGE, STYLE

RESULTS = Path(__file__).with_suffix(".json")
Table = tuple[jax.Array, jax.Array]
REPLICATES, ROWS, COLUMNS = 100, 100, 6


def truth(columns: int = COLUMNS, dispersion: float | None = 0.5) -> dict[str, np.ndarray]:
    """Parameters as the model has them, of one covariate and two latent dimensions."""
    free = np.stack([np.linspace(-0.8, 0.8, columns), np.linspace(0.9, -0.6, columns)])
    free[0, 0], free[1, 1] = 0.8, 0.7
    params = {
        "intercept": np.linspace(0.5, 2.5, columns),
        "coefficients": np.linspace(-0.6, 0.6, columns)[None],
        "loadings": free[np.triu_indices(2, m=columns)],
    }
    return params | (
        {} if dispersion is None else {"log_dispersion": np.full(columns, np.log(dispersion))}
    )


def simulate(rng: np.random.Generator, params: dict, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (rows, columns) and covariates (rows, 1)."""
    covariates, z = rng.normal(size=(rows, 1)), rng.normal(size=(rows, 2))
    kernel = np.asarray(model.loadings(jax.tree.map(jnp.asarray, params)))
    mean = np.exp(params["intercept"] + covariates @ params["coefficients"] + z @ kernel)
    if "log_dispersion" in params:
        dispersion = np.exp(params["log_dispersion"])
        mean = mean * rng.gamma(1 / dispersion, dispersion, size=mean.shape)
    return rng.poisson(mean), covariates


def coverage(dispersion: float | None) -> tuple[dict[str, Any], Table, model.Params]:
    """Fits of simulated tables: bias, and how often 90 % intervals hold the true parameters.

    Returns:
        The summary; the first table, and its fit.
    """
    params, rng = truth(dispersion=dispersion), np.random.default_rng(0)
    tables = [simulate(rng, params, ROWS) for _ in range(REPLICATES)]
    batch = tuple(jnp.asarray(np.stack(part)) for part in zip(*tables, strict=True))
    fit = jax.jit(jax.vmap(lambda *table: model.fit(table, dispersed=dispersion is not None)))
    found, errors, converged = jax.tree.map(np.asarray, fit(*batch))
    half_width = scipy.stats.norm.ppf(0.95)
    summary: dict[str, Any] = {"converged": float(np.mean(converged))}
    for name, true in params.items():
        error = found[name] - true
        is_inside = np.abs(error) < half_width * errors[name]
        summary[name] = {
            "coverage": float(np.mean(is_inside)),
            "bias": float(np.mean(np.abs(np.median(error, axis=0)))),
            "spread over standard error": float(
                np.median(np.std(error, axis=0) / np.nanmedian(errors[name], axis=0))
            ),
        }
    first = jax.tree.map(lambda array: jnp.asarray(array[0]), (batch, found))
    return summary, *first


def quadrature(params: dict, row: tuple, latent: int, points: int = 30) -> jax.Array:
    """Log likelihood of one row by Gauss-Hermite quadrature, centered and scaled by Laplace."""
    _, posterior, _ = model.infer(params, *row)
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = jnp.asarray(np.stack(np.meshgrid(*[nodes] * latent), -1).reshape(-1, latent))
    log_weights = np.sum(np.meshgrid(*[np.log(weights)] * latent), axis=0).ravel()
    offsets = solve_triangular(posterior.chol_precision, grid.T, lower=True, trans=1).T
    value = jax.vmap(lambda z: model.expansion(params, *row)(z).value)(posterior.mean + offsets)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(posterior.chol_precision)))
    return jax.nn.logsumexp(value + log_weights + 0.5 * jnp.sum(grid**2, 1)) - half_log_det


def bound(key: jax.Array, params: dict, row: tuple) -> jax.Array:
    """ELBO of one row with the variational Gaussian, which is held at its optimum."""
    expand = model.expansion(params, *row)
    _, posterior, _ = model.infer(params, *row)
    refined, _ = vl.variational_refine(expand, posterior, key, num_steps=8, num_samples=16)
    return vl.elbo(key, lambda z: expand(z).value, refined, num_samples=32, antithetic=True)


def evidence() -> dict[str, Any]:
    """Mean error of a row's evidence, nats, at true parameters of 1 and 2 latent dimensions."""
    results = {}
    for name, dispersion in (("poisson", None), ("negative binomial", 0.5)):
        for latent in (1, 2):
            params = jax.tree.map(jnp.asarray, truth(dispersion=dispersion))
            rows = simulate(np.random.default_rng(1), params, ROWS)
            if latent == 1:
                params["loadings"] = params["loadings"][:COLUMNS]
            table = tuple(jnp.asarray(part) for part in rows)
            results[f"{name}, {latent}"] = _evidence(params, table, latent)
    return results


def _evidence(params: dict, rows: tuple, latent: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), ROWS)

    @jax.jit
    @jax.vmap
    def compare(key: jax.Array, *row: jax.Array) -> tuple[jax.Array, ...]:
        exact, coarser = (quadrature(params, row, latent, points) for points in (30, 24))
        return exact, coarser, model.infer(params, *row)[0], bound(key, params, row)

    exact, coarser, laplace, variational = map(np.asarray, compare(keys, *rows))
    return {
        "log likelihood": float(np.mean(exact)),
        "quadrature": float(np.max(np.abs(exact - coarser))),
        "Laplace": float(np.mean(laplace - exact)),
        "Laplace, largest": float(np.max(np.abs(laplace - exact))),
        "ELBO": float(np.mean(variational - exact)),
    }


def residuals(key: jax.Array, params: dict, table: tuple) -> np.ndarray:
    """Dunn-Smyth residuals: normal quantiles of randomized probabilities, (rows, columns).

    At a draw of each row's posterior, so that they are standard normal where the model holds.
    """
    _, posterior, _ = jax.jit(jax.vmap(model.infer, (None, 0, 0)))(params, *table)
    keys = jax.random.split(key, len(table[0]))
    z = jax.vmap(lambda key, posterior: posterior.sample_and_log_prob(key)[0])(keys, posterior)
    counts, covariates = map(np.asarray, table)
    eta = params["intercept"] + covariates @ params["coefficients"] + z @ model.loadings(params)
    mean, law = np.exp(eta), scipy.stats.poisson(np.exp(eta))
    if "log_dispersion" in params:
        size = np.exp(-np.asarray(params["log_dispersion"]))
        law = scipy.stats.nbinom(size, size / (size + mean))
    low, high = law.cdf(counts - 1), law.cdf(counts)
    uniform = low + (high - low) * np.asarray(jax.random.uniform(jax.random.key(9), low.shape))
    return scipy.stats.norm.ppf(uniform)


def ordination(path: Path, params: dict, posterior: Any, noise: np.ndarray) -> None:
    """Rows with ellipses that hold 90 % of their posteriors, loadings as arrows; and residuals."""
    kernel = np.asarray(model.loadings(params))
    # Rotated to the principal axes of the loadings, which the likelihood does not change.
    axes = np.linalg.svd(kernel)[0]
    means = np.asarray(posterior.mean) @ axes
    covariances = axes.T @ np.asarray(jax.vmap(lambda q: q.covariance())(posterior)) @ axes
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        radius = np.sqrt(scipy.stats.chi2.ppf(0.9, 2))
        for mean, covariance in zip(means, covariances, strict=True):
            values, vectors = np.linalg.eigh(covariance)
            angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
            size = 2 * radius * np.sqrt(values[::-1])
            left.add_patch(Ellipse(mean, *size, angle=angle, fc="none", ec=BLUE, alpha=0.15))
        left.plot(*means.T, ".", color=BLUE, ms=3)
        for number, (x, y) in enumerate((axes.T @ kernel).T, 1):
            left.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": ORANGE})
            left.text(1.12 * x, 1.12 * y, str(number), color=INK, ha="center", va="center")
        left.set(xlabel="latent 1", ylabel="latent 2", title="rows, and columns 1 to 6")
        ordered = np.sort(noise.ravel())
        expected = scipy.stats.norm.ppf((np.arange(ordered.size) + 0.5) / ordered.size)
        right.plot(expected, expected, color=INK, lw=0.8)
        right.plot(expected, ordered, ".", color=BLUE, ms=3)
        right.set(xlabel="normal quantile", ylabel="Dunn-Smyth residual", title="residuals")
        FigureCanvasAgg(figure).print_figure(path, dpi=DPI)


def simulated() -> dict[str, Any]:
    """Coverage, and the first table drawn, with its residuals and its likelihood by quadrature."""
    summary, table, params = coverage(None)
    _, posterior, _ = jax.jit(jax.vmap(model.infer, (None, 0, 0)))(params, *table)
    noise = residuals(jax.random.key(0), params, table)
    ordination(IMAGES / "gllvm.png", params, posterior, noise)
    exact = jax.jit(jax.vmap(lambda *row: quadrature(params, row, 2)))(*table)
    summary["first table"] = {
        "Laplace log likelihood": -float(jax.jit(model.loss)(params, table)),
        "log likelihood by quadrature": float(jnp.sum(exact)),
        "residuals' normality, p": float(scipy.stats.kstest(noise.ravel(), "norm").pvalue),
    }
    return summary


STUDIES = {"simulate": simulated, "evidence": evidence}


def main() -> None:
    """Measure what is asked for, print it, and keep it in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    jax.config.update("jax_enable_x64", True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[study] = STUDIES[study]()
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(json.dumps(kept[study], indent=1))


if __name__ == "__main__":
    main()
