import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import counted
from torch import nn

from moe_posterior import BetaPosterior, Evidence, InvalidArgumentError

C, E = 3, 4
outcomes = st.one_of(st.just(math.nan), st.sampled_from([0.0, 1.0]))
rows = st.lists(st.tuples(st.integers(0, C - 1), st.lists(outcomes, min_size=E, max_size=E)), max_size=12)


def observed(posterior: BetaPosterior, batch: list[tuple[int, list[float]]]) -> BetaPosterior:
    clusters = torch.tensor([cluster for cluster, _ in batch], dtype=torch.int64)
    values = torch.tensor([row for _, row in batch], dtype=torch.float64).reshape(len(batch), E)
    posterior.observe(clusters, values)
    return posterior


def state(posterior: BetaPosterior) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in posterior.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


@given(first=rows, second=rows)
def test_updates_commute(first: list, second: list) -> None:
    one = observed(observed(BetaPosterior(C, E), first), second)
    other = observed(observed(BetaPosterior(C, E), second), first)
    assert_same(state(one), state(other))


@given(batch=rows, split=st.integers(0, 12))
def test_merging_parts_equals_observing_the_whole(batch: list, split: int) -> None:
    whole = observed(BetaPosterior(C, E), batch)
    part = observed(BetaPosterior(C, E), batch[:split])
    part.merge(observed(BetaPosterior(C, E), batch[split:]))
    assert_same(state(whole), state(part))


@given(batch=rows)
def test_counting_matches_a_loop_over_outcomes(batch: list) -> None:
    posterior = observed(BetaPosterior(C, E), batch)
    successes, failures = counted([c for c, _ in batch], [list(range(E))] * len(batch), [r for _, r in batch], (C, E))
    torch.testing.assert_close(posterior.successes, successes)
    torch.testing.assert_close(posterior.failures, failures)


@given(batch=rows)
def test_state_dict_round_trip_is_bit_exact(batch: list) -> None:
    posterior = observed(BetaPosterior(C, E, prior_alpha=0.3), batch)
    restored = BetaPosterior(C, E)
    restored.load_state_dict(posterior.state_dict())
    assert_same(state(posterior), state(restored))


def test_slots_of_one_batch_count_duplicates() -> None:
    posterior = BetaPosterior(C, E)
    clusters, experts = torch.tensor([1, 1, 1]), torch.tensor([[2, 0], [2, 3], [2, 0]])
    posterior.observe(clusters, torch.tensor([[1.0, 0.0], [1.0, math.nan], [0.25, 1.0]]), experts)
    assert posterior.successes[1].tolist() == [1.0, 0.0, 2.25, 0.0]
    assert posterior.failures[1].tolist() == [1.0, 0.0, 0.75, 0.0]
    assert posterior.successes[[0, 2]].sum() == 0


def test_threshold_binarises_at_and_above() -> None:
    posterior = BetaPosterior(1, 3)
    posterior.observe(torch.tensor([0]), torch.tensor([[0.49, 0.5, 0.51]]), threshold=0.5)
    assert posterior.successes.tolist() == [[0.0, 1.0, 1.0]]
    assert posterior.failures.tolist() == [[1.0, 0.0, 0.0]]


def test_evidence_past_two_to_the_24_keeps_counting() -> None:
    posterior = BetaPosterior(1, 1)
    posterior.merge(Evidence(torch.tensor([[2.0**24]]), torch.tensor([[0.0]])))
    posterior.half()
    for _ in range(3):
        posterior.observe(torch.tensor([0]), torch.tensor([[1.0]]))
    assert posterior.successes.item() == 2**24 + 3


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: nn.Sequential(m).to(dtype=torch.bfloat16)[0],
        copy.deepcopy,
    ],
    ids=["to bf16", "half", "float", "inside a cast model", "deepcopy"],
)
def test_casts_leave_evidence_as_it_was(cast) -> None:
    posterior = BetaPosterior(C, E)
    posterior.observe(torch.tensor([0, 1]), torch.full((2, E), 1 / 3))
    before = state(posterior)
    assert_same(before, state(cast(posterior)))


