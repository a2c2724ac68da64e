"""Every example is run, and what it says is held to something true."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

pytestmark = pytest.mark.usefixtures("quick_compile")

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_in(text):
    return [float(found) for found in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


# ---------------------------------------------------------------- what each one shows


def check_plain_jax(module, figures):
    """A linear model: evidence and every single sample of the ELBO are log p(x)."""
    exact = figures["exact"]  # scikit-learn's, in float64
    assert np.std(exact) > 5.0
    np.testing.assert_allclose(figures["evidence"], exact, rtol=0, atol=2e-3)
    np.testing.assert_allclose(figures["elbo"], exact, rtol=0, atol=2e-3)


def check_training_loop(module, figures):
    """A bound that beats PCA's exact log-likelihood by 3 nats has learned something nonlinear."""
    assert figures["elbo"] > figures["pca"] + 3.0


def check_flax_nnx(module, figures):
    """Two estimates of log p(x) agree, the bound is below, and the posterior is a good proposal."""
    log_prob, info = np.asarray(figures["log_prob"]), figures["info"]
    assert np.mean(log_prob) > 64 * np.log(0.5) + 15.0  # better than a coin a pixel
    assert abs(np.mean(figures["evidence"]) - np.mean(log_prob)) < 0.25
    assert np.mean(info.elbo) < np.mean(log_prob) < np.mean(info.elbo) + 1.0
    assert np.mean(info.ess) > 0.25 * module.SAMPLES


def check_flax_linen(module, figures):
    """A Newton step lifts the bound, and further steps never lower it by more than noise."""
    encoder, *searched = figures["elbos"]
    assert searched[1] > encoder + 1.0 and searched[-1] > searched[1]
    assert np.all(np.diff(searched) > -0.1)


def check_equinox_decoder(module, figures):
    """Without a repair the indefinite ones have no posterior, and they alone; with it all have."""
    elbo, is_pd = map(np.asarray, figures["exact"])
    np.testing.assert_array_equal(np.isnan(elbo), ~is_pd)
    assert 0.0 < np.mean(is_pd) < 1.0
    repaired, is_pd = map(np.asarray, figures["repaired"])
    assert np.all(np.isfinite(repaired)) and not np.all(is_pd)
    assert np.mean(repaired) > np.mean(figures["before"][0]) + 50.0


def check_haiku_decoder(module, figures):
    """Rectified units: Gauss-Newton is the exact Hessian. And the counts are scipy's binomials."""
    train, test = (np.asarray(part, np.float64) for part in figures["split"])
    rates = (train.sum(axis=0) + 0.5) / (16 * len(train) + 1)
    alone = scipy.stats.binom.logpmf(test, 16, rates).sum(axis=1).mean()
    np.testing.assert_allclose(figures["alone"], alone, rtol=1e-4)
    assert np.mean(figures["elbo"]) > alone + 50.0
    gauss_newton, exact = map(np.asarray, figures["precisions"])
    scale = np.max(np.abs(exact), axis=(1, 2), keepdims=True)
    assert np.max(np.abs(gauss_newton - exact) / scale) < 1e-5


def check_numpyro_model(module, figures):
    """Of a posterior that is nearly Gaussian: 1000 draws of NUTS agree to their noise."""
    (mean, std), (nuts_mean, nuts_std) = figures["laplace"], figures["nuts"]
    assert np.max(np.abs(mean - nuts_mean) / nuts_std) < 0.5
    assert np.max(np.abs(std / nuts_std - 1)) < 0.2


def check_optimistix_search(module, figures):
    """The learned prior has more evidence than narrow and wide ones, and than its neighbors."""
    learned = float(figures["log_scale"])
    assert figures["evidence"][1] > max(figures["evidence"][0], figures["evidence"][2]) + 1.0
    assert figures["held_out"][1] > max(figures["held_out"][0], figures["held_out"][2])
    offsets = jnp.array([-0.05, 0.0, 0.05])
    evidence = jax.jit(jax.vmap(lambda s: module.fit(s, *figures["train"])[0]))(learned + offsets)
    below, best, above = np.asarray(evidence, np.float64)
    assert best > below and best > above
    # The top of the parabola through the three.
    assert abs(0.025 * (above - below) / (2 * best - above - below)) < 0.01


def check_blackjax_hmc(module, figures):
    """Ten times as many effective draws a gradient, of the same posterior."""
    (plain, slow), (whitened, fast) = figures["z"], figures["u"]
    assert fast > 10 * slow
    for draws, allowed in [(plain, 0.6), (whitened, 0.25)]:
        error = np.abs(np.mean(draws, axis=0) - figures["mode"]) / figures["std"]
        assert np.max(error) < allowed
    assert np.max(np.abs(np.std(whitened, axis=0) / figures["std"] - 1)) < 0.2


def check_train_and_use(module, figures):
    """Codes of unseen digits say more than the mean image does, and less than is certain."""
    codes, pictures = figures["codes"], figures["pictures"]
    assert codes["mean"].shape == (197, 8) and codes["is_pd"].all()
    # Data only add precision to that of the prior, which is 1.
    assert np.all(figures["std"] > 0) and np.max(figures["std"]) <= 1 + 1e-4
    assert figures["error"] < 0.6 * figures["spread"]
    assert pictures.shape == (16, 8, 8, 1)
    assert pictures.min() >= 0 and pictures.max() <= 1


# ---------------------------------------------------------------- all of them


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_what_it_shows_is_true(name, capsys):
    module = load(name)
    figures = module.main()
    printed = capsys.readouterr().out
    assert numbers_in(printed) and "nan" not in printed
    globals()[f"check_{name}"](module, figures)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_what_it_shows(name):
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""') and text.endswith('if __name__ == "__main__":\n    main()\n')


def test_the_table_has_a_line_for_every_example_and_no_other():
    rows = re.findall(
        r"^\| \[(\w+)\.py\]\((\w+)\.py\) \|", (FOLDER / "README.md").read_text(), re.M
    )
    assert sorted(rows) == [(name, name) for name in EXAMPLES]
