"""Trajectories and flags, against a plain walk over the table of decisions."""

import math
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import BELIEFS, EMBEDDINGS, C, E, live, lived, new_router

from moe_posterior.audit import AuditLog, flags
from moe_posterior.audit.flags import Falls, below_pool
from moe_posterior.audit.survey import Survey, kind_of_refusal, survey
from moe_posterior.audit.trajectories import Sampler


def read(folder: Path) -> Survey:
    return survey(AuditLog(folder, mode="r").read())


def moments(alpha: list[float], beta: list[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(alpha, beta, strict=True))
    return [a / (a + b) for a, b in pairs], [a * b / ((a + b) ** 2 * (a + b + 1)) for a, b in pairs]


def plain_flags(folder: Path) -> dict[tuple, dict]:
    """(against, cluster or None, expert) -> first decision, kind, times and end, of a log that was told nothing but a flat prior."""
    table = {cluster: moments([1.0] * E, [1.0] * E) for cluster in range(C)}
    start, low, found, peak = 0.5, {}, {}, {}
    for number, row in enumerate(AuditLog(folder, mode="r").decisions().to_pylist()):
        cluster = row["cluster"]
        table[cluster] = moments(row["alpha"], row["beta"])
        over_all = (
            [math.fsum(table[c][0][e] for c in table) / C for e in range(E)],
            [math.fsum(table[c][1][e] for c in table) / C**2 for e in range(E)],
        )
        for place, (mean, variance) in ((cluster, table[cluster]), (None, over_all)):
            for against, level in (("pool", math.fsum(mean) / E), ("start", start)):
                for e in range(E):
                    key = against, place, e
                    peak[key] = max(peak.get(key, start), mean[e])
                    now = mean[e] + 2 * math.sqrt(variance[e]) < level
                    if now and not low.get(key):
                        one = {
                            "number": number,
                            "id": row["id"],
                            "fell": mean[e] + math.sqrt(variance[e]) < peak[key],
                            "times": 0,
                        }
                        found.setdefault(key, one)["times"] += 1
                    if low.get(key) and not now:
                        found[key]["ended"] = row["id"]
                    low[key] = now
    for key, one in found.items():
        one["ended"] = None if low[key] else one["ended"]
    return found


def uneven(folder: Path, rotate_bytes: int = 64 << 20, **options: object) -> None:
    """Experts of which some are bad and one changes halfway, so that flags go up and come down."""
    rng = np.random.default_rng(5)
    with AuditLog(folder, rotate_bytes=rotate_bytes) as log:
        router = new_router(log, exploration=0.7, half_life=8.0, abstain_below=None, **options)
        for step in range(90):
            quality = np.array([0.9, 0.8, 0.1, 0.9, 0.5]) if step % 30 < 15 else np.array([0.1, 0.8, 0.9, 0.9, 0.5])
            decisions = router.route_batch(EMBEDDINGS[rng.integers(200, size=rng.integers(1, 25))])
            router.resolve_batch(decisions.ids, (rng.random(decisions.experts.shape) < quality[decisions.experts]))
            if step % 7 == 0:
                log.flush()


@pytest.mark.parametrize("rotate_bytes", [64 << 20, 3000])
def test_flags_are_those_of_a_plain_walk_over_the_decisions(tmp_path, rotate_bytes: int) -> None:
    uneven(tmp_path, rotate_bytes)
    assert rotate_bytes > 3000 or len(list(tmp_path.glob("*.audit"))) > 2
    wanted = plain_flags(tmp_path)
    (source,) = read(tmp_path).sources.values()
    raised = source.flags()
    assert [flag.number for flag in raised] == sorted(flag.number for flag in raised)
    found = {
        (f.against, f.cluster, f.expert): {
            "number": f.number,
            "id": f.decision,
            "fell": f.fell,
            "times": f.times,
            "ended": f.ended,
        }
        for f in raised
    }
    assert found == wanted
    assert len(wanted) > 15
    for against in ("pool", "start"):
        for over_all in (False, True):
            assert any(key[0] == against and (key[1] is None) == over_all for key in wanted)
    assert any(one["ended"] is not None for one in wanted.values())
    assert any(one["times"] > 1 for one in wanted.values())


def test_flags_do_not_depend_on_how_many_rows_are_looked_at_together(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven(tmp_path)
    whole = next(iter(read(tmp_path).sources.values())).flags()
    monkeypatch.setattr(flags, "_CHUNK", 7 * E)
    assert next(iter(read(tmp_path).sources.values())).flags() == [
        flag._replace(mean=pytest.approx(flag.mean), std=pytest.approx(flag.std), level=pytest.approx(flag.level))
        for flag in whole
    ]


def test_a_flag_holds_the_numbers_and_the_time_of_its_decision(tmp_path) -> None:
    uneven(tmp_path)
    rows = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    for flag in next(iter(read(tmp_path).sources.values())).flags():
        row = rows[flag.number]
        assert row["id"] == flag.decision
        assert round(row["time"].timestamp() * 1e6) == flag.time
        assert flag.mean + 2 * flag.std < flag.level
        if flag.cluster is not None:
            assert row["cluster"] == flag.cluster
            mean, variance = moments(row["alpha"], row["beta"])
            assert (flag.mean, flag.std) == pytest.approx((mean[flag.expert], math.sqrt(variance[flag.expert])))
            assert flag.level == pytest.approx(0.5 if flag.against == "start" else sum(mean) / E)


@pytest.mark.parametrize("belief", [name for name in BELIEFS if "several" not in name])  # whose rows are mixed
def test_samples_are_the_rows_that_decisions_saw(tmp_path, belief: str) -> None:
    lived(tmp_path, belief=belief)
    (source,) = read(tmp_path).sources.values()
    samples = source.samples()
    assert (samples.alpha[0] == 1).all()
    rows = AuditLog(tmp_path, mode="r").decisions().to_pylist()
    assert samples.numbers[-1] == len(rows) == source.decisions
    assert samples.alpha.shape == (len(samples.numbers), samples.alpha.shape[1], E)
    seen: dict[int, dict] = {}
    number = 0
    for at, alpha, beta in zip(samples.numbers, samples.alpha, samples.beta, strict=True):
        while number < at:
            seen[rows[number]["cluster"]] = rows[number]
            number += 1
        for cluster, row in seen.items():
            np.testing.assert_allclose(alpha[cluster], row["alpha"], rtol=1e-6)
            np.testing.assert_allclose(beta[cluster], row["beta"], rtol=1e-6)


def test_a_long_log_gives_no_more_samples_than_a_short_one() -> None:
    sampler = Sampler(np.ones((2, 2)), np.ones((2, 2)), 0, points=16)
    for stop in range(1, 3000):
        sampler.count = stop
        if sampler.count % sampler.stride == 0:
            sampler._keep(stop)
    numbers = sampler.samples().numbers
    assert 8 <= len(numbers) <= 18
    assert numbers[0] == 0
    assert numbers[-1] == 2999
    assert len(set(np.diff(numbers)[:-1])) == 1


def test_a_huge_pool_is_sampled_more_rarely() -> None:
    table = np.ones((64, 4096))
    assert Sampler(table, table, 0).points == 8
    assert Sampler(table[:, :32], table[:, :32], 0).points == 240


def test_who_is_low_when_the_log_is_told_has_not_fallen(tmp_path) -> None:
    outcomes = np.full((200, E), 0.9)
    outcomes[:, 2] = 0.05
    with AuditLog(tmp_path) as log:
        router = new_router(log, abstain_below=None)
        router.warm_start(EMBEDDINGS, outcomes, strength=60.0)
        for row in range(40):
            router.resolve(router.route(EMBEDDINGS[row]).id, 1.0)
    (source,) = read(tmp_path).sources.values()
    pool, start = source.flagging.cells
    assert pool.low[:, 2].all()
    assert not start.low.any()
    assert not any(flag.expert == 2 for flag in source.flags())


def test_a_replaced_expert_is_no_longer_flagged_and_clusters_found_anew_begin_anew(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, exploration=0.5, abstain_below=None)
        for _ in range(30):
            decisions = router.route_batch(EMBEDDINGS[:50])
            router.resolve_batch(decisions.ids, (decisions.experts != 1).astype(float))
        router.replace_expert(1)
        replaced_at = router.route(EMBEDDINGS[0]).id
        log.flush()
        first = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
        assert len(first) == 2 * (C + 1)
        assert {flag.ended for flag in first} == {replaced_at}
        router.add_expert()
        router.route_batch(EMBEDDINGS)
        log.flush()
        (source,) = read(tmp_path).sources.values()
        assert np.isnan(source.samples().alpha[0, :, E]).all()
        router.fit(EMBEDDINGS, seed=1)
        router.route_batch(EMBEDDINGS)
    (source,) = read(tmp_path).sources.values()
    assert source.flags() == []
    assert (source.earlier, source.samples().numbers[-1]) == (1701, 200)


def test_an_expert_alone_or_a_pool_without_anyone_is_never_below_it() -> None:
    mean, std = np.full((2, 3), 0.01), np.full((2, 3), 0.001)
    assert not below_pool(mean, std, np.zeros(3, dtype=bool))[0].any()
    assert not below_pool(mean, std, np.array([False, True, False]))[0].any()


def test_an_expert_that_others_overtake_is_told_from_one_that_fell() -> None:
    start = np.array([[0.5, 0.5, 0.5]]), np.full((1, 3), 0.05)
    falls = Falls(*start, np.ones(3, dtype=bool), "pool")
    one = np.array([0])
    falls.look(one, np.array([[0.5, 0.9, 0.9]]), start[1], one + 7, one + 70, one + 700)
    falls.look(one, np.array([[0.9, 0.2, 0.9]]), start[1], one + 8, one + 80, one + 800)
    overtaken, fallen = falls.flags()
    assert (overtaken.expert, overtaken.number, overtaken.fell, overtaken.ended) == (0, 7, False, 80)
    assert (fallen.expert, fallen.decision, fallen.fell, fallen.ended) == (1, 80, True, None)


def test_a_newcomer_ends_nobody_elses_flags(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, exploration=0.5, abstain_below=None)
        for _ in range(30):
            decisions = router.route_batch(EMBEDDINGS[:50])
            router.resolve_batch(decisions.ids, (decisions.experts != 1).astype(float))
        log.flush()
        before = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
        router.replace_expert(3)
        router.route_batch(EMBEDDINGS[:50])
    after = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
    assert len(before) == 2 * (C + 1)
    assert after == before


def test_counts_are_those_of_the_tables(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        live(new_router(log, **BELIEFS["everything"]), 80, seed=1)
    (source,) = read(tmp_path).sources.values()
    log = AuditLog(tmp_path, mode="r")
    decisions, outcomes = log.decisions().to_pylist(), log.outcomes().to_pylist()
    accepted = [row for row in outcomes if row["accepted"]]
    assert source.decisions == len(decisions)
    assert source.abstained == sum(row["abstain"] for row in decisions)
    assert source.explored == sum(row["explored"] for row in decisions)
    assert source.outcomes == len({row["id"] for row in accepted})
    assert source.unknown == sum(math.isnan(row["signal"]) for row in accepted)
    assert sum(source.refused.values()) == len(outcomes) - len(accepted)
    assert set(source.refused) == {kind_of_refusal(row["reason"]) for row in outcomes if not row["accepted"]}
    for expert in range(E):
        assert source.chosen[expert] == sum(row["experts"].count(expert) for row in decisions)
    for cluster in range(C):
        chosen = [expert for row in decisions if row["cluster"] == cluster for expert in row["experts"]]
        assert source.traffic[cluster].tolist() == [chosen.count(expert) for expert in range(E)]
    assert source.waiting == min(300, source.decisions - source.outcomes)
