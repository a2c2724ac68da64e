"""Runs side by side: which belong together, and what is drawn and written of them."""

import json

import numpy as np
import pytest
from report.test_report import (
    Page,
    make_config,
    make_metrics,
    make_results,
    make_snapshots,
    write_run,
)

from vlae_jax.commands.main import main
from vlae_jax.errors import UserError
from vlae_jax.report import write_comparison
from vlae_jax.report.comparison import draw_all_steps, draw_posteriors, draw_training
from vlae_jax.report.groups import baseline_of, sort_runs
from vlae_jax.report.rows import (
    draw_all_gaps,
    draw_differences,
    draw_log_likelihood,
    draw_reliabilities,
)
from vlae_jax.report.table import seed_rows
from vlae_jax.runs.records import read_runs

PICTURES = {
    *("log_likelihood.png", "paired_differences.png", "gaps.png", "pareto_k.png", "steps.png"),
    *("posterior_covariances.png", "training_curves.png"),
}


def add_run(
    folder,
    method,
    seed,
    log_prob,
    *,
    steps=2,
    images=None,
    fingerprint="a",
    dataset="digits",
    **more,
):
    """A run whose log p(x) and ELBO of each image are given (the ELBO one nat less)."""
    config = make_config(method=method, steps=steps)
    config["data"]["dataset"] = dataset
    config["training"]["seed"] = seed
    for section, values in more.pop("config", {}).items():
        config[section] |= values
    log_prob = np.asarray(log_prob, float)
    finite = log_prob[np.isfinite(log_prob)]
    error = finite.std(ddof=1) / np.sqrt(len(finite))
    metrics = (
        ("log_prob", finite.mean(), error, "nats", len(finite), 100),
        ("elbo", finite.mean() - 1.0, error, "nats", len(finite), 100),
    )
    results = make_results(metrics)
    results["run"] = {"fingerprint": fingerprint}
    per_image = {"log_prob": log_prob, "elbo": log_prob - 1.0} | more.pop("per_image", {})
    name = f"{method}-T{steps}-{seed}-{len(list(folder.iterdir()))}"
    return write_run(folder / name, config=config, results=results, per_image=per_image, **more)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    return path


def problem_of(folder):
    [problem] = sort_runs(read_runs(sorted(folder.iterdir())))
    return problem


