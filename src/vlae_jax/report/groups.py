"""Runs put in order for comparison: by data, by configuration, seed by seed."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlae_jax.report.style import FAINT, MARKERS, shade
from vlae_jax.runs.methods import METHODS
from vlae_jax.runs.records import Run, number

# Settings that may differ between runs of one configuration: the place of the data and the amount
# of work done at once change no metric.
_FREE = {"training.seed", "data.data_dir", "evaluation.evaluation_batch", "evaluation.chunk_size"}
# Settings that every label names.
_SAID = {"inference.method", "inference.steps", "training.objective", "training.train_samples"}
_DATA = ("dataset", "preprocess", "logit_lambda", "standardize")


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """Runs that differ in their seed alone, with their label, color and marker in pictures."""

    label: str
    runs: list[Run]
    """In the order of their seeds; of two with one seed the first."""
    color: str
    marker: str

    @property
    def first(self) -> Run:
        """The run of the lowest seed."""
        return self.runs[0]

    def values(self, name: str) -> list[tuple[float, float]]:
        """A test metric of each seed with its standard error over images, where it is finite."""
        metrics = [run.gap if name == "inference_gap" else run.metric(name) for run in self.runs]
        pairs = [(number(m.get("value")), number(m.get("standard_error"))) for m in metrics if m]
        return [pair for pair in pairs if math.isfinite(pair[0])]


class Problem(NamedTuple):
    """Configurations whose metrics may be compared: they model the same images alike."""

    title: str
    configurations: list[Configuration]

    @property
    def runs(self) -> list[Run]:
        """The runs of all configurations."""
        return [run for configuration in self.configurations for run in configuration.runs]


class Difference(NamedTuple):
    """A metric of one run less that of another on the same test images, in nats."""

    mean: float
    standard_error: float
    """Over images."""
    images: int


def sort_runs(runs: Iterable[Run]) -> list[Problem]:
    """Group runs by data and preprocessing, in order of appearance, and by configuration.

    Systems come in one order always, their T ascending. Configurations with the same system and T
    are told apart by the settings in which they differ.
    """
    problems: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.setting("data", name) for name in _DATA])
        problems.setdefault(key, []).append(run)
    names = [members[0].dataset for members in problems.values()]
    titles: list[str] = []
    for members, name in zip(problems.values(), names, strict=True):
        title = name
        if names.count(name) > 1:
            title = f"{name} {members[0].setting('data', 'preprocess') or '?'}"
        # Other settings of the data may differ as well.
        same = sum(other == title or other.startswith(f"{title} #") for other in titles)
        titles.append(f"{title} #{same + 1}" if same else title)
    return [
        Problem(title, _configurations(members))
        for title, members in zip(titles, problems.values(), strict=True)
    ]


def _configurations(runs: Sequence[Run]) -> list[Configuration]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    members = sorted(groups.values(), key=lambda group: _order(group[0]))
    return [
        Configuration(
            _label(group[0], [other[0] for other in members]),
            _one_a_seed(group),
            _color(group[0], runs),
            _marker(group[0], [other[0] for other in members]),
        )
        for group in members
    ]


def _identity(run: Run) -> dict[str, Any]:
    settings = {
        f"{section}.{name}": value
        for section, values in run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if f"{section}.{name}" not in _FREE
    }
    if run.steps is None:
        settings.pop("inference.steps", None)
    return settings


def _order(run: Run) -> tuple[Any, ...]:
    known = list(METHODS)
    place = known.index(run.method) if run.method in known else len(known)
    return place, run.method, run.label, run.steps or 0, json.dumps(_identity(run), default=str)


def _label(run: Run, others: Sequence[Run]) -> str:
    alike = [_identity(other) for other in others if other.system == run.system]
    names = sorted({name for identity in alike for name in identity} - _SAID)
    differing = [name for name in names if len({str(each.get(name)) for each in alike}) > 1]
    mine = _identity(run)
    words = [f"{name.split('.')[1]} {mine.get(name)}".replace("_", " ") for name in differing]
    return run.system + (f" ({', '.join(words)})" if words else "")


def _one_a_seed(runs: Sequence[Run]) -> list[Run]:
    seeds: dict[str, Run] = {}
    for run in runs:
        seeds.setdefault(str(run.seed), run)
    return sorted(seeds.values(), key=lambda run: (number(run.seed, math.inf), str(run.seed)))


def _color(run: Run, runs: Sequence[Run]) -> str:
    counts = sorted({other.steps or 0 for other in runs if other.method == run.method})
    strengths = np.linspace(0.45 if len(counts) > 1 else 1.0, 1.0, len(counts))
    color = METHODS[run.method].color if run.method in METHODS else FAINT
    return shade(color, float(strengths[counts.index(run.steps or 0)]))


def _marker(run: Run, others: Sequence[Run]) -> str:
    alike = [other for other in others if (other.method, other.steps) == (run.method, run.steps)]
    return MARKERS[alike.index(run) % len(MARKERS)]


def baseline_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The plain VAE with the same seed, of several the one whose configuration is nearest."""
    mine = _identity(run)

    def distance(other: Run) -> int:
        theirs = _identity(other)
        names = {name for name in {*mine, *theirs} if not name.startswith("inference.")}
        return sum(mine.get(name) != theirs.get(name) for name in names)

    candidates = [
        other
        for other in runs
        if other.method == "vae"
        and (other.setting("training", "objective") or "elbo") == "elbo"
        and other.seed == run.seed
    ]
    return min(candidates, key=distance, default=None)


def paired_difference(run: Run, baseline: Run, name: str) -> Difference | None:
    """Mean and standard error of a metric's differences over the test images that both have read.

    The i-th image and its noise do not depend on how many images were read.
    """
    if run.fingerprint != baseline.fingerprint:
        return None
    mine, theirs = run.per_image.get(name), baseline.per_image.get(name)
    if mine is None or theirs is None:
        return None
    count = min(len(mine), len(theirs))
    differences = np.asarray(mine[:count], np.float64) - np.asarray(theirs[:count], np.float64)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    return Difference(float(differences.mean()), standard_error(differences), len(differences))


def paired_differences(
    configuration: Configuration, runs: Sequence[Run], name: str
) -> list[Difference]:
    """Differences to the VAE of the same seed, for each seed that has one."""
    pairs = [(run, baseline_of(run, runs)) for run in configuration.runs]
    found = [
        paired_difference(run, baseline, name)
        for run, baseline in pairs
        if baseline is not None and baseline is not run
    ]
    return [difference for difference in found if difference is not None]


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """The standard error of the mean; NaN for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def over_seeds(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard error over seeds; a single seed keeps its error over images."""
    if not values:
        return math.nan, math.nan
    if len(values) == 1:
        return values[0]
    return float(np.mean([v for v, _ in values])), standard_error([v for v, _ in values])
