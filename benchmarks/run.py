"""Measure what training and evaluation cost, beside baselines that take turns with them.

`python -m benchmarks.run` prints Markdown tables and writes all numbers as JSON. PyTorch, if it
is installed, is measured too; it is no dependency of the project.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measure import Program, compile_program, gemm_rate, time_in_turns
from benchmarks.programs import (
    ConvolutionalDecoder,
    Network,
    Problem,
    Sizes,
    build_problem,
    convolutional_step,
    log_probs,
    posteriors,
    system_step,
    training_gradient,
)
from vlae_jax.runs.config import InferenceConfig

SECTIONS = {
    "step": "Training step: value and gradient of the loss, encoder included",
    "log_prob": "Importance-weighted log-likelihood, per image",
    "posterior": "Posterior only",
    "convolutions": "Step with a convolutional decoder of 28 × 28 pixels, batch 32, no encoder",
}
BASELINES = {
    "step": (
        "torch jacobian unroll paper",
        "torch gram unroll paper",
        "hessian implicit paper cholesky",
    ),
    "log_prob": ("torch", "torch distributions", "full decode"),
    "posterior": ("hessian line_search cholesky", "jacobian line_search cholesky"),
    "convolutions": ("hessian",),
}
"""The rows that speed-ups of a section are relative to. Torch's step is the paper's algorithm."""
STEPS = (
    ("gram", "implicit", "line_search", "cg"),
    ("gram", "implicit", "line_search", "cholesky"),
    ("gram", "stop", "line_search", "cg"),
    ("gram", "unroll", "line_search", "cg"),
    ("gram", "unroll", "paper", "cg"),
    ("gram", "unroll", "paper", "cholesky"),
    ("jacobian", "implicit", "paper", "cholesky"),
    ("jacobian", "unroll", "paper", "cholesky"),
    ("hessian", "implicit", "paper", "cholesky"),
    ("hessian", "unroll", "paper", "cholesky"),
)
POSTERIORS = (
    ("gram", "line_search", "cg"),
    ("gram", "line_search", "cholesky"),
    ("jacobian", "line_search", "cholesky"),
    ("hessian", "line_search", "cholesky"),
)
CONVOLUTIONS = {
    "gauss_newton": ("gauss_newton", None),
    "gauss_newton chunks of 5": ("gauss_newton", 5),
    "hessian": ("hessian", None),
    "hessian chunks of 5": ("hessian", 5),
}
NETWORKS = {
    "mlp 20": Network((28, 28, 1), 20, (200, 200)),
    "conv 20": Network((32, 32, 3), 20, (128,), (16, 32), batch=64),
    "conv 128": Network((32, 32, 3), 128, (128,), (16, 32), batch=64),
}
"""The networks of the section of systems, with their latent dimensions."""
SYSTEMS = {
    "vae": InferenceConfig(method="vae"),
    "exact 1": InferenceConfig(steps=1),
    "exact 4": InferenceConfig(steps=4),
    "matrix-free 1": InferenceConfig(steps=1, posterior="matrix_free"),
    "matrix-free 4": InferenceConfig(steps=4, posterior="matrix_free"),
    "scaled matrix-free 1": InferenceConfig(steps=1, search="scaled", posterior="matrix_free"),
    "scaled matrix-free 4": InferenceConfig(steps=4, search="scaled", posterior="matrix_free"),
}
"""Its systems, with their steps T."""
SECTIONS |= {f"systems {name}": f"Training step of {name}, encoder included" for name in NETWORKS}
BASELINES |= {f"systems {name}": ("vae",) for name in NETWORKS}
QUICK = Sizes(dim=48, latent=3, hidden=16, batch=4, steps=2, images=2, samples=20, chunk=10)
CURVES: dict[str, tuple[int, ...]] = {
    "steps": (1, 2, 4, 8, 16),
    "latent": (10, 25, 50, 100, 200),
    "hidden": (125, 250, 500, 1000),
    "dim": (196, 784, 3072, 12288),
    "batch": (32, 128, 512),
    "samples": (500, 5000, 20000),
}


class Case(NamedTuple):
    """One row to measure."""

    section: str
    name: str
    sizes: Sizes
    call: Callable[[], Any]
    program: Program | None
    """The compiled program of a JAX row."""
    per: int = 1
    """Images the call's seconds are divided by."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    if not options.quick:
        # The time of compilation is measured too.
        jax.config.update("jax_enable_compilation_cache", False)
    torch = None if options.without_torch else load_torch()
    setting = describe_setting(sys.argv[1:] if arguments is None else arguments)
    setting["jax_gemm_gigaflops"] = gemm_rate() / 1e9
    if torch:
        setting["versions"] += f", torch {metadata.version('torch')}"
        setting["torch_gemm_gigaflops"] = torch.gemm_rate() / 1e9
    for name, value in setting.items():
        print(f"- {name}: {value:.1f}" if isinstance(value, float) else f"- {name}: {value}")
    found = grow(options, setting) if options.curves else compare(options, setting, torch)
    if torch is None and not options.curves:
        print("\nPyTorch is not installed, or was left out: its rows and ratios are missing.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"setting": setting, **found}, indent=1) + "\n")


def compare(options: argparse.Namespace, setting: dict[str, Any], torch: Any) -> dict[str, Any]:
    """Every row beside its baselines."""
    rows: list[dict[str, Any]] = []
    agreement: list[str] = []
    for sizes in (QUICK,) if options.quick else (Sizes(), Sizes(dim=3072)):
        problem = build_problem(sizes)
        cases = [
            *step_cases(problem, options.only, torch),
            *log_prob_cases(problem, options.only, torch),
            *posterior_cases(problem, options.only),
            *(convolution_cases(sizes, options.only) if sizes.dim != 3072 else ()),
            *(system_cases(sizes, options) if sizes.dim != 3072 else ()),
        ]
        rows += measure(cases, setting, options)
        calls = {(case.section, case.name): case.call for case in cases}
        agreement += compare_with_torch(problem, calls, torch)
    add_speed_ups(rows)
    for section in SECTIONS:
        print_rows(section, [row for row in rows if row["section"] == section])
    if agreement:
        print("\nThe same numbers:\n")
        print("\n".join(f"- {line}" for line in agreement))
    return {"rows": rows, "agreement": agreement}


def grow(options: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """The default step, and the log-likelihood, as one size after the other varies."""
    rows: list[dict[str, Any]] = []
    for varied, values in CURVES.items():
        for value in (2, 4) if options.quick else values:
            sizes = (QUICK if options.quick else Sizes())._replace(**{varied: value})
            cases = curve_cases(build_problem(sizes), varied, options.only)
            rows += measure([*cases], setting, options)
    print_curves(rows)
    return {"rows": rows}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", default="", help="rows whose 'section name' contains this")
    parser.add_argument(
        "--curves", action="store_true", help="instead: growth, one size varied at a time"
    )
    parser.add_argument("--without-torch", action="store_true", help="even if it is installed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each row")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"), help="JSON file")
    return parser.parse_args(arguments)


def count_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_torch() -> Any:
    """The module with the PyTorch baseline, ready; None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    from benchmarks import pytorch_baseline

    pytorch_baseline.prepare(count_cores())
    return pytorch_baseline


def describe_setting(arguments: list[str]) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    packages = ("vlae-jax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    return {
        "command": " ".join(["python -m benchmarks.run", *arguments]),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu}, {count_cores()} cores",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def jax_case(
    section: str, name: str, sizes: Sizes, function: Any, *arguments: Any, per: int = 1
) -> Case:
    """Compile, and wait to be timed."""
    program = compile_program(function, *arguments)
    return Case(section, name, sizes, lambda: program.run(*arguments), program, per)


def step_cases(problem: Problem, only: str, torch: Any) -> Iterator[Case]:
    """Training steps, of this package and of PyTorch."""
    sizes = problem.sizes
    for choice in STEPS:
        name = " ".join(choice)
        if only in f"step {name}":
            function = training_gradient(problem, *choice)
            arguments = (problem.params, problem.xs, problem.keys)
            yield jax_case("step", name, sizes, function, *arguments)
    if torch:
        model = torch.TorchVLAE(problem.model(problem.params))
        x = torch.tensor(problem.xs)

        def step(by_gram: bool) -> None:
            noise = torch.normal(sizes.batch, sizes.latent)
            model.gradient(x, noise, sizes.steps, by_gram=by_gram)

        for curvature, by_gram in (("jacobian", False), ("gram", True)):
            name = f"torch {curvature} unroll paper"
            if only in f"step {name}":
                yield Case("step", name, sizes, functools.partial(step, by_gram), None)


def posterior_cases(problem: Problem, only: str) -> Iterator[Case]:
    """The inference alone."""
    for choice in POSTERIORS:
        name = " ".join(choice)
        if only in f"posterior {name}":
            function = posteriors(problem, *choice)
            yield jax_case("posterior", name, problem.sizes, function, problem.params, problem.xs)


def convolution_cases(sizes: Sizes, only: str) -> Iterator[Case]:
    """A generic decoder: the Jacobian and the Hessian at once and in chunks of columns."""
    decoder = ConvolutionalDecoder(sizes.latent)
    batch = min(sizes.batch, 32)
    key_w, key_z, key = jax.random.split(jax.random.key(3), 3)
    weights = decoder.init(key_w)
    zs = jax.random.normal(key_z, (batch, sizes.latent))
    xs = jax.vmap(functools.partial(decoder.decode, weights))(zs)
    sizes = sizes._replace(dim=xs.shape[1], batch=batch)
    for name, (curvature, chunk_size) in CONVOLUTIONS.items():
        if only in f"convolutions {name}":
            function = convolutional_step(decoder, curvature, chunk_size, sizes.steps)
            arguments = (weights, xs, jax.random.split(key, batch))
            yield jax_case("convolutions", name, sizes, function, *arguments)


def system_cases(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """Steps of whole systems, as shares of a VAE's on the same network."""
    for network_name, network in NETWORKS.items():
        if options.quick:
            channels = (2,) * len(network.channels)
            network = network._replace(shape=(8, 8, 1), hidden=(4,), channels=channels, batch=2)
        dim = math.prod(network.shape)
        shown = sizes._replace(dim=dim, latent=network.latent, batch=network.batch)
        for name, inference in SYSTEMS.items():
            section = f"systems {network_name}"
            if options.only in f"{section} {name}":
                function, arguments = system_step(network, inference)
                yield jax_case(section, name, shown, function, *arguments)


def given_posteriors(problem: Problem) -> tuple[jax.Array, ...]:
    """Some images with the means and precisions to propose from, and keys."""
    images = problem.sizes.images
    xs = jnp.resize(problem.xs, (images, problem.sizes.dim))
    infer = posteriors(problem, "gram", "line_search", "auto")
    found = jax.jit(infer)(problem.params, xs)
    precisions = found.chol_precision @ found.chol_precision.mT
    return xs, found.mean, precisions, jax.random.split(jax.random.key(2), images)


def log_prob_cases(problem: Problem, only: str, torch: Any) -> Iterator[Case]:
    """Log-likelihood estimates from the same proposals, of this package and of PyTorch."""
    sizes = problem.sizes
    names = ["whitened head", "full decode", *(("torch", "torch distributions") if torch else ())]
    names = [name for name in names if only in f"log_prob {name}"]
    if not names:
        return
    xs, means, precisions, keys = given_posteriors(problem)
    for name in names:
        if name.startswith("torch"):
            model = torch.TorchVLAE(problem.model(problem.params))
            given = [torch.tensor(array) for array in (xs, means, precisions)]
            function = model.log_prob if name == "torch" else model.log_prob_by_distributions
            call = functools.partial(function, *given, samples=sizes.samples, chunk=sizes.chunk)
            yield Case("log_prob", name, sizes, call, None, sizes.images)
        else:
            # The factorization is one for a whole test set, and not timed.
            model = problem.model(problem.params)
            head = model.whitened_head() if name == "whitened head" else None
            arguments = (problem.params, head, xs, means, precisions, keys)
            function = log_probs(problem)
            yield jax_case("log_prob", name, sizes, function, *arguments, per=sizes.images)


def curve_cases(problem: Problem, varied: str, only: str) -> Iterator[Case]:
    """The default training step, or for `samples` the log-likelihood."""
    sizes = problem.sizes
    name = f"{varied} {getattr(sizes, varied)}"
    if only not in f"curves {name}":
        return
    if varied == "samples":
        given = given_posteriors(problem)
        head = problem.model(problem.params).whitened_head()
        arguments = (problem.params, head, *given)
        yield jax_case("curves", name, sizes, log_probs(problem), *arguments, per=sizes.images)
    else:
        given = (problem.xs, problem.keys)
        function = training_gradient(problem, "gram", "implicit", "line_search", "auto")
        yield jax_case("curves", name, sizes, function, problem.params, *given)


def measure(
    cases: list[Case], setting: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the cases in turns; one row each."""
    timings = time_in_turns(
        {f"{case.section} {case.name}": case.call for case in cases},
        rounds=1 if options.quick else options.rounds,
        seconds_each=0.0 if options.quick else 0.5,
    )
    rows = []
    for case in cases:
        timing = timings[f"{case.section} {case.name}"]
        row = {
            "section": case.section,
            "name": case.name,
            "sizes": case.sizes._asdict(),
            "best_seconds": timing.best / case.per,
            "median_seconds": timing.median / case.per,
            "calls": timing.calls,
        }
        if case.program:
            row |= {
                "compile_seconds": case.program.compile_seconds,
                "gigaflop": case.program.flops / 1e9 / case.per,
                "temp_megabytes": case.program.temp_bytes / 1e6,
                "share_of_gemm": case.program.flops
                / timing.best
                / (1e9 * setting["jax_gemm_gigaflops"]),
            }
        rows.append(row)
    return rows


def add_speed_ups(rows: list[dict[str, Any]]) -> None:
    """Divide the time of each baseline of a row's section and size by the time of the row."""
    seconds = {(r["section"], r["name"], r["sizes"]["dim"]): r["best_seconds"] for r in rows}
    for row in rows:
        section, dim = row["section"], row["sizes"]["dim"]
        row["speed_up"] = {
            baseline: seconds[section, baseline, dim] / row["best_seconds"]
            for baseline in BASELINES[section]
            if (section, baseline, dim) in seconds
        }


def compare_with_torch(
    problem: Problem, calls: dict[tuple[str, str], Callable[[], Any]], torch: Any
) -> list[str]:
    """Compare the numbers of both libraries, as far as the rows that ran can tell."""
    lines = []
    sizes = problem.sizes
    paper = "gram unroll paper cholesky"
    if torch and ("step", paper) in calls:
        model = torch.TorchVLAE(problem.model(problem.params))
        first = jax.vmap(jax.random.fold_in, in_axes=(0, None))(problem.keys, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (sizes.latent,)))(first)
        loss, gradient = calls["step", paper]()
        layer = problem.model(gradient).head
        assert isinstance(layer, nnx.Linear)
        ours = np.asarray(layer.kernel[...]).T
        head = next(i for i, p in enumerate(model.parameters) if p is model.decoder[-1][0])
        for curvature, by_gram in (("jacobian", False), ("gram", True)):
            theirs, gradients = model.gradient(
                torch.tensor(problem.xs), torch.tensor(noise), sizes.steps, by_gram=by_gram
            )
            difference = gradients[head].numpy() - ours
            error = np.linalg.norm(difference) / np.linalg.norm(ours)
            lines.append(
                f"D={sizes.dim}, loss: {paper} {float(loss):.4f}, torch {curvature} "
                f"unroll paper {float(theirs):.4f} nats; relative difference of the gradient "
                f"of the last layer: {error:.1e}"
            )
    default = calls.get(("log_prob", "whitened head"))
    for name in ("full decode", "torch", "torch distributions"):
        if default and (other := calls.get(("log_prob", name))):
            estimates, errors = default()
            theirs = other()[0] if name == "full decode" else other()
            difference = np.mean(np.asarray(theirs) - np.asarray(estimates))
            standard_error = np.sqrt(2 * np.sum(np.square(errors))) / sizes.images
            same = "same samples" if name == "full decode" else f"error {standard_error:.3f}"
            lines.append(
                f"D={sizes.dim}, mean log p(x): {name} - whitened head = {difference:.4f} nats "
                f"of {np.mean(estimates):.1f}; {same}"
            )
    return lines


def print_rows(section: str, rows: list[dict[str, Any]]) -> None:
    """The table of one section."""
    if not rows:
        return
    baselines = [b for b in BASELINES[section] if any(b in row["speed_up"] for row in rows)]
    head = ["D", "row", "ms", "compile s", "GFLOP", "temp MB", "% of GEMM"]
    print(f"\n### {SECTIONS[section]}\n")
    print_table([*head, *(f"× {baseline}" for baseline in baselines)])
    for row in rows:
        speed_ups = (row["speed_up"].get(baseline) for baseline in baselines)
        ratios = (None if speed_up is None else f"{speed_up:.2f}" for speed_up in speed_ups)
        print_line([row["sizes"]["dim"], row["name"], *shared_cells(row), *ratios])


def print_curves(rows: list[dict[str, Any]]) -> None:
    """The table of growth, with the exponent of each size between neighbouring points."""
    head = ["varied", "ms", "compile s", "GFLOP", "temp MB", "% of GEMM", "exponent"]
    print("\n### Growth of the default step; K: of a log-likelihood, per image\n")
    print_table(head)
    before: tuple[str, int, float] = ("", 0, 0.0)
    for row in rows:
        varied, value = row["name"].split()
        seconds, exponent = row["best_seconds"], None
        if before[0] == varied:
            growth = math.log(seconds / before[2]) / math.log(int(value) / before[1])
            exponent = f"{growth:.2f}"
        print_line([row["name"], *shared_cells(row), exponent])
        before = (varied, int(value), seconds)


def shared_cells(row: dict[str, Any]) -> list[str | None]:
    """The columns that all tables share."""
    if "gigaflop" not in row:
        return [f"{1e3 * row['best_seconds']:.1f}", None, None, None, None]
    return [
        f"{1e3 * row['best_seconds']:.1f}",
        f"{row['compile_seconds']:.1f}",
        f"{row['gigaflop']:.1f}",
        f"{row['temp_megabytes']:.0f}",
        f"{100 * row['share_of_gemm']:.0f}",
    ]


def print_table(head: list[str]) -> None:
    """The first two lines of a Markdown table."""
    print_line(head)
    print_line(["---"] * len(head))


def print_line(cells: list[Any]) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
