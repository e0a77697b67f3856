"""Weight experts that were chosen elsewhere by a router's own rule; gates have :meth:`~moe_posterior.gates.Gate.reweigh`.

Dimensions: N tokens, E experts, k experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ForcedChoice(TorchFunctionMode):
    """While active, the top-k by which a router chooses returns the recorded experts and their values; the rest is unchanged.

    What the router does with the values, normalisation and scaling, follows its own rule, with gradient.

    >>> with ForcedChoice(torch.tensor([[2, 0]]), num_experts=3):
    ...     torch.tensor([[0.1, 0.7, 0.2]]).topk(2)
    torch.return_types.topk(
    values=tensor([[0.2000, 0.1000]]),
    indices=tensor([[2, 0]]))
    """

    def __init__(self, expert_indices: Tensor, num_experts: int) -> None:
        super().__init__()
        self.expert_indices, self.num_experts = expert_indices, num_experts
        self.choices = 0  # made so far

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or not self._is_choice(args, kwargs):
            return func(*args, **kwargs)
        self.choices += 1
        indices = self.expert_indices.reshape(*args[0].shape[:-1], -1)
        return torch.return_types.topk((args[0].gather(-1, indices), indices))

    def _is_choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a top-k is over all experts and of the recorded k, not one that picks groups or the best within each group."""
        scores, (num_tokens, top_k) = args[0], self.expert_indices.shape
        wanted = args[1] if len(args) > 1 else kwargs.get("k")
        whole = scores.shape[-1] >= self.num_experts and scores.numel() == num_tokens * scores.shape[-1]
        return whole and wanted == top_k
