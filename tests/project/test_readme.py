"""The README's promises that a program can check."""

import re
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_as_printed_and_is_right():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names = {}
    exec(example, names)
    assert names["modes"].shape == (128, 3)
    assert np.asarray(names["is_pd"]).all()
    assert np.isfinite(names["log_probs"]).all()
    # At a mode of the example's own log joint the gradient vanishes.
    x, mode = names["xs"][0], names["modes"][0]
    vl, jnp, weights = names["vl"], names["jnp"], names["weights"]
    grad = jax.grad(
        lambda z: vl.gaussian(x, jnp.tanh(z) @ weights, jnp.log(0.1)) + vl.standard_normal(z)
    )(mode)
    np.testing.assert_allclose(grad, 0, atol=1e-2)


def test_every_file_and_make_variable_it_names_exists():
    for path in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\b([A-Z_]{4,})=", README)) - {"NAME", "NPROC"}:
        assert re.search(rf"\b{name}\b", makefile), name
