"""The report says what the run folder's files say, and says so when they say nothing."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from rich.cells import cell_len
from rich.console import Console

from vlae_jax import report
from vlae_jax.errors import UserError
from vlae_jax.report import (
    draw_figures,
    print_summary,
    summary_table,
    write_comparison,
    write_report,
)
from vlae_jax.report.figures import draw_gap, draw_interpolations, draw_reliability, draw_steps
from vlae_jax.report.panels import K_EDGES
from vlae_jax.runs.records import read_run

PICTURES = {
    "reconstructions.png",
    "step_log_joint.png",
    "posterior_covariances.png",
    "prior_samples.png",
    "training_curve.png",
}
METRICS = (
    # name, value, standard error, unit, images, samples
    ("elbo", -643.125, 0.4375, "nats", 500, 1),
    ("log_prob", -639.5, 0.25, "nats", 500, 1234),
    ("bits_per_dim", 1.8125, 0.0008, "bits/dim", 500, 1234),
    ("ess", 321.5, None, "samples", 500, 1234),
    ("unconverged", 0.0625, None, "share", 500, None),
    ("not_positive_definite", 0.0, None, "share", 500, None),
    ("unreliable", 0.125, None, "share", 500, None),
)


def make_config(method="vlae", steps=2):
    return {
        "data": {"dataset": "di$gi$ts", "preprocess": "logit"},
        "model": {"latent": 5, "hidden": [16, 8]},
        "inference": {"method": method, "steps": steps, "damping": "line_search"},
        "training": {"epochs": 12, "seed": 7, "batch_size": 32},
        "evaluation": {"importance_samples": 1234},
    }


def make_metrics(epochs=12):
    for epoch in range(1, epochs + 1):
        elbo = -600.0 - 4000.0 * np.exp(-2.0 * epoch)
        record = {"step": 10 * epoch, "epoch": float(epoch), "elbo": elbo, "kl": 20.0}
        record["reconstruction"] = elbo + 20.0
        yield {"split": "train", **record}
        yield {"split": "validation", **record, "best": epoch <= 9}


def make_results(metrics=METRICS):
    names = ("name", "value", "standard_error", "unit", "images", "samples")
    return {
        "run": {"name": "first [run] <nobr>", "seed": 7, "dataset": "digits", "method": "vlae"},
        "metrics": [{**dict(zip(names, row, strict=True)), "split": "test"} for row in metrics],
        "versions": {"jax": "9.8.7"},
        "device": "one big TPU",
        "seconds": {"training": 12.5},
        "checkpoint": {"step": 90, "epoch": 9.0},
    }


def make_snapshots(steps=2, channels=1, images=4, latent=5):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, latent, latent))
    return {
        "data": rng.uniform(size=(images, 8, 8, channels)),
        "reconstructions": rng.uniform(size=(images, steps + 1, 8, 8, channels)),
        "step_log_joint": -100.0 + np.sort(rng.normal(size=(images, steps + 1)), axis=1),
        "prior_samples": rng.uniform(size=(6, 8, 8, channels)),
        "covariances": factors @ factors.transpose(0, 2, 1) + np.eye(latent),
    }


def write_run(
    path, *, config=None, metrics=None, results=None, snapshots=None, per_image=None, gaps=None
):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or make_config()))
    if metrics is not None:
        lines = [json.dumps(record) + "\n" for record in metrics]
        (path / "metrics.jsonl").write_text("".join(lines))
    if results is not None:
        (path / "results.json").write_text(json.dumps(results))
    if snapshots is not None:
        np.savez(path / "snapshots.npz", **snapshots)
    if per_image is not None:
        np.savez(path / "per_image.npz", **per_image)
    if gaps is not None:
        metrics = [
            {"name": name, "value": value, "standard_error": error, "unit": "nats", "images": 9}
            for name, (value, error) in gaps.items()
        ]
        (path / "gaps.json").write_text(json.dumps({"metrics": metrics, "settings": {}}))
    return path


@pytest.fixture
def run(tmp_path):
    """Make a run folder with everything in it."""
    return write_run(
        tmp_path / "run",
        metrics=make_metrics(),
        results=make_results(),
        snapshots=make_snapshots(),
    )


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Report on a whole run folder; for tests that only read what came out."""
    run = write_run(
        tmp_path_factory.mktemp("reported") / "run",
        metrics=make_metrics(),
        results=make_results(),
        snapshots=make_snapshots(),
    )
    assert write_report([run]) == [run / "report.html"]
    return run


