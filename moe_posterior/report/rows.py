"""The rows of a report's further sections, as :mod:`~moe_posterior.report.schema` puts them together. Intervals are ``[low, high]``."""

from collections.abc import Sequence
from typing import TypedDict

Interval = Sequence[float | None]  # [low, high]
Number = float | None


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
    interval: Interval | None  # of the risk, 95 %; None where nothing was acted on
    coverage: Number  # share acted on
    max_risk: Number  # the promise that the threshold was chosen for
    error_probability: Number  # how probable it may be that the calibration rows mislead
    verdict: str | None  # "held", "failed", "nothing acted on"


class Guarantee(TypedDict):
    """The threshold of one arm that calibration rows prove, and what must hold for its promise."""

    arm: str
    threshold: Number  # None: nothing can be promised
    max_risk: float
    error_probability: float
    rows: int  # calibration rows
    acted: int  # of these, how many reach the threshold
    errors: float  # wrong among them; graded answers count in part
    coverage: Number
    risk: Number
    reason: str  # why nothing can be promised
    assumptions: Sequence[str]
    fitting_threshold: Number  # the one that just fits the calibration rows, without an allowance for chance
    fitting_coverage: Number


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
