"""The pictures of one run."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlae_jax.report.columns import draw_columns, draw_latent
from vlae_jax.report.panels import (
    GAP_WORDS,
    K_LABEL,
    K_WORDS,
    color_bar,
    color_limit,
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
    BLUE,
    DPI,
    FAINT,
    INK,
    ORANGE,
    Drawer,
    Picture,
    Sheet,
    draw_pictures,
    enlarge,
    minus,
    mosaic,
    save,
    suptitle,
    write_message,
)
from vlae_jax.runs.metrics import QUANTITIES
from vlae_jax.runs.records import Run, number, read_run

SHOWN_IMAGES, SHOWN_STEPS, SHOWN_SAMPLES, SHOWN_POSTERIORS = 10, 9, 100, 6


def draw_figures(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw the pictures of a run into the folder `figures` of its run folder.

    `reconstructions.png` (of a table `columns.png` and `latent_space.png`), `step_log_joint.png`,
    `posterior_covariances.png`, `prior_samples.png`,
    `interpolations.png`, `pareto_k.png`, `gaps.png` and `training_curve.png`. Equal files give
    equal bytes.

    Args:
        run_dir: Folder of one run.

    Returns:
        The files written. A picture whose data are missing is left out.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    run = read_run(run_dir)
    return [path for path, _ in save_pictures(run)]


def save_pictures(run: Run) -> list[tuple[Path, Picture]]:
    """Draw and write the pictures of a run, in the order of the page."""
    saved = [(run.path / "figures" / f"{picture.name}.png", picture) for picture in _pictures(run)]
    for path, picture in saved:
        save(path, picture.png)
    return saved


def _pictures(run: Run) -> list[Picture]:
    drawers: Sequence[tuple[str, str, Drawer[Run]]] = (
        ("reconstructions", "Reconstructions", _draw_reconstructions),
        ("columns", "Reconstructions", draw_columns),
        ("latent_space", "Latent space", draw_latent),
        ("step_log_joint", "Refinement", draw_steps),
        ("posterior_covariances", "Posterior correlations", _draw_posteriors),
        ("prior_samples", "Samples from the prior", _draw_prior_samples),
        ("interpolations", "Interpolations", draw_interpolations),
        ("pareto_k", "Reliability of log p(x)", draw_reliability),
        ("gaps", "Inference gap", draw_gap),
        ("training_curve", "Training", _draw_training_curve),
    )
    return draw_pictures(run, drawers)


def _spread(count: int, most: int) -> list[int]:
    """Pick at most `most` of 0..count-1, evenly spread, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most)).tolist()})


def _log_joints(run: Run) -> tuple[np.ndarray, str]:
    """Log joints (n, steps + 1) of images whose search stayed finite, and their number in words."""
    paths = np.asarray(run.snapshots.get("step_log_joint", np.empty((0, 1))), np.float64)
    finite = np.isfinite(paths).all(axis=1)
    words = f"mean over {finite.sum()} test images"
    if not finite.all():
        words += f" ({(~finite).sum()} more came out non-finite and are left out)"
    return paths[finite], words


def _draw_reconstructions(run: Run) -> tuple[Figure, str] | None:
    data, steps = run.snapshots.get("data"), run.snapshots.get("reconstructions")
    if data is None or steps is None:
        return None
    count = min(len(data), len(steps), SHOWN_IMAGES)
    data, steps = data[:count], steps[:count]
    shown, gap = _spread(steps.shape[1], SHOWN_STEPS), 6
    strips = [mosaic(data, count, gap), *(mosaic(steps[:, t], count, gap) for t in shown)]
    height, width = strips[0].shape[:2]
    left, top, apart = 112, 72, 22
    total = top + len(strips) * (height + gap) + apart + 18
    sheet = Sheet(left + width + 128, total, f"Reconstructions · {run.subject}")
    log_joints, words = _log_joints(run)
    searched = steps.shape[1] > 1
    if len(log_joints):
        heading = "mean\nlog joint,\nnats"
        style = {"ha": "right", "color": FAINT, "linespacing": 1.4}
        sheet.text(left + width + 104, top + height / 2, heading, **style)
    for row, strip in enumerate(strips):
        y = top + row * (height + gap) + (apart if row else 0)
        sheet.image(left, y, strip)
        t = shown[row - 1]
        label = "data" if row == 0 else f"t = {t}" if searched else "mean"
        sheet.text(left - 18, y + height / 2, label, ha="right")
        if row and len(log_joints) and t < log_joints.shape[1]:
            mean = minus(f"{log_joints[:, t].mean():,.1f}")
            sheet.text(left + width + 104, y + height / 2, mean, ha="right")
    caption = (
        f"Test images above, and below them the decoder's output at {_searched_points(searched)}"
    )
    if len(log_joints):
        caption += f", with the log joint log p(x, z) in nats, {words}"
    return sheet.figure, caption + "."


def _searched_points(searched: bool) -> str:
    if not searched:
        return "the posterior mean"
    return "each step t of the refinement, from the encoder's guess (t = 0) to the last"


