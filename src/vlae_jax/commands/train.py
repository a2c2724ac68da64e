"""Commands that train and evaluate a run."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlae_jax.commands.arguments import Folder, Inference, InferenceChoice
from vlae_jax.commands.tables import print_metrics
from vlae_jax.data.formats import installed
from vlae_jax.errors import UserError, require_counts
from vlae_jax.parallel.options import DistributedConfig
from vlae_jax.runs.config import Config, EvaluationConfig, Proposal
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.storage import absolute, in_bucket

if TYPE_CHECKING:
    import numpy as np
    from tensorboardX import SummaryWriter

    from vlae_jax.models.trained import Trained
    from vlae_jax.parallel.placement import Placement


_INSTEAD_OF_EVALUATE = (
    "in Python, call vlae_jax.analysis.evaluation.evaluate(vlae_jax.load(RUN_DIR), test_images)"
)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model, evaluate its best checkpoint on the test images, and draw the report."""

    config: Annotated[Config, tyro.conf.OmitArgPrefixes]
    preset: str | None = None
    """Published settings as defaults: paper-screenshot is the picture in the authors' README."""
    run_dir: Folder | None = None
    """Folder of this run, local or gs://BUCKET/FOLDER (needs the gcs extra); by default
    RUNS_DIR/DATASET-METHOD-T-SEED."""
    runs_dir: Folder = Path("runs")
    """Folder of all runs, local or gs://BUCKET/FOLDER."""
    resume: bool = False
    """Continue the run from its last checkpoint."""
    resume_if_there: bool = False
    """Continue the run if there is one, else start it: for a command that is repeated until the
    run is finished."""
    overwrite: bool = False
    """Delete the run that is in the folder, and start anew."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints, besides one after each epoch that is the best so far."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (needs the tensorboard extra)."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        require_counts(self, "log_every", "checkpoint_every")

    def run(self) -> None:
        """Train, evaluate and report."""
        if self.tensorboard:
            _require_tensorboard()
        config = _with_absolute_folders(self.config)
        run = RunFolder(self.run_dir or self.runs_dir / config.run_name)
        if self.tensorboard and in_bucket(run.path):
            raise UserError(
                "--tensorboard writes to local folders alone; metrics.jsonl holds the same scalars"
            )
        resume = self.resume or (self.resume_if_there and run.exists())
        if resume:
            run.require_continuable(config)
        from vlae_jax.data.supplied import as_dataset
        from vlae_jax.parallel import processes
        from vlae_jax.training.loop import FitOptions, fit

        with processes.running(self.distributed) as placement, processes.held_by_first(run.owned()):
            dataset = processes.together(lambda: as_dataset(None, config.data))
            if processes.is_first():
                print(f"run folder: {run.path}", flush=True)
            with contextlib.closing(_EventFiles(run.path / "tensorboard")) as events:
                trained = fit(
                    config,
                    dataset,
                    run_dir=run.path,
                    resume=resume,
                    overwrite=self.overwrite,
                    options=FitOptions(
                        self.log_every,
                        self.checkpoint_every,
                        events if self.tensorboard else None,
                    ),
                    placement=placement,
                )
            images = dataset.first_test_images(config.evaluation.test_images)
            _evaluate_and_report(trained, images, run, placement)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate the best checkpoint of a trained run again, and draw its report.

    With another way to infer than the run's, what is measured is printed and kept beside the run's
    results, in results-CHOICE.json and per_image-CHOICE.npz: --method vlae --steps 20 gives a VAE
    Laplace posteriors at test time.
    """

    run_dir: tyro.conf.Positional[Folder]
    """The run folder."""
    data_dir: str | None = None
    """Folder or file of the run's images, if they have moved."""
    importance_samples: int | None = None
    """K of the importance-weighted log-likelihood; by default the run's."""
    proposal: Proposal | None = None
    """The distribution of importance samples; by default the run's."""
    proposal_scale: float | None = None
    """widened: the factor on standard deviations; by default the run's."""
    proposal_df: float | None = None
    """student_t: degrees of freedom; by default the run's."""
    evaluation_budget: float | None = None
    """auto: how much may be done where first estimates do not suffice; by default the run's."""
    chunk_size: int | None = None
    """Importance samples held in memory at once, per image; by default the run's."""
    test_images: int | None = None
    """Evaluate only this many test images, the first ones; by default as in the run."""
    evaluation_batch: int | None = None
    """Test images evaluated at once; by default the run's."""
    inference: Inference = dataclasses.field(default_factory=InferenceChoice)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        EvaluationConfig(**self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        """The choices that differ from the run's evaluation."""
        return {
            field.name: value
            for field in dataclasses.fields(EvaluationConfig)
            if (value := getattr(self, field.name)) is not None
        }

    def run(self) -> None:
        """Evaluate and report."""
        run = RunFolder(self.run_dir)
        run.read_config()
        from vlae_jax.commands.uses import images_of_run
        from vlae_jax.models.saved import load
        from vlae_jax.parallel import processes

        with processes.running(self.distributed) as placement, processes.held_by_first(run.owned()):
            trained = load(run.path, placement).with_config("evaluation", **self.changes)
            dataset = processes.together(
                lambda: images_of_run(trained, self.data_dir, _INSTEAD_OF_EVALUATE)
            )
            images = dataset.first_test_images(trained.config.evaluation.test_images)
            chosen = self.inference.of(trained)
            _evaluate_and_report(chosen, images, run, placement, self.inference.name)


def _with_absolute_folders(config: Config) -> Config:
    """The configuration with folders that do not depend on the working directory."""
    data, training = config.data, config.training
    if data.data_dir is not None:
        path = str(Path(data.data_dir).expanduser().absolute())
        data = dataclasses.replace(data, data_dir=path)
    if training.init_from is not None:
        path = str(absolute(RunFolder.at(training.init_from).path))
        training = dataclasses.replace(training, init_from=path)
    return dataclasses.replace(config, data=data, training=training)


def _evaluate_and_report(
    trained: "Trained",
    images: "np.ndarray",
    run: RunFolder,
    placement: "Placement",
    choice: str = "",
) -> None:
    """Measure a model and keep what was measured, under the name of a choice beside the run's."""
    from vlae_jax.analysis.evaluation import describe, evaluate
    from vlae_jax.analysis.snapshots import take_snapshots
    from vlae_jax.parallel import processes
    from vlae_jax.report import write_report

    trained = trained.with_params(placement.whole(trained.params))
    began = time.monotonic()
    metrics, per_image = evaluate(trained, images, placement=placement)
    seconds = {"evaluation": time.monotonic() - began}

    def write() -> None:
        run.write_results(describe(trained, metrics, seconds=seconds), choice)
        run.write_per_image(per_image, choice)
        if choice:
            print_metrics(metrics)
            return
        run.write_snapshots(take_snapshots(trained, images))
        write_report([run.path])

    processes.on_first(write)


class _EventFiles:
    """TensorBoard event files, opened with the first scalar: a new run needs an empty folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Log one value."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        self._writer.add_scalar(tag, value, global_step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


def _require_tensorboard() -> None:
    if not installed("tensorboardX"):
        raise UserError("--tensorboard needs tensorboardX: pip install 'vlae-jax[tensorboard]'")
