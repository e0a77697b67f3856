"""Routing on one GPU: correctness first, then ours beside eager torch, torch.compile and the gate that it replaces.

    python -m moe_posterior.kernels.bench_gpu [--json FILE]

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token. Every path is captured in a CUDA graph, so that what
is timed is the device and not Python; each shape takes a few seconds. The GB/s are those of the minimal traffic, each input read once
and each output written once: the roofline's, not the memory controller's. Without a GPU it says so and ends well.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import MoEPosteriorError
from moe_posterior.kernels import dispatch, reference, roofline

SHAPES = [(8192, 4096, 64, 64, 8), (16384, 2048, 128, 128, 8), (4096, 7168, 256, 256, 8), (1, 4096, 64, 64, 8)]
DTYPES = [torch.bfloat16, torch.float32]
KNOBS: dict[str, Any] = {"risk_aversion": 1.0, "temperature": 0.1}
_NEAR_TIE = 1e-4  # of a token's similarity to its own centroid: below it, float32 itself does not know the nearest
_REPLAYS, _SAMPLES = 20, 15
_FLUSH_BYTES = 256 * 2**20  # more than any second-level cache
Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """One shape's tensors; centroids lie among the tokens, as k-means leaves them."""

    hidden: Tensor  # (N, D)
    centroids: reference.Centroids
    alpha: Tensor  # (C, E) float32
    beta: Tensor  # (C, E) float32
    tables: tuple[Tensor, Tensor, Tensor]  # experts, weights, scores (C, k)
    gate: Tensor  # (E, D), of the softmax gate
    top_k: int


class WrongAnswerError(MoEPosteriorError):
    """A fast path differs from the reference: no speed is reported."""