def test_observing_under_autocast_counts_in_float64() -> None:
    posterior = BetaPosterior(1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior.observe(torch.zeros(1000, dtype=torch.int64), torch.ones(1000, 1))
    assert posterior.successes.item() == 1000.0


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_cast_checkpoint_warns_and_keeps_float64(assign: bool) -> None:
    posterior = BetaPosterior(1, 1)
    posterior.merge(Evidence(torch.tensor([[257.0]]), torch.tensor([[0.0]])))
    cast = {name: value.to(torch.bfloat16) for name, value in posterior.state_dict().items()}
    restored = BetaPosterior(1, 1)
    with pytest.warns(UserWarning, match="successes is stored as torch.bfloat16"):
        restored.load_state_dict(cast, assign=assign)
    assert restored.successes.dtype == torch.float64
    restored.observe(torch.tensor([0]), torch.tensor([[1.0]]))
    assert restored.successes.item() == 257.0  # 256 came back; from here on it counts again


@pytest.mark.parametrize(
    ("clusters", "outcome", "experts", "message"),
    [
        ([0], [[0.0, 1.5]], [[0, 1]], r"outcome must lie in \[0, 1\] or be NaN \(not observed\); got 1.5 at \(0, 1\)"),
        ([0], [[-0.1, 0.0]], [[0, 1]], "got -0.1"),
        ([0], [[math.inf, 0.0]], [[0, 1]], "got inf"),
        ([0], [[0.0, -math.inf]], [[0, 1]], "got -inf"),
        ([0], [[0.0, 1.0]], None, r"outcome must have shape \(1, 4\); got \(1, 2\)"),
        ([0, 1], [[0.0, 1.0]], [[0, 1]], r"outcome must have shape \(2, 2\); got \(1, 2\)"),
        ([3], [[0.0, 1.0]], [[0, 1]], r"cluster_ids must lie in \[0, 3\); got values from 3 to 3"),
        ([-1], [[0.0, 1.0]], [[0, 1]], "cluster_ids must lie"),
        ([0], [[0.0, 1.0]], [[0, 4]], r"expert_indices must lie in \[0, 4\); got values from 0 to 4"),
        ([0.5], [[0.0, 1.0]], [[0, 1]], "cluster_ids must be integers"),
    ],
)
def test_observe_rejects_bad_input_and_changes_nothing(clusters, outcome, experts, message) -> None:
    posterior = BetaPosterior(C, E)
    posterior.observe(torch.tensor([1]), torch.ones(1, E))
    before = state(posterior)
    with pytest.raises(InvalidArgumentError, match=message):
        posterior.observe(
            torch.tensor(clusters), torch.tensor(outcome), None if experts is None else torch.tensor(experts)
        )
    assert_same(before, state(posterior))


def test_an_empty_batch_changes_nothing() -> None:
    posterior = BetaPosterior(C, E)
    before = state(posterior)
    posterior.observe(torch.zeros(0, dtype=torch.int64), torch.zeros(0, E))
    assert_same(before, state(posterior))


def test_warm_start_moves_the_prior_and_not_the_evidence() -> None:
    posterior = BetaPosterior(1, 2)
    clusters = torch.zeros(8, dtype=torch.int64)
    posterior.warm_start(clusters, torch.tensor([[1.0, 0.0]] * 6 + [[0.0, math.nan]] * 2), strength=5.0)
    # Expert 0: Beta(1 + 6, 1 + 2) = mean .7, shortened from 10 to 5; expert 1: Beta(1, 7), from 8 to 5.
    assert posterior.prior_alpha[0].tolist() == pytest.approx([3.5, 0.625])
    assert posterior.prior_beta[0].tolist() == pytest.approx([1.5, 4.375])
    assert posterior.successes.sum() == 0


def test_warm_start_keeps_a_rarely_seen_cell_weak() -> None:
    posterior = BetaPosterior(2, 1)
    posterior.warm_start(torch.tensor([0]), torch.tensor([[1.0]]), strength=50.0)
    assert (posterior.alpha + posterior.beta).flatten().tolist() == [3.0, 2.0]


def test_reset_forgets_evidence_and_on_request_the_warm_start() -> None:
    posterior = BetaPosterior(1, 1, prior_alpha=2.0)
    posterior.warm_start(torch.tensor([0]), torch.tensor([[1.0]]))
    posterior.observe(torch.tensor([0]), torch.tensor([[1.0]]))
    posterior.reset()
    assert (posterior.alpha.item(), posterior.successes.item()) == (3.0, 0.0)
    posterior.reset(prior=True)
    assert posterior.alpha.item() == 2.0


def test_merge_refuses_another_shape() -> None:
    with pytest.raises(InvalidArgumentError, match=r"other.successes must have shape \(3, 4\); got \(4, 3\)"):
        BetaPosterior(C, E).merge(BetaPosterior(E, C))


@pytest.mark.parametrize("arguments", [(0, 4), (3, 0)])
def test_sizes_below_one_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1; got 0"):
        BetaPosterior(*arguments)


@pytest.mark.parametrize("prior", [0.0, -1.0, math.inf, math.nan])
def test_an_improper_prior_is_refused(prior: float) -> None:
    with pytest.raises(InvalidArgumentError, match="prior_beta must be positive and finite"):
        BetaPosterior(1, 1, prior_beta=prior)


def test_an_outcome_equal_to_the_threshold_is_a_success_in_every_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for threshold in (0.1, 0.7, 0.9):
            posterior = BetaPosterior(1, 1)
            posterior.observe(torch.tensor([0]), torch.tensor([[threshold]], dtype=dtype), threshold=threshold)
            assert posterior.successes.item() == 1.0, (dtype, threshold)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integer_types_find_their_cells(dtype: torch.dtype) -> None:
    posterior = BetaPosterior(64, 32)
    posterior.observe(torch.tensor([63], dtype=dtype), torch.ones(1, 1), torch.tensor([[31]], dtype=dtype))
    assert posterior.successes[63, 31] == posterior.successes.sum() == 1


def test_indices_that_are_no_integers_are_refused() -> None:
    for clusters, experts in ((torch.tensor([True]), torch.tensor([[0]])), (torch.tensor([0]), torch.tensor([[0.0]]))):
        with pytest.raises(InvalidArgumentError, match="must be integers"):
            BetaPosterior(C, E).observe(clusters, torch.ones(1, 1), experts)


@pytest.mark.parametrize(
    "name",
    [
        "moe_posterior.posterior BetaPosterior",
        "moe_posterior.posterior _notify_after_load",
        "moe_posterior.gates.posterior PosteriorGate",
        "moe_posterior.router PosteriorRouter",
        "moe_posterior.router Decision",
        "moe_posterior.router Decisions",
    ],
)
def test_what_an_earlier_version_pickled_is_found_under_its_name(name: str) -> None:
    assert callable(pickle.loads("c{}\n{}\n.".format(*name.split()).encode()))
