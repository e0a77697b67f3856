"""The two ends of the scale: always the same experts, and the truly best ones.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.gates.bandits import validate_temperature
from moe_posterior.gates.base import Gate, Routing
from moe_posterior.gates.baselines import UNKNOWN, read_labelled
from moe_posterior.kernels import reference
from moe_posterior.precision import FixedPrecision


class FixedGate(Gate, FixedPrecision):
    """Send every token to the k experts with the highest mean outcome on labelled rows: for k = 1 the best single expert.

    The baseline that a router must beat. Nothing is learned after :meth:`warm_start`; exact ties go to the lowest expert,
    and one that was never observed counts as ½.

    Args:
        hidden_size, num_experts, top_k: D, E, k.
        temperature: > 0; weights are ``softmax(mean outcome / temperature)`` over the chosen.

    Raises:
        InvalidArgumentError: a knob out of range. NotFittedError: called before :meth:`warm_start`.

    >>> gate = FixedGate(hidden_size=2, num_experts=3, top_k=1)
    >>> gate.warm_start(torch.zeros(2, 2), torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))
    >>> gate(torch.ones(4, 2)).expert_indices.flatten().tolist()
    [1, 1, 1, 1]
    """

    mean_outcome: Tensor  # (E,) float64; NaN until known

    @as_declared
    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 1, *, temperature: float = 0.1) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        validate_temperature(temperature)
        self.temperature, self._known = float(temperature), False
        self.register_buffer("mean_outcome", torch.full((num_experts,), torch.nan, dtype=torch.float64))
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def fitted(self) -> bool:
        """Whether the mean outcomes are known."""
        return self._known

    @torch.no_grad()
    def warm_start(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Learn which experts are best on the whole; the hidden states decide nothing.

        Raises:
            InvalidArgumentError: no rows, a wrong shape, or a value out of range; nothing has changed.
        """
        hidden, outcome = read_labelled(self, hidden, outcome)
        if not len(outcome):
            raise InvalidArgumentError("outcome must hold at least one row; got none")
        self.mean_outcome.copy_(outcome.double().nanmean(dim=0).nan_to_num(UNKNOWN))
        self._known = True

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """The same experts for every token."""
        self.validate_hidden(hidden)
        if not self._known:
            raise NotFittedError("this gate does not know the best experts yet: call warm_start(hidden, outcome)")
        return _route(self.mean_outcome.expand(hidden.shape[0], -1), self.top_k, self.temperature)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The mean outcome on the labelled rows, which is also what ranked the experts."""
        return routing.scores


class OracleGate(Gate):
    """Send every token to the k experts that are truly the most competent on it: the bound no router passes.

    Args:
        hidden_size, num_experts, top_k: D, E, k.
        competence: ``(N, D) -> (N, E)``, the true success probability of every expert on every row, or its realised outcome. A
            NaN counts as 0. Where the truth is no function of the hidden state, as in recorded outcomes or after an expert has
            been degraded, set the attribute anew before each batch: ``gate.competence = lambda hidden: truth[rows]``.
        temperature: > 0; weights are ``softmax(competence / temperature)`` over the chosen.

    Raises:
        InvalidArgumentError: a knob out of range, or ``competence`` answers in another shape.

    >>> gate = OracleGate(hidden_size=2, num_experts=2, top_k=1, competence=lambda hidden: hidden.sigmoid())
    >>> gate(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).expert_indices.flatten().tolist()
    [0, 1]
    """

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        competence: Callable[[Tensor], Tensor],
        temperature: float = 0.1,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        validate_temperature(temperature)
        self.competence, self.temperature = competence, float(temperature)

    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose by the true competence; exact ties go to the lowest expert."""
        self.validate_hidden(hidden)
        competence = self.competence(hidden)
        expected = (hidden.shape[0], self.num_experts)
        if tuple(competence.shape) != expected:
            raise InvalidArgumentError(f"competence must answer in shape {expected}; got {tuple(competence.shape)}")
        return _route(competence.nan_to_num(nan=0.0), self.top_k, self.temperature)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The true competence of the chosen."""
        return routing.scores


def _route(scores: Tensor, top_k: int, temperature: float) -> Routing:  # (N, E)
    cluster_ids = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    selection = reference.select(scores.float(), cluster_ids, top_k)
    weights = reference.weigh(selection.scores, temperature)
    distance = torch.zeros(scores.shape[0], dtype=torch.float32, device=scores.device)
    return Routing(selection.expert_indices, weights, cluster_ids, selection.scores, distance)


def _refresh_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, FixedGate):
        module._known = bool(torch.isfinite(module.mean_outcome).all())
