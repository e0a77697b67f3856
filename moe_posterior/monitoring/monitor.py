"""An alarm for confidences that stop meaning what they say, which may be read after every row for ever.

Dimensions: N rows of an update, J streams: everything, then one per configuration.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from moe_posterior.checks.declared import as_declared
from moe_posterior.checks.validation import count, described, floats, integers, number, outcomes
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.monitoring.baseline import Baseline, fit_baseline
from moe_posterior.monitoring.bets import DIRECTIONS, Array, Index, log_start_weight, log_stream_weight
from moe_posterior.monitoring.records import Alarm, StreamSummary
from moe_posterior.monitoring.sequence import half_width
from moe_posterior.monitoring.streams import Rows, Streams

CHUNK = 4096  # rows advanced at a time: a few MB
START_SCALE = 2_000.0  # rows over which the start of a drift is about equally likely
FORMAT = 1
OPTIONS = ("alpha", "tolerance", "expected_configurations", "global_share", "max_configurations")


class CalibrationMonitor:
    """Watches displayed confidences and raises an alarm once it is proven that they no longer hold, globally or in a configuration.

    The null of a stream is that ``E[correct | all that came before, confidence, configuration]`` lies within ``tolerance`` of the
    confidence on each of its rows. The probability that a stream whose null holds is ever named is at most ``alpha``, over all
    streams, directions and times together, however often one looks and for ever (not only for a mean time between alarms). In each
    stream and direction the evidence is a mixture of bets against the confidences over their sizes and over the rows at which the
    drift may have begun; Ville's inequality bounds its maximum. The budget ``alpha`` is shared out over streams in the order in
    which configurations first appear, so that no number of them has to be known.

    Outcomes may come late and in any order, if neither depends on what they are. A NaN outcome is skipped.

    A mean of outcomes that is right while some confidences are too high and others too low goes unseen. Not safe for several threads
    at once: give each its own monitor or a lock. Memory is a few hundred bytes a configuration.

    Args:
        alpha: probability of any false alarm, ever.
        tolerance: gap that counts as no drift, in [0, 0.5). No model is exactly calibrated, and with 0 every model is reported in the
            end; 0.02 is what a calibrated model loses on fresh data of its own domain.
        expected_configurations: about how many configurations will come. The first that many get about equal parts of the budget.
        global_share: part of the budget for all rows together, once configurations are given; without, they get all of it.
        max_configurations: configurations watched. Rows of any further ones count in the global stream alone.

    Raises:
        InvalidArgumentError: an option out of range.

    Source: bets against forecasts: Shafer 2021, *Testing by Betting*; mixtures over starting points: Shin, Ramdas & Rinaldo 2023,
    *E-detectors*, whose guarantee is a mean time between alarms where ours is a probability for ever; shares of an error budget are
    Bonferroni's. The combination is ours.

    >>> rng = np.random.default_rng(0)
    >>> shown, expert = np.full(4000, 0.9), np.arange(4000) % 4
    >>> falls = (expert == 2) & (np.arange(4000) >= 2000)  # one expert falls from 90 to 50 %
    >>> right = rng.random(4000) < np.where(falls, 0.5, 0.9)
    >>> monitor = CalibrationMonitor()
    >>> alarm = monitor.update(shown, right, expert)[0]
    >>> alarm.configuration, alarm.direction, abs(alarm.since - 2000) < 100, alarm.row < 2400
    (2, 'overconfident', True, True)
    """

    @as_declared
    def __init__(
        self,
        alpha: float = 0.05,
        tolerance: float = 0.02,
        *,
        expected_configurations: int = 16,
        global_share: float = 0.25,
        max_configurations: int = 4096,
    ) -> None:
        self.alpha = number("alpha", alpha, above=0, below=1)
        self.tolerance = number("tolerance", tolerance, least=0, below=0.5)
        self.expected_configurations = count("expected_configurations", expected_configurations)
        self.global_share = number("global_share", global_share, above=0, below=1)
        self.max_configurations = count("max_configurations", max_configurations, most=10**6)
        self.rows = 0  # given, known or not
        self.left_out = 0  # with a known outcome, of configurations beyond the most
        self.baseline: Baseline | None = None
        self._grouped: bool | None = None  # whether rows carry configurations; known from the first update
        self._slots: dict[int, int] = {}  # configuration -> stream
        self._alarms: list[Alarm] = []
        self._standing = np.zeros((1, 2), bool)  # (J, S) alarmed since the last reset
        self._streams = Streams(START_SCALE)
        self._streams.grow(1)

    @property
    def alarm(self) -> Alarm | None:
        """The first alarm, or None."""
        return self._alarms[0] if self._alarms else None

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All alarms, in the order in which they were raised."""
        return tuple(self._alarms)

    def set_baseline(self, confidence: Any, correct: Any, configuration: Any = None) -> "CalibrationMonitor":
        """Watch for changes from what the confidences meant on these rows, instead of from the confidences themselves.

        A logistic map from confidence to accuracy, with a shift per configuration, is fitted; then the null is that accuracy stays
        within ``tolerance`` of the map, or within 2.5 standard errors of the map where those are wider. The bound on false alarms
        is for that null: it does not cover a map that is further off because its form does not fit or the reference rows were
        unlucky. A configuration that the reference rows lack is held to the map of all of them.

        Args:
            confidence, correct, configuration: as in :meth:`update`; a few hundred rows at least, not those that the model or a
                calibrator was fitted on.

        Raises:
            InvalidArgumentError: after the first update, fewer than 20 known outcomes, or as in :meth:`update`.
        """
        if self.rows:
            raise InvalidArgumentError(f"a baseline must be set before the first update; got {self.rows} rows already")
        shown, outcome, ids = self._read(confidence, correct, configuration)
        known = ~np.isnan(outcome)
        if known.sum() < 20:
            raise InvalidArgumentError(f"correct must hold at least 20 known outcomes; got {int(known.sum())}")
        self.baseline = fit_baseline(shown[known], outcome[known], None if ids is None else ids[known])
        return self

    def update(self, confidence: Any, correct: Any, configuration: Any = None) -> tuple[Alarm, ...]:
        """Take rows in, in the order in which they were answered, and return the alarms that they raise.

        One batch and the same rows one by one give the same alarms, up to rounding. Costs a few microseconds a row in batches of
        thousands, and under a millisecond a call.

        Args:
            confidence: (N,) or one number in [0, 1], as displayed.
            correct: (N,) or one; bool, or in [0, 1], or NaN where not known.
            configuration: (N,) or one integer; given with every update or with none.

        Raises:
            InvalidArgumentError: shapes or values that do not fit; nothing is taken in then.
        """
        shown, outcome, ids = self._read(confidence, correct, configuration)
        if self.rows and self._grouped != (ids is not None):
            raise InvalidArgumentError(
                f"configuration must be given with every update or with none; got {'some' if ids is not None else 'None'}"
            )
        if len(shown):
            self._grouped = ids is not None
        before = len(self._alarms)
        for start in range(0, len(shown), CHUNK):
            part = slice(start, start + CHUNK)
            self._take(shown[part], outcome[part], None if ids is None else ids[part])
        return tuple(self._alarms[before:])

    def reset(self, configuration: int | None = None) -> None:
        """Forget the evidence, of a configuration and of all rows together, or of everything: after a recalibration.

        The bound on false alarms stays that of one monitor, for its whole life: evidence starts anew from the part of the
        budget that later rows had from the beginning. Alarms that were raised stay listed and may be raised again.

        Raises:
            InvalidArgumentError: a configuration never seen.
        """
        if configuration is None:
            streams = np.arange(len(self._streams))
        elif count("configuration", configuration, least=-(2**63)) in self._slots:
            streams = np.array([0, self._slots[int(configuration)]])
        else:
            raise InvalidArgumentError(f"configuration must be one that was seen; got {configuration}")
        self._streams.clear(streams)
        self._standing[streams] = False

    def summary(self) -> list[StreamSummary]:
        """All streams, those with the strongest evidence first.

        The intervals are of the mean gap since the last reset. All of them, at all times, hold together with probability 1 − alpha.
        """
        names = [None, *self._slots]
        evidence, threshold = self._streams.evidence(), self._thresholds()
        order = np.argsort(threshold - evidence.max(1), kind="stable").tolist()
        found = []
        for stream in order:
            rows, gap, low, high = self._gap(stream, self._streams.total[stream])
            directions = tuple(name for name, on in zip(DIRECTIONS, self._standing[stream], strict=True) if on)
            over, under = evidence[stream].tolist()
            found.append(
                StreamSummary(names[stream], rows, gap, low, high, (over, under), float(threshold[stream]), directions)
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, as tensors and plain values; ``torch.load(..., weights_only=True)`` reads it."""
        arrays = {name: torch.from_numpy(getattr(self._streams, name).copy()) for name in Streams.ARRAYS}
        baseline = None
        if self.baseline is not None:
            map_of = (self.baseline.coefficients, self.baseline.covariance)
            baseline = (*(part.tolist() for part in map_of), dict(self.baseline.shifts))
        return {
            "format": FORMAT,
            "options": {name: getattr(self, name) for name in OPTIONS},
            "rows": self.rows,
            "left_out": self.left_out,
            "grouped": self._grouped,
            "configurations": list(self._slots),
            "standing": self._standing.tolist(),
            "alarms": [asdict(alarm) for alarm in self._alarms],
            "baseline": baseline,
            "streams": arrays,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the monitor that wrote the state stood, bit for bit.

        Raises:
            InvalidArgumentError: not such a state, or one of a monitor with other options; nothing is changed then.
        """
        options = {name: getattr(self, name) for name in OPTIONS}
        if not isinstance(state, Mapping) or state.get("format") != FORMAT or state.get("options") != options:
            got = (state.get("format"), state.get("options")) if isinstance(state, Mapping) else described(state)
            raise InvalidArgumentError(f"state must be of format {FORMAT} with options {options}; got {got}")
        read = CalibrationMonitor(**options)
        try:
            read.rows, read.left_out, read._grouped = state["rows"], state["left_out"], state["grouped"]
            read._slots = {one: place + 1 for place, one in enumerate(state["configurations"])}
            read._standing = np.array(state["standing"], bool).reshape(1 + len(read._slots), len(DIRECTIONS))
            read._alarms = [Alarm(**alarm) for alarm in state["alarms"]]
            if state["baseline"] is not None:
                coefficients, covariance, shifts = state["baseline"]
                read.baseline = Baseline(np.array(coefficients), np.array(covariance), dict(shifts))
            read._streams.restore(
                {name: table.numpy() for name, table in state["streams"].items()}, 1 + len(read._slots)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(
                f"state must be what state_dict returned; got something else: {error}"
            ) from error
        self.__dict__.update(read.__dict__)

    def _read(self, confidence: Any, correct: Any, configuration: Any) -> tuple[Array, Array, Index | None]:
        shown = floats("confidence", confidence, finite=True).detach().cpu().double().numpy()
        single = shown.ndim == 0
        shape: tuple[int, ...] = () if single else (len(shown),)
        if shown.ndim > 1:
            raise InvalidArgumentError(f"confidence must be one number or of shape (N,); got shape {shown.shape}")
        if ((shown < 0) | (shown > 1)).any():
            raise InvalidArgumentError(f"confidence must lie in [0, 1]; got from {shown.min():g} to {shown.max():g}")
        outcome = outcomes("correct", correct, shape).detach().cpu().double().numpy()
        ids = None if configuration is None else integers("configuration", configuration, shape).cpu().numpy()
        return (*np.atleast_1d(shown, outcome), None if ids is None else np.atleast_1d(ids))

    def _take(self, shown: Array, outcome: Array, ids: Index | None) -> None:
        known = ~np.isnan(outcome)
        numbers = self.rows + np.flatnonzero(known)
        self.rows += len(shown)
        shown, outcome, ids = shown[known], outcome[known], None if ids is None else ids[known]
        slot = np.full(len(shown), -1) if ids is None else self._slots_of(ids)
        if ids is not None:
            self.left_out += int((slot < 0).sum())
        expected, slack = shown, np.zeros_like(shown)
        if self.baseline is not None:
            expected, slack = self.baseline.expected(shown, ids)
        rows = Rows(expected, np.maximum(self.tolerance, slack), outcome, slot, numbers)
        while len(rows.outcome):
            threshold = np.where(self._standing, np.inf, self._thresholds()[:, None])
            taken = self._streams.play(rows, threshold)
            for stream, side in np.argwhere(self._streams.evidence() >= threshold).tolist():
                self._raise(stream, side, int(rows.number[taken - 1]))
            rows = rows.part(slice(taken, None))

    def _slots_of(self, ids: Index) -> Index:
        different, first, where = np.unique(ids, return_index=True, return_inverse=True)
        for one in different[np.argsort(first)].tolist():  # in the order in which they came
            if one not in self._slots and len(self._slots) < self.max_configurations:
                self._slots[one] = len(self._slots) + 1
        extra = len(self._slots) + 1 - len(self._streams)
        if extra:
            self._streams.grow(len(self._streams) + extra)
            self._standing = np.concatenate([self._standing, np.zeros((extra, 2), bool)])
        return np.array([self._slots.get(one, -1) for one in different.tolist()], np.int64)[where]

    def _thresholds(self) -> Array:  # (J,) log
        """What each direction of a stream must reach: 1 / (alpha · the stream's share / 2)."""
        place = np.arange(1.0, len(self._streams))
        own = math.log1p(-self.global_share) + log_stream_weight(place, float(self.expected_configurations))
        whole = math.log(self.global_share) if self._grouped else 0.0
        return math.log(2 / self.alpha) - np.concatenate([[whole], own])

    def _raise(self, stream: int, side: int, row: int) -> None:
        streams, threshold = self._streams, float(self._thresholds()[stream])
        size = int(streams.best[stream, side].argmax())
        rows, gap, low, high = self._gap(stream, streams.stretch[stream, side, size])
        self._standing[stream, side] = True
        log_e = float(streams.evidence()[stream, side])
        self._alarms.append(
            Alarm(
                configuration=[None, *self._slots][stream],
                direction=DIRECTIONS[side],
                row=row,
                since=int(streams.since[stream, side, size]),
                rows=rows,
                gap=gap,
                low=low,
                high=high,
                e_value=math.exp(log_e) if log_e < 709 else math.inf,
                threshold=math.exp(threshold),
            )
        )

    def _gap(self, stream: int, sums: Array) -> tuple[int, float, float, float]:  # (3,) rows, gap, squares
        """Rows, mean gap and its interval; since the data chose the start, the interval holds for every start at once."""
        rows = int(sums[0])
        if not rows:
            return 0, math.nan, -1.0, 1.0
        begin = np.array([float(self._streams.seen[stream] - rows + 1)])
        log_alpha = math.log(2) - self._thresholds()[stream] + log_start_weight(begin, START_SCALE)[0]
        gap, half = float(sums[1]) / rows, half_width(float(sums[2]), rows, float(log_alpha))
        return rows, gap, max(gap - half, -1.0), min(gap + half, 1.0)
