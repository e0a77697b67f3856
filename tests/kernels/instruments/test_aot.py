"""What the compilers say of the kernels, in a process where Triton is not interpreting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels.instruments import aot, roofline, traffic

ROOT = Path(__file__).resolve().parents[3]
MATRIX_UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def compiled(target: str, folder: Path, *options: str) -> list[dict]:
    triton = pytest.importorskip("triton")
    backends = Path(triton.__file__).parent / "backends"
    needed = backends / ("amd" if target == "gfx942" else "nvidia/bin/cuobjdump")
    if not needed.exists():
        pytest.skip(f"this build of triton cannot compile for {target}: it has no {needed.name}")
    file = folder / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "moe_posterior.kernels.instruments.aot",
        "--targets",
        target,
        "--json",
        str(file),
        *options,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return json.loads(file.read_text())["rows"]


def assert_sound(rows: list[dict], target: str) -> None:
    assert {row["spilled_bytes"] for row in rows} == {0}
    assert {row["launches"] for row in rows} == {1}
    assert {row["kernel"] for row in rows} == {"assign_and_gather", "assign_and_select", "assign_and_add"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    for row in rows:
        unit = "mma.sync" if row["num_clusters"] == 16 and target != "gfx942" else MATRIX_UNIT[target]
        assert any(name.startswith(unit) for name in row["matrix_instructions"]), row
        # Tokens are never rounded: 16 bits meet the float32 directions as they are, or a gate's weights of their own dtype.
        narrow = any("f16" in name for name in row["matrix_instructions"])
        of_gate = row["dtype"] == "float16" and row["kernel"] == "assign_and_add"
        assert narrow == (row["dtype"] == "bfloat16" or of_gate), row
        assert row["resident_bytes"] < 50e6, row
        if row["num_clusters"] <= 256 and row["kernel"] == "assign_and_gather":
            assert row["token_reads"] == 1, row
            assert 1.0 <= row["memory_ratio"] <= 1.1, row
        if target != "gfx942":
            assert row["counted_bytes"] == pytest.approx(row["requested_bytes"], rel=0.05), row


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_the_largest_kernels_spill_nothing_and_use_the_matrix_units(target, tmp_path) -> None:
    rows = compiled(target, tmp_path, "--largest")
    assert len(rows) == 13
    assert max(row["num_clusters"] * row["num_experts"] for row in rows) == 512 * 1024
    assert_sound(rows, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_every_kernel_spills_nothing_and_uses_the_matrix_units(target, tmp_path) -> None:
    rows = compiled(target, tmp_path)
    assert len(rows) == len(list(aot.variants()))
    assert_sound(rows, target)


def test_minimal_bytes_count_each_tensor_once() -> None:
    variant = roofline.Variant(torch.bfloat16, num_tokens=10, hidden_size=100, num_clusters=3, num_experts=0, top_k=2)
    inputs = 10 * 100 * 2 + (3 + 1) * 100 * 4 + 3 * 4 + 3 * 2 * (8 + 4 + 4)
    outputs = 10 * 8 + 10 * 4 + 10 * 2 * (8 + 4 + 4)
    assert roofline.minimal_bytes(variant) * 10 == pytest.approx(inputs + outputs)
    assert roofline.resident_bytes(variant) == inputs - 10 * 100 * 2


def test_requested_bytes_count_every_read_of_a_program() -> None:
    variant = roofline.Variant(torch.float32, num_tokens=32, hidden_size=100, num_clusters=40, num_experts=5, top_k=2)
    reads = 3 * 32 * 100 * 4  # three tiles of clusters
    centroids = 2 * (40 * (100 * 4 + 4) + 2 * 2 * 100 * 4)
    belief, outputs = 32 * 5 * 8, 32 * (8 + 4) + 32 * 2 * (8 + 4 + 4)
    asked = roofline.requested_bytes(variant, {"BLOCK_N": 16, "BLOCK_C": 16}) * 32
    assert asked == pytest.approx(reads + centroids + belief + outputs)


WALKED = """
.visible .entry copy(.param .u64 copy_param_0, .param .u64 copy_param_1, .param .u32 copy_param_2)
    ld.param.b64 %rd1, [copy_param_0];
    ld.param.b64 %rd2, [copy_param_1];
    ld.param.b32 %r1, [copy_param_2];
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 4;
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd4, %rd1, %rd3;
    mov.b64 {%r10, %r11}, %rd2;
    mov.b64 %rd6, {%r10, %r11};
    add.s64 %rd5, %rd6, 4;
    setp.lt.s32 %p1, %r2, 5;
    mov.b32 %r4, 0;
$L__BB0_1:
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4];
    @%p1 ld.global.b32 %r9, [%rd5+8];
    add.s32 %r4, %r4, 1;
    setp.lt.s32 %p2, %r4, %r1;
    @%p2 bra $L__BB0_1;
    setp.gt.s32 %p3, %r9, 0;
    @%p3 st.global.b64 [%rd5], %rd4;
    ret;
"""


def test_a_walk_counts_widths_threads_masks_and_turns() -> None:
    found = traffic.walk(WALKED, {2: 3}, 8)
    assert found[0] == traffic.Access(merged=3 * 8 * 16, by_thread=3 * 8 * 16)
    assert found[1] == traffic.Access(merged=3 * 4, by_thread=3 * 5 * 4)


@pytest.mark.parametrize("statement", ["mul.hi.s32 %r2, %r3, %r3;", "@%p1 bra $L__BB0_1;"])
def test_a_walk_refuses_what_it_cannot_follow(statement) -> None:
    with pytest.raises(traffic.UnreadableCodeError):
        traffic.walk(WALKED.replace("ret;", statement), {2: 3}, 8)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="target must be one of"):
        aot.compile_variant(next(iter(aot.variants())), "sm_10")
