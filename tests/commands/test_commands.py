"""The command line: what it prints, what it leaves behind, and how it refuses."""

import contextlib
import io
import json
import os
import re
import shutil

import numpy as np
import pytest

from vlae_jax.runs.config import Config, ModelConfig, TrainingConfig
from vlae_jax.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = [
    *("--hidden", "16", "--latent", "2", "--epochs", "2"),
    *("--importance-samples", "4", "--test-images", "8"),
]


def refused(capsys, *arguments):
    """The one line a wrong call gets, its exit code checked."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("vlae_jax: error: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture
def images(tmp_path):
    """A folder of the user's own data, and a function that spoils it."""
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (40, 6, 6, 1), dtype=np.uint8),
        "x_test": rng.integers(0, 256, (10, 6, 6, 1), dtype=np.uint8),
    }
    folder = tmp_path / "data"
    folder.mkdir()

    def write(**changes):
        np.savez(folder / "mine.npz", **{**good, **changes})
        return folder

    return write


def own(folder, *more):
    return ["train", "--dataset", "mine", "--data-dir", folder, *QUICK, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compile):
    """A run from beginning to end and what it said, for tests that leave it as it is."""
    folder, said = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stderr(said):
        cli.main(["train", *QUICK, "--run-dir", str(folder), "--tensorboard"])
    return folder, said.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be changed."""
    folder, _ = finished
    return shutil.copytree(folder, tmp_path / "run")


def test_a_run_is_not_used_on_other_images_of_the_same_name(images, tmp_path, capsys):
    run = tmp_path / "run"
    cli.main([*map(str, own(images(), "--batch-size", "8")), "--run-dir", str(run)])
    results = (run / "results.json").read_bytes()
    images(x_train=np.random.default_rng(1).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8))
    for command in ("evaluate", "encode", "gap"):
        line = refused(capsys, command, run)
        assert "images of mine are not those the run was started with" in line
    assert (run / "results.json").read_bytes() == results
    assert not (run / "encoded.npz").exists() and not (run / "gaps.json").exists()


def test_a_run_leaves_everything_a_reader_needs(finished):
    folder, said = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "metrics.jsonl", "results.json", "snapshots.npz", "report.html"),
        *("figures", "checkpoints", "tensorboard"),
    }
    assert {path.name for path in (folder / "figures").iterdir()} >= {
        *("reconstructions.png", "prior_samples.png", "posterior_covariances.png"),
        "training_curve.png",
    }
    assert not list(folder.rglob("*.partial"))
    assert "epoch 1: validation ELBO" in said
    results = json.loads((folder / "results.json").read_text())
    assert results["run"]["seed"] == 0
    assert results["versions"]["jax"]
    figures = {figure["name"]: figure for figure in results["figures"]}
    assert figures["log_prob"]["samples"] == 4
    assert figures["log_prob"]["images"] == 8
    assert figures["log_prob"]["value"] >= figures["elbo"]["value"]
    assert figures["bits_per_dim"]["unit"] == "bits/dim"
    assert set(figures["elbo"]) == {
        *("name", "value", "standard_error", "unit", "images", "samples", "split"),
    }


@pytest.fixture
def without_pictures(monkeypatch):
    """Evaluate, and leave out the report that `finished` has had drawn."""
    monkeypatch.setattr("vlae_jax.diagnostics.take_snapshots", lambda *_: {})
    monkeypatch.setattr("vlae_jax.report.write_report", lambda _: None)


def test_evaluate_repeats_the_figures_and_draws_the_report_again(copied):
    before = json.loads((copied / "results.json").read_text())["figures"]
    for name in ("results.json", "snapshots.npz", "report.html"):
        (copied / name).unlink()
    cli.main(["evaluate", str(copied)])
    assert json.loads((copied / "results.json").read_text())["figures"] == before
    assert (copied / "snapshots.npz").exists() and (copied / "report.html").exists()


def test_evaluate_takes_another_number_of_samples(copied, without_pictures):
    cli.main(["evaluate", str(copied), "--importance-samples", "9", "--chunk-size", "4"])
    again = json.loads((copied / "results.json").read_text())["figures"]
    assert again[0]["samples"] == 9


def test_resuming_a_finished_run_trains_no_further_and_more_epochs_do(copied, monkeypatch, capsys):
    """Either way it is evaluated again; what that does is tested above."""
    evaluated = []
    monkeypatch.setattr(cli, "_evaluate_and_report", lambda _, run, *__: evaluated.append(run.path))
    again = ["train", *QUICK, "--run-dir", str(copied), "--resume"]
    before = (copied / "metrics.jsonl").read_text()
    cli.main(again)
    assert (copied / "metrics.jsonl").read_text() == before
    cli.main([*again, "--epochs", "3"])
    after = (copied / "metrics.jsonl").read_text()
    assert len(after.splitlines()) > len(before.splitlines())
    assert "resuming at step" in capsys.readouterr().err
    assert evaluated == [copied, copied]


def test_a_missing_best_checkpoint_is_named_and_another_used(copied, without_pictures, capsys):
    steps = sorted(int(path.name) for path in (copied / "checkpoints").iterdir())
    assert len(steps) > 1
    best = RunFolder(copied).best_step()
    shutil.rmtree(copied / "checkpoints" / str(best))
    cli.main(["evaluate", str(copied)])
    other = max(step for step in steps if step != best)
    message = f"the best checkpoint, {best}, is missing; using checkpoint {other} instead"
    assert message in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    assert "no readable checkpoint" in refused(capsys, "evaluate", copied)


def test_evaluate_takes_another_proposal(copied, without_pictures):
    cli.main(["evaluate", str(copied), "--proposal", "student_t", "--proposal-freedom", "7"])
    assert json.loads((copied / "results.json").read_text())["run"]["proposal"] == "student_t"


def test_probabilistic_pca_is_trained_and_evaluated_in_closed_form(tmp_path):
    """The posterior is exact: the gap is 0, and so is the excess energy of the encoder's guess."""
    folder, samples = tmp_path / "run", ("--importance-samples", "8", "--test-images", "16")
    cli.main(["train", "--method", "ppca", *samples, "--run-dir", str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert (results["run"]["epochs"], results["run"]["steps"]) == (0, None)
    figures = {figure["name"]: figure["value"] for figure in results["figures"]}
    assert abs(figures["inference_gap"]) < 1e-3
    assert figures["log_prob"] < 0 and figures["ess"] == pytest.approx(8, rel=1e-3)
    assert figures["unconverged"] == figures["not_positive_definite"] == 0
    (logged,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (logged["split"], logged["step"], logged["best"]) == ("validation", 0, True)
    assert abs(logged["amortization_loss"]) < 1e-3
    assert (folder / "report.html").exists()


def test_report_prints_several_runs(finished, capsys):
    folder, _ = finished
    cli.main(["report", str(folder), str(folder)])
    assert "log p(x)" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [[], ["train"], ["evaluate"], ["report"], ["prepare"]])
def test_help_explains(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_help_gives_every_training_option_with_a_text_and_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--dataset", "mnist", "--help"])
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for section in ("data", "model", "inference", "training", "evaluation"):
        for name, value in vars(getattr(Config(), section)).items():
            option = "--" + name.replace("_", "-")
            assert option in text
            if name != "dataset" and not isinstance(value, tuple | bool):
                assert f"(default: {value})" in text.split(option, 1)[1][:600], option


def test_digits_have_smaller_defaults_and_other_sets_the_papers():
    assert cli._parse(["train"]).config.model.hidden == (200, 200)
    config = cli._parse(["train", "--dataset=mnist"]).config
    assert config.model == ModelConfig()
    assert (config.model.latent, config.model.hidden) == (50, (500, 500))
    assert config.training == TrainingConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnits"], "did you mean 'mnist'"),
        (["--method", "vlea"], "did you mean 'vlae'"),
        (["--latent", "0"], "latent must be at least 1"),
        (["--steps", "-1"], "steps must be at least 0"),
        (["--batch-size", "5000"], "larger than the training set"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--batch-size", "10", "--microbatches", "4"], "microbatches must divide batch_size 10"),
        (["--likelihood", "bernoulli"], "needs binary images"),
        (["--logit-lambda", "0.7"], "logit_lambda"),
        (["--validation-fraction", "1.5"], "validation_fraction"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--learning-rate", "nan"], "learning_rate must be positive"),
        (["--importance-samples", "0"], "importance_samples must be at least 1"),
        (["--test-images", "99999"], "only 359 test images"),
        (["--log-every", "0"], "log_every"),
        (["--hidden", "16", "0"], "hidden widths"),
        (["--preset", "paper-screenshoot"], "did you mean 'paper-screenshot'"),
        (["--patience", "0"], "patience must be at least 1"),
        (["--minutes", "0"], "minutes must be positive"),
        (["--train-samples", "0"], "train_samples must be at least 1"),
        (["--ascent-rate", "0"], "ascent_rate must be positive"),
        (["--ascent-momentum", "1"], "ascent_momentum must be at least 0 and below 1"),
        (["--ascent-clip", "0"], "ascent_clip must be positive"),
        (["--proposal-scale", "0"], "proposal_scale must be positive"),
        (["--proposal-freedom", "nan"], "proposal_freedom must be positive"),
        (["--method", "sa_vae", "--gradient", "implicit"], "choose unroll or stop"),
        (["--method", "vae_hf", "--steps", "0"], "vae_hf needs at least one step"),
        (["--method", "vae_iaf", "--flow-width", "3"], "flow_width must be at least latent"),
        (["--method", "vae", "--objective", "evidence"], "which vlae has and vae has not"),
        (["--method", "vae_hf", "--objective", "dreg"], "needs the density of any point"),
        (["--method", "ppca", "--hidden", "16"], "it has no hidden layers"),
        (["--method", "ppca", "--epochs", "3"], "takes --epochs 0"),
        (["--method", "ppca", "--preprocess", "static_binary"], "ppca has a gaussian output"),
        (["--method", "ppca", "--variance", "per_pixel"], "of one variance"),
        (["--method", "ppca", "--latent", "64"], "fewer latent dimensions than pixels"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--damping", "none"], ["--nonsense"]])
def test_arguments_of_the_wrong_kind_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((40, 6), np.uint8)}, "mine.npz"),
        ({"x_train": np.zeros((40, 6, 6, 1), np.float32)}, "uint8"),
        ({"x_test": np.zeros((10, 5, 6, 1), np.uint8)}, "mine.npz"),
        ({"x_test": np.zeros((0, 6, 6, 1), np.uint8)}, "mine.npz"),
    ],
)
def test_wrong_data_are_refused_before_anything_is_written(
    tmp_path, capsys, images, changes, message
):
    folder = images(**changes)
    line = refused(capsys, *own(folder, "--run-dir", tmp_path / "run"))
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_npz_is_refused(tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(b"nothing of the kind")
    assert "mine.npz" in refused(capsys, *own(tmp_path, "--run-dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(finished, capsys):
    folder, _ = finished
    before = sorted(path for path in folder.rglob("*"))
    line = refused(capsys, "train", *QUICK, "--run-dir", folder)
    assert all(way in line for way in ("--resume", "--overwrite", "--run-dir"))
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_folder_of_other_files_is_never_deleted(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    line = refused(capsys, "train", *QUICK, "--run-dir", tmp_path, "--overwrite")
    assert "no run" in line
    assert (tmp_path / "thesis.tex").exists()


def test_resuming_with_another_configuration_names_the_differences(finished, capsys):
    folder, _ = finished
    line = refused(
        capsys,
        *("train", *QUICK, "--run-dir", folder, "--resume"),
        *("--latent", "5", "--learning-rate", "0.1"),
    )
    assert "model.latent is 5, was 2" in line
    assert "training.learning_rate is 0.1, was 0.001" in line
    assert "hidden" not in line


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_a_folder_without_a_run_is_refused(tmp_path, capsys, verb):
    assert str(tmp_path) in refused(capsys, verb, tmp_path)


def test_resuming_where_there_is_no_run_is_refused(tmp_path, capsys):
    line = refused(capsys, "train", *QUICK, "--run-dir", tmp_path / "none", "--resume")
    assert "no run folder" in line
    assert not (tmp_path / "none").exists()


def test_a_broken_config_is_refused(finished, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model": {"latent": "many"}}')
    assert "model.latent" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"latents": 3}}')
    assert "model.latents" in refused(capsys, "evaluate", tmp_path)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", *QUICK, "--run-dir", tmp_path / "file" / "run")
    assert "cannot be written" in line


def test_a_full_disk_is_told_in_one_line_before_anything_is_half_written(
    tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    line = refused(capsys, "train", *QUICK, "--method", "vae", "--run-dir", tmp_path / "run")
    assert "no space left" in line
    assert "--resume" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by setrlimit")
def test_a_write_that_breaks_off_leaves_the_old_results_whole(finished, monkeypatch, capsys):
    """A limit on the size of files fails a write as a full disk does: part of the way through."""
    import resource

    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    write_results = RunFolder.write_results

    # Python ignores the signal of this limit, and the write fails instead.
    def write_limited(*arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write_results(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(RunFolder, "write_results", write_limited)
    line = refused(capsys, "evaluate", folder, "--importance-samples", "3")
    assert "results.json cannot be written: File too large" in line
    assert (folder / "results.json").read_bytes() == before
    assert not list(folder.glob("*.partial"))
