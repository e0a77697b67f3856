"""The calibration report as a dict: predictions of each arm on each evaluation set in, numbers with intervals out.

Dimensions: n rows of an evaluation set, K classes, B = n_bins bins, R resamples, k experts per row.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    BinSums,
    bin_sums,
    brier_score,
    centred_interval,
    curve_from_sums,
    negative_log_likelihood,
    top_label,
)
from moe_posterior.metrics.calibration import validate_arguments, validate_predictions
from moe_posterior.results.intervals import bootstrap_sums
from moe_posterior.training.prediction import Prediction
from moe_posterior.training.report.ece import (
    Answers,
    configuration_rows,
    correct_for_many,
    ece_difference,
    ece_record,
    finite,
    resampled_p,
)
from moe_posterior.training.report.marks import is_main
from moe_posterior.training.report.places import ALL_SHIFTS, CLEAN, place_name, pool_name

SCHEMA = "moe-posterior/calibration-report/2"
METRICS = ("accuracy", "nll", "brier", "ece")
OVERALL = "overall"
NOTES = (
    "ECE is debiased: what sampling noise adds to the plain binned error is taken off, and its 95 % interval inverts a test, so that "
    "it covers also where the true error is near 0. Where it begins at 0, the rows do not tell the arm from a calibrated one.",
    "The noise floor beside an ECE is the mean plain ECE of a model that displays these confidences and is right as often as they say.",
    "The other intervals are 95 % percentile bootstrap intervals over rows, less the bootstrap's estimate of bias; every arm and every "
    "evaluation set of the same size sees the same resamples.",
    "Differences are marked where their 95 % interval excludes 0 and Holm's correction for the comparisons of the table agrees: one "
    "family is the main table with its subsets, the other all further places.",
)
NOTES_ON_SHIFTS = (
    "severity null is the mean over evaluation sets; a mean of ECEs is not the ECE of the pooled predictions.",
    "Reliability curves pool evaluation sets made of the same rows; their Wilson intervals take the predictions as "
    "independent and are too narrow where sets were pooled.",
)

Key = tuple[str, str, int | None]  # arm, shift, severity; None: the mean over evaluation sets


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """A set of predictions reduced to what the report needs, so that the probabilities may be freed."""

    target: Tensor  # (n,)
    answers: Answers  # (n,) each
    scores: Tensor  # (n, 3) float64: correct, nll, brier
    sums: BinSums  # (1, B)
    configurations: dict[tuple[int | None, tuple[int, ...]], BinSums]  # (cluster, experts) -> (1, B)


def evaluate_predictions(
    predictions: Iterable[Prediction],
    subsets: Mapping[str, Tensor],  # name -> (n,) bool
    *,
    n_bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
    baseline: str = "softmax",
    shifted_from: int = 3,
) -> dict:
    """Accuracy, NLL, Brier score and debiased ECE of every arm, shift, severity and subset, with intervals and paired comparisons.

    Args:
        predictions: one per (arm, shift, severity), read once, in any order; every arm covers the same evaluation sets.
            Severity 0 are the stored test rows, under one name: "clean", or the shift that they are under as they stand.
        subsets: bool masks over the rows, for instance hard and easy ones; "overall" is always added, and a mask of all rows is
            left out, being the same. With subsets, every evaluation set has the masks' number of rows, in the same order.
        n_bins: equal-width bins of the top-label ECE; 15 is the paper's.
        resamples: bootstrap resamples; 1,000 settle the second digit of a 95 % interval.
        seed: of the resamples.
        baseline: the arm that the others are compared with, where there are several.
        shifted_from: severities pooled in the reliability curves of shifted sets; if no set reaches it, all shifted sets.

    Returns:
        A dict that is strict JSON (NaN became None): ``records`` (arm, shift, severity, subset, n, metric, value, low, high;
        n counts predictions; means over severities have severity None, means over shifts the shift "all shifts"; an ECE also has its
        ``plain`` value and its noise ``floor``), ``paired`` (the same of arm − baseline, with ``p_value``, Holm's ``p_holm`` and the
        number of ``comparisons`` in its family), ``reliability`` (curves), ``configurations`` (calibration of each
        routing configuration, where routings came along), the settings, and ``notes`` on how to read it.

    Raises:
        InvalidArgumentError: predictions, masks or names that do not fit together.

    >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> report = evaluate_predictions([Prediction(probs, target=torch.tensor([0, 1]))], {}, resamples=9)
    >>> [(r["metric"], round(r["value"], 3)) for r in report["records"]]
    [('accuracy', 1.0), ('nll', 0.308), ('brier', 0.17), ('ece', 0.25)]
    """
    validate_arguments(1, n_bins, "l1", 1)
    evaluations: dict[Key, _Evaluation] = {}
    for item in predictions:
        key = (item.arm, item.shift, item.severity)
        _validate_item(item, subsets, key in evaluations)
        evaluations[key] = _reduce(item, n_bins)
    arms = _validate_arms(evaluations, baseline)
    whole = [name for name, mask in subsets.items() if is_everything(mask)]
    subsets = {name: mask for name, mask in subsets.items() if name not in whole}
    records, paired = [], []
    for subset, mask in {OVERALL: None, **subsets}.items():
        found = _subset(evaluations, mask, None if len(arms) == 1 else baseline, n_bins, resamples, seed)
        records += [{**record, "subset": subset} for record in found[0]]
        paired += [{**pair, "subset": subset} for pair in found[1]]
    correct_for_many(paired, [is_main(pair) for pair in paired])
    panels, pools = _panels(evaluations, shifted_from), _pools(evaluations, shifted_from)
    return {
        "schema": SCHEMA,
        "n_bins": n_bins,
        "resamples": resamples,
        "seed": seed,
        "arms": arms,
        "baseline": baseline if len(arms) > 1 else None,
        "subsets": {OVERALL: None, **{name: int(mask.sum()) for name, mask in subsets.items()}},
        "shifted_from": shifted_from,
        "pools": pools,
        "records": records,
        "paired": paired,
        "reliability": [_curve(arm, panel, members, n_bins, seed) for (arm, panel), members in panels.items()],
        "configurations": [
            row for (arm, panel), members in panels.items() for row in _configurations(arm, panel, members)
        ],
        "notes": [
            *NOTES,
            *(NOTES_ON_SHIFTS if pools else ()),
            *(f"Subset {name!r} holds every row and is not shown apart." for name in whole),
        ],
    }


def is_everything(mask: Tensor) -> bool:  # (n,) bool
    """Whether a subset holds every row, so that it says nothing that "overall" does not."""
    return bool(mask.all())


def _validate_item(item: Prediction, subsets: Mapping[str, Tensor], seen: bool) -> None:
    name = f"predictions of arm {item.arm!r} on {item.shift!r}, severity {item.severity}"
    if seen:
        raise InvalidArgumentError(f"{name} must come once; got them twice")
    if item.shift == ALL_SHIFTS or item.severity < 0 or (item.shift == CLEAN) > (item.severity == 0):
        raise InvalidArgumentError(
            f"shift must be 'clean' with severity 0, or another name than 'all shifts' with severity ≥ 0; got {name}"
        )
    if item.probs.ndim != 2 or not len(item.probs):
        raise InvalidArgumentError(f"{name}: probs must have shape (n ≥ 1, K); got {tuple(item.probs.shape)}")
    target = item.need("target")
    validate_predictions(item.probs, target)
    for subset, mask in subsets.items():
        if subset == OVERALL or mask.dtype != torch.bool or mask.shape != target.shape:
            raise InvalidArgumentError(
                f"subsets must be bool of shape {tuple(target.shape)} under a name other than 'overall'; got "
                f"{subset!r}: {mask.dtype} of shape {tuple(mask.shape)}"
            )


def _validate_arms(evaluations: dict[Key, _Evaluation], baseline: str) -> list[str]:
    """All arms cover the same sets with the same targets; returns the arms, the baseline first."""
    arms = list(dict.fromkeys(arm for arm, _, _ in evaluations))
    if not arms:
        raise InvalidArgumentError("predictions must hold at least one evaluation set; got none")
    stored = list(dict.fromkeys(shift for _, shift, severity in evaluations if severity == 0))
    if len(stored) > 1:
        raise InvalidArgumentError(f"predictions of severity 0, the stored test rows, must have one name; got {stored}")
    if stored and any(shift in stored and severity for _, shift, severity in evaluations):
        raise InvalidArgumentError(
            f"predictions of severity 0, the stored test rows, must have a name of their own; got {stored[0]!r} with severities too"
        )
    if len(arms) > 1 and baseline not in arms:
        raise InvalidArgumentError(f"baseline must be one of the arms {arms}; got {baseline!r}")
    for _, shift, severity in evaluations:
        present = [evaluations[key] for arm in arms if (key := (arm, shift, severity)) in evaluations]
        if len(present) < len(arms) or not all(one.target.equal(present[0].target) for one in present):
            raise InvalidArgumentError(
                f"predictions must cover {shift!r}, severity {severity}, with the same target in every arm of {arms}"
            )
    return sorted(arms, key=lambda arm: arm != baseline)


def _reduce(item: Prediction, n_bins: int) -> _Evaluation:
    probs, target = item.probs.cpu(), item.need("target").cpu().long()
    confidence, correct = top_label(probs, target)
    scores = [correct, negative_log_likelihood(probs, target, "none"), brier_score(probs, target, "none")]
    return _Evaluation(
        target=target,
        answers=Answers(confidence, correct),
        scores=torch.stack(scores, dim=1),
        sums=bin_sums(confidence, correct, torch.zeros_like(target), 1, n_bins),
        configurations=_configuration_sums(item, confidence, correct, n_bins),
    )


def _subset(
    evaluations: dict[Key, _Evaluation],
    mask: Tensor | None,  # (n,) bool
    baseline: str | None,
    n_bins: int,
    resamples: int,
    seed: int,
) -> tuple[list[dict], list[dict]]:
    """Records of every place on some rows, and those of every arm's difference from the baseline."""
    rows = slice(None) if mask is None else mask.cpu()
    answers = {key: Answers(*(part[rows] for part in one.answers)) for key, one in evaluations.items()}
    places = _places(evaluations)
    statistics = _statistics({key: one.scores[rows] for key, one in evaluations.items()}, places, resamples, seed)
    records, pairs = [], []
    for (arm, shift, severity), members in places.items():
        where = {"arm": arm, "shift": shift, "severity": severity}
        where["n"] = sum(len(answers[key].correct) for key in members)
        values = statistics[arm, shift, severity]
        sets = [answers[key] for key in members]
        records += _tidy(where, values, floor=0.0)
        records.append({**where, "metric": "ece", **ece_record(sets, n_bins, seed)})
        if baseline is not None and arm != baseline:
            where["baseline"] = baseline
            difference = values - statistics[baseline, shift, severity]
            p_values = resampled_p(difference[0], difference[1:]).tolist()
            pairs += [
                {**one, "p_value": finite(p)}
                for one, p in zip(_tidy(where, difference, floor=-math.inf), p_values, strict=True)
            ]
            others = [answers[baseline, *key[1:]] for key in members]
            pairs.append({**where, "metric": "ece", **ece_difference(sets, others, n_bins, seed)})
    return records, pairs