def read_picture(path):
    return matplotlib_image.imread(path)[..., :3]


def table_cells(*runs):
    """Cells of the summary by column, one list a run."""
    table = summary_table(runs)
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    return [{name: cells[row] for name, cells in columns.items()} for row in range(len(runs))]


class Page(HTMLParser):
    """Text, tags and inlined pictures of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.pictures, self.words = set(), [], 0, []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        addresses = [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.addresses += addresses
        self.pictures += sum(address.startswith("data:image/png;base64,") for address in addresses)

    def handle_data(self, data):
        self.words.append(data)


def test_every_picture_is_drawn_and_has_a_printable_size(reported):
    assert {path.name for path in (reported / "figures").iterdir()} == PICTURES
    for path in (reported / "figures").iterdir():
        pixels = read_picture(path)
        assert 250 < pixels.shape[0] < 2000 and 600 < pixels.shape[1] < 2000, path.name
        assert pixels.std() > 0.02, f"{path.name} is blank"


def test_the_same_files_give_the_same_bytes(reported):
    first = {path: path.read_bytes() for path in (reported / "figures").iterdir()}
    assert {path: path.read_bytes() for path in draw_figures(reported)} == first


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_show_the_pixels_as_they_are(tmp_path, channels):
    """One flat image a row, so each row's color can be found again, in order, undistorted."""
    snapshots = make_snapshots(channels=channels, images=1)
    colors = np.linspace(0.2, 0.8, 4 * channels).reshape(4, channels)
    snapshots["data"] = np.broadcast_to(colors[0], (1, 8, 8, channels))
    snapshots["reconstructions"] = np.broadcast_to(colors[1:, None, None], (1, 3, 8, 8, channels))
    draw_figures(write_run(tmp_path / "run", snapshots=snapshots))
    pixels = read_picture(tmp_path / "run/figures/reconstructions.png")
    middles = []
    for color in colors:
        same = (np.abs(pixels - np.broadcast_to(color, (3,))) < 1 / 254).all(axis=-1)
        rows, columns = np.nonzero(same)
        # Lettering has a few gray pixels of the same value; the image is the solid block.
        solid = np.bincount(rows) >= 90
        assert solid.sum() == 96 and np.bincount(columns)[np.bincount(columns) >= 96].size == 96
        middles.append(np.nonzero(solid)[0].mean())
    assert middles == sorted(middles)


def test_active_dimensions_come_first_and_colors_are_symmetric(tmp_path):
    """The three informed dimensions lie scattered; their correlations must end up top left."""
    informed, latent = [1, 4, 8], 9
    covariance = np.eye(latent)
    covariance[np.ix_(informed, informed)] = 0.01 * np.array(
        [[1.0, 0.9, -0.9], [0.9, 1.0, -0.9], [-0.9, -0.9, 1.0]]
    )
    snapshots = make_snapshots(images=1) | {"covariances": covariance[None]}
    draw_figures(write_run(tmp_path / "run", snapshots=snapshots))
    pixels = read_picture(tmp_path / "run/figures/posterior_covariances.png")
    blue = pixels[..., 2] - pixels[..., 0] > 0.2
    red = pixels[..., 0] - pixels[..., 2] > 0.2
    # The heat map is 9 cells of 33 pixels, its left edge 24 + 112 + 56 from the left.
    corner = slice(76, 76 + 99), slice(192, 192 + 99)
    heat_map = slice(76, 76 + 297), slice(192, 192 + 297)
    cell = 33 * 33
    assert blue[corner].sum() == pytest.approx(4 * cell, rel=0.1)
    assert red[corner].sum() == pytest.approx(5 * cell, rel=0.1)
    assert blue[heat_map].sum() == blue[corner].sum()
    assert red[heat_map].sum() == pytest.approx((5 + 6) * cell, rel=0.1)


