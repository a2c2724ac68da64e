"""The parts that `benchmarks.accelerator` measures, each in a process of its own.

    python -m benchmarks.accelerator_parts PART SETTINGS LINES

SETTINGS are JSON; rows and notes are appended to the file LINES as they are found.
"""

import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
MARK = "mark.accelerator"
SHAPES = {784: (28, 28, 1), 3072: (32, 32, 3)}
"""Images by their number of pixels times channels, D."""
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy"),
    *("arviz-stats", "pydantic", "jaxtyping"),
)
CALLS = 5
"""Timings of which the median counts."""


class Sizes(NamedTuple):
    """Sizes of models, data and measurements."""

    dims: tuple[int, ...] = (784, 3072)
    steps: tuple[tuple[str, int], ...] = (("vae", 4), ("vlae", 1), ("vlae", 4))
    """Systems whose training step is timed, with T; a VAE has no use for it."""
    latent: int = 50
    hidden: tuple[int, ...] = (500, 500)
    channels: tuple[int, ...] = (32, 64)
    batch: int = 128
    images: int = 5000
    """Made-up images, where no real ones are given."""
    samples: int = 5000
    """K of a log-likelihood."""
    chunk: int = 500
    image_batches: tuple[int, ...] = (16, 128)
    """Images at once in a log-likelihood."""
    test_images: int = 500
    """Test images of the evaluation after training."""
    least_seconds: float = 0.2
    """Shortest time of one timing."""


TINY = Sizes(
    dims=(784,),
    steps=(("vae", 1), ("vlae", 1)),
    latent=3,
    hidden=(16,),
    channels=(2, 3),
    batch=8,
    images=64,
    samples=50,
    chunk=25,
    image_batches=(4,),
    test_images=8,
    least_seconds=0.0,
)


class Settings(NamedTuple):
    """The choices given to the command."""

    data_dir: str | None
    tiny: bool
    train_seconds: float

    @property
    def sizes(self) -> Sizes:
        """The paper's, or tiny ones."""
        return TINY if self.tiny else Sizes()


