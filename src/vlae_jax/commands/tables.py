"""Tables on the terminal: of means, errors, scores and metrics."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from vlae_jax.runs.metrics import QUANTITIES, Metric, titled


def shares(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The flags of a system by the labels under which their means are printed.

    Of convergence that is the decrement, in nats: at the kinks of a ReLU decoder, where most of its
    modes lie, a flag alone would read as a failure.
    """
    labels = {
        "newton_decrement": titled("newton_decrement"),
        "is_pd": "share positive definite",
    }
    return {label: arrays[flag] for flag, label in labels.items() if flag in arrays}


def shape(array: ArrayLike) -> str:
    """The shape of an array in parentheses: ``(10, 3)``, ``(10)``."""
    return "(" + ", ".join(map(str, np.shape(array))) + ")"


def print_means(values: Mapping[str, np.ndarray]) -> None:
    """Print the mean over images of each array, with its standard error."""
    rows = [(name, _mean(array), str(len(array))) for name, array in values.items()]
    print_table(("", "mean", "images"), rows)


def print_errors(errors: Mapping[str, np.ndarray], unit: str = "pixels in [0, 1]") -> None:
    """Print the RMSE over missing pixels and the coverage of their predictive intervals.

    In one row for the posterior given the other pixels, and in one for the encoder alone.
    """
    counts = errors["num_missing"].astype(np.float64)
    weights = counts / counts.sum()
    rows = []
    for label, prefix in (("posterior given the rest", ""), ("encoder alone", "encoder_")):
        cells = [f"{np.sqrt(weights @ errors[prefix + 'squared_error']):.4f}"]
        cells += [f"{np.sqrt(weights @ errors[prefix + 'squared_error_x']):.4f}"]
        for name in ("coverage_50", "coverage_90"):
            covered = errors.get(prefix + name)
            cells += ["–" if covered is None else f"{100 * weights @ covered:.1f} %"]
        rows.append((label, *cells))
    header = ("", f"RMSE, {unit}", "RMSE, model space", "inside 50 %", "inside 90 %")
    print_table(header, rows)
    print(f"Over the missing pixels of {np.count_nonzero(counts)} images.")


def print_scores(
    scores: Mapping[str, np.ndarray],
    against: Mapping[str, np.ndarray] | None = None,
    areas: Mapping[str, float] | None = None,
) -> None:
    """Print the mean of each score; for two sets of images, also how well it tells them apart.

    Args:
        scores: One number for each image, by score.
        against: Scores of the other set.
        areas: Area under the ROC curve of each score that has one.
    """
    rows = []
    for name, values in scores.items():
        end = "high" if QUANTITIES[name].outlying > 0 else "low"
        row = [titled(name), end, _mean(values)]
        if against is not None and areas is not None:
            row += [_mean(against[name]), f"{areas[name]:.4f}" if name in areas else "–"]
        rows.append(row)
    header = ["score", "outlying if", f"mean of {len(next(iter(scores.values())))}"]
    if against is not None:
        header += [f"mean of {len(next(iter(against.values())))} against", "AUROC"]
    print_table(header, rows)


def _mean(values: np.ndarray) -> str:
    """The mean of the finite values, with its standard error over images."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return f"{finite[0]:.4g}" if len(finite) else "–"
    return f"{finite.mean():.4g} ± {finite.std(ddof=1) / np.sqrt(len(finite)):.2g}"


def print_metrics(metrics: Iterable[Metric]) -> None:
    """Print each metric on a line, with its standard error."""
    rows = [
        (
            metric.name.replace("_", " "),
            f"{metric.value:.3f}",
            "" if metric.standard_error is None else f"± {metric.standard_error:.3f}",
            metric.unit,
            f"{metric.images} {metric.split}",
        )
        for metric in metrics
    ]
    print_table(("", "mean", "± error", "unit", "images"), rows)


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table, as wide as it needs and a terminal allows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    # A file or a pipe has no width that a table must fit.
    width = console.width if console.is_terminal else max(needed, console.width)
    Console(highlight=False, width=width).print(table)
