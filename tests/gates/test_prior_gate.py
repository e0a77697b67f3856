import math

import pytest
import torch
from torch import Tensor, nn

from moe_posterior import InvalidArgumentError, NotFittedError, PriorGate, SoftmaxGate, record, replay
from moe_posterior.gates.tempering import evidence_bias, reference_from, shortfall

HIDDEN, EXPERTS, CLUSTERS = 5, 4, 3


def hidden_states(count: int, seed: int = 0) -> Tensor:  # (N, D)
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def healthy(top_k: int = 2, **knobs: float | bool | None) -> PriorGate:
    """Fitted, and held to a competence of 0.7 everywhere."""
    gate = PriorGate(HIDDEN, EXPERTS, CLUSTERS, top_k, **knobs)  # type: ignore[arg-type]
    gate.fit(hidden_states(300))
    gate.warm_start_from_counts(torch.full((CLUSTERS, EXPERTS), 70.0), torch.full((CLUSTERS, EXPERTS), 30.0))
    return gate


def test_without_evidence_it_is_the_softmax_gate_bit_for_bit() -> None:
    gate, softmax, hidden = healthy(), SoftmaxGate(HIDDEN, EXPERTS, 2), hidden_states(200, seed=1)
    assert gate.router is not None
    softmax.router.load_state_dict(gate.router.state_dict())
    ours, theirs = gate(hidden), softmax(hidden)
    assert torch.equal(ours.expert_indices, theirs.expert_indices)
    torch.testing.assert_close(ours.routing_weights, theirs.routing_weights)
    assert not gate.biased
    assert (gate.evidence_bias == 0).all()


class Adapted(nn.Module):
    """A router with something on top, as LoRA adapters are."""

    def __init__(self, router: nn.Linear) -> None:
        super().__init__()
        self.router, self.weight = router, router.weight
        self.extra = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.router(hidden) + self.extra(hidden)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clusters_alone_change_no_bit_of_what_any_router_says(dtype: torch.dtype, adapted: bool) -> None:
    gate, hidden = PriorGate(HIDDEN, EXPERTS, CLUSTERS, EXPERTS), hidden_states(200, seed=1).to(dtype)
    linear = nn.Linear(HIDDEN, EXPERTS)
    with torch.no_grad():
        linear.bias.copy_(torch.arange(EXPERTS))
    gate.router = Adapted(linear) if adapted else linear  # type: ignore[assignment]
    gate.to(dtype)
    assert gate.router is not None
    expected = gate.router(hidden).float()
    gate.fit(hidden_states(300))
    routing = gate(hidden)
    assert torch.equal(routing.scores, expected.gather(1, routing.expert_indices))
    assert torch.equal(routing.routing_weights, torch.softmax(routing.scores, dim=-1))
    with record(gate) as trace:
        gate(hidden)
    with replay(gate, trace, weights="recomputed"):
        assert torch.equal(gate(hidden).routing_weights, routing.routing_weights)


def test_before_a_fit_broken_rows_and_removed_experts_are_treated_as_after_one() -> None:
    gate, hidden = PriorGate(HIDDEN, EXPERTS, CLUSTERS, top_k=2), hidden_states(100, seed=1)
    hidden[3] = torch.nan
    assert gate(hidden).routing_weights[3].tolist() == [0.5, 0.5]
    gate.remove_expert(2)
    assert not (gate(hidden_states(100)).expert_indices == 2).any()


def test_an_explicit_kernel_refuses_a_router_that_is_more_than_its_weight() -> None:
    gate = healthy(backend="triton")  # type: ignore[arg-type]
    gate.router = Adapted(nn.Linear(HIDDEN, EXPERTS))  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"'triton' needs a plain nn\.Linear as router"):
        gate(hidden_states(3))


def test_an_expert_as_good_as_it_was_keeps_its_logits_exactly() -> None:
    gate, hidden = healthy(), hidden_states(400, seed=1)
    before = gate(hidden)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        gate.observe(before, torch.bernoulli(torch.full((400, 2), 0.7), generator=generator))
    assert float(gate.posterior.successes.sum()) > 100
    assert not gate.biased
    assert torch.equal(gate(hidden).scores, before.scores)


def test_an_expert_that_fails_loses_its_tokens_and_only_it() -> None:
    gate, hidden = healthy(top_k=1), hidden_states(1000, seed=1)
    before = gate(hidden)
    victim = int(before.expert_indices.mode(dim=0).values)
    failed = before.expert_indices == victim
    gate.observe(before, torch.where(failed, 0.0, 0.7))
    after = gate(hidden)
    assert failed.any()
    assert not (after.expert_indices == victim).any()
    assert torch.equal(after.expert_indices[~failed], before.expert_indices[~failed])


