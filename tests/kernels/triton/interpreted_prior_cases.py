"""Prior mode, removed experts and draws on Triton, interpreted on the CPU; run by test_interpreter.py in a process of its own."""

import math

import pytest
import torch
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import dispatch, reference, sampling
from moe_posterior.kernels.triton import operators

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, C, D, E, k
SIZES = [
    (0, 3, 17, 5, 2),
    (1, 1, 1, 1, 1),
    (63, 64, 17, 70, 2),
    (63, 3, 300, 6, 6),
    (100, 150, 64, 130, 8),
    (70, 300, 40, 9, 3),
]
# (relative, absolute), against the reference; kernels/README.md promises them.
TOLERANCE = {"scores": (1e-5, 1e-5), "weights": (1e-4, 1e-6), "gradient": (1e-4, 1e-5), "draw": (1e-4, 1e-6)}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch) -> None:
    """Whatever a kernel does not write is NaN, or an index that exists nowhere."""
    empty = operators.empty_outputs

    def poisoned(*arguments: object) -> tuple[Tensor, ...]:
        return tuple(t.fill_(torch.nan if t.is_floating_point() else -999) for t in empty(*arguments))

    monkeypatch.setattr(operators, "empty_outputs", poisoned)


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[what]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_alike(actual, expected) -> None:
    assert torch.equal(actual[0].cluster_ids, expected[0].cluster_ids)
    assert torch.equal(actual[1].expert_indices, expected[1].expert_indices)
    assert_close("scores", actual[1].scores, expected[1].scores)
    assert_close("weights", actual[2], expected[2])


def gate_problem(generator, num_tokens, clusters, size, num_experts, dtype=torch.float32, rows=None):
    hidden = torch.randn(num_tokens, size, generator=generator).to(dtype)
    centroids = reference.prepare_centroids(torch.randn(clusters, size, generator=generator))
    gate = torch.randn(num_experts, size, generator=generator).to(dtype)
    bias = -torch.rand(rows or clusters, num_experts, generator=generator)
    return hidden, centroids, gate, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "clusters", "size", "num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("dressed", [False, True])
def test_prior_mode_equals_the_reference(
    generator, dtype, num_tokens, clusters, size, num_experts, top_k, dressed
) -> None:
    problem = gate_problem(generator, num_tokens, clusters, size, num_experts, dtype)
    options = {"top_k": top_k}
    if dressed:
        options["gate_bias"] = torch.randn(num_experts, generator=generator).to(dtype)
        options["active"] = torch.rand(num_experts, generator=generator) < 0.7
    assert_alike(
        dispatch.route_prior(*problem, **options, backend="triton"), reference.route_prior(*problem, **options)
    )


def test_exact_ties_of_logits_go_to_the_lowest_turn(generator) -> None:
    hidden, centroids, gate, bias = gate_problem(generator, 40, 12, 8, 100)
    for signed_zero in (0.0, -0.0):
        chosen = dispatch.route_prior(hidden, centroids, gate * 0, bias * 0 + signed_zero, top_k=3, backend="triton")
        clusters = chosen[0].cluster_ids.tolist()
        assert chosen[1].expert_indices.tolist() == [[(c + j) % 100 for j in range(3)] for c in clusters]


