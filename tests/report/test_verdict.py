"""The verdict: a yes only where intervals lie within the tolerance, and nothing unmeasured passed over in silence."""

import copy
import dataclasses
import json

import pytest
import torch
from report_example import full_report

from moe_posterior.prediction import Prediction
from moe_posterior.report.preference import preference_of
from moe_posterior.report.schema import ArmVerdictRecord, VerdictRecord
from moe_posterior.report.sections import fit_calibrators
from moe_posterior.report.verdict import NO, UNDECIDED, UNMEASURED, YES, ArmVerdict, Verdict, verdict_of
from moe_posterior.report.whole import report_of


def answers(n: int, accuracy: float, confidence: float = 0.9, seed: int = 0, **where) -> Prediction:
    """Binary answers of one displayed confidence and a random share right."""
    right = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < accuracy
    jitter = 0.05 * (torch.rand(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) - 0.5)
    probs = torch.stack([confidence + jitter, 1 - confidence - jitter], dim=1)
    return Prediction(probs, target=(~right).long(), row=torch.arange(n), arm="a", **where)


def judged(*tests: Prediction, subsets: dict | None = None, **settings) -> ArmVerdict:
    validation = {"a": answers(2000, 0.93, seed=7)}
    kinds = {"a": fit_calibrators_of(validation["a"])}
    sets = [(one.shift, one.severity) for one in tests]
    report = report_of(tests, validation, kinds, subsets or {}, sets, resamples=100, **settings)
    assert report["verdict"] == verdict_of(report).to_dict()
    json.dumps(report, allow_nan=False)
    (arm,) = verdict_of(report).arms
    return arm


def fit_calibrators_of(validation: Prediction) -> dict:
    known = fit_calibrators(validation)
    return {"temperature": known["temperature"]}


def test_a_calibrated_model_on_many_rows_may_be_used_and_acted_on() -> None:
    found = judged(answers(4000, 0.92), answers(4000, 0.6, shift="fog", severity=3))
    assert (found.usable, found.acting) == (YES, YES)
    assert found.passed == ("clean",)
    assert found.failed == ("fog, severity 3",)
    assert (found.kept, found.broken) == (("clean",), ("fog, severity 3",))
    assert found.risk_interval[0] < found.risk < found.risk_interval[1] <= found.max_risk
    first, second, third = found.lines
    assert "Yes" in first
    assert "4,000 rows" in first
    assert f"{found.risk:.3f}" in second
    assert "promised at most 0.100" in second
    assert "outside the tolerance on fog (severity 3)" in third
    assert "breaks its promise on fog (severity 3)" in third


def test_few_rows_never_give_a_yes_and_say_how_many_would_do() -> None:
    found = judged(answers(60, 0.92))
    assert (found.usable, found.acting) == (UNDECIDED, UNDECIDED)
    assert "Not enough rows to say" in found.lines[0]
    assert "rows would settle it" in found.lines[0]
    assert "not enough rows to say" in found.lines[1]


@pytest.mark.parametrize(
    ("interval", "gap_interval", "word", "decisive"),
    [
        ([0.0, 0.024], [-0.06, 0.06], "cannot say", "0.000 [−0.060, 0.060], on both sides"),
        ([0.0, 0.024], [-0.07, 0.01], "cannot say", "−0.030 [−0.070, 0.010], on both sides"),
        ([0.01, 0.07], [-0.06, 0.06], "cannot say", "error is 0.020 [0.010, 0.070], on both sides"),
        ([0.01, 0.07], [0.051, 0.08], "fail", "0.066 [0.051, 0.080], beyond"),
        ([0.051, 0.07], [-0.01, 0.02], "fail", "error is 0.020 [0.051, 0.070], beyond"),
        ([0.0, 0.04], [-0.01, 0.02], "pass", "error is 0.020 [0.000, 0.040], within"),
    ],
)
def test_the_first_line_names_the_interval_that_decided(
    interval: list[float], gap_interval: list[float], word: str, decisive: str
) -> None:
    condition = {"shift": "clean", "severity": 0, "group": "overall", "n": 900, "tolerance": 0.05, "verdict": word}
    condition |= {"arm": "a", "ece": 0.0 if "0.000 [−" in decisive else 0.02, "interval": interval, "comparisons": 1}
    condition |= {"gap": sum(gap_interval) / 2, "gap_interval": gap_interval}
    found = verdict_of({"arms": ["a"], "conditions": [condition]}).arms[0]
    assert decisive in found.lines[0]


def test_the_rows_that_would_settle_it_count_for_the_interval_that_is_still_too_wide() -> None:
    condition = {"shift": "clean", "severity": 0, "group": "overall", "n": 900, "tolerance": 0.05, "arm": "a"}
    condition |= {"verdict": "cannot say", "ece": 0.0, "interval": [0.0, 0.024], "gap": 0.0, "comparisons": 1}
    lines = verdict_of({"arms": ["a"], "conditions": [condition | {"gap_interval": [-0.1, 0.1]}]}).arms[0].lines
    assert "About 3,600 rows would settle it" in lines[0]  # half the width at four times the rows
    lines = verdict_of({"arms": ["a"], "conditions": [condition | {"n": 3, "gap_interval": [-0.6, 0.6]}]}).arms[0].lines
    assert "would settle it" not in lines[0].replace("how many would settle it", "")