def _draw_prior_samples(run: Run) -> tuple[Figure, str] | None:
    samples = run.snapshots.get("prior_samples")
    if samples is None:
        return None
    samples = samples[:SHOWN_SAMPLES]
    tiles = mosaic(samples, _columns(len(samples)))
    title = f"Prior samples · {run.subject}"
    sheet = Sheet(tiles.shape[1] + 48, tiles.shape[0] + 92, title)
    sheet.image(24, 68, tiles)
    return sheet.figure, "Decoder means at latents drawn from the standard normal prior."


def _columns(count: int) -> int:
    """Choose the columns of a nearly square grid, with a full last row where possible."""
    root = math.ceil(math.sqrt(count))
    full = [columns for columns in range(root, 2 * root + 1) if count % columns == 0]
    return full[0] if full else root


def _draw_posteriors(run: Run) -> tuple[Figure, str] | None:
    covariances, data = run.snapshots.get("covariances"), run.snapshots.get("data")
    if covariances is None or data is None:
        return None
    count = min(len(covariances), len(data), SHOWN_POSTERIORS)
    correlations, deviations = ordered_correlations(covariances[:count])
    limit = color_limit(correlations)
    latent = deviations.shape[1]
    scale = max(1, round(300 / latent))
    picture, side = enlarge(data[0], 112).shape[1], scale * latent
    columns = min(count, 3)
    step_x, step_y = picture + 66 + side + 46, side + 118
    rows, bar = -(-count // columns), 140
    title = f"Posterior correlations · {run.subject}"
    sheet = Sheet(columns * step_x + bar, 76 + rows * step_y, title)
    for index in range(count):
        x, y = 24 + index % columns * step_x, 76 + index // columns * step_y
        sheet.image(x, y, enlarge(data[index], 112))
        x += picture + 56
        axes = sheet.axes(x, y, side, side)
        mappable = heat_map(axes, correlations[index], limit)
        deviation_strip(sheet.axes(x, y + side + 12, side, 46), deviations, index)
    axes = sheet.axes(columns * step_x + 8, 76, 16, side)
    color_bar(sheet, axes, mappable, limit)
    return sheet.figure, (
        f"Posterior correlations of the {latent} latent dimensions for {count} test images, "
        "ordered by mean posterior variance: dimensions that the data inform come first, those "
        "left at the prior, with standard deviation 1 (strip), come last."
    )


def draw_steps(run: Run) -> tuple[Figure, str] | None:
    """Draw reconstruction error and log joint against steps, with their spread over images."""
    paths, words = _log_joints(run)
    if not len(paths) or paths.shape[1] < 2:
        return None
    behind, errors = paths - paths[:, -1:], step_paths([run], "step_error")
    panels = 1 if errors is None else 2
    figure = Figure(figsize=(5.6 if panels == 1 else 8.6, 3.7), dpi=DPI, layout="constrained")
    first = figure.add_subplot(1, panels, 1)
    if errors is not None:
        axes = figure.add_subplot(1, panels, 2)
        _band(axes, errors)
        axes.set_ylabel("RMSE, model space")
        axes.set_title("Reconstruction error")
    _band(first, behind)
    # Newton steps shrink by orders of magnitude, so a linear axis would show only the first.
    if np.ptp(np.quantile(behind, [0.1, 0.5, 0.9], axis=0)) > 0.2:
        first.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        first.yaxis.set_major_formatter(lambda value, _: minus(f"{value:g}"))
    first.axhline(0.0, color=FAINT, linewidth=0.8)
    first.set_ylabel(r"$\log p(x, z_t) - \log p(x, z_T)$, nats")
    first.set_title("Log joint, less its final value" if panels > 1 else "")
    suptitle(figure, f"Refinement · {run.subject}")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = (
        f"Log joint at each step t, less its final value: from the encoder's guess to the end it "
        f"rises by {minus(f'{-behind[:, 0].mean():,.2f}')} nats an image, {words}"
    )
    if errors is not None:
        start, end = np.median(errors[:, [0, -1]], axis=0)
        caption += (
            "; and the root mean squared error of the reconstruction in model space, whose "
            f"median over images goes from {start:.4g} to {end:.4g}"
        )
    return figure, caption + "."


def _band(axes: Axes, paths: np.ndarray) -> None:
    """Draw the median and the middle 80 % of images at each step of paths (images, steps + 1)."""
    t = np.arange(paths.shape[1])
    low, middle, high = np.quantile(paths, [0.1, 0.5, 0.9], axis=0)
    axes.fill_between(t, low, high, color=BLUE, alpha=0.2, linewidth=0, label="10–90 % of images")
    axes.plot(t, middle, "o-", color=BLUE, markersize=4, label="median", clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step t")


def draw_interpolations(run: Run) -> tuple[Figure, str] | None:
    """Draw images between two test images in the latent space, one pair in each row."""
    lines = run.snapshots.get("interpolations")
    if lines is None:
        return None
    pairs, points = lines.shape[:2]
    tiles = mosaic(lines.reshape(-1, *lines.shape[2:]), points)
    title = f"Latent interpolations · {run.subject}"
    sheet = Sheet(tiles.shape[1] + 48, tiles.shape[0] + 92, title)
    sheet.image(24, 68, tiles)
    return sheet.figure, (
        "Decoder means on the straight line between the posterior means of two test images, which "
        f"stand at the ends of each row; {pairs} pairs."
    )


def draw_reliability(run: Run) -> tuple[Figure, str] | None:
    """Draw the Pareto k̂ of the test images."""
    tails = read_tails([run])
    if tails is None:
        return None
    figure = Figure(figsize=(5.6, 3.3), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    draw_tails(axes, tails, BLUE)
    axes.set(xlabel=K_LABEL, ylabel="% of test images")
    suptitle(figure, f"Reliability of log p(x) · {run.subject}")
    return figure, (
        f"Shape k̂ of the tail of the importance weights, image by image: {tails.words}. {K_WORDS}"
    )


def draw_gap(run: Run) -> tuple[Figure, str] | None:
    """Draw the parts of the distance between the ELBO and log p(x)."""
    row = gap_row(run.system, run)
    if row is None:
        return None
    figure = Figure(figsize=(7.0, 2.1), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    draw_gaps(figure, axes, [row])
    suptitle(figure, f"Inference gap · {run.subject}")
    levels = [
        f"{QUANTITIES[name].label} {minus(f'{value:,.2f}')}"
        for name in ("log_prob_ais", "best_in_family_elbo", "amortized_elbo", "converged_elbo")
        if math.isfinite(value := run.gap_metric(name)[0])
    ]
    caption = f"{GAP_WORDS} Error bars: the standard error of each part."
    return figure, caption + (
        f" In nats, with annealed importance sampling (AIS): {'; '.join(levels)}." if levels else ""
    )


def _draw_training_curve(run: Run) -> tuple[Figure, str] | None:
    if not run.log:
        return None
    figure = Figure(figsize=(9.2, 4.0), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1.0))
    chosen = run.checkpoint
    panels = {
        "elbo": (grid[:, 0], "ELBO"),
        "reconstruction": (grid[0, 1], r"Reconstruction, $\mathrm{E}_q \log p(x \mid z)$"),
        "kl": (grid[1, 1], r"KL, $q(z \mid x)$ to the prior"),
    }
    for name, (place, title) in panels.items():
        axes = figure.add_subplot(place)
        first = name == "elbo"
        axes.set_title(title)
        _curve(axes, run, name)
        _mark_checkpoint(axes, chosen, name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("nats per image")
        if name != "reconstruction":
            axes.set_xlabel("epoch")
        if first:
            # Below the panels, since the curves may run through any corner.
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    suptitle(figure, f"Training · {run.subject}")
    caption = (
        "ELBO, reconstruction term and KL divergence against epochs, on training and validation "
        "images"
    )
    if chosen is not None:
        epoch = number(chosen.get("epoch"))
        caption += f"; the dotted line marks the checkpoint chosen on validation (epoch {epoch:g})"
    return figure, caption + "."


def _thinned(epochs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points until at most 150 are left."""
    together = -(-len(epochs) // 150) or 1
    starts = np.arange(0, len(epochs), together)
    counts = np.diff([*starts, len(epochs)])
    if not len(starts):
        return epochs, values
    return np.add.reduceat(epochs, starts) / counts, np.add.reduceat(values, starts) / counts


def _curve(axes: Axes, run: Run, name: str) -> None:
    train, validation = run.series("train", name), run.series("validation", name)
    axes.plot(*_thinned(*train), color=BLUE, linewidth=1.2, label="train")
    marker = "o" if len(validation[0]) <= 40 else ""
    axes.plot(*validation, color=ORANGE, marker=marker, markersize=3, label="validation")
    curves = [curve for curve in (_thinned(*train), validation) if len(curve[0])]
    if not curves:
        write_message(axes, "no finite values")
        return
    low, high = robust_limits(curves)
    axes.set_ylim(low, high)
    _, start = min((curve[0][0], curve[1][0]) for curve in (train, validation) if len(curve[0]))
    if not low <= start <= high:
        note = minus(f"starts at {start:,.0f}")
        axes.set_title(note, loc="right", fontsize=8, color=FAINT)


def _mark_checkpoint(axes: Axes, chosen: Mapping[str, Any] | None, name: str) -> None:
    if chosen is None or not math.isfinite(number(chosen.get("epoch"))):
        return
    epoch, value = number(chosen.get("epoch")), number(chosen.get(name))
    label = "chosen checkpoint"
    axes.axvline(epoch, color=INK, linewidth=1.0, linestyle=":", label=label, zorder=1)
    if math.isfinite(value):
        axes.plot([epoch], [value], "o", color=ORANGE, mec=INK, markersize=6, zorder=5)
