"""A calibrator that keeps learning: outcomes that arrive later adjust the confidence.

Dimensions: N rows, K classes, C configurations, B confidence bins.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor

from moe_posterior.calibrators.base import Calibrator, Outputs, read_outputs
from moe_posterior.calibrators.configuration import lookup
from moe_posterior.calibrators.pooling import NUM_BINS, Counts, count, logit_bins, pooled_shifts
from moe_posterior.calibrators.probabilities import safe_logit, top_confidence, top_label, with_confidence
from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.soundness import require_sound
from moe_posterior.checks.validation import floats
from moe_posterior.errors import InvalidArgumentError

STRENGTHS = (10.0, 30.0, 100.0, 300.0)


class OnlineConfigurationCalibrator(Calibrator):
    """Starts as a fitted static calibrator and learns from outcomes as they arrive, pooled from coarse to fine.

    ``observe(outputs, correct)`` counts successes and failures per (configuration, confidence bin): float64 sums, a few
    hundred bytes per configuration whatever the traffic, additive over replicas (``merge``). From these counts it computes

    1. an offset and a slope of the logit of the static confidence, which a few dozen outcomes already move
       (``pooling.affine_posterior``);
    2. per confidence bin, the shift from the confidence this shows to the Beta posterior mean
       ``(strength · m + successes) / (strength + n)`` with that confidence m as the prior mean (``pooling.beta_shift``);
    3. per configuration the same, on top of both.

    The result is ``sigmoid(offset + slope · logit(static) + bin + configuration)``. Without outcomes that is the static calibrator,
    bit for bit; a configuration without outcomes gets the pooled steps. Where ``outputs.configuration`` is None all rows count as
    one. The label of the static calibrator stays, so with K classes no confidence falls below 1/K.

    Args:
        static: the calibrator to start from; ``fit`` fits it if it is not.
        strength: pseudo-observations of the prior in steps 2 and 3. None: ``fit`` chooses among 10, 30, 100 and 300 by the log
            score of each half of the validation rows after observing the other half.
        half_life: number of later outcomes after which an outcome counts half, for conditions that keep changing; None: never forget.

    Raises:
        InvalidArgumentError: an option out of range.

    Source: ours; the hierarchy as in Gelman et al., *Bayesian Data Analysis*, chapter 5.

    >>> from moe_posterior.calibrators import TemperatureScaling
    >>> validation = Outputs(torch.tensor([[0.9, 0.1]] * 10))
    >>> online = OnlineConfigurationCalibrator(TemperatureScaling(), strength=30.0)
    >>> online = online.fit(validation, torch.tensor([0] * 9 + [1]))
    >>> before = online(validation)[0, 0].item()
    >>> after = online.observe(validation, torch.tensor([True, False] * 5))(validation)[0, 0].item()
    >>> round(before, 2), 0.5 < after < before
    (0.9, True)
    """

    chosen_strength: Tensor
    configurations: Tensor
    successes: Tensor
    failures: Tensor
    logits: Tensor
    offset: Tensor
    slope: Tensor
    bin_shifts: Tensor
    configuration_shifts: Tensor

    @as_declared
    def __init__(self, static: Calibrator, strength: float | None = None, half_life: float | None = None) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("half_life", half_life)):
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgumentError(f"{name} must be positive and finite, or None; got {value}")
        self.static, self.strength, self.half_life = static, strength, half_life
        self.keeps_top_label = static.keeps_top_label  # type: ignore[misc]
        self.register_buffer("chosen_strength", torch.tensor(strength or math.nan, dtype=torch.float64))
        # With a strength given there is nothing left to fit.
        self.fitted.fill_(strength is not None and bool(static.fitted))
        self.register_buffer("configurations", torch.zeros(0, dtype=torch.int64))  # (C,) ids, sorted
        for name in Counts._fields:
            self.register_buffer(name, torch.zeros(0, NUM_BINS, dtype=torch.float64))  # (C, B)
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))
        self.register_buffer("slope", torch.ones((), dtype=torch.float64))
        self.register_buffer("bin_shifts", torch.zeros(NUM_BINS, dtype=torch.float64))  # (B,)
        self.register_buffer("configuration_shifts", torch.zeros(0, dtype=torch.float64))  # (C,)

    @property
    def outcomes(self) -> float:
        """How many outcomes the map rests on, discounted ones counted by their weight."""
        return float(self.successes.sum() + self.failures.sum())

    @torch.no_grad()
    def observe(
        self,
        outputs: Outputs,  # of M rows
        correct: Tensor,  # (M,) bool, or in [0, 1] with NaN for unknown
    ) -> Self:
        """Learn whether the labels shown were right; the order of rows matters only under a half-life.

        Raises:
            NotFittedError: before ``fit``.
            InvalidArgumentError: shapes or values that do not fit; nothing is learned then.
        """
        self.require_fitted()
        outputs = read_outputs(outputs, self.static.call_needs)
        outcome = floats("correct", correct, (len(outputs.probs),)).double()
        if ((outcome < 0) | (outcome > 1)).any():
            raise InvalidArgumentError("correct must lie in [0, 1] or be NaN (not known)")
        known = ~outcome.isnan()
        self._observe(top_confidence(self.static(outputs))[known], outcome[known], self._ids(outputs)[known])
        return self

    @torch.no_grad()
    def merge(self, other: "OnlineConfigurationCalibrator") -> Self:
        """Add the outcomes that a replica with the same static calibrator has observed.

        Raises:
            InvalidArgumentError: under a half-life, where the order of outcomes matters and two replicas have no common order.
        """
        if self.half_life is not None or other.half_life is not None:
            raise InvalidArgumentError(
                f"merge must be between calibrators without a half_life; got {self.half_life} and {other.half_life}"
            )
        self._make_room(other.configurations)
        slots = torch.searchsorted(self.configurations, other.configurations)
        for name in Counts._fields:
            getattr(self, name).index_add_(0, slots, getattr(other, name))
        self._redraw()
        return self

    def _observe(self, confidence: Tensor, outcome: Tensor, ids: Tensor) -> None:  # (M,), (M,), (M,)
        if not len(outcome):
            return
        self._make_room(ids)
        weights = torch.ones_like(outcome)
        if self.half_life is not None:
            ages = torch.arange(len(outcome) - 1, -1, -1, dtype=torch.float64, device=outcome.device)
            weights = torch.exp2(-ages / self.half_life)
            for name in Counts._fields:
                getattr(self, name).mul_(2.0 ** (-len(outcome) / self.half_life))
        slots = torch.searchsorted(self.configurations, ids.contiguous())
        new = count(confidence, outcome, slots, weights, len(self.configurations))
        for name, sums in zip(Counts._fields, new, strict=True):
            getattr(self, name).add_(sums)
        self._redraw()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = {name: state_dict.get(prefix + name) for name in Counts._fields}
        require_sound({name: table for name, table in saved.items() if isinstance(table, Tensor)}, of=prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _make_room(self, ids: Tensor) -> None:
        known = torch.cat([self.configurations, ids]).unique()
        places = torch.searchsorted(known, self.configurations)
        for name in Counts._fields:
            old = getattr(self, name)
            setattr(self, name, old.new_zeros(len(known), NUM_BINS).index_copy_(0, places, old))
        self.configurations = known

    def _redraw(self) -> None:
        counts = Counts(self.successes, self.failures, self.logits)
        self.offset, self.slope, self.bin_shifts, self.configuration_shifts = pooled_shifts(
            counts, self.chosen_strength
        )

    def _forget(self) -> None:
        self.configurations = self.configurations.new_zeros(0)
        for name in Counts._fields:
            setattr(self, name, getattr(self, name).new_zeros(0, NUM_BINS))
        self._redraw()

    def _ids(self, outputs: Outputs) -> Tensor:  # -> (N,) int64
        if outputs.configuration is None:
            return torch.zeros(len(outputs.probs), dtype=torch.int64, device=outputs.probs.device)
        return outputs.configuration

    def _fit(self, outputs: Outputs, target: Tensor) -> None:
        if not self.static.fitted:
            self.static.fit(outputs, target)
        shown = self.static(outputs)
        evidence = top_confidence(shown).double(), top_label(shown).eq(target).double(), self._ids(outputs)
        if self.strength is None:
            scores = [self._score(evidence, strength) for strength in STRENGTHS]
            self.chosen_strength.fill_(STRENGTHS[max(range(len(scores)), key=scores.__getitem__)])
        self._forget()

    def _score(self, evidence: tuple[Tensor, Tensor, Tensor], strength: float) -> float:
        self.chosen_strength.fill_(strength)
        score = 0.0
        for half in (0, 1):
            self._forget()
            self._observe(*(column[half::2] for column in evidence))
            confidence, correct, ids = (column[1 - half :: 2] for column in evidence)
            log_odds = self._moved(safe_logit(confidence), ids)
            score -= float(torch.nn.functional.binary_cross_entropy_with_logits(log_odds, correct, reduction="sum"))
        return score

    def _moved(self, logits: Tensor, ids: Tensor) -> Tensor:  # (N,), (N,) -> (N,)
        own = lookup(ids, self.configurations, self.configuration_shifts)
        return self.offset + self.slope * logits + self.bin_shifts[logit_bins(logits)] + own

    def _calibrate(self, outputs: Outputs) -> Tensor:
        shown = self.static(outputs)
        if not self.outcomes:
            return shown
        probs = shown.double()
        return with_confidence(probs, torch.sigmoid(self._moved(safe_logit(top_confidence(probs)), self._ids(outputs))))

    def extra_repr(self) -> str:
        return (
            f"outcomes={self.outcomes:g}, strength={self.chosen_strength.item():g}, half_life={self.half_life}, "
            f"offset={self.offset.item():.3g}, slope={self.slope.item():.3g}"
        )
