"""The predictions of a model: one type from the classifier through objectives and calibrators to the report.

Dimensions: N rows, E experts, K classes, k experts per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Routing
from moe_posterior.metrics import Configurations, configuration_ids

__all__ = ["Prediction", "dense_weights", "joined", "normalised", "numbered_configurations"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts for N rows, and how. Readers need only some of the fields; None means unknown.

    >>> one = Prediction(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), target=torch.tensor([0, 1]), arm="softmax")
    >>> one.rows(torch.tensor([False, True])).target
    tensor([1])
    """

    probs: Tensor  # (N, K) of the aggregate
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
        """The same fields of some rows, without the routing."""
        some: dict[str, Any] = {name: field[index] for name, field in _tensors(self).items()}
        return replace(self, routing=None, **some)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """The rows of several predictions of one arm in one, with the fields that all of them have.

    >>> one = Prediction(torch.tensor([[0.9, 0.1]]), target=torch.tensor([0]))
    >>> joined([one, one]).target
    tensor([0, 0])
    """
    columns = [_tensors(part) for part in parts]
    together: dict[str, Any] = {
        name: torch.cat([own[name] for own in columns]) if all(name in own for own in columns) else None
        for name in columns[0]
    }
    return replace(parts[0], routing=None, **together)


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
