"""What every gate must do. A new gate brings one line in GATES and passes tests/gates/test_contract.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_posterior.gates import (
    BanditGate,
    ExpertThresholdGate,
    FixedGate,
    Gate,
    LearnedPrior,
    NearestNeighbourGate,
    OracleGate,
    PosteriorGate,
    PriorGate,
    Routing,
    SoftmaxGate,
)

HIDDEN_SIZE, NUM_EXPERTS = 6, 5


def data(num_tokens: int, seed: int = 0) -> Tensor:  # (N, D)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def competence(hidden: Tensor) -> Tensor:  # (N, D) -> (N, E)
    """A truth for the oracle; at module level, so that the gate can be pickled."""
    return hidden[:, :NUM_EXPERTS].sigmoid()


def warm(gate: FixedGate | NearestNeighbourGate) -> Gate:
    """Give the gate labelled rows, a fifth of the outcomes unobserved."""
    generator = torch.Generator().manual_seed(7)
    outcome = torch.rand(100, NUM_EXPERTS, generator=generator)
    outcome[torch.rand(100, NUM_EXPERTS, generator=generator) < 0.2] = torch.nan
    gate.warm_start(data(100, seed=8), outcome)
    return gate


# name -> (top_k -> gate). Numbers are awkward on purpose: neither E nor C is a power of two.
GATES: dict[str, Callable[[int], Gate]] = {
    "softmax": lambda k: SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, k),
    "softmax mlp": lambda k: SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, k, router_width=9),
    "posterior lcb": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k),
    "posterior mean": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, score="mean", threshold=0.5),
    "posterior quantile": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, score="quantile"),
    "posterior outliers": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, novelty="class"),
    "posterior thompson": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, score="thompson"),
    "posterior race": lambda k: PosteriorGate(
        HIDDEN_SIZE, NUM_EXPERTS, 7, k, score="race", pooling="hierarchy", surprise=3.0
    ),
    "several clusters": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, clusterings=2, neighbours=3),
    "learned prior": lambda k: PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, prior=LearnedPrior(width=9)),
    "learned prior linear": lambda k: PosteriorGate(
        HIDDEN_SIZE,
        NUM_EXPERTS,
        7,
        k,
        prior=LearnedPrior(None, 5.0, shrinkage=None, scale="competence"),
        pooling="hierarchy",
    ),
    "prior": lambda k: PriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k),
    "prior with amnesty": lambda k: PriorGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, amnesty=50.0, pooling=None),
    "expert threshold": lambda k: ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, k),
    "bandit ucb1": lambda k: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k),
    "bandit discounted ucb": lambda k: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, policy="discounted_ucb"),
    "bandit thompson": lambda k: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, 7, k, policy="thompson", threshold=0.5),
    "bandit without clusters": lambda k: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, top_k=k, contextual=False),
    "neighbours": lambda k: warm(NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, k, num_neighbours=7)),
    "neighbours by cosine": lambda k: warm(
        NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, k, num_neighbours=7, metric="cosine")
    ),
    "fixed": lambda k: warm(FixedGate(HIDDEN_SIZE, NUM_EXPERTS, k)),
    "oracle": lambda k: OracleGate(HIDDEN_SIZE, NUM_EXPERTS, k, competence=competence),
}
# These draws come from an explicit generator or from numpy, which a graph cannot hold, and are made per batch.
DRAWN_PER_BATCH = ["posterior thompson", "posterior race", "bandit thompson"]
# Memberships come beside the five fields of a Routing, which a graph's outputs have no place for.
COMPILED_WHOLE = [name for name in GATES if name not in (*DRAWN_PER_BATCH, "several clusters")]


def fitted(name: str, top_k: int = 2) -> Gate:
    gate = GATES[name](top_k)
    gate.fit(data(100))
    return gate


def assert_valid(routing: Routing, num_tokens: int, top_k: int) -> None:
    assert routing.expert_indices.shape == routing.routing_weights.shape == routing.scores.shape == (num_tokens, top_k)
    assert routing.cluster_ids.shape == routing.distance.shape == (num_tokens,)
    assert routing.expert_indices.dtype == routing.cluster_ids.dtype == torch.int64
    assert ((routing.expert_indices >= 0) & (routing.expert_indices < NUM_EXPERTS)).all()
    assert all(len(set(row)) == top_k for row in routing.expert_indices.tolist()), "an expert was chosen twice"


def assert_equal(first: Routing, second: Routing) -> None:
    for name in Routing._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
