"""The gates' calls during one training batch: their routings, and the hidden states that are candidates for the sample."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_posterior.gates import BeliefGate, Routing
from moe_posterior.replay import Trace
from moe_posterior.replay.checkpointing import in_backward
from moe_posterior.training.belief.credits import Credit, per_expert
from moe_posterior.training.belief.reservoir import Reservoir, row_keys

__all__ = ["WatchedStep"]


class _Candidates(NamedTuple):
    """The tokens of one call of a gate that may enter the sample."""

    rows: Tensor  # (M,) int64, their places among the call's tokens
    keys: Tensor  # (M,) int64
    hidden: Tensor  # (M, D)


class WatchedStep:
    """From before a batch's forward to after its backward.

    Args:
        gates: the gates to watch, by name.
        samples: the reservoirs of those whose hidden states are sampled.
        stream: what the keys of this batch's rows are drawn from.
        rank, world_size: which rows of the batch this process has.
    """

    def __init__(
        self,
        gates: Mapping[str, BeliefGate],
        samples: Mapping[str, Reservoir],
        stream: tuple[int | str, ...],
        rank: int,
        world_size: int,
    ) -> None:
        self.trace = Trace(dict(gates))
        self._samples, self._stream, self._place = samples, stream, (rank, world_size)
        self._calls: Counter[str] = Counter()
        self._candidates: list[_Candidates | None] = []  # one for each routing of the trace
        self._handles = [gate.register_forward_hook(self._hook(name), with_kwargs=True) for name, gate in gates.items()]

    def close(self) -> None:
        """Take the hooks off the gates."""
        self.trace.close()
        for handle in self._handles:
            handle.remove()

    def rows_of(self, name: str, credits: Sequence[Credit | None]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, hidden states and outcomes (M, E) of a gate's candidates, call by call."""
        found = []
        for (gate, _), candidates, credit in zip(self.trace.routings, self._candidates, credits, strict=True):
            if gate == name and candidates is not None:
                outcome = per_expert(credit, candidates.rows, self.trace.gates[name].num_experts)
                found.append((candidates.keys, candidates.hidden, outcome))
        return found

    def credits_of(self, name: str, credits: Sequence[Credit | None]) -> list[Credit]:
        """The credits of a gate's calls."""
        return [
            credit
            for (gate, _), credit in zip(self.trace.routings, credits, strict=True)
            if gate == name and credit is not None
        ]

    def _hook(self, name: str) -> Any:
        def keep(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
            # Activation checkpointing runs a call again, with the same tokens; other threads' calls are not this step's.
            if self.trace.open_here and not in_backward():
                self._candidates.append(self._of_call(name, args[0] if args else kwargs["hidden"], routing))

        return keep

    def _of_call(self, name: str, hidden: Tensor, routing: Routing) -> _Candidates | None:  # (N, D)
        call = self._calls[name]
        self._calls[name] += 1
        if name not in self._samples:
            return None
        keys = row_keys(len(hidden), (*self._stream, name, call), *self._place)
        rows = self._samples[name].admitted(keys)
        real = routing.distance.isfinite().to("cpu")[rows]  # not padding, whose distance is inf
        rows = rows[real]
        return _Candidates(rows, keys[rows], hidden.detach()[rows.to(hidden.device)])
