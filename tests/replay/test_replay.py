from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_posterior import InvalidArgumentError, MixtureOfExperts, PosteriorGate, PriorGate, SoftmaxGate, record
from moe_posterior.errors import DamagedFileError
from moe_posterior.files.tensorfile import load_tensors, save_tensors
from moe_posterior.gates import FixedGate, Gate
from moe_posterior.replay import recording_from_experts, replay
from moe_posterior.replay.checkpointing import signature
from moe_posterior.replay.saving import load_recording

D, E, C, K = 6, 5, 3, 2


def data(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed))


def posterior_gate() -> Gate:
    gate = PosteriorGate(D, E, C, K)
    gate.fit(data(50))
    return gate


def prior_gate() -> Gate:
    gate = PriorGate(D, E, C, K)
    gate.fit(data(50))
    gate.observe(gate(data(50)), torch.zeros(50, K))
    assert gate.biased
    return gate


def softmax_gate() -> Gate:
    return SoftmaxGate(D, E, K)


KINDS = [posterior_gate, prior_gate, softmax_gate]


def layers(make: Callable[[], Gate], count: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        *(MixtureOfExperts(nn.ModuleList(nn.Linear(D, D) for _ in range(E)), make()) for _ in range(count))
    )


def estrange(model: nn.Module) -> None:
    """Give the gates other beliefs and weights, so that they would choose otherwise."""
    generator = torch.Generator().manual_seed(9)
    for gate in [module for module in model.modules() if isinstance(module, Gate)]:
        if isinstance(gate, PosteriorGate | PriorGate):
            outcome = torch.rand(C, E, generator=generator).round()
            gate.posterior.observe(torch.arange(C).repeat(30), outcome.repeat(30, 1))
        for weight in gate.parameters():
            nn.init.normal_(weight, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def batches() -> list[Tensor]:
    return [data(7, 1), data(0), data(7, 2), data(12, 3)]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("saved", [False, True])
def test_outputs_repeat_bit_for_bit_whatever_became_of_the_gates(make: Callable, saved: bool, tmp_path: Path) -> None:
    model = layers(make, 3)
    with record(model) as trace:
        before = [model(batch) for batch in batches()]
    if saved:
        trace.save(tmp_path / "routing")
    trace.close()
    estrange(model)
    assert not torch.equal(model(batches()[0]), before[0])
    with replay(model, tmp_path / "routing" if saved else trace):
        after = [model(batch) for batch in batches()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not torch.equal(model(batches()[0]), before[0])  # and the gates decide for themselves again
    assert not any(gate._forward_hooks for gate in model.modules() if isinstance(gate, Gate))


def test_gradients_repeat_bit_for_bit() -> None:
    model = layers(posterior_gate, 3)
    inputs = [batch.requires_grad_() for batch in batches()]
    with record(model) as trace:
        torch.cat([model(batch) for batch in inputs]).square().sum().backward()
    trace.close()
    before, of_inputs = gradients(model), [batch.grad.clone() for batch in inputs]
    for batch in inputs:
        batch.grad = None
    estrange(model)
    with replay(model, trace):
        torch.cat([model(batch) for batch in inputs]).square().sum().backward()
    assert same(gradients(model), before)
    assert all(torch.equal(batch.grad, was) for batch, was in zip(inputs, of_inputs, strict=True))


@pytest.mark.parametrize("make", KINDS)
def test_recomputed_weights_and_their_gradients_are_those_of_an_unchanged_gate(make: Callable) -> None:
    model = layers(make, 2)
    with record(model) as trace:
        before = torch.cat([model(batch) for batch in batches()])
    before.square().sum().backward()
    trace.close()
    expected = gradients(model)
    with replay(model, trace, weights="recomputed"):
        after = torch.cat([model(batch) for batch in batches()])
        after.square().sum().backward()
    assert torch.equal(before, after)
    assert same(gradients(model), expected)


@pytest.mark.parametrize("make", KINDS)
def test_recomputed_weights_follow_the_changed_gate_on_the_recorded_choice(make: Callable) -> None:
    model, hidden = layers(make, 1), data(9)
    with record(model) as trace:
        model(hidden)
    (_, was) = trace.routings[0]
    estrange(model)
    gate = model[0].gate
    with replay(model, trace, weights="recomputed"), record(model) as seen:
        model(hidden).sum().backward()
    (_, now) = seen.routings[0]
    assert torch.equal(now.expert_indices, was.expert_indices)
    for token in range(9):
        chosen = was.expert_indices[token].tolist()
        if isinstance(gate, PosteriorGate):
            scores = gate.competence_scores()[now.cluster_ids[token]] / gate.temperature
        else:
            scores = gate.router.weight.detach().double() @ hidden[token].double()
        if isinstance(gate, PriorGate):
            scores = scores + gate.evidence_bias[now.cluster_ids[token]]
        weights = torch.tensor([float(scores[expert].exp()) for expert in chosen])
        torch.testing.assert_close(now.routing_weights[token].detach(), weights / weights.sum(), rtol=1e-5, atol=1e-6)
    if not isinstance(gate, PosteriorGate):
        assert gate.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [posterior_gate, prior_gate])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["inside", "after", "each inside", "first to last"])
