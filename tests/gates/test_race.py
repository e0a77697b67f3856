"""The race: who is drawn among, what a draw depends on, and when it ends."""

from math import erf

import numpy as np
import pytest

from moe_posterior import PosteriorRouter
from moe_posterior.gates import race

E, D, C = 5, 6, 4
EMBEDDINGS = np.random.default_rng(0).normal(size=(200, D)).astype(np.float32)
NONE, ALL = np.zeros(3, dtype=bool), np.ones(3, dtype=bool)


def fitted(**options) -> PosteriorRouter:
    router = PosteriorRouter(E, D, C, **options)
    router.fit(EMBEDDINGS)
    return router


def live(router: PosteriorRouter, quality: list[float], queries: int, seed: int = 0) -> np.ndarray:  # -> (queries,)
    rng, chosen = np.random.default_rng(seed), []
    for query in range(queries):
        decision = router.route(EMBEDDINGS[query % 200])
        chosen.append(decision.expert)
        router.resolve(decision.id, float(rng.random() < quality[decision.expert]))
    return np.array(chosen)


def begun(mean: list[float], count: list[float], fallen: np.ndarray = NONE, active: np.ndarray = ALL) -> race.Race:
    means, counts = np.array([mean]), np.array([count])
    std = np.sqrt(means * (1 - means) / (counts + 1))
    return race.start(means, std, counts, active, fallen, np.array([[int(np.argmax(means))]]), width=1.0)


def test_experts_whose_bounds_separate_are_out_and_the_others_in() -> None:
    assert begun([0.9, 0.86, 0.3], [30.0, 30.0, 30.0]).entered.tolist() == [[True, True, False]]


def test_a_few_outcomes_put_nobody_out_and_many_put_everybody_out_but_the_leader() -> None:
    assert begun([0.9, 0.86, 0.3], [200.0, 5.0, 5.0]).entered.tolist() == [[True, True, True]]
    assert begun([0.9, 0.89, 0.3], [5.0, 60.0, 60.0]).entered.tolist() == [[True, False, False]]


def test_an_expert_that_left_never_runs() -> None:
    assert begun([0.9, 0.8, 0.8], [5.0, 5.0, 5.0], active=np.array([True, False, True])).entered.tolist() == [
        [True, False, True]
    ]


def test_the_fallen_are_tried_ever_more_rarely_and_never_more_than_the_share() -> None:
    fallen = np.array([False, True, True])
    few, many = (begun([0.9, 0.2, 0.2], [90.0, n, n], fallen=fallen).retried[0] for n in (60.0, 120.0))
    assert few[0] == 0
    assert race.RETRIED > few[1:].sum() > many[1:].sum() > 0
    assert begun([0.9, 0.2, 0.2], [90.0, 0.0, 0.0], fallen=fallen).retried.sum() <= race.RETRIED + 1e-12


def test_draws_of_a_race_have_the_posteriors_mean_and_spread() -> None:
    uniform = race.uniforms(3, np.arange(40_000), 7)
    assert 0 < uniform.min() < uniform.max() < 1
    two = begun([0.6, 0.5, 0.1], [20.0, 20.0, 400.0])
    field = race.Race(*(np.repeat(part, 40_000, axis=0) for part in two))
    won = np.bincount(race.choose(field, uniform)[:, 0], minlength=3) / 40_000
    gap, std = 0.1, np.hypot(*two.std[0, :2])
    assert won[0] == pytest.approx(0.5 * (1 + erf(gap / std / 2**0.5)), abs=0.01)
    assert won[2] == 0


def test_decisions_before_the_first_outcome_differ_and_repeat_with_the_seed() -> None:
    router, twin, other = fitted(seed=1), fitted(seed=1), fitted(seed=2)
    experts = [[r.route(EMBEDDINGS[0]).expert for _ in range(40)] for r in (router, twin, other)]
    assert len(set(experts[0])) == E
    assert experts[0] == experts[1] != experts[2]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"novelty": "class"}, {"lazy": False}, {"clusterings": 2}])
