"""Labels, logits and outcomes of a language model: one answer for every type, and a broken prediction is no failure."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, PosteriorMoE, record, token_outcomes

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


def logits(vocabulary: int = 300) -> Tensor:
    return torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("measure", ["top1", "probability"])
@pytest.mark.parametrize("shift", [True, False])
def test_labels_of_every_integer_type_mean_the_tokens_they_name(kind: torch.dtype, measure: str, shift: bool) -> None:
    labels = torch.tensor([[0, 5, 100, 127, 3], [9, 9, 9, 9, 9]])
    expected = token_outcomes(logits(), labels, measure, shift=shift)
    found = token_outcomes(logits(), labels.to(kind), measure, shift=shift)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    listed = token_outcomes(logits().numpy(), labels.tolist(), measure, shift=shift)
    torch.testing.assert_close(listed, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_a_label_that_is_minus_100_in_a_narrower_sign_is_a_token(kind: torch.dtype) -> None:
    given = torch.zeros(1, 4, 300)
    given[0, :, 156] = 9
    labels = torch.full((1, 4), 156).to(kind)
    assert token_outcomes(given, labels)[0, :3].tolist() == [1, 1, 1]
    assert token_outcomes(given, labels, shift=False)[0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "wrong", [[[300] * 5] * 2, [[-1] * 5] * 2, torch.zeros(2, 5), [[True] * 5] * 2, "abc", None, [0] * 5]
)
def test_labels_of_another_kind_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="labels must"):
        token_outcomes(logits(), wrong)
    with pytest.raises(InvalidArgumentError, match="must"):
        token_outcomes("abc", torch.zeros(2, 5).long())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("measure", ["top1", "probability"])
def test_a_prediction_that_is_not_finite_is_unobserved(kind: torch.dtype, measure: str) -> None:
    given = torch.zeros(1, 4, 3, dtype=kind)
    given[0, 0, 1], given[0, 1, 2], given[0, 2] = math.nan, math.inf, -math.inf
    given[0, 3, 0] = -math.inf  # a token that is ruled out is a prediction all the same
    found = token_outcomes(given, torch.ones(1, 4, dtype=torch.int64), measure, shift=False)
    assert found.isnan().tolist() == [[True, True, True, False]]


def test_empty_batches_have_no_outcomes() -> None:
    assert token_outcomes(torch.zeros(0, 5, 3), torch.zeros(0, 5).long()).shape == (0, 5)
    assert token_outcomes(torch.zeros(2, 0, 3), torch.zeros(2, 0).long()).shape == (2, 0)


def recorded() -> tuple[PosteriorMoE, Any]:
    hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    moe = PosteriorMoE(nn.ModuleList([nn.Identity() for _ in range(3)]), hidden_size=4, num_clusters=2, top_k=2)
    moe.gate.fit(hidden)
    with record(moe) as trace:
        moe(hidden)
    return moe, trace


@pytest.mark.parametrize("kind", [*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_a_trace_takes_outcomes_of_every_type(kind: torch.dtype) -> None:
    given = torch.arange(8) % 2
    beliefs = []
    for outcome in (given.double(), given.to(kind).view(2, 4), given.to(kind).tolist()):
        moe, trace = recorded()
        trace.observe(outcome)
        beliefs.append(moe.gate.posterior.successes)
    assert torch.equal(beliefs[0], beliefs[1])
    assert torch.equal(beliefs[0], beliefs[2])


@pytest.mark.parametrize("wrong", [[math.inf] * 8, [1.5] * 8, [1.0] * 7, "outcomes", None, [1j] * 8])
def test_a_trace_refuses_what_is_no_outcome_and_learns_nothing(wrong: Any) -> None:
    moe, trace = recorded()
    with pytest.raises(InvalidArgumentError, match="outcome must"):
        trace.observe(wrong)
    assert not moe.gate.posterior.successes.any()
    trace.observe(torch.full((8,), torch.nan))
    assert not moe.gate.posterior.failures.any()
