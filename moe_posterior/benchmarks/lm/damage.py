"""Damaging experts, repairing them bit for bit, and masking them.

Dimensions: E experts, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from moe_posterior.benchmarks.lm.data import batches
from moe_posterior.errors import InvalidArgumentError

Kind = Literal["noise", "zeroed", "exchanged"]
NOISE = 2.0  # std of the added noise, in stds of the expert's weights
_BATCH = 32


@dataclass(frozen=True)
class Damage:
    """A kind of damage and its layers: noise on an expert's weights, an expert set to zero, or two experts swapped."""

    kind: Kind
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidArgumentError(f"kind must be one of {list(get_args(Kind))}; got {self.kind!r}")

    @property
    def name(self) -> str:
        """
        >>> Damage("noise", (0,)).name, Damage("zeroed", (0, 1)).name
        ('noise, layer 0', 'zeroed, layers 0 1')
        """
        return f"{self.kind}, layer{'s' * (len(self.layers) > 1)} {' '.join(map(str, self.layers))}"


def every_damage(num_layers: int) -> list[Damage]:
    """Each kind of damage in each layer alone and in all layers together."""
    places = [(layer,) for layer in range(num_layers)] + ([tuple(range(num_layers))] if num_layers > 1 else [])
    return [Damage(kind, place) for kind in get_args(Kind) for place in places]


def victims(damage: Damage, usage: Sequence[Tensor]) -> dict[int, list[int]]:  # one (E,) a layer
    """The experts that a damage touches in each layer: the most used one, and the second if two are swapped.

    >>> victims(Damage("exchanged", (1,)), [torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.2, 0.7])])
    {1: [2, 1]}
    """
    count = 2 if damage.kind == "exchanged" else 1
    return {layer: usage[layer].argsort(descending=True, stable=True)[:count].tolist() for layer in damage.layers}


@contextmanager
def damaged(model: nn.Module, damage: Damage, touched: Mapping[int, Sequence[int]], seed: int) -> Iterator[None]:
    """Damage these experts inside the block; restore the weights bit for bit after it."""
    generator = torch.Generator().manual_seed(seed)
    kept = [
        (weight, weight.detach().clone())
        for layer in touched
        for weight in decoder_layers(model)[layer].mlp.experts.parameters()
    ]
    try:
        with torch.no_grad():
            for layer, experts in touched.items():
                for weight in decoder_layers(model)[layer].mlp.experts.parameters():
                    _spoil(weight, damage.kind, list(experts), generator)
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def _spoil(weight: Tensor, kind: Kind, experts: list[int], generator: torch.Generator) -> None:  # (E, ...)
    if kind == "zeroed":
        weight[experts] = 0.0
    elif kind == "exchanged":
        weight[experts] = weight[experts[::-1]]
    else:
        for expert in experts:
            noise = torch.randn(weight[expert].shape, generator=generator)
            weight[expert] += NOISE * weight[expert].std() * noise


@contextmanager
def masked(model: nn.Module, experts: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Send no token to these experts inside the block: the best response if one knew which are bad.

    The named experts' logits are set to -inf, and Mixtral's own rule chooses again.
    """
    with ExitStack() as stack:
        for layer, closed in experts.items():
            handle = router(model, layer).register_forward_hook(_without(list(closed)))
            stack.callback(handle.remove)
        yield


def _without(closed: list[int]) -> Any:
    def choose_again(module: nn.Module, inputs: Any, output: Any) -> Any:
        logits, _, indices = output
        open_logits = logits.index_fill(1, torch.tensor(closed), -torch.inf)
        chosen = torch.softmax(open_logits.float(), dim=-1).topk(indices.shape[1], dim=-1)
        return logits, chosen.values / chosen.values.sum(dim=-1, keepdim=True), chosen.indices

    return choose_again


@torch.no_grad()
def usage_of(model: nn.Module, windows: Tensor) -> list[Tensor]:  # (n, T) -> one (E,) a layer
    """Each layer's share of (token, slot) pairs by expert."""
    layers = range(len(decoder_layers(model)))
    counts: list[Tensor] = [torch.zeros(0) for _ in layers]
    with ExitStack() as stack:
        for layer in layers:
            handle = router(model, layer).register_forward_hook(_counting(counts, layer))
            stack.callback(handle.remove)
        for tokens in batches(windows, min(_BATCH, len(windows))):
            model(input_ids=tokens)
    return [count / count.sum() for count in counts]


def _counting(counts: list[Tensor], layer: int) -> Any:
    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        logits, _, indices = output
        found = torch.bincount(indices.flatten(), minlength=logits.shape[1]).double()
        counts[layer] = found if not len(counts[layer]) else counts[layer] + found

    return count


def decoder_layers(model: nn.Module) -> Sequence[Any]:
    """The decoder layers of a Mixtral."""
    return cast(Sequence[Any], cast(Any, model).model.layers)


def router(model: nn.Module, layer: int) -> nn.Module:
    """The module that returns (logits, weights, indices) in a layer."""
    return cast(nn.Module, decoder_layers(model)[layer].mlp.gate)
