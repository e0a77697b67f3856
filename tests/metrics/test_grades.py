"""Graded outcomes in [0, 1] beside confidences: what a router learns from, its metrics take."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    GroupedCalibrationError,
    aurc,
    brier_decomposition,
    brier_score,
    calibration_error,
    configuration_calibration,
    configuration_ids,
    cross_fitted_rce_curve,
    excess_aurc,
    grouped_calibration_error,
    negative_log_likelihood,
    rce_curve,
    reliability_curve,
    risk_coverage,
    smooth_calibration_error,
)

N = 400


def world(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidences, and grades of thirds that they overstate."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(N, generator=generator, dtype=torch.float64)
    grade = torch.binomial(torch.full((N,), 3.0, dtype=torch.float64), 0.8 * confidence, generator=generator) / 3
    return confidence, grade


def configurations(count: int):
    return configuration_ids(torch.arange(count) % 4, torch.zeros(count, 1, dtype=torch.int64), 1, num_clusters=4)


def groups(count: int) -> Tensor:
    return torch.arange(count) % 3


def streamed(confidence: Tensor, target: Tensor) -> Tensor:
    metric = GroupedCalibrationError(num_groups=3)
    for rows in torch.arange(len(confidence)).split(64):
        metric.update(confidence[rows], target[rows], groups(len(confidence))[rows])
    return torch.stack(list(metric.compute().values()))


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        f"{norm}, {binning}{', debiased' * debias}": lambda c, t, n=norm, b=binning, d=debias: calibration_error(
            c, t, norm=n, binning=b, debias=d
        )
        for norm in ("l1", "l2", "max")
        for binning in ("equal_width", "equal_mass")
        for debias in ((False, True) if norm != "max" else (False,))
    },
    "smooth": smooth_calibration_error,
    "grouped": lambda c, t: grouped_calibration_error(c, t, groups(len(c)), 3).calibration_error,
    "streamed": streamed,
    "reliability": lambda c, t: reliability_curve(c, t).accuracy,
    "brier": brier_score,
    "log loss": negative_log_likelihood,
    "decomposition": lambda c, t: torch.stack(list(brier_decomposition(c, t))),
    "configurations": lambda c, t: configuration_calibration(c, t, configurations(len(c))).gap,
    "reweighted": lambda c, t: rce_curve(c, t, configurations(len(c)), [0.1]).value,
    "cross-fitted": lambda c, t: cross_fitted_rce_curve(c, t, configurations(len(c)), [0.1], splits=2),
    "risk": lambda c, t: risk_coverage(c, t)[1],
    "aurc": aurc,
    "excess aurc": excess_aurc,
}
every = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@every
def test_grades_of_0_and_1_are_right_and_wrong_whatever_their_type(metric) -> None:
    confidence, grade = world()
    right = grade > 0.5
    expected = metric(confidence, right.long())
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        torch.testing.assert_close(metric(confidence, right.to(dtype)), expected, rtol=0, atol=0, equal_nan=True)


@every
def test_grades_in_between_are_accepted_and_move_the_value(metric) -> None:
    confidence, grade = world()
    value = metric(confidence, grade)
    assert value.isfinite().any()
    assert not torch.equal(value.nan_to_num(), metric(confidence, grade.round()).nan_to_num())


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.25, 1.25])
def test_what_is_no_grade_is_refused(metric, bad: float) -> None:
    confidence, grade = world()
    grade[7] = bad
    with pytest.raises(InvalidArgumentError, match=r"must .* in \[0, 1\]"):
        metric(confidence, grade)


@pytest.mark.parametrize("metric", [brier_score, negative_log_likelihood, calibration_error])
def test_grades_are_no_classes(metric) -> None:
    with pytest.raises(InvalidArgumentError, match="target must be integer"):
        metric(torch.full((4, 2), 0.5), torch.tensor([0.0, 1.0, 0.5, 0.0]))


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_a_bins_error_is_mean_confidence_against_mean_grade(norm: str) -> None:
    confidence, grade = world()
    gaps, shares = [], []
    for low in range(10):
        rows = (confidence * 10).long() == low
        if rows.any():
            gaps.append(abs(sum(grade[rows].tolist()) - sum(confidence[rows].tolist())) / int(rows.sum()))
            shares.append(int(rows.sum()) / N)
    pairs = list(zip(gaps, shares, strict=True))
    expected = {"l1": sum(g * s for g, s in pairs), "l2": math.sqrt(sum(g * g * s for g, s in pairs)), "max": max(gaps)}
    assert calibration_error(confidence, grade, n_bins=10, norm=norm).item() == pytest.approx(expected[norm], rel=1e-9)


def test_a_half_is_as_one_right_and_one_wrong_answer() -> None:
    confidence, grade = world()
    grade = (2 * grade).round() / 2  # 0, a half or 1
    twice = torch.cat([confidence, confidence])
    answers = torch.cat([grade.ceil(), grade.floor()]).long()
    for norm in ("l1", "l2", "max"):
        graded, split = (calibration_error(c, t, norm=norm) for c, t in ((confidence, grade), (twice, answers)))
        torch.testing.assert_close(graded, split)
    torch.testing.assert_close(negative_log_likelihood(confidence, grade), negative_log_likelihood(twice, answers))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_debiasing_takes_off_the_noise_of_grades_not_that_of_coin_flips(norm: str) -> None:
    confidence = torch.full((40,), 0.55)
    steady = torch.full((40,), 0.5)  # no noise at all
    value = calibration_error(confidence, steady, norm=norm, debias=True).item()
    assert value == pytest.approx(0.05, abs=1e-6)
    coins = torch.arange(40) % 2
    assert calibration_error(confidence, coins, norm=norm, debias=True).item() < 0.04


def test_confidences_score_as_their_two_class_probabilities_do() -> None:
    confidence, grade = world()
    right = (grade > 0.5).long()
    both = torch.stack([1 - confidence, confidence], dim=1)
    torch.testing.assert_close(2 * brier_score(confidence, right, "none"), brier_score(both, right, "none"))
    torch.testing.assert_close(
        negative_log_likelihood(confidence, right, "none"), negative_log_likelihood(both, right, "none")
    )
    torch.testing.assert_close(brier_decomposition(confidence, grade).total, brier_score(confidence, grade))
