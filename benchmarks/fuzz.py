"""Random configurations, through both ways in: each trains and is evaluated, or is refused.

    python -m benchmarks.fuzz --count 2000 --seed 0

A configuration changes a few options of `vlae_jax train`, all of which are found by their types, to
values inside and outside their ranges, for tiny data of some kind. It goes in as words of the
command line, or as a `Config` in Python. Then it trains for an epoch of two steps, is saved, loaded
and evaluated; or one line says why not. A failure is a traceback, a model that changes as it is
saved and loaded, or a number that is not finite and that no flag tells of.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from vlae_jax.analysis.evaluation import evaluate
from vlae_jax.commands.main import main, parse
from vlae_jax.commands.train import Train
from vlae_jax.data.supplied import as_dataset
from vlae_jax.errors import RunFailure, UserError
from vlae_jax.models.saved import load
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.likelihoods import LIKELIHOODS
from vlae_jax.runs.methods import METHODS
from vlae_jax.training.loop import fit

Way = Literal["python", "parsed", "commands"]
_ROWS, _TEST_ROWS = 20, 4
_BASE: dict[str, Any] = {
    "data.validation_fraction": 0.2,
    "model.latent": 2,
    "model.hidden": (4,),
    "model.channels": (2,),
    "model.prior_components": 2,
    "inference.method": "vae",
    "inference.steps": 1,
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.learning_rate": 1e-3,
    "evaluation.importance_samples": 4,
    "evaluation.proposal": "posterior",
    "evaluation.chunk_size": 4,
    "evaluation.evaluation_batch": 2,
    "evaluation.test_images": 2,
}
"""What keeps a configuration tiny."""
_LINEAR: dict[str, Any] = {"model.hidden": (), "training.epochs": 0}
_COUNTS = (1, 2, 3, 0, -1, 2**31 - 1, 2**31, 2**40)
_NUMBERS = (1.0, 0.5, 0.01, 2.5, 0.0, -1.0, 1e-30, 1e30, math.inf, math.nan)
_VALUES: dict[str, tuple[Any, ...]] = {
    "data.levels": (256, 2, 17, 1, 257),
    "data.validation_fraction": (0.1, 0.2, 0.5, 0.9, 0.001, 0.999, 0.0, 1.0, math.nan),
    "data.logit_lambda": (1e-6, 1e-3, 0.1, 0.49, 1e-30, 0.5, 0.0, math.nan),
    "data.stream": (False, False, True),
    "data.resize": ((4, 4), (0, 3)),
    "model.latent": (1, 2, 3, 5, 0, -1, 2**31),
    "model.prior_components": (1, 2, 3, 0, -2),
    "model.channels": ((2,), (2, 3), (1,), (), (0,), (2, 2, 2, 2)),
    "model.hidden": ((4,), (4, 3), (), (1,), (0,), (-3, 2)),
    "model.student_df": (5.0, 1.0, 0.3, 30.0, 1e-30, 1e30, 0.0, math.inf),
    "model.min_std": (1e-3, 0.1, 1.0, 1e-30, 1e30, 0.0, -1.0, math.nan),
    "inference.method": (*METHODS, *METHODS, "vlea"),
    "inference.steps": (0, 1, 2, 3, -1, 2**31),
    "inference.refine_steps": (1, 2, 0, 2**31),
    "inference.refine_samples": (2, 4, 3, 0, -2),
    "inference.flow_width": (None, 2, 4, 1, 0),
    "training.epochs": (1, 1, 2, 0, -1),
    "training.pretrain": (0, 1, "auto", -1, 5, "often"),
    "training.init_from": (None, "/nonexistent"),
    "training.minutes": (None, 1.0, 1e-9, 0.0, -1.0, math.nan),
    "training.batch_size": (8, 4, 16, 1, 3, 17, 0, -8, 2**31),
    "training.microbatches": (None, 1, 2, 4, 3, 0, 2**31),
    "training.warmup_steps": (0, 1, 5, -1, 2**31 - 1),
    "training.train_samples": (1, 2, 3, 0, -1),
    "training.seed": (0, 1, 2**32 - 1, 2**32, -1),
    "evaluation.importance_samples": (1, 2, 4, 30, 0, -1, 2**31),
    "evaluation.chunk_size": (1, 3, 4, 50, 0, 2**31),
    "evaluation.test_images": (None, 1, 2, 4, 5, 0),
    "evaluation.evaluation_batch": (1, 2, 3, 50, 0, 2**31),
    "evaluation.proposal": ("posterior", "posterior", "widened", "student_t", "auto", "best"),
}
"""Values of options whose type alone says too little; all others take those of their type."""
_FOREIGN: tuple[Any, ...] = ("3", 1.5, None, True, (1, 2), {}, "")
"""Values of types that only Python can give."""
_WAYS: tuple[Way, ...] = ("python", "parsed", "python", "parsed", "python", "parsed", "commands")
_FIXED = ("data.dataset", "data.data_dir")


class Case(NamedTuple):
    """One configuration and the way it goes in."""

    kind: str
    """A key of `KINDS`."""
    way: Way
    """python: as a `Config`. parsed: as words, from which the command line makes a `Config`.
    commands: as words to `train` and `evaluate`."""
    options: dict[str, Any]
    """The values of options by their names with sections."""


class Outcome(NamedTuple):
    """What became of a case."""

    what: Literal["trained", "refused", "failed", "FAULT"]
    """failed: training was not finite, and one line says so."""
    line: str = ""


def _tables(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    level = rng.normal(size=(rows, 1))
    normal = level + 0.5 * rng.normal(size=(rows, 4))
    counts = rng.poisson(np.exp(normal)).astype(float)
    binary = (normal > 0).astype(float)
    classes = rng.integers(0, 3, (rows, 4)).astype(float)
    gaps = np.where(rng.random((rows, 4)) < 0.2, np.nan, normal)
    return {
        "table": normal,
        "table with gaps": gaps,
        "units": normal * [1e-6, 1.0, 1e6, 1.0] + [0.0, 100.0, 0.0, -5.0],
        "counts": counts,
        "counts with gaps": np.where(np.isnan(gaps), np.nan, counts),
        "binary": binary,
        "classes": classes,
        "mixed": np.stack([counts[:, 0], normal[:, 1], binary[:, 2], classes[:, 3]], axis=1),
        "constant": np.ones((rows, 3)),
    }


def _images(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    gray = rng.integers(0, 256, (rows, 4, 4, 1), np.uint8)
    floats = rng.normal(size=(rows, 4, 3, 1)).astype(np.float32)
    return {
        "gray": gray,
        "color": rng.integers(0, 256, (rows, 4, 3, 3), np.uint8),
        "flat": (gray[:, :1, :2] > 99).astype(np.uint8),
        "black and white": 255 * (gray > 127).astype(np.uint8),
        "floats": floats,
        "floats with gaps": np.where(rng.random(floats.shape) < 0.1, np.nan, floats),
        "one pixel": gray[:, :1, :1],
    }


@functools.cache
def data() -> dict[str, dict[str, np.ndarray]]:
    """Training and test examples of each kind."""
    rng = np.random.default_rng(0)
    train, test = ({**_tables(n, rng), **_images(n, rng)} for n in (_ROWS, _TEST_ROWS))
    return {kind: {"x_train": train[kind], "x_test": test[kind]} for kind in train}


KINDS = tuple(data())


def options() -> dict[str, Any]:
    """All options of a configuration, by name with section, and their types."""
    sections = typing.get_type_hints(Config)
    return {
        f"{section}.{name}": hint
        for section, cls in sections.items()
        if dataclasses.is_dataclass(cls)
        for name, hint in typing.get_type_hints(cls).items()
        if not name.startswith("_") and f"{section}.{name}" not in _FIXED
    }


def _values(name: str, hint: Any) -> tuple[Any, ...]:
    if name in _VALUES:
        return _VALUES[name]
    if typing.get_origin(hint) is Literal:
        return (*typing.get_args(hint), *typing.get_args(hint), "none such")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        return tuple(v for part in parts if part is not type(None) for v in _values("", part)) + (
            (None,) if type(None) in parts else ()
        )
    return {bool: (True, False), int: _COUNTS, float: _NUMBERS}[hint]


def _likelihoods(kind: str) -> st.SearchStrategy[str]:
    width = int(np.prod(data()[kind]["x_train"].shape[1:]))
    several = st.sampled_from(
        [
            f"poisson:1,gaussian:{width - 1}",
            "poisson:1,gaussian:1,bernoulli:1,categorical:1",
            "negative_binomial:1,student_t:1,bernoulli:1,categorical:1",
            "gaussian:1,gaussian:1",
            "poisson:a+b,gaussian",
            "gaussian:999999999999",
            "gaussian,,",
        ]
    )
    return st.one_of(st.sampled_from(["auto", *LIKELIHOODS, "gausian"]), several)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Configurations that differ in a few options from one that trains."""
    kind = draw(st.sampled_from(KINDS))
    way = draw(st.sampled_from(_WAYS))
    hints = options()
    method = draw(st.sampled_from(_VALUES["inference.method"]))
    chosen: dict[str, Any] = {**_BASE, "inference.method": method}
    if method in METHODS and METHODS[method].fit is not None:
        chosen |= {**_LINEAR, "model.variance": METHODS[method].variance}
    if draw(st.booleans()):
        chosen["model.likelihood"] = draw(_likelihoods(kind))
    for name in draw(st.lists(st.sampled_from(sorted(hints)), max_size=6, unique=True)):
        if name != "model.likelihood":
            chosen[name] = draw(st.sampled_from(_values(name, hints[name])))
            if way == "python" and draw(st.integers(0, 9)) == 0:
                chosen[name] = draw(st.sampled_from(_FOREIGN))
    return Case(kind, way, chosen)


