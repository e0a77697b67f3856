"""The worst group among those large enough."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import WorstGroup, worst_group

groups = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, math.nan]), st.integers(0, 9)), min_size=1, max_size=9)


@given(groups, st.integers(1, 5), st.booleans())
def test_it_agrees_with_a_plain_loop(rows: list[tuple[float, int]], min_count: int, largest: bool) -> None:
    best: tuple[float, int] | None = None
    for index, (value, count) in enumerate(rows):
        if count < min_count or math.isnan(value):
            continue
        if best is None or (value > best[0] if largest else value < best[0]):
            best = (value, index)
    values, count = (torch.tensor(part) for part in zip(*rows, strict=True))
    found = worst_group(values, count, min_count=min_count, largest=largest)
    if best is None:
        assert found.index is None
        assert math.isnan(found.value)
        assert found.count == 0
    else:
        assert found == WorstGroup(best[1], best[0], rows[best[1]][1])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"one shape \(G,\); got \(2,\) and \(3,\)"):
        worst_group(torch.rand(2), torch.ones(3))
    with pytest.raises(InvalidArgumentError, match="min_count must be at least 1; got 0"):
        worst_group(torch.rand(2), torch.ones(2), min_count=0)
