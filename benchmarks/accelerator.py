"""One command that measures the package on an accelerator that is at hand for minutes.

    python -m benchmarks.accelerator --data-dir FOLDER --out FOLDER

Every part runs in a process of its own, under its own share of the time that is left, and is
ended when that is over. Its rows are on disk as soon as it has them: OUT/results.json, and the
same as tables in OUT/results.md. This process imports nothing but Python's own library, so that
the accelerator belongs to the part that runs; `benchmarks.accelerator_parts` holds what they do.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SHARES = {
    "device": 1,
    "tests": 2,
    "steps-mlp": 6,
    "steps-conv": 7,
    "log_prob": 4,
    "train-vae": 3,
    "train-vlae": 4,
}
"""The parts in their order, and how the time is shared among them."""
TABLES = {
    "device": "Where this was measured",
    "tests": "Tests that are marked `accelerator`",
    "steps": "Training steps, beside the VAE's of the same network and size",
    "log_prob": "Log-likelihoods",
    "training": "Training with the published settings for MNIST",
    "evaluation": "What that training led to, on test images",
}
LEAST = 1.0
"""Seconds below which a part is not worth starting."""


class Part(NamedTuple):
    """Something to measure."""

    name: str
    command: Sequence[str]
    """Takes a file as its last argument, and appends its rows and notes to it: a line of JSON each,
    {"table": ..., ...} or {"note": ...}."""
    share: float = 1.0
    """Its share of the time, relative to the other parts."""


def measure(
    parts: Sequence[Part],
    seconds: float,
    report: Callable[[list[dict[str, Any]]], None],
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run the parts one after the other, each under its share of the time that is left.

    Args:
        parts: What to measure; what one leaves of its time goes to those after it.
        seconds: For all together.
        report: Called with everything found so far, whenever there is more.
        environment: Of the processes.

    Returns:
        For each part its name, status ("done", "failed", "cut off", "not reached"), seconds, limit,
        rows and notes.
    """
    end = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        limit = left * part.share / sum(other.share for other in parts[number:])
        result: dict[str, Any] = {"part": part.name, "status": "running"}
        result |= {"seconds": 0.0, "limit": max(0.0, limit), "rows": [], "notes": []}
        found.append(result)
        if limit < LEAST:
            result["status"] = "not reached"
        else:
            _run(part, limit, result, lambda: report(found), environment)
        report(found)
        print(f"{part.name}: {result['status']}, {result['seconds']:.0f} of {limit:.0f} s")
        for note in result["notes"]:
            print(f"  {note}", flush=True)
    return found


def _run(
    part: Part,
    limit: float,
    result: dict[str, Any],
    report: Callable[[], None],
    environment: Mapping[str, str] | None,
) -> None:
    """Run one part, and end it with all that it started when its time is over."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        lines.touch()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*part.command, str(lines)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        try:
            while process.poll() is None and time.monotonic() - began < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(0.5, max(0.0, began + limit - time.monotonic())))
                if _take(lines, result):
                    report()
        finally:
            code = process.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _take(lines, result)
        result["seconds"] = time.monotonic() - began
        result["status"] = "done" if code == 0 else "cut off" if code is None else "failed"
        if code:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            result["notes"].append(f"exit code {code}: {' / '.join(said[-3:])[-600:]}")


def _take(lines: Path, result: dict[str, Any]) -> bool:
    """Read what a part has written, whole lines alone; whether there is more than before."""
    before = len(result["rows"]) + len(result["notes"])
    text = lines.read_text()
    said = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    result["rows"] = [line for line in said if "note" not in line]
    result["notes"] = [line["note"] for line in said if "note" in line]
    return len(said) > before


def tables(setting: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Everything found, as Markdown."""
    text = ["# Measured on an accelerator", ""]
    text += [f"- {name}: {_cell(value)}" for name, value in setting.items()]
    head = ("part", "status", "seconds", "limit")
    text += ["", *_table(head, [{name: part[name] for name in head} for part in found])]
    text += ["", *(f"- {part['part']}: {note}" for part in found for note in part["notes"])]
    for name, title in TABLES.items():
        rows = [row for part in found for row in part["rows"] if row["table"] == name]
        if rows:
            columns = dict.fromkeys(column for row in rows for column in row if column != "table")
            text += ["", f"## {title}", "", *_table(tuple(columns), rows)]
    return "\n".join(text) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")


def unpacked(wheels: Path | None, folder: Path) -> list[str]:
    """Unpack the wheels of a folder, and return what to put on Python's path for them."""
    files = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not files:
        raise SystemExit(f"{wheels} holds no wheels (*.whl)")
    for file in files:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    return [str(folder)] if files else []


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz: x_train, x_test")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument(
        "--only", nargs="+", default=list(SHARES), metavar="PART", help=", ".join(SHARES)
    )
    parser.add_argument("--tiny", action="store_true", help="every part in seconds, on the CPU")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are missing there")
    parser.add_argument(
        "--train-seconds", type=float, default=20.0, help="of training, once compiled"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(SHARES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 if every part could be measured to its end."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    setting = {
        "command": " ".join(["python -m benchmarks.accelerator", *given]),
        "date": datetime.date.today().isoformat(),
        "minutes": options.minutes,
    }
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = {
        "data_dir": options.data_dir and str(options.data_dir.resolve()),
        "tiny": options.tiny,
        "train_seconds": 1.0 if options.tiny else options.train_seconds,
    }

    def report(found: list[dict[str, Any]]) -> None:
        texts = {
            "results.json": json.dumps({"setting": setting, "parts": found}, indent=1) + "\n",
            "results.md": tables(setting, found),
        }
        for name, text in texts.items():
            (out / f".{name}").write_text(text)
            (out / f".{name}").replace(out / name)

    program = [sys.executable, "-m", "benchmarks.accelerator_parts"]
    parts = [
        Part(name, [*program, name, json.dumps(chosen)], share)
        for name, share in SHARES.items()
        if name in options.only
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = [str(ROOT / "src"), str(ROOT / "tests"), *unpacked(options.wheels, Path(folder))]
        path += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        if options.tiny:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        # A little is kept for what comes after the last part.
        found = measure(parts, 60 * options.minutes - 2, report, environment)
    print(f"{out / 'results.md'}")
    return 0 if all(part["status"] == "done" for part in found) else 1


if __name__ == "__main__":
    sys.exit(main())
