"""The paired bootstrap against scipy's, and its coverage of known truths."""

import numpy as np
import pytest
import torch
from scipy import stats

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.metrics import calibration_error, centred_interval, paired_bootstrap
from moe_posterior.results.intervals import MAX_DRAWS, bootstrap_sums, resampled_rows


def calibrated(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return confidence, torch.bernoulli(confidence, generator=generator).long()


def test_the_interval_of_a_mean_and_of_a_paired_difference_agree_with_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(80, generator=generator, dtype=torch.float64)
    two = one + 0.3 + 0.1 * torch.randn(80, generator=generator, dtype=torch.float64)
    result = paired_bootstrap(torch.mean, {"one": (one,), "two": (two,)}, reference="one", samples=4000)
    for data, interval in ((one, result.arms["one"]), (two - one, result.differences["two"])):
        expected = stats.bootstrap(
            (data.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        width = expected.high - expected.low
        assert interval.value.item() == pytest.approx(data.mean().item())
        assert interval.low.item() == pytest.approx(expected.low, abs=0.06 * width)
        assert interval.high.item() == pytest.approx(expected.high, abs=0.06 * width)
    assert list(result.differences) == ["two"]


def test_all_arms_see_the_same_rows() -> None:
    rows = torch.arange(30.0)
    result = paired_bootstrap(
        torch.mean, {"a": (rows,), "b": (rows.clone(),), "c": (rows + 2,)}, reference="a", samples=50
    )
    assert [end.item() for end in result.differences["b"]] == [0, 0, 0]
    assert [end.item() for end in result.differences["c"]] == pytest.approx([2, 2, 2], abs=1e-5)
    assert result.arms["a"].low < result.arms["a"].high


def test_the_interval_of_a_calibration_error_holds_its_value_where_the_plain_one_does_not() -> None:
    confidence, correct = calibrated(3, 200)
    values = []

    def spy(*tensors: torch.Tensor) -> torch.Tensor:
        values.append(calibration_error(*tensors))
        return values[-1]

    interval = paired_bootstrap(spy, {"only": (confidence, correct)}, reference="only", samples=300).arms["only"]
    resampled = torch.stack(values[1:])
    assert len(resampled) == 300
    assert resampled.quantile(0.025) > interval.value - 0.01, "the plain interval sits too high"
    assert interval.low < interval.value < interval.high
    assert (interval.low + interval.high).item() / 2 == pytest.approx(interval.value.item(), abs=0.01)


def test_a_metric_may_return_many_numbers_and_the_seed_decides() -> None:
    rows = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))

    def run(seed: int) -> torch.Tensor:
        result = paired_bootstrap(lambda x: x.mean(0), {"a": (rows,)}, reference="a", samples=20, seed=seed)
        return result.arms["a"].low

    before = torch.get_rng_state()
    assert run(0).shape == (3,)
    assert run(0).equal(run(0))
    assert not run(0).equal(run(1))
    assert torch.get_rng_state().equal(before)


def test_the_difference_of_two_means_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(60, generator=generator)
        two = 0.5 * one + torch.randn(60, generator=generator) + 0.2
        result = paired_bootstrap(torch.mean, {"a": (one,), "b": (two,)}, reference="a", samples=200, seed=seed)
        interval = result.differences["b"]
        hits += bool(interval.low <= 0.2 <= interval.high)
    assert 0.87 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "c"}, r"reference must be one of the arms \['a', 'b'\]; got 'c'"),
        ({"samples": 0}, "samples must be an integer in"),
        ({"level": 1.0}, r"level must lie in \(0, 1\); got 1.0"),
        ({"arms": {"a": (torch.rand(3),), "b": (torch.rand(4),)}}, r"one positive number of rows; got \[3, 4\]"),
        ({"arms": {"a": (torch.rand(0),)}}, r"one positive number of rows; got \[0\]"),
    ],
)
def test_a_bad_argument_is_named(change: dict, message: str) -> None:
    good = {"arms": {"a": (torch.rand(3),), "b": (torch.rand(3),)}, "reference": "a", "samples": 5}
    paired_bootstrap(torch.mean, **good)
    with pytest.raises(InvalidArgumentError, match=message):
        paired_bootstrap(torch.mean, **{**good, **change})


def test_a_nan_in_a_resample_makes_the_interval_nan() -> None:
    low, high = centred_interval(torch.tensor(1.0), torch.tensor([1.0, torch.nan, 2.0]))
    assert low.isnan()
    assert high.isnan()


def test_rows_are_drawn_evenly_in_chunks_of_bounded_size() -> None:
    rows = MAX_DRAWS // 2 - 1
    assert [tuple(drawn.shape) for drawn in resampled_rows(rows, 3, seed=0)] == [(2, rows), (1, rows)]
    drawn = torch.cat(list(resampled_rows(50, 4000, seed=0)))
    counts = torch.zeros(4000, 50).scatter_add_(1, drawn, torch.ones(4000, 50))
    assert counts.mean().item() == 1
    assert counts.var().item() == pytest.approx(49 / 50, rel=0.02)


def test_sums_and_any_other_metric_are_resampled_alike() -> None:
    values = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    [sums] = bootstrap_sums([values[:, None]], 200, seed=5)
    low, high = centred_interval(values.mean(), sums[:, 0] / 40)
    found = paired_bootstrap(torch.mean, {"one": (values,)}, reference="one", samples=200, seed=5).arms["one"]
    assert (found.low.item(), found.high.item()) == (pytest.approx(low.item()), pytest.approx(high.item()))
