"""A promise served rows like those it was made on, and then rows of a shift: when is it noticed, and what happens next?"""

import math

import numpy as np
import torch

from moe_posterior.benchmarks.guarantees.predictions import Part
from moe_posterior.benchmarks.guarantees.thresholds import Population, Row
from moe_posterior.guarantees import OnlineActionThreshold

BEFORE, AFTER = 400, 3_200  # rows of a stream before and after the shift
STEP = 10  # rows between looks
SHOWN = (0, 50, 100, 200, 400, 800, 1600, 3190)  # outcomes after the shift


def measure(calibration: Part, shifted: Part, level: float, delta: float, streams: int, seed: int) -> Row:
    """Share of streams that act at a threshold whose true risk is too high, and coverage, by outcomes since the shift.

    Half of the calibration rows, another half for every stream, make the promise; the others are served before the shift.
    """
    generator = torch.Generator().manual_seed(seed)
    before, after = (Population(part.confidence, part.correct) for part in (calibration, shifted))
    quiet: list[float] = []
    thresholds: list[list[float]] = []
    static: list[float] = []
    delays: list[float] = []
    false = 0
    for _ in range(streams):
        order = torch.randperm(len(calibration.target), generator=generator)
        half = len(order) // 2
        fitted, served = calibration.rows(order[:half]), calibration.rows(order[half:])
        online = OnlineActionThreshold(level, delta).calibrate(fitted.confidence, fitted.correct)
        static.append(online.threshold)
        calm = served.rows(torch.randint(len(served.target), (BEFORE,), generator=generator))
        for start in range(0, BEFORE, STEP):
            quiet.append(before.judged(online.threshold)[0])
            online.update(calm.confidence[start : start + STEP], calm.correct[start : start + STEP])
        false += online.alarms > 0
        rows = shifted.rows(torch.randint(len(shifted.target), (AFTER,), generator=generator))
        found: list[float] = []
        alarms, delay = online.alarms, math.inf
        for start in range(0, AFTER, STEP):
            found.append(online.threshold)
            online.update(rows.confidence[start : start + STEP], rows.correct[start : start + STEP])
            delay = min(delay, start + STEP) if online.alarms > alarms else delay
        thresholds.append(found)
        delays.append(delay if math.isfinite(static[-1]) and not alarms else math.nan)
    return _summary(after, thresholds, static, level, delta) | {
        "quiet_coverage": float(np.mean(quiet)),
        "promised_coverage": float(np.mean([before.judged(one)[0] for one in static])),
        "false_alarms": false / streams,
        "delay": _quantile(delays, 0.5),
        "delay_90": _quantile(delays, 0.9),
    }


def _summary(after: Population, thresholds: list[list[float]], static: list[float], level: float, delta: float) -> Row:
    judged = np.array([[after.judged(one) for one in stream] for stream in thresholds])  # (streams, looks, 2)
    coverage, risk = judged[:, :, 0].mean(axis=0), judged[:, :, 1]
    bad = (risk > level).mean(axis=0)
    kept = np.nonzero(bad > delta)[0]
    frozen = np.array([after.judged(one) for one in static])
    looks = [shown // STEP for shown in SHOWN]
    grid = np.arange(1, len(after.falling) + 1)
    possible = np.nonzero(after.errors[1:] / grid <= level)[0]
    return {
        "level": level,
        "static_risk": float((frozen[:, 0] * frozen[:, 1]).sum() / max(frozen[:, 0].sum(), 1e-12)),
        "static_coverage": float(frozen[:, 0].mean()),
        "static_bad": float((frozen[:, 1] > level).mean()),
        "possible": float((possible[-1] + 1) / len(grid)) if len(possible) else 0.0,
        "bad": [float(bad[look]) for look in looks],
        "coverage": [float(coverage[look]) for look in looks],
        "holds_after": int((kept[-1] + 1) * STEP) if len(kept) else 0,
    }


def _quantile(delays: list[float], share: float) -> float | None:
    """Of the streams that had a promise and no false alarm; None where it is beyond the stream."""
    known = sorted(delay for delay in delays if not math.isnan(delay))
    found = known[min(int(share * len(known)), len(known) - 1)] if known else math.inf
    return found if math.isfinite(found) else None
