"""Export from whole models, the way to another process, and the agreement with routers of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior import InvalidArgumentError, MixtureOfExperts, PosteriorGate, PriorGate
from moe_posterior.errors import DamagedFileError
from moe_posterior.files.tensorfile import load_tensors, save_tensors
from moe_posterior.gates import Gate
from moe_posterior.serving import HostRule, export_routing, load_routing, save_routing, update_routing

D, E, C, K = 16, 8, 4, 2


def data(num_tokens: int, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def believe(gate: Gate, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(gate.num_clusters, (600,), generator=generator)
    competence = torch.rand(gate.num_clusters, gate.num_experts, generator=generator)
    gate.posterior.observe(ids, torch.bernoulli(competence[ids], generator=generator))


def model() -> nn.Sequential:
    gates: list[Gate] = [PriorGate(D, E, C, K), PosteriorGate(D, E, C, K), PosteriorGate(D, E, C, K, novelty="class")]
    for gate in gates:
        gate.fit(data(80))
        believe(gate)
    experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])
    return nn.Sequential(*(MixtureOfExperts(experts, gate) for gate in gates))


def answers(functions: dict) -> list[Tensor]:
    hidden, logits = data(60, 1), data(60, 2, E)
    calls = [f(hidden_states=hidden, gating_output=logits, topk=K, renormalize=True) for f in functions.values()]
    return [part for call in calls for part in call]


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(one, other) for one, other in zip(answers(left), answers(right), strict=True))


def test_functions_travel_by_file_bit_for_bit(tmp_path: Path) -> None:
    rule = HostRule("sigmoid", 4, 2, 2.5, torch.linspace(0, 1, E))
    functions = export_routing(model(), rule={"0.gate": rule}, scaled=True)
    save_routing(functions, tmp_path / "routing")
    again = load_routing(tmp_path / "routing")
    assert list(again) == ["0.gate", "1.gate", "2.gate"]
    assert same(again, functions)
    assert again["0.gate"].rule[:4] == rule[:4]


def test_a_serving_process_takes_the_evidence_of_a_training_process(tmp_path: Path) -> None:
    source = model()
    functions = export_routing(source)
    places = [table.data_ptr() for f in functions.values() for table in f.state_dict().values()]
    for layer in source:
        believe(layer.gate, seed=7)
    trained = export_routing(source)
    assert not same(functions, trained)
    save_routing(trained, tmp_path / "routing")
    update_routing(functions, tmp_path / "routing")
    assert same(functions, trained)
    assert [table.data_ptr() for f in functions.values() for table in f.state_dict().values()] == places


def test_an_update_from_another_model_is_refused_whole(tmp_path: Path) -> None:
    functions = export_routing(model())
    before = answers(functions)
    first = dict(list(functions.items())[:1])
    save_routing(first, tmp_path / "fewer")
    wider = model()
    wider[2].gate = PosteriorGate(D, E, C + 1, K)
    wider[2].gate.fit(data(80))
    save_routing(export_routing(wider), tmp_path / "wider")
    save_routing(export_routing(model(), rule=HostRule("sigmoid")), tmp_path / "rule")
    for name, message in (
        ("fewer", "must be those of"),
        ("wider", "function '2.gate' must be"),
        ("rule", "function '0.gate' must be"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            update_routing(functions, tmp_path / name)
    content = bytearray((tmp_path / "wider").read_bytes())
    content[-1] ^= 1
    (tmp_path / "wider").write_bytes(content)
    with pytest.raises(DamagedFileError):
        update_routing(functions, tmp_path / "wider")
    tensors, header = load_tensors(tmp_path / "rule", "exported routing")
    save_tensors(tmp_path / "rule", tensors, header | {"version": 9})
    with pytest.raises(DamagedFileError, match="version 1; got 9"):
        load_routing(tmp_path / "rule")
    assert all(torch.equal(one, other) for one, other in zip(before, answers(functions), strict=True))


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    return MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))


def qwen3() -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    return Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=D, num_local_experts=E, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False)
    )


def olmoe() -> nn.Module:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter

    return OlmoeTopKRouter(OlmoeConfig(hidden_size=D, num_local_experts=E, num_experts=E, num_experts_per_tok=K))


def gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    return GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))


def deepseek_v3() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2, routed_scaling_factor=2.5
        )
    )
    router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, E))
    return router


def llama4() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

    return Llama4Router(Llama4TextConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=1))


ROUTERS = {
    mixtral: True,
    qwen3: False,
    olmoe: False,
    gpt_oss: True,
    deepseek_v3: True,
    llama4: False,
}  # and whether it renormalises


def swapped(make: Callable[[], nn.Module], mode: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Gate]:
    pytest.importorskip("transformers")
    from moe_posterior.huggingface import swap_gates

    router = make()
    for weight in router.parameters():
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(2))
    block = nn.ModuleDict({"gate": router.to(dtype).eval()})
    swap_gates(block, num_clusters=C, mode=mode)
    return block, router.posterior_gate


def decision(router: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The router's own (T, E) weights, 0 where not chosen, and its plain logits."""
    output = router(hidden)
    indices, weights = router.moe_posterior.adapter.read(router, output)
    bias = getattr(router, "bias", None)
    return torch.zeros(len(hidden), E).scatter(1, indices, weights.float()), functional.linear(
        hidden, router.weight, bias
    )


