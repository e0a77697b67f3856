"""The belief callback on a transformers model inside a LightningModule, its routers swapped."""

from typing import Any

import lightning
import pytest
import torch
from huggingface.models import batch, mixtral
from torch import Tensor

from moe_posterior import record, swap_gates
from moe_posterior.training.belief import BeliefCallback

STEPS, WARMUP, REAL = 8, 3, 27  # tokens of a batch that are not padding


class Tuned(lightning.LightningModule):
    def __init__(self, mode: str, *, balanced: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        self.model = mixtral()
        self.swapped = swap_gates(self.model, num_clusters=4, mode=mode)
        self.balanced = balanced
        if checkpointing:
            self.model.gradient_checkpointing_enable()

    def training_step(self, rows: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        return self.model(**rows, labels=labels, output_router_logits=self.balanced).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def fit(module: Tuned, *callbacks: lightning.Callback) -> None:
    trainer = lightning.Trainer(accelerator="cpu", barebones=True, max_steps=STEPS, callbacks=list(callbacks))
    rows = [batch(seed=seed, padded=3) for seed in range(STEPS)]
    trainer.fit(module.train(), torch.utils.data.DataLoader(rows, batch_size=None))


def gates_of(module: Tuned) -> list[Any]:
    return [layer.mlp.gate.posterior_gate for layer in module.model.model.layers]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["prior", "replace"])
def test_swapped_routers_are_fitted_to_the_tokens_that_are_not_padding(mode: str, checkpointing: bool) -> None:
    module, callback = Tuned(mode, checkpointing=checkpointing), BeliefCallback(warmup=WARMUP)
    counted = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            samples = callback.state_dict()["samples"]
            counted.append([len(sample["keys"]) for sample in samples.values()])

    fit(module, callback, Look())
    assert counted[: WARMUP - 1] == [[REAL] * 2, [2 * REAL] * 2]
    for gate in gates_of(module):
        assert gate.clusterer.fitted
        seen = gate.posterior.successes + gate.posterior.failures
        assert 0 < float(seen.sum()) <= 2 * REAL * STEPS
    if mode == "prior":
        assert all(len(gate.reference.unique()) > 1 for gate in gates_of(module))


@pytest.mark.parametrize("mode", ["prior", "replace"])
def test_until_the_fit_a_swapped_model_trains_as_the_stock_one(mode: str) -> None:
    losses: dict[str, list[float]] = {"with": [], "without": []}

    class Losses(lightning.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *arguments: Any) -> None:
            losses[self.name].append(float(outputs["loss"]))

    fit(Tuned(mode), BeliefCallback(warmup=STEPS), Losses("with"))
    stock = Tuned(mode)
    fit(stock, Losses("without"))
    assert losses["with"] == losses["without"]


def test_a_load_balancing_loss_is_no_outcome() -> None:
    """The gradient of the auxiliary loss reaches every token; the outcomes are those of the loss without it."""

    def outcomes(balanced: bool) -> list[Tensor]:
        module, seen = Tuned("prior", balanced=balanced), []

        class Keep(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
                if trainer.global_step == 1:
                    samples = callback.state_dict()["samples"].values()
                    seen.extend(sample["outcome"].nan_to_num(-1) for sample in samples)

        callback = BeliefCallback(warmup=WARMUP)
        fit(module, callback, Keep())
        return seen

    for plain, balanced in zip(outcomes(False), outcomes(True), strict=True):
        assert torch.equal(plain, balanced)
        assert (plain == 1).any()


def test_an_unfitted_gate_in_replace_mode_records_the_routers_own_choice() -> None:
    model, rows = mixtral(), batch(padded=3)
    with torch.no_grad():
        before = model(**rows).logits
        swap_gates(model, num_clusters=4, mode="replace")
        with record(model) as trace:
            after = model(**rows).logits
    assert torch.equal(before, after)
    for _, routing in trace.routings:
        assert int(routing.distance.isfinite().sum()) == REAL
        assert not routing.cluster_ids.any()
