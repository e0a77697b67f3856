"""Tokens in several clusters: the shares, the evidence and the scores against plain loops, and every road that they take."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from oracles import assert_close, best_experts
from torch import Tensor, nn

from moe_posterior import BetaPosterior, InvalidArgumentError, PosteriorGate, PosteriorMoE, PosteriorRouter, record
from moe_posterior.evidence import ProxyNoise
from moe_posterior.gates.base import Routing, SharedRouting
from moe_posterior.memberships import Memberships, mixed
from moe_posterior.replay.saving import load_recording

D, E, C = 6, 5, 7
SEVERAL = [
    {"clusterings": 3},
    {"neighbours": 3, "softness": 0.5},
    {"clusterings": 2, "neighbours": 2},
    {"clusterings": 2, "neighbours": 2, "shrinkage": 4.0, "half_life": 9.0, "surprise": 3.0, "novelty": "discount"},
]
several = pytest.mark.parametrize("options", SEVERAL, ids=str)


def data(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def gate_of(**options) -> PosteriorGate:
    gate = PosteriorGate(D, E, C, 2, **options)
    gate.fit(data(300), generator=torch.Generator().manual_seed(5))
    return gate


def outcomes(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_members(gate: PosteriorGate, token: Tensor) -> list[tuple[int, float]]:
    """(row of the belief, share) of one token, by the definition."""
    found = []
    for place, clusterer in enumerate((gate.clusterer, *gate.members.others)):
        squared = [float((token.double() - centroid.double()).square().sum()) for centroid in clusterer.centroids]
        nearest = sorted(range(C), key=squared.__getitem__)[: gate.members.neighbours]
        width = gate.members.softness * float(gate.members.scale[place])
        powers = [math.exp(-(squared[c] - squared[nearest[0]]) / width) for c in nearest]
        found += [(place * C + c, power / sum(powers)) for c, power in zip(nearest, powers, strict=True)]
    return found


@pytest.mark.parametrize("options", SEVERAL[:3], ids=str)
def test_shares_evidence_and_choice_are_those_of_a_plain_loop(options: dict) -> None:
    gate, seen, outcome = gate_of(**options), data(60, 2), outcomes(60)
    gate.observe(gate(seen), outcome)
    runs = gate.members.clusterings
    won, lost = np.ones((runs * C, E)), np.ones((runs * C, E))
    for token, row in zip(seen, outcome.numpy(), strict=True):
        for cluster, share in plain_members(gate, token):
            won[cluster] += share * row
            lost[cluster] += share * (1 - row)
    torch.testing.assert_close(gate.posterior.alpha, torch.from_numpy(won), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate.posterior.beta, torch.from_numpy(lost), rtol=1e-5, atol=1e-5)
    new = data(40, 3)
    routing = gate(new)
    for token, experts, scores, cluster in zip(
        new, routing.expert_indices.tolist(), routing.scores.tolist(), routing.cluster_ids.tolist(), strict=True
    ):
        alpha = sum(share * won[c] for c, share in plain_members(gate, token)) / runs
        beta = sum(share * lost[c] for c, share in plain_members(gate, token)) / runs
        total = alpha + beta
        bound = alpha / total - np.sqrt(alpha * beta / (total + 1)) / total
        assert experts == best_experts(bound.tolist(), cluster, 2)
        assert scores == pytest.approx(sorted(bound, reverse=True)[:2], rel=1e-4)


@several
def test_alone_and_in_a_batch_a_token_is_shared_and_routed_alike(options: dict) -> None:
    gate, new = gate_of(**options), data(50, 3)
    gate.warm_start(data(200, 4), outcomes(200))
    gate.observe(gate(data(60, 2)), outcomes(60))
    batch = gate(new)
    for row in range(50):
        one = gate(new[row : row + 1])
        for part, whole in zip((*one, *one.members), (*batch, *batch.members), strict=True):
            assert torch.equal(part, whole[row : row + 1])


@several
def test_each_clustering_counts_every_outcome_once(options: dict) -> None:
    gate = gate_of(**options | {"half_life": None, "surprise": None})
    gate.observe(gate(data(60, 2)), torch.ones(60, E))
    per_clustering = gate.posterior.successes.view(gate.members.clusterings, C, E).sum(dim=1)
    torch.testing.assert_close(per_clustering, torch.full_like(per_clustering, 60.0), rtol=1e-6, atol=0)
    assert f"observations={60 * E}" in repr(gate.posterior)


@pytest.mark.parametrize("clusterings", [2, 5])
@pytest.mark.parametrize(
    "options", [{}, {"shrinkage": 3.0, "half_life": 7.0}, {"noise": ProxyNoise(0.1, 0.2)}], ids=str
)
def test_clusterings_that_agree_say_what_one_alone_says(clusterings: int, options: dict) -> None:
    alone = BetaPosterior(C, E, **options)
    together = BetaPosterior(C * clusterings, E, clusterings=clusterings, **options)
    generator = torch.Generator().manual_seed(0)
    for use in ("warm_start", "observe", "observe"):
        ids = torch.randint(C, (40,), generator=generator)
        outcome = torch.rand(40, E, dtype=torch.float64, generator=generator)
        copies = ids[:, None] + C * torch.arange(clusterings)
        getattr(alone, use)(ids, outcome)
        getattr(together, use)(copies, outcome, shares=torch.ones(40, clusterings))
        members = Memberships(copies, torch.ones(40, clusterings))
        if use == "observe" or "shrinkage" not in options:
            for mine, other in zip(mixed(together, members), alone.parameters_of(ids), strict=True):
                assert_close(mine, other)


@pytest.mark.parametrize("noise", [None, ProxyNoise(0.1, 0.2)])
def test_under_a_half_life_a_batch_equals_its_rows_one_after_the_other(noise: ProxyNoise | None) -> None:
    batched, stepped = (BetaPosterior(C, E, half_life=3.0, noise=noise) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(C, generator=generator)[:2] for _ in range(50)])
    shares = torch.rand(50, 1, generator=generator)
    shares = torch.cat([shares, 1 - shares], dim=1)
    outcome = outcomes(50).masked_fill(torch.rand(50, E, generator=generator) < 0.2, torch.nan)
    batched.observe(ids, outcome, shares=shares)
    for row in range(50):
        stepped.observe(ids[row : row + 1], outcome[row : row + 1], shares=shares[row : row + 1])
    assert_close(batched.successes, stepped.successes)
    assert_close(batched.failures, stepped.failures)


@several
def test_a_broken_token_teaches_nothing_and_is_shared_without_nan(options: dict) -> None:
    gate, broken = gate_of(**options), data(4, 2)
    broken[0, 0], broken[2, 1] = torch.nan, torch.inf
    routing = gate(broken)
    assert torch.isinf(routing.distance).tolist() == [True, False, True, False]
    assert routing.members.shares.isfinite().all()
    before = gate.posterior.alpha.clone()
    gate.observe(routing.map(lambda part: part[[0, 2]]), torch.ones(2, E))
    assert torch.equal(gate.posterior.alpha, before)


def test_points_that_lie_on_their_centroids_have_shares_all_the_same() -> None:
    points = torch.eye(D)[:4].repeat(3, 1)
    gate = PosteriorGate(D, E, 4, 1, neighbours=2)
    gate.fit(points)
    shares = gate(points).members.shares
    assert shares[:, 0].tolist() == [1.0] * 12
    assert torch.isfinite(gate(data(9)).members.shares).all()


def test_one_cluster_alone_is_as_ever() -> None:
    gate = gate_of()
    assert gate.members is None
    assert type(gate(data(3))) is Routing
    assert gate(data(3)).members is None
    assert not gate.chooses_per_token
    assert not any("members" in name for name in gate.state_dict())


@several
def test_memberships_outlive_every_way_that_a_routing_goes(options: dict, tmp_path) -> None:
    gate = gate_of(**options)
    routing = gate(data(9))
    for same in (
        copy.deepcopy(routing),
        pickle.loads(pickle.dumps(routing)),
        routing.map(torch.clone),
        routing._replace(),
    ):
        assert isinstance(same, SharedRouting)
        assert all(torch.equal(a, b) for a, b in zip(same.members, routing.members, strict=True))
    assert routing.map(lambda part: part[:4]).members.ids.shape == (4, gate.members.width)
    moe = PosteriorMoE(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), D, C, 2, **options)
    moe.gate.fit(data(300))
    with record(moe) as trace:
        moe(data(9))
    trace.save(tmp_path / "recording")
    (_, kept), (_, live) = load_recording(tmp_path / "recording").calls[0], trace.routings[0]
    assert all(torch.equal(a, b) for a, b in zip(kept.members, live.members, strict=True))
    trace.observe(torch.ones(9))
    assert float(moe.gate.posterior.successes.sum()) > 0


def test_a_routing_that_has_lost_its_memberships_is_refused() -> None:
    gate = gate_of(clusterings=2)
    before = copy.deepcopy(gate.state_dict())
    for lost in (Routing(*gate(data(9))), SharedRouting(*gate(data(9))), gate_of()(data(9))):
        for use in (gate.expected_outcome, gate.counts_of, lambda routing: gate.observe(routing, torch.ones(9, 2))):
            with pytest.raises(InvalidArgumentError, match="routing must be this gate's"):
                use(lost)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gate.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusterings": 0}, "clusterings must be"),
        ({"neighbours": 0}, "neighbours must"),
        ({"neighbours": C + 1}, "neighbours must"),
        ({"softness": 0.0}, "softness must be"),
        ({"softness": math.nan}, "softness must be"),
        ({"clusterings": 2, "novelty": "class"}, "clusterings and neighbours must be 1"),
        ({"neighbours": 2, "levels": 2}, "clusterings and neighbours must be 1"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        PosteriorGate(D, E, C, 2, **options)


@pytest.mark.parametrize(
    "shares", [torch.ones(2, 1), torch.full((2, 2), 1.5), torch.full((2, 2), -0.1), torch.full((2, 2), torch.nan)]
)
def test_shares_that_are_none_are_refused_and_nothing_changes(shares: Tensor) -> None:
    belief = BetaPosterior(C, E)
    for use in (belief.observe, belief.warm_start):
        with pytest.raises(InvalidArgumentError, match="shares must"):
            use(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, E), shares=shares)
    assert (belief.alpha == 1).all()


def test_ranks_hold_the_sum_of_all_that_was_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, joined = (gate_of(clusterings=2, neighbours=2) for _ in range(2))
    routing = apart(data(20, 2))
    for _ in range(2):  # another rank saw the same
        apart.posterior.observe(routing.members.ids, outcomes(20), shares=routing.members.shares)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    joined.observe(routing, outcomes(20))
    assert_close(joined.posterior.successes, apart.posterior.successes)
    assert_close(joined.posterior.failures, apart.posterior.failures)


@several
def test_a_saved_gate_and_a_saved_router_go_on_as_they_were(options: dict, tmp_path) -> None:
    gate, fresh = gate_of(**options), PosteriorGate(D, E, C, 2, **options)
    gate.observe(gate(data(60, 2)), outcomes(60))
    fresh.load_state_dict(gate.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gate(data(30, 3)), fresh(data(30, 3)), strict=True))
    router = PosteriorRouter(E, D, C, max_pending=50, **options)
    router.fit(data(300).numpy())
    ids = router.route_batch(data(40, 2).numpy()).ids
    router.resolve_batch(ids[::2], np.linspace(0, 1, 20))
    router.save(tmp_path / "router")
    again = PosteriorRouter.load(tmp_path / "router")
    for each in (router, again):
        each.resolve_batch(ids[1::2], np.linspace(1, 0, 20))
    assert torch.equal(router.posterior.successes, again.posterior.successes)
    assert router.route(data(1, 7)[0].numpy()) == again.route(data(1, 7)[0].numpy())


def test_explored_means_not_what_the_mixed_belief_would_have_chosen() -> None:
    router = PosteriorRouter(E, D, C, score="lcb", clusterings=3, exploration=0.5)
    router.fit(data(300).numpy())
    decided = router.route_batch(data(200, 2).numpy())
    router.gate.configure(exploration=0.0)
    greedy = router.route_batch(data(200, 2).numpy())
    assert (decided.explored == (decided.experts != greedy.experts)[:, 0]).all()
    assert 50 < decided.explored.sum() < 150
    assert not greedy.explored.any()
