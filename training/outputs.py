"""The predictions of a trained classifier on a whole split, on the CPU, as calibrators and reports read them.

Dimensions: n rows, E experts, K classes.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import BeliefGate
from moe_posterior.prediction import Prediction, dense_weights, joined
from moe_posterior.training.data import Batch
from moe_posterior.training.module import MoEClassifier

__all__ = ["outputs_of", "predict_split"]


def outputs_of(model: MoEClassifier, batches: Iterable[Batch]) -> tuple[Outputs, Tensor]:
    """The model's outputs on all batches, as calibrators read them, and the labels."""
    prediction = predict_split(model, batches)
    return prediction.outputs, prediction.need("target")


@torch.no_grad()
def predict_split(model: MoEClassifier, batches: Iterable[Batch]) -> Prediction:
    """The model's predictions on all batches, with labels and groups (0 if the data have none); rows are numbered from 0.

    Raises:
        InvalidArgumentError: the gate was never fitted.
    """
    if not model.moe.gate.fitted:
        raise InvalidArgumentError("the gate was never fitted: train past competence.warmup_epochs")
    whole = joined([_predict_batch(model, batch) for batch in batches])
    return replace(whole, row=torch.arange(len(whole.probs)))


def _predict_batch(model: MoEClassifier, batch: Batch) -> Prediction:
    gate = model.moe.gate
    prediction = model.predict(batch["input"].to(model.device))
    expert_probs, routing = prediction.need("expert_probs"), prediction.routing
    assert routing is not None  # the gate is fitted
    weights = dense_weights(prediction)
    gap = expert_probs - prediction.probs[:, None]
    clusters, novelty = None, torch.zeros_like(routing.distance)
    if isinstance(gate, BeliefGate):
        clusters, novelty = routing.cluster_ids.cpu(), gate.relative_distance(routing)
    return Prediction(
        prediction.probs.cpu(),
        expert_probs.cpu(),
        routing_weights=weights.cpu(),
        expert_indices=routing.expert_indices.cpu(),
        cluster_ids=clusters,
        configuration=gate.configurations(routing).cpu(),
        novelty=novelty.cpu(),
        disagreement=(weights * gap.square().sum(dim=-1)).sum(dim=-1).cpu(),
        group=batch.get("group", torch.zeros(len(weights), dtype=torch.int64)).cpu(),
        target=batch["target"],
    )
