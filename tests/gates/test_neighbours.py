import math

import pytest
import torch
from contracts import HIDDEN_SIZE, NUM_EXPERTS, assert_equal, data
from oracles import best_experts, softmax
from torch import Tensor

from moe_posterior import InvalidArgumentError, NotFittedError
from moe_posterior.gates import NearestNeighbourGate
from moe_posterior.gates import neighbours as module


def outcomes(num_rows: int, missing: float = 0.5) -> Tensor:  # (N, E)
    generator = torch.Generator().manual_seed(1)
    outcome = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    outcome[torch.rand(num_rows, NUM_EXPERTS, generator=generator) < missing] = torch.nan
    return outcome


def warm(top_k: int = 2, num_rows: int = 63, **options) -> NearestNeighbourGate:
    options = {"num_neighbours": 3} | options
    gate = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, top_k, **options)
    gate.warm_start(data(num_rows), outcomes(num_rows))
    return gate


def mean_or(values: list[float], otherwise: float) -> float:
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else otherwise


def scores_by_hand(token: Tensor, memory: Tensor, outcome: Tensor, num_neighbours: int, metric: str) -> list[float]:
    distances = []
    for row in memory.double():
        cosine = float(token.double() @ row / token.double().norm() / row.norm())
        distances.append(-cosine if metric == "cosine" else float((token.double() - row).norm()))
    nearest = sorted(range(len(memory)), key=lambda i: distances[i])[:num_neighbours]
    overall = [mean_or(column.tolist(), 0.5) for column in outcome.T]
    return [mean_or([outcome[i, e].item() for i in nearest], overall[e]) for e in range(NUM_EXPERTS)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("top_k", "num_neighbours"), [(1, 1), (2, 3), (NUM_EXPERTS, 63)])
def test_choice_scores_and_weights_match_a_loop_over_tokens(metric, top_k: int, num_neighbours: int) -> None:
    gate = warm(top_k, metric=metric, num_neighbours=num_neighbours, temperature=0.3)
    hidden = 2 * data(40, seed=5)
    routing = gate(hidden)
    for i, token in enumerate(hidden):
        scores = scores_by_hand(token, data(63), outcomes(63), num_neighbours, metric)
        experts = best_experts(scores, 0, top_k)
        chosen = [scores[e] for e in experts]
        assert routing.scores[i].tolist() == pytest.approx(chosen, rel=1e-5)
        assert routing.routing_weights[i].tolist() == pytest.approx(softmax(chosen, 0.3), rel=1e-4)
        assert [scores[e] for e in routing.expert_indices[i].tolist()] == pytest.approx(chosen, rel=1e-5)


def test_a_remembered_row_is_its_own_nearest_neighbour() -> None:
    gate = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, 1, num_neighbours=1)
    gate.warm_start(data(100), outcomes(100, missing=0.0))
    routing = gate(data(100))
    best, expert = outcomes(100, missing=0.0).max(dim=1)
    assert torch.equal(routing.expert_indices[:, 0], expert)
    assert torch.equal(routing.scores[:, 0], best)


def test_the_cosine_ignores_lengths() -> None:
    gate = warm(metric="cosine")
    assert torch.equal(gate(data(30, seed=2)).expert_indices, gate(8 * data(30, seed=2)).expert_indices)


def test_experts_never_observed_count_as_one_half() -> None:
    gate, outcome = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, NUM_EXPERTS, num_neighbours=3), outcomes(50)
    outcome[:, 3] = torch.nan
    gate.warm_start(data(50), outcome)
    routing = gate(data(20, seed=2))
    assert (routing.scores[routing.expert_indices == 3] == 0.5).all()


def test_a_broken_row_gets_the_overall_means() -> None:
    gate = warm(NUM_EXPERTS)
    routing = gate(torch.full((1, HIDDEN_SIZE), torch.nan))
    assert torch.isinf(routing.distance).all()
    overall = [mean_or(column.tolist(), 0.5) for column in outcomes(63).T]
    assert routing.scores[0].tolist() == pytest.approx(sorted(overall, reverse=True), rel=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = warm()
    whole = gate(data(40, seed=3))
    monkeypatch.setattr(module, "_CELLS", 63 * 7)  # 7 tokens at a time
    assert torch.equal(gate(data(40, seed=3)).expert_indices, whole.expert_indices)


def test_remembering_in_parts_is_remembering_at_once() -> None:
    parts = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=3)
    for rows in torch.arange(63).split(20):
        parts.remember(data(63)[rows], outcomes(63)[rows])
    assert_equal(parts(data(30, seed=2)), warm()(data(30, seed=2)))


def test_beyond_its_capacity_the_oldest_rows_are_forgotten() -> None:
    gate, last = warm(capacity=20), NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=3)
    last.warm_start(data(63)[43:], outcomes(63)[43:])
    assert len(gate.memory) == 20
    assert_equal(gate(data(30, seed=2)), last(data(30, seed=2)))


def test_the_memory_is_a_copy() -> None:
    hidden, outcome = data(63), outcomes(63)
    gate = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=3)
    gate.warm_start(hidden, outcome)
    before = gate(data(30, seed=2))
    hidden.zero_()
    outcome.zero_()
    assert_equal(gate(data(30, seed=2)), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_saved_memory_of_any_size_can_be_loaded(assign: bool) -> None:
    saved = warm(num_rows=63)
    for other in (NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=3), warm(num_rows=10)):
        other.load_state_dict(saved.state_dict(), assign=assign)
        assert_equal(other(data(30, seed=2)), saved(data(30, seed=2)))


def test_a_cast_rounds_no_remembered_row() -> None:
    gate = warm()
    before = gate(data(30, seed=2))
    assert_equal(gate.to(torch.bfloat16)(data(30, seed=2)), before)


def test_too_few_rows_are_refused() -> None:
    gate = NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=40)
    with pytest.raises(NotFittedError, match=r"remembers 0 rows.*call warm_start"):
        gate(data(3))
    with pytest.raises(InvalidArgumentError, match="at least num_neighbours=40 rows; got 39"):
        gate.warm_start(data(39), outcomes(39))


@pytest.mark.parametrize("options", [{"num_neighbours": 0}, {"metric": "manhattan"}, {"capacity": 39}])
def test_knobs_out_of_range_are_refused_by_name(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, **options)
