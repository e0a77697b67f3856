"""A token in several clusters at once: the nearest few of one or more k-means runs, each with a share.

Dimensions: N tokens, D hidden size, M clusterings of C clusters each, H neighbours in each, J = M H memberships, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_posterior.clustering import Clusterer
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import reference
from moe_posterior.posterior import BetaPosterior
from moe_posterior.precision import FixedPrecision

_CHUNK = 16_384  # rows measured at a time, as in a fit


class Memberships(NamedTuple):
    """Rows of the belief that speak for each token, and how much."""

    ids: Tensor  # (N, J) int64: cluster c of clustering m is row m C + c
    shares: Tensor  # (N, J) float32, in [0, 1]; 1 together in each clustering, exactly so with one neighbour


class SeveralClusters(FixedPrecision):
    """Assigns a token to several clusters.

    In each clustering the token belongs to its ``neighbours`` nearest clusters, with shares softmax(-d² / (softness · s)), d its
    distance and s the mean squared distance of the fitted tokens to their own centroid. So ``softness`` has no unit: between two
    centroids whose squared distances differ by ``softness · s`` the nearer one counts e times as much.

    Args:
        num_clusters, hidden_size: C, D.
        clusterings: M; the first is the gate's own clusterer, and M - 1 more are held here.
        neighbours: H, from 1 to C.
        softness: positive.

    Raises:
        InvalidArgumentError: a number out of range.
    """

    scale: Tensor  # (M,) float32, s of each clustering; NaN until fitted

    def __init__(self, num_clusters: int, hidden_size: int, clusterings: int, neighbours: int, softness: float) -> None:
        super().__init__()
        if clusterings < 1:
            raise InvalidArgumentError(f"clusterings must be at least 1; got {clusterings}")
        if not 1 <= neighbours <= num_clusters:
            raise InvalidArgumentError(f"neighbours must lie in [1, num_clusters={num_clusters}]; got {neighbours}")
        if not 0.0 < softness < float("inf"):
            raise InvalidArgumentError(f"softness must be positive and finite; got {softness}")
        self.clusterings, self.neighbours, self.softness = clusterings, neighbours, softness
        self.num_clusters = num_clusters
        self.others = nn.ModuleList(Clusterer(num_clusters, hidden_size) for _ in range(clusterings - 1))
        self.register_buffer("scale", torch.full((clusterings,), torch.nan, dtype=torch.float32))

    @property
    def width(self) -> int:
        """J, memberships of a token."""
        return self.clusterings * self.neighbours

    @property
    def fitted(self) -> bool:
        """Whether all clusterings have centroids and a scale."""
        return bool(torch.isfinite(self.scale).all()) and all(other.fitted for other in self.others)

    @torch.no_grad()
    def fit(self, first: Clusterer, hidden: Tensor, generator: torch.Generator | None) -> None:  # (..., D)
        """Find the other clusterings, each from its own draws, and the scale of all; ``first`` is fitted already."""
        points = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        generator = torch.Generator().manual_seed(1) if generator is None else generator
        for other in self.others:
            other.fit(points, generator=generator)  # type: ignore[operator]
        self._measure(first, points)

    @torch.no_grad()
    def adopt(self, first: Clusterer, others: Sequence[Clusterer], hidden: Tensor) -> None:  # (N, D)
        """In place of :meth:`fit`: take clusterings that were found elsewhere, and measure their scale on these tokens."""
        for own, other in zip(self.others, others, strict=True):
            own.load_state_dict(other.state_dict())
        self._measure(first, hidden.float())

    def _measure(self, first: Clusterer, points: Tensor) -> None:
        means = [
            torch.cat([clusterer(rows).distance for rows in points.split(_CHUNK)]).double().square().mean()
            for clusterer in (first, *self.others)
        ]
        scale = torch.stack(means).to(self.scale)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(scale, src=0)
        self.scale.copy_(scale)

    @torch.no_grad()
    def forward(self, first: Clusterer, hidden: Tensor) -> tuple[reference.Assignment, Memberships]:  # (N, D)
        """The nearest cluster of the first clustering with its distance, and all memberships.

        A row that holds NaN or inf belongs to cluster 0 of each clustering, at distance inf.
        """
        own = first(hidden)
        ids, shares = [], []
        for place, clusterer in enumerate((first, *self.others)):
            near, share = self._nearest(clusterer, self.scale[place], hidden, own if place == 0 else None)
            ids.append(near + place * self.num_clusters)
            shares.append(share)
        broken = torch.isinf(own.distance)[:, None]
        zeros = torch.arange(self.clusterings, device=hidden.device).repeat_interleave(self.neighbours)
        members = torch.where(broken, zeros * self.num_clusters, torch.cat(ids, dim=1))
        even = torch.full((), 1 / self.neighbours, dtype=torch.float64, device=hidden.device)
        return own, Memberships(members, torch.where(broken, even, torch.cat(shares, dim=1)).float())

    def _nearest(
        self, clusterer: Clusterer, scale: Tensor, hidden: Tensor, own: reference.Assignment | None
    ) -> tuple[Tensor, Tensor]:  # 2 x (N, H)
        if self.neighbours == 1:
            ids = (clusterer(hidden) if own is None else own).cluster_ids[:, None]
            return ids, torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
        rows, points = hidden.float(), clusterer.prepared
        near = (rows @ points.directions.T - points.offsets).topk(self.neighbours, dim=1).indices
        squared = torch.stack([(rows - points.points[column]).square().sum(dim=1) for column in near.unbind(1)], dim=1)
        # An infinite width, of points that all lie on their centroids, would divide 0 by 0.
        width = (self.softness * scale).double().clamp(min=torch.finfo(torch.float32).tiny)
        return near, torch.softmax(-squared.double() / width, dim=1)

    def extra_repr(self) -> str:
        return f"clusterings={self.clusterings}, neighbours={self.neighbours}, softness={self.softness:g}"


def mixed(belief: BetaPosterior, members: Memberships) -> tuple[Tensor, Tensor]:  # -> 2 x (N, E) float64
    """Alpha and beta of every expert for each token: those of its clusters by its shares, averaged over the clusterings.

    The pseudo-counts are averaged, not the bounds: a token half-way between a well-known and an unknown cluster is half known.
    """
    rows, width = members.ids.shape
    tables = belief.parameters_of(members.ids.reshape(-1))
    alpha, beta = (
        _sum(table.view(rows, width, belief.num_experts), members.shares) / belief.clusterings for table in tables
    )
    return alpha, beta


def mixed_at(
    belief: BetaPosterior, members: Memberships, expert_indices: Tensor
) -> tuple[Tensor, Tensor]:  # 2 x (N, k)
    """:func:`mixed` of the chosen experts alone, the same bits."""
    tables = belief.parameters_at(members.ids[:, :, None], expert_indices[:, None])  # (N, J, k)
    alpha, beta = (_sum(table, members.shares) / belief.clusterings for table in tables)
    return alpha, beta


def _sum(values: Tensor, shares: Tensor) -> Tensor:  # (N, J, F), (N, J) -> (N, F)
    """Added one after the other: the same bits alone, in a batch, and when an audit log is read."""
    weighted = values * shares.to(values.dtype)[:, :, None]
    total = weighted[:, 0].clone()
    for place in range(1, weighted.shape[1]):
        total += weighted[:, place]
    return total
