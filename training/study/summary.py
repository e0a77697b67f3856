"""The study in two tables over all data sets: hard rows method by method, and the paired differences that the text speaks of."""

from collections.abc import Mapping, Sequence

from moe_posterior.results.tables import Table
from moe_posterior.training.study.values import Records, Values, by_seed, difference, error_metric, name_of, shown

__all__ = ["summary_of"]

Arm = tuple[str, str, str]  # gate, method, calibrator
STOPPED = "expert temperature, stopped"
OWN_ROBUST = "robust configuration + robust"
ROWS: Mapping[str, Arm] = {
    "single": ("softmax", "single", "none"),
    "deep ensemble, same cost": ("average", "ensemble", "none"),
    "vanilla": ("softmax", "vanilla", "none"),
    "MoCaE": ("softmax", "vanilla", "expert temperature"),
    "MoCaE, stopped": ("softmax", "vanilla", STOPPED),
    "FGR": ("softmax", "fgr", "none"),
    "Robust": ("softmax", "robust", "none"),
    "Robust, detached": ("softmax", "robust, detached", "none"),
    "Robust Filtered": ("softmax", "robust filtered", "none"),
    "Robust Filtered, detached": ("softmax", "robust filtered, detached", "none"),
    "FGR + Robust": ("softmax", "fgr + robust", "none"),
    "vanilla, own loss .03": ("softmax", "vanilla, own loss .03", "none"),
    OWN_ROBUST: ("softmax", OWN_ROBUST, "none"),
    "vanilla, posterior gate": ("posterior", "vanilla", "none"),
    "Robust Filtered, posterior gate": ("posterior", "robust filtered", "none"),
    f"{OWN_ROBUST}, posterior gate": ("posterior", OWN_ROBUST, "none"),
    "the same, expert temperature stopped": ("posterior", OWN_ROBUST, STOPPED),
    "vanilla, learned prior": ("learned", "vanilla", "none"),
    "Robust Filtered, learned prior": ("learned", "robust filtered", "none"),
    f"{OWN_ROBUST}, learned prior": ("learned", OWN_ROBUST, "none"),
}
PAIRS = (
    ("vanilla, learned prior", "vanilla"),
    ("vanilla, learned prior", "vanilla, own loss .03"),
    ("vanilla, learned prior", "vanilla, posterior gate"),
    ("vanilla, posterior gate", "vanilla"),
    ("Robust Filtered, learned prior", "Robust Filtered"),
    ("Robust Filtered, posterior gate", "Robust Filtered"),
    (f"{OWN_ROBUST}, learned prior", OWN_ROBUST),
    (f"{OWN_ROBUST}, posterior gate", OWN_ROBUST),
    ("MoCaE", "vanilla"),
    ("MoCaE, stopped", "vanilla"),
    ("Robust", "vanilla"),
    ("Robust", "MoCaE"),
    ("Robust", "Robust, detached"),
    ("Robust Filtered", "vanilla"),
    ("vanilla, own loss .03", "vanilla"),
    ("deep ensemble, same cost", "single"),
)


def summary_of(studies: Sequence[Records]) -> list[Table]:
    """Accuracy and calibration error on hard rows of every method, then paired differences; a pair of columns a data set.

    Args:
        studies: the records of one data set each; none may be empty.
    """
    columns = [f"{name_of(records[0]['study'])} {what}" for records in studies for what in ("acc.", "ECE")]
    seeds = "; ".join(
        f"{name_of(records[0]['study'])}: {_named({record['seed'] for record in records})}" for records in studies
    )
    methods = [[label, *(shown(value) for value in _values(studies, label))] for label in ROWS]
    differences = [
        [
            f"{one} − {other}",
            *(difference(*two) for two in zip(_values(studies, one), _values(studies, other), strict=True)),
        ]
        for one, other in PAIRS
    ]
    note = (
        f"ECE is debiased. Mean ± half of the 95 % t interval over seeds of the mean over settings. Seeds: {seeds}. No calibrator but "
        "those named; stopped: after 50 L-BFGS steps."
    )
    paired = "Paired over the seeds that both have. The intervals allow neither for their number nor for the draw of the test rows."
    return [
        Table(["", *columns], methods, note, "Hard rows", right=True),
        Table(["", *columns], differences, paired, "Differences on hard rows", right=True),
    ]


def _values(studies: Sequence[Records], label: str) -> list[Values]:
    gate, method, calibrator = ROWS[label]
    arm = {"gate": gate, "method": method, "calibrator": calibrator, "subset": "hard"}
    return [
        by_seed(records, **arm, metric=metric) for records in studies for metric in ("accuracy", error_metric(records))
    ]


def _named(seeds: set[int]) -> str:
    return " ".join(map(str, sorted(seeds)))
