import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import nearest_centroid
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from moe_posterior import Clusterer, InvalidArgumentError, NotFittedError
from moe_posterior.kernels.reference import prepare_centroids

DIGITS = torch.from_numpy(load_digits().data).float() / 16


def inertia(points: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(points.double(), centroids.double()).min(dim=1).values.square().sum())


@pytest.mark.parametrize("batch_size", [None, 256])
def test_fit_is_as_good_as_scikit_learn_on_real_digits(batch_size: int | None) -> None:
    clusterer = Clusterer(20, 64).fit(DIGITS, batch_size=batch_size)
    reference = KMeans(20, n_init=1, random_state=0).fit(DIGITS.double().numpy()).inertia_
    assert inertia(DIGITS, clusterer.centroids) < 1.05 * reference


@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("num_clusters", [1, 7, 64, 400])
def test_no_cluster_is_empty_after_a_fit(num_clusters: int, batch_size: int | None) -> None:
    clusterer = Clusterer(num_clusters, 64).fit(DIGITS, batch_size=batch_size, max_iterations=10)
    assert torch.bincount(clusterer(DIGITS).cluster_ids, minlength=num_clusters).min() > 0


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_as_many_clusters_as_distinct_points_each_own_one(num_clusters: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randperm(50, generator=generator)[:num_clusters].float()[:, None]
    points = distinct.repeat(3, 1)
    clusterer = Clusterer(num_clusters, 1).fit(points, generator=generator)
    assert sorted(clusterer.centroids.flatten().tolist()) == pytest.approx(sorted(distinct.flatten().tolist()))


@pytest.mark.parametrize("points", [torch.zeros(100, 2), torch.eye(2).repeat(50, 1), torch.zeros(2, 2)])
def test_fewer_distinct_points_than_clusters_is_a_clear_error(points: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=r"at least num_clusters=3 distinct rows; got [12]"):
        Clusterer(3, 2).fit(points)


def test_a_fit_is_reproducible_and_the_generator_matters() -> None:
    first, again = Clusterer(10, 64).fit(DIGITS), Clusterer(10, 64).fit(DIGITS)
    other = Clusterer(10, 64).fit(DIGITS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_assignment_matches_a_loop_over_tokens() -> None:
    clusterer = Clusterer(13, 64).fit(DIGITS)
    ids, distance = clusterer(DIGITS[:100])
    expected = nearest_centroid(DIGITS[:100], clusterer.centroids)
    assert ids.tolist() == [cluster for cluster, _ in expected]
    torch.testing.assert_close(distance, torch.tensor([d for _, d in expected]), rtol=1e-4, atol=1e-3)


def test_radius_is_a_high_quantile_of_the_members_distances() -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    ids, distance = clusterer(DIGITS)
    for cluster in range(5):
        share_inside = (distance[ids == cluster] <= clusterer.radius[cluster]).float().mean()
        assert 0.985 <= share_inside <= 1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_row_without_a_finite_nearest_centroid_goes_to_cluster_0_at_distance_inf(bad: float) -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    hidden = DIGITS[:3].clone()
    hidden[1, 7] = bad
    ids, distance = clusterer(hidden)
    if bad == 3e38:  # finite, yet its square overflows: the nearest centroid may exist, the distance does not
        assert 0 <= ids[1] < 5
    else:
        assert ids[1] == 0
    assert distance[1] == torch.inf
    assert torch.isfinite(distance[[0, 2]]).all()


def test_state_dict_round_trip_restores_the_fit_bit_for_bit() -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    restored = Clusterer(5, 64)
    restored.load_state_dict(clusterer.state_dict())
    assert restored.fitted
    assert torch.equal(restored(DIGITS).cluster_ids, clusterer(DIGITS).cluster_ids)
    assert torch.equal(restored(DIGITS).distance, clusterer(DIGITS).distance)
    assert torch.equal(restored.radius, clusterer.radius)


@pytest.mark.parametrize(
    "change",
    [
        lambda clusterer: clusterer.set_centroids(DIGITS[100:105]),
        lambda clusterer: (clusterer.load_state_dict(Clusterer(5, 64).fit(DIGITS[:99]).state_dict()), clusterer)[1],
        lambda clusterer: clusterer.to(torch.float16),
        lambda clusterer: clusterer.double(),
        lambda clusterer: copy.deepcopy(clusterer),
        lambda clusterer: pickle.loads(pickle.dumps(clusterer)),
    ],
    ids=["set", "load", "half", "double", "deepcopy", "pickle"],
)
def test_what_is_derived_from_the_centroids_follows_them(change) -> None:
    clusterer = change(Clusterer(5, 64).fit(DIGITS))
    expected = prepare_centroids(clusterer.centroids)
    for found, wanted in zip(
        clusterer.prepared[:3] + clusterer.prepared[4:6], expected[:3] + expected[4:6], strict=True
    ):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_an_unfitted_state_dict_restores_an_unfitted_clusterer() -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    clusterer.load_state_dict(Clusterer(5, 64).state_dict())
    with pytest.raises(NotFittedError, match="these 5 clusters have no centroids yet"):
        clusterer(DIGITS)


def test_casting_leaves_the_centroids_as_they_were() -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    before = clusterer.centroids.clone()
    assert torch.equal(clusterer.to(torch.bfloat16).centroids, before)


def test_low_precision_hidden_states_are_assigned_in_float32() -> None:
    clusterer = Clusterer(5, 64).fit(DIGITS)
    rounded = DIGITS.to(torch.bfloat16)
    assert torch.equal(clusterer(rounded).cluster_ids, clusterer(rounded.float()).cluster_ids)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(10, 63), r"hidden must have shape \(..., 64\); got \(10, 63\)"),
        (torch.full((10, 64), torch.nan), "10 of 10 rows hold NaN or inf"),
        (torch.zeros(64), r"hidden must have shape"),
    ],
)
def test_fit_refuses_bad_points(points: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Clusterer(5, 64).fit(points)


def test_fit_accepts_leading_dimensions() -> None:
    flat, shaped = Clusterer(5, 64).fit(DIGITS[:1000]), Clusterer(5, 64).fit(DIGITS[:1000].reshape(10, 100, 64))
    assert torch.equal(flat.centroids, shaped.centroids)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_data_far_from_the_origin_is_clustered_as_well_as_at_it(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(8, 16, generator=generator)
    points = centres.repeat_interleave(100, dim=0) + torch.randn(800, 16, generator=generator) + offset
    clusterer = Clusterer(8, 16).fit(points)
    reference = KMeans(8, n_init=1, random_state=0).fit(points.double().numpy()).inertia_
    assert inertia(points, clusterer.centroids) < 1.05 * reference
    ids, distance = clusterer(points)
    expected = nearest_centroid(points, clusterer.centroids)
    assert (ids == torch.tensor([c for c, _ in expected])).double().mean() > 0.995
    torch.testing.assert_close(distance, torch.tensor([d for _, d in expected]), rtol=1e-3, atol=1e-3 + 1e-6 * offset)


def test_one_massive_dimension_does_not_swallow_the_distances() -> None:
    points = DIGITS.clone()
    points[:, 0] += 3000
    clusterer = Clusterer(10, 64).fit(points)
    expected = nearest_centroid(points[:200], clusterer.centroids)
    torch.testing.assert_close(
        clusterer(points[:200]).distance, torch.tensor([d for _, d in expected]), rtol=1e-3, atol=1e-3
    )


def test_assignment_is_the_same_under_autocast() -> None:
    clusterer = Clusterer(32, 64).fit(DIGITS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, distance = clusterer(DIGITS)
    assert torch.equal(ids, clusterer(DIGITS).cluster_ids)
    assert torch.equal(distance, clusterer(DIGITS).distance)


@pytest.mark.parametrize("radius", [torch.ones(7), torch.tensor([-1.0, 1.0]), torch.tensor([torch.nan, 1.0])])
def test_a_refused_radius_changes_nothing(radius: torch.Tensor) -> None:
    clusterer = Clusterer(2, 3).set_centroids(torch.eye(2, 3))
    with pytest.raises(InvalidArgumentError, match="radius"):
        clusterer.set_centroids(torch.zeros(2, 3), radius=radius)
    assert torch.equal(clusterer.centroids, torch.eye(2, 3))


def test_centroids_that_arrive_by_a_broadcast_of_buffers_count_as_fitted() -> None:
    source, target = Clusterer(5, 64).fit(DIGITS), Clusterer(5, 64)
    target.centroids.copy_(source.centroids)
    assert torch.equal(target(DIGITS).cluster_ids, source(DIGITS).cluster_ids)


def mixture(tokens: int, size: int, clusters: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(clusters, size, generator=generator)
    hidden = centroids[torch.randint(clusters, (tokens,), generator=generator)]
    return centroids, hidden + spread * torch.randn(tokens, size, generator=generator)


@pytest.mark.parametrize(("spread", "least"), [(0.3, 0.99), (1.0, 0.9)])
def test_two_levels_find_the_nearest_of_many_clusters(spread: float, least: float) -> None:
    centroids, hidden = mixture(2000, 256, 300, spread)
    flat, two = (Clusterer(300, 256, levels=levels).set_centroids(centroids)(hidden) for levels in (1, 2))
    assert (flat.cluster_ids == two.cluster_ids).double().mean() >= least
    same = flat.cluster_ids == two.cluster_ids
    torch.testing.assert_close(flat.distance[same], two.distance[same])
    assert (two.distance >= flat.distance - 1e-3).all()


def test_two_levels_find_the_nearest_cluster_of_real_digits() -> None:
    centroids = Clusterer(200, 64).fit(DIGITS[:1200], max_iterations=5).centroids
    flat, two = (Clusterer(200, 64, levels=levels).set_centroids(centroids)(DIGITS[1200:]) for levels in (1, 2))
    assert (flat.cluster_ids == two.cluster_ids).double().mean() >= 0.9
    assert two.distance.mean() < 1.01 * flat.distance.mean()


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 1000))
def test_two_levels_never_give_an_invalid_id(num_clusters: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(num_clusters, size, generator=generator)
    centroids[::2] = centroids[0].clone()  # many are the same
    clusterer = Clusterer(num_clusters, size, levels=2, outliers=bool(seed % 2)).set_centroids(
        centroids, radius=torch.full((num_clusters,), 3.0)
    )
    hidden = 3 * torch.randn(50, size, generator=generator)
    hidden[0], hidden[1], hidden[2] = torch.nan, torch.inf, 3e38
    ids, distance = clusterer(hidden)
    assert ids.min() >= 0
    assert ids.max() < clusterer.num_classes
    torch.testing.assert_close(ids[:2], Clusterer.forward(clusterer.double(), hidden.double())[0][:2])
    own = clusterer.centroids[ids[3:].clamp(max=num_clusters - 1)]
    inside = ids[3:] < num_clusters
    torch.testing.assert_close(distance[3:][inside], (hidden[3:] - own).norm(dim=1)[inside], rtol=1e-4, atol=1e-3)


def test_two_levels_travel_with_the_clusterer() -> None:
    centroids, hidden = mixture(500, 64, 100, 3.0)  # so far apart that candidates miss
    clusterer = Clusterer(100, 64, levels=2).set_centroids(centroids)
    loaded = Clusterer(100, 64, levels=2)
    loaded.load_state_dict(clusterer.state_dict())
    expected = clusterer(hidden).cluster_ids
    assert not torch.equal(expected, Clusterer(100, 64).set_centroids(centroids)(hidden).cluster_ids)
    for other in (loaded, copy.deepcopy(clusterer), pickle.loads(pickle.dumps(clusterer)), clusterer.half()):
        assert torch.equal(other(hidden).cluster_ids, expected)


def test_levels_are_one_or_two() -> None:
    with pytest.raises(InvalidArgumentError, match="levels must be 1 or 2; got 3"):
        Clusterer(4, 2, levels=3)
