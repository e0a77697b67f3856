"""Add evidence to a router's logits inside its own forward, so that everything after them is still the router's own code.

Dimensions: T tokens, E experts, W logits per token (at least E), k experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (
    functional.linear,
    torch.matmul,
    torch.mm,
    torch.addmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
    Tensor.addmm,
)
_CHOICES = (torch.topk, Tensor.topk)


class LogitsInterceptor(TorchFunctionMode):
    """While active, add ``bias`` to the result of every matrix product of shape (T, W): a router computes exactly one.

    Some routers add a correction to the scores for choosing only (DeepSeek-V3's load balancing). An expert that evidence
    speaks against would keep that advantage, so its correction fades, as its odds do, to the lowest correction of all.

    Args:
        num_tokens, width: T and W.
        bias: (T, W) to be added, below 0 where evidence speaks against an expert; None only counts the products.
        correction: (W,), what the router adds to its scores before choosing; None if nothing.
    """

    def __init__(self, num_tokens: int, width: int, bias: Tensor | None, correction: Tensor | None) -> None:
        super().__init__()
        self.size, self.width, self.bias = num_tokens * width, width, bias
        self.products = 0  # seen so far
        self.over = False  # set once the router has chosen: products after that are not its logits
        self.handicap: Tensor | None = None  # (T, W), at most 0
        if bias is not None and correction is not None:
            lost = 1 - bias.clamp(max=0.0).exp()
            self.handicap = lost * (correction.min() - correction.detach().float())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.over:
            return func(*args, **(kwargs or {}))
        if self.handicap is not None and func in _CHOICES and self._matches(args[0] if args else None):
            args = (args[0] + self.handicap.reshape(args[0].shape).to(args[0].dtype), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and self._matches(result):
            self.products += 1
            if self.bias is not None:
                result = result + self.bias.reshape(result.shape).to(result.dtype)
        return result

    def _matches(self, tensor: object) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.ndim >= 2
            and tensor.shape[-1] == self.width
            and tensor.numel() == self.size
        )
