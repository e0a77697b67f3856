"""Built-in feed-forward experts, their weights stacked so that one grouped matrix product can run them all.

Dimensions: N rows, D hidden size, F intermediate size, E experts.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.dispatch import split_by_expert
from moe_posterior.errors import InvalidArgumentError

Activation = Literal["swiglu", "gelu"]
Implementation = Literal["auto", "loop", "grouped_mm"]


class ExpertsFFN(nn.Module):
    """E feed-forward networks ``D -> F -> D``, SwiGLU or GELU, without biases.

    Args:
        num_experts, hidden_size, intermediate_size: E, D, F.
        activation: ``"swiglu"`` (default; a gate and an up projection, as in Mixtral) or ``"gelu"``.
        implementation: ``"loop"`` multiplies expert by expert; ``"grouped_mm"`` runs all experts in one call; ``"auto"`` (default)
            takes grouped_mm on an accelerator if D and F fit its alignment (multiples of 16 bytes), else the loop.
        generator: source of the initial weights, uniform in ±1/sqrt(fan in) like ``nn.Linear``; None uses torch's default one.

    Raises:
        InvalidArgumentError: a size below one or an unknown option.

    >>> experts = ExpertsFFN(num_experts=3, hidden_size=8, intermediate_size=16)
    >>> experts(torch.ones(5, 8), torch.tensor([2, 0, 3])).shape  # rows sorted by expert, and how many each has
    torch.Size([5, 8])
    """

    @as_declared
    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = "swiglu",
        implementation: Implementation = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        num_experts, hidden_size, intermediate_size = (validation.count(name, size) for name, size in sizes.items())
        if activation not in get_args(Activation):
            raise InvalidArgumentError(f"activation must be one of {list(get_args(Activation))}; got {activation!r}")
        if implementation not in get_args(Implementation):
            raise InvalidArgumentError(
                f"implementation must be one of {list(get_args(Implementation))}; got {implementation!r}"
            )
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.implementation = activation, implementation
        widening = 2 if activation == "swiglu" else 1
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, widening * intermediate_size))  # (E, D, F or 2F)
        self.down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))  # (E, F, D)
        for weight in (self.up, self.down):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def __len__(self) -> int:
        return self.num_experts

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:  # (N, D), (E,) -> (N, D)
        """Run each expert on its rows: the first ``counts[0]`` belong to expert 0, and so on."""
        grouped = self.implementation == "grouped_mm" or (
            self.implementation == "auto" and rows.device.type != "cpu" and self._aligned(rows.dtype)
        )
        return self._grouped(rows, counts) if grouped else self._loop(rows, counts)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation!r}"
        )

    def _aligned(self, dtype: torch.dtype) -> bool:
        """grouped_mm wants rows of a multiple of 16 bytes."""
        return all(
            size * dtype.itemsize % 16 == 0 for size in (self.hidden_size, self.up.shape[2], self.intermediate_size)
        )

    def _activate(self, projected: Tensor) -> Tensor:  # (n, F or 2F) -> (n, F)
        if self.activation == "gelu":
            return F.gelu(projected)
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _loop(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = [
            self._activate(part @ self.up[expert]) @ self.down[expert]
            for expert, part in enumerate(split_by_expert(rows, counts))
        ]
        return torch.cat(parts)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        offsets = counts.cumsum(0).to(torch.int32)
        hidden = self._activate(F.grouped_mm(rows, self.up, offs=offsets))
        return F.grouped_mm(hidden, self.down, offs=offsets)
