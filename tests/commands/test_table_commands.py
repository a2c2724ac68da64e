"""A table from a CSV file by the command line: trained, drawn, used."""

import re

import numpy as np
import pytest
from builders import refused

from vlae_jax.commands.main import main, parse
from vlae_jax.runs.records import read_run

pytestmark = pytest.mark.usefixtures("quick_compile")
SMALL = "--latent 2 --hidden 8 --epochs 1 --batch-size 8 --importance-samples 20 --steps 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CSV file, and a run on it."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 1)) * [1, 20, 300] + rng.normal(size=(60, 3)) * [0.1, 2, 30]
    rows += [0, 100, 1000]
    lines = [",".join(f"{value:.6g}" for value in row) for row in rows]
    (folder / "health.csv").write_text("age,blood pressure,income\n" + "\n".join(lines))
    words = f"train --data-dir {folder}/health.csv --run-dir {folder}/run {SMALL} --method vae"
    main([*words.split(), "--proposal", "posterior"])
    return folder


def test_a_run_on_a_table_is_reported(folder):
    run = read_run(folder / "run")
    assert run.config["data"]["dataset"] == "health"
    assert run.config["data"]["preprocess"] == "standardize"
    figures = {path.stem for path in (folder / "run" / "figures").iterdir()}
    assert {"columns", "latent_space", "training_curve"} <= figures
    assert not {"reconstructions", "prior_samples"} & figures
    page = (folder / "run" / "report.html").read_text()
    assert "observed" in page or "the data's own units" in page
    test_rows = run.snapshots["rows"]
    assert test_rows.shape == (12, 3)
    assert list(run.snapshots["columns"]) == ["age", "blood pressure", "income"]
    assert 50 < test_rows[:, 1].mean() < 150


def test_empty_entries_are_filled_in(folder, capsys):
    new = folder / "new.csv"
    new.write_text("income,age,blood pressure\n1000,,100\n,0.5,\n")
    out = folder / "filled.csv"
    main(["impute", str(folder / "run"), str(new), "--output", str(out), "--samples", "50"])
    header, *lines = out.read_text().splitlines()
    assert header == "age,blood pressure,income"
    filled = np.array([[float(word) for word in line.split(",")] for line in lines])
    assert np.isfinite(filled).all()
    np.testing.assert_allclose(filled[0, 1:], [100, 1000], rtol=1e-5)
    np.testing.assert_allclose(filled[1, 0], 0.5, rtol=1e-5)
    capsys.readouterr()
    main(["impute", str(folder / "run"), "--missing", "0.5", "--images", "4", "--samples", "20"])
    assert re.search(r"RMSE, own\s+units", capsys.readouterr().out)


def test_wrong_uses_of_a_table_are_refused(folder, capsys):
    run = folder / "run"
    (folder / "short.csv").write_text("age\n1\n2\n")
    for arguments, said in [
        (("encode", run, folder / "short.csv"), "has no column 'blood pressure'"),
        (("encode", run, folder / "absent.csv"), "does not exist"),
        (("impute", run, "--output", folder / "a.npz"), "choose the missing pixels by one of"),
        (
            ("impute", run, "--overwrite", "--missing-box", 0, 0, 1, 1),
            "hides a rectangle of an image",
        ),
        (("train", "--data-dir", folder / "health.csv", "--preprocess", "raw"), "is for pixels"),
    ]:
        assert said in refused(capsys, *arguments)


def test_a_file_gives_the_data_set_its_name(folder):
    assert parse(["train", f"--data-dir={folder}/health.csv"]).config.data.dataset == "health"
    assert parse(["train", "--data-dir", str(folder)]).config.data.dataset == "digits"
