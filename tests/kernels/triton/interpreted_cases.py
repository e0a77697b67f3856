"""The Triton kernels, interpreted on the CPU, held to the reference; run by test_interpreter.py in a process of its own."""

import pytest
import torch
from torch import Tensor

from moe_posterior import PosteriorGate, beta
from moe_posterior.errors import InvalidArgumentError
from moe_posterior.kernels import dispatch, reference
from moe_posterior.kernels.instruments import bench_gpu
from moe_posterior.kernels.triton import launch, operators

KNOBS = {"risk_aversion": 0.7, "temperature": 0.1}
# (relative, absolute), against the reference; kernels/README.md promises them.
TOLERANCE = {"distance": (1e-4, 1e-6), "scores": (1e-6, 2e-7), "weights": (1e-5, 1e-7)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, C, D, E, k: every awkward size of each, and k = E
SIZES = [
    (0, 3, 17, 5, 2),
    (1, 1, 1, 1, 1),
    (1, 130, 300, 7, 7),
    (63, 64, 17, 70, 2),
    (63, 3, 300, 6, 6),
    (100, 130, 64, 130, 1),
    (100, 1, 300, 20, 20),
    (100, 64, 1, 9, 8),
    (63, 3, 17, 150, 5),
]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch) -> None:
    """Whatever a kernel does not write is NaN, or an index that exists nowhere."""
    empty = operators.empty_outputs

    def poisoned(*arguments: object) -> tuple[Tensor, ...]:
        return tuple(t.fill_(torch.nan if t.is_floating_point() else -999) for t in empty(*arguments))

    monkeypatch.setattr(operators, "empty_outputs", poisoned)


def sample(generator, num_tokens, clusters, size, dtype=torch.float32) -> tuple[Tensor, reference.Centroids]:
    hidden = torch.randn(num_tokens, size, generator=generator).to(dtype)
    return hidden, reference.prepare_centroids(torch.randn(clusters, size, generator=generator))


def random_tables(generator, clusters, num_experts, top_k) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.randint(num_experts, (clusters, top_k), generator=generator)
    return indices, *torch.rand(2, clusters, top_k, generator=generator)


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[what]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_alike(actual, expected) -> None:
    """Same clusters and experts; the rest to the tolerances."""
    assert torch.equal(actual[0].cluster_ids, expected[0].cluster_ids)
    assert_close("distance", actual[0].distance, expected[0].distance)
    assert torch.equal(actual[1].expert_indices, expected[1].expert_indices)
    assert_close("scores", actual[1].scores, expected[1].scores)
    assert_close("weights", actual[2], expected[2])


def assert_both_paths_alike(hidden, centroids, tables, alpha, b, top_k) -> None:
    assert_alike(
        dispatch.route_by_table(hidden, centroids, *tables, backend="triton"),
        reference.route_by_table(hidden, centroids, *tables),
    )
    options = {"top_k": top_k, **KNOBS}
    assert_alike(
        dispatch.route(hidden, centroids, alpha, b, **options, backend="triton"),
        reference.route(hidden, centroids, alpha, b, **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "clusters", "size", "num_experts", "top_k"), SIZES)
def test_both_kernels_equal_the_reference(generator, dtype, num_tokens, clusters, size, num_experts, top_k) -> None:
    hidden, centroids = sample(generator, num_tokens, clusters, size, dtype)
    tables = random_tables(generator, clusters, num_experts, top_k)
    alpha, b = torch.rand(2, clusters, num_experts, generator=generator) * 20 + 0.5
    assert_both_paths_alike(hidden, centroids, tables, alpha, b, top_k)


