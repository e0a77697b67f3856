"""Intervals, comparisons and the noise floor against simulation, numpy and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    calibration_difference,
    calibration_error,
    calibration_interval,
    holm,
    noise_floor,
)
from moe_posterior.metrics.gaps import gap_sums
from moe_posterior.metrics.inference import interval_of_sums
from moe_posterior.metrics.inversion import GapTest

SPREADS = {
    "sharp": lambda rng, n: rng.beta(30, 1, n),
    "spread": lambda rng, n: rng.uniform(0.3, 1, n),
    "mild": lambda rng, n: rng.beta(6, 1.5, n),
}


def drawn(seed: int, rows: int, spread: str = "mild", shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Confidences and labels of a model that is right less often than it says by ``shift``."""
    rng = np.random.default_rng(seed)
    confidence = SPREADS[spread](rng, rows)
    return torch.tensor(confidence), torch.tensor(rng.random(rows) < np.clip(confidence - shift, 0, 1)).long()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("rows", [20, 300])
def test_the_floor_is_the_mean_plain_error_of_labels_drawn_from_the_confidences(rows: int, spread: str) -> None:
    confidence, _ = drawn(1, rows, spread)
    rng = np.random.default_rng(2)
    plain = [
        calibration_error(confidence, torch.tensor(rng.random(rows) < confidence.numpy()).long()).item()
        for _ in range(600)
    ]
    error = np.std(plain) / len(plain) ** 0.5
    assert noise_floor(confidence).item() == pytest.approx(np.mean(plain), abs=4 * error + 0.01 * np.mean(plain))


def test_the_floor_is_exact_for_one_bin_and_for_bins_of_one_row() -> None:
    binomial = sum(
        abs(k - 5 * 0.75) * 0.75**k * 0.25 ** (5 - k) * len(list(itertools.combinations(range(5), k))) for k in range(6)
    )
    assert noise_floor(torch.full((5,), 0.75)).item() == pytest.approx(binomial / 5)
    apart = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)  # E|c − correct| = 2 c (1 − c)
    assert noise_floor(apart).item() == pytest.approx((2 * apart * (1 - apart)).mean().item())
    assert noise_floor(torch.ones(4)).item() == noise_floor(torch.zeros(4)).item() == 0
    assert noise_floor(torch.zeros(0)).isnan()