@pytest.mark.parametrize("weights", ["recorded", "recomputed"])
def test_activation_checkpointing_runs_a_call_again_with_its_own_routing(
    make: Callable, reentrant: bool, backward: str, weights: str
) -> None:
    model = layers(make, 2)
    inputs = [data(7, seed).requires_grad_() for seed in (1, 2, 3)]

    def run(source: object, again: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        losses = []
        with replay(model, source, weights=weights):
            for batch in inputs:
                output = batch
                for layer in model:
                    output = checkpoint(layer, output, use_reentrant=reentrant) if again else layer(output)
                losses.append(output.square().sum())
                if backward == "each inside":
                    losses[-1].backward()
            if backward == "inside":
                sum(losses).backward()
        if backward == "after":
            sum(losses).backward()
        elif backward == "first to last":
            for loss in losses:
                loss.backward()
        found = gradients(model) | {str(i): batch.grad for i, batch in enumerate(inputs)}
        for batch in inputs:
            batch.grad = None
        return [loss.detach() for loss in losses], found

    with record(model) as trace:
        for batch in inputs:
            model(batch)
    trace.close()
    estrange(model)
    plain, expected = run(trace, again=False)
    forced, found = run(trace, again=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, forced, strict=True))
    for name in expected:  # micro-batches may add up in another order
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    if backward != "inside" and backward != "after":
        assert same(found, expected)


def test_the_hooks_for_a_later_backward_go_with_the_next_replay() -> None:
    model = layers(posterior_gate)
    with record(model) as trace:
        model(data(4))
    for _ in range(3):
        with replay(model, trace), torch.no_grad():
            model(data(4))
        assert len(model[0].gate._forward_hooks) == 2  # the open trace's and one for a backward that may come
    with replay(model, trace) as replaying, torch.no_grad():
        model(data(4))
    replaying.close()
    assert len(model[0].gate._forward_hooks) == 1


def test_another_models_backward_pass_is_left_alone_after_the_block() -> None:
    model = layers(prior_gate, 1)
    with record(model) as trace:
        model(data(4))
    trace.close()
    with replay(model, trace), torch.no_grad():
        model(data(4))
    plain = gradients_of(model, data(9, 5), again=False)
    assert same(gradients_of(model, data(9, 5), again=True), plain)


def gradients_of(model: nn.Module, hidden: Tensor, again: bool) -> dict[str, Tensor]:
    hidden = hidden.requires_grad_()
    output = checkpoint(model, hidden, use_reentrant=False) if again else model(hidden)
    output.square().sum().backward()
    return gradients(model)


def test_a_backward_after_the_next_replay_is_refused_rather_than_routed_anew() -> None:
    model = layers(prior_gate, 1)
    with record(model) as trace:
        model(data(4))
    trace.close()
    with record(model) as other:
        model(data(4, 1))
    other.close()
    with replay(model, trace):
        loss = checkpoint(model, data(4).requires_grad_(), use_reentrant=False).sum()
    with replay(model, other):
        checkpoint(model, data(4, 1).requires_grad_(), use_reentrant=False)
    with pytest.raises(InvalidArgumentError, match="bit for bit"):
        loss.backward()


