import copy
import pickle

import pytest
import torch
from huggingface.models import LAYERS, D, E, batch, condemn, evidence, fit_on_noise, mixtral
from torch import nn

from moe_posterior import InvalidArgumentError, record
from moe_posterior.gates import PriorGate
from moe_posterior.huggingface import restore_gates, swap_gates, swapped_gates
from moe_posterior.huggingface.gates import Choice, make_gate


def routers(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


def test_a_swap_without_evidence_changes_no_bit_of_the_outputs() -> None:
    model, inputs = mixtral(), batch(padded=3)
    before = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    report = swap_gates(model, num_clusters=5)
    for _ in range(2):  # the first call proves the adapter, the second is the plain one
        after = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.loss, before.loss)
        assert torch.equal(after.aux_loss, before.aux_loss)
    fit_on_noise(dict(swapped_gates(model)))
    with record(model):
        assert torch.equal(model(**inputs).logits, before.logits)
    assert [layer.status for layer in report.layers] == ["swapped"] * LAYERS


def test_gradients_of_the_parameters_stay_the_same_bit_for_bit_also_under_record() -> None:
    plain, model, inputs = mixtral(), mixtral(), batch()
    plain(**inputs, labels=inputs["input_ids"]).loss.backward()
    swap_gates(model, num_clusters=5)
    fit_on_noise(dict(swapped_gates(model)))
    with record(model):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name


def test_evidence_against_an_expert_moves_the_choice_to_the_next_best_of_the_routers_own_ranking() -> None:
    model, inputs = mixtral(), batch()
    swap_gates(model, num_clusters=5)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    condemn(gates["model.layers.0.mlp.gate"], expert=1)
    seen = []
    routers(model)[0].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(**inputs)
    hidden, (logits, weights, indices) = seen[0]
    assert not (indices == 1).any()
    own = hidden.reshape(-1, hidden.shape[-1]) @ routers(model)[0].weight.T
    others = own.index_fill(1, torch.tensor([1]), -torch.inf)
    assert torch.equal(indices, others.topk(2, dim=-1).indices)
    torch.testing.assert_close(
        weights,
        torch.softmax(others, dim=-1).topk(2, dim=-1).values
        / torch.softmax(others, dim=-1).topk(2).values.sum(1, keepdim=True),
    )
    assert logits[:, 1].max() < logits[:, [0, 2, 3]].min()


def test_restoring_brings_back_the_same_objects_and_the_same_bits() -> None:
    model, inputs = mixtral(), batch()
    before, objects = model(**inputs).logits, routers(model)
    classes, keys = [type(router) for router in objects], list(model.state_dict())
    swap_gates(model, num_clusters=5)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    condemn(gates["model.layers.0.mlp.gate"], expert=1)
    assert not torch.equal(model(**inputs).logits, before)
    restore_gates(model)
    assert all(new is old for new, old in zip(routers(model), objects, strict=True))
    assert [type(router) for router in routers(model)] == classes
    assert torch.equal(model(**inputs).logits, before)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(isinstance(module, PriorGate) for module in model.modules())
    with pytest.raises(InvalidArgumentError, match="holds no swapped router"):
        restore_gates(model)


def test_gradient_signs_are_those_of_a_finite_difference() -> None:
    model, inputs = mixtral(experts_implementation="eager", initializer_range=0.3).double(), batch(size=1, length=4)
    swap_gates(model, num_clusters=2)
    fit_on_noise(dict(swapped_gates(model)))
    with record(model) as trace:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    name, _, outcome = trace.gradient_outcomes()[0]
    assert name == "model.layers.0.mlp.gate.posterior_gate"
    for token, slot in ((0, 0), (1, 1), (2, 0)):

        def scale(_: nn.Module, __: object, output: tuple, at: tuple[int, int] = (token, slot)) -> tuple:
            weights = output[1].clone()
            weights[at] *= 0.9
            return output[0], weights, output[2]

        handle = routers(model)[0].register_forward_hook(scale)
        with torch.no_grad():
            with_less = model(**inputs, labels=inputs["input_ids"]).loss
        handle.remove()
        assert float(outcome[token, slot]) == float(with_less > loss)


def test_padding_never_becomes_evidence() -> None:
    model, inputs = mixtral(), batch(size=2, length=8, padded=5)
    swap_gates(model, num_clusters=2, half_life=None, amnesty=None)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        model(**inputs)
    trace.observe(torch.ones(2, 8))
    assert {evidence(gate) for gate in gates.values()} == {(16 - 5) * 2.0}
    model(input_ids=inputs["input_ids"])  # a call without a mask has no padding
    with record(model) as trace:
        model(input_ids=inputs["input_ids"])
    trace.observe(torch.ones(2, 8))
    assert {evidence(gate) for gate in gates.values()} == {(16 - 5 + 16) * 2.0}


def test_padding_is_known_also_where_cached_keys_make_the_mask_longer_than_the_call() -> None:
    model, inputs = mixtral(), batch(size=2, length=8, padded=5)
    swap_gates(model, num_clusters=2, half_life=None)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    with record(model) as trace:
        model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)
    trace.observe(torch.ones(2, 4))
    assert {evidence(gate) for gate in gates.values()} == {(8 - 1) * 2.0}


