"""The script of coverage and level: true errors are what it says, tables and files hold what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_posterior.benchmarks import coverage
from moe_posterior.errors import InvalidArgumentError


@pytest.mark.parametrize("spread", coverage.SPREADS)
def test_a_shift_gives_the_error_that_was_asked_for(spread: str) -> None:
    shift = coverage.shift_of(spread, 0.05)
    confidence = coverage.SPREADS[spread](np.random.default_rng(1), 200_000)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [np.mean((bins == k) * (confidence - (confidence - shift).clip(0))) for k in range(15)]
    assert np.abs(gaps).sum() == pytest.approx(0.05, abs=5e-4)
    assert coverage.shift_of(spread, 0.0) == 0


def test_both_tables_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ROWS": (60,), "ERRORS": (0.0,), "PAIR_ROWS": (60,), "PAIRS": coverage.PAIRS[:2]}.items():
        monkeypatch.setattr(coverage, name, value)
    assert coverage.main(["--runs", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "coverage.json").read_text())
    assert printed.strip() in (tmp_path / "coverage.md").read_text()
    assert len(found["coverage"]) == 3
    assert len(found["comparisons"]) == 2
    for one in found["coverage"]:
        assert one["covered"] + one["below"] + one["above"] == pytest.approx(1)
        assert one["low"] <= one["value"] <= one["high"]
    assert "mild, 0.00" in printed
    with pytest.raises(InvalidArgumentError, match="--runs must be at least 1; got 0"):
        coverage.main(["--runs", "0"])
