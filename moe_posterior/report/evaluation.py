"""An arm's predictions on one evaluation set, checked and reduced to what the report needs.

Dimensions: n rows, B bins, k experts per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import BinSums, bin_sums, brier_score, negative_log_likelihood, top_label
from moe_posterior.metrics.calibration import validate_predictions
from moe_posterior.prediction import Prediction
from moe_posterior.report.ece import Answers
from moe_posterior.report.places import ALL_SHIFTS, CLEAN
from moe_posterior.report.schema import OVERALL, Key

__all__ = ["Evaluation", "reduced", "validate_arms", "validate_prediction"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions reduced to what the report needs, so that the probabilities can be freed."""

    target: Tensor  # (n,)
    answers: Answers  # (n,) each
    scores: Tensor  # (n, 3) float64: correct, nll, brier
    sums: BinSums  # (1, B)
    configurations: dict[tuple[int | None, tuple[int, ...]], BinSums]  # (cluster, experts) -> (1, B)


def reduced(item: Prediction, n_bins: int) -> Evaluation:
    probs, target = item.probs.cpu(), item.need("target").cpu().long()
    confidence, correct = top_label(probs, target)
    scores = [correct, negative_log_likelihood(probs, target, "none"), brier_score(probs, target, "none")]
    return Evaluation(
        target=target,
        answers=Answers(confidence, correct),
        scores=torch.stack(scores, dim=1),
        sums=bin_sums(confidence, correct, torch.zeros_like(target), 1, n_bins),
        configurations=_configuration_sums(item, confidence, correct, n_bins),
    )


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


def validate_prediction(item: Prediction, subsets: Mapping[str, Tensor], seen: bool) -> None:
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


def validate_arms(evaluations: Mapping[Key, Evaluation], baseline: str) -> list[str]:
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
