"""Which bin a value belongs to: one convention for every binned figure in this library.

B bins of equal width have the edges k / B. A bin holds its lower edge and not its upper one, except the last, which holds 1 too; so a
value on an inner edge belongs to the bin above, and no bin is made for the confidence 1.0 alone. Bins of equal mass do the same with
edges taken from the data. Values and edges are compared in float64 whatever the input: what counts is the number that is stored, and
the float32 nearest to 0.7 lies below 0.7.
"""

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, floats
from moe_posterior.errors import InvalidArgumentError

MOST_BINS = 1 << 20  # edges of a million bins take 8 MB; more is a typing error


def place(values: Tensor, edges: Tensor) -> Tensor:  # (...), (B − 1,) rising inner edges -> (...) int64 in [0, B)
    """Bin of each value between inner edges; a value on an edge belongs to the bin above it.

    >>> place(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5])).tolist()
    [0, 1, 1]
    """
    return torch.bucketize(values.double().contiguous(), edges.double(), right=True)


def bin_edges(n_bins: int) -> Tensor:  # (B + 1,) float64
    """Edges of bins of equal width on [0, 1], each the float64 nearest to k / B (``linspace`` is off by a rounding at some).

    >>> bin_edges(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return torch.arange(n_bins + 1, dtype=torch.float64) / n_bins


@as_declared
def bin_indices(confidence: Tensor, n_bins: int) -> Tensor:  # (...) -> (...) int64 in [0, n_bins)
    """Bin of equal width of each confidence: the lower edge belongs to a bin, and 1.0 to the last one.

    >>> bin_indices(torch.tensor([0.0, 0.24, 0.25, 1.0]), 4).tolist()
    [0, 0, 1, 3]
    """
    found = _confidences(confidence)
    n_bins = count("n_bins", n_bins, most=MOST_BINS)
    return place(found, bin_edges(n_bins)[1:-1].to(found.device))


@as_declared
def equal_mass_bins(confidence: Tensor, n_bins: int) -> Tensor:  # (N,) -> (N,) int64 in [0, n_bins)
    """Bin of each confidence when the bins hold equal numbers of predictions, ties together.

    Splitting a tie would make the error depend on the order of the rows, so a bin may come out larger, and another
    empty. Bin sizes otherwise differ by at most one.

    >>> equal_mass_bins(torch.tensor([0.9, 0.1, 0.2, 0.8]), 2).tolist()
    [1, 0, 0, 1]
    """
    confidence = _confidences(confidence)
    n_bins = count("n_bins", n_bins, most=MOST_BINS)
    if confidence.ndim != 1:
        raise InvalidArgumentError(f"confidence must be of shape (N,); got shape {tuple(confidence.shape)}")
    if not len(confidence):
        return torch.zeros(0, dtype=torch.int64, device=confidence.device)
    chunks = confidence.double().sort().values.tensor_split(min(n_bins, len(confidence)))
    firsts = [chunk[0] for chunk in chunks[1:]]
    return place(confidence, torch.stack(firsts) if firsts else confidence.new_zeros(0))


def _confidences(confidence: Tensor) -> Tensor:
    found = floats("confidence", confidence)
    if bool(found.isnan().any()):
        raise InvalidArgumentError("confidence must be a number to belong to a bin; got NaN")
    return found
