"""The Brier decomposition against the score itself, scikit-learn and plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from moe_posterior.metrics import brier_decomposition, brier_score


def drawn(seed: int, rows: int = 120, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    preds = torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    return preds, torch.randint(classes, (rows,), generator=generator)


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(2, 5), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_four_terms_make_the_brier_score(seed: int, n_bins: int, classes: int, rows: int) -> None:
    preds, target = drawn(seed, rows, classes)
    assert brier_decomposition(preds, target, n_bins).total.item() == pytest.approx(
        brier_score(preds, target).item(), abs=1e-12
    )
    confidence, correct = preds.amax(1), (preds.argmax(1) == target).long()
    top = brier_decomposition(preds, target, n_bins, top_label_only=True)
    assert top.total.item() == pytest.approx((confidence - correct).square().mean().item(), abs=1e-12)
    assert [a.item() for a in brier_decomposition(confidence, correct, n_bins)] == [a.item() for a in top]


def test_the_top_label_score_is_scikit_learns() -> None:
    preds, target = drawn(1)
    expected = brier_score_loss((preds.argmax(1) == target).long(), preds.amax(1))
    assert brier_decomposition(preds, target, top_label_only=True).total.item() == pytest.approx(expected)


def test_murphys_three_terms_agree_with_a_plain_loop_over_classes_and_bins() -> None:
    preds, target = drawn(2)
    reliability = resolution = uncertainty = 0.0
    for k in range(4):
        hits = [float(label == k) for label in target.tolist()]
        base = sum(hits) / len(hits)
        uncertainty += base * (1 - base)
        bins: dict[int, list[tuple[float, float]]] = {}
        for probability, hit in zip(preds[:, k].tolist(), hits, strict=True):
            bins.setdefault(int(probability * 8), []).append((probability, hit))
        for members in bins.values():
            said, seen = (sum(column) / len(members) for column in zip(*members, strict=True))
            reliability += len(members) / len(hits) * (said - seen) ** 2
            resolution += len(members) / len(hits) * (seen - base) ** 2
    result = brier_decomposition(preds, target, n_bins=8)
    found = [result.reliability.item(), result.resolution.item(), result.uncertainty.item()]
    assert found == pytest.approx([reliability, resolution, uncertainty], abs=1e-12)
    assert abs(result.within_bin.item()) > 1e-4, "the bins must hide something"


def test_one_forecast_value_per_bin_leaves_no_remainder_and_no_predictions_give_nan() -> None:
    confidence = torch.tensor([0.25, 0.75]).repeat(50)
    correct = torch.randint(2, (100,), generator=torch.Generator().manual_seed(0))
    assert brier_decomposition(confidence, correct, 2).within_bin.item() == pytest.approx(0, abs=1e-12)
    assert brier_decomposition(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).total.isnan()
