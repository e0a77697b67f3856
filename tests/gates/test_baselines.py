import math

import pytest
import torch
from contracts import GATES, HIDDEN_SIZE, NUM_EXPERTS, assert_equal, competence, data, fitted
from oracles import best_experts, softmax
from torch import Tensor

from moe_posterior import InvalidArgumentError, NotFittedError
from moe_posterior.gates import BanditGate, ExpertThresholdGate, FixedGate, Gate, NearestNeighbourGate, OracleGate
from moe_posterior.gates.baselines import SoftmaxGate, soft_target_loss

LABELLED = {  # what learns from labelled rows
    "softmax": lambda: SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1),
    "softmax mlp": lambda: SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1, router_width=9),
    "threshold": lambda: ExpertThresholdGate(HIDDEN_SIZE, NUM_EXPERTS, 1),
    "bandit": lambda: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, top_k=1, contextual=False),
    "neighbours": lambda: NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, 1, num_neighbours=3),
    "fixed": lambda: FixedGate(HIDDEN_SIZE, NUM_EXPERTS, 1),
}
every_labelled = pytest.mark.parametrize("name", LABELLED)


def outcomes(num_tokens: int, seed: int = 1, missing: float = 0.3) -> Tensor:  # (N, E)
    generator = torch.Generator().manual_seed(seed)
    outcome = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    outcome[torch.rand(num_tokens, NUM_EXPERTS, generator=generator) < missing] = torch.nan
    return outcome


def loss_by_hand(logits: Tensor, outcome: Tensor) -> float:
    losses = []
    for row, result in zip(logits.tolist(), outcome.tolist(), strict=True):
        seen = [e for e, value in enumerate(result) if not math.isnan(value)]
        total = sum(result[e] for e in seen)
        probabilities = softmax([row[e] for e in seen], 1.0)
        losses.append(-sum(result[e] / total * math.log(p) for e, p in zip(seen, probabilities, strict=True)))
    return sum(losses) / len(losses)


def test_the_soft_target_loss_matches_a_loop_over_rows() -> None:
    logits, outcome = data(40, seed=2)[:, :NUM_EXPERTS].double(), outcomes(40).double()
    outcome[:, 0] = 0.5  # every row has a success
    assert float(soft_target_loss(logits, outcome)) == pytest.approx(loss_by_hand(logits, outcome), rel=1e-12)


def test_the_soft_target_loss_is_least_where_the_router_gives_the_targets() -> None:
    outcome = outcomes(20, missing=0.0).double()
    best = float(soft_target_loss(outcome.log(), outcome))  # softmax of the logs is the normalised outcome
    for seed in range(5):
        noise = torch.randn(outcome.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(soft_target_loss(outcome.log() + 0.1 * noise, outcome)) > best


def test_unobserved_experts_get_no_gradient() -> None:
    logits = data(30)[:, :NUM_EXPERTS].clone().requires_grad_()
    outcome = outcomes(30)
    outcome[:, 0] = 1.0
    soft_target_loss(logits, outcome).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[outcome.isnan()] == 0).all()


@pytest.mark.parametrize("router_width", [None, 9])
def test_a_trained_router_sends_each_kind_to_the_expert_that_knows_it(router_width: int | None) -> None:
    hidden = data(300)
    specialist = hidden[:, :NUM_EXPERTS].argmax(dim=1)
    outcome = torch.nn.functional.one_hot(specialist, NUM_EXPERTS).float()
    gate = SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1, router_width=router_width)
    loss = gate.warm_start(hidden, outcome)
    assert loss < 0.5 * math.log(NUM_EXPERTS)
    assert loss == pytest.approx(loss_by_hand(gate.router(hidden).detach(), outcome), rel=1e-4)
    fresh = data(200, seed=5)
    assert (gate(fresh).expert_indices[:, 0] == fresh[:, :NUM_EXPERTS].argmax(dim=1)).float().mean() > 0.85