@pytest.mark.parametrize("copies", [1, 3])
def test_joint_sums_are_those_of_a_table_of_rows_by_bins(copies: int) -> None:
    """Two arms, the first on two sets, against a dense numpy table."""
    sets = [drawn(seed, 60, spread) for seed, spread in ((1, "mild"), (2, "spread"), (3, "sharp"))]
    rows = torch.arange(60) // copies
    sums = gap_sums([sets[:2], sets[2:]], 15, rows)
    table = np.zeros((60 // copies, 45))
    for index, (confidence, correct) in enumerate(sets):
        for row, (said, seen) in enumerate(zip(confidence.tolist(), correct.tolist(), strict=True)):
            table[row // copies, 15 * index + min(int(said * 15), 14)] += said - seen
    used = (table != 0).any(0)
    weights = np.repeat([1 / 120, 1 / 120, 1 / 60], 15)[used]
    table = table[:, used]
    np.testing.assert_allclose(sums.gap, table.sum(0) * weights, atol=1e-12)
    products = table.T @ table
    scale = np.sqrt(np.diag(products))
    np.testing.assert_allclose(sums.correlation, products / scale / scale[:, None], atol=1e-12)
    assert sums.rows == 60 // copies
    for arm in (0, 1):
        assert sums.share[sums.arm == arm].sum().item() == pytest.approx(1)
    if copies == 1:
        np.testing.assert_allclose(sums.inflation, 1, atol=1e-12)


def test_drawn_gaps_vary_as_those_of_redrawn_rows() -> None:
    confidence, correct = drawn(0, 2000, "spread", 0.1)
    test = GapTest.start(gap_sums([[(confidence, correct)]], 15), 4096, 0)
    truth = test.even([0.1])
    found = test.drawn(truth[None])[0].numpy()
    rng = np.random.default_rng(1)
    tables = []
    for _ in range(1500):
        rows = rng.integers(2000, size=2000)
        said = confidence.numpy()[rows]
        place = np.minimum((said * 15).astype(int), 14)
        tilt = (truth / test.sums.share).numpy()  # gaps of bins 4 to 14
        right = rng.random(2000) < np.clip(said - tilt[place - 4], 0, 1)
        tables.append(np.bincount(place, weights=said - right, minlength=15)[4:] / 2000)
    np.testing.assert_allclose(found.mean(0), np.mean(tables, 0), atol=6e-4)
    np.testing.assert_allclose(found.std(0), np.std(tables, 0), rtol=0.1)
    np.testing.assert_allclose(np.abs(found).sum(1).std(), np.abs(tables).sum(1).std(), rtol=0.1)


@pytest.mark.parametrize(("rows", "spread", "shift"), [(100, "mild", 0.0), (300, "sharp", 0.05), (300, "spread", 0.15)])
def test_an_interval_covers_the_true_error(rows: int, spread: str, shift: float) -> None:
    confidence, _ = drawn(99, 400_000, spread)
    truth = (
        np.abs(confidence - (confidence - shift).clamp(min=0)).mean().item()
    )  # one sign: the sum over bins is the mean
    found = [calibration_interval(*drawn(seed, rows, spread, shift), draws=256) for seed in range(60)]
    assert sum(one.low <= truth <= one.high for one in found) >= 51, "60 at 95 %: fewer than 51 once in 2,000 times"
    assert all(one.low <= one.value <= one.high for one in found)
    if shift == 0:
        assert np.mean([one.plain for one in found]) == pytest.approx(np.mean([one.floor for one in found]), rel=0.1)
        assert np.mean([one.value for one in found]) < 0.8 * np.mean([one.plain for one in found])


@pytest.mark.parametrize("rows", [300, 1000])
def test_of_two_calibrated_models_neither_the_sharp_nor_the_spread_one_wins(rows: int) -> None:
    won = {"sharp": 0, "spread": 0}
    for seed in range(60):
        found = calibration_difference(drawn(seed, rows, "sharp"), drawn(1000 + seed, rows, "spread"), draws=256)
        won["sharp"] += found.high < 0
        won["spread"] += found.low > 0
        assert (found.p_value < 0.05) <= (found.low > 0 or found.high < 0)
    assert max(won.values()) <= 6, "60 at 2.5 %: more than 6 once in 1,000 times"


def test_a_model_that_is_truly_worse_is_found() -> None:
    won = 0
    for seed in range(20):
        confidence, correct = drawn(seed, 1000)
        worse = torch.minimum(confidence + 0.1, torch.ones(()))
        won += calibration_difference((worse, correct), (confidence, correct), draws=256).low > 0
    assert won >= 15


def test_a_model_does_not_differ_from_itself_and_sides_are_alike() -> None:
    first, second = drawn(0, 500), drawn(1, 500, "spread", 0.2)
    same = calibration_difference(first, first)
    assert same == (0, 0, 0, 1)
    there, back = calibration_difference(first, second), calibration_difference(second, first)
    assert there.value == -back.value
    assert [there.low, there.high] == pytest.approx([-back.high, -back.low], abs=0.01)


@pytest.mark.parametrize("spread", SPREADS)
def test_an_estimate_is_the_debiased_error_and_depends_on_nothing_but_the_rows(spread: str) -> None:
    confidence, correct = drawn(3, 400, spread, 0.03)
    state = torch.random.get_rng_state()
    found = calibration_interval(confidence, correct)
    assert torch.random.get_rng_state().equal(state)
    assert found.value == pytest.approx(calibration_error(confidence, correct, debias=True).item(), abs=1e-12)
    assert found.plain == pytest.approx(calibration_error(confidence, correct).item(), abs=1e-12)
    assert found.floor == pytest.approx(noise_floor(confidence).item(), abs=1e-12)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert calibration_interval(confidence[order], correct[order]) == pytest.approx(found, abs=1e-9)
    assert calibration_interval(confidence.tolist(), correct.numpy()) == pytest.approx(found, abs=1e-9)
    narrow, wide = (calibration_interval(confidence, correct, level=level) for level in (0.5, 0.99))
    assert wide.low <= found.low <= narrow.low <= narrow.high <= found.high <= wide.high


def test_copies_of_rows_do_not_narrow_an_interval_nor_lower_the_floor() -> None:
    confidence, correct = drawn(4, 200, "spread", 0.1)
    once = calibration_interval(confidence, correct)
    rows = torch.arange(200).repeat(20)
    often = calibration_interval(confidence.repeat(20), correct.repeat(20), rows=rows)
    assert often == pytest.approx(once, abs=2e-3)
    sets = interval_of_sums(gap_sums([[(confidence, correct)] * 3], 15))
    assert [sets.low, sets.high, sets.plain] == pytest.approx([once.low, once.high, once.plain], abs=5e-3)


def test_grades_vary_less_than_right_or_wrong_answers() -> None:
    rng = np.random.default_rng(0)
    confidence = torch.tensor(rng.uniform(0.3, 0.9, 500))
    graded = (confidence + torch.tensor(rng.normal(0, 0.05, 500))).clamp(0, 1)
    binary = torch.bernoulli(confidence, generator=torch.Generator().manual_seed(0)).long()
    narrow, wide = calibration_interval(confidence, graded), calibration_interval(confidence, binary)
    assert narrow.high < 0.5 * wide.high
    assert narrow.floor < 0.3 * wide.floor


def test_saturated_and_hopeless_predictions_have_finite_intervals() -> None:
    cases = [
        (torch.ones(50), torch.ones(50).long()),
        (torch.ones(50), torch.zeros(50).long()),
        (torch.zeros(50), torch.zeros(50).long()),
        (torch.tensor([0.7]), torch.tensor([1])),
        drawn(5, 12, "sharp"),
    ]
    for confidence, correct in cases:
        found = calibration_interval(confidence, correct)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.floor >= 0
        difference = calibration_difference((confidence, correct), (confidence / 2, correct))
        assert difference.low <= difference.value <= difference.high
    assert calibration_interval(torch.ones(50), torch.ones(50).long()).value == 0
    assert calibration_interval(torch.ones(50), torch.zeros(50).long()).low > 0.8


@pytest.mark.parametrize("confidence", [1.0, 0.999, 0.001, 0.0])
@pytest.mark.parametrize("rows", [10, 100, 300])
def test_answers_that_were_all_as_sure_as_said_leave_room_for_an_error_not_seen(rows: int, confidence: float) -> None:
    """Of models that are wrong in 1 row of ``rows``, a third show no wrong answer at all: their interval must not end at 0."""
    as_said = torch.full((rows,), round(confidence))
    found = calibration_interval(torch.full((rows,), confidence), as_said)
    exact = 1 - 0.025 ** (1 / rows)  # the largest error that shows nothing with probability 2.5 %
    assert found.low == 0
    assert 1 / rows < found.high < 1.25 * exact
    same = (torch.full((rows,), confidence), as_said)
    assert calibration_difference(same, same) == (0.0, 0.0, 0.0, 1.0)


def test_no_predictions_give_nan() -> None:
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert np.isnan(calibration_interval(*empty)).all()
    assert np.isnan(calibration_difference(empty, empty)).all()


def test_holm_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 9):
        p = rng.random(size) ** 3
        expected, worst = np.zeros(size), 0.0
        for rank, index in enumerate(np.argsort(p)):
            worst = max(worst, p[index] * (size - rank))
            expected[index] = min(1.0, worst)
        assert holm(p).tolist() == pytest.approx(expected.tolist())
    assert holm([0.01, float("nan"), 0.04]).tolist() == pytest.approx([0.02, float("nan"), 0.04], nan_ok=True)


def test_refusals_name_the_argument() -> None:
    confidence, correct = drawn(0, 10)
    for call, message in [
        (lambda: calibration_interval(confidence, correct, level=1.0), r"level must lie in \(0, 1\); got 1.0"),
        (
            lambda: calibration_interval(confidence, correct, draws=5),
            "draws must be an integer in .100, 1000000.; got 5",
        ),
        (lambda: calibration_interval(confidence, correct, n_bins=0), "n_bins must be"),
        (lambda: calibration_interval(confidence, correct, rows=torch.arange(3)), "rows must be"),
        (lambda: calibration_interval(confidence + 1, correct), "preds must be probabilities"),
        (
            lambda: calibration_difference((confidence, correct), (confidence[:5], correct[:5])),
            "second must hold the rows of first, 10; got 5",
        ),
        (lambda: holm([1.5]), r"p_values must be of shape \(H,\) in \[0, 1\]"),
        (lambda: noise_floor(confidence + 1), "preds must be probabilities"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            call()


@pytest.mark.parametrize("right", [82, 86, 90, 94, 98])
def test_a_p_value_is_small_only_where_the_interval_excludes_0(right: int) -> None:
    target = torch.zeros(100, dtype=torch.int64)
    sure = torch.stack([torch.ones(100), torch.zeros(100)], dim=1)
    less = torch.where((torch.arange(100) < right)[:, None], torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9]))
    found = calibration_difference((sure, target), (less, target))
    assert -1.0 <= found.low <= found.high <= 1.0
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