def make_problem(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> Problem:
    """Clustered random tokens and a random belief, the same on every machine."""
    num_tokens, size, clusters, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(clusters, size, generator=generator)
    members = torch.randint(clusters, (num_tokens,), generator=generator)
    hidden = (points[members] + torch.randn(num_tokens, size, generator=generator)).to(device, dtype)
    alpha, beta = (torch.rand(2, clusters, num_experts, generator=generator) * 50 + 1).to(device)
    centroids = reference.prepare_centroids(points.to(device))
    _, selection, weights = reference.route(centroids.points, centroids, alpha, beta, top_k=top_k, **KNOBS)
    tables = (selection.expert_indices, weights, selection.scores)
    gate = torch.randn(num_experts, size, generator=generator).to(device, dtype)
    return Problem(hidden, centroids, alpha, beta, tables, gate, top_k)


def check(problem: Problem) -> dict[str, float]:
    """Hold both kernels to the reference; what they may differ in is near-ties and last digits.

    Raises:
        WrongAnswerError: a cluster that is no near-tie, experts that are not the cluster's, or a distance off by more than 1e-4.
    """
    p = problem
    expected = reference.route_by_table(p.hidden, p.centroids, *p.tables)
    exact = p.hidden.double() @ p.centroids.directions.double().T - p.centroids.offsets.double()
    best = exact.max(dim=1).values
    differing = 0.0
    for name, call in (("table", lambda: by_table(p, "triton")), ("full", lambda: full_path(p, "triton"))):
        assignment, selection, weights = call()
        ids = assignment.cluster_ids
        regret = (best - exact.gather(1, ids[:, None])[:, 0]) / best.abs().clamp(min=1.0)
        own = torch.linalg.vector_norm(p.hidden.float() - p.centroids.points[ids], dim=1)
        failures = {
            "cluster": bool((regret > _NEAR_TIE).any()),
            "experts": not torch.equal(selection.expert_indices, p.tables[0][ids]),
            "weights": not torch.allclose(weights, p.tables[1][ids], rtol=1e-4, atol=1e-6),
            "distance": not torch.allclose(assignment.distance, own, rtol=1e-4),
        }
        if any(failures.values()):
            wrong = [what for what, failed in failures.items() if failed]
            raise WrongAnswerError(
                f"the {name} kernel differs from the reference in {wrong} at {tuple(p.hidden.shape)}"
            )
        differing = max(differing, float((ids != expected[0].cluster_ids).float().mean()))
    return {"differing_near_ties": differing}


def by_table(problem: Problem, backend: dispatch.Backend) -> Any:
    """The table path."""
    return dispatch.route_by_table(problem.hidden, problem.centroids, *problem.tables, backend=backend)


def full_path(problem: Problem, backend: dispatch.Backend) -> Any:
    """The full path."""
    p = problem
    return dispatch.route(p.hidden, p.centroids, p.alpha, p.beta, top_k=p.top_k, **KNOBS, backend=backend)


def softmax_gate(problem: Problem) -> tuple[Tensor, Tensor]:
    """What is replaced: Linear, softmax, top-k."""
    probabilities = torch.softmax(torch.nn.functional.linear(problem.hidden, problem.gate).float(), dim=-1)
    weights, experts = probabilities.topk(problem.top_k, dim=-1)
    return experts, weights


def paths(problem: Problem, compiled: Callable[[Call], Call]) -> dict[str, Call]:
    """What is timed."""
    calls: dict[str, Call] = {
        "table, triton": lambda: by_table(problem, "triton"),
        "full, triton": lambda: full_path(problem, "triton"),
        "table, eager": lambda: by_table(problem, "eager"),
        "full, eager": lambda: full_path(problem, "eager"),
        "softmax top-k, eager": lambda: softmax_gate(problem),
    }
    eager = {name: call for name, call in calls.items() if name.endswith("eager")}
    return calls | {name.replace("eager", "compiled"): compiled(call) for name, call in eager.items()}


def microseconds(call: Call) -> float:
    """Median over samples of one replayed call, the second-level cache flushed before each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    samples = []
    for _ in range(_SAMPLES * _REPLAYS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in samples) * 1e3


def run(
    device: str,
    timer: Callable[[Call], float],
    compiled: Callable[[Call], Call],
    shapes: list[tuple[int, int, int, int, int]],
) -> list[dict[str, Any]]:
    """One row a shape, dtype and path; a wrong answer ends everything."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in DTYPES:
            problem = make_problem(shape, dtype, device)
            checked = check(problem)
            times = {name: timer(call) for name, call in paths(problem, compiled).items()}
            num_tokens, size, clusters, num_experts, top_k = shape
            for name, us in times.items():
                experts = num_experts if name.startswith("full") else 0
                minimal = (
                    roofline.minimal_bytes(roofline.Variant(dtype, num_tokens, size, clusters, experts, top_k))
                    * num_tokens
                )
                row = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "path": name, "us": us}
                row |= {"ratio": us / times["softmax top-k, eager"], **checked}
                ours = not name.startswith("softmax")
                rows.append(row | {"minimal_gb_per_s": minimal / us / 1e3 if ours else None})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines; ratio is to the eager softmax gate."""
    lines = [f"{'N, D, C, E, k':28}{'dtype':10}{'path':26}{'µs':>9}{'ratio':>8}{'GB/s':>7}"]
    for row in rows:
        speed = "" if row["minimal_gb_per_s"] is None else f"{row['minimal_gb_per_s']:.0f}"
        shape = ", ".join(map(str, row["shape"]))
        lines.append(f"{shape:28}{row['dtype']:10}{row['path']:26}{row['us']:9.1f}{row['ratio']:8.2f}{speed:>7}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print, write; 0 also where there is no GPU to do it on."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_posterior.kernels.bench_gpu", description="Time routing on a GPU"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was checked or timed")
        return 0
    import triton

    rows = run("cuda", microseconds, torch.compile, SHAPES)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(f"{machine}\n{table(rows)}")
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine, "shapes": "N, D, C, E, k", "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
