"""Figures of a computed report; every mark reads without colour.

Dimensions: C clusters, E experts.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.escape import label
from moe_posterior.report.places import ece_text, size
from moe_posterior.report.schema import Report
from moe_posterior.results.figures import STYLES, canvas, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Luminances far apart, and each arm a marker of its own; the first arm, the baseline, is dashed.
ARM_STYLES = tuple(
    {**STYLES[i], "marker": marker, "linewidth": 1.2} for i, marker in ((1, "o"), (0, "s"), (2, "^"), (3, "D"))
)
MOST_ARMS = len(ARM_STYLES)
HATCHES = ("", "///", "...", "xxx")
FEW = 10  # predictions in a bin, below which its accuracy is drawn faint
MAX_ANNOTATED = 200  # cells; beyond it numbers no longer fit


def reliability_diagram(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw accuracy against confidence, stored test rows beside shifted sets, with Wilson intervals and the share of predictions below.

    Bins with fewer than ten predictions are faint and off the line.

    Args:
        report: from :func:`~moe_posterior.report.evaluate_predictions`, or read back from its JSON.
        path: a PNG (or whatever the suffix says), replaced if it exists.

    Raises:
        InvalidArgumentError: more arms than can be told apart (four).
        MissingDependencyError: without matplotlib.
    """
    if len(report["arms"]) > MOST_ARMS:
        raise InvalidArgumentError(f"report must hold at most {MOST_ARMS} arms; got {report['arms']}")
    panels = list(dict.fromkeys(curve["panel"] for curve in report["reliability"]))
    figure = canvas(width=0.8 + 3.6 * len(panels), height=5.2)
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3.2, 1]}
    )
    for column, panel in enumerate(panels):
        curves = [curve for curve in report["reliability"] if curve["panel"] == panel]
        curves.sort(key=lambda curve: report["arms"].index(curve["arm"]))
        _draw_curves(axes[0, column], curves)
        _draw_shares(axes[1, column], curves)
        axes[0, column].set_title(f"{label(panel)}\nn = {size(curves[0]['n'], curves[0]['sets']).text}", fontsize=9)
        axes[1, column].set_xlabel("confidence of the top label (probability)")
    axes[0, 0].set_ylabel("accuracy (share correct)")
    axes[1, 0].set_ylabel("share of\npredictions (%)")
    save(figure, path)


def posterior_heatmap(
    mean: Tensor,  # (C, E) in [0, 1]
    count: Tensor,  # (C, E) observations
    path: str | os.PathLike[str],
    expert_names: Sequence[str] | None = None,
) -> None:
    """Draw the posterior mean competence of every expert on every cluster; small tables also show the counts.

    Args:
        mean: posterior means.
        count: observations behind each cell (successes + failures); a cell without any is hatched: it shows its prior.
        path: a PNG (or whatever the suffix says), replaced if it exists.
        expert_names: E labels; by default the indices.

    Raises:
        InvalidArgumentError: shapes that differ, or the wrong number of names.
        MissingDependencyError: without matplotlib.
    """
    if mean.ndim != 2 or mean.shape != count.shape:
        raise InvalidArgumentError(
            f"mean and count must share a shape (C, E); got {tuple(mean.shape)} and {tuple(count.shape)}"
        )
    num_clusters, num_experts = mean.shape
    if expert_names is not None and len(expert_names) != num_experts:
        raise InvalidArgumentError(f"expert_names must name {num_experts} experts; got {len(expert_names)}")
    figure = canvas(width=min(12, 3.2 + 0.62 * num_experts), height=min(9, 2.2 + 0.34 * num_clusters))
    from matplotlib.ticker import MaxNLocator  # after canvas, which explains a missing matplotlib

    axes = figure.subplots()
    image = axes.imshow(mean.cpu().double().numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="posterior mean competence")
    annotate = mean.numel() <= MAX_ANNOTATED
    axes.set_title(("number: observations; " if annotate else "") + "hatched: none yet", fontsize=9)
    axes.set_xlabel("expert")
    axes.set_ylabel("cluster")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if expert_names is not None:
        axes.set_xticks(
            range(num_experts),
            labels=[label(name) for name in expert_names],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
    _mark_cells(axes, mean, count, annotate)
    save(figure, path)


def _draw_curves(axes: "Axes", curves: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    for curve, style in zip(curves, ARM_STYLES, strict=False):
        bins = curve["bins"]
        for solid in (True, False):  # bins with few predictions stay visible, but neither join the line nor shout
            kept = [i for i, count in enumerate(bins["count"]) if count and (count >= FEW) == solid]
            confidence, accuracy, low, high = (
                [bins[name][i] for i in kept] for name in ("confidence", "accuracy", "low", "high")
            )
            below = [max(0, middle - end) for middle, end in zip(accuracy, low, strict=True)]
            above = [max(0, end - middle) for middle, end in zip(accuracy, high, strict=True)]
            look = style if solid else {**style, "linestyle": "none", "alpha": 0.3}
            shown = f"{label(curve['arm'])} (ECE {ece_text(curve)})" if solid else None
            axes.errorbar(confidence, accuracy, [below, above], label=shown, markersize=4, capsize=2, **look)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)


def _draw_shares(axes: "Axes", curves: Sequence[Mapping[str, Any]]) -> None:
    for index, (curve, style) in enumerate(zip(curves, ARM_STYLES, strict=False)):
        bins = curve["bins"]
        counts = bins["count"]
        width = 1 / len(counts) / len(curves)
        centres = [lower + (index + 0.5) * width for lower in bins["lower"]]
        shares = [100 * count / curve["n"] for count in counts]
        axes.bar(
            centres, shares, 0.9 * width, color=style["color"], edgecolor="white", linewidth=0, hatch=HATCHES[index]
        )
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)


def _mark_cells(axes: "Axes", mean: Tensor, count: Tensor, annotate: bool) -> None:
    """Hatch what nobody observed and, where there is room, write how often the rest was."""
    from matplotlib.patches import Rectangle

    for (cluster, expert), seen in ((where, count[where].item()) for where in _cells(mean)):
        if not seen:
            box = Rectangle((expert - 0.5, cluster - 0.5), 1, 1, hatch="////", fill=False, edgecolor="0.7", linewidth=0)
            axes.add_patch(box)
        elif annotate:
            ink = "white" if mean[cluster, expert] < 0.5 else "black"
            axes.text(expert, cluster, _short(seen), ha="center", va="center", fontsize=7, color=ink)


def _cells(table: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(table.shape[0]) for column in range(table.shape[1])]


def _short(count: float) -> str:
    """``1.2k`` for 1234: at most five characters in a cell."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:.3g}"
