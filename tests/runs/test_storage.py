"""Run folders in a bucket: the real command line against a bucket on loopback."""

import functools
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from bucket_server import served
from commandline import refused as refused_beside
from commandline import run
from google.cloud.storage import Client

from vlae_jax.errors import UserError
from vlae_jax.report import write_report
from vlae_jax.runs import storage
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.storage import absolute, as_folder, in_bucket, read_json, resolved

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = [
    *("--method", "vae", "--hidden", "16", "--latent", "3", "--learning-rate", "0.01"),
    *("--epochs", "2", "--checkpoint-every", "15", "--log-every", "5"),
    *("--importance-samples", "8", "--test-images", "16"),
]


# What the storage clients log would stand beside the line.
refused = functools.partial(refused_beside, alone=True)


@pytest.fixture(scope="module")
def service():
    """The bucket, for all tests: each has its own folder in it."""
    with served() as (bucket, url), pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield bucket


@pytest.fixture
def bucket(service, monkeypatch):
    """The same, which the program has not asked yet."""
    storage.reach.cache_clear()
    monkeypatch.setattr(service, "before_write", lambda name: None)
    yield service
    storage.reach.cache_clear()


def records(folder):
    """The records of metrics.jsonl without times."""
    timed = ("seconds", "images_per_second")
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in folder.read_metrics()
    ]


