"""Tables of the metrics of runs, side by side and over seeds."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlae_jax.report.groups import (
    Configuration,
    Problem,
    over_seeds,
    paired_differences,
    sort_runs,
)
from vlae_jax.runs.metrics import QUANTITIES, UNITS, UNRELIABLE_K
from vlae_jax.runs.records import Run, number, read_run

ABSENT = "–"
PAIRED = ("log_prob", "elbo")
_BOUNDS = tuple((f"test {QUANTITIES[name].label}", "right") for name in ("elbo", "log_prob"))


def _titles(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((QUANTITIES[name].label, "right") for name in names)


COLUMNS = (
    ("run", "left"),
    ("data set", "left"),
    ("method", "left"),
    ("T", "right"),
    ("seed", "right"),
    ("epochs", "right"),
    *_BOUNDS,
    ("K", "right"),
    *_titles("inference_gap", "bits_per_dim", "unreliable"),
)
SEED_COLUMNS = (
    ("data set", "left"),
    ("configuration", "left"),
    ("seeds", "right"),
    *_BOUNDS,
    *_titles("inference_gap", "bits_per_dim", "unreliable"),
    *((f"{QUANTITIES[name].label} − VAE", "right") for name in PAIRED),
)
SEED_NOTE = (
    "Nats per image: mean ± standard error over seeds. The last two columns are paired differences "
    "to the VAE of the same seed, on the same test images; those of a single seed ± standard error "
    "over images."
)


def summary_table(run_dirs: Iterable[str | os.PathLike[str]]) -> Table:
    """Set runs side by side, one in each row.

    ELBO, log p(x) and their gap are in nats per test image, with standard errors; K is the number
    of importance samples, and log p(x) is the lower bound that K samples give. The gap is taken
    only where both were measured on equally many images. A value that is not finite reads "not
    finite", and a run without `results.json` reads "not evaluated".

    Args:
        run_dirs: Folders of runs.

    Returns:
        A table for a rich console.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    rows = [read_run(run_dir) for run_dir in run_dirs]
    return _rich_table(COLUMNS, [table_row(run) for run in rows], table_note(rows))


