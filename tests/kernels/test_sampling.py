"""Draws from (seed, token, expert): the generator against its published answers, the draws against the distribution."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from moe_posterior.kernels import sampling

# Largest distance between the distribution of the draws and the true one, over the grid below; kernels/README.md promises it.
KOLMOGOROV_SMIRNOV = 0.006
COUNTS = [0.3, 1.0, 1.5, 2.0, 5.0, 30.0, 1000.0]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 on Python's integers."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second % 2**32, (first >> 32) ^ d ^ m, first % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def words(seed: int, token: int, expert: int) -> tuple[int, ...]:
    return tuple(int(w) for w in sampling.philox(seed, torch.tensor([[token]]), torch.tensor([[expert]])))


def test_the_generator_gives_the_published_answer() -> None:
    assert words(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", [1, 2**31, 2**40 + 17, 2**63 - 1])
@pytest.mark.parametrize(("token", "expert"), [(0, 1), (1, 0), (2**31 + 5, 3), (2**33 + 1, 1023)])
def test_the_generator_is_philox_on_integers(seed, token, expert) -> None:
    expected = philox((expert, token % 2**32, token >> 32, 0), (seed % 2**32, seed >> 32))
    assert words(seed, token, expert) == expected


def test_normals_are_the_inverse_of_their_distribution() -> None:
    bits = torch.cat([torch.arange(0, 2**32, 2**15 + 1), torch.tensor([0, 511, 512, 2**31, 2**32 - 1])])
    u = (np.floor(bits.numpy() / 512) + 0.5) / 2**23
    assert sampling.uniform(bits).double().numpy() == pytest.approx(u, abs=0)
    np.testing.assert_allclose(sampling.normal(bits).double().numpy(), special.ndtri(u), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("a", COUNTS)
@pytest.mark.parametrize("b", COUNTS)
def test_draws_follow_the_beta_distribution(a, b) -> None:
    shape = (40_000, 1)
    alpha, beta = (torch.full(shape, count, dtype=torch.float64) for count in (a, b))  # float32 ends at 1 - 2^-24
    draws = sampling.beta_draws(alpha, beta, seed=3).flatten().numpy()
    sampling_error = 1.63 / np.sqrt(len(draws))  # exceeded by true draws once in a hundred
    assert stats.kstest(draws, stats.beta(a, b).cdf).statistic < KOLMOGOROV_SMIRNOV + sampling_error


def test_the_bound_would_see_a_wrong_distribution() -> None:
    shape = (40_000, 1)
    draws = sampling.beta_draws(torch.full(shape, 2.0), torch.full(shape, 5.0), seed=3).flatten().numpy()
    assert stats.kstest(draws, stats.beta(2.0, 4.8).cdf).statistic > KOLMOGOROV_SMIRNOV + 1.63 / np.sqrt(len(draws))


def test_draws_take_the_dtype_of_the_belief_and_depend_on_the_place_alone() -> None:
    alpha = torch.full((50, 3), 2.0, dtype=torch.float64)
    draws = sampling.beta_draws(alpha, alpha, seed=1)
    assert draws.dtype == torch.float64
    assert torch.equal(sampling.beta_draws(alpha[:7], alpha[:7], seed=1), draws[:7])
    assert not torch.equal(sampling.beta_draws(alpha, alpha, seed=2), draws)