def test_a_batch_decides_as_its_queries_one_after_the_other(options: dict) -> None:
    single, batched = fitted(**options), fitted(**options)
    rng = np.random.default_rng(5)
    for start in range(0, 200, 25):
        part = EMBEDDINGS[start : start + 25]
        one, batch = [single.route(embedding) for embedding in part], batched.route_batch(part)
        assert [list(d.experts) for d in one] == batch.experts.tolist()
        assert [d.explored for d in one] == batch.explored.tolist()
        np.testing.assert_array_equal([d.score for d in one], batch.scores[:, 0])
        outcomes = rng.random(batch.experts.shape)
        single.resolve_batch(batch.ids, outcomes)
        batched.resolve_batch(batch.ids, outcomes)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_score_is_the_bound_and_explored_says_who_the_bound_did_not_choose(top_k: int) -> None:
    router, rng, seen = fitted(top_k=top_k), np.random.default_rng(6), set()
    for embedding in EMBEDDINGS:
        decision = router.route(embedding)
        bounds = router.gate.competence_scores()[decision.cluster].numpy()
        assert decision.score == np.float32(bounds[decision.expert])
        order = [(e + decision.cluster) % E for e in range(E)]  # exact ties go round from the cluster's own expert
        best = sorted(order, key=lambda e: -bounds[e])[:top_k]
        assert decision.explored == (best != list(decision.experts))
        seen.add(decision.explored)
        router.resolve(decision.id, (rng.random(top_k) < 0.3).astype(float))
    assert seen == {False, True}


def test_a_saved_router_goes_on_with_the_same_draws(tmp_path) -> None:
    router = fitted()
    live(router, [0.9, 0.8, 0.7, 0.6, 0.5], 60)
    router.save(tmp_path / "router.pt")
    twin = PosteriorRouter.load(tmp_path / "router.pt")
    assert [router.route(e) for e in EMBEDDINGS] == [twin.route(e) for e in EMBEDDINGS]


def test_the_best_is_found_from_nothing_and_exploring_ends() -> None:
    for seed in range(5):
        router = fitted(seed=seed)
        chosen = live(router, [0.5, 0.9, 0.6, 0.4, 0.7], 800, seed)
        assert (chosen[-200:] == 1).mean() > 0.9
        assert np.mean([router.route(embedding).explored for embedding in EMBEDDINGS]) < 0.1


def test_a_failing_expert_is_left_and_a_recovered_one_found_again() -> None:
    router = fitted()
    live(router, [0.9, 0.6, 0.6, 0.6, 0.6], 400)
    assert (live(router, [0.1, 0.6, 0.6, 0.6, 0.6], 200, seed=1)[60:] == 0).mean() < 0.2
    assert (live(router, [0.9, 0.6, 0.6, 0.6, 0.6], 1000, seed=2)[-200:] == 0).mean() > 0.8


def test_another_score_keeps_the_plain_belief_and_draws_nothing() -> None:
    router = fitted(score="lcb")
    assert router.posterior.surprise is router.posterior.shrinkage is None
    assert router.posterior.pooling == "odds"
    assert not any(router.route(embedding).explored for embedding in EMBEDDINGS)


def test_a_file_of_before_these_defaults_loads_as_what_it_was() -> None:
    old = fitted(score="lcb", half_life=30.0)
    state = old.state()
    state["options"] = {name: value for name, value in state["options"].items() if name != "score"}
    router = PosteriorRouter.from_state(state)
    assert (router.gate.score, router.posterior.pooling, router.posterior.half_life) == ("lcb", "odds", 30.0)
    assert [router.route(e) for e in EMBEDDINGS] == [old.route(e) for e in EMBEDDINGS]


def test_the_number_of_clusters_follows_from_the_rows_and_is_kept(tmp_path) -> None:
    router = PosteriorRouter(E, D)
    router.save(tmp_path / "unfitted.pt")
    for fresh in (router, PosteriorRouter.load(tmp_path / "unfitted.pt")):
        fresh.remove_expert(3)
        fresh.fit(EMBEDDINGS)
        assert fresh.gate.clusterer.num_clusters == 4
        assert 3 not in {fresh.route(embedding).expert for embedding in EMBEDDINGS}
    router.save(tmp_path / "router.pt")
    assert PosteriorRouter.load(tmp_path / "router.pt").gate.num_clusters == 4
    router.fit(np.repeat(EMBEDDINGS[:2], 100, axis=0))  # fewer distinct rows than the rule asks for
    assert router.gate.num_clusters == 2
    assert PosteriorRouter(E, D, 9).gate.num_clusters == 9


@pytest.mark.parametrize("lazy", [False, True])
def test_a_newcomer_joins_the_race(lazy: bool) -> None:
    router = fitted(lazy=lazy)
    live(router, [0.5] * E, 300)
    assert router.add_expert() == E
    assert E in live(router, [0.1] * E + [0.9], 300)
