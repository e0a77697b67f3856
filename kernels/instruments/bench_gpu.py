"""Routing on one GPU: correctness first, then our time next to eager torch, torch.compile and the gate that it replaces.

    python -m moe_posterior.kernels.instruments.bench_gpu [--json FILE]

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token. Every path is captured in a CUDA graph, so that what
is timed is the device and not Python; each shape takes a few seconds. The GB/s are those of the minimal traffic, each input read once
and each output written once: the roofline's, not the memory controller's. Without a GPU it says so and exits with 0.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_posterior.errors import MoEPosteriorError
from moe_posterior.files.atomic import write_text
from moe_posterior.kernels import dispatch, reference, sampling
from moe_posterior.kernels.instruments import roofline

SHAPES = [(8192, 4096, 64, 64, 8), (16384, 2048, 128, 128, 8), (4096, 7168, 256, 256, 8), (1, 4096, 64, 64, 8)]
DTYPES = [torch.bfloat16, torch.float32]
KNOBS: dict[str, Any] = {"risk_aversion": 1.0, "temperature": 0.1}
SEED = 1  # of the draws
_NEAR_TIE = 1e-4  # of a token's similarity to its own centroid: below it, float32 itself cannot tell which is nearest
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
    gate: Tensor  # (E, D), of the softmax gate and of prior mode
    bias: Tensor  # (C, E) float32, of prior mode
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
    bias = -torch.rand(clusters, num_experts, generator=generator).to(device)
    return Problem(hidden, centroids, alpha, beta, tables, gate, bias, top_k)


def check(problem: Problem) -> dict[str, float]:
    """Check all kernels against the reference; they may differ only in near-ties and last digits.

    Raises:
        WrongAnswerError: a cluster that is not a near-tie, experts or weights that are not the cluster's, a distance off by more
            than 1e-4, a draw or a gate's choice that is not a near-tie of the reference's.
    """
    p = problem
    expected = reference.route_by_table(p.hidden, p.centroids, *p.tables)
    exact = p.hidden.double() @ p.centroids.directions.double().T - p.centroids.offsets.double()
    differing = 0.0
    answers = {name: call(p, "triton") for name, call in PATHS.items()}
    for name, (assignment, selection, weights) in answers.items():
        ids = assignment.cluster_ids
        own = torch.linalg.vector_norm(p.hidden.float() - p.centroids.points[ids], dim=1)
        failures = {
            "cluster": bool((_regret(exact, ids[:, None]) > _NEAR_TIE).any()),
            "distance": not torch.allclose(assignment.distance, own, rtol=1e-4),
        }
        if name in ("table", "full"):
            failures["experts"] = not torch.equal(selection.expert_indices, p.tables[0][ids])
            failures["weights"] = not torch.allclose(weights, p.tables[1][ids], rtol=1e-4, atol=1e-6)
        else:
            failures |= _failures_of_choice(
                _scores(p, name, ids), selection, weights, KNOBS["temperature"] if name == "draws" else 1.0
            )
        if any(failures.values()):
            wrong = [what for what, failed in failures.items() if failed]
            raise WrongAnswerError(
                f"the {name} kernel differs from the reference in {wrong} at {tuple(p.hidden.shape)}"
            )
        differing = max(differing, float((ids != expected[0].cluster_ids).float().mean()))
    return {"differing_near_ties": differing}


def _scores(problem: Problem, name: str, ids: Tensor) -> Tensor:  # (N, E)
    p = problem
    if name == "draws":
        return sampling.beta_draws(p.alpha[ids], p.beta[ids], SEED).double()
    return p.hidden.double() @ p.gate.double().T + p.bias.double()[ids]


def _regret(scores: Tensor, chosen: Tensor) -> Tensor:  # (N, M), (N, k) -> (N, k)
    """How far each choice lies below the one that belongs in its place, relative to the latter."""
    best = scores.topk(chosen.shape[1], dim=1).values
    return (best - scores.gather(1, chosen)).abs() / best.abs().clamp(min=1.0)


def _failures_of_choice(
    scores: Tensor, selection: reference.Selection, weights: Tensor, temperature: float
) -> dict[str, bool]:
    own = scores.gather(1, selection.expert_indices)
    expected = reference.weigh(selection.scores, temperature)
    return {
        "experts": bool((_regret(scores, selection.expert_indices) > _NEAR_TIE).any()),
        "scores": not torch.allclose(selection.scores.double(), own, rtol=_NEAR_TIE, atol=1e-3),
        "weights": not torch.allclose(weights, expected, rtol=1e-4, atol=1e-6),
    }


def by_table(problem: Problem, backend: dispatch.Backend) -> Any:
    """The table path."""
    return dispatch.route_by_table(problem.hidden, problem.centroids, *problem.tables, backend=backend)


def full_path(problem: Problem, backend: dispatch.Backend) -> Any:
    """The full path."""
    p = problem
    return dispatch.route(p.hidden, p.centroids, p.alpha, p.beta, top_k=p.top_k, **KNOBS, backend=backend)


def draws(problem: Problem, backend: dispatch.Backend) -> Any:
    """The full path by Thompson draws."""
    p = problem
    return dispatch.route(p.hidden, p.centroids, p.alpha, p.beta, top_k=p.top_k, **KNOBS, seed=SEED, backend=backend)


def prior_mode(problem: Problem, backend: dispatch.Backend) -> Any:
    """A learned gate and the evidence's bias."""
    p = problem
    return dispatch.route_prior(p.hidden, p.centroids, p.gate, p.bias, top_k=p.top_k, backend=backend)


PATHS: dict[str, Callable[[Problem, dispatch.Backend], Any]] = {
    "table": by_table,
    "full": full_path,
    "draws": draws,
    "prior": prior_mode,
}


def softmax_gate(problem: Problem) -> tuple[Tensor, Tensor]:
    """What is replaced: Linear, softmax, top-k."""
    probabilities = torch.softmax(torch.nn.functional.linear(problem.hidden, problem.gate).float(), dim=-1)
    weights, experts = probabilities.topk(problem.top_k, dim=-1)
    return experts, weights


def paths(problem: Problem, compiled: Callable[[Call], Call]) -> dict[str, Call]:
    """What is timed."""
    ours = {name: partial(path, problem, "triton") for name, path in PATHS.items()}
    eager: dict[str, Call] = {name: partial(path, problem, "eager") for name, path in PATHS.items()}
    eager["softmax top-k"] = partial(softmax_gate, problem)
    calls: dict[str, Call] = {f"{name}, triton": call for name, call in ours.items()}
    calls |= {f"{name}, eager": call for name, call in eager.items()}
    return calls | {f"{name}, compiled": compiled(call) for name, call in eager.items()}


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
    """One row per shape, dtype and path; a wrong answer stops the run."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in DTYPES:
            problem = make_problem(shape, dtype, device)
            checked = check(problem)
            times = {name: timer(call) for name, call in paths(problem, compiled).items()}
            num_tokens, size, clusters, num_experts, top_k = shape
            for name, us in times.items():
                sizes = (num_tokens, size, clusters, 0 if name.startswith("table") else num_experts, top_k)
                variant = roofline.Variant(dtype, *sizes, prior=name.startswith("prior"))
                minimal = roofline.minimal_bytes(variant) * num_tokens
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
    """Check, time, print, write; returns 0 also without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_posterior.kernels.instruments.bench_gpu", description="Time routing on a GPU"
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
        write_text(
            given.json, json.dumps({"machine": machine, "shapes": "N, D, C, E, k", "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
