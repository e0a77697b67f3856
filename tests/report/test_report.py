import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from moe_posterior import InvalidArgumentError
from moe_posterior.metrics import (
    calibration_difference,
    calibration_error,
    calibration_interval,
    centred_interval,
    noise_floor,
)
from moe_posterior.prediction import Prediction
from moe_posterior.report import (
    evaluate_predictions,
    posterior_heatmap,
    reliability_diagram,
    render_table,
    to_card,
    to_html,
    to_markdown,
    write_json,
)
from moe_posterior.report.marks import verdict
from moe_posterior.results.intervals import bootstrap_sums, resampled_rows

DIGITS = load_digits()
TRAIN, TEST = slice(0, 800), slice(800, 1797)
HARD = torch.from_numpy(DIGITS.target[TEST] == 8)


def predictions() -> list[Prediction]:
    """Two regularisations of a logistic regression as arms, on clean and on noisy digits."""
    found = []
    for arm, strength in (("softmax", 1.0), ("posterior", 0.001)):
        model = LogisticRegression(C=strength, max_iter=300).fit(DIGITS.data[TRAIN], DIGITS.target[TRAIN])
        for shift, severity, scale in (("clean", 0, 0.0), ("noise", 1, 2.0), ("noise", 4, 6.0)):
            noise = np.random.default_rng(0).normal(size=DIGITS.data[TEST].shape) * scale
            probs = torch.from_numpy(model.predict_proba(DIGITS.data[TEST] + noise))
            found.append(
                Prediction(probs, target=torch.from_numpy(DIGITS.target[TEST]), arm=arm, shift=shift, severity=severity)
            )
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
            found = record["plain" if metric == "ece" else "value"]
            assert found == pytest.approx(float(wanted), abs=1e-5)  # torchmetrics sums in float32
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
    twin = Prediction(first.probs, target=first.target, arm="posterior", shift=first.shift, severity=first.severity)
    for seed in range(5):
        paired = evaluate_predictions([first, twin], {"hard": HARD}, resamples=50, seed=seed)["paired"]
        assert paired
        assert all(record["value"] == record["low"] == record["high"] == 0 for record in paired)


def test_all_shifts_is_the_mean_over_shifted_sets(report: dict) -> None:
    shifted = [
        value(report, arm="softmax", shift="noise", severity=severity, subset="overall", metric="ece")["value"]
        for severity in (1, 4)
    ]
    mean = value(report, arm="softmax", shift="all shifts", severity=None, subset="overall", metric="ece")
    assert mean["value"] == pytest.approx(sum(shifted) / 2)


@pytest.mark.slow
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
    lonely = Prediction(noisy.probs, target=noisy.target, arm="posterior", shift=noisy.shift, severity=noisy.severity)
    with pytest.raises(InvalidArgumentError):
        evaluate_predictions([clean, lonely], {}, resamples=5)


def explicit_resamples(num_rows: int, resamples: int) -> Iterator[Tensor]:
    """The drawn rows themselves, so that the oracle never computes with counts."""
    for chunk in resampled_rows(num_rows, resamples, seed=0):
        yield from chunk


def centred(value: float, drawn: list[float]) -> list[float]:
    return (np.percentile(drawn, [2.5, 97.5]) - (np.mean(drawn) - value)).tolist()


def test_an_ece_is_debiased_with_the_interval_comparison_and_noise_floor_of_the_metrics(report: dict) -> None:
    softmax, posterior = (item for item in predictions() if (item.shift, item.severity) == ("noise", 1))
    where = {"arm": "posterior", "shift": "noise", "severity": 1, "subset": "hard", "metric": "ece"}
    record = value(report, **where)
    pairs = [(item.probs[HARD], item.target[HARD]) for item in (posterior, softmax)]
    expected = calibration_interval(*pairs[0])._asdict()
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert record["value"] == pytest.approx(calibration_error(*pairs[0], debias=True).item())
    assert record["floor"] == pytest.approx(noise_floor(pairs[0][0]).item())
    [pair] = [r for r in report["paired"] if all(r[name] == wanted for name, wanted in where.items())]
    expected = calibration_difference(*pairs)._asdict()
    assert {name: pair[name] for name in expected} == pytest.approx(expected)
    assert pair["baseline"] == "softmax"


