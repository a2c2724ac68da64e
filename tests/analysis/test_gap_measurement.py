"""The gaps of a linear model, for which all of them are known in closed form."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from builders import Linear, digits, linear_config, refused, untrained

from vlae_jax.analysis.gap_measurement import measure_gaps
from vlae_jax.annealing import AnnealingInfo
from vlae_jax.commands.main import main
from vlae_jax.errors import UserError
from vlae_jax.models.saved import save
from vlae_jax.runs.config import InferenceConfig
from vlae_jax.runs.gap_config import GapConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = GapConfig(
    images=6,
    simulated_images=4,
    temperatures=20,
    chains=4,
    leapfrog=3,
    family_steps=20,
    family_samples=4,
    elbo_samples=200,
    search_steps=3,
    batch=6,
)


@pytest.fixture(scope="module")
def linear(quick_compile):
    """Probabilistic PCA of the digits with 3 dimensions, and its gaps."""
    trained = untrained(linear_config("ppca", preprocess="logit"))
    metrics, per_image = measure_gaps(trained, digits().test, QUICK)
    return trained, {metric.name: metric for metric in metrics}, per_image


def test_nothing_is_lost_where_the_posterior_is_exact(linear):
    trained, metrics, per_image = linear
    truth = Linear(trained, digits().test[:6]).log_prob()
    for name in ("log_prob_ais", "amortized_elbo", "converged_elbo"):
        np.testing.assert_allclose(per_image[name], truth, rtol=1e-5, err_msg=name)
    # Adam makes steps of its full size out of rounded gradients that should be zero.
    lost = truth - per_image["best_in_family_elbo"]
    assert (lost > -1e-3).all() and (lost < 0.02).all()
    for name, atol in (
        ("approximation_gap", 0.02),
        ("amortization_gap", 0.02),
        ("non_convergence_gap", 1e-3),
        ("bdmc_gap", 1e-3),
    ):
        np.testing.assert_allclose(per_image[name], 0, atol=atol, err_msg=name)
        np.testing.assert_allclose(metrics[name].value, per_image[name].mean(), atol=1e-6)
    assert metrics["bdmc_gap"].split == "simulated" and metrics["bdmc_gap"].images == 4


def test_a_poor_encoder_loses_by_amortization_and_early_stops_by_non_convergence():
    """An untrained encoder of a linear decoder, whose approximation gap is zero.

    The Laplace posterior at its guess has the right covariance: the KL divergence is the energy
    of how far off it is. Chains start at the prior here, which is not where they must end.
    """
    config = dataclasses.replace(
        linear_config(preprocess="logit"), inference=InferenceConfig(steps=0)
    )
    trained = untrained(config)
    options = dataclasses.replace(
        QUICK, family_steps=300, family_samples=16, start="prior", temperatures=60, chains=16
    )
    _, per_image = measure_gaps(trained, digits().test, options)
    truth = Linear(trained, digits().test[:6])
    error = per_image["ais_sampling_error"]
    assert (error > 1e-4).all() and (error < 0.3).all()
    assert (np.abs(per_image["log_prob_ais"] - truth.log_prob()) < 5 * error).all()
    lost = truth.decrements(truth.guesses)
    assert lost.mean() > 0.05
    np.testing.assert_allclose(per_image["converged_elbo"], truth.log_prob(), rtol=1e-4)
    # The weights of a Gaussian that is only moved have twice that variance.
    error = np.sqrt(2 * lost / options.elbo_samples)
    assert (np.abs(per_image["non_convergence_gap"] - lost) < 5 * error + 1e-3).all()
    # With a Laplace posterior all of the amortization gap is non-convergence.
    np.testing.assert_allclose(
        per_image["amortization_gap"], per_image["non_convergence_gap"], atol=0.02
    )
    exact = per_image["approximation_gap"] - (per_image["log_prob_ais"] - truth.log_prob())
    np.testing.assert_allclose(exact, 0, atol=0.02)


def test_the_chains_of_a_bound_take_the_step_sizes_that_others_found(linear, monkeypatch):
    """Chains that adapt their own step sizes would not give a strict bound."""
    forward, backward = set(), set()

    def anneal(key, log_joint, start, *, num_chains, step_size=None, adapt=True, **_):
        forward.add((num_chains, adapt, step_size is None))
        drawn = jax.random.uniform(key)
        size = drawn if step_size is None else step_size
        info = dict.fromkeys(AnnealingInfo._fields, drawn)
        return drawn, AnnealingInfo(**{**info, "step_size": size, "standard_error": size})

    def reverse(key, log_joint, start, z_exact, *, step_size, adapt=True, **_):
        backward.add(adapt)
        return step_size, None

    module = "vlae_jax.analysis.gap_measurement"
    monkeypatch.setattr("vlae_jax.annealing.annealed_importance_sampling", anneal)
    monkeypatch.setattr(f"{module}.reverse_annealed_importance_sampling", reverse)
    trained, images = linear[0], digits().test
    _, found = measure_gaps(trained, images, dataclasses.replace(QUICK, family_steps=1))
    assert forward == {(2, True, True), (4, False, False)} and backward == {False}
    # The bound's own draw beside that of the pilot, which came along as the step size.
    names = ("log_prob_ais", "ais_sampling_error", "bdmc_lower", "bdmc_upper")
    drawn = np.concatenate([found[name] for name in names])
    assert len(np.unique(drawn)) == len(drawn) == 2 * (QUICK.images + QUICK.simulated_images)


def test_more_images_than_there_are_cannot_be_measured(linear):
    with pytest.raises(UserError, match="images is 1000, but there are only 359"):
        measure_gaps(linear[0], digits().test, GapConfig(images=1000))


@pytest.fixture
def run(linear, tmp_path):
    """The run folder of the linear model."""
    save(linear[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chains", "0"], "chains must be at least 1"),
        (["--temperatures", "1"], "temperatures must be at least 2"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, capsys, arguments, message):
    assert message in refused(capsys, "gap", run, *arguments)


def test_the_command_writes_what_was_measured(linear, run, capsys, monkeypatch):
    _, metrics, per_image = linear
    asked = []

    def measured(trained, images, options):
        asked.append((trained.config.inference.method, len(images), options))
        return list(metrics.values()), per_image

    monkeypatch.setattr("vlae_jax.analysis.gap_measurement.measure_gaps", measured)
    monkeypatch.setattr("vlae_jax.report.write_report", lambda runs: asked.append(runs))
    quick = [
        argument
        for name, value in dataclasses.asdict(QUICK).items()
        for argument in (f"--{name.replace('_', '-')}", str(value))
    ]
    main(["gap", str(run), *quick])
    assert asked == [("ppca", 359, QUICK), [run]]
    printed = capsys.readouterr().out
    written = json.loads((run / "gaps.json").read_text())
    assert written["settings"]["chains"] == 4
    values = {metric["name"]: metric["value"] for metric in written["metrics"]}
    assert values == {name: metric.value for name, metric in metrics.items()}
    assert "approximation gap" in printed and "bdmc gap" in printed
