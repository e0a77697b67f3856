"""Intervals and permutation tests against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.results.intervals import mean_interval, median_interval, sign_flip_p


def test_a_mean_interval_is_the_t_interval_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.5, 0.45, 0.2, 0.6]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    mean, half_width, runs = mean_interval(values)
    assert (mean - half_width, mean + half_width, runs) == (pytest.approx(low), pytest.approx(high), 5)


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert math.isnan(mean_interval([0.5]).half_width)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize("count", [2, 5, 11])
def test_few_pairs_are_enumerated_as_scipy_does(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(0).normal(0.3, 1, count)
    exact = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(torch.tensor(differences)) == pytest.approx(exact.pvalue)


def test_many_pairs_are_sampled_and_agree_with_the_normal_limit(generator: torch.Generator) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = torch.randn(2000, dtype=torch.float64, generator=generator) + 0.04
    z = float(differences.sum() / differences.square().sum().sqrt())
    assert sign_flip_p(differences) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.02)
    assert sign_flip_p(differences) == sign_flip_p(differences)


def test_pairs_without_difference_prove_nothing() -> None:
    assert sign_flip_p(torch.zeros(100)) == 1.0


@pytest.mark.parametrize("count", [1, 3, 6, 9, 20, 25])
def test_the_medians_interval_has_its_level_and_is_no_wider_than_needed(count: int) -> None:
    values = [float(v) for v in np.random.default_rng(count).permutation(count)]
    middle, low, high = median_interval(values)
    assert middle == np.median(values)
    rank = int(low)  # the values are 0 … count − 1
    assert high == count - 1 - rank
    coverage = 1 - 2 * binom.cdf(rank, count, 0.5)
    assert coverage >= 0.95 or rank == 0
    if count > 5:
        assert 1 - 2 * binom.cdf(rank + 1, count, 0.5) < 0.95