def test_nll_intervals_match_resampling_the_rows_one_by_one(report: dict) -> None:
    [arm] = [item for item in predictions() if (item.arm, item.shift, item.severity) == ("posterior", "noise", 1)]
    losses = -arm.probs[torch.arange(len(HARD)), arm.target].clamp(min=1e-12).log()
    drawn = [losses[rows].mean().item() for rows in explicit_resamples(len(HARD), 200)]
    record = value(report, arm="posterior", shift="noise", severity=1, subset="overall", metric="nll")
    assert [record["low"], record["high"]] == pytest.approx(centred(losses.mean().item(), drawn), abs=1e-9)


def test_marks_allow_for_all_comparisons_of_their_family(report: dict) -> None:
    main = [
        pair
        for pair in report["paired"]
        if pair["severity"] == 0 or (pair["shift"] == "all shifts" and pair["severity"] is None)
    ]
    rest = [pair for pair in report["paired"] if pair not in main]
    for family in (main, rest):
        assert {pair["comparisons"] for pair in family} == {len(family)}
        ordered = sorted(family, key=lambda pair: pair["p_value"])
        worst = 0.0
        for rank, pair in enumerate(ordered):
            worst = max(worst, min(1.0, pair["p_value"] * (len(family) - rank)))
            assert pair["p_holm"] == pytest.approx(worst)
    said = f"Holm's correction for the {len(main)} comparisons of the main table and for the {len(rest)} of all further places"
    assert said in " ".join(rendered(report)[-4:]).replace("  ", " ")
    assert said in to_markdown(report)
    pair = {"metric": "ece", "low": -0.03, "high": -0.01, "p_holm": 0.2}
    assert verdict(pair) is None
    assert verdict({**pair, "p_holm": 0.01}) == "better"


def test_calibrated_arms_of_unlike_spread_are_seldom_marked_in_ece() -> None:
    marked = 0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        found = []
        for arm, power in (("softmax", 0.03), ("posterior", 1.0)):  # sharp, and spread
            confidence = 0.5 + 0.5 * torch.rand(400, generator=generator, dtype=torch.float64) ** power
            right = torch.bernoulli(confidence, generator=generator).bool()
            probs = torch.stack([confidence, 1 - confidence], dim=1)
            target = torch.zeros(400, dtype=torch.int64)  # correct or not: swap the columns
            probs = torch.where(right[:, None], probs, probs.flip(1))
            found.append(Prediction(probs, target=target, arm=arm, shift="clean", severity=0))
        [pair] = [p for p in evaluate_predictions(found, {}, resamples=20)["paired"] if p["metric"] == "ece"]
        marked += verdict(pair) is not None
    assert marked <= 2


def test_every_rendering_shows_the_noise_floor_beside_an_ece(report: dict) -> None:
    record = value(report, arm="posterior", shift="clean", severity=0, subset="hard", metric="ece")
    short, long = f"{record['floor']:.3f}".removeprefix("0"), f"noise {record['floor']:.3f}"
    [head] = [i for i, line in enumerate(rendered(report)) if line.startswith("── clean, hard")]
    assert f"posterior {short}" in rendered(report)[head + 1]
    assert f", noise {short} |" in to_markdown(report)
    assert long in to_html(report)
    assert long in to_card(report)


def test_means_over_shifts_resample_each_row_jointly_over_the_shifts(report: dict) -> None:
    members = [item for item in predictions() if (item.arm, item.shift) == ("softmax", "noise")]
    per_row = torch.stack([(item.probs.argmax(1) == item.target).double() for item in members]).mean(0)
    drawn = [per_row[rows].mean().item() for rows in explicit_resamples(len(per_row), 200)]
    record = value(report, arm="softmax", shift="all shifts", severity=None, subset="overall", metric="accuracy")
    assert [record["low"], record["high"]] == pytest.approx(centred(per_row.mean().item(), drawn))
    assert record["n"] == 2 * len(per_row)


