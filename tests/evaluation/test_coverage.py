"""Intervals of sets that were sampled hold the truth of the population as often as they say.

The truth is known: confidences are uniform on [.5, 1], and answers are right less often than said by a fixed gap.
"""

import numpy as np
import pytest

from moe_posterior.evaluation.collect import Collector, Settings, Words
from moe_posterior.evaluation.columns import Columns
from moe_posterior.evaluation.survey import Facts, planned
from moe_posterior.report import evaluate_predictions

GAPS = {"a": 0.05, "b": 0.10}
# Means over c uniform on [.5, 1] of (c − r)² with r right at c − gap: c (1 − c) + gap (2 c − 1) + … has the closed form below.
MEAN, SQUARE = 0.75, 7 / 12


def truth(gap: float) -> dict[str, float]:
    right = MEAN - gap
    brier = SQUARE - 2 * (SQUARE - gap * MEAN) + right  # E c² − 2 E c r + E r
    return {"accuracy": right, "brier": brier, "ece": gap}


def drawn(n: int, sample: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Records and differences of two models on n rows, of which a sample is kept."""
    draw = np.random.default_rng(seed)
    confidence, luck = draw.uniform(0.5, 1, n), draw.random(n)
    group = (draw.random(n) < 0.2).astype(np.int64)
    words, keys = Words(), [(model, "test rows", 0) for model in GAPS]
    words.group("", ["most", "few"], group)
    plan = planned({key: Facts(n, None, np.empty(0, np.uint64)) for key in keys}, 0.0)
    collector = Collector(plan, Settings(sample=sample), words)
    for key in keys:
        right = (luck < confidence - GAPS[key[0]]).astype(float)
        collector.add(key, Columns(confidence, right, groups={"": group}))
    report = evaluate_predictions(collector.predictions(), {}, resamples=300, seed=seed, baseline="a")
    return list(report["records"]), list(report["paired"])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "sample", "draws"), [(20_000, 2_000, 300), (200_000, 20_000, 200)])
def test_intervals_of_sampled_sets_cover(n: int, sample: int, draws: int) -> None:
    covered: dict[tuple[str, str, str], list[bool]] = {}
    for seed in range(draws):
        records, pairs = drawn(n, sample, seed)
        for one in records:
            if one["metric"] in truth(0):
                known = truth(GAPS[one["arm"]])[one["metric"]]
                where = (one["arm"], one["subset"], one["metric"])
                covered.setdefault(where, []).append(one["low"] <= known <= one["high"])
        for one in pairs:
            if one["metric"] in truth(0):
                known = truth(GAPS["b"])[one["metric"]] - truth(GAPS["a"])[one["metric"]]
                where = ("b − a", one["subset"], one["metric"])
                covered.setdefault(where, []).append(one["low"] <= known <= one["high"])
    rates = {where: sum(found) / draws for where, found in covered.items()}
    print(rates)
    slack = 3 * (0.95 * 0.05 / draws) ** 0.5
    assert all(rate >= 0.95 - slack for rate in rates.values()), rates
    wide = {where: rate for where, rate in rates.items() if rate > 0.95 + slack and where[2] != "ece"}
    assert not wide  # the ECE's difference errs on the side of no difference


def test_values_of_sampled_sets_are_those_of_all_rows() -> None:
    sampled, apart = drawn(6_000, 2_000, 0)
    whole, together = drawn(6_000, 6_000, 0)
    for one, other in zip(sampled + apart, whole + together, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=1e-12)
        assert one["n"] == other["n"]
        if one["subset"] == "overall":
            assert one["high"] - one["low"] == pytest.approx(other["high"] - other["low"], rel=0.25)


def test_the_ece_of_a_sampled_set_is_exact_with_its_interval() -> None:
    sampled, _ = drawn(6_000, 1_000, 1)
    whole, _ = drawn(6_000, 6_000, 1)
    for one, other in zip(sampled, whole, strict=True):
        if one["metric"] == "ece":
            for name in ("value", "low", "high", "plain", "floor"):
                assert one[name] == pytest.approx(other[name], abs=1e-9)
