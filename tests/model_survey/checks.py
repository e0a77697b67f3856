"""What a swap promises, checked on a model: each check takes an unswapped model and leaves it so.

They need neither data nor labels nor a loss, so that they run on any model that turns token ids into tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model_survey.probe import (
    PADDED,
    bias_of,
    choices,
    condemn,
    evidence,
    expert_weights,
    floating,
    gradients,
    logit_weight,
    lowered,
    objective,
    outputs,
    same,
    swapped,
)
from model_survey.tiny import EXPERTS, tiny_batch
from moe_posterior.huggingface.host import swapped_routers
from moe_posterior.huggingface.swap import swapped_gates
from moe_posterior.replay.record import record


def check_identical(model: nn.Module) -> bool:
    """Outputs are the same bits: at the first call after the swap, at the second, under record, and after a restore."""
    batch = tiny_batch(model, padded=PADDED)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    with torch.no_grad():
        before = outputs(model, batch)
        with swapped(model):
            during = [outputs(model, batch), outputs(model, batch)]
            with record(model):
                during.append(outputs(model, batch))
        during.append(outputs(model, batch))
    restored = [type(module) for module in model.modules()] == classes and list(model.state_dict()) == keys
    return restored and all(same(before, each) for each in during)


def check_gradients(model: nn.Module) -> bool:
    """Every parameter's gradient is the same bits under record, and every router that was used gets evidence from the backward."""
    batch = tiny_batch(model)
    before = gradients(model, batch)
    with swapped(model):
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
        with swapped(model):
            chosen = choices(model, batch)
            weights = {name: logit_weight(model.get_submodule(name)) for name in chosen}
            # Routers that share a weight (an encoder's and a decoder's) can only be lowered together.
            used = {weight: int(chosen[name].flatten().mode().values) for name, weight in weights.items()}
            worst = {name: used[weight] for name, weight in weights.items()}
            for name, gate in swapped_gates(model):
                if name in worst:
                    condemn(gate, worst[name])
            after = outputs(model, batch)
            avoided = all(not (indices == worst[name]).any() for name, indices in choices(model, batch).items())
            penalties = {weights[name]: (expert, bias_of(model, name, expert)) for name, expert in worst.items()}
        with lowered(penalties):
            expected = outputs(model, batch)
    return avoided and same(after, expected) and not same(after, before)


def check_replacing(model: nn.Module) -> bool:
    """A gate that replaces its router sends tokens where it believes, with the sum of the router's own weights."""
    batch = tiny_batch(model)
    with torch.no_grad():
        before = outputs(model, batch)
        with swapped(model, "replace"):
            for _, gate in swapped_gates(model):
                gate.posterior.successes[:, EXPERTS - 1] = 50.0
                gate.posterior.forget(1.0)  # keeps everything, and refreshes what depends on it
            bindings = [router.moe_posterior for router in swapped_routers(model).values()]
            traces = []
            for own in (True, False):
                for binding in bindings:
                    binding.own_choice = own
                with record(model) as trace:
                    after = outputs(model, batch)
                traces.append(trace.routings)
    # Of the first router alone: what comes after sees other inputs by then.
    own_total, total = (routings[0][1].routing_weights.float().sum(dim=1) for routings in traces)
    leads = all(bool((routing.expert_indices[:, 0] == EXPERTS - 1).all()) for _, routing in traces[1])
    return (
        leads
        and torch.allclose(own_total, total)
        and not same(before, after)
        and all(bool(t.isfinite().all()) for t in after)
    )


def check_experts(model: nn.Module) -> bool:
    """An expert's index means that expert: of one token, silencing those it was not sent to changes no bit, the others do.

    Without it, evidence would be credited to experts that had no part in it.
    """
    batch = {name: tensor[:1, :1] for name, tensor in tiny_batch(model).items()}
    if "decoder_attention_mask" in batch and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch["decoder_attention_mask"] = torch.ones(1, 2, dtype=torch.int64)  # prompt and canvas
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = outputs(model, batch)
        with swapped(model):
            chosen = choices(model, batch)
        held = []
        for wanted in (False, True):
            for name, indices in chosen.items():
                for expert, tensor in expert_weights(model, name):
                    if bool((indices == expert).any()) == wanted:
                        tensor.zero_()
            held.append(same(outputs(model, batch), before))
            model.load_state_dict(weights)
    return held == [True, False]


def check_padding(model: nn.Module) -> bool:
    """Exactly the padding of a batch lies at distance inf, in every router that sees the batch's tokens."""
    batch = tiny_batch(model, padded=PADDED)
    real = int(batch["attention_mask"].sum())
    with torch.no_grad(), swapped(model), record(model) as trace:
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
            _set_checkpointing(model, True)
            model.train()
        with torch.random.fork_rng(), swapped(model):
            torch.manual_seed(0)
            with record(model) as trace:
                loss = objective(model, batch)
            loss.backward()
            outcomes = trace.gradient_outcomes()
            seen.append(sorted((name, int((~outcome.isnan()).sum())) for name, _, outcome in outcomes))
    model.zero_grad()
    _set_checkpointing(model, False)
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
    with swapped(model):
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
    with torch.no_grad(), swapped(model):
        after = model(**batch, output_router_logits=True)
    return all(same(floating(before[name]), floating(after[name])) for name in names)


def check_bfloat16(model: nn.Module) -> bool | None:
    """In bfloat16 outputs are the same bits and the belief stays in float64; None where the model itself cannot be cast."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = tiny_batch(model)
    model.to(torch.bfloat16)
    try:
        with torch.no_grad():
            before = outputs(model, batch)
            with swapped(model):
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


def _set_checkpointing(model: nn.Module, enabled: bool) -> None:
    """By transformers' newer name for it, or the older."""
    action = "enable" if enabled else "disable"
    names = (f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}")
    next(getattr(model, name) for name in names if hasattr(model, name))()


CHECKS: dict[str, Callable[[nn.Module], bool | None]] = {
    "identical": check_identical,
    "gradients": check_gradients,
    "evidence": check_evidence,
    "experts": check_experts,
    "replacing": check_replacing,
    "padding": check_padding,
    "checkpointing": check_checkpointing,
    "generation": check_generation,
    "router logits": check_router_logits,
    "bfloat16": check_bfloat16,
}
