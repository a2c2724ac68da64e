"""Commands that use a trained run: encode, reconstruct, sample, impute, score, gap.

More than 400 lines, many of which are what --help says of each option.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import tyro

from vlae_jax.commands.arguments import Folder, Inference, InferenceChoice
from vlae_jax.commands.tables import (
    print_errors,
    print_means,
    print_metrics,
    print_scores,
    shape,
    shares,
)
from vlae_jax.data.dataset import has_missing
from vlae_jax.data.supplied import (
    Images,
    checked,
    read_images,
    read_mask,
    read_missing,
    read_rows,
    write_rows,
)
from vlae_jax.errors import UserError, require_counts, require_seed
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.gap_config import GapConfig
from vlae_jax.runs.storage import in_bucket, write_atomically

if TYPE_CHECKING:
    from vlae_jax.data.sets import Dataset
    from vlae_jax.models.trained import Trained


_WITH_INPUT = "name images as INPUT"
_ONE_WAY = (
    "choose the missing pixels by one of --mask FILE, --missing SHARE and "
    "--missing-box TOP LEFT HEIGHT WIDTH"
)
_INSTEAD_OF_GAP = (
    "in Python, call vlae_jax.analysis.gap_measurement.measure_gaps(vlae_jax.load(RUN_DIR), "
    "test_images, options)"
)


@dataclasses.dataclass(frozen=True)
class _Use:
    """A command that reads a run and writes one file."""

    run_dir: tyro.conf.Positional[Folder]
    """The run folder; its best checkpoint is used."""
    output: Folder | None = None
    """The .npz file to write; by default one of a fixed name in the run folder."""
    overwrite: bool = False
    """Replace the output file if there is one."""

    default_name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]] = (".npz",)

    def target(self) -> Path:
        """The file to write; checked before the command begins its work.

        Raises:
            UserError: If it exists already, is no .npz file, or has no folder that can be written.
        """
        target = self.output or self.run_dir / self.default_name
        if target.suffix not in self.endings:
            raise UserError(f"output must be an {' or '.join(self.endings)} file, got {target}")
        if not in_bucket(target) and not target.parent.is_dir():
            raise UserError(f"output folder {target.parent} does not exist; make it first")
        if not in_bucket(target) and not os.access(target.parent, os.W_OK):
            raise UserError(f"output folder {target.parent} cannot be written; choose --output")
        if target.exists() and not self.overwrite:
            raise UserError(
                f"{target} already exists: --overwrite replaces it, --output FILE.npz names another"
            )
        return target

    def load(self) -> "Trained":
        """The model of the run; nothing but the run folder is read."""
        from vlae_jax.models.saved import load

        return load(self.run_dir)

    def write(
        self, target: Path, arrays: Mapping[str, Any], columns: Sequence[str] | None = None
    ) -> None:
        """Write the file, and print its name and contents. A .csv file holds the rows alone."""
        if target.suffix == ".csv":
            if "rows" not in arrays:
                raise UserError(f"{target} can hold a table alone, not images: give an .npz file")
            write_atomically(target, lambda file: write_rows(file, arrays["rows"], columns))
            print(f"{target}: rows {shape(arrays['rows'])}")
            return
        write_atomically(target, lambda file: np.savez_compressed(file, **arrays))
        shapes = ", ".join(f"{name} {shape(array)}" for name, array in arrays.items())
        print(f"{target}: {shapes}")


@dataclasses.dataclass(frozen=True)
class _UseOnImages(_Use):
    """A command that reads a run and images, and writes one file."""

    input: tyro.conf.Positional[Path | None] = None
    """Images: an .npz (key x or x_test) or .npy file of uint8, a picture, or a folder of pictures
    and of folders of them; for a run on a table a .csv, .parquet, .npz or .npy file; by default the
    run's test images, or rows."""
    images: int | None = None
    """Use only this many images or rows, the first ones; by default all."""
    data_dir: str | None = None
    """Folder or file of the run's images, if they have moved; not needed with INPUT."""

    def __post_init__(self) -> None:
        require_counts(self, "images")

    def read(self, trained: "Trained") -> Images:
        """The images, of the shape and range of the run's."""
        if self.input is None:
            dataset = images_of_run(trained, self.data_dir, _WITH_INPUT)
            return Images(dataset.test).first(self.images)
        return _supplied(trained, self.input).first(self.images)


@dataclasses.dataclass(frozen=True)
class Encode(_UseOnImages):
    """Write the mean and covariance of each image's posterior."""

    inference: Inference = dataclasses.field(default_factory=InferenceChoice)

    default_name: ClassVar[str] = "encoded.npz"

    def run(self) -> None:
        """Encode the images and write the file."""
        from vlae_jax.analysis.uses import encode

        target = self.target()
        trained = self.inference.of(self.load())
        images = self.read(trained)
        arrays = encode(trained, images.pixels)
        self.write(target, {**arrays, **_named(images)})
        deviations = np.sqrt(np.diagonal(arrays["covariance"], axis1=1, axis2=2))
        print_means(
            {
                "|mean|": np.linalg.norm(arrays["mean"], axis=1),
                "standard deviation": deviations.mean(axis=1),
                **shares(arrays),
            }
        )


