"""Pooled records: what is shared by the pool, what is an expert's own, and what the belief makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_posterior import BetaPosterior, InvalidArgumentError, hierarchy

E, C = 4, 3


def belief(**options) -> BetaPosterior:
    return BetaPosterior(C, E, pooling="hierarchy", **options)


def see(posterior: BetaPosterior, expert: int, outcomes: list[float], cluster: int = 0) -> None:
    for outcome in outcomes:
        posterior.observe(torch.tensor([cluster]), torch.tensor([[outcome]]), torch.tensor([[expert]]))


def warm(posterior: BetaPosterior, quality: list[float]) -> BetaPosterior:
    rows = torch.tensor(quality, dtype=torch.float64).expand(60 * C, E)
    posterior.warm_start(torch.arange(60 * C) % C, rows, strength=50.0)
    return posterior


def record(won: list[float], lost: list[float], foreseen: float = 0.9, own: float = 0.1) -> hierarchy.Record:
    won_, lost_ = np.array(won), np.array(lost)
    total, one = won_ + lost_, np.ones(len(won))
    return hierarchy.Record(won_, lost_, foreseen * total, (1 - foreseen) * total, foreseen * one, own * one, 0 * one)


def test_the_unobserved_inherit_a_loss_that_pools_share() -> None:
    posterior = warm(belief(), [0.95, 0.9, 0.9, 0.9])
    before = posterior.mean()
    see(posterior, 0, ([1.0] * 8 + [0.0] * 2) * 20)  # 200 outcomes at .8
    after = posterior.mean()
    assert (after[:, 1:] < before[:, 1:] - 0.05).all()
    assert (posterior.lcb(1.0).argmax(dim=1) == 0).all()  # and so the best stays the best


def test_a_collapse_is_the_experts_own() -> None:
    posterior = warm(belief(surprise=8.0), [0.95, 0.9, 0.9, 0.9])
    see(posterior, 0, [0.0] * 40)
    assert (posterior.lcb(1.0).argmax(dim=1) != 0).all()


def test_a_second_expert_that_holds_says_that_the_loss_is_not_shared() -> None:
    alone = hierarchy.deviations(record([75.0, 0, 0], [25.0, 0, 0]), np.ones(3, dtype=bool))
    beside = hierarchy.deviations(record([75.0, 90.0, 0], [25.0, 10.0, 0]), np.ones(3, dtype=bool))
    assert alone.total[2] < beside.total[2] < 0


def test_an_expert_that_left_says_nothing_of_the_others() -> None:
    active = np.array([False, True, True])
    found = hierarchy.deviations(record([10.0, 0, 0], [90.0, 0, 0]), active)
    assert found.total[1:] == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_deviations_are_finite_and_no_variance_is_negative(counts: list, foreseen: float) -> None:
    won, lost = ([pair[side] for pair in counts] for side in (0, 1))
    found = hierarchy.deviations(record(won, lost, foreseen), np.ones(len(counts), dtype=bool))
    assert all(np.isfinite(part).all() for part in found)
    assert (found.variance > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, C - 1), st.integers(0, E - 1), st.booleans()), max_size=40))
def test_the_order_of_outcomes_does_not_matter_without_surprise(seen: list) -> None:
    forward, backward = belief(), belief()
    for posterior, order in ((forward, seen), (backward, seen[::-1])):
        for cluster, expert, won in order:
            see(posterior, expert, [float(won)], cluster)
    torch.testing.assert_close(forward.mean(), backward.mean(), rtol=1e-10, atol=1e-12)


def test_what_is_seen_in_one_cluster_speaks_in_the_others_as_far_as_clusters_are_alike() -> None:
    posterior = belief()
    see(posterior, 2, [1.0] * 30)
    alpha, beta = posterior.parameters_of()
    assert posterior.mean()[1, 2] > 0.8 > posterior.mean()[1, 0]
    assert float((alpha + beta)[1].min()) > 0
    assert float((alpha + beta)[1].max()) <= hierarchy.ALIKE + 1


def test_an_expert_that_recovers_is_trusted_as_before() -> None:
    posterior = warm(belief(surprise=4.0), [0.95, 0.9, 0.9, 0.9])
    see(posterior, 0, [0.0] * 10)
    assert posterior.fallen.tolist() == [True, False, False, False]
    see(posterior, 0, [1.0] * 12)
    assert not posterior.fallen.any()
    assert posterior.trust[0] == 1
    assert float(posterior.mean()[:, 0].min()) > 0.7


def test_a_state_keeps_what_the_hierarchy_believes() -> None:
    posterior = warm(belief(surprise=4.0), [0.95, 0.2, 0.6, 0.9])
    see(posterior, 0, [0.0] * 7 + [1.0])
    twin = belief(surprise=4.0)
    twin.load_state_dict(posterior.state_dict())
    assert torch.equal(twin.alpha, posterior.alpha)
    assert torch.equal(twin.beta, posterior.beta)
    assert torch.equal(twin.relief, posterior.relief)


def test_newcomers_and_successors_start_with_nothing_held_against_them() -> None:
    posterior = warm(belief(surprise=4.0), [0.95, 0.9, 0.9, 0.9])
    see(posterior, 0, [0.0] * 10)
    index = posterior.add_expert()
    posterior.replace_expert(0)
    for expert in (0, index):
        assert not posterior.fallen[expert]
        assert posterior.relief[expert] == posterior.suspicion[expert] == 0
        assert posterior.alike[expert] == hierarchy.ALIKE


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="pooling must be one of"):
        BetaPosterior(C, E, pooling="mean")  # type: ignore[arg-type]
