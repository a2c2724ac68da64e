"""The benchmarks run, at sizes of no interest, and their FLOPs are counted right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="the benchmarks come with the repository only"
)
STEPS = {
    "gram implicit line_search cg",
    "gram implicit line_search cholesky",
    "gram stop line_search cg",
    "gram unroll line_search cg",
    "gram unroll paper cg",
    "gram unroll paper cholesky",
    "jacobian implicit paper cholesky",
    "jacobian unroll paper cholesky",
    "hessian implicit paper cholesky",
    "hessian unroll paper cholesky",
}
POSTERIORS = {
    "gram line_search cg",
    "gram line_search cholesky",
    "jacobian line_search cholesky",
    "hessian line_search cholesky",
}
CONVOLUTIONS = {
    "gauss_newton",
    "gauss_newton chunks of 5",
    "hessian",
    "hessian chunks of 5",
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Where the benchmarks are a package."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def options(folder, *arguments):
    return ["--quick", "--without-torch", "--output", str(folder / "bench.json"), *arguments]


def run(monkeypatch, folder, *arguments):
    """In this process, without rating the machine and with two of the curves."""
    from benchmarks import run as program

    monkeypatch.setattr(program, "gemm_rate", lambda: 1e9)
    monkeypatch.setattr(program, "CURVES", {"steps": (1,), "batch": (1,)})
    program.main(options(folder, *arguments))
    return json.loads((folder / "bench.json").read_text())


def names(found, section):
    return {row["name"] for row in found["rows"] if row["section"] == section}


def test_rows_chosen_by_name_are_measured_printed_and_written(tmp_path):
    """By the command as it is printed, in a process of its own."""
    arguments = options(tmp_path, "--only", "posterior jacobian")
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=quick)
    assert result.returncode == 0, result.stderr
    printed, found = result.stdout, json.loads((tmp_path / "bench.json").read_text())
    (row,) = found["rows"]
    assert row["name"] == "jacobian line_search cholesky"
    assert min(row["best_seconds"], row["compile_seconds"], row["gigaflop"]) > 0
    assert f"| {row['name']} |" in printed
    assert "jax" in found["setting"]["versions"]


def test_there_is_a_row_for_every_way(monkeypatch, tmp_path, capsys):
    """None of them is compiled, which takes minutes."""
    from benchmarks import measure
    from benchmarks import run as program

    nothing = measure.Program(lambda *_: (np.zeros(2), np.ones(2)), 0.0, 0.0, 0)
    monkeypatch.setattr(program, "compile_program", lambda function, *arguments: nothing)
    monkeypatch.setattr(program, "given_posteriors", lambda problem: (None,) * 4)
    found = run(monkeypatch, tmp_path)
    assert names(found, "step") == STEPS
    assert names(found, "posterior") == POSTERIORS
    assert names(found, "log_prob") == {"whitened head", "full decode"}
    assert names(found, "convolutions") == CONVOLUTIONS
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} |" in printed for row in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("step hessian unroll", 1),
        ("log_prob", 2),
        ("convolutions gauss_newton chunks of 5", 1),
    ],
)
def test_rows_of_each_section_are_measured(quick_compile, monkeypatch, tmp_path, only, count):
    """One of the posteriors' is measured in the process above."""
    found = run(monkeypatch, tmp_path, "--only", only)
    assert len(found["rows"]) == count
    for row in found["rows"]:
        assert only in f"{row['section']} {row['name']}"
        assert min(row["best_seconds"], row["compile_seconds"], row["gigaflop"]) > 0
    assert len(found["agreement"]) == count - 1
    assert all(re.search("head = -?0.0000 nats", line) for line in found["agreement"])


@pytest.mark.slow
def test_curves_vary_one_size_at_a_time(quick_compile, monkeypatch, tmp_path, capsys):
    found = run(monkeypatch, tmp_path, "--curves", "--only", "batch")
    assert names(found, "curves") == {"batch 2", "batch 4"}
    assert [row["sizes"]["batch"] for row in found["rows"]] == [2, 4]
    assert "| batch 4 |" in capsys.readouterr().out


def test_matrix_products_in_loops_count_as_often_as_they_run():
    """A body of 2 · 8 · 8 · 8 FLOPs runs 5 times, after a product of 2 · 4 · 8 · 8."""
    from benchmarks.measure import compile_program

    def loop(a, b):
        a = a @ b
        c, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), b, length=5)
        return a, c

    program = compile_program(loop, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert program.flops == 5 * 2 * 8**3 + 2 * 4 * 8**2
