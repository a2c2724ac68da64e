"""Pictures, a table and a page, drawn from the files of finished runs.

Nothing here needs JAX: a run folder copied to any machine can be drawn there again.

| file in the run folder | what is drawn from it |
|---|---|
| `config.json` | who the run is; the one file that must be there |
| `metrics.jsonl` | the training curve |
| `results.json` | the table |
| `snapshots.npz` | reconstructions, prior samples, posterior correlations, the mode search |
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlae_jax.errors import UserError

DPI = 150
# Okabe and Ito's palette: told apart with every common colour vision.
BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#777777"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 9.0,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.6,
}
SHOWN_IMAGES, SHOWN_STEPS, SHOWN_SAMPLES, SHOWN_POSTERIORS = 10, 9, 100, 6
ABSENT = "–"


class _Run(NamedTuple):
    """What a run folder holds; a file that is not there is None or empty."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None
    snapshots: dict[str, np.ndarray]


class _Picture(NamedTuple):
    """A drawn figure with the sentence that goes below it."""

    name: str
    title: str
    png: bytes
    caption: str


# --- the run folder ---------------------------------------------------------------------------


def _read_run(run_dir: str | os.PathLike[str]) -> _Run:
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"no run folder at {path}: give a folder that training wrote")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a run folder, it has no config.json: give a folder that training wrote"
        )
    results = path / "results.json"
    return _Run(
        path,
        _read_json(path / "config.json"),
        _read_metrics(path / "metrics.jsonl"),
        _read_results(results) if results.exists() else None,
        _read_snapshots(path / "snapshots.npz"),
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({_one_line(error)}): restore it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_results(path: Path) -> dict[str, Any]:
    results = _read_json(path)
    figures = results.get("figures")
    if not isinstance(figures, list) or not all(
        isinstance(figure, dict) and isinstance(figure.get("name"), str) for figure in figures
    ):
        raise UserError(
            f"{path} must hold 'figures', a list of objects with a name: evaluate the run again"
        )
    return results


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records; of a step written twice, as by a resumed run, the later one counts."""
    lines = _read_bytes(path).split(b"\n") if path.exists() else []
    lines = [line for line in lines if line.strip()]
    records: dict[tuple[Any, Any], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            # A killed process leaves its last line unfinished; that is no damage.
            if number == len(lines):
                break
            raise UserError(f"{path}: record {number} is not valid JSON: remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: record {number} is not a JSON object: remove it")
        records[record.get("split"), record.get("step")] = record
    return list(records.values())


def _read_snapshots(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            snapshots = {name: archive[name] for name in archive.files}
    # A damaged archive raises from zipfile, zlib or numpy, each with exceptions of its own.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a numpy archive: evaluate again") from error
    _check_snapshots(path, snapshots)
    return {name: array for name, array in snapshots.items() if array.size}


def _check_snapshots(path: Path, snapshots: Mapping[str, np.ndarray]) -> None:
    wanted = {
        "data": "(n, height, width, 1 or 3)",
        "reconstructions": "(n, steps + 1, height, width, 1 or 3)",
        "step_log_joint": "(n, steps + 1)",
        "prior_samples": "(m, height, width, 1 or 3)",
        "covariances": "(k, latent, latent)",
    }
    for name, shape in wanted.items():
        array = snapshots.get(name)
        if array is None:
            continue
        ok = array.ndim == shape.count(",") + 1 and array.dtype.kind in "fiu"
        if "1 or 3" in shape:
            ok = ok and array.shape[-1] in (1, 3)
        if name == "covariances":
            ok = ok and array.shape[1] == array.shape[2]
        if not ok:
            raise UserError(f"{path}: {name} must have shape {shape}, got {array.shape}")


def _write(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _minus(text: str) -> str:
    """Set the typographic minus, as matplotlib does on its axes."""
    return text.replace("-", "−")


def _number(value: Any) -> float:
    """Take a number from JSON; null, and whatever is no number, becomes NaN."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else math.nan


def _setting(run: _Run, section: str, name: str) -> Any:
    values = run.config.get(section)
    return values.get(name) if isinstance(values, dict) else None


def _name(run: _Run) -> str:
    described = (run.results or {}).get("run")
    name = described.get("name") if isinstance(described, dict) else None
    return str(name or run.path.resolve().name)


def _method(run: _Run) -> str:
    return str(_setting(run, "inference", "method") or "?").upper().replace("_", "-")


def _steps(run: _Run) -> int | None:
    """T, or None where the method searches no mode."""
    steps = _setting(run, "inference", "steps")
    return None if _method(run).startswith("VAE") or not isinstance(steps, int) else steps


def _subject(run: _Run) -> str:
    steps = _steps(run)
    method = _method(run) if steps is None else f"{_method(run)}, T = {steps}"
    return f"{_setting(run, 'data', 'dataset') or '?'} · {method}"


def _checkpoint(run: _Run) -> Mapping[str, Any] | None:
    """Find the chosen checkpoint, with its validation figures where they are on record."""
    validation = [record for record in run.metrics if record.get("split") == "validation"]
    chosen = (run.results or {}).get("checkpoint")
    if isinstance(chosen, dict):
        validation = [record for record in validation if record.get("step") == chosen.get("step")]
    else:
        validation = [record for record in validation if record.get("best")]
    return validation[-1] if validation else chosen if isinstance(chosen, dict) else None


# --- pictures ---------------------------------------------------------------------------------


def draw_figures(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw what a run folder has the data for, into its folder `figures`.

    `reconstructions.png`, `prior_samples.png`, `posterior_covariances.png`, `step_log_joint.png`
    and `training_curve.png`. The same files give the same bytes.

    Args:
        run_dir: Folder of one run.

    Returns:
        The files written. A figure whose input is missing is left out.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    run = _read_run(run_dir)
    return [path for path, _ in _save_pictures(run)]


def _save_pictures(run: _Run) -> list[tuple[Path, _Picture]]:
    saved = [(run.path / "figures" / f"{picture.name}.png", picture) for picture in _pictures(run)]
    for path, picture in saved:
        _write(path, picture.png)
    return saved


def _pictures(run: _Run) -> list[_Picture]:
    """Draw every picture that the run has the data for, in the order of the page."""
    drawers: Sequence[tuple[str, str, Callable[[_Run], tuple[Figure, str] | None]]] = (
        ("reconstructions", "Reconstructions", _draw_reconstructions),
        ("step_log_joint", "Mode search", _draw_step_log_joint),
        ("posterior_covariances", "Posterior correlations", _draw_posteriors),
        ("prior_samples", "Samples from the prior", _draw_prior_samples),
        ("training_curve", "Training", _draw_training_curve),
    )
    pictures = []
    for name, title, draw in drawers:
        with matplotlib.rc_context(STYLE):
            drawn = draw(run)
            if drawn is not None:
                pictures.append(_Picture(name, title, _png(drawn[0]), drawn[1]))
    return pictures


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


class _Sheet:
    """A figure laid out in whole device pixels from the top left, so that images stay crisp."""

    def __init__(self, width: int, height: int, title: str) -> None:
        # Room for the title above a lone image.
        self.width, self.height = max(width, 760), height
        self.figure = Figure(figsize=(self.width / DPI, height / DPI), dpi=DPI)
        self.text(24, 34, title, size=11.0, weight="bold")

    def axes(self, left: int, top: int, width: int, height: int) -> Axes:
        bottom = self.height - top - height
        share = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(share)

    def image(self, left: int, top: int, pixels: np.ndarray) -> None:
        axes = self.axes(left, top, pixels.shape[1], pixels.shape[0])
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"va": "center", "ha": "left", "parse_math": False, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)


def _enlarge(image: np.ndarray, target: int = 100) -> np.ndarray:
    """Make RGB of one image (h, w, 1 or 3), each pixel repeated a whole number of times."""
    scale = max(1, round(target / max(image.shape[:2])))
    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0.0, 1.0)
    return np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)


