import math
from types import SimpleNamespace

import lightning
import pytest
import torch

from moe_posterior import InvalidArgumentError, LearnedPrior, PosteriorGate, SoftmaxGate
from moe_posterior.training.backbones import DigitsNet
from moe_posterior.training.callbacks import CompetenceUpdates
from moe_posterior.training.data import Digits
from moe_posterior.training.module import MoEClassifier

GATES = {
    "softmax": lambda size, experts: SoftmaxGate(size, experts, 2),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 8, 2),
}


def trained(gate: str, epochs: int, **options) -> tuple[MoEClassifier, Digits, lightning.Trainer]:
    lightning.seed_everything(0, verbose=False)
    model, data = MoEClassifier(DigitsNet(), 10, gate=GATES[gate], lr=3e-3), Digits(seed=1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CompetenceUpdates(**options)],
    )
    trainer.fit(model, datamodule=data)
    return model, data, trainer


def test_a_refit_counts_each_experts_own_correctness_row_by_row() -> None:
    model, data, trainer = trained("posterior", 2, warmup_epochs=1)
    model.eval()
    CompetenceUpdates(warmup_epochs=0).refit(trainer, model)
    successes, failures = torch.zeros(8, 4, dtype=torch.float64), torch.zeros(8, 4, dtype=torch.float64)
    split = data.split("train")
    with torch.no_grad():
        for image, target in zip(split.inputs, split.targets, strict=True):
            scaled = image[None].float() / split.scale if split.scale else image[None]
            features = model.features(scaled)
            cluster = int(model.moe.gate(features).cluster_ids)
            for e, expert in enumerate(model.moe.experts):
                right = int(expert(features).argmax()) == int(target)
                successes[cluster, e] += right
                failures[cluster, e] += not right
    assert torch.equal(model.moe.gate.posterior.successes, successes)
    assert torch.equal(model.moe.gate.posterior.failures, failures)


def test_all_experts_weigh_the_same_until_the_clusters_are_fitted() -> None:
    model, data, _ = trained("posterior", 1, warmup_epochs=3)
    assert not model.moe.gate.fitted
    batch = next(iter(data.test_dataloader()))
    prediction = model.predict(batch["input"])
    assert prediction.routing is None
    torch.testing.assert_close(prediction.probs, prediction.expert_probs.mean(dim=1))


def test_the_layer_and_the_classifier_mix_alike() -> None:
    model, data, _ = trained("posterior", 2, warmup_epochs=1)
    model.eval()
    inputs = next(iter(data.test_dataloader()))["input"]
    torch.testing.assert_close(model(inputs), model.moe(model.features(inputs)))
    torch.testing.assert_close(model(inputs).sum(dim=-1), torch.ones(len(inputs)))


def test_evidence_from_validation_rows_counts_those_alone() -> None:
    model, data, _ = trained("posterior", 3, warmup_epochs=1, evidence="val")
    posterior = model.moe.gate.posterior
    assert (posterior.successes + posterior.failures).sum(dim=0).tolist() == [float(len(data.split("val")))] * 4


class Careful(PosteriorGate):
    @property
    def counts_training_rows(self) -> bool:
        return False


def test_a_gate_that_forbids_training_rows_is_given_validation_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "careful", lambda size, experts: Careful(size, experts, 8, 2))
    model, data, _ = trained("careful", 3, warmup_epochs=1, observe_batches=True)
    posterior = model.moe.gate.posterior
    assert (posterior.successes + posterior.failures).sum(dim=0).tolist() == [float(len(data.split("val")))] * 4


def learned(size: int, experts: int) -> PosteriorGate:
    return PosteriorGate(size, experts, 8, 2, prior=LearnedPrior(16, draws=3.0, warmup_epochs=1))


def test_a_learned_prior_is_finished_after_the_last_batch_and_counts_no_outcome_as_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(GATES, "learned", learned)
    model, data, _ = trained("learned", 3, warmup_epochs=1, observe_batches=True)
    gate = model.moe.gate
    assert gate.clusterer.fitted
    assert not any(bool(counts.any()) for counts in gate.posterior.evidence)
    strength = gate.posterior.strength
    assert 1.0 <= float(strength[0, 0]) <= len(data.split("val"))
    torch.testing.assert_close(strength, strength[0, 0].expand_as(strength))
    model.eval()
    with torch.no_grad():
        val = [(model.features(b["input"]), b["target"]) for b in data.val_dataloader()]
        hidden, target = (torch.cat(parts) for parts in zip(*val, strict=True))
        correct = (model.moe.expert_outputs(hidden).argmax(dim=-1) == target[:, None]).double()
    before = gate.posterior.prior_alpha.clone()
    gate.learn_prior(hidden, correct)
    assert torch.equal(gate.posterior.prior_alpha, before), "validation rows alone said what the prior is worth"


