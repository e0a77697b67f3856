"""One belief on all ranks of torch.distributed: new evidence is summed, and a mistake on one rank is refused by all.

Dimensions: U cells that were observed.
"""

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError


def agree(mistake: InvalidArgumentError | None, device: torch.device) -> None:
    """Raise InvalidArgumentError where another rank has made a mistake: the others would wait for it in the next collective for ever.

    A rank with a mistake of its own returns, and raises that.
    """
    mistakes = torch.tensor(float(mistake is not None), device=device)
    torch.distributed.all_reduce(mistakes)
    if mistake is None and mistakes > 0:
        raise InvalidArgumentError("another rank's outcomes were refused, so nothing has changed on this one")


def summed(
    cells: Tensor, sums: Tensor, num_cells: int
) -> tuple[Tensor, Tensor]:  # (U,), (3 or 4, U) -> the same of all ranks
    """The cells that any rank observed, and what all ranks together observed there."""
    dense = sums.new_zeros(len(sums), num_cells)
    dense[:, cells] = sums
    torch.distributed.all_reduce(dense)
    cells = (dense[2] > 0).nonzero().flatten()
    return cells, dense[:, cells]
