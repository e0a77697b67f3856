"""Sizes of the parts that everything is built from: whatever is no whole number is refused by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_posterior import (
    BetaPosterior,
    Clusterer,
    ExpertsFFN,
    InvalidArgumentError,
    PosteriorGate,
    PriorGate,
    SoftmaxGate,
)
from moe_posterior.gates import BanditGate, ExpertThresholdGate, FixedGate, NearestNeighbourGate

GATE = {"hidden_size": 4, "num_experts": 3, "top_k": 1}
PARTS: dict[Callable[..., object], dict[str, int]] = {
    BetaPosterior: {"num_clusters": 2, "num_experts": 3},
    Clusterer: {"num_clusters": 2, "hidden_size": 4},
    ExpertsFFN: {"num_experts": 3, "hidden_size": 4, "intermediate_size": 5},
    **dict.fromkeys((PosteriorGate, PriorGate, SoftmaxGate, BanditGate, ExpertThresholdGate, FixedGate), GATE),
    NearestNeighbourGate: GATE,
}
WRONG = [None, "4", [], {}, object(), 1j, True, 1.5, float("nan"), 0, -1, torch.ones(2), torch.ones((), device="meta")]


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, sizes in PARTS.items() for name in sizes])
def test_a_size_that_is_no_whole_number_is_refused_by_name(part: Callable[..., object], name: str) -> None:
    for wrong in WRONG:
        with pytest.raises(InvalidArgumentError, match=f"^{name} must"):
            part(**{**PARTS[part], name: wrong})


@pytest.mark.parametrize("make", [int, np.int8, np.uint64, lambda size: torch.tensor(size)])
@pytest.mark.parametrize("part", PARTS)
def test_a_size_may_be_an_integer_of_any_kind(part: Callable[..., object], make: Callable[[int], Any]) -> None:
    part(**{name: make(size) for name, size in PARTS[part].items()})
