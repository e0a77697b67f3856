"""The study's tables: every method, setting, calibrator and curve that the records allow."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_posterior.escape import code
from moe_posterior.results import tables as results
from moe_posterior.results.tables import Table
from moe_posterior.training.study.choice import against_published, on_simulated_shift
from moe_posterior.training.study.values import Records, arms_of, by_seed, error_metric, label, shown, table, title

__all__ = ["tables_of", "to_markdown"]


def tables_of(records: Records) -> list[Table]:
    """Every table that the records allow."""
    if not records:
        return []
    tables = [
        _methods(records),
        *([_settings(records)] if len({record["setting"] for record in records}) > 1 else []),
        _corrupted(records),
        _calibrators(records),
        on_simulated_shift(records),
        against_published(records),
        _online(records),
        _reweighted(records),
        _human(records),
    ]
    return [table for table in tables if table.rows]


def _methods(records: Records) -> Table:
    rows = []
    first = "overall" if any(record["subset"] == "overall" for record in records) else "validation"
    for method, gate in arms_of(records):
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
    return table(title(records, "methods"), [*columns, "+ expert temp.", "the same, stopped", "hard NLL"], rows, note)


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
                for metric in ("accuracy", error_metric(records))
                for setting in settings
            ),
        ]
        for method, gate in arms_of(records)
    ]
    columns = ["method", "gate", *(f"{metric} {setting}" for metric in ("acc.", "ECE") for setting in settings)]
    return table(title(records, "held-out domains one by one"), columns, rows, "ECE is debiased.")


def _corrupted(records: Records) -> Table:
    rows = []
    for method, gate in arms_of(records) if any(record["subset"] == "corrupted" for record in records) else []:
        arm = {"method": method, "gate": gate, "subset": "corrupted"}
        cells = [
            ("accuracy", "none"),
            *((error_metric(records), name) for name in ("none", "temperature", "expert temperature")),
        ]
        values = [by_seed(records, **arm, metric=metric, calibrator=name) for metric, name in [*cells, ("nll", "none")]]
        rows.append([label(method, records[0]["study"]), gate, *(shown(value) for value in values)])
    columns = ["method", "gate", "acc.", "ECE", "+ temperature", "+ expert temp.", "NLL"]
    note = "Five corruptions at severity 3, the same 2,000 test images each. ECE is debiased."
    return table(title(records, "corrupted images"), columns, rows, note)


def _calibrators(records: Records) -> Table:
    names = list(dict.fromkeys(r["calibrator"] for r in records if r["metric"] == "ece" and r["subset"] == "hard"))
    rows = [
        [
            label(method, records[0]["study"]),
            gate,
            *(
                shown(
                    by_seed(
                        records, method=method, gate=gate, metric=error_metric(records), calibrator=name, subset="hard"
                    )
                )
                for name in names
            ),
        ]
        for method, gate in arms_of(records)
    ]
    note = (
        "Debiased hard ECE. Fitted on validation rows; simulated and shift-aware temperatures on source domains or groups left out "
        "once more. adapted: the level of the shift is read from the unlabelled test rows."
    )
    return table(title(records, "calibrators"), ["method", "gate", *names], rows, note)


def _online(records: Records) -> Table:
    metrics = list(dict.fromkeys(r["metric"] for r in records if r["calibrator"] == "online"))
    metrics.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
    rows = []
    for method, gate in arms_of(records):
        curve = [
            by_seed(records, method=method, gate=gate, calibrator="online", subset="hard", metric=m) for m in metrics
        ]
        rows.append([label(method, records[0]["study"]), gate, *(shown(values) for values in curve)])
    columns = ["method", "gate", *(f"after {metric.rsplit('_', 1)[1]}" for metric in metrics)]
    note = (
        "Debiased hard ECE of the temperature-scaled aggregate on rows whose outcome never arrives, after so many others' outcomes; "
        "mean of five random orders."
    )
    return table(title(records, "ECE against outcomes delivered"), columns, rows if metrics else [], note)


def _reweighted(records: Records) -> Table:
    metrics = list(dict.fromkeys(r["metric"] for r in records if r["metric"].startswith("rce_")))
    names = list(dict.fromkeys(r["calibrator"] for r in records if r["metric"] in metrics))
    rows = []
    for method, gate in arms_of(records):
        if gate != "posterior":
            continue
        for name in names:
            values = [by_seed(records, method=method, gate=gate, calibrator=name, metric=metric) for metric in metrics]
            rows.append([label(method, records[0]["study"]), name, *(shown(value) for value in values)])
    columns = ["method, posterior gate", "calibrator", *(f"ρ = {metric.removeprefix('rce_')}" for metric in metrics)]
    note = (
        "Debiased RCE(ρ) over routing configurations on rows of the training distribution that no calibrator has seen."
    )
    return table(title(records, "calibration error under reweighting"), columns, rows, note)


def _human(records: Records) -> Table:
    arms = arms_of(records) if any(record["metric"] == "human_kl" for record in records) else []
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
    return table(title(records, "distance to the human labels"), ["method", "gate", *columns], rows, note)


def to_markdown(tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """The tables and the command that makes them."""
    return "\n".join([*([results.to_markdown(*tables)] if tables else []), code(about["command"])]) + "\n"