def metrics(folder):
    return read_json(folder.results)["metrics"]


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_bucket(
    bucket, monkeypatch, tmp_path, capsys
):
    """And ends as one on a disk that nobody killed; then it is used, all from the bucket.

    The process dies when the second checkpoint is about to be declared whole. As much as a machine
    that is deleted then leaves is in the bucket: half a checkpoint, which does not count, and
    metrics that go on after the whole one.
    """
    commit = re.compile(r"runs/digits-vae-seed0/checkpoints/(\d+)/commit_success.txt")
    committed = []

    def before_write(name):
        if found := commit.fullmatch(name):
            committed.append(int(found[1]))
            if len(committed) == 2:
                process.kill()
                raise ConnectionAbortedError

    monkeypatch.setattr(bucket, "before_write", before_write)
    process = subprocess.Popen(
        [sys.executable, "-m", "vlae_jax", "train", "--runs-dir", "gs://bucket/runs", *SMALL],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    local = RunFolder(tmp_path / "run")
    with monkeypatch.context() as without_pictures:
        without_pictures.setattr("vlae_jax.analysis.snapshots.take_snapshots", lambda *_: {})
        without_pictures.setattr("vlae_jax.report.write_report", lambda _: None)
        run("train", "--run-dir", local.path, *SMALL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    remote = RunFolder(as_folder("gs://bucket/runs/digits-vae-seed0"))
    first, second = committed
    assert bucket.names(f"runs/digits-vae-seed0/checkpoints/{second}/")
    assert max(record["step"] for record in records(remote)) >= second > first
    monkeypatch.setattr(bucket, "before_write", lambda name: None)
    capsys.readouterr()

    run("train", "--runs-dir", "gs://bucket/runs", *SMALL, "--resume-if-there")
    assert f"resuming at step {first} of" in capsys.readouterr().err
    assert records(remote) == records(local)
    assert metrics(remote) == metrics(local)
    written = set(bucket.names("runs/digits-vae-seed0/"))
    files = (
        "results.json",
        "per_image.npz",
        "snapshots.npz",
        "report.html",
        "figures/pareto_k.png",
    )
    assert {f"runs/digits-vae-seed0/{name}" for name in files} <= written
    assert not [name for name in written if "partial" in name or "tmp" in name]
    run("encode", remote.path, "--images", "4")
    with (remote.path / "encoded.npz").open("rb") as file:
        assert np.load(file)["mean"].shape == (4, 3)
    assert "already exists" in refused(capsys, "encode", remote.path)
    assert "already holds a run" in refused(capsys, "train", "--run-dir", remote.path, *SMALL)
    run("report", remote.path, local.path, "--output", "gs://bucket/compared")
    assert {"compared/report.html", "compared/log_likelihood.png"} <= set(bucket.names("compared"))
    assert (remote.path / "figures/training_curve.png").read_bytes().startswith(b"\x89PNG")


def test_names_stay_what_they_are(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = as_folder("gs://bucket/a/b")
    assert str(path) == str(path / "") == str(absolute(path)) == str(resolved(path))
    assert str(path / "c") == "gs://bucket/a/b/c"
    assert in_bucket(path)
    assert absolute(as_folder("a")) == resolved(as_folder("a/../a")) == tmp_path / "a"
    assert type(as_folder("a")) is type(tmp_path)


def test_what_others_write_is_seen_at_once(bucket):
    """TensorStore and other processes write there too."""
    folder = as_folder("gs://bucket/shared")
    (folder / "ours").write_bytes(b"1")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    assert not (folder / "theirs").exists()
    Client().bucket("bucket").blob("shared/theirs").upload_from_string(b"2")
    assert [path.name for path in folder.iterdir()] == ["ours", "theirs"]
    assert (folder / "theirs").read_bytes() == b"2"


def test_only_the_run_itself_is_overwritten(bucket):
    runs = {name: RunFolder(as_folder(f"gs://bucket/kept/{name}")) for name in ("run", "run2")}
    for folder in runs.values():
        folder.create(Config(), overwrite=False)
        folder.write_results({"metrics": []})
    with pytest.raises(UserError, match="already holds a run"):
        runs["run"].create(Config(), overwrite=False)
    runs["run"].create(Config(), overwrite=True)
    left = ["kept/run/config.json", "kept/run2/config.json", "kept/run2/results.json"]
    assert bucket.names("kept") == left
    with pytest.raises(UserError, match="holds files that are no run"):
        RunFolder(as_folder("gs://bucket/kept")).create(Config(), overwrite=True)
    with pytest.raises(UserError, match="whole bucket"):
        RunFolder(as_folder("gs://bucket")).create(Config(), overwrite=True)
    assert bucket.names("kept") == left


def test_metrics_are_written_when_they_are_saved(bucket, monkeypatch):
    written = []
    monkeypatch.setattr(bucket, "before_write", written.append)
    run = RunFolder(as_folder("gs://bucket/metrics"))
    for begin in (0, 3):
        log = run.metrics_log()
        for step in range(begin, begin + 5):
            log.append({"step": step, "best": step == 2})
        assert len(written) == (1 if begin else 0)
        log.save()
        log.save()  # nothing new
        assert written == ["metrics/metrics.jsonl"] * (2 if begin else 1)
        if not begin:
            run.drop_metrics_after(2)
            written.pop()
    assert [record["step"] for record in records(run)] == list(range(8))
    assert run.best_step() == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(bucket):
    folder = as_folder("gs://bucket/damaged/checkpoints")
    states = {step: {"weights": np.full(1000, step, np.float32)} for step in (1, 2)}
    checkpoints = Checkpoints(folder)
    for step, state in states.items():
        checkpoints.save(step, {"state": state}, CheckpointInfo(0.0, 0.0, step, 0.0, {}))
    checkpoints.close()
    for name in bucket.names("damaged/checkpoints/2/state/"):
        if "/d/" in name:
            bucket.create_file("bucket", name, b"rubbish", bucket.objects["bucket"][name])
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore_last(lambda info: {"state": states[1]})
    assert restored.step == 1
    np.testing.assert_array_equal(restored.trees["state"]["weights"], states[1]["weights"])
    (line,) = restored.damaged
    assert line.startswith("checkpoint 2 is damaged")
    assert line.endswith("using checkpoint 1 instead")
    assert checkpoints.steps() == [1]
    checkpoints.close()


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://", "gs:///run", "https://host/run"])
def test_other_urls_are_refused(name, capsys):
    assert "neither a local folder nor gs://" in refused(capsys, "evaluate", name)


def test_a_bucket_that_is_not_there_is_not_made(bucket, capsys):
    line = refused(capsys, "train", "--run-dir", "gs://nowhere/run")
    assert "there is no bucket gs://nowhere" in line
    assert list(bucket.buckets) == ["bucket"]


def test_a_folder_that_is_not_there(bucket, capsys):
    assert "is no run folder" in refused(capsys, "evaluate", "gs://bucket/nothing")
    with pytest.raises(UserError, match="no run folder at gs://bucket/nothing"):
        write_report(["gs://bucket/nothing"])


def test_no_network(bucket, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    line = refused(capsys, "report", "gs://bucket/run")
    assert "gs://bucket cannot be reached" in line
    assert "check the network" in line


def test_no_credentials(bucket, monkeypatch, tmp_path, capsys):
    """Neither from the environment, nor a file, nor the machine."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    line = refused(capsys, "report", "gs://bucket/run")
    assert "gcloud auth application-default login" in line
    assert "GOOGLE_APPLICATION_CREDENTIALS" in line


def test_no_permission(bucket, monkeypatch, capsys):
    def granted(self, permissions, **_):
        return [name for name in permissions if name != "storage.objects.delete"]

    monkeypatch.setattr("google.cloud.storage.Bucket.test_iam_permissions", granted)
    line = refused(capsys, "report", "gs://bucket/run")
    assert "lack storage.objects.delete; ask its owner" in line


def test_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = refused(capsys, "train", "--runs-dir", "gs://bucket/runs")
    assert "pip install 'vlae-jax[gcs]'" in line


def test_a_write_that_is_refused_is_told_in_one_line(bucket, monkeypatch):
    run = RunFolder(as_folder("gs://bucket/refused"))

    def refuse(*_, **__):
        raise RuntimeError("quota\nexceeded")

    monkeypatch.setattr("gcsfs.GCSFileSystem.open", refuse)
    with pytest.raises(UserError, match=r"results\.json cannot be written: quota exceeded;"):
        run.write_results({})


def test_event_files_are_for_local_folders(bucket, capsys):
    line = refused(capsys, "train", "--tensorboard", "--run-dir", "gs://bucket/events")
    assert "metrics.jsonl holds the same scalars" in line
    assert not bucket.names("events")


def test_a_local_run_does_not_import_the_storage_clients(tmp_path):
    """They take a second."""
    code = (
        "import sys\nfrom vlae_jax.commands.main import main\n"
        "try:\n    main(['evaluate', sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "vlae_jax.runs.storage" in output.split()
    assert not {"gcsfs", "google.cloud", "google.auth", "aiohttp"} & set(output.split())
