"""What the studies share: run every variant with every seed, once, and set the results out."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

COLUMNS = {
    "log_prob": "log p(x)",
    "elbo": "ELBO",
    "inference_gap": "gap",
    "bits_per_dim": "bits/dim",
    "unconverged": "unconverged",
}


def main(
    name: str,
    variants: Mapping[str, Sequence[str]],
    common: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
) -> None:
    """Run a study and print its table in Markdown.

    A run that is finished is not repeated, one that was broken off is resumed.

    Args:
        name: The study's name, a folder under runs/.
        variants: Label → options of `vlae_jax train` that make the variant; the first is the
            baseline that paired differences refer to.
        common: Options of all variants.
        seeds: Each variant is trained with each.
    """
    parser = argparse.ArgumentParser(description=f"Run the {name} study and print its table.")
    parser.add_argument("--data-dir", help="where the images are, if not in the cache")
    parser.add_argument("--folder", type=Path, default=Path("runs") / name, help="where runs go")
    arguments = parser.parse_args()
    if arguments.data_dir:
        common = [*common, "--data-dir", arguments.data_dir]
    results = {
        label: [_result(arguments.folder, label, seed, [*common, *options]) for seed in seeds]
        for label, options in variants.items()
    }
    print(table(results))


def table(results: Mapping[str, Sequence[Mapping]]) -> str:
    """One row a variant: mean over seeds ± its standard error, or over images if one seed."""
    baseline = next(iter(results.values()))
    head = ["system", *COLUMNS.values(), "log p(x) - baseline", "training s"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for label, runs in results.items():
        cells = [label, *(_over_seeds([_figure(run, name) for run in runs]) for name in COLUMNS)]
        differences = [
            (_figure(run, "log_prob")[0] - _figure(base, "log_prob")[0], math.nan)
            for run, base in zip(runs, baseline, strict=True)
        ]
        cells.append("" if runs is baseline else _over_seeds(differences))
        cells.append(f"{mean(run['seconds']['training'] for run in runs):.0f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _result(folder: Path, label: str, seed: int, options: Sequence[str]) -> dict:
    run = folder / f"{label.replace(' ', '-')}-seed{seed}"
    results = run / "results.json"
    if not results.exists():
        resume = ["--resume"] if (run / "checkpoints").exists() else ["--overwrite"]
        command = [sys.executable, "-m", "vlae_jax", "train", "--run-dir", str(run)]
        subprocess.run([*command, *options, "--seed", str(seed), *resume], check=True)
    return json.loads(results.read_text())


def _figure(result: Mapping, name: str) -> tuple[float, float]:
    for figure in result["figures"]:
        if figure["name"] == name:
            return figure["value"], figure["standard_error"]
    return math.nan, math.nan


def _over_seeds(figures: Sequence[tuple[float, float]]) -> str:
    values = [value for value, _ in figures]
    if math.isnan(values[0]):
        return "-"
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else figures[0][1]
    text = f"{mean(values):.3f}"
    return text if math.isnan(error) else f"{text} ± {error:.3f}"
