"""The study's records as tables: means over seeds and settings, paired differences, the curves.

A value is one cell's: (setting, seed). Intervals are t intervals over seeds of the mean over settings, so n is the number of seeds.
"""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from moe_posterior.escape import code
from moe_posterior.results import tables as results
from moe_posterior.results.intervals import mean_interval, plus_minus
from moe_posterior.results.tables import DASH, Table
from moe_posterior.training.study.plan import BELIEF_GATES, PUBLISHED

__all__ = ["paired", "tables_of", "to_markdown"]

Records = Sequence[Mapping[str, Any]]
Values = dict[int, float]  # seed -> mean over settings
Key = tuple[str, str, str]  # method, gate, calibrator
WITHIN = 0.01  # of the best accuracy
SHOWN = 10


def by_seed(records: Records, settings: Sequence[str] | None = None, **wanted: Any) -> Values:
    """The matching records' values, averaged over settings, for the seeds that have all of them."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        if all(record[key] == value for key, value in wanted.items()):
            found.setdefault(record["seed"], {})[record["setting"]] = record["value"]
    needed = {setting for values in found.values() for setting in values} if settings is None else set(settings)
    return {
        seed: mean(values[setting] for setting in needed) for seed, values in found.items() if needed <= values.keys()
    }


def paired(ours: Values, other: Values) -> tuple[float, float]:
    """Mean of ours − other over the seeds both have, and half of its 95 % interval.

    >>> paired({1: 0.1, 2: 0.2}, {1: 0.2, 2: 0.3, 3: 0.9})[0]
    -0.1
    """
    differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    if not differences:
        return math.nan, math.nan
    value, half = _interval(differences)
    return round(value, 12), half


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, correctly rounded because means of shares often end in a 5, and half of its 95 % interval."""
    return mean(values), mean_interval(values).half_width


def shown(values: Values) -> str:
    """Mean ± half of the interval, without leading zeros.

    >>> shown({42: 0.25, 43: 0.25})
    '.250 ± .000'
    """
    return _without_zeros(plus_minus(*_interval(list(values.values())))) if values else DASH


def _difference(ours: Values, other: Values) -> str:
    value, half = paired(ours, other)
    return DASH if math.isnan(value) else _without_zeros(plus_minus(value, half, sign="+"))


def _without_zeros(text: str) -> str:
    return re.sub(r"\b0\.", ".", text)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    return Table(columns, rows, note, title, right=False)


def tables_of(records: Records) -> list[Table]:
    """Every table that the records allow."""
    if not records:
        return []
    tables = [
        _methods(records),
        *([_settings(records)] if len({record["setting"] for record in records}) > 1 else []),
        _corrupted(records),
        _calibrators(records),
        _choice(records),
        _best(records),
        _online(records),
        _reweighted(records),
        _human(records),
    ]
    return [table for table in tables if table.rows]


def label(method: str, study: str) -> str:
    """A method as tables name it: where there are no images, FGR filters nothing."""
    return f"{method}, unfiltered" if method.startswith("fgr") and study != "cifar10h" else method


def _name(study: str) -> str:
    return {"pacs": "PACS", "comments": "CAD (keyword groups)", "cifar10h": "CIFAR-10H"}[study]


def _title(records: Records, what: str) -> str:
    seeds = len({record["seed"] for record in records})
    return f"{_name(records[0]['study'])}: {what}, {seeds} seed{'s' * (seeds != 1)}"


def _arms(records: Records) -> list[tuple[str, str]]:
    return list(dict.fromkeys((record["method"], record["gate"]) for record in records))


