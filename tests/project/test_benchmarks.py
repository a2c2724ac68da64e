"""The benchmarks run, at sizes of no interest, and their FLOPs are counted right."""

import ast
import json
import os
import re
import subprocess
import sys
import time
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
SYSTEMS = {
    "vae",
    *(
        f"{way} {steps}"
        for way in ("exact", "matrix-free", "scaled matrix-free")
        for steps in (1, 4)
    ),
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    for network in ("mlp 20", "conv 20", "conv 128"):
        assert names(found, f"systems {network}") == SYSTEMS
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} |" in printed for row in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("step hessian unroll", 1),
        ("log_prob", 2),
        ("convolutions gauss_newton chunks of 5", 1),
        ("systems conv 128 scaled matrix-free 1", 1),
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


def imported(path, known):
    """The modules of benchmarks/ that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("benchmarks.") for name in found} & known


def test_no_import_between_the_modules_runs_back():
    """One after another can be taken away whose imports are all taken away already."""
    files = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    left = {name: imported(path, set(files)) for name, path in files.items()}
    assert left["run"] >= {"measure", "programs", "pytorch_baseline"}
    while free := {name for name in left if not left[name] & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


# ----------------------------------------------------------- the command for an accelerator

WRITE = "import json, sys; open(sys.argv[-1], 'a').write(json.dumps({line}) + '\\n');"
ROW = WRITE.format(line="{'table': 'steps', 'D': 784}")
NOTE = WRITE.format(line="{'note': 'nothing to do'}")


def part(name, code, share=1.0):
    from benchmarks.accelerator import Part

    return Part(name, [sys.executable, "-c", code], share)


def test_a_part_that_overruns_is_cut_off_with_what_it_started_and_the_rest_goes_on(tmp_path):
    """It has 1 of 6 shares of 36 seconds, and would go on without end."""
    from benchmarks.accelerator import measure

    alive = tmp_path / "alive"
    writes = f"import time\nwhile True: open({str(alive)!r}, 'w').write('x'); time.sleep(0.1)"
    starts = f"import subprocess; subprocess.run([sys.executable, '-c', {writes!r}])"
    parts = [part("sleeper", ROW + starts, 1.0), part("quick", NOTE, 5.0)]
    reported = []
    began = time.monotonic()
    found = measure(parts, 36.0, lambda found: reported.append(json.dumps(found)))
    assert 6.0 <= time.monotonic() - began < 36.0
    assert [result["status"] for result in found] == ["cut off", "done"]
    assert found[0]["rows"] == [{"table": "steps", "D": 784}]
    assert found[1]["notes"] == ["nothing to do"]
    assert found[0]["limit"] == pytest.approx(6, rel=0.01)
    assert found[1]["limit"] > 20  # a little less than 30, for a slow machine
    # The row was reported while its part still ran.
    assert any(json.loads(text)[0]["status"] == "running" for text in reported)
    assert alive.exists()
    alive.unlink()
    time.sleep(1.0)
    assert not alive.exists()


def test_a_part_that_fails_is_noted_and_one_without_time_is_not_started(tmp_path):
    from benchmarks.accelerator import measure, tables

    fails = part("fails", ROW + "raise SystemExit('no memory left')", 99.0)
    found = measure([fails, part("late", ROW, 0.001)], 30.0, lambda found: None)
    assert [result["status"] for result in found] == ["failed", "done"]
    assert found[0]["notes"] == ["exit code 1: no memory left"]
    late = measure([part("late", ROW)], 0.5, lambda found: None)
    assert (late[0]["status"], late[0]["rows"]) == ("not reached", [])
    text = tables({"minutes": 1}, [*found, *late])
    assert "| fails | failed |" in text
    assert "- fails: exit code 1: no memory left" in text
    assert "| D |\n| --- |\n| 784 |\n| 784 |\n" in text


def test_wheels_are_unpacked_for_the_parts(tmp_path):
    from zipfile import ZipFile

    from benchmarks.accelerator import unpacked

    wheels, folder = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    assert unpacked(None, folder) == []
    with pytest.raises(SystemExit, match="holds no wheels"):
        unpacked(wheels, folder)
    with ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "answer = 42")
    assert unpacked(wheels, folder) == [str(folder)]
    assert (folder / "carried" / "__init__.py").read_text() == "answer = 42"


@pytest.mark.slow
def test_the_command_for_an_accelerator_measures_every_part(tmp_path):
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, (n, 28, 28), np.uint8)
        for name, n in {"x_train": 60, "x_test": 10}.items()
    }
    np.savez(tmp_path / "mnist.npz", **images)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--tiny"]
    command += ["--data-dir", str(tmp_path), "--out", str(out), "--minutes", "30"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = {part["part"]: part for part in json.loads((out / "results.json").read_text())["parts"]}
    assert all(part["status"] == "done" for part in parts.values())
    tests = parts.pop("tests")
    assert tests["rows"] or tests["notes"] == ["no test is marked `accelerator`"]
    assert all(part["rows"] for part in parts.values())
    (device,) = parts["device"]["rows"]
    assert f"jax {jax.__version__}," in device["versions"]
    for network in ("mlp", "conv"):
        rows = parts[f"steps-{network}"]["rows"]
        assert [(row["system"], row["D"]) for row in rows] == [("VAE", 784), ("VLAE, T = 1", 784)]
        assert rows[0]["times_VAE"] == 1.0
        assert all(row["finite"] and row["ms"] > 0 for row in rows)
    assert all(row["finite"] and row["ms_an_image"] > 0 for row in parts["log_prob"]["rows"])
    for method in ("vae", "vlae"):
        training, evaluation = parts[f"train-{method}"]["rows"]
        assert training["data"] == "mnist, 54 images"
        assert training["finite"] and training["seconds"] >= 1.0
        assert evaluation["not_finite"] == 0
        assert evaluation["ELBO"] <= evaluation["log_p"]
        assert 0 <= evaluation["k_hat_above_0_7"] <= 1
    markdown = (out / "results.md").read_text()
    assert all(f"| {row['system']} |" in markdown for row in parts["train-vlae"]["rows"])


def test_matrix_products_in_loops_count_as_often_as_they_run():
    """A body of 2 · 8 · 8 · 8 FLOPs runs 5 times, after a product of 2 · 4 · 8 · 8."""
    from benchmarks.measure import compile_program

    def loop(a, b):
        a = a @ b
        c, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), b, length=5)
        return a, c

    program = compile_program(loop, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert program.flops == 5 * 2 * 8**3 + 2 * 4 * 8**2
