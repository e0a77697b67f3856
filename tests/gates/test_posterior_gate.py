import math

import pytest
import torch
from contracts import HIDDEN_SIZE, NUM_EXPERTS, assert_equal, data
from oracles import best_experts, softmax

from moe_posterior import BetaPosterior, Evidence, InvalidArgumentError, NotFittedError, PosteriorGate

CLUSTERS = 7


def fitted_gate(top_k: int = 2, **options) -> PosteriorGate:
    gate = PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, CLUSTERS, top_k, **options)
    gate.fit(data(100))
    return gate


def scores_by_hand(posterior: BetaPosterior, cluster: int, risk_aversion: float) -> list[float]:
    scores = []
    for a, b in zip(posterior.alpha[cluster].tolist(), posterior.beta[cluster].tolist(), strict=True):
        mean = a / (a + b)
        scores.append(mean - risk_aversion * math.sqrt(mean * (1 - mean) / (a + b + 1)))
    return scores


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_choice_weights_and_scores_match_a_loop_over_tokens(top_k: int) -> None:
    gate = fitted_gate(top_k, risk_aversion=1.5, temperature=0.2)
    outcome = (torch.rand(200, NUM_EXPERTS, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    gate.observe(gate(data(200)), outcome, dense=True)
    routing = gate(data(60, seed=2))
    for i, cluster in enumerate(routing.cluster_ids.tolist()):
        scores = scores_by_hand(gate.posterior, cluster, 1.5)
        experts = best_experts(scores, cluster, top_k)
        assert routing.expert_indices[i].tolist() == experts
        assert routing.scores[i].tolist() == pytest.approx([scores[e] for e in experts], rel=1e-6)
        assert routing.routing_weights[i].tolist() == pytest.approx(
            softmax([scores[e] for e in experts], 0.2), rel=1e-5
        )


def test_without_evidence_clusters_spread_over_experts() -> None:
    gate = fitted_gate(top_k=2)
    assert gate.topk_indices.tolist() == [[c % NUM_EXPERTS, (c + 1) % NUM_EXPERTS] for c in range(CLUSTERS)]


@pytest.mark.parametrize("score", ["lcb", "mean", "quantile"])
def test_tables_follow_every_change_of_the_belief(score: str) -> None:
    gate = fitted_gate(score=score)

    def assert_fresh(step: str) -> None:
        stale = gate.topk_scores.clone(), gate.topk_indices.clone(), gate.topk_weights.clone()
        gate.configure()
        for old, new in zip(stale, (gate.topk_scores, gate.topk_indices, gate.topk_weights), strict=True):
            assert torch.equal(old, new), step

    outcome = torch.rand(100, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    gate.observe(gate(data(100)), outcome, dense=True)
    assert_fresh("observe many tokens")
    gate.observe(gate(data(2)), outcome[:2], dense=True)
    assert_fresh("observe fewer tokens than clusters")
    gate.posterior.observe(torch.tensor([3]), torch.ones(1, NUM_EXPERTS))
    assert_fresh("observe through the posterior")
    gate.posterior.merge(Evidence(torch.rand(CLUSTERS, NUM_EXPERTS), torch.rand(CLUSTERS, NUM_EXPERTS)))
    assert_fresh("merge")
    gate.posterior.warm_start(torch.tensor([0, 1]), torch.ones(2, NUM_EXPERTS))
    assert_fresh("warm start")
    gate.load_state_dict(fitted_gate(score=score).state_dict())
    assert_fresh("load_state_dict")
    gate.posterior.reset()
    assert_fresh("reset")


def test_knobs_change_the_decision_on_the_same_belief() -> None:
    gate = fitted_gate(top_k=1, risk_aversion=0.0)
    gate.posterior.merge(Evidence(torch.full((CLUSTERS, NUM_EXPERTS), 60.0), torch.full((CLUSTERS, NUM_EXPERTS), 40.0)))
    gate.posterior.prior_alpha[:, 2] = 3.0  # Beta(3, 1): the best mean, hardly seen
    gate.posterior.successes[:, 2], gate.posterior.failures[:, 2] = 0.0, 0.0
    gate.configure(score="mean")
    assert (gate(data(10)).expert_indices == 2).all()
    gate.configure(score="lcb", risk_aversion=3.0)
    assert (gate(data(10)).expert_indices != 2).all()


def test_an_unfitted_gate_says_so() -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, CLUSTERS)(data(3))


def test_fitting_again_forgets_evidence_of_other_clusters_and_keeps_the_prior() -> None:
    gate = fitted_gate(prior_alpha=4.0)
    gate.observe(gate(data(50)), torch.ones(50, 2))
    gate.fit(data(100, seed=9))
    assert gate.posterior.successes.sum() == 0
    assert (gate.posterior.alpha == 4.0).all()


def test_broken_rows_add_no_evidence() -> None:
    gate, hidden = fitted_gate(), data(10)
    hidden[:4] = torch.nan
    routing = gate(hidden)
    assert (routing.cluster_ids[:4] == 0).all()
    assert torch.isinf(routing.distance[:4]).all()
    gate.observe(routing, torch.ones(10, 2))
    assert gate.posterior.successes.sum() == 6 * 2


def test_a_routing_can_be_observed_later_and_in_part() -> None:
    gate = fitted_gate(top_k=1)
    first = gate(data(10))
    gate.observe(gate(data(10, seed=5)), torch.zeros(10, 1))
    outcome = torch.full((10, 1), torch.nan)
    outcome[4] = 1.0
    gate.observe(first, outcome)
    assert gate.posterior.successes.sum() == 1
    assert gate.posterior.successes[first.cluster_ids[4], first.expert_indices[4, 0]] == 1


def test_thompson_explores_and_repeats_until_something_is_observed() -> None:
    gate, again = fitted_gate(top_k=1, score="thompson", seed=3), fitted_gate(top_k=1, score="thompson", seed=3)
    hidden = data(1).expand(300, -1)
    first = gate(hidden)
    assert len(set(first.expert_indices.flatten().tolist())) == NUM_EXPERTS
    assert_equal(first, again(hidden))
    gate.observe(first, torch.full((300, 1), torch.nan))
    assert not torch.equal(gate(hidden).expert_indices, first.expert_indices)
    other_seed = fitted_gate(top_k=1, score="thompson", seed=4)
    assert not torch.equal(other_seed(hidden).expert_indices, first.expert_indices)


def test_casting_the_gate_changes_no_choice_and_no_weight() -> None:
    gate = fitted_gate()
    gate.observe(gate(data(100)), torch.rand(100, 2, generator=torch.Generator().manual_seed(1)))
    before = gate(data(50))
    assert_equal(before, gate.to(torch.bfloat16)(data(50)))


@pytest.mark.parametrize(
    "options",
    [
        {"score": "median"},
        {"risk_aversion": -1.0},
        {"risk_aversion": math.nan},
        {"temperature": 0.0},
        {"credible_level": 1.0},
        {"threshold": 1.1},
        {"novelty": True},
        {"exploration": 1.0},
        {"num_clusters": 0},
        {"prior_beta": 0.0},
    ],
)
def test_knobs_out_of_range_are_refused_by_name(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, **options)


def test_a_refused_knob_changes_nothing() -> None:
    gate = fitted_gate()
    with pytest.raises(InvalidArgumentError):
        gate.configure(risk_aversion=7.0, temperature=-1.0)
    assert gate.risk_aversion == 1.0


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="backend must be one of"):
        fitted_gate(backend="cuda-magic")


def test_exploration_sends_a_share_of_last_slots_to_experts_not_chosen() -> None:
    gate, plain = fitted_gate(exploration=0.25, seed=1), fitted_gate()
    hidden = data(4000, seed=6)
    explored, greedy = gate(hidden).expert_indices, plain(hidden).expert_indices
    assert torch.equal(explored[:, 0], greedy[:, 0])
    changed = explored[:, 1] != greedy[:, 1]
    assert 0.22 < changed.double().mean() < 0.28
    assert (explored[:, 1] != explored[:, 0]).all()


def test_a_shadow_expert_is_another_one_and_leaves_the_routing_alone() -> None:
    gate = fitted_gate()
    routing = gate(data(4000, seed=6))
    shadow = gate.shadow(routing, rate=0.1)
    drawn = shadow >= 0
    assert 0.08 < drawn.double().mean() < 0.12
    assert (shadow[drawn, None] != routing.expert_indices[drawn]).all()
    assert_equal(routing, gate(data(4000, seed=6)))
    gate.posterior.observe(routing.cluster_ids[drawn], torch.ones(int(drawn.sum()), 1), shadow[drawn, None])


def test_novelty_lowers_the_scores_of_far_tokens_alone() -> None:
    gate, plain = fitted_gate(novelty="discount"), fitted_gate()
    for one in (gate, plain):
        one.observe(one(data(100)), torch.ones(100, NUM_EXPERTS), dense=True)
    near, far = data(100), data(100) + 50
    within = plain(near).distance <= plain.clusterer.radius[plain(near).cluster_ids]
    assert within.double().mean() > 0.9
    torch.testing.assert_close(gate(near).scores[within], plain(near).scores[within])
    assert (gate(far).scores < plain(far).scores).all()
    assert gate(far).abstain(0.83).all()
    assert not plain(far).abstain(0.83).any()


def test_abstain_flags_low_and_nan_scores() -> None:
    routing = fitted_gate()(data(3))._replace(scores=torch.tensor([[0.9, 0.1], [0.3, 0.2], [torch.nan, 0.1]]))
    assert routing.abstain(0.5).tolist() == [False, True, True]


def test_a_removed_expert_is_never_chosen_and_top_k_must_stay_possible() -> None:
    gate = fitted_gate(top_k=3, exploration=0.5)
    for expert in (1, 4):
        gate.remove_expert(expert)
    chosen = gate(data(500)).expert_indices
    assert set(chosen.flatten().tolist()) == {0, 2, 3}
    with pytest.raises(InvalidArgumentError, match="top_k=3 experts must stay active"):
        gate.remove_expert(0)


def test_an_added_expert_takes_part_in_routing_and_observing() -> None:
    gate = fitted_gate(top_k=1)
    assert gate.add_expert() == NUM_EXPERTS
    outcome = torch.zeros(100, NUM_EXPERTS + 1)
    outcome[:, -1] = 1.0
    gate.observe(gate(data(100)), outcome)
    assert (gate(data(30)).expert_indices == NUM_EXPERTS).all()


def test_a_lazy_gate_decides_like_an_eager_one() -> None:
    lazy, eager = fitted_gate(lazy=True, shrinkage=3.0), fitted_gate(shrinkage=3.0)
    for seed in range(5):
        hidden = data(10, seed=seed)
        assert_equal(lazy(hidden), eager(hidden))
        for gate in (lazy, eager):
            gate.observe(gate(hidden), torch.rand(10, 2, generator=torch.Generator().manual_seed(seed)))


def test_outliers_are_learned_about_together_and_apart_from_the_clusters() -> None:
    gate = fitted_gate(top_k=1, novelty="class")
    far = data(30) + torch.where(torch.arange(30)[:, None] < 15, 50.0, -50.0)  # in opposite directions
    routing = gate(far)
    assert (routing.cluster_ids == CLUSTERS).all()
    near = gate(data(100)).cluster_ids
    assert (near < CLUSTERS).double().mean() > 0.9
    before = gate.topk_indices[:CLUSTERS].clone()
    gate.observe(routing, (torch.arange(NUM_EXPERTS) == 3).double().expand(30, -1))
    assert (gate(far).expert_indices == 3).all()
    assert torch.equal(gate.topk_indices[:CLUSTERS], before)


def test_two_levels_reach_the_gates_batches(generator) -> None:
    centroids = torch.randn(100, 64, generator=generator)
    hidden = 5 * torch.randn(400, 64, generator=generator)
    gates = [PosteriorGate(64, 4, 100, top_k=1, levels=levels) for levels in (1, 2)]
    flat, two = (gate.clusterer.set_centroids(centroids)(hidden).cluster_ids for gate in gates)
    assert not torch.equal(flat, two)
    assert torch.equal(gates[0](hidden).cluster_ids, flat)
    assert torch.equal(gates[1](hidden).cluster_ids, two)
    assert torch.equal(gates[1](hidden[:1]).cluster_ids, flat[:1])  # one token is compared with all
