"""Replay a recorded routing: training on a rollout must use the experts that the rollout used.

Dimensions: N tokens, D hidden size, E experts, k experts per token.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, Routing
from moe_posterior.gates.host import GateHost
from moe_posterior.replay import scope
from moe_posterior.replay.checkpointing import in_backward, may_run_again, signature
from moe_posterior.replay.find import find_gates, hosting_router, outer_name
from moe_posterior.replay.record import Trace
from moe_posterior.replay.reweigh import ForcedChoice
from moe_posterior.replay.saving import GateMark, Recording, load_recording, mark, recording_of

Weights = Literal["recorded", "recomputed"]


class _Call(NamedTuple):
    """A call that was forced and may be run again in the backward pass."""

    name: str
    signature: Tensor  # ()
    routing: Routing


class _Forced:
    """The forward hook that puts the recorded routing in place of a gate's own."""

    def __init__(self, replaying: "Replay", name: str) -> None:
        self.replaying, self.name = replaying, name

    def __call__(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Routing | None:
        return self.replaying.force(self.name, gate, args[0] if args else kwargs["hidden"], routing)


class _ForcedRouter:
    """The forward hooks that make a router with a gate inside weight the recorded experts by its own rule."""

    def __init__(self, replaying: "Replay", name: str, gate: Gate) -> None:
        self.replaying, self.name, self.gate = replaying, name, gate
        self.modes: dict[int, ForcedChoice] = {}  # by thread: torch's modes belong to one

    def before(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        recorded = self.replaying.expected(self.name, hidden.detach().reshape(-1, self.gate.hidden_size))
        if recorded is not None:
            mode = ForcedChoice(recorded.expert_indices.to(hidden.device), self.gate.num_experts)
            self.modes[threading.get_ident()] = mode
            mode.__enter__()

    def after(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.release()

    def release(self) -> None:
        """Leave the mode; an interrupt that ends a router's call early runs no forward hooks, so it would stay on."""
        mode = self.modes.pop(threading.get_ident(), None)
        if mode is not None:
            mode.__exit__(None, None, None)


class Replay:
    """A recorded routing while it is being forced on a model, inside :func:`replay`.

    ``pending`` holds the calls still to come, as (name of the gate, its routing).
    """

    def __init__(self, recording: Recording, model: nn.Module, gates: dict[str, Gate], weights: Weights) -> None:
        self.pending = deque(recording.calls)
        self.inside = True  # the block
        self._weights, self._total = weights, len(recording.calls)
        self._seen: list[_Call] = []
        self._forward_since = False  # whether these gates ran a forward after the block
        self._handles: list[RemovableHandle] = []
        self._forced: list[_ForcedRouter] = []
        for name, gate in gates.items():
            # Before any other hook, so that record() sees what was forced.
            self._handles.append(gate.register_forward_hook(_Forced(self, name), prepend=True, with_kwargs=True))
            router = hosting_router(model, name)
            if router is not None and weights == "recomputed":
                hooks = _ForcedRouter(self, name, gate)
                self._forced.append(hooks)
                self._handles.append(router.register_forward_pre_hook(hooks.before, with_kwargs=True))
                self._handles.append(router.register_forward_hook(hooks.after, always_call=True))
        scope.enter(self)

    def close(self) -> None:
        """Remove the hooks from the gates."""
        scope.leave(self)
        for hooks in self._forced:
            hooks.release()
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._forced = [], [], []

    def leave(self) -> None:
        """End of the block; the hooks stay only for calls that a backward pass may still run again."""
        self.inside = False
        scope.leave(self)
        if self.pending:
            left, (name, _) = len(self.pending), self.pending[0]
            self.close()
            raise InvalidArgumentError(
                f"model must repeat all {self._total} recorded calls of its gates; {left} are left, first one of gate {name!r}"
            )
        if not self._seen:
            self.close()

    def force(self, name: str, gate: Gate, hidden: Tensor, routing: Routing) -> Routing | None:
        """The routing to force on this call of a gate; None keeps the gate's own."""
        recorded = self.expected(name, hidden)
        if recorded is None:
            self._forward_since = self._forward_since or not in_backward()
            return None
        if not in_backward():
            self.pending.popleft()
            if may_run_again():
                self._seen.append(_Call(name, signature(hidden), recorded))
        indices = recorded.expert_indices.to(hidden.device)
        if self._weights == "recorded":
            # Cloned: experts may scale their weights in place.
            weights = recorded.routing_weights.to(routing.routing_weights, copy=True)
            return recorded._replace(routing_weights=weights).map(lambda part: part.to(hidden.device))
        if gate.reweighs:
            return gate.reweigh(hidden, routing, indices)
        if not torch.equal(routing.expert_indices, indices):
            raise InvalidArgumentError(
                f"weights must be 'recorded': the router of gate {name!r} does not choose by one top-k over its experts"
            )
        return routing

    def expected(self, name: str, hidden: Tensor) -> Routing | None:  # (N, D)
        """What was recorded for the current call of this gate; None if the call is not part of the replay."""
        if in_backward():  # activation checkpointing: the same tokens again, not the next ones
            return self._recall(name, hidden)
        if not self.inside or not scope.is_open(self):
            return None
        if not self.pending:
            raise InvalidArgumentError(
                f"model must make no more than the {self._total} recorded calls; got one more of gate {name!r}"
            )
        due, routing = self.pending[0]
        if name != due:
            raise InvalidArgumentError(f"model must call its gates in the recorded order: {due!r} next; got {name!r}")
        if len(hidden) != len(routing.expert_indices):
            raise InvalidArgumentError(
                f"gate {name!r} must see the recorded {len(routing.expert_indices)} tokens in call "
                f"{self._total - len(self.pending)}; got {len(hidden)}"
            )
        return routing

    def _recall(self, name: str, hidden: Tensor) -> Routing | None:
        """Which call is being run again: the one that saw the same bits."""
        wanted = signature(hidden)
        for call in reversed(self._seen):
            if call.name == name and torch.equal(call.signature, wanted):
                return call.routing
        if self._forward_since:  # of a forward pass that is not part of the replay
            return None
        raise InvalidArgumentError(
            f"gate {name!r} must see in the backward pass, bit for bit, what it saw in the forward pass; it does not. Run the backward "
            f"before the next replay, and with deterministic kernels"
        )


@contextmanager
@as_declared
def replay(
    model: nn.Module,
    recorded: Trace | Recording | str | os.PathLike[str],
    *,
    weights: Weights = "recorded",
    same_state: bool = False,
) -> Iterator[Replay]:
    """Force a recorded routing on the forward passes inside the block.

    Training on a rollout needs the experts that the rollout used: a gate that has changed a little since, or runs in another
    precision, would choose others, and the probabilities would not be those of the model that acted. The model must make all
    recorded calls, in the recorded order and with the recorded numbers of tokens. A call that activation checkpointing runs again
    gets the same routing again. Record and replay may be nested. Calls of other threads and asyncio tasks are left alone.

    Args:
        model: holds the same gates, by name, order and sizes, as the model recorded; not compiled.
        recorded: a trace that has not been observed yet, a file of :meth:`Trace.save`, what
            :func:`~moe_posterior.replay.load_recording` read, or :func:`recording_from_experts`.
        weights: ``"recorded"`` (default) also forces the routing weights, as constants: the same outputs bit for bit, however the
            gates have changed, and no gradient to them. ``"recomputed"`` forces only the experts and weights them by the gate's
            current rule, with gradient, which training a router on a rollout needs; outputs are the same while the gates are.
        same_state: also require the gates' weights, clusters and belief to be those of the recording, bit for bit.

    Raises:
        InvalidArgumentError: another model, another order or number of tokens, calls left over at the end of the block, a gate
            that cannot weight a given choice, or a swapped router that uses its logits for more than choice and weights
            (Inkling). MissingDataError, DamagedFileError: the file is missing or damaged.

    >>> from moe_posterior import PosteriorMoE, record
    >>> hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> moe = PosteriorMoE(nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), hidden_size=8, num_clusters=4)
    >>> moe.gate.fit(hidden)
    >>> with record(moe) as trace:
    ...     before = moe(hidden)
    >>> moe.gate.posterior.observe(torch.zeros(9, dtype=torch.int64), torch.zeros(9, 4))  # the belief moves on
    >>> with replay(moe, trace):
    ...     after = moe(hidden)
    >>> torch.equal(before, after)
    True
    """
    if weights not in get_args(Weights):
        raise InvalidArgumentError(f"weights must be one of {list(get_args(Weights))}; got {weights!r}")
    recording = _recording(recorded)
    gates = find_gates(model)
    _validate_gates(recording.gates, gates, same_state)
    if weights == "recorded" and any(len(r.routing_weights) < len(r.expert_indices) for _, r in recording.calls):
        raise InvalidArgumentError("weights must be 'recomputed': the experts alone were recorded")
    for name, gate in gates.items():
        _validate_weights(name, gate, hosting_router(model, name), weights)
    _make_room(gates)
    replaying = Replay(recording, model, gates, weights)
    try:
        yield replaying
    except BaseException:
        replaying.close()
        raise
    replaying.leave()


@as_declared
def recording_from_experts(model: nn.Module, experts: Mapping[str, Tensor]) -> Recording:  # name: (N, k)
    """One forward pass as an engine reports it: only the chosen experts, to be replayed with ``weights="recomputed"``.

    Args:
        model: what will be trained on it.
        experts: for every gate the experts of its tokens, in the order in which the model calls its gates; by the names of
            :func:`~moe_posterior.serving.export_routing`.

    Raises:
        InvalidArgumentError: other names, a wrong shape, or an expert that is not there.

    >>> from moe_posterior import MixtureOfExperts, SoftmaxGate
    >>> moe = MixtureOfExperts(nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), SoftmaxGate(8, 4, top_k=2))
    >>> with replay(moe, recording_from_experts(moe, {"gate": torch.tensor([[3, 0]])}), weights="recomputed"):
    ...     moe.route(torch.ones(1, 8)).expert_indices
    tensor([[3, 0]])
    """
    gates = find_gates(model)
    names = {outer_name(model, name): name for name in gates}
    if experts.keys() != names.keys():
        raise InvalidArgumentError(f"experts must be given for the gates {list(names)}; got {list(experts)}")
    calls = []
    for key, chosen in experts.items():
        gate, indices = gates[names[key]], chosen.long()
        fits = indices.ndim == 2 and indices.shape[1] == gate.top_k
        if not fits or (indices < 0).any() or (indices >= gate.num_experts).any():
            raise InvalidArgumentError(
                f"experts of gate {key!r} must be (N, {gate.top_k}) and below {gate.num_experts}; got {tuple(chosen.shape)}"
            )
        none = torch.empty(0)
        calls.append((names[key], Routing(indices, none, none, none, none)))
    return Recording({name: mark(gate, with_state=False) for name, gate in gates.items()}, calls)


def _recording(recorded: Trace | Recording | str | os.PathLike[str]) -> Recording:
    if isinstance(recorded, Recording):
        recording = recorded
    elif isinstance(recorded, Trace):
        recording = recording_of(recorded.gates, recorded.routings)
    else:
        recording = load_recording(recorded)
    if not recording.calls:
        raise InvalidArgumentError("recorded must hold routings: replay a trace before it is observed, or save it")
    return recording


def _validate_gates(recorded: dict[str, GateMark], gates: dict[str, Gate], same_state: bool) -> None:
    """Raise InvalidArgumentError, saying what differs, unless the gates are those recorded."""
    here = {name: mark(gate, with_state=same_state) for name, gate in gates.items()}
    wrong = [f"gate {name!r} is missing" for name in recorded if name not in here]
    wrong += [f"gate {name!r} is not in the recording" for name in here if name not in recorded]
    for name in recorded:
        if name in here and recorded[name].sizes != here[name].sizes:
            wrong.append(
                f"gate {name!r} has (experts, top_k, hidden size) {here[name].sizes}, recorded {recorded[name].sizes}"
            )
        elif name in here and same_state and recorded[name].state != here[name].state:
            wrong.append(f"gate {name!r} has other weights, clusters or belief than recorded")
    if not wrong and list(recorded) != list(here):
        wrong.append(f"the gates come in the order {list(here)}, recorded {list(recorded)}")
    if wrong:
        raise InvalidArgumentError(f"model must have the gates that were recorded; {'; '.join(wrong)}")


def _validate_weights(name: str, gate: Gate, router: GateHost | None, weights: Weights) -> None:
    if weights == "recomputed" and not (gate.reweighs if router is None else router.chooses):
        raise InvalidArgumentError(
            f"weights must be 'recorded': gate {name!r}, a {type(gate).__name__}, has no rule to weigh a given choice"
        )
    if weights == "recorded" and router is not None and not router.whole:
        raise InvalidArgumentError(
            f"weights must be 'recomputed': the router of gate {name!r} returns more than was recorded, a choice and its weights"
        )


def _make_room(gates: dict[str, Gate]) -> None:
    """Close a replay that has ended; raise if one is still running."""
    for name, gate in gates.items():
        for hook in list(gate._forward_hooks.values()):
            if isinstance(hook, _Forced):
                if hook.replaying.inside:
                    raise InvalidArgumentError(f"model must not be replayed already; gate {name!r} is")
                hook.replaying.close()
