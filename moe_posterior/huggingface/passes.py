"""Two passes over healthy data: the first finds each layer's clusters, the second measures what its experts can do.

Dimensions: T tokens, D hidden size, C clusters, E experts, k experts per token, B sequences, S positions.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_posterior.checks import validation
from moe_posterior.checks.declared import as_declared
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError, NotFittedError
from moe_posterior.gates import Routing
from moe_posterior.huggingface.host import SwappedRouter, swapped_routers
from moe_posterior.replay.find import outer_name
from moe_posterior.replay.record import record

Batches = Iterable[Mapping[str, Any]]


class Reservoir:
    """A uniform sample of fixed size from rows that arrive in batches, in memory of that size (Vitter's algorithm R)."""

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        self.capacity, self.generator, self.seen = capacity, generator, 0
        self.rows: Tensor | None = None  # (capacity, D) float32, on the CPU

    def add(self, hidden: Tensor) -> None:  # (T, D)
        """Admit each row with the probability that keeps this a uniform sample of all rows so far; non-finite rows are skipped."""
        rows = hidden.detach().to("cpu", torch.float32)
        rows = rows[torch.isfinite(rows).all(dim=1)]
        if self.rows is None:
            self.rows = torch.empty(self.capacity, rows.shape[1])
        number = torch.arange(self.seen, self.seen + len(rows))
        drawn = (torch.rand(len(rows), generator=self.generator, dtype=torch.float64) * (number + 1)).long()
        place = torch.where(number < self.capacity, number, drawn)
        kept = (place < self.capacity).nonzero().flatten()
        last = torch.full((self.capacity,), -1).scatter_reduce(0, place[kept], kept, "amax")  # last one per slot
        self.rows[last >= 0] = rows[last[last >= 0]]
        self.seen += len(rows)

    @property
    def sample(self) -> Tensor:  # (n, D)
        """What was kept: all rows while they are fewer than the capacity."""
        return torch.empty(0, 0) if self.rows is None else self.rows[: min(self.seen, self.capacity)]


def fit_clusters(
    model: nn.Module, dataloader: Batches, max_tokens: int | None, sample_size: int, generator: torch.Generator
) -> None:
    """See :meth:`SwappedModel.fit`."""
    for name, size in (("sample_size", sample_size), ("max_tokens", max_tokens)):
        if size is not None and size < 1:
            raise InvalidArgumentError(f"{name} must be at least 1; got {size}")
    routers = swapped_routers(model)
    reservoirs = {name: Reservoir(sample_size, generator) for name in routers}
    for name, router in routers.items():
        router.moe_posterior.collector = reservoirs[name].add
    try:
        with evaluating(model), torch.no_grad():
            for batch in _progress(dataloader, "fit"):
                model(**on_device(batch, model))
                if max_tokens is not None and min(each.seen for each in reservoirs.values()) >= max_tokens:
                    break
    finally:
        for router in routers.values():
            router.moe_posterior.collector = None
    for name, router in routers.items():
        needed, seen = router.posterior_gate.num_clusters, len(reservoirs[name].sample)
        if 0 < seen < needed:
            raise InvalidArgumentError(
                f"dataloader must yield at least {needed} tokens to fit as many clusters; router {name!r} saw {seen}"
            )
    unused = [name for name in routers if not reservoirs[name].seen]
    if len(unused) == len(routers):
        raise InvalidArgumentError("dataloader must yield at least one batch with tokens; no router saw any")
    if unused:
        warnings.warn(f"these routers saw no token and stay without clusters: {unused}", stacklevel=3)
    for name in (name for name in routers if name not in unused):
        gate = routers[name].posterior_gate
        gate.fit(reservoirs[name].sample.to(gate.posterior.successes.device), generator=generator)


def warm_start(model: nn.Module, dataloader: Batches, max_tokens: int | None) -> None:
    """See :meth:`SwappedModel.warm_start`."""
    if max_tokens is not None and max_tokens < 1:
        raise InvalidArgumentError(f"max_tokens must be at least 1; got {max_tokens}")
    routers = {
        name: router for name, router in swapped_routers(model).items() if router.posterior_gate.clusterer.fitted
    }
    if not routers:
        raise NotFittedError("the swapped gates have no clusters yet: call swapped.fit(dataloader) first")
    counts = {
        name: torch.zeros_like(router.posterior_gate.posterior.successes).repeat(2, 1, 1)
        for name, router in routers.items()
    }
    tokens = 0
    with evaluating(model), without_parameter_gradients(model), own_choice(routers):
        for batch in _progress(dataloader, "warm start"):
            with record(model) as trace, torch.enable_grad():
                loss = loss_of(model, with_labels(on_device(batch, model), model))
            loss.backward()
            outcomes = trace.gradient_outcomes()
            for gate_name, routing, outcome in outcomes:
                name = outer_name(model, gate_name)
                if name in counts:
                    add_to_counts(counts[name], routing, outcome)
            trace.close()
            tokens += max(int(torch.isfinite(routing.distance).sum()) for _, routing, _ in outcomes)
            if max_tokens is not None and tokens >= max_tokens:
                break
    for name, router in routers.items():
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts[name])
        router.posterior_gate.set_reference(*counts[name])