def _methods(records: Records) -> Table:
    rows = []
    first = "overall" if any(record["subset"] == "overall" for record in records) else "validation"
    for method, gate in _arms(records):
        arm = {"method": method, "gate": gate}

        def value(metric: str, calibrator: str = "none", subset: str = "hard", arm: dict[str, str] = arm) -> str:
            return shown(by_seed(records, **arm, metric=metric, calibrator=calibrator, subset=subset))

        rows.append(
            [
                label(method, records[0]["study"]),
                gate,
                value("accuracy", subset=first),
                value("ece", subset=first),
                value("accuracy"),
                value("ece"),
                value("ece_debiased"),
                value("ece_floor"),
                value("ece_debiased", "temperature"),
                value("ece_debiased", "expert temperature"),
                value("ece_debiased", "expert temperature, stopped"),
                value("nll"),
            ]
        )
    columns = ["method", "gate", f"{first} acc.", f"{first} ECE", "hard acc.", "hard ECE", "debiased"]
    columns += ["noise floor", "+ temperature"]
    note = (
        "15 equal-width bins; noise floor: the mean plain ECE if the confidences were right; with temperatures, fitted on validation "
        "rows, the debiased ECE. vanilla with expert temperatures is MoCaE; stopped: after 50 L-BFGS "
        "steps, as common code does. ± half of the 95 % t interval over seeds of the mean over "
        "settings."
    )
    return _table(_title(records, "methods"), [*columns, "+ expert temp.", "the same, stopped", "hard NLL"], rows, note)


def _error(records: Records) -> str:
    """The debiased error, where it was recorded: plain ones reward sharp confidences."""
    return "ece_debiased" if any(record["metric"] == "ece_debiased" for record in records) else "ece"


def _settings(records: Records) -> Table:
    settings = list(dict.fromkeys(record["setting"] for record in records))
    rows = [
        [
            label(method, records[0]["study"]),
            gate,
            *(
                shown(
                    by_seed(
                        [record for record in records if record["setting"] == setting],
                        method=method,
                        gate=gate,
                        metric=metric,
                        calibrator="none",
                        subset="hard",
                    )
                )
                for metric in ("accuracy", _error(records))
                for setting in settings
            ),
        ]
        for method, gate in _arms(records)
    ]
    columns = ["method", "gate", *(f"{metric} {setting}" for metric in ("acc.", "ECE") for setting in settings)]
    return _table(_title(records, "held-out domains one by one"), columns, rows, "ECE is debiased.")


def _corrupted(records: Records) -> Table:
    rows = []
    for method, gate in _arms(records) if any(record["subset"] == "corrupted" for record in records) else []:
        arm = {"method": method, "gate": gate, "subset": "corrupted"}
        cells = [
            ("accuracy", "none"),
            *((_error(records), name) for name in ("none", "temperature", "expert temperature")),
        ]
        values = [by_seed(records, **arm, metric=metric, calibrator=name) for metric, name in [*cells, ("nll", "none")]]
        rows.append([label(method, records[0]["study"]), gate, *(shown(value) for value in values)])
    columns = ["method", "gate", "acc.", "ECE", "+ temperature", "+ expert temp.", "NLL"]
    note = "Five corruptions at severity 3, the same 2,000 test images each. ECE is debiased."
    return _table(_title(records, "corrupted images"), columns, rows, note)


def _ranked(records: Records) -> list[tuple[Key, float, float, bool]]:
    """(combination, accuracy, error, eligible) on the simulated shifts, best first."""
    found = [record for record in records if record["subset"] == "simulated"]
    keys = dict.fromkeys((record["method"], record["gate"], record["calibrator"]) for record in found)

    def value(key: Key, metric: str) -> float:
        return mean(by_seed(found, method=key[0], gate=key[1], calibrator=key[2], metric=metric).values())

    scored = [(key, value(key, "accuracy"), value(key, "ece_debiased")) for key in keys]
    least = max((accuracy for _, accuracy, _ in scored), default=0.0) - WITHIN
    ranked = sorted(scored, key=lambda row: (row[1] < least, row[2]))
    return [(key, accuracy, error, accuracy >= least) for key, accuracy, error in ranked]


def _settings_of(records: Records) -> list[str]:
    return list(dict.fromkeys(record["setting"] for record in records))


