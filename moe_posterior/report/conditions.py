"""Operating conditions: on which evaluation sets, and for which groups there, the confidences hold within a tolerance.

A condition passes only where the interval of its error ends below the tolerance, and fails only where it begins above. In between the
rows are too few to say: wide intervals never pass. The intervals of one family hold for all its conditions together (Bonferroni), so
the risk of any wrong "pass" or "fail" in it is at most 5 %.

Dimensions: n rows of an evaluation set.
"""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from moe_posterior.checks.validation import number
from moe_posterior.metrics import wilson_interval
from moe_posterior.metrics.gaps import moments_of
from moe_posterior.metrics.inference import interval_of_sums
from moe_posterior.report.ece import joint_sums
from moe_posterior.report.evaluation import Evaluation, Part
from moe_posterior.report.schema import OVERALL, Condition, ConditionPlace, Key

__all__ = ["FAIL", "PASS", "TOLERANCE", "UNSURE", "condition_name", "conditions"]

# Half of the risk that the action threshold promises by default: the score's own error uses up no more than half of the promise.
TOLERANCE = 0.05
PASS, FAIL, UNSURE = "pass", "fail", "cannot say"
RISK = 0.05  # of any wrong verdict in a family
STORED, SHIFTED, GROUPS = "the stored test rows", "the shifted sets", "the groups on every set"


def conditions(
    evaluations: Mapping[Key, Evaluation],
    subsets: Mapping[str, Tensor],  # name -> (n,) bool, over the rows of every set
    *,
    tolerance: float = TOLERANCE,
    n_bins: int = 15,
    seed: int = 0,
) -> list[Condition]:
    """Every set, and every group on every set, of every arm, judged.

    Args:
        evaluations: by arm, shift and severity.
        subsets: masks of groups.
        tolerance: largest debiased ECE, and largest |mean confidence − accuracy|, that passes, in (0, 1].
        n_bins, seed: of the ECE's interval.

    Raises:
        InvalidArgumentError: a tolerance outside (0, 1].
    """
    number("tolerance", tolerance, above=0.0, most=1.0)
    found: list[Condition] = []
    parts = {
        (key, group): part
        for key, one in evaluations.items()
        for group, mask in {OVERALL: None, **dict.fromkeys(one.subsets), **subsets}.items()
        if (part := one.part(group, mask)).n
    }
    sizes = Counter((key[0], _family(key, group)) for key, group in parts)
    for (key, group), part in parts.items():
        arm, shift, severity = key
        family = _family(key, group)
        place: ConditionPlace = {
            "arm": arm,
            "shift": shift,
            "severity": severity or 0,
            "group": group,
            "family": family,
            "comparisons": sizes[arm, family],
        }
        found.append(_judged(place, part, tolerance, n_bins, seed))
    return found


def condition_name(one: Mapping[str, object]) -> str:
    """What a condition is called.

    >>> condition_name({"shift": "fog", "severity": 2, "group": "hard"}), condition_name({"shift": "clean", "severity": 0})
    ('hard on fog, severity 2', 'clean')
    """
    shift, severity = str(one["shift"]), one.get("severity")
    name = f"{shift}, severity {severity}" if severity else shift
    group = one.get("group") or OVERALL
    return name if group == OVERALL else f"{group} on {name}"


def _family(key: Key, group: str) -> str:
    return GROUPS if group != OVERALL else SHIFTED if key[2] else STORED


def _judged(place: ConditionPlace, part: Part, tolerance: float, n_bins: int, seed: int) -> Condition:
    """The two errors of one condition, with intervals at the family's level, and the verdict on them."""
    level = 1 - RISK / place["comparisons"]
    error = interval_of_sums(joint_sums([[part.answers]], n_bins), level=level, seed=seed)
    totals = part.answers.totals
    if totals is None:
        totals = moments_of(part.answers.confidence.double(), part.answers.correct.double(), n_bins)
    count, said, correct = totals[:3].sum(dim=1)
    confidence, accuracy = float(said / count), float(correct / count)
    low, high = wilson_interval(correct, count, level=level)
    gap = (confidence - float(high), confidence - float(low))
    return {
        **place,
        "n": part.n,
        "tolerance": tolerance,
        "level": level,
        "ece": error.value,
        "interval": [error.low, error.high],
        "gap": confidence - accuracy,
        "gap_interval": list(gap),
        "verdict": verdict((error.low, error.high), gap, tolerance),
    }


def verdict(error: tuple[float, float], gap: tuple[float, float], tolerance: float) -> str:
    """The verdict on an ECE's interval and that of the mean gap, which lies within the ECE.

    >>> verdict((0.0, 0.04), (-0.02, 0.03), 0.05), verdict((0.06, 0.09), (0.01, 0.09), 0.05), verdict((0.0, 0.2), (-0.1, 0.1), 0.05)
    ('pass', 'fail', 'cannot say')
    """
    if error[0] > tolerance or gap[0] > tolerance or gap[1] < -tolerance:
        return FAIL
    return PASS if error[1] <= tolerance and gap[0] >= -tolerance and gap[1] <= tolerance else UNSURE
