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
from moe_posterior.prediction import ConfigurationName, Prediction, Whole, normalised
from moe_posterior.report.ece import Answers
from moe_posterior.report.places import ALL_SHIFTS, CLEAN
from moe_posterior.report.schema import OVERALL, Key

__all__ = [
    "Evaluation",
    "Part",
    "answers_of",
    "confidences_of",
    "reduced",
    "rows_of",
    "scored_rows",
    "validate_arms",
    "validate_prediction",
]


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one subset of an evaluation set."""

    answers: Answers  # (n,) each
    scores: Tensor  # (n, 3) float64: correct, nll, brier
    sums: Tensor | None  # (3,) of the scores of all rows, where these are a sample
    n: int  # all rows


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions reduced to what the report needs, so that the probabilities can be freed."""

    target: Tensor  # (n,)
    answers: Answers  # (n,) each
    scores: Tensor  # (n, 3) float64: correct, nll, brier
    sums: BinSums  # (1, B)
    configurations: Mapping[ConfigurationName, BinSums]  # (cluster, experts) -> (1, B)
    subsets: Mapping[str, Tensor]  # name -> (n,) bool, those of this set alone
    whole: Whole | None  # where the rows are a sample
    confidences: bool = False  # the target is the answers' correctness

    @property
    def n(self) -> int:
        """All rows, also where only a sample is held."""
        return len(self.target) if self.whole is None else self.whole.overall.n

    def part(self, subset: str, mask: Tensor | None) -> Part:  # (n,) bool
        """The rows of a subset: those of a mask, of this set's own subset of that name, or all of them."""
        mask = self.subsets.get(subset) if mask is None else mask.cpu()
        if mask is None and subset != OVERALL:
            mask = torch.zeros(len(self.target), dtype=torch.bool)
        rows = slice(None) if mask is None else mask
        confidence, correct = self.answers[:2]
        found, scores = Answers(confidence[rows], correct[rows]), self.scores[rows]
        if self.whole is None:
            return Part(found, scores, None, len(scores))
        totals = self.whole.overall if subset == OVERALL else self.whole.subsets.get(subset)
        if totals is None:
            return Part(found, scores, None, len(scores))
        return Part(found._replace(totals=totals.moments), scores, totals.scores, totals.n)


def scored_rows(probs: Tensor, target: Tensor) -> tuple[Answers, Tensor]:  # (n, K) or (n,), (n,) -> , (n, 3)
    """The answers, and each row's correctness, NLL and Brier score, in float64."""
    confidence, correct = top_label(probs, target)
    scores = [correct, negative_log_likelihood(probs, target, "none"), brier_score(probs, target, "none")]
    return Answers(confidence, correct), torch.stack(scores, dim=1)


def answers_of(judged: Prediction) -> Answers:
    """The confidence and correctness of every answer."""
    return Answers(*top_label(confidences_of(judged), judged.need("target")))


def rows_of(judged: Prediction) -> Tensor:  # (n,) int64
    """Which row of the data each prediction is about; all differ where nothing is known."""
    return torch.arange(len(judged.probs)) if judged.row is None else judged.row


def confidences_of(judged: Prediction) -> Tensor:  # (n, K) or (n,) float64
    """The probabilities of every class, each row's adding up to 1; or the confidences, where only those are known."""
    return normalised(judged.probs) if judged.classes else judged.probs.double()


def reduced(item: Prediction, n_bins: int) -> Evaluation:
    probs, target = item.probs.cpu(), item.need("target").cpu()
    target = target.long() if item.classes else target
    answers, scores = scored_rows(probs, target)
    confidence, correct, _ = answers
    if item.whole is None:
        sums = bin_sums(confidence, correct, torch.zeros(len(target), dtype=torch.int64), 1, n_bins)
        configurations = _configuration_sums(item, confidence, correct, n_bins)
    else:
        count, said, right = item.whole.overall.moments[:3, None]
        sums = BinSums(said, right, count)
        names = item.configuration_names or {}
        configurations = {names[index]: one for index, one in item.whole.configurations.items()}
    return Evaluation(target, answers, scores, sums, configurations, item.subsets or {}, item.whole, not item.classes)


def _configuration_sums(item: Prediction, confidence: Tensor, correct: Tensor, n_bins: int) -> dict:
    """Sums of each routing configuration: the cluster and the set of chosen experts, of whichever are known."""
    if item.configuration_names is not None:
        found, ids = item.need("configuration").cpu().unique(return_inverse=True)
        sums = bin_sums(confidence, correct, ids, len(found), n_bins)
        names = [item.configuration_names.get(index) for index in found.tolist()]
        return {
            name: BinSums(*(x[i : i + 1] for x in vars(sums).values()))
            for i, name in enumerate(names)
            if name is not None
        }
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
    if item.probs.ndim not in (1, 2) or not len(item.probs):
        raise InvalidArgumentError(
            f"{name}: probs must have shape (n ≥ 1, K), or (n ≥ 1,) if confidences; got {tuple(item.probs.shape)}"
        )
    target = item.need("target")
    validate_predictions(item.probs, target)
    for subset, mask in {**subsets, **(item.subsets or {})}.items():
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
        if len(present) < len(arms) or not all(_same_rows(one, present[0]) for one in present):
            raise InvalidArgumentError(
                f"predictions must cover {shift!r}, severity {severity}, with the same target in every arm of {arms}"
            )
    return sorted(arms, key=lambda arm: arm != baseline)


def _same_rows(one: Evaluation, other: Evaluation) -> bool:
    """Whether two arms can have predicted the same rows: of answers alone, whose targets differ by arm, only the number tells."""
    if one.n != other.n or len(one.target) != len(other.target):
        return False
    return one.confidences or other.confidences or one.target.equal(other.target)
