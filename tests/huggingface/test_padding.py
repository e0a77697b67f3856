"""A padding mask keeps its meaning whatever the caches and mask utilities of transformers turn it into."""

from typing import Any

import pytest
import torch
from huggingface.models import batch, mixtral
from torch import Tensor
from transformers import MixtralForCausalLM, StaticCache
from transformers.masking_utils import create_causal_mask

from moe_posterior import record, swap_gates
from moe_posterior.huggingface.padding import padding_of

SIDES = {"left": slice(0, 3), "right": slice(7, 10), "both": [0, 9], "none": slice(0, 0)}
every_side = pytest.mark.parametrize("side", SIDES)
TYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def swapped(**options: Any) -> MixtralForCausalLM:
    model = mixtral(**options)
    swap_gates(model, num_clusters=4).fit([batch(3, 10, seed=1)])
    return model


def padded(side: str) -> dict[str, Tensor]:
    """Three sequences of ten, the second one padded."""
    given = batch(3, 10)
    given["attention_mask"][1, SIDES[side]] = 0
    return given


def observed(model: torch.nn.Module, given: dict[str, Any]) -> list[list[bool]]:
    """Which tokens each call of the first layer would count, call by call."""
    with record(model) as trace, torch.no_grad():
        model(**given)
    return [routing.distance.isfinite().tolist() for name, routing in trace.routings if ".0." in name]


@pytest.mark.parametrize("side", ["left", "none"])  # generation continues from the last position
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
def test_generation_with_a_static_cache_counts_what_a_dynamic_one_counts(
    side: str, implementation: str, window: int | None
) -> None:
    model = swapped(attn_implementation=implementation, sliding_window=window, pad_token_id=0)
    given, found = padded(side), {}
    for cache in ("dynamic", "static"):
        with record(model) as trace, torch.no_grad():
            model.generate(
                **given,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else cache,
                disable_compile=True,
            )
        first = [routing for name, routing in trace.routings if ".0." in name]
        found[cache] = [routing.distance.isfinite().tolist() for routing in first]
    assert found["static"] == found["dynamic"]
    assert found["static"][0] == given["attention_mask"].bool().flatten().tolist()
    assert all(all(step) for step in found["static"][1:])
    assert len(found["static"]) == 4


@every_side
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_flat_mask_of_every_type_means_the_same(side: str, kind: torch.dtype) -> None:
    model, given = swapped(), padded(side)
    expected = given["attention_mask"].bool().flatten().tolist()
    assert observed(model, {**given, "attention_mask": given["attention_mask"].to(kind)}) == [expected]


@every_side
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_made_by_hand_means_what_the_flat_one_did(side: str, implementation: str) -> None:
    model, given = swapped(attn_implementation=implementation), padded(side)
    embeddings = model.get_input_embeddings()(given["input_ids"])
    made = create_causal_mask(model.config, embeddings, given["attention_mask"], None)
    expected = given["attention_mask"].bool().flatten().tolist()
    assert observed(model, {**given, "attention_mask": made}) == [expected]


@every_side
def test_a_flat_mask_as_long_as_the_static_cache_speaks_of_the_tokens_from_its_start(side: str) -> None:
    model, given = swapped(), padded(side)
    cache = StaticCache(config=model.config, max_cache_len=16)
    longer = torch.nn.functional.pad(given["attention_mask"], (0, 6))
    expected = given["attention_mask"].bool().flatten().tolist()
    assert observed(model, {**given, "attention_mask": longer, "past_key_values": cache}) == [expected]
    nexts = {"input_ids": given["input_ids"][:, :2], "past_key_values": cache}
    longer[:, 10:12] = torch.tensor([[1, 1], [1, 1], [1, 0]])
    assert observed(model, {**nexts, "attention_mask": longer}) == [[True, True, True, True, True, False]]


def test_sequences_packed_into_one_row_are_all_real_but_for_what_is_hidden_from_itself() -> None:
    model, given = swapped(), batch(1, 10)
    lengths = [4, 4]
    allowed = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths), torch.zeros(2, 2)).bool()[None, None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0, 0]])
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = [True] * 8 + [False] * 2
    for mask in (allowed, added):
        assert observed(
            model, {"input_ids": given["input_ids"], "position_ids": positions, "attention_mask": mask}
        ) == [expected]
    assert observed(model, {"input_ids": given["input_ids"], "position_ids": positions}) == [[True] * 10]


def causal(mask: Tensor, keys: int, past: int = 0) -> Tensor:  # (B, M) -> (B, 1, S, K) bool
    size = mask.shape[1] - past
    own = torch.arange(size)[:, None] + past
    allowed = torch.arange(keys)[None] <= own
    whole = torch.nn.functional.pad(mask, (0, keys - mask.shape[1]), value=1).bool()
    return (allowed[None] & whole[:, None])[:, None]


class Cache:
    def __init__(self, length: Any) -> None:
        self.length = length

    def get_seq_length(self) -> Any:
        return self.length


@every_side
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("keys", [10, 16])
def test_every_form_of_a_mask_is_read_alike(side: str, past: int, keys: int) -> None:
    flat = padded(side)["attention_mask"]
    boolean, expected = causal(flat, keys, past), flat[:, past:].bool()
    given = {"input_ids": torch.zeros(3, 10 - past), "past_key_values": Cache(torch.tensor(past))}
    forms: dict[str, Any] = {"bool": boolean, "heads": boolean.expand(-1, 2, -1, -1), "three": boolean[:, 0]}
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for low in (-torch.inf, torch.finfo(kind).min, torch.finfo(kind).min / 2, -1e4):
            forms[f"{kind} {low}"] = torch.zeros(boolean.shape, dtype=kind).masked_fill(~boolean, low)
    forms |= {f"{kind}": boolean.to(kind) for kind in (torch.int64, torch.uint8, torch.float32)}
    forms |= {"by layer": {"sliding_attention": None, "full_attention": boolean}, "one layer": {"chunked": boolean}}
    for name, mask in forms.items():
        found = padding_of(mask, given, ("input_ids",))
        assert found is not None
        assert torch.equal(found.bool(), expected), name


def test_a_block_mask_is_asked_by_its_own_rule() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    flat = padded("left")["attention_mask"].bool()

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + 4) & flat[b, k.clamp(max=9)]

    mask = flex.create_block_mask(rule, 3, None, 6, 16, device="cpu")
    given = {"input_ids": torch.zeros(3, 6), "past_key_values": Cache(4)}
    assert torch.equal(padding_of(mask, given, ("input_ids",)), flat[:, 4:])


def test_masks_that_speak_of_other_tokens_or_of_none_tell_nothing() -> None:
    given = {"input_ids": torch.zeros(3, 10)}
    for mask in (
        torch.ones(3),
        torch.ones(3, 1, 7, 10),
        torch.ones(3, 1, 10, 7),
        {},
        {"full_attention": None},
        "mask",
        None,
    ):
        assert padding_of(mask, given, ("input_ids",)) is None
    bias = -torch.arange(10.0)[None, None, :, None] * torch.ones(3, 2, 10, 10)  # of relative positions
    found = padding_of(bias, given, ("input_ids",))
    assert found is not None
    assert found.all()
