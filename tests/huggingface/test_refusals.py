"""A swap that fails anywhere leaves the model as it was, bit for bit."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface.models import D, E, condemn, evidence, fit_on_noise
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, MoEPosteriorError, record, restore_gates, swap_gates
from moe_posterior.huggingface import swapped_gates


class PlainRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(E, D))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        weights, indices = logits.softmax(-1).topk(self.top_k)
        return logits, weights, indices


class FinalRouter(PlainRouter):
    """Its class cannot be derived from."""

    def __init_subclass__(cls, **options: Any) -> None:
        raise TypeError("FinalRouter cannot be subclassed")


class FixedRouter(PlainRouter):
    """Its class cannot be changed."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "__class__":
            raise TypeError("__class__ assignment: object layout differs")
        super().__setattr__(name, value)


class StrictRouter(PlainRouter):
    """It takes no attribute that it does not know."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "moe_posterior":
            raise AttributeError("unknown attribute")
        super().__setattr__(name, value)


class TakenRouter(PlainRouter):
    """The gate's place is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.posterior_gate = nn.Linear(2, 2)


class InterruptedRouter(PlainRouter):
    """Somebody presses Ctrl-C."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        raise KeyboardInterrupt


class AbstractRouter(ABC, nn.Module):
    """As in Megatron-Core: ABC before nn.Module, so that instances have another layout than a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(E, D))

    @abstractmethod
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        return logits, *self.routing(logits)


class ConcreteRouter(AbstractRouter):
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).topk(self.top_k)


class Layers(nn.Module):
    """Routers one after the other, each of which also scales its input, so that all of them take part."""

    def __init__(self, kinds: list[type[nn.Module]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList([kind() for kind in kinds])

    def forward(self, hidden: Tensor) -> Tensor:
        for router in self.routers:
            _, weights, indices = router(hidden)
            hidden = hidden * (1 + weights.sum(-1, keepdim=True)) + indices.sum(-1, keepdim=True)
        return hidden


class HookShy(Layers):
    def register_forward_pre_hook(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("no hooks here")


def everything(model: nn.Module) -> dict[str, Any]:
    """What a swap could change: classes, attributes, hooks, children, and the bits of every tensor."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        held = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        found[name] = (type(module), list(held), held)
    return found


def unchanged(model: nn.Module, before: dict[str, Any], bits: dict[str, Tensor]) -> bool:
    after = everything(model)
    if list(after) != list(before):
        return False
    for name, (kind, keys, held) in after.items():
        old_kind, old_keys, old_held = before[name]
        if kind is not old_kind or keys != old_keys:
            return False
        for key in keys:
            one, other = held[key], old_held[key]
            same = (
                list(one) == list(other) and all(one[k] is other[k] for k in one)
                if isinstance(one, dict)
                else one is other
            )
            if not same:
                return False
    state = model.state_dict()
    return list(state) == list(bits) and all(torch.equal(state[key], bits[key]) for key in bits)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", [FinalRouter, FixedRouter, StrictRouter, TakenRouter])
def test_a_router_that_refuses_its_gate_is_named_and_the_model_stays_as_it_was(
    kind: type[nn.Module], position: int
) -> None:
    kinds: list[type[nn.Module]] = [PlainRouter] * 3
    kinds[position] = kind
    model, hidden = Layers(kinds), torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    output, before, bits = model(hidden), everything(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        MoEPosteriorError, match=rf"router 'routers\.{position}', a {kind.__name__}, refuses it"
    ) as caught:
        swap_gates(model, num_clusters=3)
    assert isinstance(caught.value.__cause__, (TypeError, AttributeError, KeyError))
    assert unchanged(model, before, bits)
    assert torch.equal(model(hidden), output)
    with pytest.raises(InvalidArgumentError, match="holds no swapped router"):
        restore_gates(model)


def interrupted() -> tuple[nn.Module, type[BaseException]]:
    return Layers([PlainRouter, InterruptedRouter]), KeyboardInterrupt


def without_hooks() -> tuple[nn.Module, type[BaseException]]:
    return HookShy([PlainRouter, PlainRouter]), RuntimeError


def warned_of() -> tuple[nn.Module, type[BaseException]]:
    model = Layers([PlainRouter, PlainRouter])
    model.routers[1].forward = model.routers[1].forward
    return model, UserWarning


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("failing", [interrupted, without_hooks, warned_of])
def test_whatever_stops_a_swap_leaves_the_model_as_it_was(
    failing: Callable[[], tuple[nn.Module, type[BaseException]]],
) -> None:
    model, error = failing()
    before, bits = everything(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error):
        swap_gates(model, num_clusters=3)
    assert unchanged(model, before, bits)


def test_a_router_of_another_layout_is_swapped_observed_and_restored() -> None:
    model, hidden = (
        Layers([ConcreteRouter, PlainRouter]),
        torch.randn(40, D, generator=torch.Generator().manual_seed(0)),
    )
    output, before, bits = model(hidden), everything(model), {k: v.clone() for k, v in model.state_dict().items()}
    report = swap_gates(model, num_clusters=3)
    assert [layer.router for layer in report.swapped] == ["ConcreteRouter", "PlainRouter"]
    assert torch.equal(model(hidden), output)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        loss = model(hidden).square().mean()
    loss.backward()
    trace.observe_gradients()
    assert all(evidence(gate) > 0 for gate in gates.values())
    condemn(gates["routers.0"], expert=1)
    assert not (model.routers[0](hidden)[2] == 1).any()
    restore_gates(model)
    model.zero_grad()
    assert unchanged(model, before, bits)
