"""The predictions of a model: one type from the classifier through objectives and calibrators to the report.

Dimensions: N rows, E experts, K classes, k experts per row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Routing
from moe_posterior.metrics import BinSums, Configurations, configuration_ids

__all__ = ["Prediction", "Totals", "Whole", "dense_weights", "joined", "normalised", "numbered_configurations"]

ConfigurationName = tuple[int | str | None, tuple[int, ...]]  # cluster, chosen experts


@dataclass(frozen=True, eq=False)
class Totals:
    """Exact sums over all rows of an evaluation set, or of a subset of it."""

    scores: Tensor  # (3,) float64: right answers, NLL, Brier score
    moments: Tensor  # (6, B) float64, of moe_posterior.metrics.gaps.moments_of

    @property
    def n(self) -> int:
        """Rows."""
        return int(self.moments[0].sum())


@dataclass(frozen=True, eq=False)
class Whole:
    """Sums over all rows of an evaluation set too large to be kept, of which a :class:`Prediction` holds a random sample."""

    overall: Totals
    subsets: Mapping[str, Totals]
    configurations: Mapping[int, BinSums]  # id -> sums of shape (1, B)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts for N rows, and how. Readers need only some of the fields; None means unknown.

    >>> one = Prediction(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), target=torch.tensor([0, 1]), arm="softmax")
    >>> one.rows(torch.tensor([False, True])).target
    tensor([1])
    """

    probs: Tensor  # (N, K) of the aggregate, or (N,) confidences of answers whose correctness or grade is the target
    expert_probs: Tensor | None = None  # (N, E, K) each expert's own
    routing: Routing | None = (
        None  # the gate's decision, needed to observe outcomes; not kept when rows are selected or joined
    )
    routing_weights: Tensor | None = None  # (N, E), 0 for experts that were not chosen
    expert_indices: Tensor | None = None  # (N, k) int64, the chosen experts
    cluster_ids: Tensor | None = None  # (N,) int64; None also for gates without clusters
    configuration: Tensor | None = None  # (N,) int64, id of (cluster, chosen experts)
    novelty: Tensor | None = None  # (N,) distance to the centroid / cluster radius, 0 for gates without clusters
    disagreement: Tensor | None = (
        None  # (N,) weighted squared distance of the experts' probabilities from the aggregate's
    )
    group: Tensor | None = None  # (N,) int64, the data's group of each row
    target: Tensor | None = None  # (N,) int64, the label
    row: Tensor | None = None  # (N,) int64, which row of the data it is: the same under every shift
    configuration_names: Mapping[int, ConfigurationName] | None = (
        None  # of the ids in ``configuration``; by default the clusters and experts above
    )
    subsets: Mapping[str, Tensor] | None = None  # name -> (N,) bool, of these rows alone
    whole: Whole | None = None  # exact sums, if these rows are a sample
    arm: str = "model"  # whose prediction it is: "softmax", "posterior"
    shift: str = "clean"  # or the name of the shift that the rows are under
    severity: int = 0  # 0 for the stored test rows, else 1 (mild) to 5

    @property
    def outputs(self) -> Outputs:
        """The fields that calibrators read."""
        return Outputs(
            self.probs,
            self.expert_probs,
            self.routing_weights,
            self.configuration,
            self.novelty,
            self.disagreement,
            self.group,
        )

    @property
    def classes(self) -> bool:
        """Whether it holds the probability of every class, not only the confidence in an answer."""
        return self.probs.ndim == 2

    def need(self, name: str) -> Tensor:
        """A field that the caller requires.

        Raises:
            InvalidArgumentError: it is None.
        """
        field = getattr(self, name)
        if field is None:
            raise InvalidArgumentError(f"prediction.{name} must be given for this; got None")
        return field

    def rows(self, index: Tensor) -> "Prediction":  # (M,) int64 or (N,) bool
        """The same fields of some rows, without the routing and the sums over all rows."""
        some: dict[str, Any] = {name: field[index] for name, field in _tensors(self).items()}
        subsets = None if self.subsets is None else {name: mask[index] for name, mask in self.subsets.items()}
        return replace(self, routing=None, whole=None, subsets=subsets, **some)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """The rows of several predictions of one arm in one, with the fields that all of them have; subsets only of a single one.

    >>> one = Prediction(torch.tensor([[0.9, 0.1]]), target=torch.tensor([0]))
    >>> joined([one, one]).target
    tensor([0, 0])
    """
    if len(parts) == 1:
        return replace(parts[0], routing=None)
    columns = [_tensors(part) for part in parts]
    together: dict[str, Any] = {
        name: torch.cat([own[name] for own in columns]) if all(name in own for own in columns) else None
        for name in columns[0]
    }
    return replace(parts[0], routing=None, subsets=None, whole=None, **together)


def _tensors(prediction: Prediction) -> dict[str, Tensor]:
    """The fields that hold one value per row."""
    values = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def dense_weights(prediction: Prediction) -> Tensor:  # (N, E)
    """The weight of every expert, 0 for those that were not chosen; rows sum to 1. Without a routing every expert weighs 1/E.

    >>> probs = torch.full((2, 3, 4), 0.25)
    >>> dense_weights(Prediction(probs[:, 0], probs, None))[0]
    tensor([0.3333, 0.3333, 0.3333])
    """
    expert_probs = prediction.need("expert_probs")
    rows, num_experts = expert_probs.shape[:2]
    if prediction.routing is None:
        return expert_probs.new_full((rows, num_experts), 1 / num_experts)
    weights = prediction.routing.routing_weights.to(expert_probs.dtype)
    return weights.new_zeros(rows, num_experts).scatter(1, prediction.routing.expert_indices, weights)


def normalised(probs: Tensor) -> Tensor:  # (n, K) -> (n, K) float64
    """Rows that sum to 1 to the last digit."""
    probs = probs.double()
    return probs / probs.sum(dim=1, keepdim=True)


def numbered_configurations(ids: Tensor) -> Configurations:  # (n,) int64
    """Configuration ids as the metrics take them: those that occur, numbered."""
    return configuration_ids(ids, torch.zeros(len(ids), 1).long(), 1, num_clusters=int(ids.max()) + 1)
