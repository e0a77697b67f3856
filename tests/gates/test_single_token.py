"""One token without gradient is routed in numpy: by the same tables, whatever has happened to them in between."""

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_posterior import PosteriorGate, Routing

SIZE, CLUSTERS, EXPERTS = 16, 7, 5


def learned_gate(seed: int = 0, **options) -> PosteriorGate:
    generator = torch.Generator().manual_seed(seed)
    gate = PosteriorGate(SIZE, EXPERTS, CLUSTERS, top_k=2, **options)
    gate.clusterer.set_centroids(torch.randn(CLUSTERS, SIZE, generator=generator), radius=torch.full((CLUSTERS,), 4.0))
    hidden = torch.randn(200, SIZE, generator=generator)
    gate.observe(gate(hidden), torch.rand(200, EXPERTS, generator=generator))
    return gate


def assert_single_is_batch(gate: PosteriorGate, hidden: torch.Tensor) -> None:
    """The reference routes the whole batch; one by one the tokens must go the same way."""
    gate.backend, backend = "eager", gate.backend
    expected = gate(hidden)
    gate.backend = backend
    rows = [gate(token[None]) for token in hidden]
    for field in Routing._fields:
        found = torch.cat([getattr(row, field) for row in rows])
        assert found.dtype == getattr(expected, field).dtype
        torch.testing.assert_close(found, getattr(expected, field), msg=field)


@pytest.fixture
def tokens(generator) -> torch.Tensor:
    hidden = 2 * torch.randn(60, SIZE, generator=generator)
    hidden[0, 0], hidden[1, 1], hidden[2] = torch.nan, torch.inf, -torch.inf
    return hidden


@pytest.mark.parametrize("novelty", ["off", "discount", "class"])
@pytest.mark.parametrize("lazy", [False, True])
def test_one_by_one_is_as_in_a_batch(tokens, novelty, lazy) -> None:
    assert_single_is_batch(learned_gate(novelty=novelty, lazy=lazy), tokens)


def load(gate: PosteriorGate, other: PosteriorGate, assign: bool) -> PosteriorGate:
    gate.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    return gate


def shared(gate: PosteriorGate) -> PosteriorGate:
    gate.share_memory()
    gate.observe(gate(torch.ones(30, SIZE)), torch.zeros(30, gate.num_experts))
    return gate


def learned_more(gate: PosteriorGate) -> PosteriorGate:
    gate.observe(gate(torch.ones(30, SIZE)), torch.zeros(30, gate.num_experts))
    return gate


@pytest.mark.parametrize(
    "change",
    [
        learned_more,
        shared,
        lambda gate: load(gate, learned_gate(seed=1), assign=False),
        lambda gate: load(gate, learned_gate(seed=1), assign=True),
        lambda gate: learned_more(copy.deepcopy(gate)),
        lambda gate: learned_more(pickle.loads(pickle.dumps(gate))),
        lambda gate: gate.to(torch.bfloat16),
        lambda gate: learned_more(gate.double()),
        lambda gate: (gate.clusterer.set_centroids(torch.eye(CLUSTERS, SIZE)), gate)[1],
        lambda gate: (gate.fit(torch.randn(50, SIZE, generator=torch.Generator().manual_seed(2))), gate)[1],
        lambda gate: (gate.configure(risk_aversion=4.0), gate)[1],
        lambda gate: (gate.add_expert(), learned_more(gate))[1],
        lambda gate: (gate.replace_expert(1), gate)[1],
    ],
)
def test_the_kept_views_follow_every_change(tokens, change) -> None:
    gate = learned_gate()
    gate(tokens[5:6])  # the views are made
    assert_single_is_batch(change(gate), tokens)


def test_a_gate_saved_whole_is_loaded_whole(tokens) -> None:
    gate, file = learned_gate(), io.BytesIO()
    gate(tokens[5:6])
    torch.save(gate, file)
    file.seek(0)
    assert_single_is_batch(torch.load(file, weights_only=False), tokens)


def test_what_is_done_to_a_routing_does_not_reach_the_tables(tokens) -> None:
    gate = learned_gate()
    first = gate(tokens[5:6])
    kept = [field.clone() for field in first]
    for field in first:
        field.zero_()
    for again, expected in zip(gate(tokens[5:6]), kept, strict=True):
        assert torch.equal(again, expected)


def test_a_routing_does_not_change_when_the_gate_learns(tokens) -> None:
    gate = learned_gate()
    routing = gate(tokens[5:6])
    before = [field.clone() for field in routing]
    gate.observe(routing, torch.zeros(1, EXPERTS))
    assert all(torch.equal(field, kept) for field, kept in zip(routing, before, strict=True))


def test_a_token_with_gradient_keeps_it_and_without_grad_mode_does_not_need_it(tokens) -> None:
    gate, token = learned_gate(), tokens[5:6].clone().requires_grad_()
    gate(token).distance.sum().backward()
    assert token.grad is not None
    with torch.no_grad():
        assert not gate(token).distance.requires_grad


def test_a_trace_holds_no_decision_of_the_example(tokens) -> None:
    class Chosen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = learned_gate()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.gate(hidden).expert_indices

    module = Chosen()
    traced = torch.jit.trace(module, tokens[5:6])
    assert torch.equal(torch.cat([traced(token[None]) for token in tokens]), module(tokens))


def test_a_fake_token_is_routed_as_a_batch_is() -> None:
    gate = learned_gate()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        routing = gate(mode.from_tensor(torch.randn(1, SIZE)))
    assert routing.expert_indices.shape == (1, 2)
