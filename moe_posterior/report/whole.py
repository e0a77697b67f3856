"""The whole report from an experiment's predictions: the core, and the sections that need validation rows; a pure function."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from moe_posterior.calibrators import Calibrator
from moe_posterior.prediction import Prediction, joined
from moe_posterior.report.compute import evaluate_predictions, is_everything
from moe_posterior.report.conditions import TOLERANCE
from moe_posterior.report.panels import panels_of
from moe_posterior.report.promise import Scored
from moe_posterior.report.schema import OVERALL, Report
from moe_posterior.report.sections import MAX_RISK, further_sections, scored
from moe_posterior.report.verdict import verdict_of

__all__ = ["SEVERE", "report_of"]

SEVERE = 3  # severities from here on are pooled for curves and calibrators


def report_of(
    predictions: Iterable[Prediction],
    validation: Mapping[str, Prediction],  # by arm
    fitted: Mapping[str, Mapping[str, Calibrator]],  # by arm, then name
    subsets: Mapping[str, Tensor],  # name -> (n,) bool, over the stored test rows
    sets: Sequence[tuple[str, int]],
    *,
    baseline: str | None = None,
    max_risk: float = MAX_RISK,
    n_bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Report:
    """The report of several arms, without its provenance and identity.

    Args:
        predictions: as for :func:`~moe_posterior.report.evaluate_predictions`, read once; only those of the stored test rows
            and of severe shifts are held in memory together.
        validation: predictions on validation rows, on which the action threshold is chosen, of the arms that have some.
        fitted: calibrators, fitted on the same rows.
        subsets: as for ``evaluate_predictions``; "overall" may be among them.
        sets: (shift, severity) of every evaluation set that ``predictions`` will cover, the stored test rows first.
        baseline: the arm that the others are compared with; by default "softmax", or else the first.
        max_risk: share of wrong answers that the action threshold promises not to exceed.
        n_bins: equal-width bins of the ECE.
        resamples, seed: of the bootstrap.
        tolerance: as for ``evaluate_predictions``.

    Raises:
        InvalidArgumentError: predictions, masks or names that do not fit together.
    """
    masks = {name: mask for name, mask in subsets.items() if name != OVERALL}
    panel_of = panels_of(sets, SEVERE)
    judged: dict[str, dict[str, list[Prediction]]] = {}  # panel -> arm -> evaluation sets
    acted: dict[str, list[Scored]] = {}

    def noted() -> Iterator[Prediction]:
        for prediction in predictions:
            acted.setdefault(prediction.arm, []).append(scored(prediction))
            if panel := panel_of.get((prediction.shift, prediction.severity)):
                judged.setdefault(panel, {}).setdefault(prediction.arm, []).append(prediction)
            yield prediction

    if baseline is None:
        baseline = "softmax" if "softmax" in validation else next(iter(validation))
    core = evaluate_predictions(
        noted(),
        masks,
        n_bins=n_bins,
        resamples=resamples,
        seed=seed,
        baseline=baseline,
        shifted_from=SEVERE,
        tolerance=tolerance,
    )
    sections = further_sections(
        fitted,
        validation,
        {panel: {arm: joined(parts) for arm, parts in arms.items()} for panel, arms in judged.items()},
        {name: mask for name, mask in masks.items() if not is_everything(mask)},
        base=sets[0][0],
        sets=acted,
        n_bins=n_bins,
        max_risk=max_risk,
        seed=seed,
    )
    found: Report = {**core, **sections}
    return {**found, "verdict": verdict_of(found).to_dict()}
