"""The README's promises that a program can check."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import vlae_jax

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIT, LIBRARY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def lines_of(example: str) -> int:
    return len([line for line in example.splitlines() if line.strip()])


def test_the_readme_is_read_in_two_minutes():
    assert len(README.encode()) < 7000
    assert lines_of(FIT) <= 8 and lines_of(LIBRARY) <= 11


def test_the_library_example_runs_as_printed_and_is_right():
    names = {}
    exec(LIBRARY, names)
    assert names["modes"].shape == (128, 3)
    assert names["covariances"].shape == (128, 3, 3)
    assert np.asarray(names["is_pd"]).all()
    # At a mode of the example's own log joint the gradient vanishes.
    x, mode = names["xs"][0], names["modes"][0]
    vl, jnp, weights = names["vl"], names["jnp"], names["weights"]
    grad = jax.grad(
        lambda z: vl.gaussian(x, jnp.tanh(z) @ weights, jnp.log(0.1)) + vl.standard_normal(z)
    )(mode)
    np.testing.assert_allclose(grad, 0, atol=1e-2)


@pytest.mark.slow
def test_the_example_of_a_fit_runs_as_printed(quick_compile, tmp_path, monkeypatch, capsys):
    """With the network and the epochs of a second in place of the defaults, nothing else."""
    config = vlae_jax.default_config("digits")
    tiny = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, latent=3, hidden=(16,)),
        training=dataclasses.replace(config.training, epochs=1),
    )
    monkeypatch.setattr(vlae_jax, "default_config", {"digits": tiny}.__getitem__)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(FIT, names)
    assert capsys.readouterr().out == "(359, 3) (359, 3, 3)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["digits-model"]
    covariances = names["codes"]["covariance"]
    assert np.linalg.eigvalsh(covariances).min() > 0


def test_the_first_command_prints_what_is_shown():
    """A run's lines, in their order, and none left over from the place they were put into."""
    (shown,) = re.findall(r"<!-- first command.*?-->\n```\n(.*?)```", README, re.DOTALL)
    run, *epochs = shown.splitlines()[:4]
    assert run == f"run folder: runs/{vlae_jax.default_config().run_name}"
    assert epochs[0].startswith("epoch 1: validation ELBO ")
    assert re.search(r"^  digits-vlae-T4-seed0 +digits +VLAE +4 +0 +120 ", shown, re.MULTILINE)


def test_every_file_and_make_variable_it_names_exists():
    for path in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\b([A-Z_]{4,})=", README)):
        assert re.search(rf"\b{name}\b", makefile), name
