"""The pictures of several runs that have a row or a panel for each configuration."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlae_jax.report.groups import (
    Configuration,
    Problem,
    over_seeds,
    paired_differences,
    standard_error,
)
from vlae_jax.report.panels import (
    GAP_WORDS,
    K_LABEL,
    K_WORDS,
    GapRow,
    draw_gaps,
    draw_tails,
    gap_row,
    label_rows,
    read_tails,
    rows_height,
)
from vlae_jax.report.style import DPI, FAINT, INK, lines_of, suptitle, wrapped
from vlae_jax.runs.metrics import QUANTITIES, UNRELIABLE_K

BOUNDS = ("log_prob", "elbo")
_SEEDS_WORDS = (
    "Error bars are standard errors: over seeds where there are several (small dots: each seed), "
    "else over test images."
)
Values = Sequence[tuple[float, float]]


def draw_log_likelihood(problem: Problem) -> tuple[Figure, str] | None:
    """Draw log p(x) and ELBO of each configuration, with error bars over seeds or images."""
    rows = [c for c in problem.configurations if c.values("log_prob") or c.values("elbo")]
    if not rows:
        return None
    figure, panels = _rows_figure(rows, f"Test log-likelihood · {problem.title}")
    samples = _distinct(rows, "log_prob", "samples")
    for axes, name in zip(panels, BOUNDS, strict=True):
        _dots(axes, rows, [row.values(name) for row in rows])
        drawn = f", K = {' or '.join(samples) or '?'}" if name == "log_prob" else ""
        axes.set_title(f"{QUANTITIES[name].label}{drawn}")
        axes.set_xlabel("nats per image, higher is better")
    caption = (
        f"{_SEEDS_WORDS} Errors over images are mostly differences between images, which all "
        "systems share; the paired differences show whether one system is better."
    )
    if len(samples) > 1:
        caption += " Estimates of log p(x) with unequal K do not compare: more samples raise them."
    images = _distinct(rows, "log_prob", "images")
    if len(images) > 1:
        caption += f" The runs read unequal numbers of test images ({', '.join(images)})."
    proposals = {str((run.results or {}).get("run", {}).get("proposal")) for run in problem.runs}
    if len(proposals - {"None"}) > 1:
        caption += f" Their proposals differ: {', '.join(sorted(proposals))}."
    return figure, caption


def draw_differences(problem: Problem) -> tuple[Figure, str] | None:
    """Draw log p(x) and ELBO less those of the VAE of the same seed, over common test images."""
    found = {
        name: [paired_differences(c, problem.runs, name) for c in problem.configurations]
        for name in BOUNDS
    }
    kept = [any(found[name][i] for name in BOUNDS) for i in range(len(problem.configurations))]
    rows = [c for c, keep in zip(problem.configurations, kept, strict=True) if keep]
    if not rows:
        return None
    figure, panels = _rows_figure(rows, f"Difference to the VAE · {problem.title}")
    images = set()
    for axes, name in zip(panels, BOUNDS, strict=True):
        differences = [d for d, keep in zip(found[name], kept, strict=True) if keep]
        images |= {d.images for row in differences for d in row}
        _dots(axes, rows, [[(d.mean, d.standard_error) for d in row] for row in differences])
        axes.axvline(0.0, color=INK, linewidth=1.2, zorder=1.5)
        axes.set_title(f"{QUANTITIES[name].label} less the VAE’s")
        axes.set_xlabel("nats per image, right of 0 is better")
    return figure, (
        "Differences to the VAE of the same seed, image by image on the same "
        f"{' or '.join(map(str, sorted(images)))} test images. {_SEEDS_WORDS}"
    )


def _distinct(rows: Sequence[Configuration], name: str, key: str) -> list[str]:
    """The values that runs give for one property of a metric, ascending."""
    found = {(run.metric(name) or {}).get(key) for row in rows for run in row.runs}
    return [str(value) for value in sorted(v for v in found if isinstance(v, int))]


def _rows_figure(rows: Sequence[Configuration], title: str) -> tuple[Figure, list[Axes]]:
    """Make two panels whose rows are configurations, with a line between systems."""
    labels = [row.label for row in rows]
    height = 1.35 + rows_height(labels, 0.3)
    figure = Figure(figsize=(9.0, height), dpi=DPI, layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    for axes in (left, right):
        label_rows(axes, labels)
        for place in range(1, len(rows)):
            if rows[place].first.method != rows[place - 1].first.method:
                axes.axhline(place - 0.5, color="#d0d0d0", linewidth=0.7)
    right.tick_params(axis="y", labelleft=False)
    suptitle(figure, title)
    return figure, [left, right]


def _dots(axes: Axes, rows: Sequence[Configuration], values: Sequence[Values]) -> None:
    """Draw a dot with its error for each row, and a small one for each of its seeds."""
    for place, (row, given) in enumerate(zip(rows, values, strict=True)):
        if not given:
            continue
        mean, error = over_seeds(given)
        style: dict[str, Any] = {
            "color": row.color,
            "ecolor": row.color,
            "elinewidth": 1.6,
            "capsize": 3,
        }
        bar = None if math.isnan(error) else [error]
        axes.errorbar([mean], [place], xerr=bar, fmt=row.marker, markersize=6, **style, zorder=3)
        if len(given) > 1:
            seeds = [value for value, _ in given]
            below = [place + 0.26] * len(seeds)
            axes.plot(seeds, below, "o", color=row.color, markersize=2.5, linestyle="", zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.08)


def draw_all_gaps(problem: Problem) -> tuple[Figure, str] | None:
    """Draw the parts of the inference gap, one bar a configuration."""
    rows = [row for row in map(_mean_gap, problem.configurations) if row is not None]
    if not rows:
        return None
    height = 1.5 + rows_height([row.label for row in rows], 0.36)
    figure = Figure(figsize=(8.0, height), dpi=DPI, layout="constrained")
    draw_gaps(figure, figure.add_subplot(), rows)
    suptitle(figure, f"Inference gaps · {problem.title}")
    words = "over seeds where there are several, else over images"
    return figure, f"{GAP_WORDS} Error bars: the standard error of each part, {words}."


def _mean_gap(configuration: Configuration) -> GapRow | None:
    rows = [gap_row(configuration.label, run) for run in configuration.runs]
    rows = [row for row in rows if row is not None]
    if len(rows) < 2:
        return rows[0] if rows else None
    means = []
    for name in GapRow._fields[1:]:
        values = [getattr(row, name)[0] for row in rows]
        means.append((float(np.mean(values)), standard_error(values)))
    return GapRow(configuration.label, *means)


def draw_reliabilities(problem: Problem) -> tuple[Figure, str] | None:
    """Draw histograms of Pareto k̂, one a configuration, its seeds together."""
    found = [(c, read_tails(c.runs)) for c in problem.configurations]
    rows = [(c, tails) for c, tails in found if tails is not None]
    if not rows:
        return None
    columns = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // columns)
    # Beside each label stands the unreliable share.
    letters = 78 if columns == 1 else 28
    heading = 0.17 * (max(lines_of(c.label, letters) for c, _ in rows) - 1)
    height = 1.0 + (1.3 + heading) * lines
    figure = Figure(figsize=(9.0, height), dpi=DPI, layout="constrained")
    panels: list[Axes] = []
    for index, (configuration, tails) in enumerate(rows):
        first = panels[0] if panels else None
        axes = figure.add_subplot(lines, columns, index + 1, sharey=first)
        panels.append(axes)
        draw_tails(axes, tails, configuration.color)
        axes.set_title(wrapped(configuration.label, letters), parse_math=False, pad=4.0)
        share = f"{100 * tails.unreliable:.1f} % above {UNRELIABLE_K}"
        if not math.isnan(tails.unreliable):
            axes.set_title(share, loc="right", fontsize=8.5, color=FAINT, pad=4.0)
        last = index + columns >= len(rows)
        axes.tick_params(axis="x", labelbottom=last, labelsize=8)
        axes.tick_params(axis="y", labelleft=index % columns == 0)
        if last:
            axes.set_xlabel(K_LABEL)
            # The label may reach into an empty place below, but must not widen the gap of rows.
            axes.xaxis.set_in_layout(index + 1 == len(rows) or index % columns == 0)
    figure.supylabel("% of test images", size=9.0)
    suptitle(figure, f"Reliability of log p(x) · {problem.title}")
    words = "; ".join(f"{c.label}: {tails.words}" for c, tails in rows)
    return figure, (
        "Shape k̂ of the tail of the importance weights, image by image, seeds together. "
        f"{K_WORDS} {words}."
    )
