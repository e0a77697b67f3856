"""What the compilers say of the kernels, in a process where Triton is not interpreting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import aot

ROOT = Path(__file__).resolve().parents[2]
MATRIX_UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def compiled(target: str, folder: Path, *options: str) -> list[dict]:
    triton = pytest.importorskip("triton")
    backends = Path(triton.__file__).parent / "backends"
    needed = backends / ("amd" if target == "gfx942" else "nvidia/bin/cuobjdump")
    if not needed.exists():
        pytest.skip(f"this build of triton cannot compile for {target}: it has no {needed.name}")
    file = folder / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe_posterior.kernels.aot", "--targets", target, "--json", str(file), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return json.loads(file.read_text())["rows"]


def assert_sound(rows: list[dict], target: str) -> None:
    assert {row["spilled_bytes"] for row in rows} == {0}
    assert {row["launches"] for row in rows} == {1}
    assert {row["kernel"] for row in rows} == {"assign_and_gather", "assign_and_select"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    for row in rows:
        unit = "mma.sync" if row["num_clusters"] == 16 and target != "gfx942" else MATRIX_UNIT[target]
        assert any(name.startswith(unit) for name in row["matrix_instructions"]), row
        bfloat16 = any("bf16" in name for name in row["matrix_instructions"]) or "kind::f16" in str(row)
        assert bfloat16 == (row["dtype"] == "bfloat16"), row  # float32 tokens are never rounded to bfloat16
        assert row["token_reads"] == 2 or row["num_clusters"] > 128


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_the_largest_kernels_spill_nothing_and_use_the_matrix_units(target, tmp_path) -> None:
    rows = compiled(target, tmp_path, "--largest")
    assert len(rows) == 12
    assert max(row["num_clusters"] * row["num_experts"] for row in rows) == 512 * 1024
    assert_sound(rows, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_every_kernel_spills_nothing_and_uses_the_matrix_units(target, tmp_path) -> None:
    rows = compiled(target, tmp_path)
    assert len(rows) == len(list(aot.variants()))
    assert_sound(rows, target)


def test_minimal_bytes_count_each_tensor_once() -> None:
    variant = aot.Variant(torch.bfloat16, num_tokens=10, hidden_size=100, num_clusters=3, num_experts=0, top_k=2)
    inputs = 10 * 100 * 2 + 2 * 3 * 100 * 4 + 3 * 4 + 3 * 2 * (8 + 4 + 4)
    outputs = 10 * 8 + 10 * 4 + 10 * 2 * (8 + 4 + 4)
    assert aot.minimal_bytes(variant) * 10 == pytest.approx(inputs + outputs)


def test_requested_bytes_count_every_read_of_a_program() -> None:
    variant = aot.Variant(torch.float32, num_tokens=32, hidden_size=100, num_clusters=40, num_experts=5, top_k=2)
    reads = 4 * 32 * 100 * 4  # three tiles of clusters, and the distance
    centroids = 2 * 40 * (100 * 4 + 4) + 32 * 100 * 4
    belief, outputs = 32 * 5 * 8, 32 * (8 + 4) + 32 * 2 * (8 + 4 + 4)
    assert aot.requested_bytes(variant, 16, 16) * 32 == pytest.approx(reads + centroids + belief + outputs)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="target must be one of"):
        aot.compile_variant(next(aot.variants()), "sm_10")
