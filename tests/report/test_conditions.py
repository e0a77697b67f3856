"""Operating conditions: pass and fail only where the rows say so, judged together."""

import pytest
import torch

from moe_posterior import InvalidArgumentError
from moe_posterior.metrics import calibration_error, calibration_interval
from moe_posterior.prediction import Prediction
from moe_posterior.report import evaluate_predictions
from moe_posterior.report.conditions import FAIL, PASS, UNSURE, condition_name


def binary(n: int, confidence: float, accuracy: float, **where) -> Prediction:
    """``n`` rows of one displayed confidence, a share of ``accuracy`` of them right."""
    right = torch.arange(n) < round(accuracy * n)
    probs = torch.tensor([[confidence, 1 - confidence]], dtype=torch.float64).repeat(n, 1)
    return Prediction(probs, target=(~right).long(), arm="a", **where)


def judged(predictions: list[Prediction], subsets: dict | None = None, **settings) -> dict:
    report = evaluate_predictions(predictions, subsets or {}, resamples=9, baseline="a", **settings)
    return {condition_name(one): one for one in report["conditions"]}


def test_a_good_a_bad_and_a_small_set_pass_fail_and_stay_undecided() -> None:
    found = judged([
        binary(4000, 0.8, 0.8),
        binary(4000, 0.8, 0.6, shift="fog", severity=1),
        binary(40, 0.8, 0.8, shift="rain", severity=1),
    ])  # fmt: skip
    assert {name: one["verdict"] for name, one in found.items()} == {
        "clean": PASS,
        "fog, severity 1": FAIL,
        "rain, severity 1": UNSURE,
    }


def test_a_tolerance_moves_the_verdict() -> None:
    rows = [binary(4000, 0.8, 0.7)]
    assert judged(rows, tolerance=0.05)["clean"]["verdict"] == FAIL
    assert judged(rows, tolerance=0.2)["clean"]["verdict"] == PASS


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.5, float("nan")])
def test_a_tolerance_outside_its_range_is_refused(tolerance: float) -> None:
    with pytest.raises(InvalidArgumentError, match="tolerance"):
        judged([binary(10, 0.8, 0.8)], tolerance=tolerance)


def test_errors_are_those_of_the_rows_and_intervals_widen_with_the_family() -> None:
    shifted = [binary(500, 0.8, 0.75, shift="fog", severity=level) for level in (1, 2, 3, 4, 5)]
    found = judged([binary(500, 0.8, 0.75), *shifted])
    stored, fog = found["clean"], found["fog, severity 3"]
    alone = calibration_interval(shifted[0].probs, shifted[0].target)
    assert (stored["comparisons"], fog["comparisons"], fog["level"]) == (1, 5, pytest.approx(0.99))
    assert stored["ece"] == pytest.approx(float(calibration_error(shifted[0].probs, shifted[0].target, debias=True)))
    assert stored["interval"] == [alone.low, alone.high]
    assert fog["interval"][1] > stored["interval"][1]
    assert stored["gap"] == pytest.approx(0.05)
    assert fog["gap_interval"][0] < stored["gap_interval"][0] < 0.05 < stored["gap_interval"][1]


def test_groups_are_a_family_of_their_own_and_empty_ones_are_left_out() -> None:
    mask = torch.arange(1000) < 300
    found = judged([binary(1000, 0.8, 0.8)], {"first": mask, "nobody": torch.zeros(1000, dtype=torch.bool)})
    assert list(found) == ["clean", "first on clean"]
    assert found["first on clean"]["n"] == 300
    assert found["first on clean"]["verdict"] == FAIL  # the first rows are all right


def test_calibrated_sets_rarely_fail_however_many_are_judged() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(10):
        sets = []
        for level in range(11):
            confidence = 0.5 + 0.5 * torch.rand(200, generator=generator, dtype=torch.float64)
            right = torch.rand(200, generator=generator, dtype=torch.float64) < confidence
            probs = torch.stack([confidence, 1 - confidence], dim=1)
            where = {"shift": "fog", "severity": level} if level else {}
            sets.append(Prediction(probs, target=(~right).long(), arm="a", **where))
        wrong += any(one["verdict"] == FAIL for one in judged(sets, tolerance=0.001).values())
    assert wrong <= 3  # at most 10 % each over two families: more than three of ten reports once in a hundred
