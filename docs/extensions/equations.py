"""Equations as inline SVG, drawn by matplotlib: no script, no font and no network to read them."""

from html import escape
from typing import Any

import numpy as np
from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextToPath
from sphinx.application import Sphinx
from sphinx.util import logging

SIZE = 100
"""Units of a drawing to one em of text."""
COMMANDS = {
    Path.MOVETO: "M",
    Path.LINETO: "L",
    Path.CURVE3: "Q",
    Path.CURVE4: "C",
    Path.CLOSEPOLY: "Z",
}


def draw(latex: str) -> str:
    """One equation as an SVG in the color of the text around it, on its baseline.

    Args:
        latex: In the part of LaTeX's mathematics that matplotlib's mathtext knows.
    """
    font = FontProperties(size=SIZE, math_fontfamily="stix")
    shapes, text = TextToPath(), f"${' '.join(latex.split())}$"
    vertices, codes = shapes.get_text_path(font, text, ismath=True)
    width, height, descent = shapes.get_text_width_height_descent(text, font, ismath=True)
    # A pixel more on each side: curves reach a little beyond the box.
    left, top, width, height = -4, descent - height - 4, width + 8, height + 8
    em = 1.1 / SIZE
    return (
        f'<svg class="equation" role="img" aria-label="{escape(latex)}" '
        f'viewBox="{left:.0f} {top:.0f} {width:.0f} {height:.0f}" '
        f'style="width: {width * em:.2f}em; vertical-align: {-(descent + 4) * em:.3f}em">'
        f'<path d="{_outline(np.asarray(vertices), codes)}"/></svg>'
    )


def _outline(vertices: np.ndarray, codes: list[int]) -> str:
    path, last = [], None
    for (x, y), code in zip(np.round(vertices, 1), codes, strict=True):
        if code == Path.CLOSEPOLY:
            path.append("Z")
        else:
            # A curve has two or three points, each with its code.
            path.append(f"{COMMANDS[code] if code != last else ' '}{x:g} {-y:g}")
        last = None if code in (Path.MOVETO, Path.CLOSEPOLY) else code
    return "".join(path)


def _write(writer: Any, node: nodes.Element, before: str, after: str) -> None:
    try:
        latex = node.astext()
        if isinstance(node, nodes.math_block):
            latex = latex.replace(r"\frac", r"\dfrac")  # mathtext knows no display style
        writer.body.append(f"{before}{draw(latex)}{after}")
    except ValueError as error:
        logging.getLogger(__name__).warning(f"equation: {error}", location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the drawing as `html_math_renderer`."""
    app.add_html_math_renderer(
        "svg",
        (lambda writer, node: _write(writer, node, "", ""), None),
        (lambda writer, node: _write(writer, node, '<div class="equation">', "</div>"), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
