"""Trajectories and recoveries as figures."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_posterior.benchmarks.records import Record
from moe_posterior.benchmarks.routing.evaluate import CURVE_STEP
from moe_posterior.benchmarks.routing.stream import CHECKPOINTS
from moe_posterior.benchmarks.routing.tables import Block, blocks_of
from moe_posterior.escape import label
from moe_posterior.results.figures import STYLES, band, canvas, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = ("posterior", "softmax", "expert threshold", "discounted ucb", "posterior of the paper")


def draw(records: Iterable[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw trajectories of the degraded expert (B) and success along the stream, for whatever the records hold.

    Returns:
        The files written, ``<benchmark>-<environment>-<what>.png`` in ``folder``, which is created if missing.

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


def _trajectories(block: Block) -> "Figure":
    """Table 6 as a figure: affected and healthy classes, one panel per gate, with a band over seeds."""
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
