"""Draw pictures as SVG text that goes into a page as it is, in this project's style."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, cast

import matplotlib as mpl

mpl.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"plain": "#6b7280", "adversarial": "#1d5fbf", "attacked": "#c2410c"}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a $
    "svg.fonttype": "path",  # the page must look the same without this machine's fonts
}


def on_axes(draw: Callable[[Axes], None]) -> Callable[[Figure], None]:
    """Draw on the only axes of a figure."""
    return lambda figure: draw(figure.add_subplot())


def svg(
    draw: Callable[[Figure], None], salt: str, size: tuple[float, float] = (5.6, 3.6), *, opaque: bool = False
) -> str:
    """Draw a figure of `size` inches in this project's style. Equal drawings with equal `salt` give equal text.

    `opaque`: on white, for pages whose background is not known.
    """
    with mpl.rc_context(cast("Any", {**STYLE, "svg.hashsalt": salt})):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=not opaque, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]
