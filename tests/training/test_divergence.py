"""Training that leaves the finite numbers stops with a sentence, and nothing of it is kept as trained."""

import math
from pathlib import Path

import lightning
import pytest
import torch
from points import Plane, Points

from moe_posterior import MoEPosteriorError, PosteriorGate, SoftmaxGate
from moe_posterior.cli import main
from moe_posterior.errors import DivergedError
from moe_posterior.training import methods
from moe_posterior.training.callbacks import CompetenceUpdates
from moe_posterior.training.divergence import StopWhereDiverged, require_finite
from moe_posterior.training.module import MoEClassifier

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
GATES = {
    "softmax": lambda size, experts: SoftmaxGate(size, experts, 2),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 4, 2),
}


class Spoil(lightning.Callback):
    """Puts a value that is not finite somewhere, at the end of a batch or of the epoch."""

    def __init__(self, where: str, value: float) -> None:
        self.where, self.value = where, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        last = batch_idx == trainer.num_training_batches - 1
        if trainer.current_epoch == 2 and (self.where, last) in {("weights", False), ("last weights", True)}:
            with torch.no_grad():
                next(pl_module.moe.experts.parameters()).view(-1)[0] = self.value
        if trainer.current_epoch == 2 and self.where == "loss":
            outputs["loss"].fill_(self.value)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 2 and self.where == "figure":
            pl_module.log("val/own", torch.tensor(self.value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "last weights", "loss", "figure"])
@pytest.mark.parametrize("gate", GATES)
def test_whatever_is_not_finite_stops_training_in_its_epoch_before_a_checkpoint_holds_it(
    where: str, value: float, gate: str, tmp_path: Path
) -> None:
    kept = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Spoil(where, value), StopWhereDiverged("arm 'x'"), CompetenceUpdates(), kept],
    )
    model = MoEClassifier(Plane(), 3, gate=GATES[gate], method=methods.Vanilla())
    with pytest.raises(DivergedError, match=r"arm 'x' diverged in epoch 2: .*(nan|inf|NaN).*lower --model\.lr"):
        trainer.fit(model, datamodule=Points(batch_size=48))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1
    require_finite({name: state["state_dict"][name] for name, _ in model.named_parameters()}, "kept", 1)


def test_a_run_that_diverges_is_an_error_and_its_arm_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "fit",
        "--config",
        str(DEMO),
        "--run-dir",
        str(tmp_path),
        "--model.lr",
        "1e30",
        "--trainer.max_epochs",
        "2",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "arm 'softmax' diverged in epoch 0: train/loss is nan; try a lower --model.lr" in said.err
    assert "Trained" not in said.out
    assert not list(tmp_path.rglob("finished.json"))
    assert main(["evaluate", "--run", str(tmp_path / "demo")]) == 2
    assert "is not fully trained" in capsys.readouterr().err


def test_an_error_of_divergence_is_one_of_ours() -> None:
    assert issubclass(DivergedError, MoEPosteriorError)
    assert issubclass(DivergedError, ArithmeticError)
