"""The promise of an action threshold: tails against scipy, the search against a plain loop, and its level on simulated populations."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees import GuaranteedThreshold, select_threshold
from moe_posterior.guarantees.tails import EXACT_ROWS, allowed_errors, passes
from moe_posterior.guarantees.threshold import STARTS

LEVELS = [(0.1, 0.1), (0.01, 0.05), (0.3, 0.02), (0.5, 0.5), (0.1, 0.9)]


def plain_threshold(
    confidence: list[float], correct: list[float], alpha: float, delta: float, starts: dict[float, float]
) -> float:
    """Every threshold from the top, in plain Python."""
    rows, found = len(confidence), math.inf
    for start, share in starts.items():
        proof = math.ceil(math.log(delta * share) / math.log1p(-alpha)) + 1
        first = max(proof, math.ceil(start * rows))
        for rank in range(first, rows + 1):
            threshold = sorted(confidence, reverse=True)[rank - 1]
            acted = [right for score, right in zip(confidence, correct, strict=True) if score >= threshold]
            errors = sum(1 - right for right in acted)
            if binom.cdf(errors, len(acted) - 1, alpha) > delta * share:
                break
            found = min(found, threshold)
    return found


def drawn(seed: int, rows: int, risk: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences, and answers that are the more often right the higher the confidence."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(rows, generator=generator) > 2 * risk * (1 - confidence)


@pytest.mark.parametrize(("level", "probability"), LEVELS)
def test_the_most_errors_allowed_are_those_of_the_exact_binomial_tail(level: float, probability: float) -> None:
    rows = np.arange(2001)
    allowed = allowed_errors(2000, level, probability).numpy()[:2001]
    assert (binom.cdf(allowed, rows, level) <= probability + 1e-12).all()
    assert ((binom.cdf(allowed + 1, rows, level) > probability - 1e-12) | (allowed >= rows)).all()


def test_hoeffdings_bound_takes_over_without_allowing_more_than_the_exact_tail() -> None:
    rows = EXACT_ROWS + 1
    errors = torch.arange(int(0.094 * rows), int(0.1 * rows), 10, dtype=torch.float64)
    found = passes(errors, torch.full_like(errors, rows, dtype=torch.int64), 0.1, 0.1)
    exact = binom.cdf(errors.numpy(), rows, 0.1) <= 0.1
    assert found.any()
    assert not (found.numpy() & ~exact).any()
    assert (exact.sum() - int(found.sum())) * 10 / rows < 0.001


def test_grades_are_tested_by_a_bound_that_holds_for_any_loss_and_allows_less_than_the_binomial() -> None:
    rows, errors = torch.full((200,), 1000), torch.arange(0, 100, 0.5, dtype=torch.float64)
    binary, graded = (passes(errors, rows, 0.1, 0.1, graded=graded) for graded in (False, True))
    assert int(graded.sum()) > 100
    assert not (graded & ~binary).any()


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.6, 0.8, 0.9]), st.integers(0, 9)), min_size=1, max_size=120))
@settings(max_examples=40, deadline=None)
def test_the_search_is_that_of_a_plain_loop_ties_included(rows: list[tuple[float, int]]) -> None:
    confidence, luck = zip(*rows, strict=True)
    correct = [float(value > 0) for value in luck]
    found = select_threshold(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), 0.3, 0.2)
    assert found.threshold == plain_threshold(list(confidence), correct, 0.3, 0.2, STARTS)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.4]))
@settings(max_examples=25, deadline=None)
def test_neither_the_order_of_rows_nor_a_rising_map_of_confidence_changes_who_is_acted_on(
    seed: int, alpha: float
) -> None:
    confidence, correct = drawn(seed, 400)
    confidence = (20 * confidence).round() / 20 if seed % 2 else confidence
    found = select_threshold(confidence, correct, alpha)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    assert select_threshold(confidence[order], correct[order], alpha) == found
    mapped = select_threshold(confidence.exp() * 7 - 3, correct, alpha)
    assert (mapped.acted, mapped.errors, mapped.promised) == (found.acted, found.errors, found.promised)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_laxer_level_or_a_larger_error_probability_never_raises_the_threshold(seed: int) -> None:
    confidence, correct = drawn(seed, 500)
    levels = [
        select_threshold(confidence, correct, 0.2, delta, starts={0.2: 1.0}).threshold for delta in (0.02, 0.1, 0.3)
    ]
    assert levels == sorted(levels, reverse=True)
    strict = select_threshold(confidence, correct, 0.15, starts={0.2: 1.0}).threshold
    assert strict >= levels[1]


def test_the_promise_is_broken_at_most_as_often_as_stated_and_nearly_that_often_where_it_is_hard_to_keep() -> None:
    # A tenth of the errors lies below 0.5; the risk among confidences of at least t is 0.3 * (1 - t).
    broken, alpha, delta = 0, 0.1, 0.2
    for seed in range(400):
        threshold = select_threshold(*drawn(seed, 600), alpha, delta, starts={0.1: 1.0}).threshold
        broken += 0.3 * (1 - threshold) > alpha + 1e-12 if math.isfinite(threshold) else 0
    assert 0.05 * 400 < broken <= (delta + 3 * math.sqrt(delta * (1 - delta) / 400)) * 400


def test_the_level_holds_for_ties_grades_and_a_risk_that_rises_and_falls_with_confidence() -> None:
    rng = np.random.default_rng(0)
    risks = np.array([0.02, 0.25, 0.05, 0.16, 0.4])  # by grade of confidence, the most confident first
    shares = np.array([0.2, 0.1, 0.3, 0.2, 0.2])
    true = (risks * shares).cumsum() / shares.cumsum()
    broken = {False: 0, True: 0}
    for _ in range(400):
        grade = rng.choice(5, size=400, p=shares)
        for graded in broken:
            loss = rng.beta(1, 1 / risks[grade] - 1) if graded else rng.random(400) < risks[grade]
            found = select_threshold(torch.from_numpy(-grade.astype(float)), torch.from_numpy(1 - loss), 0.1, 0.2)
            broken[graded] += found.promised and true[int(-found.threshold)] > 0.1
    assert max(broken.values()) <= (0.2 + 3 * math.sqrt(0.2 * 0.8 / 400)) * 400


def test_all_right_promises_everything_and_all_wrong_nothing() -> None:
    confidence = torch.linspace(0.5, 1, 200)
    every = select_threshold(confidence, torch.ones(200), 0.1)
    assert (every.threshold, every.coverage, every.risk) == (0.5, 1.0, 0.0)
    none = select_threshold(confidence, torch.zeros(200), 0.1)
    assert none.threshold == math.inf
    assert none.to_dict()["threshold"] is None
    assert not none.acts(confidence).any()
    assert "cannot be promised" in str(none)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_too_few_rows_promise_nothing_and_say_how_many_it_takes(rows: int) -> None:
    found = select_threshold(torch.rand(rows), torch.ones(rows), 0.1)
    assert not found.promised
    assert "at least" in found.reason


def test_rows_at_the_threshold_are_acted_on_and_a_tie_is_taken_whole() -> None:
    confidence = torch.tensor([0.9] * 40 + [0.7] * 40)
    correct = torch.cat([torch.ones(40), torch.zeros(40)])
    found = select_threshold(confidence, correct, 0.1)
    assert found.acted == 40
    assert found.acts(torch.tensor([0.9, 0.7])).tolist() == [True, False]
    assert len(found.assumptions) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_any_precision_and_any_kind_of_correctness_is_read_the_same(dtype: torch.dtype, kind: torch.dtype) -> None:
    confidence, correct = drawn(1, 800)
    confidence = confidence.to(dtype)
    found = select_threshold(confidence, correct.to(kind), 0.15)
    assert found == select_threshold(confidence.double(), correct, 0.15)
    assert int(found.acts(confidence).sum()) == found.acted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"confidence": torch.tensor([math.nan, 0.5])}, "confidence"),
        ({"confidence": torch.tensor([math.inf, 0.5])}, "confidence"),
        ({"correct": torch.tensor([math.nan, 1.0])}, "correct"),
        ({"correct": torch.tensor([1.5, 1.0])}, "correct"),
        ({"correct": torch.tensor([1.0])}, "confidence and correct"),
        ({"max_risk": 0.0}, "max_risk"),
        ({"max_risk": True}, "max_risk"),
        ({"error_probability": 1.0}, "error_probability"),
        ({"starts": {}}, "starts"),
        ({"starts": {0.1: 0.7, 0.2: 0.7}}, "starts"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict, message: str) -> None:  # type: ignore[type-arg]
    arguments = {"confidence": torch.tensor([0.4, 0.5]), "correct": torch.tensor([1.0, 1.0]), "max_risk": 0.1}
    with pytest.raises(InvalidArgumentError, match=message):
        select_threshold(**{**arguments, **changed})


def test_a_result_survives_strict_json_and_says_what_it_assumes() -> None:
    found = select_threshold(*drawn(3, 500), 0.2)
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert GuaranteedThreshold.from_dict(saved) == found
    assert all(assumption in str(found) for assumption in found.assumptions)
    with pytest.raises(InvalidArgumentError, match="saved"):
        GuaranteedThreshold.from_dict({"threshold": 0.5})
