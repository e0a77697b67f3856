"""Triton: the Beta draws of :mod:`moe_posterior.kernels.sampling`, operation by operation."""

# Triton parameters are not Python values, and kernels are traced: constexpr is the only annotation.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from moe_posterior.kernels import sampling

CENTRE: tl.constexpr = tl.constexpr(sampling.CENTRE)
TAIL: tl.constexpr = tl.constexpr(sampling.TAIL)


@triton.jit
def _uniform(words):
    return ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _polynomial(coefficients: tl.constexpr, at):
    total = tl.zeros_like(at) + coefficients[0]
    for i in tl.static_range(1, 9):
        total = total * at + coefficients[i]
    return total


@triton.jit
def _normal(words):
    x = 2.0 * _uniform(words) - 1.0
    w = -tl.log((1.0 - x) * (1.0 + x))
    near = _polynomial(CENTRE, w - 2.5)
    far = _polynomial(TAIL, tl.sqrt_rn(w) - 3.0)
    return 1.4142135623730951 * x * tl.where(w < 5.0, near, far)


@triton.jit
def _gamma(shape, normal_word, uniform_word):
    more = shape + 1.0
    spread = tl.div_rn(_normal(normal_word), 3.0 * tl.sqrt_rn(more))
    root = tl.maximum(1.0 - tl.div_rn(tl.zeros_like(more) + 1.0, 9.0 * more) + spread, 0.0)
    return more * root * root * root * tl.exp(tl.div_rn(tl.log(_uniform(uniform_word)), shape))


@triton.jit
def beta_draws(
    alpha, beta, seed, tokens, experts
):  # (BLOCK_N, BLOCK_E) x 2, (), (BLOCK_N, 1) int64, (1, BLOCK_E) int32
    """One draw for every token and expert, which depends only on their indices and the seed."""
    none = tl.zeros_like(alpha).to(tl.int32)
    words = tl.philox(seed, none + experts, none + tokens.to(tl.int32), none + (tokens >> 32).to(tl.int32), none)
    successes = _gamma(alpha, words[0], words[1])
    total = successes + _gamma(beta, words[2], words[3])
    mean = tl.div_rn(alpha, alpha + beta)
    return tl.where(total > 0.0, tl.div_rn(successes, total), mean)