class Lines(NamedTuple):
    """The file of rows and notes."""

    file: Path

    def row(self, table: str, **columns: Any) -> None:
        """Append a row of a table."""
        self._append({"table": table, **columns})

    def note(self, text: str) -> None:
        """Append a note."""
        self._append({"note": text})

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def stand_in_for_what_is_missing(lines: Lines) -> None:
    """Let the package be imported where two of its libraries are not installed."""
    if importlib.util.find_spec("pydantic") is None:
        lines.note("pydantic is not installed: done without, no run folder can be read")
        sys.modules["pydantic"] = _module("pydantic", TypeAdapter=None, ValidationError=ValueError)
    if importlib.util.find_spec("arviz_stats") is None:
        lines.note("arviz-stats is not installed: done without, the k-hat share is missing")
        no_shape = SimpleNamespace(psislw=lambda log_weights: (log_weights, np.nan))
        sys.modules["arviz_stats"] = _module("arviz_stats")
        sys.modules["arviz_stats.base"] = _module("arviz_stats.base", array_stats=no_shape)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def device(settings: Settings, lines: Lines) -> None:
    """The device, what runs on it, and how fast one product is."""
    from benchmarks.measure import GEMM, gemm_rate

    versions = {name: version for name in PACKAGES if (version := _version(name))}
    lines.row(
        "device",
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.default_backend()}",
        python=platform.python_version(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        precision=jax.config.jax_default_matmul_precision or "JAX's default",  # type: ignore[attr-defined]
    )
    if not settings.tiny:
        rows, inner, columns = GEMM
        lines.note(
            f"{gemm_rate() / 1e9:.0f} GFLOP/s in one float32 product of {rows} x {inner} by "
            f"{inner} x {columns}"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tests(settings: Settings, lines: Lines) -> None:
    """Every test that is marked `accelerator`."""
    if importlib.util.find_spec("pytest") is None:
        lines.note("pytest is not installed: left out")
        return
    import pytest

    files = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in f.read_text()]
    if not files:
        lines.note("no test is marked `accelerator`")
        return

    class Recorder:
        """Writes each test's outcome when it is known."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                name, seconds = report.nodeid.removeprefix("tests/"), report.duration
                lines.row("tests", test=name, outcome=report.outcome, seconds=seconds)

    only = ["-q", "-m", "accelerator", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*only, *files], plugins=[Recorder()])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        lines.note("no test that is marked `accelerator` was chosen")
    elif code:
        raise SystemExit(f"pytest: exit code {int(code)}")


def steps(network: Literal["mlp", "conv"], settings: Settings, lines: Lines) -> None:
    """Training steps of one kind of network."""
    from vlae_jax.models.initial import initialize
    from vlae_jax.parallel.placement import Placement
    from vlae_jax.training.step import Trainer

    sizes = settings.sizes
    for dim in sizes.dims:
        dataset, vae = _images(dim, settings), None
        for method, count in sizes.steps:
            trained = initialize(_config(settings, dataset.name, method, count, network), dataset)
            trainer = Trainer(trained, dataset, Placement.here())
            state, arguments = trainer.init(), trainer.feed.arguments(0)
            compiled, seconds = _compiled(trainer.step, state, *next(arguments))

            def step(state: Any, compiled: Any = compiled, arguments: Any = arguments) -> Any:
                return compiled(state, *next(arguments))[0]

            state, times = _time(step, state, sizes.least_seconds)
            median = statistics.median(times)
            vae = vae or median
            lines.row(
                "steps",
                network=network,
                D=dim,
                system=_words(trained),
                batch=sizes.batch,
                ms=1e3 * median,
                best_ms=1e3 * min(times),
                times_VAE=median / vae,
                compile_s=seconds,
                temp_MB=_temp_bytes(compiled) / 1e6,
                finite=int(state.bad_step) < 0,
            )
            del state, trainer, compiled, step


def log_prob(settings: Settings, lines: Lines) -> None:
    """Importance-weighted log-likelihoods, the inference of the posterior included."""
    from vlae_jax.bounds import importance_weighted_log_prob
    from vlae_jax.models.initial import initialize
    from vlae_jax.models.trained import Trained

    sizes = settings.sizes
    weigh = functools.partial(
        importance_weighted_log_prob, num_samples=sizes.samples, chunk_size=sizes.chunk
    )

    def one(trained: Trained, pixels: jax.Array, key: jax.Array) -> jax.Array:
        inferred = trained.infer(key, pixels)
        return weigh(inferred.keys.bound, inferred.log_joint, inferred.posterior)[0]

    for dim in sizes.dims:
        dataset = _images(dim, settings)
        for method in ("vlae", "vae"):
            trained = initialize(_config(settings, dataset.name, method, 4), dataset).factored()
            for count in sizes.image_batches:
                images = jnp.asarray(dataset.test[:count])
                keys = jax.random.split(jax.random.key(0), len(images))
                function = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
                compiled, seconds = _compiled(function, trained, images, keys)
                call = functools.partial(_ignoring_the_last, compiled, (trained, images, keys))
                found, times = _time(call, None, sizes.least_seconds)
                lines.row(
                    "log_prob",
                    D=dim,
                    system=_words(trained),
                    K=sizes.samples,
                    images_at_once=len(images),
                    ms_an_image=1e3 * statistics.median(times) / len(images),
                    compile_s=seconds,
                    temp_MB=_temp_bytes(compiled) / 1e6,
                    finite=bool(jnp.isfinite(found).all()),
                )


def train(method: str, settings: Settings, lines: Lines) -> None:
    """The published settings for MNIST, trained for some seconds and evaluated."""
    import dataclasses

    from vlae_jax.analysis.evaluation import evaluate
    from vlae_jax.models.initial import initialize
    from vlae_jax.parallel.placement import Placement
    from vlae_jax.runs.presets import default_config
    from vlae_jax.training.step import Trainer

    sizes = settings.sizes
    dataset = _images(784, settings)
    config = default_config(dataset.name, method, "paper-screenshot")
    if settings.tiny:
        model = dataclasses.replace(config.model, latent=sizes.latent, hidden=sizes.hidden)
        training = dataclasses.replace(config.training, batch_size=sizes.batch)
        config = dataclasses.replace(config, model=model, training=training)
    trained = initialize(config, dataset)
    trainer = Trainer(trained, dataset, Placement.here())
    state, arguments = trainer.init(), trainer.feed.arguments(0)
    compiled, compile_seconds = _compiled(trainer.step, state, *next(arguments))
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < settings.train_seconds:
        for _ in range(20):
            state, loss = compiled(state, *next(arguments))
        jax.block_until_ready(loss)
    count = int(state.step)
    lines.row(
        "training",
        system=_words(trained),
        data=f"{dataset.name}, {len(dataset.train)} images",
        seconds=seconds,
        steps=count,
        epochs=count / trainer.steps_per_epoch,
        images_per_second=count * config.training.batch_size / seconds,
        compile_s=compile_seconds,
        last_loss=float(loss),
        finite=int(state.bad_step) < 0,
    )
    trained = trained.with_params(state.params).with_config(
        "evaluation",
        importance_samples=sizes.samples,
        chunk_size=sizes.chunk,
        evaluation_batch=max(sizes.image_batches),
    )
    images = dataset.test[: sizes.test_images]
    began = time.perf_counter()
    metrics = {metric.name: metric for metric in evaluate(trained, images).metrics}
    seconds = time.perf_counter() - began
    lines.row(
        "evaluation",
        system=_words(trained),
        images=len(images),
        K=sizes.samples,
        ELBO=metrics["elbo"].value,
        log_p=metrics["log_prob"].value,
        log_p_standard_error=metrics["log_prob"].standard_error,
        k_hat_above_0_7=None if np.isnan(k := metrics["unreliable"].value) else k,
        not_finite=metrics["not_finite"].value,
        seconds=seconds,
    )


def _images(dim: int, settings: Settings) -> Any:
    """MNIST from the folder that was given; made-up pictures in its place, and in other sizes."""
    from benchmarks.scaling_programs import low_rank_images
    from vlae_jax.data.sets import dataset_from_arrays, load_dataset

    if dim == 784 and settings.data_dir:
        return load_dataset("mnist", settings.data_dir)
    images = low_rank_images(settings.sizes.images, SHAPES[dim])
    tests = max(*settings.sizes.image_batches, settings.sizes.test_images)
    return dataset_from_arrays(images, images[:tests])._replace(name="made-up pictures")


def _config(
    settings: Settings,
    dataset: str,
    method: str,
    steps: int,
    network: Literal["mlp", "conv"] = "mlp",
) -> Any:
    from vlae_jax.runs import config as c

    sizes = settings.sizes
    return c.Config(
        data=c.DataConfig(dataset=dataset),
        model=c.ModelConfig(
            latent=sizes.latent, hidden=sizes.hidden, channels=sizes.channels, network=network
        ),
        inference=c.InferenceConfig(method=method, steps=steps),
        training=c.TrainingConfig(batch_size=sizes.batch),
    )


def _words(trained: Any) -> str:
    inference = trained.config.inference
    steps = inference.num_steps
    return inference.label if steps is None else f"{inference.label}, T = {steps}"


def _compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds of tracing and compilation."""
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def _temp_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def _ignoring_the_last(function: Callable[..., Any], arguments: tuple[Any, ...], _: Any) -> Any:
    return function(*arguments)


