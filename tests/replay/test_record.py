import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_posterior import (
    InvalidArgumentError,
    MixtureOfExperts,
    NotFittedError,
    PosteriorMoE,
    PriorGate,
    SoftmaxGate,
    record,
)

D, E = 6, 5


def data(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(0))


def moe(top_k: int = 2) -> PosteriorMoE:
    layer = PosteriorMoE(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), hidden_size=D, num_clusters=3, top_k=top_k)
    layer.gate.fit(data(50))
    return layer


def evidence(layer: PosteriorMoE) -> float:
    return float((layer.gate.posterior.successes + layer.gate.posterior.failures).sum())


def test_all_layers_are_credited_once() -> None:
    model = nn.Sequential(moe(), moe())
    with record(model) as trace:
        model(data(10).reshape(2, 5, D))
    assert [name for name, _ in trace.routings] == ["0.gate", "1.gate"]
    outcome = torch.ones(2, 5)
    outcome[0, 0] = torch.nan  # padding
    trace.observe(outcome)
    assert evidence(model[0]) == evidence(model[1]) == 9 * 2
    with pytest.raises(InvalidArgumentError, match="holds no routings"):
        trace.observe(outcome)


def test_hooks_are_gone_after_the_block_and_after_an_error() -> None:
    model = moe()
    with pytest.raises(RuntimeError, match="stop"), record(model) as trace:
        raise RuntimeError("stop")
    model(data(5))
    assert len(trace) == 0


def test_a_bad_outcome_is_refused_before_any_layer_learns() -> None:
    model = nn.Sequential(moe(), moe())
    with record(model) as trace:
        model(data(4))
    for bad in (torch.ones(5), torch.tensor([0.0, 1.0, 1.5, 1.0])):
        with pytest.raises(InvalidArgumentError, match="outcome must"):
            trace.observe(bad)
    assert evidence(model[0]) == evidence(model[1]) == 0
    trace.observe(torch.ones(4))
    assert evidence(model[0]) == 8


def test_the_gradients_sign_says_whether_an_experts_share_lowered_the_loss() -> None:
    model, hidden = moe(), data(40)
    target = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    with record(model) as trace:
        output = model(hidden)
    (output - target).square().sum().backward()
    (_, routing) = trace.routings[0]
    trace.observe_gradients()
    # By hand: the loss falls as a slot's weight grows iff <dL/dy, expert output> < 0.
    successes = torch.zeros(3, E, dtype=torch.float64)
    slope = 2 * (output - target).detach()
    for i in range(40):
        for expert in routing.expert_indices[i].tolist():
            helped = float(slope[i] @ model.experts[expert](hidden[i]).detach()) < 0
            successes[routing.cluster_ids[i], expert] += helped
    assert torch.equal(model.gate.posterior.successes, successes)
    assert evidence(model) == 80


def test_an_expert_that_does_nothing_did_not_help_and_a_token_without_loss_says_nothing() -> None:
    model, hidden = moe(), data(40)
    with torch.no_grad():
        for parameter in model.experts[1].parameters():
            parameter.zero_()
    with record(model) as trace:
        output = model(hidden)
    output[:30].square().sum().backward()
    (_, routing, outcome) = trace.gradient_outcomes()[0]
    dead = routing.expert_indices[:30] == 1
    assert dead.any()
    assert (outcome[:30][dead] == 0).all()
    assert not outcome[:30].isnan().any()
    assert outcome[30:].isnan().all()


def test_learned_gates_keep_their_own_gradient_under_record() -> None:
    model = MixtureOfExperts(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), SoftmaxGate(D, E, 2))
    model(data(20)).square().sum().backward()
    plain = model.gate.router.weight.grad.clone()
    model.zero_grad()
    with record(model):
        model(data(20)).square().sum().backward()
    assert torch.equal(plain, model.gate.router.weight.grad)


def test_gradients_before_a_backward_are_an_error_that_says_what_to_do() -> None:
    model = moe()
    with record(model) as trace:
        model(data(4))
    with pytest.raises(InvalidArgumentError, match=r"call loss.backward\(\)"):
        trace.observe_gradients()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("by_gradient", [True, False])
def test_activation_checkpointing_records_every_token_once(reentrant: bool, inside: bool, by_gradient: bool) -> None:
    model, plain, hidden = moe(), moe(), data(40)
    plain.load_state_dict(model.state_dict())
    with record(plain) as reference:
        plain(hidden).square().sum().backward()
    with record(model) as trace:
        loss = checkpoint(model, hidden.clone().requires_grad_(), use_reentrant=reentrant).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    if by_gradient:
        trace.observe_gradients()
        reference.observe_gradients()
        assert torch.equal(model.gate.posterior.successes, plain.gate.posterior.successes)
    else:
        trace.observe(torch.ones(40))
    assert evidence(model) == 80


def test_a_later_forward_is_not_recorded_while_the_trace_waits() -> None:
    model = moe()
    with record(model) as trace:
        model(data(10))
    model(data(20)).sum().backward()
    assert len(trace) == 1
    trace.observe(torch.ones(10))
    assert not model.gate._forward_hooks


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must not be compiled"), record(torch.compile(moe())):
        pass


def test_recording_changes_no_output() -> None:
    model = moe()
    with record(model):
        recorded = model(data(20))
    assert torch.equal(recorded, model(data(20)))


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="Linear holds none"), record(nn.Linear(2, 2)):
        pass


def test_a_trace_that_nobody_observes_is_gone_with_its_hooks() -> None:
    model = moe()
    for _ in range(3):
        with record(model) as trace:
            model(data(4))
    assert len(model.gate._forward_hooks) == 1
    del trace
    assert not model.gate._forward_hooks


def test_a_copy_or_pickle_of_a_recorded_model_does_not_write_into_the_originals_trace() -> None:
    model = moe()
    with record(model) as trace:
        before = model(data(4))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(data(4)), before)
    assert len(trace) == 1


def test_a_gate_without_clusters_is_named_before_any_layer_learns() -> None:
    gates = [PriorGate(D, E, 3, 2) for _ in range(2)]
    model = nn.Sequential(
        *(MixtureOfExperts(nn.ModuleList([nn.Linear(D, D) for _ in range(E)]), gate) for gate in gates)
    )
    gates[0].fit(data(50))
    with record(model) as trace:
        model(data(4)).sum().backward()
    for observe in (trace.observe_gradients, lambda: trace.observe(torch.ones(4))):
        with pytest.raises(NotFittedError, match="no clusters"):
            observe()
    assert float(gates[0].posterior.successes.sum() + gates[0].posterior.failures.sum()) == 0
