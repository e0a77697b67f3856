"""Record and replay through the routers of transformers models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, export_routing, record
from moe_posterior.gates import PriorGate
from moe_posterior.replay import recording_from_experts, replay

transformers = pytest.importorskip("transformers")
from moe_posterior.huggingface import swap_gates  # noqa: E402, after the skip

D, E, C, VOCABULARY = 16, 8, 4, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=E))


def qwen3() -> nn.Module:
    options = {"num_experts": E, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": False}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **options))


def deepseek_v3() -> nn.Module:
    options = {
        "n_routed_experts": E,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES, **options))


def gpt_oss() -> nn.Module:
    options = {"num_local_experts": E, "head_dim": 8, "layer_types": ["full_attention"] * 3}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **options))


MAKERS = [mixtral, qwen3, deepseek_v3, gpt_oss]


def swapped(make: object, mode: str = "prior") -> nn.Module:
    model = make()
    swap_gates(model, num_clusters=C, mode=mode)
    generator = torch.Generator().manual_seed(0)
    for router in routers(model):
        nn.init.normal_(router.weight, std=0.5, generator=generator)
        router.posterior_gate.fit(torch.randn(80, D, generator=generator))
        believe(router.posterior_gate, generator)
    return model


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "posterior_gate")]


def believe(gate: nn.Module, generator: torch.Generator) -> None:
    ids = torch.randint(C, (300,), generator=generator)
    outcome = torch.bernoulli(torch.rand(C, E, generator=generator)[ids], generator=generator)
    gate.posterior.observe(ids, outcome)


def estrange(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    for router in routers(model):
        believe(router.posterior_gate, generator)
        nn.init.normal_(router.weight, generator=generator)


def ids(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, seeds: tuple[int, ...] = (1, 2)) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = [model(input_ids=ids(seed), labels=ids(seed)) for seed in seeds]
    sum(output.loss for output in outputs).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return [output.logits.detach() for output in outputs], found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("mode", ["prior", "replace"])
def test_a_swapped_models_logits_repeat_bit_for_bit_whatever_became_of_its_routers(
    make: object, mode: str, tmp_path: Path
) -> None:
    model = swapped(make, mode).eval()
    with torch.no_grad(), record(model) as trace:
        before = [model(input_ids=ids(seed)).logits for seed in (1, 2)]
    trace.save(tmp_path / "routing")
    trace.close()
    estrange(model)
    with torch.no_grad(), replay(model, tmp_path / "routing"):
        after = [model(input_ids=ids(seed)).logits for seed in (1, 2)]
    assert same(before, after)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids(1)).logits, before[0])


@pytest.mark.parametrize("make", MAKERS)
def test_recomputed_weights_are_the_routers_own_with_their_gradient(make: object) -> None:
    model = swapped(make).train()
    with record(model) as trace:
        logits, expected = step(model)
    trace.close()
    with replay(model, trace, weights="recomputed"):
        again, found = step(model)
    assert same(logits, again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.endswith(("gate.weight", "router.weight")) and found[name].abs().sum() > 0 for name in found)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("weights", ["recorded", "recomputed"])
def test_gradient_checkpointing_of_transformers_repeats_the_forced_routing(
    make: object, reentrant: bool, weights: str
) -> None:
    model = swapped(make).train()
    with record(model) as trace:
        model(input_ids=ids(1)), model(input_ids=ids(2))
    trace.close()
    estrange(model)
    with replay(model, trace, weights=weights):
        logits, expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with replay(model, trace, weights=weights):
        again, found = step(model)
    assert same(logits, again)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_recomputed_weights_follow_the_changed_router_on_the_recorded_experts() -> None:
    model = swapped(mixtral).eval()
    with record(model) as trace:
        model(input_ids=ids(1))
    trace.close()
    estrange(model)
    seen = []
    for router in routers(model):
        router.register_forward_hook(
            lambda _, args, output: seen.append((args[0].reshape(-1, D), output[1], output[2]))
        )
    with replay(model, trace, weights="recomputed"):
        model(input_ids=ids(1))
    for router, (_, routing), (hidden, weights, indices) in zip(routers(model), trace.routings, seen, strict=True):
        assert torch.equal(indices, routing.expert_indices)
        gate: PriorGate = router.posterior_gate
        bias = gate.evidence_bias[gate.assign(hidden).cluster_ids]
        scores = (hidden.double() @ router.weight.double().T + bias).gather(1, indices).exp()
        expected = scores / scores.sum(dim=1, keepdim=True)
        torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_the_served_routing_chose_is_what_training_replays() -> None:
    model = swapped(mixtral).eval()
    functions = export_routing(model)  # the rollout's, as an engine would hold them
    estrange(model)
    hidden = torch.randn(18, D, generator=torch.Generator().manual_seed(4))
    experts = {}
    for (name, function), router in zip(functions.items(), routers(model), strict=True):
        logits = nn.functional.linear(hidden, router.weight)
        experts[name] = function(hidden_states=hidden, gating_output=logits, topk=2, renormalize=True)[1]
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda _, args, output: seen.append(output[2]))
    with replay(model, recording_from_experts(model, experts), weights="recomputed"):
        model(input_ids=ids(1))
    assert same(seen, [chosen.long() for chosen in experts.values()])


def test_a_router_that_does_not_choose_by_top_k_and_a_replacing_gate_have_no_rule() -> None:
    replacing = swapped(mixtral, "replace").eval()
    with torch.no_grad(), record(replacing) as trace:
        replacing(input_ids=ids(1))
    with (
        pytest.raises(InvalidArgumentError, match="must be 'recorded'"),
        replay(replacing, trace, weights="recomputed"),
    ):
        pytest.fail("the block ran")
    model = swapped(mixtral).eval()
    with torch.no_grad(), record(model) as trace:
        model(input_ids=ids(1))
    trace.close()
    for router in routers(model):
        router.moe_posterior.original = _Sorting
    estrange(model)
    with (
        torch.no_grad(),
        pytest.raises(InvalidArgumentError, match="does not choose by one top-k"),
        replay(model, trace, weights="recomputed"),
    ):
        model(input_ids=ids(1))


class _Sorting(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, D)
        logits = nn.functional.linear(hidden, self.weight)
        weights, indices = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        return logits, weights[:, :2], indices[:, :2]


def test_an_interrupt_inside_a_router_leaves_nothing_forced_behind() -> None:
    model = swapped(mixtral).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with record(model) as trace:
        model(tokens)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = routers(model)[0].posterior_gate.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), replay(model, trace, weights="recomputed"):
        model(tokens)
    handle.remove()
    scores = torch.tensor([[0.1, 0.7, 0.2]]).repeat(12, 3)  # as many rows as tokens, and no fewer columns than experts
    assert scores.topk(2).indices[:, 0].eq(scores.argmax(dim=1)).all()


@pytest.mark.parametrize("weights", ["recorded", "recomputed"])
def test_a_trace_still_at_hand_does_not_disturb_a_checkpointed_replay_of_it(weights: str) -> None:
    model = swapped(mixtral)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), record(model) as trace:
        model(tokens)
    noted = [routing for _, routing in trace.routings]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with replay(model, trace, weights=weights):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert [routing for _, routing in trace.routings] == noted
