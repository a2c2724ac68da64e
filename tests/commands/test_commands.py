"""The command line: what it prints, what it leaves behind, and how it refuses."""

import contextlib
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from commandline import refused, run

from vlae_jax.commands.main import parse
from vlae_jax.data.supplied import as_dataset
from vlae_jax.models.initial import initialize
from vlae_jax.models.saved import save
from vlae_jax.runs.config import Config, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = [
    *("--hidden", "16", "--latent", "2", "--epochs", "2"),
    *("--importance-samples", "4", "--proposal", "posterior", "--test-images", "8"),
]


def contents(folder):
    """Everything in a run folder but the lock of its owner."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


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
        run("train", *QUICK, "--run-dir", folder, "--tensorboard")
    return folder, said.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be changed."""
    folder, _ = finished
    return shutil.copytree(folder, tmp_path / "run")


def test_a_run_is_not_used_on_other_images_of_the_same_name(images, tmp_path, capsys):
    folder = tmp_path / "run"
    config = parse([*map(str, own(images(), "--batch-size", "8"))]).config
    save(initialize(config, as_dataset(None, config.data)), folder)
    before = contents(folder)
    images(x_train=np.random.default_rng(1).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8))
    for command in ("evaluate", "encode", "gap"):
        line = refused(capsys, command, folder)
        assert "images of mine are not those the run was started with" in line
    shutil.rmtree(tmp_path / "data")
    for command, way_out in (("evaluate", "in Python, call"), ("encode", "name images as INPUT")):
        line = refused(capsys, command, folder)
        assert f"data_dir {tmp_path / 'data'} does not exist" in line and way_out in line
    assert contents(folder) == before


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
    metrics = {metric["name"]: metric for metric in results["metrics"]}
    assert metrics["log_prob"]["samples"] == 4
    assert metrics["log_prob"]["images"] == 8
    assert metrics["bits_per_dim"]["unit"] == "bits/dim"
    assert set(metrics["elbo"]) == {
        *("name", "value", "standard_error", "unit", "images", "samples", "split"),
    }


@pytest.fixture
def without_pictures(monkeypatch):
    """Evaluate, and leave out the report that `finished` has had drawn."""
    monkeypatch.setattr("vlae_jax.analysis.snapshots.take_snapshots", lambda *_: {})
    monkeypatch.setattr("vlae_jax.report.write_report", lambda _: None)


def test_evaluate_repeats_the_metrics_and_draws_the_report_again(copied):
    before = json.loads((copied / "results.json").read_text())["metrics"]
    for name in ("results.json", "snapshots.npz", "report.html"):
        (copied / name).unlink()
    run("evaluate", copied)
    assert json.loads((copied / "results.json").read_text())["metrics"] == before
    assert (copied / "snapshots.npz").exists() and (copied / "report.html").exists()


def test_evaluate_takes_another_number_of_samples(copied, without_pictures):
    run("evaluate", copied, "--importance-samples", "9", "--chunk-size", "4")
    again = json.loads((copied / "results.json").read_text())["metrics"]
    assert again[0]["samples"] == 9


def test_resuming_a_finished_run_trains_no_further_and_more_epochs_do(
    copied, without_pictures, monkeypatch, capsys
):
    """Either way it is evaluated again; the tests above say what that does."""
    evaluated = []
    monkeypatch.setattr(
        "vlae_jax.analysis.evaluation.evaluate",
        lambda trained, *_, **__: (evaluated.append(trained), ([], {}))[1],
    )
    again = ["train", *QUICK, "--run-dir", copied, "--resume"]
    before = (copied / "metrics.jsonl").read_text()
    run(*again)
    assert (copied / "metrics.jsonl").read_text() == before
    run(*again, "--epochs", "3")
    assert [trained.config.training.epochs for trained in evaluated] == [2, 3]
    after = (copied / "metrics.jsonl").read_text()
    assert len(after.splitlines()) > len(before.splitlines())
    assert "resuming at step" in capsys.readouterr().err


def test_a_missing_best_checkpoint_is_named_and_another_used(copied, without_pictures, capsys):
    steps = sorted(int(path.name) for path in (copied / "checkpoints").iterdir())
    assert len(steps) > 1
    best = RunFolder(copied).best_step()
    shutil.rmtree(copied / "checkpoints" / str(best))
    run("evaluate", copied)
    other = max(step for step in steps if step != best)
    message = f"the best checkpoint, {best}, is missing; using checkpoint {other} instead"
    assert message in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    assert "no readable checkpoint" in refused(capsys, "evaluate", copied)


def test_evaluate_takes_another_proposal(copied, without_pictures):
    """Of each degree of freedom another estimate, of the same images, beside the same bound."""
    found = []
    for df in ("7", "2"):
        run("evaluate", copied, "--proposal", "student_t", "--proposal-df", df)
        results = json.loads((copied / "results.json").read_text())
        assert results["run"]["proposal"] == "student_t"
        found.append({metric["name"]: metric["value"] for metric in results["metrics"]})
    assert found[0]["log_prob"] != found[1]["log_prob"]
    assert found[0]["elbo"] == pytest.approx(found[1]["elbo"], rel=1e-6)


