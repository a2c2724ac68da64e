"""What the studies share: run every variant with every seed, once, and keep a record.

A study is a module with a `STUDY`; `python -m experiments.NAME` runs it. What was measured goes to
`experiments/results/NAME.json`, from which `make report` sets the tables and draws the plots.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PAIRED = ("log_prob", "elbo", "inference_gap")
"""Quantities whose difference to the baseline is taken image by image."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants of `vlae_jax train` that are compared."""

    name: str
    title: str
    variants: Mapping[str, Sequence[str]]
    """Label → options; the first is the baseline that paired differences refer to."""
    common: Sequence[str]
    """Options of all variants, before their own."""
    seeds: Sequence[int] = (0,)
    """Each variant is trained with each."""
    baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Label → the label it is compared with instead."""
    shares: Sequence[str] = ()
    """Shares of images in the table besides those of every study."""
    command: Sequence[str] = ("-m", "vlae_jax", "train")
    """What takes the options, after the Python interpreter."""


def main(study: Study) -> None:
    """Run a study from the command line.

    A run that is finished is not repeated, one that was broken off is resumed. With --jobs each
    run has one CPU core to itself, so that their training times can be compared.
    """
    parser = argparse.ArgumentParser(description=f"Run the study '{study.title}'.")
    parser.add_argument("--data-dir", help="where the images are, if not in the cache")
    parser.add_argument("--folder", type=Path, default=Path("runs") / study.name, help="for runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="+", choices=study.variants, help="these variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=study.seeds, help="these seeds")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    place = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    wanted = [
        (label, seed) for seed in arguments.seeds for label in arguments.only or study.variants
    ]
    writing = threading.Lock()
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for index in range(arguments.jobs):
        cores.put(_core(index) if arguments.jobs > 1 else None)

    def run(label: str, seed: int) -> None:
        core = cores.get()
        try:
            _train(study, arguments.folder, label, seed, place, core)
            with writing:
                collect(study, arguments.folder)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(run, label, seed) for label, seed in wanted]:
            done.result()


def collect(study: Study, folder: Path) -> None:
    """Write down what the finished runs of a study have measured.

    What is on record of runs that are no longer in the folder stays there.
    """
    path = RESULTS / f"{study.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"runs": []}
    on_record = {(run["label"], run["seed"]): run for run in before["runs"]}
    found = {(run["label"], run["seed"]): run for run in _runs(study, folder)}
    for key, run in found.items():
        # Collected again, a run is as old as it was.
        known = on_record.get(key, {})
        if known.get("figures") == run["figures"]:
            run |= {name: known[name] for name in ("date", "hardware")}
    merged = on_record | found
    record = {
        "name": study.name,
        "title": study.title,
        "common": list(study.common),
        "variants": list(study.variants),
        "shares": list(study.shares),
        "runs": [
            merged[label, seed]
            for label in study.variants
            for seed in sorted(seed for other, seed in merged if other == label)
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    unfinished = RESULTS / f".{study.name}.{os.getpid()}"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def _runs(study: Study, folder: Path) -> Iterator[dict[str, Any]]:
    """What is to be recorded of the finished runs in a folder."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for label, options in study.variants.items():
        for path in sorted(folder.glob(f"{_file_name(label)}-seed*")):
            if not (path / "results.json").exists():
                continue
            results = json.loads((path / "results.json").read_text())
            seed = results["run"]["seed"]
            other = study.baselines.get(label, next(iter(study.variants)))
            baseline = folder / f"{_file_name(other)}-seed{seed}"
            yield {
                "label": label,
                "seed": seed,
                "options": list(options),
                "steps": results["run"]["steps"],
                "figures": {
                    figure["name"]: [figure["value"], figure["standard_error"]]
                    for figure in results["figures"]
                },
                "paired": _paired(path, baseline) if path != baseline else {},
                "gaps": _gaps(path),
                "images": results["figures"][0]["images"],
                "samples": results["figures"][0]["samples"],
                "epoch": results["checkpoint"]["epoch"],
                "seconds": results["seconds"]["training"],
                "versions": results["versions"],
                "device": results["device"],
                "date": today,
                "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
                "fingerprint": results["run"]["fingerprint"],
            }


def _gaps(path: Path) -> dict[str, list[float]]:
    """What `vlae_jax gap` measured of a run, if it was asked to."""
    if not (path / "gaps.json").exists():
        return {}
    figures = json.loads((path / "gaps.json").read_text())["figures"]
    return {f["name"]: [f["value"], f["standard_error"], f["images"]] for f in figures}


def _paired(path: Path, baseline: Path) -> dict[str, list[float]]:
    """Mean difference to the baseline over the same test images, with its standard error."""
    if not (baseline / "per_image.npz").exists():
        return {}
    differences = {}
    with np.load(path / "per_image.npz") as mine, np.load(baseline / "per_image.npz") as theirs:
        for name in PAIRED:
            if mine[name].shape == theirs[name].shape:
                values = mine[name].astype(np.float64) - theirs[name]
                error = values.std(ddof=1) / np.sqrt(len(values))
                differences[name] = [float(values.mean()), float(error)]
    return differences


def _train(
    study: Study, folder: Path, label: str, seed: int, place: Sequence[str], core: int | None
) -> None:
    run = folder / f"{_file_name(label)}-seed{seed}"
    if (run / "results.json").exists():
        return
    resume = ["--resume"] if (run / "checkpoints").exists() else ["--overwrite"]
    options = [*study.common, *study.variants[label], "--seed", str(seed), *place, *resume]
    command = [sys.executable, *study.command, "--run-dir", str(run), *options]
    run.parent.mkdir(parents=True, exist_ok=True)
    print(f"{label}, seed {seed}", flush=True)
    with (run.parent / f"{run.name}.log").open("a") as log:
        finished = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
            check=False,
        )
    if finished.returncode:
        raise SystemExit(f"{label}, seed {seed}: failed, see {log.name}")


def _core(index: int) -> int:
    cores = sorted(os.sched_getaffinity(0))
    return cores[index % len(cores)]


def _file_name(label: str) -> str:
    return label.replace(" ", "-").replace("/", "-")
