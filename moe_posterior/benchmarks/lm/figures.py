"""Recovery, return of a repaired expert, and training from scratch as figures."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_posterior.benchmarks.lm.experiment import METHODS, SCRATCH
from moe_posterior.benchmarks.lm.scratch import ARMS
from moe_posterior.benchmarks.lm.shares import CHECKPOINTS
from moe_posterior.benchmarks.lm.tables import Measured
from moe_posterior.benchmarks.records import Record
from moe_posterior.results.figures import STYLES, band, canvas, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST = -1.5  # shared outcomes fall far below it and would flatten the rest


def draw(records: Iterable[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure that the records have data for into ``folder``, which is created if missing.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    measured, folder = Measured(records), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in {"recovery": recovery, "repair": repair, "scratch": from_scratch}.items():
        figure = make(measured)
        if figure is not None:
            written.append(save(figure, folder / f"lm-{name}.png"))
    return written


def recovery(measured: Measured) -> "Figure | None":
    """Share of the recoverable loss against tokens seen since the damage."""
    return _over_tokens(
        measured.mean_shares,
        "tokens since the damage",
        "share of the recoverable loss",
        f"recovery after a damage, cut at {LOWEST}",
    )


def repair(measured: Measured) -> "Figure | None":
    """Traffic of the repaired experts against tokens seen since the repair."""
    return _over_tokens(
        measured.traffic, "tokens since the repair", "traffic, 1 = before the damage", "return of repaired experts"
    )


def _over_tokens(
    values_of: Callable[[str, int], dict[int, float]], across: str, up: str, title: str
) -> "Figure | None":
    """One line per method over the checkpoints, with a band over seeds."""
    lines = {method.name: [list(values_of(method.name, n).values()) for n in CHECKPOINTS] for method in METHODS}
    lines = {name: points for name, points in lines.items() if all(points)}
    if not lines:
        return None
    figure = canvas(6.4, 3.8)
    axes = figure.subplots()
    for (name, points), style in zip(lines.items(), STYLES, strict=False):
        band(axes, list(CHECKPOINTS), points, name, style)
    for level in (0, 1):
        axes.axhline(level, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=512, linscale=0.7)
    axes.set_xlim(0, CHECKPOINTS[-1])
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST))
    axes.set_xticks(CHECKPOINTS, [f"{n:,}" for n in CHECKPOINTS], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def from_scratch(measured: Measured) -> "Figure | None":
    """Validation loss during training, and every expert's share of the traffic at the end."""
    arms = [arm for arm in ARMS if measured.get(SCRATCH, arm, "curve_loss")]
    if not arms:
        return None
    figure = canvas(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    for arm, style in zip(arms, STYLES, strict=False):
        curves = list(measured.get(SCRATCH, arm, "curve_loss").values())
        steps = next(iter(measured.get(SCRATCH, arm, "curve_step").values()))
        band(left, steps, [list(column) for column in zip(*curves, strict=True)], arm, style)
        ranked = [
            sorted((share * len(layer) for share in layer), reverse=True)
            for layers in measured.get(SCRATCH, arm, "shares").values()
            for layer in layers
        ]
        band(right, _ranks(ranked), [list(column) for column in zip(*ranked, strict=True)], arm, style)
    left.set_xlabel("training step")
    left.set_ylabel("validation loss (nats a byte)")
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("expert, by rank within its layer")
    right.set_ylabel("traffic, 1 = fair share")
    right.set_ylim(bottom=0)
    return figure


def _ranks(ranked: Sequence[Sequence[float]]) -> list[int]:
    return list(range(1, len(ranked[0]) + 1))
