"""The reference itself, held against loops over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_experts, nearest_centroid, softmax

from moe_posterior import beta
from moe_posterior.kernels import reference


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize(("clusters", "size"), [(1, 1), (7, 13), (33, 60)])
def test_assign_finds_the_nearest_centroid(num_tokens, clusters, size, generator) -> None:
    hidden = torch.randn(num_tokens, size, generator=generator)
    centroids = torch.randn(clusters, size, generator=generator)
    ids, distance = reference.assign(hidden, reference.prepare_centroids(centroids))
    expected = nearest_centroid(hidden, centroids)
    assert ids.tolist() == [cluster for cluster, _ in expected]
    torch.testing.assert_close(distance, torch.tensor([d for _, d in expected]), rtol=1e-4, atol=1e-3)


def test_equal_distances_go_to_the_lower_cluster() -> None:
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    ids, _ = reference.assign(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), reference.prepare_centroids(centroids))
    assert ids.tolist() == [0, 0]


@given(st.data())
def test_select_matches_a_sort_by_the_tie_rule(data) -> None:
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    level = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # few levels: many ties
    scores = data.draw(st.lists(st.lists(level, min_size=num_experts, max_size=num_experts), max_size=6))
    clusters = data.draw(st.lists(st.integers(0, 20), min_size=len(scores), max_size=len(scores)))
    table = torch.tensor(scores, dtype=torch.float64).reshape(len(scores), num_experts)
    chosen = reference.select(table, torch.tensor(clusters, dtype=torch.int64), top_k)
    expected = [best_experts(row, cluster, top_k) for row, cluster in zip(scores, clusters, strict=True)]
    assert chosen.expert_indices.tolist() == expected
    assert chosen.scores.tolist() == [[row[e] for e in es] for row, es in zip(scores, expected, strict=True)]


def test_weigh_is_a_softmax_at_the_temperature() -> None:
    weights = reference.weigh(torch.tensor([[0.9, 0.7, 0.2]], dtype=torch.float64), 0.1)
    assert weights[0].tolist() == pytest.approx(softmax([0.9, 0.7, 0.2], 0.1))


def test_the_table_path_equals_the_full_path(generator) -> None:
    hidden, centroids = torch.randn(63, 10, generator=generator), torch.randn(5, 10, generator=generator)
    alpha, b = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) * 20 + 1
    options = {"top_k": 3, "risk_aversion": 0.7, "temperature": 0.3}
    assignment, selection, weights = reference.route(hidden, centroids, alpha, b, **options)
    clusters = torch.arange(5)
    table = reference.select(beta.lcb(alpha, b, 0.7), clusters, 3)
    tables = (table.expert_indices, reference.weigh(table.scores, 0.3), table.scores)
    by_table = reference.route_by_table(hidden, reference.prepare_centroids(centroids), *tables)
    assert torch.equal(by_table[0].cluster_ids, assignment.cluster_ids)
    assert torch.equal(by_table[1].expert_indices, selection.expert_indices)
    assert torch.equal(by_table[2], weights)


@pytest.mark.parametrize("dressed", [False, True])
def test_prior_mode_matches_a_loop_over_tokens(generator, dressed) -> None:
    hidden, centroids = torch.randn(63, 10, generator=generator), torch.randn(5, 10, generator=generator)
    gate, evidence = torch.randn(7, 10, generator=generator), -torch.rand(5, 7, generator=generator)
    offset = torch.randn(7, generator=generator) if dressed else torch.zeros(7)
    active = torch.arange(7) != 2 if dressed else torch.ones(7, dtype=torch.bool)
    given = {"gate_bias": offset, "active": active} if dressed else {}
    prepared = reference.prepare_centroids(centroids)
    assignment, selection, weights = reference.route_prior(hidden, prepared, gate, evidence, top_k=3, **given)
    for n, (cluster, _) in enumerate(nearest_centroid(hidden, centroids)):
        scores = [
            sum(float(x) * float(w) for x, w in zip(hidden[n], gate[e], strict=True))
            + float(offset[e])
            + float(evidence[cluster, e])
            if active[e]
            else -float("inf")
            for e in range(7)
        ]
        chosen = best_experts(scores, cluster, 3)
        assert assignment.cluster_ids[n] == cluster
        assert selection.expert_indices[n].tolist() == chosen
        assert selection.scores[n].tolist() == pytest.approx([scores[e] for e in chosen], rel=1e-4, abs=1e-5)
        assert weights[n].tolist() == pytest.approx(softmax([scores[e] for e in chosen], 1.0), rel=1e-4)


def test_prior_mode_without_evidence_is_the_gate_itself(generator) -> None:
    hidden, gate = torch.randn(63, 10, generator=generator), torch.randn(7, 10, generator=generator)
    centroids = reference.prepare_centroids(torch.randn(5, 10, generator=generator))
    _, selection, weights = reference.route_prior(hidden, centroids, gate, torch.zeros(5, 7), top_k=2)
    best = (hidden @ gate.T).topk(2, dim=-1)
    assert torch.equal(selection.expert_indices, best.indices)
    assert torch.equal(weights, torch.softmax(best.values, dim=-1))


def test_a_row_of_removed_experts_alone_still_has_weights() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf], [0.5, -torch.inf], [torch.inf, 0.0]])
    assert reference.weigh(scores, 0.1).tolist() == [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
