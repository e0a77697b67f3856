"""How evidence fades by a half-life: an observation of a cell counts less for each later one of the same cell.

Dimensions: M observations. The evidence of a cell that is not observed, and every prior, stay as they are.
"""

import torch
from torch import Tensor


def retention(half_life: float) -> float:
    """The factor by which one more observation of a cell discounts the earlier ones: ``2^(-1/half_life)``."""
    return 2.0 ** (-1.0 / half_life)


def discounts(
    cells: Tensor,  # (M,) int64
    fading: float,
    weight: Tensor | None = None,  # (M,)
) -> Tensor:  # (M,) float64
    """How much of each observation of a batch remains once the batch has been observed row by row.

    ``fading`` is the :func:`retention` of one observation; one of part weight fades the others by that part.

    >>> discounts(torch.tensor([3, 5, 3, 3]), fading=0.5).tolist()
    [0.25, 1.0, 0.5, 1.0]
    """
    return fading ** later_in_cell(cells, weight).to(torch.float64)


def later_in_cell(
    cells: Tensor, weight: Tensor | None = None
) -> Tensor:  # (M,) int64, (M,) -> (M,) int64, or float64 by weight
    """For every observation, how many later ones in the batch fall into the same cell; with a weight, what those weigh together.

    >>> later_in_cell(torch.tensor([3, 5, 3, 3])).tolist()
    [2, 0, 1, 0]
    """
    ordered, order = cells.sort(stable=True)
    if weight is not None:
        return _later_weight(ordered, order, weight)
    positions = torch.arange(len(cells), device=cells.device)
    last = torch.searchsorted(ordered, ordered, right=True) - 1  # where the run of equal cells ends
    ranks = torch.empty_like(cells)
    ranks[order] = last - positions
    return ranks


def _later_weight(ordered: Tensor, order: Tensor, weight: Tensor) -> Tensor:  # 3 x (M,) -> (M,) float64
    total = weight[order].cumsum(0)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    later = torch.empty_like(total)
    later[order] = (total[last] - total).clamp(min=0)
    return later
