"""Further sections of a report: calibrators, groups, a threshold to act on, recalibration from arriving outcomes.

Dimensions: n rows, K classes. Calibrators and the threshold are fitted on validation rows; everything is judged on test rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_posterior.calibrators import (
    Calibrator,
    ConfigurationCalibrator,
    ExpertTemperature,
    HistogramBinning,
    IsotonicCalibration,
    OnlineConfigurationCalibrator,
    TemperatureScaling,
    VectorScaling,
)
from moe_posterior.metrics import (
    Configurations,
    calibration_error,
    negative_log_likelihood,
    rce_curve,
    risk_coverage,
    shared_confidence,
    top_label,
    worst_group,
)
from moe_posterior.prediction import Prediction, normalised, numbered_configurations
from moe_posterior.report.baselines import beside
from moe_posterior.report.disagreement import disagreement_curve, disagreement_row
from moe_posterior.report.ece import Answers, ece_of
from moe_posterior.report.evaluation import answers_of, confidences_of, rows_of
from moe_posterior.report.guarantee import chosen_threshold, guarantee_row
from moe_posterior.report.missing import left_out
from moe_posterior.report.promise import Scored, promise_rows
from moe_posterior.report.schema import Sections

__all__ = ["fit_calibrators", "further_sections", "scored"]

CALIBRATORS: dict[str, type[Calibrator]] = {
    "temperature": TemperatureScaling,
    "temperature per expert": ExpertTemperature,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "configuration": ConfigurationCalibrator,
}
MAX_RISK = 0.1  # of the action threshold: at most one wrong answer in ten acted on, on validation rows
RHOS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
DELIVERED = (0, 10, 20, 50, 100, 200, 500)
LEFT_TO_JUDGE = 200
CURVE_POINTS = 100
FLOOR_DRAWS = 10


def fit_calibrators(validation: Prediction) -> dict[str, Calibrator]:
    """Every calibrator of :data:`CALIBRATORS` whose inputs the validation rows have, fitted on them."""
    known = {name for name in validation.outputs._fields if getattr(validation.outputs, name) is not None}
    kinds = CALIBRATORS if validation.classes else {}
    return {
        name: kind().fit(validation.outputs, validation.need("target"))
        for name, kind in kinds.items()
        if known.issuperset(kind.fit_needs + kind.call_needs)
    }


def further_sections(
    fitted: Mapping[str, Mapping[str, Calibrator]],  # by arm, then name
    validation: Mapping[str, Prediction],  # by arm
    panels: Mapping[str, Mapping[str, Prediction]],  # by panel, then arm
    subsets: Mapping[str, Tensor],  # name -> (n,) bool, over the rows of the panel ``base``
    *,
    base: str = "clean",
    sets: Mapping[str, Sequence[Scored]] | None = None,  # by arm: every evaluation set
    n_bins: int = 15,
    max_risk: float = MAX_RISK,
    seed: int = 0,
) -> Sections:
    """The optional keys of a report (see :mod:`~moe_posterior.report.schema`) that need outputs and validation rows.

    What an arm's predictions do not have is left out of its sections, and ``left_out`` says so. An arm without validation rows has
    neither calibrators nor an action threshold.

    Args:
        fitted, validation, panels, subsets: what to measure. Predictions may have subsets of their own besides.
        base: the panel of the stored test rows.
        sets: what the action threshold is judged on, by default the stored test rows alone.
        n_bins: of the ECE.
        max_risk: that the action threshold promises: the share of wrong answers among those acted on.
        seed: of every draw.
    """
    if sets is None:
        sets = {arm: [scored(judged)] for arm, judged in panels[base].items()}
    everywhere = [(panel, arm, judged) for panel, arms in panels.items() for arm, judged in arms.items()]
    routed = [(panel, arm, judged) for panel, arm, judged in everywhere if judged.configuration is not None]
    online = [one for one in routed if {"temperature", "configuration"} <= fitted.get(one[1], {}).keys()]
    baselines, versus = beside(everywhere, validation, fitted, n_bins, seed)
    thresholds = {arm: chosen_threshold(rows, max_risk) for arm, rows in validation.items()}
    sections: dict[str, Any] = {
        "metric": {
            "name": "top-label ECE",
            "binning": "equal width",
            "n_bins": n_bins,
            "norm": "l1",
            "debiased": True,
        },
        "subgroups": [
            row for arm, judged in panels[base].items() for row in _subgroups(arm, judged, subsets, n_bins, seed)
        ],
        "shared_confidence": [_shared(panel, arm, judged) for panel, arm, judged in routed],
        "calibrators": [
            row
            for panel, arm, judged in everywhere
            if fitted.get(arm)
            for row in _calibrated(panel, arm, judged, fitted[arm], n_bins, seed)
        ],
        "action": [
            row
            for arm, members in sets.items()
            if arm in thresholds
            for row in promise_rows(arm, thresholds[arm], members)
        ],
        "guarantee": [guarantee_row(arm, chosen, validation[arm]) for arm, chosen in thresholds.items()],
        "risk_coverage": [
            curve
            for where in everywhere
            for curve in (_risk_coverage(*where), disagreement_curve(*where, CURVE_POINTS))
            if curve is not None
        ],
        "rce": [
            curve
            for panel, arm, judged in routed
            for curve in _reweighted(panel, arm, judged, fitted.get(arm, {}), seed)
        ],
        "online": [
            curve
            for panel, arm, judged in online
            for curve in [_online(panel, arm, judged, validation[arm], fitted[arm]["temperature"], seed)]
            if curve is not None
        ],
        "baselines": baselines,
        "versus": versus,
        "disagreement": [row for where in everywhere if (row := disagreement_row(*where)) is not None],
    }
    if missing := left_out(panels[base], validation, fitted, bool(subsets)):
        sections["left_out"] = missing
    return _finite(sections)


def _finite(value: Any) -> Any:
    """The same with None where there is no finite number: no threshold that keeps the promise, no configuration with enough rows."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _subgroups(
    arm: str, judged: Prediction, subsets: Mapping[str, Tensor], n_bins: int, seed: int
) -> list[dict[str, Any]]:
    """Every subgroup; the largest ECE is called the worst only if it is beyond noise, the choice among all of them allowed for."""
    rows: list[dict[str, Any]] = []
    masks = {**(judged.subsets or {}), **subsets}
    totals = {} if judged.whole is None else judged.whole.subsets
    answers = answers_of(judged)
    chosen: list[tuple[Answers, Tensor]] = []
    for name, mask in masks.items():
        if not bool(mask.any()):
            continue
        whole = totals.get(name)
        own = Answers(answers.confidence[mask], answers.correct[mask], None if whole is None else whole.moments)
        chosen.append((own, rows_of(judged)[mask]))
        rows.append(
            {
                "arm": arm,
                "group": name,
                "n": len(own.correct) if whole is None else whole.n,
                "accuracy": float(own.correct.mean() if whole is None else whole.scores[0] / whole.n),
                **ece_of(*chosen[-1], n_bins, seed),
                "worst": False,
            }
        )
    if rows:
        errors = torch.tensor([row["ece"] for row in rows], dtype=torch.float64)
        most = worst_group(errors, torch.tensor([row["n"] for row in rows])).index or 0
        rows[most]["worst"] = True
        rows[most]["within_noise"] = ece_of(*chosen[most], n_bins, seed, level=1 - 0.05 / len(rows))["interval"][0] <= 0
    return rows


