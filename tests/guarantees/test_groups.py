"""Thresholds per group: who is pooled with whom, and what the promise costs."""

import json
import math

import pytest
import torch

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.guarantees import select_group_thresholds, select_threshold


def rows_of(sizes: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of these sizes; group g's answers are right if the confidence beats a bar that rises with g."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    confidence = torch.rand(len(groups), generator=generator)
    return confidence, torch.rand(len(groups), generator=generator) < 0.6 + 0.4 * confidence, groups


def test_a_large_group_has_its_own_threshold_at_its_share_of_the_error_probability() -> None:
    confidence, correct, groups = rows_of([900, 700])
    found = select_group_thresholds(confidence, correct, groups, 0.15, 0.1)
    for part in found.parts:
        rows = groups == part.groups[0]
        assert part.found == select_threshold(confidence[rows], correct[rows], 0.15, 0.05)
    assert found.thresholds(torch.tensor([1, 0])).tolist() == [part.found.threshold for part in found.parts[::-1]]


def test_small_groups_are_pooled_within_their_parent_and_what_is_left_of_all_parents_together() -> None:
    confidence, correct, groups = rows_of([900, 200, 250, 100, 60, 250])
    parents = {0: 7, 1: 7, 2: 7, 3: 8, 4: 8}
    found = select_group_thresholds(confidence, correct, groups, 0.2, parents=parents)
    named = {part.name: part.groups for part in found.parts}
    assert named == {
        "group 0": (0,),
        "the other groups of parent 7": (1, 2),
        "all other groups": (3, 4, 5),
    }
    assert sum(part.found.rows for part in found.parts) == len(groups)
    assert all(part.found.error_probability == pytest.approx(0.1 / 3) for part in found.parts)


def test_a_part_with_too_few_rows_costs_nothing_and_is_never_acted_on() -> None:
    confidence, correct, groups = rows_of([900, 20])
    found = select_group_thresholds(confidence, correct, groups, 0.15)
    assert found.parts[0].found.error_probability == 0.1
    assert found.parts[1].found.threshold == math.inf
    assert "min_rows" in found.parts[1].found.reason
    assert "never act" in str(found)
    assert not found.acts(torch.ones(2), torch.tensor([1, 99])).any()  # too few rows, and never seen


def test_at_most_so_many_groups_are_tested_on_their_own_the_largest_first() -> None:
    found = select_group_thresholds(*rows_of([400, 500, 600, 350]), 0.2, max_groups=2)
    assert [part.groups for part in found.parts] == [(1,), (2,), (0, 3)]


def test_the_mix_of_the_groups_may_change_and_the_risk_over_all_of_them_still_keeps_the_level() -> None:
    broken, draws = 0, 120
    for seed in range(draws):
        found = select_group_thresholds(*rows_of([500, 500], seed), 0.1, 0.2)
        risks = [
            0.2 * (1 - part.found.threshold) for part in found.parts if part.found.promised
        ]  # mean of 0.4 * (1 - c)
        broken += any(risk > 0.1 for risk in risks)  # then some mix of the groups breaks the level
    assert broken <= (0.2 + 3 * math.sqrt(0.2 * 0.8 / draws)) * draws


def test_thresholds_of_groups_survive_strict_json() -> None:
    found = select_group_thresholds(*rows_of([900, 20]), 0.15)
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [part["name"] for part in saved["parts"]] == ["group 0", "all other groups"]
    assert saved["parts"][1]["threshold"] is None
    assert saved["assumptions"] == list(found.assumptions)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": torch.zeros(3).long()}, "groups"),
        ({"groups": torch.rand(20)}, "groups"),
        ({"min_rows": 0}, "min_rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed: dict, message: str) -> None:  # type: ignore[type-arg]
    confidence, correct, groups = rows_of([20])
    with pytest.raises(InvalidArgumentError, match=message):
        select_group_thresholds(
            **{"confidence": confidence, "correct": correct, "groups": groups, "max_risk": 0.1, **changed}
        )
