"""The scaling of training: on paper for TPU v5e, and measured as far as one machine can show it.

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
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import hlo, scaling_measure, scaling_report
from benchmarks.scaling_programs import (
    CASES,
    SYSTEMS,
    Case,
    build,
    exported,
    foreign_calls,
    lower,
    tpu_devices,
)
from benchmarks.scaling_results import read, setting, write
from vlae_jax.conjugate_gradients import conjugate_gradients
from vlae_jax.data.supplied import as_dataset
from vlae_jax.expansions import MatrixFreeExpansion
from vlae_jax.models.saved import load
from vlae_jax.models.trained import Trained
from vlae_jax.refinement import SHORTFALL
from vlae_jax.training.loop import require_same_images


def describe(case: Case, trained: Trained, compiled: Any) -> dict[str, Any]:
    """The cost of a compiled program: once, and for each product of conjugate gradients.

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
    leaves = jax.tree.leaves(trained.params)
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
        trained, dataset = build(case)
        devices = tpu_devices(case.chips)
        began = time.perf_counter()
        try:
            lowered = lower(case, trained, dataset, devices)
            compiled = lowered.compile()
        except Exception as error:  # the compiler's refusal is a result too
            row = {**case._asdict(), "system": case.system, "error": " ".join(str(error).split())}
            row["error"] = row["error"][:500]
        else:
            row = describe(case, trained, compiled)
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
            program = exported(*build(case))
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


def count_products(trained: Trained, pixels: np.ndarray) -> list[int]:
    """Products that conjugate gradients make for one batch, in each step of the mode search.

    A batch goes on until its last image is done, so that its size matters.
    """
    count = 0

    def note(_: Any) -> None:
        nonlocal count
        count += 1

    batch = len(pixels)
    keys = jax.random.split(jax.random.key(0), batch)

    def iterates(key: jax.Array, image: jax.Array) -> jax.Array:
        return trained.infer(key, image).inference.iterates

    def one(key: jax.Array, image: jax.Array, z: jax.Array) -> Any:
        expand, _ = trained.infer(key, image).at.expansions()
        assert isinstance(expand, MatrixFreeExpansion)
        _, grad, times, _ = expand.products(z)

        def counted(v: jax.Array) -> jax.Array:
            jax.debug.callback(note, v[0])
            return times(v)

        return conjugate_gradients(counted, grad, shortfall=SHORTFALL)

    direction = jax.jit(jax.vmap(one))
    paths = np.asarray(jax.jit(jax.vmap(iterates))(keys, pixels))
    found = []
    for start in np.moveaxis(paths, 1, 0)[:-1]:
        count = 0
        jax.block_until_ready(direction(keys, pixels, start))
        jax.effects_barrier()
        found.append(count // batch)
    return found


def run_products(options: argparse.Namespace) -> None:
    """Count the products of conjugate gradients in a trained run, by size of the batch."""
    trained = load(options.run_folder)
    config = trained.config
    data_dir = options.data_dir or config.data.data_dir
    dataset = as_dataset(None, dataclasses.replace(config.data, data_dir=data_dir))
    require_same_images(trained.provenance.fingerprint, dataset)
    rows = []
    for batch in options.batches:
        found = count_products(trained, dataset.train[np.arange(batch)])
        rows.append({"batch": batch, "products": found})
        print(f"batch {batch}: {found} products", flush=True)
    about = {
        "dataset": config.data.dataset,
        "hidden": config.model.hidden,
        "latent": config.model.latent,
        "epochs": config.training.epochs,
        "image_shape": trained.preprocessor.image_shape,
    }
    write("products", {"setting": setting(), **about, "rows": rows})


def main(arguments: Iterable[str] | None = None) -> None:
    """Run one part."""
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
