"""The benchmark of intervals: truths that are true, draws that are of the models they say, shares that are counted right."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_posterior.benchmarks import intervals, records
from moe_posterior.benchmarks.intervals import Model
from moe_posterior.benchmarks.records import Record
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import brier_score, calibration_error, negative_log_likelihood

ABOUT = {"torch": "0", "python": "0", "processors": 1}


@pytest.mark.parametrize("model", [Model("mild", 0.05), Model("sharp", 0.0)])
def test_the_truth_is_what_a_large_draw_shows(model: Model) -> None:
    rng = np.random.default_rng(5)
    found = intervals.drawn(rng, model, rng.random(200_000))
    label = torch.zeros(200_000, dtype=torch.int64)
    confidence, top = found.probs.max(1)
    acted = confidence >= intervals.THRESHOLD
    seen = {
        "accuracy": float((top == 0).double().mean()),
        "nll": float(negative_log_likelihood(found.probs, label)),
        "brier": float(brier_score(found.probs, label)),
        "ece": float(calibration_error(found.probs, label)),
        intervals.RISK: float((top[acted] != 0).double().mean()),
    }
    for name, value in seen.items():
        assert intervals.truth(model)[name] == pytest.approx(value, abs=0.006), name
    assert torch.allclose(found.probs.sum(1), torch.ones(200_000, dtype=torch.float64))


def test_a_draw_judges_every_figure() -> None:
    found = intervals.hits(Model("mild", 0.0), Model("mild", 0.05), 100, seed=1, resamples=50)
    assert set(found) == set(intervals.FIGURES)


def test_the_command_counts_and_flags_what_lies_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ROWS": (60,), "PAIRS": intervals.PAIRS[:1], "BLOCK": 2}.items():
        monkeypatch.setattr(intervals, name, value)
    out = str(tmp_path / "out.json")
    assert intervals.intervals(["--draws", "4", "--out", out], ABOUT) == 0
    found = records.read(out).records
    assert len(found) == 2 * len(intervals.FIGURES)
    assert all(0 <= one.value <= 2 for one in found)  # type: ignore[operator]
    assert "Coverage with 60 rows" in capsys.readouterr().out
    assert intervals.intervals(["--draws", "4", "--out", out], ABOUT) == 0
    assert records.read(out).records == found
    with pytest.raises(InvalidArgumentError, match="--draws"):
        intervals.intervals(["--draws", "1"], ABOUT)


def test_a_share_outside_the_band_is_marked_unless_chance_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "ROWS", (60,))
    held = {"accuracy": 950, "nll": 900, "brier": 925, "ece": 1000, intervals.GAPS: 1000}
    options = {"rows": 60, "draws": 1000}
    found = [Record("intervals", "case", "", options, 0, name, value) for name, value in held.items()]
    [table] = intervals.tables_of(found)
    shown = {row[0]: row[1] for row in table.rows}
    assert shown["accuracy"] == "0.950"
    assert shown["nll"] == "0.900 *"
    assert shown["brier"] == "0.925"
    assert shown["ece"] == "1.000 *"
    assert shown[intervals.GAPS] == "1.000"