def test_a_covariance_that_is_not_finite_is_named_and_leaves_the_others(tmp_path):
    snapshots = make_snapshots()
    whole = write_run(tmp_path / "whole", snapshots=snapshots)
    snapshots["covariances"][1] = np.nan
    damaged = write_run(tmp_path / "damaged", snapshots=snapshots)
    for path in (whole, damaged):
        assert "posterior_covariances.png" in {picture.name for picture in draw_figures(path)}
    pictures = [
        read_picture(path / "figures/posterior_covariances.png") for path in (whole, damaged)
    ]
    colorful = [(np.ptp(picture, axis=-1) > 0.1).mean() for picture in pictures]
    assert 0.5 < colorful[1] / colorful[0] < 0.85


def test_a_run_without_a_mode_search_has_one_row_and_no_step_picture(tmp_path):
    run = write_run(
        tmp_path / "vae",
        config=make_config(method="vae"),
        metrics=make_metrics(),
        results=make_results(),
        snapshots=make_snapshots(steps=0),
    )
    assert {path.name for path in draw_figures(run)} == PICTURES - {"step_log_joint.png"}
    [cells] = table_cells(run)
    assert cells["method"] == "VAE" and cells["T"] == "–"


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("data", {"reconstructions.png", "posterior_covariances.png"}),
        ("reconstructions", {"reconstructions.png"}),
        ("step_log_joint", {"step_log_joint.png"}),
        ("prior_samples", {"prior_samples.png"}),
        ("covariances", {"posterior_covariances.png"}),
    ],
)
def test_a_picture_without_input_is_left_out(tmp_path, missing, lost):
    snapshots = make_snapshots()
    del snapshots[missing]
    run = write_run(tmp_path / "run", snapshots=snapshots)
    drawn = {path.name for path in draw_figures(run)}
    assert drawn == PICTURES - lost - {"training_curve.png"}


def test_the_table_holds_the_metrics_given(run):
    [cells] = table_cells(run)
    assert cells == {
        "run": "first [run] <nobr>",
        "data set": "di$gi$ts",
        "method": "VLAE",
        "T": "2",
        "seed": "7",
        "epochs": "12",
        "test ELBO": "-643.12 ± 0.44",
        "test log p(x)": "-639.50 ± 0.25",
        "K": "1234",
        "gap": "3.62",
        "bits/dim": "1.8125 ± 0.0008",
        "k̂ > 0.7": "12.50 %",
    }


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_printing_breaks_no_number_whatever_the_width(run, width, terminal):
    stream = io.StringIO()
    print_summary([run] * 5, Console(file=stream, width=width, force_terminal=terminal))
    printed = stream.getvalue()
    for cell in table_cells(run)[0].values():
        assert printed.count(cell) >= 5, cell
    if terminal:
        assert (
            max(cell_len(re.sub(r"\x1b.*?m", "", line)) for line in printed.splitlines()) <= width
        )


def test_of_two_metrics_the_one_with_more_samples_counts_and_only_on_test(tmp_path):
    results = make_results()
    few = {**results["metrics"][1], "value": -700.0, "samples": 10}
    seen = {**results["metrics"][1], "value": -1.0, "samples": 9999, "split": "validation"}
    results["metrics"] += [few, seen]
    [cells] = table_cells(write_run(tmp_path / "run", results=results))
    assert (cells["test log p(x)"], cells["K"]) == ("-639.50 ± 0.25", "1234")


def test_no_gap_between_metrics_of_different_images(tmp_path):
    results = make_results()
    results["metrics"][1]["images"] = 100
    [cells] = table_cells(write_run(tmp_path / "run", results=results))
    assert cells["gap"] == "–"


def test_a_small_standard_error_never_reads_zero(tmp_path):
    results = make_results((("elbo", -1.5, 0.00031, "nats", 5, 1),))
    [cells] = table_cells(write_run(tmp_path / "run", results=results))
    assert cells["test ELBO"] == "-1.5000 ± 0.0003"


