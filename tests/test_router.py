import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from moe_posterior import InvalidArgumentError, NotFittedError, PosteriorRouter
from moe_posterior.gates import LCB, Mean, Quantile, Race, Rule, Thompson

E, D, C = 5, 6, 4
EMBEDDINGS = np.random.default_rng(0).normal(size=(200, D)).astype(np.float32)


def fitted_router(**options) -> PosteriorRouter:
    router = PosteriorRouter(E, D, C, **options)
    router.fit(EMBEDDINGS)
    return router


def evidence(router: PosteriorRouter) -> float:
    return float((router.posterior.successes + router.posterior.failures).sum())


@pytest.mark.parametrize("options", [{}, {"lazy": False}, {"shrinkage": 4.0, "surprise": 4.0, "half_life": 20.0}])
def test_one_at_a_time_and_batched_decide_alike(options: dict) -> None:
    single, batched = fitted_router(**options), fitted_router(**options)
    for start in range(0, 200, 20):
        part = EMBEDDINGS[start : start + 20]
        decisions = [single.route(embedding) for embedding in part]
        batch = batched.route_batch(part)
        assert [d.expert for d in decisions] == batch.experts[:, 0].tolist()
        assert [d.id for d in decisions] == batch.ids.tolist()
        assert [d.cluster for d in decisions] == batch.clusters.tolist()
        np.testing.assert_allclose([d.score for d in decisions], batch.scores[:, 0], rtol=1e-6)
        outcomes = (batch.experts[:, 0] == 2).astype(float)
        batched.resolve_batch(batch.ids, outcomes)
        single.resolve_batch([d.id for d in decisions], outcomes)
    assert torch.equal(single.posterior.successes, batched.posterior.successes)


def test_it_learns_which_expert_is_right() -> None:
    router = fitted_router()
    for embedding in EMBEDDINGS:
        decision = router.route(embedding)
        router.resolve(decision.id, float(decision.expert == 3))
    assert {router.route(embedding).expert for embedding in EMBEDDINGS} == {3}


def test_lazy_and_eager_tables_agree_after_every_outcome() -> None:
    lazy, eager = fitted_router(), fitted_router(lazy=False)
    rng = np.random.default_rng(1)
    for embedding in EMBEDDINGS:
        one, other = lazy.route(embedding), eager.route(embedding)
        assert one == other
        outcome = float(rng.random() < 0.5)
        lazy.resolve(one.id, outcome)
        eager.resolve(other.id, outcome)


def test_outcomes_may_come_late_in_any_order_and_in_part() -> None:
    router = fitted_router()
    ids = [router.route(embedding).id for embedding in EMBEDDINGS[:10]]
    for decision_id in reversed(ids[3:]):
        router.resolve(decision_id, 1.0)
    assert evidence(router) == 7
    router.resolve(ids[0], np.nan)  # known to be unknown: resolved, and nothing learned
    assert evidence(router) == 7


def test_an_outcome_counts_once() -> None:
    router = fitted_router()
    decision = router.route(EMBEDDINGS[0])
    router.resolve(decision.id, 1.0)
    with pytest.raises(InvalidArgumentError, match="is resolved already or too old"):
        router.resolve(decision.id, 1.0)
    with pytest.raises(InvalidArgumentError, match="decision 99 was never given"):
        router.resolve(99, 1.0)
    with pytest.raises(InvalidArgumentError, match="decision -1 was never given"):
        router.resolve(-1, 1.0)
    assert evidence(router) == 1


@pytest.mark.parametrize(
    ("ids", "outcomes", "message"),
    [
        ([0, 0], [1.0, 1.0], "ids must not repeat"),
        ([0, 1], [1.0, 1.5], "outcome must lie"),
        ([0, 1], [1.0], r"outcomes must have shape \(2, 1\); got \(1,\)"),
        ([0.5], [1.0], "ids must be integers"),
        ([0, 7], [1.0, 1.0], "decision 7 was never given"),
    ],
)
def test_a_bad_batch_of_outcomes_changes_nothing(ids: list, outcomes: list, message: str) -> None:
    router = fitted_router()
    router.route_batch(EMBEDDINGS[:3])
    with pytest.raises(InvalidArgumentError, match=message):
        router.resolve_batch(ids, outcomes)
    assert evidence(router) == 0
    router.resolve_batch([0, 1, 2], [1.0, 0.0, 1.0])
    assert evidence(router) == 3


def test_decisions_beyond_the_limit_are_forgotten_and_said_to_be() -> None:
    router = fitted_router(max_pending=8)
    ids = router.route_batch(EMBEDDINGS[:5]).ids.tolist() + [router.route(e).id for e in EMBEDDINGS[5:12]]
    with pytest.raises(InvalidArgumentError, match="decision 3 is resolved already or too old"):
        router.resolve(ids[3], 1.0)
    router.resolve(ids[4], 1.0)