@pytest.mark.slow
def test_probabilistic_pca_is_trained_and_evaluated_in_closed_form(tmp_path):
    """The posterior is exact: the gap is 0, and so is the excess energy of the encoder's guess.

    So is the proposal that is found for each image: 8 samples make 4 pairs of equal weight.
    """
    folder, samples = tmp_path / "run", ("--importance-samples", "8", "--test-images", "16")
    run("train", "--method", "ppca", *samples, "--run-dir", folder)
    results = json.loads((folder / "results.json").read_text())
    assert (results["run"]["epochs"], results["run"]["steps"]) == (0, None)
    metrics = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert abs(metrics["inference_gap"]) < 1e-3
    assert metrics["log_prob"] < 0 and metrics["ess"] == pytest.approx(4, rel=1e-3)
    assert metrics["unconverged"] == metrics["not_positive_definite"] == 0
    (logged,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (logged["split"], logged["step"], logged["best"]) == ("validation", 0, True)
    assert abs(logged["amortization_loss"]) < 1e-3
    assert (folder / "report.html").exists()


def test_report_prints_several_runs(finished, capsys):
    folder, _ = finished
    run("report", folder, folder)
    assert "log p(x)" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [[], ["train"], ["evaluate"], ["report"], ["prepare"]])
def test_help_explains(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*verb, "--help")
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_help_gives_every_training_option_with_a_text_and_its_default(capsys):
    with pytest.raises(SystemExit):
        run("train", "--dataset", "mnist", "--help")
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for section in ("data", "model", "inference", "training", "evaluation"):
        for name, value in vars(getattr(Config(), section)).items():
            option = "--" + name.replace("_", "-")
            assert option in text
            if name != "dataset" and not isinstance(value, tuple | bool):
                assert f"(default: {value})" in text.split(option, 1)[1][:600], option


