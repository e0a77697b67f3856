"""Tables on the terminal and as Markdown, figures as PNG."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_posterior.benchmarks.evaluate import CURVE_STEP
from moe_posterior.benchmarks.records import Record
from moe_posterior.benchmarks.stream import CHECKPOINTS
from moe_posterior.benchmarks.tables import Block, Table, blocks_of
from moe_posterior.errors import MissingDependencyError
from moe_posterior.escape import label, markdown, terminal
from moe_posterior.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

STYLES: tuple[dict[str, Any], ...] = (  # luminances and line styles differ: reads in grey
    {"color": "#2d1e6b", "linestyle": "-", "linewidth": 2.0},
    {"color": "#b35806", "linestyle": "--"},
    {"color": "#4d9221", "linestyle": ":"},
    {"color": "#777777", "linestyle": "-."},
    {"color": "#c994c7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)
DRAWN = ("posterior", "softmax", "expert threshold", "discounted ucb", "posterior of the paper")
DPI = 150
FILE_WIDTH = 132


def print_tables(tables: Iterable[Table], console: "Console | None" = None) -> None:
    """Print tables with rich.

    Raises:
        MissingDependencyError: without rich.
    """
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError("rich", "train") from error
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)  # a file has no width: do not break its tables at 80
    for table in tables:
        grid = RichTable(
            title=Text(terminal(table.title)), title_justify="left", title_style="bold", box=None, padding=(0, 1)
        )
        for index, name in enumerate(table.header):
            grid.add_column(Text(terminal(name)), justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in table.rows:
            grid.add_row(*(Text(terminal(cell)) for cell in row))
        console.print(grid)
        if table.note:
            console.print(Text(terminal(table.note), "dim italic"))
        console.print()


def to_markdown(tables: Iterable[Table]) -> str:
    """The same tables in Markdown, ending in a newline.

    >>> print(to_markdown([Table("T", ["gate", "x"], [["posterior", "1"]], "n")]), end="")
    **T**
    <BLANKLINE>
    | gate | x |
    |---|--:|
    | posterior | 1 |
    <BLANKLINE>
    n
    """
    parts = []
    for table in tables:
        lines = [f"**{markdown(table.title)}**", "", _row(table.header), "|---|" + "--:|" * (len(table.header) - 1)]
        lines += [_row(row) for row in table.rows]
        parts += ["\n".join([*lines, "", *([markdown(table.note), ""] if table.note else [])])]
    return "\n".join(parts)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(markdown, cells)) + " |"


def draw(records: Iterable[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw what the records allow: trajectories of the degraded expert (B), recovery after the change (C and the streams).

    Returns:
        The files written, ``<benchmark>-<environment>-<what>.png`` in ``folder``, which is made if it does not exist.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for block in blocks_of(records):
        stem = f"{block.benchmark}-{block.environment}{block.setting}"
        stem = re.sub(r"[^\w]+", "-", stem).strip("-")
        if any(block.numbers(gate, "degraded_mean_affected_0") for gate in block.gates):
            written.append(save(_trajectories(block), folder / f"{stem}-trajectories.png"))
        if block.environment != "static":
            written.append(save(_success(block), folder / f"{stem}-success.png"))
    return written


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure, as a PNG or whatever the suffix says, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=DPI)
    return path


def canvas(width: float, height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "train") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _trajectories(block: Block) -> "Figure":
    """Table 6 as a picture: a line for affected and one for healthy classes, gate by gate, seeds as a band."""
    gates = [gate for gate in DRAWN if gate in block.gates and block.numbers(gate, "degraded_mean_affected_0")]
    figure = canvas(0.6 + 3.4 * len(gates), 3.2)
    panels = figure.subplots(1, len(gates), squeeze=False, sharey=True)[0]
    for axes, gate in zip(panels, gates, strict=True):
        for where, style in zip(("affected", "healthy"), STYLES, strict=False):
            lines = [block.numbers(gate, f"degraded_mean_{where}_{passed}") for passed in CHECKPOINTS]
            band(axes, list(CHECKPOINTS), [list(line.values()) for line in lines], where, style)
        axes.set_title(label(gate), fontsize=10)
        axes.set_xlabel("queries since the failure")
    panels[0].set_ylabel("posterior mean of the degraded expert")
    panels[0].set_ylim(0, 1)
    panels[0].legend(frameon=False, fontsize=8, title="query classes", title_fontsize=8)
    return figure


def _success(block: Block) -> "Figure":
    """True success probability of the chosen expert, averaged over the next 50 queries."""
    figure = canvas(6.4, 3.6)
    axes = figure.subplots()
    gates = [gate for gate in DRAWN if gate in block.gates]
    for gate, style in zip(
        [*gates, "oracle"], [*STYLES[: len(gates)], {"color": "0.4", "linewidth": 0.8}], strict=True
    ):
        curves = [curve for curve in block.values[gate].get("curve_expected", {}).values() if isinstance(curve, list)]
        if curves:
            points = [list(values) for values in zip(*curves, strict=True)]
            band(axes, [CURVE_STEP * index for index in range(len(points))], points, gate, style)
    axes.axhline(0.85, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("query")
    axes.set_ylabel("success of the next 50 queries (share)")
    axes.set_title(label(block.title("routing along the stream")), fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def band(axes: "Axes", x: list[int], samples: list[list[float]], label: str, style: dict[str, Any]) -> None:
    """Mean over seeds and, where there are several, plus and minus two standard errors."""
    columns = [torch.tensor(values or [torch.nan], dtype=torch.float64) for values in samples]
    mean = torch.tensor([float(column.mean()) for column in columns])
    axes.plot(x, mean.tolist(), label=label, **style)
    if all(len(column) > 1 for column in columns):
        error = torch.tensor([2 * float(column.std()) / len(column) ** 0.5 for column in columns])
        axes.fill_between(
            x, (mean - error).tolist(), (mean + error).tolist(), color=style["color"], alpha=0.15, linewidth=0
        )