def test_non_finite_and_absent_metrics_say_so(tmp_path):
    results = make_results((("elbo", None, None, "nats", 500, 1),))
    run = write_run(tmp_path / "run", results=results)
    bare = write_run(tmp_path / "bare")
    evaluated, unevaluated = table_cells(run, bare)
    assert evaluated["test ELBO"] == "not finite" and evaluated["test log p(x)"] == "–"
    assert unevaluated["run"] == "bare" and unevaluated["test ELBO"] == "not evaluated"


def test_a_run_cut_short_says_how_far_it_came(tmp_path):
    [cells] = table_cells(write_run(tmp_path / "run", metrics=make_metrics(epochs=5)))
    assert cells["epochs"] == "5 of 12"


def test_the_page_loads_nothing_and_shows_everything(reported):
    path = reported / "report.html"
    page, source = Page(path), path.read_text()
    assert page.pictures == len(PICTURES) and len(page.addresses) == page.pictures
    assert not page.tags & {"script", "link", "iframe", "object", "nobr"}
    assert not re.search(r"https?:|url\(|@import", source)
    for _, _, _, unit, images, _ in METRICS:
        assert unit in page.text and str(images) in page.text
    shown = ("first [run] <nobr>", "-643.12 ± 0.44", "K = 1234", "321.5", "9.8.7", "one big TPU")
    for words in (*shown, "line_search", "16, 8", "checkpoint of epoch 9"):
        assert words in page.text, words


def test_a_list_in_the_place_of_an_objective_is_shown(tmp_path):
    config = make_config()
    config["training"]["objective"] = ["elbo"]
    [cells] = table_cells(write_run(tmp_path / "run", config=config))
    assert "['elbo']" in cells["method"]


def test_what_is_wider_than_the_page_scrolls_by_itself(reported):
    """Tables and pictures: on a telephone a picture stays legible, its text in view."""
    source = (reported / "report.html").read_text()
    assert source.count("<img ") == source.count('<div class="picture"><img ') > 0
    assert source.count("<table>") == source.count('<div class="table"><table>') > 0
    for name in ("table", "picture"):
        assert re.search(rf"^\.{name} {{ overflow-x: auto; }}$", source, re.M)