def _choice(records: Records) -> Table:
    """Every combination on the simulated shifts, best first: what ours was chosen by."""
    found = [record for record in records if record["subset"] == "simulated"]
    rows = [
        [*key, _without_zeros(f"{accuracy:.3f}"), _without_zeros(f"{error:.3f}"), "yes" if eligible else "no"]
        for key, accuracy, error, eligible in _ranked(records)[:SHOWN]
    ]
    note = (
        f"The {SHOWN} best. Each training domain or group was left out once more and judged on; means over settings. Eligible: within "
        "1 point of the best accuracy. Debiased ECE; calibrators are fitted on the unshifted validation rows of the same run."
    )
    columns = ["method", "gate", "calibrator", "simulated acc.", "simulated ECE", "eligible"]
    return _table(_title(found or records, "combinations on simulated shift"), columns, rows, note)


def _calibrators(records: Records) -> Table:
    names = list(dict.fromkeys(r["calibrator"] for r in records if r["metric"] == "ece" and r["subset"] == "hard"))
    rows = [
        [
            label(method, records[0]["study"]),
            gate,
            *(
                shown(
                    by_seed(records, method=method, gate=gate, metric=_error(records), calibrator=name, subset="hard")
                )
                for name in names
            ),
        ]
        for method, gate in _arms(records)
    ]
    note = (
        "Debiased hard ECE. Fitted on validation rows; simulated and shift-aware temperatures on source domains or groups left out "
        "once more. adapted: the level of the shift is read from the unlabelled test rows."
    )
    return _table(_title(records, "calibrators"), ["method", "gate", *names], rows, note)


MOCAE = {"expert temperature": "mocae", "expert temperature, stopped": "mocae, stopped"}
# Where no shift was simulated: what PACS's simulated shift chooses.
ELSEWHERE: Key = ("robust configuration + robust", "posterior", "expert temperature, stopped")


def ours_of(records: Records) -> Key:
    """Our combination for one setting: the best on its simulated shifts among gates that hold a belief, eligible if there is one.

    Of one setting alone: what is held out for testing in one is a simulated shift of another, and must not choose for itself.
    """
    return next((key for key, *_ in _ranked(records) if key[1] in BELIEF_GATES), ELSEWHERE)


def is_published(method: str, gate: str, calibrator: str) -> bool:
    """A method as published: the softmax gate, and no calibration but MoCaE's own."""
    if method == "vanilla" and gate == "softmax":
        return calibrator == "none" or calibrator in MOCAE
    return method in PUBLISHED and gate == "softmax" and calibrator == "none"


def _best(records: Records) -> Table:
    """Our combination against every published method, as published and with the calibrator that ours uses."""
    keys = dict.fromkeys((r["method"], r["gate"], r["calibrator"]) for r in records)
    published = [key for key in keys if is_published(*key)]
    settings = {setting: [r for r in records if r["setting"] == setting] for setting in _settings_of(records)}
    choices = {setting: ours_of(found) for setting, found in settings.items()}
    equipped = [(key[0], key[1], "expert temperature") for key in published if key[2] == "none"]

    def value(key: Key, metric: str) -> Values:
        return by_seed(records, method=key[0], gate=key[1], calibrator=key[2], metric=metric, subset="hard")

    def of_choices(metric: str) -> Values:
        own = [
            by_seed(settings[setting], method=key[0], gate=key[1], calibrator=key[2], metric=metric, subset="hard")
            for setting, key in choices.items()
        ]
        seeds = set.intersection(*(set(values) for values in own))
        return {seed: mean(values[seed] for values in own) for seed in sorted(seeds)}

    error = _error(records)
    ours = {metric: of_choices(metric) for metric in (error, "accuracy")}
    named_ours = "ours" if len(set(choices.values())) > 1 else f"ours: {', '.join(next(iter(choices.values())))}"
    rows = [[named_ours, *(cell for m in ours for cell in (shown(ours[m]), DASH))]] if ours[error] else []
    for key in dict.fromkeys([*published, *equipped] if rows else []):
        named = (
            MOCAE[key[2]]
            if key[:2] == ("vanilla", "softmax") and key[2] in MOCAE
            else label(key[0], records[0]["study"])
        )
        suffix = f" + {key[2]}" if key[2] != "none" and named not in MOCAE.values() else ""
        cells = [[shown(value(key, m)), _difference(ours[m], value(key, m))] for m in ours]
        rows.append([named + suffix, *cells[0], *cells[1]])
    chosen = [f"{setting}: {', '.join(key)}" for setting, key in choices.items()]
    note = (
        f"ECE is debiased: a difference of plain ones rewards sharper confidences. The table makes {2 * max(len(rows) - 1, 0)} "
        "comparisons, and the intervals do not allow for their number. ours − other is paired over seeds; intervals are over "
        "training seeds and do not cover the draw of the test rows. Ours was chosen for each setting on its own simulated shift "
        f"alone ({'; '.join(chosen)}); where none was simulated, on PACS's."
    )
    columns = ["method", "hard ECE", "ours − other", "hard acc.", "ours − other "]
    return _table(_title(records, "ours against the published methods"), columns, rows, note)


