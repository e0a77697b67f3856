"""A deep ensemble at the cost of one mixture: as many small networks as the mixture has experts, trained apart, averaged."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_posterior import losses
from moe_posterior.gates import FixedGate, Gate
from moe_posterior.prediction import Prediction
from moe_posterior.training.methods import Method, Terms
from moe_posterior.training.module import MoEClassifier

__all__ = ["Members", "MembersApart", "average_gate", "into_ensemble"]


class Members(nn.Module):
    """Several backbones side by side; their features lie next to each other.

    Args:
        make: one member; its width is ``out_features``.
        count: how many.

    >>> from moe_posterior.training.backbones import Trunk
    >>> Members(lambda: Trunk(10, 4), 3)(torch.rand(5, 10)).shape
    torch.Size([5, 12])
    """

    def __init__(self, make: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(make() for _ in range(count))
        self.width = int(self.members[0].out_features)  # type: ignore[arg-type]  # a number, as every backbone has
        self.out_features = count * self.width

    def forward(self, inputs: Tensor) -> Tensor:  # (N, ...) -> (N, count * width)
        """Every member's features."""
        return torch.cat([member(inputs) for member in self.members], dim=-1)


class MembersApart(Method):
    """The mean of the members' own negative log-likelihoods: nothing flows from one to another."""

    def objective(self, prediction: Prediction, target: Tensor, gate: Gate, groups: Tensor | None) -> Terms:
        own = [losses.nll(probs, target) for probs in prediction.need("expert_probs").unbind(1)]
        return Terms(torch.stack(own).mean(), {})


def average_gate(hidden_size: int, num_experts: int) -> Gate:
    """All members, the same weight each."""
    gate = FixedGate(hidden_size, num_experts, num_experts)
    gate.warm_start(torch.zeros(1, hidden_size), torch.ones(1, num_experts))
    return gate


def into_ensemble(model: MoEClassifier) -> MoEClassifier:
    """Give every head its own member's features alone; the backbone must be :class:`Members`."""
    assert isinstance(model.backbone, Members)
    assert isinstance(model.moe.experts, nn.ModuleList)
    width = model.backbone.width
    for number in range(len(model.backbone.members)):
        head = nn.Sequential(Columns(number * width, width), nn.Linear(width, model.num_classes), nn.Softmax(dim=-1))
        model.moe.experts[number] = head
    return model


class Columns(nn.Module):
    """Some of the columns."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width

    def forward(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, width)
        """``hidden[:, start : start + width]``."""
        return hidden.narrow(-1, self.start, self.width)