def test_an_empty_subset_is_null_renders_as_no_rows_and_stays_strict_json() -> None:
    report = evaluate_predictions(predictions()[:1], {"nobody": torch.zeros_like(HARD)}, resamples=20)
    record = value(report, shift="clean", subset="nobody", metric="ece")
    assert (record["n"], record["value"], record["low"], record["high"]) == (0, None, None, None)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert sum("no rows" in line for line in rendered(report)) == 1


def test_evaluation_sets_of_different_sizes_share_a_report() -> None:
    clean, noisy, _ = predictions()[:3]
    shorter = Prediction(noisy.probs[:301], target=noisy.target[:301], arm="softmax", shift="other domain", severity=1)
    report = evaluate_predictions([clean, shorter, noisy], {}, resamples=20)
    sizes = {row["shift"]: row["n"] for row in report["records"] if row["severity"] is None}
    assert sizes == {"other domain": 301, "all shifts": 301 + 997, "noise": 997}


def test_reliability_curves_pool_the_severe_shifts_or_all_where_none_is_severe() -> None:
    clean, mild, severe = predictions()[:3]
    for found, pooled in (([clean, mild, severe], [severe]), ([clean, mild], [mild])):
        curves = evaluate_predictions(found, {}, resamples=5)["reliability"]
        assert [curve["panel"] for curve in curves] == ["clean", f"noise, severity {found[-1].severity}"]
        expected = multiclass_calibration_error(pooled[0].probs, pooled[0].target, 10, 15).item()
        assert curves[1]["ece"] == pytest.approx(expected, abs=1e-5)
        assert sum(curves[1]["bins"]["count"]) == curves[1]["n"] == len(HARD)


def test_routing_configurations_are_clusters_with_their_sets_of_experts() -> None:
    probs = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    routing = {
        "cluster_ids": torch.tensor([0, 0, 0, 0, 1, 1]),
        "expert_indices": torch.tensor([[0, 2], [2, 0], [0, 2], [0, 1], [0, 1], [1, 0]]),
    }
    one = Prediction(
        probs, target=torch.tensor([0, 0, 1, 0, 1, 1]), arm="posterior", shift="clean", severity=0, **routing
    )
    rows = evaluate_predictions([one], {}, resamples=5)["configurations"]
    found = [(row["cluster"], row["experts"], row["n"]) for row in rows]
    assert found == [(0, [0, 2], 3), (1, [0, 1], 2), (0, [0, 1], 1)]
    assert [row["ece"] for row in rows] == pytest.approx([0.9 - 2 / 3, 0.4, 0.1])
    with pytest.raises(InvalidArgumentError, match=r"cluster_ids must have one entry per row \(6\); got \(5,\)"):
        evaluate_predictions(
            [Prediction(probs, target=one.target, arm="a", shift="clean", severity=0, cluster_ids=torch.zeros(5))], {}
        )


