"""Trajectories and flags, against a plain walk over the table of decisions."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import BELIEFS, EMBEDDINGS, C, E, live, lived, new_router

from moe_posterior.audit import AuditLog
from moe_posterior.audit.views.falls import uniform
from moe_posterior.audit.views.flags import below_pool
from moe_posterior.audit.views.survey import Survey, kind_of_refusal, survey
from moe_posterior.audit.views.trajectories import Sampler

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read(folder: Path) -> Survey:
    return survey(AuditLog(folder, mode="r").read())


def plain_flags(folder: Path, told: float = 0.0) -> dict[tuple, dict]:
    """(cluster or None, expert) -> decision and number of the first fall, how often, and the rise after the last; one by one."""
    log = AuditLog(folder, mode="r")
    decisions = {row["id"]: (number, row) for number, row in enumerate(log.decisions().to_pylist())}
    records: dict[tuple, list[float]] = {}
    states: dict[tuple, dict] = {}
    found: dict[tuple, dict] = {}
    for outcome in log.outcomes().to_pylist():
        if not outcome["accepted"] or math.isnan(outcome["signal"]):
            continue
        row = decisions[outcome["id"]][1]
        expert, cluster = row["experts"][outcome["slot"]], row["cluster"]
        salted = np.array([outcome["id"] * E + expert])
        failed, tie = outcome["signal"] < uniform(salted, 2)[0], uniform(salted, 1)[0]
        for place, level in ((None, 0.005), (cluster, 0.005 / C)):
            record = records.setdefault((place is None, cluster, expert), [told, told])
            state = states.setdefault((place, expert), {"bets": [], "fallen": False})
            total = sum(record) + 1
            p = tie * (record[1] + 1) / total if failed else (record[1] + tie * (record[0] + 1)) / total
            p = 1 - p if state["fallen"] else p
            bet = 0.25 / math.sqrt(p) + (1.6 if p < 0.25 else 0.4 / 3)
            state["bets"] = [product * bet for product in [*state["bets"], 1.0]]  # from every outcome on
            record[int(failed)] += 1
            weights = [1 / math.log2(begin + 2) - 1 / math.log2(begin + 3) for begin in range(len(state["bets"]))]
            average = math.fsum(weight * product for weight, product in zip(weights, state["bets"], strict=True))
            if average < 1 / (0.05 if state["fallen"] else level):
                continue
            state["fallen"], state["bets"] = not state["fallen"], []
            for key in records:
                if key[0] == (place is None) and key[2] == expert and (place is None or key[1] == cluster):
                    records[key] = [0.0, 0.0]
            one = found.setdefault((place, expert), {"id": outcome["id"], "times": 0})
            one["times"] += state["fallen"]
            one["ended"] = None if state["fallen"] else outcome["id"]
    return found


def uneven(folder: Path, rotate_bytes: int = 64 << 20, **options: object) -> None:
    """Experts of which some are bad and one changes halfway, so that flags go up and come down."""
    rng = np.random.default_rng(5)
    with AuditLog(folder, rotate_bytes=rotate_bytes) as log:
        router = new_router(log, exploration=0.7, half_life=8.0, abstain_below=None, **options)
        for step in range(200):
            quality = np.array([0.9, 0.8, 0.1, 0.9, 0.5]) if step % 80 < 40 else np.array([0.1, 0.8, 0.9, 0.9, 0.5])
            decisions = router.route_batch(EMBEDDINGS[rng.integers(200, size=rng.integers(1, 25))])
            router.resolve_batch(decisions.ids, (rng.random(decisions.experts.shape) < quality[decisions.experts]))
            if step % 7 == 0:
                log.flush()


@pytest.mark.parametrize("rotate_bytes", [64 << 20, 3000])
def test_flags_are_those_of_a_plain_walk_over_the_outcomes(tmp_path, rotate_bytes: int) -> None:
    uneven(tmp_path, rotate_bytes)
    assert rotate_bytes > 3000 or len(list(tmp_path.glob("*.audit"))) > 2
    (source,) = read(tmp_path).sources.values()
    raised = source.flags()
    assert [flag.number for flag in raised] == sorted(flag.number for flag in raised)
    found = {
        (f.cluster, f.expert): {"id": f.decision, "times": f.times, "ended": f.ended}
        for f in raised
        if f.against == "start"
    }
    assert found == plain_flags(tmp_path)
    assert max(one["times"] for one in found.values()) > 1
    assert len({place for place, _ in found}) > 1


def test_a_flag_holds_the_numbers_of_the_outcome_that_raised_it(tmp_path) -> None:
    uneven(tmp_path)
    log = AuditLog(tmp_path, mode="r")
    rows = {row["id"]: (number, row) for number, row in enumerate(log.decisions().to_pylist())}
    flags = next(iter(read(tmp_path).sources.values())).flags()
    assert {flag.against for flag in flags} == {"start", "pool"}
    for flag in flags:
        number, row = rows[flag.decision]
        assert (row["time" if flag.against == "pool" else "resolved"] - EPOCH) // timedelta(microseconds=1) == flag.time
        if flag.against == "pool":
            assert number == flag.number
            assert flag.mean + 2 * flag.std < flag.level
            assert any(one.against == "start" and one[:2] == flag[:2] and one.number <= flag.number for one in flags)
        else:
            assert number < flag.number <= len(rows)
            assert flag.level == pytest.approx(0.5)


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


def test_who_is_low_when_the_log_is_told_or_all_along_has_not_fallen(tmp_path) -> None:
    outcomes = np.tile([0.9, 0.9, 0.05, 0.9, 0.9], (200, 1))
    rng = np.random.default_rng(0)
    for name, warm in (("warm", True), ("cold", False)):
        with AuditLog(tmp_path / name) as log:
            router = new_router(log, abstain_below=None, exploration=0.9)
            if warm:
                router.warm_start(EMBEDDINGS, outcomes, strength=60.0)
            for _ in range(30):
                made = router.route_batch(EMBEDDINGS)
                router.resolve_batch(made.ids, rng.random(made.experts.shape) < outcomes[0, made.experts])
            router.route_batch(EMBEDDINGS)
        (source,) = read(tmp_path / name).sources.values()
        assert source.flagging.low()[:, 2].all()
        assert source.flags() == []


def test_a_replaced_expert_is_no_longer_flagged_and_clusters_found_anew_begin_anew(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, exploration=0.5, abstain_below=None)
        for step in range(60):
            decisions = router.route_batch(EMBEDDINGS[:50])
            router.resolve_batch(decisions.ids, ((decisions.experts != 1) | (step < 30)).astype(float))
        router.replace_expert(1)
        replaced_at = router.route(EMBEDDINGS[0]).id
        log.flush()
        first = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
        assert {flag.cluster for flag in first} == {None, *range(C)}
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
    assert (source.earlier, source.samples().numbers[-1]) == (3201, 200)


def test_an_expert_alone_or_a_pool_without_anyone_is_never_below_it() -> None:
    mean, std = np.full((2, 3), 0.01), np.full((2, 3), 0.001)
    assert not below_pool(mean, std, np.zeros(3, dtype=bool))[0].any()
    assert not below_pool(mean, std, np.array([False, True, False]))[0].any()


def test_a_newcomer_ends_nobody_elses_flags(tmp_path) -> None:
    with AuditLog(tmp_path) as log:
        router = new_router(log, exploration=0.5, abstain_below=None)
        for step in range(60):
            decisions = router.route_batch(EMBEDDINGS[:50])
            router.resolve_batch(decisions.ids, ((decisions.experts != 1) | (step < 30)).astype(float))
        log.flush()
        before = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
        router.replace_expert(3)
        router.route_batch(EMBEDDINGS[:50])
    after = [flag for flag in next(iter(read(tmp_path).sources.values())).flags() if flag.expert == 1]
    assert {flag.cluster for flag in before} == {None, *range(C)}
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
