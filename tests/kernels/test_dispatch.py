"""Which backend runs, and what a backend that cannot says."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_posterior import PosteriorGate
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.kernels import dispatch, reference
from moe_posterior.kernels.triton import operators

ROOT = Path(__file__).resolve().parents[2]
KNOBS = {"top_k": 2, "risk_aversion": 1.0, "temperature": 0.1}


def problem(generator):
    hidden, points = torch.randn(20, 6, generator=generator), torch.randn(4, 6, generator=generator)
    alpha, beta = torch.rand(2, 4, 5, generator=generator) + 1
    tables = (torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2, generator=generator), torch.rand(4, 2))
    return hidden, reference.prepare_centroids(points), alpha, beta, *tables


def fake_on_gpu(mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cuda:0"))


def problem_on_a_fake_gpu(mode: FakeTensorMode):
    fake = partial(fake_on_gpu, mode)
    centroids = reference.Centroids(fake(4, 6), fake(4, 6), fake(4))
    return fake(20, 6), centroids, fake(4, 5), fake(4, 5), fake(4, 2, dtype=torch.int64), fake(4, 2), fake(4, 2)


def test_auto_is_the_reference_on_a_cpu(generator) -> None:
    hidden, centroids, alpha, beta, *tables = problem(generator)
    for backend in ("auto", "eager"):
        actual = dispatch.route_by_table(hidden, centroids, *tables, backend=backend)
        assert torch.equal(actual[2], reference.route_by_table(hidden, centroids, *tables)[2])
        actual = dispatch.route(hidden, centroids, alpha.double(), beta.double(), **KNOBS, backend=backend)
        expected = reference.route(hidden, centroids.points, alpha.double(), beta.double(), **KNOBS)
        assert torch.equal(actual[1].expert_indices, expected[1].expert_indices)
        assert torch.equal(actual[2], expected[2])


@pytest.mark.skipif(not operators.TRITON_INSTALLED, reason="triton is not installed")
def test_triton_refuses_what_it_cannot_run(generator) -> None:
    hidden, centroids, alpha, beta, *tables = problem(generator)
    with pytest.raises(InvalidArgumentError, match="'triton' needs tensors on a GPU; got hidden on cpu"):
        dispatch.route_by_table(hidden, centroids, *tables, backend="triton")
    with pytest.raises(InvalidArgumentError, match="'triton' needs tensors on a GPU"):
        dispatch.route(hidden, centroids, alpha, beta, **KNOBS, backend="triton")


def test_an_unknown_backend_is_refused(generator) -> None:
    hidden, centroids, _, _, *tables = problem(generator)
    with pytest.raises(InvalidArgumentError, match=r"backend must be one of \['auto', 'eager', 'triton'\]; got 'cuda'"):
        dispatch.route_by_table(hidden, centroids, *tables, backend="cuda")


def test_without_triton_auto_falls_back_and_the_name_says_what_to_install(generator, monkeypatch) -> None:
    monkeypatch.setattr(operators, "TRITON_INSTALLED", False)
    hidden, centroids, _, _, *tables = problem(generator)
    assert len(dispatch.route_by_table(hidden, centroids, *tables)[2]) == 20
    with pytest.raises(MissingDependencyError, match=r"moe-posterior\[triton\]"):
        dispatch.route_by_table(hidden, centroids, *tables, backend="triton")


class OperatorLog(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def pretend_a_gpu(monkeypatch, *, major: int = 9, installed: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(operators, "TRITON_INSTALLED", installed)
    for name in ("route_by_table", "route", "route_prior"):  # without CUDA even fake tensors cannot be indexed on it
        monkeypatch.setattr(reference, name, lambda *arguments, **options: "eager")


def test_auto_on_a_gpu_is_one_operator(monkeypatch) -> None:
    pretend_a_gpu(monkeypatch)
    with FakeTensorMode() as mode:
        hidden, centroids, alpha, beta, *tables = problem_on_a_fake_gpu(mode)
        with OperatorLog() as log:
            by_table = dispatch.route_by_table(hidden, centroids, *tables)
            full = dispatch.route(hidden, centroids, alpha, beta, **KNOBS)
            draws = dispatch.route(hidden, centroids, alpha, beta, **KNOBS, seed=3)
            prior = dispatch.route_prior(hidden, centroids, fake_on_gpu(mode, 5, 6), alpha, top_k=2)
    launched = [name for name in log.names if name.startswith("moe_posterior")]
    assert launched == [f"moe_posterior.{name}.default" for name in ("route_by_table", "route", "route", "route_prior")]
    for assignment, selection, weights in (by_table, full, draws, prior):
        assert assignment.cluster_ids.shape == assignment.distance.shape == (20,)
        assert selection.expert_indices.shape == selection.scores.shape == weights.shape == (20, 2)
        assert selection.expert_indices.dtype == assignment.cluster_ids.dtype == torch.int64


@pytest.mark.parametrize(("major", "installed"), [(7, True), (9, False)])
def test_auto_on_a_gpu_falls_back_where_triton_does_not_run(monkeypatch, major, installed) -> None:
    pretend_a_gpu(monkeypatch, major=major, installed=installed)
    with FakeTensorMode() as mode:
        hidden, centroids, alpha, beta, *tables = problem_on_a_fake_gpu(mode)
        assert dispatch.route_by_table(hidden, centroids, *tables) == "eager"
        assert dispatch.route(hidden, centroids, alpha, beta, **KNOBS) == "eager"
        assert dispatch.route_prior(hidden, centroids, alpha, alpha, top_k=2) == "eager"


def test_float64_beliefs_are_never_routed_by_in_less_precision(monkeypatch) -> None:
    pretend_a_gpu(monkeypatch)
    with FakeTensorMode() as mode:
        hidden, centroids, alpha, beta, *_ = problem_on_a_fake_gpu(mode)
        assert dispatch.route(hidden, centroids, alpha.double(), beta.double(), **KNOBS) == "eager"
        with pytest.raises(InvalidArgumentError, match=r"alpha and beta of float32; got torch\.float64"):
            dispatch.route(hidden, centroids, alpha.double(), beta.double(), **KNOBS, backend="triton")
        with pytest.raises(InvalidArgumentError, match="top_k of at most 64; got 65"):
            dispatch.route(hidden, centroids, alpha, beta, **{**KNOBS, "top_k": 65}, backend="triton")


def test_importing_the_dispatcher_does_not_import_triton() -> None:
    code = "import sys; from moe_posterior.kernels import dispatch; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_gpu_benchmark_says_that_there_is_no_gpu(tmp_path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "moe_posterior.kernels.instruments.bench_gpu",
        "--json",
        str(tmp_path / "none.json"),
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "no GPU here: nothing was checked or timed\n"
    assert not (tmp_path / "none.json").exists()


# What makes the host wait for the device: values read on it, and shapes that depend on data.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero")
COPYING = ("_to_copy", "copy_")


class NoWaiting(OperatorLog):
    """Fails where the host would wait: a synchronising operator, a mask as an index, or data that leaves the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        masked = name.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        moved = name.startswith(COPYING) and leaves_the_gpu(args, kwargs or {})
        if name.startswith(WAITING) or masked or moved:
            raise AssertionError(f"the host waits in {function}")
        return super().__torch_dispatch__(function, types, args, kwargs)


