"""Training steps timed on one machine: processes that share the work, and virtual devices.

Every process is held to one core and sums gradients with the others through gloo, over loopback.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.scaling_programs import low_rank_images, untrained
from benchmarks.scaling_results import read, setting, write
from vlae_jax.parallel.options import DistributedConfig
from vlae_jax.parallel.processes import running
from vlae_jax.runs.config import Config, DataConfig, InferenceConfig, TrainingConfig
from vlae_jax.training.step import Trainer

METHODS = ("vae", "vlae")
SHAPE = (28, 28, 1)
VIRTUAL = (1, 2, 4, 8)
WARM_UP = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `measure`."""
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--batch", type=int, default=64, help="images a process")
    parser.add_argument("--steps", type=int, default=30, help="steps timed")
    parser.add_argument("--processes", type=int, default=2, help="one a core")
    parser.add_argument(
        "--without-virtual", action="store_true", help="leave virtual devices as they are"
    )


def run(options: argparse.Namespace) -> None:
    """Time one process, several apart, several together; and virtual devices."""
    rows = []
    for method in options.methods:
        for kind in ("one process", "several apart", "several together"):
            found = processes(kind, method, options)
            rows.append({"method": method, "kind": kind, "batch": options.batch, **found})
            print(f"{method}, {kind}: {1e3 * found['median_seconds']:.1f} ms a step", flush=True)
    virtual = []
    for method in () if options.without_virtual else options.methods:
        virtual += virtual_devices(method, options)
    part = {
        "setting": setting() | {"cpu": _cpu(), "processes": options.processes},
        "rows": rows,
        "virtual": virtual or read().get("measure", {}).get("virtual", []),
    }
    write("measure", part)


def processes(kind: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start them, wait, and take the slowest."""
    several = 1 if kind == "one process" else options.processes
    joined = several if kind == "several together" else 1
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for index in range(several):
            join = ["--coordinator", f"localhost:{port}"] if joined > 1 else []
            commands.append(
                [
                    *_on_core(index),
                    *_worker(method, options.batch * joined, options.steps, folder, index),
                    *("--processes", str(joined), "--index", str(index if joined > 1 else 0)),
                    *join,
                ]
            )
        _all(commands)
        found = [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(several)]
    seconds = [max(times) for times in zip(*(one["seconds"] for one in found), strict=True)]
    if kind == "several apart":  # nothing holds them in step
        seconds = max((one["seconds"] for one in found), key=statistics.median)
    return {
        "processes": several,
        "median_seconds": statistics.median(seconds),
        "best_seconds": min(seconds),
        "seconds": seconds,
    }


def virtual_devices(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one global batch on 1 to 8 virtual devices of one process, and compare its results."""
    rows: list[dict[str, Any]] = []
    batch = 2 * options.batch
    first = np.zeros(0)
    with tempfile.TemporaryDirectory() as folder:
        for devices in VIRTUAL:
            command = _worker(method, batch, options.steps // 3, folder, devices)
            _all([[*command, "--processes", "1", "--index", "0", "--devices", str(devices)]])
            found = json.loads((Path(folder) / f"{devices}.json").read_text())
            params = np.load(Path(folder) / f"{devices}.npy", allow_pickle=False)
            # The norm: Adam turns a gradient of 0, off by rounding, into a whole step.
            first = params if devices == 1 else first
            difference = float(np.linalg.norm(params - first) / np.linalg.norm(first))
            seconds = statistics.median(found["seconds"])
            rows.append(
                {
                    "method": method,
                    "devices": devices,
                    "batch": batch,
                    "median_seconds": seconds,
                    "difference": difference,
                    "loss": found["loss"],
                }
            )
            print(
                f"{method}, {devices} virtual devices: {1e3 * seconds:.1f} ms a step, parameters "
                f"differ by {difference:.1e} after {WARM_UP} steps",
                flush=True,
            )
    return rows


def _worker(method: str, batch: int, steps: int, folder: str, index: int) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.scaling", "worker", "--method", method]
    return [*command, "--batch", str(batch), "--steps", str(steps), "--output", f"{folder}/{index}"]


def _on_core(core: int) -> Sequence[str]:
    cores = sorted(os.sched_getaffinity(0))
    return ("taskset", "--cpu-list", str(cores[core % len(cores)]))


def _all(commands: Sequence[Sequence[str]]) -> None:
    """Run them at the same time; all must succeed."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a worker failed:\n{output[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return f"{len(os.sched_getaffinity(0))} cores"


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of one process among those that are timed."""
    parser.add_argument("--method", required=True)
    parser.add_argument("--batch", type=int, required=True, help="images of all together")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--coordinator", default=None)
    parser.add_argument("--devices", type=int, default=None)


def work(options: argparse.Namespace) -> None:
    """Time the steps of one process (what `measure` starts)."""
    alone = options.coordinator is None
    place = DistributedConfig(
        coordinator=options.coordinator,
        processes=options.processes,
        process_id=None if alone else options.index,
        devices=options.devices,
    )
    config = Config(
        data=DataConfig(dataset="patterns"),
        inference=InferenceConfig(method=options.method),
        training=TrainingConfig(batch_size=options.batch, epochs=1000),
    )
    with running(place) as placement:
        trained, dataset = untrained(config, low_rank_images(10 * options.batch, SHAPE))
        trainer = Trainer(trained, dataset, placement)
        state, arguments = trainer.init(), trainer.feed.arguments(0)
        for _ in range(WARM_UP):
            state, loss = trainer.step(state, *next(arguments))
        jax.block_until_ready(state)
        params = [np.ravel(leaf) for leaf in jax.tree.leaves(placement.whole(state.params))]
        np.save(f"{options.output}.npy", np.concatenate(params))
        seconds = []
        for _ in range(options.steps):
            began = time.perf_counter()
            state, loss = trainer.step(state, *next(arguments))
            jax.block_until_ready(loss)
            seconds.append(time.perf_counter() - began)
        found = {"seconds": seconds, "loss": float(loss)}
        Path(f"{options.output}.json").write_text(json.dumps(found))
