"""The tables of `docs/scaling.md`, from what `benchmarks.scaling` found."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.report import put

from benchmarks import hlo
from benchmarks.roofline import (
    SLICES,
    TPU_V5E,
    Seconds,
    all_reduce_seconds,
    crossing,
    ring_bytes,
)
from benchmarks.scaling_programs import BATCH, SWEEP, Case
from benchmarks.scaling_results import read

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
CHIPS = tuple(SLICES)
TRAINED = ("vae", "vlae")
GLOBAL_BATCH = max(SWEEP)


def run(options: argparse.Namespace) -> None:
    """Set the tables again."""
    found = read()
    text = PAGE.read_text()
    paper = Paper(found)
    tables = {
        "lowering": lowering(found, paper),
        "costs": costs(paper),
        "batches": batches(paper),
        "collectives": collectives(paper),
        "weak": weak(paper),
        "strong": strong(paper),
        "processes": processes(found["measure"]),
        "virtual": virtual(found["measure"]),
    }
    for name, content in tables.items():
        text = put(text, f"table: {name}", content)
    for name in ("compile", "products", "measure"):
        text = put(text, f"setting: {name}", provenance(found[name]))
    PAGE.write_text(text)


class Paper:
    """Compiled programs, priced at a chip's peaks."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.rows = {row["name"]: row for row in found["compile"]["rows"]}
        counted = found["products"]["rows"][0]["products"]
        self.products = sum(counted) / len(counted)
        """Products of conjugate gradients in each step of the search."""

    def row(self, case: Case) -> dict[str, Any] | None:
        """The row of a case, if it was compiled."""
        row = self.rows.get(case.name)
        return None if row is None or "error" in row else row

    def flops(self, row: dict[str, Any]) -> dict[str, float]:
        """FLOPs of products by precision."""
        once, product = row["once"]["flops"], row["product"]["flops"]
        return {kind: once[kind] + self.products * product[kind] for kind in once}

    def total(self, row: dict[str, Any], name: str) -> float:
        """The cost of that name, of a step with all its products."""
        return row["once"][name] + self.products * row["product"][name]

    def seconds(self, row: dict[str, Any], chips: int = 1) -> Seconds:
        """A step at the peaks; its communication as if these were so many chips."""
        passes = sum(hlo.PASSES[kind] * count for kind, count in self.flops(row).items())
        return Seconds(
            compute=passes / TPU_V5E.flops,
            memory=self.total(row, "hbm_bytes") / TPU_V5E.memory,
            communication=self.communication(row, chips),
        )

    def estimate(self, row: dict[str, Any]) -> float:
        """Seconds of the compiler's own estimates, without communication."""
        return self.total(row, "cycles") * TPU_V5E.cycle

    def communication(self, row: dict[str, Any], chips: int) -> float:
        """Seconds of a program's collectives on a slice of so many chips."""
        total = 0.0
        for each in row["collectives"]:
            seconds = all_reduce_seconds(TPU_V5E, SLICES[chips], each["bytes"])
            half = 1.0 if each["kind"] == "all-reduce" else 0.5
            total += half * seconds * (each["once"] + self.products * each["product"])
        return total

    def sent(self, row: dict[str, Any]) -> float:
        """Bytes that each chip must send in a step."""
        return sum(
            (each["once"] + self.products * each["product"])
            * hlo.sent_bytes(hlo.Collective(each["kind"], each["bytes"], each["devices"], 1.0))
            for each in row["collectives"]
        )


def lowering(found: dict[str, Any], paper: Paper) -> str:
    """The calls that each system's step makes on its way to a TPU, and what compiling it took."""

    def lines() -> Iterator[list[str]]:
        for each in found["export"]["rows"]:
            row = paper.rows.get(f"{each['system']}, 1 x {BATCH}", {})
            ours = "custom_calls" in row
            yield [
                each["system"],
                ", ".join(each["foreign_calls"]) or "none",
                f"{row['compile_seconds']:.0f}" if ours else row.get("error", "not compiled"),
                f"{row['memory']['generated_code'] / 1e6:.0f}" if ours else "",
                ", ".join(f"`{name}`" for name in row["custom_calls"]) if ours else "",
            ]

    head = ["system", "foreign calls, lowered", "compiled in s", "code MB", "the compiler's own"]
    return table(head, lines())


