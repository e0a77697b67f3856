"""What each router class returns: how to read its choice, and how to write other weights or another choice into it.

Most routers of transformers return ``(logits, weights (T, k), indices (T, k), …)``; one adapter serves them. The others have one each.

Dimensions: T tokens, D hidden size, E experts, W logits per token (at least E), k experts per token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.replay.auxiliary import chosen_by, handed_on

Decide = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor] | None
]  # maps (T, k) indices and weights to new ones; None keeps them
_CORRECTIONS = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class UnknownRouterError(InvalidArgumentError):
    """A router does not behave as its adapter expects, so it cannot be swapped without guessing."""


class Adapter:
    """How to read a router's choice, and how to write another one into what it returns.

    This class serves routers that hold one projection to logits and return a tuple that starts with logits, weights (T, k), indices
    (T, k). For another return value override :meth:`read` and :meth:`write`; for another name of the number of experts a token
    gets, :meth:`top_k`; for hidden states under another argument name, :meth:`hidden`. A router must compute its logits in one
    matrix product to W columns; the first forward after the swap checks that, and what ``read`` returns.
    :func:`~moe_posterior.huggingface.register_adapter` says which class an adapter is for.

    >>> class WeightsAndExperts(Adapter):
    ...     logits = None  # they are not returned
    ...
    ...     def read(self, router, output):
    ...         return output["experts"], output["weights"]
    ...
    ...     def write(self, router, output, indices, weights):
    ...         return {"experts": indices, "weights": weights}
    """

    kind = "swapped"  # the status shown in the table of layers
    logits: int | None = (
        0  # position in the output of the logits that auxiliary losses use; None if they are not in the tuple
    )
    whole = True  # whether indices and weights are all that the model computes with among the outputs that depend on the logits

    def num_experts(self, router: nn.Module) -> int:
        """E; if a router also scores something else, such as a zero expert, that counts as an expert too."""
        return _projection(router)[0]

    def hidden_size(self, router: nn.Module) -> int:
        """D."""
        return _projection(router)[1]

    def width(self, router: nn.Module) -> int:
        """W."""
        return _projection(router)[0]

    def top_k(self, router: nn.Module) -> int:
        """k."""
        top_k = getattr(router, "top_k", None)
        if top_k is None:
            top_k = getattr(getattr(router, "config", None), "top_k_experts", None)
        if not isinstance(top_k, int):
            raise UnknownRouterError(
                f"{type(router).__name__} has no attribute top_k that says how many experts it chooses"
            )
        return top_k

    def hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:  # -> (..., D)
        """The hidden states among a call's arguments."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise UnknownRouterError(f"hidden states must come first or as hidden_states; got {type(hidden).__name__}")
        return hidden

    def correction(
        self, router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:  # -> (W,)
        """The correction that this call adds to the scores for choosing, but not to the weights, if any."""
        holders = (router, getattr(router, "moe_statics", None))
        found = [getattr(holder, name, None) for holder in holders for name in _CORRECTIONS]
        found += [kwargs.get(name) for name in _CORRECTIONS]
        found += list(args[1:2])
        width = self.width(router)
        return next(
            (x.reshape(-1) for x in found if isinstance(x, Tensor) and x.numel() == width and x.is_floating_point()),
            None,
        )

    def call(
        self,
        router: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        decide: Decide,
    ) -> Any:
        """Run the router's own ``forward`` and replace its choice by what ``decide`` returns for it."""
        output = forward(router, *args, **kwargs)
        changed = decide(*self.read(router, output))
        return output if changed is None else self.write(router, output, *changed)

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:  # -> (T, k), (T, k)
        """Expert indices and their weights.

        Raises:
            UnknownRouterError: the output does not look as expected.
        """
        fits = isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, Tensor) for part in output[:3])
        if not fits:
            raise _unexpected(router, "(logits, weights, indices)", output)
        _, weights, indices = output[:3]
        if weights.ndim != 2 or weights.shape != indices.shape or indices.dtype != torch.int64:
            raise _unexpected(router, "weights (T, k) and int64 indices (T, k)", output)
        return indices, weights

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:  # (T, k), (T, k)
        """The output with this choice and these weights in it."""
        return (output[0], weights, indices, *output[3:])

    def hand_on(self, output: Any, told: Callable[[], None]) -> Any:
        """The output with its logits passed through a door that an auxiliary loss's gradient can be kept out by."""
        place = self.logits
        if place is None or not self.whole or not isinstance(output, tuple) or len(output) <= place:
            return output
        logits = output[place]
        if not isinstance(logits, Tensor) or not logits.requires_grad:
            return output
        return (*output[:place], handed_on(logits, told), *output[place + 1 :])


