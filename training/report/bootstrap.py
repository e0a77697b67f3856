"""Paired bootstrap of statistics that are functions of column sums.

Dimensions: n rows, R resamples, M columns. Accuracy, mean scores and binned calibration errors all depend on the rows through
sums alone, so a resample is a row of counts, and all statistics of all resamples are one matrix product.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError

MAX_COUNTS = 2**21  # entries of a chunk of counts: 16 MB, whatever n and R are (one resample at least)


def resample_counts(num_rows: int, resamples: int, seed: int) -> Iterator[Tensor]:  # chunks (r, n), r summing to R
    """How often each row was drawn with replacement, in chunks of bounded size; the same for the same n and seed.

    >>> counts = torch.cat(list(resample_counts(5, 3, seed=0)))
    >>> counts.shape, counts.sum(1).tolist()
    (torch.Size([3, 5]), [5.0, 5.0, 5.0])
    """
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, MAX_COUNTS // max(num_rows, 1))
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), num_rows)
        draws = torch.randint(num_rows, shape, generator=generator)
        ones = torch.ones((), dtype=torch.float64).expand(shape)
        yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, draws, ones)


def bootstrap_sums(
    columns: Sequence[Tensor],  # each (n, M_i) float64, row i the same example in all
    resamples: int,
    seed: int = 0,
) -> list[Tensor]:  # each (R, M_i)
    """Column sums of every resample; all tensors see the same resamples, so differences between them are paired.

    Args:
        columns: at least one tensor; all have the same n ≥ 1.
        resamples: R.
        seed: of the draws; the global generator is not touched.

    Raises:
        InvalidArgumentError: no rows, unequal numbers of rows, or no resamples.

    >>> [sums] = bootstrap_sums([torch.ones(4, 1, dtype=torch.float64)], resamples=3)
    >>> sums.tolist()
    [[4.0], [4.0], [4.0]]
    """
    lengths = {len(block) for block in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgumentError(f"columns must share one positive number of rows; got {sorted(lengths)}")
    if resamples < 1:
        raise InvalidArgumentError(f"resamples must be at least 1; got {resamples}")
    # One product a tensor, not one wide product: there, equal columns may be summed in another order, and two arms that
    # predict the same would differ by 1e-17 with an interval that excludes 0.
    chunks = [[counts @ block for block in columns] for counts in resample_counts(len(columns[0]), resamples, seed)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]