def _tile(images: np.ndarray, columns: int, gap: int = 6, target: int = 100) -> np.ndarray:
    """Lay images (n, h, w, c) out as an RGBA mosaic, transparent between them."""
    cells = np.stack([_enlarge(image, target) for image in images])
    height, width = cells.shape[1] + gap, cells.shape[2] + gap
    rows = -(-len(cells) // columns)
    mosaic = np.zeros((rows * height - gap, columns * width - gap, 4), np.float32)
    for index, cell in enumerate(cells):
        top, left = index // columns * height, index % columns * width
        mosaic[top : top + cell.shape[0], left : left + cell.shape[1], :3] = cell
        mosaic[top : top + cell.shape[0], left : left + cell.shape[1], 3] = 1.0
    return mosaic


def _spread(count: int, most: int) -> list[int]:
    """Pick at most so many of 0..count-1, evenly spread, first and last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most)).tolist()})


def _log_joints(run: _Run) -> tuple[np.ndarray, str]:
    """Log joints (n, steps + 1) of the images whose search stayed finite, and words on how many."""
    paths = np.asarray(run.snapshots.get("step_log_joint", np.empty((0, 1))), np.float64)
    finite = np.isfinite(paths).all(axis=1)
    words = f"mean over {finite.sum()} test images"
    if not finite.all():
        words += f" ({(~finite).sum()} more came out non-finite and are left out)"
    return paths[finite], words


def _draw_reconstructions(run: _Run) -> tuple[Figure, str] | None:
    data, steps = run.snapshots.get("data"), run.snapshots.get("reconstructions")
    if data is None or steps is None:
        return None
    count = min(len(data), len(steps), SHOWN_IMAGES)
    data, steps = data[:count], steps[:count]
    shown, gap = _spread(steps.shape[1], SHOWN_STEPS), 6
    strips = [_tile(data, count, gap), *(_tile(steps[:, t], count, gap) for t in shown)]
    height, width = strips[0].shape[:2]
    left, top, apart = 112, 72, 22
    total = top + len(strips) * (height + gap) + apart + 18
    sheet = _Sheet(left + width + 128, total, f"Reconstructions · {_subject(run)}")
    log_joints, words = _log_joints(run)
    searched = steps.shape[1] > 1
    if len(log_joints):
        heading = "mean\nlog joint,\nnats"
        style = {"ha": "right", "color": FAINT, "linespacing": 1.4}
        sheet.text(left + width + 104, top + height / 2, heading, **style)
    for row, strip in enumerate(strips):
        y = top + row * (height + gap) + (apart if row else 0)
        sheet.image(left, y, strip)
        t = shown[row - 1]
        label = "data" if row == 0 else f"t = {t}" if searched else "mean"
        sheet.text(left - 18, y + height / 2, label, ha="right")
        if row and len(log_joints) and t < log_joints.shape[1]:
            mean = _minus(f"{log_joints[:, t].mean():,.1f}")
            sheet.text(left + width + 104, y + height / 2, mean, ha="right")
    caption = (
        f"Test images above, and below them the decoder's output at {_searched_points(searched)}"
    )
    if len(log_joints):
        caption += f", with the log joint log p(x, z) in nats, {words}"
    return sheet.figure, caption + "."


def _searched_points(searched: bool) -> str:
    if not searched:
        return "the posterior mean"
    return "each step t of the mode search, from the encoder's guess (t = 0) to the mode"


def _draw_prior_samples(run: _Run) -> tuple[Figure, str] | None:
    samples = run.snapshots.get("prior_samples")
    if samples is None:
        return None
    samples = samples[:SHOWN_SAMPLES]
    mosaic = _tile(samples, _columns(len(samples)))
    title = f"Prior samples · {_subject(run)}"
    sheet = _Sheet(mosaic.shape[1] + 48, mosaic.shape[0] + 92, title)
    sheet.image(24, 68, mosaic)
    return sheet.figure, "Decoder means at latents drawn from the standard normal prior."


def _columns(count: int) -> int:
    """Choose the columns of a grid near square, without a ragged last row where possible."""
    root = math.ceil(math.sqrt(count))
    full = [columns for columns in range(root, 2 * root + 1) if count % columns == 0]
    return full[0] if full else root


def _draw_posteriors(run: _Run) -> tuple[Figure, str] | None:
    covariances, data = run.snapshots.get("covariances"), run.snapshots.get("data")
    if covariances is None or data is None:
        return None
    count = min(len(covariances), len(data), SHOWN_POSTERIORS)
    correlations, deviations = _ordered_correlations(covariances[:count])
    limit = _colour_limit(correlations)
    latent = deviations.shape[1]
    scale = max(1, round(300 / latent))
    picture, side = _enlarge(data[0], 112).shape[1], scale * latent
    columns = min(count, 3)
    step_x, step_y = picture + 66 + side + 46, side + 118
    rows, bar = -(-count // columns), 140
    title = f"Posterior correlations · {_subject(run)}"
    sheet = _Sheet(columns * step_x + bar, 76 + rows * step_y, title)
    for index in range(count):
        x, y = 24 + index % columns * step_x, 76 + index // columns * step_y
        sheet.image(x, y, _enlarge(data[index], 112))
        x += picture + 56
        axes = sheet.axes(x, y, side, side)
        mappable = _heat_map(axes, correlations[index], limit)
        _deviation_strip(sheet.axes(x, y + side + 12, side, 46), deviations, index)
    axes = sheet.axes(columns * step_x + 8, 76, 16, side)
    colours = sheet.figure.colorbar(mappable, cax=axes, extend="max" if limit < 1 else "neither")
    colours.set_ticks([-limit, 0.0, limit])
    colours.set_label("correlation", color=FAINT)
    colours.outline.set_visible(False)
    return sheet.figure, (
        f"Posterior correlations of the {latent} latent dimensions for {count} test images, "
        "in one order for all: by mean posterior variance, so that the dimensions the data "
        "inform come first and those left at the prior, with standard deviation 1 (strip), last."
    )


def _ordered_correlations(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order correlations (k, latent, latent) and standard deviations (k, latent), smallest first.

    A covariance that is not one leaves NaN correlations.
    """
    covariances = np.asarray(covariances, np.float64)
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    finite = np.isfinite(covariances).all(axis=(1, 2)) & (variances > 0).all(axis=1)
    order = np.argsort(variances[finite].mean(axis=0) if finite.any() else variances[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        deviations = np.sqrt(variances)
        correlations = covariances / deviations[:, :, None] / deviations[:, None, :]
    correlations[~finite] = np.nan
    return correlations[:, order][:, :, order], deviations[:, order]


def _colour_limit(correlations: np.ndarray) -> float:
    """Take the smallest round limit that covers nearly all correlations off the diagonal."""
    latent = correlations.shape[1]
    sizes = np.abs(correlations[:, ~np.eye(latent, dtype=bool)])
    sizes = sizes[np.isfinite(sizes)]
    top = np.quantile(sizes, 0.995) if sizes.size else 1.0
    return next((limit for limit in (0.25, 0.5) if 0 < top <= limit), 1.0)


def _heat_map(axes: Axes, correlation: np.ndarray, limit: float) -> Any:
    image = axes.imshow(
        correlation, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto"
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#bbbbbb")
    if not np.isfinite(correlation).all():
        _message(axes, "not positive\ndefinite")
    return image


def _message(axes: Axes, text: str) -> None:
    place = axes.transAxes
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=place, color=FAINT)


def _deviation_strip(axes: Axes, deviations: np.ndarray, index: int) -> None:
    top = max(1.0, float(deviations[np.isfinite(deviations)].max(initial=0.0)))
    axes.stairs(np.nan_to_num(deviations[index]), fill=True, color="#9a9a9a", linewidth=0)
    axes.set(xlim=(0, deviations.shape[1]), ylim=(0, top * 1.05), xticks=[], yticks=[0, 1])
    axes.tick_params(labelsize=7, length=2, pad=2)
    axes.set_xlabel("posterior std", fontsize=8, color=FAINT, labelpad=3)
    axes.grid(False)


def _draw_step_log_joint(run: _Run) -> tuple[Figure, str] | None:
    paths, words = _log_joints(run)
    if not len(paths) or paths.shape[1] < 2:
        return None
    behind = paths - paths[:, -1:]
    low, lower, upper, high = np.quantile(behind, [0.1, 0.25, 0.75, 0.9], axis=0)
    t = np.arange(paths.shape[1])
    figure = Figure(figsize=(5.6, 3.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(t, low, high, color=BLUE, alpha=0.15, linewidth=0, label="10–90 % of images")
    axes.fill_between(t, lower, upper, color=BLUE, alpha=0.3, linewidth=0, label="25–75 %")
    axes.plot(t, behind.mean(axis=0), "o-", color=BLUE, markersize=4, label="mean")
    # Newton's steps shrink by orders of magnitude: a linear axis would show the first alone.
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axes.yaxis.set_major_formatter(lambda value, _: _minus(f"{value:g}"))
    axes.axhline(0.0, color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step t", ylabel=r"$\log p(x, z_t) - \log p(x, z_T)$, nats")
    axes.set_title(f"Mode search · {_subject(run)}", weight="bold", parse_math=False)
    axes.legend(loc="lower right")
    gain = -behind[:, 0].mean()
    return figure, (
        f"Log joint at each step of the mode search, less its final value: from the encoder's "
        f"guess to the end the search gains {gain:,.2f} nats an image, {words}."
    )


def _draw_training_curve(run: _Run) -> tuple[Figure, str] | None:
    if not run.metrics:
        return None
    figure = Figure(figsize=(9.2, 4.0), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1.0))
    chosen = _checkpoint(run)
    panels = {
        "elbo": (grid[:, 0], f"ELBO · {_subject(run)}"),
        "reconstruction": (grid[0, 1], r"Reconstruction, $\mathrm{E}_q \log p(x \mid z)$"),
        "kl": (grid[1, 1], r"KL, $q(z \mid x)$ to the prior"),
    }
    for name, (place, title) in panels.items():
        axes = figure.add_subplot(place)
        first = name == "elbo"
        axes.set_title(title, weight="bold" if first else "normal", parse_math=not first)
        _curve(axes, run, name)
        _mark_checkpoint(axes, chosen, name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("nats per image")
        if name != "reconstruction":
            axes.set_xlabel("epoch")
        if first:
            # Beside the curves, which may run through any corner.
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = "ELBO, reconstruction term and KL divergence against epoch, on train and validation"
    if chosen is not None:
        epoch = _number(chosen.get("epoch"))
        caption += f"; the dotted line marks the checkpoint chosen on validation (epoch {epoch:g})"
    return figure, caption + "."


def _series(run: _Run, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Gather epochs and values of one metric, where both are finite."""
    records = [record for record in run.metrics if record.get("split") == split]
    points = np.array([(_number(r.get("epoch")), _number(r.get(name))) for r in records])
    points = points.reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    points = points[np.argsort(points[:, 0], kind="stable")]
    return points[:, 0], points[:, 1]


def _thinned(epochs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until a figure can show them, at most 150 points."""
    together = -(-len(epochs) // 150) or 1
    starts = np.arange(0, len(epochs), together)
    counts = np.diff([*starts, len(epochs)])
    if not len(starts):
        return epochs, values
    return np.add.reduceat(epochs, starts) / counts, np.add.reduceat(values, starts) / counts


def _curve(axes: Axes, run: _Run, name: str) -> None:
    train, validation = _series(run, "train", name), _series(run, "validation", name)
    axes.plot(*_thinned(*train), color=BLUE, linewidth=1.2, label="train")
    marker = "o" if len(validation[0]) <= 40 else ""
    axes.plot(*validation, color=ORANGE, marker=marker, markersize=3, label="validation")
    curves = [curve for curve in (_thinned(*train), validation) if len(curve[0])]
    if not curves:
        _message(axes, "no finite values")
        return
    low, high = _robust_limits(curves)
    axes.set_ylim(low, high)
    _, start = min((curve[0][0], curve[1][0]) for curve in (train, validation) if len(curve[0]))
    if not low <= start <= high:
        note = _minus(f"starts at {start:,.0f}")
        axes.set_title(note, loc="right", fontsize=8, color=FAINT)


def _robust_limits(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Choose limits that the first epochs and single spikes do not stretch."""
    begin = min(epochs[0] for epochs, _ in curves)
    end = max(epochs[-1] for epochs, _ in curves)
    bounds = []
    # Each by itself: a long curve must not push a short one's worst stretch out of sight.
    for epochs, values in curves:
        late = values[epochs >= begin + 0.15 * (end - begin)]
        bounds += [*np.quantile(late if len(late) else values, [0.01, 0.99])]
    margin = 0.08 * np.ptp(bounds) or 0.05 * max(abs(max(bounds)), 1.0)
    return float(min(bounds) - margin), float(max(bounds) + margin)


def _mark_checkpoint(axes: Axes, chosen: Mapping[str, Any] | None, name: str) -> None:
    if chosen is None or not math.isfinite(_number(chosen.get("epoch"))):
        return
    epoch, value = _number(chosen.get("epoch")), _number(chosen.get(name))
    label = "chosen checkpoint"
    axes.axvline(epoch, color=INK, linewidth=1.0, linestyle=":", label=label, zorder=1)
    if math.isfinite(value):
        axes.plot([epoch], [value], "o", color=ORANGE, mec=INK, markersize=6, zorder=5)


# --- the table --------------------------------------------------------------------------------

COLUMNS = (
    ("run", "left"),
    ("data set", "left"),
    ("method", "left"),
    ("T", "right"),
    ("seed", "right"),
    ("epochs", "right"),
    ("test ELBO", "right"),
    ("test log p(x)", "right"),
    ("K", "right"),
    ("gap", "right"),
    ("bits/dim", "right"),
    ("unconverged", "right"),
    ("not PD", "right"),
)


def summary_table(run_dirs: Iterable[str | os.PathLike[str]]) -> Table:
    """Set runs side by side: one row a run.

    ELBO, log p(x) and their gap are in nats per test image, with standard errors; K is the number
    of importance samples, and log p(x) is the lower bound that K samples give. The gap is taken
    only where both figures read the same number of images. A figure that came out non-finite
    reads "not finite", and a run without `results.json` "not evaluated".

    Args:
        run_dirs: Folders of runs.

    Returns:
        A table for a rich console.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    return _rich_table([_read_run(run_dir) for run_dir in run_dirs])


def print_summary(
    run_dirs: Iterable[str | os.PathLike[str]], console: Console | None = None
) -> None:
    """Print the summary table; on a terminal too narrow for it, with one column a run instead.

    Args:
        run_dirs: Folders of runs.
        console: Where to print; None is standard output.

    Raises:
        UserError: If there is no such run, or one of its files is damaged.
    """
    _print([_read_run(run_dir) for run_dir in run_dirs], console or Console())


def _print(runs: Sequence[_Run], console: Console) -> None:
    table = _rich_table(runs)
    unlimited = console.options.update(max_width=10_000)
    needed = console.measure(table, options=unlimited).maximum
    if needed <= console.width:
        console.print(table)
        return
    if not console.is_terminal:
        # A file or a pipe has no width of its own to fit the table to.
        Console(file=console.file, width=needed).print(table)
        return
    abreast = max(1, (console.width - 16) // 20)
    for first in range(0, len(runs), abreast):
        console.print(_tall_table(runs[first : first + abreast]))
    console.print(Text(_note(runs), style="dim italic"))


def _tall_table(runs: Sequence[_Run]) -> Table:
    (corner, _), *quantities = COLUMNS
    names, *rows = zip(*map(_row, runs), strict=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(corner)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for (quantity, _), cells in zip(quantities, rows, strict=True):
        table.add_row(quantity, *map(Text, cells))
    return table


def _rich_table(runs: Sequence[_Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=_note(runs), caption_justify="left")
    for header, justify in COLUMNS:
        # Folded, not cut: a narrow terminal must not eat digits.
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for run in runs:
        table.add_row(*(Text(cell) for cell in _row(run)))
    return table


def _note(runs: Sequence[_Run]) -> str:
    if all(run.results is None for run in runs):
        return "No run here has a results.json: evaluate to fill the table."
    return "Nats per image ± standard error; log p(x) from K importance samples."


def _row(run: _Run) -> list[str]:
    steps = _steps(run)
    settings = [
        _name(run),
        str(_setting(run, "data", "dataset") or ABSENT),
        _method(run),
        ABSENT if steps is None else str(steps),
        _plain(_setting(run, "training", "seed")),
        _epochs(run),
    ]
    if run.results is None:
        return [*settings, "not evaluated", *[ABSENT] * 6]
    log_prob = _figure(run, "log_prob")
    return [
        *settings,
        _quantity(_figure(run, "elbo")),
        _quantity(log_prob),
        _plain((log_prob or {}).get("samples")),
        _quantity(_gap(run)),
        _quantity(_figure(run, "bits_per_dim")),
        _quantity(_figure(run, "unconverged")),
        _quantity(_figure(run, "not_positive_definite")),
    ]


def _figure(run: _Run, name: str) -> dict[str, Any] | None:
    """Find the test figure of that name; of several, the one with the most samples."""
    figures = [
        figure
        for figure in (run.results or {}).get("figures", [])
        if figure["name"] == name and figure.get("split", "test") == "test"
    ]
    return max(figures, key=lambda figure: figure.get("samples") or 0, default=None)


def _gap(run: _Run) -> dict[str, Any] | None:
    """Log p(x) less ELBO; None where they come from different numbers of images."""
    given = _figure(run, "inference_gap")
    elbo, log_prob = _figure(run, "elbo"), _figure(run, "log_prob")
    if given is not None or elbo is None or log_prob is None:
        return given
    if elbo.get("images") != log_prob.get("images"):
        return None
    return {"value": _number(log_prob.get("value")) - _number(elbo.get("value")), "unit": "nats"}


def _epochs(run: _Run) -> str:
    planned = _setting(run, "training", "epochs")
    reached = max(_series(run, "train", "epoch")[0], default=math.inf)
    # The last record of an epoch may come a few steps before its end.
    return f"{reached:.3g} of {planned}" if reached < _number(planned) - 1 else _plain(planned)


def _plain(value: Any) -> str:
    return ABSENT if value is None else str(value)


def _quantity(figure: Mapping[str, Any] | None) -> str:
    """Write a value with its standard error, to the decimals its unit deserves."""
    if figure is None:
        return ABSENT
    value, error = _number(figure.get("value")), _number(figure.get("standard_error"))
    if not math.isfinite(value):
        return "not finite"
    unit = figure.get("unit")
    factor, decimals, suffix = {
        "share": (100.0, 2, " %"),
        "samples": (1.0, 1, ""),
        "bits/dim": (1.0, 4, ""),
    }.get(str(unit), (1.0, 2, ""))
    if not math.isfinite(error):
        return f"{value * factor:,.{decimals}f}{suffix}"
    if error > 0:
        # Two decimals of a tiny error would read 0.00.
        decimals = max(decimals, -math.floor(math.log10(error * factor)))
    return f"{value * factor:,.{decimals}f} ± {error * factor:,.{decimals}f}{suffix}"


# --- the page ---------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #5f6975;
  --line: #e3e6ea; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2025; --ink: #e8eaed;
  --soft: #9aa4b0; --line: #2e343c; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 44px 0 12px; }
h3 { font-size: .8rem; margin: 0 0 8px; color: var(--soft); font-weight: 600;
  text-transform: uppercase; letter-spacing: .06em; }
.lead, figcaption, .note { color: var(--soft); }
.lead { margin: 0 0 24px; }
.note { font-size: .875rem; }
header h1 { margin-bottom: 20px; }
header + article, article + article { margin-top: 72px; padding-top: 48px;
  border-top: 1px solid var(--line); }
.tiles, .cards { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.tile, .card, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile, .card { padding: 14px 18px; }
.tile b { display: block; font-size: 1.5rem; white-space: nowrap; font-weight: 600;
  line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums; }
.tile small { font-size: .9rem; font-weight: 400; }
.tile span { font-size: .85rem; color: var(--soft); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; }
.right { text-align: right; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 16px; margin: 0; font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 36px; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: 8px;
  border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-top: 10px; max-width: 74ch; font-size: .92rem; }
figcaption b { color: var(--ink); }
@media print { main { max-width: none; padding: 0; } figure, .card { break-inside: avoid; } }
"""


def write_report(
    run_dirs: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Draw every run's figures, print the table, and write the page.

    The page is one file that loads nothing: pictures and style are inside it.

    Args:
        run_dirs: Folders of runs.
        output: File for one page about all runs together. None writes `report.html` into each
            run's own folder.

    Returns:
        The pages written.

    Raises:
        UserError: If no run is given or there is no such run, if one of the files is damaged, or
            if the page cannot be written.
    """
    runs = [_read_run(run_dir) for run_dir in run_dirs]
    if not runs:
        raise UserError("no run to report on: give one or more folders that training wrote")
    sections = [_section(run, [picture for _, picture in _save_pictures(run)]) for run in runs]
    _print(runs, Console())
    if output is not None:
        pages = [(Path(output), runs, sections)]
    else:
        singly = zip(runs, sections, strict=True)
        pages = [(run.path / "report.html", [run], [section]) for run, section in singly]
    for path, page_runs, page_sections in pages:
        _write(path, _page(page_runs, page_sections).encode())
    return [path for path, _, _ in pages]


def _page(runs: Sequence[_Run], sections: Sequence[str]) -> str:
    title = _name(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    body = "\n".join(f"<article>\n{section}\n</article>" for section in sections)
    if len(runs) > 1:
        rows = _html_table(COLUMNS, [_row(run) for run in runs])
        overview = f"<h1>{title}</h1>\n{rows}<p class=note>{_note(runs)}</p>"
        body = f"<header>\n{overview}\n</header>\n{body}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(run: _Run, pictures: Sequence[_Picture]) -> str:
    seed = _plain(_setting(run, "training", "seed"))
    lead = f"{_subject(run)} · seed {seed} · {_epochs(run)} epochs{_chosen_words(run)}"
    parts = [
        f"<h1>{html.escape(_name(run))}</h1>\n<p class=lead>{html.escape(lead)}</p>",
        _results_html(run),
        f"<h2>Pictures</h2>\n{''.join(map(_picture_html, pictures))}" if pictures else "",
        f"<h2>Configuration</h2>\n{_cards(run.config)}",
    ]
    if run.results is not None:
        made = {
            "versions": run.results.get("versions"),
            "seconds": run.results.get("seconds"),
            "machine": {"device": run.results.get("device")},
        }
        parts.append(f"<h2>Made with</h2>\n{_cards(made)}")
    return "\n".join(part for part in parts if part)


def _chosen_words(run: _Run) -> str:
    chosen = _checkpoint(run)
    if chosen is None or not math.isfinite(_number(chosen.get("epoch"))):
        return ""
    return f", checkpoint of epoch {_number(chosen.get('epoch')):g} chosen on validation"


def _results_html(run: _Run) -> str:
    if run.results is None:
        return "<h2>Results</h2>\n<p>This run is not evaluated: it has no results.json.</p>"
    log_prob = _figure(run, "log_prob")
    samples = _plain((log_prob or {}).get("samples"))
    tiles = (
        ("test ELBO, nats", _figure(run, "elbo")),
        (f"test log p(x), nats, K = {samples}", log_prob),
        ("gap between them, nats", _gap(run)),
        ("bits per dimension", _figure(run, "bits_per_dim")),
    )
    shown = "".join(
        f"<div class=tile><b>{_tile_words(figure)}</b><span>{label}</span></div>\n"
        for label, figure in tiles
        if figure is not None
    )
    return f"<div class=tiles>\n{shown}</div>\n<h2>Results</h2>\n{_figures_html(run.results)}"


def _tile_words(figure: Mapping[str, Any]) -> str:
    value, sign, error = _quantity(figure).partition(" ± ")
    return f"{value} <small>± {error}</small>" if sign else value


NAMES = {
    "elbo": "ELBO",
    "log_prob": "log p(x)",
    "bits_per_dim": "bits per dimension",
    "ess": "effective sample size",
    "kl": "KL",
}


def _figures_html(results: Mapping[str, Any]) -> str:
    columns = (
        ("figure", "left"),
        ("value ± standard error", "right"),
        ("unit", "left"),
        ("split", "left"),
        ("images", "right"),
        ("K", "right"),
    )
    rows = [
        [
            NAMES.get(figure["name"], figure["name"].replace("_", " ")),
            _quantity(figure),
            _plain(figure.get("unit")),
            _plain(figure.get("split")),
            _plain(figure.get("images")),
            _plain(figure.get("samples")),
        ]
        for figure in results["figures"]
    ]
    note = "K is the number of samples per image; log p(x) is the lower bound that K samples give."
    return f"{_html_table(columns, rows)}<p class=note>{note}</p>"


def _html_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th class={side}>{html.escape(name)}</th>" for name, side in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class={side}>{html.escape(cell)}</td>"
            for cell, (_, side) in zip(row, columns, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f"<div class=table><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _picture_html(picture: _Picture) -> str:
    source = base64.b64encode(picture.png).decode("ascii")
    caption = html.escape(picture.caption)
    # One scale for all, so that their lettering has one size; a PNG's width is in its bytes 16-19.
    width = round(0.7 * int.from_bytes(picture.png[16:20], "big"))
    return (
        f'<figure><img width="{width}" src="data:image/png;base64,{source}" '
        f'alt="{caption}">\n<figcaption><b>{picture.title}.</b> {caption}</figcaption></figure>\n'
    )


def _cards(sections: Mapping[str, Any]) -> str:
    """One card for each section of settings."""
    cards = []
    for title, values in sections.items():
        values = values if isinstance(values, Mapping) else {title: values}
        rows = "".join(
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(_setting_words(value))}</dd>"
            for name, value in values.items()
        )
        cards.append(f"<div class=card><h3>{html.escape(str(title))}</h3><dl>{rows}</dl></div>")
    return f"<div class=cards>{''.join(cards)}</div>"


def _setting_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_setting_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_setting_words(item)}" for name, item in value.items())
    return ABSENT if value is None else str(value)
