"""Figures of merit against plain loops and hand-made cases."""

import math

import pytest
import torch

from moe_posterior.benchmarks.routing import measures


def looped_ece(confidence: list[float], outcome: list[float], n_bins: int) -> float:
    total = 0.0
    for b in range(n_bins):
        rows = [i for i, value in enumerate(confidence) if min(int(value * n_bins), n_bins - 1) == b]
        total += abs(sum(outcome[i] - confidence[i] for i in rows))
    return total / len(confidence)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("count", [1, 63, 100])
def test_calibration_error_equals_a_loop_over_bins(n_bins: int, count: int, generator: torch.Generator) -> None:
    confidence = torch.rand(count, dtype=torch.float64, generator=generator)
    outcome = torch.rand(count, dtype=torch.float64, generator=generator).round()
    expected = looped_ece(confidence.tolist(), outcome.tolist(), n_bins)
    assert measures.calibration_error(confidence, outcome, n_bins) == pytest.approx(expected)


def test_calibration_error_of_nothing_is_nan() -> None:
    assert math.isnan(measures.calibration_error(torch.zeros(0), torch.zeros(0)))
    assert math.isnan(measures.debiased_calibration_error(torch.zeros(0), torch.zeros(0)))


def test_noise_floor_is_what_a_calibrated_router_shows(generator: torch.Generator) -> None:
    confidence = 0.5 + 0.5 * torch.rand(1000, dtype=torch.float64, generator=generator)
    errors = []
    for _ in range(50):
        outcome = torch.bernoulli(confidence, generator=generator)
        errors.append(measures.calibration_error(confidence, outcome))
    assert measures.noise_floor(confidence) == pytest.approx(sum(errors) / 50, abs=0.004)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.2])
def test_debiasing_brings_the_error_nearer_to_the_truth(shift: float, generator: torch.Generator) -> None:
    plain, debiased = [], []
    for _ in range(40):
        confidence = 0.4 + 0.4 * torch.rand(400, dtype=torch.float64, generator=generator)
        outcome = torch.bernoulli(confidence - shift, generator=generator)
        plain.append(measures.calibration_error(confidence, outcome))
        debiased.append(measures.debiased_calibration_error(confidence, outcome))
    bias = [abs(sum(values) / 40 - shift) for values in (debiased, plain)]
    assert bias[0] <= bias[1] + 0.003
    assert bias[0] < 0.035


def test_next_windows_equal_slices(generator: torch.Generator) -> None:
    values = torch.rand(60, dtype=torch.float64, generator=generator)
    windows = measures.next_windows(values, window=7)
    assert windows.tolist() == pytest.approx([float(values[t : t + 7].mean()) for t in range(54)])
    assert not len(measures.next_windows(values, window=61))


def test_recovery_counts_the_queries_of_the_dip() -> None:
    after = torch.cat([torch.zeros(30), torch.ones(100)])
    assert measures.recovery(after, 0.85) == 23  # of the 50 queries from 23 on, 7 fail: 86 %
    assert measures.recovery(torch.ones(100)) == 0
    assert measures.recovery(torch.zeros(100)) == 100


def test_recovery_can_be_measured_against_the_oracle() -> None:
    oracle = torch.full((200,), 0.8, dtype=torch.float64)
    assert measures.recovery(torch.full((200,), 0.7), 0.85 * oracle) == 0
    assert measures.recovery(torch.full((200,), 0.6), 0.85 * oracle) == 200


def looped_avoidance(
    chosen: list[int], affected: list[bool], expert: int, window: int, share: float
) -> tuple[int, int]:
    rows = [t for t, flag in enumerate(affected) if flag]
    for first in range(len(rows) - window + 1):
        picked = sum(chosen[t] == expert for t in rows[first : first + window])
        if picked <= share * window:
            return (0 if first == 0 else rows[first - 1] + 1), first
    return len(chosen), len(rows)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_queries_until_avoided_equal_a_loop(share: float, generator: torch.Generator) -> None:
    affected = torch.rand(200, generator=generator) < 0.6
    chosen = (torch.rand(200, generator=generator) > torch.linspace(0.9, -0.3, 200)).long()
    expected = looped_avoidance(chosen.tolist(), affected.tolist(), 0, 20, share)
    assert measures.queries_until_avoided(chosen, affected, 0, window=20, share=share) == expected


def test_an_expert_that_is_never_avoided_costs_the_whole_stream() -> None:
    affected = torch.tensor([True, False] * 60)
    assert measures.queries_until_avoided(torch.zeros(120, dtype=torch.int64), affected, 0) == (120, 60)
