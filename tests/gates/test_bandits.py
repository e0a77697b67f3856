import math
from itertools import pairwise

import pytest
import torch
from contracts import HIDDEN_SIZE, NUM_EXPERTS, assert_equal, data
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_experts, counted, softmax
from torch import Tensor

from moe_posterior import Evidence, InvalidArgumentError, NotFittedError
from moe_posterior.gates import BanditGate

CLUSTERS = 7


def fitted_gate(top_k: int = 2, **options) -> BanditGate:
    gate = BanditGate(HIDDEN_SIZE, NUM_EXPERTS, CLUSTERS, top_k, **options)
    gate.fit(data(100))
    return gate


def outcomes(num_tokens: int, seed: int = 1) -> Tensor:  # (N, E)
    generator = torch.Generator().manual_seed(seed)
    outcome = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    outcome[torch.rand(num_tokens, NUM_EXPERTS, generator=generator) < 0.4] = torch.nan
    outcome[torch.rand(num_tokens, generator=generator) < 0.1] = torch.nan  # whole rows: no round
    return outcome


class LoopBandit:
    """UCB1, discounted or not: one outcome at a time, plain floats."""

    def __init__(self, num_clusters: int, exploration: float, discount: float = 1.0) -> None:
        self.sums = [[0.0] * NUM_EXPERTS for _ in range(num_clusters)]
        self.plays = [[0.0] * NUM_EXPERTS for _ in range(num_clusters)]
        self.exploration, self.discount = exploration, discount

    def observe(self, cluster: int, experts: list[int], row: list[float]) -> None:
        pairs = [(e, value) for e, value in zip(experts, row, strict=True) if not math.isnan(value)]
        if pairs:
            self.sums[cluster] = [self.discount * value for value in self.sums[cluster]]
            self.plays[cluster] = [self.discount * value for value in self.plays[cluster]]
        for expert, value in pairs:
            self.sums[cluster][expert] += value
            self.plays[cluster][expert] += 1

    def index(self, cluster: int) -> list[float]:
        total, index = sum(self.plays[cluster]), []
        for value, plays in zip(self.sums[cluster], self.plays[cluster], strict=True):
            bonus = self.exploration * math.sqrt(2 * math.log(total) / plays) if plays else math.inf
            index.append(value / plays + bonus if plays else math.inf)
        return index

    def estimates(self, cluster: int) -> list[float]:
        return [s / n if n else 0.5 for s, n in zip(self.sums[cluster], self.plays[cluster], strict=True)]


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize(("policy", "discount"), [("ucb1", 1.0), ("discounted_ucb", 0.9)])
def test_a_stream_matches_a_loop_over_outcomes(policy, discount: float, top_k: int) -> None:
    gate = fitted_gate(top_k, policy=policy, discount=discount, exploration=0.7, temperature=0.2)
    loop = LoopBandit(CLUSTERS, 0.7, discount)
    for step, size in enumerate([1, 30, 0, 7, 100, 1]):
        routing = gate(data(size, seed=step))
        expected = gate.expected_outcome(routing)
        for i, cluster in enumerate(routing.cluster_ids.tolist()):
            index, estimates = loop.index(cluster), loop.estimates(cluster)
            experts = best_experts(index, cluster, top_k)
            assert routing.expert_indices[i].tolist() == experts
            finite = [j for j, e in enumerate(experts) if index[e] < math.inf]
            assert routing.scores[i][finite].tolist() == pytest.approx([index[experts[j]] for j in finite], rel=1e-5)
            chosen = [estimates[e] for e in experts]
            assert expected[i].tolist() == pytest.approx(chosen, rel=1e-5)
            assert routing.routing_weights[i].tolist() == pytest.approx(softmax(chosen, 0.2), rel=1e-4)
        outcome = outcomes(size, seed=step)[:, :top_k]
        gate.observe(routing, outcome, dense=False)
        for cluster, slots, row in zip(
            routing.cluster_ids.tolist(), routing.expert_indices.tolist(), outcome.tolist(), strict=True
        ):
            loop.observe(cluster, slots, row)


def test_ucb1_agrees_with_mabwiser() -> None:
    mab = pytest.importorskip("mabwiser.mab")
    other = mab.MAB(list(range(NUM_EXPERTS)), mab.LearningPolicy.UCB1(alpha=0.6))
    gate = BanditGate(HIDDEN_SIZE, NUM_EXPERTS, top_k=1, contextual=False, exploration=0.6)
    reward = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, value in enumerate(reward):
        routing = gate(torch.zeros(1, HIDDEN_SIZE))
        arm = int(routing.expert_indices)
        if step >= NUM_EXPERTS:  # mabwiser does not try untried arms first
            index = other.predict_expectations()
            assert float(routing.scores) == pytest.approx(index[arm], rel=1e-6)
            assert arm == max(index, key=lambda e: index[e])
        value = value * (arm + 1) / NUM_EXPERTS
        gate.observe(routing, value.view(1, 1))
        (other.partial_fit if step else other.fit)([arm], [float(value)])


