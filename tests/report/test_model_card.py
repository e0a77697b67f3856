"""The model card's front matter, as the Hugging Face hub reads it."""

import json
from pathlib import Path

import pytest
from report_example import full_report

from moe_posterior.report.model_card import model_index, to_model_card

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
DEMO = Path(__file__).resolve().parents[2] / "results" / "demo"


def results_of(card: str) -> list:
    return hub.ModelCard(card).data.eval_results


@pytest.mark.parametrize(
    "report", [full_report(), json.loads((DEMO / "report.json").read_text())], ids=["full", "demo"]
)
def test_the_hub_reads_every_main_value_from_the_card(report: dict) -> None:
    read = {
        (one.dataset_config, one.metric_name): (one.metric_value, one.metric_args["low"], one.metric_args["high"])
        for one in results_of(to_model_card(report))
    }
    main = [
        record
        for record in report["records"]
        if record["subset"] == "overall"
        and (record["severity"] == 0 or (record["shift"], record["severity"]) == ("all shifts", None))
    ]
    assert len(read) == len(main) == 8 * len(report["arms"])
    for record in main:
        title = record["metric"].upper() if record["metric"] in ("ece", "nll") else record["metric"]
        (found,) = [
            values
            for (place, name), values in read.items()
            if name == f"{title}, {record['arm']}" and (place == "clean") == (record["severity"] == 0)
        ]
        assert found == pytest.approx((record["value"], record["low"], record["high"]), abs=1e-6)


def test_the_committed_card_is_read_and_names_its_model() -> None:
    data = hub.ModelCard((DEMO / "model_card.md").read_text()).data
    assert data.model_name == "DigitsNet"
    assert data.library_name == "moe-posterior"
    assert {one.task_type for one in data.eval_results} == {"other"}


@pytest.mark.parametrize(
    "name", ['a"\n---\nlicense: mit', "café: x # y", "\u2028\x85\x07tab\t", "🙂 {[&*!|>%@`", "---"]
)
def test_no_name_becomes_a_key_or_ends_the_front_matter(name: str) -> None:
    report = full_report()
    report["about"] = {"model": name, "task": "image-classification"}
    report["identity"]["data"]["evaluation"] = name
    data = hub.ModelCard(to_model_card(report)).data
    assert set(data.to_dict()) == {"library_name", "tags", "model-index"}
    assert data.model_name == model_index(report)[0]["name"]
    assert {one.task_type for one in data.eval_results} == {"image-classification"}


def test_the_card_below_is_the_fragment() -> None:
    card = to_model_card(full_report())
    assert "## Calibration of the routed aggregate" in card
    assert "### Verdict" in card


def test_a_report_without_values_has_a_card_without_results() -> None:
    assert results_of(to_model_card({"arms": ["a"]})) is None
