"""The page of a run, and the one that compares runs: one file each, which loads nothing."""

import base64
import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlae_jax.report.comparison import save_comparison
from vlae_jax.report.figures import save_pictures
from vlae_jax.report.files import Run, number, read_runs, write_file
from vlae_jax.report.groups import sort_runs
from vlae_jax.report.style import Picture
from vlae_jax.report.table import (
    ABSENT,
    COLUMNS,
    SEED_COLUMNS,
    SEED_NOTE,
    epochs_words,
    plain,
    print_runs,
    quantity,
    seed_rows,
    table_note,
    table_row,
)
from vlae_jax.runs.storage import as_folder

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #5f6975;
  --line: #e3e6ea; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2025; --ink: #e8eaed;
  --soft: #9aa4b0; --line: #2e343c; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 44px 0 12px; }
h3 { font-size: .8rem; margin: 0 0 8px; color: var(--soft); font-weight: 600;
  text-transform: uppercase; letter-spacing: .06em; }
.lead, figcaption, .note { color: var(--soft); }
.lead { margin: 0 0 24px; }
.note { font-size: .875rem; }
header h1 { margin-bottom: 20px; }
header + article, article + article { margin-top: 72px; padding-top: 48px;
  border-top: 1px solid var(--line); }
.tiles, .cards { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.tile, .card, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile, .card { padding: 14px 18px; }
.tile b { display: block; font-size: 1.5rem; white-space: nowrap; font-weight: 600;
  line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums; }
.tile small { font-size: .9rem; font-weight: 400; }
.tile span { font-size: .85rem; color: var(--soft); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; }
.right { text-align: right; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 16px; margin: 0; font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 36px; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: 8px;
  border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-top: 10px; max-width: 74ch; font-size: .92rem; }
figcaption b { color: var(--ink); }
@media print { main { max-width: none; padding: 0; } figure, .card { break-inside: avoid; } }
"""


def write_report(
    run_dirs: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Draw every run's figures, print the table, and write the page.

    The page is one file that loads nothing: pictures and style are inside it.

    Args:
        run_dirs: Folders of runs.
        output: File for one page about all runs together, which begins with the pictures that
            compare them (if there are several); these lie beside it as PNG files too. None writes
            `report.html` into each run's own folder.

    Returns:
        The pages written.

    Raises:
        UserError: If no run is given or there is no such run, if one of the files is damaged, or
            if the page cannot be written.
    """
    runs = read_runs(run_dirs)
    pictures = [[picture for _, picture in save_pictures(run)] for run in runs]
    print_runs(runs, Console())
    sections = [_section(run, drawn) for run, drawn in zip(runs, pictures, strict=True)]
    if output is None:
        for run, section in zip(runs, sections, strict=True):
            write_file(run.path / "report.html", _page(run.name, [section]).encode())
        return [run.path / "report.html" for run in runs]
    return _write_comparison(runs, sections, as_folder(output))[:1]


def write_comparison(
    run_dirs: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]
) -> list[Path]:
    """Compare runs in a folder: pictures as PNG files, and `report.html` with them and the tables.

    Unlike `write_report`, prints nothing and leaves the run folders alone: the page has the
    figures and the configuration of each run, but not its own pictures.

    Args:
        run_dirs: Folders of runs.
        folder: Where to write.

    Returns:
        The page, and the pictures: `log_likelihood.png`, `paired_differences.png`, `gaps.png`,
        `pareto_k.png`, `steps.png`, `posterior_covariances.png` and `training_curves.png`, with the
        data set in the name where there are several. One whose input is missing is left out. The
        same files give the same bytes.

    Raises:
        UserError: If no run is given or there is no such run, if one of the files is damaged, or
            if something cannot be written.
    """
    runs = read_runs(run_dirs)
    sections = [_section(run, []) for run in runs]
    return _write_comparison(runs, sections, as_folder(folder) / "report.html")


def _write_comparison(runs: Sequence[Run], sections: Sequence[str], path: Path) -> list[Path]:
    """Write one page about several runs, and the pictures that compare them beside it."""
    problems = sort_runs(runs)
    saved = save_comparison(problems, path.parent) if len(runs) > 1 else []
    overview = _html_table(COLUMNS, [table_row(run) for run in runs])
    parts = [
        f"<h1>{html.escape(_count(runs))}</h1>\n{overview}<p class=note>{table_note(runs)}</p>"
    ]
    over = seed_rows(problems)
    if over:
        parts.append(
            f"<h2>Over seeds</h2>\n{_html_table(SEED_COLUMNS, over)}<p class=note>{SEED_NOTE}</p>"
        )
    for problem, pictures in zip(problems, saved, strict=bool(saved)):
        drawn = "".join(_picture_html(picture) for _, picture in pictures)
        parts.append(f"<h2>Comparison · {html.escape(problem.title)}</h2>\n{drawn}")
    header = "\n".join(parts)
    write_file(path, _page(_count(runs), sections, f"<header>\n{header}\n</header>\n").encode())
    return [path, *(picture for items in saved for picture, _ in items)]


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} runs" if len(runs) > 1 else runs[0].name


