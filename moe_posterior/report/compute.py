"""The calibration report: predictions of each arm on each evaluation set in, numbers with intervals out; a pure function.

Dimensions: n rows of an evaluation set, K classes.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from moe_posterior.metrics.calibration import validate_arguments
from moe_posterior.prediction import Prediction
from moe_posterior.report import panels
from moe_posterior.report.conditions import TOLERANCE, conditions
from moe_posterior.report.ece import correct_for_many
from moe_posterior.report.evaluation import Evaluation, reduced, validate_arms, validate_prediction
from moe_posterior.report.marks import is_main
from moe_posterior.report.records import records_of
from moe_posterior.report.schema import OVERALL, SCHEMA, Core, Key, Pair, Record

__all__ = ["evaluate_predictions", "is_everything"]

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


def evaluate_predictions(
    predictions: Iterable[Prediction],
    subsets: Mapping[str, Tensor],  # name -> (n,) bool
    *,
    n_bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
    baseline: str = "softmax",
    shifted_from: int = 3,
    tolerance: float = TOLERANCE,
) -> Core:
    """Accuracy, NLL, Brier score and debiased ECE of every arm, shift, severity and subset, with intervals and paired comparisons.

    Args:
        predictions: one per (arm, shift, severity), read once, in any order; every arm covers the same evaluation sets.
            Severity 0 are the stored test rows, under one name: "clean", or the shift that they are under as they stand.
        subsets: bool masks over the rows, for instance hard and easy ones; "overall" is always added, and a mask of all rows is
            left out, being the same. With subsets, every evaluation set has the masks' number of rows, in the same order. Predictions
            may have subsets of their own too.
        n_bins: equal-width bins of the top-label ECE; 15 is the paper's.
        resamples: bootstrap resamples; 1,000 settle the second digit of a 95 % interval.
        seed: of the resamples.
        baseline: the arm that the others are compared with, where there are several.
        shifted_from: severities pooled in the reliability curves of shifted sets; if no set reaches it, all shifted sets.
        tolerance: largest calibration error inside which a condition passes, in (0, 1]; by default half of the risk that the action
            threshold promises.

    Returns:
        The core of a report, strict JSON (NaN became None): see :class:`~moe_posterior.report.schema.Core`.

    Raises:
        InvalidArgumentError: predictions, masks or names that do not fit together.

    >>> import torch
    >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> report = evaluate_predictions([Prediction(probs, target=torch.tensor([0, 1]))], {}, resamples=9)
    >>> [(r["metric"], round(r["value"], 3)) for r in report["records"]]
    [('accuracy', 1.0), ('nll', 0.308), ('brier', 0.17), ('ece', 0.25)]
    """
    validate_arguments(1, n_bins, "l1", 1)
    evaluations: dict[Key, Evaluation] = {}
    for item in predictions:
        key = (item.arm, item.shift, item.severity)
        validate_prediction(item, subsets, key in evaluations)
        evaluations[key] = reduced(item, n_bins)
    arms = validate_arms(evaluations, baseline)
    whole = [name for name, mask in subsets.items() if is_everything(mask)]
    subsets = {name: mask for name, mask in subsets.items() if name not in whole}
    against = baseline if len(arms) > 1 else None
    own = dict.fromkeys(name for one in evaluations.values() for name in one.subsets)
    records: list[Record] = []
    paired: list[Pair] = []
    for subset, mask in {OVERALL: None, **own, **subsets}.items():
        found, differences = records_of(evaluations, subset, mask, against, n_bins, resamples, seed)
        records += found
        paired += differences
    correct_for_many(paired, [is_main(pair) for pair in paired])
    members, pools = panels.panels(evaluations, shifted_from), panels.pools(evaluations, shifted_from)
    return {
        "schema": SCHEMA,
        "n_bins": n_bins,
        "resamples": resamples,
        "seed": seed,
        "arms": arms,
        "baseline": against,
        "subsets": {
            OVERALL: None,
            **{name: _size(evaluations, name) for name in own},
            **{name: int(mask.sum()) for name, mask in subsets.items()},
        },
        "shifted_from": shifted_from,
        "pools": pools,
        "records": records,
        "paired": paired,
        "reliability": [panels.curve(*name, sets, n_bins, seed) for name, sets in members.items()],
        "configurations": [row for name, sets in members.items() for row in panels.configurations(*name, sets)],
        "conditions": conditions(evaluations, subsets, tolerance=tolerance, n_bins=n_bins, seed=seed),
        "notes": [
            *NOTES,
            *(NOTES_ON_SHIFTS if pools else ()),
            *(f"Subset {name!r} holds every row and is not shown apart." for name in whole),
        ],
    }


def _size(evaluations: Mapping[Key, Evaluation], subset: str) -> int:
    """Rows of a subset that the sets define: those among the stored test rows, or in the first set that has any."""
    sizes = [one.part(subset, None).n for _, one in sorted(evaluations.items(), key=lambda item: bool(item[0][2]))]
    return next((size for size in sizes if size), 0)


def is_everything(mask: Tensor) -> bool:  # (n,) bool
    """Whether a subset holds every row, so that it says nothing that "overall" does not."""
    return bool(mask.all())
