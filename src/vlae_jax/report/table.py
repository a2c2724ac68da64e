"""The figures of runs side by side, and over seeds, for a terminal."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlae_jax.report.files import Run, number, read_run
from vlae_jax.report.groups import (
    Configuration,
    Problem,
    over_seeds,
    paired_differences,
    sort_runs,
)

ABSENT = "–"
COLUMNS = (
    ("run", "left"),
    ("data set", "left"),
    ("method", "left"),
    ("T", "right"),
    ("seed", "right"),
    ("epochs", "right"),
    ("test ELBO", "right"),
    ("test log p(x)", "right"),
    ("K", "right"),
    ("gap", "right"),
    ("bits/dim", "right"),
    ("unreliable", "right"),
    ("unconverged", "right"),
    ("not PD", "right"),
)
SEED_COLUMNS = (
    ("data set", "left"),
    ("configuration", "left"),
    ("seeds", "right"),
    ("test ELBO", "right"),
    ("test log p(x)", "right"),
    ("gap", "right"),
    ("bits/dim", "right"),
    ("unreliable", "right"),
    ("log p(x) − VAE", "right"),
    ("ELBO − VAE", "right"),
)
SEED_NOTE = (
    "Nats per image: mean ± standard error over seeds. The last two columns are paired differences "
    "to the VAE of the same seed, on the same test images; those of a single seed ± standard error "
    "over images."
)


def summary_table(run_dirs: Iterable[str | os.PathLike[str]]) -> Table:
    """Set runs side by side: one row a run.

    ELBO, log p(x) and their gap are in nats per test image, with standard errors; K is the number
    of importance samples, and log p(x) is the lower bound that K samples give. The gap is taken
    only where both figures read the same number of images. A figure that came out non-finite
    reads "not finite", and a run without `results.json` "not evaluated".

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
    """Print what `print_summary` prints, of runs already read."""
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
        # A file or a pipe has no width of its own to fit the table to.
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
        # Folded, not cut: a narrow terminal must not eat digits.
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def seed_rows(problems: Sequence[Problem]) -> list[list[str]]:
    """One row a configuration over its seeds; none if no configuration has several."""
    if all(len(c.runs) < 2 for problem in problems for c in problem.configurations):
        return []
    return [_seed_row(problem, c) for problem in problems for c in problem.configurations]


def _seed_row(problem: Problem, configuration: Configuration) -> list[str]:
    figures = (
        ("elbo", "nats"),
        ("log_prob", "nats"),
        ("inference_gap", "nats"),
        ("bits_per_dim", "bits/dim"),
        ("unreliable", "share"),
    )
    cells = []
    for name, unit in figures:
        values = configuration.values(name)
        # An error over images beside errors over seeds would be taken for one.
        value, error = over_seeds([(value, math.nan) for value, _ in values] or [(math.nan,) * 2])
        figure = {"value": value, "standard_error": error, "unit": unit}
        cells.append(quantity(figure) if values else ABSENT)
    for name in ("log_prob", "elbo"):
        found = paired_differences(configuration, problem.runs, name)
        if not found:
            cells.append(ABSENT)
            continue
        value, error = over_seeds([(each.mean, each.standard_error) for each in found])
        cells.append(quantity({"value": value, "standard_error": error, "unit": "nats"}))
    seeds = str(len(configuration.runs))
    return [problem.title, configuration.label, seeds, *cells]


def table_note(runs: Sequence[Run]) -> str:
    """What the reader of the table must know."""
    if all(run.results is None for run in runs):
        return "No run here has a results.json: evaluate to fill the table."
    return (
        "Nats per image ± standard error; log p(x) from K importance samples, unreliable for the "
        "share of images whose weights have a Pareto k above 0.7."
    )


def table_row(run: Run) -> list[str]:
    """One run's cells."""
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
        return [*settings, "not evaluated", *[ABSENT] * 7]
    log_prob = run.metric("log_prob")
    return [
        *settings,
        quantity(run.metric("elbo")),
        quantity(log_prob),
        plain((log_prob or {}).get("samples")),
        quantity(run.gap),
        quantity(run.metric("bits_per_dim")),
        quantity(run.metric("unreliable")),
        quantity(run.metric("unconverged")),
        quantity(run.metric("not_positive_definite")),
    ]


def epochs_words(run: Run) -> str:
    """How many epochs were trained, and of how many where a run was cut short."""
    planned = run.setting("training", "epochs")
    reached = max(run.series("train", "epoch")[0], default=math.inf)
    # The last record of an epoch may come a few steps before its end.
    return f"{reached:.3g} of {planned}" if reached < number(planned) - 1 else plain(planned)


def plain(value: Any) -> str:
    """Whatever a file says, a dash for nothing."""
    return ABSENT if value is None else str(value)


def quantity(figure: Mapping[str, Any] | None) -> str:
    """Write a value with its standard error, to the decimals its unit deserves."""
    if figure is None:
        return ABSENT
    value, error = number(figure.get("value")), number(figure.get("standard_error"))
    if not math.isfinite(value):
        return "not finite"
    unit = figure.get("unit")
    factor, decimals, suffix = {
        "share": (100.0, 2, " %"),
        "samples": (1.0, 1, ""),
        "bits/dim": (1.0, 4, ""),
    }.get(str(unit), (1.0, 2, ""))
    if not math.isfinite(error):
        return f"{value * factor:,.{decimals}f}{suffix}"
    if error > 0:
        # Two decimals of a tiny error would read 0.00.
        decimals = max(decimals, -math.floor(math.log10(error * factor)))
    return f"{value * factor:,.{decimals}f} ± {error * factor:,.{decimals}f}{suffix}"
