"""The belief follows the weights through transformers' Trainer: learning, saving, resuming, and going back to the best model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.models import VOCABULARY, D, evidence
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Trainer, TrainingArguments

from moe_posterior import InvalidArgumentError, NotFittedError, record, swap_gates
from moe_posterior.huggingface import BeliefTrainerCallback, load_belief, load_swapped, swapped_gates
from moe_posterior.huggingface.saving import FILE

pytest.importorskip("accelerate")


def rows(count: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def swapped(seed: int = 0, fit: bool = True) -> nn.Module:
    """A model whose weights transformers saves by the names that it has in memory: the Trainer resumes no others (Mixtral, Qwen3)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GptOssForCausalLM(
            GptOssConfig(
                vocab_size=VOCABULARY,
                hidden_size=D,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=4,
                layer_types=["full_attention"] * 2,
                num_experts_per_tok=2,
            )
        )
    report = swap_gates(model, num_clusters=3, half_life=None, amnesty=None)
    if fit:
        report.fit([{"input_ids": torch.stack([row["input_ids"] for row in rows(seed=1)])}])
    return model


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = TrainingArguments(str(folder), **{**settings, **options})
    return Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4, 2), callbacks=list(callbacks))


def belief(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for _, gate in swapped_gates(model) for tensor in gate.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def total(model: nn.Module) -> float:
    return sum(evidence(gate) for _, gate in swapped_gates(model))


@pytest.mark.parametrize(("every", "accumulated", "observed"), [(1, 1, 4), (2, 1, 2), (1, 2, 8)])
def test_training_steps_become_evidence_and_are_logged(
    every: int, accumulated: int, observed: int, tmp_path: Path
) -> None:
    model = swapped()
    run = trainer(
        model, tmp_path, BeliefTrainerCallback(every=every), save_strategy="no", gradient_accumulation_steps=accumulated
    )
    run.train()
    slots = 2 * (2 * 7) * 2  # layers, tokens that predict one, experts of each
    assert total(model) == pytest.approx(observed * slots, rel=0.1)  # a slot without any gradient is not observed
    assert total(model) % 1 == 0
    logged = [entry["belief_evidence"] for entry in run.state.log_history]
    assert logged == sorted(logged)
    assert logged[-1] == total(model)
    assert not any(gate._forward_hooks for _, gate in swapped_gates(model))


def test_observing_by_the_callback_is_observing_by_hand(tmp_path: Path) -> None:
    model, other = swapped(), swapped()
    run = trainer(model, tmp_path, BeliefTrainerCallback(), max_steps=1, save_strategy="no")
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    with record(other) as trace:
        loss = other(**{name: value.to(other.device) for name, value in batch.items()}).loss
    loss.backward()
    trace.observe_gradients()
    assert total(model) == total(other)


def test_training_is_the_same_with_and_without_the_callback(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [BeliefTrainerCallback(every=2)]):
        model = swapped()
        trainer(model, tmp_path, *callbacks, save_strategy="no").train()
        assert not any(gate.takes_part for _, gate in swapped_gates(model))  # too little evidence to change a choice
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert same(*weights)


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["whole", "lora"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_ends_with_the_belief_of_one_that_went_through(wrap: Any, moved: bool, tmp_path: Path) -> None:
    through = wrap(swapped())
    trainer(through, tmp_path / "through", BeliefTrainerCallback()).train()
    first = wrap(swapped())
    trainer(first, tmp_path / "a", BeliefTrainerCallback(), max_steps=4).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    second = wrap(swapped(fit=False))
    options = {"resume_from": str(checkpoint)} if moved else {}
    run = trainer(second, tmp_path / ("b" if moved else "a"), BeliefTrainerCallback(**options))
    run.train(resume_from_checkpoint=str(checkpoint))
    assert total(second) > 0
    assert same(belief(second), belief(through))
    assert (tmp_path / ("b" if moved else "a") / "checkpoint-4" / FILE).is_file()


def test_a_checkpoint_of_another_run_is_not_taken_for_the_resumed_one(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 5)):
        trainer(swapped(seed), tmp_path / name, BeliefTrainerCallback(), max_steps=2).train()
    run = trainer(swapped(fit=False), tmp_path / "b", BeliefTrainerCallback())
    with pytest.raises(InvalidArgumentError, match="resume_from must be the folder of the checkpoint of step 2"):
        run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["whole", "lora"])
def test_the_best_models_belief_comes_back_with_its_weights(wrap: Any, tmp_path: Path) -> None:
    model = wrap(swapped())
    run = trainer(
        model,
        tmp_path,
        BeliefTrainerCallback(),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_step",
        learning_rate=1.0,
    )
    losses = iter([1.0, 0.0])
    run.compute_metrics = None
    evaluate = run.evaluate

    def worse_each_time(*args: Any, **kwargs: Any) -> dict[str, float]:
        found = evaluate(*args, **kwargs)
        found["eval_step"] = next(losses)
        return found

    run.evaluate = worse_each_time
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = wrap(swapped(fit=False)), wrap(swapped(fit=False))
    load_belief(best, tmp_path / "checkpoint-2")
    load_belief(last, tmp_path / "checkpoint-4")
    assert not same(belief(best), belief(last))
    assert same(belief(model), belief(best))


def test_a_checkpoint_is_a_folder_that_load_swapped_reads(tmp_path: Path) -> None:
    model = swapped()
    trainer(model, tmp_path, BeliefTrainerCallback(), max_steps=2).train()
    loaded = load_swapped(tmp_path / "checkpoint-2")
    assert same(belief(loaded), belief(model))


def test_what_would_lose_the_belief_is_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match=r"call swapped\.fit"):
        trainer(swapped(fit=False), tmp_path, BeliefTrainerCallback()).train()
    plain = swapped()
    trainer(plain, tmp_path / "a", max_steps=2, save_strategy="steps").train()
    (tmp_path / "a" / "checkpoint-2" / FILE).unlink()
    with pytest.raises(InvalidArgumentError, match="there is none in"):
        trainer(plain, tmp_path / "a", BeliefTrainerCallback()).train(resume_from_checkpoint=True)
    with pytest.raises(InvalidArgumentError, match="every must"):
        BeliefTrainerCallback(every=0)


def test_weights_that_are_resumed_without_their_belief_are_warned_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer(swapped(), tmp_path, BeliefTrainerCallback(), max_steps=2).train()
    plain = trainer(swapped(fit=False), tmp_path, max_steps=4, save_strategy="no")
    with pytest.warns(UserWarning, match="Call load_belief"):
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    recwarn.clear()
    kept = trainer(swapped(fit=False), tmp_path, BeliefTrainerCallback(), save_strategy="no")
    kept.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [each for each in recwarn if "load_belief" in str(each.message)]


def test_a_state_dict_that_holds_the_belief_is_loaded_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    model, other = swapped(), swapped(seed=1)
    other.load_state_dict(model.state_dict())
    assert same(belief(other), belief(model))
    assert not [each for each in recwarn if "load_belief" in str(each.message)]
