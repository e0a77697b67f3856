"""The verdict of a report in three lines: may the score be used, from which confidence to act, and under which conditions.

A pure function of the report. A "yes" needs an interval that lies within the tolerance; where the rows are too few the verdict is
"not enough rows to say", and what was not measured is named. Intervals hold for all shifted sets together (Bonferroni).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_posterior.metrics import wilson_interval
from moe_posterior.report import promise, tables
from moe_posterior.report.baselines import CONSTANT, MODEL, TEMPERATURE
from moe_posterior.report.conditions import FAIL, PASS, RISK, UNSURE
from moe_posterior.report.places import base_of, severities_text
from moe_posterior.report.preference import preference_of
from moe_posterior.report.schema import OVERALL, VerdictRecord
from moe_posterior.report.versus import beats
from moe_posterior.results.tables import estimate, show

__all__ = ["ArmVerdict", "Verdict", "verdict_of"]

YES, NO, UNDECIDED, UNMEASURED = "yes", "no", "not enough rows to say", "not measured"
OF_CONDITIONS = {PASS: YES, FAIL: NO, UNSURE: UNDECIDED}
MOST_ROWS = 10**7  # beyond it more rows are no advice
LEAST_ROWS = 50  # below it the width of an interval says little of what more rows would give

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ArmVerdict:
    """What one arm's evidence allows; names of conditions are those of the page."""

    arm: str
    usable: str  # "yes", "no", "not enough rows to say", "not measured": on the stored test rows, within the tolerance
    acting: str  # the same of the action threshold's promise
    lines: tuple[str, str, str]
    tolerance: float | None
    threshold: float | None  # act from this confidence on
    max_risk: float | None  # promised share of wrong answers among those acted on
    risk: float | None  # measured on the stored test rows
    risk_interval: tuple[float, float] | None
    coverage: float | None
    passed: tuple[str, ...]  # sets on which the score is within the tolerance
    failed: tuple[str, ...]
    undecided: tuple[str, ...]
    kept: tuple[str, ...]  # sets on which the promise of the threshold held, its interval included
    broken: tuple[str, ...]
    unsure: tuple[str, ...]
    groups_failed: tuple[str, ...]  # groups on a set
    groups_undecided: tuple[str, ...]
    not_measured: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """One verdict per arm, and which arm to prefer."""

    arms: tuple[ArmVerdict, ...]
    preferred: str | None  # None: none is credibly better
    preference: str  # the reason; empty with a single arm

    @property
    def lines(self) -> tuple[str, ...]:
        """Everything in plain words; with several arms each line begins with its arm."""
        several = len(self.arms) > 1
        said = [f"{one.arm}: {line}" if several else line for one in self.arms for line in one.lines]
        return (*said, self.preference) if self.preference else tuple(said)

    def to_dict(self) -> VerdictRecord:
        """The same as strict JSON."""
        found: Any = asdict(self)
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines)


def verdict_of(report: Mapping[str, Any]) -> Verdict:
    """The verdict on every arm of a report, whole or partial.

    >>> condition = {"shift": "clean", "severity": 0, "group": "overall", "n": 900, "tolerance": 0.05, "verdict": "pass"}
    >>> condition |= {"arm": "a", "ece": 0.02, "interval": [0.0, 0.04], "comparisons": 1}
    >>> print(verdict_of({"arms": ["a"], "conditions": [condition]}))
    May the score be used? Yes, under the conditions named below: on clean (900 rows) its calibration error is 0.020 [0.000, 0.040], \
within the tolerance of 0.050.
    From which confidence to act: not measured in this run.
    Where: within the tolerance on clean. Not measured: shifts, groups, action threshold, trivial baselines, disagreement of experts.
    """
    found = tables.rows_of(report, "action")
    arms = list(report.get("arms") or dict.fromkeys(one.get("arm") or "the model" for one in found) or ["the model"])
    preferred, reason = preference_of(report)
    judged = tuple(_arm(report, arm, alone=len(arms) == 1) for arm in arms)
    doubt = next((one.usable for one in judged if one.arm == preferred and one.usable != YES), None)
    if doubt:
        reason = f"{reason} May its score be used? {doubt[0].upper()}{doubt[1:]}."
    return Verdict(judged, preferred, reason)


