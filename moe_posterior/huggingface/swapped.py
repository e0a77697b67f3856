"""A model whose gates were swapped: what the swap did, and the two passes over data that come after it."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn

from moe_posterior.escape import terminal
from moe_posterior.huggingface.passes import Batches, fit_clusters, warm_start


class Layer(NamedTuple):
    """One router, or one mixture whose router is not supported."""

    name: str  # in the model
    router: str  # its class
    status: str  # "swapped" by the common adapter, "special" by one of its own, "refused"
    reason: str  # why refused, else ""
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class SwappedModel:
    """What :func:`~moe_posterior.swap_gates` returns: which layers were swapped, which were left alone and why; fits and warm-starts
    those that were.

    >>> print(SwappedModel(nn.Identity(), "prior", [Layer("0.gate", "SomeRouter", "swapped", "", 8, 2)]))
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

    def fit(
        self,
        dataloader: Batches,
        max_tokens: int | None = None,
        *,
        sample_size: int = 8192,
        generator: torch.Generator | None = None,
    ) -> "SwappedModel":
        """Find every layer's clusters in one pass, with a sample of fixed size for each layer in memory.

        The model runs in evaluation mode, without gradients, routing as it does now; the belief so far is dropped, because it
        belongs to other clusters. Under torch.distributed this is a collective call, and every rank ends with rank 0's clusters.

        Args:
            dataloader: yields the model's arguments as mappings; padding, by ``attention_mask``, is left out.
            max_tokens: stop once every layer has seen this many; None (default) reads everything.
            sample_size: tokens kept for each layer, in float32 on the CPU. The default 8192 is 128 for each of 64 clusters.
            generator: a CPU generator for the sample and for k-means; None starts from seed 0.

        Raises:
            InvalidArgumentError: a layer saw fewer tokens than it has clusters, or an argument is out of range.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        fit_clusters(self.model, dataloader, max_tokens, sample_size, generator)
        return self

    def warm_start(self, dataloader: Batches, max_tokens: int | None = None) -> "SwappedModel":
        """Measure on healthy data how often each expert's share lowers its token's loss: the reference for later evidence.

        One forward and one backward a batch, through the routing weights alone: no parameter changes or gets a gradient. The
        routers choose as before the swap. Evidence so far is forgotten.

        Args:
            dataloader: yields the model's arguments as mappings; without ``labels``, a causal language model's ``input_ids`` are
                used, padding left out.
            max_tokens: stop after this many tokens; None (default) reads everything. 30,000 were enough for 64 clusters and 8 experts.

        Raises:
            NotFittedError: before :meth:`fit`. InvalidArgumentError: there are no labels, or the model returns no loss.
        """
        warm_start(self.model, dataloader, max_tokens)
        return self

    def __str__(self) -> str:
        rows = [["layer", "router", "status", "experts", "top_k", "reason"]]
        for layer in self.layers:
            counts = ("", "") if layer.status == "refused" else (str(layer.num_experts), str(layer.top_k))
            rows.append([terminal(cell) for cell in (layer.name, layer.router, layer.status, *counts, layer.reason)])
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i in (3, 4) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)
