"""The rate of false alarms that the flags state, read after every outcome, and how soon a fall is seen."""

import numpy as np
import pytest

from moe_posterior.audit.views.falls import FALSE_ALARMS, FallTest, uniform

C, LEVEL = 4, FALSE_ALARMS / 2


def first_falls(
    theta: np.ndarray,  # (C, E) before
    outcomes: int,  # of each expert
    told: float | None,
    seed: int,
    change: tuple[int, np.ndarray] | None = None,
    cells: bool = False,
    greedy: bool = False,
) -> np.ndarray:  # (E,), -1 where there was none
    """When each of E experts that have nothing to do with each other is first said to have fallen, over all clusters or on one."""
    rng, experts = np.random.default_rng(seed), theta.shape[1]
    groups = np.arange(theta.size).reshape(theta.shape)
    test = FallTest(groups if cells else groups % experts, LEVEL / C if cells else LEVEL)
    if told is not None:  # as a warm start of so many outcomes a cell would have it
        share = (1 + rng.binomial(int(told), theta)) / (2 + told)
        test.told(told * share, told * (1 - share), list(range(experts)))
    first, won, seen = np.full(experts, -1), np.ones(theta.shape), np.full(theta.shape, 2.0)
    for number in range(outcomes):
        cluster = rng.integers(C, size=experts)
        if greedy:  # the cluster of two on which the expert has done better so far is asked: luck that does not last
            other, each = rng.integers(C, size=experts), np.arange(experts)
            better = (won / seen)[other, each] > (won / seen)[cluster, each]
            cluster = np.where(better, other, cluster)
        now = theta if change is None or number < change[0] else change[1]
        failed = rng.random(experts) >= now[cluster, np.arange(experts)]
        won[cluster, np.arange(experts)] += ~failed
        seen[cluster, np.arange(experts)] += 1
        ids = np.arange(experts) * 1_000_003 + number
        for turn in test.see(groups[cluster, np.arange(experts)], failed, uniform(ids, 1)):
            expert = turn.group % experts
            if turn.fell and first[expert] < 0:
                first[expert] = number
    return first


STATIONARY = {
    "bad": lambda rng, shape: np.full(shape, 0.1),
    "middling": lambda rng, shape: np.full(shape, 0.5),
    "good": lambda rng, shape: np.full(shape, 0.95),
    "of all kinds": lambda rng, shape: rng.random(shape),
    "good here and bad there": lambda rng, shape: rng.choice([0.05, 0.95], size=shape),
}


def rate_is_held(falls: np.ndarray, level: float) -> bool:
    """Whether so many false alarms, or fewer, are to be expected at the level: three standard deviations of the count."""
    return int((falls >= 0).sum()) <= len(falls) * level + 3 * np.sqrt(len(falls) * level)


@pytest.mark.parametrize("told", [None, 20.0], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", STATIONARY)
def test_an_expert_that_stays_as_it_is_is_said_to_have_fallen_no_more_often_than_stated(
    kind: str, told: float | None
) -> None:
    theta = STATIONARY[kind](np.random.default_rng(0), (C, 100))
    assert rate_is_held(first_falls(theta, 100, told, seed=1, greedy=True), LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("told", [None, 20.0])
@pytest.mark.parametrize("kind", STATIONARY)
def test_the_rate_holds_over_thousands_of_outcomes(kind: str, told: float | None, greedy: bool, cells: bool) -> None:
    theta = STATIONARY[kind](np.random.default_rng(0), (C, 500))
    assert rate_is_held(first_falls(theta, 2000, told, seed=2, cells=cells, greedy=greedy), LEVEL)


@pytest.mark.parametrize(("told", "after", "within"), [(20.0, 0, 20), (20.0, 100, 40), (None, 200, 40)])
def test_a_fall_to_a_third_is_seen_within_some_outcomes(told: float | None, after: int, within: int) -> None:
    theta = np.random.default_rng(0).beta(18, 2, size=(C, 40))
    falls = first_falls(theta, after + 150, told, seed=3, change=(after, 0.35 * theta))
    assert np.median(np.where(falls < after, 10**6, falls - after)) <= within


def test_an_expert_that_rises_again_is_said_to_have_and_can_fall_once_more() -> None:
    test = FallTest(np.zeros((1, 1), dtype=np.int64), LEVEL)
    failed = np.concatenate([np.zeros(60), np.ones(60), np.zeros(60), np.ones(60)]).astype(np.bool_)
    turns = test.see(np.zeros(240, dtype=np.int64), failed, uniform(np.arange(240), 1))
    assert [turn.fell for turn in turns] == [True, False, True]
    assert [turn.row // 60 for turn in turns] == [1, 2, 3]


def test_outcomes_count_the_same_one_by_one_and_together() -> None:
    rng = np.random.default_rng(0)
    cells, failed = rng.integers(6, size=400), rng.random(400) < np.where(np.arange(400) < 200, 0.1, 0.8)
    ties, groups = uniform(np.arange(400), 1), np.arange(6).reshape(2, 3)
    for of_groups in (groups, groups % 3):
        whole, single = FallTest(of_groups, LEVEL), FallTest(of_groups, LEVEL)
        turns = []
        for row in range(400):
            here = slice(row, row + 1)
            turns += [turn._replace(row=row) for turn in single.see(cells[here], failed[here], ties[here])]
        assert whole.see(cells, failed, ties) == turns
        assert len(turns) > 2
