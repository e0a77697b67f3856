"""The report from Python: what it takes, what it refuses, what it says, and that it is the road of trained runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prediction_files import CLASSES, NAMES, answers, predictions, softmax

import moe_posterior
from moe_posterior import InvalidArgumentError
from moe_posterior.errors import UnwritableFileError
from moe_posterior.evaluation import evaluate, evaluate_model
from moe_posterior.evaluation.columns import probabilities
from moe_posterior.prediction import Prediction
from moe_posterior.report.checklist import checklist
from moe_posterior.report.sections import fit_calibrators
from moe_posterior.report.whole import report_of

FAST: dict[str, Any] = {"resamples": 100}


def values(report: dict[str, Any]) -> dict[tuple, float]:
    keys = ("arm", "shift", "severity", "subset", "metric")
    return {tuple(one[key] for key in keys): one["value"] for one in report["records"]}


def test_with_calibration_rows_it_is_the_report_of_the_road_that_runs_take() -> None:
    found, held = predictions(), predictions(150, 7)
    report = evaluate(
        found["probs"], found["target"], calibration=(held["probs"], held["target"]), seed=3, **FAST
    ).to_dict()

    def prediction(one: dict[str, Any]) -> Prediction:
        probs, target = torch.from_numpy(one["probs"]), torch.from_numpy(one["target"])
        return Prediction(probs, target=target, row=torch.arange(len(target)), shift="test rows")

    validation = {"model": prediction(held)}
    fitted = {"model": fit_calibrators(validation["model"])}
    expected = report_of([prediction(found)], validation, fitted, {}, [("test rows", 0)], resamples=100, seed=3)
    for key, value in expected.items():
        if key != "notes":
            assert report[key] == value, key  # type: ignore[literal-required]


@pytest.mark.parametrize("kind", ["lists", "torch", "half", "pandas", "arrow", "arrow lists", "read-only"])
def test_arrays_of_every_kind_give_the_same_report(kind: str) -> None:
    found = predictions()
    probs, target, country = found["probs"], found["target"], found["groups"]["country"]
    plain = evaluate(probs, target, groups=country, **FAST).to_dict()
    if kind == "lists":
        given = (probs.tolist(), target.tolist(), country.tolist())
    elif kind in ("torch", "half"):
        given = (torch.from_numpy(probs), torch.from_numpy(target), country)
        given = (given[0].half(), *given[1:]) if kind == "half" else given
    elif kind == "pandas":
        pandas = pytest.importorskip("pandas")
        given = (pandas.DataFrame(probs), pandas.Series(target), pandas.Series(country))
    elif kind == "read-only":
        probs.flags.writeable = False
        given = (probs, target, country)
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({str(k): probs[:, k] for k in range(CLASSES)})
        listed = pa.chunked_array([probs[:100].tolist(), probs[100:].tolist()])
        given = (table if kind == "arrow" else listed, pa.array(target), pa.array(country))
    report = evaluate(given[0], given[1], groups=given[2], **FAST).to_dict()
    near = 0.01 if kind == "half" else 0.0
    assert values(report) == pytest.approx(values(plain), abs=near)


def test_a_data_frame_names_its_classes() -> None:
    pandas = pytest.importorskip("pandas")
    found = predictions()
    frame, labels = pandas.DataFrame(found["probs"], columns=NAMES), [NAMES[one] for one in found["target"]]
    plain = evaluate(found["probs"], found["target"], **FAST).to_dict()
    assert evaluate(frame, labels, **FAST).to_dict()["records"] == plain["records"]
    assert evaluate(found["probs"], labels, class_names=NAMES, **FAST).to_dict()["records"] == plain["records"]


def test_logits_are_probabilities_after_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(200, CLASSES))
    target = predictions(200)["target"]
    said = evaluate(logits, target, logits=True, **FAST).to_dict()
    assert values(said) == pytest.approx(values(evaluate(softmax(logits), target, **FAST).to_dict()))
    with pytest.raises(InvalidArgumentError, match=r"logits=True"):
        evaluate(logits, target, **FAST)


def test_rounded_probabilities_are_divided_by_their_sum_and_the_report_says_so() -> None:
    probs = np.tile([0.33, 0.33, 0.33], (100, 1))
    report = evaluate(probs, np.arange(100) % 3, **FAST).to_dict()
    assert any("divided by their sum" in note for note in report["notes"])
    assert report["records"][1]["value"] == pytest.approx(np.log(3))


def test_a_row_is_the_same_in_every_piece_and_no_confidence_is_above_1() -> None:
    rounded = np.array([[0.33, 0.33, 0.33], [0.3334, 0.3333, 0.3334], [1.0009, 0.0, 0.0], [1.0, 1e-6, -1e-6]])
    before = rounded.copy()
    whole, count = probabilities(rounded, "probs", logits=False)
    alone = np.concatenate([probabilities(row[None], "probs", logits=False)[0] for row in rounded])
    assert (whole == alone).all()
    assert count == 1
    assert whole.max() <= 1
    assert whole.min() >= 0
    assert (rounded == before).all()


def test_a_part_of_the_rows_is_held_out_also_of_shifts_that_hold_the_same_rows() -> None:
    found, other = predictions(), predictions(300, 9)
    shifts = {
        "fog": (0.5 * found["probs"] + 0.5 / CLASSES, found["target"]),
        "abroad": (other["probs"], other["target"]),
    }
    report = evaluate(found["probs"], found["target"], shifts=shifts, **FAST).to_dict()
    sizes = {one["shift"]: one["n"] for one in report["records"] if one["severity"] is not None}
    assert (sizes["test rows"], sizes["fog"], sizes["abroad"]) == (210, 210, 300)
    assert any("90 of the 300 rows" in note for note in report["notes"])
    assert any("left out of fog" in note for note in report["notes"])
    assert any("other rows" in note and "abroad" in note for note in report["notes"])


def test_ids_say_which_shifted_rows_are_held_out() -> None:
    found = predictions()
    order = np.random.default_rng(1).permutation(300)[:200]
    shifted = {"probs": found["probs"][order], "target": found["target"][order], "rows": order}
    report = evaluate(found["probs"], found["target"], rows=np.arange(300), shifts={"some": shifted}, **FAST).to_dict()
    rows = {one["shift"]: one["n"] for one in report["records"] if one["severity"] is not None}
    assert rows["test rows"] == 210
    assert 120 <= rows["some"] <= 160  # of the 200, those that were not held out


def test_the_unshifted_rows_count_as_no_shift() -> None:
    found, other = predictions(), predictions(100, 9)
    report = evaluate(found["probs"], found["target"], **FAST).to_dict()
    assert report["shifts"] == []
    assert next(item for item in checklist(report) if item.requirement == "Shift scenarios tested").found is None
    shifts = {("fog", 2): (other["probs"], other["target"]), "rain": (other["probs"], other["target"])}
    report = evaluate(found["probs"], found["target"], shifts=shifts, **FAST).to_dict()
    assert [(one["name"], one["severities"], one["n"]) for one in report["shifts"]] == [
        ("fog", [2], 100),
        ("rain", [1], 100),
    ]


def test_without_held_out_rows_calibrators_and_threshold_are_left_out_by_name() -> None:
    found = predictions()
    report = evaluate(found["probs"], found["target"], hold_out=0, **FAST).to_dict()
    assert {"section": "calibrators", "reason": "no calibration rows"} in report["left_out"]
    assert not report["action"]
    assert report["records"][0]["n"] == 300


def test_nothing_is_left_out_where_everything_is_given() -> None:
    assert "left_out" not in evaluate(**predictions(), **FAST).to_dict()


def test_confidences_are_scored_as_the_event_that_the_answer_is_right() -> None:
    confidence, correct = answers()
    report = evaluate(confidence=confidence, correct=correct, hold_out=0, **FAST).to_dict()
    found = {key[-1]: value for key, value in values(report).items()}
    assert found["accuracy"] == pytest.approx(correct.mean())
    assert found["brier"] == pytest.approx(((confidence - correct) ** 2).mean())
    assert found["nll"] == pytest.approx(-np.log(np.where(correct, confidence, 1 - confidence)).mean())
    assert any("event that the answer is right" in note for note in report["notes"])


def test_graded_answers_count_by_their_grades() -> None:
    confidence, _ = answers()
    grade = np.round(confidence, 1)
    report = evaluate(confidence=confidence, correct=grade, hold_out=0, **FAST).to_dict()
    assert report["records"][0]["value"] == pytest.approx(grade.mean())


def test_groups_are_reported_with_the_rows_they_have_in_each_set() -> None:
    found, other = predictions(), predictions(200, 5)
    shifts = {"abroad": {key: other[key] for key in ("probs", "target", "groups")}}
    shifts["abroad"]["groups"] = {"country": np.where(np.arange(200) < 50, "DE", "IT")}
    report = evaluate(
        found["probs"], found["target"], groups=found["groups"], shifts=shifts, hold_out=0, **FAST
    ).to_dict()
    sizes = {(one["shift"], one["subset"]): one["n"] for one in report["records"] if one["severity"] is not None}
    assert sizes["abroad", "country=DE"] == 50
    assert sizes["abroad", "country=IT"] == 150
    assert ("test rows", "country=IT") not in sizes
    assert sizes["test rows", "country=FR"] == (found["groups"]["country"] == "FR").sum()


def test_configurations_come_from_weights_names_or_both() -> None:
    found = predictions()
    named = np.where(np.arange(300) % 2, "odd", "even")
    for given, expected in (
        ({"configurations": named}, {("even", ()), ("odd", ())}),
        ({"routing_weights": found["routing_weights"]}, {(None, (0, 1)), (None, (0, 2)), (None, (1, 2))}),
        (
            {"configurations": named, "routing_weights": found["routing_weights"]},
            {(name, chosen) for name in ("even", "odd") for chosen in ((0, 1), (0, 2), (1, 2))},
        ),
    ):
        report = evaluate(found["probs"], found["target"], hold_out=0, **given, **FAST).to_dict()
        rows = {(one["cluster"], tuple(one["experts"])): one["n"] for one in report["configurations"]}
        assert set(rows) == expected
        assert sum(rows.values()) == 300


def test_many_experts_make_configurations_too() -> None:
    found = predictions()
    weights = np.zeros((300, 70))
    weights[np.arange(300), np.where(np.arange(300) % 3, 69, 2)] = 1
    report = evaluate(found["probs"], found["target"], routing_weights=weights, hold_out=0, **FAST).to_dict()
    assert {tuple(one["experts"]): one["n"] for one in report["configurations"]} == {(69,): 200, (2,): 100}


def test_models_are_compared_with_the_first_on_the_same_rows() -> None:
    found = predictions()
    flat = np.full((300, CLASSES), 1 / CLASSES)
    report = evaluate(found["probs"], found["target"], models={"flat": flat}, name="mine", **FAST).to_dict()
    assert report["arms"] == ["mine", "flat"]
    assert report["baseline"] == "mine"
    nll = next(one for one in report["paired"] if one["metric"] == "nll" and one["subset"] == "overall")
    assert nll["low"] > 0


def test_the_order_of_the_rows_moves_no_value() -> None:
    found = predictions()
    order = np.random.default_rng(2).permutation(300)
    plain = evaluate(found["probs"], found["target"], groups=found["groups"]["country"], hold_out=0, **FAST)
    moved = evaluate(
        found["probs"][order], found["target"][order], groups=found["groups"]["country"][order], hold_out=0, **FAST
    )
    assert values(moved.to_dict()) == pytest.approx(values(plain.to_dict()), abs=1e-12)


def test_large_sets_are_added_up_and_the_report_says_what_is_of_the_sample() -> None:
    found = predictions(4000)
    given: dict[str, Any] = {**found, "hold_out": 0, **FAST}
    sampled, whole = evaluate(**given, sample=1000).to_dict(), evaluate(**given).to_dict()
    assert values(sampled) == pytest.approx(values(whole), abs=1e-9)
    for one, other in zip(sampled["configurations"], whole["configurations"], strict=True):
        assert (one["experts"], one["n"]) == (other["experts"], other["n"])
        assert one["ece"] == pytest.approx(other["ece"], abs=1e-9)
    assert any("random sample of 1,000 rows" in note for note in sampled["notes"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"target": None}, "target must be given"),
    "a label beyond": ({"target": np.full(300, 4)}, r"target must be classes in \[0, 3\]; got 4 in row 0"),
    "half a label": ({"target": np.full(300, 0.5)}, "target must be class indices or names"),
    "a label missing": ({"target": [*range(3), None] * 75}, "row 3"),
    "other lengths": ({"target": np.zeros(299, int)}, "target must have 300 rows"),
    "both kinds": ({"confidence": np.ones(300), "correct": np.ones(300)}, "without probabilities"),
    "correct alone": ({"correct": np.ones(300)}, "must come with confidence"),
    "group lengths": ({"groups": ["a"]}, "must have 300 rows"),
    "group missing": ({"groups": [None] * 300}, "groups must have a value in every row"),
    "many groups": ({"groups": np.arange(300)}, "at most 200 different values"),
    "weights below 0": ({"routing_weights": -np.ones((300, 2))}, "routing_weights must be routing weights"),
    "weights of others": ({"routing_weights": np.ones((300, 2))}, "of 2 experts"),
    "experts of others": ({"expert_probs": np.ones((300, 3, 9)) / 9}, "expert_probs must have shape"),
    "names": ({"class_names": ["a"] * CLASSES}, "class_names must be 4 different names"),
    "risk": ({"max_risk": 2}, "max_risk"),
    "share": ({"hold_out": 1.0}, "hold_out"),
    "resamples": ({"resamples": 10}, "resamples"),
    "seed": ({"seed": True}, "seed"),
    "shift's name": ({"shifts": {"clean": (np.ones((1, 4)) / 4, [0])}}, "shifts must have different names"),
    "shift's keys": ({"shifts": {"fog": {"probabilities": 1}}}, "keys of"),
    "model's name": ({"models": {"model": np.ones((300, 4)) / 4}}, "models must map other names"),
    "model's rows": ({"models": {"b": np.ones((299, 4)) / 4}}, "target must have 299 rows"),
    "rows twice": ({"rows": np.zeros(300, int)}, "row ids must differ"),
    "a masked confidence": (
        {
            **dict.fromkeys(predictions(), None),
            "confidence": np.ma.masked_equal([0.5, 0.7], 0.7),
            "correct": [1, 0],
        },
        "confidence must have a value in every row; got a masked one in row 1",
    ),
    "a masked label": ({"target": np.ma.masked_equal(np.arange(300) % 4, 2)}, "target must have.*masked one in row 2"),
    "an immense label": ({"target": np.full(300, 1e300)}, "target must be class indices or names"),
    "no text for a name": ({"name": 3}, "name must be a text"),
    "one text for names": ({"class_names": "abcd"}, "class_names must be one name per class"),
    "shift's classes": (
        {"shifts": {"fog": (np.ones((9, 5)) / 5, [0] * 9)}},
        r"shifts\['fog'\].probs must be of 4 classes",
    ),
    "shift's kind": (
        {"shifts": {"fog": {"confidence": [0.5], "correct": [1]}}},
        "must be of 4 classes.*got confidences",
    ),
    "model's classes": (
        {"models": {"b": np.ones((300, 2)) / 2}},
        "target must be classes|models.*must be of 4 classes",
    ),
    "calibration's classes": (
        {"calibration": (np.ones((9, 5)) / 5, [0] * 9)},
        r"calibration.probs must be of 4 classes",
    ),
    "everything held out": ({"hold_out": 0.999}, "hold_out must leave rows to judge on; all rows of test rows"),
    "shift without weights": (
        {"shifts": {"fog": (np.ones((9, 4)) / 4, [0] * 9)}},
        r"shifts\['fog'\].routing_weights must be given",
    ),
    "shift's experts": (
        {"shifts": {"fog": {"probs": np.ones((9, 4)) / 4, "target": [0] * 9, "routing_weights": np.ones((9, 2))}}},
        r"shifts\['fog'\].routing_weights must be of 3 experts",
    ),
    "calibration's experts": (
        {"calibration": {"probs": np.ones((9, 4)) / 4, "target": [0] * 9, "expert_probs": np.ones((9, 2, 4)) / 4}},
        r"calibration.expert_probs must be of 3 experts",
    ),
    "no calibration rows": ({"calibration": (np.ones((0, 4)), [])}, "calibration rows must be given of every model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, said = WRONG[name]
    with pytest.raises(InvalidArgumentError, match=said):
        evaluate(**{**predictions(), "resamples": 100, **change})


def test_a_shift_whose_rows_were_all_held_out_is_named() -> None:
    found = predictions()
    fog = {"probs": found["probs"][:1], "target": found["target"][:1]}
    refused = []
    for row in range(6):
        try:
            shifts = {"fog": {**fog, "rows": [row]}}
            evaluate(found["probs"], found["target"], rows=np.arange(300), shifts=shifts, hold_out=0.9, **FAST)
        except InvalidArgumentError as error:
            refused.append(str(error))
    assert refused
    assert all("all rows of fog are held out" in message for message in refused)


def test_calibration_rows_that_are_judged_too_are_refused() -> None:
    found, other = predictions(), predictions(120, 7)
    given = {key: found[key] for key in ("probs", "target")}
    with pytest.raises(InvalidArgumentError, match="calibration must hold other rows"):
        evaluate(**given, calibration=given, **FAST)
    shifts = {"fog": (other["probs"], other["target"])}
    with pytest.raises(InvalidArgumentError, match="got rows of fog"):
        evaluate(**given, shifts=shifts, calibration=(other["probs"], other["target"]), **FAST)
    some = {"probs": found["probs"][90:], "target": found["target"][90:], "rows": np.arange(90, 300)}
    with pytest.raises(InvalidArgumentError, match="got rows of test rows"):
        evaluate(**given, rows=np.arange(300), calibration=some, **FAST)
    numbered_anew = {"probs": other["probs"], "target": other["target"], "rows": np.arange(120)}
    assert evaluate(**given, rows=np.arange(300), calibration=numbered_anew, **FAST).to_dict()["guarantee"]


@pytest.mark.parametrize("names", [None, ["0", "1", "2", "3"], [0, 1, 2, 3]])
def test_labels_that_a_gap_once_made_floats_are_still_classes(names: list | None) -> None:
    found = predictions()
    given = {"probs": found["probs"], "class_names": names, **FAST}
    plain = evaluate(target=found["target"], **given).to_dict()["records"]
    assert evaluate(target=found["target"].astype(float), **given).to_dict()["records"] == plain
    assert evaluate(target=found["target"].astype(float).astype(str), **given).to_dict()["records"] == plain


def test_a_report_is_saved_whole_and_shown_in_notebooks(tmp_path: Path) -> None:
    report = evaluate(**predictions(), **FAST)
    folder = report.save(tmp_path / "deep" / "report")
    assert {"index.html", "report.json", "table.md", "model_card.md", "reliability.png"} <= {
        one.name for one in folder.iterdir()
    }
    with pytest.raises(UnwritableFileError, match=r"index\.html"):
        report.save(folder / "index.html" / "deeper")
    with pytest.raises(UnwritableFileError, match="not a folder"):
        report.save(folder / "index.html")
    report.save(folder)
    assert "<iframe" in report._repr_html_()
    assert "accuracy" in report.table
    assert "model accuracy" in repr(report)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UnwritableFileError, match=r"notes\.txt"):
        report.save(folder)


def test_the_package_hands_out_evaluate() -> None:
    assert moe_posterior.evaluate is evaluate


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x))


def test_a_model_is_run_in_evaluation_mode_over_its_loaders() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(50, 4, generator=generator), torch.randint(3, (50,), generator=generator)) for _ in range(4)
    ]
    model = Classifier()
    report = evaluate_model(model, {"clean": batches, "noise": batches}, logits=True, **FAST).to_dict()
    assert model.training
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        probs = model.eval()(x).softmax(1)
    expected = evaluate(probs, y, shifts={"noise": (probs, y)}, **FAST).to_dict()
    assert report["records"] == expected["records"]


def test_outputs_with_logits_and_mappings_need_no_flag() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    batches = [{"x": torch.randn(100, 4), "labels": torch.randint(3, (100,))}]
    probs = torch.softmax(batches[0]["x"][:, :3], 1)
    expected = evaluate(probs, batches[0]["labels"], **FAST).to_dict()["records"]
    assert evaluate_model(lambda x: Output(x[:, :3]), batches, **FAST).to_dict()["records"] == expected
    assert evaluate_model(lambda x: {"logits": x[:, :3]}, batches, **FAST).to_dict()["records"] == expected
    assert evaluate_model(lambda x: {"probs": probs}, batches, **FAST).to_dict()["records"] == expected
    with pytest.raises(InvalidArgumentError, match="logits=True"):
        evaluate_model(lambda x: x[:, :3], batches, **FAST)
    with pytest.raises(InvalidArgumentError, match="at least one batch"):
        evaluate_model(lambda x: x, [], **FAST)


def test_a_text_classification_pipeline_is_evaluated_with_the_names_of_its_classes() -> None:
    transformers = pytest.importorskip("transformers")

    class Pipeline(transformers.TextClassificationPipeline):
        def __init__(self, top_k: int | None) -> None:
            self.model = type("Model", (), {"config": type("Config", (), {"id2label": {0: "no", 1: "yes"}})})
            self.top_k = top_k

        def __call__(self, texts: list[str]) -> list:
            scores = [
                [{"label": "yes", "score": float(one)}, {"label": "no", "score": 1 - float(one)}] for one in texts
            ]
            return scores if self.top_k is None else [row[0] for row in scores]

    draw = np.random.default_rng(0)
    sure = draw.uniform(size=100).round(3)
    labels = np.where(draw.random(100) < sure, "yes", "no").tolist()
    batches = [([str(one) for one in sure], labels)]
    expected = evaluate(np.stack([1 - sure, sure], 1), labels, class_names=["no", "yes"], **FAST).to_dict()
    assert evaluate_model(Pipeline(None), batches, **FAST).to_dict()["records"] == expected["records"]
    with pytest.raises(InvalidArgumentError, match="top_k=None"):
        evaluate_model(Pipeline(1), batches, **FAST)
