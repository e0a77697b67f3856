"""The fast CPU assignment is the reference's, also where bfloat16 cannot tell."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_posterior.kernels import cpu, reference
from moe_posterior.kernels.instruments.bench_common import posterior_gate


def world(
    tokens: int, size: int, clusters: int, spread: float, far: float = 0.0
) -> tuple[torch.Tensor, reference.Centroids]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(clusters, size, generator=generator) + far
    hidden = points[torch.randint(clusters, (tokens,), generator=generator)]
    return hidden + spread * torch.randn(tokens, size, generator=generator), reference.prepare_centroids(points)


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize(("tokens", "size", "clusters"), [(300, 64, 1), (257, 100, 3), (600, 65, 130), (513, 257, 64)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_it_assigns_as_the_reference_does(tokens, size, clusters, spread, low_precision) -> None:
    hidden, centroids = world(tokens, size, clusters, spread)
    expected, found = reference.assign(hidden, centroids), cpu.assign(hidden, centroids, low_precision=low_precision)
    assert torch.equal(found.cluster_ids, expected.cluster_ids)
    torch.testing.assert_close(found.distance, expected.distance)


@pytest.mark.parametrize("far", [0.0, 1e3])
def test_near_ties_that_bfloat16_cannot_see_are_decided_in_float32(far: float) -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(40, 128, generator=generator).repeat_interleave(2, dim=0)
    points[1::2] += 1e-3 * torch.randn(40, 128, generator=generator)  # pairs that agree to three digits
    centroids = reference.prepare_centroids(points + far)
    hidden = (points + far)[torch.randint(80, (500,), generator=generator)]
    found = cpu.assign(hidden, centroids, low_precision=True)
    assert torch.equal(found.cluster_ids, reference.assign(hidden, centroids).cluster_ids)


def test_without_the_check_bfloat16_would_err(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, centroids = world(2000, 64, 200, 4.0)
    expected = reference.assign(hidden, centroids).cluster_ids
    monkeypatch.setattr(cpu, "ROUNDING", 0.0)
    assert not torch.equal(cpu.assign(hidden, centroids, low_precision=True).cluster_ids, expected)


def test_the_bound_holds_on_every_product() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.exp(3 * torch.randn(50, 1, generator=generator))
        x, d = scale * torch.randn(50, 96, generator=generator), torch.randn(70, 96, generator=generator)
        error = ((x.bfloat16() @ d.bfloat16().T).double() - x.double() @ d.double().T).abs()
        assert (error <= cpu.ROUNDING * x.double().norm(dim=1, keepdim=True) * d.double().norm(dim=1)).all()


@pytest.mark.parametrize("with_radius", [False, True])
def test_broken_rows_and_outliers_are_the_references(with_radius: bool) -> None:
    hidden, centroids = world(400, 64, 8, 1.0)
    if with_radius:
        centroids = centroids._replace(radius=torch.full((8,), 8.0))
    for low_precision in (True, False):
        clean = cpu.assign(hidden, centroids, low_precision=low_precision)
        assert torch.equal(clean.cluster_ids, reference.assign(hidden, centroids).cluster_ids)
        broken = hidden.clone()
        broken[0, 0], broken[1, 1], broken[2], broken[3] = torch.nan, torch.inf, -torch.inf, 3e38
        expected, found = (
            reference.assign(broken, centroids),
            cpu.assign(broken, centroids, low_precision=low_precision),
        )
        assert torch.equal(found.cluster_ids, expected.cluster_ids)
        torch.testing.assert_close(found.distance, expected.distance)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("with_radius", [False, True])
def test_one_token_in_numpy_is_assigned_as_the_reference_does(far: float, with_radius: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = reference.prepare_centroids(torch.randn(40, 16, generator=generator) + far)
    if with_radius:
        centroids = centroids._replace(radius=torch.full((40,), 5.0))
    queries = torch.randn(300, 16, generator=generator) * 1.2 + far
    queries[0, 3], queries[1, 0], queries[2], queries[3] = torch.nan, torch.inf, -torch.inf, 3e38
    expected = reference.assign(queries, centroids)
    views, tensors = cpu.Views(), tuple(tensor for tensor in centroids[:4] if tensor is not None)
    found = [views.assign_one(query.numpy(), tensors) for query in queries]
    assert [cluster for cluster, *_ in found] == expected.cluster_ids.tolist()
    torch.testing.assert_close(torch.tensor([distance for _, distance, _ in found]), expected.distance)


def test_views_follow_storage_that_is_moved_in_place() -> None:
    _, centroids = world(1, 16, 8, 1.0)
    views, tensors = cpu.Views(), tuple(tensor.clone() for tensor in centroids[:3])
    table = torch.arange(8)[:, None]
    query = tensors[0][5].numpy().copy()
    assert views.assign_one(query, tensors, (table,))[2][0][5] == 5
    table.share_memory_()  # the same tensor object, other memory
    table.add_(10)
    assert views.assign_one(query, tensors, (table,))[2][0][5] == 15


@pytest.mark.parametrize("low_precision", [True, False])
def test_autocast_does_not_decide_near_ties_in_bfloat16(low_precision: bool) -> None:
    hidden, centroids = world(2000, 64, 200, 4.0)
    expected = reference.assign(hidden, centroids).cluster_ids
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu.assign(hidden, centroids, low_precision=low_precision).cluster_ids, expected)


class Made(TorchDispatchMode):
    """Shapes of the tensors that operators allocate; views of what was there are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(output):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(leaf.shape))
        return output


@pytest.mark.parametrize("low_precision", [True, False])
def test_a_forward_makes_nothing_anew_that_does_not_depend_on_its_tokens(low_precision, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: low_precision)
    tokens = 96
    gate, hidden = posterior_gate(tokens, 64, 40, 7, torch.Generator().manual_seed(0))
    with Made() as made:
        gate(hidden)
    assert len(made.shapes) > 5
    assert [shape for shape in made.shapes if shape and shape[0] != tokens] == []


def test_centroids_rounded_beforehand_decide_as_those_rounded_in_the_call() -> None:
    hidden, centroids = world(600, 65, 130, 4.0)
    bare = centroids._replace(rounded=None, reach=None)
    expected = cpu.assign(hidden, bare, low_precision=True)
    assert torch.equal(cpu.assign(hidden, centroids, low_precision=True).cluster_ids, expected.cluster_ids)


def test_it_stands_in_only_where_it_may() -> None:
    hidden = torch.randn(300, 64)
    assert cpu.applies(hidden)
    assert not cpu.applies(hidden[:0])
    assert not cpu.applies(hidden.bfloat16())
    assert not cpu.applies(hidden.clone().requires_grad_())
    with torch.no_grad():
        assert cpu.applies(hidden.clone().requires_grad_())
