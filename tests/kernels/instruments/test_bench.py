"""What the CPU benchmarks say beside their clocks: bytes, equal results, and what was skipped."""

import sys

import pytest
import torch
from torch import nn

from moe_posterior.kernels.instruments import bench, bench_layers


@pytest.mark.parametrize("batch", [1, 63, 512])
def test_the_layer_holds_no_more_memory_than_the_softmax_layer(batch: int) -> None:
    records = list(bench_layers.memory_cases(batch, 64, 8))
    assert [record["path"] for record in records] == ["peak, forward + backward", "kept for backward"]
    for record in records:
        assert record["ratio"] <= 1.05


class Widths(nn.Module):
    """Three tensors of known size: x·a, its square, and the sum's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight


def test_bytes_are_counted_as_by_hand() -> None:
    hidden = torch.ones(1000)
    assert (
        bench_layers.saved_bytes(Widths(), hidden) == 4000
    )  # the input, for the weight's gradient; the input needs none
    # In the backward of the mean of squares: the product, the gradient it meets, and what 2·product·gradient goes through.
    assert 3 * 4000 <= bench_layers.peak_bytes(Widths(), hidden) <= 6 * 4000


def test_a_tensor_that_is_gone_is_not_counted_and_one_that_is_held_is() -> None:
    with bench_layers._Peak() as released:
        for _ in range(10):
            torch.ones(1000)
    with bench_layers._Peak() as held:
        _keep = [torch.ones(1000) for _ in range(10)]
    assert released.bytes <= 2 * 4000
    assert held.bytes == 10 * 4000


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_mixtrals_block_computes_what_the_softmax_layer_does(implementation: str) -> None:
    pytest.importorskip("transformers")
    ours, softmax, hidden = bench_layers.layers(100, 16, 5)
    block = bench_layers.mixtral_block(softmax, implementation)
    routing = ours.route(hidden)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden[None])[0], softmax(hidden), rtol=1e-4, atol=1e-4)
        theirs = block.experts(hidden, routing.expert_indices, routing.routing_weights)
        torch.testing.assert_close(theirs, ours(hidden), rtol=1e-4, atol=1e-4)


def test_a_block_that_computes_something_else_is_not_timed(monkeypatch) -> None:
    pytest.importorskip("transformers")
    honest = bench_layers.mixtral_block

    def swapped(layer, implementation):
        block = honest(layer, implementation)
        with torch.no_grad():
            block.experts.down_proj.copy_(block.experts.down_proj.flip(0))
        return block

    monkeypatch.setattr(bench_layers, "mixtral_block", swapped)
    with pytest.raises(AssertionError, match=r"Mixtral's experts \(eager\) do not compute what ours do"):
        bench_layers.mixtral_case(64, 16, 4, "eager", backward=False)


def test_without_transformers_a_record_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    record = bench_layers.mixtral_case(8, 16, 4, "eager", backward=True)
    assert record["ratio"] is None
    assert bench._figures(record).strip() == record["skipped"] == "transformers is not installed"
