"""An action threshold that watches its own promise while outcomes arrive, withdraws it when it is broken, and makes a new one.

Dimensions: M outcomes, in the order in which they arrived.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from moe_posterior.checks.validation import count, floats, number, outcomes
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees.threshold import GuaranteedThreshold, assumptions, read_losses, select_threshold

BETS = (
    0.05,
    0.1,
    0.2,
    0.4,
)  # stakes on the risk being above the level, as shares of the largest that cannot ruin: 1 / α
EPOCHS = tuple(100 * 2**j for j in range(8))  # outcomes after an alarm at which a promise is tried: 100, 200, …, 12,800
KNOTS = 256  # confidences kept of those above a promised threshold
FORMAT = 1
_CAUTIOUS = ("Raising the threshold does not raise the share of errors: caution may raise it above the promised one.",)


class OnlineActionThreshold:
    """Act on confidences of at least :attr:`threshold`; tell it every outcome, in the order of arrival, with :meth:`update`.

    Three things happen:

    1. *Caution.* Every error among the answers acted on raises the threshold a little, and every right one lowers it, never below the
       promised one. While nothing shifts the promise of :func:`~moe_posterior.guarantees.select_threshold` holds as before.
    2. *Alarm.* A betting process grows while more than a share α of the answers above the promised threshold is wrong. As long as it
       holds, the expected number of outcomes above the threshold until a false alarm is at least ``alarm``.
    3. *Renewal.* After an alarm nothing is acted on until a new threshold can be promised from the outcomes since, at 100, 200, 400, …
       of them. If these are independent draws from one population again, then with probability of at least 1 − δ every threshold
       promised between this alarm and the next is good, however often it is read.

    There is no promise for the time between a shift and its alarm: how long it takes depends on how far the risk is above α.
    Outcomes of answers not acted on, if they can be had, count too; without them nothing can be promised after an alarm.
    Memory is bounded: at most 12,800 outcomes are kept, and only after an alarm.

    Args:
        max_risk: α in (0, 1).
        error_probability: δ in (0, 1), of the first promise, and of those between two alarms.
        step: how far an error moves the threshold, as a share of the answers above the promised one; 0 switches caution off.
        alarm: the level of the betting process at which a promise is withdrawn, above 1. A false alarm costs coverage, so take
            about the number of outcomes in which you would bear one. Ten times as much delays a true alarm by about log(10) divided
            by the information in one outcome: 15 answers at a risk of 0.3 against 0.1, and 90 at 0.17.

    Raises:
        InvalidArgumentError: a number out of range.

    Source: Shin, Ramdas & Rinaldo 2024, *E-detectors* (alarm); Gibbs & Candès 2021, *Adaptive Conformal Inference Under Distribution
    Shift* (caution); Learn then Test with the error probability halved at every trial (renewal).

    >>> online = OnlineActionThreshold(max_risk=0.1).calibrate(torch.linspace(0, 1, 1000), torch.arange(1000) > 300)
    >>> round(online.threshold, 2)
    0.24
    >>> online.update(torch.full((30,), 0.9), torch.zeros(30)).threshold, online.alarms
    (inf, 1)
    """

    def __init__(
        self, max_risk: float, error_probability: float = 0.1, *, step: float = 0.03, alarm: float = 100.0
    ) -> None:
        self.max_risk = number("max_risk", max_risk, above=0.0, below=1.0)
        self.error_probability = number("error_probability", error_probability, above=0.0, below=1.0)
        self.step = number("step", step, least=0.0, most=1.0)
        self.alarm = number("alarm", alarm, above=1.0)
        self.promise: GuaranteedThreshold | None = None  # the one that is watched; None while there is none
        self.alarms = 0
        self.outcomes = 0  # told of so far
        self._knots: list[float] = []  # confidences above the promised threshold, falling
        self._depth = 1.0  # share of the answers above the promised threshold that is acted on
        self._wealth = [1.0] * len(BETS)
        self._since: list[tuple[float, float]] = []  # confidence and loss since the alarm

    def calibrate(self, confidence: Tensor, correct: Tensor) -> Self:
        """Make the first promise from calibration rows, forgetting everything else; without it, the first outcomes have to do.

        Raises:
            InvalidArgumentError: as :func:`~moe_posterior.guarantees.select_threshold`.
        """
        found = select_threshold(confidence, correct, self.max_risk, self.error_probability)
        scores, _ = read_losses(confidence, correct)
        self.alarms = self.outcomes = 0
        self._since = []
        self._watch(found, scores)
        return self

    @property
    def threshold(self) -> float:
        """Act on confidences of at least this now; infinite while nothing can be promised."""
        if self.promise is None:
            return math.inf
        return self._knots[math.ceil(self._depth * (len(self._knots) - 1))]

    def acts(self, confidence: Tensor) -> Tensor:  # (...) -> (...) bool
        """Which answers to act on now; NaN confidences never."""
        return floats("confidence", confidence).double() >= self.threshold

    def update(self, confidence: Tensor, correct: Tensor) -> Self:  # (M,), (M,) or one of each
        """Learn from outcomes, the oldest first.

        Args:
            confidence: as it was when the answer was given.
            correct: bool, or a grade in [0, 1]; NaN where the outcome is not known, which changes nothing.

        Raises:
            InvalidArgumentError: a shape or value that does not fit; nothing was changed.
        """
        scores, grades = (
            floats("confidence", confidence, finite=True).reshape(-1),
            outcomes("correct", correct).reshape(-1),
        )
        if scores.shape != grades.shape:
            raise InvalidArgumentError(
                f"confidence and correct must have one shape (M,); got {tuple(scores.shape)} and {tuple(grades.shape)}"
            )
        losses = (1 - grades.double()).tolist()
        for score, loss in zip(scores.double().tolist(), losses, strict=True):
            if not math.isnan(loss):
                self._observe(score, loss)
        return self

    def _observe(self, score: float, loss: float) -> None:
        self.outcomes += 1
        if self.promise is not None and score >= self.promise.threshold:
            excess = loss - self.max_risk
            if score >= self.threshold:
                self._depth = min(1.0, max(0.0, self._depth - self.step * excess))
            won = excess / self.max_risk
            self._wealth = [max(w, 1.0) * (1 + bet * won) for w, bet in zip(self._wealth, BETS, strict=True)]
            if sum(self._wealth) / len(BETS) >= self.alarm:
                self.promise, self._knots, self._since = None, [], []
                self.alarms += 1
                return
        if self._collecting:
            self._since.append((score, loss))
            if len(self._since) in EPOCHS:
                self._renew(EPOCHS.index(len(self._since)))

    @property
    def _collecting(self) -> bool:
        calibrated = self.alarms == 0 and self.promise is not None and not self._since
        return not calibrated and len(self._since) < EPOCHS[-1]

    def _renew(self, trial: int) -> None:
        scores, losses = torch.tensor(self._since, dtype=torch.float64).unbind(1)
        found = select_threshold(scores, 1 - losses, self.max_risk, self.error_probability / 2 ** (trial + 1))
        if found.promised and (self.promise is None or found.threshold <= self.promise.threshold):
            self._watch(found, scores)

    def _watch(self, found: GuaranteedThreshold, scores: Tensor) -> None:
        self.promise = found if found.promised else None
        above = scores[scores >= found.threshold].sort(descending=True).values  # none without a promise
        kept = torch.linspace(0, max(len(above) - 1, 0), min(KNOTS, len(above)), dtype=torch.float64).round().long()
        self._knots, self._depth, self._wealth = above[kept].tolist(), 1.0, [1.0] * len(BETS)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, as strict JSON and ``torch.save`` take it."""
        return {
            "format": FORMAT,
            "settings": [self.max_risk, self.error_probability, self.step, self.alarm],
            "promise": None if self.promise is None else self.promise.to_dict(),
            "alarms": self.alarms,
            "outcomes": self.outcomes,
            "knots": list(self._knots),
            "depth": self._depth,
            "wealth": list(self._wealth),
            "since": [list(pair) for pair in self._since],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on from a saved state.

        Raises:
            InvalidArgumentError: it is no such state, or one of other settings; nothing was changed.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()) or state["format"] != FORMAT:
            raise InvalidArgumentError(f"state must be a state_dict of an OnlineActionThreshold of format {FORMAT}")
        own = self.state_dict()["settings"]
        if list(state["settings"]) != own:
            raise InvalidArgumentError(f"state must be of the settings {own}; got {list(state['settings'])}")
        try:
            promise = None if state["promise"] is None else GuaranteedThreshold.from_dict(state["promise"])
            knots, wealth = [float(x) for x in state["knots"]], [float(x) for x in state["wealth"]]
            since = [(float(score), float(loss)) for score, loss in state["since"]]
            alarms, told = count("alarms", state["alarms"], least=0), count("outcomes", state["outcomes"], least=0)
            depth = number("depth", state["depth"], least=0.0, most=1.0)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"state must hold what state_dict made: {error}") from error
        if (
            len(wealth) != len(BETS)
            or bool(knots) != (promise is not None)
            or not all(map(math.isfinite, knots + wealth))
        ):
            raise InvalidArgumentError(
                "state must hold a finite wealth for each bet, and confidences above its promise"
            )
        self.promise, self.alarms, self.outcomes = promise, alarms, told
        self._knots, self._depth, self._wealth, self._since = knots, depth, wealth, since
        return self

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold for the promises to hold, in words."""
        return (
            *(assumptions() if self.promise is not None and not self.alarms else ()),
            "After an alarm, and until the next: the outcomes told are independent draws from one population, answers not acted on "
            "included.",
            "Which outcomes are told does not depend on whether the answers were right.",
            *(
                (
                    "Raising the threshold does not raise the share of errors: caution may raise it above the promised one.",
                )
                * (self.step > 0)
            ),
        )

    def __str__(self) -> str:
        state = (
            "nothing can be promised now"
            if self.promise is None
            else f"act on confidences of at least {self.threshold:.6g}"
        )
        head = f"After {self.outcomes:,} outcomes and {self.alarms} alarms: {state}."
        return "\n".join([head, "Promises hold if:", *(f"- {assumption}" for assumption in self.assumptions)])