def _time(
    function: Callable[[Any], Any], value: Any, least_seconds: float
) -> tuple[Any, list[float]]:
    """Seconds of one call, several times; each takes the result of the one before.

    An accelerator runs behind the program that feeds it: a quick function is called so often
    before it is waited for that a timing takes `least_seconds`.
    """
    value = jax.block_until_ready(function(value))
    began = time.perf_counter()
    value = jax.block_until_ready(function(value))
    calls = 1 + int(least_seconds / (time.perf_counter() - began))
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        for _ in range(calls):
            value = function(value)
        jax.block_until_ready(value)
        times.append((time.perf_counter() - began) / calls)
    return value, times


PARTS: dict[str, Callable[[Settings, Lines], None]] = {
    "device": device,
    "tests": tests,
    "steps-mlp": functools.partial(steps, "mlp"),
    "steps-conv": functools.partial(steps, "conv"),
    "log_prob": log_prob,
    "train-vae": functools.partial(train, "vae"),
    "train-vlae": functools.partial(train, "vlae"),
}


def main() -> None:
    """Run one part."""
    name, settings, file = sys.argv[1:]
    lines = Lines(Path(file))
    stand_in_for_what_is_missing(lines)
    PARTS[name](Settings(**json.loads(settings)), lines)


if __name__ == "__main__":
    main()
