"""The style of all figures: colours, fonts, grid. Matplotlib is imported only when a figure is drawn."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastres.errors import MissingDependencyError
from fastres.extras import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
PLAIN = ("#f0a35e", "#d96b1f", "#8f3d0b")  # light to dark: shallow to deep
RESIDUAL = ("#6db3d8", "#2274a5", "#0d3b66")
DEPTH_COLOURS = ("#8ecae6", "#2274a5", "#0d2c54")
BROWN_NOISE, WHITE_NOISE = "#8d6e4f", "#9aa5b1"
DPI = 130

_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.title_fontsize": 9,
}


def new_figure(
    rows: int, columns: int, *, width: float, height: float, **shared: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of ``width`` × ``height`` inches and its axes by row. Call this inside ``drawing()``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, axes.tolist()


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Set Matplotlib up for drawing figures inside the block, and restore its settings afterwards.

    Raise ``MissingDependencyError`` if Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(f"Figures need matplotlib, which is not installed: {install('bench')}") from error
    with matplotlib.rc_context(_STYLE):
        yield


def log_labels(axis: Axes) -> None:
    """Label only a few powers of ten, however many decades an axis spans."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.yaxis.set_major_locator(LogLocator(numticks=7))
    axis.yaxis.set_minor_locator(NullLocator())


def note(axis: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """Label a curve directly, in its colour, at data coordinates."""
    axis.annotate(text, (x, y), color=colour, fontsize=10, fontweight="bold", va=options.pop("va", "center"), **options)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return content.getvalue()
