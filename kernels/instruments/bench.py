"""``python -m moe_posterior.kernels.instruments.bench``: what the gate costs on a CPU, as ratios of medians measured in one run.

Dimensions: B tokens, D hidden size, C clusters, E experts, k experts per token.

Before a case is timed its result is checked against the reference; a case that fails the check raises.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moe_posterior.clustering import Clusterer
from moe_posterior.files.atomic import write_text
from moe_posterior.gates import SoftmaxGate
from moe_posterior.kernels import cpu, reference
from moe_posterior.kernels.instruments import bench_layers
from moe_posterior.kernels.instruments.bench_common import TOP_K, posterior_gate, record

GATE_BATCHES = (1, 64, 4096)
HIDDEN, EXPERTS = 1024, 64


def main(arguments: list[str] | None = None) -> int:
    """Run every case, print a table, and write the records if requested."""
    parser = argparse.ArgumentParser(
        "python -m moe_posterior.kernels.instruments.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default %(default)s)"
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    records = []
    print(f"{'case':<36}{'path':<30}{'B':>6}{'C':>6}{'E':>6}{'ratio':>8}{'ours':>10}{'other':>10}")
    for found in cases():
        records.append(found)
        sizes = "".join(f"{found[name]:>6}" for name in ("batch", "clusters", "experts"))
        print(f"{found['case']:<36}{found['path']:<30}{sizes}{_figures(found)}", flush=True)
    if asked.json:
        about = {
            "torch": torch.__version__,
            "threads": asked.threads,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        }
        write_text(asked.json, json.dumps({"about": about, "records": records}, indent=1) + "\n")
    return 0


def _figures(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"  {found['skipped']}"
    unit = "ms" if "ours_ms" in found else "mib"
    equal = f"  {found['equal']:.4f} equal" if "equal" in found else ""
    return f"{found['ratio']:>8.3f}{found['ours_' + unit]:>10.4f}{found['other_' + unit]:>10.4f} {unit}{equal}"


def cases() -> Iterator[dict[str, Any]]:
    """Every case, checked and timed."""
    for clusters in (EXPERTS, 2 * EXPERTS):
        for batch in GATE_BATCHES:
            yield gate_case(batch, HIDDEN, clusters, EXPERTS)
        for low_precision in (False, True):
            yield assign_case(4096, HIDDEN, clusters, EXPERTS, low_precision)
    yield gate_case(1, 384, 64, 32)
    yield gate_case(4096, HIDDEN, 512, 1000)
    yield from levels_cases(4096, HIDDEN, 512)
    yield from bench_layers.cases()


def gate_case(batch: int, hidden_size: int, clusters: int, experts: int) -> dict[str, Any]:
    """The table path against the softmax top-k gate."""
    generator = torch.Generator().manual_seed(0)
    posterior, hidden = posterior_gate(batch, hidden_size, clusters, experts, generator)
    softmax = SoftmaxGate(hidden_size, experts, TOP_K)
    routing = posterior(hidden)
    expected = reference.assign(hidden, posterior.clusterer.prepared)
    if not torch.equal(routing.cluster_ids, expected.cluster_ids):
        raise AssertionError("the gate's clusters are not the reference's")
    with torch.inference_mode():
        return record(
            "gate / softmax gate", "table", batch, clusters, experts, lambda: posterior(hidden), lambda: softmax(hidden)
        )


def assign_case(batch: int, hidden_size: int, clusters: int, experts: int, low_precision: bool) -> dict[str, Any]:
    """The CPU assignment alone, with and without bfloat16, against the softmax top-k gate."""
    posterior, hidden = posterior_gate(batch, hidden_size, clusters, experts, torch.Generator().manual_seed(0))
    softmax, centroids = SoftmaxGate(hidden_size, experts, TOP_K), posterior.clusterer.prepared

    def ours() -> reference.Assignment:
        return cpu.assign(hidden, centroids, low_precision=low_precision)

    if not torch.equal(ours().cluster_ids, reference.assign(hidden, centroids).cluster_ids):
        raise AssertionError("the clusters are not the reference's")
    path = "bfloat16, checked" if low_precision else "float32"
    with torch.inference_mode():
        return record("assign / softmax gate", path, batch, clusters, experts, ours, lambda: softmax(hidden))


def levels_cases(batch: int, hidden_size: int, clusters: int) -> Iterator[dict[str, Any]]:
    """Two levels against both flat assignments: in float32, and by checked bfloat16, which is what users get.

    Tokens lie around unstructured random centroids, closely (spread 0.5 of the centroids' own) and less so, or among each other
    (1, 2). Two levels are approximate, so the share of equal clusters is given with the ratio.
    """
    for spread in (0.5, 1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(clusters, hidden_size, generator=generator)
        hidden = points[torch.randint(clusters, (batch,), generator=generator)]
        hidden = hidden + spread * torch.randn(batch, hidden_size, generator=generator)
        two = Clusterer(clusters, hidden_size, levels=2).set_centroids(points).prepared
        flat = two._replace(levels=None)
        equal = (cpu.assign(hidden, two).cluster_ids == reference.assign(hidden, flat).cluster_ids).double().mean()
        for name, low_precision in (("float32", False), ("checked bfloat16", True)):
            with torch.inference_mode():
                found = record(
                    f"two levels / flat {name}",
                    f"spread {spread}",
                    batch,
                    clusters,
                    clusters,
                    partial(cpu.assign, hidden, two),
                    partial(cpu.assign, hidden, flat, low_precision=low_precision),
                )
            yield {**found, "equal": float(equal)}


if __name__ == "__main__":
    raise SystemExit(main())
