"""Query classes: the nearest of ``num_clusters`` centroids, found by k-means.

Dimensions: N tokens, D hidden size, C clusters.

The fit runs in torch where the hidden states are, with an explicit generator: it must serve a model on a GPU without copying
its activations to the host, and ``import moe_posterior`` needs torch and einops alone. scikit-learn's k-means is its oracle in
the tests.
"""

from typing import Any

import torch
from torch import Tensor

from moe_posterior import kmeans
from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.kernels import dispatch, reference
from moe_posterior.precision import FixedPrecision


class Clusterer(FixedPrecision):
    """Assign tokens to the nearest of C centroids.

    The state is two float32 buffers, which keep their dtype through casts and travel in the state_dict: ``centroids`` (C, D) and
    ``radius`` (C,), the 99th percentile of the distances of a cluster's members at the fit: farther than that is unusual.

    Args:
        num_clusters: C, at least 1.
        hidden_size: D, at least 1.
        outliers: if True, tokens outside their cluster's radius are assigned to one more class, with index C: what is unlike
            anything seen is then learned about together, instead of being mistaken for the nearest known thing.
        levels: 1 (default) compares a token with all centroids, exactly. 2 groups them, and compares a token of a float32 batch on
            a CPU with about sqrt(2 C) group means, then with C / 8 candidates of the nearest group: at hundreds of clusters several
            times faster. The id is always valid, but the nearest cluster is missed where it lies outside the candidates or leads
            by less than bfloat16 resolves: for a fraction of a percent of tokens close to one of 512 centroids, for a tenth of
            those that lie between clusters or have few to choose from. Everywhere else, on a GPU and for a single token too, 2 is as 1.

    >>> points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    >>> clusterer = Clusterer(num_clusters=2, hidden_size=2).fit(points)
    >>> ids = clusterer(points).cluster_ids
    >>> bool(ids[0] == ids[1]), bool(ids[2] == ids[3]), bool(ids[0] == ids[2])
    (True, True, False)
    """

    centroids: Tensor  # (C, D) float32; NaN until fitted
    radius: Tensor  # (C,) float32; NaN until fitted
    directions: Tensor  # (C, D) float32, derived
    offsets: Tensor  # (C,) float32, derived
    rounded: Tensor  # (C, D) bfloat16, derived
    reach: Tensor  # () float32, derived

    @as_declared
    def __init__(self, num_clusters: int, hidden_size: int, *, outliers: bool = False, levels: int = 1) -> None:
        super().__init__()
        num_clusters = validation.count("num_clusters", num_clusters)
        hidden_size = validation.count("hidden_size", hidden_size)
        if levels not in (1, 2):
            raise InvalidArgumentError(f"levels must be 1 or 2; got {levels}")
        self.num_clusters, self.hidden_size, self.outliers, self.levels = num_clusters, hidden_size, outliers, levels
        self._levels: reference.Levels | None = None
        self._fitted = False
        self.register_buffer("centroids", torch.full((num_clusters, hidden_size), torch.nan, dtype=torch.float32))
        self.register_buffer("radius", torch.full((num_clusters,), torch.nan, dtype=torch.float32))
        self.register_buffer("directions", self.centroids.clone(), persistent=False)
        self.register_buffer("offsets", self.radius.clone(), persistent=False)
        self.register_buffer("rounded", self.centroids.bfloat16(), persistent=False)
        self.register_buffer("reach", self.radius.new_full((), torch.nan), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def forward(self, hidden: Tensor) -> reference.Assignment:  # (N, D) -> (N,), (N,)
        """Nearest centroid and Euclidean distance of every token.

        A row that holds NaN or inf goes to cluster 0 at distance inf.

        Raises:
            NotFittedError: before :meth:`fit` or :meth:`set_centroids`.
            InvalidArgumentError: ``hidden`` is not (N, D).
        """
        self.require_fitted()
        if not isinstance(hidden, Tensor) or hidden.is_complex() or hidden.is_meta or hidden.layout != torch.strided:
            raise InvalidArgumentError(
                f"hidden must be a real tensor, dense and with values, of shape "
                f"(N, {self.hidden_size}); got {validation.described(hidden)}"
            )
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise InvalidArgumentError(f"hidden must have shape (N, {self.hidden_size}); got {tuple(hidden.shape)}")
        return dispatch.assign(hidden, self.prepared)

    @property
    def prepared(self) -> reference.Centroids:
        """The centroids as the kernels take them."""
        radius = self.radius if self.outliers else None
        return reference.Centroids(
            self.centroids, self.directions, self.offsets, radius, self.rounded, self.reach, self._levels
        )

    @property
    def prepared_for_one(self) -> tuple[Tensor, ...]:
        """Points, directions, offsets and, with ``outliers``, radius: what one token is compared with (``kernels/cpu.py``).

        Read from the table of buffers: nn.Module's attribute access would take half a microsecond for each.
        """
        own: dict[str, Any] = self._buffers
        centroids = own["centroids"], own["directions"], own["offsets"]
        return (*centroids, own["radius"]) if self.outliers else centroids

    @property
    def num_classes(self) -> int:
        """How many ids there are, C and one more with ``outliers``."""
        return self.num_clusters + self.outliers

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the centroids: as before the first fit."""
        for name in ("centroids", "radius", "directions", "offsets", "rounded", "reach"):
            getattr(self, name).fill_(torch.nan)
        self._levels, self._fitted = None, False

    @property
    def fitted(self) -> bool:
        """Whether there are centroids, also ones that arrived by a broadcast of buffers."""
        if not self._fitted and self.centroids.device.type != "meta" and bool(torch.isfinite(self.centroids).all()):
            self._refresh()
        return self._fitted

    def require_fitted(self) -> None:
        """Raise NotFittedError unless there are centroids."""
        if not self.fitted:
            raise NotFittedError(
                f"these {self.num_clusters} clusters have no centroids yet: call fit(hidden) on representative hidden states "
                f"of shape (N, {self.hidden_size}), N ≥ {self.num_clusters}, or load a fitted state_dict"
            )

    @torch.no_grad()
    @as_declared
    def fit(
        self,
        hidden: Tensor,  # (..., D)
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        max_iterations: int = 50,
        tolerance: float = 1e-4,
    ) -> "Clusterer":
        """Find the centroids: k-means++ seeding, then Lloyd's iterations or mini-batches.

        Every cluster owns at least one of the points after the fit. Under torch.distributed this is a collective call, and all
        ranks end with rank 0's clusters; give each a sample of the whole data.

        Args:
            hidden: at least C distinct finite rows; float32 is used inside.
            generator: a CPU generator; None starts from seed 0, so that a fit is reproducible by default.
            batch_size: None runs Lloyd's iterations over all rows; a number runs ``max_iterations`` passes of mini-batch k-means
                (Sculley 2010), for more rows than fit the time.
            max_iterations: upper limit of passes over the rows.
            tolerance: stop once no centroid moved farther than this, in units of the data's overall standard deviation.

        Raises:
            InvalidArgumentError: wrong shape, non-finite rows, or fewer distinct rows than clusters.

        Source: Arthur & Vassilvitskii 2007 (seeding), Lloyd 1982.
        """
        points = self._validated_points(hidden)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        centroids = kmeans.seed_centroids(points, self.num_clusters, generator)
        scale = float(points.var(dim=0, correction=0).sum().sqrt())
        if batch_size is None:
            centroids = kmeans.lloyd(points, centroids, max_iterations, tolerance * scale)
        else:
            centroids = kmeans.mini_batches(points, centroids, batch_size, max_iterations, tolerance * scale, generator)
        centroids, assignment = kmeans.without_empty_clusters(points, centroids)
        radius = kmeans.radius_of(assignment, self.num_clusters)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Evidence is summed over ranks: cluster c must be the same cluster on all of them.
            torch.distributed.broadcast(centroids, src=0)
            torch.distributed.broadcast(radius, src=0)
        return self.set_centroids(centroids, radius=radius)

    @torch.no_grad()
    @as_declared
    def set_centroids(self, centroids: Tensor, radius: Tensor | None = None) -> "Clusterer":  # (C, D), (C,)
        """Use given centroids; without a radius no distance counts as unusual (radius inf).

        Raises:
            InvalidArgumentError: wrong shape, or not finite.
        """
        expected = (self.num_clusters, self.hidden_size)
        centroids = validation.floats("centroids", centroids).float()
        radius = None if radius is None else validation.floats("radius", radius)
        if tuple(centroids.shape) != expected or not torch.isfinite(centroids).all():
            raise InvalidArgumentError(
                f"centroids must be finite and of shape {expected}; got {tuple(centroids.shape)}"
            )
        if radius is not None and (tuple(radius.shape) != expected[:1] or not (radius >= 0).all()):
            raise InvalidArgumentError(
                f"radius must be non-negative and of shape {expected[:1]}; got {tuple(radius.shape)}"
            )
        self.centroids.copy_(centroids)
        self.radius.copy_(torch.full_like(self.radius, torch.inf) if radius is None else radius)
        self._refresh()
        return self

    def extra_repr(self) -> str:
        return f"num_clusters={self.num_clusters}, hidden_size={self.hidden_size}, fitted={self.fitted}"

    def _validated_points(self, hidden: Tensor) -> Tensor:
        hidden = validation.tensor("hidden", hidden)
        if hidden.ndim < 2 or hidden.shape[-1] != self.hidden_size:
            raise InvalidArgumentError(f"hidden must have shape (..., {self.hidden_size}); got {tuple(hidden.shape)}")
        points = hidden.detach().reshape(-1, self.hidden_size).float()
        broken = int((~torch.isfinite(points).all(dim=1)).sum())
        if broken:
            raise InvalidArgumentError(
                f"hidden must be finite to fit clusters; {broken} of {len(points)} rows hold NaN or inf"
            )
        if len(points) < self.num_clusters:
            raise InvalidArgumentError(
                f"hidden must hold at least num_clusters={self.num_clusters} distinct rows; got {len(points)} rows"
            )
        return points

    def _refresh(self) -> None:
        # Replaced, not copied into: after a load with assign=True they may still be on the meta device.
        prepared = reference.prepare_centroids(self.centroids)
        self.directions, self.offsets = prepared.directions, prepared.offsets
        self.rounded, self.reach = reference.round_directions(prepared.directions)
        self._fitted = self.centroids.device.type != "meta" and bool(torch.isfinite(self.centroids).all())
        self._levels = kmeans.two_levels(prepared) if self.levels == 2 and self._fitted else None


def _refresh_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, Clusterer):
        with torch.no_grad():
            module._refresh()