def _arm(report: Mapping[str, Any], arm: str, alone: bool) -> ArmVerdict:
    def own(key: str) -> list[Row]:
        rows = tables.rows_of(report, key)
        return [one for one in rows if one.get("arm") == arm or (alone and not one.get("arm"))]

    conditions, actions = own("conditions"), [one for one in own("action") if one.get("severity") is not None or alone]
    sets = [one for one in conditions if one["group"] == OVERALL]
    groups = [one for one in conditions if one["group"] != OVERALL]
    base = next((one for one in sets if not one["severity"]), None)
    stored = next((one for one in actions if not one.get("severity")), None)
    shifted = sum(bool(one.get("severity")) for one in actions)
    promises = [(one, _promised(one, shifted if one.get("severity") else 1)) for one in actions]
    versus = [one for one in own("versus") if one["panel"] == base_of(report) and one["against"] == MODEL]  # type: ignore[arg-type]
    missing = _missing(report, arm, sets, groups, actions, own)
    usable, first = _usable(base, versus)
    acting, second = _acting(stored)
    where = _where(sets, groups, promises)
    third = " ".join([*where, *([f"Not measured: {', '.join(missing)}."] if missing else [])])
    action = stored or {}
    return ArmVerdict(
        arm,
        usable,
        acting,
        (f"May the score be used? {first}", f"From which confidence to act: {second}", f"Where: {third}"),
        tolerance=None if base is None else base["tolerance"],
        threshold=action.get("threshold"),
        max_risk=action.get("max_risk"),
        risk=action.get("risk"),
        risk_interval=None if action.get("interval") is None else tuple(action["interval"]),
        coverage=action.get("coverage"),
        passed=_names(one for one in sets if one["verdict"] == PASS),
        failed=_names(one for one in sets if one["verdict"] == FAIL),
        undecided=_names(one for one in sets if one["verdict"] == UNSURE),
        kept=_names(one for one, word in promises if word == YES),
        broken=_names(one for one, word in promises if word == NO),
        unsure=_names(one for one, word in promises if word == UNDECIDED),
        groups_failed=_names(one for one in groups if one["verdict"] == FAIL),
        groups_undecided=_names(one for one in groups if one["verdict"] == UNSURE),
        not_measured=tuple(missing),
    )


def _usable(base: Row | None, versus: Sequence[Row]) -> tuple[str, str]:
    """Whether the score is within the tolerance on the stored test rows, and carries more than a constant does."""
    if base is None:
        return UNMEASURED, "Not measured in this run: the report holds no operating conditions."
    tolerance = show(base["tolerance"])
    said = f"on {base['shift']} ({show(base['n'])} rows) {_evidence(base)}"
    constant = next((one for one in versus if (one["name"], one["metric"]) == (CONSTANT, "brier")), None)
    if constant is not None and beats(constant):
        apart = show(estimate(constant["value"], constant["low"], constant["high"]))
        return NO, f"No: a constant confidence is the better score there (Brier score {apart} beside the model's)."
    if base["verdict"] == PASS:
        return YES, f"Yes, under the conditions named below: {said}, within the tolerance of {tolerance}."
    if base["verdict"] == FAIL:
        scaled = next((one for one in versus if (one["name"], one["metric"]) == (TEMPERATURE, "ece")), None)
        helps = scaled is not None and beats(scaled)
        advice = f" Temperature scaling lowers it by {show(-scaled['value'])}." if scaled and helps else ""
        return NO, f"No, not as it is: {said}, beyond the tolerance of {tolerance}.{advice}"
    return UNDECIDED, f"Not enough rows to say: {said}, on both sides of the tolerance of {tolerance}. {_needed(base)}"


def _evidence(base: Row) -> str:
    """The calibration error, and the mean gap where that decides: an interval of the one may pass while that of the other does not."""
    (low, high), tolerance, gap = base["interval"], base["tolerance"], base.get("gap")
    error = f"its calibration error is {show(estimate(base['ece'], low, high))}"
    explains = {FAIL: low > tolerance, UNSURE: low <= tolerance < high}
    if gap is None or explains.get(base["verdict"], True):
        return error
    return f"{error}, but its mean confidence less its accuracy is {show(estimate(gap, *base['gap_interval']))}"


def _needed(base: Row) -> str:
    """How many rows would settle it, since intervals shrink with the root of their number."""
    if base["n"] < LEAST_ROWS:
        return "So few rows do not show how many would settle it."
    errors = [(base["ece"], *base["interval"])]
    if (gap := base.get("gap")) is not None:
        low, high = base["gap_interval"]
        errors.append((gap, low, high) if gap >= 0 else (-gap, -high, -low))
    tolerance = base["tolerance"]
    fails = [(value - low) / (value - tolerance) for value, low, _ in errors if value > tolerance]
    passes = [(high - value) / (tolerance - value) for value, _, high in errors if value < tolerance]
    known = fails or (passes if len(passes) == len(errors) else [])  # one error beyond it is a no; a yes takes both
    wanted = (min(fails) if fails else max(passes)) if known else math.inf
    rows = base["n"] * wanted**2
    if rows > MOST_ROWS:
        return "The error is about the tolerance itself, and more rows may not settle it."
    digits = 10 ** max(math.floor(math.log10(max(rows, 1))) - 1, 0)
    return (
        f"About {show(max(math.ceil(rows / digits) * digits, base['n'] + 1))} rows would settle it if the error stays."
    )


