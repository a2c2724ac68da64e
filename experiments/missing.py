"""Missing values in tables: models of this package beside scikit-learn's imputers.

`python -m experiments.missing` hides 20, 50 and 80 % of the entries of scikit-learn's own tables at
random, lets every method fill them in, having seen the same gaps, and records what it measured in
`experiments/missing.json`. `--table` prints the table of `docs/missing.md` from that record.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from scipy.stats import norm
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import vlae_jax
from experiments.comparison import run_comparison
from vlae_jax.analysis.imputation import missing_at_random
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.models.trained import Trained
from vlae_jax.parallel.mapping import map_images
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig

RECORD = Path(__file__).with_suffix(".json")
TABLES: dict[str, Callable[[], Any]] = {
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}
SHARES = (0.2, 0.5, 0.8)
IMPUTATIONS = 10
"""Draws of the iterative imputer, for the mean and the spread of its predictions."""
SAMPLES = 1000
"""Samples of z a row, for the predictions of a model."""
MODEL = ModelConfig(latent=4, hidden=(64,), activation="tanh", variance="per_pixel", min_std=0.05)
TRAINING = TrainingConfig(epochs=150, batch_size=32, learning_rate=3e-3, patience=20)


class Prediction(NamedTuple):
    """What a method says of each entry, in units of the column's standard deviation, (n, dim)."""

    mean: np.ndarray
    log_density: np.ndarray | None = None
    """Of the true entry, nats; None for a method that predicts points."""
    rank: np.ndarray | None = None
    """Probability of a value below the true one."""


