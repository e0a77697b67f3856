"""Each metric with its interval, and the paired differences from the baseline, at every place that a report speaks of.

Dimensions: n rows of an evaluation set, R resamples.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from moe_posterior.metrics import centred_interval
from moe_posterior.report.ece import ece_difference, ece_record, finite, resampled_p
from moe_posterior.report.evaluation import Evaluation, Part
from moe_posterior.report.places import ALL_SHIFTS
from moe_posterior.report.schema import METRICS, EceEstimate, Estimate, Key, Pair, Place, Record
from moe_posterior.results.intervals import bootstrap_sums

__all__ = ["LEAST_SAMPLED", "records_of"]

LEAST_SAMPLED = 100  # sampled rows of a subset, below which they do not say how its scores vary: no interval is given


def records_of(
    evaluations: Mapping[Key, Evaluation],
    subset: str,
    mask: Tensor | None,  # (n,) bool, the subset's rows; None: all
    baseline: str | None,
    n_bins: int,
    resamples: int,
    seed: int,
) -> tuple[list[Record], list[Pair]]:
    """The records of every place on a subset, and those of every arm's difference from the baseline."""
    parts = {key: one.part(subset, mask) for key, one in evaluations.items()}
    if mask is None:  # subsets of each set's own: a set without such rows says nothing of them
        parts = {key: one for key, one in parts.items() if one.n}
    answers = {key: one.answers for key, one in parts.items()}
    places = _places(parts)
    statistics = _statistics(parts, places, resamples, seed)
    records: list[Record] = []
    pairs: list[Pair] = []
    for key, members in places.items():
        arm, shift, severity = key
        sets = [answers[member] for member in members]
        place: Place = {
            "arm": arm,
            "shift": shift,
            "severity": severity,
            "n": sum(parts[member].n for member in members),
        }
        ece: EceEstimate = ece_record(sets, n_bins, seed)
        records += _records(place, subset, statistics[key])
        records.append({**place, "metric": "ece", **ece, "subset": subset})
        if baseline is not None and arm != baseline:
            others = [answers[baseline, *member[1:]] for member in members]
            pairs += _pairs(place, baseline, subset, statistics[key] - statistics[baseline, shift, severity])
            apart = ece_difference(sets, others, n_bins, seed)
            pairs.append({**place, "baseline": baseline, "metric": "ece", **apart, "subset": subset})
    return records, pairs


def _records(place: Place, subset: str, values: Tensor) -> Iterator[Record]:  # (1 + R, 3): one a score
    for metric, found in _estimates(
        values, floor=0.0
    ):  # no metric is negative, though a moved interval may reach there
        yield {**place, "metric": metric, **found, "subset": subset}


def _pairs(place: Place, baseline: str, subset: str, difference: Tensor) -> Iterator[Pair]:  # (1 + R, 3)
    p_values = resampled_p(difference[0], difference[1:]).tolist()
    for (metric, found), p in zip(_estimates(difference, floor=-math.inf), p_values, strict=True):
        yield {**place, "baseline": baseline, "metric": metric, **found, "p_value": finite(p), "subset": subset}


def _places(evaluations: Iterable[Key]) -> dict[Key, list[Key]]:
    """Every place that a report speaks of, and the evaluation sets it is the mean of."""
    places = {key: [key] for key in evaluations}
    for arm, shift, severity in list(places):
        if severity != 0:
            for mean in ((arm, shift, None), (arm, ALL_SHIFTS, severity), (arm, ALL_SHIFTS, None)):
                places.setdefault(mean, []).append((arm, shift, severity))
    return places


def _statistics(
    parts: Mapping[Key, Part],
    places: dict[Key, list[Key]],
    resamples: int,
    seed: int,
) -> dict[Key, Tensor]:  # (1 + R, 3): of the data, then of each resample
    """Mean scores of each place."""
    scores = {key: one.scores for key, one in parts.items()}
    sets = {key: torch.full((1 + resamples, 3), math.nan, dtype=torch.float64) for key in scores}
    for rows in sorted({len(block) for block in scores.values()} - {0}):
        keys = [key for key, block in scores.items() if len(block) == rows]
        for key, sums in zip(keys, bootstrap_sums([scores[key] for key in keys], resamples, seed), strict=True):
            sets[key] = torch.cat([scores[key].sum(0, keepdim=True), sums]) / rows
    sets = {key: _of_all_rows(parts[key], found) for key, found in sets.items()}
    return {place: torch.stack([sets[key] for key in members]).mean(0) for place, members in places.items()}


def _of_all_rows(part: Part, sampled: Tensor) -> Tensor:  # (1 + R, 3)
    """Exact means, with the resamples of a sample of m rows drawn together around them, to the spread that all n rows have.

    A mean of m rows varies sqrt(n / m) times as much as one of n rows. Arms and sets keep their pairing, since all shrink alike.
    """
    if part.sums is None:
        return sampled
    exact, rows = part.sums / part.n, len(part.scores)
    spread = (sampled[1:] - sampled[0]) * math.sqrt(rows / part.n)
    if rows < min(LEAST_SAMPLED, part.n):
        spread = torch.full_like(spread, math.nan)
    return torch.cat([exact[None], exact + spread])


def _estimates(values: Tensor, floor: float) -> Iterator[tuple[str, Estimate]]:  # (1 + R, 3): one a score
    low, high = centred_interval(values[0], values[1:])
    columns = (values[0].tolist(), low.clamp(min=floor).tolist(), high.tolist())
    for metric, value, least, most in zip(METRICS[:3], *columns, strict=True):
        yield metric, {"value": finite(value), "low": finite(least), "high": finite(most)}
