"""What our plots have in common: figures that need no display, and a look for each line of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['look', 'new_figure', 'save']


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; matplotlib is imported by now and not before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def look(number: int) -> dict[str, str]:
    """Color and marker of a line; ten colors and eight markers make forty pairs."""
    return {'color': f'C{number % 10}', 'marker': 'osD^vP*X'[number % 8]}


def save(figure: Figure, path: Path) -> None:
    """Write the figure with a grid in each of its panels."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