@dataclasses.dataclass(frozen=True)
class Reconstruct(_UseOnImages):
    """Write the expected image at the mean of each image's posterior."""

    every_step: bool = False
    """Also write the images at each step of the search."""
    inference: Inference = dataclasses.field(default_factory=InferenceChoice)

    default_name: ClassVar[str] = "reconstructed.npz"

    def run(self) -> None:
        """Reconstruct the images and write the file."""
        from vlae_jax.analysis.uses import reconstruct

        target = self.target()
        trained = self.inference.of(self.load())
        images = self.read(trained)
        arrays = reconstruct(trained, images.pixels, every_step=self.every_step)
        self.write(target, {**arrays, **_named(images)})
        unit = "pixel, of [0, 1]" if trained.provenance.levels else "entry, in its own unit"
        print_means({f"squared error a {unit}": arrays["squared_error"]})


@dataclasses.dataclass(frozen=True)
class Sample(_Use):
    """Decode samples of the prior into images."""

    count: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed of the samples."""
    temperature: float = 1.0
    """Standard deviation of the latent; below 1 the images are closer to the mean."""
    draws: bool = False
    """Also draw images from p(x | z), with the output's noise."""

    default_name: ClassVar[str] = "samples.npz"

    def __post_init__(self) -> None:
        require_counts(self, "count")
        require_seed(self.seed)
        if not 0 <= self.temperature < np.inf:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")

    def run(self) -> None:
        """Sample and write the file."""
        from vlae_jax.analysis.uses import sample

        target = self.target()
        trained = self.load()
        arrays = sample(
            trained,
            self.count,
            seed=self.seed,
            temperature=self.temperature,
            draws=self.draws,
        )
        self.write(target, arrays)


@dataclasses.dataclass(frozen=True)
class Impute(_UseOnImages):
    """Fill in missing pixels by the posterior given the other pixels. Works with any run.

    Choose the missing pixels by one of --mask, --missing and --missing-box. Errors are printed
    where the missing pixels are known: always, except for --mask with images of your own. In a
    table empty entries are missing anyway, and --mask or --missing may be left out.
    """

    mask: Path | None = None
    """A .npz, .npy or picture file that is not 0 where a pixel is missing: one mask for all images,
    or one for each."""
    missing: float | None = None
    """Hide this share of the pixels, at random."""
    missing_box: tuple[int, int, int, int] | None = None
    """Hide a rectangle: top, left, height and width in pixels."""
    steps: int = 20
    """Newton steps of the search."""
    refine: bool = False
    """Move the Laplace posterior on, towards the Gaussian of largest ELBO."""
    samples: int = 200
    """Samples of the predictive distribution per image."""
    draws: int = 0
    """Write so many of these samples (measurements alone)."""
    seed: int = 0
    """Seed of the pixels that --missing hides."""

    default_name: ClassVar[str] = "imputed.npz"
    endings: ClassVar[tuple[str, ...]] = (".npz", ".csv")

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = (self.mask, self.missing, self.missing_box)
        chosen = sum(way is not None for way in ways)
        if chosen > 1 or (chosen == 0 and self.input is None):  # a file may have empty entries
            raise UserError(_ONE_WAY)
        if self.missing is not None and not 0 < self.missing < 1:
            raise UserError(f"missing must lie between 0 and 1, got {self.missing}")
        require_counts(self, "steps", "draws", "missing_box", least=0)
        require_counts(self, "samples", least=2)
        if self.draws > self.samples:
            raise UserError(f"draws must be at most samples {self.samples}, got {self.draws}")
        require_seed(self.seed)

    def run(self) -> None:
        """Fill in the missing pixels, write the file and print the errors."""
        from vlae_jax.analysis.imputation import impute

        target = self.target()
        trained = self.load()
        images = self.read(trained)
        missing = self._missing(images.pixels)
        arrays, errors = impute(
            trained,
            images.pixels,
            missing,
            num_steps=self.steps,
            num_samples=self.samples,
            refine=self.refine,
            draws=self.draws,
        )
        is_known = (self.mask is None or self.input is None) and errors["num_missing"].sum() > 0
        arrays = {**arrays, "missing": missing, **(errors if is_known else {})}
        self.write(target, {**arrays, **_named(images)}, trained.provenance.columns)
        print_means(shares(arrays))
        if is_known:
            print_errors(errors, "pixels in [0, 1]" if trained.provenance.levels else "own units")

    def _missing(self, images: np.ndarray) -> np.ndarray:
        from vlae_jax.analysis.imputation import missing_at_random, missing_box

        shape = images.shape
        ways = (self.mask, self.missing, self.missing_box)
        unknown = np.isnan(images) if has_missing(images) else np.zeros(shape, bool)
        if all(way is None for way in ways) and unknown.any():
            return unknown
        if all(way is None for way in ways):
            raise UserError(_ONE_WAY)
        if len(shape) == 2 and self.missing_box is not None:
            raise UserError("missing_box hides a rectangle of an image: give --missing or --mask")
        if len(shape) == 2 and self.mask is not None:
            return read_mask(self.mask, shape) | unknown
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
    """Score how outlying images are; with --against, also how well scores tell two sets apart."""

    against: str | None = None
    """The other set of images: a file as for INPUT, or the name of a data set, whose test images
    are taken (looked for in the folder of the run's images)."""
    importance_samples: int = 500
    """K of the importance-weighted log-likelihood."""
    inference: Inference = dataclasses.field(default_factory=InferenceChoice)

    default_name: ClassVar[str] = "scores.npz"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "importance_samples")

    def run(self) -> None:
        """Score the images, write the file and print the means."""
        from vlae_jax.analysis.uses import auroc, score

        target = self.target()
        trained = self.inference.of(self.load())
        trained = trained.with_config("evaluation", importance_samples=self.importance_samples)
        images = self.read(trained)
        others = None if self.against is None else self._others(trained)
        scores = score(trained, images.pixels)
        arrays = {**scores, **_named(images)}
        if others is None:
            self.write(target, arrays)
            print_scores(scores)
            return
        against = score(trained, others.pixels, what=f"scoring {self.against}")
        beside = {**against, **_named(others)}
        areas = auroc(scores, against)
        arrays |= {f"against_{name}": values for name, values in beside.items()}
        arrays |= {f"auroc_{name}": np.asarray(area) for name, area in areas.items()}
        self.write(target, arrays)
        print_scores(scores, against, areas)

    def _others(self, trained: "Trained") -> Images:
        from vlae_jax.data.prepared import KNOWN_DATASETS
        from vlae_jax.data.sets import load_dataset

        assert self.against is not None
        shape, levels = trained.provenance.image_shape, trained.provenance.levels
        if self.against not in KNOWN_DATASETS or not levels:
            others = _supplied(trained, Path(self.against).expanduser())
        else:
            folder = self.data_dir or trained.config.data.data_dir
            folder = folder if folder and Path(folder).expanduser().is_dir() else None
            test = load_dataset(self.against, folder).test
            others = Images(checked(test, shape, levels, self.against))
        count = self.images and min(self.images, len(others.pixels))
        return others.first(count)


