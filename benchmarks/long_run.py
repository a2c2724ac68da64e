"""Whether a long run stays flat, and whether its log can still be read: 50,000 steps, 1e6 lines.

    python -m benchmarks.long_run

A tiny VAE is trained on digits; memory, open files, threads and the CPU time of a step are noted as
it goes on. Then a run folder gets a log of a million lines, and what reads it is timed. Times are
CPU seconds of the process, so that other load does not count.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import setting_of, write_record

RESULTS = Path(__file__).parent / "results" / "long_run.json"
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Gets the scalars of a run as TensorBoard would, and notes what the process holds."""

    def __init__(self, every: int) -> None:
        self.every, self.rows = every, [now(0)]

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Note a row, every so many steps."""
        if global_step - self.rows[-1]["step"] >= self.every:
            self.rows.append(now(global_step))


def now(step: int) -> dict[str, Any]:
    """What this process holds, and the CPU seconds it has taken."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return {
        "step": step,
        "resident_mb": round(resident / 1e6, 1),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
        "cpu_seconds": round(time.process_time(), 2),
    }


def train(folder: Path, steps: int, every: int) -> list[dict[str, Any]]:
    """Train for so many steps, and return the rows."""
    from vlae_jax import default_config, fit
    from vlae_jax.runs.config import ModelConfig, TrainingConfig
    from vlae_jax.training.loop import FitOptions

    batch = 8
    epochs = -(-steps // (1294 // batch))
    config = dataclasses.replace(
        default_config("digits", "vae"),
        model=ModelConfig(latent=2, hidden=(8,)),
        training=TrainingConfig(epochs=epochs, batch_size=batch),
    )
    watch = Watch(every)
    fit(config, "digits", run_dir=folder, options=FitOptions(writer=watch))
    return watch.rows


def growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What changed between the second and the last tenth of a run, whose first tenth warms up."""
    tenth = len(rows) // 10
    early, late = rows[tenth : 2 * tenth + 1], rows[-tenth - 1 :]

    def mean(part: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([row[name] for row in part]))

    def step_ms(part: list[dict[str, Any]]) -> float:
        first, last = part[0], part[-1]
        cpu = last["cpu_seconds"] - first["cpu_seconds"]
        return round(1e3 * cpu / (last["step"] - first["step"]), 3)

    names = ("resident_mb", "open_files", "threads", "python_threads")
    changes = {name: [round(mean(part, name), 1) for part in (early, late)] for name in names}
    return {**changes, "cpu_ms_a_step": [step_ms(early), step_ms(late)]}


def timed(action: Callable[[], object]) -> float:
    """CPU seconds of this process for an action."""
    began = time.process_time()
    action()
    return round(time.process_time() - began, 2)


def read_log(folder: Path, lines: int) -> dict[str, float]:
    """Give a run a log of so many lines, and time what reads it: CPU seconds."""
    from vlae_jax.report import write_report
    from vlae_jax.runs.folder import RunFolder

    run = RunFolder(folder)
    records = run.read_metrics()
    with run.metrics.open("w") as file:
        for number in range(lines):
            record = records[number % len(records)]
            file.write(json.dumps({**record, "step": number + 1, "epoch": number / 100}) + "\n")
    megabytes = run.metrics.stat().st_size / 1e6
    return {
        "megabytes": round(megabytes, 1),
        "read_metrics": timed(run.read_metrics),
        "drop_metrics_after": timed(lambda: run.drop_metrics_after(lines)),
        "report": timed(lambda: write_report([run.path])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=500, help="steps between two rows")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory(prefix="long-") as folder:
        run = Path(folder) / "run"
        rows = train(run, options.steps, options.every)
        found = {
            "setting": setting_of("long_run", given),
            "early_and_late": growth(rows),
            "log_cpu_seconds": read_log(run, options.lines),
            "rows": rows,
        }
    write_record(options.output, found)
    print(json.dumps({name: found[name] for name in ("early_and_late", "log_cpu_seconds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
