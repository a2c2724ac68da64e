"""The study of estimators: what it measures is held to a decoder whose log p(x) is known."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import Linear, digits, linear_config

from vlae_jax import fit
from vlae_jax.runs.records import read_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("studies")
IMAGES = 8


@pytest.mark.slow
def test_every_estimator_gives_the_closed_form_of_a_linear_decoder(
    quick_compile, tmp_path, monkeypatch
):
    """The encoder is untrained, so that the own posterior of a VAE is far off."""
    from experiments import estimators

    run = tmp_path / "VAE-seed0"
    trained = fit(linear_config("vae"), "digits", run_dir=run)
    truth = Linear(trained, digits().test[:IMAGES]).log_prob()
    monkeypatch.setattr(estimators, "RECORD", tmp_path / "record.json")
    arguments = ["--images", str(IMAGES), "--annealed", "4", "--samples", "100"]
    monkeypatch.setattr("sys.argv", ["estimators", str(tmp_path), *arguments])
    estimators.main()
    [row] = json.loads((tmp_path / "record.json").read_text())
    assert (row["dataset"], row["run"], row["images"]) == ("digits", "VAE-seed0", IMAGES)
    np.testing.assert_allclose(row["reference"][0], truth.mean(), atol=1e-3)
    for name in ("laplace", "refined"):
        assert abs(row["estimators"][name]["log_prob_less_reference"][0]) < 1e-3
        assert row["estimators"][name]["unreliable"] == 0
    assert row["estimators"]["own"]["elbo_less_reference"][0] < -1
    assert abs(row["estimators"]["laplace"]["elbo_less_reference"][0]) < 1e-3
    # Posteriors of a linear decoder are exact: 0.9 of 400, within four standard errors.
    assert abs(row["coverage"]["laplace"] - 0.9) < 0.06
    assert row["coverage"]["own"] < 0.8
    assert abs(row["ais"]["less_reference"][0]) < 1e-3
    assert all(found["milliseconds"] > 0 for found in row["estimators"].values())
    kept = read_run(run)
    np.testing.assert_allclose(kept.per_image["log_prob"], truth, atol=2e-3)
    # On record: not measured again.
    monkeypatch.setattr(estimators, "examine", None)
    estimators.main()


def test_the_time_has_no_compilation_in_it(monkeypatch):
    from experiments import estimators

    def compile_and_wait():
        began = time.monotonic()
        jax.block_until_ready(jax.jit(lambda x: jax.numpy.linalg.eigh(x @ x.T)[0])(np.eye(7)))
        compiled = time.monotonic() - began
        time.sleep(0.2)
        return compiled

    jax.monitoring.register_event_duration_secs_listener(estimators._note_compilation)
    try:
        compiled, milliseconds = estimators.timed(compile_and_wait, images=2)
    finally:
        jax.monitoring.unregister_event_duration_listener(estimators._note_compilation)
    assert 100 <= milliseconds < 100 + 500 * compiled


def test_nested_traces_are_left_out_once():
    from experiments import estimators

    def traces():
        time.sleep(0.2)
        for seconds in (0.05, 0.1, 0.15):  # the inner ones end first
            estimators._note_compilation("/jax/core/compile/trace", seconds)
        estimators._note_compilation("/jax/other", 0.2)

    _, milliseconds = estimators.timed(traces, images=1)
    assert 50 <= milliseconds < 150


def test_a_row_of_the_table():
    from experiments.report import estimators_table

    def found(less, unreliable):
        return {
            "log_prob_less_reference": [less, 0.5],
            "unreliable": unreliable,
            "milliseconds": 7.0,
        }

    row = {
        "run": "VAE+HF-T=4-seed0",
        "reference": [-541.02, 4.0],
        "images": 100,
        "samples": 5000,
        "estimators": {
            "own": found(-12.5, 1.0),
            "laplace": found(-1.5, 0.5),
            "refined": found(-0.5, 0.25),
            "auto": found(0.0, 0.02),
        },
        "ais": {"images": 50, "less_reference": [0.1, 0.2], "milliseconds": 30.0},
        "hardware": "2 cores, x86_64",
        "jax": "0.9.2",
    }
    table = estimators_table([row]).splitlines()
    assert table[2] == (
        "| VAE+HF T=4 | −541.0 ± 4.0 (2 %) | −12.50 ± 0.50 (100 %) | −1.50 ± 0.50 (50 %) | "
        "−0.50 ± 0.50 (25 %) | 0.10 ± 0.20 |"
    )
    assert "own posterior 7, Laplace 7, variational 7, auto 7, AIS 30" in table[-1]


COLUMNS = {
    "VAE": "VAE",
    "VLAE, T = 1": "VLAE T=1",
    "VLAE, T = 4": "VLAE T=4",
    "VAE then VLAE, T = 1": "VAE then VLAE T=1",
    "SA-VAE, T = 4": "SA-VAE T=4",
    "VAE+IAF, T = 4": "VAE+IAF T=4",
}
ROWS = {"MNIST": "mnist", "OMNIGLOT": "omniglot", "CIFAR10, a fifth": "cifar10_subset"}


def test_the_pages_show_what_is_on_record():
    """The tables that the report sets."""
    from experiments.report import estimators_table, inference_table

    record = json.loads((ROOT / "experiments" / "estimators.json").read_text())
    assert inference_table(record) in (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "estimators.md").read_text()
    for dataset in {row["dataset"] for row in record}:
        assert estimators_table([row for row in record if row["dataset"] == dataset]) in page


def test_the_results_page_shows_the_studies_of_equal_time():
    folder = ROOT / "experiments" / "results"
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "results.md").read_text().splitlines()
        if line.startswith(("| log p(x), ELBO |", *(f"| {name} |" for name in ROWS)))
    ]
    head, *rows = lines
    assert head[1:] == list(COLUMNS) and [row[0] for row in rows] == list(ROWS)
    for name, *cells in rows:
        study = json.loads((folder / f"{ROWS[name]}_time.json").read_text())
        found = {run["label"]: run["metrics"] for run in study["runs"]}
        for cell, label in zip(cells, COLUMNS.values(), strict=True):
            values = [found[label]["log_prob"][0], found[label]["elbo"][0]]
            shown = [float(word.strip("* ").replace("−", "-")) for word in cell.split(",")]
            assert shown == [round(value, 1) for value in values], (name, label)