def test_layers_share_no_state() -> None:
    model, inputs = mixtral(), batch()
    swap_gates(model, num_clusters=5)
    first, second = dict(swapped_gates(model)).values()
    fit_on_noise({"first": first})
    condemn(first, expert=1)
    assert evidence(second) == 0
    assert not second.biased
    assert not second.clusterer.fitted
    storages = [{tensor.data_ptr() for tensor in gate.state_dict().values()} for gate in (first, second)]
    assert not storages[0] & storages[1]
    model(**inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_evidence_once(reentrant: bool) -> None:
    plain, model, inputs = mixtral(), mixtral(), batch(padded=3)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    counts = []
    for each in (plain, model):
        swap_gates(each, num_clusters=5, half_life=None)
        gates = dict(swapped_gates(each))
        fit_on_noise(gates)
        with record(each) as trace:
            loss = each(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        trace.observe_gradients()
        counts.append([gate.posterior.successes for gate in gates.values()])
    assert all(torch.equal(one, other) for one, other in zip(*counts, strict=True))
    assert float(counts[0][0].sum()) > 0


def test_a_frozen_model_can_be_observed_by_gradient() -> None:
    model, inputs = mixtral(), batch()
    model.requires_grad_(False)
    swap_gates(model, num_clusters=5, half_life=None)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    trace.observe_gradients()
    assert all(evidence(gate) > 0 for gate in gates.values())


def test_bfloat16_leaves_the_belief_in_float64_and_the_outputs_as_they_were() -> None:
    model, inputs = mixtral().to(torch.bfloat16), batch()
    before = model(**inputs).logits
    swap_gates(model, num_clusters=5)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    model.to(torch.bfloat16)
    assert torch.equal(model(**inputs).logits, before)
    gate = gates["model.layers.0.mlp.gate"]
    condemn(gate, expert=2)
    model.to(torch.bfloat16)
    assert gate.posterior.failures.dtype == torch.float64
    assert float(gate.posterior.failures[0, 2]) == 1000.0
    seen = []
    routers(model)[0].register_forward_hook(lambda _, __, output: seen.append(output[2]))
    model(**inputs)
    assert not (seen[0] == 2).any()


def test_generation_is_the_same() -> None:
    model, inputs = mixtral(), batch(padded=3)
    before = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    swap_gates(model, num_clusters=5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0), before)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_model_has_beliefs_and_a_mask_of_its_own(duplicate: object) -> None:
    model, inputs = mixtral(), batch(size=2, length=8, padded=5)
    swap_gates(model, num_clusters=2, half_life=None)
    fit_on_noise(dict(swapped_gates(model)))
    other = duplicate(model)
    with record(other) as trace:
        logits = other(**inputs).logits
    trace.observe(torch.ones(2, 8))
    assert all(evidence(gate) == 22 for _, gate in swapped_gates(other))
    assert all(evidence(gate) == 0 for _, gate in swapped_gates(model))
    assert torch.equal(model(**inputs).logits, logits)
    restore_gates(other)
    restore_gates(model)
    assert type(routers(other)[0]) is type(routers(model)[0])
    assert not any(module._forward_pre_hooks for copied in (model, other) for module in copied.modules())


def test_replacing_gates_choose_by_competence_alone_and_keep_the_routers_scale() -> None:
    model, inputs = mixtral(), batch()
    before = model(**inputs).logits
    swap_gates(model, num_clusters=5, mode="replace")
    assert torch.equal(model(**inputs).logits, before)  # until there are clusters
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    gate = gates["model.layers.0.mlp.gate"]
    gate.posterior.successes[:, 3] = 50.0
    gate.posterior.successes[:, 1] = 20.0
    gate.posterior.forget(1.0)
    seen = []
    routers(model)[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with record(model) as trace:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert (seen[0][2] == torch.tensor([3, 1])).all()
    torch.testing.assert_close(seen[0][1].sum(dim=1), torch.ones(30))
    loss.backward()
    trace.observe_gradients()
    assert evidence(gate) > 70 * 5


def test_what_cannot_be_swapped_is_said(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(InvalidArgumentError, match="it holds no router"):
        swap_gates(nn.Linear(2, 2))
    model = mixtral()
    with pytest.raises(InvalidArgumentError, match="mode must be one of"):
        swap_gates(model, mode="guess")
    with pytest.raises(InvalidArgumentError, match=r"knobs must be options of PriorGate; got .*risk_aversion"):
        swap_gates(model, risk_aversion=1.0)
    with pytest.raises(InvalidArgumentError, match="penalty must be at least 0"):
        swap_gates(model, penalty=-1.0)
    assert not list(swapped_gates(model))
    routers(model)[0].forward = routers(model)[0].forward
    with pytest.warns(UserWarning, match="its forward was replaced on the instance"):
        report = swap_gates(model)
    assert [layer.status for layer in report.layers] == ["refused", "swapped"]
    assert "before that" in str(report)
    with torch.device("meta"), pytest.raises(InvalidArgumentError, match="on the meta device"):
        swap_gates(mixtral())
    with pytest.raises(InvalidArgumentError, match="must not be swapped already"):
        swap_gates(model)


def test_a_router_that_does_not_do_as_its_adapter_expects_stops_the_first_forward() -> None:
    class TwiceRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.weight = 1, nn.Parameter(torch.randn(E, 8))

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = nn.functional.linear(hidden, self.weight) + nn.functional.linear(hidden, self.weight)
            weights, indices = logits.topk(1)
            return logits, weights, indices

    class SwappedOrderRouter(TwiceRouter):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = nn.functional.linear(hidden, self.weight)
            weights, indices = logits.topk(1)
            return logits, indices, weights

    for router, complaint in ((TwiceRouter(), "got 2"), (SwappedOrderRouter(), "int64 indices")):
        model = nn.Sequential(router)
        swap_gates(model)
        with pytest.raises(InvalidArgumentError, match=complaint):
            model(torch.randn(5, 8))
        restore_gates(model)
        model(torch.randn(5, 8))


def test_a_model_compiled_after_the_swap_runs_as_one_graph_until_evidence_and_then_as_the_plain_one() -> None:
    inputs = batch()
    stock = torch.compile(mixtral(), backend="eager", fullgraph=True)(**inputs).logits
    model = mixtral()
    swap_gates(model, num_clusters=4).fit([batch(seed=seed) for seed in range(3)])
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(whole(**inputs).logits, stock)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    condemn(dict(swapped_gates(model))["model.layers.0.mlp.gate"], expert=1)
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(compiled(**inputs).logits, stock)
    with pytest.raises(InvalidArgumentError, match="must not be compiled"), record(compiled):
        pass


def test_a_model_compiled_before_the_swap_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="swap the gates first, then compile"):
        swap_gates(torch.compile(mixtral()))
    model = mixtral()
    model.compile()
    with pytest.raises(InvalidArgumentError, match="swap the gates first, then compile"):
        swap_gates(model)


class SigmoidRouter(nn.Module):
    """The recipe for a block of one's own: a class named ...Router with top_k, one projection, and this return."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.project = 2, nn.Linear(D, E)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.project(hidden)
        weights, indices = logits.sigmoid().topk(self.top_k, dim=-1)
        return logits, 2.5 * weights, indices


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = SigmoidRouter()
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _, weights, indices = self.router(hidden)
        outputs = torch.stack([expert(hidden) for expert in self.experts], dim=1)
        return (weights[..., None] * outputs.take_along_dim(indices[..., None], dim=1)).sum(dim=1)


def test_a_hand_written_block_is_swapped_by_the_recipe() -> None:
    hidden = torch.randn(60, D, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(OwnBlock(), OwnBlock())
    before = model(hidden)
    report = swap_gates(model, num_clusters=3)
    assert [layer.name for layer in report.swapped] == ["0.router", "1.router"]
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        output = model(hidden)
    assert torch.equal(output, before)
    output.square().mean().backward()
    trace.observe_gradients()
    assert all(evidence(gate) > 0 for gate in gates.values())
    condemn(gates["0.router"], expert=3)
    assert not torch.equal(model(hidden), before)
    restore_gates(model)
    assert torch.equal(model(hidden), before)


def test_routers_behind_accelerates_hooks_are_swapped_and_restored() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = mixtral(), batch()
    before = model(**inputs).logits
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    swap_gates(model, num_clusters=2)
    gates = dict(swapped_gates(model))
    fit_on_noise(gates)
    with record(model) as trace:
        assert torch.equal(model(**inputs).logits, before)
    assert len(trace) == LAYERS
    condemn(gates["model.layers.0.mlp.gate"], expert=1)
    assert not torch.equal(model(**inputs).logits, before)
    hooks.remove_hook_from_module(model, recurse=True)
    assert not torch.equal(model(**inputs).logits, before)
    restore_gates(model)
    assert torch.equal(model(**inputs).logits, before)


def test_a_block_that_bypasses_its_router_is_refused() -> None:
    class Mxfp4GptOssMLP(OwnBlock):
        pass

    with pytest.raises(InvalidArgumentError, match="past the router"):
        swap_gates(nn.Sequential(Mxfp4GptOssMLP()))
    block = OwnBlock()
    block.forward = lambda hidden: hidden
    with pytest.raises(InvalidArgumentError, match="the OwnBlock around it was replaced"):
        swap_gates(nn.Sequential(block))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_a_slot_without_weight_is_not_observed_whatever_the_outcomes_dtype(dtype: torch.dtype) -> None:
    gate = make_gate("prior", 4, 3, 2, 2)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gate.fit(hidden)
    weights = torch.ones(6, 2)
    weights[2, 1] = 0.0
    choice = Choice(torch.tensor([[0, 1]] * 6), weights, None, None, stands=True)
    gate.observe(gate(hidden, choice), torch.ones(6, 2).to(dtype))
    assert gate.posterior.successes.sum(dim=0).round().tolist() == [6, 5, 0]