def dots(axes):
    """Center and half width of the error bar for each row with one, by row."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        half = np.nan
        if bars:
            [segment] = bars[0].get_segments()
            half = np.ptp(segment[:, 0]) / 2
        found[int(line.get_ydata()[0])] = (line.get_xdata()[0], half)
    return found


def labels(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def test_log_likelihoods_are_means_over_seeds_with_their_errors(folder):
    add_run(folder, "vae", 0, [-10.0, -12.0])
    add_run(folder, "vlae", 0, [-5.0, -6.0, -7.0])
    add_run(folder, "vlae", 1, [-7.0, -8.0, -9.0])
    figure, caption = draw_log_likelihood(problem_of(folder))
    left, right = figure.axes
    assert labels(left) == ["VAE", "VLAE, T = 2"]
    # One seed: over its two images. Two seeds, -6 and -8: their standard error is 1.
    assert dots(left) == {0: pytest.approx((-11.0, 1.0)), 1: pytest.approx((-7.0, 1.0))}
    assert dots(right)[1] == pytest.approx((-8.0, 1.0))
    seeds = [line.get_xdata() for line in left.lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(values, [-6.0, -8.0]) for values in seeds)
    assert left.get_title() == "log p(x), K = 100"
    assert "unequal numbers of test images (2, 3)" in caption


def test_differences_are_paired_by_seed_and_image(folder):
    add_run(folder, "vae", 0, [-10.0, -20.0, -30.0, -40.0])
    add_run(folder, "vae", 1, [-11.0, -21.0, -31.0, -41.0])
    add_run(folder, "vlae", 0, [-9.0, -18.0, np.nan, -37.0])
    add_run(folder, "vlae", 1, [-7.0, -17.0])
    add_run(folder, "vae_hf", 0, [-10.0, -20.0, -33.0, -40.0])
    add_run(folder, "vae_iaf", 5, [-1.0, -2.0])
    figure, caption = draw_differences(problem_of(folder))
    left, _ = figure.axes
    assert labels(left) == ["VAE+HF, T = 2", "VLAE, T = 2"]
    drawn = dots(left)
    # Householder: 0, 0, -3, 0.
    assert drawn[0] == pytest.approx((-0.75, 0.75))
    # VLAE: (1 + 2 + 3) / 3 = 2 without the NaN; 4 on the two common images: 3 ± 1.
    assert drawn[1] == pytest.approx((3.0, 1.0))
    assert "2 or 3 or 4 test images" in caption


def test_other_images_are_not_compared(folder):
    add_run(folder, "vae", 0, [-10.0, -20.0])
    add_run(folder, "vlae", 0, [-9.0, -18.0], fingerprint="b")
    assert draw_differences(problem_of(folder)) is None


def test_the_baseline_is_the_vae_that_is_trained_alike(folder):
    add_run(folder, "vae", 0, [-1.0, -2.0], config={"model": {"latent": 2}})
    add_run(folder, "vae", 0, [-3.0, -4.0])
    add_run(folder, "vae", 0, [-5.0, -6.0], config={"training": {"objective": "iwae"}})
    add_run(folder, "vlae", 0, [-3.0, -4.0])
    runs = problem_of(folder).runs
    [run] = [run for run in runs if run.method == "vlae"]
    baseline = baseline_of(run, runs)
    assert baseline.per_image["log_prob"].tolist() == [-3.0, -4.0]


def test_configurations_are_told_apart_by_what_differs(folder):
    add_run(folder, "vlae", 1, [-1.0, -2.0], steps=8)
    add_run(folder, "vlae", 0, [-1.0, -2.0], steps=8, config={"data": {"data_dir": "x"}})
    add_run(folder, "vlae", 0, [-1.0, -2.0], steps=8, config={"inference": {"damping": "paper"}})
    add_run(folder, "vlae", 0, [-1.0, -2.0], steps=1)
    # T means nothing to a plain VAE.
    add_run(folder, "vae", 0, [-1.0, -2.0], steps=8)
    add_run(folder, "vae", 1, [-1.0, -2.0], steps=1)
    configurations = problem_of(folder).configurations
    assert [(c.label, [run.seed for run in c.runs]) for c in configurations] == [
        ("VAE", [0, 1]),
        ("VLAE, T = 1", [0]),
        ("VLAE, T = 8 (damping line search)", [0, 1]),
        ("VLAE, T = 8 (damping paper)", [0]),
    ]
    colors = [c.color for c in configurations]
    assert colors[2] == colors[3] == "#0072b2" and len(set(colors)) == 3
    assert configurations[2].marker != configurations[3].marker


def test_a_table_over_seeds_where_there_are_several(folder):
    add_run(folder, "vae", 0, [-10.0, -20.0])
    add_run(folder, "vlae", 0, [-9.0, -18.0])
    problem = problem_of(folder)
    assert seed_rows([problem]) == []
    add_run(folder, "vae", 1, [-11.0, -21.0])
    rows = seed_rows([problem_of(folder)])
    vae = ["digits", "VAE", "2", "-16.50 ± 0.50", "-15.50 ± 0.50", "1.00 ± 0.00", "–", "–"]
    vlae = ["digits", "VLAE, T = 2", "1", "-14.50", "-13.50", "1.00", "–", "–"]
    assert rows == [[*vae, "–", "–"], [*vlae, "1.50 ± 0.50", "1.50 ± 0.50"]]


def test_posteriors_stand_side_by_side_for_the_same_images(folder):
    snapshots = make_snapshots()
    add_run(folder, "vae", 0, [-1.0, -2.0], snapshots=snapshots)
    add_run(folder, "vlae", 0, [-1.0, -2.0], steps=1, snapshots=snapshots)
    loud = snapshots | {"covariances": snapshots["covariances"] * 9.0}
    add_run(folder, "vlae", 0, [-1.0, -2.0], steps=8, snapshots=loud)
    strangers = make_snapshots() | {"data": 1.0 - snapshots["data"]}
    add_run(folder, "sa_vae", 0, [-1.0, -2.0], snapshots=strangers)
    figure, caption = draw_posteriors(problem_of(folder))
    words = {text.get_text() for text in figure.texts}
    assert {"VAE", "VLAE, T = 8"} <= words and "VLAE, T = 1" not in words
    assert "SA-VAE, T = 2" not in words and "other images: SA-VAE, T = 2." in caption
    matrices = [
        np.asarray(axes.images[0].get_array())
        for axes in figure.axes
        if axes.images and axes.images[0].get_array().shape == (5, 5)
    ]
    # Three images, two systems; a scaled covariance has the same correlations.
    assert len(matrices) == 6
    for mine, theirs in zip(matrices[:3], matrices[3:], strict=True):
        assert mine == pytest.approx(theirs) and np.diagonal(mine) == pytest.approx(np.ones(5))


def test_steps_overlay_medians_and_show_the_others_as_levels(folder):
    rng = np.random.default_rng(0)
    paths = rng.normal(size=(2, 9, 4))
    level = rng.normal(size=(9, 1))
    for seed, path in enumerate(paths):
        snapshots = {"step_error": path, "step_log_joint": -path}
        add_run(folder, "vlae", seed, [-1.0, -2.0], steps=3, snapshots=snapshots)
    snapshots = {"step_error": level, "step_log_joint": -level}
    add_run(folder, "vae", 0, [-1.0, -2.0], snapshots=snapshots)
    figure, _ = draw_all_steps(problem_of(folder))
    error, joint = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    median = np.median(paths.reshape(18, 4), axis=0)
    assert error["VLAE, T = 3"].get_ydata() == pytest.approx(median)
    assert joint["VLAE, T = 3"].get_ydata() == pytest.approx(-median)
    assert error["VAE"].get_xdata() == pytest.approx([0, 3])
    assert error["VAE"].get_ydata() == pytest.approx([np.median(level)] * 2)


def test_histograms_take_the_seeds_together(folder):
    for seed, shapes in enumerate(([0.12, 0.72], [0.12, -np.inf])):
        per_image = {"pareto_k": np.array(shapes)}
        add_run(folder, "vlae", seed, [-1.0, -2.0], per_image=per_image)
    figure, caption = draw_reliabilities(problem_of(folder))
    heights, edges, _ = figure.axes[0].patches[0].get_data()
    assert sorted(heights[heights > 0]) == pytest.approx([25.0, 50.0])
    assert edges[np.argmax(heights)] == pytest.approx(0.1)
    assert "VLAE, T = 2: 25.0 % of 4 images above 0.7; 1 with equal weights" in caption


def test_gaps_of_several_seeds_are_averaged(folder):
    for seed, size in enumerate((1.0, 3.0)):
        gaps = {"approximation_gap": (size, 0.1), "amortization_gap": (2 * size, 0.1)}
        add_run(folder, "vae", seed, [-1.0, -2.0], gaps=gaps)
    add_run(folder, "sa_vae", 0, [-1.0, -2.0])
    figure, _ = draw_all_gaps(problem_of(folder))
    [axes] = figure.axes
    assert labels(axes) == ["VAE"]
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(0.0, 2.0), (2.0, 4.0)]
    ends = [c.lines[2][0].get_segments()[0][:, 0].tolist() for c in axes.containers[1::2]]
    assert ends == [pytest.approx([1.0, 3.0]), pytest.approx([4.0, 8.0])]


def test_training_curves_stand_against_epochs_and_time(folder):
    for method, pace in (("vae", 1.0), ("vlae", 20.0)):
        metrics = [{**record, "seconds": pace * record["epoch"]} for record in make_metrics()]
        add_run(folder, method, 0, [-1.0, -2.0], metrics=metrics)
    figure, caption = draw_training(problem_of(folder))
    epochs, seconds = figure.axes
    elbo = [record["elbo"] for record in make_metrics() if record["split"] == "validation"]
    assert epochs.lines[1].get_ydata() == pytest.approx(elbo)
    assert epochs.lines[1].get_xdata() == pytest.approx(np.arange(1, 13))
    assert seconds.lines[1].get_xdata() == pytest.approx(20.0 * np.arange(1, 13))
    # One is 20 times as slow.
    assert seconds.get_xscale() == "log" and "logarithmic" in caption
    assert epochs.get_ylim() == seconds.get_ylim()


def complete(folder, method, seed, **more):
    per_image = {"pareto_k": np.array([0.3, 0.8])}
    gaps = {"approximation_gap": (1.0, 0.1), "amortization_gap": (2.0, 0.1)}
    metrics = [{**record, "seconds": record["epoch"]} for record in make_metrics()]
    snapshots = make_snapshots() | {"step_error": np.ones((4, 3))}
    more = {"per_image": per_image, "gaps": gaps, "metrics": metrics, "snapshots": snapshots} | more
    return add_run(folder, method, seed, [-1.0, -2.0], **more)


def test_the_page_of_a_comparison(folder, tmp_path):
    runs = [complete(folder, method, seed) for method in ("vae", "vlae") for seed in (0, 1)]
    page, *pictures = write_comparison([*runs, runs[0]], tmp_path / "out")
    assert {path.name for path in pictures} == PICTURES
    assert {path.parent for path in pictures} == {page.parent} == {tmp_path / "out"}
    read = Page(page)
    assert read.pictures == len(PICTURES) == len(read.addresses)
    assert not read.tags & {"script", "link", "iframe", "object"}
    for words in ("4 runs", "Over seeds", "VLAE, T = 2", "Differences to the VAE", "1.00 ± 0.00"):
        assert words in read.text, words
    # The run folders are left alone, and the same files give the same bytes.
    assert not list(folder.rglob("*.png")) and not list(folder.rglob("*.html"))
    before = {path: path.read_bytes() for path in (page, *pictures)}
    write_comparison(runs, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before


def test_each_data_set_has_pictures_of_its_own(folder, tmp_path):
    add_run(folder, "vae", 0, [-1.0, -2.0])
    add_run(folder, "vae", 0, [-1.0, -2.0], dataset="../m n")
    add_run(folder, "vae", 0, [-1.0, -2.0], config={"data": {"preprocess": "raw"}})
    _, *pictures = write_comparison(sorted(folder.iterdir()), tmp_path / "out")
    names = {path.name for path in pictures}
    assert len(names) == 3 and {path.parent for path in pictures} == {tmp_path / "out"}
    assert {"log_likelihood-digits_logit.png", "log_likelihood-digits_raw.png"} < names


def test_the_command_line_puts_the_comparison_where_it_is_told(folder, tmp_path, capsys):
    runs = [str(add_run(folder, method, 0, [-1.0, -2.0])) for method in ("vae", "vlae")]
    main(["report", *runs, "--output", str(tmp_path / "out")])
    assert f"comparison: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "paired_differences.png").exists()
    # A run alone, even if named twice, has nothing to be compared with.
    main(["report", runs[0], runs[0], "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_wrong_use_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="no run to report on"):
        write_comparison([], tmp_path / "out")
    run = add_run(folder, "vae", 0, [-1.0, -2.0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison([run, add_run(folder, "vlae", 0, [-1.0, -2.0])], tmp_path / "file")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "training": None}))
    assert write_comparison([run], tmp_path / "out")
