"""Bytes and operations of a routing, and the least time they take on an H100: a model, not a measurement.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.

    python -m moe_posterior.kernels.instruments.roofline          # the table of kernels/README.md
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SHAPES = [(8192, 4096, 64, 64, 8), (16384, 2048, 128, 128, 8), (4096, 7168, 256, 256, 8)]  # N, D, C, E, k
MEMORY_BYTES_PER_US = 3.35e6
CACHE_BYTES_PER_US = 5.5e6  # between the second-level cache and the multiprocessors; assumed
CACHE_BYTES = 50e6
FLOPS_PER_US = {torch.bfloat16: 990e6, torch.float32: 495e6}
# Matrix-unit products for one product of the model: three parts of a direction; one for a gate's weight, or three with TF32.
PARTS = 3


@dataclass(frozen=True)
class Variant:
    """Sizes that lead to one compiled kernel; E = 0 stands for kernel 1, which knows no experts."""

    dtype: torch.dtype
    num_tokens: int
    hidden_size: int
    num_clusters: int
    num_experts: int
    top_k: int = 8
    radius: bool = False
    prior: bool = False
    masked: bool = False
    draws: bool = False

    @property
    def kernel(self) -> str:
        if self.prior:
            return "assign_and_add"
        return "assign_and_select" if self.num_experts else "assign_and_gather"


def minimal_bytes(variant: Variant) -> float:
    """Per token, without a second pass: each input read once per launch, each output written once."""
    used = min(variant.num_tokens, variant.num_clusters)
    once = _centroid_bytes(variant) + used * _row_bytes(variant) + _gate_bytes(variant)
    return token_bytes(variant) + output_bytes(variant) + once / variant.num_tokens


def resident_bytes(variant: Variant) -> int:
    """What every program reads and the second-level cache should hold: directions, tables or belief, gate weights."""
    return _centroid_bytes(variant) + variant.num_clusters * _row_bytes(variant) + _gate_bytes(variant)


def requested_bytes(variant: Variant, tiles: dict[str, int]) -> float:
    """Bytes per token that programs request from the caches, without a second pass.

    A program reads all directions and gate weights, a token once per tile of clusters and of the gate's experts, and a row of the
    tables or of the belief for each token. For the centroids' mean it reads a point and its direction, each twice: the compiler wants
    them in two layouts.
    """
    shared = _centroid_bytes(variant) + 3 * 4 * variant.hidden_size + _gate_bytes(variant)
    rows = min(tiles["BLOCK_N"], variant.num_tokens)
    own = token_reads(variant, tiles) * token_bytes(variant) + _row_bytes(variant) + output_bytes(variant)
    return own + shared / rows


def token_reads(variant: Variant, tiles: dict[str, int]) -> int:
    """How often a program reads its tokens, without a second pass."""
    again = -(-variant.num_experts // tiles["BLOCK_E"]) if variant.prior else 0
    return -(-variant.num_clusters // tiles["BLOCK_C"]) + again


def token_bytes(variant: Variant) -> int:
    return variant.hidden_size * variant.dtype.itemsize


def output_bytes(variant: Variant) -> int:
    return 8 + 4 + 16 * variant.top_k


def _centroid_bytes(variant: Variant) -> int:
    """Directions, offsets, and the one point that with its direction gives the mean."""
    return variant.num_clusters * (4 * variant.hidden_size + 4) + 4 * variant.hidden_size


def _row_bytes(variant: Variant) -> int:
    if variant.prior:
        return 4 * variant.num_experts
    return 8 * variant.num_experts if variant.num_experts else 16 * variant.top_k


def _gate_bytes(variant: Variant) -> int:
    return variant.num_experts * token_bytes(variant) if variant.prior else 0


def flops(variant: Variant) -> float:
    """Of one launch, on the matrix units."""
    gate_parts = 0 if not variant.prior else 1 if variant.dtype.itemsize == 2 else PARTS
    columns = PARTS * variant.num_clusters + gate_parts * variant.num_experts
    return 2.0 * variant.num_tokens * variant.hidden_size * columns


def rows() -> Iterator[tuple[str, ...]]:
    """Shape, dtype, path; then least megabytes, gigaflops and requested megabytes, each with its microseconds."""
    from moe_posterior.kernels.triton import launch

    for dtype in FLOPS_PER_US:
        for n, d, c, e, k in SHAPES:
            paths = {
                "table": Variant(dtype, n, d, c, 0, k),
                "full": Variant(dtype, n, d, c, e, k),
                "prior": Variant(dtype, n, d, c, e, k, prior=True),
            }
            shape, name = f"{n}, {d}, {c}, {e}, {k}", str(dtype).removeprefix("torch.")
            for path, variant in paths.items():
                tiles = launch.tiles(n, c, dtype, amd=False, prior=variant.prior) | launch.expert_tile(k, e)
                least, asked = minimal_bytes(variant) * n, requested_bytes(variant, tiles) * n
                cells = [*_cells(least, MEMORY_BYTES_PER_US), *_flop_cells(flops(variant), dtype)]
                yield (shape, name, path, *cells, *_cells(asked, CACHE_BYTES_PER_US))
                shape = name = ""
            least = n * (d * dtype.itemsize + 12 * k) + e * d * dtype.itemsize
            parts = 1 if dtype.itemsize == 2 else PARTS
            cells = [*_cells(least, MEMORY_BYTES_PER_US), *_flop_cells(2.0 * n * d * e * parts, dtype)]
            yield ("", "", "softmax gate", *cells, "", "")


def _cells(amount: float, per_us: float) -> tuple[str, str]:
    return f"{amount / 1e6:.1f}", f"{amount / per_us:.0f}"


def _flop_cells(amount: float, dtype: torch.dtype) -> tuple[str, str]:
    return f"{amount / 1e9:.1f}", f"{amount / FLOPS_PER_US[dtype]:.0f}"


def markdown() -> str:
    """The table of the README."""
    head = ("N, D, C, E, k", "tokens", "path", "least, MB", "µs", "GFLOP", "µs", "requested, MB", "µs")
    rule = ("---", "---", "---", *["--:"] * 6)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows()))


if __name__ == "__main__":
    print(markdown())