def test_the_bias_is_the_formula_cell_by_cell() -> None:
    gate = healthy(pooling=None, penalty=7.0, confidence=1.5, strength=20.0, half_life=None)
    successes = torch.arange(12.0, dtype=torch.float64).reshape(CLUSTERS, EXPERTS)
    failures = torch.full((CLUSTERS, EXPERTS), 9.0, dtype=torch.float64)
    gate.posterior.successes.copy_(successes)
    gate.posterior.failures.copy_(failures)
    gate.posterior._changed()
    for cluster in range(CLUSTERS):
        for expert in range(EXPERTS):
            held = float(gate.reference[cluster, expert])
            alpha = 20 * held + float(successes[cluster, expert])
            total = 20 + float(successes[cluster, expert]) + 9
            mean = alpha / total
            upper = mean + 1.5 * math.sqrt(mean * (1 - mean) / (total + 1))
            expected = 7 * min(0.0, math.log(upper / held))
            assert float(gate.evidence_bias[cluster, expert]) == pytest.approx(expected, abs=1e-6)


def test_a_failure_seen_in_one_cluster_warns_in_the_others_with_pooling_alone() -> None:
    outcome, ids = torch.zeros(500, 1), torch.zeros(500, dtype=torch.int64)
    biases = []
    for pooling in (30.0, None):
        gate = healthy(pooling=pooling)
        gate.posterior.observe(ids, outcome, torch.full((500, 1), 2))
        biases.append(gate.evidence_bias)
    pooled, apart = biases
    assert (pooled[:, 2] < -1).all()
    assert apart[0, 2] < -1
    assert (apart[1:, 2] == 0).all()
    assert (pooled[:, [0, 1, 3]] == 0).all()


def test_without_the_rule_luck_moves_logits_both_ways() -> None:
    gate = healthy(innocent=False, pooling=None)
    gate.posterior.observe(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0, torch.nan, torch.nan]] * 2))
    assert gate.evidence_bias[0, 0] > 0 > gate.evidence_bias[0, 1]
    assert (gate.evidence_bias[0, 2:].abs() < 1e-5).all()


def test_amnesty_lets_an_expert_come_back_that_is_no_longer_asked() -> None:
    forgiving, strict, hidden = (
        healthy(top_k=1, amnesty=500.0),
        healthy(top_k=1, amnesty=None),
        hidden_states(500, seed=1),
    )
    strict.load_state_dict(forgiving.state_dict())
    returned = []
    for gate in (forgiving, strict):
        before = gate(hidden)
        victim = int(before.expert_indices.mode(dim=0).values)
        gate.observe(before, torch.where(before.expert_indices == victim, 0.0, 0.7))
        for _ in range(12):
            routing = gate(hidden)
            gate.observe(routing, torch.full((500, 1), 0.7))
        returned.append(bool((gate(hidden).expert_indices == victim).any()))
    assert returned == [True, False]


def test_amnesty_halves_the_evidence_after_as_many_tokens() -> None:
    gate = healthy(top_k=1, amnesty=100.0, half_life=None)
    hidden = hidden_states(100, seed=1)
    gate.observe(gate(hidden), torch.ones(100, 1))
    gate.observe(gate(hidden), torch.ones(100, 1))
    assert float(gate.posterior.successes.sum()) == pytest.approx(150.0)
    unobserved = torch.full((100, 1), torch.nan)
    gate.observe(gate(hidden), unobserved)
    assert float(gate.posterior.successes.sum()) == pytest.approx(150.0), "tokens without an outcome are no time"


def test_refused_outcomes_change_nothing_with_amnesty() -> None:
    gate = healthy(amnesty=10.0)
    hidden = hidden_states(50)
    gate.observe(gate(hidden), torch.ones(50, 2))
    before = gate.posterior.successes.clone()
    with pytest.raises(InvalidArgumentError, match="outcome must lie"):
        gate.observe(gate(hidden), torch.full((50, 2), 2.0))
    assert torch.equal(gate.posterior.successes, before)


def test_before_a_fit_it_routes_and_refuses_evidence() -> None:
    gate = PriorGate(HIDDEN, EXPERTS, CLUSTERS, 2)
    routing = gate(hidden_states(10))
    with pytest.raises(NotFittedError, match="no clusters to hold evidence yet"):
        gate.observe(routing, torch.ones(10, 2))