def costs(paper: Paper) -> str:
    """A step of every system on one chip."""

    def lines() -> Iterator[list[str]]:
        for row in paper.rows.values():
            if row["chips"] > 1 or row["batch"] != BATCH or "error" in row:
                continue
            flops, seconds = paper.flops(row), paper.seconds(row)
            estimate = paper.estimate(row)
            yield [
                row["system"],
                f"{row['parameter_bytes'] / 1e6:.1f}",
                f"{flops['default'] / 1e9:.1f}",
                f"{flops['highest'] / 1e9:.1f}",
                f"{paper.total(row, 'hbm_bytes') / 1e6:.0f}",
                f"{row['memory']['temp'] / 1e6:.0f}",
                f"{1e6 * seconds.compute:.0f}",
                f"{1e6 * seconds.memory:.0f}",
                rate(BATCH / seconds.total),
                f"{1e6 * estimate:.0f}",
                rate(BATCH / estimate),
            ]

    head = ["system", "parameters MB", "GFLOP, 1 pass", "GFLOP, 6 passes", "HBM MB", "temp MB"]
    head += ["arithmetic µs", "memory µs", "images/s at most", "compiler's estimate µs"]
    return table([*head, "images/s by it"], lines())


def batches(paper: Paper) -> str:
    """One chip with more and more images."""
    sizes = sorted({*SWEEP, BATCH})
    points: dict[str, list[tuple[float, float, float]]] = {method: [] for method in TRAINED}

    def lines() -> Iterator[list[str]]:
        for batch in sizes:
            cells = [str(batch)]
            for method in TRAINED:
                row = paper.row(Case(method, batch=batch))
                if row is None:
                    cells += [""] * 4
                    continue
                seconds = paper.seconds(row)
                points[method].append((batch, seconds.compute, seconds.memory))
                cells += [
                    f"{1e6 * seconds.compute:.0f}",
                    f"{1e6 * seconds.memory:.0f}",
                    rate(batch / seconds.total),
                    rate(batch / paper.estimate(row)),
                ]
            yield cells

    columns = ("arithmetic µs", "memory µs", "images/s at most", "images/s, compiler")
    head = ["images", *(f"{words(m)}: {column}" for m in TRAINED for column in columns)]
    text = table(head, lines())
    for method in TRAINED:
        batch = crossing(points[method])
        if batch is None:
            text += f"\n\n{words(method)} is bound by memory at any batch."
            continue
        beyond = ", by the last two rows' line" if batch > points[method][-1][0] else ""
        text += (
            f"\n\n{words(method)} is bound by arithmetic from {batch:.0f} images a chip{beyond}."
        )
    return text


def collectives(paper: Paper) -> str:
    """The communication of compiled programs, beside the formula."""

    def lines() -> Iterator[list[str]]:
        for row in paper.rows.values():
            if row["chips"] == 1 or "error" in row:
                continue
            sums = [each for each in row["collectives"] if each["kind"] == "all-reduce"]
            others = [each for each in row["collectives"] if each["kind"] != "all-reduce"]
            large = [each for each in sums if each["bytes"] > 64]
            small = [each for each in sums if each["bytes"] <= 64]
            yield [
                row["name"],
                f"{row['parameter_bytes'] / 1e6:.2f}",
                " + ".join(f"{each['once']:.0f} × {each['bytes'] / 1e6:.2f}" for each in large),
                f"{sum(e['once'] + paper.products * e['product'] for e in small):.0f}",
                f"{sum(e['once'] * e['bytes'] for e in others) / 1e6:.2f}",
                f"{ring_bytes(row['parameter_bytes'], row['chips']) / 1e6:.2f}",
                f"{paper.sent(row) / 1e6:.2f}",
            ]

    head = ["program", "parameters MB", "summed MB", "small sums", "gathered MB"]
    return table([*head, "2 (n − 1)/n × parameters", "sent MB"], lines())


def weak(paper: Paper) -> str:
    """Weak scaling: as many images on each of more chips."""

    def lines() -> Iterator[list[str]]:
        for chips in CHIPS:
            cells = [str(chips)]
            for method in TRAINED:
                one, several = paper.row(Case(method)), paper.row(Case(method, chips=8))
                assert one and several
                cells += scaled(paper, one, several, one, chips, chips)
            yield cells

    return table(["chips", *scaled_head()], lines())


