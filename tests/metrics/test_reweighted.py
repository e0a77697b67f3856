"""RCE(ρ) against scipy's optimisers, and its estimators against distributions whose truth is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.special import rel_entr
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    Configurations,
    configuration_calibration,
    cross_fitted_rce_curve,
    debiased_gap,
    rce_curve,
    reweighted_calibration_error,
)


def dual_value(size: np.ndarray, share: np.ndarray, rho: float) -> float:
    """min over t > 0 of (ρ + log Σ p exp(t size)) / t: convex duality, no primal solution needed."""

    def objective(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        peak = size.max()
        return (rho + math.log(float((share * np.exp(tilt * (size - peak))).sum()))) / tilt + peak

    grid = np.linspace(-12, 18, 3001)
    start = grid[int(np.argmin([objective(point) for point in grid]))]
    found = optimize.minimize_scalar(objective, bounds=(start - 0.02, start + 0.02), method="bounded")
    return float(min(found.fun, objective(start)))


gaps = st.lists(st.floats(-1, 1).map(lambda value: round(value, 3)), min_size=2, max_size=8)


@given(gaps, st.integers(0, 2**31), st.sampled_from([0.001, 0.05, 0.3, 1.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_the_value_agrees_with_the_dual_and_its_distribution_is_feasible(gap: list, seed: int, rho: float) -> None:
    share = np.random.default_rng(seed).dirichlet(np.ones(len(gap))) + 1e-3
    share /= share.sum()
    value, worst = reweighted_calibration_error(torch.tensor(gap), torch.tensor(share), rho)
    assert worst.sum().item() == pytest.approx(1)
    assert (worst >= 0).all()
    assert rel_entr(worst.numpy(), share).sum() <= rho + 1e-9
    size = np.abs(np.float32(gap).astype(float))
    assert value.item() == pytest.approx(float((worst.numpy() * size).sum()))
    assert value.item() == pytest.approx(dual_value(size, share, rho), abs=2e-6)


def test_the_worst_distribution_agrees_with_a_constrained_optimiser() -> None:
    gap, share, rho = np.array([0.02, -0.1, 0.3, 0.15]), np.array([0.5, 0.2, 0.05, 0.25]), 0.2
    found = optimize.minimize(
        lambda q: -(q * np.abs(gap)).sum(),
        share,
        bounds=[(1e-9, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: rho - rel_entr(q, share).sum()},
        ],
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert found.success
    value, worst = reweighted_calibration_error(torch.tensor(gap), torch.tensor(share), rho)
    assert value.item() == pytest.approx(-found.fun, abs=1e-6)
    assert worst.tolist() == pytest.approx(found.x.tolist(), abs=1e-4)


@given(gaps)
def test_it_rises_with_the_radius_from_the_mean_to_the_largest_gap(gap: list) -> None:
    size = torch.tensor(gap, dtype=torch.float64)
    share = torch.full((len(gap),), 1 / len(gap), dtype=torch.float64)
    values = [reweighted_calibration_error(size, share, rho)[0].item() for rho in (0, 0.01, 0.1, 1, 10, math.inf)]
    assert values == sorted(values) or max(np.diff(values) * -1) < 1e-12
    assert values[0] == pytest.approx(size.abs().mean().item())
    assert values[-1] == pytest.approx(size.abs().max().item())


def test_a_configuration_that_never_occurred_gets_no_weight_whatever_its_gap() -> None:
    gap, share = torch.tensor([0.1, torch.nan, 0.2]), torch.tensor([3.0, 0.0, 1.0])
    value, worst = reweighted_calibration_error(gap, share, math.inf)
    assert worst.tolist() == [0, 0, 1]
    assert value.item() == pytest.approx(0.2)
    value, unmoved = reweighted_calibration_error(gap, share, 0.0)
    assert value.item() == pytest.approx(0.125)
    assert unmoved.tolist() == [0.75, 0, 0.25], "exactly P at radius 0"


def test_nearly_equal_maxima_do_not_stall_the_search() -> None:
    gap = torch.tensor([0.3, 0.3 - 1e-15, 0.1], dtype=torch.float64)
    value, worst = reweighted_calibration_error(gap, torch.tensor([1e-6, 0.5, 0.5]), 0.6931)
    assert 0.2999 < value.item() <= 0.3
    assert worst.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.ones(3), 0.1), "one shape"),
        ((torch.zeros(2), torch.zeros(2), 0.1), "share must be non-negative"),
        ((torch.zeros(2), torch.tensor([1.0, -0.1]), 0.1), "share must be non-negative"),
        ((torch.zeros(2), torch.ones(2), -0.1), "rho must be at least 0; got -0.1"),
        ((torch.zeros(2), torch.ones(2), math.nan), "rho must be at least 0; got nan"),
        ((torch.tensor([0.1, torch.nan]), torch.ones(2), 0.1), "gap must be finite"),
    ],
)
def test_a_bad_argument_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        reweighted_calibration_error(*arguments)


def calibrated(seed: int, counts: list[int], offset: list[float]) -> tuple[Tensor, Tensor, Configurations]:
    """Confidences whose configurations are off by a known amount."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    confidence = 0.7 + 0.2 * torch.rand(len(ids), generator=generator, dtype=torch.float64)
    truth = confidence + torch.tensor(offset, dtype=torch.float64)[ids]
    correct = torch.bernoulli(truth, generator=generator).long()
    table = torch.stack([torch.zeros(len(counts)).long(), torch.arange(len(counts))], dim=1)
    return confidence, correct, Configurations(ids, table)


