"""Train one cell and keep what it says of the rows it is judged by.

Dimensions: n rows, E experts, K classes.
"""

import logging
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch
from torch import Tensor

from moe_posterior.calibrators import Outputs
from moe_posterior.files.atomic import replacing
from moe_posterior.files.reading import decoding
from moe_posterior.files.torchfile import load_plain, read_plain_file
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint
from moe_posterior.training.data import ClassificationData
from moe_posterior.training.divergence import StopWhereDiverged
from moe_posterior.training.module import MoEClassifier
from moe_posterior.training.study.plan import Cell, Study

__all__ = ["load_outputs", "save_outputs", "train_cell"]


def train_cell(cell: Cell, study: Study, folder: Path) -> tuple[MoEClassifier, ClassificationData]:
    """Train a cell, from the shared warm-up if an earlier cell of the same seed, gate and data has left one in the folder."""
    data = cell.data()
    shape = tuple(data.split("train").inputs.shape[1:])
    lightning.seed_everything(cell.seed, verbose=False)
    model = cell.model(study, shape, data.num_classes, data.num_groups)
    place = folder / "warmup" / f"{cell.setting}-{cell.inner}-{cell.gate}-{cell.num_experts}-{cell.seed}"
    warmup = WarmupCheckpoint(place)
    branches = warmup.path.is_file() and model.method.warmup_epochs > 0
    if branches:
        with decoding(warmup.path, "a checkpoint that can be read", "delete it and run the same command again"):
            load_plain(read_plain_file(warmup.path), warmup.path)["state_dict"]
    callbacks = [
        StopWhereDiverged(f"cell {cell.key}"),
        CompetenceUpdates(warmup_epochs=1, refit_every=3, fit_rows=4000, seed=cell.seed),
    ]
    trainer = _trainer(study, [*callbacks, *([] if branches else [warmup])])
    trainer.fit(model, datamodule=data, ckpt_path=warmup.path if branches else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return model.eval(), data


def _trainer(study: Study, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return lightning.Trainer(
        max_epochs=study.epochs,
        precision=study.precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def save_outputs(path: Path, parts: dict[str, tuple[Outputs, Tensor]]) -> None:
    """Write what a cell says of several splits; whole or not at all."""
    arrays = {}
    for name, (outputs, target) in parts.items():
        arrays[f"{name}/target"] = target.numpy()
        for field, values in zip(Outputs._fields, outputs, strict=True):
            assert values is not None
            array = values.numpy()
            arrays[f"{name}/{field}"] = array.astype(np.float32) if array.dtype.kind == "f" else array
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any keyword for allow_pickle


def load_outputs(path: Path) -> dict[str, tuple[Outputs, Tensor]]:
    """What :func:`save_outputs` wrote."""
    advice = "delete it and run the same command again"
    with decoding(path, "what a cell said", advice), np.load(path, allow_pickle=False) as stored:
        names = dict.fromkeys(key.split("/")[0] for key in stored.files)
        if not names:
            raise ValueError("it is empty")
        return {
            name: (
                Outputs(*(torch.from_numpy(stored[f"{name}/{field}"]) for field in Outputs._fields)),
                torch.from_numpy(stored[f"{name}/target"]),
            )
            for name in names
        }
