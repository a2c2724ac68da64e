"""A sample of `benchmarks.fuzz`: configurations train and are evaluated, or are refused."""

import numpy as np
import pytest
from benchmarks import fuzz
from hypothesis import HealthCheck, Phase, assume, given, settings

from vlae_jax.runs.config import Config


@pytest.mark.usefixtures("quick_compile")
@settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=fuzz.cases())
def test_a_random_configuration_trains_or_is_refused(case, tmp_path_factory):
    outcome = fuzz.try_out(case, tmp_path_factory.mktemp("run"))
    assert outcome.what != "FAULT", f"{case}: {outcome.line}"


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(case=fuzz.cases())
def test_both_ways_in_lead_to_one_configuration_or_both_refuse(case):
    assume(not any(value is None or value in ({}, "") for value in case.options.values()))
    found = [_config(case._replace(way=way)) for way in ("python", "parsed")]
    assert found[0] == found[1]


def _config(case):
    with fuzz._silence() as said:
        try:
            if case.way == "python":
                return fuzz.as_config(case.options)
            return fuzz._parsed(case, said)
        except fuzz.UserError:
            return None


def test_all_options_are_tried():
    names = set(fuzz.options())
    assert {"training.pretrain", "model.likelihood", "evaluation.proposal"} <= names
    assert len(names) == sum(len(vars(getattr(Config(), s))) for s in vars(Config())) - 2


@pytest.mark.parametrize("flagged", [True, False])
def test_a_number_that_is_lost_must_be_flagged(flagged):
    values = dict.fromkeys(("elbo", "kl", "log_det", "inference_gap", "ess"), np.zeros(2))
    values["log_prob"] = np.array([0.0, np.nan])
    outcome = fuzz._judged({"not_finite": 0.5 if flagged else 0.0}, values)
    assert outcome.what == ("trained" if flagged else "FAULT")