def served(function: Callable, hidden: Tensor, logits: Tensor, top_k: int, renormalize: bool) -> Tensor:
    weights, ids = function(hidden_states=hidden, gating_output=logits, topk=top_k, renormalize=renormalize)
    return torch.zeros(len(hidden), E).scatter(1, ids.long(), weights)


@pytest.mark.parametrize("make", ROUTERS)
@pytest.mark.parametrize("mode", ["prior", "replace"])
@torch.no_grad()
def test_a_swapped_router_is_served_as_it_chooses_before_and_after_evidence(make: Callable, mode: str) -> None:
    block, gate = swapped(make, mode)
    hidden = data(300, 6)
    renormalize = ROUTERS[make]
    untouched, _ = decision(block["gate"], hidden)
    gate.fit(data(80))
    for evidence in (False, True):
        if evidence:
            believe(gate)
        function = export_routing(block, scaled=True)["gate"]
        expected, logits = decision(block["gate"], hidden)
        found = served(function, hidden, logits, gate.top_k, renormalize)
        assert torch.equal(found != 0, expected != 0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(expected, untouched) is (mode == "prior" and not evidence)
    if make is deepseek_v3:
        unscaled = served(export_routing(block)["gate"], hidden, logits, gate.top_k, renormalize)
        torch.testing.assert_close(2.5 * unscaled, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mixtral, qwen3])
@torch.no_grad()
def test_in_bfloat16_only_ties_and_roundings_are_served_otherwise(make: Callable) -> None:
    block, gate = swapped(make, "prior", torch.bfloat16)
    gate.fit(data(80))
    believe(gate)
    hidden = data(2000, 6).bfloat16()
    expected, logits = decision(block["gate"], hidden)
    found = served(export_routing(block, scaled=True)["gate"], hidden, logits, K, ROUTERS[make])
    differing = ((found != 0) != (expected != 0)).any(dim=1)
    assert differing.float().mean() < 0.03
    torch.testing.assert_close(found[~differing], expected[~differing], rtol=2e-2, atol=2e-2)


def test_a_router_whose_rule_is_unknown_is_refused_by_name() -> None:
    block, _ = swapped(mixtral, "prior")
    block["gate"].moe_posterior.original = _Odd
    with pytest.raises(
        InvalidArgumentError, match="rule of router 'gate', a _Odd, is not known: neither softmax nor sigmoid"
    ):
        export_routing(block)
    assert export_routing(block, rule=HostRule())["gate"].rule == HostRule()
    nn.init.zeros_(block["gate"].weight)
    with pytest.raises(InvalidArgumentError, match="logits are all equal"):
        export_routing(block)
    block["gate"].moe_posterior.original = _Needy
    with pytest.raises(InvalidArgumentError, match="cannot be run alone"):
        export_routing(block)


class _Odd(nn.Module):
    top_k = K

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden, self.weight)
        weights, indices = logits.square().topk(K, dim=-1)
        return logits, weights, indices


class _Needy(nn.Module):
    def forward(self, hidden: Tensor, also: Tensor) -> None: ...


@torch.no_grad()
def test_a_whole_swapped_mixtral_is_served_as_it_runs() -> None:
    transformers = pytest.importorskip("transformers")
    from moe_posterior.huggingface import swap_gates

    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=E,
    )
    language_model = transformers.MixtralForCausalLM(config).eval()
    swap_gates(language_model, num_clusters=C)
    routers = [layer.mlp.gate for layer in language_model.model.layers]
    for router in routers:
        nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
        router.posterior_gate.fit(data(80))
        believe(router.posterior_gate)
    functions = export_routing(language_model)
    assert list(functions) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for router in routers:
        router.register_forward_hook(lambda _, args, output: seen.append((args[0], output[1], output[2])))
    language_model(torch.randint(32, (3, 20), generator=torch.Generator().manual_seed(0)))
    for router, function, (hidden, weights, indices) in zip(routers, functions.values(), seen, strict=True):
        hidden = hidden.reshape(-1, D)
        logits = functional.linear(hidden, router.weight)
        found, ids = function(hidden_states=hidden, gating_output=logits, topk=K, renormalize=True)
        assert torch.equal(ids.long(), indices)
        torch.testing.assert_close(found, weights)
