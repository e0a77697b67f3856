"""The calibration report: strict JSON (None where there is no value), as :mod:`~moe_posterior.report.compute` fills it and
every rendering reads it.

Intervals are ``[low, high]``. A report read back from JSON may lack any of the further sections; the page and the model card then say
"not measured in this run". In those a single row may stand without its list.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from moe_posterior.report.rows import (
    Abstention,
    Action,
    ArmVerdictRecord,
    Baseline,
    Calibrator,
    Condition,
    ConditionPlace,
    Configuration,
    ConfigurationPlace,
    Curve,
    Disagreement,
    Guarantee,
    Interval,
    Number,
    SharedConfidence,
    Subgroup,
    VerdictRecord,
    Versus,
)

__all__ = [
    "METRICS",
    "OVERALL",
    "READABLE",
    "SCHEMA",
    "TITLES",
    "About",
    "Abstention",
    "Action",
    "ArmVerdictRecord",
    "AuditEvidence",
    "Baseline",
    "Calibrator",
    "Condition",
    "ConditionPlace",
    "Configuration",
    "ConfigurationPlace",
    "Core",
    "Curve",
    "Difference",
    "Disagreement",
    "EceEstimate",
    "Estimate",
    "Guarantee",
    "Identity",
    "Interval",
    "Key",
    "LeftOut",
    "MetricSettings",
    "Number",
    "Operation",
    "Pair",
    "Place",
    "Pool",
    "Record",
    "ReliabilityCurve",
    "Report",
    "Sections",
    "SharedConfidence",
    "Shift",
    "Subgroup",
    "VerdictRecord",
    "Versus",
]

SCHEMA = "moe-posterior/calibration-report/3"
READABLE = ("moe-posterior/calibration-report/2", SCHEMA)  # files that every rendering still reads
METRICS = ("accuracy", "nll", "brier", "ece")
TITLES = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "brier": "Brier ↓", "ece": "ECE ↓"}
OVERALL = "overall"  # the subset of all rows

Key = tuple[str, str, int | None]  # arm, shift, severity; None: the mean over severities


class Place(TypedDict):
    """What a record is of."""

    arm: str
    shift: str  # "clean", a shift, or "all shifts" for the mean over them
    severity: int | None  # 0: the stored test rows; None: the mean over severities
    n: int  # predictions


class Estimate(TypedDict):
    """A value with its 95 % interval."""

    value: Number
    low: Number
    high: Number


class EceEstimate(Estimate):
    """A debiased calibration error, and what surrounds it."""

    floor: Number  # the plain ECE that noise alone would show
    plain: Number


class Difference(Estimate):
    """A value less the baseline's on the same rows."""

    p_value: Number  # two-sided, of no difference


class Record(Place, Estimate):
    """One metric of one arm at one place, on one subset."""

    metric: str  # one of METRICS
    floor: NotRequired[Number]  # of an ECE alone, as in EceEstimate
    plain: NotRequired[Number]
    subset: str


class Pair(Place, Difference):
    """The same of arm − baseline."""

    baseline: str
    metric: str
    subset: str
    p_holm: NotRequired[Number]  # Holm's correction within its family
    comparisons: NotRequired[int]  # size of that family


class ReliabilityCurve(TypedDict):
    """Confidence against accuracy, bin by bin, of one arm on one panel."""

    arm: str
    panel: str  # the stored test rows' name ("clean"), or that of a pool of shifted sets
    sets: int
    n: int
    accuracy: Number
    confidence: Number
    ece: Number  # plain
    debiased: Number
    interval: Interval  # of the debiased ECE
    floor: Number
    bins: Mapping[str, Sequence[Number]]  # lower, upper, confidence, accuracy, low, high, count


class Identity(TypedDict, total=False):
    """What was evaluated; what is missing here is read from the report's provenance."""

    routing: Mapping[str, str]  # arm -> "soft, top-2 of 4 experts, posterior gate"
    model: str  # name and version
    data: Mapping[str, str]  # "training", "validation", "evaluation" -> name and version
    seed: int
    versions: Mapping[str, str]  # package -> version
    date: str
    command: str
    machine: str


class Shift(TypedDict, total=False):
    """A scenario that the model was evaluated under."""

    name: str
    severities: Sequence[int]
    n: int | None
    description: str


class Pool(TypedDict, total=False):
    """What the name of an evaluation stands for that holds several sets."""

    name: str
    holds: str  # "the mean of each set's own value", "one value of all predictions together"
    shifts: Sequence[str]
    severities: Sequence[int]
    sets: int
    n: int  # predictions of one arm


class MetricSettings(TypedDict, total=False):
    """How calibration was measured."""

    name: str  # "top-label ECE"
    binning: str  # "equal width", "equal mass"
    n_bins: int
    norm: str  # "l1", "l2", "max"
    debiased: bool


class AuditEvidence(TypedDict, total=False):
    """The log of routing decisions that the user named for incident review."""

    path: str
    verified: bool | None  # None: not checked
    head: str  # last hash of the chain
    decisions: int
    problem: str  # the first that was found


class About(TypedDict, total=False):
    """What only the user can know of a deployment."""

    model: str
    version: str
    training_data: str
    evaluation_data: str
    routing: str
    intended_use: str
    contact: str
    task: str  # as the Hugging Face hub names it, for instance "image-classification"


class Operation(TypedDict, total=False):
    """What the governance standard asks of the deployment and no evaluation can measure."""

    routing_log: str
    abstention: str
    conditions: Sequence[str]  # operating conditions inside which the confidences hold


class Core(TypedDict):
    """What :func:`~moe_posterior.report.evaluate_predictions` computes from predictions alone."""

    schema: str
    n_bins: int
    resamples: int
    seed: int
    arms: Sequence[str]  # the baseline first
    baseline: str | None  # None with a single arm
    subsets: Mapping[str, int | None]  # name -> rows; None: all
    shifted_from: int
    pools: Sequence[Pool]
    records: Sequence[Record]
    paired: Sequence[Pair]
    reliability: Sequence[ReliabilityCurve]
    configurations: Sequence[Configuration]
    conditions: NotRequired[Sequence[Condition]]
    notes: Sequence[str]


class LeftOut(TypedDict, total=False):
    """A part of the report that could not be measured, and what was missing for it."""

    arm: str  # where other arms have it
    section: str
    reason: str


class Sections(TypedDict, total=False):
    """What :func:`~moe_posterior.report.further_sections` adds, with calibrators and validation rows."""

    metric: MetricSettings
    subgroups: Sequence[Subgroup]
    shared_confidence: Sequence[SharedConfidence]
    calibrators: Sequence[Calibrator]
    action: Sequence[Action]
    guarantee: Sequence[Guarantee]
    risk_coverage: Sequence[Curve]
    rce: Sequence[Curve]
    online: Sequence[Curve]
    left_out: Sequence[LeftOut]  # absent where nothing is
    baselines: Sequence[Baseline]
    versus: Sequence[Versus]
    disagreement: Sequence[Disagreement]


class Report(Core, Sections, total=False):
    """The whole report."""

    verdict: VerdictRecord
    about: About
    audit_log: AuditEvidence
    provenance: Mapping[str, Any]
    identity: Identity
    shifts: Sequence[Shift]
    operation: Operation
