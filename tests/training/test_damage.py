"""An expert breaks: who is damaged, what is observed, and how soon each gate leaves it."""

import copy
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn

from moe_posterior import InvalidArgumentError, PosteriorGate, SoftmaxGate
from moe_posterior.training.backbones import DigitsNet
from moe_posterior.training.callbacks import CompetenceUpdates
from moe_posterior.training.damage import (
    BATCH,
    damage_expert,
    recovery_figure,
    recovery_of,
    recovery_records,
    recovery_table,
)
from moe_posterior.training.data import Digits
from moe_posterior.training.module import MoEClassifier

GATES = {
    "softmax": lambda size, experts: SoftmaxGate(size, experts, 2),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 8, 2),
    "learned": lambda size, experts: PosteriorGate(size, experts, 8, 2, prior="learned"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, MoEClassifier]:
    found = {}
    for name, gate in GATES.items():
        lightning.seed_everything(0, verbose=False)
        model = MoEClassifier(DigitsNet(), 10, gate=gate, lr=3e-3)
        trainer = lightning.Trainer(
            max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, callbacks=[CompetenceUpdates(1, 2)],
        )  # fmt: skip
        trainer.fit(model, datamodule=Digits(seed=1))
        found[name] = model.eval()
    return found


@pytest.fixture(scope="module")
def recoveries(models: dict[str, MoEClassifier]) -> dict:
    data = Digits(seed=1)
    return {name: recovery_of(model, data.test_dataloader(), name, streams=4) for name, model in models.items()}


def test_weights_that_are_all_alike_get_noise_of_their_size() -> None:
    norm = nn.LayerNorm(2000)
    nn.init.constant_(norm.weight, 3.0)
    layer = nn.Linear(2000, 1)
    bias = float(layer.bias.detach())
    for expert in (norm, layer):
        damage_expert(expert, torch.Generator().manual_seed(0))
    assert float(norm.weight.square().mean().sqrt()) == pytest.approx(3.0, rel=0.1)
    assert float(norm.weight.std()) == pytest.approx(3.0, rel=0.1)
    assert not bool(norm.bias.any())
    assert 0 < abs(float(layer.bias.detach())) != abs(bias)


def test_noise_of_the_same_size_takes_the_place_of_every_parameter() -> None:
    expert = nn.Sequential(nn.Linear(40, 30), nn.Softmax(dim=-1))
    before = copy.deepcopy(expert)
    damage_expert(expert, torch.Generator().manual_seed(0))
    for new, old in zip(expert.parameters(), before.parameters(), strict=True):
        assert not bool((new == old).any())
    assert float(expert[0].weight.std()) == pytest.approx(float(before[0].weight.std()), rel=0.1)


def test_the_model_itself_stays_as_it_is(models: dict[str, MoEClassifier]) -> None:
    model = models["learned"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recovery_of(model, Digits(seed=1).test_dataloader(), streams=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_most_used_expert_is_damaged_and_only_gates_with_a_belief_leave_it(recoveries: dict) -> None:
    for one in recoveries.values():
        assert one.healthy > 0.6
        assert one.accuracy.shape == one.share.shape == (4, len(Digits(seed=1).split("test")) // BATCH)
        assert one.outcomes.tolist() == [2 * BATCH * place for place in range(len(one.outcomes))]
    last = {name: float(one.share[:, -8:].mean()) for name, one in recoveries.items()}
    assert last["softmax"] == pytest.approx(float(recoveries["softmax"].share[:, :8].mean()), abs=0.05)
    for name, kept in (("posterior", 0.9), ("learned", 0.5)):  # the table of a model so little trained is slow
        assert last[name] < kept * recoveries[name].used


def test_a_gate_with_a_learned_prior_has_left_it_within_80_outcomes(recoveries: dict) -> None:
    one = recoveries["learned"]
    after = one.outcomes >= 80
    assert float(one.share[:, after][:, :3].mean()) < 0.5 * one.used
    assert float(one.accuracy[:, after].mean()) > float(recoveries["softmax"].accuracy[:, after].mean())


def test_the_first_batch_is_answered_before_anything_is_observed(models: dict[str, MoEClassifier]) -> None:
    data = Digits(seed=1)
    one, again = (recovery_of(models["learned"], data.test_dataloader(), "a", streams=2) for _ in range(2))
    assert torch.equal(one.accuracy, again.accuracy)
    assert float(one.share[:, 0].mean()) == pytest.approx(one.used, abs=0.2)


def test_table_records_and_figure_say_the_same(recoveries: dict, tmp_path: Path) -> None:
    records = recovery_records(list(recoveries.values()))
    first = next(record for record in records if record["arm"] == "learned" and record["outcomes"] == "0–80")
    one = recoveries["learned"]
    assert first["share"] == pytest.approx(float(one.share[:, one.outcomes < 80].mean()))
    lines = recovery_table(list(recoveries.values())).splitlines()
    assert [line.split("|")[1].strip() for line in lines[-3:]] == list(recoveries)
    assert "0–80" in lines[-5]
    assert recovery_figure(list(recoveries.values()), tmp_path / "damage.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_rows_are_refused(models: dict[str, MoEClassifier]) -> None:
    rows = {"input": torch.zeros(5, 1, 8, 8), "target": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(InvalidArgumentError, match="batches must hold at least 32 rows to see a recovery; got 5"):
        recovery_of(models["softmax"], [rows])
    with pytest.raises(InvalidArgumentError, match="batches must hold at least 32 rows to see a recovery; got 0"):
        recovery_of(models["softmax"], [])
    with pytest.raises(InvalidArgumentError, match="streams must be an integer of at least 1; got 0"):
        recovery_of(models["softmax"], [rows], streams=0)


def test_a_single_order_has_no_standard_error(models: dict[str, MoEClassifier], tmp_path: Path) -> None:
    one = [recovery_of(models["learned"], Digits(seed=1).test_dataloader(), "learned", streams=1)]
    records = recovery_records(one)
    assert records[1]["accuracy_error"] is None
    assert 0 < records[1]["accuracy"] < 1
    table = recovery_table(one)
    assert "One order of the test rows." in table
    assert "±" not in table
    assert recovery_figure(one, tmp_path / "damage.png").is_file()
