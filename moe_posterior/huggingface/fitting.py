"""Fit and warm-start every gate of any module in one pass over data: swapped routers, and gates of this library's own layers.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, NotFittedError
from moe_posterior.gates import BeliefGate, Routing
from moe_posterior.huggingface.gates import HostedGate
from moe_posterior.huggingface.host import swapped_routers
from moe_posterior.huggingface.passes import (
    Reservoir,
    add_to_counts,
    evaluating,
    loss_of,
    on_device,
    own_choice,
    with_labels,
    without_parameter_gradients,
)
from moe_posterior.replay.find import find_gates
from moe_posterior.replay.record import record

Loss = Callable[[nn.Module, Any], Tensor]


@as_declared
def fit_gates(
    model: nn.Module,
    dataloader: Iterable[Any],
    max_tokens: int | None = None,
    *,
    sample_size: int = 8192,
    generator: torch.Generator | None = None,
) -> None:
    """Find the clusters of every gate in ``model`` that holds a belief, in one pass, with a sample of fixed size for each in memory.

    The model runs in evaluation mode, without gradients. A gate that cannot route before it has clusters sends its tokens to all
    experts in turn meanwhile, so that later layers see inputs too; a second call, with the same data, fits those on the routing that
    the fitted layers before them make. The belief so far is dropped, because it belongs to other clusters. Under
    torch.distributed this is a collective call.

    Args:
        model: holds the gates; swapped or not, not compiled.
        dataloader: yields the model's arguments as mappings, or its one argument as a tensor, alone or first in a tuple. Padding of
            a swapped model, by ``attention_mask``, is left out.
        max_tokens: stop once every gate has seen this many; None (default) reads everything.
        sample_size: tokens kept for each gate, in float32 on the CPU. The default 8192 is 128 for each of 64 clusters.
        generator: a CPU generator for the sample and for k-means; None starts from seed 0.

    Raises:
        InvalidArgumentError: the model holds no gate with a belief, a gate saw fewer tokens than it has clusters, or an argument is
            out of range; no gate has changed.

    >>> from moe_posterior import PosteriorMoE
    >>> experts = lambda: nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    >>> model = nn.Sequential(*(PosteriorMoE(experts(), hidden_size=8, num_clusters=4) for _ in range(2)))
    >>> fit_gates(model, [torch.randn(64, 8, generator=torch.Generator().manual_seed(0))])
    >>> model(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """
    sample_size = validation.count("sample_size", sample_size)
    max_tokens = None if max_tokens is None else validation.count("max_tokens", max_tokens)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    gates = _believing(model)
    samples = {name: Reservoir(sample_size, generator) for name in gates}
    with ExitStack() as undo:
        for name, gate in gates.items():
            undo.enter_context(_routing_in_turn(gate, always=False))
            undo.callback(gate.register_forward_hook(_collector(samples[name]), with_kwargs=True).remove)
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.no_grad())
        for batch in dataloader:
            _call(model, batch)
            if max_tokens is not None and min(each.seen for each in samples.values()) >= max_tokens:
                break
    used = [name for name in gates if samples[name].seen]
    for name in used:
        needed, seen = gates[name].clusterer.num_clusters, len(samples[name].sample)
        if seen < needed:
            raise InvalidArgumentError(
                f"dataloader must yield at least {needed} tokens to fit as many clusters; gate {name!r} saw {seen}"
            )
    if not used:
        raise InvalidArgumentError("dataloader must yield at least one batch with tokens; no gate saw any")
    if unused := [name for name in gates if name not in used]:
        warnings.warn(f"these gates saw no token and stay as they are: {unused}", stacklevel=2)
    for name in used:
        gate = gates[name]
        gate.fit(samples[name].sample.to(gate.posterior.successes.device), generator=generator)


@as_declared
def warm_start_gates(
    model: nn.Module, dataloader: Iterable[Any], max_tokens: int | None = None, *, loss: Loss | None = None
) -> None:
    """Measure on healthy data how often each expert's share lowers its token's loss, for every gate in ``model`` with a belief.

    One forward and one backward a batch, through the routing weights alone: no parameter changes or gets a gradient. Routers choose
    by their own rule; a gate that decides by its belief alone sends its tokens to all experts in turn, so that each is measured
    in every cluster. The counts are where later evidence starts from; evidence so far is forgotten.

    Args:
        model: holds the gates, fitted; not compiled.
        dataloader: as for :func:`fit_gates`, with what the loss needs.
        max_tokens: stop after this many tokens; None (default) reads everything.
        loss: ``loss(model, batch)`` calls the model and returns the loss; None (default) takes the ``loss`` of what the model
            returns for a mapping, with ``labels``, or ``input_ids`` for a causal language model.

    Raises:
        NotFittedError: a gate has no clusters yet. InvalidArgumentError: the model holds no gate with a belief, a gate learns a prior
            from outcomes and so has no counts to start from, or there is no loss.
    """
    max_tokens = None if max_tokens is None else validation.count("max_tokens", max_tokens)
    gates = _believing(model)
    for name, gate in gates.items():
        if gate.learned_prior is not None:
            raise InvalidArgumentError(
                f"model must hold gates without a learned prior; gate {name!r} has one: call its measure"
            )
        if not gate.clusterer.fitted:
            raise NotFittedError(f"gate {name!r} has no clusters yet: call fit_gates(model, dataloader) first")
    counts = {name: torch.zeros_like(gate.posterior.successes).repeat(2, 1, 1) for name, gate in gates.items()}
    tokens = 0
    with ExitStack() as undo:
        for gate in gates.values():
            undo.enter_context(_routing_in_turn(gate, always=True))
        undo.enter_context(evaluating(model))
        undo.enter_context(without_parameter_gradients(model))
        undo.enter_context(own_choice(swapped_routers(model, required=False)))
        for batch in dataloader:
            with record(model) as trace, torch.enable_grad():
                value = _default_loss(model, batch) if loss is None else loss(model, batch)
            if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                raise InvalidArgumentError(
                    f"loss must return a scalar tensor with a gradient; got {validation.described(value)}"
                )
            value.backward()
            outcomes = [each for each in trace.gradient_outcomes() if each[0] in gates]
            for name, routing, outcome in outcomes:
                add_to_counts(counts[name], routing, outcome)
            trace.close()
            tokens += max((int(torch.isfinite(routing.distance).sum()) for _, routing, _ in outcomes), default=0)
            if max_tokens is not None and tokens >= max_tokens:
                break
    if not tokens:
        raise InvalidArgumentError("dataloader must yield at least one batch with tokens; no gate saw any")
    for name, gate in gates.items():
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts[name])
        gate.set_reference(*counts[name])


def _believing(model: nn.Module) -> dict[str, BeliefGate]:
    gates = {name: gate for name, gate in find_gates(model).items() if isinstance(gate, BeliefGate)}
    if not gates:
        raise InvalidArgumentError(
            f"model must hold at least one gate with a belief; {type(model).__name__} holds none"
        )
    return gates


@contextmanager
def _routing_in_turn(gate: BeliefGate, always: bool) -> Iterator[None]:
    """Inside, a gate that decides by its belief alone sends its tokens to all experts in turn: always, or where it cannot route."""
    if isinstance(gate, HostedGate) or not gate.decides_alone:
        yield
        return
    own = gate.forward

    def forward(hidden: Tensor) -> Routing:  # (N, D)
        if always:
            return in_turn(own(hidden), gate.num_experts)
        try:
            return own(hidden)
        except NotFittedError:
            nothing = torch.zeros(len(hidden), gate.top_k, device=hidden.device)
            ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            return in_turn(
                Routing(nothing.long(), nothing + 1 / gate.top_k, ids, nothing, nothing[:, 0]), gate.num_experts
            )

    vars(gate)["forward"] = forward
    try:
        yield
    finally:
        del vars(gate)["forward"]


def in_turn(routing: Routing, num_experts: int) -> Routing:
    """The routing with its choice replaced: token n gets the k experts from n on, with equal weights.

    >>> nothing = torch.zeros(3, 2)
    >>> in_turn(Routing(nothing.long(), nothing, nothing[:, 0].long(), nothing, nothing[:, 0]), 4).expert_indices.tolist()
    [[0, 1], [1, 2], [2, 3]]
    """
    num_tokens, top_k = routing.expert_indices.shape
    place = torch.arange(num_tokens, device=routing.expert_indices.device)[:, None]
    indices = (place + torch.arange(top_k, device=place.device)) % num_experts
    return routing._replace(expert_indices=indices, routing_weights=torch.full_like(routing.routing_weights, 1 / top_k))


def _collector(sample: Reservoir) -> Callable[..., None]:
    def collect(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
        hidden = args[0] if args else kwargs["hidden"]
        sample.add(hidden[routing.distance.isfinite().to(hidden.device)])

    return collect


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**on_device(batch, model))
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise InvalidArgumentError(
            f"dataloader must yield mappings of a model's arguments, or tensors; got {type(batch).__name__}"
        )
    parameter = next(model.parameters(), None)
    return model(first if parameter is None else first.to(parameter.device))


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise InvalidArgumentError(
            f"loss must be given where dataloader does not yield mappings; got {type(batch).__name__}"
        )
    return loss_of(model, with_labels(on_device(batch, model), model))