@dataclasses.dataclass(frozen=True)
class Gap:
    """Measure the parts of the bound's gap: approximation, amortization and non-convergence."""

    run_dir: tyro.conf.Positional[Folder]
    """The run folder; its best checkpoint is used."""
    effort: Annotated[GapConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=GapConfig
    )
    data_dir: str | None = None
    """Folder or file of the run's images, if they have moved."""

    def run(self) -> None:
        """Measure the gaps, keep them in the run folder and print them."""
        from vlae_jax.analysis.evaluation import describe
        from vlae_jax.analysis.gap_measurement import measure_gaps
        from vlae_jax.models.saved import load
        from vlae_jax.report import write_report

        run, began = RunFolder(self.run_dir), time.monotonic()
        with run.owned():
            trained = load(run.path)
            dataset = images_of_run(trained, self.data_dir, _INSTEAD_OF_GAP)
            metrics, _ = measure_gaps(trained, dataset.test, self.effort)
            run.write_gaps(
                describe(
                    trained,
                    metrics,
                    seconds={"gaps": time.monotonic() - began},
                    settings=dataclasses.asdict(self.effort),
                )
            )
            print_metrics(metrics)
            write_report([run.path])


def images_of_run(trained: "Trained", data_dir: str | None, instead: str) -> "Dataset":
    """Load the images that a model was trained on, and their test images.

    Args:
        trained: The model.
        data_dir: Their folder or file, if they have moved.
        instead: What a user can do without them, for the message.

    Raises:
        UserError: If they cannot be loaded, or differ from those of the training.
    """
    from vlae_jax.data.sets import ARRAYS
    from vlae_jax.data.supplied import as_dataset
    from vlae_jax.training.loop import require_same_images

    if trained.provenance.dataset == ARRAYS:
        raise UserError(
            f"the run was trained on arrays given in Python, which it does not keep: {instead}"
        )
    data = trained.config.data
    try:
        dataset = as_dataset(None, dataclasses.replace(data, data_dir=data_dir or data.data_dir))
        require_same_images(trained.provenance.fingerprint, dataset)
    except UserError as error:
        raise UserError(f"the images of the run are not available: {error}; or {instead}") from None
    return dataset


def _supplied(trained: "Trained", path: Path) -> Images:
    """Images or rows from a file of the user's, of the kind and shape that a model takes."""
    made_from = trained.provenance
    if made_from.levels:
        resize = trained.config.data.resize
        return read_images(path, made_from.image_shape, made_from.levels, resize=resize)
    return Images(read_rows(path, made_from.image_shape, made_from.columns))


def _named(images: Images) -> dict[str, np.ndarray]:
    return {} if images.names is None else {"names": np.array(images.names)}