def _shared(panel: str, arm: str, judged: Prediction) -> dict[str, Any]:
    found = shared_confidence(confidences_of(judged), _configurations(judged))
    return {"arm": arm, "panel": panel, "n": int(found.total), "shared": int(found.shared), "decimals": 2}


def _calibrated(
    panel: str, arm: str, judged: Prediction, fitted: Mapping[str, Calibrator], n_bins: int, seed: int
) -> Iterator[dict[str, Any]]:
    outputs, target, row = judged.outputs, judged.need("target"), rows_of(judged)
    for name, probs in [("none", outputs.probs), *((name, kind(outputs)) for name, kind in fitted.items())]:
        probs = normalised(probs)
        yield {
            "arm": arm,
            "panel": panel,
            "name": name,
            "accuracy": float((probs.argmax(dim=1) == target).double().mean()),
            **ece_of(Answers(*top_label(probs, target)), row, n_bins, seed),
            "nll": float(negative_log_likelihood(probs, target)),
        }


def scored(judged: Prediction) -> Scored:
    """The confidences and correctness by which the action threshold is judged on one evaluation set."""
    return Scored(judged.shift, judged.severity, *answers_of(judged)[:2])


def _risk_coverage(panel: str, arm: str, judged: Prediction) -> dict[str, Any]:
    coverage, risk = risk_coverage(*answers_of(judged)[:2])
    shown = torch.linspace(0, len(coverage) - 1, min(CURVE_POINTS, len(coverage))).round().long()
    return {"name": arm, "panel": panel, "x": coverage[shown].tolist(), "y": risk[shown].tolist()}


