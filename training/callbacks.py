"""Callbacks of training: they keep a gate's belief in step with the model, and write checkpoints."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.tensorfile import save_plain
from moe_posterior.gates import BeliefGate
from moe_posterior.training.data import Batch
from moe_posterior.training.data.base import generator_for
from moe_posterior.training.module import MoEClassifier

__all__ = ["CompetenceUpdates", "WarmupCheckpoint", "WholeCheckpoints"]

EvidenceSplit = Literal["train", "val"]


class CompetenceUpdates(lightning.Callback):
    """Fit the clusters after a warm-up, refit them while the backbone changes, and observe whether each expert is right.

    After ``warmup_epochs`` epochs with equal weights for all experts, the features of the training rows are clustered, and a pass over
    the rows counts the evidence: outcome 1 where an expert's own top label is right, for every expert on every row. A refit makes new
    clusters and counts the evidence again from zero. Gates without a belief are left alone.

    A gate with a learned prior routes from its map alone while it is trained, so it is fitted once, after the last training batch: the
    features of the training rows are clustered, and the rows of the validation split say how many observations the map is worth.

    Args:
        warmup_epochs: epochs before the first fit.
        refit_every: epochs between refits; each costs one pass over the training rows without gradients.
        fit_rows: at most this many rows, drawn with the run's seed, go into k-means; the evidence uses all.
        evidence: rows to count. ``"train"`` (default) has many rows, on which experts look better than they are; ``"val"`` has few,
            unseen ones, and is what a gate gets whose ``counts_training_rows`` is False.
        observe_batches: also observe every training batch between refits. The belief then follows the experts more closely but is
            overconfident, since the same rows count again every epoch. Off by default.
        seed: of the draw and the k-means seeding, together with the epoch.

    Raises:
        InvalidArgumentError: a number below its minimum or an unknown split.
    """

    def __init__(
        self,
        warmup_epochs: int = 1,
        refit_every: int = 1,
        fit_rows: int = 20_000,
        evidence: EvidenceSplit = "train",
        observe_batches: bool = False,
        seed: int = 42,
    ) -> None:
        for name, value, least in (
            ("warmup_epochs", warmup_epochs, 0),
            ("refit_every", refit_every, 1),
            ("fit_rows", fit_rows, 1),
        ):
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}; got {value}")
        if evidence not in get_args(EvidenceSplit):
            raise InvalidArgumentError(f"evidence must be one of {list(get_args(EvidenceSplit))}; got {evidence!r}")
        self.warmup_epochs, self.refit_every, self.fit_rows = warmup_epochs, refit_every, fit_rows
        self.evidence, self.observe_batches, self.seed = evidence, observe_batches, seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        learner = _learner(pl_module)
        if learner is not None:
            if learner.clusterer.fitted:  # training goes on after it was finished
                learner.relearn()
            return
        since_warmup = trainer.current_epoch - self.warmup_epochs
        if since_warmup >= 0 and since_warmup % self.refit_every == 0:
            self.refit(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        gate, routing = _classifier(pl_module).moe.gate, outputs["routing"]
        counts = isinstance(gate, BeliefGate) and gate.counts_training_rows
        if self.observe_batches and routing is not None and counts:
            gate.observe(routing, outputs["expert_correct"].double(), dense=True)
        ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if _learner(pl_module) is not None and (ends or trainer.global_step == trainer.max_steps):
            # Before the validation at the end of the epoch, after which the last checkpoint is written.
            self.refit(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        learner = _learner(pl_module)
        if learner is not None and not learner.clusterer.fitted:  # stopped early
            self.refit(trainer, pl_module)

    @torch.no_grad()
    def refit(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Cluster the features of the training rows and count the evidence, both from scratch."""
        model = _classifier(pl_module)
        gate = model.moe.gate
        if not isinstance(gate, BeliefGate):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        was_training = model.training
        model.eval()
        hidden, correct = _pass_over(model, data.train_evaluation_dataloader())
        generator = generator_for("clusters", self.seed, trainer.current_epoch)
        hidden_of_all = _gather(hidden)
        rows = torch.randperm(len(hidden_of_all), generator=generator)[: self.fit_rows]
        gate.fit(hidden_of_all[rows.to(hidden.device)], generator=generator)
        if self.evidence == "val" or not gate.counts_training_rows:
            hidden, correct = _pass_over(model, data.val_dataloader())
        gate.measure(hidden, correct)
        model.train(was_training)


class WarmupCheckpoint(lightning.Callback):
    """Save the state at the end of the ERM warm-up, from which other methods with the same seed can branch.

    Args:
        folder: where ``warmup.ckpt`` is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def path(self) -> Path:
        """Where the state is."""
        return self.folder / "warmup.ckpt"

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch + 1 == _classifier(pl_module).method.warmup_epochs:
            trainer.save_checkpoint(self.path)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are on disk before they replace the previous one, unlike Lightning's own."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint to a local folder, which is created if needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, checkpoint)


def _classifier(module: lightning.LightningModule) -> MoEClassifier:
    if not isinstance(module, MoEClassifier):
        raise InvalidArgumentError(f"CompetenceUpdates needs a MoEClassifier; got {type(module).__name__}")
    return module


def _learner(module: lightning.LightningModule) -> BeliefGate | None:
    """The gate, if it has a prior to learn."""
    gate = _classifier(module).moe.gate
    return gate if isinstance(gate, BeliefGate) and gate.learned_prior is not None else None


def _pass_over(model: MoEClassifier, loader: Any) -> tuple[Tensor, Tensor]:  # (n, F), (n, E) float64
    """Features of all rows, and whether each expert's own top label is right."""
    hidden, correct = [], []
    precision = model.trainer.precision_plugin
    for batch in loader:
        inputs = precision.convert_input(batch["input"].to(model.device))
        with precision.forward_context():
            features = model.features(inputs)
        expert_probs = model.moe.expert_outputs(features)
        hidden.append(features)
        correct.append(expert_probs.argmax(dim=-1) == batch["target"].to(model.device)[:, None])
    return torch.cat(hidden), torch.cat(correct).double()


def _gather(hidden: Tensor) -> Tensor:  # (n, F) -> (sum of n over ranks, F)
    """Under distributed training every rank must find the same clusters, so each needs all rows."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return hidden
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, hidden.cpu())
    return torch.cat(parts).to(hidden.device)
