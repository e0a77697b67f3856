"""One function a task picks the backend that runs it: ``auto`` falls back, an explicit backend that cannot run raises."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import reference

Backend = Literal["auto", "eager"]
_ROUTE_BY_TABLE: dict[str, Callable[..., tuple[reference.Assignment, reference.Selection, Tensor]]] = {
    "eager": reference.route_by_table,
}


def route_by_table(
    hidden: Tensor,  # (N, D)
    centroids: reference.Centroids,
    topk_indices: Tensor,  # (C, k)
    topk_weights: Tensor,  # (C, k)
    topk_scores: Tensor,  # (C, k)
    *,
    backend: Backend = "auto",
) -> tuple[reference.Assignment, reference.Selection, Tensor]:  # weights (N, k)
    """Nearest centroid, then that cluster's row of the tables, by the chosen backend.

    Args:
        backend: ``"auto"`` takes the fastest that runs here; ``"eager"`` is plain torch.

    Raises:
        InvalidArgumentError: the backend is unknown or cannot run here.
    """
    chosen = "eager" if backend == "auto" else backend
    if chosen not in _ROUTE_BY_TABLE:
        raise InvalidArgumentError(f"backend must be one of {['auto', *_ROUTE_BY_TABLE]}; got {backend!r}")
    return _ROUTE_BY_TABLE[chosen](hidden, centroids, topk_indices, topk_weights, topk_scores)
