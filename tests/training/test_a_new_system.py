"""A new inference system: one function and one entry, and all commands know it."""

import json

import jax.numpy as jnp
import numpy as np
from builders import records, tiny_mapping

from vlae_jax.commands.main import main
from vlae_jax.models.systems import Inference
from vlae_jax.posterior import DiagonalPosterior
from vlae_jax.runs.folder import RunFolder
from vlae_jax.runs.methods import METHODS, Method

WIDTH = 0.25


def fixed_width(at, key, config):
    """A system with the encoder's mean and one standard deviation for all dimensions."""
    posterior = DiagonalPosterior(at.mean, jnp.full_like(at.mean, np.log(WIDTH)))
    flags = {"newton_decrement": jnp.sum(at.mean**2)}
    return Inference(posterior, jnp.zeros(()), at.mean[None], flags)


def test_a_new_system_is_one_function_and_one_entry(quick_compile, tmp_path, monkeypatch, capsys):
    """It trains, is evaluated and reported, and encodes, by name."""
    entry = Method("Fixed width", f"{__name__}:fixed_width", "#123456", has_steps=False)
    monkeypatch.setitem(METHODS, "fixed", entry)
    arrays = tiny_mapping()
    np.savez(tmp_path / "mine.npz", **arrays)
    run = RunFolder(tmp_path / "run")
    main(
        [
            *("train", "--dataset", "mine", "--data-dir", str(tmp_path), "--method", "fixed"),
            *("--latent", "2", "--hidden", "8", "--epochs", "3", "--batch-size", "8"),
            *("--learning-rate", "0.01", "--importance-samples", "30", "--proposal", "posterior"),
            *("--run-dir", str(run.path)),
        ]
    )
    assert "Fixed width" in capsys.readouterr().out
    assert len(records(run, "validation")) == 3
    results = json.loads(run.results.read_text())
    assert (results["run"]["method"], results["run"]["label"]) == ("fixed", "Fixed width")
    assert results["run"]["steps"] is None
    metrics = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert np.isfinite([metrics["log_prob"], metrics["elbo"], metrics["newton_decrement"]]).all()
    assert "Fixed width" in (run.path / "report.html").read_text()
    main(["encode", str(run.path), "--data-dir", str(tmp_path)])
    with np.load(run.path / "encoded.npz") as encoded:
        covariances = encoded["covariance"]
        np.testing.assert_allclose(
            encoded["newton_decrement"], (encoded["mean"] ** 2).sum(axis=1), rtol=1e-5
        )
    expected = np.broadcast_to(WIDTH**2 * np.eye(2), (len(arrays["x_test"]), 2, 2))
    np.testing.assert_allclose(covariances, expected, rtol=1e-5)
