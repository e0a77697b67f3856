"""The classifier that the experiments train: a backbone and, on top, a mixture of experts that predict class probabilities.

Dimensions: N inputs, F features, E experts, K classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from moe_posterior import losses
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, SoftmaxGate
from moe_posterior.layer import MixtureOfExperts
from moe_posterior.metrics import CalibrationError
from moe_posterior.prediction import Prediction
from moe_posterior.training.data import Batch
from moe_posterior.training.data.base import generator_for
from moe_posterior.training.methods import Method, Terms, Vanilla

__all__ = ["MoEClassifier", "project"]


class MoEClassifier(lightning.LightningModule):
    """Backbone + mixture of E linear probability experts; by default the loss is the negative log of the *aggregate* probability.

    The mixture is linear in probabilities: ``f(x) = Σ_e w_e(x) softmax(W_e φ(x))``. Until a gate that needs clusters is fitted
    (see :class:`~moe_posterior.training.callbacks.CompetenceUpdates`), all experts have the same weight. A gate with a
    learned prior adds its own loss to the method's, on whether each expert is right, and a share of every expert's.

    Args:
        backbone: maps an input batch to (N, F) and has F as its attribute ``out_features``.
        num_classes: K; the CLI takes it from the data module.
        num_experts: E; 4 as in the paper.
        gate: makes a gate from (hidden size, number of experts); in YAML a ``class_path`` with the remaining ``init_args``.
        method: the objective; in YAML a ``class_path`` from :mod:`moe_posterior.training.methods`. Default: ERM.
        num_groups: G of the data, for objectives over groups; the CLI takes it from the data module.
        seed: of the objective's random draws, together with epoch and batch.
        lr, weight_decay: of AdamW. The learning rate rises linearly over the first ``warmup_share`` of all steps and falls to zero
            by a cosine.
        warmup_share: in [0, 1).

    Raises:
        InvalidArgumentError: the backbone has no ``out_features``, or ``warmup_share`` is out of range.

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
        method: Method | None = None,
        num_groups: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        features = getattr(backbone, "out_features", None)
        if not isinstance(features, int):
            raise InvalidArgumentError(
                f"backbone must have an int attribute out_features, its width; {type(backbone).__name__} has none"
            )
        if not 0 <= warmup_share < 1:
            raise InvalidArgumentError(f"warmup_share must lie in [0, 1); got {warmup_share}")
        self.backbone, self.num_classes = backbone, num_classes
        self.lr, self.weight_decay, self.warmup_share = lr, weight_decay, warmup_share
        experts = [nn.Sequential(nn.Linear(features, num_classes), nn.Softmax(dim=-1)) for _ in range(num_experts)]
        self.moe = MixtureOfExperts(nn.ModuleList(experts), gate(features, num_experts))
        self.method = Vanilla() if method is None else method
        self.method.bind(self.moe.gate, num_groups)
        self.seed = seed
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_ece = CalibrationError(validate_args=False)  # a diverged epoch logs NaN

    def forward(self, inputs: Tensor) -> Tensor:  # (N, ...) -> (N, K)
        """Class probabilities of the aggregate."""
        return self.predict(inputs).probs

    def features(self, inputs: Tensor) -> Tensor:  # (N, ...) -> (N, F)
        """What the gate and the experts see, in the experts' dtype: float32 also under autocast, half or double where the trainer's
        precision says so.
        """
        return self.backbone(inputs).to(next(self.moe.experts.parameters()).dtype)

    def predict(self, inputs: Tensor) -> Prediction:  # (N, ...)
        """Aggregate, every expert's own probabilities, and the routing."""
        return self.predict_from(self.features(inputs))

    def predict_from(self, hidden: Tensor) -> Prediction:  # (N, F)
        """:meth:`predict`, given the features."""
        # E linear maps are cheap next to the backbone, so all experts run, and the correctness of each is observed.
        expert_probs = self.moe.expert_outputs(hidden)
        if not self.moe.gate.fitted:
            return Prediction(expert_probs.mean(dim=1), expert_probs)
        routing = self.moe.route(hidden)
        chosen = expert_probs.gather(1, routing.expert_indices[..., None].expand(-1, -1, self.num_classes))
        probs = (routing.routing_weights[..., None].to(chosen.dtype) * chosen).sum(dim=1)
        return Prediction(probs, expert_probs, routing)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        target = batch["target"]
        inputs = batch["input"]
        gate = self.moe.gate
        gate.begin_step(self.global_step, self.current_epoch)
        warming_up = self.current_epoch < self.method.warmup_epochs
        if not warming_up:
            inputs = self.method.extend(inputs, generator_for("method", self.seed, self.global_step))
        hidden = self.features(inputs)
        prediction = self.predict_from(hidden)
        terms = self.method.terms(prediction, target, gate, batch.get("group"), self.current_epoch)
        count = len(target)
        correct = prediction.need("expert_probs")[:count].detach().argmax(dim=-1) == target[:, None]
        own = gate.loss(hidden[:count], correct.float())
        if own is not None:
            experts = gate.individual * _own_loss(prediction.need("expert_probs")[:count], target)
            parts = {"competence": own.detach(), "experts": experts.detach()}
            terms = terms._replace(loss=terms.loss + own + experts, logs={**terms.logs, **parts})
        shown = terms.loss.detach()
        self.log("train/loss", shown, prog_bar=True, batch_size=count)
        self.log("train/nll", losses.nll(prediction.probs[:count].detach(), target), batch_size=count)
        for name, value in terms.logs.items():
            self.log(f"train/{name}", value.float(), batch_size=count)
        routing = prediction.routing
        if routing is not None and len(inputs) > count:
            routing = routing.map(lambda field: field[:count])
        return {"loss": self._projected(terms), "routing": routing, "expert_correct": correct}

    def _projected(self, terms: Terms) -> Tensor:
        """The loss; with a constraint, a stand-in whose gradient is the loss's without the part that conflicts with it."""
        if terms.constraint is None:
            return terms.loss
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        wanted, guard = (
            torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for term in (terms.loss, terms.constraint)
        )
        pairs = zip(parameters, project(wanted, guard), strict=True)
        stand_in = torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()
        return stand_in - stand_in.detach() + terms.loss.detach()

    def on_fit_start(self) -> None:
        """Refuse a warm-up as long as the training: the run would be plain ERM under another name."""
        epochs, warmup = self.trainer.max_epochs, self.method.warmup_epochs
        if warmup and epochs is not None and 0 <= epochs <= warmup and not isinstance(self.method, Vanilla):
            raise InvalidArgumentError(
                f"warmup_epochs must be less than max_epochs, {epochs}, or {type(self.method).__name__} never applies; got {warmup}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which method the state belongs to."""
        checkpoint["method"] = type(self.method).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A warm-up checkpoint may come from another method, whose own state is then ignored."""
        if checkpoint.get("method") == type(self.method).__name__:
            return
        state, own = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("method.")} | {
            name: value for name, value in own.items() if name.startswith("method.")
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        probs, target = self(batch["input"]), batch["target"]
        self.val_accuracy(probs, target)
        self.val_ece(probs, target)
        count = len(target)
        self.log("val/nll", losses.nll(probs, target), prog_bar=True, batch_size=count, sync_dist=True)
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


def _own_loss(expert_probs: Tensor, target: Tensor) -> Tensor:  # (N, E, K), (N,) -> ()
    """The mean negative log likelihood of every expert by itself, on every row."""
    right = expert_probs.gather(2, target[:, None, None].expand(-1, expert_probs.shape[1], 1))
    return -right.clamp(min=torch.finfo(right.dtype).tiny).log().mean()


def project(wanted: Sequence[Tensor], guard: Sequence[Tensor]) -> list[Tensor]:
    """The gradient ``wanted`` without its component against ``guard``; unchanged unless the two conflict over all parameters together.

    Source: arXiv 2606.20544, FGR; Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*.

    >>> project([torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])])
    [tensor([1., 0.])]
    """
    inner = sum((w * g).sum() for w, g in zip(wanted, guard, strict=True))
    square = sum(g.square().sum() for g in guard)
    share = torch.where((inner < 0) & (square > 0), inner / square, 0.0)  # type: ignore[arg-type]
    return [w - share * g for w, g in zip(wanted, guard, strict=True)]
