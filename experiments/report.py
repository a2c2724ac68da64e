"""Tables and plots of all studies, from what they measured: `make report`.

Reads `experiments/results/*.json`; writes the tables between the marks in `experiments/README.md`
and one plot a study to `docs/images/`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.studies import STUDIES
from experiments.study import RESULTS, file_name
from vlae_jax.report.groups import over_seeds
from vlae_jax.report.style import BLUE, DPI, FAINT, INK, ORANGE, STYLE, minus
from vlae_jax.runs.metrics import QUANTITIES, UNRELIABLE_K

README = Path(__file__).parent / "README.md"
ESTIMATES = Path(__file__).parent / "estimators.json"
FRONT_PAGE = Path(__file__).parent.parent / "README.md"
BASELINE = "VAE-seed0"
ESTIMATORS = {
    "own": "own posterior",
    "laplace": "Laplace",
    "refined": "variational",
    "auto": "auto",
    "ais": "AIS",
}
"""Estimators of log p(x) by their names on record, with their labels."""
ESTIMATORS_PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS = (
    *("log_prob", "unreliable", "own_log_prob", "own_unreliable"),
    *("elbo", "inference_gap", "bits_per_dim"),
)
PAIRED = ("log_prob", "elbo")
GAPS = (
    *("log_prob_ais", "amortized_elbo", "approximation_gap", "amortization_gap"),
    *("non_convergence_gap", "bdmc_gap"),
)


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
    rows = json.loads(ESTIMATES.read_text())
    page = ESTIMATORS_PAGE.read_text()
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_set = [row for row in rows if row["dataset"] == dataset]
        page = put(page, f"estimators: {dataset}", estimators_table(of_set))
        print(f"estimators on {dataset}: {len(of_set)} runs")
    ESTIMATORS_PAGE.write_text(page)
    if rows:
        FRONT_PAGE.write_text(
            put(FRONT_PAGE.read_text(), "table: inference", inference_table(rows))
        )


def estimators_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row for each decoder: the believable log p(x), and how far the others are from it.

    Beside each stands, in parentheses, the share of images with an unreliable k̂.
    """
    head = ["trained as", "log p(x), auto"]
    head += [f"{label} − auto" for name, label in ESTIMATORS.items() if name != "auto"]
    labels = {file_name(name): name for study in STUDIES.values() for name in study.variants}
    lines = []
    for row in rows:
        found = row["estimators"]
        cells = [
            f"{words(*found[name]['log_prob_less_reference'])} ({_share(found[name])})"
            for name in ("own", "laplace", "refined")
        ]
        believable = f"{words(*row['reference'])} ({_share(found['auto'])})"
        lines.append(
            [
                labels[row["run"].rsplit("-seed", 1)[0]],
                believable,
                *cells,
                words(*row["ais"]["less_reference"]),
            ]
        )
    first = rows[0]
    timed = [{**row["estimators"], "ais": row["ais"]} for row in rows]
    costs = ", ".join(
        f"{label} {mean(row[name]['milliseconds'] for row in timed):.0f}"
        for name, label in ESTIMATORS.items()
    )
    return (
        f"{markdown(head, lines)}\n\n{first['images']} test images ({first['ais']['images']} for "
        f"AIS), K = {first['samples']}; ± is the standard error over images, of paired "
        f"differences; in parentheses the share of images with k̂ > {UNRELIABLE_K}. Milliseconds "
        f"an image without compilation, mean over the rows: {costs} "
        f"({first['hardware']}, one core, jax {first['jax']})."
    )


def inference_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What other inference makes of decoders that were trained as a VAE, one row a data set."""
    head = ["decoder of a VAE", "log p(x)", "ELBO of its encoder", "Laplace", "variational"]
    head += ["90 % regions that hold the true z", "ms an image"]
    lines = []
    for row in rows:
        if row["run"] != BASELINE:
            continue
        found, covered = row["estimators"], row["coverage"]
        bounds = [minus(f"{found[name]['elbo'][0]:.1f}") for name in ("own", "laplace", "refined")]
        regions = " / ".join(f"{100 * covered[name]:.0f} %" for name in covered)
        times = " / ".join(f"{row['inference_milliseconds'][name]:.1f}" for name in covered)
        lines.append([row["dataset"], minus(f"{row['reference'][0]:.1f}"), *bounds, regions, times])
    return markdown(head, lines)


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['unreliable']:.0f} %"


def put(text: str, mark: str, content: str) -> str:
    """Replace the content between a mark and the next end mark of a page."""
    start = f"<!-- {mark} -->\n"
    if start not in text:
        raise SystemExit(f"the page has no place for {mark}: {start.strip()} ... <!-- end -->")
    before, after = text.split(start, 1)
    after = after.split("<!-- end -->", 1)[1]
    return f"{before}{start}{content}\n<!-- end -->{after}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gap_table(record: Mapping[str, Any]) -> str:
    """The parts of the gap for the first seed of each variant whose gaps were measured."""
    rows = []
    for label, runs in by_label(record).items():
        if runs[0].get("gaps"):
            cells = (words(*average(runs[:1], "gaps", name)) for name in GAPS)
            rows.append([label, *cells])
    return markdown(["system", *(QUANTITIES[name].label for name in GAPS)], rows)


def by_label(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant in the study's order, without variants that have none."""
    grouped = {
        label: [r for r in record["runs"] if r["label"] == label] for label in record["variants"]
    }
    return {label: runs for label, runs in grouped.items() if runs}


