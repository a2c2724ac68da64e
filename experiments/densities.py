"""Densities of tables: `vlae_jax.VLAE` beside scikit-learn's models, by log p(x) of test rows.

`python -m experiments.densities` fits each model to half of the rows of scikit-learn's own tables,
with default settings but the number of components, and records what it measured in
`experiments/densities.json`. `--table` prints the table of `docs/sklearn.md` from that record.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from experiments.comparison import run_comparison
from vlae_jax import VLAE

RECORD = Path(__file__).with_suffix(".json")
TABLES: dict[str, tuple[Callable[[], Any], int]] = {
    "digits": (datasets.load_digits, 10),
    "breast_cancer": (datasets.load_breast_cancer, 5),
    "wine": (datasets.load_wine, 2),
}
"""Name → its loader, and the number of components of every model with latent dimensions."""
MODELS: dict[str, Callable[[int, int], Any]] = {
    "PCA": lambda k, seed: PCA(k),
    "FactorAnalysis": lambda k, seed: FactorAnalysis(k),
    "GaussianMixture": lambda k, seed: GaussianMixture(k, reg_covar=1e-3, random_state=seed),
    "KernelDensity, width searched": lambda k, seed: GridSearchCV(
        KernelDensity(), {"bandwidth": np.geomspace(0.1, 3.0, 12)}
    ),
    "VLAE, no hidden layers": lambda k, seed: VLAE(k, hidden_layer_sizes=(), random_state=seed),
    "VLAE, method vae": lambda k, seed: VLAE(k, method="vae", random_state=seed),
    "VLAE": lambda k, seed: VLAE(k, random_state=seed),
}


def halves(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows, each column with mean 0 and standard deviation 1 in training.

    The pixels of the digits are dequantized, and those that hardly vary are left out.
    """
    rows = np.asarray(TABLES[name][0]().data, float)
    rng = np.random.default_rng(seed)
    if name == "digits":
        rows = rows[:, rows.std(axis=0) > 0.5]
        rows = rows + rng.uniform(size=rows.shape)
    rows = rows[rng.permutation(len(rows))]
    train, test = rows[::2], rows[1::2]
    mean, std = train.mean(axis=0), train.std(axis=0)
    return (train - mean) / std, (test - mean) / std


def run_one(table_name: str, model: str, seed: int) -> dict[str, Any]:
    """Fit and measure one model on one table."""
    train, test = halves(table_name, seed)
    estimator = MODELS[model](TABLES[table_name][1], seed)
    began = time.process_time()
    estimator.fit(train)
    seconds = time.process_time() - began
    fitted = getattr(estimator, "best_estimator_", estimator)
    found = fitted.score_samples(test)
    return {
        "table": table_name,
        "model": model,
        "seed": seed,
        "log_prob": float(found.mean()),
        "standard_error": float(found.std() / len(found) ** 0.5),
        "seconds": seconds,
        "rows": len(train),
        "columns": train.shape[1],
        "components": TABLES[table_name][1],
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    results = record["results"]
    names = list(dict.fromkeys(r["table"] for r in results))
    lines = ["| model | " + " | ".join(f"{n}, nats | s" for n in names) + " |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for model in dict.fromkeys(r["model"] for r in results):
        cells = [model]
        for name in names:
            same = [r for r in results if (r["table"], r["model"]) == (name, model)]
            value, error, seconds = (
                np.mean([r[key] for r in same]) for key in ("log_prob", "standard_error", "seconds")
            )
            cells += [f"{value:.2f} ± {error:.2f}".replace("-", "−"), f"{seconds:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = {r["table"]: f"{r['rows']} × {r['columns']}, {r['components']}" for r in results}
    made = record["made_with"]
    lines.append("")
    lines.append(
        "Training rows × columns, components: "
        + "; ".join(f"{name} {size}" for name, size in sizes.items())
        + f". Seeds {', '.join(map(str, sorted({r['seed'] for r in results})))}; seconds of one "
        "core's processor time beside other work, compilation included; "
        f"{made['device']}, jax {made['jax']}, scikit-learn "
        f"{made['scikit-learn']}; `python -m experiments.densities`."
    )
    return "\n".join(lines)


def measure(tables: Sequence[str], seeds: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Fit and measure every model on each table, with each seed."""
    for name, model in itertools.product(tables, MODELS):
        yield [run_one(name, model, seed) for seed in seeds]


if __name__ == "__main__":
    run_comparison("densities", __doc__, tables=TABLES, record=RECORD, table=table, measure=measure)
