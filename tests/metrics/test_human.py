"""Distances from human label distributions against scipy."""

import pytest
import torch
from scipy import stats

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import brier_score, human_divergence, negative_log_likelihood


def drawn(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 5, generator=generator, dtype=torch.float64).mul(2).softmax(1)


def test_divergences_agree_with_scipy_where_some_labels_were_never_given() -> None:
    preds = drawn(0)
    human = (drawn(1) * 20).floor()
    human = human / human.sum(1, keepdim=True)
    assert (human == 0).any()
    result = human_divergence(preds, human, reduction="none")
    assert result.kl.tolist() == pytest.approx([stats.entropy(h, p) for h, p in zip(human, preds, strict=True)])
    loop = [
        sum((a - b) ** 2 for a, b in zip(p, h, strict=True))
        for p, h in zip(preds.tolist(), human.tolist(), strict=True)
    ]
    assert result.brier.tolist() == pytest.approx(loop)
    means = human_divergence(preds, human)
    assert means.kl.item() == pytest.approx(result.kl.mean().item())
    assert means.brier.item() == pytest.approx(sum(loop) / len(loop))


def test_unanimous_humans_make_it_the_likelihood_and_the_brier_score() -> None:
    preds, target = drawn(2), torch.arange(40) % 5
    result = human_divergence(preds, torch.nn.functional.one_hot(target, 5).double())
    torch.testing.assert_close(result.kl, negative_log_likelihood(preds, target))
    torch.testing.assert_close(result.brier, brier_score(preds, target))


def test_predictions_equal_to_the_humans_have_no_divergence_and_an_impossible_label_a_capped_one() -> None:
    same = human_divergence(drawn(3), drawn(3))
    assert same.kl.item() == pytest.approx(0, abs=1e-12)
    assert same.brier.item() == 0
    certain = torch.tensor([[1.0, 0.0]])
    assert human_divergence(certain, certain.flip(1)).kl.item() == pytest.approx(27.631, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"human": torch.ones(2, 3) / 3}, r"one shape \(N, K\); got \(2, 2\) and \(2, 3\)"),
        ({"human": torch.ones(2, 2)}, "human must sum to 1 over classes; got 2 in row 0"),
        ({"preds": torch.ones(2, 2)}, "preds must sum to 1 over classes; got 2 in row 0"),
        ({"reduction": "sum"}, "reduction must be"),
        ({"eps": 0.0}, "eps must lie in"),
    ],
)
def test_a_bad_argument_is_named(change: dict, message: str) -> None:
    good = {"preds": torch.ones(2, 2) / 2, "human": torch.ones(2, 2) / 2}
    human_divergence(**good)
    with pytest.raises(InvalidArgumentError, match=message):
        human_divergence(**{**good, **change})
