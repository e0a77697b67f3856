"""What a trained classifier says of a split: the fields that calibrators and reports read.

Dimensions: n rows, E experts, K classes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate, Routing
from moe_posterior.metrics import Configurations, configuration_ids
from moe_posterior.training.data import Batch
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.prediction import dense_weights

__all__ = ["normalised", "numbered_configurations", "outputs_of", "routed_outputs_of"]


def outputs_of(model: MoEClassifier, batches: Iterable[Batch]) -> tuple[Outputs, Tensor]:
    """What the model says of all batches, and the labels."""
    outputs, target, _ = routed_outputs_of(model, batches)
    return outputs, target


@torch.no_grad()
def routed_outputs_of(model: MoEClassifier, batches: Iterable[Batch]) -> tuple[Outputs, Tensor, Routing]:
    """What the model says of all batches, the labels, and the routing; on the CPU.

    Novelty is the distance to the cluster's centroid in units of its radius, 0 for gates without clusters; disagreement is the
    routing-weighted squared distance of the experts' probabilities from the aggregate's. Domains are the batches' groups, 0 where
    there are none.

    Raises:
        InvalidArgumentError: the gate was never fitted.
    """
    gate = model.moe.gate
    if not gate.fitted:
        raise InvalidArgumentError("the gate was never fitted: train past competence.warmup_epochs")
    parts, targets, routings = [], [], []
    for batch in batches:
        prediction = model.predict(batch["input"].to(model.device))
        routing = prediction.routing
        assert routing is not None
        weights = dense_weights(prediction)
        gap = prediction.expert_probs - prediction.probs[:, None]
        novelty = (
            gate.relative_distance(routing) if isinstance(gate, BeliefGate) else torch.zeros_like(routing.distance)
        )
        fields = (
            prediction.probs,
            prediction.expert_probs,
            weights,
            gate.configurations(routing),
            novelty,
            (weights * gap.square().sum(dim=-1)).sum(dim=-1),
            batch.get("group", torch.zeros(len(novelty), dtype=torch.int64)),
        )
        parts.append([field.cpu() for field in fields])
        targets.append(batch["target"])
        routings.append([field.cpu() for field in routing])
    whole = Outputs(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return whole, torch.cat(targets), Routing(*(torch.cat(column) for column in zip(*routings, strict=True)))


def normalised(probs: Tensor) -> Tensor:  # (n, K) -> (n, K) float64
    """Rows that sum to 1 to the last digit."""
    probs = probs.double()
    return probs / probs.sum(dim=1, keepdim=True)


def numbered_configurations(ids: Tensor) -> Configurations:  # (n,) int64
    """Configuration ids as the metrics take them: those that occur, numbered."""
    return configuration_ids(ids, torch.zeros(len(ids), 1).long(), 1, num_clusters=int(ids.max()) + 1)