def test_training_depends_on_rows_options_and_generator_alone() -> None:
    first, second = (SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1, router_width=9) for _ in range(2))
    losses = []
    for gate in (first, second):
        torch.rand(3)  # the global generator is nobody's business
        with torch.no_grad():  # nor is the caller's gradient mode
            generator = torch.Generator().manual_seed(4)
            losses.append(gate.warm_start(data(90), outcomes(90), epochs=3, batch_size=32, generator=generator))
    assert losses[0] == losses[1]
    assert_equal(first(data(20)), second(data(20)))
    second.warm_start(data(90), outcomes(90), epochs=3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first(data(20)).scores, second(data(20)).scores)


def test_rows_on_which_nobody_succeeded_teach_nothing() -> None:
    hidden, outcome = data(60), outcomes(60)
    failed = torch.where(outcomes(20, seed=3).isnan(), torch.nan, 0.0)
    gates = [SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS, 1) for _ in range(2)]
    alone = gates[0].warm_start(hidden, outcome, epochs=2)
    together = gates[1].warm_start(torch.cat([hidden, data(20, seed=9)]), torch.cat([outcome, failed]), epochs=2)
    assert alone == together


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": math.nan}, {"epochs": 0}, {"batch_size": 0}])
def test_training_options_out_of_range_are_refused_by_name(options: dict) -> None:
    gate = SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS)
    before = gate.router.weight.clone()
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        gate.warm_start(data(10), outcomes(10), **options)
    assert torch.equal(gate.router.weight, before)


def test_training_without_a_success_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must hold a row with a success; got 10 rows"):
        SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS).warm_start(data(10), torch.zeros(10, NUM_EXPERTS))


@every_labelled
@pytest.mark.parametrize(
    ("hidden", "outcome", "message"),
    [
        (torch.zeros(10, 3), torch.ones(10, 5), r"hidden must be floating point of shape \(N, 6\)"),
        (torch.full((10, 6), torch.nan), torch.ones(10, 5), "hidden must be finite; 10 of 10 rows"),
        (torch.zeros(10, 6), torch.ones(9, 5), r"outcome must be numbers of shape \(10, 5\).*got.*\(9, 5\)"),
        (torch.zeros(10, 6), torch.ones(10, 5) * 1j, "got torch.complex64"),
        (torch.zeros(10, 6), torch.full((10, 5), 1.5), r"must lie in \[0, 1\].*got 1.5 at \(0, 0\)"),
        (torch.zeros(10, 6), torch.full((10, 5), -torch.inf), r"must lie in \[0, 1\].*got -inf"),
    ],
)
def test_bad_labelled_rows_are_refused_and_change_nothing(
    name: str, hidden: Tensor, outcome: Tensor, message: str
) -> None:
    gate = LABELLED[name]()
    gate.warm_start(data(50), outcomes(50))
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    with pytest.raises(InvalidArgumentError, match=message):
        gate.warm_start(hidden, outcome)
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_labelled
def test_a_warm_start_forgets_the_one_before(name: str) -> None:
    once, twice = LABELLED[name](), LABELLED[name]()
    twice.warm_start(data(70, seed=8), outcomes(70, seed=8))
    for gate in (once, twice):
        gate.warm_start(data(50), outcomes(50))
    assert_equal(once(data(20, seed=2)), twice(data(20, seed=2)))


@pytest.mark.parametrize(
    "name", [name for name in GATES if not name.startswith(("posterior", "prior", "several", "learned"))]
)
def test_expected_outcomes_are_probabilities_of_the_chosen(name: str) -> None:
    gate = fitted(name)
    gate.observe(gate(data(60)), outcomes(60), dense=True)
    routing = gate(data(30, seed=4))
    expected = gate.expected_outcome(routing)
    assert expected.shape == routing.scores.shape
    assert expected.dtype == routing.scores.dtype
    assert ((expected >= 0) & (expected <= 1)).all()
    if not name.startswith(("bandit", "expert threshold")):  # these rank by something else than an estimate
        assert torch.equal(expected, routing.scores)


# --- the two ends of the scale


