"""The classifier that the experiments train: a backbone, and on it a mixture of experts that predict class probabilities.

Dimensions: N inputs, F features, E experts, K classes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, Routing, SoftmaxGate
from moe_posterior.layer import MixtureOfExperts
from moe_posterior.training.data import Batch

__all__ = ["MoEClassifier", "Prediction"]


class Prediction(NamedTuple):
    """What the classifier says of a batch, and how it came to it."""

    probs: Tensor  # (N, K) of the aggregate
    expert_probs: Tensor  # (N, E, K)
    routing: Routing | None  # None while the gate is not fitted: every expert weighs 1/E then


def aggregate_nll(probs: Tensor, target: Tensor) -> Tensor:  # (N, K), (N,) -> ()
    """Mean negative log of the aggregate probability of the true class, floored at 1e-12 so that an underflow stays finite."""
    return F.nll_loss(probs.clamp(min=1e-12).log(), target)


class MoEClassifier(lightning.LightningModule):
    """Backbone + mixture of E linear probability experts; the loss is the negative log of the *aggregate* probability.

    The mixture is linear in probabilities: ``f(x) = Σ_e w_e(x) softmax(W_e φ(x))``. Until a gate that needs clusters is fitted
    (see :class:`~moe_posterior.training.callbacks.CompetenceUpdates`) all experts weigh the same.

    Args:
        backbone: maps an input batch to (N, F) and says F as ``out_features``.
        num_classes: K; the CLI takes it from the data module.
        num_experts: E; 4 as in the paper.
        gate: from (hidden size, number of experts) to a gate; in YAML a ``class_path`` with the remaining ``init_args``.
        lr, weight_decay: of AdamW. The learning rate rises linearly over the first ``warmup_share`` of all steps and falls to zero
            by a cosine.
        warmup_share: in [0, 1).

    Raises:
        InvalidArgumentError: the backbone does not say ``out_features``, or ``warmup_share`` is out of range.

    Source: *Toward Calibrated Mixture-of-Experts Under Distribution Shift*, arXiv 2606.20544, model and defaults.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_experts: int = 4,
        gate: Callable[[int, int], Gate] = SoftmaxGate,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_share: float = 0.05,
    ) -> None:
        super().__init__()
        features = getattr(backbone, "out_features", None)
        if not isinstance(features, int):
            raise InvalidArgumentError(
                f"backbone must say its width as out_features; {type(backbone).__name__} does not"
            )
        if not 0 <= warmup_share < 1:
            raise InvalidArgumentError(f"warmup_share must lie in [0, 1); got {warmup_share}")
        self.backbone, self.num_classes = backbone, num_classes
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        experts = [nn.Sequential(nn.Linear(features, num_classes), nn.Softmax(dim=-1)) for _ in range(num_experts)]
        self.moe = MixtureOfExperts(nn.ModuleList(experts), gate(features, num_experts))
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_ece = MulticlassCalibrationError(num_classes, n_bins=15)

    def forward(self, inputs: Tensor) -> Tensor:  # (N, ...) -> (N, K)
        """Class probabilities of the aggregate."""
        return self.predict(inputs).probs

    def features(self, inputs: Tensor) -> Tensor:  # (N, ...) -> (N, F)
        """What the gate and the experts see; float32 also under autocast."""
        return self.backbone(inputs).float()

    def predict(self, inputs: Tensor) -> Prediction:  # (N, ...)
        """Aggregate, every expert's own probabilities, and the routing."""
        hidden = self.features(inputs)
        # E linear maps cost next to nothing beside the backbone, so all experts run: each one's own correctness is observed.
        expert_probs = self.moe.expert_outputs(hidden)
        if not self.moe.gate.fitted:
            return Prediction(expert_probs.mean(dim=1), expert_probs, None)
        routing = self.moe.route(hidden)
        chosen = expert_probs.gather(1, routing.expert_indices[..., None].expand(-1, -1, self.num_classes))
        probs = (routing.routing_weights[..., None].to(chosen.dtype) * chosen).sum(dim=1)
        return Prediction(probs, expert_probs, routing)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        prediction = self.predict(batch["input"])
        loss = aggregate_nll(prediction.probs, batch["target"])
        self.log("train/nll", loss, prog_bar=True, batch_size=len(batch["target"]))
        correct = prediction.expert_probs.detach().argmax(dim=-1) == batch["target"][:, None]
        return {"loss": loss, "routing": prediction.routing, "expert_correct": correct}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        probs, target = self(batch["input"]), batch["target"]
        self.val_accuracy(probs, target)
        self.val_ece(probs, target)
        count = len(target)
        self.log("val/nll", aggregate_nll(probs, target), prog_bar=True, batch_size=count, sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=count)
        self.log("val/ece", self.val_ece, prog_bar=True, batch_size=count)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rising = int(self.warmup_share * total)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
