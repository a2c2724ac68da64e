"""Damaged and foreign files in a run folder: named in one line, or without effect.

    python -m benchmarks.damage --random 10000 --seed 0

A small run is made. Then every byte of each of its text files is changed, and the file is cut
there; random changes hit all files, checkpoints among them; and values of a foreign kind take the
place of each value in the JSON files. Each time all readers read the folder, in this process: the
configuration, the records from which reports and tables are made, the model, and the state from
which a run resumes. Either a `UserError` of one line names the file, or all they read is as before;
what has been cut off the end of a log may be missing. Anything else is a fault.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from vlae_jax.analysis.evaluation import describe, evaluate
from vlae_jax.analysis.snapshots import take_snapshots
from vlae_jax.errors import Unreadable, UserError
from vlae_jax.models.saved import arrays_of, load
from vlae_jax.report import page
from vlae_jax.report.table import print_runs
from vlae_jax.runs import checkpoints as store
from vlae_jax.runs.config import Config, EvaluationConfig, InferenceConfig, ModelConfig
from vlae_jax.runs.config import TrainingConfig as Training
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.records import Run, read_run
from vlae_jax.runs.storage import read_json
from vlae_jax.training.loop import FitOptions, fit

Verdict = Literal["named", "harmless", "earlier", "FAULT"]
FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 10**400, 1.5, -1e300, float("inf"), "", "x", "\ud800", "a\0b"),
    *("<script>alert(1)</script>", "ä" * 500, [], {}, [[]], [None], {"": None}),
)
"""Values that JSON can hold in place of another."""


def make_run(folder: Path) -> RunFolder:
    """A small evaluated run with every file that a run can have."""
    rng = np.random.default_rng(0)
    rows = {f"x_{part}": rng.normal(size=(n, 3)) for part, n in (("train", 24), ("test", 4))}
    config = Config(
        model=ModelConfig(latent=1, hidden=(2,)),
        inference=InferenceConfig(method="vae"),
        training=Training(epochs=2, batch_size=8),
        evaluation=EvaluationConfig(4, "posterior", chunk_size=4),
    )
    run = RunFolder(folder)
    with _silence():
        options = FitOptions(log_every=1, checkpoint_every=1)
        trained = fit(config, rows, run_dir=folder, options=options)
        metrics, per_image = evaluate(trained, rows["x_test"])
        described = describe(trained, metrics, seconds={"evaluation": 1.0})
        run.write_results(described)
        run.write_gaps({**described, "settings": {}})
        run.write_per_image(per_image)
        run.write_snapshots(take_snapshots(trained, rows["x_test"]))
    return run


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        yield said


class Reader:
    """Everything that is read of a run folder, and the comparison with what it was."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        store._PAUSES = ()  # type: ignore[assignment]  # what cannot be read now will not be readable later
        self.records = read_run(run.path)
        self.config, self.best = run.read_config(), run.best_step()
        with _silence():
            self.wanted = {"model": arrays_of(load(run.path))}
            self.restored = self._restored()

    def judge(self, changed: Path) -> tuple[Verdict, str]:
        """The verdict on the folder with one changed file, and what was said."""
        try:
            in_checkpoint = self.run.checkpoints in changed.parents
            return self._of_checkpoint(changed) if in_checkpoint else self._of_record(changed)
        except (UserError, Unreadable) as error:
            line = str(error)
            named = "\n" not in line and (changed.name in line or str(self.run.path) in line)
            return ("named" if named else "FAULT"), line
        except Exception:
            return "FAULT", traceback.format_exc()

    def _of_record(self, changed: Path) -> tuple[Verdict, str]:
        found = read_run(self.run.path)
        config, best = self.run.read_config(), self.run.best_step()
        if config != self.config:
            return "FAULT", f"another configuration: {config.differences(self.config)}"
        if changed == self.run.metrics:
            # Where the name of a seal is damaged, it stays as an entry without a meaning.
            same = all(
                new | old == new for new, old in zip(found.log, self.records.log, strict=False)
            )
            if same and len(found.log) == len(self.records.log) and best == self.best:
                return "harmless", ""
            return ("earlier", "") if same else ("FAULT", f"another log: {found.log}")
        if not changed.exists() and changed != self.run.path / "config.json":
            return "earlier", ""
        return ("harmless", "") if self._equal(found) else ("FAULT", f"other figures: {found}")

    def _equal(self, found: Run) -> bool:
        for field in dataclasses.fields(Run):
            before, after = getattr(self.records, field.name), getattr(found, field.name)
            if isinstance(before, dict):
                for name, value in before.items():
                    again = None if after is None else after.get(name)
                    if not _alike(value, again):
                        return False
            elif before != after:
                return False
        return True

    def _restored(self) -> tuple[int, Any, list[Any]]:
        """What `load` makes a model of: step, description and arrays of the best checkpoint."""
        checkpoints = store.Checkpoints(self.run.checkpoints, read_only=True)
        restored = checkpoints.restore_best(lambda info: self.wanted)
        for line in restored.damaged:
            print(line, file=sys.stderr)
        return restored.step, restored.info, jax.tree.leaves(restored.trees)

    def _of_checkpoint(self, changed: Path) -> tuple[Verdict, str]:
        with _silence() as said:
            found = self._restored()
        line = said.getvalue().strip()
        if "is damaged" in line and "\n" not in line:
            return "named", line
        same = found[:2] == self.restored[:2] and all(map(_alike, found[2], self.restored[2]))
        return ("harmless", "") if same and not line else ("FAULT", f"another model; {line}")


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, also where they are arrays with NaN."""
    if isinstance(one, np.ndarray) and one.dtype.kind == "f" and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    return np.array_equal(one, other)


Change = tuple[str, Path, bytes | None]
"""Its name, the file, and its new content; None where the file is gone."""


def every_byte(run: RunFolder, rng: np.random.Generator) -> Iterator[Change]:
    """Each byte of the text files changed to a random other one, and the file cut before it."""
    for path in (run.path / "config.json", run.metrics, run.results, run.gaps):
        content = path.read_bytes()
        for place, byte in enumerate(content):
            other = bytes([(byte + int(rng.integers(1, 256))) % 256])
            yield "a byte", path, content[:place] + other + content[place + 1 :]
            yield "cut", path, content[:place]


def at_random(run: RunFolder, count: int, rng: np.random.Generator) -> Iterator[Change]:
    """Random changes of all files."""
    files = sorted(
        p
        for p in run.path.rglob("*")
        if p.is_file() and p.suffix in ("", ".json", ".jsonl", ".npz")
    )
    files = [path for path in files if path.name != ".lock"]
    contents = {path: path.read_bytes() for path in files}
    for _ in range(count):
        path = files[rng.integers(len(files))]
        content = bytearray(contents[path])
        kind = rng.integers(8)
        place = int(rng.integers(len(content) + 1))
        if kind == 0:
            yield "gone", path, None
        elif kind == 1:
            yield "empty", path, b""
        elif kind == 2:
            yield "cut", path, bytes(content[:place])
        elif kind == 3:
            yield "longer", path, bytes(content) + rng.bytes(int(rng.integers(1, 50)))
        elif kind == 4:
            yield "block of zeros", path, bytes(content[:place]) + bytes(len(content) - place)
        elif kind == 5:
            other = contents[files[rng.integers(len(files))]]
            yield "another file's", path, other
        else:
            for _ in range(int(rng.integers(1, 5))):
                if content:
                    at = int(rng.integers(len(content)))
                    content[at] = int(rng.integers(256))
            yield "bytes", path, bytes(content)


def foreign(run: RunFolder) -> Iterator[Change]:
    """Each value in the JSON files replaced by one of each foreign kind, without a seal."""
    for path in (run.path / "config.json", run.results, run.gaps):
        yield from _replaced(path, read_json(path), lambda content: json.dumps(content).encode())
    lines = run.read_metrics()
    for index in (0, len(lines) - 1):

        def text(line: Any, index: int = index) -> bytes:
            changed = [*lines[:index], line, *lines[index + 1 :]]
            return b"".join(json.dumps(each).encode() + b"\n" for each in changed)

        yield from _replaced(run.metrics, lines[index], text)


def _replaced(path: Path, content: Any, text: Callable[[Any], bytes]) -> Iterator[Change]:
    for place in _places(content):
        for value in FOREIGN:
            yield (
                f"foreign {'.'.join(map(str, place))}={value!r:.40}",
                path,
                text(_with(content, place, value)),
            )


def _places(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _places(value, (*before, key))


def _with(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = _with(content[place[0]], place[1:], value)
    return copy


def read_foreign(run: RunFolder, changed: Path) -> tuple[Verdict, str]:
    """Whether tables and page of a run can be made, or a line names its file."""
    try:
        with contextlib.suppress(UserError):
            run.read_config()
        record = read_run(run.path)
        print_runs([record], Console(file=io.StringIO(), width=200))
        page._page(record.name, [page._section(record, [])])
        page.sort_runs([record])
    except UserError as error:
        line = str(error)
        named = "\n" not in line and changed.name in line
        return ("named" if named else "FAULT"), line
    except Exception:
        return "FAULT", traceback.format_exc()
    return "harmless", ""


def sweep(
    changes: Iterator[Change],
    judge: Callable[[Path], tuple[Verdict, str]],
    minutes: float = float("inf"),
) -> tuple[collections.Counter[str], list[str]]:
    """Judge each change, and undo it; counts of the verdicts, and the faults."""
    tally: collections.Counter[str] = collections.Counter()
    faults, end = [], time.monotonic() + 60 * minutes
    for kind, path, content in changes:
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        verdict, line = judge(path)
        path.write_bytes(before)
        tally[verdict] += 1
        if verdict == "FAULT":
            faults.append(f"{path.name}, {kind}: {line}")
        if time.monotonic() > end:
            break
    return tally, faults


def main() -> None:
    """Run all sweeps and print their counts."""
    parser = argparse.ArgumentParser(description="Damaged and foreign files.")
    parser.add_argument("--random", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each sweep")
    parser.add_argument("--sweeps", nargs="*", default=["bytes", "foreign", "random"])
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run")
        reader = Reader(run)
        all_sweeps: dict[str, Any] = {
            "bytes": lambda: sweep(every_byte(run, rng), reader.judge, arguments.minutes),
            "foreign": lambda: sweep(
                foreign(run), lambda path: read_foreign(run, path), arguments.minutes
            ),
            "random": lambda: sweep(
                at_random(run, arguments.random, rng), reader.judge, arguments.minutes
            ),
        }
        failed = False
        for name in arguments.sweeps:
            tally, faults = all_sweeps[name]()
            print(f"{name}: {sum(tally.values())} changes, {dict(tally)}", flush=True)
            for fault in {fault.strip().splitlines()[-1]: fault for fault in faults}.values():
                print(f"FAULT {fault[:200]} ... {fault[-1500:]}", flush=True)
            failed |= bool(faults)
        shutil.rmtree(run.path)
    sys.exit(failed)


if __name__ == "__main__":
    main()