def test_the_loss_holds_the_priors_log_score_and_a_share_of_every_experts_own() -> None:
    torch.manual_seed(0)
    gate = lambda size, experts: PosteriorGate(size, experts, 8, 2, prior=LearnedPrior(16, weight=2.0, own=0.25))  # noqa: E731
    model, batch = MoEClassifier(DigitsNet(), 10, gate=gate), next(iter(Digits(seed=1).val_dataloader()))
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model._trainer = SimpleNamespace(current_epoch=3, global_step=41)
    loss = float(model.training_step(batch, 0)["loss"])
    hidden, target = model.features(batch["input"]), batch["target"]
    probs = model.moe.expert_outputs(hidden)
    score, own = [], []
    for row, label in enumerate(target.tolist()):
        for expert, logit in enumerate(model.moe.gate.prior.logits(hidden)[row].tolist()):
            mean = 1 / (1 + math.exp(-logit))
            score.append(-math.log(mean if int(probs[row, expert].argmax()) == label else 1 - mean))
            own.append(-math.log(float(probs[row, expert, label])))
    mixture = -model(batch["input"]).gather(1, target[:, None]).log().mean()
    parts = float(mixture) + 2.0 * sum(score) / len(score) + 0.25 * sum(own) / len(own)
    assert loss == pytest.approx(parts, rel=1e-4)
    assert {"train/competence", "train/experts"} <= logged.keys()
    assert (model.moe.gate.prior.epoch, model.moe.gate.prior.step) == (3, 41)


class StopAfterOne(lightning.Callback):
    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = True


def test_in_its_warm_up_a_learned_prior_learns_while_all_experts_weigh_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routed = []
    monkeypatch.setattr(
        PosteriorGate, "forward", lambda gate, hidden: routed.append(gate.training) or gate.route(hidden)
    )
    model = MoEClassifier(DigitsNet(), 10, gate=learned, lr=3e-3)
    before = model.moe.gate.prior.map[0].weight.clone()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[CompetenceUpdates(), StopAfterOne()],
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(seed=1))
    assert not any(routed)
    assert not torch.equal(model.moe.gate.prior.map[0].weight, before)
    assert model.moe.gate.clusterer.fitted, "a training that is stopped early is finished too"


def test_a_learned_prior_goes_back_to_its_map_when_training_goes_on() -> None:
    model = MoEClassifier(DigitsNet(), 10, gate=learned, lr=3e-3)
    model.moe.gate.fit(torch.randn(50, model.moe.gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    seen = []

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(pl_module.moe.gate.clusterer.fitted)

    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[CompetenceUpdates(), Look()],
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(seed=1))
    assert seen == [False] * 3
    assert model.moe.gate.clusterer.fitted


def test_refits_happen_when_they_should() -> None:
    model, data, _ = trained("posterior", 5, warmup_epochs=1, refit_every=3)
    posterior = model.moe.gate.posterior
    assert (posterior.successes + posterior.failures).sum(dim=0).tolist() == [1.0 * len(data.split("train"))] * 4
    model, data, _ = trained("posterior", 5, warmup_epochs=1, refit_every=3, observe_batches=True)
    posterior = model.moe.gate.posterior
    # Refit at the start of epochs 1 and 4: one pass and one epoch of batches since.
    assert (posterior.successes + posterior.failures).sum(dim=0).tolist() == [2.0 * len(data.split("train"))] * 4


def test_a_gate_without_clusters_trains_as_if_the_callback_were_not_there() -> None:
    early, _, _ = trained("softmax", 2, warmup_epochs=0)
    late, _, _ = trained("softmax", 2, warmup_epochs=9)
    for one, other in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(one, other)
    start = MoEClassifier(DigitsNet(), 10, gate=GATES["softmax"]).moe.gate.router.weight
    assert not torch.equal(early.moe.gate.router.weight, start)


@pytest.mark.parametrize("options", [{"warmup_epochs": -1}, {"refit_every": 0}, {"fit_rows": 0}, {"evidence": "test"}])
def test_wrong_options_are_named(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        CompetenceUpdates(**options)


def test_a_backbone_without_a_width_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="Flatten has none"):
        MoEClassifier(torch.nn.Flatten(), 10)
