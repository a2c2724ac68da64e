"""Checkpoints: a file that is missing is damage, whichever it is."""

import shutil

import jax
import jax.numpy as jnp

from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints


def test_every_file_that_is_missing_is_named_and_the_checkpoint_before_it_used(tmp_path):
    trees = {"model": {"weights": jnp.arange(3.0)}, "training": {"step": jnp.zeros(())}}
    checkpoints = Checkpoints(tmp_path / "whole")
    for step in (1, 2):
        info = CheckpointInfo(0.0, float(step), step, -1.0, {})
        checkpoints.save(step, jax.tree.map(lambda leaf, step=step: leaf + step, trees), info)
    checkpoints.close()
    newest = tmp_path / "whole" / "2"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    # Of Orbax's own marks nothing is read back.
    marks = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = [path for path in files if path.name not in marks]
    assert {path.parts[0] for path in files} >= {"model", "training", "info", "sha256.json"}
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "2" / file).unlink()
        restored = Checkpoints(copy).restore_last(lambda _: trees)
        assert restored.step == 1, file
        assert "checkpoint 2 is damaged" in restored.damaged[0] and file.name in restored.damaged[0]
        assert restored.trees["model"]["weights"].tolist() == [1.0, 2.0, 3.0]
