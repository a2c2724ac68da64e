"""Run folders on a disk: whole files or none, and one line for each kind of damage."""

import json

import pytest

from vlae_jax.errors import UserError
from vlae_jax.runs.config import Config
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.storage import read_bytes, read_json, write_atomically


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def log(run, *lines):
    run.path.mkdir(exist_ok=True)
    run.metrics.write_bytes(b"".join(lines))


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def break_off(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"file cannot be written: No space left on device;"):
        write_atomically(path, break_off)
    assert read_bytes(path) == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is damaged: it holds no JSON"),
        (b'{"a": ', "is damaged: it holds no JSON"),
        (b"\xff\xfe", "is damaged: it holds no JSON"),
        (b"[" * 100_000, "is damaged: it holds no JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
    ids=["missing", "empty", "half", "no text", "deep", "list"],
)
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_in_place_of_a_file_is_told_in_one_line(run):
    run.metrics.mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        run.best_step()


def test_the_best_step_is_that_of_the_last_record_marked_best(run):
    assert run.best_step() is None
    log(run, b'{"step": 1, "best": true}\n', b'{"step": 2, "best": true}\n', b'{"step": 3}\n')
    assert run.best_step() == 2


def test_a_last_line_that_a_crash_has_cut_short_is_left_out_and_goes(run):
    log(run, b'{"step": 1}\n', b'{"step": 2}\n', b'{"step": 3, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2]
    run.drop_metrics_after(1)
    assert run.read_metrics() == [{"step": 1}] and run.metrics.read_text().count("\n") == 1


def test_records_stay_as_they_were_when_later_ones_are_dropped(run):
    records = [{"split": "train", "step": step, "elbo": -0.1 * step, "kl": None} for step in (1, 2)]
    log(run, *(json.dumps(record).encode() + b"\n" for record in records))
    run.drop_metrics_after(1)
    assert run.read_metrics() == records[:1]


def test_a_folder_where_a_crash_left_half_a_config_may_be_used(run):
    run.path.mkdir()
    (run.path / "config.json.123.partial").write_text("{")
    run.create(Config(), overwrite=False)
    assert run.read_config() == Config()
    assert [entry.name for entry in run.path.iterdir()] == ["config.json"]
