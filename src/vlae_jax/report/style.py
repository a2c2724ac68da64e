"""How all pictures look, and the few things that several of them draw."""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

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
    """A drawn figure with the sentence that goes below it."""

    name: str
    title: str
    png: bytes
    caption: str


def minus(text: str) -> str:
    """Set the typographic minus, as matplotlib does on its axes."""
    return text.replace("-", "−")


def png(figure: Figure) -> bytes:
    """Render; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


Subject = TypeVar("Subject")
Drawer = Callable[[Subject], tuple[Figure, str] | None]
"""What is drawn → a figure and its caption, or None where it has no data for it."""


def draw_pictures(
    subject: Subject, drawers: Sequence[tuple[str, str, Drawer[Subject]]]
) -> list[Picture]:
    """Every picture that there is the data for; drawers come with file name and title."""
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
        # Room for the title above a lone image.
        self.width, self.height = max(width, 760), height
        self.figure = Figure(figsize=(self.width / DPI, height / DPI), dpi=DPI)
        self.text(24, 34, title, size=11.0, weight="bold")

    def axes(self, left: int, top: int, width: int, height: int) -> Axes:
        """Axes in this rectangle of pixels."""
        bottom = self.height - top - height
        share = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(share)

    def image(self, left: int, top: int, pixels: np.ndarray) -> None:
        """Pixels as they are, one for one."""
        axes = self.axes(left, top, pixels.shape[1], pixels.shape[0])
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Lettering at a pixel, never read as mathematics."""
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
    """Say in the middle of a panel why there is nothing in it."""
    place = axes.transAxes
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=place, color=FAINT)


def shade(colour: str, strength: float) -> str:
    """Mix a colour with white; strength 1 leaves it as it is."""
    red, green, blue = (1.0 - strength * (1.0 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put the legend beside the curves, which may run through any corner."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        for text in legend.get_texts():
            text.set_parse_math(False)
