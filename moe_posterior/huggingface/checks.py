"""What a swap promises, checked on a model: each check takes an unswapped model and leaves it so.

They need neither data nor labels nor a loss, so that they run on any model that turns token ids into tensors.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_posterior.huggingface.gates import HostedPriorGate
from moe_posterior.huggingface.host import SwappedRouter
from moe_posterior.huggingface.swap import restore_gates, swap_gates, swapped_gates
from moe_posterior.huggingface.tiny import tiny_batch
from moe_posterior.record import Trace, record

_CLUSTERS, _PADDED = 3, 3


def check_identical(model: nn.Module) -> bool:
    """Outputs are the same bits: at the first call after the swap, at the second, under record, and after a restore."""
    batch = tiny_batch(model, padded=_PADDED)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    with torch.no_grad():
        before = outputs(model, batch)
        with _swapped(model):
            during = [outputs(model, batch), outputs(model, batch)]
            with record(model):
                during.append(outputs(model, batch))
        during.append(outputs(model, batch))
    restored = [type(module) for module in model.modules()] == classes and list(model.state_dict()) == keys
    return restored and all(same(before, each) for each in during)


def check_gradients(model: nn.Module) -> bool:
    """Every parameter's gradient is the same bits under record, and every router that was used gets evidence from the backward."""
    batch = tiny_batch(model)
    before = _gradients(model, batch)
    with _swapped(model):
        with record(model) as trace:
            loss = objective(model, batch)
        loss.backward()
        used = {name for name, routing in trace.routings if routing.routing_weights.grad is not None}
        after = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        trace.observe_gradients()
        gates = {f"{name}.posterior_gate": gate for name, gate in swapped_gates(model)}
        learned = all(evidence(gates[name]) > 0 for name in used)
    equal = all((one is None) == (other is None) for one, other in zip(before, after, strict=True))
    return (
        bool(used)
        and learned
        and equal
        and same([g for g in before if g is not None], [g for g in after if g is not None])
    )


def check_evidence(model: nn.Module) -> bool:
    """The most used expert of each layer, once condemned, is chosen no more; all else is as if its logit had been that low.

    The reference is the unswapped model with the result of the routers' own matrix product lowered from outside.
    """
    batch = tiny_batch(model)
    with torch.no_grad():
        before = outputs(model, batch)
        with _swapped(model):
            chosen = choices(model, batch)
            weights = {name: _logit_weight(model.get_submodule(name)) for name in chosen}
            # Routers that share a weight (an encoder's and a decoder's) can only be lowered together.
            used = {weight: int(chosen[name].flatten().mode().values) for name, weight in weights.items()}
            worst = {name: used[weight] for name, weight in weights.items()}
            for name, gate in swapped_gates(model):
                if name in worst:
                    condemn(gate, worst[name])
            after = outputs(model, batch)
            avoided = all(not (indices == worst[name]).any() for name, indices in choices(model, batch).items())
            penalties = {weights[name]: (expert, gates_bias(model, name, expert)) for name, expert in worst.items()}
        with _lowered(penalties):
            expected = outputs(model, batch)
    return avoided and same(after, expected) and not same(after, before)


def check_padding(model: nn.Module) -> bool:
    """Exactly the padding of a batch lies at distance inf, in every router that sees the batch's tokens."""
    batch = tiny_batch(model, padded=_PADDED)
    real = int(batch["attention_mask"].sum())
    with torch.no_grad(), _swapped(model), record(model) as trace:
        outputs(model, batch)
        counts = [int(torch.isfinite(routing.distance).sum()) for _, routing in trace.routings]
    return bool(counts) and all(count == real for count in counts)


def check_checkpointing(model: nn.Module) -> bool | None:
    """Under gradient checkpointing every token is counted once; None where the model offers none or ignores it."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    batch, seen = tiny_batch(model), []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            model.train()
        with torch.random.fork_rng(), _swapped(model):
            torch.manual_seed(0)
            with record(model) as trace:
                loss = objective(model, batch)
            loss.backward()
            outcomes = trace.gradient_outcomes()
            seen.append(sorted((name, int((~outcome.isnan()).sum())) for name, _, outcome in outcomes))
    model.zero_grad()
    model.gradient_checkpointing_disable()  # type: ignore[operator]
    model.eval()
    return seen[0] == seen[1]


def check_generation(model: nn.Module) -> bool | None:
    """Generation gives the same tokens; None where the model does not generate text."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    batch = tiny_batch(model)
    batch.pop("decoder_input_ids", None)
    batch.pop("decoder_attention_mask", None)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generate() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some draw even when asked not to
            generated = model.generate(**batch, **options)  # type: ignore[operator]
        return generated if isinstance(generated, Tensor) else generated.sequences

    before = generate()
    with _swapped(model):
        after = generate()
    return torch.equal(before, after)