def table(record: Mapping[str, Any]) -> str:
    """One row for each variant."""
    shares = record.get("shares", ())
    names = [n for n in (*COLUMNS, *shares) if any(n in r["metrics"] for r in record["runs"])]
    by_own = is_by_own_proposals(record)
    owned = {name: f"own_{name}" for name in ("log_prob", "unreliable")} if by_own else {}
    paired = ("elbo",) if by_own else PAIRED
    head = ["system", *(QUANTITIES[owned.get(name, name)].label for name in names)]
    head += [f"{QUANTITIES[name].label} − baseline" for name in paired]
    head += ["epochs", "training s"]
    several = len({run["seed"] for run in record["runs"]}) > 1
    head += ["seeds"] if several else []
    rows = []
    for label, runs in by_label(record).items():
        row = [label]
        for name in names:
            share = QUANTITIES[name].unit == "share"
            row.append(words(*average(runs, "metrics", name), share=share))
        row += [words(*average(runs, "paired", name)) for name in paired]
        row += [f"{mean(run[name] for run in runs):.0f}" for name in ("epoch", "seconds")]
        rows.append(row + ([str(len(runs))] if several else []))
    return markdown(head, rows)


def is_by_own_proposals(record: Mapping[str, Any]) -> bool:
    """Whether log p(x) is by each system's own proposal, and so no measure to compare them by.

    The estimate made alike for every decoder has that by the own one beside it.
    """
    return not any("own_log_prob" in run["metrics"] for run in record["runs"])


def provenance(record: Mapping[str, Any]) -> str:
    """Images, seeds, dates, machines, versions and options behind a table."""
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


def average(runs: Sequence[Mapping[str, Any]], kind: str, name: str) -> tuple[float, float]:
    """Mean and standard error over seeds, or over images where there is one seed.

    Args:
        runs: Records of runs.
        kind: "metrics", "paired" for differences to the baseline, or "gaps".
        name: The quantity; without a value of it mean and error are NaN.
    """
    found = [run[kind][name] for run in runs if name in run[kind]]
    pairs = [(value, math.nan if error is None else error) for value, error, *_ in found]
    return over_seeds([pair for pair in pairs if pair[0] is not None])


def words(value: float, error: float, *, share: bool = False) -> str:
    """A number with its error, to two digits of the error."""
    if math.isnan(value):
        return ""
    if share:
        return f"{100 * value:.0f} %"
    if math.isnan(error) or error == 0:
        return minus(f"{value:.2f}")
    digits = min(3, max(1, 1 - math.floor(math.log10(error))))
    return minus(f"{value:.{digits}f} ± {error:.{digits}f}")


def bounds(runs: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """ELBO and log p(x) of a variant, each with its error."""
    return average(runs, "metrics", "elbo"), average(runs, "metrics", "log_prob")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Plot the ELBO and log p(x) of every variant: the distance of the two dots is the gap."""
    groups = by_label(record)
    by_own = is_by_own_proposals(record)
    estimate = QUANTITIES["own_log_prob" if by_own else "log_prob"].label
    rows = {"axes.spines.left": False, "axes.grid.axis": "x", "ytick.left": False}
    with matplotlib.rc_context(STYLE | rows):
        figure = Figure(figsize=(7.2, 1.1 + 0.23 * len(groups)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for row, runs in enumerate(groups.values()):
            bound, log_prob = bounds(runs)
            axes.plot([bound[0], log_prob[0]], [row, row], color=FAINT, linewidth=1.0, zorder=1)
            # Where the two are equal, the larger dot is seen around the smaller one.
            for (value, error), color, size, label in (
                (bound, ORANGE, 6.0, "ELBO"),
                (log_prob, BLUE, 3.8, estimate),
            ):
                axes.errorbar(
                    value,
                    row,
                    # An error over images, which all systems share, would mislead here.
                    xerr=error if len(runs) > 1 else None,
                    fmt="o",
                    color=color,
                    markersize=size,
                    elinewidth=1.2,
                    label=label if row == 0 else None,
                )
        # A system far below the others would press these together, so its ELBO is cut off.
        unit = "nats per image"
        elbos = {name: bounds(runs)[0][0] for name, runs in groups.items()}
        values = sorted(elbos.values())
        best = max(bounds(runs)[1][0] for runs in groups.values())
        low = values[len(values) // 8] if len(values) > 8 else values[0]
        cut = best - 1.6 * (best - low)
        if values[0] < cut:
            axes.set_xlim(left=cut)
            outside = [f"{n} ({words(v, math.nan)})" for n, v in elbos.items() if v < cut]
            unit += f"\nELBO outside on the left: {', '.join(outside)}"
        axes.set_yticks(range(len(groups)), list(groups), color=INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
        figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
