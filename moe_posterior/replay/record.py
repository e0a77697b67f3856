"""Collect the routings of a forward pass and observe them once outcomes are known."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.gates import Gate, Routing
from moe_posterior.replay import scope
from moe_posterior.replay.auxiliary import Apart
from moe_posterior.replay.checkpointing import in_backward, may_run_again, signature
from moe_posterior.replay.find import find_gates, hosting_router
from moe_posterior.replay.saving import recording_of, save_recording


class _Listener:
    """The forward hook of a trace; it does nothing once the trace is gone, or in a copy of the model."""

    def __init__(self, trace: "Trace | None", name: str) -> None:
        # A weak reference: otherwise a trace that is never observed would live, with its autograd graph, as long as the model.
        self._trace = None if trace is None else weakref.ref(trace)
        self._name = name

    def __call__(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Routing:
        trace = None if self._trace is None else self._trace()
        return routing if trace is None else trace.keep(self._name, args[0] if args else kwargs["hidden"], routing)

    def __reduce__(self) -> tuple[type["_Listener"], tuple[None, str]]:
        return _Listener, (None, self._name)

    @property
    def listens(self) -> bool:
        """Whether the current call may be one of the trace's own; in a backward pass, which has threads of its own, it may."""
        trace = None if self._trace is None else self._trace()
        return trace is not None and (trace.open_here or in_backward())

    def auxiliary(self) -> None:
        """Tell the trace that a gradient came through logits that a router returned."""
        trace = None if self._trace is None else self._trace()
        if trace is not None:
            trace.auxiliary = True


class _Watcher:
    """The forward hook on the recorded model itself: its output is where the loss comes from."""

    def __init__(self, trace: "Trace | None") -> None:
        self._trace = None if trace is None else weakref.ref(trace)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace = None if self._trace is None else self._trace()
        if trace is not None:
            trace.watch(output)

    def __reduce__(self) -> tuple[type["_Watcher"], tuple[None]]:
        return _Watcher, (None,)


