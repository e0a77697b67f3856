"""Abstaining where experts disagree: risk against coverage of that rule beside abstaining where the confidence is low.

Dimensions: N predictions.
"""

import torch
from torch import Tensor

from moe_posterior.metrics import aurc, risk_coverage
from moe_posterior.prediction import Prediction
from moe_posterior.report.copies import mean_of_copies, share_of_copies
from moe_posterior.report.evaluation import answers_of, rows_of
from moe_posterior.report.schema import Abstention, Curve, Disagreement

__all__ = ["disagreement_curve", "disagreement_row"]

SHARES = (0.05, 0.1, 0.2, 0.3)  # of rows abstained on


def disagreement_row(panel: str, arm: str, judged: Prediction) -> Disagreement | None:
    """How abstaining on the most disputed rows compares with abstaining on the least confident; None where disagreement is unknown.

    The difference of the two areas has a 95 % interval from their influence functions, which pairs the rules row by row and takes
    copies of a data row together.
    """
    if judged.disagreement is None:
        return None
    confidence, correct = answers_of(judged)[:2]
    agreement, rows = -judged.disagreement.double(), rows_of(judged)
    loss = 1 - correct.double()
    by_confidence, by_agreement = aurc(confidence, correct), aurc(agreement, correct)
    influence = _influence(agreement, loss) - _influence(confidence, loss)
    difference = float(by_agreement - by_confidence)
    apart = mean_of_copies(influence - influence.mean() + difference, rows)
    return {
        "arm": arm,
        "panel": panel,
        "n": len(loss),
        "risk": float(loss.mean()),
        "aurc_confidence": float(by_confidence),
        "aurc_disagreement": float(by_agreement),
        "difference": difference,
        "interval": [apart["low"], apart["high"]],
        "abstentions": [_abstention(share, agreement, confidence, loss, rows) for share in SHARES],
    }


def disagreement_curve(panel: str, arm: str, judged: Prediction, shown: int) -> Curve | None:
    """Risk against coverage when the most disputed rows are left out first; None where disagreement is unknown."""
    if judged.disagreement is None:
        return None
    _, correct = answers_of(judged)[:2]
    coverage, risk = risk_coverage(-judged.disagreement.double(), correct)
    points = torch.linspace(0, len(coverage) - 1, min(shown, len(coverage))).round().long()
    return {
        "name": f"{arm}, by disagreement",
        "panel": panel,
        "x": coverage[points].tolist(),
        "y": risk[points].tolist(),
    }


def _abstention(share: float, agreement: Tensor, confidence: Tensor, loss: Tensor, rows: Tensor) -> Abstention:
    """What is left wrong after leaving out this share of rows, by either rule."""
    kept = max(len(loss) - round(share * len(loss)), 1)
    found: Abstention = {"share": share, "kept": kept}
    for score, risk, interval in (
        (agreement, "risk_disagreement", "interval_disagreement"),
        (confidence, "risk_confidence", "interval_confidence"),
    ):
        counted = _kept(score, kept)
        found[risk] = float((loss * counted).sum() / counted.sum())  # type: ignore[literal-required]
        found[interval] = share_of_copies(loss * counted, counted, rows)  # type: ignore[literal-required]
    return found


def _kept(score: Tensor, kept: int) -> Tensor:  # (N,) -> (N,) float64
    """1 for rows kept, 0 for those left out, and in between for rows tied at the border: the mean of every order of them."""
    border = score.sort(descending=True).values[kept - 1]
    above, tied = score > border, score == border
    return above.double() + tied.double() * (kept - above.sum()) / tied.sum()


def _influence(score: Tensor, loss: Tensor) -> Tensor:  # (N,) -> (N,) float64
    """Each row's influence on the area, up to a constant that is the same for every score.

    The area is the mean of ``loss · (H_N − H_{j−1})`` over ranks j, with H the harmonic numbers. A row brings its own term, and
    moves all rows behind it one rank on, which costs each ``loss / rank``. Tied rows share the mean of their ranks.
    """
    ordered, order = score.sort(descending=True)
    _, tie, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(1, len(loss) + 1, dtype=torch.float64)
    own = _tie_means(_from_here(1 / rank), tie, size)  # Σ 1/k over k ≥ j
    behind = _tie_means(_from_here(_tie_means(loss[order], tie, size) / rank), tie, size)
    influence = torch.empty_like(loss)
    influence[order] = loss[order] * own - behind
    return influence


def _from_here(values: Tensor) -> Tensor:  # (N,) -> (N,)
    """Sum of each value and all after it."""
    return values.flip(0).cumsum(0).flip(0)


def _tie_means(values: Tensor, tie: Tensor, size: Tensor) -> Tensor:  # (N,), (N,), (T,) -> (N,)
    return (values.new_zeros(len(size)).index_add_(0, tie, values) / size)[tie]