def strong(paper: Paper) -> str:
    """Strong scaling: as many images in all, on more chips."""

    def lines() -> Iterator[list[str]]:
        for chips in CHIPS:
            cells = [str(chips), str(GLOBAL_BATCH // chips)]
            for method in TRAINED:
                first = paper.row(Case(method, batch=GLOBAL_BATCH))
                one = paper.row(Case(method, batch=GLOBAL_BATCH // chips))
                several = paper.row(Case(method, chips=8))
                assert first and several
                if one is None:
                    break
                cells += scaled(paper, one, several, first, chips, 1)
            else:
                yield cells

    return table(["chips", "images a chip", *scaled_head()], lines())


def scaled_head() -> list[str]:
    """Titles of the columns that `scaled` fills, for both methods."""
    columns = ("communication µs", "step µs at least", "efficiency", "by the compiler's estimate")
    return [f"{words(method)}: {column}" for method in TRAINED for column in columns]


def scaled(
    paper: Paper,
    own: dict[str, Any],
    several: dict[str, Any],
    first: dict[str, Any],
    chips: int,
    times: int,
) -> list[str]:
    """A step on so many chips, beside one.

    Args:
        paper: Prices.
        own: The program of one chip with its share of the batch.
        several: One whose collectives it would have.
        first: The program of one chip that it is compared with.
        chips: How many.
        times: How many times as much work as that one they do together.
    """
    communication = paper.communication(several, chips)
    seconds = paper.seconds(own)._replace(communication=communication)
    gain = times * paper.seconds(first).total / seconds.total / chips
    estimated = paper.estimate(own) + communication
    estimated_gain = times * paper.estimate(first) / estimated / chips
    return [
        f"{1e6 * communication:.0f}",
        f"{1e6 * seconds.total:.0f}",
        f"{100 * gain:.0f} %",
        f"{1e6 * estimated:.0f} µs, {100 * estimated_gain:.0f} %",
    ]


def processes(part: dict[str, Any]) -> str:
    """Weak scaling over processes, measured."""

    def lines() -> Iterator[list[str]]:
        for method in dict.fromkeys(row["method"] for row in part["rows"]):
            rows = {row["kind"]: row for row in part["rows"] if row["method"] == method}
            alone = rows["one process"]["median_seconds"]
            apart = rows["several apart"]["median_seconds"]
            for kind, row in rows.items():
                median = row["median_seconds"]
                together = kind == "several together"
                yield [
                    words(method),
                    kind.replace("several", str(row["processes"])),
                    str(row["batch"]),
                    f"{1e3 * median:.1f}",
                    f"{1e3 * row['best_seconds']:.1f}",
                    rate(row["processes"] * row["batch"] / median),
                    f"{100 * alone / median:.0f} %",
                    f"{100 * apart / median:.0f} %" if together else "",
                ]

    head = ["system", "processes", "images a process", "ms a step", "best", "images/s"]
    return table([*head, "efficiency", "of the same apart"], lines())


def virtual(part: dict[str, Any]) -> str:
    """One batch on more and more virtual devices of one process, measured."""

    def lines() -> Iterator[list[str]]:
        first: dict[str, float] = {}
        for row in part["virtual"]:
            alone = first.setdefault(row["method"], row["median_seconds"])
            yield [
                words(row["method"]),
                str(row["devices"]),
                f"{1e3 * row['median_seconds']:.0f}",
                f"{row['median_seconds'] / alone:.2f}",
                f"{row['difference']:.0e}",
            ]

    head = ["system", "virtual devices", "ms a step", "× one", "difference of parameters"]
    return table(head, lines())


def provenance(part: dict[str, Any]) -> str:
    """The date, machine and versions of a part."""
    setting = part["setting"]
    cpu = f", {setting['cpu']}" if "cpu" in setting else ""
    return f"{setting['date']}{cpu}, Python {setting['python']}, {setting['versions']}."


def words(method: str) -> str:
    """A method as readers know it."""
    return method.upper().replace("_", "-")


def rate(images: float) -> str:
    """Images a second, to three digits."""
    rounded = float(f"{images:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.1f}"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