def test_a_recording_inside_a_replay_sees_what_was_forced_and_its_gradient() -> None:
    model = layers(prior_gate)
    with record(model) as trace:
        model(data(8))
    trace.close()
    estrange(model)
    with record(model) as outer, replay(model, trace), record(model) as inner:
        model(data(8)).square().sum().backward()
    for seen in (outer, inner):
        for (_, now), (_, was) in zip(seen.routings, trace.routings, strict=True):
            assert torch.equal(now.expert_indices, was.expert_indices)
            assert torch.equal(now.cluster_ids, was.cluster_ids)
            assert now.routing_weights.grad is not None
        seen.close()


def test_another_precision_gets_the_recorded_experts() -> None:
    model = layers(posterior_gate, 1)
    with record(model) as trace:
        model(data(20))
    model = model.to(torch.bfloat16)
    with replay(model, trace), record(model) as seen:
        assert model(data(20).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(seen.routings[0][1].expert_indices, trace.routings[0][1].expert_indices)


def test_experts_that_scale_their_weights_in_place_leave_the_recording_as_it_is() -> None:
    model = layers(posterior_gate, 1)
    with record(model) as trace:
        model(data(4))
    trace.close()
    before = trace.routings[0][1].routing_weights.clone()
    for _ in range(2):
        with replay(model, trace):
            routing = model[0].route(data(4))
        assert torch.equal(routing.routing_weights, before)
        routing.routing_weights.mul_(3.0)


def test_what_differs_is_named_before_anything_runs(tmp_path: Path) -> None:
    model = layers(posterior_gate, 2)
    with record(model) as trace:
        model(data(4))
    trace.save(tmp_path / "routing")
    wide = layers(posterior_gate, 2)
    wide[1].gate = PosteriorGate(D, E, C, 1)
    swapped = nn.Sequential()
    for name in ("1", "0"):
        swapped.add_module(name, model[int(name)])
    cases = {
        "gate '1.gate' is missing": layers(posterior_gate, 1),
        "gate '2.gate' is not in the recording": layers(posterior_gate, 3),
        r"gate '1.gate' has \(experts, top_k, hidden size\) \(5, 1, 6\), recorded \(5, 2, 6\)": wide,
        r"come in the order \['1.gate', '0.gate'\]": swapped,
        "holds none": nn.Linear(2, 2),
        "must not be compiled": torch.compile(layers(posterior_gate, 2)),
    }
    for message, other in cases.items():
        for source in (trace, tmp_path / "routing"):
            with pytest.raises(InvalidArgumentError, match=message), replay(other, source):
                pytest.fail("the block ran")


def test_the_same_state_can_be_required(tmp_path: Path) -> None:
    model = layers(prior_gate, 2)
    with record(model) as trace:
        model(data(4))
    trace.save(tmp_path / "routing")
    with replay(model, tmp_path / "routing", same_state=True):
        model(data(4))
    model[1].gate.observe(model[1].route(data(1)), torch.ones(1, K))
    with (
        pytest.raises(InvalidArgumentError, match=r"'1.gate' has other weights, clusters or belief"),
        replay(model, tmp_path / "routing", same_state=True),
    ):
        pytest.fail("the block ran")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda model: model(data(5)), "must see the recorded 4 tokens in call 0; got 5"),
        (lambda model: model[1](data(4)), "'0.gate' next; got '1.gate'"),
        (
            lambda model: model[0](data(4)),
            "repeat all 2 recorded calls of its gates; 1 are left, first one of gate '1.gate'",
        ),
        (lambda model: model(model(data(4))), "no more than the 2 recorded calls; got one more of gate '0.gate'"),
    ],
)
def test_another_course_is_refused_and_the_gates_are_free_again(run: Callable, message: str) -> None:
    model = layers(posterior_gate, 2)
    with record(model) as trace:
        model(data(4))
    trace.close()
    with pytest.raises(InvalidArgumentError, match=message), replay(model, trace):
        run(model)
    assert not model[0].gate._forward_hooks


def test_an_error_in_the_block_stays_the_error() -> None:
    model = layers(posterior_gate, 1)
    with record(model) as trace:
        model(data(4))
    trace.close()
    with pytest.raises(RuntimeError, match="stop"), replay(model, trace):
        raise RuntimeError("stop")
    assert not model[0].gate._forward_hooks