def as_words(given: Mapping[str, Any]) -> list[str]:
    """The options as words of the command line; those that are None are left out."""
    words: list[str] = []
    for name, value in given.items():
        option = "--" + name.partition(".")[2].replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        elif value is not None:
            words.append(f"{option}={value}")
    return words


def as_config(given: Mapping[str, Any]) -> Config:
    """The options as they are set in Python."""
    config = Config()
    sections: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, value in given.items():
        section, _, field = name.partition(".")
        sections[section][field] = value
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **changed)


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        yield said


def try_out(case: Case, folder: Path) -> Outcome:
    """Train, save, load and evaluate one case in an empty folder."""
    try:
        with _silence() as said:
            if case.way == "commands":
                return _by_commands(case, folder, said)
            if case.way == "parsed":
                config = _parsed(case, said)
                if config is None:
                    return _refused(said)
            else:
                config = as_config(case.options)
            return _by_functions(case, config, folder)
    except UserError as error:
        return _one_line("refused", str(error))
    except RunFailure as error:
        return _one_line("failed", str(error))
    except Exception:
        return Outcome("FAULT", traceback.format_exc())


def _one_line(what: Literal["refused", "failed"], line: str) -> Outcome:
    return Outcome(what, line) if line and "\n" not in line else Outcome("FAULT", line)


