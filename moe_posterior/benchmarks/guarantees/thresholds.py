"""Thresholds chosen on rows drawn anew and anew from stored predictions, which serve as the population: the true risk is known.

Rows are drawn with replacement, so they are independent draws from a population of n rows, however many are drawn.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_posterior.benchmarks.guarantees.predictions import Part
from moe_posterior.calibrators import Outputs, TemperatureScaling
from moe_posterior.guarantees import select_group_thresholds, select_threshold
from moe_posterior.metrics import action_threshold

FEW, MANY = (
    1_000,
    20_000,
)  # calibration rows, beside as many as the population has; of the many, a tenth of the resamples
TEMPERATURES = 30  # resamples on which a temperature is fitted

Row = dict[str, Any]


class Population:
    """Risk and coverage of every threshold, known exactly."""

    def __init__(self, confidence: Tensor, correct: Tensor) -> None:
        order = (-confidence).argsort(stable=True)
        self.falling = (-confidence[order]).numpy()
        self.errors = np.concatenate([[0.0], (~correct[order]).double().cumsum(0).numpy()])

    def judged(self, threshold: float) -> tuple[float, float]:
        """Coverage and risk of acting on confidences of at least this; a risk of 0 where nothing is acted on."""
        acted = int(np.searchsorted(self.falling, -threshold, side="right")) if math.isfinite(threshold) else 0
        acted = len(self.falling) if threshold == -math.inf else acted
        return acted / len(self.falling), float(self.errors[acted] / max(acted, 1))


def measure(part: Part, levels: list[float], delta: float, resamples: int, seed: int) -> Iterator[Row]:
    """Coverage and broken levels of every policy, for every level that acting on everything breaks."""
    population = Population(part.confidence, part.correct)
    hard = [level for level in levels if population.judged(-math.inf)[1] > level]
    for rows in dict.fromkeys((FEW, len(part.target), MANY)):
        generator = torch.Generator().manual_seed(seed)
        found: dict[tuple[float, str], list[tuple[float, float]]] = {}
        for index in range(resamples if rows < MANY else max(1, resamples // 10)):
            drawn = torch.randint(len(part.target), (rows,), generator=generator)
            chosen = _chosen(part, drawn, hard, delta, index < TEMPERATURES and rows == len(part.target))
            for level, policy, threshold, judge in chosen:
                found.setdefault((level, policy), []).append((judge or population).judged(threshold))
        for (level, policy), judged in found.items():
            yield {**_summary(judged, level), "policy": policy, "level": level, "rows": rows}


def _chosen(
    part: Part, drawn: Tensor, levels: list[float], delta: float, temperature: bool
) -> Iterator[tuple[float, str, float, Population | None]]:
    """Level, policy, its threshold, and the population to judge it by where that is not the plain one."""
    confidence, correct = part.confidence[drawn], part.correct[drawn]
    scaled = None
    if temperature:
        scaling = TemperatureScaling().fit(Outputs(part.probs[drawn]), part.target[drawn])
        scaled = Population(scaling(Outputs(part.probs)).amax(dim=1).double(), part.correct)
    for level in levels:
        yield level, "promised", select_threshold(confidence, correct, level, delta).threshold, None
        yield level, "empirical", action_threshold(confidence, correct, level).threshold, None
        yield level, "act on everything", -math.inf, None
        if scaled is not None:
            yield level, "temperature, then 1 − α", 1 - level, scaled


def measure_groups(part: Part, levels: list[float], delta: float, resamples: int, seed: int) -> Iterator[Row]:
    """The same for thresholds per routing configuration, beside one threshold for all, judged in every part of the former."""
    assert part.configuration is not None
    everyone = Population(part.confidence, part.correct)
    for level in levels:
        if everyone.judged(-math.inf)[1] <= level:
            continue
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[tuple[float, bool]]] = {"one threshold": [], "per configuration": []}
        parts = []
        for _ in range(resamples):
            drawn = torch.randint(len(part.target), (len(part.target),), generator=generator)
            rows = part.rows(drawn)
            assert rows.configuration is not None
            grouped = select_group_thresholds(rows.confidence, rows.correct, rows.configuration, level, delta)
            single = select_threshold(rows.confidence, rows.correct, level, delta).threshold
            parts.append(len(grouped.parts))
            least = grouped.thresholds(part.configuration)
            for name, thresholds in (("one threshold", torch.full_like(least, single)), ("per configuration", least)):
                acted = part.confidence >= thresholds
                broken = any(
                    _risk(part, acted & torch.isin(part.configuration, torch.tensor(one.groups))) > level
                    for one in grouped.parts
                )
                found[name].append((float(acted.double().mean()), broken))
        for name, judged in found.items():
            coverage, violated = zip(*judged, strict=True)
            yield {
                "policy": name,
                "level": level,
                "parts": float(np.mean(parts)),
                "coverage": float(np.mean(coverage)),
                "violations": float(np.mean(violated)),
            }


def _risk(part: Part, acted: Tensor) -> float:
    return float((~part.correct[acted]).double().mean()) if bool(acted.any()) else 0.0


def _summary(judged: list[tuple[float, float]], level: float) -> Row:
    coverage, risk = np.array(judged).T
    return {
        "coverage": float(coverage.mean()),
        "risk": float((coverage * risk).sum() / max(coverage.sum(), 1e-12)),
        "violations": float((risk > level + 1e-12).mean()),
        "resamples": len(judged),
    }
