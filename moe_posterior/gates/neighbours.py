"""Nearest neighbours: how did the experts do on the labelled rows most like this one?

Dimensions: N tokens, D hidden size, E experts, k experts per token, M remembered rows.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.gates.bandits import validate_temperature
from moe_posterior.gates.base import Gate, Routing
from moe_posterior.gates.baselines import UNKNOWN, read_labelled
from moe_posterior.kernels import reference
from moe_posterior.precision import FixedPrecision

Metric = Literal["euclidean", "cosine"]
_CELLS = 1 << 24  # similarities held at a time: bounds memory however many rows are remembered


class NearestNeighbourGate(Gate, FixedPrecision):
    """Route to the experts with the highest mean outcome among the ``num_neighbours`` remembered rows nearest to the token.

    An expert none of whose outcomes is known there counts with its mean over all remembered rows, or with ½ if it has
    none; so do all experts on a row that holds NaN or inf. Exact ties go to the lowest expert.

    The memory is what :meth:`warm_start` gave it: a ``Routing`` does not hold the hidden state, so ``observe`` checks its arguments
    and learns nothing. A stream that keeps the hidden states can add to the memory with :meth:`remember`.

    Args:
        hidden_size, num_experts, top_k: D, E, k.
        num_neighbours: at least 1.
        metric: ``"euclidean"`` (default) or ``"cosine"``.
        temperature: > 0; weights are ``softmax(score / temperature)`` over the chosen.
        capacity: remember at most this many rows, the latest; None keeps all.

    Raises:
        InvalidArgumentError: a knob out of range. NotFittedError: called before there are ``num_neighbours`` rows.

    Source: Fix & Hodges 1951; as a router of queries between language models, the k-NN baseline of RouterBench (Hu et al. 2024).

    >>> hidden = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
    >>> gate = NearestNeighbourGate(hidden_size=1, num_experts=2, top_k=1, num_neighbours=2)
    >>> gate.warm_start(hidden, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> routing = gate(torch.tensor([[0.4], [8.4]]))
    >>> routing.expert_indices.flatten().tolist(), routing.scores.flatten().tolist()
    ([0, 1], [0.5, 1.0])
    """

    memory: Tensor  # (M, D) float32
    outcomes: Tensor  # (M, E) float32, 0 where not observed
    observed: Tensor  # (M, E) bool
    half_norms: Tensor  # (M,) float32, derived
    overall: Tensor  # (E,) float32, derived

    @as_declared
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_neighbours: int = 40,
        metric: Metric = "euclidean",
        temperature: float = 0.1,
        capacity: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if num_neighbours < 1:
            raise InvalidArgumentError(f"num_neighbours must be at least 1; got {num_neighbours}")
        if metric not in get_args(Metric):
            raise InvalidArgumentError(f"metric must be one of {list(get_args(Metric))}; got {metric!r}")
        validate_temperature(temperature)
        if capacity is not None and capacity < num_neighbours:
            raise InvalidArgumentError(f"capacity must be at least num_neighbours={num_neighbours}; got {capacity}")
        self.num_neighbours, self.metric, self.temperature = num_neighbours, metric, float(temperature)
        self.capacity = capacity
        self.register_buffer("memory", torch.zeros(0, hidden_size, dtype=torch.float32))
        self.register_buffer("outcomes", torch.zeros(0, num_experts, dtype=torch.float32))
        self.register_buffer("observed", torch.zeros(0, num_experts, dtype=torch.bool))
        self.register_buffer("half_norms", torch.zeros(0, dtype=torch.float32), persistent=False)
        self.register_buffer("overall", torch.zeros(num_experts, dtype=torch.float32), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def fitted(self) -> bool:
        """Whether there are enough rows to look among."""
        return len(self.memory) >= self.num_neighbours

    def warm_start(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Replace the memory by these labelled rows.

        Args:
            hidden: finite rows, at least ``num_neighbours``; kept in float32.
            outcome: competence signals in [0, 1], column e for expert e; NaN where not observed.

        Raises:
            InvalidArgumentError: too few rows, a wrong shape, or a value out of range; nothing has changed.
        """
        hidden, outcome = read_labelled(self, hidden, outcome)
        if len(hidden) < self.num_neighbours:
            raise InvalidArgumentError(
                f"hidden must hold at least num_neighbours={self.num_neighbours} rows; got {len(hidden)}"
            )
        self._keep(hidden.to(self.memory), outcome.nan_to_num(0.0).to(self.outcomes), ~outcome.isnan())

    def remember(self, hidden: Tensor, outcome: Tensor) -> None:  # (N, D), (N, E)
        """Add labelled rows to the memory; beyond ``capacity`` the oldest go. Arguments as :meth:`warm_start`, any number."""
        hidden, outcome = read_labelled(self, hidden, outcome)
        self._keep(
            torch.cat([self.memory, hidden.to(self.memory)]),
            torch.cat([self.outcomes, outcome.nan_to_num(0.0).to(self.outcomes)]),
            torch.cat([self.observed, ~outcome.isnan().to(self.observed.device)]),
        )

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Routing:  # (N, D)
        """Choose by the neighbours' mean outcomes; changes no state. A row that holds NaN or inf has distance inf."""
        self.validate_hidden(hidden)
        if not self.fitted:
            raise NotFittedError(
                f"this gate remembers {len(self.memory)} rows and looks among num_neighbours={self.num_neighbours}: call "
                f"warm_start(hidden, outcome) on labelled rows, or load a state_dict that holds them"
            )
        chunk = max(1, _CELLS // len(self.memory))
        scores = torch.cat([self._neighbours_mean(rows) for rows in hidden.split(chunk)])
        cluster_ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        finite = torch.isfinite(hidden).all(dim=1)
        scores = torch.where(finite[:, None], scores, self.overall)
        selection = reference.select(scores, cluster_ids, self.top_k)
        weights = reference.weigh(selection.scores, self.temperature)
        distance = torch.where(finite, 0.0, torch.inf).float()
        return Routing(selection.expert_indices, weights, cluster_ids, selection.scores, distance)

    def expected_outcome(self, routing: Routing) -> Tensor:  # -> (N, k)
        """The neighbours' mean outcome, which is also what ranked the experts."""
        return routing.scores

    def extra_repr(self) -> str:
        size = f"num_neighbours={self.num_neighbours}, metric={self.metric!r}, remembered={len(self.memory)}"
        return f"{super().extra_repr()}, {size}"

    def _neighbours_mean(self, hidden: Tensor) -> Tensor:  # (n, D) -> (n, E)
        # The nearest by ‖x - m‖² are those with the largest x·m - ‖m‖²/2; by the cosine, with the largest x·m/‖m‖.
        with torch.autocast(hidden.device.type, enabled=False):  # which would round the memory
            similarity = hidden.float() @ self.memory.T
        if self.metric == "euclidean":
            similarity = similarity - self.half_norms
        else:
            similarity = similarity / (2 * self.half_norms).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        nearest = similarity.topk(self.num_neighbours, dim=-1).indices
        seen = self.observed[nearest].sum(dim=1)  # (n, E), of num_neighbours
        mean = self.outcomes[nearest].sum(dim=1) / seen.clamp(min=1)
        return torch.where(seen > 0, mean, self.overall)

    @torch.no_grad()
    def _keep(self, memory: Tensor, outcomes: Tensor, observed: Tensor) -> None:  # (M, D), (M, E), (M, E)
        first = 0 if self.capacity is None else max(0, len(memory) - self.capacity)
        # Copies: the caller may reuse its tensors.
        self.memory, self.outcomes = memory.detach()[first:].clone(), outcomes.detach()[first:].clone()
        self.observed = observed[first:].to(self.outcomes.device, copy=True)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        self.half_norms = self.memory.square().sum(dim=1) / 2
        seen = self.observed.sum(dim=0)
        mean = self.outcomes.sum(dim=0, dtype=torch.float64) / seen.clamp(min=1)
        self.overall = torch.where(seen > 0, mean, UNKNOWN).float()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.require_loadable(state_dict, prefix)
        # The memory has as many rows as the saved one, whatever this gate held before.
        for name in ("memory", "outcomes", "observed"):
            incoming, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(incoming, Tensor) and own is not None and incoming.shape[1:] == own.shape[1:]:
                self._buffers[name] = own.new_empty(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refresh_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if isinstance(module, NearestNeighbourGate):
        module._refresh()
