"""The latency benchmark measures; these tests check what it counts, never how long it took."""

import json
from functools import partial

import numpy as np
import pytest

from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.routing import latency
from moe_posterior.router import PosteriorRouter


def small_router() -> tuple[PosteriorRouter, np.ndarray]:
    embeddings = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    router = PosteriorRouter(4, 8, 5)
    router.fit(embeddings)
    return router, embeddings


def test_under_load_every_query_is_decided_once_and_all_but_the_last_batch_resolved() -> None:
    router, embeddings = small_router()
    found = latency.open_loop(router, embeddings, load=2000, seconds=0.25, random=np.random.default_rng(0))
    observed = float((router.posterior.successes + router.posterior.failures).sum())
    assert router._next_id == 500
    assert 0 < 500 - observed < 500
    assert found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert found["mean_batch"] >= 1
    assert 0 < found["share_routing"] + found["share_resolving"] <= 1


def test_a_query_waits_from_its_arrival_not_from_when_it_was_picked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    router, embeddings = small_router()
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds + 0.001))
    route_batch = router.route_batch

    def slow(batch: np.ndarray):
        now[0] += 0.5
        return route_batch(batch)

    monkeypatch.setattr(router, "route_batch", slow)
    found = latency.open_loop(router, embeddings, load=1000, seconds=0.1, random=np.random.default_rng(0))
    # About 100 queries within 0.1 s: the first batch takes 0.5 s, everybody else waits for it and then 0.5 s more.
    assert found["p50_ms"] > 800
    assert found["backlog_s"] > 0.8


def test_single_decisions_are_each_resolved() -> None:
    router, embeddings = small_router()
    found = latency.single_decisions(router, embeddings, repeats=50)
    assert float((router.posterior.successes + router.posterior.failures).sum()) == 250  # 200 of them warm-up
    assert set(found) == {f"{what}{metric}" for what in ("", "resolve_") for metric in latency.QUANTILES}


def test_records_render_as_two_tables(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(latency, "SIZES", (latency.Size(4, 5, 8), latency.Size(6, 7, 8)))
    monkeypatch.setattr(latency, "measure", partial(latency.measure, seconds=0.1, loads=(500,)))
    out = tmp_path / "latency.json"
    assert benchmark(["latency", "--seeds", "1", "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "One decision, one outcome" in printed
    assert "Open-loop load" in printed
    assert len(json.loads(out.read_text())["records"]) > 20
    assert benchmark(["latency", "--from", str(out)]) == 0
    assert "Open-loop load" in capsys.readouterr().out