@given(cuts=st.lists(st.integers(0, 60), max_size=5), policy=st.sampled_from(["ucb1", "discounted_ucb"]))
def test_a_batch_counts_as_its_rows_one_at_a_time(cuts: list[int], policy) -> None:
    whole, parts = (fitted_gate(policy=policy, discount=0.8, threshold=0.5) for _ in range(2))
    routing, outcome, edges = whole(data(60)), outcomes(60), [0, *sorted(cuts), 60]
    whole.observe(routing, outcome)
    for start, stop in pairwise(edges):
        parts.observe(type(routing)(*(field[start:stop] for field in routing)), outcome[start:stop])
    torch.testing.assert_close(parts.posterior.successes, whole.posterior.successes)
    torch.testing.assert_close(parts.posterior.failures, whole.posterior.failures)


def test_untried_arms_are_each_tried_once_before_any_again() -> None:
    for policy in ("ucb1", "discounted_ucb"):
        gate = fitted_gate(1, policy=policy)
        token, seen = data(1), []
        cluster = int(gate(token).cluster_ids)
        for _ in range(NUM_EXPERTS):
            routing = gate(token)
            seen.append(int(routing.expert_indices))
            gate.observe(routing, torch.ones(1, 1))
        assert seen == [(cluster + j) % NUM_EXPERTS for j in range(NUM_EXPERTS)]


def test_discounting_leaves_an_arm_that_became_worse_sooner() -> None:
    plays = {}
    for policy in ("ucb1", "discounted_ucb"):
        gate = BanditGate(2, 2, top_k=1, contextual=False, policy=policy, discount=0.95, exploration=0.1)
        chosen = []
        for step in range(600):
            routing = gate(torch.zeros(1, 2))
            competence = torch.tensor([[1.0 if step < 300 else 0.0, 0.6]])
            gate.observe(routing, competence.gather(1, routing.expert_indices))
            chosen.append(int(routing.expert_indices))
        plays[policy] = sum(chosen[300:])
    assert plays["discounted_ucb"] > 270
    assert plays["ucb1"] < 150, "with all it has ever seen, UCB1 needs some 200 failures"


def test_one_bandit_for_all_tokens_needs_no_fit_and_reads_no_token() -> None:
    gate = BanditGate(HIDDEN_SIZE, NUM_EXPERTS, top_k=2, contextual=False)
    assert gate.fitted
    gate.observe(gate(data(40)), outcomes(40))
    routing = gate(data(50, seed=3))
    assert len({tuple(row) for row in routing.expert_indices.tolist()}) == 1
    assert (routing.cluster_ids == 0).all()
    gate.fit(data(5))  # fewer rows than clusters: there are none to find
    assert gate.posterior.successes.sum() > 0


@pytest.mark.parametrize("contextual", [True, False])
@pytest.mark.parametrize("policy", ["ucb1", "discounted_ucb", "thompson"])
def test_broken_rows_count_nothing(policy, contextual: bool) -> None:
    gate, hidden = fitted_gate(policy=policy, contextual=contextual, discount=0.5), data(10)
    hidden[4:] = torch.nan
    routing = gate(hidden)
    assert torch.isinf(routing.distance[4:]).all()
    gate.observe(routing, torch.ones(10, 2))
    kept = type(routing)(*(field[:4] for field in routing))
    other = fitted_gate(policy=policy, contextual=contextual, discount=0.5)
    other.observe(kept, torch.ones(4, 2))
    torch.testing.assert_close(gate.posterior.successes, other.posterior.successes)


def test_thompson_draws_from_the_posterior_it_has_counted() -> None:
    gate = fitted_gate(1, policy="thompson", threshold=0.5)
    routing = gate(data(200))
    outcome = outcomes(200)
    gate.observe(routing, outcome, dense=True)
    experts = [list(range(NUM_EXPERTS))] * 200
    binary = torch.where(outcome.isnan(), torch.nan, (outcome >= 0.5).float())
    successes, failures = counted(routing.cluster_ids.tolist(), experts, binary.tolist(), (CLUSTERS, NUM_EXPERTS))
    torch.testing.assert_close(gate.posterior.successes, successes)
    torch.testing.assert_close(gate.posterior.failures, failures)
    token = data(1).expand(20_000, -1)
    chosen = gate(token)
    cluster = int(chosen.cluster_ids[0])
    alpha, beta = (successes[cluster] + 1).numpy(), (failures[cluster] + 1).numpy()
    draws = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(beta)).sample((50_000,))
    frequency = torch.bincount(chosen.expert_indices[:, 0], minlength=NUM_EXPERTS) / 20_000
    expected = torch.bincount(draws.argmax(dim=1), minlength=NUM_EXPERTS) / 50_000
    assert (frequency - expected).abs().max() < 0.02
    assert gate.expected_outcome(chosen)[0, 0] == pytest.approx(
        (alpha / (alpha + beta))[int(chosen.expert_indices[0, 0])], rel=1e-5
    )


