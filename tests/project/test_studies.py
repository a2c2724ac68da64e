"""The studies' bookkeeping, and the mistakes that one of them makes on purpose."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "experiments").is_dir(), reason="the studies come with the repository only"
)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Where the studies are a package."""
    monkeypatch.syspath_prepend(str(ROOT))


LOG_PROBS = {("VAE", 0): -10.0, ("VAE", 1): -14.0, ("VLAE T=4", 0): -7.0, ("VLAE T=4", 1): -9.0}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """What `collect` makes of four finished runs and one that is not."""
    from experiments import study

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    for (label, seed), log_prob in LOG_PROBS.items():
        run = tmp_path / "runs" / f"{label.replace(' ', '-')}-seed{seed}"
        run.mkdir(parents=True)
        values = log_prob + np.array([-1.0, 0.0, 1.0])
        results = {
            "run": {"seed": seed, "steps": None, "fingerprint": "f"},
            "figures": [
                {"name": name, "value": value, "standard_error": 0.5, "images": 3, "samples": 10}
                for name, value in {"log_prob": log_prob, "elbo": log_prob - 2}.items()
            ],
            "checkpoint": {"step": 8, "epoch": 2.0},
            "seconds": {"training": 3.0 + seed},
            "versions": {"jax": "1", "python": "3"},
            "device": "cpu",
        }
        (run / "results.json").write_text(json.dumps(results))
        arrays = {"log_prob": values, "elbo": values - 2, "inference_gap": np.full(3, 2.0)}
        np.savez(run / "per_image.npz", **arrays)
    (tmp_path / "runs" / "VAE-seed2").mkdir()
    example = study.Study(
        "example", "an example", {"VAE": [], "VLAE T=4": ["--steps", "4"]}, ["--epochs", "2"]
    )
    study.collect(example, tmp_path / "runs")
    return json.loads((tmp_path / "results" / "example.json").read_text())


def test_a_study_is_summed_up_over_seeds_and_pairs(record):
    from experiments.report import by_label, measured, paired

    groups = by_label(record)
    assert {label: len(runs) for label, runs in groups.items()} == {"VAE": 2, "VLAE T=4": 2}
    # -10 and -14: mean -12, standard deviation 2.83, of two.
    assert measured(groups["VAE"], "log_prob") == (-12.0, pytest.approx(2.0))
    # Differences 3 and 5 of the same seed.
    assert paired(groups["VLAE T=4"], "log_prob") == (4.0, pytest.approx(1.0))
    # One seed has the error over images: all differences are 3.
    assert paired(groups["VLAE T=4"][:1], "log_prob") == (3.0, 0.0)
    assert np.isnan(paired(groups["VAE"], "log_prob")[0])


def test_the_report_writes_between_the_marks_and_draws(record, tmp_path, monkeypatch):
    from experiments import report

    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: example -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
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
def test_figures_have_the_digits_of_their_error(label, expected):
    from experiments.report import words

    assert words(label, 0.0123) == expected


def test_every_study_names_options_that_there_are(monkeypatch):
    """Each variant's options are parsed as the command line would, and build a configuration."""
    import importlib

    from experiments import repairs

    from vlae_jax.commands.main import _parse

    for path in (ROOT / "experiments").glob("*.py"):
        study = getattr(importlib.import_module(f"experiments.{path.stem}"), "STUDY", None)
        if study is None:
            continue
        methods = set()
        for label, options in study.variants.items():
            train = _parse(["train", *study.common, *options, "--seed", "3"])
            assert train.config.training.seed == 3, label
            methods.add(train.config.inference.method)
        known = {**repairs.systems.SYSTEMS, **repairs.WRONG}
        assert methods <= set(known), path.stem


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


def test_the_blind_flow_is_one_map_for_all_images(quick_compile):
    from experiments.repairs import WRONG

    from vlae_jax.models.autoencoder import VariationalAutoencoder
    from vlae_jax.models.systems import SYSTEMS
    from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig

    config = Config(
        model=ModelConfig(latent=3, hidden=(8,)), inference=InferenceConfig(method="vae_iaf")
    )
    model = VariationalAutoencoder(
        6,
        latent=3,
        hidden=(8,),
        activation="relu",
        likelihood="gaussian",
        variance=np.ones(6),
        posterior_head=lambda features, rngs: SYSTEMS["vae_iaf"].head(config, features, rngs),
        rngs=nnx.Rngs(0),
    )
    xs = jax.random.normal(jax.random.key(0), (2, 6))
    point = jnp.array([0.3, -1.0, 0.5])

    def mapped(spec):
        posterior = spec.build(config.inference)(model, xs[0], jax.random.key(0)).posterior
        other = spec.build(config.inference)(model, xs[1], jax.random.key(0)).posterior
        return posterior.flow(point, posterior.context)[0] - other.flow(point, other.context)[0]

    assert jnp.abs(mapped(SYSTEMS["vae_iaf"])).max() > 1e-4
    np.testing.assert_array_equal(mapped(WRONG["vae_iaf_blind"]), 0)