def test_learned_weights_stay_trainable_and_gradients_are_credited() -> None:
    gate, hidden = healthy(), hidden_states(60)
    target = torch.randn(60, 2, generator=torch.Generator().manual_seed(5))
    with record(gate) as trace:
        loss = (gate(hidden).routing_weights * target).sum()
    loss.backward()
    assert gate.router is not None
    assert gate.router.weight.grad is not None
    assert gate.router.weight.grad.abs().sum() > 0
    trace.observe_gradients()
    assert float(gate.posterior.successes.sum()) == pytest.approx(float((target < 0).sum()), rel=0.2)


def test_a_removed_expert_is_never_chosen() -> None:
    gate, hidden = healthy(top_k=3), hidden_states(200)
    gate.remove_expert(1)
    assert not (gate(hidden).expert_indices == 1).any()
    with pytest.raises(InvalidArgumentError, match="expert 0 cannot be removed: top_k=3"):
        gate.remove_expert(0)


def test_state_dict_restores_the_bias() -> None:
    gate, other, hidden = healthy(), PriorGate(HIDDEN, EXPERTS, CLUSTERS, 2), hidden_states(300, seed=1)
    gate.observe(gate(hidden), torch.zeros(300, 2))
    assert gate.biased
    other.load_state_dict(gate.state_dict())
    assert other.biased
    assert torch.equal(gate.evidence_bias, other.evidence_bias)


def test_references_of_rare_cells_are_drawn_to_expert_and_cluster() -> None:
    successes = torch.tensor([[90.0, 50.0], [60.0, 0.0]], dtype=torch.float64)
    failures = torch.tensor([[10.0, 50.0], [40.0, 0.0]], dtype=torch.float64)
    held = reference_from(successes, failures)
    assert 0 < float(held[1, 1]) < 0.5, "a hard cluster and a weak expert"
    many = reference_from(1e6 * successes[:, :1], 1e6 * failures[:, :1])
    torch.testing.assert_close(many[:, 0], torch.tensor([0.9, 0.6], dtype=torch.float64), atol=1e-3, rtol=0)


def test_shortfall_is_one_for_whoever_reaches_the_reference() -> None:
    reference = torch.full((6, 3), 0.6, dtype=torch.float64)
    total = torch.full((6, 3), 50.0, dtype=torch.float64)
    rates = torch.tensor([0.6, 0.9, 0.1], dtype=torch.float64)
    share = shortfall(total * rates, total * (1 - rates), reference, 30.0, 2.0)
    assert share[:2].tolist() == [1.0, 1.0]
    wanted = (30 * 0.6 + 30 + 2 * math.sqrt(300 * 0.24)) / (30 * 0.6 + 180)
    assert float(share[2]) == pytest.approx(wanted)


def test_the_penalty_grows_as_doubt_shrinks() -> None:
    reference, scale = torch.full((1, 5), 0.8), torch.tensor([[1.0, 3.0, 10.0, 30.0, 1000.0]])
    bias = evidence_bias(24 + 0.3 * scale, 6 + 0.7 * scale, reference, penalty=20.0, confidence=2.0)[0]
    assert bias[0] == 0
    assert (bias.diff() <= 0).all()
    assert float(bias[-1]) == pytest.approx(20 * math.log(0.3146 / 0.8), rel=0.15)


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"confidence": math.nan}, "confidence must be at least 0"),
        ({"strength": 0.0}, "strength must be positive"),
        ({"amnesty": -5.0}, "amnesty must be positive"),
        ({"pooling": math.inf}, "pooling must be positive"),
        ({"half_life": 0.0}, "half_life must be positive"),
    ],
)
def test_knobs_out_of_range_are_refused(knob: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        PriorGate(HIDDEN, EXPERTS, CLUSTERS, 2, **knob)  # type: ignore[arg-type]


def test_counts_that_are_none_are_refused() -> None:
    gate = healthy()
    held = gate.reference.clone()
    with pytest.raises(InvalidArgumentError, match=r"failures must be finite and at least 0; got -1 at \(0, 0\)"):
        gate.warm_start_from_counts(torch.ones(CLUSTERS, EXPERTS), torch.full((CLUSTERS, EXPERTS), -1.0))
    assert torch.equal(gate.reference, held)


def test_evidence_that_arrives_by_an_average_of_models_counts() -> None:
    gate, hidden = healthy(top_k=1), hidden_states(1000, seed=1)
    average = torch.optim.swa_utils.AveragedModel(gate)
    gate.observe(gate(hidden), torch.zeros(1000, 1))
    assert gate.biased
    average.update_parameters(gate)
    assert torch.equal(average(hidden).scores, gate(hidden).scores)
