"""The calibration error family against torchmetrics, uncertainty-calibration, netcal, scipy and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import calibration_error, equal_mass_bins
from moe_posterior.metrics.ece import expected_absolute


def overconfident(seed: int, rows: int = 500, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (2.5 * logits).softmax(1), target


def plain_loop(preds: Tensor, target: Tensor, bins: list[int], norm: str, debias: bool) -> float:
    """The definition, one bin at a time."""
    rows = [(max(p), float(p.index(max(p)) == y)) for p, y in zip(preds.tolist(), target.tolist(), strict=True)]
    total, worst = 0.0, 0.0
    for name in set(bins):
        members = [row for row, place in zip(rows, bins, strict=True) if place == name]
        n, accuracy = len(members), sum(right for _, right in members) / len(members)
        gap = accuracy - sum(confidence for confidence, _ in members) / n
        noise = accuracy * (1 - accuracy)
        worst = max(worst, abs(gap))
        if norm == "l2":
            correction = noise / (n - 1) if debias and n > 1 else 0.0
            total += n / len(rows) * (gap**2 - correction)
        elif debias and noise:
            std = math.sqrt(noise / n)
            total += n / len(rows) * (2 * abs(gap) - stats.foldnorm.mean(abs(gap) / std, scale=std))
        else:
            total += n / len(rows) * abs(gap)
    return worst if norm == "max" else math.sqrt(max(total, 0)) if norm == "l2" else max(total, 0)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 8, 15])
def test_equal_width_agrees_with_torchmetrics(norm: str, n_bins: int) -> None:
    preds, target = overconfident(0)
    expected = multiclass_calibration_error(preds, target, 4, n_bins, norm).item()
    assert calibration_error(preds, target, n_bins=n_bins, norm=norm).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize(("norm", "binning"), [("l1", "equal_mass"), ("l2", "equal_mass"), ("l2", "equal_width")])
def test_both_binnings_agree_with_a_plain_loop(norm: str, binning: str, debias: bool) -> None:
    preds, target = overconfident(1, rows=97)
    confidence = preds.amax(1)
    if binning == "equal_mass":
        sizes = [10] * 7 + [9] * 3  # 97 in 10 bins
        ranks = confidence.argsort().argsort().tolist()
        edges = [sum(sizes[: i + 1]) for i in range(10)]
        bins = [sum(rank >= edge for edge in edges) for rank in ranks]
    else:
        bins = [int(value * 10) for value in confidence.tolist()]
    ours = calibration_error(preds, target, n_bins=10, norm=norm, binning=binning, debias=debias).item()
    assert ours == pytest.approx(plain_loop(preds, target, bins, norm, debias), abs=1e-12)


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("debias", [False, True])
def test_equal_mass_agrees_with_the_package_of_kumar_et_al(norm: str, power: int, debias: bool) -> None:
    package = pytest.importorskip("calibration.utils")
    preds, target = overconfident(2, rows=600)
    confidence, correct = preds.amax(1).numpy(), (preds.argmax(1) == target).long().numpy()
    binned = package.bin(
        list(zip(confidence, correct, strict=True)), package.get_equal_bins(confidence.tolist(), num_bins=12)
    )
    if not debias:
        expected = package.plugin_ce(binned, power=power)
    elif norm == "l2":
        expected = package.unbiased_l2_ce(binned)
    else:
        expected = package.normal_debiased_ce(binned, power=1, resamples=20_000)
    ours = calibration_error(preds, target, n_bins=12, norm=norm, binning="equal_mass", debias=debias).item()
    assert ours == pytest.approx(expected, abs=5e-4 if debias and norm == "l1" else 1e-9)  # theirs is simulated


def test_equal_width_agrees_with_netcal() -> None:
    netcal = pytest.importorskip("netcal.metrics")
    preds, target = overconfident(3)
    confidence, correct = preds.amax(1), (preds.argmax(1) == target).long()
    expected = netcal.ECE(bins=10).measure(confidence.numpy(), correct.numpy())
    assert calibration_error(preds, target, n_bins=10).item() == pytest.approx(float(expected), abs=1e-6)


def test_debiasing_takes_most_of_the_noise_off_calibrated_and_miscalibrated_predictions() -> None:
    generator = torch.Generator().manual_seed(4)
    for shift in (0.0, 0.1):  # of every bin
        plain, debiased = [], []
        for _ in range(300):
            confidence = 0.6 + 0.4 * torch.rand(300, generator=generator, dtype=torch.float64)
            correct = torch.bernoulli(confidence - shift, generator=generator).long()
            for found, flag in ((plain, False), (debiased, True)):
                value = calibration_error(confidence, correct, binning="equal_mass", norm="l2", debias=flag)
                found.append(value.square().item())
        off = [abs(sum(found) / 300 - shift**2) for found in (plain, debiased)]
        assert off[1] < 0.5 * off[0], "the clamp at 0 leaves some bias where the truth is 0"


@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), min_size=1, max_size=40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_equal_mass_bins_keep_ties_together_and_the_order_of_confidences(values: list[float], n_bins: int) -> None:
    confidence = torch.tensor(values)
    bins = equal_mass_bins(confidence, n_bins)
    order = confidence.argsort()
    assert (bins[order].diff() >= 0).all()
    assert 0 <= bins.min() <= bins.max() < n_bins
    for value in confidence.unique():
        assert len(bins[confidence == value].unique()) == 1


def test_the_order_of_rows_does_not_matter_even_with_ties() -> None:
    generator = torch.Generator().manual_seed(5)
    confidence = torch.randint(0, 8, (200,), generator=generator) / 8
    correct = torch.randint(0, 2, (200,), generator=generator)
    shuffle = torch.randperm(200, generator=generator)
    first = calibration_error(confidence, correct, binning="equal_mass", debias=True)
    torch.testing.assert_close(
        first, calibration_error(confidence[shuffle], correct[shuffle], binning="equal_mass", debias=True)
    )


@given(st.floats(-3, 3), st.floats(0.01, 3))
def test_the_folded_normal_mean_agrees_with_scipy(mean: float, std: float) -> None:
    ours = expected_absolute(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)).item()
    assert ours == pytest.approx(stats.foldnorm.mean(abs(mean) / std, scale=std), rel=1e-9)


def test_no_predictions_give_nan_and_one_prediction_its_gap() -> None:
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for binning in ("equal_width", "equal_mass"):
        for debias in (False, True):
            assert calibration_error(*empty, binning=binning, debias=debias).isnan()
        one = calibration_error(torch.tensor([0.75]), torch.tensor([1]), binning=binning)
        assert one.item() == 0.25


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
@pytest.mark.parametrize("rows", [1, 2, 12, 15])
def test_where_every_bin_holds_one_row_the_debiased_value_is_the_plain_one(rows: int, binning: str, norm: str) -> None:
    confidence = (torch.arange(rows, dtype=torch.float64) + 0.5) / 15  # also one in each bin of equal width
    for correct in (torch.zeros(rows), torch.ones(rows), torch.arange(rows) % 2):
        plain, debiased = (
            calibration_error(confidence, correct.long(), binning=binning, norm=norm, debias=flag)
            for flag in (False, True)
        )
        assert debiased.item() == pytest.approx(plain.item(), abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_dozen_confident_mistakes_are_not_called_calibrated(norm: str) -> None:
    confidence, wrong = torch.linspace(0.95, 0.99, 12), torch.zeros(12, dtype=torch.int64)
    for binning in ("equal_width", "equal_mass"):
        assert calibration_error(confidence, wrong, binning=binning, norm=norm, debias=True) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binning": "kde"}, "binning must be one of .*got 'kde'"),
        ({"norm": "max", "debias": True}, "norm must be 'l1' or 'l2' to be debiased; got 'max'"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"n_bins": 0}, "n_bins must be"),
    ],
)
def test_a_bad_knob_is_named(change: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        calibration_error(torch.tensor([0.5]), torch.tensor([1]), **change)
