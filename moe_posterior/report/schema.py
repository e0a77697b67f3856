"""The calibration report: strict JSON (None where there is no value), as :mod:`~moe_posterior.report.compute` fills it and
every rendering reads it.

Intervals are ``[low, high]``. A report read back from JSON may lack any of the further sections; the page and the model card then say
"not measured in this run". In those a single row may stand without its list.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

SCHEMA = "moe-posterior/calibration-report/3"
READABLE = ("moe-posterior/calibration-report/2", SCHEMA)  # files that every rendering still reads
METRICS = ("accuracy", "nll", "brier", "ece")
TITLES = {"accuracy": "accuracy ↑", "nll": "NLL ↓", "brier": "Brier ↓", "ece": "ECE ↓"}
OVERALL = "overall"  # the subset of all rows

Interval = Sequence[float | None]  # [low, high]
Number = float | None
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


class Subgroup(TypedDict, total=False):
    """Calibration of one subgroup, of one arm where there are several."""

    arm: str
    group: str
    n: int
    accuracy: Number
    ece: Number
    interval: Interval  # of the ECE
    floor: Number  # the plain ECE that noise alone would show
    plain: Number  # the plain ECE, where ``ece`` is debiased
    worst: bool
    within_noise: bool  # of the one with the largest ECE: no evidence that it is miscalibrated


class ConfigurationPlace(TypedDict, total=False):
    """A routing configuration of one arm on one panel: a cluster and the experts chosen there."""

    arm: str
    panel: str
    cluster: int | str | None  # or the name that the data give a configuration
    experts: Sequence[int]


class Configuration(ConfigurationPlace, total=False):
    """How well one routing configuration is calibrated."""

    n: int
    accuracy: Number
    confidence: Number
    ece: Number
    gap: Number  # confidence − accuracy; computed from the two where absent
    interval: Interval  # of the gap
    floor: Number  # the mean |gap| of a calibrated configuration of this size


class SharedConfidence(TypedDict, total=False):
    """How many inputs display a confidence that another configuration displays too."""

    arm: str
    panel: str
    n: int  # inputs looked at
    shared: int  # those whose displayed confidence occurs in two configurations or more
    decimals: int  # of the displayed confidence
    widest_gap: Number  # largest difference in accuracy between two configurations behind one displayed confidence


class Calibrator(TypedDict, total=False):
    """A post-processing of the confidences, and what it reached."""

    arm: str
    name: str
    panel: str
    ece: Number
    nll: Number
    accuracy: Number
    interval: Interval  # of the ECE
    floor: Number  # the plain ECE that noise alone would show
    plain: Number  # the plain ECE, where ``ece`` is debiased


class Action(TypedDict, total=False):
    """The confidence above which the system acts, and whether what it promises held in one evaluation."""

    arm: str
    shift: str  # the stored test rows' name, or a shift
    severity: int | None  # 0: the stored test rows; None: all severities of the shift pooled
    severities: Sequence[int]  # where several are pooled
    failed_at: Sequence[int]  # those of them where the promise failed
    sets: int
    n: int  # answers given
    acted: int  # answers acted on
    threshold: Number
    risk: Number  # share of wrong answers among those acted on
    interval: Interval  # of the risk, 95 %
    coverage: Number  # share acted on
    max_risk: Number  # the promise that the threshold was chosen for
    verdict: str | None  # "held", "failed", "nothing acted on"


class Curve(TypedDict, total=False):
    """A line with an optional interval; ``x`` is coverage, ρ or outcomes delivered, ``y`` risk, RCE or ECE."""

    name: str  # arm, calibrator or method
    panel: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number]
    high: Sequence[Number]


class ConditionPlace(TypedDict):
    """One arm on one evaluation set, on all its rows or on those of one group."""

    arm: str
    shift: str
    severity: int  # 0: the stored test rows
    group: str  # a subset, or "overall"
    family: str  # which conditions the intervals hold for together
    comparisons: int  # how many those are


class Condition(ConditionPlace):
    """Whether the confidences hold there within a tolerance."""

    n: int  # predictions
    tolerance: float  # largest calibration error that passes
    level: float  # of each interval: 1 − 0.05 / comparisons
    ece: Number  # debiased
    interval: Interval  # of the ECE
    gap: Number  # mean confidence − accuracy
    gap_interval: Interval
    verdict: str  # "pass", "fail", "cannot say"


class Baseline(TypedDict, total=False):
    """The model, or a trivial baseline chosen on validation rows, on one panel."""

    arm: str
    panel: str
    name: str  # "the model", "constant confidence", …
    detail: str  # what was chosen: the constant, the expert, the weights
    n: int
    accuracy: Number
    ece: Number  # debiased
    interval: Interval  # of the ECE
    floor: Number
    plain: Number
    brier: Number
    nll: Number


class Versus(TypedDict, total=False):
    """A baseline less the model, or a calibrator less temperature scaling, on the same rows."""

    arm: str
    panel: str
    name: str
    against: str  # "the model", "temperature"
    metric: str  # "ece", "brier", "nll": of each less is better
    value: Number
    low: Number
    high: Number
    p_value: Number
    p_holm: Number  # within its arm, panel and opponent
    comparisons: int


class Abstention(TypedDict, total=False):
    """What is left wrong after abstaining on a share of the rows: the most disputed, or the least confident."""

    share: float
    kept: int
    risk_disagreement: Number
    interval_disagreement: Interval
    risk_confidence: Number
    interval_confidence: Interval


class Disagreement(TypedDict, total=False):
    """Abstaining where experts disagree beside abstaining where the confidence is low."""

    arm: str
    panel: str
    n: int
    risk: Number  # without abstaining
    aurc_confidence: Number  # area under risk against coverage
    aurc_disagreement: Number
    difference: Number  # disagreement − confidence
    interval: Interval  # of the difference
    abstentions: Sequence[Abstention]


class ArmVerdictRecord(TypedDict):
    """What one arm's evidence allows."""

    arm: str
    usable: str  # "yes", "no", "not enough rows to say", "not measured": on the stored test rows, within the tolerance
    acting: str  # the same of the action threshold's promise
    lines: Sequence[str]  # three sentences
    tolerance: Number
    threshold: Number  # act from this confidence on
    max_risk: Number  # promised share of wrong answers among those acted on
    risk: Number  # measured on the stored test rows
    risk_interval: Interval | None
    coverage: Number
    passed: Sequence[str]  # sets on which the score is within the tolerance
    failed: Sequence[str]
    undecided: Sequence[str]
    kept: Sequence[str]  # sets on which the promise of the threshold held, its interval included
    broken: Sequence[str]
    unsure: Sequence[str]
    groups_failed: Sequence[str]  # groups on a set
    groups_undecided: Sequence[str]
    not_measured: Sequence[str]


class VerdictRecord(TypedDict):
    """One verdict per arm, and which arm to prefer."""

    arms: Sequence[ArmVerdictRecord]
    preferred: str | None  # None: none is credibly better
    preference: str  # the reason; empty with a single arm


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
    routing: str
    intended_use: str
    contact: str


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
