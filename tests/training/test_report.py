import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import multiclass_calibration_error

from moe_posterior import InvalidArgumentError
from moe_posterior.training.report import (
    Predictions,
    centred_interval,
    evaluate_predictions,
    posterior_heatmap,
    reliability_diagram,
    render_table,
    to_markdown,
    write_json,
)

DIGITS = load_digits()
TRAIN, TEST = slice(0, 800), slice(800, 1797)
HARD = torch.from_numpy(DIGITS.target[TEST] == 8)


def predictions() -> list[Predictions]:
    """Two regularisations of a logistic regression as arms, on clean and on noisy digits."""
    found = []
    for arm, strength in (("softmax", 1.0), ("posterior", 0.001)):
        model = LogisticRegression(C=strength, max_iter=300).fit(DIGITS.data[TRAIN], DIGITS.target[TRAIN])
        for shift, severity, scale in (("clean", 0, 0.0), ("noise", 1, 2.0), ("noise", 4, 6.0)):
            noise = np.random.default_rng(0).normal(size=DIGITS.data[TEST].shape) * scale
            probs = torch.from_numpy(model.predict_proba(DIGITS.data[TEST] + noise))
            found.append(Predictions(probs, torch.from_numpy(DIGITS.target[TEST]), arm, shift, severity))
    return found


@pytest.fixture(scope="module")
def report() -> dict:
    return evaluate_predictions(predictions(), {"hard": HARD, "easy": ~HARD}, resamples=200)


def value(report: dict, **where) -> dict:
    (record,) = [r for r in report["records"] if all(r[name] == wanted for name, wanted in where.items())]
    return record


@pytest.mark.parametrize("subset", ["overall", "hard", "easy"])
def test_values_match_independent_computations(report: dict, subset: str) -> None:
    mask = {"overall": torch.ones_like(HARD), "hard": HARD, "easy": ~HARD}[subset]
    for item in predictions():
        probs, target = item.probs[mask], item.target[mask]
        where = {"arm": item.arm, "shift": item.shift, "severity": item.severity, "subset": subset}
        one_hot = torch.eye(10, dtype=torch.float64)[target]
        expected = {
            "accuracy": (probs.argmax(1) == target).double().mean(),
            "nll": -probs[torch.arange(len(target)), target].clamp(min=1e-12).log().mean(),  # the documented floor
            "brier": ((probs - one_hot) ** 2).sum(1).mean(),
            "ece": multiclass_calibration_error(probs, target, num_classes=10, n_bins=15),
        }
        for metric, wanted in expected.items():
            record = value(report, metric=metric, **where)
            assert record["value"] == pytest.approx(float(wanted), abs=1e-5)  # torchmetrics sums in float32
            assert record["n"] == int(mask.sum())


def test_every_interval_holds_its_value_and_no_metric_is_negative(report: dict) -> None:
    for record in report["records"]:
        assert 0 <= record["low"] <= record["value"] <= record["high"], record


def test_intervals_of_accuracy_match_the_binomial_ones(report: dict) -> None:
    record = value(report, arm="softmax", shift="clean", severity=0, subset="overall", metric="accuracy")
    half_width = 1.96 * (record["value"] * (1 - record["value"]) / record["n"]) ** 0.5
    assert (record["high"] - record["low"]) / 2 == pytest.approx(half_width, rel=0.25)


def test_pairing_makes_the_difference_of_equal_arms_exactly_zero() -> None:
    first = predictions()[0]
    twin = Predictions(first.probs, first.target, "posterior", first.shift, first.severity)
    paired = evaluate_predictions([first, twin], {}, resamples=50)["paired"]
    assert paired
    assert all(record["value"] == record["low"] == record["high"] == 0 for record in paired)


def test_all_shifts_is_the_mean_over_shifted_sets(report: dict) -> None:
    shifted = [
        value(report, arm="softmax", shift="noise", severity=severity, subset="overall", metric="ece")["value"]
        for severity in (1, 4)
    ]
    mean = value(report, arm="softmax", shift="all shifts", severity=None, subset="overall", metric="ece")
    assert mean["value"] == pytest.approx(sum(shifted) / 2)


def test_the_same_seed_gives_the_same_report_and_another_seed_other_intervals(report: dict) -> None:
    masks = {"hard": HARD, "easy": ~HARD}
    assert evaluate_predictions(predictions(), masks, resamples=200) == report
    other = evaluate_predictions(predictions(), masks, resamples=200, seed=1)
    assert [r["value"] for r in other["records"]] == [r["value"] for r in report["records"]]
    assert [r["low"] for r in other["records"]] != [r["low"] for r in report["records"]]


def test_centred_intervals_are_calibrated_on_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.randn(40, generator=generator, dtype=torch.float64)
        rows = torch.randint(40, (400, 40), generator=generator)
        low, high = centred_interval(sample.mean(), sample[rows].mean(1))
        covered += int(low <= 0 <= high)
    assert 0.88 <= covered / 200 <= 0.99


def test_the_table_and_markdown_show_both_arms_side_by_side(report: dict) -> None:
    from rich.console import Console

    console = Console(width=80, record=True)
    render_table(report, console)
    text = console.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    accuracy = value(report, arm="posterior", shift="clean", severity=0, subset="overall", metric="accuracy")["value"]
    for shown in (text, to_markdown(report)):
        assert f"{accuracy:.3f}".lstrip("0") in shown
        assert "softmax" in shown
        assert "hard" in shown


def test_json_is_strict_and_atomic(report: dict, tmp_path) -> None:
    path = tmp_path / "report.json"
    write_json(report, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_figures_are_pictures(report: dict, tmp_path) -> None:
    reliability_diagram(report, tmp_path / "reliability.png")
    posterior_heatmap(torch.rand(5, 3), torch.ones(5, 3), tmp_path / "posterior.png")
    for name in ("reliability.png", "posterior.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_together_is_refused() -> None:
    clean, noisy = predictions()[:2]
    with pytest.raises(InvalidArgumentError, match="must come once"):
        evaluate_predictions([clean, clean], {}, resamples=5)
    with pytest.raises(InvalidArgumentError):
        evaluate_predictions([clean], {"hard": HARD[:5]}, resamples=5)
    lonely = Predictions(noisy.probs, noisy.target, "posterior", noisy.shift, noisy.severity)
    with pytest.raises(InvalidArgumentError):
        evaluate_predictions([clean, lonely], {}, resamples=5)