def test_a_batch_larger_than_the_limit_is_refused() -> None:
    router = fitted_router(max_pending=8)
    with pytest.raises(InvalidArgumentError, match="at most max_pending=8"):
        router.route_batch(EMBEDDINGS[:9])


def test_outcomes_of_an_expert_that_left_or_was_replaced_are_refused() -> None:
    router = fitted_router(score="lcb")
    first, second = router.route(EMBEDDINGS[0]), router.route(EMBEDDINGS[0])
    router.replace_expert(first.expert)
    with pytest.raises(InvalidArgumentError, match="which has left or been replaced since"):
        router.resolve(first.id, 1.0)
    third = router.route(EMBEDDINGS[0])
    router.remove_expert(third.expert)
    assert router.route(EMBEDDINGS[0]).expert != third.expert
    with pytest.raises(InvalidArgumentError, match="which has left"):
        router.resolve(third.id, 1.0)
    with pytest.raises(InvalidArgumentError, match="which has left"):
        router.resolve(second.id, 1.0)


def test_a_new_expert_with_good_donors_is_chosen() -> None:
    router = fitted_router()
    router.warm_start(EMBEDDINGS, np.tile([0.9, 0.2, 0.2, 0.2, 0.2], (200, 1)), strength=20.0)
    newcomer = router.add_expert({0: 1.0}, strength=2000.0)
    assert newcomer == E
    assert router.route(EMBEDDINGS[0]).expert == newcomer


def test_abstention_below_the_threshold_and_on_broken_embeddings() -> None:
    router = fitted_router(abstain_below=0.5)
    assert router.route(EMBEDDINGS[0]).abstain  # nothing is proved yet
    router.warm_start(EMBEDDINGS, np.full((200, E), 0.95))
    assert not router.route(EMBEDDINGS[0]).abstain
    broken = EMBEDDINGS[0].copy()
    broken[2] = np.nan
    decision = router.route(broken)
    assert decision.abstain
    assert decision.distance == np.inf
    router.resolve(decision.id, 1.0)
    assert evidence(router) == 0


def test_novelty_makes_far_queries_abstain() -> None:
    router = fitted_router(abstain_below=0.8, novelty="discount", risk_aversion=2.0)
    router.warm_start(EMBEDDINGS, np.full((200, E), 0.95))
    batch = router.route_batch(np.concatenate([EMBEDDINGS[:100], 40 + EMBEDDINGS[:100]]))
    assert batch.abstain[:100].mean() < 0.1
    assert batch.abstain[100:].all()


def test_exploration_is_seeded_flagged_and_about_as_frequent_as_asked() -> None:
    options = {"score": "lcb", "exploration": 0.2, "seed": 7}
    router, twin = fitted_router(**options), fitted_router(**options)
    decisions = [router.route(EMBEDDINGS[i % 200]) for i in range(1000)]
    assert decisions == [twin.route(EMBEDDINGS[i % 200]) for i in range(1000)]
    share = np.mean([d.explored for d in decisions])
    assert 0.15 < share < 0.25
    plain = fitted_router(score="lcb")
    for i, decision in enumerate(decisions):
        assert (decision.expert != plain.route(EMBEDDINGS[i % 200]).expert) == decision.explored


def test_saving_and_loading_keeps_belief_pool_and_pending_decisions(tmp_path) -> None:
    router = fitted_router(shrinkage=4.0, half_life=50.0)
    router.add_expert({0: 1.0})
    for embedding in EMBEDDINGS[:50]:
        router.resolve(router.route(embedding).id, 1.0)
    waiting = router.route(EMBEDDINGS[60])
    router.save(tmp_path / "router.pt")
    restored = PosteriorRouter.load(tmp_path / "router.pt")
    assert torch.equal(restored.posterior.alpha, router.posterior.alpha)
    for one in (router, restored):
        one.resolve(waiting.id, 0.0)
    for embedding in EMBEDDINGS:
        assert restored.route(embedding) == router.route(embedding)


