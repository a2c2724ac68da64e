"""Running a study: every variant with every seed, once, and a record of the results.

The record is `experiments/results/NAME.json`; `make report` sets the tables of it and draws the
plots.
"""

import concurrent.futures
import datetime
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.studies import STUDIES, Study
from vlae_jax.report.groups import paired_difference
from vlae_jax.runs.records import Run, read_run

RESULTS = Path(__file__).parent / "results"
PAIRED = ("log_prob", "elbo", "inference_gap")
"""Quantities whose difference to the baseline is taken image by image."""


def run_study(
    name: str,
    folder: Path,
    *,
    labels: Sequence[str] = (),
    seeds: Sequence[int] = (),
    data_dir: str | None = None,
    jobs: int = 1,
) -> None:
    """Train the variants of a study with their seeds, and record the finished runs.

    A finished run is not repeated, and an interrupted one is resumed. With several jobs each run
    has one CPU core to itself, so that training times can be compared.

    Args:
        name: A key of `STUDIES`.
        folder: For the run folders.
        labels: Variants to train; all of them if none is named.
        seeds: Seeds to train with; those of the study if none is named.
        data_dir: Folder with the images, if they are not in the cache.
        jobs: Number of runs at a time.
    """
    study = STUDIES[name]
    place = ["--data-dir", data_dir] if data_dir else []
    wanted = [(label, seed) for seed in seeds or study.seeds for label in labels or study.variants]
    writing = threading.Lock()
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for index in range(jobs):
        cores.put(_core(index) if jobs > 1 else None)

    def run(label: str, seed: int) -> None:
        core = cores.get()
        try:
            _train(study, folder, label, seed, place, core)
            with writing:
                collect(name, folder)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(run, label, seed) for label, seed in wanted]:
            done.result()


def collect(name: str, folder: Path) -> None:
    """Record the results of the finished runs of a study.

    The record keeps the results of runs that are no longer in the folder.
    """
    study, path = STUDIES[name], RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"runs": []}
    on_record = {(run["label"], run["seed"]): run for run in before["runs"]}
    found = {(run["label"], run["seed"]): run for run in _runs(study, folder)}
    for place, run in found.items():
        # A run that is collected again keeps its date.
        known = on_record.get(place, {})
        if known.get("metrics") == run["metrics"]:
            run |= {key: known[key] for key in ("date", "hardware")}
    merged = on_record | found
    record = {
        "name": name,
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
    unfinished = RESULTS / f".{name}.{os.getpid()}"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def _runs(study: Study, folder: Path) -> Iterator[dict[str, Any]]:
    """The records of the finished runs in a folder."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for label, options in study.variants.items():
        for path in sorted(folder.glob(f"{file_name(label)}-seed*")):
            if not (path / "results.json").exists():
                continue
            run = read_run(path)
            results = run.results or {}
            other = study.baselines.get(label, next(iter(study.variants)))
            baseline = folder / f"{file_name(other)}-seed{run.seed}"
            yield {
                "label": label,
                "seed": run.seed,
                "options": list(options),
                "steps": run.steps,
                "metrics": {
                    m["name"]: [m["value"], m["standard_error"]] for m in results["metrics"]
                },
                "paired": _paired(run, baseline) if path != baseline else {},
                "gaps": {
                    m["name"]: [m["value"], m["standard_error"], m["images"]]
                    for m in (run.gaps or {}).get("metrics", [])
                },
                "images": results["metrics"][0]["images"],
                "samples": results["metrics"][0]["samples"],
                "epoch": results["checkpoint"]["epoch"],
                "seconds": results["seconds"]["training"],
                "versions": results["versions"],
                "device": results["device"],
                "date": today,
                "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
                "fingerprint": run.fingerprint,
            }


def _paired(run: Run, baseline: Path) -> dict[str, list[float]]:
    """Mean difference to the baseline over the same test images, with its standard error."""
    if not (baseline / "per_image.npz").exists():
        return {}
    other = read_run(baseline)
    found = {name: paired_difference(run, other, name) for name in PAIRED}
    return {name: [d.mean, d.standard_error] for name, d in found.items() if d is not None}


def _train(
    study: Study, folder: Path, label: str, seed: int, place: Sequence[str], core: int | None
) -> None:
    run = folder / f"{file_name(label)}-seed{seed}"
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


def file_name(label: str) -> str:
    """The name of a variant as that of its run folders."""
    return label.replace(" ", "-").replace("/", "-")
