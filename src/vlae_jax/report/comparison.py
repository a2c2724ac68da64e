"""The pictures of several runs side by side."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlae_jax.report.files import Run, write_file
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
    GapRow,
    colour_limit,
    deviation_strip,
    draw_gaps,
    draw_tails,
    gap_row,
    heat_map,
    ordered_correlations,
    read_tails,
    robust_limits,
    step_paths,
)
from vlae_jax.report.style import (
    DPI,
    FAINT,
    INK,
    Drawer,
    Picture,
    Sheet,
    draw_pictures,
    enlarge,
    legend_below,
)

COMPARED_IMAGES = 4
_SEEDS_WORDS = (
    "Error bars are standard errors: over seeds where there are several (small dots: each seed), "
    "else over test images."
)


def save_comparison(problems: Sequence[Problem], folder: Path) -> list[list[tuple[Path, Picture]]]:
    """Draw and write the pictures of each problem."""
    saved = []
    for problem in problems:
        suffix = re.sub(r"[^\w.-]+", "_", f"-{problem.title}") if len(problems) > 1 else ""
        pictures = compare(problem)
        saved.append([(folder / f"{each.name}{suffix}.png", each) for each in pictures])
    for path, picture in (item for items in saved for item in items):
        write_file(path, picture.png)
    return saved


def compare(problem: Problem) -> list[Picture]:
    """Draw every picture that the runs have the data for, in the order of the page."""
    drawers: Sequence[tuple[str, str, Drawer[Problem]]] = (
        ("log_likelihood", "Log-likelihood and ELBO", draw_log_likelihood),
        ("paired_differences", "Differences to the VAE", draw_differences),
        ("gaps", "Inference gaps", draw_all_gaps),
        ("pareto_k", "Reliability of log p(x)", draw_reliabilities),
        ("steps", "Refinement", draw_all_steps),
        ("posterior_covariances", "Posterior correlations", draw_posteriors),
        ("training_curves", "Training", draw_training),
    )
    return draw_pictures(problem, drawers)


Values = Sequence[tuple[float, float]]


def draw_log_likelihood(problem: Problem) -> tuple[Figure, str] | None:
    """Log p(x) and ELBO of each configuration, with error bars over seeds or images."""
    rows = [c for c in problem.configurations if c.values("log_prob") or c.values("elbo")]
    if not rows:
        return None
    figure, panels = _rows_figure(rows, f"Test log-likelihood · {problem.title}")
    samples = _distinct(rows, "log_prob", "samples")
    titles = {"log_prob": f"log p(x), K = {' or '.join(samples) or '?'}", "elbo": "ELBO"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        _dots(axes, rows, [row.values(name) for row in rows])
        axes.set_title(title)
        axes.set_xlabel("nats per image, higher is better")
    caption = (
        f"{_SEEDS_WORDS} Dots and not bars, since a bar is read from zero, and zero is far away. "
        "Errors over images are mostly differences between images, common to all systems: whether "
        "one system is better, the paired differences tell."
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
    """Log p(x) and ELBO less those of the VAE of the same seed, over the same test images."""
    names = {"log_prob": "log p(x)", "elbo": "ELBO"}
    found = {
        name: [paired_differences(c, problem.runs, name) for c in problem.configurations]
        for name in names
    }
    kept = [any(found[name][i] for name in names) for i in range(len(problem.configurations))]
    rows = [c for c, keep in zip(problem.configurations, kept, strict=True) if keep]
    if not rows:
        return None
    figure, panels = _rows_figure(rows, f"Difference to the VAE · {problem.title}")
    images = set()
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        differences = [d for d, keep in zip(found[name], kept, strict=True) if keep]
        images |= {d.images for row in differences for d in row}
        _dots(axes, rows, [[(d.mean, d.standard_error) for d in row] for row in differences])
        axes.axvline(0.0, color=INK, linewidth=1.2, zorder=1.5)
        axes.set_title(f"{title} less the VAE’s")
        axes.set_xlabel("nats per image, right of 0 is better")
    return figure, (
        "Differences to the VAE of the same seed, image by image on the same "
        f"{' or '.join(map(str, sorted(images)))} test images. {_SEEDS_WORDS}"
    )


def _distinct(rows: Sequence[Configuration], figure: str, key: str) -> list[str]:
    """The values that runs give for one property of a figure, ascending."""
    found = {(run.metric(figure) or {}).get(key) for row in rows for run in row.runs}
    return [str(value) for value in sorted(v for v in found if isinstance(v, int))]


def _rows_figure(rows: Sequence[Configuration], title: str) -> tuple[Figure, list[Axes]]:
    """Two panels whose rows are configurations, with a line between systems."""
    height = 1.35 + 0.3 * len(rows)
    figure = Figure(figsize=(9.0, height), dpi=DPI, layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    left.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False)
    left.set_ylim(len(rows) - 0.5, -0.5)
    right.tick_params(axis="y", labelleft=False)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        for place in range(1, len(rows)):
            if rows[place].first.method != rows[place - 1].first.method:
                axes.axhline(place - 0.5, color="#d0d0d0", linewidth=0.7)
    _suptitle(figure, title)
    return figure, [left, right]


def _suptitle(figure: Figure, title: str) -> None:
    style: dict[str, Any] = {"x": 0.01, "ha": "left", "size": 10.0, "weight": "bold"}
    figure.suptitle(title, parse_math=False, **style)


def _dots(axes: Axes, rows: Sequence[Configuration], values: Sequence[Values]) -> None:
    """A dot with its error for each row, and small ones for the seeds it comes from."""
    for place, (row, given) in enumerate(zip(rows, values, strict=True)):
        if not given:
            continue
        mean, error = over_seeds(given)
        style: dict[str, Any] = {
            "color": row.colour,
            "ecolor": row.colour,
            "elinewidth": 1.6,
            "capsize": 3,
        }
        bar = None if math.isnan(error) else [error]
        axes.errorbar([mean], [place], xerr=bar, fmt=row.marker, markersize=6, **style, zorder=3)
        if len(given) > 1:
            seeds = [value for value, _ in given]
            below = [place + 0.26] * len(seeds)
            axes.plot(seeds, below, "o", color=row.colour, markersize=2.5, linestyle="", zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.08)


def draw_all_gaps(problem: Problem) -> tuple[Figure, str] | None:
    """The parts of the inference gap, one bar a configuration."""
    rows = [row for row in map(_mean_gap, problem.configurations) if row is not None]
    if not rows:
        return None
    figure = Figure(figsize=(8.0, 1.5 + 0.36 * len(rows)), dpi=DPI, layout="constrained")
    draw_gaps(figure, figure.add_subplot(), rows)
    _suptitle(figure, f"Inference gaps · {problem.title}")
    words = "over seeds where there are several, else as measured for the one"
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
    """Histograms of Pareto k̂, one a configuration, its seeds together."""
    found = [(c, read_tails(c.runs)) for c in problem.configurations]
    rows = [(c, tails) for c, tails in found if tails is not None]
    if not rows:
        return None
    columns = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(9.0, 1.0 + 1.3 * lines), dpi=DPI, layout="constrained")
    panels: list[Axes] = []
    for index, (configuration, tails) in enumerate(rows):
        first = panels[0] if panels else None
        axes = figure.add_subplot(lines, columns, index + 1, sharey=first)
        panels.append(axes)
        draw_tails(axes, tails, configuration.colour)
        axes.set_title(configuration.label, parse_math=False, pad=4.0)
        share = f"{100 * tails.unreliable:.1f} % above 0.7"
        if not math.isnan(tails.unreliable):
            axes.set_title(share, loc="right", fontsize=8.5, color=FAINT, pad=4.0)
        last = index + columns >= len(rows)
        axes.tick_params(axis="x", labelbottom=last, labelsize=8)
        axes.tick_params(axis="y", labelleft=index % columns == 0)
        if last:
            axes.set_xlabel(K_LABEL)
            # Below it there may be an empty place, but no wider gap between the rows.
            axes.xaxis.set_in_layout(index + 1 == len(rows) or index % columns == 0)
    figure.supylabel("% of test images", size=9.0)
    _suptitle(figure, f"Reliability of log p(x) · {problem.title}")
    words = "; ".join(f"{c.label}: {tails.words}" for c, tails in rows)
    return figure, (
        "Shape k̂ of the tail of the importance weights, image by image, seeds together. Below "
        "0.5 the weights have a finite variance and up to 0.7 log p(x) can be relied on; above, "
        f"it tends to be too low. {words}."
    )


def draw_all_steps(problem: Problem) -> tuple[Figure, str] | None:
    """Reconstruction error and log joint against steps; systems without steps as levels."""
    found = {
        name: [(c, step_paths(c.runs, name)) for c in problem.configurations]
        for name in ("step_error", "step_log_joint")
    }
    longest = max(
        (len(p[0]) for rows in found.values() for _, p in rows if p is not None), default=0
    )
    if longest < 2:
        return None
    figure = Figure(figsize=(9.0, 4.2), dpi=DPI, layout="constrained")
    titles = {
        "step_error": ("Reconstruction error", "RMSE, model space"),
        "step_log_joint": ("Log joint log p(x, z) at step t", "nats per image"),
    }
    for place, (name, (title, unit)) in enumerate(titles.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for configuration, paths in found[name]:
            if paths is None:
                continue
            middle = np.median(paths, axis=0)
            style: dict[str, Any] = {"color": configuration.colour, "label": configuration.label}
            if len(middle) > 1:
                marker = f"{configuration.marker}-"
                axes.plot(np.arange(len(middle)), middle, marker, markersize=4, **style)
            else:
                axes.plot([0, longest - 1], [middle[0]] * 2, linestyle="--", linewidth=1.1, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="step t", ylabel=unit, title=title)
    shown = max(figure.axes, key=lambda axes: len(axes.lines))
    legend_below(figure, shown)
    _suptitle(figure, f"Refinement · {problem.title}")
    return figure, (
        "Medians over test images, seeds together, at each step from the encoder's guess (t = 0); "
        "dashed, systems that take no such steps. Each system has a decoder of its own, so the "
        "levels tell of the model as well as of the inference."
    )


def draw_posteriors(problem: Problem) -> tuple[Figure, str] | None:
    """Posterior correlations of the same test images, a row each, in a column for each system."""
    chosen: dict[str, tuple[Configuration, Run]] = {}
    for configuration in problem.configurations:
        run = _posterior_run(configuration)
        best = chosen.get(configuration.first.label)
        if run is not None and (best is None or (run.steps or 0) > (best[1].steps or 0)):
            chosen[run.label] = configuration, run
    columns = list(chosen.values())
    if len(columns) < 2:
        return None
    data = columns[0][1].snapshots["data"]
    others = [c.label for c, run in columns if not _same_images(run, data)]
    columns = [(c, run) for c, run in columns if _same_images(run, data)]
    count = min(COMPARED_IMAGES, *(len(run.snapshots["covariances"]) for _, run in columns))
    count = min(count, len(data))
    found = [ordered_correlations(run.snapshots["covariances"][:count]) for _, run in columns]
    limit = colour_limit(*(correlations for correlations, _ in found))
    side = max(max(1, round(190 / d.shape[1])) * d.shape[1] for _, d in found)
    picture = enlarge(data[0], 90).shape[1]
    left, top, step_x, step_y = 24 + picture + 50, 112, side + 44, side + 74
    title = f"Posterior correlations · {problem.title}"
    sheet = Sheet(left + len(columns) * step_x + 104, top + count * step_y, title)
    for row in range(count):
        sheet.image(24, top + row * step_y, enlarge(data[row], 90))
    for column, ((configuration, _), (correlations, deviations)) in enumerate(
        zip(columns, found, strict=True)
    ):
        x = left + column * step_x
        label = "\n".join(textwrap.wrap(configuration.label, max(10, side // 11)))
        sheet.text(x + side / 2, top - 12, label, ha="center", va="bottom", linespacing=1.3)
        for row in range(count):
            y = top + row * step_y
            mappable = heat_map(sheet.axes(x, y, side, side), correlations[row], limit)
            strip = sheet.axes(x, y + side + 8, side, 34)
            deviation_strip(strip, deviations, row)
            strip.set_xlabel("posterior std" if row == count - 1 else "")
    axes = sheet.axes(left + len(columns) * step_x, top, 16, side)
    extend = "max" if limit < 1 else "neither"
    colours = sheet.figure.colorbar(mappable, cax=axes, extend=extend)
    colours.set_ticks([-limit, 0.0, limit])
    colours.set_label("correlation", color=FAINT)
    colours.outline.set_visible(False)
    caption = (
        "Posterior correlations of the latent dimensions for the same test images, one system a "
        "column (with its largest T, lowest seed). Each system has a latent space of its own: its "
        "dimensions are ordered by mean posterior variance, and the strip is their posterior "
        "standard deviation, 1 where the prior is left as it is."
    )
    if others:
        caption += f" Left out, since they saved other images: {', '.join(others)}."
    return sheet.figure, caption


def _posterior_run(configuration: Configuration) -> Run | None:
    runs = [r for r in configuration.runs if {"covariances", "data"} <= r.snapshots.keys()]
    return runs[0] if runs else None


def _same_images(run: Run, data: np.ndarray) -> bool:
    mine = run.snapshots["data"]
    count = min(len(mine), len(data))
    # Hardware may round the last digits of the same image differently.
    return mine.shape[1:] == data.shape[1:] and np.allclose(mine[:count], data[:count], atol=1e-3)


def draw_training(problem: Problem) -> tuple[Figure, str] | None:
    """Validation ELBO against epochs and against seconds, one line a seed."""
    figure = Figure(figsize=(9.0, 4.2), dpi=DPI, layout="constrained")
    panels = {"epoch": figure.add_subplot(1, 2, 1), "seconds": figure.add_subplot(1, 2, 2)}
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in panels}
    for name, axes in panels.items():
        for configuration in problem.configurations:
            label: str | None = configuration.label
            for run in configuration.runs:
                points, values = run.series("validation", "elbo", name)
                if not len(points):
                    continue
                curves[name].append((points, values))
                marker = configuration.marker if len(points) <= 40 else ""
                style: dict[str, Any] = {
                    "color": configuration.colour,
                    "linewidth": 1.2,
                    "markersize": 3,
                }
                axes.plot(points, values, marker=marker, label=label, **style)
                label = None
    if not curves["epoch"]:
        return None
    for axes in panels.values():
        axes.set_ylim(*robust_limits(curves["epoch"]))
        axes.set_ylabel("validation ELBO, nats per image")
    panels["epoch"].set(xlabel="epoch", title="Against epochs")
    panels["epoch"].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels["seconds"].set(xlabel="training time, seconds", title="Against time")
    ends = [points[-1] for points, _ in curves["seconds"]]
    caption = "ELBO on validation images, one line a seed, against epochs and against training time"
    if ends and max(ends) > 5 * min(ends) > 0:
        # Else the quick systems would be a stroke at the left edge.
        panels["seconds"].set_xscale("log")
        panels["seconds"].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels["seconds"].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels["seconds"].xaxis.set_minor_formatter(NullFormatter())
        caption += " (on a logarithmic axis)"
    legend_below(figure, panels["epoch"])
    _suptitle(figure, f"Training · {problem.title}")
    devices = {str((run.results or {}).get("device")) for run in problem.runs if run.results}
    if len(devices) > 1:
        caption += f"; times are those of different devices ({', '.join(sorted(devices))})"
    return figure, f"{caption}. Time includes compilation and validation."
