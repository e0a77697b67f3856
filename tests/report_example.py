"""A small report that measured everything, for the page and the card."""

import copy
import math

from moe_posterior.report.schema import SCHEMA

METRICS = {"accuracy": 0.9, "nll": 0.4, "brier": 0.2, "ece": 0.04}
BINS = {
    "lower": [0.0, 0.5, 1.0],
    "upper": [0.5, 1.0, 1.0],
    "confidence": [0.4, 0.8, None],
    "accuracy": [0.25, 0.75, None],
    "low": [0.1, 0.7, None],
    "high": [0.5, 0.8, None],
    "count": [4, 996, 0],
}


def record(arm: str, shift: str, severity: int | None, subset: str, metric: str, value: float, **more: object) -> dict:
    where = {"arm": arm, "shift": shift, "severity": severity, "subset": subset, "n": 1000}
    return {**where, **more, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01}


def full_report() -> dict:
    """Every section of the schema, two arms, two subsets, one shift at two severities."""
    arms = ["softmax", "posterior"]
    places = [
        ("clean", 0),
        ("fog", 1),
        ("fog", 2),
        ("fog", None),
        ("all shifts", 1),
        ("all shifts", 2),
        ("all shifts", None),
    ]
    records = [
        record(arm, shift, severity, subset, metric, value + 0.02 * (severity or 0) + 0.001 * arms.index(arm))
        for subset in ("overall", "hard")
        for arm in arms
        for shift, severity in places
        for metric, value in METRICS.items()
    ]
    paired = [
        {**one, "baseline": "softmax", "value": -0.02, "low": -0.03, "high": -0.01}
        for one in records
        if one["arm"] == "posterior"
    ]
    line = {"x": [0.0, 0.5, 1.0], "y": [0.01, 0.05, 0.2], "low": [0.0, 0.04, 0.15], "high": [0.02, 0.06, 0.25]}
    place = {"arm": "softmax", "panel": "clean"}
    apart = {"value": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.001, "p_holm": 0.002, "comparisons": 2}
    report = {
        "schema": SCHEMA,
        "n_bins": 2,
        "resamples": 100,
        "arms": arms,
        "baseline": "softmax",
        "subsets": {"overall": None, "hard": 100},
        "records": records,
        "paired": paired,
        "reliability": [
            {"arm": arm, "panel": panel, "sets": 1, "n": 1000, "accuracy": 0.748, "ece": 0.05, "bins": BINS}
            for arm in arms
            for panel in ("clean", "shifted")
        ],
        "configurations": [
            {"cluster": 0, "experts": [0, 1], "n": 500, "accuracy": 0.9, "confidence": 0.92},
            {"cluster": 1, "experts": [2, 3], "n": 400, "accuracy": 0.8, "confidence": 0.5, "interval": [-0.4, -0.2]},
            {"cluster": 2, "experts": [1, 3], "n": 3, "accuracy": 0.0, "confidence": 0.99},
            {"cluster": 3, "experts": [0, 3], "n": 97, "accuracy": None, "confidence": math.nan},
        ],
        "notes": ["Intervals are bootstrap intervals."],
        "identity": {
            "routing": {"softmax": "soft, top-2 of 4", "posterior": "posterior, top-2 of 4"},
            "model": "small net 1.2",
            "data": {"training": "digits 3", "validation": "digits 3, 10 %", "evaluation": "digits test"},
            "seed": 7,
            "versions": {"torch": "2.10"},
            "date": "2026-06-25",
            "command": "moe-posterior evaluate --run runs/x",
        },
        "shifts": [{"name": "fog", "severities": [1, 2], "n": 2000, "description": "grey veil"}],
        "metric": {"name": "top-label ECE", "binning": "equal mass", "n_bins": 2, "norm": "l2", "debiased": True},
        "subgroups": [
            {"arm": "softmax", "group": "left", "n": 600, "accuracy": 0.9, "ece": 0.03, "interval": [0.02, 0.05]},
            {"arm": "softmax", "group": "right", "n": 400, "accuracy": 0.7, "ece": 0.123, "worst": True},
        ],
        "shared_confidence": [{"arm": "softmax", "decimals": 2, "n": 1000, "shared": 870, "widest_gap": 0.31}],
        "calibrators": [
            {"name": "none", "ece": 0.1, "nll": 0.5, "accuracy": 0.8, "interval": [0.08, 0.12]},
            {"name": "temperature", "ece": 0.05, "nll": 0.4, "accuracy": 0.8},
        ],
        "conditions": [
            {
                "arm": arm,
                "shift": shift,
                "severity": severity,
                "group": group,
                "family": "the groups on every set" if group == "hard" else "the shifted sets",
                "comparisons": 2,
                "n": 1000,
                "tolerance": 0.05,
                "level": 0.975,
                "ece": 0.03,
                "interval": [0.01, 0.045],
                "gap": 0.01,
                "gap_interval": [-0.01, 0.03],
                "verdict": verdict,
            }
            for arm in arms
            for shift, severity, group, verdict in (
                ("clean", 0, "overall", "pass"),
                ("fog", 1, "overall", "fail"),
                ("fog", 2, "overall", "cannot say"),
                ("clean", 0, "hard", "fail"),
            )
        ],
        "baselines": [
            {**place, "name": "the model", "n": 1000, "accuracy": 0.9, "ece": 0.04, "brier": 0.2, "nll": 0.4},
            {**place, "name": "constant confidence", "detail": "0.900", "ece": 0.01, "brier": 0.18, "nll": 0.3},
        ],
        "versus": [
            {**place, "name": "constant confidence", "against": "the model", "metric": "ece", **apart},
            {**place, "name": "vector", "against": "temperature", "metric": "ece", **apart},
        ],
        "disagreement": [
            {
                **place,
                "n": 1000,
                "risk": 0.1,
                "aurc_confidence": 0.02,
                "aurc_disagreement": 0.03,
                "difference": 0.01,
                "interval": [0.005, 0.015],
                "abstentions": [
                    {"share": 0.1, "kept": 900, "risk_disagreement": 0.08, "risk_confidence": 0.06},
                ],
            }
        ],
        "about": {"model": "small net", "intended_use": "sorting mail", "contact": "desk@example.org"},
        "audit_log": {"path": "logs/routing", "verified": True, "head": "5f0c", "decisions": 1200},
        "action": {"threshold": 0.85, "risk": 0.031, "coverage": 0.62, "max_risk": 0.05},
        "risk_coverage": [{"name": arm, "panel": "clean", **line} for arm in arms],
        "rce": [{"name": name, **line} for name in ("none", "temperature")],
        "online": [{"name": "posterior", "x": [0, 10, 100, 500], "y": [0.2, 0.1, 0.05, 0.04]}],
        "operation": {"routing_log": "every decision", "abstention": "above 0.2", "conditions": ["indoors", "English"]},
    }
    return copy.deepcopy(report)
