"""Triton: the nearest centroid of every token and the distance to it, for the kernels of :mod:`moe_posterior.kernels.triton.routing`.

Dimensions: N tokens, D hidden size, C clusters. A program owns BLOCK_N tokens: it loops over the clusters in tiles and in each over D,
and keeps the best cluster so far.

The distance comes with the similarities. With m the mean of the centroids and d = c - m, a similarity is s = x·d - (m·d + ‖d‖²/2),
and ``‖x - c‖² = ‖x - m‖² - 2 s``, whose first term is summed from differences while the first tile of clusters is multiplied. The
error is a few roundings of ``Σ|x_i d_i| ≤ (‖x - m‖ + ‖m‖) (‖x - m‖ + ‖x - c‖)``; where ``‖x - c‖²`` is less than 2^-6 of that, or
not finite, the token is read once more and its distance taken from the differences.

How the similarity is multiplied (``DOT``), always summed in float32:

- ``split``: for bfloat16 tokens. The float32 direction is cut into three bfloat16 parts, which together hold its 24 bits, so that
  every product is exact and runs on the matrix units.
- ``tf32x3``: for float16 and float32 tokens on NVIDIA. Three TF32 products keep 21 bits of each factor.
- ``ieee``: for float16 and float32 tokens on AMD, whose matrix units multiply float32 as it is.
- ``emulated``: ``split`` with float32 products, for Triton's interpreter, which silently multiplies bfloat16 wrongly.
"""

# Triton parameters are not Python values, and kernels are traced: constexpr is the only annotation.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _accumulate(b_d, b_x, acc, DOT: tl.constexpr):  # (BLOCK_C, BLOCK_D) float32, (BLOCK_N, BLOCK_D), (BLOCK_C, BLOCK_N)
    if DOT == "split" or DOT == "emulated":
        high = b_d.to(tl.bfloat16)
        rest = b_d - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        if DOT == "emulated":
            high, middle, low = high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
            b_x = b_x.to(tl.float32)
        acc = tl.dot(high, tl.trans(b_x), acc, input_precision="ieee")
        acc = tl.dot(middle, tl.trans(b_x), acc, input_precision="ieee")
        return tl.dot(low, tl.trans(b_x), acc, input_precision="ieee")
    else:
        return tl.dot(b_d, tl.trans(b_x.to(tl.float32)), acc, input_precision=DOT)


@triton.jit
def _similarity(
    rows, points, directions, offsets, i_c, m_n, C, D,
    FIRST: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C, BLOCK_N), -inf where there is none; with FIRST also ‖x - m‖² and ‖m‖², m the mean of the centroids."""
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    clusters = directions + o_c[:, None].to(tl.int64) * D
    acc = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares_of_mean = tl.zeros((BLOCK_D,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_x = tl.load(rows + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_d = tl.load(clusters + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0)
        if FIRST:
            b_m = tl.load(points + o_d, mask=m_d, other=0.0) - tl.load(directions + o_d, mask=m_d, other=0.0)
            apart = b_x.to(tl.float32) - b_m[None, :]
            squares += apart * apart
            squares_of_mean += b_m * b_m
        acc = _accumulate(b_d, b_x, acc, DOT)
    similarity = acc - tl.load(offsets + o_c, mask=m_c, other=0.0)[:, None]
    # False for NaN too: a row that holds NaN or inf has no finite similarity and stays with cluster 0
    similarity = tl.where(m_c[:, None] & (similarity < float("inf")), similarity, float("-inf"))
    return similarity, tl.sum(squares, axis=1), tl.sum(squares_of_mean, axis=0)


@triton.jit
def _nearest(
    hidden, points, directions, offsets, o_n, N, C, D, stride_n,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cluster of the highest similarity, the lower one of equals, 0 where none is finite; ‖x - c‖² of it, and the scale of
    what cancelled in it."""
    rows = hidden + o_n[:, None] * stride_n
    m_n = o_n < N
    similarity, from_mean, of_mean = _similarity(
        rows, points, directions, offsets, 0, m_n, C, D, True, DOT, BLOCK_N, BLOCK_C, BLOCK_D
    )  # fmt: skip
    best, cluster = tl.max(similarity, axis=0, return_indices=True)
    for i_c in range(BLOCK_C, C, BLOCK_C):
        similarity, _, _ = _similarity(
            rows, points, directions, offsets, i_c, m_n, C, D, False, DOT, BLOCK_N, BLOCK_C, BLOCK_D
        )  # fmt: skip
        top, place = tl.max(similarity, axis=0, return_indices=True)
        better = top > best
        cluster = tl.where(better, i_c + place, cluster)
        best = tl.where(better, top, best)
    squared = from_mean - 2.0 * best
    reach = tl.sqrt_rn(from_mean)
    scale = (reach + tl.sqrt_rn(of_mean)) * (reach + tl.sqrt_rn(tl.maximum(squared, 0.0)))
    return cluster, squared, scale


@triton.jit
def _distance_to(
    hidden, points, cluster, o_n, m_n, D, stride_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Distance from the differences, at the cost of reading the rows of ``m_n`` again."""
    rows = hidden + o_n[:, None] * stride_n
    own = points + cluster[:, None].to(tl.int64) * D
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        mask = m_n[:, None] & (o_d < D)[None, :]
        b_x = tl.load(rows + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_c = tl.load(own + o_d[None, :], mask=mask, other=0.0)
        squares += (b_x - b_c) * (b_x - b_c)
    distance = tl.sqrt_rn(tl.sum(squares, axis=1))
    return tl.where(distance != distance, float("inf"), distance)


@triton.jit
def assign(
    hidden, points, directions, offsets, radius, distances, cluster_ids, N, C, D, stride_n,
    HAS_RADIUS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write cluster id and distance of this program's tokens; return the tokens' offsets and their clusters."""
    CANCELLED: tl.constexpr = 0.015625  # 2^-6: below, more than 6 of the sum's 24 bits are gone
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    cluster, squared, scale = _nearest(
        hidden, points, directions, offsets, o_n, N, C, D, stride_n, DOT, BLOCK_N, BLOCK_C, BLOCK_D
    )  # fmt: skip
    sound = (squared >= CANCELLED * scale) & (squared < float("inf"))  # False for NaN too
    distance = tl.sqrt_rn(tl.where(sound, squared, 0.0))
    doubtful = m_n & (sound == 0)
    if tl.max(doubtful.to(tl.int32), axis=0) > 0:
        again = _distance_to(hidden, points, cluster, o_n, doubtful, D, stride_n, BLOCK_N, BLOCK_D)
        distance = tl.where(doubtful, again, distance)
    if HAS_RADIUS:
        cluster = tl.where(distance > tl.load(radius + cluster), C, cluster)
    tl.store(cluster_ids + o_n, cluster.to(tl.int64), mask=m_n)
    tl.store(distances + o_n, distance, mask=m_n)
    return o_n, cluster
