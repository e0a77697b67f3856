"""Two sets of probabilities for the same rows, compared: calibration error, Brier score and NLL, with paired intervals.

Dimensions: N predictions, K classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_posterior.metrics import brier_score, calibration_difference, holm, negative_log_likelihood
from moe_posterior.report.copies import mean_of_copies
from moe_posterior.report.ece import finite
from moe_posterior.report.marks import RISK
from moe_posterior.report.schema import Difference, Versus

__all__ = ["COMPARED", "beats", "compared", "corrected"]

COMPARED = ("ece", "brier", "nll")  # of each less is better


def compared(
    first: Tensor,  # (N, K), or (N,) confidences
    second: Tensor,  # the same
    target: Tensor,  # (N,) classes, or the correctness of confident answers
    rows: Tensor,  # (N,) int64, equal for copies of one data row
    n_bins: int,
    seed: int,
) -> dict[str, Difference]:
    """First less second, by metric of :data:`COMPARED`."""
    copies = rows if len(rows.unique()) < len(rows) else None
    apart = calibration_difference((first, target), (second, target), n_bins=n_bins, rows=copies, seed=seed)
    names = ("value", "low", "high", "p_value")
    found: dict[str, Any] = {"ece": {name: finite(part) for name, part in zip(names, apart, strict=True)}}
    for metric, score in (("brier", brier_score), ("nll", negative_log_likelihood)):
        difference = score(first, target, "none") - score(second, target, "none")
        found[metric] = mean_of_copies(difference.double(), rows)
    return found


def corrected(rows: list[Versus]) -> list[Versus]:
    """The same with ``p_holm``: Holm's correction within each arm, panel and opponent."""
    families: dict[tuple, list[Versus]] = {}
    for row in rows:
        families.setdefault((row["arm"], row["panel"], row["against"]), []).append(row)
    found: list[Versus] = []
    for family in families.values():
        known = [torch.nan if row["p_value"] is None else row["p_value"] for row in family]
        for row, p in zip(family, holm(torch.tensor(known, dtype=torch.float64)).tolist(), strict=True):
            found.append({**row, "p_holm": finite(p), "comparisons": len(family)})
    return found


def beats(row: Mapping[str, Any]) -> bool | None:
    """Whether the first of a comparison is credibly better (True) or worse (False); None where the rows do not say.

    Credible: the paired interval excludes 0, and so does Holm's correction for the comparisons of its family.

    >>> beats({"low": -0.03, "high": -0.01, "p_holm": 0.001}), beats({"low": 0.01, "high": 0.03}), beats({"low": -1.0, "high": 1.0})
    (True, False, None)
    """
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or low <= 0 <= high or (row.get("p_holm") or 0.0) > RISK:
        return None
    return high < 0