def test_the_curve_leaves_small_configurations_out_and_says_how_much_it_covers() -> None:
    preds, target, configurations = calibrated(0, [50, 30, 5], [0.0, -0.2, -0.6])
    curve = rce_curve(preds, target, configurations, [0.0, 0.2, math.inf], min_count=20, debias=False)
    result = configuration_calibration(preds, target, configurations, min_count=1)
    gap = result.gap[:2].abs()
    assert curve.covered == pytest.approx(80 / 85)
    assert curve.worst[:, 2].tolist() == [0, 0, 0]
    assert curve.value[0].item() == pytest.approx((50 * gap[0] + 30 * gap[1]).item() / 80)
    assert curve.value[2].item() == pytest.approx(gap.max().item())
    assert curve.value[1].item() == pytest.approx(dual_value(gap.numpy(), np.array([5, 3]) / 8, 0.2), abs=2e-6)


def test_with_nothing_to_judge_the_curve_is_nan() -> None:
    preds, target, configurations = calibrated(0, [5, 5], [0.0, 0.0])
    curve = rce_curve(preds, target, configurations, [0.0, 1.0], min_count=20)
    assert curve.value.isnan().all()
    assert curve.covered == 0.0
    assert cross_fitted_rce_curve(preds, target, configurations, [0.0, 1.0], min_count=20).isnan().all()


def test_the_debiased_gap_agrees_with_a_simulation_of_its_noise() -> None:
    gap, accuracy, count = 0.05, 0.9, 40
    p = (count * accuracy + 1) / (count + 2)
    noise = np.random.default_rng(0).normal(0, math.sqrt(p * (1 - p) / count), 400_000)
    expected = max(0.0, 2 * gap - np.abs(gap + noise).mean())
    ours = debiased_gap(torch.tensor([-gap, gap]), torch.tensor([accuracy] * 2), torch.tensor([count] * 2))
    assert ours.tolist() == pytest.approx([expected] * 2, abs=3e-4)
    assert debiased_gap(torch.tensor([0.2]), torch.tensor([1.0]), torch.tensor([3])).item() < 0.2, (
        "all right, yet noisy"
    )


@pytest.mark.parametrize("offset", [0.0, -0.15])
def test_debiased_curves_lie_nearer_the_truth_than_plain_ones_and_cross_fitting_below_it(offset: float) -> None:
    counts, rhos = [40] * 30, [0.0, 0.5, 3.0]
    offsets = [offset] * 5 + [0.0] * 25
    share = torch.full((30,), 1 / 30, dtype=torch.float64)
    truth = torch.stack([reweighted_calibration_error(torch.tensor(offsets), share, rho)[0] for rho in rhos])
    plain, debiased, crossed = [], [], []
    for seed in range(40):
        data = calibrated(seed, counts, offsets)
        plain.append(rce_curve(*data, rhos, debias=False).value)
        debiased.append(rce_curve(*data, rhos, debias=True).value)
        crossed.append(cross_fitted_rce_curve(*data, rhos, splits=4, seed=seed))
    means = [torch.stack(found).mean(0) for found in (plain, debiased, crossed)]
    assert (means[0] - truth > 0.02).all()
    assert ((means[1] - truth).abs() < (means[0] - truth)).all()
    assert (means[2] < truth + 0.01).all()
    if offset:
        assert (means[2] > 0.2 * truth).all()


def test_cross_fitting_agrees_with_a_loop_over_its_halves_and_repeats_with_its_seed() -> None:
    preds, target, configurations = calibrated(1, [21, 40], [0.0, -0.3])
    once = cross_fitted_rce_curve(preds, target, configurations, [0.0, math.inf], splits=3, seed=7)
    assert once.equal(cross_fitted_rce_curve(preds, target, configurations, [0.0, math.inf], splits=3, seed=7))
    assert not once.equal(cross_fitted_rce_curve(preds, target, configurations, [0.0, math.inf], splits=3, seed=8))
    constant = torch.full((61,), 0.75, dtype=torch.float64)  # no noise: both halves see the gap
    right = torch.ones(61, dtype=torch.int64)
    result = cross_fitted_rce_curve(constant, right, configurations, [0.0, 1.0], splits=1)
    assert result.tolist() == pytest.approx([0.25, 0.25])


def test_cross_fitting_refuses_configurations_that_cannot_be_halved() -> None:
    with pytest.raises(InvalidArgumentError, match="min_count must be at least 2 and splits at least 1; got 1 and 20"):
        cross_fitted_rce_curve(*calibrated(0, [5], [0.0]), [0.1], min_count=1)
