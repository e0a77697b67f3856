"""Figures drawn by matplotlib, on canvases of their own: pyplot and its global backend stay untouched."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_posterior.errors import MissingDependencyError
from moe_posterior.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
STYLES: tuple[dict[str, Any], ...] = (  # luminances and dashes differ, so a figure reads in grey
    {"color": "#2d1e6b", "linestyle": "-", "linewidth": 2.0},
    {"color": "#b35806", "linestyle": "--"},
    {"color": "#4d9221", "linestyle": ":"},
    {"color": "#777777", "linestyle": "-."},
    {"color": "#c994c7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)


def canvas(width: float, height: float) -> "Figure":
    """An empty figure, in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "evaluate") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure whole or not at all: as a PNG, or in the format that the suffix names."""
    path = Path(path)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=DPI)
    return path


def band(
    axes: "Axes", x: Sequence[float], samples: Sequence[Sequence[float]], label: str, style: dict[str, Any]
) -> None:
    """Mean over seeds at each x and, if each has several, a band of two standard errors to either side."""
    columns = [torch.tensor(values or [torch.nan], dtype=torch.float64) for values in samples]
    mean = torch.tensor([float(column.mean()) for column in columns])
    axes.plot(x, mean.tolist(), label=label, **style)
    if all(len(column) > 1 for column in columns):
        error = torch.tensor([2 * float(column.std()) / len(column) ** 0.5 for column in columns])
        axes.fill_between(
            x, (mean - error).tolist(), (mean + error).tolist(), color=style["color"], alpha=0.15, linewidth=0
        )