@pytest.mark.parametrize("with_radius", [False, True])
def test_broken_rows_choose_valid_experts_and_spoil_no_neighbour(generator, with_radius) -> None:
    hidden, centroids, gate, bias = gate_problem(generator, 40, 70, 33, 9, rows=70 + with_radius)
    hidden[3, 5], hidden[17, 0], hidden[39] = torch.nan, torch.inf, torch.nan
    if with_radius:
        centroids = centroids._replace(radius=torch.full((70,), 8.0))
    actual = dispatch.route_prior(hidden, centroids, gate, bias, top_k=2, backend="triton")
    sound = torch.ones(40, dtype=torch.bool)
    sound[[3, 17, 39]] = False
    expected = reference.route_prior(hidden[sound], centroids, gate, bias, top_k=2)
    assert torch.equal(actual[1].expert_indices[sound], expected[1].expert_indices)
    assert_close("weights", actual[2][sound], expected[2])
    assert actual[1].expert_indices.min() >= 0
    assert actual[1].expert_indices.max() < 9
    unlike = 70 if with_radius else 0
    assert actual[1].expert_indices[[3, 39]].tolist() == [[unlike % 9, (unlike + 1) % 9]] * 2
    assert actual[2][[3, 39]].tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_reach_tokens_and_gate_as_in_the_reference(generator, dtype) -> None:
    data, centroids, gate_data, bias = gate_problem(generator, 30, 5, 12, 9, dtype)
    offset_data = torch.randn(9, generator=generator).to(dtype)
    upstream = torch.randn(2, 30, 3, generator=generator)
    found = []
    for backend in ("eager", "triton"):
        hidden, gate, offset = (t.clone().requires_grad_() for t in (data, gate_data, offset_data))
        assignment, selection, weights = dispatch.route_prior(
            hidden, centroids, gate, bias, top_k=3, gate_bias=offset, backend=backend
        )
        loss = (weights * upstream[0]).sum() + (selection.scores * upstream[1]).sum() + assignment.distance.sum()
        loss.backward()
        found.append([t.grad.float() for t in (hidden, gate, offset)])
    rtol, atol = TOLERANCE["gradient"] if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize("part", ["weights", "scores", "distance"])
def test_each_output_of_prior_mode_has_its_gradient_alone(generator, part) -> None:
    data, centroids, gate, bias = gate_problem(generator, 20, 5, 12, 9)
    found = []
    for backend in ("eager", "triton"):
        hidden = data.clone().requires_grad_()
        assignment, selection, weights = dispatch.route_prior(hidden, centroids, gate, bias, top_k=3, backend=backend)
        output = {"weights": weights, "scores": selection.scores, "distance": assignment.distance}[part]
        (output * torch.linspace(0, 1, output.numel()).reshape(output.shape)).sum().backward()
        found.append(hidden.grad)
    assert_close("gradient", found[1], found[0])


def test_prior_mode_passes_opcheck(generator) -> None:
    hidden, centroids, gate, bias = gate_problem(generator, 20, 5, 12, 9)
    active = torch.arange(9) > 0
    given = (hidden.requires_grad_(), *centroids[:4], gate.requires_grad_(), None, bias, active, 3)
    torch.library.opcheck(operators.route_prior, given)


def test_prior_mode_compiles_to_one_graph_with_its_backward(generator) -> None:
    data, centroids, gate_data, bias = gate_problem(generator, 40, 5, 12, 9)

    def loss(hidden: Tensor, gate: Tensor) -> Tensor:
        return dispatch.route_prior(hidden, centroids, gate, bias, top_k=3, backend="triton")[2].square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        for size in (40, 23):
            gate = gate_data.clone().requires_grad_()
            function(data[:size], gate).backward()
            gradients.append(gate.grad)
    torch.testing.assert_close(gradients[2:], gradients[:2])


@pytest.mark.parametrize("seed", [None, 5])
def test_removed_experts_are_chosen_only_where_no_others_are_left(generator, seed) -> None:
    hidden = torch.randn(40, 8, generator=generator)
    centroids = reference.prepare_centroids(torch.randn(4, 8, generator=generator))
    alpha, b = torch.rand(2, 4, 70, generator=generator) * 9 + 1
    options = {"risk_aversion": 0.7, "temperature": 0.1, "seed": seed}
    active = torch.zeros(70, dtype=torch.bool)
    active[[3, 40, 66]] = True
    for top_k in (2, 5):
        call = {"top_k": top_k, "active": active, **options}
        actual = dispatch.route(hidden, centroids, alpha, b, **call, backend="triton")
        expected = reference.route(hidden, centroids, alpha, b, **call)
        assert torch.equal(actual[1].expert_indices, expected[1].expert_indices)
        assert_close("draw", actual[1].scores, expected[1].scores)
        assert active[actual[1].expert_indices[:, : min(3, top_k)]].all()
        assert actual[2][:, 3:].eq(0.0).all()
    nobody = dispatch.route(
        hidden, centroids, alpha, b, **{**options, "top_k": 4}, active=active & False, backend="triton"
    )
    torch.testing.assert_close(nobody[2], torch.full((40, 4), 0.25))


def drawn(hidden, centroids, alpha, b, seed, backend, top_k=None):
    options = {"top_k": top_k or alpha.shape[1], "risk_aversion": 0.0, "temperature": 0.1}
    return dispatch.route(hidden, centroids, alpha, b, **options, seed=seed, backend=backend)


