import math
from itertools import pairwise

import pytest
import torch
from contracts import HIDDEN_SIZE, NUM_EXPERTS, assert_equal, data
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_experts, softmax
from torch import Tensor

from moe_posterior import InvalidArgumentError
from moe_posterior.gates import ExpertThresholdGate, SoftmaxGate


def probabilities(gate: SoftmaxGate, hidden: Tensor) -> list[list[float]]:
    return [softmax(row, 1.0) for row in gate.router(hidden).detach().tolist()]


def threshold_by_hand(rows: list[list[float]], top_k: int) -> list[float]:
    """Per expert: the largest score that stays outside when its fair share of the rows gets in."""
    share = max(1, round(len(rows) * top_k / NUM_EXPERTS))
    columns = [sorted(column, reverse=True) for column in zip(*rows, strict=True)]
    return [column[min(share, len(rows) - 1)] for column in columns]


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_choice_scores_and_weights_match_a_loop_over_tokens(top_k: int) -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, top_k)
    gate.fit(data(101))
    thresholds = threshold_by_hand(probabilities(gate, data(101)), top_k)
    assert gate.thresholds.tolist() == pytest.approx(thresholds, rel=1e-6)
    hidden = data(40, seed=1)
    routing = gate(hidden)
    expected = gate.expected_outcome(routing)
    for i, row in enumerate(probabilities(gate, hidden)):
        margins = [p - t for p, t in zip(row, thresholds, strict=True)]
        experts = best_experts(margins, 0, top_k)
        assert routing.expert_indices[i].tolist() == experts
        assert routing.scores[i].tolist() == pytest.approx([margins[e] for e in experts], abs=1e-6)
        assert expected[i].tolist() == pytest.approx([row[e] for e in experts], abs=1e-6)
        total = sum(row[e] for e in experts)
        assert routing.routing_weights[i].tolist() == pytest.approx([row[e] / total for e in experts], rel=1e-4)


def test_adapting_matches_a_loop_over_windows() -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 2, decay=0.7, window=16)
    gate.fit(data(50))
    thresholds, hidden = gate.thresholds.tolist(), data(40, seed=1)  # two full windows and a half
    gate.adapt(hidden)
    rows = probabilities(gate, hidden)
    for start in (0, 16):
        fresh = threshold_by_hand(rows[start : start + 16], 2)
        thresholds = [0.7 * old + 0.3 * new for old, new in zip(thresholds, fresh, strict=True)]
    assert gate.thresholds.tolist() == pytest.approx(thresholds, rel=1e-5)
    assert int(gate.pending_rows) == 8


@given(cuts=st.lists(st.integers(0, 70), max_size=6))
def test_how_a_stream_is_cut_into_batches_changes_nothing(cuts: list[int]) -> None:
    whole, parts = (ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 2, window=16) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    stream, edges = data(70), [0, *sorted(cuts), 70]
    whole.adapt(stream)
    for start, stop in pairwise(edges):
        parts.adapt(stream[start:stop])
    torch.testing.assert_close(parts.thresholds, whole.thresholds)
    assert int(parts.pending_rows) == int(whole.pending_rows) == 70 % 16


def test_without_thresholds_it_chooses_as_its_softmax_would() -> None:
    gate, plain = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 2), SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 2)
    plain.router.load_state_dict(gate.router.state_dict())
    assert torch.equal(gate(data(50)).expert_indices, plain(data(50)).expert_indices)
    torch.testing.assert_close(gate(data(50)).routing_weights, plain(data(50)).routing_weights)


def test_thresholds_take_traffic_from_an_expert_that_is_popular_everywhere() -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1, router_width=9, decay=0.5, window=50)
    with torch.no_grad():
        gate.router[-1].bias[2] += 3.0
    stream = data(1000)
    before = (gate(stream).expert_indices == 2).float().mean()
    gate.adapt(stream)
    after = (gate(stream).expert_indices == 2).float().mean()
    assert before > 0.9
    assert abs(after - 1 / NUM_EXPERTS) < 0.15


def test_outcomes_teach_it_nothing() -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1)
    gate.fit(data(100))
    before = gate(data(50))
    gate.observe(before, torch.zeros(50, 1))
    assert_equal(gate(data(50)), before)


def test_broken_rows_move_no_threshold() -> None:
    clean, spoiled = (ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1, window=8) for _ in range(2))
    spoiled.load_state_dict(clean.state_dict())
    broken = torch.full((3, HIDDEN_SIZE), torch.nan)
    clean.adapt(data(30))
    spoiled.adapt(torch.cat([data(30)[:10], broken, data(30)[10:]]))
    torch.testing.assert_close(spoiled.thresholds, clean.thresholds)
    with pytest.raises(InvalidArgumentError, match="at least one finite row"):
        clean.fit(broken)


def test_a_warm_start_trains_the_router_and_sets_the_thresholds() -> None:
    gate, plain = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1), SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1)
    outcome = torch.rand(60, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    assert gate.warm_start(data(60), outcome, epochs=3) == plain.warm_start(data(60), outcome, epochs=3)
    assert torch.equal(gate.router.weight, plain.router.weight)
    assert gate.thresholds.tolist() == pytest.approx(threshold_by_hand(probabilities(gate, data(60)), 1), rel=1e-5)


def test_an_expert_chosen_at_a_vanishing_probability_has_a_finite_weight() -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1)
    with torch.no_grad():
        gate.router.weight.zero_()
        gate.router.weight[0] = 500.0
    gate.thresholds[0] = 2.0  # a bar that nobody reaches
    routing = gate(torch.ones(4, HIDDEN_SIZE))
    assert (routing.expert_indices == 1).all()
    assert (routing.routing_weights == 1).all()


def test_a_cast_rounds_no_threshold() -> None:
    gate = ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1)
    gate.fit(data(100))
    before = gate.thresholds.clone()
    gate.to(torch.bfloat16)
    assert gate.router.weight.dtype == torch.bfloat16
    assert torch.equal(gate.thresholds, before)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"decay": math.nan}, {"window": 0}])
def test_knobs_out_of_range_are_refused_by_name(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, **options)