def test_large_batches_take_larger_tiles(generator) -> None:
    assert launch.tiles(5000, 3, torch.float32, amd=False)["BLOCK_N"] == 64
    hidden, centroids = sample(generator, 5000, 3, 4)
    alpha, b = torch.rand(2, 3, 5, generator=generator) + 1
    assert_both_paths_alike(hidden, centroids, random_tables(generator, 3, 5, 2), alpha, b, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twin_centroids_give_the_lower_cluster_also_across_tiles(generator, dtype) -> None:
    # Small integers and a power of two of them: every sum is exact, in whatever order a matrix product takes it.
    points = torch.randint(-4, 5, (256, 33), generator=generator).float()
    points[64], points[129], points[40] = points[3], points[3], points[20]
    hidden = points[[3, 20, 64, 129, 40, 0]].to(dtype)
    tables = random_tables(generator, 256, 9, 2)
    ids = dispatch.route_by_table(hidden, reference.prepare_centroids(points), *tables, backend="triton")[0].cluster_ids
    assert ids.tolist() == [3, 20, 3, 3, 20, 0]


@pytest.mark.parametrize("num_experts", [5, 64, 100])
def test_equal_scores_go_to_the_lowest_turn_from_the_cluster(generator, num_experts) -> None:
    points = torch.eye(12) * 3
    ones = torch.ones(12, num_experts)
    options = {"top_k": 3, **KNOBS, "backend": "triton"}
    chosen = dispatch.route(points, reference.prepare_centroids(points), ones, ones, **options)
    assert chosen[1].expert_indices.tolist() == [[(c + j) % num_experts for j in range(3)] for c in range(12)]
    torch.testing.assert_close(chosen[2], torch.full((12, 3), 1 / 3))


def test_few_levels_of_belief_tie_as_the_reference_says(generator) -> None:
    hidden, centroids = sample(generator, 63, 30, 8)
    alpha, b = torch.randint(1, 3, (2, 30, 70), generator=generator).float()
    assert_both_paths_alike(hidden, centroids, random_tables(generator, 30, 70, 4), alpha, b, 8)


def test_negative_scores_rank_below_positive_ones(generator) -> None:
    hidden, centroids = sample(generator, 20, 4, 8)
    alpha, b = torch.rand(2, 4, 33, generator=generator) * 3 + 0.1
    options = {"top_k": 33, "risk_aversion": 3.0, "temperature": 0.5}
    assert (beta.lcb(alpha, b, 3.0) < 0).any()
    actual = dispatch.route(hidden, centroids, alpha, b, **options, backend="triton")
    assert_alike(actual, reference.route(hidden, centroids, alpha, b, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_radius", [False, True])
def test_broken_rows_go_to_cluster_0_or_to_the_unlike_and_spoil_no_neighbour(generator, dtype, with_radius) -> None:
    hidden, centroids = sample(generator, 40, 70, 33, dtype)
    hidden[3, 5], hidden[17, 0], hidden[18, 32], hidden[39] = torch.nan, torch.inf, -torch.inf, torch.nan
    if with_radius:
        radius = torch.rand(70, generator=generator) * 16
        centroids = centroids._replace(radius=radius)
    rows = 70 + with_radius
    tables = random_tables(generator, rows, 9, 2)
    alpha, b = torch.rand(2, rows, 9, generator=generator) + 1
    assert_both_paths_alike(hidden, centroids, tables, alpha, b, 2)
    assignment = dispatch.route_by_table(hidden, centroids, *tables, backend="triton")[0]
    assert assignment.cluster_ids[[3, 17, 18, 39]].tolist() == [70 if with_radius else 0] * 4
    assert assignment.distance[[3, 17, 18, 39]].isinf().all()
    assert not with_radius or 4 < (assignment.cluster_ids == 70).sum() < 40


def test_rows_too_large_for_float32_keep_a_valid_cluster(generator) -> None:
    hidden, centroids = sample(generator, 8, 5, 4)
    assignment = dispatch.route_by_table(
        hidden * 3e38, centroids, *random_tables(generator, 5, 3, 1), backend="triton"
    )[0]
    assert assignment.cluster_ids.ge(0).all()
    assert assignment.cluster_ids.lt(5).all()
    assert assignment.distance.isinf().all()


def test_an_offset_that_all_clusters_share_does_not_drown_their_differences(generator) -> None:
    hidden, centroids = sample(generator, 63, 12, 16)
    offset = 300 * torch.ones(16)
    near = reference.prepare_centroids(centroids.points + offset)
    assert_alike(
        dispatch.route_by_table(
            hidden + offset, near, *(tables := random_tables(generator, 12, 5, 2)), backend="triton"
        ),
        reference.route_by_table(hidden + offset, near, *tables),
    )


def nearest(hidden, centroids) -> reference.Assignment:
    tables = (
        torch.zeros(len(centroids.points) + 1, 1, dtype=torch.int64),
        *torch.zeros(2, len(centroids.points) + 1, 1),
    )
    return dispatch.route_by_table(hidden, centroids, *tables, backend="triton")[0]


def exact_distance(hidden, points, cluster_ids) -> Tensor:
    return torch.linalg.vector_norm(hidden.double() - points.double()[cluster_ids], dim=1).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
@pytest.mark.parametrize(("clusters", "size"), [(20, 40), (150, 1000), (300, 200)])
def test_distances_hold_their_tolerance_near_and_far_from_the_origin(generator, dtype, offset, clusters, size) -> None:
    points = torch.randn(clusters, size, generator=generator) + offset
    members = torch.randint(clusters, (50,), generator=generator)
    spread = torch.logspace(-3, 1, 50)[:, None]  # from all but on its centroid to far outside
    hidden = (points[members] + spread * torch.randn(50, size, generator=generator)).to(dtype)
    actual = nearest(hidden, reference.prepare_centroids(points))
    assert_close("distance", actual.distance, exact_distance(hidden, points, actual.cluster_ids))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_token_on_its_centroid_is_at_distance_zero(generator, offset) -> None:
    centroids = reference.prepare_centroids(torch.randn(150, 300, generator=generator) + offset)
    actual = nearest(centroids.points, centroids)
    assert actual.cluster_ids.tolist() == list(range(150))
    assert actual.distance.tolist() == [0.0] * 150


def test_a_token_whose_distance_does_not_cancel_is_read_once(generator) -> None:
    """Past row 0, which gives the mean, the points are read for the second pass alone: poisoned, they show in its rows."""
    hidden, centroids = sample(generator, 60, 9, 50)
    hidden[40:] = centroids.points[5] + 1e-3
    poisoned = centroids._replace(points=centroids.points.clone())
    poisoned.points[1:] = torch.nan
    actual = nearest(hidden, poisoned)
    assert_close("distance", actual.distance[:40], exact_distance(hidden, centroids.points, actual.cluster_ids)[:40])
    assert actual.distance[40:].isinf().all()


@pytest.mark.parametrize("clusters", [9, 200, 300])
def test_the_radius_is_held_against_either_kind_of_distance(generator, clusters) -> None:
    hidden, centroids = sample(generator, 60, clusters, 50)
    hidden[20:40] = centroids.points[5] + 1e-3 * torch.randn(20, 50, generator=generator)
    hidden[50] = torch.nan
    exact = exact_distance(hidden, centroids.points, reference.assign(hidden, centroids).cluster_ids)
    bounds = {"all out": 1e-4, "near ones in": 1.0, "all in": 2 * float(exact[exact.isfinite()].max())}
    for bound, inside in zip(bounds.values(), (0, 20, 59), strict=True):
        ids = nearest(hidden, centroids._replace(radius=torch.full((clusters,), bound))).cluster_ids
        assert int((ids < clusters).sum()) == inside
        assert ids[50] == clusters


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "one row for all"])
def test_any_strides(generator, view) -> None:
    hidden, centroids = sample(generator, 40, 6, 18)
    given = {
        "rows": hidden[::2],
        "columns": torch.cat([hidden, hidden], dim=1)[:, 5:23],
        "transposed": hidden.T.contiguous().T,
        "one row for all": hidden[:1].expand(40, 18),
    }[view]
    tables = tuple(t.T.contiguous().T for t in random_tables(generator, 6, 9, 3))
    alpha, b = (torch.rand(9, 6, 2, generator=generator) + 1).permute(2, 1, 0)
    assert_both_paths_alike(given, centroids, tables, alpha, b, 3)


def test_the_distance_has_the_reference_s_gradient_and_nothing_else_has_one(generator) -> None:
    data, centroids = sample(generator, 30, 5, 12)
    data[4] = centroids.points[2]
    tables = random_tables(generator, 5, 9, 3)
    for given in (centroids, centroids._replace(radius=torch.full((5,), 3.0))):
        rows = [torch.cat([t, t[:1]]) for t in tables]
        gradients = []
        for backend in ("eager", "triton"):
            hidden = data.clone().requires_grad_()
            assignment, selection, weights = dispatch.route_by_table(hidden, given, *rows, backend=backend)
            assert not weights.requires_grad
            assert not selection.scores.requires_grad
            (assignment.distance * torch.arange(30.0)).sum().backward()
            gradients.append(hidden.grad)
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("with_radius", [False, True])
def test_the_operators_pass_opcheck(generator, with_radius) -> None:
    hidden, (points, directions, offsets, *_) = sample(generator, 20, 5, 12)
    radius = torch.full((5,), 3.0) if with_radius else None
    belief = torch.rand(2, 5 + with_radius, 9, generator=generator) + 1
    common = (hidden.requires_grad_(), points, directions, offsets, radius)
    torch.library.opcheck(operators.route_by_table, (*common, *random_tables(generator, 5 + with_radius, 9, 3)))
    torch.library.opcheck(operators.route, (*common, *belief, None, 3, 0.7, 0.1, None))


def test_a_gate_on_triton_compiles_to_one_graph_for_any_batch(generator) -> None:
    data = torch.randn(200, 8, generator=generator)
    gates = [PosteriorGate(8, 6, num_clusters=5, top_k=2, backend=backend) for backend in ("eager", "triton")]
    for gate in gates:
        gate.fit(data)
        gate.observe(gate(data), torch.rand(200, 6, generator=torch.Generator().manual_seed(1)))
    compiled = torch.compile(gates[1], fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (100, 63, 2):
        expected, actual = gates[0](data[:size]), compiled(data[:size])
        assert torch.equal(actual.expert_indices, expected.expert_indices)
        assert torch.equal(actual.routing_weights, expected.routing_weights)


def test_bfloat16_tokens_see_the_last_bits_of_a_centroid() -> None:
    """Nearest to 2 is the largest; cut after two bfloat16 parts the first two would have the same product."""
    base = 1 + 2.0**-9
    points = torch.tensor([[base], [base + 2.0**-20], [-base], [-base - 2.0**-20]])
    tables = (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.ones(4, 1))
    hidden = torch.tensor([[2.0], [-2.0]]).bfloat16()
    ids = dispatch.route_by_table(hidden, reference.prepare_centroids(points), *tables, backend="triton")[0].cluster_ids
    assert ids.tolist() == [1, 3]


def test_three_bfloat16_parts_hold_a_float32_exactly(generator) -> None:
    exact = torch.randn(10_000, generator=generator)
    high = exact.bfloat16()
    middle = (exact - high.float()).bfloat16()
    low = (exact - high.float() - middle.float()).bfloat16()
    assert torch.equal(high.double() + middle.double() + low.double(), exact.double())


def test_the_interpreter_frees_only_the_cpu_rule(generator) -> None:
    hidden, centroids = sample(generator, 4, 3, 5)
    with pytest.raises(InvalidArgumentError, match=r"hidden of float32, bfloat16 or float16; got torch\.float64"):
        dispatch.route_by_table(hidden.double(), centroids, *random_tables(generator, 3, 4, 2), backend="triton")


def test_the_gpu_benchmark_checks_then_times_every_path() -> None:
    timed = []
    rows = bench_gpu.run(
        "cpu", lambda call: float(len(timed.append(call()) or timed)), lambda f: f, [(40, 12, 5, 9, 2)]
    )
    assert len(rows) == len(timed) == 2 * 14
    assert {row["path"].split(", ")[1] for row in rows} == {"triton", "eager", "compiled"}
    assert "softmax top-k, compiled" in bench_gpu.table(rows)
    assert next(row["ratio"] for row in rows if row["path"] == "softmax top-k, eager") == 1.0


@pytest.mark.parametrize("part", ["cluster_ids", "distance"])
def test_the_gpu_benchmark_reports_no_speed_of_a_wrong_answer(monkeypatch, part) -> None:
    problem = bench_gpu.make_problem((40, 12, 5, 9, 2), torch.float32, "cpu")
    right = dispatch.route

    def wrong(*arguments, **options):
        assignment, *rest = right(*arguments, **options)
        return assignment._replace(**{part: getattr(assignment, part).flip(0)}), *rest

    monkeypatch.setattr(dispatch, "route", wrong)
    with pytest.raises(bench_gpu.WrongAnswerError, match="the full kernel differs"):
        bench_gpu.check(problem)
