"""Tables and plots of all studies, from what they measured: `make report`.

Reads `experiments/results/*.json`; writes the tables between the marks in `experiments/README.md`
and one plot a study to `docs/images/`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.study import RESULTS

README = Path(__file__).parent / "README.md"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS = {
    "log_prob": "log p(x)",
    "elbo": "ELBO",
    "inference_gap": "gap",
    "bits_per_dim": "bits/dim",
    "unreliable": "k̂ > 0.7",
}
PAIRED = {"log_prob": "log p(x) − baseline", "elbo": "ELBO − baseline"}
GAPS = {
    "log_prob_ais": "log p(x), AIS",
    "amortized_elbo": "ELBO",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "non_convergence_gap": "of it non-convergence",
    "bdmc_gap": "AIS sandwich, simulated",
}
BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#888888"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": FAINT,
    "ytick.left": False,
}


def main() -> None:
    """Write every table and every plot again."""
    text = README.read_text()
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        name = record["name"]
        text = put(text, f"table: {name}", f"{table(record)}\n\n{provenance(record)}")
        if any(run.get("gaps") for run in record["runs"]):
            text = put(text, f"gaps: {name}", gap_table(record))
        IMAGES.mkdir(parents=True, exist_ok=True)
        draw(record, IMAGES / f"study_{name}.png")
        print(f"{record['title']}: {len(record['runs'])} runs")
    README.write_text(text)


def put(text: str, mark: str, content: str) -> str:
    """The page with what stands between a mark and the next end replaced."""
    start = f"<!-- {mark} -->\n"
    if start not in text:
        raise SystemExit(f"{README} has no place for {mark}: {start.strip()} ... <!-- end -->")
    before, after = text.split(start, 1)
    after = after.split("<!-- end -->", 1)[1]
    return f"{before}{start}{content}\n<!-- end -->{after}"


def gap_table(record: Mapping[str, Any]) -> str:
    """Where the bounds of the first seed lose their nats, for the runs that were measured."""
    head = ["system", *GAPS.values()]
    lines = [head, ["---"] * len(head)]
    for label, runs in by_label(record).items():
        found = runs[0].get("gaps")
        if found:
            cells = [
                words(found[name][0], math.nan if found[name][1] is None else found[name][1])
                if name in found
                else ""
                for name in GAPS
            ]
            lines.append([label, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_label(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant, in the study's order; those that have none are left out."""
    grouped = {
        label: [r for r in record["runs"] if r["label"] == label] for label in record["variants"]
    }
    return {label: runs for label, runs in grouped.items() if runs}


def table(record: Mapping[str, Any]) -> str:
    """One row a variant, in Markdown."""
    titles = COLUMNS | {name: name for name in record.get("shares", ())}
    columns = [name for name in titles if any(name in r["figures"] for r in record["runs"])]
    head = [
        "system",
        *(titles[name] for name in columns),
        *PAIRED.values(),
        "epochs",
        "training s",
    ]
    several = len({run["seed"] for run in record["runs"]}) > 1
    head += ["seeds"] if several else []
    shares = ("unreliable", *record.get("shares", ()))
    lines = [head, ["---"] * len(head)]
    for label, runs in by_label(record).items():
        cells = [
            label,
            *(words(*measured(runs, name), share=name in shares) for name in columns),
        ]
        cells += [words(*paired(runs, name)) for name in PAIRED]
        cells += [
            f"{mean(r['epoch'] for r in runs):.0f}",
            f"{mean(r['seconds'] for r in runs):.0f}",
        ]
        lines.append(cells + ([str(len(runs))] if several else []))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(record: Mapping[str, Any]) -> str:
    """What a table was measured with."""
    first = record["runs"][0]
    versions = first["versions"]
    dates = sorted({run["date"] for run in record["runs"]})
    machines = sorted({run["hardware"] for run in record["runs"]})
    seeds = sorted({run["seed"] for run in record["runs"]})
    return (
        f"{first['images']} test images, K = {first['samples']}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"{dates[0]}{'' if dates[0] == dates[-1] else f' to {dates[-1]}'}, {', '.join(machines)}, "
        f"jax {versions['jax']}, Python {versions['python']}; "
        f"options of all: `{' '.join(record['common'])}`."
    )


def measured(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard error: over seeds, or over images where there is one seed."""
    found = [run["figures"][name] for run in runs if name in run["figures"]]
    found = [(value, error) for value, error in found if value is not None]
    if not found:
        return math.nan, math.nan
    values = [value for value, _ in found]
    if len(values) == 1:
        return values[0], math.nan if found[0][1] is None else found[0][1]
    return mean(values), stdev(values) / math.sqrt(len(values))


def paired(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean difference to the baseline: over seeds of the same number, or over the same images."""
    found = [run["paired"][name] for run in runs if name in run["paired"]]
    if not found:
        return math.nan, math.nan
    if len(found) == 1:
        return found[0][0], found[0][1]
    values = [value for value, _ in found]
    return mean(values), stdev(values) / math.sqrt(len(values))


def words(value: float, error: float, *, share: bool = False) -> str:
    """A number with its error, to two digits of the error."""
    if math.isnan(value):
        return ""
    if share:
        return f"{100 * value:.0f} %"
    if math.isnan(error) or error == 0:
        return f"{value:.2f}".replace("-", "−")
    digits = min(3, max(1, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Plot the ELBO and log p(x) of every variant: the distance of the two dots is the gap."""
    groups = by_label(record)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + 0.23 * len(groups)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for row, runs in enumerate(groups.values()):
            bound, log_prob = measured(runs, "elbo"), measured(runs, "log_prob")
            axes.plot([bound[0], log_prob[0]], [row, row], color=FAINT, linewidth=1.0, zorder=1)
            # Where the two are equal, the one behind is seen around the other.
            for (value, error), color, size, label in (
                (bound, ORANGE, 6.0, "ELBO"),
                (log_prob, BLUE, 3.8, "log p(x), importance weighted"),
            ):
                axes.errorbar(
                    value,
                    row,
                    # All systems share the images, so that an error over them says nothing here.
                    xerr=error if len(runs) > 1 else None,
                    fmt="o",
                    color=color,
                    markersize=size,
                    elinewidth=1.2,
                    label=label if row == 0 else None,
                )
        # A system far below the others would press these together.
        unit = "nats per image"
        values = sorted(measured(runs, "elbo")[0] for runs in groups.values())
        best = max(measured(runs, "log_prob")[0] for runs in groups.values())
        low = values[len(values) // 8] if len(values) > 8 else values[0]
        cut = best - 1.6 * (best - low)
        if values[0] < cut:
            axes.set_xlim(left=cut)
            outside = [
                f"{name} ({words(measured(runs, 'elbo')[0], math.nan)})"
                for name, runs in groups.items()
                if measured(runs, "elbo")[0] < cut
            ]
            unit += f"\nELBO outside on the left: {', '.join(outside)}"
        axes.set_yticks(range(len(groups)), list(groups), color=INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
        figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
