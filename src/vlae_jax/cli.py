"""The command line: arguments → config → train, evaluate, report, prepare, and uses. No maths."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vlae_jax.config import Config, DistributedConfig, EvaluationConfig, Proposal, default_config
from vlae_jax.errors import RunFailure, Stopped, Unreadable, UserError
from vlae_jax.folders import in_bucket, resolved
from vlae_jax.run_folder import RunFolder
from vlae_jax.verbs import Encode, Folder, Gap, Impute, Reconstruct, Sample, Score, load_best

_CHOICES = ("dataset", "method", "preset")
"""Options whose values change the defaults of others, which --help shows and training takes."""


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
    """Folder that holds the runs, likewise."""
    resume: bool = False
    """Continue the run from its last checkpoint."""
    resume_if_there: bool = False
    """Continue the run if there is one, else start it: for a command that is repeated until the
    run is finished."""
    overwrite: bool = False
    """Delete the run that is there and start anew."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints, besides one after each epoch that is the best so far."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (needs the tensorboard extra)."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def run(self) -> None:
        """Do it."""
        writer_class = _event_writer_class() if self.tensorboard else None
        config = _with_absolute_data_dir(self.config)
        run = RunFolder(self.run_dir or self.runs_dir / config.run_name)
        if self.tensorboard and in_bucket(run.path):
            raise UserError(
                "--tensorboard writes to local folders alone; metrics.jsonl holds the same scalars"
            )
        resume = self.resume or (self.resume_if_there and run.exists())
        if resume:
            differences = config.differences(run.read_config())
            if differences:
                raise UserError(
                    f"{run.path} was trained with another configuration: {'; '.join(differences)}"
                )
        from vlae_jax import distributed
        from vlae_jax.experiment import build_experiment
        from vlae_jax.training import FitOptions, fit

        with distributed.running(self.distributed) as placement:
            # The images may lie elsewhere on another machine; what they are is checked below.
            same = dataclasses.replace(config.data, data_dir=None)
            chosen = (dataclasses.replace(config, data=same), run.path, resume)
            distributed.require_equal("the configuration", repr(chosen))
            experiment = distributed.together(lambda: build_experiment(config))
            distributed.require_equal("the data", experiment.dataset.fingerprint)
            placement.require_even(config.training.batch_size, config.training.microbatches)
            distributed.on_first(
                lambda: (
                    run.write_config(config)
                    if resume
                    else run.create(config, overwrite=self.overwrite)
                )
            )
            if distributed.is_first():
                print(f"run folder: {run.path}", flush=True)
            with contextlib.ExitStack() as open_files:
                writer = None
                if writer_class and distributed.is_first():
                    writer = open_files.enter_context(writer_class(str(run.path / "tensorboard")))
                options = FitOptions(self.log_every, self.checkpoint_every, writer)
                fit(experiment, run, resume=resume, options=options, placement=placement)
            _evaluate_and_report(experiment, run, placement)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate the best checkpoint of a trained run again, and draw its report."""

    run_dir: tyro.conf.Positional[Folder]
    """The run folder."""
    data_dir: str | None = None
    """Where the images are now, if they have moved."""
    importance_samples: int | None = None
    """K of the importance-weighted log-likelihood; by default the run's."""
    proposal: Proposal | None = None
    """What importance samples are drawn from; by default as in the run."""
    proposal_scale: float | None = None
    """widened: the factor on standard deviations; by default the run's."""
    proposal_freedom: float | None = None
    """student_t: degrees of freedom; by default the run's."""
    chunk_size: int | None = None
    """Importance samples held in memory at once, per image; by default the run's."""
    test_images: int | None = None
    """Evaluate only the first so many test images; by default as in the run."""
    evaluation_batch: int | None = None
    """Test images evaluated at once; by default the run's."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def run(self) -> None:
        """Do it."""
        run = RunFolder(self.run_dir)
        config = run.read_config()
        asked = {
            field.name: value
            for field in dataclasses.fields(EvaluationConfig)
            if (value := getattr(self, field.name)) is not None
        }
        evaluation = dataclasses.replace(config.evaluation, **asked)
        data = dataclasses.replace(config.data, data_dir=self.data_dir or config.data.data_dir)
        config = dataclasses.replace(config, evaluation=evaluation, data=data)
        from vlae_jax import distributed
        from vlae_jax.experiment import build_experiment

        with distributed.running(self.distributed) as placement:
            experiment = distributed.together(
                lambda: build_experiment(_with_absolute_data_dir(config))
            )
            _evaluate_and_report(experiment, run, placement)


@dataclasses.dataclass(frozen=True)
class Report:
    """Print the results of runs side by side and draw their pictures and report.html again."""

    run_dirs: tyro.conf.Positional[tuple[Folder, ...]]
    """Run folders."""
    output: Folder = Path("comparison")
    """Folder for the pictures that compare several runs, and the page with all of them."""

    def run(self) -> None:
        """Do it."""
        from vlae_jax.report import write_comparison, write_report

        if not self.run_dirs:
            raise UserError("name at least one run folder")
        write_report(self.run_dirs)
        if len({resolved(path) for path in self.run_dirs}) > 1:
            page, *_ = write_comparison(self.run_dirs, self.output)
            print(f"comparison: {page}")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download a data set by tensorflow-datasets and keep it as a small uint8 file."""

    dataset: tyro.conf.Positional[str]
    """Name of the data set."""
    data_dir: str | None = None
    """With --check: look here, as training would."""
    check: bool = False
    """Download nothing; the exit code tells whether the data can be read:
    0 yes, 3 with the tfds extra, 4 after a download."""
    stream: bool = False
    """Keep, or with --check look for, the files that train --stream reads, in place of that one."""

    def run(self) -> None:
        """Do it."""
        from vlae_jax import data

        if self.check:
            sys.exit(int(data.availability(self.dataset, self.data_dir, stream=self.stream)))
        ready = data.prepare_dataset(self.dataset, stream=self.stream)
        print(f"{self.dataset} is ready: {ready}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, 1 (failed run), 2 (wrong use), 75 (worth trying again: another process died, or a
    checkpoint could not be read for now) or 128 + signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _parse(arguments).run()
        sys.stdout.flush()
    except UserError as error:
        _leave(error, 2)
    except RunFailure as error:
        _leave(error, 1)
    except Unreadable as error:
        _leave(error, os.EX_TEMPFAIL)
    except Stopped as stopped:
        print(f"vlae_jax: {stopped}; --resume continues", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(arguments: list[str]) -> Any:
    dataset, method, preset = (_asked(arguments, f"--{name}") for name in _CHOICES)
    train = Train(default_config(dataset, method, preset), preset)
    command: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Impute, tyro.conf.subcommand("impute")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Gap, tyro.conf.subcommand("gap")]
    )
    return tyro.cli(
        command,
        args=arguments,
        prog="vlae_jax",
        description="Variational Laplace Autoencoders: train, evaluate, report, and use.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _asked(arguments: list[str], option: str) -> str | None:
    """What the command line gives for an option that the defaults of others depend on."""
    value = None
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _with_absolute_data_dir(config: Config) -> Config:
    """The same, with a data_dir that is still right when read from elsewhere."""
    if config.data.data_dir is None:
        return config
    path = str(Path(config.data.data_dir).expanduser().absolute())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=path))


def _evaluate_and_report(experiment: Any, run: RunFolder, placement: Any) -> None:
    from vlae_jax import distributed
    from vlae_jax.diagnostics import take_snapshots
    from vlae_jax.evaluation import describe, evaluate
    from vlae_jax.report import write_report

    restored = load_best(experiment, run, placement)
    params = placement.whole(restored.state.params)
    figures, per_image = evaluate(experiment, params, placement)
    checkpoint = {"step": restored.step, "epoch": restored.step / experiment.steps_per_epoch}
    seconds = {"training": restored.notes.seconds}

    def write() -> None:
        run.write_results(describe(experiment, figures, checkpoint=checkpoint, seconds=seconds))
        run.write_per_image(per_image)
        run.write_snapshots(take_snapshots(experiment, params))
        write_report([run.path])

    distributed.on_first(write)


def _event_writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs tensorboardX: pip install 'vlae-jax[tensorboard]'"
        ) from None
    return SummaryWriter


def _leave(error: Exception, code: int) -> None:
    print(f"vlae_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
