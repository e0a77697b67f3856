"""A run that stops in the middle and goes on from its last checkpoint ends bit for bit where an undisturbed one does."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from points import Plane, Points

from moe_posterior import LearnedPrior, PosteriorGate
from moe_posterior.training import methods
from moe_posterior.training.callbacks import CompetenceUpdates
from moe_posterior.training.module import MoEClassifier

EPOCHS = 5
METHODS = {
    "group dro": lambda: methods.GroupDRO(1, step=0.5),
    "robust configuration": lambda: methods.RobustConfiguration(1),
    "robust configuration + robust": lambda: methods.RobustConfiguration(1, robust=True),
    "learned prior": lambda: methods.Vanilla(),
}


class Killed(Exception):
    pass


class KillAt(lightning.Callback):
    """Ends training as a crash would, after some batches of an epoch: what came since the last checkpoint is lost."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.moment = epoch, batch

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        if (trainer.current_epoch, arguments[-1]) == self.moment:
            raise Killed


def trainer_and_model(
    name: str, folder: Path, *callbacks: lightning.Callback
) -> tuple[lightning.Trainer, MoEClassifier]:
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CompetenceUpdates(refit_every=2), ModelCheckpoint(folder, save_last=True), *callbacks],
    )
    gates = {
        False: lambda size, experts: PosteriorGate(size, experts, 4, 2, exploration=0.2),
        True: lambda size, experts: PosteriorGate(
            size, experts, 4, 2, prior=LearnedPrior(8, draws=3.0, warmup_epochs=1)
        ),
    }
    return trainer, MoEClassifier(
        Plane(), 3, gate=gates[name == "learned prior"], lr=1e-2, method=METHODS[name](), num_groups=2
    )


def run(name: str, folder: Path, *callbacks: lightning.Callback, resume: bool = False) -> dict[str, Any]:
    """All that training leaves: weights, belief, the method's state, the optimiser's moments and the schedule."""
    lightning.seed_everything(99 if resume else 0, verbose=False)  # a new process starts from other weights
    trainer, model = trainer_and_model(name, folder, *callbacks)
    path = folder / "last.ckpt" if resume else None
    trainer.fit(model, datamodule=Points(batch_size=48, seed=1), ckpt_path=path)
    left = {
        "model": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "steps": trainer.global_step,
    }
    return copy.deepcopy(left)


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left.nan_to_num(-1.0), right.nan_to_num(-1.0)), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for place, pair in enumerate(zip(left, right, strict=True)):
            assert_identical(*pair, f"{where}/{place}")
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: run(name, tmp_path_factory.mktemp("whole")) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("epoch", [2, 3])  # clusters are fitted at the start of 1 and 3
def test_a_killed_run_resumes_bit_for_bit(undisturbed, name: str, epoch: int, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(name, tmp_path, KillAt(epoch, 2))
    resumed = run(name, tmp_path, resume=True)
    assert_identical(resumed, undisturbed[name])


@pytest.mark.parametrize("name", METHODS)
def test_the_state_that_is_resumed_is_more_than_nothing(undisturbed, name: str) -> None:
    model = undisturbed[name]["model"]
    if name == "learned prior":
        assert torch.isfinite(model["moe.gate.clusterer.centroids"]).all()
        assert len(model["moe.gate.posterior.prior_alpha"].unique()) > 1
        return
    assert len(model["method.weights"].unique()) > 1
    assert model["moe.gate.posterior.successes"].sum() > 0
    if name != "group dro":
        assert model["method.counts"].min() > 0
