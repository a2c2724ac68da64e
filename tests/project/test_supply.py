"""What is installed is known by its hash, and nothing that is read is run."""

import ast
import json
import pickle
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_config, tiny_mapping
from packaging.requirements import Requirement

from vlae_jax.data.sets import load_dataset
from vlae_jax.data.supplied import as_dataset, read_array, read_mask
from vlae_jax.errors import Unreadable, UserError
from vlae_jax.models.initial import initialize
from vlae_jax.models.saved import load, save
from vlae_jax.runs import checkpoints
from vlae_jax.runs.records import read_run

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "benchmarks", "experiments", "examples")
RUNS_WHAT_IT_READS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def pins(text):
    return {line.split(" \\")[0].strip() for line in text.splitlines() if "==" in line}


def test_every_requirement_has_a_hash_and_the_version_of_constraints():
    text = (ROOT / "requirements.txt").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert pins(text) <= pins((ROOT / "constraints.txt").read_text())
    # Nothing but pins and hashes: no options, which could name another index.
    assert not re.findall(r"^-|https?:", text, re.M)


def test_what_the_command_needs_is_among_them():
    names = {Requirement(pin).name for pin in pins((ROOT / "requirements.txt").read_text())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert {Requirement(each).name for each in wanted} <= names


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_read_by_running_it(folder):
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for name, words in calls(tree):
            if name in ("np.load", "numpy.load"):
                refused = words.get("allow_pickle")
                assert refused is not None and ast.unparse(refused) == "False", path
            assert name not in ("eval", "exec", "torch.load", "yaml.load"), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert (module or "").partition(".")[0] not in RUNS_WHAT_IT_READS, path


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compile):
    folder = tmp_path_factory.mktemp("supply") / "run"
    config = tiny_config()
    save(initialize(config, as_dataset(tiny_mapping(), config.data)), folder)
    return folder


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["per_image.npz", "snapshots.npz"])
def test_an_array_of_objects_in_a_run_is_not_unpickled(run, tmp_path, name):
    mark = tmp_path / "mark"
    np.savez(run / name, data=np.array([Trap(mark)]))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_run(run)
    (run / name).unlink()
    assert not mark.exists()


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_an_array_of_objects_of_the_users_is_not_unpickled(tmp_path, ending):
    mark, path = tmp_path / "mark", tmp_path / f"x{ending}"
    (np.save if ending == ".npy" else np.savez)(path, np.array([Trap(mark)]))
    for read in (read_array, lambda file: read_mask(file, (1, 2))):
        with pytest.raises(UserError, match=str(path)):
            read(path)
    with pytest.raises(UserError, match=str(path)):
        load_dataset("x", path)
    assert not mark.exists()


def test_a_model_is_loaded_without_any_unpickling(run, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert load(run).provenance.image_shape == (4, 3, 1)


def test_no_file_of_a_checkpoint_is_a_pickle(run):
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        # Protocols 2 to 5 begin with this, and all end with a full stop.
        content = path.read_bytes()
        assert not (content[:1] == b"\x80" and content[-1:] == b"."), path


def test_pickles_in_the_place_of_a_checkpoints_files_are_not_run(run, tmp_path, monkeypatch):
    """Not even where their digests are right, as a stranger would make them."""
    monkeypatch.setattr(checkpoints, "_PAUSES", ())
    mark, copy = tmp_path / "mark", shutil.copytree(run, tmp_path / "run")
    (step,) = (path for path in (copy / "checkpoints").iterdir() if path.name.isdigit())
    replaced = [path for path in step.rglob("*") if path.is_file() and path.parent != step]
    for path in replaced:
        path.write_bytes(pickle.dumps(Trap(mark)))
    (step / "sha256.json").write_text(json.dumps(checkpoints._digests(step)))
    with pytest.raises((UserError, Unreadable)):
        load(copy)
    assert len(replaced) > 4 and not mark.exists()
