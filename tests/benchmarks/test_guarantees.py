"""The benchmark of promises, in miniature: reading predictions, known risks, records and tables."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("rich")

from moe_posterior.benchmarks.cli import benchmark
from moe_posterior.benchmarks.guarantees import drift, sets, thresholds
from moe_posterior.benchmarks.guarantees.predictions import Part, find, read
from moe_posterior.benchmarks.guarantees.thresholds import Population
from moe_posterior.benchmarks.records import read as read_records
from moe_posterior.errors import DamagedFileError, InvalidArgumentError, MissingDataError


def drawn(rows: int, seed: int, sharp: float = 2.0) -> Part:
    """Rows of an overconfident model; the larger ``sharp``, the less its confidence is worth."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    configuration = torch.randint(2, (rows,), generator=generator)
    probs = (sharp * logits + (sharp - 2) * torch.randn(rows, 3, generator=generator)).softmax(1)
    return Part(probs, target, configuration)


def write(path: Path, **parts: Part) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        f"{name}/{kind}": column.numpy()
        for name, part in parts.items()
        for kind, column in part._asdict().items()
        if column is not None
    }
    np.savez(path, **columns)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    name = "study-shapes/outputs/round--small--softmax--vanilla--42.npz"
    write(tmp_path / name, val=drawn(600, 0), test=drawn(800, 1), far=drawn(500, 2, sharp=8.0))
    return tmp_path


def test_a_file_of_the_study_is_read_with_its_setting_gate_and_parts(runs: Path) -> None:
    [path] = find(runs, ["*.npz"])
    found = read(path)
    assert (found.name, found.gate, sorted(found.parts)) == (
        "shapes round, small left out",
        "softmax",
        ["far", "test", "val"],
    )
    assert torch.allclose(found.parts["val"].probs, drawn(600, 0).probs)
    assert torch.equal(found.parts["val"].target, drawn(600, 0).target)


def test_a_file_of_another_name_goes_by_it_and_needs_no_configurations(tmp_path: Path) -> None:
    write(tmp_path / "mine.npz", test=drawn(50, 0)._replace(configuration=None))
    found = read(tmp_path / "mine.npz")
    assert (found.name, found.gate, found.parts["test"].configuration) == ("mine", "", None)


def test_a_folder_without_predictions_and_a_file_of_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="nowhere"):
        find(tmp_path / "nowhere", ["*.npz"])
    with pytest.raises(MissingDataError, match="moe-posterior study"):
        find(tmp_path, ["*.npz"])
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DamagedFileError, match=r"torn\.npz"):
        read(tmp_path / "torn.npz")
    write(tmp_path / "odd.npz", test=Part(torch.full((4, 2), -0.5), torch.zeros(4).long()))
    with pytest.raises(InvalidArgumentError, match="probs"):
        read(tmp_path / "odd.npz")


def test_the_risk_of_a_population_is_that_of_a_plain_count() -> None:
    part = drawn(200, 3)
    confidence = (10 * part.confidence).round() / 10  # with ties
    population = Population(confidence, part.correct)
    for threshold in (-math.inf, 0.4, 0.7, 0.95, 1.0, math.inf):
        acted = confidence >= threshold
        risk = float((~part.correct[acted]).double().mean()) if acted.any() else 0.0
        assert population.judged(threshold) == pytest.approx((float(acted.double().mean()), risk))


def test_on_a_population_the_promise_is_kept_where_the_empirical_threshold_breaks_it() -> None:
    rows = {
        (row["policy"], row["rows"]): row for row in thresholds.measure(drawn(1500, 4), [0.1, 0.9], 0.1, 30, seed=0)
    }
    assert {row["level"] for row in rows.values()} == {0.1}  # everything keeps 0.9
    for calibration in (1_000, 1_500):
        promised, empirical = rows["promised", calibration], rows["empirical", calibration]
        assert promised["violations"] <= 0.25 < empirical["violations"]
        assert 0 < promised["coverage"] < empirical["coverage"]
    assert rows["act on everything", 1_500]["coverage"] == 1.0


def test_a_shift_is_noticed_and_without_one_little_changes() -> None:
    calibration = drawn(3000, 5)
    same, far = (
        drift.measure(calibration, part, 0.15, 0.1, 6, seed=0) for part in (drawn(3000, 6), drawn(3000, 7, sharp=9.0))
    )
    assert far["static_bad"] == 1.0
    assert far["bad"][0] > far["bad"][-1]
    assert far["delay"] is not None
    assert same["quiet_coverage"] <= same["promised_coverage"]
    assert same["coverage"][0] > 0.2


def test_sets_hold_what_is_asked_on_the_other_half_and_weights_mend_a_tilt() -> None:
    rows = {row["policy"]: row for row in sets.measure(drawn(1500, 8), 10, seed=0)}
    for name in ("lac, within all", "aps, within all", "lac, within class", "lac, within group"):
        assert abs(rows[name]["held"] - 0.9) < 0.02
        assert rows[name]["worst_class"] <= rows[name]["held"] + 1e-12
        assert 1 <= rows[name]["size"] <= 3
    assert abs(rows["tilted"]["weighted"] - 0.9) < 0.03


def test_the_command_measures_resumes_and_renders_what_it_wrote(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = runs / "g.json", runs / "g.md"
    asked = [
        "guarantees",
        "--predictions",
        str(runs),
        "--files",
        "*.npz",
        "--levels",
        "0.2",
        "--resamples",
        "5",
        "--quiet",
    ]
    assert benchmark([*asked, "--out", str(out), "--markdown", str(text)]) == 0
    first, written = read_records(out).records, text.read_text()
    for title in (
        "A promised threshold",
        "per routing configuration",
        "under a shift",
        "Prediction sets, ε",
        "nobody knows",
    ):
        assert title in written
    assert benchmark([*asked, "--out", str(out)]) == 0
    assert read_records(out).records == first
    assert benchmark(["guarantees", "--from", str(out), "--markdown", str(runs / "again.md")]) == 0
    assert (runs / "again.md").read_text().split("\n`")[0] == written.split("\n`")[0]  # the command below differs
    assert "A promised threshold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ([], "predictions"),
        (["--resamples", "2"], "resamples"),
        (["--delta", "1"], "delta"),
        (["--levels", "0"], "levels"),
    ],
)
def test_a_wrong_option_is_refused_by_name(runs: Path, changed: list[str], name: str) -> None:
    folder = ["--predictions", str(runs)] if changed else []
    with pytest.raises(InvalidArgumentError, match=name):
        benchmark(["guarantees", *folder, *changed, "--quiet"])