def test_a_refusal_names_what_was_expected_and_what_came() -> None:
    clean, noisy = predictions()[:2]
    flipped = Prediction(clean.probs, target=clean.target.flip(0), arm="posterior", shift="clean", severity=0)
    renamed = Prediction(clean.probs, target=clean.target, arm="softmax", shift="all shifts", severity=1)
    for found, masks, message in [
        ([], {}, "at least one evaluation set"),
        ([clean, flipped], {}, "with the same target in every arm"),
        ([renamed], {}, "shift must be .* another name than 'all shifts'"),
        ([clean], {"few": HARD[:5]}, r"subsets must be bool of shape \(997,\).*'few': torch.bool of shape \(5,\)"),
        ([clean], {"overall": HARD}, "a name other than 'overall'"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            evaluate_predictions(found, masks, resamples=5)
    other = Prediction(clean.probs, target=clean.target, arm="posterior", shift="clean", severity=0)
    with pytest.raises(InvalidArgumentError, match="baseline must be one of the arms"):
        evaluate_predictions([clean, other], {}, baseline="uniform")
    with pytest.raises(InvalidArgumentError, match="resamples must be at least 1; got 0"):
        evaluate_predictions([noisy], {}, resamples=0)
    with pytest.raises(InvalidArgumentError, match=r"columns must share one positive number of rows; got \[3, 4\]"):
        bootstrap_sums([torch.ones(3, 1), torch.ones(4, 1)], 5)


def rendered(report: dict) -> list[str]:
    file = io.StringIO()
    render_table(report, Console(file=file, width=80, color_system=None))
    return file.getvalue().splitlines()


def test_the_table_shows_every_subset_of_clean_and_all_shifts_and_each_shift_overall(report: dict) -> None:
    lines = rendered(report)
    (title,) = [line for line in lines if "15-bin" in line]
    assert "200 resamples" in title
    assert not any("…" in line for line in lines)
    heads = [line.removeprefix("── ").rsplit(" (n", 1)[0] for line in lines if line.startswith("──")]
    names = ("clean", "mean of 2 sets (1 shift, severities 1, 4)")
    both = [f"{name}, {subset}" for name in names for subset in ("overall", "hard", "easy")]
    assert heads == [*both, "noise, mean of severities 1, 4, overall"]
    rows = [line for line in to_markdown(report).splitlines() if line.startswith("| ") and "evaluation" not in line]
    assert len(rows) == 2 * len(heads)
    assert {row.count("|") for row in rows} == {9}


def test_a_report_that_is_not_strict_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json({"value": 1}, path)
    for bad in (float("nan"), torch.ones(1)):
        with pytest.raises(InvalidArgumentError, match="report must be strict JSON"):
            write_json({"value": bad}, path)
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_reliability_diagram_draws_what_the_json_says(report: dict, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    reread = json.loads((tmp_path / "report.json").read_text())
    reliability_diagram(report, tmp_path / "direct.png")
    reliability_diagram(reread, tmp_path / "reread.png")
    [shifted] = [c for c in reread["reliability"] if (c["arm"], c["panel"]) == ("posterior", "noise, severity 4")]
    shifted["bins"]["accuracy"] = [found and found / 2 for found in shifted["bins"]["accuracy"]]
    reliability_diagram(reread, tmp_path / "other.png")
    direct, same, other = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("direct", "reread", "other"))
    assert (direct == same).all()
    changed = (direct != other).any(axis=(0, 2)).nonzero()[0]
    assert changed.min() > direct.shape[1] / 2, "only the right panel may change"


def test_the_heat_map_marks_cells_without_evidence(tmp_path: Path) -> None:
    mean, count = torch.full((3, 4), 0.5), torch.full((3, 4), 20.0)
    posterior_heatmap(mean, count, tmp_path / "full.png", expert_names=list("abcd"))
    count[2, 3] = 0
    posterior_heatmap(mean, count, tmp_path / "hole.png", expert_names=list("abcd"))
    full, hole = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("full", "hole"))
    rows, columns = (full != hole).any(axis=2).nonzero()
    assert rows.size > 100
    assert rows.min() > full.shape[0] / 2
    assert columns.min() > full.shape[1] / 2, "the last cell, lower right"


def test_figures_refuse_what_they_cannot_draw(report: dict, tmp_path: Path) -> None:
    table = torch.zeros(3, 4)
    with pytest.raises(InvalidArgumentError, match=r"must share a shape \(C, E\); got \(3, 4\) and \(4, 3\)"):
        posterior_heatmap(table, table.T, tmp_path / "x.png")
    with pytest.raises(InvalidArgumentError, match="expert_names must name 4 experts; got 1"):
        posterior_heatmap(table, table, tmp_path / "x.png", expert_names=["a"])
    with pytest.raises(InvalidArgumentError, match="at most 4 arms"):
        reliability_diagram({**report, "arms": list("abcde")}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
