"""One suite for every gate."""

import copy
import pickle

import pytest
import torch
from contracts import (
    COMPILED_WHOLE,
    DRAWN_PER_BATCH,
    GATES,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    assert_equal,
    assert_valid,
    data,
    fitted,
)

from moe_posterior import InvalidArgumentError
from moe_posterior.gates import BeliefGate

every_gate = pytest.mark.parametrize("name", GATES)


@every_gate
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_routings_are_valid_at_awkward_sizes(name: str, num_tokens: int, top_k: int) -> None:
    routing = fitted(name, top_k)(data(num_tokens, seed=1))
    assert_valid(routing, num_tokens, top_k)
    torch.testing.assert_close(routing.routing_weights.sum(dim=-1), torch.ones(num_tokens))
    assert (routing.scores.diff(dim=-1) <= 0).all(), "slots are not best first"


@every_gate
def test_a_single_expert_gets_weight_exactly_one(name: str) -> None:
    assert (fitted(name, 1)(data(50)).routing_weights == 1).all()


@every_gate
def test_forward_is_repeatable_and_changes_no_state(name: str) -> None:
    gate = fitted(name)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    assert_equal(gate(data(40)), gate(data(40)))
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_gate
def test_a_tokens_routing_does_not_depend_on_its_neighbours(name: str) -> None:
    if name in DRAWN_PER_BATCH:
        pytest.skip("draws are made per batch")
    gate, hidden = fitted(name), data(40)
    alone = torch.cat([gate(token[None]).expert_indices for token in hidden])
    assert torch.equal(gate(hidden).expert_indices, alone)


@every_gate
def test_what_a_belief_expects_of_the_chosen_is_the_mean_of_their_counts(name: str) -> None:
    gate = fitted(name)
    if not isinstance(gate, BeliefGate):
        pytest.skip("holds no belief")
    routing = gate(data(40, seed=1))
    counts = gate.counts_of(routing)
    assert counts.shape == (40, 2, gate.top_k)
    assert (counts > 0).all()
    if gate.recorded_options["novelty"] != "discount":
        torch.testing.assert_close((counts[:, 0] / counts.sum(dim=1)).float(), gate.expected_outcome(routing))


@every_gate
def test_state_dict_round_trip_routes_alike(name: str) -> None:
    gate = fitted(name)
    gate.observe(gate(data(30)), torch.rand(30, 2, generator=torch.Generator().manual_seed(2)))
    restored = GATES[name](2)
    restored.load_state_dict(gate.state_dict())
    assert_equal(gate(data(50, seed=3)), restored(data(50, seed=3)))


@every_gate
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_copies_route_alike_and_share_nothing(name: str, clone) -> None:
    gate = fitted(name)
    other, hidden = clone(gate), data(50)
    assert_equal(gate(hidden), other(hidden))
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    other.observe(other(hidden), torch.zeros(50, 2))
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key]), key
    if name.startswith("posterior") and "thompson" not in name:
        assert not torch.equal(other.topk_indices, gate.topk_indices), "the copy's tables follow the copy's belief"


@every_gate
@pytest.mark.parametrize("shape", [(10, HIDDEN_SIZE + 1), (HIDDEN_SIZE,), (2, 5, HIDDEN_SIZE)])
def test_hidden_of_a_wrong_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"hidden must be floating point of shape \(N, 6\); got"):
        fitted(name)(torch.zeros(shape))


@every_gate
def test_integer_hidden_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"got torch.int64"):
        fitted(name)(torch.zeros(3, HIDDEN_SIZE, dtype=torch.int64))


@every_gate
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_spoils_no_other_row_and_no_index(name: str, bad: float) -> None:
    gate, hidden = fitted(name), data(20)
    clean = gate(hidden)
    hidden[3, 2] = bad
    routing = gate(hidden)
    assert ((routing.expert_indices >= 0) & (routing.expert_indices < NUM_EXPERTS)).all()
    if name not in DRAWN_PER_BATCH:  # another cluster for row 3 shifts the stream of draws
        others = torch.arange(20) != 3
        assert torch.equal(routing.expert_indices[others], clean.expert_indices[others])
        assert torch.equal(routing.routing_weights[others], clean.routing_weights[others])


@every_gate
@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (torch.full((20, 2), 1.5), r"outcome must lie in \[0, 1\]"),
        (torch.full((20, 2), -torch.inf), r"outcome must lie in \[0, 1\]"),
        (torch.ones(20, 3), r"outcome must have shape \(20, 2\) \(one a slot\) or \(20, 5\) \(one an expert\); got"),
        (torch.ones(19, 2), r"got \(19, 2\)"),
        (torch.ones(20), r"got \(20,\)"),
    ],
)
def test_bad_outcomes_are_refused_and_change_nothing(name: str, outcome: torch.Tensor, message: str) -> None:
    gate = fitted(name)
    routing = gate(data(20))
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    with pytest.raises(InvalidArgumentError, match=message):
        gate.observe(routing, outcome)
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_gate
def test_outcomes_are_ambiguous_where_all_experts_are_chosen(name: str) -> None:
    gate = fitted(name, NUM_EXPERTS)
    routing = gate(data(20))
    with pytest.raises(InvalidArgumentError, match="ambiguous with top_k = num_experts = 5"):
        gate.observe(routing, torch.ones(20, NUM_EXPERTS))
    gate.observe(routing, torch.ones(20, NUM_EXPERTS), dense=True)


@every_gate
@pytest.mark.parametrize("top_k", [0, NUM_EXPERTS + 1])
def test_more_slots_than_experts_are_refused(name: str, top_k: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"top_k must lie in \[1, num_experts=5\]; got {top_k}"):
        GATES[name](top_k)


@pytest.mark.parametrize("name", COMPILED_WHOLE)
def test_compiles_to_one_graph_and_routes_alike(name: str) -> None:
    gate = fitted(name)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    gate.observe(gate(data(30)), torch.ones(30, 2))
    expected, actual = gate(data(50)), compiled(data(50))
    assert torch.equal(actual.expert_indices, expected.expert_indices)
    torch.testing.assert_close(actual.routing_weights, expected.routing_weights)


@every_gate
def test_low_precision_hidden_states_are_routed(name: str) -> None:
    gate = fitted(name).to(torch.bfloat16)
    assert_valid(gate(data(20).to(torch.bfloat16)), 20, 2)


@pytest.mark.parametrize("name", [name for name in GATES if name.startswith(("softmax", "posterior", "learned"))])
def test_a_gate_built_on_the_meta_device_loads_and_routes_alike(name: str) -> None:
    gate = fitted(name)
    gate.observe(gate(data(30)), torch.ones(30, 2))
    with torch.device("meta"):
        restored = GATES[name](2)
    restored.load_state_dict(gate.state_dict(), assign=True)
    assert_equal(restored(data(20)), gate(data(20)))