def test_digits_have_smaller_defaults_and_other_sets_the_papers():
    assert parse(["train"]).config.model.hidden == (200, 200)
    config = parse(["train", "--dataset=mnist"]).config
    assert config.model == ModelConfig()
    assert (config.model.latent, config.model.hidden) == (50, (500, 500))
    assert config.training == TrainingConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", str(2**32)], "seed must be from 0 to 2**32 - 1"),
        (["--seed", "-1"], "seed must be from 0 to 2**32 - 1"),
        (["--epochs", str(2**31)], "epochs must be at most 2147483647"),
        (["--warmup-steps", "-1"], "warmup_steps must be at least 0"),
        (["--learning-rate", "inf"], "learning_rate must be positive and finite"),
        (["--clip-norm", "nan"], "clip_norm must be positive"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1"),
        (["--distributed.devices", "0"], "distributed.devices must be at least 1"),
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
        (["--hidden", "16", "0"], "hidden must be at least 1"),
        (["--preset", "paper-screenshoot"], "did you mean 'paper-screenshot'"),
        (["--patience", "0"], "patience must be at least 1"),
        (["--minutes", "0"], "minutes must be positive"),
        (["--train-samples", "0"], "train_samples must be at least 1"),
        (["--ascent-rate", "0"], "ascent_rate must be positive"),
        (["--ascent-momentum", "1"], "ascent_momentum must be at least 0 and below 1"),
        (["--ascent-clip", "0"], "ascent_clip must be positive"),
        (["--proposal-scale", "0"], "proposal_scale must be positive"),
        (["--proposal-df", "nan"], "proposal_df must be positive"),
        (["--method", "sa_vae", "--gradient", "implicit"], "choose unroll or stop"),
        (["--method", "vae_hf", "--steps", "0"], "vae_hf needs at least one step"),
        (["--method", "vae_iaf", "--flow-width", "3"], "flow_width must be at least latent"),
        (["--method", "vae", "--objective", "evidence"], "which vlae has and vae has not"),
        (["--method", "vae_hf", "--objective", "dreg"], "needs the density of any point"),
        (["--method", "ppca", "--hidden", "16"], "it has no hidden layers"),
        (["--method", "ppca", "--epochs", "3"], "takes --epochs 0"),
        (["--method", "ppca", "--preprocess", "static_binary"], "and a gaussian output of one"),
        (["--method", "ppca", "--variance", "per_pixel"], "of one variance"),
        (["--method", "ppca", "--latent", "64"], "takes from 1 to 63 latent dimensions"),
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
        run("train", *arguments)
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
    before = contents(folder)
    line = refused(capsys, "train", *QUICK, "--run-dir", folder)
    assert all(way in line for way in ("--resume", "--overwrite", "--run-dir"))
    assert contents(folder) == before


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "RUN", "--seed", str(2**32)], "seed must be from 0 to 2**32 - 1"),
        (["sample", "RUN", "--seed", "-1"], "seed must be from 0 to 2**32 - 1"),
        (["sample", "RUN", "--count", "0"], "count must be at least 1"),
        (["sample", "RUN", "--count", str(2**31)], "count must be at most 2147483647"),
        (["sample", "RUN", "--temperature", "nan"], "temperature must be at least 0"),
        (["encode", "RUN", "--images", "0"], "images must be at least 1"),
        (["reconstruct", "RUN", "--images", "-3"], "images must be at least 1"),
        (["score", "RUN", "--images", "0"], "images must be at least 1"),
        (["score", "RUN", "--importance-samples", "0"], "importance_samples must be at least 1"),
        (["impute", "RUN", "--missing", "0.5", "--images", "0"], "images must be at least 1"),
        (["impute", "RUN", "--missing", "0.5", "--seed", str(2**32)], "seed must be from 0"),
        (["impute", "RUN", "--missing", "0.5", "--samples", "1"], "samples must be at least 2"),
        (["impute", "RUN", "--missing", "nan"], "missing must lie between 0 and 1"),
        (["impute", "RUN"], "--mask FILE, --missing SHARE"),
        (["gap", "RUN", "--images", "0"], "images must be at least 1"),
        (["gap", "RUN", "--elbo-samples", "1"], "elbo_samples must be at least 2"),
        (["evaluate", "RUN", "--importance-samples", "0"], "importance_samples must be at least 1"),
        (["evaluate", "RUN", "--test-images", "0"], "test_images must be at least 1"),
        (["evaluate", "RUN", "--proposal-df", "inf"], "proposal_df must be positive and finite"),
        (["evaluate", "RUN", "--distributed.timeout", "0"], "timeout must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_run_is_looked_at(capsys, command, message):
    assert message in refused(capsys, *command)


@pytest.mark.parametrize("command", ["evaluate", "encode", "train"])
def test_damaged_metrics_are_named_with_their_line(copied, capsys, command):
    lines = (copied / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    resume = [*QUICK, "--resume", "--run-dir"] if command == "train" else []
    for damage in (b'{"split": "tr\n', b"\xff\xfe\n", b"[1]\n", b'{"step": "two"}\n', b"\n"):
        (copied / "metrics.jsonl").write_bytes(lines[0] + damage + b"".join(lines[2:]))
        line = refused(capsys, command, *resume, copied)
        assert f"{copied / 'metrics.jsonl'} is damaged: line 2 is no whole record" in line


def test_a_run_of_a_version_before_the_first_release_is_refused(copied, capsys):
    """Its checkpoints have an item notes in place of info."""
    for step in (copied / "checkpoints").iterdir():
        (step / "info").rename(step / "notes")
        digests = (step / "sha256.json").read_text().replace('"info/', '"notes/')
        (step / "sha256.json").write_text(digests)
    for command in ("evaluate", "sample"):
        line = refused(capsys, command, copied)
        assert "was written by vlae_jax before 0.1.0" in line and "train again" in line
    resume = ("--resume", "--run-dir", copied)
    assert "before 0.1.0" in refused(capsys, "train", *QUICK, *resume)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of images given in Python, put down by `save`; and a file of such images."""
    folder = tmp_path_factory.mktemp("saved")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 6, 6), dtype=np.uint8)
    config = Config(
        model=ModelConfig(latent=2, hidden=(4,)),
        inference=InferenceConfig(steps=1),
        training=TrainingConfig(batch_size=8),
    )
    save(initialize(config, as_dataset(pixels, config.data)), folder / "run")
    np.savez(folder / "input.npz", x=pixels[:3])
    return folder / "run", folder / "input.npz"


@pytest.mark.parametrize(
    ("command", "shapes"),
    [
        (["sample", "RUN", "--count", "5"], {"expected": (5, 6, 6, 1), "z": (5, 2)}),
        (["encode", "RUN", "INPUT"], {"mean": (3, 2), "covariance": (3, 2, 2)}),
        (["reconstruct", "RUN", "INPUT"], {"squared_error": (3,)}),
        (
            ["impute", "RUN", "INPUT", "--missing", "0.5", "--steps", "2", "--samples", "4"],
            {"missing": (3, 6, 6, 1)},
        ),
        (["score", "RUN", "INPUT", "--importance-samples", "4"], {"log_prob": (3,)}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_saved_model_is_used_on_images_of_ones_own(saved, tmp_path, command, shapes):
    places = {"RUN": saved[0], "INPUT": saved[1]}
    output = tmp_path / "output.npz"
    run(*(places.get(word, word) for word in command), "--output", output)
    with np.load(output) as written:
        assert {name: written[name].shape for name in shapes} == shapes


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        ("evaluate", "call vlae_jax.analysis.evaluation.evaluate"),
        ("gap", "call vlae_jax.analysis.gap_measurement.measure_gaps"),
        ("encode", "name images as INPUT"),
        ("score", "name images as INPUT"),
    ],
)
def test_a_run_of_arrays_says_what_to_do_without_their_data_set(saved, capsys, command, way_out):
    line = refused(capsys, command, saved[0])
    assert "trained on arrays given in Python" in line and way_out in line


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
    line = refused(capsys, "evaluate", tmp_path)
    assert "this version has no option model.latents" in line and "train again" in line


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