def _places(evaluations: Iterable[Key]) -> dict[Key, list[Key]]:
    """Every place that a report speaks of, and the evaluation sets it is the mean of."""
    places = {key: [key] for key in evaluations}
    for arm, shift, severity in list(places):
        if severity != 0:
            for mean in ((arm, shift, None), (arm, ALL_SHIFTS, severity), (arm, ALL_SHIFTS, None)):
                places.setdefault(mean, []).append((arm, shift, severity))
    return places


def _statistics(
    scores: dict[Key, Tensor],  # (n, 3)
    places: dict[Key, list[Key]],
    resamples: int,
    seed: int,
) -> dict[Key, Tensor]:  # (1 + R, 3): of the data, then of each resample
    """Mean scores of each place."""
    sets = {key: torch.full((1 + resamples, 3), math.nan, dtype=torch.float64) for key in scores}
    for rows in sorted({len(block) for block in scores.values()} - {0}):
        keys = [key for key, block in scores.items() if len(block) == rows]
        for key, sums in zip(keys, bootstrap_sums([scores[key] for key in keys], resamples, seed), strict=True):
            sets[key] = torch.cat([scores[key].sum(0, keepdim=True), sums]) / rows
    return {place: torch.stack([sets[key] for key in members]).mean(0) for place, members in places.items()}