def print_summary(
    run_dirs: Iterable[str | os.PathLike[str]], console: Console | None = None
) -> None:
    """Print the summary table, and one over seeds where a configuration has several.

    On a terminal too narrow for a table, it has one column a run instead.

    Args:
        run_dirs: Folders of runs.
        console: Where to print; None is standard output.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    print_runs([read_run(run_dir) for run_dir in run_dirs], console or Console())


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """Print the tables of `print_summary` for runs that were read already."""
    _print(COLUMNS, [table_row(run) for run in runs], table_note(runs), console)
    over = seed_rows(sort_runs(runs))
    if over:
        _print(SEED_COLUMNS, over, SEED_NOTE, console)


Columns = Sequence[tuple[str, str]]


def _print(columns: Columns, rows: Sequence[Sequence[str]], note: str, console: Console) -> None:
    table = _rich_table(columns, rows, note)
    unlimited = console.options.update(max_width=10_000)
    needed = console.measure(table, options=unlimited).maximum
    if needed <= console.width:
        console.print(table)
        return
    if not console.is_terminal:
        # A file or a pipe has no width that the table must fit.
        Console(file=console.file, width=needed).print(table)
        return
    abreast = max(1, (console.width - 16) // 20)
    for first in range(0, len(rows), abreast):
        console.print(_tall_table(columns, rows[first : first + abreast]))
    console.print(Text(note, style="dim italic"))


def _tall_table(columns: Columns, rows: Sequence[Sequence[str]]) -> Table:
    (corner, _), *quantities = columns
    names, *cells = zip(*rows, strict=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(corner)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for (quantity, _), line in zip(quantities, cells, strict=True):
        table.add_row(quantity, *map(Text, line))
    return table


def _rich_table(columns: Columns, rows: Sequence[Sequence[str]], note: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=note, caption_justify="left")
    for header, justify in columns:
        # Columns are folded, since a cut would lose digits on a narrow terminal.
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def seed_rows(problems: Sequence[Problem]) -> list[list[str]]:
    """One row for each configuration over its seeds; none if no configuration has several."""
    if all(len(c.runs) < 2 for problem in problems for c in problem.configurations):
        return []
    return [_seed_row(problem, c) for problem in problems for c in problem.configurations]


def _seed_row(problem: Problem, configuration: Configuration) -> list[str]:
    columns = []
    for name in ("elbo", "log_prob", "inference_gap", "bits_per_dim", "unreliable"):
        # An error over images among errors over seeds would be mistaken for one of these.
        columns.append((name, [(value, math.nan) for value, _ in configuration.values(name)]))
    for name in PAIRED:
        found = paired_differences(configuration, problem.runs, name)
        columns.append((name, [(each.mean, each.standard_error) for each in found]))
    cells = []
    for name, values in columns:
        value, error = over_seeds(values)
        metric = {"value": value, "standard_error": error, "unit": QUANTITIES[name].unit}
        cells.append(metric_words(metric if values else None))
    return [problem.title, configuration.label, str(len(configuration.runs)), *cells]


def table_note(runs: Sequence[Run]) -> str:
    """The note that belongs below the table of runs."""
    if all(run.results is None for run in runs):
        return "No run here has a results.json: evaluate to fill the table."
    return (
        "Nats per image ± standard error. log p(x) belongs to the decoder and is estimated from K "
        "importance samples; the ELBO and the gap below it belong to the inference. For images "
        f"with a Pareto k̂ above {UNRELIABLE_K} the estimate tends to be too low."
    )


def table_row(run: Run) -> list[str]:
    """The cells of one run."""
    steps = run.steps
    settings = [
        run.name,
        str(run.setting("data", "dataset") or ABSENT),
        run.label,
        ABSENT if steps is None else str(steps),
        plain(run.seed),
        epochs_words(run),
    ]
    if run.results is None:
        return [*settings, "not evaluated", *[ABSENT] * (len(COLUMNS) - len(settings) - 1)]
    log_prob = run.metric("log_prob")
    return [
        *settings,
        metric_words(run.metric("elbo")),
        metric_words(log_prob),
        plain((log_prob or {}).get("samples")),
        metric_words(run.gap),
        *(metric_words(run.metric(name)) for name in ("bits_per_dim", "unreliable")),
    ]


def epochs_words(run: Run) -> str:
    """The number of epochs; for a run that was cut short, `reached of planned`."""
    planned = run.setting("training", "epochs")
    reached = max(run.series("train", "epoch")[0], default=math.inf)
    # The last record of an epoch may be a few steps before its end.
    return f"{reached:.3g} of {planned}" if reached < number(planned) - 1 else plain(planned)


def plain(value: Any) -> str:
    """A value from a file as text, a dash for null."""
    return ABSENT if value is None else str(value)


def metric_words(metric: Mapping[str, Any] | None) -> str:
    """Write a metric with its standard error, to the decimals of its unit."""
    if metric is None:
        return ABSENT
    value, error = number(metric.get("value")), number(metric.get("standard_error"))
    if not math.isfinite(value):
        known = QUANTITIES.get(str(metric.get("name")))
        return known.undefined if known else "not finite"
    # A file of a newer version may have units that are not known here.
    decimals, factor, suffix = UNITS.get(str(metric.get("unit")), UNITS["number"])
    if not math.isfinite(error):
        return f"{value * factor:,.{decimals}f}{suffix}"
    if error > 0:
        # Fixed decimals would show a tiny error as 0.00.
        decimals = max(decimals, -math.floor(math.log10(error * factor)))
    return f"{value * factor:,.{decimals}f} ± {error * factor:,.{decimals}f}{suffix}"
