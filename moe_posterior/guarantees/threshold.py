"""An action threshold with a promise: act on confidences of at least t, and at most a share α of those answers is wrong.

Dimensions: N calibration rows. ``correct`` may be graded in [0, 1]; a row's loss is ``1 - correct``.

Thresholds are tried from the most confident answers downwards, each with an exact test on the rows it would act on, and the first
failure ends the search: Learn-then-Test by fixed-sequence testing. Which thresholds are tried depends on ranks alone, so a monotone map
of the confidences changes nothing. That ranks may stand in for thresholds fixed beforehand is shown in docs/concepts/guarantees.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, floats, number
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees.tails import passes
from moe_posterior.metrics.reading import read_ranking

STARTS = {1.0: 0.1, 0.2: 0.65, 0.05: 0.25}  # coverage at which a search starts -> its share of the error probability
MOST_TESTS = 2_000  # in one search: steps of 0.05 % of the rows, where there are more rows


@dataclass(frozen=True)
class GuaranteedThreshold:
    """Act on confidences of at least ``threshold``; infinite where nothing can be promised, so that nothing is acted on."""

    threshold: float
    max_risk: float  # α
    error_probability: float  # δ, over the draw of the calibration rows
    rows: int  # calibration rows
    acted: int  # of these, how many reach the threshold
    errors: float  # sum of losses among them
    assumptions: tuple[str, ...]  # what must hold for the promise to hold
    reason: str = ""  # why nothing can be promised

    @property
    def promised(self) -> bool:
        """Whether there is a threshold that can be promised."""
        return math.isfinite(self.threshold)

    @property
    def coverage(self) -> float:
        """Share of the calibration rows acted on; 0 without rows."""
        return self.acted / self.rows if self.rows else 0.0

    @property
    def risk(self) -> float:
        """Share of errors among the calibration rows acted on; NaN if there are none."""
        return self.errors / self.acted if self.acted else math.nan

    def acts(self, confidence: Tensor) -> Tensor:  # (...) -> (...) bool
        """Which answers to act on; NaN confidences never."""
        return floats("confidence", confidence).double() >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON takes it: None for a threshold or risk that does not exist."""
        return {
            "threshold": self.threshold if self.promised else None,
            "max_risk": self.max_risk,
            "error_probability": self.error_probability,
            "rows": self.rows,
            "acted": self.acted,
            "errors": self.errors,
            "coverage": self.coverage,
            "risk": self.risk if self.acted else None,
            "reason": self.reason,
            "assumptions": list(self.assumptions),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "GuaranteedThreshold":
        """What :meth:`to_dict` made.

        Raises:
            InvalidArgumentError: it holds something else.
        """
        try:
            threshold = saved["threshold"]
            return cls(
                math.inf if threshold is None else number("threshold", threshold),
                number("max_risk", saved["max_risk"], above=0.0, below=1.0),
                number("error_probability", saved["error_probability"], above=0.0, below=1.0),
                count("rows", saved["rows"], least=0),
                count("acted", saved["acted"], least=0),
                number("errors", saved["errors"], least=0.0),
                tuple(str(assumption) for assumption in saved["assumptions"]),
                str(saved["reason"]),
            )
        except (KeyError, TypeError) as error:
            raise InvalidArgumentError(f"saved must hold what to_dict made; {error!r}") from error

    def __str__(self) -> str:
        said = f"at most {_percent(self.max_risk)} of the answers acted on are wrong"
        if not self.promised:
            return f"No threshold: that {said} cannot be promised. {self.reason}"
        lines = [
            f"Act on confidences of at least {self.threshold:.6g}: {said}, a promise that holds with probability of at least "
            f"{_percent(1 - self.error_probability)} over the draw of the {self.rows:,} calibration rows.",
            f"Of these, {_percent(self.coverage)} are acted on, and {_percent(self.risk)} of those are wrong.",
            "It holds if:",
            *(f"- {assumption}" for assumption in self.assumptions),
        ]
        return "\n".join(lines)


@as_declared
def select_threshold(
    confidence: Tensor,  # (N,)
    correct: Tensor,  # (N,)
    max_risk: float,
    error_probability: float = 0.1,
    *,
    starts: Mapping[float, float] | None = None,
) -> GuaranteedThreshold:
    """The lowest threshold found for which P(selective risk ≤ ``max_risk``) ≥ 1 − ``error_probability``.

    Args:
        confidence: of calibration rows that nothing was fitted on; any finite score, higher is acted on first.
        correct: bool, 0 and 1, or a grade in [0, 1].
        max_risk: α in (0, 1), the tolerated share of errors among the answers acted on.
        error_probability: δ in (0, 1), how probable it may be that a set of calibration rows misleads.
        starts: coverage at which a search starts → its share of δ; the shares sum to at most 1. A search that starts at a coverage
            where the risk is not clearly below α ends at once, and one that starts at few rows can be ended by a single error:
            by default .65 of δ goes to a search from 20 %, .25 to one from 5 %, and .1 to a single test of acting on everything,
            for confidences that rank badly. The lowest threshold found counts.

    Returns:
        The threshold, with what was seen and what is assumed; infinite, with the reason, if nothing can be promised.

    Raises:
        InvalidArgumentError: a shape or value that does not fit, NaN included.

    Source: Angelopoulos, Bates, Candès, Jordan & Lei 2025, *Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
    Control*; selective prediction as in their section on it, with binomial p-values on the rows acted on.

    >>> found = select_threshold(torch.linspace(0, 1, 1000), torch.arange(1000) > 300, max_risk=0.1)
    >>> found.promised, round(found.threshold, 2), round(found.risk, 3)
    (True, 0.24, 0.083)
    >>> select_threshold(torch.tensor([0.9]), torch.tensor([1]), max_risk=0.1).threshold
    inf
    """
    alpha = number("max_risk", max_risk, above=0.0, below=1.0)
    delta = number("error_probability", error_probability, above=0.0, below=1.0)
    shares = _read_starts(starts)
    scores, losses = read_losses(confidence, correct)
    graded = bool(((losses > 0) & (losses < 1)).any())
    ordered, order = scores.sort(descending=True)
    errors = losses[order].cumsum(0)
    ends = _block_ends(ordered)
    best = max(
        (_search(errors, ends, start, alpha, delta * share, graded) for start, share in shares.items()), default=-1
    )
    tied = len(ordered) > 1 and bool((ordered[1:] == ordered[:-1]).any())
    if best < 0:
        reason = _reason(len(ordered), alpha, delta * max(shares.values()))
        return GuaranteedThreshold(math.inf, alpha, delta, len(ordered), 0, 0.0, assumptions(tied=tied), reason)
    seen = (len(ordered), best + 1, float(errors[best]))
    return GuaranteedThreshold(float(ordered[best]), alpha, delta, *seen, assumptions(tied=tied))


def assumptions(*, tied: bool = False) -> tuple[str, ...]:
    """What must hold for a promise, in words."""
    found = (
        "The calibration rows are independent draws from the same population as the rows acted on later: no shift, and not several "
        "rows of one person, document or series.",
        "No calibration row was used to train the model, to choose it or to fit its calibrator.",
        "The level, the probability and what counts as correct were fixed before the calibration labels were looked at, and this is "
        "the only threshold chosen on them.",
    )
    with_ties = (
        "Where confidences tie: if the answers above a tied value are too often wrong, adding those at the value does not bring the "
        "share down (the risk does not fall when the threshold is lowered past a tie).",
    )
    return found + (with_ties if tied else ())


def read_losses(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64 on the CPU
    """Finite confidences and losses in [0, 1].

    Raises:
        InvalidArgumentError: different shapes, a confidence that is not finite, or a grade outside [0, 1].
    """
    scores, grades = read_ranking(confidence, correct)
    floats("confidence", scores, finite=True)
    return scores.detach().double().cpu(), 1 - grades.detach().double().cpu()


def _search(errors: Tensor, ends: Tensor, start: float, alpha: float, delta: float, graded: bool) -> int:
    """The last row of the lowest threshold that a search from this coverage proves; −1 if its first test fails."""
    rows = len(errors)
    proof = (
        math.ceil(math.log(delta) / math.log1p(-alpha)) + 1
    )  # rows without an error that prove it, and the one at the threshold
    first = max(proof, math.ceil(start * rows), 1)
    if first > rows:
        return -1
    step = -(-(rows - first + 1) // MOST_TESTS)
    ranks = torch.arange(first - 1, rows, step)
    if int(ranks[-1]) != rows - 1:
        ranks = torch.cat([ranks, torch.tensor([rows - 1])])
    tested = ends[ranks].unique()
    # The row that sets the threshold counts with its error, but not as a row: given the threshold the others are independent draws.
    failed = (~passes(errors[tested], tested, alpha, delta, graded=graded)).nonzero()
    good = int(failed[0]) if len(failed) else len(tested)
    return int(tested[good - 1]) if good else -1


def _block_ends(ordered: Tensor) -> Tensor:  # (N,) -> (N,) int64
    """The last row of each row's tie."""
    if not len(ordered):
        return torch.zeros(0, dtype=torch.int64)
    _, tie, size = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - 1)[tie]


def _read_starts(starts: Mapping[float, float] | None) -> dict[float, float]:
    if starts is None:
        return STARTS
    found = {
        number("starts", start, least=0.0, most=1.0): number("starts", share, above=0.0, most=1.0)
        for start, share in starts.items()
    }
    if not found or sum(found.values()) > 1 + 1e-9:
        raise InvalidArgumentError(
            f"starts must share at most the whole error probability, and name one start; got {dict(starts)}"
        )
    return found


def _reason(rows: int, alpha: float, delta: float) -> str:
    least = math.ceil(math.log(delta) / math.log1p(-alpha)) + 1
    if rows < least:
        return f"It takes at least {least:,} calibration rows acted on without one error; there are {rows:,} rows."
    return f"Among the most confident of the {rows:,} calibration rows too many are wrong, or too few rows are there to tell."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