def test_an_observed_trace_a_second_replay_and_gates_without_a_rule_are_refused() -> None:
    model = layers(posterior_gate, 1)
    with record(model) as trace:
        model(data(4))
    with replay(model, trace) as replaying:
        with pytest.raises(InvalidArgumentError, match="replayed already"), replay(model, trace):
            pytest.fail("the block ran")
        model(data(4))
    assert not replaying.pending
    with pytest.raises(InvalidArgumentError, match="weights must be one of"), replay(model, trace, weights="old"):
        pytest.fail("the block ran")
    trace.observe(torch.ones(4))
    with pytest.raises(InvalidArgumentError, match="must hold routings"), replay(model, trace):
        pytest.fail("the block ran")
    with pytest.raises(InvalidArgumentError, match="holds no routings"):
        trace.save("nowhere")
    model[0].gate.configure(exploration=0.5)
    fixed = MixtureOfExperts(model[0].experts, FixedGate(D, E, K))
    fixed.gate.warm_start(data(4), torch.ones(4, E))
    for holder in (model, fixed):
        with record(holder) as drawn:
            holder(data(4))
        with (
            pytest.raises(InvalidArgumentError, match="must be 'recorded'"),
            replay(holder, drawn, weights="recomputed"),
        ):
            pytest.fail("the block ran")
        with replay(holder, drawn):
            holder(data(4))


@pytest.mark.parametrize("make", KINDS)
def test_experts_chosen_by_an_engine_are_replayed_with_the_gates_own_weights(make: Callable) -> None:
    model = layers(make, 2)
    with record(model) as trace:
        before = model(data(6))
    trace.close()
    experts = {name: routing.expert_indices.to(torch.uint8) for name, routing in trace.routings}
    with replay(model, recording_from_experts(model, experts), weights="recomputed"):
        assert torch.equal(model(data(6)), before)
    with (
        pytest.raises(InvalidArgumentError, match="weights must be 'recomputed'"),
        replay(model, recording_from_experts(model, experts)),
    ):
        pytest.fail("the block ran")
    one = {"0.gate": experts["0.gate"]}
    for bad, message in (
        (one, r"for the gates \['0.gate', '1.gate'\]; got \['0.gate'\]"),
        (experts | {"1.gate": experts["1.gate"][:, :1]}, r"'1.gate' must be \(N, 2\) and below 5; got \(6, 1\)"),
        (experts | {"0.gate": experts["0.gate"] + E}, "'0.gate' must be"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            recording_from_experts(model, bad)


def test_a_file_holds_the_whole_recording_and_refuses_experts_that_are_not_there(tmp_path: Path) -> None:
    model = layers(prior_gate, 2)
    with record(model) as trace:
        model(data(5))
        model(data(0))
    trace.save(tmp_path / "routing")
    read = load_recording(tmp_path / "routing")
    assert [name for name, _ in read.calls] == ["0.gate", "1.gate", "0.gate", "1.gate"]
    for (_, was), (_, now) in zip(trace.routings, read.calls, strict=True):
        for one, other in zip(was, now, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    tensors, header = load_tensors(tmp_path / "routing", "recorded routing")
    tensors["0.expert_indices"][3, 1] = E
    save_tensors(tmp_path / "routing", tensors, header)
    with pytest.raises(DamagedFileError, match=f"experts below {E} for gate '0.gate'; call 0 does not"):
        load_recording(tmp_path / "routing")
    save_tensors(tmp_path / "routing", tensors, header | {"version": 2})
    with pytest.raises(DamagedFileError, match="format version 1; got 2"):
        load_recording(tmp_path / "routing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signatures_tell_one_changed_bit_and_one_changed_place(dtype: torch.dtype) -> None:
    hidden = data(30).to(dtype)
    seen = {int(signature(hidden))}
    for row, column in [(0, 0), (17, 3), (29, D - 1)]:
        changed = hidden.clone()
        changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[row, column] ^= 1
        seen.add(int(signature(changed)))
    seen.add(int(signature(hidden.roll(1, 0))))
    seen.add(int(signature(torch.where(torch.ones_like(hidden).bool(), torch.nan, hidden))))
    assert len(seen) == 6
    assert int(signature(hidden.T.contiguous().T)) == int(signature(hidden))
