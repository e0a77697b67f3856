"""Prediction sets: classes of which one is the right one, with a stated probability, whatever the model is worth.

Dimensions: N calibration rows, M rows to predict, K classes.

Written here and not taken from MAPIE: that takes an estimator instead of probabilities, and has neither class-conditional sets nor
weights. The tests hold this against it where both do the same.
"""

import math
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, described, floats, integers, number
from moe_posterior.errors import InvalidArgumentError, NotFittedError

Score = Literal["lac", "aps", "raps"]
Within = Literal["all", "class", "group"]


class _Sorted(NamedTuple):
    """The calibration scores of one class or group, rising, and the sum of the weights up to each."""

    scores: Tensor  # (n,)
    weight: Tensor  # (n,)


class PredictionSets:
    """Split conformal prediction: sets that hold the right class with probability of at least 1 − ``error_rate``.

    Args:
        error_rate: ε in (0, 1).
        score: how ill a class fits. ``lac``: 1 − its probability; the smallest sets on average. ``aps``: the sum of all probabilities
            down to its own; larger sets, more even over easy and hard rows. ``raps``: the same and a penalty for low ranks.
        within: where the probability holds. ``all``: over all rows together. ``class``: for the rows of every class (Mondrian).
            ``group``: for the rows of every group. Fewer than about 1/ε calibration rows of a class or group make its sets hold
            everything.
        penalty, free_ranks: of ``raps``: added for every rank beyond the first ``free_ranks``.

    Raises:
        InvalidArgumentError: an argument out of range.

    Source: Vovk, Gammerman & Shafer 2005 (conformal, Mondrian); Sadinle, Lei & Wasserman 2019 (LAC); Romano, Sesia & Candès 2020
    (APS); Angelopoulos, Bates, Malik & Jordan 2021 (RAPS); Tibshirani, Barber, Candès & Ramdas 2019 (weights).

    >>> probs = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.35, 0.25]]).repeat(10, 1)
    >>> sets = PredictionSets(0.2).calibrate(probs, torch.tensor([0, 1]).repeat(10))
    >>> sets.predict(probs[:2]).tolist()
    [[True, False, False], [True, True, False]]
    """

    @as_declared
    def __init__(
        self,
        error_rate: float,
        score: Score = "lac",
        within: Within = "all",
        *,
        penalty: float = 0.01,
        free_ranks: int = 1,
    ) -> None:
        self.error_rate = number("error_rate", error_rate, above=0.0, below=1.0)
        self.score, self.within = score, within
        self.penalty, self.free_ranks = number("penalty", penalty, least=0.0), count("free_ranks", free_ranks, least=0)
        self.num_classes = 0  # 0 before calibrate
        self._sorted: dict[int, _Sorted] = {}  # by class or group; 0 for all rows
        self._weighted = False

    @as_declared
    def calibrate(
        self,
        probs: Tensor,  # (N, K)
        target: Tensor,  # (N,)
        *,
        groups: Tensor | None = None,  # (N,) integers
        weights: Tensor | None = None,  # (N,)
        generator: torch.Generator | None = None,
    ) -> Self:
        """Learn the thresholds from rows that nothing was fitted on, forgetting earlier ones.

        Args:
            groups: with ``within="group"``.
            weights: how much more often a row like this occurs later than among the calibration rows (the ratio of densities, up to a
                factor), for a covariate shift that is known; then :meth:`predict` needs weights too.
            generator: draws that break the jumps of ``aps`` and ``raps``, so that their sets do not hold the right class more often
                than they should; then give one to :meth:`predict` too. Without it the same rows give the same sets.

        Raises:
            InvalidArgumentError: shapes or values that do not fit, or no rows.
        """
        probs = _read_probs(probs)
        target = integers("target", target, (len(probs),), low=0, high=probs.shape[1] - 1).to(probs.device)
        if not len(probs):
            raise InvalidArgumentError("probs must have at least one row to calibrate on; got none")
        keys = self._keys(groups, target, len(probs)).to(probs.device)
        mass = _read_weights(weights, len(probs), probs.device)
        own = self._scores(probs, generator).gather(1, target[:, None])[:, 0]
        self._sorted = {}
        for key in keys.unique().tolist():
            mine = keys == key
            scores, order = own[mine].sort()
            self._sorted[key] = _Sorted(scores, mass[mine][order].cumsum(0))
        self.num_classes, self._weighted = probs.shape[1], weights is not None
        return self

    @as_declared
    def predict(
        self,
        probs: Tensor,  # (M, K)
        *,
        groups: Tensor | None = None,  # (M,) integers
        weights: Tensor | None = None,  # (M,)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (M, K) bool
        """The set of every row. A set may be empty: then no class fits as well as the right ones of the calibration rows do.

        Raises:
            NotFittedError: before :meth:`calibrate`. InvalidArgumentError: shapes or values that do not fit, or weights here and not
                there.
        """
        if not self.num_classes:
            raise NotFittedError("PredictionSets must be calibrated before it predicts")
        probs = _read_probs(probs, self.num_classes)
        if (weights is not None) != self._weighted:
            raise InvalidArgumentError("weights must be given to calibrate and to predict, or to neither")
        mass = _read_weights(weights, len(probs), probs.device)
        scores = self._scores(probs, generator)
        if self.within == "class":
            limits = [self._limits(label, mass) for label in range(self.num_classes)]
            return scores <= torch.stack(limits, dim=1)
        keys = self._keys(groups, None, len(probs)).to(probs.device)
        limit = scores.new_full((len(probs),), math.inf)
        for key in keys.unique().tolist():
            mine = keys == key
            limit[mine] = self._limits(key, mass[mine])
        return scores <= limit[:, None]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold for the probability to hold, in words."""
        same = (
            "Later rows differ from the calibration rows only in what occurs how often, exactly as the weights say; the right class of "
            "an input is as likely as before."
            if self._weighted
            else "Calibration rows and later rows are exchangeable: no shift, and not several rows of one person, document or series."
        )
        where = {
            "all": "The probability is over all rows together: for some classes and groups it is lower, for others higher.",
            "class": "The probability holds for the rows of every class; classes may occur more or less often than before.",
            "group": "The probability holds for the rows of every group that the calibration rows had; others get every class.",
        }
        return (
            same,
            "No calibration row was used to train the model, to choose it or to fit its calibrator.",
            "The probability is also over the draw of the calibration rows: with n of them the coverage of one draw varies by about "
            "√(ε (1 − ε) / n).",
            where[self.within],
        )

    def to_dict(self) -> dict[str, Any]:
        """What it promises and where, as strict JSON takes it; thresholds are those of a row with weight 1, None for every class."""
        one = torch.ones(1, dtype=torch.float64)
        found = {str(key): float(self._limits(key, one.to(part.scores.device))) for key, part in self._sorted.items()}
        return {
            "error_rate": self.error_rate,
            "score": self.score,
            "within": self.within,
            "rows": {str(key): len(part.scores) for key, part in self._sorted.items()},
            "thresholds": {key: limit if math.isfinite(limit) else None for key, limit in found.items()},
            "assumptions": list(self.assumptions),
        }

    def __str__(self) -> str:
        rows = sum(len(part.scores) for part in self._sorted.values())
        head = (
            f"Sets that hold the right class with probability of at least {100 * (1 - self.error_rate):.3g} % ({self.score}, within "
            f"{self.within}, {rows:,} calibration rows)."
        )
        return "\n".join([head, "It holds if:", *(f"- {assumption}" for assumption in self.assumptions)])

    def _limits(self, key: int, mass: Tensor) -> Tensor:  # (M,) weights -> (M,) largest score of a member
        """The 1 − ε quantile of the calibration scores together with one infinite score of the row's own weight."""
        if key not in self._sorted:
            return mass.new_full(mass.shape, math.inf)
        scores, weight = self._sorted[key]
        if float(weight[-1]) == 0:
            return mass.new_full(mass.shape, math.inf)
        wanted = (1 - self.error_rate) * (weight[-1] + mass)
        place = torch.searchsorted(weight, wanted * (1 - 1e-12))
        return torch.cat([scores, scores.new_full((1,), math.inf)])[place]

    def _scores(self, probs: Tensor, generator: torch.Generator | None) -> Tensor:  # (N, K) -> (N, K)
        if self.score == "lac":
            return 1 - probs
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        luck = torch.ones(len(probs), 1, dtype=torch.float64, device=probs.device)
        if generator is not None:
            luck = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator, device=generator.device).to(
                probs.device
            )
        down = ordered.cumsum(1) - (1 - luck) * ordered
        if self.score == "raps":
            ranks = torch.arange(1, probs.shape[1] + 1, device=probs.device)
            down = down + self.penalty * (ranks - self.free_ranks).clamp(min=0)
        return torch.empty_like(down).scatter_(1, order, down)

    def _keys(self, groups: Tensor | None, target: Tensor | None, rows: int) -> Tensor:  # -> (rows,) int64
        if (groups is not None) != (self.within == "group"):
            raise InvalidArgumentError(
                f'groups must be given if, and only if, within="group"; within is {self.within!r}'
            )
        if groups is not None:
            return integers("groups", groups, (rows,))
        return target if self.within == "class" and target is not None else torch.zeros(rows, dtype=torch.int64)


def _read_probs(probs: Tensor, num_classes: int | None = None) -> Tensor:  # -> float64
    found = floats("probs", probs, finite=True).double()
    if found.ndim != 2 or found.shape[1] != (num_classes or found.shape[1]) or not found.shape[1]:
        raise InvalidArgumentError(f"probs must have shape (N, {num_classes or 'K'}); got {described(probs)}")
    total = found.sum(1)
    if len(found) and (float(found.min()) < -1e-5 or float((total - 1).abs().max()) > 1e-2):
        raise InvalidArgumentError("probs must be probabilities that sum to 1 in every row")
    return found


def _read_weights(weights: Tensor | None, rows: int, device: torch.device) -> Tensor:  # (rows,) float64
    if weights is None:
        return torch.ones(rows, dtype=torch.float64, device=device)
    found = floats("weights", weights, (rows,), finite=True).double().to(device)
    if rows and float(found.min()) < 0:
        raise InvalidArgumentError(f"weights must be at least 0; got {float(found.min()):g}")
    return found