def hidden_table(name: str, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A table, each column with mean 0 and standard deviation 1, and which entries are hidden."""
    rows = TABLES[name]().data
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    return rows, missing_at_random(rows.shape, share, seed=seed)


def by_points(imputer: Any, rows: np.ndarray, hidden: np.ndarray) -> Prediction:
    """Impute by a method of scikit-learn that gives one value."""
    return Prediction(imputer.fit_transform(np.where(hidden, np.nan, rows)))


def by_iteration(rows: np.ndarray, hidden: np.ndarray, seed: int) -> Prediction:
    """Impute by regressions of each column on the others, drawn several times."""
    gappy = np.where(hidden, np.nan, rows)
    draws = [
        IterativeImputer(sample_posterior=True, max_iter=10, random_state=seed + i, tol=1e-2)
        for i in range(IMPUTATIONS)
    ]
    filled = np.stack([imputer.fit_transform(gappy) for imputer in draws])
    mean = IterativeImputer(max_iter=10, random_state=seed, tol=1e-2).fit_transform(gappy)
    normal = norm(filled.mean(axis=0), np.maximum(filled.std(axis=0, ddof=1), 1e-3))
    return Prediction(mean, normal.logpdf(rows), normal.cdf(rows))


def train(rows: np.ndarray, hidden: np.ndarray, method: str, seed: int) -> Trained:
    """Train on rows with gaps: a VAE by the importance-weighted bound, or VLAE by the ELBO."""
    is_vae = method == "vae"
    objective = {"objective": "iwae", "train_samples": 20} if is_vae else {}
    config = Config(
        model=MODEL,
        inference=InferenceConfig(method=method, steps=4),
        training=dataclasses.replace(TRAINING, seed=seed, **objective),  # type: ignore[arg-type]
    )
    return vlae_jax.fit(config, np.where(hidden, np.nan, rows))


def by_model(
    trained: Trained, rows: np.ndarray, hidden: np.ndarray, *, laplace: bool, weighted: bool
) -> Prediction:
    """Impute by samples of z given the observed entries.

    Args:
        trained: The model.
        rows: The table, standardized, (n, dim).
        hidden: Which entries are missing.
        laplace: Samples of the Laplace posterior after 20 steps; else of the encoder's posterior.
        weighted: Give the samples importance weights, for those of the encoder's posterior as in
            MIWAE (Mattei and Frellsen, 2019); else all count alike.
    """
    if laplace:
        trained = trained.with_inference(method="vlae", steps=20)
    gappy = np.where(hidden, np.nan, rows)
    trained = trained.for_examples(gappy)

    def one(
        trained: Trained, row: Array, key: PRNGKeyArray, truth: Array
    ) -> tuple[Array, Array, Array]:
        inferred = trained.infer(key, row)
        posterior, model = inferred.posterior, inferred.at.model
        keys = jax.random.split(inferred.keys.use, SAMPLES)
        zs, log_q = jax.vmap(posterior.sample_and_log_prob)(keys)
        excess = jax.vmap(inferred.log_joint)(zs) - log_q if weighted else jnp.zeros(SAMPLES)
        weights = jax.nn.softmax(excess)[:, None]
        scale, shift = trained.preprocessor.scale, trained.preprocessor.mean
        means = jax.vmap(model.decode)(zs) * scale + shift
        stds = jnp.exp(0.5 * model.log_var) * scale
        each = jax.scipy.stats.norm.logpdf(truth, means, stds) + jnp.log(weights)
        below = jax.scipy.stats.norm.cdf(truth, means, stds)
        return (
            jnp.sum(weights * means, axis=0),
            jax.scipy.special.logsumexp(each, axis=0),
            jnp.sum(weights * below, axis=0),
        )

    run = map_images(one, gappy, fixed_keys(len(rows)), rows, batch_size=64)
    return Prediction(*run(trained))


def measure(predicted: Prediction, rows: np.ndarray, hidden: np.ndarray) -> dict[str, float]:
    """Error, log density and coverage over the hidden entries."""
    found = {"rmse": float(np.sqrt(np.mean((predicted.mean - rows)[hidden] ** 2)))}
    if predicted.log_density is not None and predicted.rank is not None:
        found["log_density"] = float(predicted.log_density[hidden].mean())
        distance = np.abs(predicted.rank[hidden] - 0.5)
        for percent in (50, 90):
            found[f"inside_{percent}"] = float((distance <= percent / 200).mean())
    return found


def run_one(name: str, share: float, seed: int) -> list[dict[str, Any]]:
    """All methods on one table with one set of gaps."""
    rows, hidden = hidden_table(name, share, seed)
    records = []

    def note(method: str, predict: Callable[[], Prediction]) -> None:
        began = time.process_time()
        found = measure(predict(), rows, hidden)
        found["cpu_seconds"] = round(time.process_time() - began, 1)
        records.append({"table": name, "share": share, "seed": seed, "method": method, **found})
        print(records[-1], flush=True)

    note("mean of the column", lambda: by_points(SimpleImputer(), rows, hidden))
    note("KNNImputer", lambda: by_points(KNNImputer(), rows, hidden))
    note("IterativeImputer", lambda: by_iteration(rows, hidden, seed))
    vae = train(rows, hidden, "vae", seed)

    def of(trained: Trained, **choice: bool) -> Callable[[], Prediction]:
        return lambda: by_model(trained, rows, hidden, **choice)

    vae = train(rows, hidden, "vae", seed)
    note("VAE, encoder, importance weights", of(vae, laplace=False, weighted=True))
    note("the same VAE, Laplace", of(vae, laplace=True, weighted=False))
    note("the same VAE, Laplace, importance weights", of(vae, laplace=True, weighted=True))
    vlae = train(rows, hidden, "vlae", seed)
    note("VLAE, Laplace, importance weights", of(vlae, laplace=True, weighted=True))
    return records


def table(record: dict[str, Any]) -> str:
    """The results as a Markdown table: means over the seeds."""
    lines = ["| table, missing | method | RMSE | log density | inside 50 % | inside 90 % |"]
    lines.append("|---|---|---|---|---|---|")
    keys = [(r["table"], r["share"], r["method"]) for r in record["results"]]
    for key in dict.fromkeys(keys):
        same = [r for r, k in zip(record["results"], keys, strict=True) if k == key]

        def cell(name: str, form: str, factor: float = 1.0, same: Any = same) -> str:
            if name not in same[0]:
                return "–"
            value = factor * np.mean([result[name] for result in same])
            return format(value, form).replace("-", "−")

        shown = (
            f"{key[0]}, {100 * key[1]:.0f} %",
            key[2],
            cell("rmse", ".3f"),
            cell("log_density", ".2f"),
            cell("inside_50", ".0f", 100),
            cell("inside_90", ".0f", 100),
        )
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def measured(tables: Sequence[str], seeds: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Run the comparison on each table, with each share of missing entries and each seed."""
    for name, share, seed in itertools.product(tables, SHARES, seeds):
        yield run_one(name, share, seed)


if __name__ == "__main__":
    run_comparison("missing", __doc__, tables=TABLES, record=RECORD, table=table, measure=measured)