def by_expert(selection) -> Tensor:  # (N, E)
    return torch.zeros_like(selection.scores).scatter(1, selection.expert_indices, selection.scores)


@pytest.mark.parametrize(("seed", "num_experts"), [(0, 70), (1, 5), (12345678901234, 5)])
def test_draws_are_the_reference_s(generator, seed, num_experts) -> None:
    hidden = torch.randn(100, 8, generator=generator)
    centroids = reference.prepare_centroids(torch.randn(6, 8, generator=generator))
    alpha, b = torch.rand(2, 6, num_experts, generator=generator) * 30 + 0.3
    top_k = min(num_experts, 8)
    actual = drawn(hidden, centroids, alpha, b, seed, "triton", top_k)
    expected = drawn(hidden, centroids, alpha, b, seed, "eager", top_k)
    assert_close("draw", actual[1].scores, expected[1].scores)
    same = actual[1].expert_indices == expected[1].expert_indices
    gaps = -expected[1].scores.diff(dim=1).clamp(max=0)
    near_tie = torch.nn.functional.pad(gaps, (0, 1), value=1.0).minimum(
        torch.nn.functional.pad(gaps, (1, 0), value=1.0)
    )
    assert (same | (near_tie < 1e-5)).all()
    assert same.float().mean() > 0.99


def test_a_draw_depends_on_seed_and_place_and_not_on_the_rest_of_the_batch(generator) -> None:
    hidden = torch.randn(1, 8, generator=generator).expand(2100, 8)
    centroids = reference.prepare_centroids(torch.randn(3, 8, generator=generator))
    alpha, b = torch.full((2, 3, 4), 2.0)
    whole = by_expert(drawn(hidden, centroids, alpha, b, 7, "triton")[1])
    part = by_expert(drawn(hidden[:63], centroids, alpha, b, 7, "triton")[1])
    other = by_expert(drawn(hidden[:63], centroids, alpha, b, 8, "triton")[1])
    assert torch.equal(whole[:63], part)  # 2100 tokens are cut into larger tiles than 63
    assert not torch.isclose(part, other).any(dim=1).all()
    assert len(whole.flatten().unique()) > 0.99 * whole.numel()
    # Independent over tokens and experts: correlations of 2100 draws stay within 4.5 standard errors.
    centred = whole - whole.mean(dim=0)
    pairs = torch.corrcoef(torch.cat([centred[1:], centred[:-1]], dim=1).T) - torch.eye(8)
    assert pairs.abs().max() < 4.5 / math.sqrt(2100)


def test_a_seed_out_of_range_is_refused(generator) -> None:
    hidden, centroids, *_ = gate_problem(generator, 4, 3, 5, 6)
    ones = torch.ones(3, 6)
    for seed in (-1, 2**63):
        with pytest.raises(InvalidArgumentError, match=r"seed must lie in \[0, 2\^63\) or be None; got"):
            drawn(hidden, centroids, ones, ones, seed, "triton")


def test_prior_mode_says_what_triton_needs(generator) -> None:
    hidden, centroids, gate, bias = gate_problem(generator, 4, 3, 5, 6)
    with pytest.raises(InvalidArgumentError, match=r"gate_weight of torch\.float32, as hidden; got torch\.bfloat16"):
        dispatch.route_prior(hidden, centroids, gate.bfloat16(), bias, top_k=2, backend="triton")
    with pytest.raises(InvalidArgumentError, match=r"evidence_bias of float32; got torch\.float64"):
        dispatch.route_prior(hidden, centroids, gate, bias.double(), top_k=2, backend="triton")


def test_the_operators_pass_opcheck_with_a_mask_and_a_seed(generator) -> None:
    hidden, centroids, *_ = gate_problem(generator, 20, 5, 12, 9)
    alpha, b = torch.rand(2, 5, 9, generator=generator) + 1
    torch.library.opcheck(operators.route, (hidden, *centroids[:4], alpha, b, torch.arange(9) > 0, 3, 0.7, 0.1, 3))


def test_the_constants_of_a_draw_are_the_reference_s() -> None:
    from moe_posterior.kernels.triton import drawing

    assert tuple(drawing.CENTRE.value) == sampling.CENTRE
    assert tuple(drawing.TAIL.value) == sampling.TAIL
