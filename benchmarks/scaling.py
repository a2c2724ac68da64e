"""How training scales: on paper for TPU v5e, and measured as far as one machine can show it.

    python -m benchmarks.scaling export      lower every system's step for TPUs
    python -m benchmarks.scaling compile     compile it with the TPU's compiler, without a TPU
    python -m benchmarks.scaling products    count the products of conjugate gradients
    python -m benchmarks.scaling measure     time 1 and 2 processes, and virtual devices
    python -m benchmarks.scaling report      set the tables of docs/scaling.md

Each of the first four replaces its part of `benchmarks/results/scaling.json`. `compile` needs
libtpu (`pip install -c constraints.txt -e '.[train,tpu]'`) and takes minutes a program: it keeps
what it has, and goes on where it stopped.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import hlo
from benchmarks.roofline import SLICES
from vlae_jax.config import Config, DataConfig, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.distributed import Placement
from vlae_jax.experiment import Experiment, build_experiment
from vlae_jax.refinement import SHORTFALL
from vlae_jax.training import Trainer

RESULTS = Path(__file__).parent / "results" / "scaling.json"
METHODS = ("vae", "vlae", "sa_vae", "vae_iaf")
BATCH = 128
"""Images a chip."""
IMAGES = {784: (54_000, 28, 28, 1), 3072: (45_000, 32, 32, 3)}
"""MNIST's and CIFAR10's training images, validation split off."""
SWEEP = (4, 16, 64, 256, 1024)
FOREIGN = re.compile(r"stablehlo\.custom_call @([\w.$]+)")
KNOWN = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"}
"""Custom calls that are no calls: marks for the partitioner."""


class Case(NamedTuple):
    """A program to compile."""

    method: str
    dim: int = 784
    network: str = "mlp"
    chips: int = 1
    batch: int = BATCH
    shard_parameters: bool = False

    @property
    def system(self) -> str:
        """What is trained, in words."""
        return f"{self.method} {'conv ' if self.network == 'conv' else ''}{self.dim}"

    @property
    def name(self) -> str:
        """All of it in words."""
        split = ", parameters split" if self.shard_parameters else ""
        return f"{self.system}, {self.chips} x {self.batch}{split}"


SYSTEMS = [
    *(Case(method, dim) for dim in (784, 3072) for method in METHODS),
    *(Case(method, 784, "conv") for method in METHODS),
]
CASES = [
    *SYSTEMS,
    *(case._replace(chips=8) for case in SYSTEMS if case.network == "mlp"),
    *(Case(method, chips=chips) for chips in (64, 256) for method in ("vae", "vlae")),
    *(Case("vlae", chips=chips, shard_parameters=True) for chips in (8, 256)),
    *(Case(method, batch=batch) for batch in SWEEP for method in ("vae", "vlae")),
]


class OnPaper(Placement):
    """A placement on devices that are not there: arrays become their shapes and shardings."""

    def put(self, tree: Any, shardings: Any = None) -> Any:
        """Describe what would be placed."""
        if shardings is None or isinstance(shardings, jax.sharding.Sharding):
            one = shardings or self.replicated
            return jax.tree.map(lambda leaf: _shape(leaf, one), tree)
        return jax.tree.map(_shape, tree, shardings)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def build(case: Case, *, hidden: Sequence[int] = (500, 500), latent: int = 50) -> Experiment:
    """The experiment of a case, on noise in place of images: as many as it would have."""
    shape = IMAGES[case.dim]
    config = Config(
        data=DataConfig(dataset="noise"),
        model=ModelConfig(network=case.network, hidden=tuple(hidden), latent=latent),  # type: ignore[arg-type]
        inference=InferenceConfig(method=case.method),
        training=TrainingConfig(batch_size=case.chips * case.batch),
    )
    return experiment_on(config, np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def experiment_on(config: Config, images: np.ndarray) -> Experiment:
    """An experiment that trains on these images."""
    with tempfile.TemporaryDirectory() as folder:
        few = images[: max(300, 2 * config.training.batch_size)]
        np.savez(f"{folder}/{config.data.dataset}.npz", x_train=few, x_test=few[:10])
        here = dataclasses.replace(config.data, data_dir=folder)
        experiment = build_experiment(dataclasses.replace(config, data=here))
    return experiment._replace(dataset=experiment.dataset._replace(train=images))


def lower(case: Case, experiment: Experiment, devices: Sequence[Any]) -> Any:
    """The training step as it would run on these devices, lowered for them."""
    placement = OnPaper.of(devices, shard_parameters=case.shard_parameters)
    trainer = Trainer(experiment, placement)
    return trainer.step.lower(trainer.init(), *next(trainer.feed.arguments(0)))


def exported(experiment: Experiment) -> jax.export.Exported:
    """The training step on one device, lowered for TPUs on whatever machine this is."""
    placement = OnPaper.of(jax.local_devices()[:1])
    trainer = Trainer(experiment, placement)
    arguments = (trainer.init(), *next(trainer.feed.arguments(0)))
    return jax.export.export(trainer.step, platforms=["tpu"])(*arguments)


def foreign_calls(stablehlo: str) -> set[str]:
    """What a lowered program calls that is no operation of StableHLO: a library, if anything."""
    return set(FOREIGN.findall(stablehlo)) - KNOWN


def tpu_devices(chips: int) -> list[Any]:
    """The chips of a TPU v5e slice, to compile for."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock is taken, nor left
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    from jax.experimental import topologies

    rows, columns = SLICES[chips]
    host = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    name = f"v5e:{rows}x{columns}"
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **host).devices)


