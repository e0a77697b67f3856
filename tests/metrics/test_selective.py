"""Risk and coverage against plain loops and permutations."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import action_threshold, aurc, excess_aurc, risk_coverage, selective_risk

pairs = st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.integers(0, 1)), min_size=1, max_size=30)


def split(rows: list[tuple[float, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, correct = zip(*rows, strict=True)
    return torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct)


def test_without_ties_risk_is_the_share_of_errors_among_the_most_confident() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.7
    coverage, risk = risk_coverage(confidence, correct)
    rows = sorted(zip(confidence.tolist(), correct.tolist(), strict=True), reverse=True)
    assert coverage.tolist() == pytest.approx([i / 50 for i in range(1, 51)])
    assert risk.tolist() == pytest.approx([sum(not right for _, right in rows[:i]) / i for i in range(1, 51)])
    assert aurc(confidence, correct).item() == pytest.approx(risk.mean().item())


def test_inside_a_tie_the_area_is_the_mean_over_all_orders() -> None:
    rows = [(0.9, 1), (0.5, 0), (0.5, 1), (0.5, 1), (0.2, 0)]
    areas = []
    for order in itertools.permutations(rows[1:4]):
        losses = [1 - right for _, right in [rows[0], *order, rows[4]]]
        areas.append(sum(sum(losses[:i]) / i for i in range(1, 6)) / 5)
    assert aurc(*split(rows)).item() == pytest.approx(sum(areas) / len(areas))


@given(pairs, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_rows_does_not_matter_and_no_order_beats_the_oracle(rows: list, random) -> None:  # type: ignore[no-untyped-def]
    area, excess = aurc(*split(rows)).item(), excess_aurc(*split(rows)).item()
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert aurc(*split(shuffled)).item() == pytest.approx(area)
    errors = sum(1 - right for _, right in rows)
    losses = [0] * (len(rows) - errors) + [1] * errors
    oracle = sum(sum(losses[:i]) / i for i in range(1, len(rows) + 1)) / len(rows)
    assert excess == pytest.approx(area - oracle, abs=1e-12)
    assert excess >= -1e-12


@given(pairs, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
@settings(max_examples=80, deadline=None)
def test_the_threshold_is_the_lowest_confidence_whose_risk_is_allowed(rows: list, max_risk: float) -> None:
    found = action_threshold(*split(rows), max_risk)
    candidates = []
    for threshold in sorted({confidence for confidence, _ in rows}):
        acted = [right for confidence, right in rows if confidence >= threshold]
        if sum(1 - right for right in acted) <= max_risk * len(acted) + 1e-12:
            candidates.append((threshold, len(acted) / len(rows), sum(1 - right for right in acted) / len(acted)))
    if candidates:
        assert (found.threshold, found.coverage, found.risk) == pytest.approx(candidates[0])
        assert selective_risk(*split(rows), found.threshold) == pytest.approx(found)
    else:
        assert found[:2] == (math.inf, 0.0)
        assert math.isnan(found.risk)
        assert selective_risk(*split(rows), math.inf).coverage == 0.0


def test_no_predictions_have_no_risk() -> None:
    empty = torch.zeros(0)
    assert risk_coverage(empty, empty)[0].shape == (0,)
    assert aurc(empty, empty).isnan()
    assert action_threshold(empty, empty, 0.1).threshold == math.inf
    assert math.isnan(selective_risk(empty, empty, 0.1).coverage)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        (torch.rand(3), torch.ones(2), "one shape"),
        (torch.tensor([0.1, torch.nan]), torch.ones(2), "confidence must not be NaN; got NaN at 1"),
        (torch.rand(2), torch.tensor([0.0, 1.5]), "correct must lie in"),
        (torch.rand(2), torch.tensor([0.0, torch.nan]), "correct must lie in"),
    ],
)
def test_a_bad_argument_is_named(confidence: torch.Tensor, correct: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        risk_coverage(confidence, correct)
    with pytest.raises(InvalidArgumentError, match=message):
        selective_risk(confidence, correct, 0.5)
    with pytest.raises(InvalidArgumentError, match="max_risk"):
        action_threshold(torch.rand(2), torch.ones(2), 1.5)
