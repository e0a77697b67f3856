"""Routing configurations against dictionaries and plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import (
    Configurations,
    configuration_calibration,
    configuration_ids,
    grouped_calibration_error,
    shared_confidence,
)


def routed(seed: int, rows: int = 400) -> tuple[Tensor, Tensor, Configurations]:
    generator = torch.Generator().manual_seed(seed)
    preds = torch.randn(rows, 3, generator=generator, dtype=torch.float64).softmax(1)
    target = torch.randint(3, (rows,), generator=generator)
    clusters = torch.randint(4, (rows,), generator=generator)
    experts = torch.rand(rows, 5, generator=generator).topk(2).indices
    return preds, target, configuration_ids(clusters, experts, 5, num_clusters=4)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.permutations(range(4)).map(lambda order: tuple(order[:2]))),
        min_size=1,
        max_size=50,
    )
)
@settings(max_examples=80, deadline=None)
def test_ids_number_the_sorted_distinct_pairs_of_cluster_and_expert_set(rows: list) -> None:
    clusters, experts = (torch.tensor(list(part)) for part in zip(*rows, strict=True))
    ids, table = configuration_ids(clusters, experts, 4, num_clusters=3)
    keys = [(cluster, *sorted(chosen)) for cluster, chosen in rows]
    expected = sorted(set(keys))
    assert [tuple(row) for row in table.tolist()] == expected
    assert ids.tolist() == [expected.index(key) for key in keys]
    assert ids.dtype == torch.int64


def test_no_rows_have_no_configurations() -> None:
    ids, table = configuration_ids(torch.zeros(0).long(), torch.zeros(0, 2, dtype=torch.int64), 4, num_clusters=1)
    assert ids.shape == (0,)
    assert table.shape == (0, 3)
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert configuration_calibration(*empty, Configurations(ids, table)).count.shape == (0,)
    assert shared_confidence(empty[0], Configurations(ids, table))[:2] == (0, 0)


def test_calibration_of_each_configuration_agrees_with_a_plain_loop() -> None:
    preds, target, configurations = routed(0)
    result = configuration_calibration(preds, target, configurations, min_count=10)
    assert (result.count < 10).any()
    assert (result.count >= 10).any()
    for index in range(len(configurations.table)):
        members = [row for row, place in enumerate(configurations.ids.tolist()) if place == index]
        confidence = sum(max(preds[row].tolist()) for row in members) / len(members)
        accuracy = sum(int(preds[row].argmax() == target[row]) for row in members) / len(members)
        assert result.count[index] == len(members)
        assert result.share[index].item() == pytest.approx(len(members) / 400)
        assert result.accuracy[index].item() == pytest.approx(accuracy)
        assert result.confidence[index].item() == pytest.approx(confidence)
        if len(members) < 10:
            assert result.gap[index].isnan()
        else:
            assert result.gap[index].item() == pytest.approx(accuracy - confidence)


def test_the_gap_is_the_one_bin_calibration_error_of_the_configuration() -> None:
    preds, target, configurations = routed(1)
    groups = len(configurations.table)
    expected = grouped_calibration_error(preds, target, configurations.ids, groups, n_bins=1).calibration_error
    ours = configuration_calibration(preds, target, configurations, min_count=1).gap.abs()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("decimals", [0, 1, 2, 4])
def test_shared_confidences_agree_with_a_dictionary(decimals: int) -> None:
    preds, _, configurations = routed(2)
    result = shared_confidence(preds, configurations, decimals=decimals)
    shown: dict[float, list[int]] = {}
    for row, index in zip(preds.tolist(), configurations.ids.tolist(), strict=True):
        shown.setdefault(round(max(row), decimals), []).append(index)
    assert result.displayed.tolist() == pytest.approx(sorted(shown))
    assert result.inputs.tolist() == [len(shown[value]) for value in sorted(shown)]
    assert result.configurations.tolist() == [len(set(shown[value])) for value in sorted(shown)]
    assert result.shared == sum(len(members) for members in shown.values() if len(set(members)) > 1)
    assert result.total == 400


GOOD = {
    "cluster_ids": torch.tensor([0, 1]),
    "expert_indices": torch.tensor([[0, 1], [2, 0]]),
    "num_experts": 3,
    "num_clusters": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 1}, r"cluster_ids must lie in \[0, 0\]; got values from 0 to 1"),
        ({"num_experts": 2}, r"expert_indices must lie in \[0, 1\]; got values from 0 to 2"),
        ({"expert_indices": torch.tensor([[0, 1], [2, 2]])}, r"once per row; got \[2, 2\] in row 1"),
        ({"expert_indices": torch.tensor([[0, 1]])}, "equally many rows; got 2 and 1"),
        ({"expert_indices": torch.tensor([0, 1])}, r"expert_indices must be integers with 2 dimension"),
        ({"cluster_ids": torch.tensor([0.0, 1.0])}, "cluster_ids must be integers.*float32"),
    ],
)
def test_a_bad_routing_is_named(change: dict, message: str) -> None:
    configuration_ids(**GOOD)
    with pytest.raises(InvalidArgumentError, match=message):
        configuration_ids(**{**GOOD, **change})


def test_configurations_of_other_predictions_are_refused() -> None:
    preds, target, configurations = routed(3)
    with pytest.raises(InvalidArgumentError, match="configurations must hold 399 ids; got 400"):
        configuration_calibration(preds[1:], target[1:], configurations)
    with pytest.raises(InvalidArgumentError, match="min_count must be an integer of at least 1; got 0"):
        configuration_calibration(preds, target, configurations, min_count=0)
    with pytest.raises(InvalidArgumentError, match="decimals must be an integer in"):
        shared_confidence(preds, configurations, decimals=-1)