def describe(case: Case, experiment: Experiment, compiled: Any) -> dict[str, Any]:
    """What a compiled program costs: once, and for each product of conjugate gradients.

    A product is one in each of the T search steps. What does not search has none.
    """
    module = hlo.parse(compiled.as_text())
    cost: dict[str, dict[str, Any]] = {"once": {}, "product": {}}
    measures = {
        "flops": lambda trips: hlo.matmul_flops(module, unknown_trips=trips),
        "hbm_bytes": lambda trips: hlo.main_memory_bytes(module, unknown_trips=trips),
        "cycles": lambda trips: hlo.estimated_cycles(module, unknown_trips=trips),
    }
    for name, measure in measures.items():
        without, with_one = measure(0.0), measure(1.0)
        cost["once"][name] = without
        cost["product"][name] = jax.tree.map(lambda one, none: one - none, with_one, without)
    pairs = zip(
        hlo.collectives(module, devices=case.chips, unknown_trips=0.0),
        hlo.collectives(module, devices=case.chips, unknown_trips=1.0),
        strict=True,
    )
    memory, xla = compiled.memory_analysis(), compiled.cost_analysis()
    leaves = jax.tree.leaves(experiment.initial_params)
    return {
        **case._asdict(),
        "system": case.system,
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        **cost,
        "collectives": [
            {
                "kind": none.kind,
                "bytes": none.bytes,
                "devices": none.devices,
                "once": none.times,
                "product": one.times - none.times,
            }
            for none, one in pairs
        ],
        "custom_calls": sorted(hlo.custom_calls(module)),
        "xla": {"flops": xla.get("flops"), "bytes_accessed": xla.get("bytes accessed")},
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp", "generated_code")
        },
    }


def run_compile(options: argparse.Namespace) -> None:
    """Compile what is not compiled yet, or all that `--only` names."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for case in CASES:
        there = {row["name"] for row in read().get("compile", {}).get("rows", [])}
        if options.only not in case.name or (case.name in there and not options.again):
            continue
        experiment = build(case)
        devices = tpu_devices(case.chips)
        began = time.perf_counter()
        try:
            lowered = lower(case, experiment, devices)
            compiled = lowered.compile()
        except Exception as error:  # the compiler's refusal is a result too
            row = {**case._asdict(), "system": case.system, "error": " ".join(str(error).split())}
            row["error"] = row["error"][:500]
        else:
            row = describe(case, experiment, compiled)
            row["foreign_calls"] = sorted(foreign_calls(lowered.as_text()))
        row |= {"name": case.name, "compile_seconds": time.perf_counter() - began}
        print(f"{case.name}: {row['compile_seconds']:.0f} s {row.get('error', '')}", flush=True)
        rows = [r for r in read().get("compile", {}).get("rows", []) if r["name"] != case.name]
        names = [c.name for c in CASES]
        rows = [r for r in [*rows, row] if r["name"] in names]
        rows.sort(key=lambda r: names.index(r["name"]))
        write("compile", {"setting": setting("libtpu"), "rows": rows})


def run_export(options: argparse.Namespace) -> None:
    """Lower every system's step for TPUs."""
    rows = []
    for case in SYSTEMS:
        if options.only in case.name:
            program = exported(build(case))
            text = program.mlir_module()
            calls = sorted(foreign_calls(text))
            operations = sorted(set(re.findall(r"stablehlo\.([a-z_]+)", text)))
            wide = sorted(set(re.findall(r"tensor<(?:\d+x)*(f64|c128)>", text)))
            rows.append(
                {
                    "system": case.system,
                    "foreign_calls": calls,
                    "operations": operations,
                    "wide_types": wide,
                }
            )
            print(f"{case.system}: {calls or 'no foreign call'}; {wide or 'no 64-bit float'}")
    write("export", {"setting": setting(), "rows": rows})


