"""The comparison of densities: its table as recorded, its data as described."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("studies")


def test_the_page_shows_the_record():
    from experiments.densities import RECORD, table

    page = (ROOT / "docs" / "sklearn.md").read_text()
    printed = page.split("<!-- table: densities -->\n")[1].split("\n<!-- end -->")[0]
    assert printed == table(json.loads(RECORD.read_text()))


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine"])
def test_halves_share_no_row_and_are_standardized_by_the_first(name):
    from experiments.densities import halves

    train, test = halves(name, 0)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-9)
    assert abs(len(train) - len(test)) <= 1
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_a_linear_model_is_measured_as_scikit_learn_measures_it():
    from experiments.densities import run_one

    ours, theirs = (
        run_one("wine", model, 0)["log_prob"]
        for model in ("VLAE, no hidden layers", "FactorAnalysis")
    )
    assert abs(ours - theirs) < 0.05  # scikit-learn stops earlier
