"""Compile every kernel variant ahead of time, without a GPU, and report what the compilers made of it.

Dimensions: N tokens, D hidden size, C clusters, E experts, k experts per token.

    python -m moe_posterior.kernels.instruments.aot [--json FILE] [--targets sm_90 …] [--largest]

A variant is a kernel, a dtype and the tiles that ``triton/launch.py`` picks for some sizes. Registers, stack and shared memory are
read from the machine code (``cuobjdump`` of Triton's own wheel, the metadata of the AMD object), matrix instructions from the
assembly. Bytes are counted in the PTX, see ``traffic.py``, for tokens that need no second pass; for AMD, whose assembly is not read,
they are those of ``roofline.py``.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.files.atomic import write_text
from moe_posterior.kernels.instruments import roofline, traffic
from moe_posterior.kernels.instruments.roofline import Variant

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_LONG = {"topk_indices", "cluster_ids", "expert_indices"}
_OUTPUTS = {"distances", "cluster_ids", "expert_indices", "routing_weights", "scores"}
_GATHERED = {"radius", "topk_indices", "topk_weights", "topk_scores", "alpha", "beta", "evidence_bias"}
_MATRIX = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)[\w.:]*")


@dataclass(frozen=True)
class Report:
    """One row of the table; bytes of memory are per token, of registers per thread."""

    target: str
    kernel: str
    dtype: str
    num_tokens: int
    hidden_size: int
    num_clusters: int
    num_experts: int
    top_k: int
    radius: bool
    draws: bool
    tiles: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: list[str]
    launches: int
    token_reads: int
    minimal_bytes: float
    requested_bytes: float  # by the model
    counted_bytes: float | None  # by the PTX
    memory_ratio: float  # to the minimum: tokens and outputs as often as requested, all else once per launch
    requested_ratio: float  # to the minimum: everything as often as requested
    resident_bytes: int  # assumed to stay in the second-level cache, if read once per launch


def variants() -> Iterator[Variant]:
    """All combinations of dtype, tiles and kernel, the full path up to C = 512, E = 1024.

    D is an argument of the kernels, not a constant; here it is small, so that counting their bytes is quick.
    """
    for dtype in _POINTERS:
        for num_tokens in (1, 4096, 8192):
            for num_clusters in (16, 64, 256, 512):
                yield Variant(dtype, num_tokens, 1024, num_clusters, 0)
                yield Variant(dtype, num_tokens, 1024, num_clusters, 1024)
        for num_clusters in (16, 64, 256, 512):
            yield Variant(dtype, 8192, 1024, num_clusters, 1024, masked=True, draws=True)
            yield Variant(dtype, 8192, 1024, num_clusters, 1024, masked=True, prior=True)
        yield Variant(dtype, 8192, 1024, 64, 0, radius=True)
        yield Variant(dtype, 8192, 1024, 64, 64, radius=True)


def largest() -> Iterator[Variant]:
    """For every dtype and kernel the variants with the most tokens and clusters; for kernel 1 those that read a token once.

    Draws, which are slow to compile and do not touch tokens, in bfloat16 only.
    """
    for v in variants():
        most = v.num_clusters == 512 if v.num_experts else v.num_clusters in (64, 256)
        if v.num_tokens == 8192 and most and not v.radius and not (v.draws and v.dtype != torch.bfloat16):
            yield v


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile one kernel for one target and read what came out.

    Raises:
        InvalidArgumentError: the target is unknown. MissingDependencyError: Triton is not installed.
    """
    if target not in TARGETS:
        raise InvalidArgumentError(f"target must be one of {list(TARGETS)}; got {target!r}")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise MissingDependencyError("triton", "triton") from error
    from moe_posterior.kernels.triton import launch, routing

    amd = TARGETS[target][0] == "hip"
    kernel: Any = getattr(routing, variant.kernel)
    tiles = launch.tiles(variant.num_tokens, variant.num_clusters, variant.dtype, amd=amd, prior=variant.prior)
    constants: dict[str, Any] = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    k, num_experts = variant.top_k, variant.num_experts
    constants |= launch.expert_tile(k, num_experts, draws=variant.draws) if num_experts else launch.table_tile(k)
    constants |= {"HAS_RADIUS": variant.radius, "DOT": launch.precision(variant.dtype, amd=amd)}
    constants |= {"HAS_ACTIVE": variant.masked, "HAS_BIAS": variant.masked, "DRAWS": variant.draws}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _type_of(name, variant.dtype, constants) for name in kernel.arg_names}
    # The launcher specialises on the same facts: torch aligns its tensors, and hidden sizes are multiples of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in ("D", "stride_n")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {name: tiles[name] for name in ("num_warps", "num_stages")} | launch.compiler_options(amd=amd)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    names = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    counted = None if amd else count_bytes(assembly, names, variant, tiles)
    minimum, requested = roofline.minimal_bytes(variant), roofline.requested_bytes(variant, constants)
    registers, spilled = _resources_amd(assembly) if amd else _resources_nvidia(compiled.asm["cubin"])
    return Report(
        target,
        variant.kernel,
        str(variant.dtype).removeprefix("torch."),
        *(variant.num_tokens, variant.hidden_size, variant.num_clusters, num_experts, k, variant.radius, variant.draws),
        tiles=tiles,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sorted(set(_MATRIX.findall(assembly))),
        launches=len(re.findall(r"\.amdhsa_kernel|\.visible \.entry", assembly)),
        token_reads=roofline.token_reads(variant, constants),
        minimal_bytes=minimum,
        requested_bytes=requested,
        counted_bytes=sum(counted.values()) if counted else None,
        memory_ratio=memory_bytes(variant, constants, counted) / minimum,
        requested_ratio=(sum(counted.values()) if counted else requested) / minimum,
        resident_bytes=roofline.resident_bytes(variant),
    )


