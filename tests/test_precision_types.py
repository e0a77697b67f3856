"""State that must stay exact: a cast in place is refused before anything is decided by it; clusters read every type."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from moe_posterior import BetaPosterior, Clusterer, InvalidArgumentError
from moe_posterior.calibrators import HistogramBinning, Outputs

POINTS = torch.arange(24).view(8, 3) % 7


def cast_in_place(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """What FSDP does to the buffers of what it wraps."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return module


def test_a_belief_whose_data_was_cast_in_place_refuses_to_count() -> None:
    belief = cast_in_place(BetaPosterior(2, 3))
    for call in (belief.observe, belief.warm_start):
        with pytest.raises(InvalidArgumentError, match=r"must stay torch.float64; got torch.bfloat16"):
            call([0], [[1, 0, 1]])
    with pytest.raises(InvalidArgumentError, match=r"must stay"):
        copy.deepcopy(belief).observe([0], [[1, 0, 1]])


def test_a_calibrator_whose_data_was_cast_in_place_refuses_to_show() -> None:
    outputs = Outputs(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
    calibrator = HistogramBinning(2).fit(outputs, [0, 1])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with pytest.raises(InvalidArgumentError, match=r"must stay torch.float64"):
            cast_in_place(copy.deepcopy(calibrator), dtype)(outputs)
    calibrator(outputs)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint16, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_clusters_of_points_of_every_type_are_the_same(kind: torch.dtype) -> None:
    expected = Clusterer(3, 3).fit(POINTS.float()).centroids
    assert torch.equal(Clusterer(3, 3).fit(POINTS.to(kind)).centroids, expected)
    for form in (POINTS.numpy(), POINTS.tolist(), POINTS.float().requires_grad_(), POINTS.T.contiguous().T):
        assert torch.equal(Clusterer(3, 3).fit(form).centroids, expected)
    assert torch.equal(
        Clusterer(3, 3).set_centroids(expected.to(kind).double().numpy()).centroids, expected.to(kind).float()
    )


@pytest.mark.parametrize(
    "wrong", ["points", None, 3, [[1.0, 2.0]] * 8, POINTS * 1j, np.full((8, 3), np.nan), np.full((8, 3), 1e300)]
)
def test_points_that_are_none_are_refused(wrong: Any) -> None:
    clusterer = Clusterer(3, 3)
    with pytest.raises(InvalidArgumentError, match="hidden must"):
        clusterer.fit(wrong)
    with pytest.raises(InvalidArgumentError, match="centroids must"):
        clusterer.set_centroids(wrong[:3] if isinstance(wrong, (np.ndarray, torch.Tensor)) else wrong)
    assert not clusterer.fitted
    clusterer.fit(POINTS)
    if not isinstance(wrong, np.ndarray):
        with pytest.raises(InvalidArgumentError, match="hidden must"):
            clusterer(wrong)