def check_router_logits(model: nn.Module) -> bool | None:
    """Recorded router logits and the auxiliary loss are the same bits; None where the model reports none."""
    batch = tiny_batch(model)
    try:
        with torch.no_grad():
            before = model(**batch, output_router_logits=True)
    except TypeError:
        return None
    names = [
        name
        for name in ("router_logits", "encoder_router_logits", "decoder_router_logits", "aux_loss")
        if before.get(name) is not None
    ]
    if not names:
        return None
    with torch.no_grad(), _swapped(model):
        after = model(**batch, output_router_logits=True)
    return all(same(_tensors(before[name]), _tensors(after[name])) for name in names)


def check_bfloat16(model: nn.Module) -> bool | None:
    """In bfloat16 outputs are the same bits and the belief stays in float64; None where the model itself cannot be cast."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = tiny_batch(model)
    model.to(torch.bfloat16)
    try:
        with torch.no_grad():
            before = outputs(model, batch)
            with _swapped(model):
                model.to(torch.bfloat16)
                after = outputs(model, batch)
                kept = all(gate.posterior.successes.dtype == torch.float64 for _, gate in swapped_gates(model))
    except RuntimeError as error:
        if "same dtype" in str(error):
            return None
        raise
    finally:
        model.to(torch.float32)
        model.load_state_dict(weights)
    return kept and same(before, after)


CHECKS: dict[str, Callable[[nn.Module], bool | None]] = {
    "identical": check_identical,
    "gradients": check_gradients,
    "evidence": check_evidence,
    "padding": check_padding,
    "checkpointing": check_checkpointing,
    "generation": check_generation,
    "router logits": check_router_logits,
    "bfloat16": check_bfloat16,
}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every floating tensor that the model returns, caches left out."""
    return _tensors(model(**batch, use_cache=False).to_tuple())


def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss that every model has: the mean square of its first output, each element weighted differently."""
    first = outputs(model, batch)[0].float()
    return (first.square() * torch.linspace(0.5, 1.5, first.numel()).reshape(first.shape)).mean()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists hold the same bits, NaN in the same places included."""
    pairs = zip(one, other, strict=True)
    return all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


def condemn(gate: Any, expert: int) -> None:
    """Evidence against one expert in every cluster."""
    gate.posterior.failures[:, expert] = 1000.0
    gate.posterior.forget(1.0)  # keeps everything, and refreshes what depends on it


def evidence(gate: Any) -> float:
    """Observations in all cells."""
    return float((gate.posterior.successes + gate.posterior.failures).sum())


def gates_bias(model: nn.Module, name: str, expert: int) -> float:
    """What the gate of a router adds to an expert's logit, the same in all clusters."""
    gate = dict(swapped_gates(model))[name]
    assert isinstance(gate, HostedPriorGate)
    return float(gate.evidence_bias[0, expert])


@contextmanager
def _swapped(model: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a type with some layers left alone says so in its row
        swap_gates(model, _CLUSTERS, half_life=None)
    for _, gate in swapped_gates(model):
        gate.fit(torch.randn(50, gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    try:
        yield
    finally:
        restore_gates(model)


def choices(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts that a swapped model's routers send a batch to with some weight, by router."""
    with record(model) as trace:
        outputs(model, batch)
    return {name.removesuffix(".posterior_gate"): _taken(trace, name) for name, _ in trace.routings}


def _taken(trace: Trace, name: str) -> Tensor:  # -> (M,)
    """The experts that a gate's tokens went to with some weight."""
    routings = [routing for each, routing in trace.routings if each == name]
    return torch.cat([routing.expert_indices[routing.routing_weights != 0] for routing in routings])


def _gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor | None]:
    objective(model, batch).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return gradients


def _logit_weight(router: nn.Module) -> int:
    """The address of the weight whose product are the router's logits."""
    assert isinstance(router, SwappedRouter)
    width = router.moe_posterior.adapter.width(router)
    return next(p.data_ptr() for p in router.parameters() if p.ndim == 2 and p.shape[0] == width)


@contextmanager
def _lowered(penalties: dict[int, tuple[int, float]]) -> Iterator[None]:
    """Within, the products with these weights (by address) have one column lowered."""
    linear = functional.linear

    def lowered(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = linear(hidden, weight, bias)
        if weight.data_ptr() not in penalties:
            return product
        expert, penalty = penalties[weight.data_ptr()]
        shift = torch.zeros(product.shape[-1], dtype=product.dtype)
        shift[expert] = penalty
        return product + shift

    functional.linear = lowered  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.linear = linear


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
