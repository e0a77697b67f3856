import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close
from scipy import stats

from moe_posterior import InvalidArgumentError, beta

GRID = torch.tensor([0.3, 1.0, 1.5, 2.0, 7.0, 30.0, 200.0, 1500.0, 40_000.0], dtype=torch.float64)
ALPHA, BETA = torch.meshgrid(GRID, GRID, indexing="ij")
counts = st.floats(min_value=0.01, max_value=1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_match_scipy_in_the_dtype_given(dtype: torch.dtype) -> None:
    distribution = stats.beta(ALPHA.numpy(), BETA.numpy())
    alpha, b = ALPHA.to(dtype), BETA.to(dtype)
    assert_close(beta.mean(alpha, b), torch.from_numpy(distribution.mean()))
    assert_close(beta.std(alpha, b), torch.from_numpy(distribution.std()))
    assert beta.variance(alpha, b).dtype == dtype


def test_lcb_matches_numbers_computed_by_hand() -> None:
    # Beta(3, 1): mean 3/4, variance 3/80; λ = 2.
    score = beta.lcb(torch.tensor(3.0), torch.tensor(1.0), 2.0)
    assert score.item() == pytest.approx(0.75 - 2 * (3 / 80) ** 0.5)


@given(a=counts, b=counts, low=st.floats(0, 5), more=st.floats(0, 5))
def test_lcb_lies_below_the_mean_and_falls_in_risk_aversion(a: float, b: float, low: float, more: float) -> None:
    alpha, failures = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert beta.lcb(alpha, failures, low) <= beta.mean(alpha, failures)
    assert beta.lcb(alpha, failures, low + more) <= beta.lcb(alpha, failures, low)


def test_lcb_prefers_more_evidence_at_equal_means() -> None:
    few, many = torch.tensor(2.0), torch.tensor(20.0)
    assert beta.lcb(many, many, 1.0) > beta.lcb(few, few, 1.0)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.95])
def test_quantile_matches_scipy(probability: float) -> None:
    expected = stats.beta.ppf(probability, ALPHA.numpy(), BETA.numpy())
    np.testing.assert_allclose(beta.quantile(ALPHA, BETA, probability).numpy(), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("value", [0.01, 0.3, 0.9])
def test_cdf_matches_scipy(value: float) -> None:
    expected = stats.beta.cdf(value, ALPHA.numpy(), BETA.numpy())
    actual = beta.cdf(ALPHA, BETA, torch.tensor(value, dtype=torch.float64))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_quantile_refuses_a_level_outside_the_open_interval(probability: float) -> None:
    with pytest.raises(InvalidArgumentError, match="probability"):
        beta.quantile(ALPHA, BETA, probability)


def test_thompson_draws_follow_the_posterior_and_repeat_with_the_generator(generator: torch.Generator) -> None:
    alpha, b = torch.full((20_000,), 3.0), torch.full((20_000,), 5.0)
    draws = beta.thompson(alpha, b, generator)
    assert stats.kstest(draws.numpy(), stats.beta(3, 5).cdf).pvalue > 0.001
    assert torch.equal(draws, beta.thompson(alpha, b, torch.Generator().manual_seed(0)))


def test_moments_are_differentiable() -> None:
    alpha = torch.tensor([0.7, 4.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([2.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: beta.lcb(x, y, 1.3), (alpha, b))
