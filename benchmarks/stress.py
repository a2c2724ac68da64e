"""Whether commands ever hang: each many times, pinned to few cores, under other load.

    python -m benchmarks.stress --repeat 100 --cores 1 2

A command gets as many cores as asked for, and shares them with as many busy processes. One that has
not ended in `--limit` seconds has hung: what its threads waited in is noted, and it is killed. The
counts are on disk after each command, in `--output`. It ends with exit code 1 if a command hung or
failed.
"""

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import setting_of, write_record

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "stress.json"
TINY = (
    *("--hidden", "8", "--latent", "2", "--steps", "1", "--epochs", "1"),
    *("--importance-samples", "8", "--proposal", "posterior", "--test-images", "8"),
)
GAP = (
    *("--images", "4", "--simulated-images", "2", "--temperatures", "5", "--chains", "2"),
    *("--family-steps", "2", "--family-samples", "4", "--elbo-samples", "20", "--batch", "2"),
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", *TINY, "--overwrite", "--run-dir", "RUN"),
    "evaluate": ("evaluate", "RUN"),
    "gap": ("gap", "RUN", *GAP),
    "sample": ("sample", "RUN", "--overwrite"),
}
"""Each command on the folder RUN, which the first one makes."""


def command(name: str, run: Path) -> list[str]:
    """The words that start a command in a process of its own."""
    words = [str(run) if word == "RUN" else word for word in COMMANDS[name]]
    return [sys.executable, "-m", "vlae_jax", *words]


def environment() -> dict[str, str]:
    """The environment of a command: without what would hide that it starts too few threads."""
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    paths = [str(ROOT / "src"), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes compute without end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def waits(process: int) -> dict[str, int]:
    """What the threads of a process wait in, by the kernel's name, and how many do."""
    found: collections.Counter[str] = collections.Counter()
    for task in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            found[(task / "wchan").read_text() or "runs"] += 1
    return dict(found)


def watched(words: Sequence[str], log: Path, limit: float) -> dict[str, Any]:
    """Run a command to its end, or to its limit of seconds."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            words, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            code: int | None = process.wait(limit)
            hung = None
        except subprocess.TimeoutExpired:
            code, hung = None, waits(process.pid)
            process.kill()
            process.wait()
    seconds = round(time.monotonic() - began, 1)
    said = log.read_text(errors="replace")[-2000:] if code else ""
    return {"code": code, "seconds": seconds, "hung": hung, "said": said}


def summary(setting: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts by command and number of cores, and whatever did not end well."""
    counts: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = f"{row['command']} on {row['cores']} core{'s' * (row['cores'] > 1)}"
        entry = counts.setdefault(name, {"runs": 0, "hung": 0, "failed": 0, "longest_seconds": 0})
        entry["runs"] += 1
        entry["hung"] += row["code"] is None
        entry["failed"] += bool(row["code"])
        entry["longest_seconds"] = max(entry["longest_seconds"], row["seconds"])
    return {"setting": setting, "counts": counts, "bad": [row for row in rows if row["code"] != 0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all commands; 0 if each ended well each time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=100, help="times that each command runs")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="how many it gets")
    parser.add_argument("--first-core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=float, default=600, help="seconds that count as a hang")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    allowed = sorted(core for core in os.sched_getaffinity(0) if core >= options.first_core)
    if len(allowed) < max(options.cores):
        parser.error(f"--cores {max(options.cores)}, but only {len(allowed)} may be used")
    given = sys.argv[1:] if arguments is None else arguments
    setting = setting_of("stress", given)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        first = watched(command("train", run), log, options.limit)
        if first["code"] != 0:
            print(f"the first training failed: {first}")
            return 1
        for repeat in range(options.repeat):
            for cores in options.cores:
                with pinned(allowed[:cores]), load(cores):
                    for name in options.only:
                        found = watched(command(name, run), log, options.limit)
                        rows.append({"command": name, "cores": cores, "repeat": repeat, **found})
                        write_record(options.output, summary(setting, rows))
    for name, entry in summary(setting, rows)["counts"].items():
        print(f"{name}: {entry}")
    return int(any(row["code"] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
