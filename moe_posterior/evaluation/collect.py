"""From pieces of predictions to a report: one pass over every set of every model, then the road that trained runs take too.

Dimensions: n rows of a piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.evaluation.columns import Columns, Vocabulary
from moe_posterior.evaluation.routes import MOST, Routes
from moe_posterior.evaluation.running import Running
from moe_posterior.evaluation.survey import MOST_HELD_OUT, Key, Plan, place_text
from moe_posterior.prediction import Prediction, Whole
from moe_posterior.report.conditions import TOLERANCE
from moe_posterior.report.schema import Report, Shift
from moe_posterior.report.sections import fit_calibrators
from moe_posterior.report.whole import report_of

__all__ = ["Collector", "Settings", "Words"]

APART = 1 << 40  # between the numbers of rows of unlike sets


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    seed: int = 0
    resamples: int = 1000
    n_bins: int = 15
    max_risk: float = 0.1
    sample: int = 50_000  # rows of a set that are kept
    hold_out: float = 0.3  # share of the base set's rows, where no calibration rows are given
    tolerance: float = TOLERANCE


@dataclass
class Words:
    """Names behind the codes in all pieces: groups, and routing configurations."""

    groups: dict[str, Vocabulary] = field(default_factory=dict)
    named: Vocabulary = field(default_factory=lambda: Vocabulary("configurations", most=1 << 20))
    routes: Routes = field(default_factory=Routes)
    rounded: int = 0  # rows of probabilities that did not sum to 1 and were divided by their sum

    def group(self, column: str, values: list, index: np.ndarray) -> np.ndarray:  # (n,) into values -> (n,) codes
        """Codes of a column of groups."""
        return self.groups.setdefault(column, Vocabulary(column or "groups")).codes(values, index)

    def routed(self, weights: np.ndarray | None, values: list | None, index: np.ndarray | None) -> np.ndarray | None:
        """Codes of the routing configurations, from weights, names, or both; None without either."""
        if weights is None and index is None:
            return None
        named = None if index is None else self.named.codes(values or [], index)
        return self.routes.codes(weights, named, self.named.names)


class Collector:
    """Takes the pieces in and makes the report.

    Args:
        plan: which sets there are.
        settings: of the user.
        words: of all pieces.
        calibrated: whether the user gives calibration rows, with :meth:`calibrate`.
    """

    def __init__(self, plan: Plan, settings: Settings, words: Words, *, calibrated: bool = False) -> None:
        self.plan, self.settings, self.words = plan, settings, words
        self._running: dict[Key, Running] = {}
        self._calibration: dict[str, Running] = {}
        self._position: dict[Key, int] = {}
        self._given = calibrated

    def add(self, key: Key, columns: Columns) -> None:
        """Some more rows of a set."""
        model, place = key[0], key[1:]
        ids = self._ids(key, columns)
        held = self.plan.is_held_out(place, ids, self.settings.seed)
        if held.any():
            if place == self.plan.base:
                self._calibrating(model).add(columns[held], ids[held])
            columns, ids = columns[~held], ids[~held]
        if key not in self._running:
            self._running[key] = Running(self.settings.sample, self.settings.n_bins, self.settings.seed)
        self._running[key].add(columns, ids)

    def calibrate(self, model: str, columns: Columns) -> None:
        """Some more calibration rows, that the user gave for a model."""
        if len(columns):
            self._calibrating(model).add(columns, self._ids((model, "calibration", -1), columns))

    def report(self) -> Report:
        """The report, with notes on what is measured on which rows.

        Raises:
            InvalidArgumentError: a set of which every row was held out; no calibration rows of a model, where they are given, or some
                that are test rows; row ids twice.
        """
        for (_, shift, severity), running in self._running.items():
            if not running.rows:
                raise InvalidArgumentError(
                    f"hold_out must leave rows to judge on; all rows of {place_text((shift, severity))} are held out: hold out "
                    "fewer, or give calibration rows of their own"
                )
        plan, settings = self.plan, self.settings
        if self._given and (absent := [model for model in plan.models if model not in self._calibration]):
            raise InvalidArgumentError(f"calibration rows must be given of every model; got none of {absent}")
        if self._given:
            self._require_other_rows()
        validation = {model: self._validation(model) for model in plan.models if model in self._calibration}
        fitted = {model: fit_calibrators(one) for model, one in validation.items()}
        predictions = self.predictions()
        report = report_of(
            predictions,
            validation,
            fitted,
            {},
            plan.sets,
            baseline=plan.models[0],
            max_risk=settings.max_risk,
            n_bins=settings.n_bins,
            resamples=settings.resamples,
            seed=settings.seed,
            tolerance=settings.tolerance,
        )
        classes = all(running.classes for running in self._running.values())
        notes = [*report["notes"], *self._notes(classes)]
        identity: dict[str, Any] = {
            "model": ", ".join(plan.models),
            "data": self._data(),
            "seed": settings.seed,
            "versions": {name: version(name) for name in ("moe-posterior", "torch")},
        }
        return {**report, "notes": notes, "identity": identity, "shifts": self._shifts()}  # type: ignore[typeddict-item]

    def predictions(self) -> Iterator[Prediction]:
        """The predictions of every model on every set, with exact sums where they are a sample."""
        for place in self.plan.sets:
            for model in self.plan.models:
                running = self._running[model, *place]
                columns, ids = running.finish()
                if columns.row is not None and len(np.unique(ids)) < len(ids):
                    raise InvalidArgumentError(f"row ids must differ within {place_text(place)}; got one twice")
                row = torch.from_numpy(ids.view(np.int64))
                if columns.row is None:
                    row = row + APART * self.plan.number(place)
                found = self._prediction(model, columns, ids)
                yield replace(
                    found,
                    row=row,
                    shift=place[0],
                    severity=place[1],
                    subsets=self._subsets(columns),
                    whole=self._whole(running) if running.n > len(columns) else None,
                )

    def _require_other_rows(self) -> None:
        """Calibration rows are none of those that are judged, as far as ids, or equal predictions on all rows, can tell."""
        for model, place in ((model, place) for model in self.plan.models for place in self.plan.sets):
            (held, own), (found, ids) = self._calibration[model].finish(), self._running[model, *place].finish()
            if held.row is not None and found.row is not None:
                _, first, second = np.intersect1d(own, ids, return_indices=True)
                same = len(first) > 0 and np.array_equal(held.target[first], found.target[second])
            else:
                equal = np.array_equal(held.probs, found.probs) and np.array_equal(held.target, found.target)
                same = equal and bool((held.probs != held.probs[:1]).any())  # of a constant, other rows look the same
            if same:
                raise InvalidArgumentError(
                    f"calibration must hold other rows than those that are judged; got rows of {place_text(place)}"
                )

    def _ids(self, key: Key, columns: Columns) -> np.ndarray:
        if columns.row is not None:
            return columns.row
        start = self._position.get(key, 0)
        self._position[key] = start + len(columns)
        return np.arange(start, start + len(columns), dtype=np.uint64)

    def _calibrating(self, model: str) -> Running:
        if model not in self._calibration:
            self._calibration[model] = Running(MOST_HELD_OUT, self.settings.n_bins, self.settings.seed)
        return self._calibration[model]

    def _validation(self, model: str) -> Prediction:
        return self._prediction(model, *self._calibration[model].finish())

    def _prediction(self, model: str, columns: Columns, ids: np.ndarray) -> Prediction:
        probs = torch.from_numpy(columns.probs)
        weights, experts = (
            None if part is None else torch.from_numpy(part) for part in (columns.weights, columns.experts)
        )
        disagreement = None
        if experts is not None:
            share = torch.full(experts.shape[:2], 1 / experts.shape[1], dtype=experts.dtype)
            if weights is not None:
                share = weights / weights.sum(1, keepdim=True)
            gap = (experts - probs[:, None]).square().sum(-1)
            disagreement = (share * gap).sum(-1)
        routed = columns.configuration is not None
        return Prediction(
            probs,
            experts,
            routing_weights=weights,
            configuration=None if columns.configuration is None else torch.from_numpy(columns.configuration),
            configuration_names=dict(enumerate(self.words.routes.names)) if routed else None,
            disagreement=disagreement,
            target=torch.from_numpy(columns.target),
            row=torch.from_numpy(ids.view(np.int64)),
            arm=model,
        )

    def _subsets(self, columns: Columns) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(columns.groups[column] == code)
            for column, code, name in self._named_groups()
            if column in columns.groups
        }

    def _whole(self, running: Running) -> Whole:
        totals = {column: running.totals(column) for column in self.words.groups}
        subsets = {
            name: totals[column][code] for column, code, name in self._named_groups() if code < len(totals[column])
        }
        return Whole(running.overall, {name: one for name, one in subsets.items() if one.n}, running.configurations())

    def _named_groups(self) -> Iterator[tuple[str, int, str]]:
        """Column, code and name of every group; a column with a single value says nothing."""
        for column, vocabulary in self.words.groups.items():
            if len(vocabulary.names) > 1:
                for code, value in sorted(enumerate(vocabulary.names), key=lambda pair: str(pair[1])):
                    yield column, code, f"{column}={value}" if column else str(value)

    def _shifts(self) -> list[Shift]:
        """The sets that are no unshifted test rows; none where nothing else was given."""
        found: dict[str, Shift] = {}
        for shift, severity in self.plan.sets[1:]:
            one = found.setdefault(shift, {"name": shift, "severities": [], "n": 0})
            one["severities"] = [*one["severities"], severity]
            one["n"] = (one["n"] or 0) + self._running[self.plan.models[0], shift, severity].n
        return list(found.values())

    def _data(self) -> dict[str, str]:
        sizes = {place: self._running[self.plan.models[0], *place].n for place in self.plan.sets}
        found = {"evaluation": "; ".join(f"{place_text(place)}: {n:,} rows" for place, n in sizes.items())}
        if self._calibration:
            rows = next(iter(self._calibration.values())).n
            found["calibration"] = f"{rows:,} rows " + (
                "of their own" if self._given else f"held out of {self.plan.base[0]}"
            )
        return found

    def _notes(self, classes: bool) -> Iterator[str]:
        plan, settings = self.plan, self.settings
        if not classes:
            yield (
                "Only the confidence in each answer was given: NLL and Brier score are those of the event that the answer is right, "
                "and cannot be compared with those of class probabilities."
            )
        if self._calibration and not self._given:
            yield from self._held_out_notes()
        if not self._calibration:
            yield "No rows were held out: there are no calibrators and no action threshold."
        large = [place for place in plan.sets if self._running[plan.models[0], *place].n > settings.sample]
        if large:
            yield (
                f"Sets of more than {settings.sample:,} rows: {', '.join(map(place_text, large))}. Their accuracy, NLL, Brier score, "
                "ECE, reliability bins, groups and configurations are sums over all rows. How rows vary together, for the intervals, "
                f"comes from a random sample of {settings.sample:,} rows; calibrators, curves and risks are measured on it."
            )
        if self.words.rounded:
            yield f"{self.words.rounded:,} rows of probabilities, as they were rounded, did not sum to 1 and were divided by their sum."
        if len(self.words.routes.names) >= MOST:
            yield f"Only the {MOST:,} routing configurations met first are told apart."

    def _held_out_notes(self) -> Iterator[str]:
        plan, n = self.plan, self.plan.facts[self.plan.models[0], *self.plan.base].n
        yield (
            f"{plan.held_out:,} of the {n:,} rows of {plan.base[0]} ({100 * plan.held_out / n:.0f} %), chosen at random with seed "
            f"{self.settings.seed}, were held out to fit calibrators and to choose the action threshold. Everything "
            "is judged on the others."
        )
        shared = [place for place in plan.sets[1:] if place in plan.same]
        if shared:
            yield f"The same rows were left out of {', '.join(map(place_text, shared))}, as far as they hold them."
        apart = [place for place in plan.sets[1:] if place not in plan.same]
        if apart:
            yield f"Taken as other rows than those of {plan.base[0]}: {', '.join(map(place_text, apart))}."
