"""The studies' bookkeeping, and the mistakes that one of them makes on purpose."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("studies")


LOG_PROBS = {("VAE", 0): -10.0, ("VAE", 1): -14.0, ("VLAE T=4", 0): -7.0, ("VLAE T=4", 1): -9.0}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The record of four finished runs, beside one that is not finished."""
    from experiments import studies, study

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    for (label, seed), log_prob in LOG_PROBS.items():
        run = tmp_path / "runs" / f"{label.replace(' ', '-')}-seed{seed}"
        run.mkdir(parents=True)
        values = log_prob + np.array([-1.0, 0.0, 1.0])
        results = {
            "run": {"seed": seed, "steps": None, "fingerprint": "f"},
            "metrics": [
                {"name": name, "value": value, "standard_error": 0.5, "images": 3, "samples": 10}
                for name, value in {"log_prob": log_prob, "elbo": log_prob - 2}.items()
            ],
            "checkpoint": {"step": 8, "epoch": 2.0},
            "seconds": {"training": 3.0 + seed},
            "versions": {"jax": "1", "python": "3"},
            "device": "cpu",
        }
        (run / "config.json").write_text(json.dumps({"training": {"seed": seed}}))
        (run / "results.json").write_text(json.dumps(results))
        arrays = {"log_prob": values, "elbo": values - 2, "inference_gap": np.full(3, 2.0)}
        np.savez(run / "per_image.npz", **arrays)
    (tmp_path / "runs" / "VAE-seed2").mkdir()
    example = studies.Study(
        "an example",
        {"VAE": (), "VLAE T=4": ("--steps", "4")},
        ("--epochs", "2"),
        studies.Measured("VLAE T=4", 4.0, 4.0, 0),
    )
    monkeypatch.setitem(studies.STUDIES, "example", example)
    study.collect("example", tmp_path / "runs")
    return json.loads((tmp_path / "results" / "example.json").read_text())


def test_a_study_is_summed_up_over_seeds_and_pairs(record):
    from experiments.report import average, by_label

    groups = by_label(record)
    assert {label: len(runs) for label, runs in groups.items()} == {"VAE": 2, "VLAE T=4": 2}
    # -10 and -14: mean -12, standard deviation 2.83, of two.
    assert average(groups["VAE"], "metrics", "log_prob") == (-12.0, pytest.approx(2.0))
    # Differences 3 and 5 of equal seeds.
    assert average(groups["VLAE T=4"], "paired", "log_prob") == (4.0, pytest.approx(1.0))
    # One seed has the error over images: all differences are 3.
    assert average(groups["VLAE T=4"][:1], "paired", "log_prob") == (3.0, 0.0)
    assert np.isnan(average(groups["VAE"], "paired", "log_prob")).all()


def test_the_report_writes_between_the_marks_and_draws(record, tmp_path, monkeypatch):
    from experiments import report

    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: example -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(report, "ESTIMATES", tmp_path / "estimators.json")
    monkeypatch.setattr(report, "ESTIMATORS_PAGE", page)
    report.ESTIMATES.write_text("[]")
    report.main()
    text = page.read_text()
    assert text.startswith("before\n<!-- table: example -->\n| system |")
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| VLAE T=4"))
    assert "| −8.0 ± 1.0 |" in row and "| 4.0 ± 1.0 |" in row
    assert "seeds 0, 1" in text and "`--epochs 2`" in text
    assert (tmp_path / "images" / "study_example.png").read_bytes().startswith(b"\x89PNG")
    report.main()
    assert page.read_text() == text