def test_one_page_for_several_runs(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", metrics=make_metrics())
    [path] = write_report([run, str(other)], tmp_path / "new" / "all.html")
    page = Page(path)
    compared = {picture.name for picture in (tmp_path / "new").glob("*.png")}
    assert compared == {"log_likelihood.png", "steps.png", "training_curves.png"}
    assert path == tmp_path / "new" / "all.html"
    assert page.pictures == len(PICTURES) + 1 + len(compared)
    assert "2 runs" in page.text and "other" in page.text and "not evaluated" in page.text
    assert not (run / "report.html").exists()
    printed = capsys.readouterr().out
    assert "first [run] <nobr>" in printed and "-639.50 ± 0.25" in printed


def test_nothing_unfinished_is_left_behind(reported):
    assert not list(reported.rglob("*.tmp"))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    samples = {"prior_samples": make_snapshots()["prior_samples"]}
    run = write_run(tmp_path / "run", snapshots=samples)
    write_report([run])
    before = {path: path.read_bytes() for path in run.glob("**/*.[ph]*")}
    np.savez(run / "snapshots.npz", prior_samples=samples["prior_samples"][:2])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        write_report([run])
    assert len(before) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert not list(run.rglob("*.tmp"))


def test_a_cut_last_record_is_skipped(tmp_path):
    """The curve is the very one that the finished records give."""
    whole = write_run(tmp_path / "whole", metrics=make_metrics())
    cut = write_run(tmp_path / "cut", metrics=make_metrics())
    with (cut / "metrics.jsonl").open("a") as stream:
        stream.write('{"split": "train", "step": 13')
    first, second = (draw_figures(run)[-1].read_bytes() for run in (whole, cut))
    assert first == second


def test_a_resumed_run_counts_each_step_once(tmp_path):
    whole = write_run(tmp_path / "whole", metrics=make_metrics())
    wrong = [{**record, "elbo": -900.0, "best": True} for record in make_metrics(epochs=6)]
    resumed = write_run(tmp_path / "resumed", metrics=[*wrong, *make_metrics()])
    first, second = (draw_figures(run)[-1].read_bytes() for run in (whole, resumed))
    assert first == second


def test_the_first_epoch_does_not_squash_the_curve(tmp_path):
    """A steady rise after a terrible start still fills the panel from bottom to top."""
    records = list(make_metrics(epochs=20))
    for record in records:
        record["elbo"] = -1e6 if record["epoch"] == 1 else -600.0 + 5.0 * record["epoch"]
    [path] = draw_figures(write_run(tmp_path / "run", metrics=records))
    # Right of the line that climbs out of the first epoch.
    panel = read_picture(path)[60:480, 250:800]
    # Okabe and Ito's vermillion, D55E00.
    orange = np.abs(panel - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=-1) < 0.05
    rows = np.nonzero(orange.any(axis=1))[0]
    assert np.ptp(rows) > 0.5 * len(panel)


def test_null_values_leave_the_rest_of_the_curve(tmp_path):
    records = list(make_metrics())
    records[8]["elbo"] = None
    [path] = draw_figures(write_run(tmp_path / "run", metrics=records))
    assert path.name == "training_curve.png"
    nothing = [{**record, "elbo": None, "kl": None} for record in records]
    assert draw_figures(write_run(tmp_path / "nothing", metrics=nothing))


def test_images_whose_search_diverged_are_counted_in_the_caption(tmp_path):
    snapshots = make_snapshots()
    snapshots["step_log_joint"][0, 1] = np.nan
    [path] = write_report([write_run(tmp_path / "run", snapshots=snapshots)])
    assert "mean over 3 test images (1 more came out non-finite" in Page(path).text


def test_the_histogram_counts_every_shape_and_names_what_has_no_place(tmp_path):
    shapes = [0.12, 0.12, 0.62, 0.72, 7.0, -0.9, -np.inf, -np.inf, np.nan, 0.32]
    per_image = {"pareto_k": np.array(shapes)}
    figure, caption = draw_reliability(read_run(write_run(tmp_path / "run", per_image=per_image)))
    [axes] = figure.axes
    heights, edges, _ = axes.patches[0].get_data()
    assert edges == pytest.approx(K_EDGES)
    bins = {round(float(edge), 2): height for edge, height in zip(edges, heights, strict=False)}
    # In percent of ten images; what lies outside is at the ends.
    drawn = {edge: height for edge, height in bins.items() if height}
    assert drawn == pytest.approx({0.1: 20, 0.6: 10, 0.7: 10, 1.45: 10, -0.5: 10, 0.3: 10})
    assert {line.get_xdata()[0] for line in axes.lines} == {0.5, 0.7}
    # Two of the nine that have a shape.
    assert "22.2 % of 10 images above 0.7" in caption
    assert "2 with equal weights" in caption and "1 without" in caption


def test_steps_show_medians_and_spreads_over_images(tmp_path):
    rng = np.random.default_rng(1)
    errors = rng.uniform(1.0, 2.0, size=(21, 3))
    joint = rng.normal(-50.0, 9.0, size=(21, 3))
    errors[4, 1] = np.nan
    snapshots = {"step_log_joint": joint, "step_error": errors}
    figure, _ = draw_steps(read_run(write_run(tmp_path / "run", snapshots=snapshots)))
    behind, error = figure.axes[1], figure.axes[0]
    if error.get_ylabel() != "RMSE, model space":
        behind, error = error, behind
    finite = np.delete(errors, 4, axis=0)
    assert error.lines[0].get_ydata() == pytest.approx(np.median(finite, axis=0))
    assert behind.lines[0].get_ydata() == pytest.approx(np.median(joint - joint[:, 2:], axis=0))
    band = error.collections[0].get_paths()[0].vertices
    for t in range(3):
        heights = band[band[:, 0] == t, 1]
        low, high = np.quantile(finite[:, t], [0.1, 0.9])
        assert (heights.min(), heights.max()) == pytest.approx((low, high))


def test_interpolations_have_a_row_a_pair_in_order(tmp_path):
    grays = np.linspace(0.1, 0.9, 6).reshape(2, 3)
    lines = np.broadcast_to(grays[..., None, None, None], (2, 3, 8, 8, 1))
    run = read_run(write_run(tmp_path / "run", snapshots={"interpolations": lines}))
    figure, caption = draw_interpolations(run)
    [image] = figure.axes[0].images
    # 8 x 8 pixels, each 12 times as large, 6 pixels apart.
    middles = np.asarray(image.get_array())[48::102, 48::102, 0]
    assert middles == pytest.approx(grays)
    assert "2 pairs" in caption


GAPS = {
    "log_prob_ais": (-60.0, 0.5),
    "best_in_family_elbo": (-62.5, 0.5),
    "amortized_elbo": (-66.5, 0.5),
    "converged_elbo": (-65.5, 0.5),
    "approximation_gap": (2.5, 0.25),
    "amortization_gap": (4.0, 0.125),
    "non_convergence_gap": (1.0, None),
}


def bars(axes):
    return [(patch.get_x(), patch.get_width()) for patch in axes.patches]


def test_gap_bars_add_up_and_non_convergence_lies_inside(tmp_path):
    figure, caption = draw_gap(read_run(write_run(tmp_path / "run", gaps=GAPS)))
    [axes] = figure.axes
    assert bars(axes) == [(0.0, 2.5), (2.5, 4.0), (6.5, -1.0)]
    [[first], [second]] = [
        container[2][0].get_segments() for container in axes.containers[1::2][:2]
    ]
    assert (first[:, 0].tolist(), second[:, 0].tolist()) == ([2.25, 2.75], [6.375, 6.625])
    assert "6.50" in {text.get_text() for text in axes.texts}
    assert "log p(x), AIS −60.00" in caption and "annealed importance sampling" in caption


def test_a_negative_part_of_the_gap_lies_left_of_zero(tmp_path):
    gaps = {"approximation_gap": (3.0, None), "amortization_gap": (-0.5, None)}
    figure, _ = draw_gap(read_run(write_run(tmp_path / "run", gaps=gaps)))
    [axes] = figure.axes
    assert bars(axes) == [(0.0, 3.0), (0.0, -0.5)]
    assert {text.get_text() for text in axes.texts} == {"2.50"}


def test_new_files_bring_new_pictures(tmp_path):
    snapshots = {"interpolations": np.zeros((2, 3, 8, 8, 1))}
    per_image = {"pareto_k": np.full(5, -np.inf)}
    run = write_run(tmp_path / "run", snapshots=snapshots, per_image=per_image, gaps=GAPS)
    paths = draw_figures(run)
    assert [path.name for path in paths] == ["interpolations.png", "pareto_k.png", "gaps.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw_figures(run)] == first
    unfinished = write_run(tmp_path / "other", gaps={"approximation_gap": (None, None)})
    assert draw_figures(unfinished) == []


@pytest.mark.parametrize(
    ("training", "label"),
    [
        ({}, "VAE+HF"),
        ({"objective": "elbo", "train_samples": 3}, "VAE+HF"),
        ({"objective": "iwae", "train_samples": 5}, "VAE+HF (IWAE, 5)"),
        ({"objective": "dreg", "train_samples": 5}, "VAE+HF (DReG, 5)"),
    ],
)
def test_labels_name_the_system_and_an_objective_beside_the_elbo(tmp_path, training, label):
    config = make_config(method="vae_hf", steps=3)
    config["training"] |= training
    [cells] = table_cells(write_run(tmp_path / "run", config=config))
    assert (cells["method"], cells["T"]) == (label, "3")


def test_the_label_of_the_results_counts(tmp_path):
    """A system that a later version knows, in the words of that version."""
    results = make_results()
    results["run"] |= {"label": "NEW-VAE", "steps": None}
    config = make_config(method="new_vae")
    [cells] = table_cells(write_run(tmp_path / "run", config=config, results=results))
    assert (cells["method"], cells["T"]) == ("NEW-VAE", "–")


def damage(name, content):
    def apply(run: Path):
        (run / name).write_bytes(content)

    return apply


def drop_config(run):
    (run / "config.json").unlink()


def cut_archive(run):
    content = (run / "snapshots.npz").read_bytes()
    (run / "snapshots.npz").write_bytes(content[: len(content) // 2])


def pickle_inside(run):
    np.savez(run / "snapshots.npz", data=np.array([object()]))


def per_image(**arrays):
    def apply(run: Path):
        np.savez(run / "per_image.npz", **arrays)

    return apply


def wrong_shape(run):
    np.savez(run / "snapshots.npz", covariances=np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (drop_config, "config.json"),
        (damage("config.json", b"{"), "config.json"),
        (damage("config.json", b"\xff\xfe"), "config.json"),
        (damage("config.json", b"[1]"), "config.json"),
        (damage("results.json", b'{"metrics": [{"na'), "results.json"),
        (damage("results.json", b'{"metrics": 3}'), "results.json"),
        (damage("metrics.jsonl", b'{"split": "tr\n{"split": "train"}\n'), "metrics.jsonl"),
        (damage("metrics.jsonl", b'3\n{"split": "train"}\n'), "metrics.jsonl"),
        (damage("snapshots.npz", b""), "snapshots.npz"),
        (damage("snapshots.npz", b"not an archive"), "snapshots.npz"),
        (cut_archive, "snapshots.npz"),
        (pickle_inside, "snapshots.npz cannot be read"),
        (wrong_shape, "snapshots.npz"),
        (damage("per_image.npz", b"PK"), "per_image.npz cannot be read"),
        (per_image(elbo=np.zeros(3), kl=np.zeros(4)), "per_image.npz"),
        (per_image(elbo=np.zeros((3, 1))), "per_image.npz"),
        (per_image(elbo=np.array(["a"])), "per_image.npz"),
        (damage("gaps.json", b"{"), "gaps.json"),
        (damage("gaps.json", b'{"metrics": {}}'), "gaps.json"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(run, spoil, names):
    spoil(run)
    for call in (
        draw_figures,
        lambda path: summary_table([path]),
        lambda path: write_report([path]),
    ):
        with pytest.raises(UserError) as caught:
            call(run)
        assert names in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_run_and_no_run_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no run folder at .*nowhere"):
        draw_figures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run to report on"):
        write_report([])


def test_names_that_users_choose_are_text_on_the_page(tmp_path):
    """Data sets, methods, settings and the words of a results file come from elsewhere."""
    evil = "</style><script>alert(1)</script>&amp;\"'>"
    config = make_config(method=evil)
    config["data"]["dataset"] = evil
    config[evil] = {evil: [evil]}
    results = make_results(
        [(evil, -1.5, 0.5, evil, 5, evil), ("log_prob", -1.0, 0.5, "nats", 5, 1)]
    )
    results["metrics"][1]["samples"] = evil
    results["run"]["name"] = results["device"] = results["versions"][evil] = evil
    run = write_run(
        tmp_path / "run", config=config, results=results, snapshots=make_snapshots(), gaps=GAPS
    )
    other = write_run(
        tmp_path / "other", config=config, results=results, snapshots=make_snapshots()
    )
    for path in (*write_report([run]), *write_report([run, other], tmp_path / "all.html")):
        page = Page(path)
        assert "script" not in page.tags and page.text.count(evil) > 10
        assert path.read_text().count("</style>") == 1
    assert "script" not in Page(write_comparison([run, other], tmp_path / "out")[0]).tags


def test_jax_is_not_needed():
    """Read from the files, since other tests have imported JAX by now."""
    files = list(Path(report.__file__).parent.glob("*.py"))
    source = "\n".join(path.read_text() for path in files)
    imported = set(re.findall(r"^\s*(?:import|from) (\S+)", source, re.M))
    assert len(files) > 5 and "numpy" in imported
    assert not {"jax", "flax", "optax", "orbax"} & {name.split(".")[0] for name in imported}
    ours = {name for name in imported if name.split(".")[0] == "vlae_jax"}
    assert {name.split(".")[1] for name in ours} == {"report", "runs"}
