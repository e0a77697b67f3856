"""Panels: the stored test rows, and the severely shifted sets pooled; their reliability curves and routing configurations.

Dimensions: n rows of an evaluation set, B bins.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add

import torch

from moe_posterior.metrics import BinSums, curve_from_sums
from moe_posterior.metrics.gaps import moments_of
from moe_posterior.prediction import ConfigurationName
from moe_posterior.report.ece import Answers, configuration_rows, ece_record, finite
from moe_posterior.report.evaluation import Evaluation
from moe_posterior.report.places import ALL_SHIFTS, place_name, pool_name
from moe_posterior.report.schema import Configuration, ConfigurationPlace, Key, Pool, ReliabilityCurve

__all__ = ["configurations", "curve", "panels", "panels_of", "pools"]


def panels_of(sets: Iterable[tuple[str, int]], shifted_from: int) -> dict[tuple[str, int], str]:
    """The panel that each (shift, severity) belongs to, for those that belong to one.

    >>> panels_of([("clean", 0), ("fog", 1), ("fog", 3), ("fog", 4)], shifted_from=3)[("fog", 4)]
    '2 sets pooled (1 shift, severities 3–4)'
    """
    known = list(dict.fromkeys(sets))
    most = max((severity for _, severity in known), default=0)
    threshold = shifted_from if most >= shifted_from else 1
    severe = [one for one in known if one[1] >= threshold]
    return {one: one[0] for one in known if one[1] == 0} | {one: pool_name(severe) for one in severe}


def panels(evaluations: Mapping[Key, Evaluation], shifted_from: int) -> dict[tuple[str, str], list[Evaluation]]:
    """The stored test rows under their name, and the sets of high severity under the name of their pool."""
    panel_of = panels_of([(shift, severity or 0) for _, shift, severity in evaluations], shifted_from)
    panels: dict[tuple[str, str], list[Evaluation]] = {}
    for (arm, shift, severity), one in evaluations.items():
        if panel := panel_of.get((shift, severity or 0)):
            panels.setdefault((arm, panel), []).append(one)
    return panels


def pools(evaluations: Mapping[Key, Evaluation], shifted_from: int) -> list[Pool]:
    """What the names stand for that hold several sets; sizes are those of one arm."""
    first = next(iter(evaluations))[0]
    rows = {(shift, severity or 0): one.n for (arm, shift, severity), one in evaluations.items() if arm == first}
    shifted = [one for one in rows if one[1]]
    severe = [one for one in panels_of(rows, shifted_from) if one[1]]
    return [
        {
            "name": name,
            "holds": holds,
            "shifts": list(dict.fromkeys(shift for shift, _ in sets)),
            "severities": sorted({severity for _, severity in sets}),
            "sets": len(sets),
            "n": sum(rows[one] for one in sets),
        }
        for name, holds, sets in (
            (place_name(shifted, ALL_SHIFTS, None), "the mean of each set's own value", shifted),
            (pool_name(severe) if severe else "", "one value of all predictions together", severe),
        )
        if len(sets) > 1
    ]


def curve(arm: str, panel: str, members: list[Evaluation], n_bins: int, seed: int) -> ReliabilityCurve:
    pooled = reduce(add, (one.sums for one in members))
    bins = {name: [finite(x) for x in value.tolist()] for name, value in vars(curve_from_sums(pooled)).items()}
    total = float(pooled.count.sum())
    confidence, correct = (torch.cat(parts) for parts in zip(*(one.answers[:2] for one in members), strict=True))
    totals = None
    if any(one.whole for one in members):
        moments = (
            moments_of(*one.answers[:2], n_bins) if one.whole is None else one.whole.overall.moments for one in members
        )
        totals = torch.stack(list(moments)).sum(0)
    together = Answers(confidence, correct, totals)
    # Sets of one size hold the same rows under different shifts.
    rows = torch.cat([torch.arange(len(one.target)) + 2**32 * len(one.target) for one in members])
    found = ece_record([together], n_bins, seed, rows)
    return {
        "arm": arm,
        "panel": panel,
        "sets": len(members),
        "n": int(total),
        "accuracy": finite(float(pooled.correct.sum()) / total),
        "confidence": finite(float(pooled.confidence.sum()) / total),
        "ece": found["plain"],
        "debiased": found["value"],
        "interval": [found["low"], found["high"]],
        "floor": found["floor"],
        "bins": bins,
    }


def configurations(arm: str, panel: str, members: list[Evaluation]) -> list[Configuration]:
    """Calibration of each routing configuration, the most frequent first."""
    pooled: dict[ConfigurationName, BinSums] = {}
    for one in members:
        for name, sums in one.configurations.items():
            pooled[name] = pooled[name] + sums if name in pooled else sums
    if not pooled:
        return []
    places: list[ConfigurationPlace] = [
        {"arm": arm, "panel": panel, "cluster": cluster, "experts": list(experts)} for cluster, experts in pooled
    ]
    together = BinSums(
        *(torch.cat(parts) for parts in zip(*(vars(one).values() for one in pooled.values()), strict=True))
    )
    return sorted(configuration_rows(places, together, len(members)), key=lambda row: -row["n"])