def test_many_threads_lose_no_outcome() -> None:
    router, errors = fitted_router(), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                if rng.random() < 0.5:
                    router.resolve(router.route(EMBEDDINGS[rng.integers(200)]).id, 1.0)
                else:
                    batch = router.route_batch(EMBEDDINGS[rng.integers(200, size=3)])
                    router.resolve_batch(batch.ids[:1], [1.0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert evidence(router) == 6 * 150


@pytest.mark.parametrize("bad", [np.zeros(D + 1), np.zeros((2, D)), np.array(["a"] * D)])
def test_a_wrong_embedding_is_named(bad: np.ndarray) -> None:
    with pytest.raises(InvalidArgumentError, match="embedding"):
        fitted_router().route(bad)


def test_an_unfitted_router_says_so() -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        PosteriorRouter(E, D, C).route(EMBEDDINGS[0])


def test_an_empty_batch_is_an_empty_answer() -> None:
    router = fitted_router()
    assert router.route_batch(EMBEDDINGS[:0]).ids.shape == (0,)
    router.resolve_batch(np.zeros(0, dtype=np.int64), np.zeros(0))


DECIDING = [
    {},
    {"lazy": False},
    {"top_k": 3},
    {"shrinkage": 4.0, "surprise": 4.0, "half_life": 20.0},
    {"score": "quantile", "false_positive_rate": 0.1},
    {"novelty": "discount", "top_k": 2},
    {"novelty": "class"},
]
DRAWING = [{"score": "thompson"}, {"exploration": 0.5, "top_k": 2}]


def experienced_router(**options) -> PosteriorRouter:
    router, rng = fitted_router(**options), np.random.default_rng(2)
    router.warm_start(EMBEDDINGS, rng.random((200, E)))
    known = router.route_batch(EMBEDDINGS)
    router.resolve_batch(known.ids, rng.random(known.experts.shape))
    return router


@pytest.mark.parametrize("options", DECIDING)
def test_mean_and_interval_are_the_same_alone_and_in_a_batch(options: dict) -> None:
    router = experienced_router(**options)
    batch, singles = router.route_batch(EMBEDDINGS[:20]), [router.route(embedding) for embedding in EMBEDDINGS[:20]]
    assert [list(one.means) for one in singles] == batch.means.tolist()
    assert [one.mean for one in singles] == batch.means[:, 0].tolist()
    low, high = batch.interval(0.8)
    assert [one.interval(0.8) for one in singles] == list(zip(low[:, 0].tolist(), high[:, 0].tolist(), strict=True))
    tails = scipy.stats.beta.ppf([[[0.1]], [[0.9]]], batch.alphas, batch.betas)
    np.testing.assert_allclose(np.stack([low, high]), tails, rtol=1e-9)


@pytest.mark.parametrize("options", [*DECIDING[:5], *DRAWING])
def test_a_decision_keeps_the_belief_that_it_rested_on(options: dict) -> None:
    router = experienced_router(**options)
    alpha, beta = (table.numpy().copy() for table in router.posterior.parameters_of())
    decision, batch = router.route(EMBEDDINGS[0]), router.route_batch(EMBEDDINGS)
    for _ in range(5):
        router.resolve(router.route(EMBEDDINGS[0]).id, np.zeros(router.gate.top_k))
    assert list(decision.alphas) == alpha[decision.cluster, list(decision.experts)].tolist()
    assert list(decision.betas) == beta[decision.cluster, list(decision.experts)].tolist()
    np.testing.assert_array_equal(batch.alphas, alpha[batch.clusters[:, None], batch.experts])
    np.testing.assert_array_equal(batch.betas, beta[batch.clusters[:, None], batch.experts])


def test_the_mean_lies_above_the_bound_and_inside_the_interval() -> None:
    decision = experienced_router().route(EMBEDDINGS[0])
    low, high = decision.interval()
    assert low < decision.mean < high
    assert decision.score < decision.mean
    narrow = decision.interval(0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, float("nan")])
def test_an_impossible_level_is_refused(level: float) -> None:
    router = fitted_router()
    for decided in (router.route(EMBEDDINGS[0]), router.route_batch(EMBEDDINGS[:2])):
        with pytest.raises(InvalidArgumentError, match="level"):
            decided.interval(level)


def test_an_empty_batch_has_empty_means_and_intervals() -> None:
    none = fitted_router().route_batch(EMBEDDINGS[:0])
    assert none.means.shape == none.interval()[0].shape == (0, 1)


@pytest.mark.parametrize("rule", [LCB(2.5), Mean(), Quantile(0.2), Thompson(7), Race(0.5)])
def test_a_router_with_a_rule_is_the_router_with_its_options_and_is_saved(tmp_path: Path, rule: Rule) -> None:
    past = np.random.default_rng(0).normal(size=(60, 4))
    routers = [PosteriorRouter(3, 4, num_clusters=2, rule=rule), PosteriorRouter(3, 4, num_clusters=2, **rule.options)]
    for router in routers:
        router.fit(past)
    assert routers[0].options == routers[1].options
    routers[0].save(tmp_path / "router")
    loaded = PosteriorRouter.load(tmp_path / "router")
    assert loaded.gate.rule == rule
    assert loaded.route(past[0]) == routers[1].route(past[0])
