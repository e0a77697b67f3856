"""``python -m moe_posterior.kernels.bench``: what the gate costs on a CPU, as ratios of medians measured in one run.

Dimensions: B tokens, D hidden size, C clusters, E experts, k experts per token.

Both sides of a ratio run in turns, so that what else the machine does hits both alike. Before a case is timed its result is checked
against the reference; a case that fails the check raises.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.experts import ExpertsFFN
from moe_posterior.gates import Gate, PosteriorGate, SoftmaxGate
from moe_posterior.kernels import cpu, reference
from moe_posterior.layer import MixtureOfExperts, PosteriorMoE

GATE_BATCHES = (1, 64, 4096)
HIDDEN, EXPERTS, TOP_K = 1024, 64, 2
ROUNDS = 30  # at least; short calls are repeated within a round until it lasts as long as the clock is good for
ROUND_SECONDS = 0.02


def main(arguments: list[str] | None = None) -> int:
    """Run every case, print a table, write the records where asked."""
    parser = argparse.ArgumentParser("python -m moe_posterior.kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default %(default)s)"
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    records = []
    print(f"{'case':<34}{'path':<22}{'B':>6}{'C':>6}{'E':>6}{'ratio':>8}{'ours ms':>10}{'other ms':>10}")
    for record in cases():
        records.append(record)
        sizes = "".join(f"{record[name]:>6}" for name in ("batch", "clusters", "experts"))
        print(
            f"{record['case']:<34}{record['path']:<22}{sizes}{record['ratio']:>8.3f}{record['ours_ms']:>10.4f}{record['other_ms']:>10.4f}",
            flush=True,
        )
    if asked.json:
        about = {
            "torch": torch.__version__,
            "threads": asked.threads,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        }
        Path(asked.json).write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n")
    return 0


def cases() -> Iterator[dict[str, Any]]:
    """Every case, checked and timed."""
    for clusters in (EXPERTS, 2 * EXPERTS):
        for batch in GATE_BATCHES:
            yield gate_case(batch, HIDDEN, clusters, EXPERTS)
        for low_precision in (False, True):
            yield assign_case(4096, HIDDEN, clusters, EXPERTS, low_precision)
    yield gate_case(1, 384, 64, 32)
    yield gate_case(4096, HIDDEN, 512, 1000)
    for backward in (False, True):
        yield layer_case(2048, 256, 8, backward)
    yield observe_case(4096, 256, 8)


def gate_case(batch: int, hidden_size: int, clusters: int, experts: int) -> dict[str, Any]:
    """The table path against the softmax top-k gate."""
    generator = torch.Generator().manual_seed(0)
    posterior, hidden = _posterior_gate(batch, hidden_size, clusters, experts, generator)
    softmax = SoftmaxGate(hidden_size, experts, TOP_K)
    routing = posterior(hidden)
    expected = reference.assign(hidden, posterior.clusterer.prepared)
    if not torch.equal(routing.cluster_ids, expected.cluster_ids):
        raise AssertionError("the gate's clusters are not the reference's")
    with torch.inference_mode():
        return _record(
            "gate / softmax gate", "table", batch, clusters, experts, lambda: posterior(hidden), lambda: softmax(hidden)
        )


def assign_case(batch: int, hidden_size: int, clusters: int, experts: int, low_precision: bool) -> dict[str, Any]:
    """The CPU assignment alone, with and without bfloat16, against the softmax top-k gate."""
    posterior, hidden = _posterior_gate(batch, hidden_size, clusters, experts, torch.Generator().manual_seed(0))
    softmax, centroids = SoftmaxGate(hidden_size, experts, TOP_K), posterior.clusterer.prepared

    def ours() -> reference.Assignment:
        return cpu.assign(hidden, centroids, low_precision=low_precision)

    if not torch.equal(ours().cluster_ids, reference.assign(hidden, centroids).cluster_ids):
        raise AssertionError("the clusters are not the reference's")
    path = "bfloat16, checked" if low_precision else "float32"
    with torch.inference_mode():
        return _record("assign / softmax gate", path, batch, clusters, experts, ours, lambda: softmax(hidden))


def layer_case(batch: int, hidden_size: int, experts: int, backward: bool) -> dict[str, Any]:
    """PosteriorMoE against the same experts behind a softmax gate."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs, hidden = _layers(batch, hidden_size, experts, generator)
    path = "forward + backward" if backward else "forward"

    def run(layer: MixtureOfExperts) -> Callable[[], object]:
        def step() -> object:
            if not backward:
                with torch.inference_mode():
                    return layer(hidden)
            layer.zero_grad(set_to_none=True)
            return layer(hidden).square().mean().backward()

        return step

    return _record("layer / softmax layer", path, batch, ours.gate.num_clusters, experts, run(ours), run(theirs))


def observe_case(batch: int, hidden_size: int, experts: int) -> dict[str, Any]:
    """One observe of a batch as a share of the layer's forward and backward on it."""
    generator = torch.Generator().manual_seed(0)
    ours, _, hidden = _layers(batch, hidden_size, experts, generator)
    routing = ours.route(hidden)
    outcome = torch.bernoulli(torch.full((batch, TOP_K), 0.8), generator=generator)

    def step() -> object:
        ours.zero_grad(set_to_none=True)
        return ours(hidden).square().mean().backward()

    return _record(
        "observe / layer step",
        "dense counts",
        batch,
        ours.gate.num_clusters,
        experts,
        lambda: ours.observe(routing, outcome),
        step,
    )


def _posterior_gate(
    batch: int, hidden_size: int, clusters: int, experts: int, generator: torch.Generator
) -> tuple[PosteriorGate, Tensor]:
    gate = PosteriorGate(hidden_size, experts, clusters, TOP_K)
    centroids = torch.randn(clusters, hidden_size, generator=generator)
    gate.clusterer.set_centroids(centroids)
    hidden = centroids[torch.randint(clusters, (batch,), generator=generator)]
    hidden = hidden + 0.5 * torch.randn(batch, hidden_size, generator=generator)
    gate.observe(gate(hidden), torch.bernoulli(torch.full((batch, TOP_K), 0.8), generator=generator), dense=False)
    return gate, hidden


def _layers(
    batch: int, hidden_size: int, experts: int, generator: torch.Generator
) -> tuple[PosteriorMoE, MixtureOfExperts, Tensor]:
    ffn = ExpertsFFN(experts, hidden_size, 2 * hidden_size, generator=generator)
    ours = PosteriorMoE(ffn, hidden_size, num_clusters=4 * experts, top_k=TOP_K)
    gate, hidden = _posterior_gate(batch, hidden_size, 4 * experts, experts, generator)
    ours.gate.load_state_dict(gate.state_dict())
    other: Gate = SoftmaxGate(hidden_size, experts, TOP_K)
    return ours, MixtureOfExperts(ffn, other), hidden


def _record(
    case: str,
    path: str,
    batch: int,
    clusters: int,
    experts: int,
    ours: Callable[[], object],
    other: Callable[[], object],
) -> dict[str, Any]:
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
    """Median seconds a call of two functions that take turns, and their ratio."""
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


if __name__ == "__main__":
    raise SystemExit(main())
