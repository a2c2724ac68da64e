"""What a signal at a random moment leaves: every command, SIGINT and SIGTERM.

    python -m benchmarks.signals --moments 200

A moment is a number of CPU seconds of the command, so that load on the machine moves none; they are
spread evenly over all that the command takes. What ends in another way than it should is printed,
and counted in `--output`: an exit code that is not 128 + signal, a traceback, a file that cannot be
read, or one that is left over. It ends with exit code 1 if there was any.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import setting_of, write_record
from benchmarks.stress import GAP, TINY, environment

RESULTS = Path(__file__).parent / "results" / "signals.json"
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", *TINY, "--overwrite", "--checkpoint-every", "3", "--run-dir", "RUN"),
    "evaluate": ("evaluate", "RUN"),
    "gap": ("gap", "RUN", *GAP),
    "sample": ("sample", "RUN", "--overwrite"),
    "encode": ("encode", "RUN", "--overwrite"),
    "reconstruct": ("reconstruct", "RUN", "--overwrite"),
    "impute": ("impute", "RUN", "--overwrite", "--missing", "0.5", "--images", "8"),
    "score": ("score", "RUN", "--overwrite", "--images", "8", "--importance-samples", "8"),
    "report": ("report", "RUN"),
    "prepare": ("prepare", "--check", "digits"),
}
_ENDS = {".html": b"</html>", ".png": b"IEND\xaeB`\x82"}
_TICKS = os.sysconf("SC_CLK_TCK")


def command(name: str, run: Path) -> list[str]:
    """The words that start a command in a process of its own."""
    words = [str(run) if word == "RUN" else word for word in COMMANDS[name]]
    return [sys.executable, "-m", "vlae_jax_command", *words]


def cpu_seconds(process: int) -> float:
    """CPU seconds that a process has taken, all its threads together; infinite once it has ended.

    Its parent has not waited for it yet.
    """
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return float("inf") if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / _TICKS


def faults_of(folder: Path) -> list[str]:
    """What is not whole below a run folder, or is left over there."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            if "orbax-checkpoint-tmp" in path.name:
                found.append(f"left over: {path.name}")
            continue
        if path.name.endswith(".partial"):
            found.append(f"left over: {path.name}")
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    [arrays[name] for name in arrays]
            elif not path.read_bytes().rstrip().endswith(_ENDS.get(path.suffix, b"")):
                found.append(f"cut short: {path.name}")
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            found.append(f"{path.name}: {error}")
    if folder.is_dir() and {path.name for path in folder.iterdir()} == {".lock"}:
        found.append("left over: an empty folder")
    for digests in folder.glob("checkpoints/*/sha256.json"):
        if not digests.parent.name.isdigit():
            continue
        missing = [n for n in json.loads(digests.read_text()) if not (digests.parent / n).is_file()]
        found += [f"checkpoint {digests.parent.name}: no {name}" for name in missing]
    return found


def signalled(
    name: str, run: Path, log: Path, number: int, moment: float, *, limit: float = 600
) -> dict[str, Any]:
    """Run a command, send it a signal at that CPU second, and say how it ended.

    Before the program's first line it ends by the signal itself, as any process does.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command(name, run),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
        while (before := cpu_seconds(process.pid)) < moment:
            time.sleep(0.003)
        os.kill(process.pid, number)  # Popen's own would wait for one that has ended
        began = time.monotonic()
        while (used := cpu_seconds(process.pid)) < float("inf"):
            last = used
            if time.monotonic() - began > limit:
                process.kill()
            time.sleep(0.01)
        code = process.wait()
    seconds = time.monotonic() - began
    said = log.read_text(errors="replace")
    started = code != -number
    faults = faults_of(run)
    if code not in (0, -number, 128 + number):
        faults.append(f"exit code {code}")
    if started and ("Traceback" in said or "Exception ignored" in said):
        faults.append("a traceback")
    over = before == float("inf")
    return {
        "command": name,
        "signal": signal.Signals(number).name,
        "moment": round(moment, 2),
        "over": over,
        "code": code,
        "seconds_after": 0.0 if over else round(seconds, 2),
        "cpu_seconds_after": 0.0 if over else round(max(0.0, last - before), 2),
        "faults": faults,
        "said": said[-3000:] if faults else "",
    }


def summary(setting: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts by command, and whatever did not end as it should."""
    counts = {}
    for name in dict.fromkeys(row["command"] for row in rows):
        mine = [row for row in rows if row["command"] == name]
        counts[name] = {
            "moments": len(mine),
            "ended_128_plus_signal": sum(row["code"] > 128 for row in mine),
            "ended_before_its_first_line": sum(row["code"] < 0 for row in mine),
            "finished": sum(row["code"] == 0 for row in mine),
            "faults": sum(bool(row["faults"]) for row in mine),
            "longest_cpu_seconds_after": max(row["cpu_seconds_after"] for row in mine),
            "longest_seconds_after": max(row["seconds_after"] for row in mine),
        }
    return {"setting": setting, "counts": counts, "bad": [row for row in rows if row["faults"]]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Send all signals; 0 if every command ended as it should each time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=200, help="moments for each command")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    setting = setting_of("signals", given)
    rng = np.random.default_rng(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="signals-") as folder:
        original, run, log = Path(folder) / "original", Path(folder) / "run", Path(folder) / "log"
        takes = {}
        for name in dict.fromkeys(["train", *options.only]):
            first = signalled(name, original, log, signal.SIGTERM, float("inf"))
            if first["code"] != 0:
                print(f"{name} without a signal failed: {log.read_text()}")
                return 1
            # What the compilation cache saves is seen in the second.
            began = os.times()
            signalled(name, original, log, signal.SIGTERM, float("inf"))
            ended = os.times()
            takes[name] = sum(ended[2:4]) - sum(began[2:4])
        for _ in range(options.moments):
            for name in options.only:
                shutil.rmtree(run, ignore_errors=True)
                if name != "train" or rng.random() < 0.5:
                    shutil.copytree(original, run)
                number = int(rng.choice([signal.SIGINT, signal.SIGTERM]))
                moment = float(rng.uniform(0, takes[name]))
                rows.append(signalled(name, run, log, number, moment))
                if rows[-1]["faults"]:
                    print(json.dumps(rows[-1], indent=1), flush=True)
                write_record(options.output, summary(setting, rows))
    for name, entry in summary(setting, rows)["counts"].items():
        print(f"{name}: {entry}")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
