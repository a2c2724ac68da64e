"""Uses of a trained run against the closed form of probabilistic PCA, and their error messages."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    Linear,
    digits,
    linear_config,
    refused,
    small_config,
    tiny_config,
    tiny_images,
    untrained,
)
from PIL import Image
from problems import assert_close
from scipy.stats import norm

from vlae_jax.analysis.imputation import (
    COVERAGES,
    _inside,
    impute,
    missing_at_random,
    missing_box,
)
from vlae_jax.analysis.uses import auroc, encode, reconstruct, sample, score
from vlae_jax.commands.main import main
from vlae_jax.data.sets import dataset_from_arrays
from vlae_jax.data.supplied import read_images, read_missing
from vlae_jax.models.saved import load, save
from vlae_jax.runs.config import DataConfig, EvaluationConfig, InferenceConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

COUNT, LATENT = 20, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compile):
    """The run folder of a probabilistic PCA of the digits."""
    folder = tmp_path_factory.mktemp("uses") / "run"
    save(untrained(linear_config("ppca", latent=LATENT, evaluation_batch=20)), folder)
    return folder


@pytest.fixture
def use(run, tmp_path):
    """A command on the run: → the arrays it wrote."""

    def call(command, *arguments):
        output = tmp_path / f"{command}.npz"
        main([command, str(run), *map(str, arguments), "--output", str(output), "--overwrite"])
        with np.load(output) as archive:
            return dict(archive)

    return call


@pytest.fixture(scope="module")
def truth(run):
    """The parts of the model and of the first test images, float64."""
    return Linear(load(run), digits().test[:COUNT])


def given(linear, seen):
    """Mean and covariance of (z, x) for each image, from the pixels seen, (n, dim)."""
    kernel, latent = linear.kernel, linear.latent
    everything = np.block([[np.eye(latent), kernel], [kernel.T, linear.covariance]])
    means, covariances = [], []
    for x, look in zip(linear.xs, seen, strict=True):
        at = latent + np.flatnonzero(look)
        gain = np.linalg.solve(everything[np.ix_(at, at)], everything[at]).T
        prior = np.concatenate([np.zeros(latent), linear.bias])
        means.append(prior + gain @ (x - linear.bias)[look])
        covariances.append(everything - gain @ everything[at])
    return np.array(means), np.array(covariances)


def clipped_moments(mean, variance):
    """Mean, variance and fourth central moment of a Gaussian clipped to [0, 1], by quantiles."""
    quantiles = norm.ppf((np.arange(2000) + 0.5) / 2000)
    values = np.clip(mean[..., None] + np.sqrt(variance)[..., None] * quantiles, 0, 1)
    first = values.mean(axis=-1)
    rest = values - first[..., None]
    return first, (rest**2).mean(axis=-1), (rest**4).mean(axis=-1)


def assert_sampled(samples_mean, samples_variance, moments, count):
    """Within five standard errors. Where the mean is clipped its samples are too rare to tell."""
    first, second, fourth = moments
    told = (first > 0.1) & (first < 0.9)
    assert told.mean() > 0.2
    assert_close(
        np.asarray(samples_mean, np.float64)[told],
        first[told],
        standard_error=np.sqrt(second / count)[told],
    )
    assert_close(
        np.asarray(samples_variance, np.float64)[told],
        second[told],
        standard_error=np.sqrt((fourth - second**2) / count)[told] + 1e-9,
    )


def test_encode_gives_the_closed_form_posterior(run, truth, tmp_path):
    """From the command line to a file in the run folder, the run read from its folder."""
    copied = shutil.copytree(run, tmp_path / "run")
    main(["encode", str(copied), "--images", str(COUNT)])
    with np.load(copied / "encoded.npz") as archive:
        encoded = dict(archive)
    means, covariances = given(truth, np.ones((COUNT, 64), bool))
    assert_close(encoded["mean"], means[:, :LATENT], rtol=1e-4)
    assert_close(encoded["covariance"], covariances[:, :LATENT, :LATENT], rtol=1e-4)
    assert encoded["converged"].all() and encoded["is_pd"].all()


def test_reconstruct_decodes_the_posterior_mean(use, truth):
    found = use("reconstruct", "--images", COUNT, "--every-step")
    means, _ = given(truth, np.ones((COUNT, 64), bool))
    expected = means[:, :LATENT] @ truth.kernel + truth.bias + truth.mean
    pictures = np.clip(expected, 0, 1).reshape(truth.pixels.shape)
    assert_close(found["images"], truth.pixels / 16)
    assert_close(found["reconstructions"], pictures, rtol=1e-4)
    error = np.mean((pictures - truth.pixels / 16) ** 2, axis=(1, 2, 3))
    assert_close(found["squared_error"], error, rtol=1e-3)
    assert found["steps"].shape == (COUNT, 2, 8, 8, 1)
    assert_close(found["steps"][:, -1], found["reconstructions"])


def test_samples_have_the_moments_of_the_model(use, truth):
    count = 4000
    found = use("sample", "--count", count, "--seed", 7, "--draws")
    mean = truth.bias + truth.mean
    signal = np.diag(truth.kernel.T @ truth.kernel)
    for name, variance in (("expected", signal), ("draws", signal + truth.noise)):
        pictures = found[name].reshape(count, 64)
        moments = clipped_moments(mean, variance)
        assert_sampled(pictures.mean(axis=0), pictures.var(axis=0), moments, count)
    decoded = np.clip(found["z"] @ truth.kernel + mean, 0, 1)
    assert_close(found["expected"].reshape(count, 64), decoded, rtol=1e-4)


def test_a_sample_does_not_depend_on_how_many_and_temperature_scales_it(run):
    trained = load(run)
    few, more = (sample(trained, count, seed=3)["z"] for count in (3, 7))
    assert_close(more[:3], few)
    half = sample(trained, 3, seed=3, temperature=0.5)["z"]
    assert_close(half, 0.5 * few)


def test_impute_is_the_conditional_gaussian(use, truth):
    hidden, count = 32, 500
    found = use("impute", "--images", COUNT, "--samples", count, "--steps", 2, "--missing", 0.5)
    missing = found["missing"].reshape(COUNT, 64)
    assert (missing.sum(axis=1) == hidden).all() and (found["num_missing"] == hidden).all()
    means, covariances = given(truth, ~missing)
    assert_close(found["mean"], means[:, :LATENT], rtol=1e-4)
    assert_close(found["covariance"], covariances[:, :LATENT, :LATENT], rtol=1e-4)
    # What the model says of the missing pixels, from what was found out about z.
    kernel = truth.kernel
    decoded = found["mean"] @ kernel + truth.bias
    spread = np.einsum("kd,nkl,ld->nd", kernel, found["covariance"], kernel) + truth.noise
    variances = np.diagonal(covariances, axis1=1, axis2=2)[:, LATENT:]
    assert_close(decoded[missing], means[:, LATENT:][missing], rtol=1e-4)
    assert_close(spread[missing], variances[missing], rtol=1e-4)
    # And in pictures, where samples are clipped.
    pictures, std = (found[name].reshape(COUNT, 64) for name in ("images", "std"))
    moments = clipped_moments((means[:, LATENT:] + truth.mean)[missing], variances[missing])
    assert_sampled(pictures[missing], std[missing] ** 2, moments, count)
    seen = truth.pixels.reshape(COUNT, 64) / 16
    assert_close(pictures[~missing], np.float32(seen[~missing]))
    assert (std[~missing] == 0).all()
    # Its errors, and those of the encoder, whose answer for the mean-filled image is in closed
    # form too.
    errors = np.mean(((pictures - seen) ** 2)[missing].reshape(COUNT, -1), axis=1)
    assert_close(found["squared_error"], errors, rtol=1e-4)
    filled = np.where(missing, 0.0, truth.xs)
    precision = kernel @ kernel.T + truth.noise * np.eye(LATENT)
    codes = np.linalg.solve(precision, kernel @ (filled - truth.bias).T).T
    beside = (codes @ kernel + truth.bias - truth.xs)[missing].reshape(COUNT, -1)
    assert_close(
        np.mean(found["encoder_squared_error_x"]), np.float64(np.mean(beside**2)), rtol=0.02
    )
    assert found["squared_error_x"].mean() < found["encoder_squared_error_x"].mean()


def test_what_is_hidden_is_what_was_asked_for(tmp_path):
    shape = (4, 8, 6, 3)
    hidden = missing_at_random(shape, 0.3, seed=1)
    assert hidden.shape == shape and (hidden == hidden[..., :1]).all()
    assert (hidden[..., 0].sum(axis=(1, 2)) == 14).all()
    assert not (hidden[0] == hidden[1]).all()
    expected = np.zeros(shape, bool)
    expected[:, 5:7, 4:6] = True
    for box in ((5, 4, 2, 2), (5, 4, 2, 9)):
        assert (missing_box(shape, box) == expected).all()
    one = expected[0, ..., 0]
    for mask in (one, 7 * expected[..., 0], expected[:1], expected[..., :1]):
        np.save(tmp_path / "mask.npy", mask)
        assert (read_missing(tmp_path / "mask.npy", shape[1:], 4) == expected).all()
    np.savez(tmp_path / "mask.npz", missing=one, images=one)
    assert (read_missing(tmp_path / "mask.npz", shape[1:], 4) == expected).all()


@pytest.mark.parametrize("count", [2, 39, 200])
def test_predictive_intervals_hold_one_more_draw_as_often_as_they_say(count):
    sets = 4000
    draws = jax.random.normal(jax.random.key(count), (count + 1, sets))
    for probability in COVERAGES:
        held = np.asarray(_inside(draws[1:], draws[0], probability), np.float64)
        error = held.std() / sets**0.5
        assert_close(held.mean(), np.float64(probability), standard_error=error)
        wide = _inside(draws[1:], jnp.full(sets, 9.0), probability)
        assert count == 2 or (wide == 0).all()
    assert count == 2 or (_inside(draws[1:], jnp.median(draws, axis=0), 0.5) > 0).all()


@pytest.mark.parametrize(
    ("method", "preprocess", "activation"),
    [("vlae", "logit", "tanh"), ("vae_iaf", "static_binary", "relu")],
)
def test_impute_takes_any_system_and_output(method, preprocess, activation):
    config = small_config(
        data=DataConfig(preprocess=preprocess),
        model=ModelConfig(latent=3, hidden=(8,), activation=activation),
        inference=InferenceConfig(method=method, steps=2),
        evaluation=EvaluationConfig(evaluation_batch=5),
    )
    images = digits().test[:5]
    missing = missing_at_random(images.shape, 0.4, seed=0)
    arrays, errors = impute(untrained(config), images, missing, num_steps=5, num_samples=40)
    assert all(np.isfinite(values).all() for values in [*arrays.values(), *errors.values()])
    assert arrays["is_pd"].all()
    is_binary = preprocess == "static_binary"
    assert ("coverage_50" in errors) is not is_binary
    if is_binary:
        expected, std = arrays["images"][missing], arrays["std"][missing]
        assert_close(std**2, expected * (1 - expected))
        # Untrained, the decoder says one half of every pixel, near enough.
        assert_close(errors["squared_error"], np.full(5, 0.25), rtol=0.1)


def test_scores_are_the_closed_form_and_tell_noise_from_digits(use, truth, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 17, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "noise.npz", x=noise, y=np.zeros(30))
    few = ("--images", COUNT, "--importance-samples", 30)
    found = use("score", *few, "--against", tmp_path / "noise.npz")
    assert_close(found["log_prob"], truth.log_prob(), rtol=1e-4)
    assert_close(found["elbo"], truth.log_prob(), rtol=1e-4)
    others = truth.log_prob(truth.as_x(noise[:COUNT]))
    assert_close(found["against_log_prob"], others, rtol=1e-4)
    # Low log densities are outlying: the wrong sign would give 0.
    assert found["auroc_log_prob"] > 0.99 and found["auroc_elbo"] > 0.99
    assert "bits_per_dim" not in found
    assert_close(found["newton_decrement"], np.zeros(COUNT), rtol=1e-3)
    printed = capsys.readouterr().out
    assert "outlying if" in printed and "AUROC" in printed


def test_auroc_counts_pairs():
    """Against its definition, with ties, infinities and what is not a number."""
    inliers = {"pareto_k": np.array([-np.inf, 0.1, 0.4, 0.4]), "elbo": np.array([-1.0, -2, 5, 0])}
    outliers = {"pareto_k": np.array([0.4, 0.9, np.nan]), "elbo": np.array([-np.inf, -3, 0])}
    pairs = {
        "pareto_k": [[1, 1, 0.5, 0.5], [1, 1, 1, 1], [1, 1, 1, 1]],
        "elbo": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0.5]],
    }
    expected = {name: float(np.mean(won)) for name, won in pairs.items()}
    found = auroc(inliers, outliers)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(np.float64(found[name]), np.float64(value))
    for half in auroc(inliers, inliers).values():
        assert_close(np.float64(half), np.float64(0.5))
    nothing = {"pareto_k": np.full(3, np.nan)}
    assert auroc(nothing, nothing) == {}


def test_pictures_are_read_in_order_and_named(use, truth, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, i in (("b.png", 1), ("a.PNG", 0), ("c.bmp", 2)):
        Image.fromarray(truth.pixels[i, ..., 0]).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    found = use("reconstruct", folder)
    assert found["names"].tolist() == ["a.PNG", "b.png", "c.bmp"]
    assert_close(found["images"], truth.pixels[:3] / 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_picture_is_read_whatever_its_mode(truth, tmp_path, mode):
    """Eight bits a channel, opaque, gray: all the same picture."""
    Image.fromarray(truth.pixels[1, ..., 0]).convert(mode).save(tmp_path / "one.png")
    one = read_images(tmp_path / "one.png", (8, 8, 1), 17)
    assert (one.pixels == truth.pixels[1:2]).all() and one.names == ("one.png",)
    three = read_images(tmp_path / "one.png", (8, 8, 3), 17).pixels
    assert (three == truth.pixels[1:2]).all() and three.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 8), (8, 8, 1), (8, 8)])
def test_an_array_may_leave_out_the_axes_of_images_and_channels(truth, tmp_path, shape):
    pixels = truth.pixels[: 2 if shape[0] == 2 else 1]
    np.save(tmp_path / "mine.npy", pixels.reshape(shape))
    assert (read_images(tmp_path / "mine.npy", (8, 8, 1), 17).pixels == pixels).all()


def test_own_images_under_a_mask_have_no_known_error(use, truth, tmp_path):
    np.save(tmp_path / "one.npy", truth.pixels[0])
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = use("impute", tmp_path / "one.npy", "--mask", tmp_path / "mask.png")
    assert "squared_error" not in found
    assert found["missing"].sum() == 16


GOOD = np.zeros((3, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GOOD + 17, "from 0 to 16, got 17"),
        (GOOD.astype(np.float32), "round(x * 16)"),
        (GOOD.astype(np.int64), "must be uint8, got int64"),
        (GOOD[:, :7], "shape 8 x 8 x 1, as those of the run, got 7 x 8 x 1"),
        (GOOD[:0], "no images"),
        (GOOD.reshape(3, 64), "got 3 x 64"),
        (np.array(["digits"], object), "cannot be read"),
    ],
)
def test_wrong_arrays_are_refused(run, tmp_path, capsys, array, message):
    np.save(tmp_path / "mine.npy", array)
    use_refused(run, capsys, message, "encode", tmp_path / "mine.npy")


def use_refused(run, capsys, message, command, *arguments):
    assert message in refused(capsys, command, run, *arguments)


def spoiled_files(folder):
    (folder / "text.npz").write_text("nothing of the kind")
    np.savez(folder / "keys.npz", one=GOOD, two=GOOD)
    (folder / "text.png").write_text("nothing of the kind")
    (folder / "images.csv").write_text("0,0")
    (folder / "empty").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "large.png")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "clear.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(folder / "bright.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.npz", "does not exist"),
        ("text.npz", "cannot be read"),
        ("keys.npz", "it holds one, two"),
        ("text.png", "cannot be read as a picture"),
        ("images.csv", "not an .npz, .npy or picture"),
        ("empty", "holds no pictures"),
        ("large.png", "got 9 x 9"),
        ("clear.png", "transparent"),
        ("deep.png", "8 bits a channel"),
        ("bright.png", "got 200"),
    ],
)
def test_unreadable_files_are_refused(run, tmp_path, capsys, name, message):
    spoiled_files(tmp_path)
    use_refused(run, capsys, message, "encode", tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "--images", 0), "at least 1"),
        (("encode", "--images", 9999), "from 1 to 359"),
        (("impute",), "one of --mask"),
        (("impute", "--missing", 0.5, "--mask", "m.npy"), "one of --mask"),
        (("impute", "--missing", 1), "between 0 and 1"),
        (("impute", "--missing-box", 8, 0, 2, 2), "hides nothing"),
        (("impute", "--missing", 0.5, "--samples", 1), "samples must be at least 2"),
        (("impute", "--mask", "none.npy"), "does not exist"),
        (("sample", "--count", 0), "count must be at least 1"),
        (("sample", "--temperature", -1), "temperature"),
        (("score", "--importance-samples", 0), "importance_samples must be at least 1"),
        (("score", "--against", "none.npz"), "does not exist"),
    ],
)
def test_wrong_options_are_refused(run, capsys, arguments, message):
    use_refused(run, capsys, message, *arguments)


def test_another_data_set_of_other_images_is_refused(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLAE_JAX_CACHE", str(tmp_path))
    large = np.zeros((20, 28, 28, 1), np.uint8)
    np.savez(tmp_path / "omniglot.npz", x_train=large, x_test=large)
    message = "omniglot: images must have shape 8 x 8 x 1, as those of the run, got 28 x 28 x 1"
    use_refused(run, capsys, message, "score", "--against", "omniglot")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 8), bool), "nothing is missing"),
        (np.ones((7, 8), bool), "got 7 x 8"),
        (np.ones((2, 8, 8), bool), "mask for 3 images"),
        (np.ones((8, 8)), "booleans or integers"),
    ],
)
def test_wrong_masks_are_refused(run, capsys, tmp_path, mask, message):
    np.save(tmp_path / "mask.npy", mask)
    arguments = ("--images", 3, "--mask", tmp_path / "mask.npy")
    use_refused(run, capsys, message, "impute", *arguments)


def test_output_is_refused_before_the_run_is_read(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlae_jax.models.saved.load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "there.npz").write_text("precious")
    for output, message in (
        ("there.npz", "--overwrite replaces it"),
        ("none/codes.npz", "does not exist"),
        ("codes.txt", "must be an .npz file"),
    ):
        assert message in refused(capsys, "encode", run, "--output", tmp_path / output)
    assert (tmp_path / "there.npz").read_text() == "precious"


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "no run folder" in refused(capsys, "sample", tmp_path)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "sample", "impute", "score"])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


def test_impute_refuses_masks_of_another_shape(run):
    trained, images = load(run), digits().test[:2]
    with pytest.raises(ValueError, match="missing must have shape"):
        impute(trained, images, np.zeros((2, 8, 8), bool))
    with pytest.raises(ValueError, match="at least 2"):
        impute(trained, images, np.zeros(images.shape, bool), num_samples=1)


@pytest.fixture(scope="module")
def of_arrays(tmp_path_factory, quick_compile):
    """A model made for arrays in memory, images like them, and the folder that it was saved to."""
    images = tiny_images(0, 60)
    trained = untrained(tiny_config(), dataset_from_arrays(images[:50]))
    folder = tmp_path_factory.mktemp("arrays") / "run"
    save(trained, folder)
    return trained, images[50:], folder


USES = {
    "encode": (encode, {}, ()),
    "reconstruct": (reconstruct, {"every_step": True}, ("--every-step",)),
    "score": (score, {}, ("--importance-samples", 30)),
    "sample": (lambda trained, _: sample(trained, 5, seed=2), {}, ("--count", 5, "--seed", 2)),
    "impute": (
        lambda trained, images: (
            impute(
                trained,
                images,
                missing_box(images.shape, (1, 1, 2, 1)),
                num_steps=3,
                num_samples=20,
            ).arrays
        ),
        {},
        ("--missing-box", 1, 1, 2, 1, "--steps", 3, "--samples", 20),
    ),
}


@pytest.mark.parametrize("command", USES)
def test_a_moved_run_is_used_on_given_images_without_its_data_set(
    of_arrays, command, tmp_path, monkeypatch
):
    """Its results equal those of the model in memory, which was never saved."""
    trained, images, folder = of_arrays
    function, options, arguments = USES[command]
    expected = function(trained, images, **options)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    np.save(tmp_path / "mine.npy", images)

    def refuse(*_, **__):
        raise AssertionError("a data set was asked for")

    for name in ("sets.load_dataset", "supplied.load_dataset", "supplied.dataset_from_arrays"):
        monkeypatch.setattr(f"vlae_jax.data.{name}", refuse)
    given = () if command == "sample" else (tmp_path / "mine.npy",)
    output = tmp_path / "found.npz"
    main([command, *map(str, (moved, *given, *arguments)), "--output", str(output)])
    with np.load(output) as found:
        assert set(expected) <= set(found)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
