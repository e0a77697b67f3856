"""Trivial baselines beside the model: whatever a constant, one expert or a temperature reaches, the model must beat.

All are chosen on validation rows and judged on the same rows as the model.

Dimensions: N predictions, V validation rows, E experts, K classes. Probabilities are (N, K), or (N,) where only confidences are known.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_posterior.calibrators import Calibrator
from moe_posterior.calibrators.probabilities import FLOOR, with_confidence
from moe_posterior.metrics import negative_log_likelihood
from moe_posterior.prediction import Prediction, normalised
from moe_posterior.report.ece import ece_of
from moe_posterior.report.evaluation import answers_of, confidences_of, rows_of, scored_rows
from moe_posterior.report.schema import Baseline, Versus
from moe_posterior.report.versus import compared, corrected

__all__ = ["CONSTANT", "MODEL", "TEMPERATURE", "beside", "fixed_mix", "trivial"]

MODEL = "the model"
CONSTANT = "constant confidence"
SINGLE = "best single expert"
TEMPERATURE = "temperature"
UNIFORM = "uniform mix of experts"
STATIC = "best fixed mix of experts"
STEPS = 500  # of EM for the fixed mix: its likelihood is concave, and the rest of the way is less than any interval

Detailed = tuple[str, Tensor]  # what was chosen, (N, K) float64


def trivial(judged: Prediction, validation: Prediction, fitted: Mapping[str, Calibrator]) -> dict[str, Detailed]:
    """The baselines' probabilities for the judged rows; those of experts only where ``expert_probs`` is known.

    >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> one = Prediction(probs, target=torch.tensor([0, 0]))
    >>> {name: (detail, found.tolist()) for name, (detail, found) in trivial(one, one, {}).items()}
    {'constant confidence': ('0.500', [[0.5, 0.5], [0.5, 0.5]])}
    """
    share = float(answers_of(validation).correct.double().mean())
    probs = confidences_of(judged)
    constant = torch.full((len(probs),), share, dtype=torch.float64)
    if judged.classes:
        constant = normalised(with_confidence(probs, constant))
    target = validation.need("target")
    found: dict[str, Detailed] = {CONSTANT: (f"{share:.3f}", constant)}
    if TEMPERATURE in fitted:
        found[TEMPERATURE] = ("", normalised(fitted[TEMPERATURE](judged.outputs)))
    if judged.expert_probs is None or validation.expert_probs is None:
        return found
    experts, learned = judged.expert_probs.double(), validation.expert_probs.double()
    losses = [float(negative_log_likelihood(normalised(learned[:, e]), target)) for e in range(learned.shape[1])]
    best = min(range(len(losses)), key=losses.__getitem__)
    weights = fixed_mix(learned, target)
    mixed = torch.einsum("nek,e->nk", experts, weights)
    return {
        **found,
        SINGLE: (f"expert {best}", normalised(experts[:, best])),
        UNIFORM: ("", normalised(experts.mean(dim=1))),
        STATIC: (", ".join(f"{weight:.2f}" for weight in weights.tolist()), normalised(mixed)),
    }


def fixed_mix(expert_probs: Tensor, target: Tensor) -> Tensor:  # (V, E, K) float64, (V,) -> (E,)
    """The weights, the same for every row, of the mix of experts that is likeliest on these rows.

    Source: the EM of mixture proportions, Dempster, Laird & Rubin 1977.

    >>> probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]] * 4).double()
    >>> fixed_mix(probs, torch.tensor([0, 0, 0, 1])).round(decimals=2)  # three in four: between .9 and .5
    tensor([0.6200, 0.3800], dtype=torch.float64)
    """
    likelihood = expert_probs[torch.arange(len(target)), :, target].clamp(min=FLOOR)  # (V, E)
    weights = torch.full((likelihood.shape[1],), 1 / likelihood.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        share = likelihood * weights
        weights = (share / share.sum(dim=1, keepdim=True)).mean(dim=0)
    return weights


def beside(
    everywhere: Iterable[tuple[str, str, Prediction]],  # panel, arm, predictions
    validation: Mapping[str, Prediction],  # by arm
    fitted: Mapping[str, Mapping[str, Calibrator]],  # by arm, then name
    n_bins: int,
    seed: int,
) -> tuple[list[Baseline], list[Versus]]:
    """The model and its baselines on every panel; and, with paired intervals, each baseline less the model and each fitted
    calibrator less temperature scaling."""
    rows: list[Baseline] = []
    versus: list[Versus] = []
    for panel, arm, judged in everywhere:
        if arm not in validation:
            continue
        own = fitted.get(arm) or {}
        found, model = trivial(judged, validation[arm], own), confidences_of(judged)
        rows += (
            _row(panel, arm, name, detail, probs, judged, n_bins, seed)
            for name, (detail, probs) in {MODEL: ("", model), **found}.items()
        )
        others = {name: probs for name, (_, probs) in found.items()}
        versus += _versus(panel, arm, judged, others, MODEL, model, n_bins, seed)
        if TEMPERATURE in others:
            fancier = {name: normalised(kind(judged.outputs)) for name, kind in own.items() if name != TEMPERATURE}
            versus += _versus(panel, arm, judged, fancier, TEMPERATURE, others[TEMPERATURE], n_bins, seed)
    return rows, corrected(versus)


def _row(
    panel: str, arm: str, name: str, detail: str, probs: Tensor, judged: Prediction, n_bins: int, seed: int
) -> Baseline:
    target = judged.need("target")
    answers, scores = scored_rows(probs, target)
    accuracy, nll, brier = scores.mean(dim=0).tolist()
    ece: Any = ece_of(answers, rows_of(judged), n_bins, seed)
    return {
        "arm": arm,
        "panel": panel,
        "name": name,
        "detail": detail,
        "n": len(target),
        "accuracy": accuracy,
        **ece,
        "brier": brier,
        "nll": nll,
    }


def _versus(
    panel: str,
    arm: str,
    judged: Prediction,
    others: Mapping[str, Tensor],  # name -> (N, K)
    against: str,
    opponent: Tensor,  # (N, K)
    n_bins: int,
    seed: int,
) -> Iterator[Versus]:
    """Each of the others less the opponent, metric by metric."""
    for name, probs in others.items():
        found = compared(probs, opponent, judged.need("target"), rows_of(judged), n_bins, seed)
        for metric, apart in found.items():
            yield {"arm": arm, "panel": panel, "name": name, "against": against, "metric": metric, **apart}
