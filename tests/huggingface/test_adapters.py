"""Routers of other libraries are swapped through adapters that a user registers."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.models import condemn, evidence, fit_on_noise
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, record, restore_gates, swap_gates
from moe_posterior.huggingface import Adapter, UnknownRouterError, find, register_adapter, swapped_gates
from moe_posterior.replay import replay

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "foreign_routers.py"))
KINDS = [("TokenChoiceTopKRouter", "Torchtitan"), ("MegatronTopKRouter", "Megatron")]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_registered", {})


def layers(router: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(EXAMPLE["Layer"](EXAMPLE[router]()) for _ in range(2)))


def hidden() -> Tensor:
    return torch.randn(60, EXAMPLE["DIM"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("router", "adapter"), KINDS)
def test_a_registered_router_is_swapped_observed_replayed_and_restored(router: str, adapter: str) -> None:
    model, rows = layers(router), hidden()
    before = model(rows)
    register_adapter(router, EXAMPLE[adapter]())
    report = swap_gates(model, num_clusters=3, half_life=None, amnesty=None)
    assert [(layer.name, layer.top_k) for layer in report.layers] == [("0.router", 2), ("1.router", 2)]
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        output = model(rows)
    assert torch.equal(output, before)
    with replay(model, trace):
        assert torch.equal(model(rows), before)
    output.square().mean().backward()
    trace.observe_gradients()
    assert [evidence(gate) for gate in gates.values()] == [120.0, 120.0]
    condemn(gates["0.router"], expert=3)
    with record(model) as trace, torch.no_grad():
        model(rows)
    assert not (trace.routings[0][1].expert_indices == 3).any()
    restore_gates(model)
    assert torch.equal(model(rows), before)


@pytest.mark.parametrize(("router", "adapter"), KINDS)
def test_a_replacing_gate_writes_its_choice_into_what_the_router_returns(router: str, adapter: str) -> None:
    register_adapter(router, EXAMPLE[adapter]())
    model, rows = layers(router), hidden()
    swap_gates(model, num_clusters=3, mode="replace")
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    gates["0.router"].posterior.successes[:, 5] = 50.0
    gates["0.router"].posterior.forget(1.0)
    first, second, *_ = model[0].router(rows)
    if second.dtype == torch.bool:
        assert second[:, 5].all()
        assert torch.equal(second, first > 0)
        assert (second.sum(1) == 2).all()
    else:
        assert (second == 5).any(1).all()
        assert first.shape == second.shape == (60, 2)


def test_a_router_of_any_name_is_found_once_it_is_registered() -> None:
    class Selector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.chosen = nn.Linear(8, 4), 1

        def forward(self, states: Tensor) -> dict[str, Tensor]:
            weights, experts = self.project(states).softmax(-1).topk(self.chosen)
            return {"experts": experts, "weights": weights}

    class Reading(Adapter):
        logits = None

        def top_k(self, router: nn.Module) -> int:
            return router.chosen

        def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
            return output["experts"], output["weights"]

        def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
            return {"experts": indices, "weights": weights}

    model = nn.Sequential(Selector())
    with pytest.raises(InvalidArgumentError, match="it holds no router"):
        swap_gates(model)
    register_adapter("Selector", Reading())
    assert [layer.router for layer in swap_gates(model).swapped] == ["Selector"]
    with record(model) as trace:
        model(torch.randn(5, 8))
    assert len(trace) == 1


def test_a_registered_adapter_that_does_not_fit_stops_the_first_forward() -> None:
    register_adapter("TokenChoiceTopKRouter", Adapter())
    model = layers("TokenChoiceTopKRouter")
    swap_gates(model)
    with pytest.raises(UnknownRouterError, match="must return"):
        model(hidden())


@pytest.mark.parametrize("name", ["", "my.Router", 3, None, "a b"])
def test_what_is_no_class_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="class_name must be the name of a class"):
        register_adapter(name, Adapter())


@pytest.mark.parametrize("adapter", [Adapter, None, "adapter"])
def test_what_is_no_adapter_is_refused(adapter: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="adapter must be an instance of Adapter"):
        register_adapter("Router", adapter)


def torchtitan_router() -> nn.Module:
    moe = pytest.importorskip("torchtitan.models.common.moe", exc_type=ImportError)
    linear = pytest.importorskip("torchtitan.models.common.linear", exc_type=ImportError)
    gate = linear.Linear.Config(in_features=16, out_features=8, bias=False)
    router = moe.TokenChoiceTopKRouter(moe.TokenChoiceTopKRouter.Config(num_experts=8, gate=gate, top_k=2))
    nn.init.normal_(router.gate.weight)
    return router


def megatron_router() -> nn.Module:
    """Megatron-Core's, but for the product of hidden states and weights, which moves the weights to a GPU."""
    core = pytest.importorskip("megatron.core.transformer.moe.router", exc_type=ImportError)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    class CpuTopKRouter(core.TopKRouter):
        def gating(self, input: Tensor) -> Tensor:
            return torch.matmul(input, self.weight.t())

    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
    config = TransformerConfig(**sizes, moe_router_load_balancing_type="none", use_cpu_initialization=True)
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = groups.tp_cp = groups.tp_dp_cp = None
    router = CpuTopKRouter(config, pg_collection=groups)
    nn.init.normal_(router.weight)
    return router


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "adapter", "shape"),
    [(torchtitan_router, "Torchtitan", (2, 30, 16)), (megatron_router, "Megatron", (30, 2, 16))],
)
def test_the_librarys_own_router_is_swapped_where_it_is_installed(
    make: Any, adapter: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    register_adapter(type(model[0]).__name__, EXAMPLE[adapter]())
    rows = torch.randn(*shape)
    before = [part.clone() for part in model(rows)]
    swap_gates(model, num_clusters=3, half_life=None, amnesty=None)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        output = model(rows)
    assert all(torch.equal(one, other) for one, other in zip(before, output, strict=True))
    output[0].square().sum().backward()
    trace.observe_gradients()
    assert evidence(gates["0"]) == 120.0
    condemn(gates["0"], expert=1)
    chosen = model(rows)[1]
    assert not (chosen[:, 1].any() if chosen.dtype == torch.bool else (chosen == 1).any())
    restore_gates(model)
    assert all(torch.equal(one, other) for one, other in zip(before, model(rows), strict=True))
