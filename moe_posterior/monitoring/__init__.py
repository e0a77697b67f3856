"""An alarm for drifting calibration that may be read after every row: anytime-valid tests of displayed confidences."""

from moe_posterior.monitoring.monitor import CalibrationMonitor
from moe_posterior.monitoring.records import Alarm, StreamSummary

__all__ = ["Alarm", "CalibrationMonitor", "StreamSummary"]
