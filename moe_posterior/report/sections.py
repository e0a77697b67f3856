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
    action_threshold,
    calibration_error,
    calibration_interval,
    negative_log_likelihood,
    rce_curve,
    risk_coverage,
    shared_confidence,
    top_label,
    worst_group,
)
from moe_posterior.prediction import Prediction, normalised, numbered_configurations
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
    """Every calibrator of :data:`CALIBRATORS`, fitted on validation rows."""
    return {name: kind().fit(validation.outputs, validation.need("target")) for name, kind in CALIBRATORS.items()}


def further_sections(
    fitted: Mapping[str, Mapping[str, Calibrator]],  # by arm, then name
    validation: Mapping[str, Prediction],  # by arm
    panels: Mapping[str, Mapping[str, Prediction]],  # by panel, then arm
    subsets: Mapping[str, Tensor],  # name -> (n,) bool, over the rows of the panel ``base``
    *,
    base: str = "clean",
    sets: Mapping[str, Sequence[Scored]] | None = None,  # by arm: every evaluation set
    n_bins: int = 15,
    seed: int = 0,
) -> Sections:
    """The optional keys of a report (see :mod:`~moe_posterior.report.schema`) that need outputs and validation rows.

    ``base`` names the panel of the stored test rows; ``sets`` are what the action threshold is judged on, by default that panel alone.
    """
    if sets is None:
        sets = {arm: [scored(judged)] for arm, judged in panels[base].items()}
    everywhere = [(panel, arm, judged) for panel, arms in panels.items() for arm, judged in arms.items()]
    sections = {
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
        "shared_confidence": [_shared(panel, arm, judged) for panel, arm, judged in everywhere],
        "calibrators": [
            row
            for panel, arm, judged in everywhere
            for row in _calibrated(panel, arm, judged, fitted[arm], n_bins, seed)
        ],
        "action": [row for arm, members in sets.items() for row in _action(arm, validation[arm], members)],
        "risk_coverage": [_risk_coverage(panel, arm, judged) for panel, arm, judged in everywhere],
        "rce": [
            curve for panel, arm, judged in everywhere for curve in _reweighted(panel, arm, judged, fitted[arm], seed)
        ],
        "online": [
            curve
            for panel, arm, judged in everywhere
            for curve in [_online(panel, arm, judged, validation[arm], fitted[arm]["temperature"], seed)]
            if curve is not None
        ],
    }
    return _finite(sections)


def _finite(value: Any) -> Any:
    """The same with None where there is no finite number: no threshold that keeps the promise, no configuration with enough rows."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ece(probs: Tensor, target: Tensor, row: Tensor, n_bins: int, seed: int, level: float = 0.95) -> dict[str, Any]:
    """The debiased ECE with its interval and noise floor; a row brings all its copies under other shifts along."""
    copies = row if len(row.unique()) < len(row) else None
    found = calibration_interval(probs, target, n_bins=n_bins, rows=copies, seed=seed, level=level)
    return {
        "ece": found.value,
        "interval": [found.low, found.high],
        "plain": found.plain,
        "floor": found.floor,
    }


def _subgroups(
    arm: str, judged: Prediction, subsets: Mapping[str, Tensor], n_bins: int, seed: int
) -> list[dict[str, Any]]:
    """Every subgroup; the largest ECE is called the worst only if it is beyond noise, the choice among all of them allowed for."""
    rows: list[dict[str, Any]] = []
    chosen = [name for name, mask in subsets.items() if bool(mask.any())]
    for name in chosen:
        mask = subsets[name]
        probs, target, row = normalised(judged.probs[mask]), judged.need("target")[mask], judged.need("row")[mask]
        rows.append(
            {
                "arm": arm,
                "group": name,
                "n": len(target),
                "accuracy": float((probs.argmax(dim=1) == target).double().mean()),
                **_ece(probs, target, row, n_bins, seed),
                "worst": False,
            }
        )
    if rows:
        errors = torch.tensor([row["ece"] for row in rows], dtype=torch.float64)
        most = worst_group(errors, torch.tensor([row["n"] for row in rows])).index or 0
        mask = subsets[chosen[most]]
        parts = normalised(judged.probs[mask]), judged.need("target")[mask], judged.need("row")[mask]
        rows[most]["worst"] = True
        rows[most]["within_noise"] = _ece(*parts, n_bins, seed, level=1 - 0.05 / len(rows))["interval"][0] <= 0
    return rows


def _shared(panel: str, arm: str, judged: Prediction) -> dict[str, Any]:
    found = shared_confidence(normalised(judged.probs), _configurations(judged))
    return {"arm": arm, "panel": panel, "n": int(found.total), "shared": int(found.shared), "decimals": 2}


def _calibrated(
    panel: str, arm: str, judged: Prediction, fitted: Mapping[str, Calibrator], n_bins: int, seed: int
) -> Iterator[dict[str, Any]]:
    outputs, target, row = judged.outputs, judged.need("target"), judged.need("row")
    for name, probs in [("none", outputs.probs), *((name, kind(outputs)) for name, kind in fitted.items())]:
        probs = normalised(probs)
        yield {
            "arm": arm,
            "panel": panel,
            "name": name,
            "accuracy": float((probs.argmax(dim=1) == target).double().mean()),
            **_ece(probs, target, row, n_bins, seed),
            "nll": float(negative_log_likelihood(probs, target)),
        }


def _action(arm: str, validation: Prediction, sets: Sequence[Scored]) -> list[dict[str, Any]]:
    chosen = action_threshold(*top_label(normalised(validation.probs), validation.need("target")), MAX_RISK)
    return promise_rows(arm, chosen, MAX_RISK, sets)


def scored(judged: Prediction) -> Scored:
    """The confidences and correctness by which the action threshold is judged on one evaluation set."""
    answers = top_label(normalised(judged.probs), judged.need("target"))
    return Scored(judged.shift, judged.severity, *answers)


def _risk_coverage(panel: str, arm: str, judged: Prediction) -> dict[str, Any]:
    coverage, risk = risk_coverage(*top_label(normalised(judged.probs), judged.need("target")))
    shown = torch.linspace(0, len(coverage) - 1, min(CURVE_POINTS, len(coverage))).round().long()
    return {"name": arm, "panel": panel, "x": coverage[shown].tolist(), "y": risk[shown].tolist()}


def _reweighted(
    panel: str, arm: str, judged: Prediction, fitted: Mapping[str, Calibrator], seed: int
) -> Iterator[dict[str, Any]]:
    outputs, target = judged.outputs, judged.need("target")
    configurations = _configurations(judged)
    for name in ("none", "temperature", "configuration"):
        probs = normalised(outputs.probs if name == "none" else fitted[name](outputs))
        curve = rce_curve(probs, target, configurations, RHOS)
        yield {"name": f"{arm}, {name}", "panel": panel, "x": list(RHOS), "y": curve.value.tolist()}
    confidence, _ = top_label(normalised(outputs.probs), target)
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
    outputs, target, row = judged.outputs, judged.need("target"), judged.need("row")
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