def leaves_the_gpu(args, kwargs) -> bool:
    devices = {tensor.device.type for tensor in args if isinstance(tensor, torch.Tensor)}
    return "cuda" in devices and devices | {torch.device(kwargs.get("device") or "cuda").type} != {"cuda"}


def gate_on_a_fake_gpu(mode: FakeTensorMode) -> PosteriorGate:
    """Fitted and observed on the CPU, then moved as ``gate.to("cuda")`` would: every buffer in its place."""
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    gate = PosteriorGate(6, 5, num_clusters=4, top_k=2)
    gate.fit(data)
    gate.observe(gate(data), torch.ones(200, 5))
    for module in gate.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), torch.device("cuda:0"))
    return gate


def test_the_host_waits_for_the_gpu_nowhere_on_the_fast_paths(monkeypatch) -> None:
    mode = FakeTensorMode()
    gate = gate_on_a_fake_gpu(mode)
    pretend_a_gpu(monkeypatch)
    with mode:
        hidden, centroids, alpha, beta, *tables = problem_on_a_fake_gpu(mode)
        weight = fake_on_gpu(mode, 5, 6)
        with NoWaiting() as log:
            dispatch.route_by_table(hidden, centroids, *tables)
            dispatch.route(hidden, centroids, alpha, beta, **KNOBS)
            dispatch.route(hidden, centroids, alpha, beta, **KNOBS, seed=3)
            dispatch.route_prior(hidden, centroids, weight, alpha, top_k=2)
            assert gate(hidden).expert_indices.is_cuda
    assert log.names.count("moe_posterior.route_by_table.default") == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda hidden: bool(torch.isfinite(hidden).all()),
        lambda hidden: hidden.sum().item(),
        lambda hidden: hidden.nonzero(),
        lambda hidden: hidden[hidden > 0],
    ],
    ids=["truth", "item", "nonzero", "mask"],
)
def test_a_value_that_the_host_reads_would_be_seen(wait) -> None:
    with pytest.raises(AssertionError, match="the host waits in"), NoWaiting():
        wait(torch.ones(3, 2))


def test_data_that_leaves_the_gpu_would_be_seen() -> None:
    with FakeTensorMode() as mode, NoWaiting(), pytest.raises(AssertionError, match="the host waits in"):
        fake_on_gpu(mode, 3, 2).to("cpu")
