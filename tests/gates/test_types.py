"""The gates' and the belief's doors: one answer for every type that holds the value, else our error and nothing learned."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts import DRAWN_PER_BATCH, GATES, HIDDEN_SIZE, NUM_EXPERTS, assert_equal, data, fitted
from torch import Tensor

from moe_posterior import BetaPosterior, InvalidArgumentError
from moe_posterior.gates import BanditGate, Gate, NearestNeighbourGate, PosteriorGate, SoftmaxGate

every_gate = pytest.mark.parametrize("name", GATES)
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
OUTCOMES = [*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIGNAL = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
WRONG = [math.inf, -math.inf, 1.5, -0.5]
NOT_OUTCOMES = ["good", None, SIGNAL * 1j, SIGNAL[:, :1], torch.ones(4, 2), [["a", "b"]] * 3]


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_states_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)


def taught(base: Gate, change: Callable[[Any], Any], of: str) -> dict[str, Tensor]:
    """The state of a gate after an observation of which one part came in another form."""
    gate = copy.deepcopy(base)
    routing, outcome = gate(data(3)), SIGNAL
    if of == "outcome":
        outcome = change(outcome)
    else:
        routing = routing._replace(**{of: change(getattr(routing, of))})
    gate.observe(routing, outcome, dense=False)
    return state(gate)


@every_gate
def test_outcomes_and_indices_of_every_type_teach_the_same(name: str) -> None:
    gate = fitted(name)
    expected = taught(gate, lambda x: x, "outcome")
    for kind in OUTCOMES:
        assert_states_equal(taught(gate, lambda x, kind=kind: x.to(kind), "outcome"), expected)
    forms = [Tensor.tolist, lambda x: x.numpy(), lambda x: x.T.contiguous().T, lambda x: x.clone().requires_grad_()]
    forms.append(lambda x: torch.where(x == 0, -0.0, x))
    for form in forms:
        assert_states_equal(taught(gate, form, "outcome"), expected)
    for part in ("cluster_ids", "expert_indices"):
        for kind in INTEGERS:
            assert_states_equal(taught(gate, lambda x, kind=kind: x.to(kind), part), expected)


@every_gate
@pytest.mark.parametrize("wrong", [*WRONG, *NOT_OUTCOMES], ids=lambda w: type(w).__name__)
def test_what_is_no_outcome_is_refused_and_teaches_nothing(name: str, wrong: Any) -> None:
    gate = fitted(name)
    routing, before = gate(data(3)), state(gate)
    given = torch.where(SIGNAL == 1, wrong, 0.5) if isinstance(wrong, float) else wrong
    with pytest.raises(InvalidArgumentError):
        gate.observe(routing, given, dense=False)
    with pytest.raises(InvalidArgumentError):
        gate.observe("routing", SIGNAL, dense=False)
    assert_states_equal(state(gate), before)


@every_gate
def test_rows_that_are_not_finite_are_unobserved(name: str) -> None:
    gate = fitted(name)
    reference = copy.deepcopy(gate)
    for value in (torch.nan, torch.inf, -torch.inf):
        hidden = data(3)
        hidden[1] = value
        routing = gate(hidden)
        gate.observe(routing, SIGNAL, dense=False)
        unknown = SIGNAL.clone()
        unknown[1] = torch.nan
        reference.observe(routing._replace(distance=routing.distance.nan_to_num(0.0, 0.0)), unknown, dense=False)
    assert_states_equal(state(gate), state(reference))


@every_gate
def test_empty_batches_first_in_the_middle_and_last_change_no_belief(name: str) -> None:
    if name in DRAWN_PER_BATCH:
        pytest.skip("its draws follow the number of observations, empty ones too")
    gate = fitted(name)
    reference = copy.deepcopy(gate)
    empty = gate(data(0))
    for step, part in enumerate([None, 0, None, 1, None]):
        rows = data(3, seed=step)
        for each in (gate, reference):
            if part is not None:
                each.observe(each(rows), SIGNAL, dense=False)
        if part is None:
            gate.observe(empty, SIGNAL[:0], dense=False)
    ours, theirs = state(gate), state(reference)
    for each in (ours, theirs):
        each.pop("steps", None)
    assert_states_equal(ours, theirs)


@every_gate
def test_a_gate_made_under_inference_mode_learns_and_routes_outside_it(name: str) -> None:
    with torch.inference_mode():
        gate = fitted(name)
        routing = gate(data(3))
    reference = copy.deepcopy(gate)
    assert not any(tensor.is_inference() for tensor in [*gate.buffers(), *gate.parameters()])
    gate.observe(routing, SIGNAL, dense=False)
    if isinstance(gate, SoftmaxGate):
        gate.warm_start(data(20), torch.ones(20, NUM_EXPERTS))
        gate(data(3)).routing_weights.sum().backward()
        return
    reference.observe(reference(data(3)), SIGNAL, dense=False)
    assert_states_equal(state(gate), state(reference))


@every_gate
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_cast_leaves_every_buffer_and_the_choice_as_they_were(name: str, cast: torch.dtype) -> None:
    gate = fitted(name)
    gate.observe(gate(data(3)), SIGNAL, dense=False)
    before, expected = {key: buffer.clone() for key, buffer in gate.named_buffers()}, gate(data(40))
    torch.nn.ModuleList([gate]).to(cast)
    for key, buffer in gate.named_buffers():
        torch.testing.assert_close(buffer, before[key], rtol=0, atol=0, equal_nan=True)
    if not list(gate.parameters()):
        assert_equal(gate(data(40)), expected)


@every_gate
def test_autocast_changes_no_choice_and_no_evidence(name: str) -> None:
    gate, reference = fitted(name), fitted(name)
    if list(gate.parameters()):
        pytest.skip("its router is the model's and is computed as the model is")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(data(40))
        gate.observe(routing, torch.ones(40, 2), dense=False)
    assert_equal(routing, reference(data(40)))
    reference.observe(reference(data(40)), torch.ones(40, 2), dense=False)
    assert_states_equal(state(gate), state(reference))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = fitted(name)
    assert_states_equal(state(again), state(fitted(name)))


LABELLED: dict[str, Callable[[], Gate]] = {
    "posterior": lambda: fitted("posterior lcb"),
    "prior": lambda: fitted("prior"),
    "bandit": lambda: fitted("bandit ucb1"),
    "neighbours": lambda: NearestNeighbourGate(HIDDEN_SIZE, NUM_EXPERTS, num_neighbours=3),
    "softmax": lambda: SoftmaxGate(HIDDEN_SIZE, NUM_EXPERTS),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_rows_of_every_type_warm_start_alike(name: str) -> None:
    hidden, outcome = data(20), (torch.arange(20 * NUM_EXPERTS).view(20, NUM_EXPERTS) % 3 == 0).float()

    def started(given: Any) -> dict[str, Tensor]:
        gate = LABELLED[name]()
        gate.warm_start(hidden, given)
        return {key: value for key, value in state(gate).items() if name == "softmax" or "router" not in key}

    expected = started(outcome)
    for kind in OUTCOMES:
        assert_states_equal(started(outcome.to(kind)), expected)
    assert_states_equal(started(outcome.numpy()), expected)
    for wrong in WRONG:
        with pytest.raises(InvalidArgumentError):
            started(torch.where(outcome == 1, wrong, 0.0))


KNOBS = {"half_life": 5.0, "shrinkage": 3.0, "surprise": 4.0}


def believed(change: Callable[[Any], Any], of: int, **options: Any) -> dict[str, Tensor]:
    posterior = BetaPosterior(4, 3, **options)
    given: list[Any] = [torch.tensor([0, 1, 3]), SIGNAL, torch.tensor([[0, 1], [2, 0], [1, 2]])]
    given[of] = change(given[of])
    posterior.observe(*given)
    posterior.warm_start(*given)
    return state(posterior)


@pytest.mark.parametrize("options", [{}, *({name: value} for name, value in KNOBS.items())], ids=repr)
def test_the_belief_counts_the_same_whatever_the_types(options: dict[str, Any]) -> None:
    expected = believed(lambda x: x, 0, **options)
    for of, kinds in ((0, INTEGERS), (1, OUTCOMES), (2, INTEGERS)):
        for kind in kinds:
            assert_states_equal(believed(lambda x, kind=kind: x.to(kind), of, **options), expected)
        for form in (Tensor.tolist, Tensor.numpy):
            assert_states_equal(believed(form, of, **options), expected)


def test_the_belief_listeners_hear_rows_and_no_masks() -> None:
    gate = PosteriorGate(HIDDEN_SIZE, NUM_EXPERTS, 4, 1, score="mean")
    gate.fit(data(40))
    for kind in INTEGERS:
        gate.posterior.reset()
        gate.posterior.observe(
            torch.tensor([1, 1, 0]).to(kind), torch.tensor([[1.0]] * 3), torch.tensor([[2]] * 3).to(kind)
        )
        assert gate.topk_indices[:, 0].tolist()[:2] == [2, 2]
        assert torch.equal(gate.competence_scores(torch.tensor([1, 0]).to(kind)), gate.competence_scores()[[1, 0]])


@pytest.mark.parametrize(
    "wrong", [[0, 1, 4], [0, 1, -1], [0.0, 1.0, 2.0], [True, False, True], [[0, 1, 2]], "abc", None, 0]
)
def test_cluster_ids_of_another_kind_are_refused_and_teach_nothing(wrong: Any) -> None:
    posterior = BetaPosterior(4, 2)
    before = state(posterior)
    for call in (posterior.observe, posterior.warm_start):
        with pytest.raises(InvalidArgumentError):
            call(wrong, SIGNAL)
    assert_states_equal(state(posterior), before)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 1.1, "half", None])
def test_shares_that_are_none_are_refused(wrong: Any) -> None:
    posterior = BetaPosterior(4, 2)
    posterior.observe([0], [[1, 0]])
    before = state(posterior)
    with pytest.raises(InvalidArgumentError, match="keep"):
        posterior.forget(wrong)
    if wrong is not None:
        with pytest.raises(InvalidArgumentError, match="keep"):
            posterior.observe([0], [[1, 0]], keep=wrong)
        with pytest.raises(InvalidArgumentError, match="threshold"):
            posterior.observe([0], [[1, 0]], threshold=wrong)
    assert_states_equal(state(posterior), before)


@pytest.mark.parametrize("kind", [*INTEGERS, torch.bool])
def test_forget_reads_experts_of_every_integer_type_and_masks(kind: torch.dtype) -> None:
    posterior = BetaPosterior(1, 3)
    posterior.observe([0], [[1, 1, 1]])
    posterior.forget(0.5, torch.tensor([False, True, False]) if kind == torch.bool else torch.tensor([1]).to(kind))
    assert posterior.successes.tolist() == [[1.0, 0.5, 1.0]]


def test_a_bandit_without_clusters_reads_types_too() -> None:
    gate = BanditGate(HIDDEN_SIZE, NUM_EXPERTS, top_k=1, contextual=False)
    gate.observe(gate(data(2)), [[1], [0]])
    assert gate.posterior.successes.sum() == 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 2.5, -1, 99, "x", None, 1j, True])
def test_experts_weights_and_strengths_that_are_none_are_refused(wrong: Any) -> None:
    posterior = BetaPosterior(2, 3)
    calls = [
        lambda: posterior.remove_expert(wrong),
        lambda: posterior.replace_expert(wrong),
        lambda: posterior.add_expert({wrong: 1.0}),
        lambda: posterior.merge(wrong),
    ]
    if wrong not in (2.5, 99):
        calls += [lambda: posterior.add_expert({0: wrong}), lambda: posterior.add_expert({0: 1.0}, strength=wrong)]
    if wrong not in (2.5, 99, -1):
        calls.append(lambda: posterior.lcb(wrong))
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    assert posterior.num_experts == 3


def test_an_expert_is_named_by_an_integer_of_any_type() -> None:
    for kind in (int, torch.tensor, *(lambda v, kind=kind: torch.tensor(v, dtype=kind).numpy() for kind in INTEGERS)):
        posterior = BetaPosterior(2, 3)
        posterior.replace_expert(kind(1), {0: 2})
        posterior.remove_expert(kind(2))
        assert posterior.active.tolist() == [True, True, False]
