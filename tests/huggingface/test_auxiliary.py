"""An auxiliary loss on the routers' logits trains the model as ever and is no evidence."""

import gc
import weakref
from typing import Any

import pytest
import torch
from huggingface.models import batch, evidence, mixtral
from model_survey.tiny import tiny_batch, tiny_model
from torch import Tensor

from moe_posterior import InvalidArgumentError, record, swap_gates
from moe_posterior.huggingface.swap import swapped_gates

TYPES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "dbrx",
    "jetmoe",
    "granitemoe",
    "phimoe",
    "gpt_oss",
    "switch_transformers",
]


def labelled(**options: Any) -> dict[str, Tensor]:
    """Token ids of which only the first half has labels."""
    given = batch(**options)
    labels = given["input_ids"].clone()
    labels[:, 5:] = -100
    return {**given, "labels": labels}


def swapped(model: torch.nn.Module, given: dict[str, Tensor]) -> torch.nn.Module:
    swap_gates(model, num_clusters=2).fit([{name: part for name, part in given.items() if name != "labels"}])
    return model


def outcomes(model: torch.nn.Module, given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    model.zero_grad()
    with record(model) as trace:
        loss = model(**given, **options).loss
    loss.backward()
    found = [outcome for _, _, outcome in trace.gradient_outcomes()]
    trace.close()
    return found


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_tokens_without_a_label_are_unobserved_in_every_layer() -> None:
    given = labelled()
    found = outcomes(swapped(mixtral(router_aux_loss_coef=1.0), given), given, output_router_logits=True)
    for outcome in found:
        assert outcome.view(3, 10, -1)[:, 5:].isnan().all()
        assert outcome.view(3, 10, -1)[:, :4].isfinite().any()


@pytest.mark.parametrize("model_type", TYPES)
def test_outcomes_are_those_of_the_loss_alone_and_gradients_those_of_the_whole(model_type: str) -> None:
    model = tiny_model(model_type)
    for name in ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.5)
    given = tiny_batch(model)
    given["labels"] = given.get("decoder_input_ids", given["input_ids"]).clone()
    given["labels"][:, 4:] = -100
    model(**given, output_router_logits=True).loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    swapped(model, given)
    whole = outcomes(model, given, output_router_logits=True)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert_alike(whole, outcomes(model, given, output_router_logits=False))


def test_a_loss_that_the_caller_adds_up_is_told_apart_too() -> None:
    given = batch()
    labels = given["input_ids"]
    model = swapped(mixtral(), given)

    def run(weight: float) -> list[Tensor]:
        with record(model) as trace:
            output = model(**given, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :4].flatten(0, 1), labels[:, :4].flatten())
        (loss + weight * output.aux_loss if weight else loss).backward()
        return [outcome for _, _, outcome in trace.gradient_outcomes()]

    assert_alike(run(1.0), run(0.0))


def test_several_forwards_a_frozen_model_and_half_precision_are_told_apart() -> None:
    given, other = labelled(), labelled(seed=5, size=2)
    for prepare in (lambda m: m, lambda m: m.requires_grad_(False), lambda m: m.bfloat16()):
        model = prepare(swapped(mixtral(router_aux_loss_coef=1.0), given))
        expected = outcomes(model, given) + outcomes(model, other)
        with record(model) as trace:
            losses = [model(**each, output_router_logits=True).loss for each in (given, other)]
        (sum(losses) / 8).backward()
        assert_alike([outcome for _, _, outcome in trace.gradient_outcomes()], expected)
        trace.observe_gradients()
        assert all(evidence(gate) > 0 for _, gate in swapped_gates(model))


def test_warm_start_measures_the_loss_alone() -> None:
    given, references = labelled(), []
    for coefficient in (0.0, 1.0):
        model = mixtral(router_aux_loss_coef=coefficient, output_router_logits=True)
        report = swap_gates(model, num_clusters=2)
        report.fit([given])
        report.warm_start([given])
        references.append([gate.posterior.prior_alpha for _, gate in swapped_gates(model)])
    assert all(torch.equal(one, other) for one, other in zip(*references, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forwards_are_told_apart(reentrant: bool) -> None:
    given = labelled()
    model = swapped(mixtral(router_aux_loss_coef=1.0), given)
    expected = outcomes(model, given)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(outcomes(model, given, output_router_logits=True), expected)


def test_an_auxiliary_loss_from_elsewhere_is_refused_and_nothing_observed() -> None:
    given = batch()
    model = swapped(mixtral(), given)
    with record(model) as trace:
        output = model.model(**given, output_router_logits=True)
    sum(logits.square().mean() for logits in output.router_logits).backward()
    with pytest.raises(InvalidArgumentError, match="auxiliary loss"):
        trace.observe_gradients()
    assert not any(evidence(gate) for _, gate in swapped_gates(model))


def test_a_dropped_trace_keeps_no_graph_alive() -> None:
    given = labelled()
    model = swapped(mixtral(), given)
    with record(model) as trace:
        output = model(**given, output_router_logits=True)
    kept = weakref.ref(output.logits)
    del trace, output
    gc.collect()
    assert kept() is None
