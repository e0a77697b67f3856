"""The audit benchmark measures; these tests check what it counts and compares, never how long it took."""

import math

import pytest
import torch

from moe_posterior.audit import AuditLog
from moe_posterior.audit.views.flags import Flag
from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.records import Record, read
from moe_posterior.benchmarks.routing import audit, horizon
from moe_posterior.benchmarks.routing.environments import NUM_WARM, synthetic
from moe_posterior.benchmarks.routing.latency import Size
from moe_posterior.benchmarks.routing.registry import build, options_of
from moe_posterior.benchmarks.routing.stream import play

pytest.importorskip("rich")


def flag(expert: int, number: int, against: str = "start", cluster: int | None = None) -> Flag:
    return Flag(expert, cluster, against, number, number, 0, 0.5, 0.1, 0.8, 1, None, None)


def test_the_failure_comes_after_healthy_queries_that_no_prior_has_seen() -> None:
    environment, onset = horizon.world(3, healthy=40)
    whole = synthetic("b", 3, num_queries=horizon.QUERIES, num_warm=NUM_WARM + 40)
    assert (onset, environment.change_at) == (40, 40)
    assert len(environment.warm_hidden) == NUM_WARM
    assert torch.equal(environment.stream.hidden[:40], whole.warm_hidden[NUM_WARM:])
    assert torch.equal(environment.stream.outcomes[:40], whole.warm_outcomes[NUM_WARM:])
    assert torch.equal(environment.stream.outcomes[40:], whole.stream.outcomes)
    assert torch.equal(environment.stream.affected[40:], whole.stream.affected)
    at_once, onset = horizon.world(3, healthy=0)
    assert onset == 0
    assert torch.equal(at_once.stream.hidden, synthetic("b", 3, num_queries=horizon.QUERIES).stream.hidden)


@pytest.mark.parametrize("gate", horizon.GATES)
def test_the_logged_router_decides_as_the_benchmarks_gate(tmp_path, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizon, "QUERIES", 80)
    environment, _ = horizon.world(1, healthy=0)
    found = horizon.play_logged(environment, options_of(gate), 1, str(tmp_path))
    wanted = play(build(gate, environment, options_of(gate), 1), environment)
    assert torch.equal(found.chosen, wanted.chosen)
    logged = AuditLog(tmp_path, mode="r").decisions(posterior=False)["experts"].to_pylist()
    assert [experts[0] for experts in logged] == wanted.chosen.tolist()


def test_horizons_count_from_the_failure_and_earlier_flags_are_false() -> None:
    environment, onset = horizon.world(0, healthy=10)
    expert = environment.degraded
    other = expert + 1
    chosen = torch.full((len(environment.stream.hidden),), other)
    chosen[12:20:2] = expert
    flags = [
        flag(expert, 4, cluster=2),
        flag(other, 5),
        flag(expert, 17),
        flag(expert, 30, cluster=1),
        flag(other, 11, against="pool"),
    ]
    found = {
        (name, metric): value
        for name, metric, value in horizon.figures_of(horizon.Play(chosen, flags), environment, onset)
    }
    assert found["start, expert", "log"] == 7
    assert found["start, expert", "own"] == 3
    assert (found["start, expert", "false_it"], found["start, expert", "false_others"]) == (0, 1)
    assert found["start, cell", "log"] == 20
    assert (found["start, cell", "false_it"], found["start, cell", "false_others"]) == (1, 0)
    assert found["pool, expert", "log"] is None
    assert found["pool, cell", "log"] is None


def test_the_horizon_runs_and_renders_from_its_file(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(horizon, "QUERIES", 60)
    monkeypatch.setattr(horizon, "HEALTHY", 20)
    out = tmp_path / "horizon.json"
    assert benchmark(["audit", "--horizon", "--seeds", "2", "--quiet", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    records = read(out).records
    assert {record.seed for record in records} == {0, 1}
    assert {record.paper for record in records if record.metric == "log" and "," in record.options["flag"]} == {20}
    assert "2 seeds" in printed
    markdown = tmp_path / "horizon.md"
    monkeypatch.setattr(horizon, "measure", lambda *_: pytest.fail("a seed was run"))
    assert benchmark(["audit", "--from", str(out), "--markdown", str(markdown)]) == 0
    assert "| after 20 | posterior of the paper | start, expert |" in markdown.read_text()


def test_a_seed_without_a_flag_counts_as_infinitely_late() -> None:
    def record(seed: int, metric: str, value: float | None) -> Record:
        return Record(
            "audit", horizon.ENVIRONMENT, "posterior", {"healthy": 0, "flag": "start, cell"}, seed, metric, value
        )

    records = [record(seed, metric, value) for seed, value in enumerate([5, 9, None]) for metric in ("log", "own")]
    (table,) = horizon.tables(records)
    assert table.rows[0][3] == "9 [5, ∞]"
    assert table.rows[0][5].startswith("67% [")


def test_speed_is_measured_on_every_part_and_rendered_beside_its_target(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name, value in {"SECONDS": 0.1, "LOAD": 2000, "CLOSED": 100, "ROUNDS": 2, "SUSTAINED": 1200}.items():
        monkeypatch.setattr(audit, name, value)
    monkeypatch.setattr(audit, "SUSTAINED_BATCH", 200)
    monkeypatch.setattr(audit, "REALISTIC", 500)
    monkeypatch.setattr(audit, "COMMIT", 100)
    monkeypatch.setattr(audit, "SIZES", (Size(4, 5, 8),))
    out = tmp_path / "speed.json"
    assert benchmark(["audit", "--seeds", "2", "--quiet", "--out", str(out)]) == 0
    records = read(out).records
    shown = {metric for metric, _, _ in audit._SHOWN}
    for seed in (0, 1):
        found = {record.metric: record.value for record in records if record.seed == seed}
        assert shown <= set(found)
        assert all(math.isfinite(value) for value in found.values())
        assert found["bytes a decision"] > 10
        assert found["throughput cost"] == pytest.approx(1 - found["throughput on"] / found["throughput off"])
    printed = capsys.readouterr().out
    assert "≥ 300,000" in printed
    assert "met" in printed or "missed" in printed


def test_a_target_is_met_on_its_side_only() -> None:
    records = [
        Record("audit", "x", "posterior", {}, seed, metric, value)
        for metric, values in {
            "verify": (2e6, 3e6, 1.0),
            "replay": (1.0, 2.0, 9e9),
            "p90_ms on": (1.0, 4.9, 90.0),
        }.items()
        for seed, value in enumerate(values)
    ]
    (table,) = audit.tables(records)
    assert {row[0].split()[-1]: row[-1] for row in table.rows} == {
        "verified": "met",
        "replayed": "missed",
        "(ms)": "met",
    }