def test_the_fixed_gate_takes_the_best_means_and_counts_only_what_was_observed() -> None:
    gate, outcome = FixedGate(HIDDEN_SIZE, NUM_EXPERTS, 3), outcomes(80)
    outcome[:, 4] = torch.nan  # never seen: ½
    gate.warm_start(data(80), outcome)
    means = []
    for expert in range(NUM_EXPERTS):
        seen = [value for value in outcome[:, expert].tolist() if not math.isnan(value)]
        means.append(sum(seen) / len(seen) if seen else 0.5)
    best = best_experts(means, 0, 3)
    routing = gate(data(20))
    assert routing.expert_indices.tolist() == [best] * 20
    assert routing.scores[0].tolist() == pytest.approx([means[e] for e in best], rel=1e-6)
    assert routing.routing_weights[0].tolist() == pytest.approx(softmax([means[e] for e in best], 0.1), rel=1e-5)


def test_the_fixed_gate_asks_for_labelled_rows_first() -> None:
    gate = FixedGate(HIDDEN_SIZE, NUM_EXPERTS)
    assert not gate.fitted
    with pytest.raises(NotFittedError, match="call warm_start"):
        gate(data(3))
    with pytest.raises(InvalidArgumentError, match="at least one row"):
        gate.warm_start(torch.zeros(0, HIDDEN_SIZE), torch.zeros(0, NUM_EXPERTS))
    gate.load_state_dict(fitted("fixed").state_dict())
    assert gate.fitted


def test_the_oracle_takes_the_truly_best_and_no_gate_beats_it() -> None:
    hidden = data(200)
    truth = competence(hidden)
    oracle = OracleGate(HIDDEN_SIZE, NUM_EXPERTS, 1, competence=competence)
    for row, routing in zip(truth.tolist(), oracle(hidden).expert_indices.tolist(), strict=True):
        assert routing == best_experts(row, 0, 1)
    reached = float(oracle.expected_outcome(oracle(hidden)).mean())
    for name in GATES:
        chosen: Tensor = fitted(name, 1)(hidden).expert_indices
        assert float(truth.gather(1, chosen).mean()) <= reached + 1e-6, name


def test_the_oracles_truth_can_change_between_batches() -> None:
    gate = OracleGate(HIDDEN_SIZE, NUM_EXPERTS, 1, competence=competence)
    for expert in (3, 1):
        gate.competence = lambda hidden, expert=expert: torch.eye(NUM_EXPERTS)[[expert]].expand(len(hidden), -1)
        assert (gate(data(10)).expert_indices == expert).all()


def test_unknown_competence_ranks_last() -> None:
    truth = torch.tensor([[torch.nan, 0.2, torch.nan, 0.1, 0.3]])
    gate = OracleGate(HIDDEN_SIZE, NUM_EXPERTS, 4, competence=lambda hidden: truth)
    assert gate(data(1)).expert_indices.tolist() == [[4, 1, 3, 0]]


def test_an_oracle_that_answers_in_another_shape_is_refused() -> None:
    gate = OracleGate(HIDDEN_SIZE, NUM_EXPERTS, competence=lambda hidden: hidden)
    with pytest.raises(InvalidArgumentError, match=r"competence must answer in shape \(3, 5\); got \(3, 6\)"):
        gate(data(3))


@pytest.mark.parametrize(
    "build",
    [
        lambda t: FixedGate(HIDDEN_SIZE, NUM_EXPERTS, temperature=t),
        lambda t: OracleGate(HIDDEN_SIZE, NUM_EXPERTS, competence=competence, temperature=t),
        lambda t: NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, temperature=t),
        lambda t: BanditGate(HIDDEN_SIZE, NUM_EXPERTS, temperature=t),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_out_of_range_are_refused(build, temperature: float) -> None:
    with pytest.raises(InvalidArgumentError, match="temperature must be positive and finite"):
        build(temperature)


def test_every_gate_is_a_gate() -> None:
    assert all(isinstance(build(2), Gate) for build in GATES.values())
