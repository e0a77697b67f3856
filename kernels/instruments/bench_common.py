"""What the CPU benchmarks share: a gate that has learned, and ratios of medians of two functions that take turns.

Both sides run in the same loop, so that other load on the machine affects both equally.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_posterior.gates import PosteriorGate

TOP_K = 2
ROUNDS = 30  # at least; short calls are repeated within a round until it is long enough for the clock
ROUND_SECONDS = 0.02


def posterior_gate(
    batch: int, hidden_size: int, clusters: int, experts: int, generator: torch.Generator
) -> tuple[PosteriorGate, Tensor]:  # hidden (B, D)
    """A gate that has seen an outcome of every token, and tokens around its centroids."""
    gate = PosteriorGate(hidden_size, experts, clusters, TOP_K)
    centroids = torch.randn(clusters, hidden_size, generator=generator)
    gate.clusterer.set_centroids(centroids)
    hidden = centroids[torch.randint(clusters, (batch,), generator=generator)]
    hidden = hidden + 0.5 * torch.randn(batch, hidden_size, generator=generator)
    gate.observe(gate(hidden), torch.bernoulli(torch.full((batch, TOP_K), 0.8), generator=generator), dense=False)
    return gate, hidden


def record(
    case: str,
    path: str,
    batch: int,
    clusters: int,
    experts: int,
    ours: Callable[[], object],
    other: Callable[[], object],
) -> dict[str, Any]:
    """One case: its sizes, and the result of :func:`ratio_of_medians` for two functions."""
    ratio, mine, theirs = ratio_of_medians(ours, other)
    return {
        "case": case,
        "path": path,
        "batch": batch,
        "clusters": clusters,
        "experts": experts,
        "ratio": ratio,
        "ours_ms": 1e3 * mine,
        "other_ms": 1e3 * theirs,
    }


def ratio_of_medians(ours: Callable[[], object], other: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds per call of two functions that take turns, and their ratio."""
    repeats = []
    for call in (ours, other):
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(ROUND_SECONDS / max(time.perf_counter() - start, 1e-7))))
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for call, count, seconds in zip((ours, other), repeats, times, strict=True):
                start = time.perf_counter()
                for _ in range(count):
                    call()
                seconds.append((time.perf_counter() - start) / count)
    finally:
        gc.enable()
    mine, theirs = (statistics.median(seconds) for seconds in times)
    return mine / theirs, mine, theirs
