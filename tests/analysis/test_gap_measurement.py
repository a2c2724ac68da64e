"""The gaps of a run, where all of them are known."""

import json

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from vlae_jax.analysis.gap_measurement import measure_gaps
from vlae_jax.data.preprocessing import fixed_keys
from vlae_jax.errors import UserError
from vlae_jax.models.trained import build_experiment
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.runs.gap_config import GapConfig
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.presets import default_config

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
    defaults = default_config(method="ppca")
    config = Config(
        data=defaults.data,
        model=ModelConfig(latent=3, hidden=()),
        inference=defaults.inference,
        training=defaults.training,
    )
    experiment = build_experiment(config)
    figures, per_image = measure_gaps(experiment, experiment.initial_params, QUICK)
    return experiment, {figure.name: figure for figure in figures}, per_image


def test_nothing_is_lost_where_the_posterior_is_exact(linear):
    experiment, figures, per_image = linear
    model = experiment.merge(experiment.initial_params)
    xs = [
        experiment.preprocessor.apply(jax.random.split(key)[0], pixels)[0]
        for key, pixels in zip(fixed_keys(6), experiment.dataset.test[:6], strict=True)
    ]
    kernel = np.asarray(model.head.kernel[...], np.float64)
    covariance = kernel.T @ kernel + float(np.exp(model.log_var)) * np.eye(kernel.shape[1])
    truth = multivariate_normal(np.asarray(model.head.bias[...]), covariance).logpdf(xs)
    for name in ("log_prob_ais", "best_in_family_elbo", "amortised_elbo", "converged_elbo"):
        np.testing.assert_allclose(per_image[name], truth, rtol=1e-5)
    for name in ("approximation_gap", "amortisation_gap", "non_convergence_gap", "bdmc_gap"):
        np.testing.assert_allclose(per_image[name], 0, atol=1e-3)
        np.testing.assert_allclose(figures[name].value, per_image[name].mean(), atol=1e-6)
    assert figures["bdmc_gap"].split == "simulated" and figures["bdmc_gap"].images == 4


def test_a_poor_encoder_loses_by_amortisation_and_early_stops_by_non_convergence():
    """An untrained encoder of a linear decoder: what the family lacks is nothing."""
    config = Config(
        model=ModelConfig(latent=3, hidden=()),
        inference=InferenceConfig(steps=0),
        training=TrainingConfig(batch_size=64),
    )
    experiment = build_experiment(config)
    options = GapConfig(**{**QUICK.__dict__, "family_steps": 300, "family_samples": 16})
    _, per_image = measure_gaps(experiment, experiment.initial_params, options)
    assert per_image["non_convergence_gap"].mean() > 0.05
    # With a Laplace posterior all of the amortisation gap is non-convergence.
    np.testing.assert_allclose(
        per_image["amortisation_gap"], per_image["non_convergence_gap"], atol=0.02
    )
    np.testing.assert_allclose(per_image["approximation_gap"], 0, atol=0.02)


def test_more_images_than_there_are_cannot_be_measured(linear):
    experiment, *_ = linear
    with pytest.raises(UserError, match="only 359 test images"):
        measure_gaps(experiment, experiment.initial_params, GapConfig(images=1000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chains", "0"], "chains must be at least 1"),
        (["--temperatures", "1"], "temperatures must be at least 2"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    run.mkdir()
    config = default_config(method="ppca")
    RunFolder(run).write_config(config)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gap", str(run), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_verb_writes_what_was_measured(linear, tmp_path, capsys, monkeypatch):
    _, figures, per_image = linear
    run = str(tmp_path / "run")
    train = ["train", "--method", "ppca", "--latent", "3", "--run-dir", run, "--test-images", "4"]
    with monkeypatch.context() as without_pictures:
        without_pictures.setattr("vlae_jax.diagnostics.take_snapshots", lambda *_: {})
        without_pictures.setattr("vlae_jax.report.write_report", lambda _: None)
        cli.main([*train, "--importance-samples", "30"])
    asked = []

    def measured(experiment, params, options):
        asked.append((experiment.config.inference.method, options))
        return list(figures.values()), per_image

    monkeypatch.setattr("vlae_jax.gap_measurement.measure_gaps", measured)
    quick = [
        argument
        for name, value in QUICK.__dict__.items()
        if name != "start"
        for argument in (f"--{name.replace('_', '-')}", str(value))
    ]
    cli.main(["gap", run, *quick])
    assert asked == [("ppca", QUICK)]
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "gaps.json").read_text())
    assert written["settings"]["chains"] == 4
    values = {figure["name"]: figure["value"] for figure in written["figures"]}
    assert values == {name: figure.value for name, figure in figures.items()}
    assert "approximation gap" in printed and "bdmc gap" in printed
    assert (tmp_path / "run" / "figures" / "gaps.png").exists()
