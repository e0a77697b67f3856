"""Layers as whole graphs: torch.compile without a break, torch.export for any number of tokens, and what neither can hold."""

import copy
from collections.abc import Callable

import pytest
import torch
from contracts import DRAWN_PER_BATCH, GATES, HIDDEN_SIZE, NUM_EXPERTS, data, fitted
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, MixtureOfExperts, PosteriorMoE, record
from moe_posterior.experts import ExpertsFFN

D, E = 16, 4
EXPERTS: dict[str, Callable[[], nn.ModuleList | ExpertsFFN]] = {
    "modules": lambda: nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D)) for _ in range(E)),
    "stacked": lambda: ExpertsFFN(E, D, 32),
    "grouped": lambda: ExpertsFFN(E, D, 32, implementation="grouped_mm").bfloat16(),
}


def model(kind: str) -> nn.Sequential:
    """A layer between others."""
    moe = PosteriorMoE(EXPERTS[kind](), D, num_clusters=3, top_k=2)
    moe.gate.fit(rows(60))
    dtype = next(moe.experts.parameters()).dtype
    return nn.Sequential(nn.Linear(D, D), moe, nn.Linear(D, 3)).to(dtype)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_a_model_with_the_layer_compiles_to_one_graph_and_learns_alike(kind: str, training: bool) -> None:
    torch._dynamo.reset()
    plain = model(kind).train(training)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager" if training else "eager")
    for shape in ((7,), (2, 5), (0,)):
        hidden = rows(*shape).to(next(plain.parameters()).dtype)
        results = []
        for one in (plain, compiled):
            one.zero_grad()
            output = one(hidden)
            output.float().square().sum().backward()
            results.append([output, *(p.grad for p in one.parameters())])
        for expected, actual in zip(*results, strict=True):
            expected = torch.zeros_like(actual) if expected is None and actual is not None else expected
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("kind", ["modules", "stacked"])
def test_an_exported_layer_takes_any_number_of_tokens(kind: str, strict: bool) -> None:
    plain = model(kind).eval()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(plain, (rows(7),), dynamic_shapes=({0: tokens},), strict=strict).module()
    for count in (7, 2, 30):
        torch.testing.assert_close(program(rows(count)), plain(rows(count)))


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_exported_or_says_why_not(name: str) -> None:
    experts = nn.ModuleList(nn.Linear(HIDDEN_SIZE, 3) for _ in range(NUM_EXPERTS))
    layer = MixtureOfExperts(experts, fitted(name)).eval()
    tokens = torch.export.Dim("tokens", min=2, max=1000)

    def export() -> nn.Module:
        return torch.export.export(layer, (data(7),), dynamic_shapes=({0: tokens},)).module()

    if name in DRAWN_PER_BATCH:
        with pytest.raises(InvalidArgumentError, match=r"a gate that draws .* cannot be exported; export one with"):
            export()
    else:
        torch.testing.assert_close(export()(data(12)), layer(data(12)))


def test_recording_a_compiled_model_says_which_object_to_pass() -> None:
    plain = model("modules")
    compiled = torch.compile(plain, backend="eager")
    with (
        pytest.raises(InvalidArgumentError, match=r"must not be compiled.* pass .* model\._orig_mod"),
        record(compiled),
    ):
        pass
    with record(compiled._orig_mod) as trace:
        plain(rows(7))
    assert len(trace) == 1
    nested = nn.Sequential(compiled)
    with (
        pytest.raises(InvalidArgumentError, match=r"module '0' was compiled by itself; take compiled = torch"),
        record(nested),
    ):
        pass
    with (
        pytest.raises(InvalidArgumentError, match="of a compiled function, pass the module"),
        record(torch.compile(plain.forward)),
    ):
        pass
    plain[1].compile(backend="eager")
    with pytest.raises(InvalidArgumentError, match=r"module '1' was compiled by \.compile\(\)"), record(plain):
        pass


def test_a_part_without_gates_may_be_compiled_while_the_model_is_recorded() -> None:
    torch._dynamo.reset()
    plain = model("modules")
    plain[2].compile(backend="eager")
    with record(plain) as trace:
        plain(rows(7))
    assert len(trace) == 1


def test_a_trace_without_routings_says_that_a_compiled_forward_leaves_none() -> None:
    with record(model("modules")) as trace:
        pass
    with pytest.raises(InvalidArgumentError, match="not of a compiled one, which runs no hooks"):
        trace.observe(torch.ones(7))
