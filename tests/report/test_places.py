"""What evaluations are called: the stored test rows by what the data say they are, means and pools by what they hold."""

import dataclasses
import io
import json
import re

import pytest
import torch
from points import Points
from report_example import full_report
from rich.console import Console

from moe_posterior import InvalidArgumentError
from moe_posterior.prediction import Prediction
from moe_posterior.report import (
    evaluate_predictions,
    render_table,
    to_card,
    to_html,
    to_markdown,
)
from moe_posterior.training.data import CAD, CIFAR10H, PACS, CivilComments, Digits
from moe_posterior.training.provenance import evaluated_on
from moe_posterior.training.study.sources import Source

HELD_OUT = "held-out sketch"


def predictions(base: str, shifts: tuple[str, ...], severities: tuple[int, ...]) -> list[Prediction]:
    """Two arms on one set of stored rows and on some shifted ones."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (60,), generator=generator)
    found = []
    for place in [(base, 0), *((shift, severity) for shift in shifts for severity in severities)]:
        for arm in ("softmax", "posterior"):
            logits = torch.randn(60, 3, generator=generator) + 2 * torch.eye(3)[target]
            found.append(Prediction(logits.softmax(dim=-1), target=target, arm=arm, shift=place[0], severity=place[1]))
    return found


def renderings(report: dict) -> list[str]:
    file = io.StringIO()
    render_table(report, Console(file=file, width=80, color_system=None))
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", to_html(report), flags=re.S)
    return [file.getvalue(), to_markdown(report), to_card(report), text]


def test_every_shipped_data_module_says_what_its_test_rows_are() -> None:
    for kind in (Digits, CIFAR10H, CivilComments, CAD):
        assert "test_shift" in {name for one in kind.__mro__[:2] for name in vars(one)}, kind
        assert kind.test_shift is None
    assert Digits().test_name == "clean"
    assert [PACS(held_out=domain).test_name for domain in PACS.domain_names] == [
        f"held-out {domain}" for domain in PACS.domain_names
    ]


def test_a_module_around_another_says_what_that_one_says() -> None:
    inner = Points()
    inner.test_shift = "other town"
    outer = Source(inner, lambda part: inner.split(part).groups, inner.group_names)
    assert [one.shift for one in outer.evaluation_sets(())] == ["other town"]


def test_a_held_out_domain_is_the_shift_and_nothing_is_called_clean() -> None:
    report = evaluate_predictions(
        predictions(HELD_OUT, (), ()), {"hard": torch.ones(60, dtype=torch.bool)}, resamples=20
    )
    assert {one["shift"] for one in report["records"]} == {HELD_OUT}
    assert {one["subset"] for one in report["records"]} == {"overall"}
    assert report["subsets"] == {"overall": None}
    assert report["pools"] == []
    assert any("'hard' holds every row" in note for note in report["notes"])
    for text in renderings(report):
        assert HELD_OUT in text
        assert "clean" not in text
        assert "shifted" not in text
    assert "clean" not in json.dumps(report)


def test_without_a_shift_nothing_is_said_of_one() -> None:
    report = evaluate_predictions(predictions("clean", (), ()), {}, resamples=20)
    for text in renderings(report):
        assert "clean" in text
        assert "shifted" not in text
        assert "mean of" not in text
        assert "pooled" not in text


def test_a_mean_over_sets_and_a_pool_of_predictions_have_names_of_their_own_that_say_what_they_hold() -> None:
    shifts, severities = ("fog", "rain"), (1, 2, 3, 4, 5)
    report = evaluate_predictions(predictions("clean", shifts, severities), {}, resamples=20)
    mean, pool = report["pools"]
    assert (mean["name"], mean["sets"], mean["n"]) == ("mean of 10 sets (2 shifts, severities 1–5)", 10, 600)
    assert (pool["name"], pool["sets"], pool["n"]) == ("6 sets pooled (2 shifts, severities 3–5)", 6, 360)
    assert (mean["shifts"], pool["severities"]) == (["fog", "rain"], [3, 4, 5])
    assert {curve["panel"] for curve in report["reliability"]} == {"clean", pool["name"]}
    terminal, markdown, card, page = (text.replace("\\", "") for text in renderings(report))
    for text in (terminal, markdown, card, page):
        assert mean["name"] in text
        assert "10 × 60" in text
    for text in (card, page):
        assert pool["name"] in text
        assert "6 × 60" in text
    assert not any(re.search(r"\bshifted\b", text) for text in (terminal, markdown, card, page))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([("clean", 0), ("sketch", 0)], r"must have one name; got \['clean', 'sketch'\]"),
        ([("sketch", 0), ("sketch", 2)], "must have a name of their own; got 'sketch'"),
        ([("clean", 0), ("fog", -1)], "severity ≥ 0"),
        ([("clean", 1)], "'clean' with severity 0"),
    ],
)
def test_names_that_would_mix_two_things_are_refused(sets: list, message: str) -> None:
    one = predictions("clean", (), ())[0]
    given = [dataclasses.replace(one, shift=shift, severity=severity) for shift, severity in sets]
    with pytest.raises(InvalidArgumentError, match=message):
        evaluate_predictions(given, {}, resamples=5)


def test_the_identity_names_the_shifts_that_were_evaluated_and_no_others() -> None:
    data = Points()
    assert evaluated_on(data, ()) == "distributed as the training rows; no further shift was evaluated"
    assert evaluated_on(data, ("fog", "rain")) == "distributed as the training rows; also under fog, rain"
    data.test_shift = HELD_OUT
    assert evaluated_on(data, ()) == "all under a shift: held-out sketch; no further shift was evaluated"


def test_the_worst_group_stands_with_its_arm() -> None:
    for text in (to_html(full_report()), to_card(full_report())):
        assert "worst of softmax: right" in text
        assert "right (worst of softmax)" in text