def _online(records: Records) -> Table:
    metrics = list(dict.fromkeys(r["metric"] for r in records if r["calibrator"] == "online"))
    metrics.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
    rows = []
    for method, gate in _arms(records):
        curve = [
            by_seed(records, method=method, gate=gate, calibrator="online", subset="hard", metric=m) for m in metrics
        ]
        rows.append([label(method, records[0]["study"]), gate, *(shown(values) for values in curve)])
    columns = ["method", "gate", *(f"after {metric.rsplit('_', 1)[1]}" for metric in metrics)]
    note = (
        "Debiased hard ECE of the temperature-scaled aggregate on rows whose outcome never arrives, after so many others' outcomes; "
        "mean of five random orders."
    )
    return _table(_title(records, "ECE against outcomes delivered"), columns, rows if metrics else [], note)


def _reweighted(records: Records) -> Table:
    metrics = list(dict.fromkeys(r["metric"] for r in records if r["metric"].startswith("rce_")))
    names = list(dict.fromkeys(r["calibrator"] for r in records if r["metric"] in metrics))
    rows = []
    for method, gate in _arms(records):
        if gate != "posterior":
            continue
        for name in names:
            values = [by_seed(records, method=method, gate=gate, calibrator=name, metric=metric) for metric in metrics]
            rows.append([label(method, records[0]["study"]), name, *(shown(value) for value in values)])
    columns = ["method, posterior gate", "calibrator", *(f"ρ = {metric.removeprefix('rce_')}" for metric in metrics)]
    note = (
        "Debiased RCE(ρ) over routing configurations on rows of the training distribution that no calibrator has seen."
    )
    return _table(_title(records, "calibration error under reweighting"), columns, rows, note)


def _human(records: Records) -> Table:
    arms = _arms(records) if any(record["metric"] == "human_kl" for record in records) else []
    rows = [
        [
            label(method, records[0]["study"]),
            gate,
            *(
                shown(by_seed(records, method=method, gate=gate, calibrator=name, metric=metric, subset=subset))
                for metric in ("human_kl", "human_brier")
                for subset in ("overall", "hard")
                for name in ("none", "temperature")
            ),
        ]
        for method, gate in arms
    ]
    columns = [
        f"{metric} {subset}{scaled}"
        for metric in ("KL", "Brier")
        for subset in ("overall", "hard")
        for scaled in ("", " + temp.")
    ]
    note = "KL(human ‖ model) in nats and squared distance to the shares of human votes."
    return _table(_title(records, "distance to the human labels"), ["method", "gate", *columns], rows, note)


def to_markdown(tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """The tables and the command that makes them."""
    return "\n".join([*([results.to_markdown(*tables)] if tables else []), code(about["command"])]) + "\n"
