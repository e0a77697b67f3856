"""Prediction sets: how often they hold the right class, over all rows and in the worst class and configuration, and their size."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moe_posterior.benchmarks.guarantees.predictions import Part
from moe_posterior.benchmarks.guarantees.thresholds import Row
from moe_posterior.guarantees import PredictionSets
from moe_posterior.guarantees.sets import Score, Within

ERROR_RATE = 0.1
LEAST = 100  # rows in the population of a class or configuration that is looked at by itself
TILT = -4.0  # a row of confidence c is drawn e^(TILT · c) times as often under the simulated covariate shift: doubtful rows come in
KINDS: tuple[tuple[Score, Within], ...] = (
    ("lac", "all"),
    ("aps", "all"),
    ("raps", "all"),
    ("lac", "class"),
    ("lac", "group"),
)


def measure(part: Part, resamples: int, seed: int) -> Iterator[Row]:
    """Calibrated on one random half and judged on the other, every kind on the same halves; means over resamples."""
    generator = torch.Generator().manual_seed(seed)
    ids = part.configuration if part.configuration is not None else torch.zeros_like(part.target)
    named = [kind for kind in KINDS if kind[1] != "group" or len(ids.unique()) > 1]
    tallies = {f"{score}, within {within}": _Tally(part.target, ids) for score, within in named}
    tallies["probabilities summed to 1 − ε"] = _Tally(part.target, ids)
    tilted: dict[str, list[float]] = {"plain": [], "weighted": []}
    for _ in range(resamples):
        order = torch.randperm(len(part.target), generator=generator)
        fitted, judged = order[: len(order) // 2], order[len(order) // 2 :]
        for score, within in named:
            own, later = (ids[fitted], ids[judged]) if within == "group" else (None, None)
            luck = None if score == "lac" else generator
            sets = PredictionSets(ERROR_RATE, score, within)
            sets.calibrate(part.probs[fitted], part.target[fitted], groups=own, generator=luck)
            held = sets.predict(part.probs[judged], groups=later, generator=luck)
            tallies[f"{score}, within {within}"].add(judged, held)
        tallies["probabilities summed to 1 − ε"].add(judged, _summed(part.probs[judged]))
        for name, value in _tilted(part, fitted, judged, generator).items():
            tilted[name].append(value)
    for name, tally in tallies.items():
        yield {"policy": name, **tally.figures()}
    yield {"policy": "tilted", **{name: float(np.mean(values)) for name, values in tilted.items()}}


def measure_shift(calibration: Part, shifted: Part) -> Row:
    """Coverage and size on shifted rows of sets calibrated on unshifted ones."""
    sets = PredictionSets(ERROR_RATE).calibrate(calibration.probs, calibration.target).predict(shifted.probs)
    held = sets.gather(1, shifted.target[:, None]).double().mean()
    return {"policy": "under the shift", "held": float(held), "size": float(sets.sum(dim=1).double().mean())}


class _Tally:
    """Hits and sizes, summed over resamples by row of the population."""

    def __init__(self, target: Tensor, ids: Tensor) -> None:
        self.target, self.ids = target, ids
        self.hits, self.sizes, self.counts = (torch.zeros(len(target), dtype=torch.float64) for _ in range(3))

    def add(self, rows: Tensor, sets: Tensor) -> None:
        """The sets of some rows, each of them once."""
        self.hits[rows] += sets.gather(1, self.target[rows, None])[:, 0].double()
        self.sizes[rows] += sets.sum(dim=1).double()
        self.counts[rows] += 1

    def figures(self) -> Row:
        """Coverage and size over all rows, and the coverage of the worst class and configuration with rows enough."""
        return {
            "held": float(self.hits.sum() / self.counts.sum()),
            "size": float(self.sizes.sum() / self.counts.sum()),
            "worst_class": self._worst(self.target),
            "worst_configuration": self._worst(self.ids) if len(self.ids.unique()) > 1 else None,
        }

    def _worst(self, keys: Tensor) -> float | None:
        _, place, size = keys.unique(return_inverse=True, return_counts=True)
        hits, counts = (
            torch.zeros(len(size), dtype=torch.float64).index_add_(0, place, x) for x in (self.hits, self.counts)
        )
        large = size >= LEAST
        return float((hits / counts)[large].min()) if bool(large.any()) else None


def _summed(probs: Tensor) -> Tensor:  # (n, K) -> (n, K) bool
    """What somebody without conformal prediction would do: the top classes until their probabilities sum to 1 − ε."""
    ordered, order = probs.sort(dim=1, descending=True)
    needed = ordered.cumsum(dim=1) - ordered < 1 - ERROR_RATE
    return torch.zeros_like(needed).scatter_(1, order, needed)


def _tilted(part: Part, fitted: Tensor, judged: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Coverage under a covariate shift whose weights are known, without and with them."""
    weight = torch.exp(TILT * (part.confidence - 1))
    drawn = judged[torch.multinomial(weight[judged], len(judged), replacement=True, generator=generator)]
    found = {}
    for name, own, later in (("plain", None, None), ("weighted", weight[fitted], weight[drawn])):
        sets = PredictionSets(ERROR_RATE).calibrate(part.probs[fitted], part.target[fitted], weights=own)
        held = sets.predict(part.probs[drawn], weights=later).gather(1, part.target[drawn, None])
        found[name] = float(held.double().mean())
    return found