def test_thompson_repeats_until_something_is_observed() -> None:
    gate, again, hidden = fitted_gate(1, policy="thompson"), fitted_gate(1, policy="thompson"), data(200)
    first = gate(hidden)
    assert_equal(first, again(hidden))
    gate.observe(first, torch.full((200, 1), torch.nan))
    assert not torch.equal(gate(hidden).expert_indices, first.expert_indices)
    assert not torch.equal(fitted_gate(1, policy="thompson", seed=1)(hidden).expert_indices, first.expert_indices)


@pytest.mark.parametrize("policy", ["ucb1", "discounted_ucb", "thompson"])
def test_a_warm_start_counts_what_observing_the_same_rows_would(policy) -> None:
    observed, warm = fitted_gate(policy=policy, discount=0.9), fitted_gate(policy=policy, discount=0.9)
    observed.observe(observed(data(80)), outcomes(80), dense=True)
    warm.warm_start(data(80), outcomes(80))
    torch.testing.assert_close(warm.posterior.successes, observed.posterior.successes)
    torch.testing.assert_close(warm.posterior.failures, observed.posterior.failures)


def test_the_strength_of_a_warm_start_caps_the_counts_and_keeps_the_means() -> None:
    full, weak = fitted_gate(), fitted_gate()
    full.warm_start(data(200), outcomes(200))
    weak.warm_start(data(200), outcomes(200), strength=3.0)
    plays = [gate.posterior.successes + gate.posterior.failures for gate in (full, weak)]
    torch.testing.assert_close(plays[1], plays[0].clamp(max=3.0))
    routing = full(data(30))
    torch.testing.assert_close(weak.expected_outcome(routing), full.expected_outcome(routing))
    with pytest.raises(InvalidArgumentError, match="strength must be positive"):
        weak.warm_start(data(20), outcomes(20), strength=0.0)


def test_fitting_again_forgets_what_other_clusters_did() -> None:
    gate = fitted_gate()
    gate.observe(gate(data(50)), torch.ones(50, 2))
    gate.fit(data(100, seed=9))
    assert gate.posterior.successes.sum() == 0


def test_ranks_add_up_their_outcomes_and_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = (fitted_gate(policy="discounted_ucb", discount=0.8) for _ in range(2))
    for gate in (alone, shared):
        gate.warm_start(data(80), outcomes(80))
    before, routing = alone.posterior.successes.clone(), alone(data(30))
    alone.observe(routing, outcomes(30), dense=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.mul_(2))  # another rank saw the same
    shared.observe(routing, outcomes(30), dense=True)
    played = ~outcomes(30).isnan().all(dim=1)
    rounds = torch.bincount(routing.cluster_ids[played], minlength=CLUSTERS).double()[:, None]
    fresh = alone.posterior.successes - before * 0.8**rounds
    torch.testing.assert_close(shared.posterior.successes, before * 0.8 ** (2 * rounds) + 2 * fresh)


def test_counts_that_fade_away_leave_an_arm_untried_not_broken() -> None:
    gate = fitted_gate(2, policy="discounted_ucb")
    gate.posterior.merge(Evidence(torch.full((CLUSTERS, NUM_EXPERTS), 1e-320), torch.zeros(CLUSTERS, NUM_EXPERTS)))
    gate.posterior.successes[:, 0] = 0.0
    routing = gate(data(20))
    assert torch.isfinite(routing.scores).all()
    assert torch.isfinite(routing.routing_weights).all()


def test_a_contextual_gate_must_be_fitted() -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        BanditGate(HIDDEN_SIZE, NUM_EXPERTS)(data(3))


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "greedy"},
        {"exploration": -1.0},
        {"exploration": math.inf},
        {"discount": 0.0},
        {"discount": 1.1},
        {"threshold": -0.5},
        {"num_clusters": 0},
    ],
)
def test_knobs_out_of_range_are_refused_by_name(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        BanditGate(HIDDEN_SIZE, NUM_EXPERTS, **options)
