"""A gate with a learned prior as a routing function, against the gate it comes from."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, LearnedPrior, MixtureOfExperts, NotFittedError, PosteriorGate
from moe_posterior.serving import LearnedRouting, export_routing, load_routing, save_routing, update_routing

D, E, C, K = 6, 7, 4, 2


def data(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed))


def outcomes(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(seed)).double()


def gate_of(width: int | None = 9, scale: str = "odds", **options: Any) -> PosteriorGate:
    torch.manual_seed(3)
    gate = PosteriorGate(D, E, C, K, prior=LearnedPrior(width, scale=scale), **options)
    gate.fit(data(200))
    gate.learn_prior(data(200, 7), outcomes(200, E, 8))
    gate.observe(gate(data(60, 2)), outcomes(60, K, 3))
    return gate


def exported(gate: PosteriorGate) -> LearnedRouting:
    function = export_routing(MixtureOfExperts(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), gate))["gate"]
    assert isinstance(function, LearnedRouting)
    return function


def serve(function: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return function(hidden_states=hidden, gating_output=torch.zeros(len(hidden), E), topk=K, renormalize=True)


def assert_as_the_gate(function: Any, gate: PosteriorGate, hidden: Tensor) -> None:
    weights, ids = serve(function, hidden)
    routing = gate(hidden)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), routing.expert_indices)
    assert torch.equal(weights, routing.routing_weights)


OPTIONS = [
    {},
    {"width": None, "score": "mean"},
    {"novelty": "off", "risk_aversion": 2.0},
    {"novelty": "class", "temperature": 0.3},
    {"surprise": 1.0, "half_life": 9.0},
    {"false_positive_rate": 0.1},
    {"scale": "competence"},
    {"scale": "competence", "novelty": "off", "surprise": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_chooses_and_weighs_as_the_gate_bit_for_bit(options: dict) -> None:
    gate = gate_of(**options)
    hidden = torch.cat([data(100, 5), 4 * data(50, 6)])  # some of them novel
    hidden[3, 1] = torch.nan
    assert_as_the_gate(exported(gate), gate, hidden)


def test_removed_experts_are_not_served_and_later_evidence_is_taken() -> None:
    gate, hidden = gate_of(), data(100, 5)
    function = exported(gate)
    gate.remove_expert(int(serve(function, hidden)[1][0, 0]))
    gate.observe(gate(data(60, 9)), outcomes(60, K, 10))
    gate.configure(risk_aversion=3.0)
    before = serve(function, hidden)
    function.refresh(gate)
    assert_as_the_gate(function, gate, hidden)
    assert not torch.equal(serve(function, hidden)[1], before[1])


def test_it_travels_by_file_and_by_pickle_and_compiles_to_one_graph(tmp_path: Path) -> None:
    gate, hidden = gate_of(), data(100, 5)
    function = exported(gate)
    save_routing({"gate": function}, tmp_path / "routing")
    again = load_routing(tmp_path / "routing")["gate"]
    assert again.settings() == function.settings()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for other in (again, pickle.loads(pickle.dumps(function)), compiled):
        for one, two in zip(serve(other, hidden), serve(function, hidden), strict=True):
            torch.testing.assert_close(one, two)
    gate.observe(gate(data(60, 9)), outcomes(60, K, 10))
    save_routing({"gate": exported(gate)}, tmp_path / "routing")
    update_routing({"gate": again}, tmp_path / "routing")
    assert_as_the_gate(again, gate, hidden)


@pytest.mark.parametrize(
    "options", [{"score": "thompson"}, {"score": "quantile"}, {"exploration": 0.1}, {"pooling": "hierarchy"}], ids=str
)
def test_what_a_host_cannot_carry_is_refused_by_name(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(InvalidArgumentError, match=rf"gate 'gate' cannot be served: .*{name}={value}|{name}='{value}'"):
        exported(gate_of(**options))


def test_a_map_of_ones_own_and_a_gate_without_clusters_are_refused() -> None:
    gate = gate_of()
    gate.prior.map.insert(1, nn.Dropout())
    with pytest.raises(InvalidArgumentError, match="prior's map must be linear layers with ReLUs"):
        exported(gate)
    with pytest.raises(NotFittedError):
        exported(PosteriorGate(D, E, C, K, prior="learned"))


def test_a_file_with_an_impossible_strength_is_refused(tmp_path: Path) -> None:
    function = exported(gate_of())
    function.strength[1, 2] = -1.0
    save_routing({"gate": function}, tmp_path / "routing")
    with pytest.raises(InvalidArgumentError, match="strength must be positive and finite"):
        load_routing(tmp_path / "routing")
