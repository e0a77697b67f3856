"""Separate the gradient of the main loss from that of an auxiliary loss on the routers' logits.

A load-balancing loss reflects how often experts are used, not how well they do, and its gradient reaches every token of every
layer but the last. So the logits that a router returns besides its choice pass through a *door*: an identity whose gradient can be
shut off. When a backward pass reaches the loss of a recorded forward whose graph holds such a door, the gradients of the routing
weights are computed a second time with the doors shut. The gradients of the parameters do not change.

Dimensions: T tokens, W logits per token, k experts per token.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_ROOTS = ("loss", "logits", "last_hidden_state")  # outputs that a loss is made from, the one closest to the loss first
_AUXILIARY = "router_logits", "aux_loss", "router_aux_loss", "z_loss", "encoder_router_logits", "decoder_router_logits"
_shut: set[int] = set()  # backward passes, by the ids that autograd gives them, in which the doors are shut


class _HandedOn(torch.autograd.Function):
    """An identity that passes no gradient back while the doors are shut."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, told: Callable[[], None]) -> Tensor:
        ctx.told = told
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        if _doors_are_shut():
            return None, None
        ctx.told()
        return gradients[0], None


class _Chosen(torch.autograd.Function):
    """An identity that stores the gradient that came back through it while the doors were shut."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if _doors_are_shut():
            ctx.kept[:] = gradients[:1]
        return gradients[0], None


def handed_on(logits: Tensor, told: Callable[[], None]) -> Tensor:  # (T, W) -> (T, W)
    """Put a door on logits that the router's choice does not use; ``told`` is called if a gradient comes back through it."""
    return _HandedOn.apply(logits, told)


def chosen_by(logits: Tensor) -> Tensor:  # (T, W) -> (T, W)
    """Mark the logits that the choice uses, for routers whose returned logits cannot be reached separately."""
    kept: list[Tensor] = []

    def only_the_choice(gradient: Tensor) -> Tensor | None:
        if not _doors_are_shut():
            return None
        return kept.pop() if kept else torch.zeros_like(gradient)

    logits.register_hook(only_the_choice)
    return _Chosen.apply(logits, kept)


class Apart:
    """One recorded forward: the routing weights it used, and, after a backward pass, their gradients without auxiliary losses."""

    def __init__(self, output: Any, weights: list[Tensor]) -> None:
        self.weights = weights
        self.gradients: list[Tensor | None] | None = None  # None until they are computed separately
        fields = _fields(output)
        self._announced = any(fields.get(name) is not None for name in _AUXILIARY)
        self._roots: dict[str, GradientEdge] = {}
        for name, root in _roots(fields).items():
            self._roots[name] = get_gradient_edge(root)
            # A weak reference: a hook that held its own node would keep the graph alive for ever.
            root.register_hook(_Arrival(self, name))

    def arrived(self, name: str, gradient: Tensor) -> None:
        """Called when a gradient has reached a root; only the first one counts."""
        edge = self._roots.pop(name, None)
        if edge is None or _doors_are_shut():
            return
        self._roots.clear()
        if not self.weights or not (self._announced or _reaches(edge.node)):
            return
        before = [weights.grad for weights in self.weights]
        try:
            with _doors_shut(edge.node):
                self.gradients = list(
                    torch.autograd.grad([edge], self.weights, [gradient], retain_graph=True, allow_unused=True)
                )
        except RuntimeError:  # part of the graph allows only one backward pass
            self.gradients = None
        for weights, kept in zip(self.weights, before, strict=True):
            weights.grad = kept

    def of(self, weights: Tensor) -> Tensor | None:  # (T, k)
        """The gradient of these routing weights without auxiliary losses; None if it was not computed separately."""
        if self.gradients is None:
            return None
        for own, gradient in zip(self.weights, self.gradients, strict=True):
            if own is weights:
                return torch.zeros_like(weights) if gradient is None else gradient
        return None


class _Arrival:
    """The hook on a root."""

    def __init__(self, apart: Apart, name: str) -> None:
        self._apart, self._name = weakref.ref(apart), name

    def __call__(self, gradient: Tensor) -> None:
        apart = self._apart()
        if apart is not None:
            apart.arrived(self._name, gradient)


@contextmanager
def _doors_shut(root: Node) -> Iterator[None]:
    """Inside, the doors are shut in the backward pass that starts at this node, whichever threads run it, and in no other."""
    begun: list[int] = []

    def begin(gradients: object) -> None:
        begun.append(torch._C._current_graph_task_id())
        _shut.add(begun[-1])

    handle = root.register_prehook(begin)
    try:
        yield
    finally:
        handle.remove()
        _shut.difference_update(begun)


def _doors_are_shut() -> bool:
    """Whether the backward pass that runs in this thread is one with shut doors."""
    return torch._C._current_graph_task_id() in _shut


def _fields(output: Any) -> dict[str, Any]:
    """A model's output by name; a tuple's parts by number, a tensor alone as the loss."""
    if isinstance(output, Tensor):
        return {"loss": output}
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", None) or [str(place) for place in range(len(output))]
        return dict(zip(names, output, strict=True))
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _roots(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    usable = {name: part for name, part in fields.items() if isinstance(part, Tensor) and part.grad_fn is not None}
    named = {name: usable[name] for name in _ROOTS if name in usable}
    return named or dict(list(usable.items())[:1])


def _reaches(root: Node) -> bool:
    """Whether this node depends on logits that have a door."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        if node.name() == "_HandedOnBackward":
            return True
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return False