def _acting(stored: Row | None) -> tuple[str, str]:
    """Whether the threshold kept its promise on the stored test rows."""
    if stored is None or stored.get("max_risk") is None:
        return UNMEASURED, "not measured in this run."
    said = f"at most {show(stored['max_risk'])} wrong among the answers acted on{promise.likely(stored)}"
    promised = f"promised {said}"
    if stored.get("threshold") is None:
        return NO, f"none. On the calibration rows no threshold can promise {said}."
    if stored.get("risk") is None:
        return UNDECIDED, f"{show(stored['threshold'])} acts on nothing there; {promised}."
    risk = show(estimate(stored["risk"], *(stored.get("interval") or ())))
    coverage = f", acting on {100 * stored['coverage']:.1f} %" if stored.get("coverage") is not None else ""
    measured = f"{promised}; measured {risk} on {stored.get('shift') or 'the stored test rows'}{coverage}"
    word = _promised(stored)
    if word == YES:
        return word, f"{show(stored['threshold'])}; {measured}."
    if word == NO:
        return word, f"not from {show(stored['threshold'])}, the threshold chosen; {measured}."
    return word, f"not enough rows to say whether {show(stored['threshold'])} keeps its promise; {measured}."


def _promised(row: Row, comparisons: int = 1) -> str:
    """Whether a risk is at most the promise: only where its whole interval is, at the level of so many sets judged together."""
    promised, risk = row.get("max_risk"), row.get("risk")
    if promised is None:
        return UNMEASURED
    if risk is None:
        return UNDECIDED
    low, high = row.get("interval") or (None, None)
    if comparisons > 1 and row.get("acted"):
        acted = torch.tensor(float(row["acted"]), dtype=torch.float64)
        low, high = map(float, wilson_interval(risk * acted, acted, level=1 - RISK / comparisons))
    if low is not None and low > promised + promise.ROUNDING:
        return NO
    return YES if high is not None and high <= promised + promise.ROUNDING else UNDECIDED


def _where(sets: Sequence[Row], groups: Sequence[Row], promises: Sequence[tuple[Row, str]]) -> list[str]:
    """The conditions by what was found, in sentences."""
    words = {PASS: "within the tolerance on", FAIL: "outside the tolerance on", UNSURE: "not enough rows to say on"}
    found = [f"{said} {names}" for word, said in words.items() if (names := _grouped(sets, word))]
    sentences = ["; ".join(found) + "."] if found else []
    broken = _compressed([one for one, word in promises if word == NO])
    if broken:
        sentences.append(f"The threshold breaks its promise on {broken}.")
    parts = []
    for group in dict.fromkeys(one["group"] for one in groups):
        rows = [one for one in groups if one["group"] == group]
        counts = {word: sum(one["verdict"] == word for one in rows) for word in (FAIL, UNSURE)}
        labels = {FAIL: "outside the tolerance on", UNSURE: "not enough rows to say on"}
        told = [f"{labels[word]} {count} of {len(rows)} sets" for word, count in counts.items() if count]
        parts.append(f"{group}: {' and '.join(told) or 'within the tolerance on every set'}")
    return [*sentences, *([f"Groups: {'; '.join(parts)}."] if parts else [])]


def _grouped(sets: Sequence[Row], word: str) -> str:
    return _compressed([one for one in sets if one["verdict"] == word])


def _compressed(rows: Sequence[Row]) -> str:
    """``clean, rotation (severities 3–5)``: a shift with its severities, and a plain name for the stored test rows."""
    shifts: dict[str, list[int]] = {}
    for one in rows:
        shifts.setdefault(str(one.get("shift") or "the stored test rows"), []).append(one.get("severity") or 0)
    parts = [
        name if severities == [0] else f"{name} ({severities_text(severities)})" for name, severities in shifts.items()
    ]
    return ", ".join(parts)


def _names(rows: Iterable[Row]) -> tuple[str, ...]:
    found = []
    for one in rows:
        shift = str(one.get("shift") or "the stored test rows")
        name = f"{shift}, severity {one['severity']}" if one.get("severity") else shift
        group = one.get("group") or OVERALL
        found.append(name if group == OVERALL else f"{group} on {name}")
    return tuple(found)


def _missing(
    report: Mapping[str, Any], arm: str, sets: Sequence[Row], groups: Sequence[Row], actions: Sequence[Row], own: Any
) -> list[str]:
    """What the verdict cannot speak of, by name."""
    known = {
        "conditions": bool(sets),
        "shifts": any(one["severity"] for one in sets),
        "groups": bool(groups),
        "action threshold": bool(actions),
        "trivial baselines": bool(own("baselines")),
        "disagreement of experts": bool(own("disagreement")),
    }
    left_out = [str(one["section"]) for one in tables.rows_of(report, "left_out") if one.get("arm") in (None, arm)]
    named = [name for name, held in known.items() if not held]
    covered = {"subgroups": "groups", "action threshold": "action threshold"}
    return [*named, *(name for name in left_out if covered.get(name) not in named and name not in named)]
