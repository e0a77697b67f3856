"""The calibration errors of a report: debiased, with intervals that cover also near 0, and with what noise alone would show.

Dimensions: n rows of an evaluation set, J sets, G configurations.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_posterior.metrics import BinSums, calibration_from_sums, holm, wilson_interval
from moe_posterior.metrics.floor import binomial_deviation
from moe_posterior.metrics.gaps import GapSums, gap_sums, moments_of
from moe_posterior.metrics.inference import DRAWS, difference_of_sums, interval_of_sums
from moe_posterior.report.schema import Configuration, ConfigurationPlace, Difference, EceEstimate, Pair

MANY = 64  # bins in use, from which the statistic is so nearly normal that a quarter of the draws settles its tails
LEVEL = 0.95


class Answers(NamedTuple):
    """Top-label confidences of one arm on one evaluation set, and which answers were right."""

    confidence: Tensor  # (n,)
    correct: Tensor  # (n,)
    totals: Tensor | None = None  # (6, B) moments of all rows, where these are a sample


def ece_record(sets: Sequence[Answers], n_bins: int, seed: int, rows: Tensor | None = None) -> EceEstimate:
    """The mean ECE of the sets: its debiased value, interval, plain value and noise floor; None where there are no rows."""
    sums = joint_sums([sets], n_bins, rows)
    found = interval_of_sums(sums, level=LEVEL, draws=_draws(sums), seed=seed)
    low, high = finite(found.low), finite(found.high)
    return {
        "value": finite(found.value),
        "low": low,
        "high": high,
        "floor": finite(found.floor),
        "plain": finite(found.plain),
    }


def ece_of(answers: Answers, rows: Tensor, n_bins: int, seed: int, level: float = LEVEL) -> dict[str, Any]:
    """The debiased ECE with its interval, plain value and noise floor; a data row brings all its copies under other shifts along."""
    copies = rows if len(rows.unique()) < len(rows) else None
    found = interval_of_sums(joint_sums([[answers]], n_bins, copies), seed=seed, level=level)
    return {"ece": found.value, "interval": [found.low, found.high], "plain": found.plain, "floor": found.floor}


def ece_difference(sets: Sequence[Answers], baseline: Sequence[Answers], n_bins: int, seed: int) -> Difference:
    """The mean ECE of the sets less that of the baseline on the same rows: value, interval and p-value."""
    sums = joint_sums([sets, baseline], n_bins)
    found = difference_of_sums(sums, level=LEVEL, draws=_draws(sums), seed=seed)
    low, high = finite(found.low), finite(found.high)
    return {"value": finite(found.value), "low": low, "high": high, "p_value": finite(found.p_value)}


def joint_sums(arms: Sequence[Sequence[Answers]], n_bins: int, rows: Tensor | None = None) -> GapSums:
    """The sums of each arm's sets: exact where totals are known, with the correlations of the sampled rows."""
    every = [one for sets in arms for one in sets]
    sampled = [one.totals is not None for one in every]
    totals = None
    if any(sampled):  # a set without totals holds all of its rows
        totals = [moments_of(*one[:2], n_bins) if one.totals is None else one.totals for one in every]
    return gap_sums([[one[:2] for one in sets] for sets in arms], n_bins, rows, totals)


def _draws(sums: GapSums) -> int:
    return DRAWS if len(sums.count) < MANY else DRAWS // 4


def finite(value: float) -> float | None:
    """The value, or None where there is nothing to say."""
    return value if math.isfinite(value) else None


def resampled_p(value: Tensor, statistics: Tensor) -> Tensor:  # (...), (R, ...) -> (...)
    """Two-sided p-value of no difference, by the normal tail with the spread of the resamples; 1 where nothing differs."""
    spread = statistics.std(0)
    return torch.where(spread > 0, 2 * torch.special.ndtr(-value.abs() / spread), torch.where(value == 0, 1.0, 0.0))


def correct_for_many(pairs: list[Pair], family: Iterable[bool]) -> None:
    """Write ``p_holm`` and ``comparisons`` into pairs: Holm's correction within two families, the chosen and the others."""
    chosen = list(family)
    for own in (True, False):
        members = [pair for pair, one in zip(pairs, chosen, strict=True) if one is own]
        known = [math.nan if pair["p_value"] is None else pair["p_value"] for pair in members]
        comparisons = sum(not math.isnan(p) for p in known)
        for pair, p in zip(members, holm(torch.tensor(known, dtype=torch.float64)).tolist(), strict=True):
            pair["p_holm"], pair["comparisons"] = finite(p), comparisons


def configuration_rows(
    places: Sequence[ConfigurationPlace], sums: BinSums, copies: int
) -> list[Configuration]:  # (G, B)
    """A row a configuration: its calibration, and the gap with an interval that holds for all of them at once.

    The largest of many gaps is large by chance, so the intervals are Bonferroni's over the configurations, and ``floor`` says which
    |gap| a calibrated configuration of this size shows on average. Copies of rows under several shifts count as one row in both.
    """
    result = calibration_from_sums(sums)
    independent = result.count / copies
    low, high = wilson_interval(result.accuracy * independent, independent, level=1 - (1 - LEVEL) / max(len(places), 1))
    variance = independent * result.confidence * (1 - result.confidence)
    floor = binomial_deviation(independent.ceil(), result.confidence, variance) / independent.ceil()
    return [
        {
            **place,
            "n": int(result.count[i]),
            "accuracy": finite(float(result.accuracy[i])),
            "confidence": finite(float(result.confidence[i])),
            "ece": finite(float(result.calibration_error[i])),
            "gap": finite(float(result.confidence[i] - result.accuracy[i])),
            "interval": [finite(float(result.confidence[i] - end[i])) for end in (high, low)],
            "floor": finite(float(floor[i])),
        }
        for i, place in enumerate(places)
    ]