def _tidy(where: dict, values: Tensor, floor: float) -> list[dict]:  # (1 + R, 3) -> one record a score
    low, high = centred_interval(values[0], values[1:])
    low = low.clamp(min=floor)  # no metric is negative, though a moved interval may reach there
    columns = zip(METRICS[:3], values[0].tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        {**where, "metric": metric, "value": finite(value), "low": finite(low_), "high": finite(high_)}
        for metric, value, low_, high_ in columns
    ]


def _panels(evaluations: dict[Key, _Evaluation], shifted_from: int) -> dict[tuple[str, str], list[_Evaluation]]:
    """The stored test rows under their name, and the sets of high severity under the name of their pool."""
    panel_of = panels_of([(shift, severity or 0) for _, shift, severity in evaluations], shifted_from)
    panels: dict[tuple[str, str], list[_Evaluation]] = {}
    for (arm, shift, severity), one in evaluations.items():
        if panel := panel_of.get((shift, severity or 0)):
            panels.setdefault((arm, panel), []).append(one)
    return panels


def _pools(evaluations: Mapping[Key, _Evaluation], shifted_from: int) -> list[dict]:
    """What the names stand for that hold several sets; sizes are those of one arm."""
    first = next(iter(evaluations))[0]
    rows = {
        (shift, severity or 0): len(one.target) for (arm, shift, severity), one in evaluations.items() if arm == first
    }
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


