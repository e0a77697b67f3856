"""Beta draws that depend on (seed, token, expert) alone: the definition against which the Triton kernels are tested.

Dimensions: N tokens, E experts.

Philox-4x32-10 turns (expert, token) and the seed into four words, two for each of two gamma draws: a normal by the inverse of its
distribution, and a uniform. A gamma of shape a is one of shape a + 1, by Wilson and Hilferty's cube of a normal, times u^(1/a).

Sources: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011; Giles, *Approximating the erfinv function*, 2011; Wilson
and Hilferty, *The distribution of chi-square*, 1931; Marsaglia and Tsang, *A simple method for generating gamma variables*, 2000.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Polynomials in w = -log(1 - x²), highest power first, of erfinv(x) / x: in w - 2.5 below w = 5, in √w - 3 above.
CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def philox(seed: int, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # 2 x (N, E) int64
    """Ten rounds of Philox-4x32 on the counter (expert, token, token's upper word, 0); words in int64."""
    words = [experts & _WORD, tokens & _WORD, (tokens >> 32) & _WORD, torch.zeros_like(tokens)]
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        # int64 products wrap around, but their bits are those of the unsigned product.
        even, odd = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((odd >> 32) & _WORD) ^ words[1] ^ keys[0],
            odd & _WORD,
            ((even >> 32) & _WORD) ^ words[3] ^ keys[1],
            even & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return words[0], words[1], words[2], words[3]


def uniform(words: Tensor) -> Tensor:  # int64 -> float32
    """In [2^-24, 1 - 2^-24], every value exact in float32."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def normal(words: Tensor) -> Tensor:  # int64 -> float32
    """√2 erfinv(2u - 1); its extremes are ±5.4."""
    x = 2.0 * uniform(words) - 1.0
    w = -torch.log((1.0 - x) * (1.0 + x))
    near = _polynomial(CENTRE, w - 2.5)
    far = _polynomial(TAIL, torch.sqrt(w) - 3.0)
    return 2.0**0.5 * x * torch.where(w < 5.0, near, far)


def beta_draws(
    alpha: Tensor,  # (N, E)
    beta: Tensor,  # (N, E)
    seed: int,
) -> Tensor:  # (N, E)
    """One draw from Beta(alpha, beta) for every token and expert; row n is token n, whatever else is in the batch.

    Approximate: see kernels/README.md for the distance to the true distribution, also for pseudo-counts below 1.

    >>> counts = torch.tensor([[2.0, 50.0]])
    >>> beta_draws(counts, counts, seed=0).shape, bool((beta_draws(counts, counts, 0) == beta_draws(counts, counts, 0)).all())
    (torch.Size([1, 2]), True)
    """
    tokens = torch.arange(alpha.shape[0], device=alpha.device)[:, None].expand(alpha.shape)
    experts = torch.arange(alpha.shape[1], device=alpha.device).expand(alpha.shape)
    words = philox(seed, tokens, experts)
    successes = _gamma(alpha, words[0], words[1])
    total = successes + _gamma(beta, words[2], words[3])
    return torch.where(total > 0, successes / total, alpha / (alpha + beta))


def _gamma(shape: Tensor, normal_word: Tensor, uniform_word: Tensor) -> Tensor:
    more = shape + 1.0
    root = 1.0 - 1.0 / (9.0 * more) + normal(normal_word) / (3.0 * torch.sqrt(more))
    root = root.clamp(min=0.0)
    return more * root * root * root * torch.exp(torch.log(uniform(uniform_word)) / shape)


def _polynomial(coefficients: tuple[float, ...], at: Tensor) -> Tensor:
    total = torch.full_like(at, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * at + coefficient
    return total
