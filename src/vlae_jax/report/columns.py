"""The pictures of a run on a table: observed against reconstructed, and the latent space."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlae_jax.report.style import BLUE, DPI, INK, suptitle, wrapped
from vlae_jax.runs.records import Run

SHOWN_COLUMNS, _ACROSS = 12, 4


def draw_columns(run: Run) -> tuple[Figure, str] | None:
    """Draw the reconstruction of each entry against the entry, a panel for each column."""
    rows, again = run.snapshots.get("rows"), run.snapshots.get("row_reconstructions")
    if rows is None or again is None or rows.shape != again.shape or rows.ndim != 2:
        return None
    count = min(rows.shape[1], SHOWN_COLUMNS)
    names = run.snapshots.get("columns", np.arange(rows.shape[1]))
    across = min(count, _ACROSS)
    down = -(-count // across)
    size = (0.6 + 2.2 * across, 0.9 + 2.1 * down)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    for index in range(count):
        axes = figure.add_subplot(down, across, index + 1)
        seen, guess = rows[:, index].astype(np.float64), again[:, index].astype(np.float64)
        both = np.isfinite(seen) & np.isfinite(guess)
        axes.plot(seen[both], guess[both], "o", color=BLUE, markersize=2.5, alpha=0.6)
        if both.any():
            ends = [seen[both].min(), seen[both].max()]
            axes.plot(ends, ends, color=INK, linewidth=1.0, linestyle=":", zorder=1)
        axes.set_title(wrapped(str(names[index]), 26), parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("observed", size=9.0)
    figure.supylabel("reconstructed", size=9.0)
    suptitle(figure, f"Reconstructions · {run.subject}")
    shown = "" if count == rows.shape[1] else f"; the first {count} of {rows.shape[1]} columns"
    return figure, (
        f"Entries of {len(rows)} test rows, and the decoder's output at the center of their "
        f"posterior, in the data's own units; on the dotted line both are equal{shown}."
    )


def draw_latent(run: Run) -> tuple[Figure, str] | None:
    """Draw the posterior means of rows in the two latent dimensions in which they vary most."""
    means = run.snapshots.get("row_means")
    if means is None or means.ndim != 2:
        return None
    means = means[np.isfinite(means).all(axis=1)].astype(np.float64)
    if not len(means):
        return None
    order = np.argsort(-means.var(axis=0), kind="stable")[:2]
    figure = Figure(figsize=(4.8, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    first = means[:, order[0]]
    second = means[:, order[1]] if len(order) > 1 else np.zeros_like(first)
    axes.plot(first, second, "o", color=BLUE, markersize=3.5, alpha=0.7)
    axes.set_xlabel(f"latent dimension {order[0]}")
    axes.set_ylabel(f"latent dimension {order[1]}" if len(order) > 1 else "")
    suptitle(figure, f"Latent space · {run.subject}")
    return figure, (
        f"Posterior means of {len(means)} test rows in the latent dimensions in which they vary "
        f"most, of {means.shape[1]}."
    )
