"""One search for every gate: n random configurations on validation seeds that no report uses."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_posterior.benchmarks.routing.measures import debiased_calibration_error
from moe_posterior.benchmarks.routing.registry import GATES, build, options_of
from moe_posterior.benchmarks.routing.stream import play
from moe_posterior.benchmarks.routing.suite import environment_of
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.files.atomic import write_text
from moe_posterior.files.reading import decoding, read_json

FIRST_SEED = 1000  # validation seeds start here; reports use 0, 1, 2 …
BENCHMARKS = ("a", "b", "c")


def candidates(gate: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The defaults, then ``count - 1`` random draws from the gate's search space; only the defaults if there is none."""
    yield options_of(gate, tuned={})
    space = GATES[gate].space
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count - 1 if space else 0):
        drawn = {
            name: values[int(torch.randint(len(values), (), generator=generator))] for name, values in space.items()
        }
        yield options_of(gate, drawn, tuned={})


def objective(gate: str, options: Mapping[str, Any], environment: str, seeds: Sequence[int], queries: int) -> float:
    """Mean true success minus debiased ECE (if the gate estimates success), averaged over benchmarks A, B and C.

    One setting serves all three, since nobody knows which case will come; the paper claims both low error and low ECE.
    """
    total, runs = 0.0, 0
    for benchmark in BENCHMARKS:
        for seed in seeds:
            played = environment_of(benchmark, environment, seed, 16, queries)
            trace = play(build(gate, played, options, seed), played)
            total += float(trace.expected.mean())
            if GATES[gate].foretells:
                total -= debiased_calibration_error(trace.confidence, trace.outcome)
            runs += 1
    return total / runs


def tune(
    gates: Sequence[str],
    count: int,
    *,
    environment: str = "synthetic",
    num_seeds: int = 3,
    queries: int = 1000,
    report: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Search every gate with the same budget.

    Args:
        gates: names from the registry.
        count: configurations per gate, including the defaults.
        environment, num_seeds, queries: what each is evaluated on, in each of benchmarks A, B and C.
        report: called after each configuration with the gate and its objective.

    Returns:
        ``{"knobs": {gate: options}, "objective": {gate: value}, "count": …, "seeds": […]}``.
    """
    if count < 1:
        raise InvalidArgumentError(f"--tune must be at least 1; got {count}")
    seeds = list(range(FIRST_SEED, FIRST_SEED + num_seeds))
    knobs, reached = {}, {}
    for gate in gates:
        best: tuple[float, dict[str, Any]] = (-2.0, {})
        for options in candidates(gate, count):
            value = objective(gate, options, environment, seeds, queries)
            best = max(best, (value, options), key=lambda pair: pair[0])
            if report is not None:
                report(gate, value)
        reached[gate], knobs[gate] = best
    return {"knobs": knobs, "objective": reached, "count": count, "seeds": seeds}


def write_knobs(found: Mapping[str, Any], path: str | os.PathLike[str], environment: str = "synthetic") -> None:
    """Store what :func:`tune` found on an environment; entries of other environments and gates stay."""
    path = Path(path)
    merged = read_json(path) if path.exists() else {}
    with decoding(path, "a file of knobs", "move it away, or name another with --knobs"):
        old = merged.get(environment, {"knobs": {}, "objective": {}})
        merged[environment] = {**old, **found} | {name: {**old[name], **found[name]} for name in ("knobs", "objective")}
    write_text(path, json.dumps(merged, indent=1) + "\n")
