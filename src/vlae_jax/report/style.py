"""The look of all pictures, and elements that several of them draw."""

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from vlae_jax.runs.storage import in_bucket, write_atomically, writing

DPI = 150

# From Okabe and Ito's palette, which is told apart with every common color vision.
BLUE, ORANGE, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#777777"
MARKERS = ("o", "D", "s", "^", "v", "P", "X")
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


class Picture(NamedTuple):
    """A rendered figure with its title and caption."""

    name: str
    title: str
    png: bytes
    caption: str


def minus(text: str) -> str:
    """Set the typographic minus, as matplotlib does on its axes."""
    return text.replace("-", "−")


def png(figure: Figure) -> bytes:
    """Render a figure; equal figures give equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


Subject = TypeVar("Subject")
Drawer = Callable[[Subject], tuple[Figure, str] | None]
"""A function from a subject to a figure and its caption; None where data are missing."""


def draw_pictures(
    subject: Subject, drawers: Sequence[tuple[str, str, Drawer[Subject]]]
) -> list[Picture]:
    """Draw every picture whose data are there; drawers come with a file name and a title."""
    pictures = []
    for name, title, draw in drawers:
        with matplotlib.rc_context(STYLE):
            drawn = draw(subject)
            if drawn is not None:
                pictures.append(Picture(name, title, png(drawn[0]), drawn[1]))
    return pictures


class Sheet:
    """A figure laid out in whole device pixels from the top left, so that images stay crisp."""

    def __init__(self, width: int, height: int, title: str) -> None:
        # A sheet with a single small image is still as wide as its title.
        self.width, self.height = max(width, 760), height
        self.figure = Figure(figsize=(self.width / DPI, height / DPI), dpi=DPI)
        # A bold letter of this size is 14 pixels wide.
        self.text(24, 34, shortened(title, self.width // 14), size=11.0, weight="bold")

    def axes(self, left: int, top: int, width: int, height: int) -> Axes:
        """Add axes in a rectangle of pixels."""
        bottom = self.height - top - height
        share = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(share)

    def image(self, left: int, top: int, pixels: np.ndarray) -> None:
        """Show an image with one device pixel for each of its pixels."""
        axes = self.axes(left, top, pixels.shape[1], pixels.shape[0])
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text at a pixel, never read as mathematics."""
        style = {"va": "center", "ha": "left", "parse_math": False, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)


def enlarge(image: np.ndarray, target: int = 100) -> np.ndarray:
    """Make RGB of one image (h, w, 1 or 3), each pixel repeated a whole number of times."""
    scale = max(1, round(target / max(image.shape[:2])))
    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0.0, 1.0)
    return np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)


def mosaic(images: np.ndarray, columns: int, gap: int = 6, target: int = 100) -> np.ndarray:
    """Lay images (n, h, w, c) out as an RGBA mosaic, transparent between them."""
    cells = np.stack([enlarge(image, target) for image in images])
    height, width = cells.shape[1] + gap, cells.shape[2] + gap
    rows = -(-len(cells) // columns)
    tiles = np.zeros((rows * height - gap, columns * width - gap, 4), np.float32)
    for index, cell in enumerate(cells):
        top, left = index // columns * height, index % columns * width
        tiles[top : top + cell.shape[0], left : left + cell.shape[1], :3] = cell
        tiles[top : top + cell.shape[0], left : left + cell.shape[1], 3] = 1.0
    return tiles


def write_message(axes: Axes, text: str) -> None:
    """Explain in the middle of an empty panel why it is empty."""
    place = axes.transAxes
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=place, color=FAINT)


def shade(color: str, strength: float) -> str:
    """Mix a color with white; strength 1 gives the color itself."""
    red, green, blue = (1.0 - strength * (1.0 - part) for part in to_rgb(color))
    return to_hex((red, green, blue))


def shortened(text: str, letters: int) -> str:
    """Leave out the middle of a text that is longer than so many letters."""
    half = max(1, (letters - 1) // 2)
    return text if len(text) <= letters else f"{text[:half]}…{text[-half:]}"


def wrapped(label: str, width: int = 30) -> str:
    """Break a long label into lines, inside words where one alone is too long."""
    return "\n".join(textwrap.wrap(label, width)) or label


def lines_of(label: str, width: int = 30) -> int:
    """The number of lines that a wrapped label takes."""
    return wrapped(label, width).count("\n") + 1


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend below the panels, since curves may run through any corner.

    The figure grows with it, so that many or long labels do not press the panels together.
    """
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    labels = [wrapped(label, 48) for label in labels]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    # A letter of the legend is about 0.075 inches wide, a line of it 0.17 inches high.
    columns = max(1, min(4, int(figure.get_figwidth() / (0.075 * longest + 0.6))))
    rows = [labels[first::columns] for first in range(columns)]
    lines = max(sum(label.count("\n") + 1 for label in column) for column in rows)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 1))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)


def suptitle(figure: Figure, title: str) -> None:
    """Put a title above all panels of a figure, at its left edge."""
    style: dict[str, Any] = {"x": 0.01, "ha": "left", "size": 10.0, "weight": "bold"}
    # A bold letter of this size is 0.085 inches wide.
    letters = int(figure.get_figwidth() / 0.085)
    figure.suptitle(shortened(title, letters), parse_math=False, **style)


def save(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the folder that it lies in.

    Raises:
        UserError: If it cannot be written.
    """
    if not in_bucket(path):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
