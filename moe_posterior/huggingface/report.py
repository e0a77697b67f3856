"""What a swap did, and the two passes over data that come after it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn


class Layer(NamedTuple):
    """One router, or one mixture whose router is not understood."""

    name: str  # in the model
    router: str  # its class
    status: str  # "swapped" by the common adapter, "special" by one of its own, "refused"
    reason: str  # why refused, else ""
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class SwapReport:
    """Which layers of a model were swapped, which were left alone and why; fits and warm-starts those that were.

    >>> print(SwapReport(nn.Identity(), "prior", [Layer("0.gate", "SomeRouter", "swapped", "", 8, 2)]))
    layer   router      status   experts  top_k  reason
    0.gate  SomeRouter  swapped        8      2
    """

    model: nn.Module = field(repr=False)
    mode: Literal["prior", "replace"]
    layers: list[Layer]

    @property
    def swapped(self) -> list[Layer]:
        """The layers that have a gate now."""
        return [layer for layer in self.layers if layer.status != "refused"]

    @property
    def refused(self) -> list[Layer]:
        """The layers that were left alone."""
        return [layer for layer in self.layers if layer.status == "refused"]

    def __str__(self) -> str:
        rows = [("layer", "router", "status", "experts", "top_k", "reason")]
        for layer in self.layers:
            counts = ("", "") if layer.status == "refused" else (str(layer.num_experts), str(layer.top_k))
            rows.append((layer.name, layer.router, layer.status, *counts, layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i in (3, 4) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)
