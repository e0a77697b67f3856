"""The report's further sections: fitted on validation rows, judged on test rows, equal to a plain computation."""

import typing
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from moe_posterior.calibrators import TemperatureScaling
from moe_posterior.metrics import calibration_error
from moe_posterior.prediction import Prediction, joined
from moe_posterior.report import schema, to_html
from moe_posterior.report.sections import MAX_RISK, fit_calibrators, further_sections
from moe_posterior.report.whole import report_of


def judged(rows: int, seed: int, sharpness: float = 2.0) -> Prediction:
    """Three classes, two configurations; shown at a power of the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, 3, generator=generator)
    target = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    probs = (sharpness * logits).softmax(dim=-1)
    experts = torch.stack([probs, probs], dim=1)
    ids = torch.randint(2, (rows,), generator=generator)
    zeros = torch.zeros(rows)
    return Prediction(
        probs,
        experts,
        routing_weights=torch.full((rows, 2), 0.5),
        configuration=ids,
        novelty=zeros,
        disagreement=zeros,
        group=ids,
        target=target,
        row=torch.arange(rows),
    )


@pytest.fixture(scope="module")
def sections() -> tuple[dict, Prediction, Prediction]:
    validation, test = judged(800, 0), judged(1000, 1)
    mask = torch.arange(1000) < 300
    found = further_sections(
        {"one": fit_calibrators(validation)}, {"one": validation}, {"clean": {"one": test}}, {"hard": mask}
    )
    return found, validation, test


def test_calibrators_are_fitted_on_validation_rows_and_judged_on_test_rows(sections) -> None:
    found, validation, test = sections
    ece = {row["name"]: row["ece"] for row in found["calibrators"]}
    scaled = TemperatureScaling().fit(validation.outputs, validation.target)(test.outputs)
    assert ece["none"] == pytest.approx(float(calibration_error(test.probs, test.target, debias=True)), abs=1e-6)
    assert ece["temperature"] == pytest.approx(float(calibration_error(scaled, test.target, debias=True)), abs=1e-6)
    assert ece["temperature"] < ece["none"] / 2
    assert all(row["interval"][0] <= row["ece"] <= row["interval"][1] for row in found["calibrators"])


def test_the_threshold_keeps_its_promise_on_rows_like_those_it_was_chosen_on(sections) -> None:
    found, _, test = sections
    [action] = found["action"]
    confidence, label = test.probs.max(dim=1)
    acted = confidence >= action["threshold"]
    assert action["coverage"] == pytest.approx(float(acted.double().mean()))
    assert action["risk"] == pytest.approx(float((label != test.target)[acted].double().mean()))
    assert action["risk"] < MAX_RISK + 0.04


def test_groups_curves_and_outcomes_say_what_was_asked(sections) -> None:
    found, _, _ = sections
    [group] = found["subgroups"]
    assert (group["group"], group["n"], group["worst"]) == ("hard", 300, True)
    [online] = found["online"]
    assert online["x"] == [0, 10, 20, 50, 100, 200, 500]
    [shared] = found["shared_confidence"]
    assert shared["n"] == 1000
    assert 0 < shared["shared"] <= 1000
    assert {curve["name"] for curve in found["rce"]} == {
        *("one, none", "one, temperature", "one, configuration", "one, noise floor")
    }
    assert all(curve["y"] == sorted(curve["y"]) for curve in found["rce"])
    assert "outcomes" in to_html({**found, "arms": ["one"]})


def test_pooling_keeps_every_row() -> None:
    whole = joined([judged(10, 0), judged(20, 1)])
    assert len(whole.target) == len(whole.probs) == 30


def test_few_rows_have_no_curve_of_outcomes() -> None:
    validation, test = judged(300, 0), judged(150, 1)
    found = further_sections(
        {"one": fit_calibrators(validation)},
        {"one": validation},
        {"clean": {"one": test}},
        {"nobody": torch.zeros(150).bool()},
    )
    assert found["online"] == []
    assert found["subgroups"] == []


def test_copies_of_the_same_rows_do_not_narrow_an_interval() -> None:
    validation, test = judged(300, 0), judged(400, 1)
    fitted, nobody = {"one": fit_calibrators(validation)}, {}
    once, often = (
        further_sections(fitted, {"one": validation}, {"clean": {"one": panel}}, nobody)["calibrators"][0]["interval"]
        for panel in (test, joined([test] * 20))
    )
    assert often[1] - often[0] == pytest.approx(once[1] - once[0], rel=1e-6)


def test_what_has_no_finite_value_is_none() -> None:
    validation, test = judged(300, 0), judged(15, 1)
    hopeless = replace(validation, target=(validation.probs.argmax(dim=1) + 1) % 3)
    found = further_sections({"one": fit_calibrators(validation)}, {"one": hopeless}, {"clean": {"one": test}}, {})
    assert found["action"][0]["threshold"] is None
    assert found["rce"][0]["y"] == [None] * 6
    to_html({**found, "arms": ["one"]})


def declared(value: object, kind: object, where: str = "report") -> None:
    """Every key of the report's dicts is one that its type declares, and no key that the type requires is missing."""
    if typing.is_typeddict(kind):
        assert set(kind.__required_keys__) <= set(value) <= set(typing.get_type_hints(kind)), where
        for name, hint in typing.get_type_hints(kind).items():
            if name in value:
                declared(value[name], hint, f"{where}.{name}")
    elif typing.get_origin(kind) is Sequence:
        for one in value:
            declared(one, typing.get_args(kind)[0], where)


def test_a_report_of_several_arms_and_shifts_is_what_its_type_declares() -> None:
    validation = {arm: judged(300, 0, sharpness) for arm, sharpness in (("softmax", 2.0), ("posterior", 1.0))}
    predictions = [
        replace(judged(250, seed, sharpness), arm=arm, shift=shift, severity=severity)
        for seed, (shift, severity) in enumerate((("clean", 0), ("fog", 3), ("fog", 4)), 1)
        for arm, sharpness in (("softmax", 2.0), ("posterior", 1.0))
    ]
    fitted = {arm: fit_calibrators(one) for arm, one in validation.items()}
    hard = torch.arange(250) < 100
    sets = [("clean", 0), ("fog", 3), ("fog", 4)]
    report = report_of(
        iter(predictions), validation, fitted, {"overall": hard | True, "hard": hard}, sets, resamples=20
    )
    declared(report, schema.Report)
    assert {row["panel"] for row in report["calibrators"]} == {"clean", "2 sets pooled (1 shift, severities 3–4)"}
    assert {(row["arm"], row["shift"], row["severity"]) for row in report["action"]} == {
        (arm, *place) for arm in validation for place in (*sets, ("fog", None))
    }
    again = report_of(predictions, validation, fitted, {"hard": hard}, sets, resamples=20)
    assert again == report