def _refused(said: io.StringIO) -> Outcome:
    """What a command said that exited with code 2."""
    text = said.getvalue()
    if "Traceback" in text or not text.strip():
        return Outcome("FAULT", text)
    return Outcome("refused", text.strip().splitlines()[-1])


def _parsed(case: Case, said: io.StringIO) -> Config | None:
    try:
        command = parse(["train", *as_words(case.options)])
    except SystemExit as stop:
        if stop.code != 2:
            raise RuntimeError(said.getvalue()) from None
        return None
    assert isinstance(command, Train)
    return command.config


def _by_functions(case: Case, config: Config, folder: Path) -> Outcome:
    trained = fit(config, data()[case.kind], run_dir=folder / "run")
    loaded = load(folder / "run")
    assert loaded.config == trained.config
    arrays = (jax.tree.leaves((m.params, m.preprocessor)) for m in (trained, loaded))
    for before, after in zip(*arrays, strict=True):
        np.testing.assert_array_equal(before, after)
    images = as_dataset(data()[case.kind], config.data).first_test_images(
        config.evaluation.test_images
    )
    metrics, per_image = evaluate(loaded, images)
    return _judged({metric.name: metric.value for metric in metrics}, per_image)


def _by_commands(case: Case, folder: Path, said: io.StringIO) -> Outcome:
    np.savez(folder / "mine.npz", **data()[case.kind])  # type: ignore[arg-type]
    given = ["--dataset=mine", f"--data-dir={folder}", f"--run-dir={folder / 'run'}"]
    for words in (["train", *as_words(case.options), *given], ["evaluate", str(folder / "run")]):
        try:
            main(words)
        except SystemExit as stop:
            if stop.code == 2 and words[0] == "train":
                assert not (folder / "run" / "checkpoints").exists(), "refused late"
                return _refused(said)
            if stop.code == 1:
                return Outcome("failed", said.getvalue().strip().splitlines()[-1])
            return Outcome("FAULT", f"{words[0]} ended with {stop.code}: {said.getvalue()}")
    run = RunFolder(folder / "run")
    metrics = json.loads(run.results.read_text())["metrics"]
    with np.load(run.per_image, allow_pickle=False) as arrays:
        return _judged({m["name"]: m["value"] for m in metrics}, dict(arrays))


def _judged(metrics: Mapping[str, float | None], values: Mapping[str, np.ndarray]) -> Outcome:
    """A number that is not finite must be told of by a flag."""
    lost = ~np.isfinite(values["log_prob"])
    if lost.any():
        share = metrics["not_finite"] or 0.0
        flagged = math.isclose(share, lost.mean(), rel_tol=1e-6)
        return Outcome("trained", "flagged") if flagged else Outcome("FAULT", f"{share=}, {lost}")
    for name in ("elbo", "kl", "log_det", "inference_gap", "ess"):
        if not np.isfinite(values[name]).all():
            return Outcome("FAULT", f"{name} is {values[name]}, and log_prob {values['log_prob']}")
    return Outcome("trained")


def main_program() -> None:
    """Try random cases until the count or the time is over, and print what became of them."""
    parser = argparse.ArgumentParser(description="Random configurations.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    arguments = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    faults: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + 60 * arguments.minutes

    @seeded(arguments.seed)
    @settings(
        max_examples=arguments.count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def go(case: Case) -> None:
        if time.monotonic() > end:
            raise KeyboardInterrupt  # the one exception that hypothesis does not try again
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_out(case, Path(folder))
        tally[
            f"{case.way} {outcome.what}{' ' + outcome.line if outcome.line == 'flagged' else ''}"
        ] += 1
        if outcome.what == "FAULT":
            changed = {k: v for k, v in case.options.items() if _BASE.get(k, "?") != v}
            last = outcome.line.strip().splitlines()[-1]
            faults[last] += 1
            print(f"FAULT {case.kind}, {case.way}, {changed}\n{outcome.line}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        go()
    print(f"{sum(tally.values())} configurations: {dict(sorted(tally.items()))}")
    for line, count in faults.most_common():
        print(f"{count:5d} {line}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main_program()