@as_declared
def token_outcomes(
    logits: Tensor,  # (B, S, V)
    labels: Tensor,  # (B, S)
    kind: str = "top1",
    *,
    shift: bool = True,
) -> Tensor:  # (B, S) float32
    """How well each position was predicted: one outcome shared by all experts that took part, for ``trace.observe``.

    Args:
        logits: what the model returned.
        labels: the true tokens; -100 where there is none, as at padding.
        kind: ``"top1"`` (default) 1 where the most likely token is the true one; ``"probability"`` the true token's probability, which
            is less coarse if few tokens are predicted right.
        shift: True (default) for causal language models, whose position s predicts label s + 1, so that the last position has no
            outcome; False where position s predicts label s.

    Returns:
        Values in [0, 1], NaN where nothing is to be observed.

    Raises:
        InvalidArgumentError: shapes that do not fit, a label outside the vocabulary, or another kind.

    >>> logits = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]]])
    >>> token_outcomes(logits, torch.tensor([[0, 0, 1]]))
    tensor([[1., 1., nan]])
    """
    logits, labels = validation.floats("logits", logits), validation.integers("labels", labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InvalidArgumentError(
            f"labels must have the shape of logits without its last dimension, {tuple(logits.shape[:2])}; got {tuple(labels.shape)}"
        )
    if kind not in ("top1", "probability"):
        raise InvalidArgumentError(f"kind must be 'top1' or 'probability'; got {kind!r}")
    truth = labels.to(logits.device)
    if shift:
        truth = torch.cat([truth[:, 1:], torch.full_like(truth[:, :1], -100)], dim=1)
    known = truth != -100
    sound = logits.amax(dim=-1).isfinite()  # a non-finite prediction counts neither for nor against the experts
    if bool(((truth < 0) | (truth >= logits.shape[-1]))[known].any()):
        raise InvalidArgumentError(f"labels must be -100 or lie in [0, {logits.shape[-1]})")
    truth = truth.clamp(min=0)
    if kind == "top1":
        outcome = (logits.argmax(dim=-1) == truth).float()
    else:
        own = logits.gather(-1, truth[..., None]).squeeze(-1).float()
        outcome = (own - logits.float().logsumexp(dim=-1)).exp().clamp(max=1.0)
    return outcome.detach().masked_fill(~(known & sound), torch.nan)


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise InvalidArgumentError(f"dataloader must yield mappings of a model's arguments; got {type(batch).__name__}")
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def with_labels(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    if "labels" in batch:
        return batch
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "input_ids" not in batch:
        raise InvalidArgumentError(
            f"dataloader must yield labels where they are not the input ids themselves; got {sorted(batch)}"
        )
    labels = batch["input_ids"]
    if isinstance(batch.get("attention_mask"), Tensor) and batch["attention_mask"].shape == labels.shape:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise InvalidArgumentError(f"model must return a loss when given labels; {type(model).__name__} returned none")
    return loss


def add_to_counts(counts: Tensor, routing: Routing, outcome: Tensor) -> None:  # (2, C, E), (T, k)
    """Add a batch's successes and failures to the counts."""
    seen = (~outcome.isnan() & torch.isfinite(routing.distance)[:, None]).to(outcome.device)
    cells = (routing.cluster_ids[:, None].expand_as(routing.expert_indices)[seen], routing.expert_indices[seen])
    success = outcome[seen].to(counts.dtype)
    counts[0].index_put_(cells, success, accumulate=True)
    counts[1].index_put_(cells, 1 - success, accumulate=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, jitter or training capacity; each module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Only the routing weights take part in the backward pass: no parameter gets a gradient, or memory for one."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def own_choice(routers: Mapping[str, SwappedRouter]) -> Iterator[None]:
    """Every router chooses as it did before the swap, also in replace mode: that choice is what is measured."""
    for router in routers.values():
        router.moe_posterior.own_choice = True
    try:
        yield
    finally:
        for router in routers.values():
            router.moe_posterior.own_choice = False


def _progress(batches: Batches, label: str) -> Iterable[Mapping[str, Any]]:
    """transformers' progress bar, which its ``disable_progress_bar`` turns off."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf") from error
    return logging.tqdm(batches, desc=label, leave=False)