class Trace:
    """The routings that the gates of a model made inside :func:`record`, in the order they were made.

    Each entry of ``routings`` is (name of the gate in the model, its routing). A trace is observed once: after
    :meth:`observe` or :meth:`observe_gradients` it is empty. Keep it until the backward pass is over.
    """

    @as_declared
    def __init__(self, gates: dict[str, Gate], model: nn.Module | None = None) -> None:
        self.gates = gates
        strangers = [name for name, gate in gates.items() if not isinstance(gate, Gate)]
        if strangers:
            raise InvalidArgumentError(f"gates must map names to gates; {strangers[0]!r} is none")
        self.routings: list[tuple[str, Routing]] = []
        self.recording = True  # inside the block
        self._seen: list[tuple[str, Tensor]] = []  # calls that checkpointing may run again, by gate and signature
        self.auxiliary = False  # whether a gradient came through logits that a router returned
        self._forwards: list[Apart] = []  # of the model, with gradients
        self._watched = 0  # routings of those forwards
        self._overtaken = False  # by a later forward with gradients, which may be the one that is run again
        self._handles = [
            gate.register_forward_hook(_Listener(self, name), with_kwargs=True) for name, gate in gates.items()
        ]
        if model is not None and any(hosting_router(model, name) for name in gates):
            self._handles.append(model.register_forward_hook(_Watcher(self)))
        weakref.finalize(self, _remove, self._handles)
        scope.enter(self)

    def __len__(self) -> int:
        return len(self.routings)

    @property
    def open_here(self) -> bool:
        """Whether forwards of the current thread, or asyncio task, are recorded: only those of the one that opened the trace are."""
        return self.recording and scope.is_open(self)

    def end(self) -> None:
        """Record no further forwards; the hooks stay for recomputation in the backward pass. The end of :func:`record`'s block."""
        self.recording = False
        scope.leave(self)

    def observe(self, outcome: Tensor) -> None:  # (...) one a token
        """Credit every chosen expert of every layer with its token's outcome.

        Experts that share a layer's output are credited equally, which confounds them; if you have a backward pass, use
        :meth:`observe_gradients`, which separates them.

        Args:
            outcome: one value in [0, 1] per token, NaN where unobserved (padding); any shape with as many elements as the
                routings have tokens.

        Raises:
            InvalidArgumentError: another number of tokens, or a value outside [0, 1]. NotFittedError: a gate that took part has no
                clusters. In either case no gate has learned anything.
        """
        self._require_routings()
        outcome = validation.outcomes("outcome", outcome)
        flat = outcome.reshape(-1)
        for name, routing in self.routings:
            if len(flat) != len(routing.expert_indices):
                raise InvalidArgumentError(
                    f"outcome must hold one value for each of the {len(routing.expert_indices)} tokens of gate {name!r}; "
                    f"got shape {tuple(outcome.shape)}"
                )
        self._require_observable()
        for name, routing in self.routings:
            slots = flat[:, None].expand(routing.expert_indices.shape)
            self.gates[name].observe(routing, slots, dense=False)
        self._done()

    def observe_gradients(self) -> None:
        """Credit each slot with its own sign, after the loss's backward: did this expert's share lower this token's loss?

        Raises:
            InvalidArgumentError: no recorded routing weight has a gradient: no backward has run on the recorded forward.
            NotFittedError: a gate that took part has no clusters. In either case no gate has learned anything.
        """
        outcomes = self.gradient_outcomes()
        self._require_observable()
        for name, routing, outcome in outcomes:
            self.gates[name].observe(routing, outcome, dense=False)
        self._done()

    def gradient_outcomes(self) -> list[tuple[str, Routing, Tensor]]:
        """What :meth:`observe_gradients` observes, as (name of the gate, its routing, outcome (N, k)); changes nothing.

        The loss's gradient on a routing weight is the inner product of the gradient on the layer's output with that expert's
        output, so ``gradient · weight < 0`` says the contribution helped: one bit per slot and layer, without an extra forward.
        A gradient of exactly zero next to a nonzero one means that the contribution did nothing, like that of a dead expert: it did
        not help. The outcome is NaN (not observed) for a token without any gradient, which has no loss, for a slot of weight zero,
        for a NaN gradient, and for a routing that the loss does not depend on.

        An auxiliary loss on the routers' logits, for load balancing, says nothing about competence. If the loss that the recorded
        model returned includes one, or your loss is made from its logits and router logits, the outcomes are those of the loss
        without it, at the cost of a second backward pass through the activations.

        Raises:
            InvalidArgumentError: as :meth:`observe_gradients`, or an auxiliary loss that cannot be separated, because the loss is
                not made from the recorded model's output.
        """
        self._require_routings()
        if all(routing.routing_weights.grad is None for _, routing in self.routings):
            raise InvalidArgumentError(
                f"the routing weights of gate {self.routings[0][0]!r} have no gradient, and no others do: call "
                f"loss.backward() on a loss of the recorded forward first"
            )
        outcomes = []
        for name, routing in self.routings:
            weights = routing.routing_weights
            gradient = self._gradient(name, weights)
            # Signs, not the product itself, which can underflow in half precision.
            share = gradient.sign() * weights.detach().sign()
            lossless = (gradient == 0).all(dim=1, keepdim=True)
            unseen = lossless | (weights.detach() == 0) | share.isnan()
            outcomes.append((name, routing, (share < 0).to(share.dtype).masked_fill(unseen, torch.nan)))
        return outcomes

    def watch(self, output: Any) -> None:
        """Note what a forward of the recorded model has returned; a hook calls this."""
        if not self.open_here or in_backward() or not torch.is_grad_enabled():
            return
        weights = [routing.routing_weights for _, routing in self.routings[self._watched :]]
        self._watched = len(self.routings)
        self._forwards.append(Apart(output, [each for each in weights if each.requires_grad]))

    def _gradient(self, name: str, weights: Tensor) -> Tensor:  # (N, k)
        apart = next((found for each in self._forwards if (found := each.of(weights)) is not None), None)
        if apart is not None:
            return apart
        if self.auxiliary and weights.grad is not None:
            raise InvalidArgumentError(
                f"the loss's gradient on gate {name!r} must be separated from that of an auxiliary loss on router logits: call "
                f"backward on the loss that the recorded model returned, or on one made from its logits"
            )
        return torch.zeros_like(weights) if weights.grad is None else weights.grad

    def close(self) -> None:
        """Remove the hooks from the gates. Observing does so too, and so does deleting the trace; until then they stay, for
        recomputation in the backward pass.
        """
        _remove(self._handles)
        scope.leave(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the routings for :func:`~moe_posterior.replay.replay`, before they are observed; files are replaced atomically.

        Raises:
            InvalidArgumentError: there are no routings, or they were observed already.
        """
        self._require_routings()
        save_recording(recording_of(self.gates, self.routings), path)

    def keep(self, name: str, hidden: Tensor, routing: Routing) -> Routing:  # (N, D)
        """Note a routing that the gate of this name has made, and return it as part of the graph; the hooks call this."""
        # Activation checkpointing runs the forward again inside the backward pass: the same tokens, not new ones.
        recomputed = in_backward()
        if not recomputed and not self.open_here:
            self._overtaken = self._overtaken or torch.is_grad_enabled()
            return routing
        if recomputed and self._overtaken and not self._knows(name, hidden):
            return routing
        if not recomputed and torch.is_grad_enabled() and may_run_again():
            self._seen.append((name, signature(hidden)))
        if torch.is_grad_enabled():
            weights = routing.routing_weights
            if weights.requires_grad:
                weights.retain_grad()
            else:
                routing = routing._replace(routing_weights=weights.detach().requires_grad_())
        if recomputed:
            self._replace_gradless(name, routing)
        else:
            self.routings.append((name, routing))
        return routing

    def _knows(self, name: str, hidden: Tensor) -> bool:  # (N, D)
        wanted = signature(hidden)
        return any(known == name and torch.equal(seen, wanted) for known, seen in self._seen)

    def _require_routings(self) -> None:
        if not self.routings:
            raise InvalidArgumentError(
                "this trace holds no routings: run a forward of the recorded model itself inside record(), not of a compiled one, "
                "which runs no hooks; and observe it once"
            )

    def _require_observable(self) -> None:
        for name in {name for name, _ in self.routings}:
            self.gates[name].require_observable()

    def _done(self) -> None:
        self.routings, self._forwards = [], []
        self.close()

    def _replace_gradless(self, name: str, routing: Routing) -> None:
        """Reentrant checkpointing records without gradients first; the recomputed weights are those that will have them.

        The rest stays as recorded: when the backward pass runs, the model call is over, and which tokens are padding is forgotten.
        """
        if not routing.routing_weights.requires_grad:
            return
        for place in reversed(range(len(self.routings))):
            known, before = self.routings[place]
            if known == name and not before.routing_weights.requires_grad and _same_choice(before, routing):
                self.routings[place] = (name, before._replace(routing_weights=routing.routing_weights))
                return


def _same_choice(one: Routing, other: Routing) -> bool:
    return torch.equal(one.expert_indices, other.expert_indices) and torch.equal(one.cluster_ids, other.cluster_ids)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the routing of every gate of ``model`` in the forward passes inside the block.

    Where gradients are enabled, recorded routing weights take part in the graph, so that a later backward leaves their
    gradient for :meth:`Trace.observe_gradients`. Under activation checkpointing every token is still recorded once. Only forwards
    of the thread or asyncio task that entered the block are recorded, so others may use the model meanwhile; run a thread of your own
    in ``contextvars.copy_context()`` to have it recorded too.

    Raises:
        InvalidArgumentError: the model holds no gate, or was compiled: a compiled graph runs no hooks. The message says which
            object to record instead.

    >>> from moe_posterior import PosteriorMoE
    >>> hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> moe = PosteriorMoE(nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), hidden_size=8, num_clusters=4)
    >>> moe.gate.fit(hidden)
    >>> with record(moe) as trace:
    ...     loss = moe(hidden).square().mean()
    >>> loss.backward()
    >>> trace.observe_gradients()
    >>> float((moe.gate.posterior.successes + moe.gate.posterior.failures).sum())
    128.0
    """
    trace = Trace(find_gates(model), model)
    try:
        yield trace
    except BaseException:
        trace.close()
        raise
    finally:
        trace.end()


def auxiliary_listener(gate: nn.Module) -> Callable[[], None]:
    """What to call when a gradient comes through logits that this gate's router returned in the current call."""
    listeners = [hook for hook in gate._forward_hooks.values() if isinstance(hook, _Listener) and hook.listens]

    def tell() -> None:
        for listener in listeners:
            listener.auxiliary()

    return tell