def count_products(experiment: Experiment, params: Any, pixels: np.ndarray) -> list[int]:
    """Products that conjugate gradients make for one batch, in each step of the mode search.

    A batch goes on until its last image is done, so that its size matters.
    """
    count = 0

    def note(_: Any) -> None:
        nonlocal count
        count += 1

    batch = len(pixels)
    keys = jax.random.split(jax.random.key(0), batch)
    xs, _ = jax.vmap(experiment.preprocessor.apply)(keys, pixels)
    model = experiment.merge(params)

    def one(x, z):
        _, grad, times = model.expansions(x)[0].products(z)  # type: ignore[union-attr]

        def counted(v):
            jax.debug.callback(note, v[0])
            return times(v)

        return conjugate_gradients(counted, grad, shortfall=SHORTFALL)

    direction = jax.jit(jax.vmap(one))
    iterates = jax.jit(jax.vmap(lambda x, key: experiment.system(model, x, key).iterates))(xs, keys)
    found = []
    for start in np.moveaxis(np.asarray(iterates), 1, 0)[:-1]:
        count = 0
        jax.block_until_ready(direction(xs, start))
        jax.effects_barrier()
        found.append(count // batch)
    return found


def run_products(options: argparse.Namespace) -> None:
    """Count the products of conjugate gradients in a trained run, by size of the batch."""
    from vlae_jax.run_folder import RunFolder
    from vlae_jax.verbs import load_run

    experiment, params = load_run(RunFolder(options.run_folder), options.data_dir)
    rows = []
    for batch in options.batches:
        found = count_products(experiment, params, experiment.dataset.train[:batch])
        rows.append({"batch": batch, "products": found})
        print(f"batch {batch}: {found} products", flush=True)
    config = experiment.config
    about = {
        "dataset": config.data.dataset,
        "hidden": config.model.hidden,
        "latent": config.model.latent,
        "epochs": config.training.epochs,
        "image_shape": experiment.preprocessor.image_shape,
    }
    write("products", {"setting": setting(), **about, "rows": rows})


def low_rank_images(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Pictures with something to learn in them: ten random patterns, mixed and squashed."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(count, 10)) @ rng.normal(size=(10, int(np.prod(shape))))
    return np.uint8(255 / (1 + np.exp(-mixed))).reshape(count, *shape)


def read() -> dict[str, Any]:
    """All parts that there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(part: str, found: Any) -> None:
    """Replace one part."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**read(), part: found}, indent=1)
    RESULTS.write_text(text + "\n")


def setting(*packages: str) -> dict[str, Any]:
    """What figures depend on."""
    names = ("jax", "jaxlib", "flax", *packages)
    return {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:2]]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    """Run one part."""
    from benchmarks import scaling_measure, scaling_report

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(required=True)

    def part(name: str, run: Any) -> argparse.ArgumentParser:
        added = parts.add_parser(name, help=run.__doc__.splitlines()[0])
        added.set_defaults(run=run)
        return added

    part("export", run_export).add_argument("--only", default="", help="names that contain this")
    compiling = part("compile", run_compile)
    compiling.add_argument("--only", default="", help="names that contain this")
    compiling.add_argument("--again", action="store_true", help="even what is there")
    products = part("products", run_products)
    products.add_argument("run_folder", type=Path, help="of a VLAE that is trained")
    products.add_argument("--data-dir", default=None)
    products.add_argument("--batches", type=int, nargs="+", default=[128, 1024, 8192])
    scaling_measure.add_options(part("measure", scaling_measure.run))
    scaling_measure.add_worker_options(part("worker", scaling_measure.work))
    part("report", scaling_report.run)
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.run(options)


if __name__ == "__main__":
    main()
