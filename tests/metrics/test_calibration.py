"""The functional core against torchmetrics, scipy, scikit-learn and plain Python loops, on real predictions."""

import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    brier_score,
    grouped_calibration_error,
    negative_log_likelihood,
    reliability_curve,
    wilson_interval,
)

SAME_ESTIMATOR = 2e-6  # torchmetrics sums in float32


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Probabilities of a logistic regression on held-out, noisy handwritten digits, and the true classes."""
    images, labels = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=200).fit(images[:600] / 16, labels[:600])
    noise = torch.randn(1197, 64, generator=torch.Generator().manual_seed(0)).numpy()
    return torch.tensor(model.predict_proba(images[600:] / 16 + 0.4 * noise)).float(), torch.tensor(labels[600:])


def plain_loop_ece(preds: Tensor, target: Tensor, n_bins: int) -> float:
    """ECE as the definition reads, one prediction at a time."""
    edges = [k / n_bins for k in range(n_bins)]
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(preds.tolist(), target.tolist(), strict=True):
        confidence = max(row)
        members.setdefault(sum(edge <= confidence for edge in edges), []).append(
            (confidence, row.index(confidence) == label)
        )
    gaps = (abs(sum(right - confidence for confidence, right in bin_)) for bin_ in members.values())
    return sum(gaps) / len(preds)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 7, 15, 64])
def test_each_group_agrees_with_torchmetrics_on_random_predictions(norm: str, n_bins: int) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        num_classes = 2 + seed % 5
        logits = torch.randn(301, num_classes, generator=generator) * (0.3, 2, 3)[seed % 3]
        preds, target = logits.softmax(1), torch.randint(num_classes, (301,), generator=generator)
        assert preds.max() < 1, "torchmetrics keeps the confidence 1.0 in a bin of its own"
        groups = torch.randint(4, (301,), generator=generator)
        result = grouped_calibration_error(preds, target, groups, 4, n_bins, norm)
        for group in range(4):
            rows = groups == group
            expected = multiclass_calibration_error(preds[rows], target[rows], num_classes, n_bins, norm)
            assert result.calibration_error[group].item() == pytest.approx(expected.item(), abs=SAME_ESTIMATOR)
            assert result.accuracy[group].item() == pytest.approx(
                (preds[rows].argmax(1) == target[rows]).double().mean().item()
            )
            assert result.confidence[group].item() == pytest.approx(preds[rows].double().amax(1).mean().item())


def test_real_predictions_agree_with_torchmetrics_and_with_a_plain_loop(digits: tuple[Tensor, Tensor]) -> None:
    preds, target = digits
    one_group = torch.zeros(len(preds), dtype=torch.int64)
    ours = grouped_calibration_error(preds, target, one_group, 1).calibration_error.item()
    assert ours == pytest.approx(multiclass_calibration_error(preds, target, 10, 15).item(), abs=SAME_ESTIMATOR)
    assert ours == pytest.approx(plain_loop_ece(preds, target, 15), abs=1e-9)
    assert ours > 0.02, "the noise must leave something to measure"


def test_overlapping_membership_equals_one_call_per_group(digits: tuple[Tensor, Tensor]) -> None:
    preds, target = digits
    membership = torch.rand(len(preds), 5, generator=torch.Generator().manual_seed(1)) < 0.4
    assert (membership.sum(1) > 1).any()
    together = grouped_calibration_error(preds, target, membership, 5)
    for group in range(5):
        rows = membership[:, group]
        expected = multiclass_calibration_error(preds[rows], target[rows], 10, 15)
        assert together.calibration_error[group].item() == pytest.approx(expected.item(), abs=SAME_ESTIMATOR)
        assert together.count[group].item() == rows.sum().item()


def test_an_empty_group_is_nan_and_a_small_group_has_no_calibration_error() -> None:
    preds, target = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])
    result = grouped_calibration_error(preds, target, torch.tensor([0, 0, 2]), 3, min_count=2)
    assert result.calibration_error.isnan().tolist() == [False, True, True]
    assert result.accuracy.isnan().tolist() == [False, True, False]
    assert result.confidence.isnan().tolist() == [False, True, False]
    assert result.count.tolist() == [2, 0, 1]


def test_a_mixture_that_rounds_above_one_is_read_as_certain() -> None:
    preds = torch.tensor([[1.0 + 1.2e-7, 0.0]])
    result = grouped_calibration_error(preds, torch.tensor([0]), torch.tensor([0]), 1)
    assert result.confidence.item() == 1.0
    assert result.calibration_error.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_accepted(digits: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    preds, target = digits
    groups = torch.zeros(len(preds), dtype=torch.int64)
    error = grouped_calibration_error(preds.to(dtype), target, groups, 1).calibration_error
    assert error.dtype == torch.float64
    assert error.item() == pytest.approx(plain_loop_ece(preds.to(dtype), target, 15), abs=0.02)


GOOD = {"preds": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "target": torch.tensor([0, 1]), "groups": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preds": torch.tensor([[0.9, torch.nan], [0.2, 0.8]])}, r"preds must be probabilities.*got nan at \(0, 1\)"),
        ({"preds": torch.tensor([[2.0, -1.0], [0.2, 0.8]])}, r"preds must be probabilities.*got 2.0 at \(0, 0\)"),
        ({"preds": torch.tensor([[0.9, 0.1], [0.9, 0.8]])}, r"preds must sum to 1 over classes; got 1.7 in row 1"),
        ({"preds": torch.tensor([[1, 0], [0, 1]])}, r"preds must be floating point.*got torch.int64"),
        ({"preds": torch.rand(2, 2, 2)}, r"preds must be .*shape \(2, 2, 2\)"),
        ({"target": torch.tensor([0, 2])}, r"target must lie in \[0, 1\]; got \[0, 2\]"),
        ({"target": torch.tensor([0, -1])}, r"target must lie in \[0, 1\]; got \[-1, 0\]"),
        ({"target": torch.tensor([0])}, r"target must be integer of shape \(2,\).*\(1,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, r"target must be integer.*float32"),
        ({"groups": torch.tensor([0, 2])}, r"groups must lie in \[0, 1\]; got \[0, 2\]"),
        (
            {"groups": torch.ones(2, 3, dtype=torch.bool)},
            r"groups must be .*\(2, 2\); got torch.bool of shape \(2, 3\)",
        ),
        ({"groups": torch.ones(2)}, r"groups must be int64 ids .*float32"),
        ({"num_groups": 0}, "num_groups must be an integer of at least 1; got 0"),
        ({"n_bins": 2.5}, "n_bins must be an integer"),
        ({"min_count": 0}, "min_count must be an integer"),
        ({"norm": "l3"}, "norm must be one of .*got 'l3'"),
        ({"preds": torch.tensor([0.5, 0.5]), "target": torch.tensor([1, 3])}, "1 = the prediction was correct"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(change: dict, message: str) -> None:
    grouped_calibration_error(**{"num_groups": 2, **GOOD})
    with pytest.raises(InvalidArgumentError, match=message):
        grouped_calibration_error(**{"num_groups": 2, **GOOD, **change})


def test_wilson_interval_agrees_with_scipy_also_at_zero_and_all_successes() -> None:
    for successes, trials in [(0, 7), (7, 7), (3, 10), (950, 1000)]:
        low, high = wilson_interval(torch.tensor(successes), torch.tensor(trials))
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert low.item() == pytest.approx(expected.low, abs=1e-12)
        assert high.item() == pytest.approx(expected.high, abs=1e-12)


def test_reliability_gaps_weighted_by_count_add_up_to_the_calibration_error(digits: tuple[Tensor, Tensor]) -> None:
    preds, target = digits
    curve = reliability_curve(preds, target, n_bins=10)
    weighted = torch.nan_to_num((curve.accuracy - curve.confidence).abs()) * curve.count / curve.count.sum()
    expected = multiclass_calibration_error(preds, target, 10, 10).item()
    assert weighted.sum().item() == pytest.approx(expected, abs=SAME_ESTIMATOR)
    occupied = curve.count > 0
    assert curve.accuracy.isnan().equal(~occupied)
    inside = (curve.lower <= curve.confidence + 1e-7) & (curve.confidence <= curve.upper + 1e-7)
    assert inside[occupied].all()
    assert ((curve.low <= curve.accuracy) & (curve.accuracy <= curve.high))[occupied].all()


def test_scores_agree_with_scikit_learn_and_a_plain_loop(digits: tuple[Tensor, Tensor]) -> None:
    preds, target = digits
    double = preds.double() / preds.double().sum(1, keepdim=True)
    assert negative_log_likelihood(double, target).item() == pytest.approx(log_loss(target, double), abs=1e-9)
    loop = [
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(preds.tolist(), target.tolist(), strict=True)
    ]
    assert brier_score(preds, target, reduction="none").tolist() == pytest.approx(loop)
    assert brier_score(preds, target).item() == pytest.approx(sum(loop) / len(loop))


def test_the_likelihood_of_an_impossible_class_is_capped() -> None:
    preds = torch.tensor([[1.0, 0.0]])
    assert negative_log_likelihood(preds, torch.tensor([1])).item() == pytest.approx(-math.log(1e-12))
    assert negative_log_likelihood(preds, torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize("score", [brier_score, negative_log_likelihood])
def test_scores_refuse_other_shapes_and_unknown_reductions(score) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidArgumentError, match=r"preds must be .* shape \(N, K\) or \(N,\); got .* \(3, 1, 1\)"):
        score(torch.rand(3, 1, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match="reduction must be"):
        score(GOOD["preds"], GOOD["target"], reduction="sum")
