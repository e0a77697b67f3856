"""Triton kernels: the routing of :mod:`moe_posterior.kernels.reference` in one launch.

Dimensions: N tokens, D hidden size, C clusters, E experts, K experts per token. In the kernels ``i_`` is an index of this
program, ``o_`` are offsets, ``m_`` masks, ``b_`` blocks of values; BLOCK_X is the tile along X. A program owns BLOCK_N tokens:
``nearest_centroid.py`` finds their clusters, then it reads a row of the tables, or loops over the experts in tiles and keeps the K
best so far.
"""

# Triton parameters are not Python values, and kernels are traced: constexpr is the only annotation.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from moe_posterior.kernels.triton.drawing import beta_draws
from moe_posterior.kernels.triton.nearest_centroid import assign


@triton.jit
def assign_and_gather(
    hidden,  # (N, D) at (stride_n); all others contiguous
    points, directions, offsets, radius,  # (C, D), (C, D), (C,), (C,) float32
    topk_indices, topk_weights, topk_scores,  # (C, K), one row more with a radius
    distances, cluster_ids, expert_indices, routing_weights, scores,  # out: (N,), (N,), (N, K) x 3
    N, C, D, stride_n,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RADIUS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Nearest centroid, distance, and the cluster's row of the three tables."""
    o_n, cluster = assign(
        hidden, points, directions, offsets, radius, distances, cluster_ids, N, C, D, stride_n,
        HAS_RADIUS, DOT, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        mask = (o_n < N)[:, None] & (o_k < K)[None, :]
        source = cluster[:, None].to(tl.int64) * K + o_k[None, :]
        target = o_n[:, None] * K + o_k[None, :]
        tl.store(expert_indices + target, tl.load(topk_indices + source, mask=mask, other=0), mask=mask)
        tl.store(routing_weights + target, tl.load(topk_weights + source, mask=mask, other=0.0), mask=mask)
        tl.store(scores + target, tl.load(topk_scores + source, mask=mask, other=0.0), mask=mask)


@triton.jit
def _lower_bound(alpha, beta, risk_aversion):
    """The same operations as moe_posterior.beta.lcb, each rounded by IEEE 754, so that equal scores stay equal."""
    total = alpha + beta
    mean = tl.div_rn(alpha, total)
    variance = tl.div_rn(mean * tl.div_rn(beta, total), total + 1.0)
    return mean - risk_aversion * tl.sqrt_rn(variance)


@triton.jit
def _rank(scores, experts, cluster, E, LOWEST: tl.constexpr):  # (BLOCK_N, BLOCK_E), (1, BLOCK_E), (BLOCK_N, 1)
    """One integer per cell that sorts by score, then by the lowest (e - c) mod E; no two experts of a token share one."""
    bits = scores.to(tl.int32, bitcast=True)  # a bound is never -0.0, which equals 0.0 and would sort below it
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    turn = experts - cluster % E
    turn = tl.where(turn < 0, turn + E, turn)
    return tl.where(experts < E, (bits.to(tl.int64) << 32) + (E - 1 - turn), LOWEST)


@triton.jit
def _score_of(ranks):
    bits = (ranks >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _none_chosen(LOWEST: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Distinct ranks, so that each eviction removes exactly one; slots beyond K are never the lowest and never evicted."""
    o_k = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    return tl.zeros((BLOCK_N, BLOCK_K), tl.int64) + tl.where(o_k < K, LOWEST + o_k, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _keep_best(best, ranks, LOWEST: tl.constexpr, K: tl.constexpr):  # (BLOCK_N, BLOCK_K), (BLOCK_N, BLOCK_E)
    """The K highest of both, unordered."""
    for _ in range(K):
        top = tl.max(ranks, axis=1)[:, None]
        ranks = tl.where(ranks == top, LOWEST, ranks)
        worst = tl.min(best, axis=1)[:, None]
        best = tl.where(best == worst, tl.maximum(top, worst), best)
    return best


@triton.jit
def _logits(scores, temperature):
    """Finite, so that a row with only removed experts has weights too."""
    scaled = tl.div_rn(scores, tl.zeros_like(scores) + temperature)
    return tl.minimum(tl.maximum(scaled, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit
def _write_choice(
    best, cluster, o_n, m_n, expert_indices, routing_weights, scores, temperature, E,
    LOWEST: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Experts, weights and scores from the ranks, best first."""
    chosen = (tl.arange(0, BLOCK_K) < K)[None, :]
    best = tl.where(chosen, best, LOWEST)
    highest = _logits(_score_of(tl.max(best, axis=1)), temperature)
    powers = tl.exp(_logits(_score_of(best), temperature) - highest[:, None])
    total = tl.sum(tl.where(chosen, powers, 0.0), axis=1)
    for i_k in range(K):
        top = tl.max(best, axis=1)
        best = tl.where(best == top[:, None], LOWEST, best)
        score = _score_of(top)
        turn = E - 1 - (top & 0xFFFFFFFF)
        weight = tl.exp(_logits(score, temperature) - highest)
        tl.store(expert_indices + o_n * K + i_k, (cluster + turn) % E, mask=m_n)
        tl.store(scores + o_n * K + i_k, score, mask=m_n)
        tl.store(routing_weights + o_n * K + i_k, tl.div_rn(weight, total), mask=m_n)


@triton.jit(do_not_specialize=["seed"])
def assign_and_select(
    hidden,  # (N, D) at (stride_n); all others contiguous
    points, directions, offsets, radius,  # (C, D), (C, D), (C,), (C,) float32
    alpha, beta, active,  # (C, E), (C, E) float32, one row more with a radius; (E,) bool
    distances, cluster_ids, expert_indices, routing_weights, scores,  # out: (N,), (N,), (N, K) x 3
    risk_aversion, temperature, seed, N, C, D, E, stride_n,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, HAS_ACTIVE: tl.constexpr, DRAWS: tl.constexpr,
    HAS_RADIUS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Nearest centroid, distance, lower confidence bounds (or draws) of the cluster's experts, the best K, their weights."""
    LOWEST: tl.constexpr = -0x8000000000000000
    o_n, cluster = assign(
        hidden, points, directions, offsets, radius, distances, cluster_ids, N, C, D, stride_n,
        HAS_RADIUS, DOT, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    m_n = o_n < N
    best = _none_chosen(LOWEST, K, BLOCK_K, BLOCK_N)
    for i_e in range(0, E, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)[None, :]
        at = cluster[:, None].to(tl.int64) * E + o_e
        mask = m_n[:, None] & (o_e < E)
        b_a = tl.load(alpha + at, mask=mask, other=1.0)
        b_b = tl.load(beta + at, mask=mask, other=1.0)
        if DRAWS:
            b_s = beta_draws(b_a, b_b, seed, o_n[:, None], o_e)
        else:
            b_s = _lower_bound(b_a, b_b, risk_aversion)
        if HAS_ACTIVE:
            b_s = tl.where(tl.load(active + o_e, mask=o_e < E, other=0) != 0, b_s, float("-inf"))
        best = _keep_best(best, _rank(b_s, o_e, cluster[:, None], E, LOWEST), LOWEST, K)
    _write_choice(
        best, cluster, o_n, m_n, expert_indices, routing_weights, scores, temperature, E, LOWEST, K, BLOCK_K
    )  # fmt: skip


@triton.jit
def _gate_product(b_w, b_x, acc, DOT: tl.constexpr):  # (BLOCK_E, BLOCK_D), (BLOCK_N, BLOCK_D), (BLOCK_E, BLOCK_N)
    """Products of 16-bit factors are exact in float32 as they are."""
    if DOT == "emulated":
        return tl.dot(b_w.to(tl.float32), tl.trans(b_x.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(b_w, tl.trans(b_x), acc, input_precision="ieee" if DOT == "split" else DOT)


@triton.jit
def assign_and_add(
    hidden,  # (N, D) at (stride_n); all others contiguous
    points, directions, offsets, radius,  # (C, D), (C, D), (C,), (C,) float32
    gate_weight, gate_bias, evidence_bias, active,  # (E, D) as hidden, (E,), (C, E) float32, (E,) bool
    distances, cluster_ids, expert_indices, routing_weights, scores,  # out: (N,), (N,), (N, K) x 3
    N, C, D, E, stride_n,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RADIUS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Nearest centroid, distance, a learned gate's logits plus the cluster's bias, the best K, their weights."""
    LOWEST: tl.constexpr = -0x8000000000000000
    o_n, cluster = assign(
        hidden, points, directions, offsets, radius, distances, cluster_ids, N, C, D, stride_n,
        HAS_RADIUS, DOT, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    m_n = o_n < N
    rows = hidden + o_n[:, None] * stride_n
    best = _none_chosen(LOWEST, K, BLOCK_K, BLOCK_N)
    for i_e in range(0, E, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        m_e = o_e < E
        experts = gate_weight + o_e[:, None].to(tl.int64) * D
        acc = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_x = tl.load(rows + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_w = tl.load(experts + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0)
            acc = _gate_product(b_w, b_x, acc, DOT)
        b_s = tl.trans(acc)
        if HAS_BIAS:
            b_s += tl.load(gate_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        at = cluster[:, None].to(tl.int64) * E + o_e[None, :]
        b_s += tl.load(evidence_bias + at, mask=m_n[:, None] & m_e[None, :], other=0.0)
        b_s = tl.where(b_s == 0.0, 0.0, b_s)  # -0.0 equals 0.0 and would sort below it
        b_s = tl.where(b_s == b_s, b_s, float("-inf"))
        if HAS_ACTIVE:
            b_s = tl.where(tl.load(active + o_e, mask=m_e, other=0)[None, :] != 0, b_s, float("-inf"))
        best = _keep_best(best, _rank(b_s, o_e[None, :], cluster[:, None], E, LOWEST), LOWEST, K)
    _write_choice(
        best, cluster, o_n, m_n, expert_indices, routing_weights, scores, 1.0, E, LOWEST, K, BLOCK_K
    )  # fmt: skip
