"""Replay and serving over every mixture-of-experts type of the installed transformers: right, or refused by name."""

import warnings

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from model_survey.checks import outputs, same
from model_survey.tiny import moe_model_types, tiny_batch, tiny_model

from moe_posterior import InvalidArgumentError, export_routing, record, replay, swap_gates
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.serving.hosts import _run

PARTLY_REPLAYED = {"inkling_mm_model", "inkling_text"}


def believe(router: SwappedRouter, seed: int) -> None:
    gate, generator = router.posterior_gate, torch.Generator().manual_seed(seed)
    ids = torch.randint(gate.num_clusters, (300,), generator=generator)
    competence = torch.rand(gate.num_clusters, gate.num_experts, generator=generator)
    gate.posterior.observe(ids, torch.bernoulli(competence[ids], generator=generator))


def swapped(model_type: str) -> tuple[nn.Module, dict[str, SwappedRouter]]:
    model = tiny_model(model_type).eval()
    if type(model).forward is nn.Module.forward:
        pytest.skip("a composite whose parts are types of their own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            swap_gates(model, num_clusters=3)
        except InvalidArgumentError:
            pytest.skip("refused by swap_gates")
    routers = {name: module for name, module in model.named_modules() if isinstance(module, SwappedRouter)}
    generator = torch.Generator().manual_seed(1)
    for router in routers.values():
        router.posterior_gate.fit(torch.randn(60, router.posterior_gate.hidden_size, generator=generator))
        believe(router, 2)
    return model, routers


@pytest.mark.slow
@pytest.mark.parametrize("model_type", moe_model_types())
@torch.no_grad()
def test_a_recorded_routing_repeats_bit_for_bit_or_is_refused(model_type: str) -> None:
    model, routers = swapped(model_type)
    batch = tiny_batch(model)
    with record(model) as trace:
        before = outputs(model, batch)
    trace.close()
    with replay(model, trace, weights="recomputed"):
        assert same(before, outputs(model, batch))
    generator = torch.Generator().manual_seed(5)
    for router in routers.values():
        believe(router, 7)
        for name, weight in router.named_parameters():
            if "experts" in name:  # DBRX routes where its experts are
                continue
            weight.add_(weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    if model_type in PARTLY_REPLAYED:
        with pytest.raises(InvalidArgumentError, match="must be 'recomputed'"), replay(model, trace):
            pytest.fail("the block ran")
        return
    with replay(model, trace):
        assert same(before, outputs(model, batch))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", moe_model_types())
@torch.no_grad()
def test_a_swapped_model_is_served_as_it_chooses_or_refused(model_type: str) -> None:
    model, routers = swapped(model_type)
    try:
        functions = export_routing(model, scaled=True)
    except InvalidArgumentError as error:
        pytest.skip(f"refused: {error}")
    calls: list[tuple[str, Tensor, object]] = []
    for name, router in routers.items():
        hidden_of = router.moe_posterior.adapter.hidden
        router.register_forward_hook(
            lambda _, args, kwargs, output, name=name, of=hidden_of: calls.append((name, of(args, kwargs), output)),
            with_kwargs=True,
        )
    outputs(model, tiny_batch(model))
    assert calls
    for name, hidden, output in list(calls):
        router, function = routers[name], functions[name]
        indices, weights = router.moe_posterior.adapter.read(router, output)
        hidden = hidden.reshape(len(indices), -1)
        logits = _run(router, hidden)[0].reshape(len(hidden), -1)
        chosen = torch.zeros(len(hidden), function.num_experts).scatter(1, indices, weights.float())
        served = []
        for renormalize in (True, False):
            found, ids = function(
                hidden_states=hidden, gating_output=logits, topk=indices.shape[1], renormalize=renormalize
            )
            served.append(torch.zeros_like(chosen).scatter(1, ids.long(), found))
        assert any(torch.allclose(chosen, each, rtol=1e-4, atol=1e-5) for each in served)