def _curve(arm: str, panel: str, members: list[_Evaluation], n_bins: int, seed: int) -> dict:
    pooled = reduce(add, (one.sums for one in members))
    curve = {name: [finite(x) for x in value.tolist()] for name, value in vars(curve_from_sums(pooled)).items()}
    total = float(pooled.count.sum())
    together = Answers(*(torch.cat(parts) for parts in zip(*(one.answers for one in members), strict=True)))
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
        "bins": curve,
    }


def _configuration_sums(item: Prediction, confidence: Tensor, correct: Tensor, n_bins: int) -> dict:
    """Sums of each routing configuration: the cluster and the set of chosen experts, of whichever are known."""
    parts = {"cluster_ids": item.cluster_ids, "expert_indices": item.expert_indices}
    for name, part in parts.items():
        if part is not None and (len(part) != len(confidence) or part.ndim != 1 + (name == "expert_indices")):
            raise InvalidArgumentError(
                f"{name} must have one entry per row ({len(confidence)}); got {tuple(part.shape)}"
            )
    known = [part.cpu().long().view(len(part), -1).sort(1).values for part in parts.values() if part is not None]
    if not known:
        return {}
    labels, ids = torch.cat(known, dim=1).unique(dim=0, return_inverse=True)
    sums = bin_sums(confidence, correct, ids, len(labels), n_bins)
    skip = 0 if item.cluster_ids is None else 1
    return {
        (row[0] if skip else None, tuple(row[skip:])): BinSums(*(x[i : i + 1] for x in vars(sums).values()))
        for i, row in enumerate(labels.tolist())
    }


def _configurations(arm: str, panel: str, members: list[_Evaluation]) -> list[dict]:
    """Calibration of each routing configuration, the most frequent first."""
    pooled: dict[tuple[int | None, tuple[int, ...]], BinSums] = {}
    for one in members:
        for name, sums in one.configurations.items():
            pooled[name] = pooled[name] + sums if name in pooled else sums
    if not pooled:
        return []
    names = [{"arm": arm, "panel": panel, "cluster": cluster, "experts": list(experts)} for cluster, experts in pooled]
    together = BinSums(
        *(torch.cat(parts) for parts in zip(*(vars(one).values() for one in pooled.values()), strict=True))
    )
    return sorted(configuration_rows(names, together, len(members)), key=lambda row: -row["n"])
