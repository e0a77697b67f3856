"""report.json against its published JSON schema."""

import copy
import json
from pathlib import Path

import pytest
import torch
from report_example import full_report

from moe_posterior.prediction import Prediction
from moe_posterior.report import evaluate_predictions
from moe_posterior.report.card import to_card
from moe_posterior.report.html import to_html
from moe_posterior.report.json_schema import derived, published
from moe_posterior.report.schema import SCHEMA

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "results" / "demo" / "report.json"


def problems(report: dict, **how: bool) -> list[str]:
    kind = jsonschema.Draft202012Validator
    return [f"{one.json_path}: {one.message}" for one in kind(derived(**how)).iter_errors(report)]


def test_the_published_schema_is_the_one_that_the_types_say() -> None:
    assert published() == derived(), "run: python -m moe_posterior.report.json_schema"
    jsonschema.Draft202012Validator.check_schema(published())


def test_a_minimal_report_holds_nothing_that_the_schema_does_not_name() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    report = evaluate_predictions([Prediction(probs, target=torch.tensor([0, 1]))], {}, resamples=9)
    assert problems(json.loads(json.dumps(report)), closed=True) == []


def test_the_demo_report_holds_nothing_that_the_schema_does_not_name() -> None:
    assert problems(json.loads(DEMO.read_text()), closed=True) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda report: report.pop("records"), "records"),
        (lambda report: report.update(schema="moe-posterior/calibration-report/2"), "schema"),
        (lambda report: report["records"][0].update(value="high"), "value"),
        (lambda report: report["arms"].append(3), "arms"),
        (lambda report: report["conditions"][0].pop("verdict"), "verdict"),
        (lambda report: report["verdict"]["arms"][0].update(usable=True), "usable"),
    ],
)
def test_a_report_that_is_otherwise_is_refused(change, where: str) -> None:
    report = json.loads(DEMO.read_text())
    change(report)
    assert any(where in problem for problem in problems(report))


def test_a_key_added_within_a_version_breaks_no_reader() -> None:
    report = json.loads(DEMO.read_text())
    report["records"][0]["added_later"] = 1
    assert problems(report) == []
    assert problems(report, closed=True)


def test_files_of_the_version_before_still_render() -> None:
    report = copy.deepcopy(full_report())
    report["schema"] = SCHEMA.replace("/3", "/2")
    for key in ("conditions", "baselines", "versus", "disagreement", "verdict"):
        report.pop(key, None)
    assert "May the score be used?" in to_html(report)
    assert "Not measured in this run: the report holds no operating conditions" in to_card(report)
