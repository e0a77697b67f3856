"""The monitor's benchmark: rivals that do what their papers say, streams that drift where they say, tables of what was measured."""

from pathlib import Path

import numpy as np
import pytest

from moe_posterior.benchmarks import records
from moe_posterior.benchmarks.monitor import measure, streams
from moe_posterior.benchmarks.monitor.command import monitor
from moe_posterior.benchmarks.monitor.rivals import BINS, pit_monitor, transformed
from moe_posterior.benchmarks.monitor.tables import tables_of
from moe_posterior.benchmarks.records import Record
from moe_posterior.errors import InvalidArgumentError, MissingDataError

ABOUT = {"torch": "0", "python": "0", "processors": 1}


def plain_pit_monitor(values: np.ndarray, rng: np.random.Generator, alpha: float) -> int | None:
    """From the paper's formulas: ranks by counting, and the mixture as a sum over starting points."""
    payoffs: list[float] = []
    counts = np.ones(BINS)
    for t in range(1, len(values) + 1):
        seen, value = values[:t], values[t - 1]
        less, equal = (seen < value).sum(), (seen == value).sum()
        place = min(int((less + rng.uniform(0, equal)) / t * BINS), BINS - 1)
        payoffs.append(counts[place] / counts.sum() * BINS)
        counts[place] += 1
        mixture = sum(np.prod(payoffs[k - 1 :]) / (k * (k + 1)) for k in range(1, t + 1))
        if mixture >= 1 / alpha:
            return t - 1
    return None


@pytest.mark.parametrize("seed", range(3))
def test_pitmonitor_is_the_papers_mixture_of_conformal_bets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.random(150), rng.beta(8, 1, 150)]).round(2)  # with ties
    found = pit_monitor(values, np.random.default_rng(9), alpha=0.5)
    assert found == plain_pit_monitor(values, np.random.default_rng(9), alpha=0.5)
    assert found is not None


def test_the_transform_of_calibrated_answers_is_uniform() -> None:
    rng = np.random.default_rng(0)
    answers = streams.calibrated(40_000, 0.0, rng)
    values = np.sort(transformed(answers.confidence, answers.correct, rng))
    assert np.abs(values - np.linspace(0, 1, len(values))).max() < 0.015


def test_a_stream_without_drift_has_the_gap_that_was_asked_for() -> None:
    answers = streams.calibrated(200_000, 0.02, np.random.default_rng(0))
    assert (answers.confidence - answers.correct).mean() == pytest.approx(0.02, abs=0.004)
    assert set(answers.configuration.tolist()) == set(range(streams.CONFIGURATIONS))


def test_friedmans_local_drift_moves_some_configurations_and_the_monitor_names_one_of_them() -> None:
    pytest.importorskip("river")
    stream = streams.friedman("local", 0)
    assert len(stream.answers.correct) == streams.STABLE + streams.LONG_AFTER
    assert 0 < len(stream.moved) < streams.CONFIGURATIONS
    row, named = measure.first_alarm(measure.OURS, stream, 0)
    assert row is not None
    assert row >= stream.drift
    assert named in stream.moved
    for rival in ("ADWIN", "Page-Hinkley"):
        assert measure.first_alarm(rival, stream, 0)[1] is None


def stored_study(folder: Path, gap: float) -> None:
    """Predictions of a mixture that is calibrated on its own domains and ``gap`` off in one configuration of the new one."""
    (folder / "outputs").mkdir()
    rng = np.random.default_rng(0)
    for domain in streams.PACS_DOMAINS:
        for arm in streams.PACS_ARMS:
            parts = {}
            for part, off in (("val", 0.0), ("test", gap)):
                shown, configuration = rng.uniform(0.7, 0.99, 600), rng.integers(0, 4, 600)
                right = rng.random(600) < shown - off * (configuration == 1)
                parts[f"{part}/probs"] = np.stack([shown, 1 - shown], 1).astype(np.float32)
                parts[f"{part}/target"] = (~right).astype(np.int64)
                parts[f"{part}/configuration"] = configuration
            np.savez(folder / "outputs" / f"{domain}----{arm}--42.npz", **parts)


def test_on_pacs_only_the_chosen_configuration_changes_its_domain(tmp_path: Path) -> None:
    stored_study(tmp_path, gap=0.5)
    stream = streams.pacs(tmp_path, "photo", streams.PACS_ARMS[0], 0, whole=False)
    assert stream.moved == {1}
    before, after = stream.answers.at(slice(stream.drift)), stream.answers.at(slice(stream.drift, None))
    for one in range(4):
        gaps = [(part.confidence - part.correct)[part.configuration == one].mean() for part in (before, after)]
        assert abs(gaps[1] - gaps[0] - 0.5 * (one == 1)) < 0.12
    assert measure.first_alarm(measure.OURS, stream, 0)[1] == 1
    with pytest.raises(MissingDataError, match="moe-posterior study"):
        streams.pacs(tmp_path / "none", "photo", streams.PACS_ARMS[0], 0, whole=True)


def test_the_command_measures_writes_resumes_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("river")
    stored_study(tmp_path, gap=0.5)
    out, again = str(tmp_path / "out.parquet"), str(tmp_path / "out.md")
    run = ["--parts", "pacs", "--study", str(tmp_path), "--seeds", "1", "--out", out]
    assert monitor(run, ABOUT) == 0
    first = records.read(out).records
    assert {one.gate for one in first} == set(measure.DETECTORS)
    assert {one.options["domain"] for one in first} == set(streams.PACS_DOMAINS)
    assert monitor(run, ABOUT) == 0
    assert records.read(out).records == first
    assert monitor(["--from", out, "--markdown", again], ABOUT) == 0
    text = (tmp_path / "out.md").read_text()
    assert "PACS, one configuration changes its domain: 8 streams" in text
    assert "moe-posterior benchmark monitor --parts pacs" in text
    with pytest.raises(InvalidArgumentError, match="--study must name"):
        monitor(["--parts", "pacs"], ABOUT)


def test_the_table_counts_early_alarms_and_compares_delays_on_the_same_streams() -> None:
    def run(detector: str, seed: int, delay: float | None, early: bool) -> list[Record]:
        figures = {"early": float(early), "delay": delay, "window": 100.0, "named": None}
        return [Record("monitor", "friedman lea", detector, {}, seed, name, value) for name, value in figures.items()]

    found = [*run(measure.OURS, 0, 10.0, False), *run(measure.OURS, 1, 30.0, False), *run(measure.OURS, 2, None, True)]
    found += [*run(measure.GLOBAL, 0, 60.0, False), *run(measure.GLOBAL, 1, None, False)]
    found += run(measure.GLOBAL, 2, 5.0, False)
    [table] = tables_of(found)
    rows = {row[0]: row for row in table.rows}
    assert rows[measure.OURS][1].startswith("0.333")
    assert rows[measure.OURS][4].startswith("0.25")  # (10 + 30) / (60 + 100), the third stream left out
    assert rows[measure.GLOBAL][3].startswith("60")


@pytest.mark.slow
def test_a_million_calm_rows_raise_no_alarm() -> None:
    for seed in range(4):
        [one] = measure.of_nothing(measure.CALM, measure.OURS, 1000 + seed)
        assert one.value == 0
