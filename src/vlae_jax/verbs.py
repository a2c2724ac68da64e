"""Commands that use a trained run: encode, reconstruct, sample, impute, score, gap. No maths."""

import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro

from vlae_jax.config import GapConfig
from vlae_jax.errors import UserError
from vlae_jax.folders import as_folder, in_bucket
from vlae_jax.images import Images, checked, read_images, read_missing
from vlae_jax.run_folder import RunFolder, write_atomically

Folder = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_folder(words[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A folder or file of the command line, which may be in a bucket."""

_LABELS = {
    "log_prob": ("log p(x), nats", "low"),
    "bits_per_dim": ("bits/dim", "high"),
    "elbo": ("ELBO, nats", "low"),
    "newton_decrement": ("Newton decrement, nats", "high"),
    "pareto_k": ("Pareto k", "high"),
}
"""Of each score: its name, and which end is the outlying one."""


@dataclasses.dataclass(frozen=True)
class _Use:
    """A run, and the file that is made with it."""

    run_dir: tyro.conf.Positional[Folder]
    """The run folder; its best checkpoint is used."""
    output: Folder | None = None
    """The .npz file to write; by default one of a fixed name in the run folder."""
    overwrite: bool = False
    """Replace the output file if there is one."""
    data_dir: str | None = None
    """Where the images of the run are now, if they have moved."""

    default_name: ClassVar[str]

    def target(self) -> Path:
        """The file to write, before anything long is done.

        Raises:
            UserError: If it is there already, is no .npz file, or has no folder.
        """
        target = self.output or self.run_dir / self.default_name
        if target.suffix != ".npz":
            raise UserError(f"output must be an .npz file, got {target}")
        if not in_bucket(target) and not target.parent.is_dir():
            raise UserError(f"output folder {target.parent} does not exist; make it first")
        if target.exists() and not self.overwrite:
            raise UserError(
                f"{target} already exists: --overwrite replaces it, --output FILE.npz names another"
            )
        return target

    def load(self, **evaluation: Any) -> tuple[Any, Any]:
        """The experiment of the run, its evaluation changed as asked, and the parameters."""
        return load_run(RunFolder(self.run_dir), self.data_dir, **evaluation)

    def write(self, target: Path, arrays: Mapping[str, Any]) -> None:
        """Write the file, and say so."""
        write_atomically(target, lambda file: np.savez_compressed(file, **arrays))
        shapes = ", ".join(f"{name} {_shape(array)}" for name, array in arrays.items())
        print(f"{target}: {shapes}")


@dataclasses.dataclass(frozen=True)
class _UseOnImages(_Use):
    """The same for images."""

    input: tyro.conf.Positional[Path | None] = None
    """Images: an .npz (key x or x_test) or .npy file of uint8, a picture, or a folder of pictures;
    by default the run's test images."""
    images: int | None = None
    """Only the first so many."""

    def read(self, experiment: Any) -> Images:
        """The images, checked to be such as the run's."""
        dataset = experiment.dataset
        if self.input is None:
            return Images(dataset.test).first(self.images)
        shape = experiment.preprocessor.image_shape
        return read_images(self.input, shape, dataset.levels).first(self.images)


@dataclasses.dataclass(frozen=True)
class Encode(_UseOnImages):
    """Write the mean and covariance of each image's posterior."""

    default_name: ClassVar[str] = "encoded.npz"

    def run(self) -> None:
        """Do it."""
        from vlae_jax.applications import encode

        target = self.target()
        experiment, params = self.load()
        images = self.read(experiment)
        arrays = encode(experiment, params, images.pixels)
        self.write(target, {**arrays, **_named(images)})
        deviations = np.sqrt(np.diagonal(arrays["covariance"], axis1=1, axis2=2))
        _print_means(
            {
                "|mean|": np.linalg.norm(arrays["mean"], axis=1),
                "standard deviation": deviations.mean(axis=1),
                **_shares(arrays),
            }
        )


@dataclasses.dataclass(frozen=True)
class Reconstruct(_UseOnImages):
    """Write the expected image where each image's posterior is centred."""

    every_step: bool = False
    """Also write the images at each step of the search."""

    default_name: ClassVar[str] = "reconstructed.npz"

    def run(self) -> None:
        """Do it."""
        from vlae_jax.applications import reconstruct

        target = self.target()
        experiment, params = self.load()
        images = self.read(experiment)
        arrays = reconstruct(experiment, params, images.pixels, every_step=self.every_step)
        self.write(target, {**arrays, **_named(images)})
        _print_means({"squared error a pixel, of [0, 1]": arrays["squared_error"]})


@dataclasses.dataclass(frozen=True)
class Sample(_Use):
    """Decode samples of the prior into images."""

    count: int = 64
    """How many."""
    seed: int = 0
    """Seeds them."""
    temperature: float = 1.0
    """Standard deviation of the latent; below 1 the images are closer to the mean."""
    draws: bool = False
    """Also draw images from p(x | z), with the output's noise."""

    default_name: ClassVar[str] = "samples.npz"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1, got {self.count}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        if not 0 <= self.temperature < np.inf:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")

    def run(self) -> None:
        """Do it."""
        from vlae_jax.applications import sample

        target = self.target()
        experiment, params = self.load()
        arrays = sample(
            experiment,
            params,
            self.count,
            seed=self.seed,
            temperature=self.temperature,
            draws=self.draws,
        )
        self.write(target, arrays)


@dataclasses.dataclass(frozen=True)
class Impute(_UseOnImages):
    """Fill in missing pixels by the posterior given the others; for any run, as it was trained.

    Say what is missing by one of --mask, --missing and --missing-box. Where the pixels under it are
    known, as they are unless --mask comes with images of your own, the errors are printed.
    """

    mask: Path | None = None
    """Pixels that are missing: not 0 in this .npz, .npy or picture file, one mask or one each."""
    missing: float | None = None
    """Hide this share of the pixels, at random."""
    missing_box: tuple[int, int, int, int] | None = None
    """Hide a rectangle: top, left, height and width in pixels."""
    steps: int = 20
    """Newton steps of the search."""
    samples: int = 200
    """Samples of the predictive distribution per image."""
    seed: int = 0
    """Seeds what --missing hides."""

    default_name: ClassVar[str] = "imputed.npz"

    def __post_init__(self) -> None:
        ways = (self.mask, self.missing, self.missing_box)
        if sum(way is not None for way in ways) != 1:
            raise UserError(
                "say what is missing by one of --mask FILE, --missing SHARE and "
                "--missing-box TOP LEFT HEIGHT WIDTH"
            )
        if self.missing is not None and not 0 < self.missing < 1:
            raise UserError(f"missing must lie between 0 and 1, got {self.missing}")
        for name, least in (("steps", 0), ("samples", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def run(self) -> None:
        """Do it."""
        from vlae_jax.applications import impute

        target = self.target()
        experiment, params = self.load()
        images = self.read(experiment)
        missing = self._missing(images.pixels.shape)
        arrays, errors = impute(
            experiment,
            params,
            images.pixels,
            missing,
            num_steps=self.steps,
            num_samples=self.samples,
        )
        is_known = self.mask is None or self.input is None
        arrays = {**arrays, "missing": missing, **(errors if is_known else {})}
        self.write(target, {**arrays, **_named(images)})
        _print_means(_shares(arrays))
        if is_known:
            _print_errors(errors)

    def _missing(self, shape: tuple[int, ...]) -> np.ndarray:
        from vlae_jax.applications import missing_at_random, missing_box

        if self.mask is not None:
            return read_missing(self.mask, shape[1:], shape[0])
        if self.missing is not None:
            return missing_at_random(shape, self.missing, seed=self.seed)
        assert self.missing_box is not None
        top, left, height, width = self.missing_box
        if not (0 <= top < shape[1] and 0 <= left < shape[2] and height >= 1 and width >= 1):
            raise UserError(
                f"missing_box {self.missing_box} (top, left, height, width) hides nothing of "
                f"images of {shape[1]} x {shape[2]}"
            )
        return missing_box(shape, self.missing_box)


@dataclasses.dataclass(frozen=True)
class Score(_UseOnImages):
    """Score how outlying images are, and how well the scores tell them from another set's."""

    against: str | None = None
    """Images to tell from those of INPUT: a file as for INPUT, or the test images of a data set by
    name (looked for where the run's images are)."""
    importance_samples: int = 500
    """K of the importance-weighted log-likelihood."""

    default_name: ClassVar[str] = "scores.npz"

    def run(self) -> None:
        """Do it."""
        from vlae_jax.applications import auroc, score

        target = self.target()
        experiment, params = self.load(importance_samples=self.importance_samples)
        images = self.read(experiment)
        others = None if self.against is None else self._others(experiment)
        scores = score(experiment, params, images.pixels)
        arrays = {**scores, **_named(images)}
        if others is None:
            self.write(target, arrays)
            _print_scores(scores)
            return
        against = score(experiment, params, others.pixels, what=f"scoring {self.against}")
        beside = {**against, **_named(others)}
        areas = auroc(scores, against)
        arrays |= {f"against_{name}": values for name, values in beside.items()}
        arrays |= {f"auroc_{name}": np.asarray(area) for name, area in areas.items()}
        self.write(target, arrays)
        _print_scores(scores, against, areas)

    def _others(self, experiment: Any) -> Images:
        from vlae_jax.data import KNOWN_DATASETS, load_dataset

        assert self.against is not None
        shape, levels = experiment.preprocessor.image_shape, experiment.dataset.levels
        if self.against not in KNOWN_DATASETS:
            others = read_images(Path(self.against).expanduser(), shape, levels)
        else:
            folder = experiment.config.data.data_dir
            folder = folder if folder and Path(folder).expanduser().is_dir() else None
            test = load_dataset(self.against, folder).test
            others = Images(checked(test, shape, levels, self.against))
        count = self.images and min(self.images, len(others.pixels))
        return others.first(count)


@dataclasses.dataclass(frozen=True)
class Gap:
    """Measure where the bound loses its nats: approximation, amortisation, non-convergence."""

    run_dir: tyro.conf.Positional[Folder]
    """The run folder; its best checkpoint is used."""
    effort: Annotated[GapConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=GapConfig
    )
    data_dir: str | None = None
    """Where the images of the run are now, if they have moved."""

    def run(self) -> None:
        """Do it."""
        from vlae_jax.evaluation import describe
        from vlae_jax.gap_measurement import measure_gaps
        from vlae_jax.report import write_report

        run, began = RunFolder(self.run_dir), time.monotonic()
        experiment, restored = _load(run, self.data_dir)
        figures, _ = measure_gaps(experiment, restored.state.params, self.effort)
        run.write_gaps(
            describe(
                experiment,
                figures,
                settings=dataclasses.asdict(self.effort),
                checkpoint={"step": restored.step},
                seconds={"gaps": time.monotonic() - began},
            )
        )
        _print_table(
            ("", "mean", "± error", "unit", "images"),
            [
                (
                    figure.name.replace("_", " "),
                    f"{figure.value:.3f}",
                    "" if figure.standard_error is None else f"± {figure.standard_error:.3f}",
                    figure.unit,
                    f"{figure.images} {figure.split}",
                )
                for figure in figures
            ],
        )
        write_report([run.path])


def load_run(run: RunFolder, data_dir: str | None, **evaluation: Any) -> tuple[Any, Any]:
    """A run's experiment, with another evaluation and place of the images, and its parameters."""
    experiment, restored = _load(run, data_dir, **evaluation)
    return experiment, restored.state.params


def _load(run: RunFolder, data_dir: str | None, **evaluation: Any) -> tuple[Any, Any]:
    """The same, with the whole checkpoint."""
    from vlae_jax.experiment import build_experiment

    config = run.read_config()
    if data_dir is not None:
        data = dataclasses.replace(config.data, data_dir=data_dir)
        config = dataclasses.replace(config, data=data)
    evaluation = {"test_images": None, **evaluation}
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, **evaluation)
    )
    experiment = build_experiment(config)
    return experiment, load_best(experiment, run)


def load_best(experiment: Any, run: RunFolder, placement: Any = None) -> Any:
    """The best checkpoint, saying on stderr what is used in place of a damaged or missing one.

    Placed as training would, by default whole on this process's first device.
    """
    from vlae_jax.checkpoints import Checkpoints
    from vlae_jax.distributed import Placement, is_first
    from vlae_jax.training import initial_state, require_same_images

    like = initial_state(experiment, placement or Placement.here())
    restored = Checkpoints(run.checkpoints, read_only=True).restore_best(like)
    require_same_images(restored.notes, experiment)
    best = run.best_step()
    if best not in (None, restored.step) and not restored.damaged:
        restored.damaged.append(
            f"the best checkpoint, {best}, is missing; using checkpoint {restored.step} instead"
        )
    for line in restored.damaged if is_first() else ():
        print(f"vlae_jax: {line}", file=sys.stderr)
    return restored


def _named(images: Images) -> dict[str, np.ndarray]:
    return {} if images.names is None else {"names": np.array(images.names)}


def _shares(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is printed of a system's flags, where it has them."""
    labels = {"converged": "share converged", "is_pd": "share positive definite"}
    return {label: arrays[flag] for flag, label in labels.items() if flag in arrays}


def _shape(array: Any) -> str:
    return "(" + ", ".join(map(str, np.shape(array))) + ")"


def _print_means(values: Mapping[str, np.ndarray]) -> None:
    rows = [(name, _mean(array), str(len(array))) for name, array in values.items()]
    _print_table(("", "mean", "images"), rows)


def _print_errors(errors: Mapping[str, np.ndarray]) -> None:
    """RMSE over missing pixels and coverage of their predictive intervals, both ways."""
    counts = errors["num_missing"].astype(np.float64)
    weights = counts / counts.sum()
    rows = []
    for label, prefix in (("posterior given the rest", ""), ("encoder alone", "encoder_")):
        cells = [f"{np.sqrt(weights @ errors[prefix + 'squared_error']):.4f}"]
        cells += [f"{np.sqrt(weights @ errors[prefix + 'squared_error_x']):.4f}"]
        for name in ("coverage_50", "coverage_90"):
            covered = errors.get(prefix + name)
            cells += ["–" if covered is None else f"{100 * weights @ covered:.1f} %"]
        rows.append((label, *cells))
    header = ("", "RMSE, pixels in [0, 1]", "RMSE, model space", "inside 50 %", "inside 90 %")
    _print_table(header, rows)
    print(f"Over the missing pixels of {np.count_nonzero(counts)} images.")


def _print_scores(
    scores: Mapping[str, np.ndarray],
    against: Mapping[str, np.ndarray] | None = None,
    areas: Mapping[str, float] | None = None,
) -> None:
    rows = []
    for name, values in scores.items():
        label, end = _LABELS[name]
        row = [label, end, _mean(values)]
        if against is not None and areas is not None:
            row += [_mean(against[name]), f"{areas[name]:.4f}" if name in areas else "–"]
        rows.append(row)
    header = ["score", "outlying if", f"mean of {len(next(iter(scores.values())))}"]
    if against is not None:
        header += [f"mean of {len(next(iter(against.values())))} against", "AUROC"]
    _print_table(header, rows)


def _mean(values: np.ndarray) -> str:
    """The mean of what is finite, with its standard error over images."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return f"{finite[0]:.4g}" if len(finite) else "–"
    return f"{finite.mean():.4g} ± {finite.std(ddof=1) / np.sqrt(len(finite)):.2g}"


def _print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    # A file or a pipe has no width of its own to fit the table to.
    width = console.width if console.is_terminal else max(needed, console.width)
    Console(highlight=False, width=width).print(table)
