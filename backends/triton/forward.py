"""The forward pass of flash attention: one program computes one tile of query rows.

    for each block of keys:                            # tiling: the (M, N) scores live in registers, never in memory
        S = Q K^T                                      # first matrix product
        m' = max(m, rowmax S)                          # online softmax: m is the largest score met so far,
        P = exp(S - m')                                #   so no exponential overflows
        l = l exp(m - m') + rowsum P                   # what was summed so far is rescaled to the new maximum
        O = O exp(m - m') + P V                        # second matrix product
    O = O / l                                          # one division at the end
    LSE = m + log l                                    # all that the backward needs to make P again

(Dao et al., FlashAttention, 2022; FlashAttention-2, 2023.) The exponentials are powers of two: log2 e is folded into
the scale.
"""

# Kernels are Triton's language in Python's clothes: its types are not Python's.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from attnrt.backends.triton.scores import (
    LN2,
    LOG2E,
    Matrix,
    accumulate,
    head_pointer,
    key_ranges,
    load_tile,
    place,
    product,
    scores_of,
    span,
    store_tile,
    survives,
    visible,
)


@triton.jit(
    do_not_specialize=[
        *("lse_batch", "lse_head", "left", "right", "heads", "group", "seqlen_q", "seqlen_kv", "tiles", "pairs"),
        "section",
    ]
)
def forward(
    # Tensors as scores.Matrix / scores.Plane; the descriptors are None where the hardware cannot fetch by them. The LSE
    # comes apart from its strides, which are lengths: Triton would compile a kernel for those that 16 divides.
    Q, K, V, OUT, LSE, lse_batch, lse_head, K_DESCRIPTOR, V_DESCRIPTOR,
    # None where the call does without: Plane, Plane, (B, Hq) Matrix, (Hq,), (B + 1) or (B,) twice, (1,) int64
    MASK, BIAS, SLOPES, SINKS, LENGTHS_Q, LENGTHS_KV, SEED,
    scale, softcap, dropout_p, left, right,
    heads, group, seqlen_q, seqlen_kv, tiles, pairs, section,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, POSITIVE_SCALE: tl.constexpr, LONGEST_FIRST: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, pair = place(tiles, pairs, section, LONGEST_FIRST)
    b = pair // heads
    h = pair % heads
    h_kv = h // group
    entry = 0 if PACKED else b  # packed sequences share one
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
    m0 = tile * BLOCK_M
    if PACKED and m0 >= length_q:  # the grid is as long as the longest sequence
        return
    end_kv = begin_kv + length_kv
    shift = length_kv - length_q if BOTTOM_RIGHT else 0
    FOREIGN: tl.constexpr = PACKED or LENGTHS_KV is not None
    PRECISE: tl.constexpr = Q.data.dtype.element_ty == tl.float32
    # Scores that are nothing but scaled products are scaled inside the exponent: one multiply-add per score.
    LINEAR: tl.constexpr = POSITIVE_SCALE and softcap is None and SLOPES is None and BIAS is None
    factor = scale * LOG2E if LINEAR else 1.0
    slope = None if SLOPES is None else tl.load(head_pointer(SLOPES, b, h))
    seed = None if SEED is None else tl.load(SEED)

    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_tile(Q, None, entry, h, begin_q + m0, begin_q + length_q, DIM_QK, BLOCK_QK, BLOCK_M, True)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # Only blocks at an edge (of the band, or of the sequence) pay for a mask: the loop runs over the keys before the
    # whole blocks, over those (part 1), and over the keys after them. SPLIT=False is one loop, part 0, that masks
    # everywhere.
    low, full_low, full_high, high = key_ranges(m0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N)
    for part in tl.static_range(0 if left is not None or not SPLIT else 1, 3 if SPLIT else 1):
        if not SPLIT:
            first, stop = low, high
        elif part == 0:
            first, stop = low, tl.minimum(full_low, high)
        elif part == 1:
            first, stop = full_low, full_high
        else:
            first, stop = full_high, high
        for n0 in tl.range(first, stop, BLOCK_N):
            cols = n0 + tl.arange(0, BLOCK_N)
            k = load_tile(
                K, K_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, part != 1
            )  # fmt: skip
            s = product(q, k, PRECISION)
            if not LINEAR:
                s, _kept = scores_of(
                    s, rows[:, None], cols[None, :], b, h, shift, length_q, length_kv, scale, softcap, slope, BIAS,
                    PRECISE,
                )  # fmt: skip
            if part != 1 or MASK is not None:
                seen = visible(
                    rows[:, None], cols[None, :], b, h, shift, length_q, length_kv, left, right, MASK, part != 1
                )  # fmt: skip
                s = tl.where(seen, s, float("-inf"))

            m_new = tl.maximum(m, tl.max(s, 1) * factor)
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet: exp2(-inf - 0) = 0
            p = tl.exp2(s * factor - safe[:, None])
            rescale = tl.exp2(m - safe)
            l = l * rescale + tl.sum(p, 1)
            if SEED is not None:  # the denominator counts what dropout takes away
                p = tl.where(survives(seed, dropout_p, b, h, heads, rows[:, None], cols[None, :]), p, 0.0)
            v = load_tile(
                V, V_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, part != 1, FOREIGN
            )  # fmt: skip
            acc = accumulate(acc * rescale[:, None], p, v, PRECISION)
            m = m_new

    live = (l > 0.0) & (rows < length_q)
    total = tl.where(live, l, 1.0)
    lse = m + tl.log2(total)
    if SINKS is not None:  # one more logit in the denominator, without a value; the LSE does not count it
        sink = tl.load(SINKS + h).to(tl.float32) * LOG2E
        total += tl.exp2(sink - tl.where(live, m, 0.0))
    if SEED is not None:
        total *= 1.0 - dropout_p
    out = tl.where(live[:, None], acc / total[:, None], 0.0)  # a dead row gives zeros

    # A padded batch has room for rows past the sequence's end: zeros there. A packed one has the next sequence.
    end_q = begin_q + (length_q if PACKED else seqlen_q)
    store_tile(OUT, entry, h, begin_q + m0, end_q, out, DIM_V, BLOCK_V, BLOCK_M)
    if LSE is not None:
        pointers = head_pointer(Matrix(LSE, lse_batch, lse_head, 1), entry, h) + begin_q + rows
        tl.store(pointers, tl.where(live, lse * LN2, float("-inf")), mask=begin_q + rows < end_q)