def _page(title: str, sections: Sequence[str], header: str = "") -> str:
    body = "\n".join(f"<article>\n{section}\n</article>" for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{header}{body}\n</main>\n</body>\n</html>\n"
    )


def _section(run: Run, pictures: Sequence[Picture]) -> str:
    lead = (
        f"{run.subject} · seed {plain(run.seed)} · {epochs_words(run)} epochs{_chosen_words(run)}"
    )
    parts = [
        f"<h1>{html.escape(run.name)}</h1>\n<p class=lead>{html.escape(lead)}</p>",
        _results_html(run),
        f"<h2>Pictures</h2>\n{''.join(map(_picture_html, pictures))}" if pictures else "",
        f"<h2>Configuration</h2>\n{_cards(run.config)}",
    ]
    if run.results is not None:
        made = {
            "versions": run.results.get("versions"),
            "seconds": run.results.get("seconds"),
            "machine": {"device": run.results.get("device")},
        }
        parts.append(f"<h2>Made with</h2>\n{_cards(made)}")
    return "\n".join(part for part in parts if part)


def _chosen_words(run: Run) -> str:
    chosen = run.checkpoint
    if chosen is None or not math.isfinite(number(chosen.get("epoch"))):
        return ""
    return f", checkpoint of epoch {number(chosen.get('epoch')):g} chosen on validation"


def _results_html(run: Run) -> str:
    if run.results is None:
        return "<h2>Results</h2>\n<p>This run is not evaluated: it has no results.json.</p>"
    log_prob = run.metric("log_prob")
    samples = plain((log_prob or {}).get("samples"))
    tiles = (
        ("test ELBO, nats", run.metric("elbo")),
        (f"test log p(x), nats, K = {samples}", log_prob),
        ("gap between them, nats", run.gap),
        ("bits per dimension", run.metric("bits_per_dim")),
    )
    shown = "".join(
        f"<div class=tile><b>{_tile_words(figure)}</b><span>{label}</span></div>\n"
        for label, figure in tiles
        if figure is not None
    )
    return f"<div class=tiles>\n{shown}</div>\n<h2>Results</h2>\n{_figures_html(run.results)}"


def _tile_words(figure: Mapping[str, Any]) -> str:
    value, sign, error = quantity(figure).partition(" ± ")
    return f"{value} <small>± {error}</small>" if sign else value


NAMES = {
    "elbo": "ELBO",
    "log_prob": "log p(x)",
    "bits_per_dim": "bits per dimension",
    "ess": "effective sample size",
    "kl": "KL",
    "unreliable": "unreliable (Pareto k\u0302 above 0.7)",
    "log_prob_sampling_error": "sampling error of log p(x)",
    "not_positive_definite": "not positive definite",
}


def _figures_html(results: Mapping[str, Any]) -> str:
    columns = (
        ("figure", "left"),
        ("value ± standard error", "right"),
        ("unit", "left"),
        ("split", "left"),
        ("images", "right"),
        ("K", "right"),
    )
    rows = [
        [
            NAMES.get(figure["name"], figure["name"].replace("_", " ")),
            quantity(figure),
            plain(figure.get("unit")),
            plain(figure.get("split")),
            plain(figure.get("images")),
            plain(figure.get("samples")),
        ]
        for figure in results["metrics"]
    ]
    note = "K is the number of samples per image; log p(x) is the lower bound that K samples give."
    return f"{_html_table(columns, rows)}<p class=note>{note}</p>"


def _html_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th class={side}>{html.escape(name)}</th>" for name, side in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class={side}>{html.escape(cell)}</td>"
            for cell, (_, side) in zip(row, columns, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f"<div class=table><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _picture_html(picture: Picture) -> str:
    source = base64.b64encode(picture.png).decode("ascii")
    caption = html.escape(picture.caption)
    # One scale for all, so that their lettering has one size; a PNG's width is in its bytes 16-19.
    width = round(0.7 * int.from_bytes(picture.png[16:20], "big"))
    return (
        f'<figure><img width="{width}" src="data:image/png;base64,{source}" '
        f'alt="{caption}">\n<figcaption><b>{picture.title}.</b> {caption}</figcaption></figure>\n'
    )


def _cards(sections: Mapping[str, Any]) -> str:
    """One card for each section of settings."""
    cards = []
    for title, values in sections.items():
        values = values if isinstance(values, Mapping) else {title: values}
        rows = "".join(
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(_setting_words(value))}</dd>"
            for name, value in values.items()
        )
        cards.append(f"<div class=card><h3>{html.escape(str(title))}</h3><dl>{rows}</dl></div>")
    return f"<div class=cards>{''.join(cards)}</div>"


def _setting_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_setting_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_setting_words(item)}" for name, item in value.items())
    return ABSENT if value is None else str(value)