def count_bytes(ptx: str, names: list[str], variant: Variant, tiles: dict[str, int]) -> dict[str, float]:
    """Bytes per token that the compiled code asks for, by parameter."""
    sizes = {"N": variant.num_tokens, "C": variant.num_clusters, "D": variant.hidden_size, "E": variant.num_experts}
    values = sizes | {"stride_n": variant.hidden_size, "risk_aversion": 0, "temperature": 0, "seed": 0}
    arguments = {i: values[name] for i, name in enumerate(names) if name in values}
    found = traffic.walk(ptx, arguments, 32 * tiles["num_warps"])
    tokens = min(variant.num_tokens, tiles["BLOCK_N"])
    # A walk without data puts every token in cluster 0, so the rows that it gathers must not be merged.
    amounts = {names[i]: access.by_thread if names[i] in _GATHERED else access.merged for i, access in found.items()}
    return {name: amount / tokens for name, amount in amounts.items()}


def memory_bytes(variant: Variant, tiles: dict[str, int], counted: dict[str, float] | None) -> float:
    """Bytes per token to and from memory: tokens and outputs as often as the code asks, all else once per launch."""
    if counted is None:
        streamed: float = roofline.token_reads(variant, tiles) * roofline.token_bytes(variant) + roofline.output_bytes(
            variant
        )
    else:
        streamed = counted["hidden"] + sum(counted.get(name, 0.0) for name in _OUTPUTS)
    once = roofline.minimal_bytes(variant) - roofline.token_bytes(variant) - roofline.output_bytes(variant)
    return streamed + once


def _type_of(name: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("hidden", "gate_weight"):
        return _POINTERS[dtype]
    if name == "active":
        return "*i1"
    if name == "seed":
        return "i64"
    if name in _LONG:
        return "*i64"
    if name in ("risk_aversion", "temperature"):
        return "fp32"
    return "i32" if name in ("N", "C", "D", "E", "stride_n") else "*fp32"


def _resources_nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers a thread; stack and local memory in bytes, which is where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _resources_amd(assembly: str) -> tuple[int, int]:
    """Vector registers a thread; its private memory in bytes. Scalar spills go to vector registers and cost no memory."""
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return found["vgpr_count"], found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]


def table(reports: list[Report]) -> str:
    """The reports as lines of fixed columns; memory and requested are ratios to the minimum."""
    head = ["target", "kernel", "dtype", "N", "C", "E", "registers", "spilled B", "shared B", "token reads"]
    head += ["B/token", "minimum", "memory", "requested", "launches", "matrix instruction"]
    rows = [head]
    for r in reports:
        sizes = [str(r.num_tokens), str(r.num_clusters) + "+1" * r.radius, str(r.num_experts or "-")]
        counts = [str(n) for n in (r.registers, r.spilled_bytes, r.shared_bytes, r.token_reads)]
        asked = r.requested_bytes if r.counted_bytes is None else r.counted_bytes
        ratios = [f"{r.memory_ratio:.3f}", f"{r.requested_ratio:.2f}"]
        matrix = " ".join(r.matrix_instructions) or "none"
        moved = [f"{asked:.0f}", f"{r.minimal_bytes:.0f}", *ratios, str(r.launches)]
        rows.append([r.target, r.kernel + ", draws" * r.draws, r.dtype, *sizes, *counts, *moved, matrix])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Compile everything, print the table; 1 if anything spills."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_posterior.kernels.instruments.aot", description="Compile all kernels"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--largest", action="store_true", help="only the kernels that need the most registers")
    given = parser.parse_args(arguments)
    chosen = list(largest() if given.largest else variants())
    reports = [compile_variant(variant, target) for target in given.targets for variant in chosen]
    print(table(reports))
    if given.json:
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write_text(
            given.json, json.dumps({"versions": versions, "rows": [asdict(r) for r in reports]}, indent=1) + "\n"
        )
    spilling = [r for r in reports if r.spilled_bytes]
    print(f"{len(reports)} kernels, {len(spilling)} of them spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
