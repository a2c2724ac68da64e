"""The page of a run, and the page that compares runs: one file each, which loads nothing.

Pages are built of elements, which escape whatever names and settings a user has chosen.
"""

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

from rich.console import Console

from vlae_jax.report.comparison import save_comparison
from vlae_jax.report.figures import save_pictures
from vlae_jax.report.groups import sort_runs
from vlae_jax.report.style import Picture, save
from vlae_jax.report.table import (
    ABSENT,
    COLUMNS,
    SEED_COLUMNS,
    SEED_NOTE,
    epochs_words,
    metric_words,
    plain,
    print_runs,
    seed_rows,
    table_note,
    table_row,
)
from vlae_jax.runs.metrics import QUANTITIES, titled
from vlae_jax.runs.records import Run, number, read_runs
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
h1, h2, .lead, figcaption { overflow-wrap: anywhere; }
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
.tile b { display: block; font-size: 1.5rem; font-weight: 600;
  line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums; }
small { white-space: nowrap; }
.tile small { font-size: .9rem; font-weight: 400; }
.tile span { font-size: .85rem; color: var(--soft); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
td.left { overflow-wrap: anywhere; min-width: 6.5rem; }
td.left:first-child { min-width: 7.5rem; }
td.right { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .8rem; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; }
.right { text-align: right; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 16px; margin: 0; font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 36px; }
.picture { overflow-x: auto; }
figure img { display: block; max-width: max(100%, 560px); height: auto; background: #fff;
  padding: 8px; border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-top: 10px; max-width: 74ch; font-size: .92rem; }
figcaption b { color: var(--ink); }
@media print { main { max-width: none; padding: 0; } figure, .card { break-inside: avoid; } }
"""


def write_report(
    run_dirs: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Draw every run's pictures, print the table, and write the page.

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
            save(run.path / "report.html", _page(run.name, [section]))
        return [run.path / "report.html" for run in runs]
    return _write_comparison(runs, sections, as_folder(output))[:1]


def write_comparison(
    run_dirs: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]
) -> list[Path]:
    """Compare runs in a folder: pictures as PNG files, and `report.html` with them and the tables.

    Unlike `write_report` it prints nothing and leaves the run folders alone: the page has the
    metrics and the configuration of each run, but not its own pictures.

    Args:
        run_dirs: Folders of runs.
        folder: Where to write.

    Returns:
        The page, and the pictures: `log_likelihood.png`, `paired_differences.png`, `gaps.png`,
        `pareto_k.png`, `steps.png`, `posterior_covariances.png` and `training_curves.png`, with the
        data set in the name where there are several. A picture whose data are missing is left out.
        Equal files give equal bytes.

    Raises:
        UserError: If no run is given or there is no such run, if one of the files is damaged, or
            if something cannot be written.
    """
    runs = read_runs(run_dirs)
    sections = [_section(run, []) for run in runs]
    return _write_comparison(runs, sections, as_folder(folder) / "report.html")


def _write_comparison(runs: Sequence[Run], sections: Sequence[Element], path: Path) -> list[Path]:
    """Write one page about several runs, and the pictures that compare them beside it."""
    problems = sort_runs(runs)
    saved = save_comparison(problems, path.parent) if len(runs) > 1 else []
    header = E("header", E("h1", _count(runs)))
    header.extend([_table(COLUMNS, [table_row(run) for run in runs]), _note(table_note(runs))])
    over = seed_rows(problems)
    if over:
        header.extend([E("h2", "Over seeds"), _table(SEED_COLUMNS, over), _note(SEED_NOTE)])
    for problem, pictures in zip(problems, saved, strict=bool(saved)):
        header.append(E("h2", f"Comparison · {problem.title}"))
        header.extend(_picture(picture) for _, picture in pictures)
    save(path, _page(_count(runs), [header, *sections]))
    return [path, *(picture for items in saved for picture, _ in items)]


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} runs" if len(runs) > 1 else runs[0].name


def E(tag: str, *content: Element | str, **attributes: str) -> Element:
    """An HTML element with text and elements in it; text is escaped when the page is written.

    The attribute `class` is given as `class_`.
    """
    element = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    for part in content:
        if not isinstance(part, str):
            element.append(part)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + part
        else:
            element.text = (element.text or "") + part
    return element


def _page(title: str, parts: Sequence[Element]) -> bytes:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = E(
        "head",
        E("meta", charset="utf-8"),
        E("meta", name="viewport", content="width=device-width, initial-scale=1"),
        E("meta", content=policy, **{"http-equiv": "Content-Security-Policy"}),
        E("title", title),
        E("style", CSS),
    )
    page = E("html", head, E("body", E("main", *parts)), lang="en")
    return b"<!doctype html>\n" + tostring(page, "utf-8", method="html") + b"\n"


def _note(text: str) -> Element:
    return E("p", text, class_="note")


def _section(run: Run, pictures: Sequence[Picture]) -> Element:
    lead = (
        f"{run.subject} · seed {plain(run.seed)} · {epochs_words(run)} epochs{_chosen_words(run)}"
    )
    section = E("article", E("h1", run.name), E("p", lead, class_="lead"), *_results(run))
    if pictures:
        section.extend([E("h2", "Pictures"), *map(_picture, pictures)])
    section.extend([E("h2", "Configuration"), _cards(run.config)])
    if run.results is not None:
        made = {
            "versions": run.results.get("versions"),
            "seconds": run.results.get("seconds"),
            "machine": {"device": run.results.get("device")},
        }
        section.extend([E("h2", "Made with"), _cards(made)])
    return section


def _chosen_words(run: Run) -> str:
    chosen = run.checkpoint
    if chosen is None or not math.isfinite(number(chosen.get("epoch"))):
        return ""
    return f", checkpoint of epoch {number(chosen.get('epoch')):g} chosen on validation"


def _results(run: Run) -> list[Element]:
    if run.results is None:
        words = "This run is not evaluated: it has no results.json."
        return [E("h2", "Results"), E("p", words)]
    tiles = E("div", class_="tiles")
    for name in ("elbo", "log_prob", "inference_gap", "bits_per_dim"):
        metric = run.gap if name == "inference_gap" else run.metric(name)
        if metric is not None:
            words = f"test {titled(name)}"
            words += f", K = {plain(metric.get('samples'))}" if name == "log_prob" else ""
            value = E("b", *_value_and_error(metric_words(metric)))
            tiles.append(E("div", value, E("span", words), class_="tile"))
    return [tiles, E("h2", "Results"), *_metrics(run.results)]


def _metrics(results: Mapping[str, Any]) -> list[Element]:
    columns = (
        ("metric", "left"),
        ("value ± standard error", "right"),
        ("unit", "left"),
        ("split", "left"),
        ("images", "right"),
        ("K", "right"),
    )
    rows = [
        [
            QUANTITIES[name].label if name in QUANTITIES else name.replace("_", " "),
            metric_words(metric),
            *(plain(metric.get(key)) for key in ("unit", "split", "images", "samples")),
        ]
        for metric in results["metrics"]
        for name in [metric["name"]]
    ]
    note = "K is the number of samples per image; log p(x) is the lower bound that K samples give."
    return [_table(columns, rows), _note(note)]


def _value_and_error(words: str) -> list[Element | str]:
    value, sign, error = words.partition(" ± ")
    if sign and error.endswith(" %"):
        value += " %"
    return [f"{value} ", E("small", f"± {error}")] if sign else [value]


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> Element:
    head = E("tr", *(E("th", name, class_=side) for name, side in columns))
    body = E("tbody")
    for row in rows:
        cells = zip(row, columns, strict=True)
        body.append(
            E("tr", *(E("td", *_value_and_error(cell), class_=side) for cell, (_, side) in cells))
        )
    return E("div", E("table", E("thead", head), body), class_="table")


def _picture(picture: Picture) -> Element:
    # All pictures have one scale, so that their text has one size. Bytes 16 to 19 of a PNG file
    # are its width.
    width = round(0.7 * int.from_bytes(picture.png[16:20], "big"))
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}"
    image = E("img", width=str(width), src=source, alt=picture.caption)
    caption = E("figcaption", E("b", f"{picture.title}."), f" {picture.caption}")
    return E("figure", E("div", image, class_="picture"), caption)


def _cards(sections: Mapping[str, Any]) -> Element:
    """One card for each section of settings."""
    cards = E("div", class_="cards")
    for title, values in sections.items():
        values = values if isinstance(values, Mapping) else {title: values}
        card = E("dl")
        for name, value in values.items():
            card.extend([E("dt", str(name)), E("dd", _setting_words(value))])
        cards.append(E("div", E("h3", str(title)), card, class_="card"))
    return cards


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
