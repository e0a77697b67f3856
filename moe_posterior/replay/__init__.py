"""Record the routings of forward passes, keep them in a file, and force them on later forward passes.

>>> from moe_posterior.replay import record, replay, load_recording
"""

from moe_posterior.replay.find import find_gates
from moe_posterior.replay.record import Trace, record
from moe_posterior.replay.replay import Replay, Weights, recording_from_experts, replay
from moe_posterior.replay.saving import GateMark, Recording, load_recording, save_recording

__all__ = [
    "GateMark",
    "Recording",
    "Replay",
    "Trace",
    "Weights",
    "find_gates",
    "load_recording",
    "record",
    "recording_from_experts",
    "replay",
    "save_recording",
]