class SharedInside(Adapter):
    """Inkling, Zaya: the last logits belong to shared experts, or to choosing no expert."""

    kind = "special"

    def num_experts(self, router: nn.Module) -> int:
        return int(router.num_experts)  # type: ignore[arg-type]

    def hidden_size(self, router: nn.Module) -> int:
        size = getattr(router, "hidden_size", None)  # Zaya projects its input down first
        return _projection(router)[1] if size is None else int(size)

    def width(self, router: nn.Module) -> int:
        width = getattr(router, "num_router_classes", None)
        return _projection(router)[0] if width is None else int(width)

    def correction(self, router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        if hasattr(
            router, "n_shared_experts"
        ):  # only routed experts can be chosen, so the correction has fewer columns than the logits
            return None
        return super().correction(router, args, kwargs)


class Inkling(SharedInside):
    """Inkling: the weights of its shared experts come out of the same softmax."""

    whole = False


class Dense(Adapter):
    """Llama 4: ``(scores (T, E), logits)``, scores 0 where an expert was not chosen."""

    kind = "special"
    logits = 1

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        if not (
            isinstance(output, tuple)
            and len(output) == 2
            and output[0].ndim == 2
            and output[0].shape == output[1].shape
        ):
            raise _unexpected(router, "(scores (T, E), logits (T, E))", output)
        indices = output[0].topk(self.top_k(router), dim=-1).indices
        return indices, output[0].gather(1, indices)

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
        return (torch.zeros_like(output[0]).scatter(1, indices, weights), *output[1:])


class Grouped(Adapter):
    """JetMoE: the weights are sorted by expert, and the sort order is returned with them."""

    kind = "special"
    logits = 4

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(output, tuple) and len(output) == 5 and output[2].shape == output[0].shape):
            raise _unexpected(router, "(order, tokens, weights, counts, logits)", output)
        order, _, weights, _, logits = output
        indices = logits.topk(self.top_k(router), dim=1).indices
        return indices, weights[order.argsort()].reshape(indices.shape)

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
        flat = indices.flatten()
        order = flat.sort(0).indices
        counts = torch.bincount(flat, minlength=self.num_experts(router)).tolist()
        tokens = order.div(indices.shape[1], rounding_mode="trunc")
        return (order, tokens, weights.flatten()[order], counts, output[4])


class Capacity(Adapter):
    """Switch: ``(one-hot choice (B, S, E), probability (B, S, 1), logits)``; a token over capacity gets no expert."""

    kind = "special"
    logits = 2

    def top_k(self, router: nn.Module) -> int:
        return 1

    def read(self, router: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(output, tuple) and len(output) == 3 and output[0].shape == output[2].shape):
            raise _unexpected(router, "(choice (B, S, E), probability (B, S, 1), logits (B, S, E))", output)
        taken, indices = output[0].reshape(-1, output[0].shape[-1]).max(dim=-1, keepdim=True)
        return indices, output[1].reshape(-1, 1) * taken

    def write(self, router: nn.Module, output: Any, indices: Tensor, weights: Tensor) -> Any:
        taken = (weights != 0).to(output[0].dtype)
        choice = torch.zeros_like(output[0]).reshape(-1, output[0].shape[-1]).scatter(1, indices, taken)
        return (choice.reshape(output[0].shape), weights.reshape(output[1].shape), output[2])


class Inside(Adapter):
    """DBRX: the mixture itself turns its router's logits into a choice, in ``route_tokens_to_experts``."""

    kind = "special"
    logits = None

    def num_experts(self, router: nn.Module) -> int:
        return _projection(router.router)[0]  # type: ignore[arg-type]

    def hidden_size(self, router: nn.Module) -> int:
        return _projection(router.router)[1]  # type: ignore[arg-type]

    def width(self, router: nn.Module) -> int:
        return self.num_experts(router)

    def call(
        self,
        router: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        decide: Decide,
    ) -> Any:
        own = router.route_tokens_to_experts

        def route(logits: Tensor) -> tuple[Tensor, Tensor]:
            weights, indices = own(chosen_by(logits) if logits.requires_grad else logits)  # type: ignore[operator]
            changed = decide(indices, weights)
            return (weights, indices) if changed is None else (changed[1], changed[0])

        router.route_tokens_to_experts = route  # type: ignore[assignment]
        try:
            return forward(router, *args, **kwargs)
        finally:
            del router.route_tokens_to_experts


SPECIAL: dict[str, Adapter] = {
    "InklingTopkRouter": Inkling(),
    "ZayaRouter": SharedInside(),
    "Llama4Router": Dense(),
    "JetMoeTopKGating": Grouped(),
    "SwitchTransformersTop1Router": Capacity(),
    "DbrxFFN": Inside(),
}
COMMON = Adapter()


def _projection(router: nn.Module) -> tuple[int, int]:  # -> W, D
    """The shape of the one weight that turns hidden states into logits."""
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    linear = [child for child in router.children() if isinstance(child, nn.Linear)]
    if len(linear) != 1:
        raise UnknownRouterError(
            f"{type(router).__name__} must hold one projection to logits; got {len(linear)} linear children"
        )
    return linear[0].out_features, linear[0].in_features


def _unexpected(router: nn.Module, expected: str, output: Any) -> UnknownRouterError:
    parts = output if isinstance(output, tuple) else (output,)
    got = ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
    return UnknownRouterError(f"{type(router).__name__} must return {expected}; got ({got})")
