"""Abstention by disagreement against abstention by confidence."""

import pytest
import torch

from moe_posterior.metrics import aurc
from moe_posterior.prediction import Prediction
from moe_posterior.report.copies import mean_of_copies
from moe_posterior.report.disagreement import disagreement_curve, disagreement_row


def predicted(n: int, seed: int, useful: float = 1.0, decimals: int | None = None) -> Prediction:
    """Binary answers whose disagreement follows the chance of an error as far as ``useful`` says."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    right = torch.rand(n, generator=generator, dtype=torch.float64) < confidence
    noise = torch.rand(n, generator=generator, dtype=torch.float64)
    disagreement = useful * (1 - confidence) + (1 - useful) * noise / 2
    if decimals is not None:
        confidence, disagreement = confidence.round(decimals=decimals), disagreement.round(decimals=decimals)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    return Prediction(probs, target=(~right).long(), disagreement=disagreement, row=torch.arange(n))


def test_a_rule_that_orders_like_the_confidence_does_not_differ() -> None:
    found = disagreement_row("clean", "a", predicted(500, 0))
    assert found["difference"] == pytest.approx(0, abs=1e-12)
    assert found["interval"] == pytest.approx([0, 0], abs=1e-12)


def test_areas_and_risks_are_those_of_plain_loops() -> None:
    one = predicted(200, 3, useful=0.3, decimals=1)  # many ties
    found = disagreement_row("clean", "a", one)
    right = (one.target == 0).double()
    assert found["aurc_disagreement"] == pytest.approx(float(aurc(-one.disagreement, right)))
    assert found["aurc_confidence"] == pytest.approx(float(aurc(one.probs[:, 0], right)))
    generator = torch.Generator().manual_seed(0)
    for abstention in found["abstentions"]:
        kept, risks = abstention["kept"], []
        for _ in range(300):  # ties in random order
            order = torch.randperm(200, generator=generator)
            ranked = order[(-one.disagreement[order]).sort(descending=True, stable=True).indices]
            risks.append(1 - float(right[ranked[:kept]].mean()))
        assert abstention["risk_disagreement"] == pytest.approx(sum(risks) / 300, abs=0.004)
        low, high = abstention["interval_disagreement"]
        assert low < abstention["risk_disagreement"] < high


@pytest.mark.parametrize("decimals", [None, 1])
def test_the_interval_agrees_with_a_paired_bootstrap(decimals: int | None) -> None:
    one = predicted(600, 5, useful=0.5, decimals=decimals)
    found = disagreement_row("clean", "a", one)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(400):
        part = one.rows(torch.randint(600, (600,), generator=generator))
        right = part.target == 0
        drawn.append(float(aurc(-part.disagreement, right) - aurc(part.probs[:, 0], right)))
    low, high = found["interval"]
    assert (high - low) / 2 / 1.96 == pytest.approx(float(torch.tensor(drawn).std()), rel=0.12)


def test_the_interval_covers_the_true_difference() -> None:
    truth = disagreement_row("clean", "a", predicted(200_000, 0, useful=0.5))["difference"]
    found = [disagreement_row("clean", "a", predicted(300, 10 + seed, useful=0.5)) for seed in range(300)]
    covered = sum(one["interval"][0] <= truth <= one["interval"][1] for one in found)
    assert 0.92 <= covered / 300 <= 0.98


def test_copies_of_rows_count_once() -> None:
    one = predicted(300, 2, useful=0.5)
    once, copied = (
        disagreement_row("clean", "a", part) for part in (one, one.rows(torch.arange(300).repeat_interleave(5)))
    )
    width = [row["interval"][1] - row["interval"][0] for row in (once, copied)]
    assert width[1] == pytest.approx(width[0], rel=0.02)
    with_copies, alone = copied["abstentions"][0], once["abstentions"][0]
    assert with_copies["interval_confidence"] == pytest.approx(alone["interval_confidence"], abs=0.01)


def test_unknown_disagreement_leaves_the_section_out() -> None:
    bare = Prediction(torch.tensor([[0.9, 0.1]]), target=torch.tensor([0]), row=torch.tensor([0]))
    assert disagreement_row("clean", "a", bare) is None
    assert disagreement_curve("clean", "a", bare, 100) is None


def test_a_mean_without_spread_has_no_interval_and_one_with_has_students() -> None:
    same = mean_of_copies(torch.full((50,), 0.25, dtype=torch.float64), torch.arange(50))
    assert (same["low"], same["high"], same["p_value"]) == (0.25, 0.25, 0.0)
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mean_of_copies(values, torch.arange(2000))
    assert found["high"] - found["value"] == pytest.approx(1.96 * float(values.std()) / 2000**0.5, rel=1e-4)
