"""Stop training when its numbers are no longer finite, before a checkpoint holds them."""

from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor

from moe_posterior.errors import DivergedError

__all__ = ["StopWhereDiverged", "require_finite"]

ADVICE = "try a lower --model.lr, --trainer.gradient_clip_val 1.0 or --trainer.precision 32-true, with --overwrite or another --name"
WATCHED = ("train/loss", "train/nll", "val/")  # prefixes of metrics that are always defined


class StopWhereDiverged(lightning.Callback):
    """Raise an error if a loss, a parameter or a metric is NaN or infinite, before a checkpoint holds it.

    The loss is checked after every batch on a CPU and every ``log_every_n_steps`` batches on other devices, where a check makes the
    device wait; parameters once an epoch, and metrics after validation.

    Args:
        name: of the model being trained, for the message.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):  # a step that was skipped, or optimised by hand
            return
        often = loss.device.type == "cpu"
        if often or batch_idx % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by a connector
            self._require({"train/loss": loss}, trainer)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._require_state(trainer, pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._require_state(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._require_figures(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._require_state(trainer, pl_module)
        self._require_figures(trainer)

    def _require_state(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._require(dict(module.named_parameters()), trainer)

    def _require_figures(self, trainer: lightning.Trainer) -> None:
        figures = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(WATCHED)}
        self._require(figures, trainer)

    def _require(self, values: Mapping[str, Tensor], trainer: lightning.Trainer) -> None:
        require_finite(values, self.name, trainer.current_epoch)


def require_finite(values: Mapping[str, Tensor], name: str, epoch: int) -> None:
    """Raise unless every value is finite.

    Raises:
        DivergedError: names the model, the epoch, the first value that is not finite, and what to try.

    >>> import torch
    >>> require_finite({"train/loss": torch.tensor([1.0])}, "arm 'a'", 3)
    """
    for what, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            got = (
                f"is {value.item()}"
                if value.numel() == 1
                else f"holds {_count(value)} of {value.numel()} values NaN or inf"
            )
            raise DivergedError(f"{name} diverged in epoch {epoch}: {what} {got}; {ADVICE}")


def _count(value: Tensor) -> int:
    return int((~value.isfinite()).sum())
