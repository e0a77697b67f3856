"""What a calibration monitor says: its alarms, and a line per stream."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """One proven drift."""

    configuration: int | None  # None: over all rows together
    direction: str  # "overconfident" or "underconfident"
    row: int  # the row that proved it, counted from 0 over the monitor's life
    since: int  # the row with which the drift most likely began
    rows: int  # of this configuration since then
    gap: float  # mean expected less observed accuracy over these rows; positive: overconfident
    low: float  # of the gap
    high: float
    e_value: float  # evidence when the alarm was raised; inf beyond the largest float
    threshold: float  # what it had to reach


@dataclass(frozen=True)
class StreamSummary:
    """What is known of one configuration, or of all rows together."""

    configuration: int | None
    rows: int  # with a known outcome, since the last reset
    gap: float  # mean expected less observed accuracy; NaN without rows
    low: float
    high: float
    log_e: tuple[float, float]  # of "overconfident" and of "underconfident"
    log_threshold: float
    alarmed: tuple[str, ...]  # directions
