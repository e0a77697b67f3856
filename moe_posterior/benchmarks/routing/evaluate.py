"""All the figures that a benchmark reports of a trace.

Dimensions: T queries, M query classes.
"""

import torch

from moe_posterior.benchmarks.routing import measures
from moe_posterior.benchmarks.routing.environments import Environment
from moe_posterior.benchmarks.routing.stream import Trace

Value = float | int | list[float] | None
CURVE_STEP = 5  # a curve keeps every fifth window, enough for a plot


def figures_of(trace: Trace, environment: Environment) -> dict[str, Value]:
    """All figures of one run; names with a leading ``curve_`` are lists over the stream.

    - ``error``: share of failed outcomes of the chosen expert. ``expected_error``: its expectation, without sampling noise.
    - ``regret``: mean shortfall of true competence against the best expert for each query.
    - ``ece``, ``ece_debiased``, ``ece_floor``: calibration of the success estimate; ``ece_score``: of the score it ranks by.
    - ``stable_after``: queries (after the change, if there is one) until performance is within 2 points of its final level.
    """
    confidence, outcome = trace.confidence, trace.outcome
    after = slice(environment.change_at, None)
    figures: dict[str, Value] = {
        "error": 1 - float(outcome.mean()),
        "expected_error": 1 - float(trace.expected.mean()),
        "regret": float((trace.oracle - trace.expected).mean()),
        "ece": measures.calibration_error(confidence, outcome),
        "ece_debiased": measures.debiased_calibration_error(confidence, outcome),
        "ece_floor": measures.noise_floor(confidence),
        "ece_score": measures.calibration_error(trace.score.clamp(0, 1), outcome),
        "mean_confidence": float(confidence.mean()),
        "stable_after": measures.queries_until_stable(trace.expected[after]),
        "curve_expected": _curve(trace.expected),
        "curve_outcome": [round(value, 3) for value in outcome.tolist()],
    }
    if environment.degraded is not None:
        figures |= _degradation(trace, environment, environment.degraded)
    if environment.change_at:
        figures |= _shift(trace, environment.change_at)
    return figures


def _curve(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in measures.next_windows(values)[::CURVE_STEP].tolist()]


def _degradation(trace: Trace, environment: Environment, expert: int) -> dict[str, Value]:
    stream, after = environment.stream, slice(environment.change_at, None)
    chosen, affected = trace.chosen[after], stream.affected[after]
    avoided, avoided_affected = measures.queries_until_avoided(chosen, affected, expert)
    figures: dict[str, Value] = {
        "avoided_after": avoided,
        "avoided_after_affected": avoided_affected,
        "degraded_share_affected": float((chosen[affected] == expert).double().mean()),
        "degraded_share_healthy": float((chosen[~affected] == expert).double().mean()),
        "log_alarm_after": trace.log_alarm,
        "curve_degraded_share": _curve((chosen[affected] == expert).double()),
    }
    num_classes = int(stream.query_class.max()) + 1
    failing = torch.zeros(num_classes, dtype=torch.bool)
    failing[stream.query_class[stream.affected]] = True
    for passed, mean in trace.degraded_mean.items():
        figures[f"degraded_mean_affected_{passed}"] = float(mean[failing].mean())
        figures[f"degraded_mean_healthy_{passed}"] = float(mean[~failing].mean()) if not failing.all() else None
        figures[f"curve_degraded_mean_{passed}"] = [round(value, 4) for value in mean.tolist()]
    if trace.degraded_mean:
        figures["curve_failing_classes"] = [float(flag) for flag in failing.tolist()]
    return figures


def _shift(trace: Trace, change_at: int) -> dict[str, Value]:
    before, after = trace.outcome[:change_at], trace.outcome[change_at:]
    return {
        "accuracy_before": float(before.mean()),
        "accuracy_after": float(after.mean()),
        "gap": float(before.mean() - after.mean()),
        "oracle_after": float(trace.oracle[change_at:].mean()),
        "recovery": measures.recovery(after),
        "recovery_relative": measures.recovery(trace.expected[change_at:], 0.85 * trace.oracle[change_at:]),
    }
