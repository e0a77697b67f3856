"""What a calibration report may hold, as typed dicts: the required core, and sections that a run measured or did not.

A report is strict JSON (None for what has no value). Every key of :class:`Report` beyond the core of
:func:`~moe_posterior.training.report.evaluate_predictions` is optional; the page and the model card say "not measured in this
run" where one is absent. Intervals are ``[low, high]``. Where a key takes rows, a single row may stand without its list.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Interval = Sequence[float | None]  # [low, high]
Number = float | None


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


class Configuration(TypedDict, total=False):
    """One routing configuration: a cluster and the experts chosen there."""

    arm: str
    panel: str  # the stored test rows' name ("clean"), or that of a pool of shifted sets
    cluster: int | None
    experts: Sequence[int]
    n: int
    accuracy: Number
    confidence: Number
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


class Operation(TypedDict, total=False):
    """What the governance standard asks of the deployment and no evaluation can measure."""

    routing_log: str
    abstention: str
    conditions: Sequence[str]  # operating conditions inside which the confidences hold


class Report(TypedDict, total=False):
    """The report as :func:`~moe_posterior.training.report.to_html` and ``to_card`` read it."""

    # made by evaluate_predictions
    schema: str
    n_bins: int
    resamples: int
    arms: Sequence[str]
    baseline: str | None
    subsets: Mapping[str, int | None]
    pools: Sequence[Pool]
    records: Sequence[
        Mapping[str, Any]
    ]  # arm, shift, severity, subset, n, metric, value, low, high; of ECE plain, floor
    paired: Sequence[Mapping[str, Any]]  # the same of arm − baseline, with p_value, p_holm, comparisons
    reliability: Sequence[Mapping[str, Any]]  # arm, panel, subset (optional), sets, n, ece, bins
    configurations: Sequence[Configuration]
    notes: Sequence[str]
    provenance: Mapping[str, Any]
    # further sections
    identity: Identity
    shifts: Sequence[Shift]
    metric: MetricSettings
    subgroups: Sequence[Subgroup]
    shared_confidence: Sequence[SharedConfidence]
    calibrators: Sequence[Calibrator]
    action: Sequence[Action]
    risk_coverage: Sequence[Curve]
    rce: Sequence[Curve]
    online: Sequence[Curve]
    operation: Operation