def test_a_miscalibrated_model_is_refused() -> None:
    found = judged(answers(4000, 0.6))
    assert (found.usable, found.acting) == (NO, NO)
    assert "beyond the tolerance" in found.lines[0]
    assert "not from" in found.lines[1]


def test_a_score_that_a_constant_beats_is_refused_although_it_is_within_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(3)
    right = torch.rand(20_000, generator=generator, dtype=torch.float64) < 0.93
    noise = torch.rand(20_000, generator=generator, dtype=torch.float64) < 0.5
    confidence = torch.where(noise, 0.99, 0.87).double()  # says nothing about which answer is right
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    found = judged(Prediction(probs, target=(~right).long(), row=torch.arange(20_000), arm="a"), tolerance=0.2)
    assert found.usable == NO
    assert "a constant confidence is the better score" in found.lines[0]


def test_what_was_not_measured_is_named() -> None:
    found = judged(answers(500, 0.92))
    assert {"shifts", "groups", "disagreement of experts"} <= set(found.not_measured)
    assert "Not measured: shifts, groups" in found.lines[2]
    silent = verdict_of({}).arms[0]
    assert (silent.usable, silent.acting) == (UNMEASURED, UNMEASURED)
    assert "action threshold" in silent.not_measured


def test_groups_outside_the_tolerance_are_named() -> None:
    one = answers(4000, 0.92)
    wrong = one.target == 1  # a group of wrong answers alone
    found = judged(one, subsets={"unlucky": wrong, "lucky": ~wrong})
    assert "unlucky on clean" in found.groups_failed
    assert "unlucky: outside the tolerance on 1 of 1 sets" in found.lines[2]


def test_a_promise_under_many_shifts_is_judged_for_all_of_them_together() -> None:
    row = {"arm": "a", "shift": "fog", "max_risk": 0.1, "threshold": 0.5, "risk": 0.128, "acted": 629, "coverage": 1.0}
    alone = {"arms": ["a"], "action": [{**row, "severity": 1, "interval": [0.104, 0.156]}]}
    many = {"arms": ["a"], "action": [{**row, "severity": s, "interval": [0.104, 0.156]} for s in range(1, 21)]}
    assert verdict_of(alone).arms[0].broken == ("fog, severity 1",)
    assert verdict_of(many).arms[0].broken == ()
    assert len(verdict_of(many).arms[0].unsure) == 20


def test_no_threshold_and_nothing_acted_on_are_no_yes() -> None:
    row = {"arm": "a", "shift": "clean", "severity": 0, "max_risk": 0.1, "risk": None, "coverage": 0.0}
    never = verdict_of({"arms": ["a"], "action": [{**row, "threshold": None}]}).arms[0]
    idle = verdict_of({"arms": ["a"], "action": [{**row, "threshold": 0.9}]}).arms[0]
    assert (never.acting, idle.acting) == (NO, UNDECIDED)


def brier(arm: str, value: float, severity: int | None, shift: str) -> dict:
    where = {"arm": arm, "shift": shift, "severity": severity, "subset": "overall", "metric": "brier"}
    return {**where, "value": value, "low": value - 0.01, "high": value + 0.01, "p_holm": 0.001}


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([("b", -0.02, 0), ("c", 0.0, 0)], "b"),
        ([("b", -0.02, 0), ("b", 0.03, None)], None),  # better here, worse there
        ([("b", 0.02, 0), ("c", 0.02, None)], "a"),
        ([("b", -0.02, 0), ("c", -0.02, 0)], None),  # both better: not compared with each other
        ([("b", 0.0, 0), ("c", 0.02, 0)], None),
    ],
)
def test_an_arm_is_preferred_only_where_it_is_credibly_better(pairs: list, wanted: str | None) -> None:
    rows = [brier(arm, value, severity, "clean" if severity == 0 else "all shifts") for arm, value, severity in pairs]
    preferred, reason = preference_of({"arms": ["a", "b", "c"], "baseline": "a", "paired": rows})
    assert preferred == wanted
    assert reason


def test_a_preferred_arm_that_may_not_be_used_says_so() -> None:
    found = verdict_of({"arms": ["a", "b"], "baseline": "a", "paired": [brier("b", -0.02, 0, "clean")]})
    assert found.preferred == "b"
    assert found.preference.endswith("May its score be used? Not measured.")


def test_the_verdict_is_pure_frozen_and_as_the_schema_says() -> None:
    report = full_report()
    before = copy.deepcopy(report)
    found = verdict_of(report)
    assert str(report) == str(before)
    assert isinstance(found, Verdict)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.preferred = "x"
    assert set(found.to_dict()) == set(VerdictRecord.__annotations__)
    assert all(set(arm) == set(ArmVerdictRecord.__annotations__) for arm in found.to_dict()["arms"])
    assert len(found.lines) == 3 * len(found.arms) + bool(found.preference)