def _reweighted(
    panel: str, arm: str, judged: Prediction, fitted: Mapping[str, Calibrator], seed: int
) -> Iterator[dict[str, Any]]:
    outputs, target = judged.outputs, judged.need("target")
    configurations = _configurations(judged)
    for name in ("none", *(name for name in ("temperature", "configuration") if name in fitted)):
        probs = confidences_of(judged) if name == "none" else normalised(fitted[name](outputs))
        curve = rce_curve(probs, target, configurations, RHOS)
        yield {"name": f"{arm}, {name}", "panel": panel, "x": list(RHOS), "y": curve.value.tolist()}
    confidence, _ = top_label(confidences_of(judged), target)
    floor = _reweighted_floor(confidence, configurations, seed)
    yield {"name": f"{arm}, noise floor", "panel": panel, "x": list(RHOS), "y": floor}


def _reweighted_floor(confidence: Tensor, configurations: Configurations, seed: int) -> list[float]:
    """Mean RCE of a model that displays these confidences and is right as often as they say: what picking the worst picks of noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.bernoulli(confidence, generator=generator).long() for _ in range(FLOOR_DRAWS))
    curves = [rce_curve(confidence, correct, configurations, RHOS).value for correct in drawn]
    return torch.stack(curves).mean(dim=0).tolist()


def _online(
    panel: str, arm: str, judged: Prediction, validation: Prediction, static: Calibrator, seed: int
) -> dict[str, Any] | None:
    """Debiased ECE on rows of the data whose outcome never arrives, under no shift; None where there are too few."""
    outputs, target, row = judged.outputs, judged.need("target"), rows_of(judged)
    _, which = row.unique(return_inverse=True)
    count = int(which.max()) + 1
    steps = [delivered for delivered in DELIVERED if delivered + LEFT_TO_JUDGE <= count]
    if not steps:
        return None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    copies = torch.randperm(len(which), generator=generator)  # one copy of a row arrives, a random one
    copy = torch.empty(count, dtype=torch.int64).index_put_((which[copies],), copies)
    left = torch.isin(which, order[steps[-1] :]).nonzero().flatten()
    online = OnlineConfigurationCalibrator(static).fit(validation.outputs, validation.need("target"))
    errors, before = [], 0
    for delivered in steps:
        arrived, before = copy[order[before:delivered]], delivered
        if len(arrived):
            said = outputs.rows(arrived)
            online.observe(said, said.probs.argmax(dim=1) == target[arrived])
        errors.append(float(calibration_error(online(outputs.rows(left)), target[left], debias=True)))
    return {"name": arm, "panel": panel, "x": list(steps), "y": errors}


def _configurations(judged: Prediction) -> Configurations:
    return numbered_configurations(judged.need("configuration"))
