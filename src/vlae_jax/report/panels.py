"""Panels of pictures, both of one run and of several."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlae_jax.report.style import FAINT, INK, Sheet, lines_of, minus, wrapped, write_message
from vlae_jax.runs.metrics import FINITE_VARIANCE_K, QUANTITIES, UNRELIABLE_K
from vlae_jax.runs.records import Run

K_EDGES = np.linspace(-0.5, 1.5, 41)
"""The bins of every histogram of k̂, so that pictures can be compared."""
K_LABEL = "Pareto k\u0302 of the importance weights"
K_WORDS = (
    f"Below {FINITE_VARIANCE_K} the weights have a finite variance, and up to {UNRELIABLE_K} the "
    "estimate of log p(x) can be relied on; above, it tends to be too low."
)
GAP_WORDS = (
    "Nats between the ELBO and log p(x). The approximation gap remains with the best posterior of "
    "the family. The amortization gap is lost by inference within the family; non-convergence is "
    "the part of it that more steps would regain (right of the bar’s end where they would lose)."
)
# Parts of a gap are no systems, so their colors are none of a system's.
_APPROXIMATION, _AMORTIZATION = "#2f3e57", "#a9b8d0"


class Tails(NamedTuple):
    """Pareto k̂ of test images, and the number of those that a histogram cannot show."""

    shapes: np.ndarray
    """The values with a place on the axis; +∞ lies beyond its right end."""
    perfect: int
    """Images whose weights are all alike: k̂ = -∞."""
    undefined: int
    annealed: int
    """Images whose log p(x) comes from annealing, to which no k̂ belongs."""
    own: np.ndarray
    """The known values with the system's own posterior as the proposal; empty where it was the only
    one."""

    @property
    def images(self) -> int:
        """The number of all images."""
        return len(self.shapes) + self.perfect + self.undefined + self.annealed

    @property
    def unreliable(self) -> float:
        """The unreliable share of the images whose reliability is known; NaN if none has."""
        judged = self.images - self.undefined
        return float(np.sum(self.shapes > UNRELIABLE_K) / judged) if judged else math.nan

    @property
    def words(self) -> str:
        """The unreliable share and the images that are not drawn, in words."""
        share = "no k\u0302" if math.isnan(self.unreliable) else f"{100 * self.unreliable:.1f} %"
        words = f"{share} of {self.images} images above {UNRELIABLE_K}"
        if len(self.own):
            before = 100 * float(np.mean(self.own > UNRELIABLE_K))
            words += f", {before:.1f} % with the system’s own posterior as the proposal (line)"
        if self.annealed:
            words += f"; {self.annealed} estimated by annealing instead"
        if self.perfect:
            words += f"; {self.perfect} with equal weights, a perfect fit (k\u0302 = −∞)"
        if self.undefined:
            words += f"; {self.undefined} without k\u0302 (NaN)"
        return words


def read_tails(runs: Sequence[Run]) -> Tails | None:
    """Read the k̂ of all images of these runs; None if none has been measured."""
    found = [run.per_image for run in runs if "pareto_k" in run.per_image]
    if not found:
        return None
    shapes = np.concatenate([values["pareto_k"] for values in found]).astype(np.float64)
    annealed = np.concatenate(
        [values.get("annealed", np.zeros(len(values["pareto_k"]))) for values in found]
    ).astype(bool)
    own = np.concatenate([values.get("own_pareto_k", np.empty(0)) for values in found])
    shapes = shapes[~annealed]
    undefined, perfect = np.isnan(shapes), np.isneginf(shapes)
    return Tails(
        shapes[~undefined & ~perfect],
        int(perfect.sum()),
        int(undefined.sum()),
        int(annealed.sum()),
        own[~np.isnan(own)],
    )


def draw_tails(axes: Axes, tails: Tails, color: str) -> None:
    """Draw the histogram of k̂ in percent of all images, with the two thresholds.

    The outline is that of the system's own posterior as the proposal.
    """

    def heights(shapes: np.ndarray) -> np.ndarray:
        inside = np.clip(shapes, K_EDGES[0], K_EDGES[-1])
        return np.histogram(inside, K_EDGES)[0] * (100.0 / tails.images)

    axes.stairs(heights(tails.shapes), K_EDGES, fill=True, color=color, linewidth=0)
    if len(tails.own):
        axes.stairs(heights(tails.own[~np.isneginf(tails.own)]), K_EDGES, color=FAINT)
    for threshold in (FINITE_VARIANCE_K, UNRELIABLE_K):
        axes.axvline(threshold, color=INK, linewidth=1.0, linestyle=":")
    ticks = {-0.5: "≤ −0.5", 0.0: "0", 0.5: "0.5", 0.7: "0.7", 1.0: "1", 1.5: "≥ 1.5"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    texts = axes.get_xticklabels()
    # The outermost labels stay within the panel, away from those of its neighbor.
    texts[0].set_horizontalalignment("left")
    texts[-1].set_horizontalalignment("right")
    axes.set_xlim(K_EDGES[0] - 0.03, K_EDGES[-1] + 0.03)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(False, axis="x")


class GapRow(NamedTuple):
    """One bar of the gaps: value and standard error of each part in nats, NaN where unknown."""

    label: str
    approximation: tuple[float, float]
    amortization: tuple[float, float]
    non_convergence: tuple[float, float]

    @property
    def total(self) -> float:
        """Log p(x) less the ELBO."""
        return self.approximation[0] + self.amortization[0]


def gap_row(label: str, run: Run) -> GapRow | None:
    """Make the bar of one run; None where its gaps are not measured."""
    row = GapRow(label, *(run.gap_metric(f"{name}_gap") for name in GapRow._fields[1:]))
    return row if math.isfinite(row.total) else None


def draw_gaps(figure: Figure, axes: Axes, rows: Sequence[GapRow]) -> None:
    """Draw each gap as a horizontal bar of its parts, from top to bottom.

    Sampling noise can make a small part negative; such a part lies left of zero.
    """
    places = np.arange(len(rows))
    right, left, reach = np.zeros((3, len(rows)))
    parts = (
        ("approximation_gap", [row.approximation for row in rows], _APPROXIMATION, "#9aa7bf"),
        ("amortization_gap", [row.amortization for row in rows], _AMORTIZATION, INK),
    )
    for name, pairs, color, ink in parts:
        values, errors = np.nan_to_num(np.array(pairs)).T
        label = QUANTITIES[name].label
        starts = np.where(values >= 0, right, left)
        ends, some = starts + values, errors > 0
        axes.barh(places, values, left=starts, height=0.62, color=color, label=label, zorder=2)
        bars: dict[str, Any] = {"fmt": "none", "elinewidth": 1.0, "capsize": 3, "zorder": 4}
        axes.errorbar(ends[some], places[some], xerr=errors[some], ecolor=ink, **bars)
        right, left = np.maximum(right, ends), np.minimum(left, ends)
        reach = np.maximum(reach, ends + errors)
    # Non-convergence is a part of the amortization gap, so it lies inside that bar, at its end.
    lost = np.array([row.non_convergence[0] for row in rows])
    if np.isfinite(lost).any():
        inside = -np.nan_to_num(lost)
        strip: dict[str, Any] = {"color": "#ffffff", "edgecolor": INK, "hatch": "////"}
        strip |= {"linewidth": 0.6, "label": "non-convergence, a part of the amortization gap"}
        axes.barh(places, inside, left=ends, height=0.24, zorder=3, **strip)
        reach = np.maximum(reach, ends + inside)
    low, high = float(left.min()), float(max(reach.max(), right.max())) or 1.0
    for place, row in enumerate(rows):
        text = minus(f"{row.total:,.2f}")
        axes.text(reach[place] + 0.015 * (high - low), place, text, va="center", ha="left")
    axes.set_xlim(low - 0.02 * (high - low) * (low < 0), high + 0.12 * (high - low))
    axes.axvline(0.0, color=FAINT, linewidth=0.8)
    label_rows(axes, [row.label for row in rows])
    axes.set_xlabel("log p(x) − ELBO, nats per image")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Make the vertical axis one of rows, from top to bottom, each with its label."""
    axes.set_yticks(range(len(labels)), [wrapped(label) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def rows_height(labels: Sequence[str], least: float) -> float:
    """The height in inches of equal rows, `least` or as much as the longest label needs."""
    return len(labels) * max([least, *(0.07 + 0.16 * lines_of(label) for label in labels)])


def step_paths(runs: Sequence[Run], name: str) -> np.ndarray | None:
    """Read the finite rows (images, steps + 1) of a quantity; None if there are none."""
    found = [np.asarray(run.snapshots[name], float) for run in runs if name in run.snapshots]
    found = [path for path in found if path.shape[1] == found[0].shape[1]]
    if not found:
        return None
    paths = np.concatenate(found)
    paths = paths[np.isfinite(paths).all(axis=1)]
    return paths if len(paths) else None


def ordered_correlations(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute correlations (k, latent, latent) and standard deviations (k, latent).

    Dimensions are ordered by mean variance, smallest first. A matrix that is no covariance gives
    NaN correlations.
    """
    covariances = np.asarray(covariances, np.float64)
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    finite = np.isfinite(covariances).all(axis=(1, 2)) & (variances > 0).all(axis=1)
    order = np.argsort(variances[finite].mean(axis=0) if finite.any() else variances[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        deviations = np.sqrt(variances)
        correlations = covariances / deviations[:, :, None] / deviations[:, None, :]
    correlations[~finite] = np.nan
    return correlations[:, order][:, :, order], deviations[:, order]


def color_limit(*systems: np.ndarray) -> float:
    """Take the smallest round limit that covers nearly all correlations off the diagonal.

    Args:
        systems: Correlations (k, latent, latent) of each system.
    """
    tops = [0.0]
    for correlations in systems:
        sizes = np.abs(correlations[:, ~np.eye(correlations.shape[1], dtype=bool)])
        sizes = sizes[np.isfinite(sizes)]
        tops.append(float(np.quantile(sizes, 0.995)) if sizes.size else 0.0)
    return next((limit for limit in (0.25, 0.5) if 0 < max(tops) <= limit), 1.0)


def heat_map(axes: Axes, correlation: np.ndarray, limit: float) -> Any:
    """Draw correlations (latent, latent) as colors symmetric about zero; returns the image."""
    image = axes.imshow(
        correlation, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto"
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#bbbbbb")
    if not np.isfinite(correlation).all():
        write_message(axes, "not positive\ndefinite")
    return image


def color_bar(sheet: Sheet, axes: Axes, mappable: Any, limit: float) -> None:
    """Draw the scale of heat maps of correlations."""
    extend = "max" if limit < 1 else "neither"
    bar = sheet.figure.colorbar(mappable, cax=axes, extend=extend)
    bar.set_ticks([-limit, 0.0, limit])
    bar.set_label("correlation", color=FAINT)
    bar.outline.set_visible(False)


def deviation_strip(axes: Axes, deviations: np.ndarray, index: int) -> None:
    """Draw standard deviations of one of the posteriors (k, latent), on an axis common to all.

    The axis is logarithmic, since many are much smaller than the prior's 1.
    """
    seen = deviations[np.isfinite(deviations) & (deviations > 0)]
    low = 10.0 ** math.floor(math.log10(min(0.5, seen.min(initial=1.0))))
    high = max(1.0, float(seen.max(initial=1.0)))
    values = np.clip(np.nan_to_num(deviations[index], nan=low), low, None)
    axes.set_yscale("log")
    axes.stairs(values, baseline=low, fill=True, color="#9a9a9a", linewidth=0)
    axes.set(xlim=(0, deviations.shape[1]), ylim=(low, high * 1.3), xticks=[])
    axes.set_yticks([low, 1.0], [f"{low:g}", "1"])
    axes.set_yticks([], minor=True)
    axes.tick_params(labelsize=7, length=2, pad=2)
    axes.set_xlabel("posterior std", fontsize=8, color=FAINT, labelpad=3)
    axes.grid(False)


def robust_limits(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Choose limits that the first epochs and single spikes do not stretch."""
    begin = min(epochs[0] for epochs, _ in curves)
    end = max(epochs[-1] for epochs, _ in curves)
    bounds = []
    # Quantiles are taken of each curve alone, or the low start of a short curve would be lost
    # among the many points of a long one.
    for epochs, values in curves:
        late = values[epochs >= begin + 0.15 * (end - begin)]
        bounds += [*np.quantile(late if len(late) else values, [0.01, 0.99])]
    margin = 0.08 * np.ptp(bounds) or 0.05 * max(abs(max(bounds)), 1.0)
    return float(min(bounds) - margin), float(max(bounds) + margin)
