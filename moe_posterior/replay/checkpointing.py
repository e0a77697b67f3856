"""Recognise forwards that activation checkpointing runs again inside the backward pass.

Dimensions: N tokens, D hidden size.
"""

import torch
from torch import Tensor

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def signature(hidden: Tensor) -> Tensor:  # (N, D) -> () int64
    """A checksum of hidden states over their bits and positions; it stays on the device, so that nothing waits for it.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> signature(rows) == signature(rows.clone()), signature(rows) == signature(rows.flip(0))
    (tensor(True), tensor(False))
    """
    bits = hidden.detach().contiguous().view(_INTEGER[hidden.element_size()])
    columns, rows = (bits.sum(dim=dim, dtype=torch.int64) for dim in (0, 1))
    place = torch.arange(1, max(bits.shape) + 1, device=bits.device)
    return (columns * place[: len(columns)]).sum() + 1_000_003 * (rows * place[: len(rows)]).sum()


def in_backward() -> bool:
    """Whether a backward pass is running: a forward in it is one that activation checkpointing runs again."""
    return torch._C._current_graph_task_id() != -1


def may_run_again() -> bool:
    """Whether activation checkpointing may run the current forward again.

    Reentrant checkpointing runs forwards without gradients, as inference does; the other kind hooks what autograd saves.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
