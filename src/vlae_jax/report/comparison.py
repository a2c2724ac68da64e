"""The comparison of several runs: all its pictures, and those that lay runs over each other."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlae_jax.report.groups import Configuration, Problem
from vlae_jax.report.panels import (
    color_bar,
    color_limit,
    deviation_strip,
    heat_map,
    ordered_correlations,
    robust_limits,
    step_paths,
)
from vlae_jax.report.rows import (
    draw_all_gaps,
    draw_differences,
    draw_log_likelihood,
    draw_reliabilities,
)
from vlae_jax.report.style import (
    DPI,
    Drawer,
    Picture,
    Sheet,
    draw_pictures,
    enlarge,
    legend_below,
    lines_of,
    save,
    suptitle,
    wrapped,
)
from vlae_jax.runs.records import Run

COMPARED_IMAGES = 4


def save_comparison(problems: Sequence[Problem], folder: Path) -> list[list[tuple[Path, Picture]]]:
    """Draw and write the pictures of each problem."""
    saved = []
    for problem in problems:
        suffix = re.sub(r"[^\w.-]+", "_", f"-{problem.title}") if len(problems) > 1 else ""
        pictures = compare(problem)
        saved.append([(folder / f"{each.name}{suffix}.png", each) for each in pictures])
    for path, picture in (item for items in saved for item in items):
        save(path, picture.png)
    return saved


def compare(problem: Problem) -> list[Picture]:
    """Draw every picture whose data the runs have, in the order of the page."""
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


def draw_all_steps(problem: Problem) -> tuple[Figure, str] | None:
    """Draw reconstruction error and log joint against steps; systems without steps as levels."""
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
            style: dict[str, Any] = {"color": configuration.color, "label": configuration.label}
            if len(middle) > 1:
                marker = f"{configuration.marker}-"
                axes.plot(np.arange(len(middle)), middle, marker, markersize=4, **style)
            else:
                axes.plot([0, longest - 1], [middle[0]] * 2, linestyle="--", linewidth=1.1, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="step t", ylabel=unit, title=title)
    shown = max(figure.axes, key=lambda axes: len(axes.lines))
    legend_below(figure, shown)
    suptitle(figure, f"Refinement · {problem.title}")
    return figure, (
        "Medians over test images, seeds together, at each step from the encoder's guess (t = 0); "
        "systems without such steps are dashed. Each system has a decoder of its own, so the "
        "levels depend on the model as well as on the inference."
    )


def draw_posteriors(problem: Problem) -> tuple[Figure, str] | None:
    """Draw posterior correlations, with a row for each test image and a column for each system."""
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
    limit = color_limit(*(correlations for correlations, _ in found))
    side = max(max(1, round(190 / d.shape[1])) * d.shape[1] for _, d in found)
    picture = enlarge(data[0], 90).shape[1]
    letters = max(10, side // 11)
    heading = max(lines_of(c.label, letters) for c, _ in columns)
    left, top, step_x, step_y = 24 + picture + 50, 86 + 26 * heading, side + 44, side + 74
    title = f"Posterior correlations · {problem.title}"
    sheet = Sheet(left + len(columns) * step_x + 104, top + count * step_y, title)
    for row in range(count):
        sheet.image(24, top + row * step_y, enlarge(data[row], 90))
    for column, ((configuration, _), (correlations, deviations)) in enumerate(
        zip(columns, found, strict=True)
    ):
        x = left + column * step_x
        label = wrapped(configuration.label, letters)
        sheet.text(x + side / 2, top - 12, label, ha="center", va="bottom", linespacing=1.3)
        for row in range(count):
            y = top + row * step_y
            mappable = heat_map(sheet.axes(x, y, side, side), correlations[row], limit)
            strip = sheet.axes(x, y + side + 8, side, 34)
            deviation_strip(strip, deviations, row)
            strip.set_xlabel("posterior std" if row == count - 1 else "")
    axes = sheet.axes(left + len(columns) * step_x, top, 16, side)
    color_bar(sheet, axes, mappable, limit)
    caption = (
        "Posterior correlations of the latent dimensions for the same test images, with a column "
        "for each system (its largest T, its lowest seed). Each system has a latent space of its "
        "own, whose dimensions are ordered by mean posterior variance; the strip is their "
        "posterior standard deviation, 1 where the prior is left as it is."
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
    # Hardware may round the last digits of an image differently.
    return mine.shape[1:] == data.shape[1:] and np.allclose(mine[:count], data[:count], atol=1e-3)


def draw_training(problem: Problem) -> tuple[Figure, str] | None:
    """Draw the validation ELBO against epochs and against seconds, one line a seed."""
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
                    "color": configuration.color,
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
    caption = (
        "ELBO on validation images, one line for each seed, against epochs and against training "
        "time"
    )
    if ends and max(ends) > 5 * min(ends) > 0:
        # On a linear axis the fast systems would be squeezed to the left edge.
        panels["seconds"].set_xscale("log")
        panels["seconds"].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels["seconds"].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels["seconds"].xaxis.set_minor_formatter(NullFormatter())
        caption += " (on a logarithmic axis)"
    legend_below(figure, panels["epoch"])
    suptitle(figure, f"Training · {problem.title}")
    devices = {str((run.results or {}).get("device")) for run in problem.runs if run.results}
    if len(devices) > 1:
        caption += f"; times are those of different devices ({', '.join(sorted(devices))})"
    return figure, f"{caption}. Time includes compilation and validation."