def test_a_table_without_a_place_is_refused(record, tmp_path, monkeypatch):
    from experiments import report

    page = tmp_path / "README.md"
    page.write_text("no marks\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    with pytest.raises(SystemExit, match="no place for table: example"):
        report.main()


@pytest.mark.parametrize(
    ("label", "expected"), [(0.0234, "0.023 ± 0.012"), (-12.345, "−12.345 ± 0.012")]
)
def test_numbers_have_the_digits_of_their_error(label, expected):
    from experiments.report import words

    assert words(label, 0.0123) == expected


def studies():
    """The names of the studies on record."""
    return sorted(path.stem for path in (ROOT / "experiments" / "results").glob("*.json"))


def test_every_study_is_on_record():
    from experiments.studies import STUDIES

    assert studies() == sorted(STUDIES)


@pytest.mark.parametrize("name", studies())
def test_the_declared_result_is_the_recorded_one(name):
    """Differences and errors are computed here again, from the numbers of each run."""
    from experiments.studies import STUDIES

    study = STUDIES[name]
    record = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
    assert (study.title, list(study.variants)) == (record["title"], record["variants"])
    label, elbo, log_prob, minutes = study.measured
    baseline = study.baselines.get(label, next(iter(study.variants)))
    values = {
        (run["label"], run["seed"]): [run["metrics"][key][0] for key in ("elbo", "log_prob")]
        for run in record["runs"]
    }
    seeds = [seed for other, seed in values if other == label]
    pairs = [np.subtract(values[label, seed], values[baseline, seed]) for seed in seeds]
    np.testing.assert_allclose([elbo, log_prob], np.mean(pairs, axis=0), atol=0.051)
    assert minutes == round(sum(run["seconds"] for run in record["runs"]) / 60)
    for run in record["runs"]:
        assert list(study.variants[run["label"]]) == run["options"]


@pytest.mark.slow
def test_every_study_names_options_that_there_are(monkeypatch):
    """Options of each variant are parsed as the command line would, and build a configuration."""
    from experiments.repairs import WRONG
    from experiments.studies import STUDIES

    from vlae_jax.commands.main import parse
    from vlae_jax.runs.methods import METHODS

    for name, entry in WRONG.items():
        monkeypatch.setitem(METHODS, name, entry)
    seen = set()
    for study in STUDIES.values():
        for label, options in study.variants.items():
            # The same variants return in study after study.
            if study.common in seen and tuple(options) in seen:
                continue
            seen |= {study.common, tuple(options)}
            train = parse(["train", *study.common, *options, "--seed", "3"])
            assert train.config.training.seed == 3, label
            assert train.config.inference.method in METHODS, label


def run_main(monkeypatch, *arguments):
    """The studies' command line."""
    from experiments.__main__ import main

    monkeypatch.setattr("sys.argv", ["experiments", *arguments])
    main()


def test_the_list_has_every_study_with_its_result(monkeypatch, capsys):
    run_main(monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == studies()
    [digits] = [line for line in lines if line.startswith("digits ")]
    assert digits.endswith("229 minutes; VLAE T=4 +1.5 nats in ELBO, -0.3 in log p(x)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a study, or --list them"),
        (("digits", "--jobs", "0"), "--jobs must be at least 1"),
        (("digits", "--only", "VAEE"), "no variant 'VAEE' in this study"),
        (("nowhere",), "invalid choice: 'nowhere'"),
    ],
)
def test_wrong_use_of_the_command_line_is_refused(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_a_study_trains_what_is_missing_and_resumes_what_was_interrupted(tmp_path, monkeypatch):
    """The training command is replaced by one that writes down its options."""
    from experiments import studies, study

    script = tmp_path / "train.py"
    script.write_text(
        "import json, pathlib, sys\nrun = pathlib.Path(sys.argv[2])\nrun.mkdir(exist_ok=True)\n"
        "(run / 'options.json').write_text(json.dumps(sys.argv[3:]))\n"
        "sys.exit(run.name == 'C-seed0')\n"
    )
    example = studies.Study(
        "an example",
        {"A": ("--a",), "B b": (), "C": ()},
        ("--epochs", "2"),
        studies.Measured("A", 0, 0, 0),
        seeds=(0, 1),
        command=(str(script),),
    )
    monkeypatch.setitem(studies.STUDIES, "example", example)
    monkeypatch.setattr(study, "collect", lambda name, folder: None)
    runs = tmp_path / "runs"
    (runs / "A-seed1" / "checkpoints").mkdir(parents=True)
    (runs / "B-b-seed0").mkdir()
    (runs / "B-b-seed0" / "results.json").write_text("{}")
    study.run_study("example", runs, labels=["A", "B b"], data_dir="images")
    written = {
        path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/options.json")
    }
    place = ["--data-dir", "images"]
    assert written == {
        "A-seed0": ["--epochs", "2", "--a", "--seed", "0", *place, "--overwrite"],
        "A-seed1": ["--epochs", "2", "--a", "--seed", "1", *place, "--resume"],
        "B-b-seed1": ["--epochs", "2", "--seed", "1", *place, "--overwrite"],
    }
    with pytest.raises(SystemExit, match="C, seed 0: failed"):
        study.run_study("example", runs, labels=["C"])


def test_the_published_mistakes_are_made_as_described():
    from experiments.repairs import BATCH, batch_mean, descending, inverted_clip

    grads = {"mean": jnp.array([6.0, 8.0])}  # of norm 10

    def updated(transformation):
        return np.asarray(transformation.update(grads, transformation.init(grads))[0]["mean"])

    np.testing.assert_allclose(updated(descending()), [-6.0, -8.0])
    np.testing.assert_allclose(updated(batch_mean()), np.array([6.0, 8.0]) / BATCH)
    # The norm of 10 becomes 0.5, and that of 100 becomes 0.05.
    np.testing.assert_allclose(np.linalg.norm(updated(inverted_clip(5.0))), 0.5)
    grads = {"mean": jnp.array([60.0, 80.0])}
    np.testing.assert_allclose(np.linalg.norm(updated(inverted_clip(5.0))), 0.05, rtol=1e-6)


def test_the_blind_flow_is_one_map_for_all_images(quick_compile, monkeypatch):
    from experiments.repairs import WRONG

    from vlae_jax.data.sets import load_dataset
    from vlae_jax.models.initial import initialize
    from vlae_jax.models.systems import find_system
    from vlae_jax.runs.config import Config, DataConfig, InferenceConfig, ModelConfig
    from vlae_jax.runs.methods import METHODS

    for name, entry in WRONG.items():
        monkeypatch.setitem(METHODS, name, entry)
    config = Config(
        data=DataConfig(dataset="digits"),
        model=ModelConfig(latent=3, hidden=(8,)),
        inference=InferenceConfig(method="vae_iaf_blind"),
    )
    model = initialize(config, load_dataset("digits")).model
    images = jax.random.normal(jax.random.key(0), (2, 64))
    point = jnp.array([0.3, -1.0, 0.5])

    def difference(method):
        system = find_system(method)
        first, second = (
            system(model.at(x), jax.random.key(0), config.inference).posterior for x in images
        )
        return first.flow(point, first.context)[0] - second.flow(point, second.context)[0]

    assert jnp.abs(difference("vae_iaf")).max() > 1e-4
    np.testing.assert_array_equal(difference("vae_iaf_blind"), 0)


def test_each_wrong_ascent_is_the_system_of_its_name(quick_compile):
    """One step without momentum from the encoder's guess, on a model whose gradient is known."""
    from types import SimpleNamespace

    from experiments import repairs

    from vlae_jax.posterior import DiagonalPosterior, kl_to_prior
    from vlae_jax.runs.config import InferenceConfig

    # With log p(x | z) = 6 z₁ + 8 z₂ and the prior as the guess, the ELBO has the gradient (6, 8)
    # in the mean.
    at = SimpleNamespace(
        guess=DiagonalPosterior(jnp.zeros(2), jnp.zeros(2)),
        model=SimpleNamespace(decode=lambda z: z),
        log_likelihood=lambda z: jnp.array([6.0, 8.0]) @ z,
        kl_to_prior=kl_to_prior,
    )
    config = InferenceConfig(method="sa_vae", steps=1, ascent_rate=1.0, ascent_momentum=0.0)
    means = {
        name: np.asarray(find(at, jax.random.key(0), config).posterior.mean)
        for name, find in vars(repairs).items()
        if name.startswith("sa_vae_")
    }
    np.testing.assert_allclose(means["sa_vae_descending"], [-6.0, -8.0], rtol=1e-6)
    np.testing.assert_allclose(means["sa_vae_batch_mean"], [6 / 64, 8 / 64], rtol=1e-6)
    direction = means["sa_vae_inverted_clip"] / np.linalg.norm(means["sa_vae_inverted_clip"])
    np.testing.assert_allclose(direction, [0.6, 0.8], rtol=1e-6)
    assert np.linalg.norm(means["sa_vae_inverted_clip"]) < 0.5
    # Divided by the batch, the gradient is too short to be clipped.
    np.testing.assert_allclose(means["sa_vae_all_three"], [-6 / 64, -8 / 64], rtol=1e-6)
