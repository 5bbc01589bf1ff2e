"""The backward pass of flash attention: nothing of the score matrix was kept, so its tiles are computed again.

With P = exp(S - LSE), dP = dO V^T and delta = rowsum(dO * O):

    dS = P * (dP - delta)        (softmax)         dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO

Each kernel is the only writer of what it writes: no atomics, so the result is the same on every run.

    preprocess   delta, and the LSE as the others want it          one program for 128 query rows
    balance      delta again, of float32 inputs                    a tile of queries stays, key tiles pass by
    dkdv         a tile of keys stays, query tiles pass by         works on S^T, so no product needs a transpose
    dq           a tile of queries stays, key tiles pass by
    dbias        a tile of the bias stays; the dims that it is broadcast over pass by
"""

# Kernels are Triton's language in Python's clothes: its types are not Python's.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from attnrt.backends.triton.scores import (
    LOG2E,
    Matrix,
    accumulate,
    head_pointer,
    key_ranges,
    load_tile,
    place,
    product,
    query_range,
    scores_of,
    span,
    store_tile,
    survives,
    visible,
)

STATS_ROWS = tl.constexpr(128)
"""Rows of the statistics are padded to a multiple of this in every sequence, so that tiles load them unmasked."""
UNSPECIALIZED = ["left", "right", "heads", "group", "batch", "seqlen_q", "seqlen_kv", "tiles", "pairs", "section"]


@triton.jit
def stats_begin(begin_q, b, padded_q, PACKED: tl.constexpr):
    """Where the statistics of sequence b begin in a (Hq, rows) array."""
    if PACKED:  # as many spare rows before it as there may be sequences with a part of a tile
        begin = (begin_q + STATS_ROWS * b) // STATS_ROWS * STATS_ROWS
    else:
        begin = b * padded_q
    return begin


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "heads", "seqlen_q", "padded_q"])
def preprocess(
    OUT, DOUT, LSE, lse_batch, lse_head, LSE2, DELTA, SINKS, DSINKS, LENGTHS_Q,
    heads, seqlen_q, padded_q, stats_rows,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """delta and the LSE in log2 units, sinks counted. Rows that see nothing, or are no rows, get +inf: then
    P = exp2(S - inf) = 0 wherever they meet a key, and no other kernel needs to know of them."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    b, h = pair // heads, pair % heads
    entry = 0 if PACKED else b  # packed sequences share one
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    end_q = begin_q + length_q
    at = tl.cast(h, tl.int64) * stats_rows + stats_begin(begin_q, b, padded_q, PACKED)
    BLOCK: tl.constexpr = min(STATS_ROWS, 4096 // BLOCK_V)  # few enough to stay in registers
    dsink = 0.0
    first = tile * STATS_ROWS
    stop = tl.minimum(first + STATS_ROWS, tl.cdiv(length_q, STATS_ROWS) * STATS_ROWS if PACKED else padded_q)
    for m0 in tl.range(first, stop, BLOCK):
        rows = m0 + tl.arange(0, BLOCK)
        out = load_tile(OUT, None, entry, h, begin_q + m0, end_q, DIM_V, BLOCK_V, BLOCK, True)
        dout = load_tile(DOUT, None, entry, h, begin_q + m0, end_q, DIM_V, BLOCK_V, BLOCK, True)
        pointers = head_pointer(Matrix(LSE, lse_batch, lse_head, 1), entry, h) + begin_q + rows
        lse = tl.load(pointers, mask=rows < length_q, other=float("-inf")) * LOG2E
        live = lse != float("-inf")
        delta = tl.where(live, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), 0.0)
        if SINKS is not None:
            sink = tl.load(SINKS + h).to(tl.float32) * LOG2E
            top = tl.maximum(lse, sink)
            lse = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))
            if DSINKS is not None:
                # A sink's value is zero, so its dP is 0: dsink = -p_sink delta, summed over every row of the head.
                dsink -= tl.sum(tl.where(live, tl.exp2(sink - lse) * delta, 0.0))
        tl.store(LSE2 + at + rows, tl.where(live, lse, float("inf")))
        tl.store(DELTA + at + rows, delta)
    if DSINKS is not None:
        tl.store(DSINKS + pair * tl.num_programs(0) + tile, dsink)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def balance(
    Q, K, V, DOUT, LSE2, DELTA, SINKS,
    MASK, BIAS, SLOPES, LENGTHS_Q, LENGTHS_KV, SEED,
    scale, softcap, dropout_p, left, right,
    heads, group, seqlen_q, seqlen_kv, padded_q, stats_rows, tiles, pairs, section,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LONGEST_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = sum P dP / sum P, of the very P and dP that the passes below compute.

    rowsum(dO * O) is the same number in another order of roundings. Where a row sees next to one key, dP - delta
    cancels to nothing, and what is left of it is the difference of the two roundings: about eps |dO| |v|, which
    PyTorch's softmax does not have. So the mean of dP - delta over the row is added to delta. The mean is small, hence
    precise, and a row of one key comes to dP exactly. Only where the LSE is that of these keys: of a part of the keys,
    sum P is not 1.
    """
    tile, pair = place(tiles, pairs, section, LONGEST_FIRST)
    b, h = pair // heads, pair % heads
    h_kv = h // group
    entry = 0 if PACKED else b  # packed sequences share one
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
    m0 = tile * BLOCK_M
    if PACKED and m0 >= length_q:
        return
    end_kv = begin_kv + length_kv
    shift = length_kv - length_q if BOTTOM_RIGHT else 0
    slope = None if SLOPES is None else tl.load(head_pointer(SLOPES, b, h))
    seed = None if SEED is None else tl.load(SEED)
    stats = tl.cast(h, tl.int64) * stats_rows + stats_begin(begin_q, b, padded_q, PACKED)

    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_tile(Q, None, entry, h, begin_q + m0, begin_q + length_q, DIM_QK, BLOCK_QK, BLOCK_M, True)
    dout = load_tile(DOUT, None, entry, h, begin_q + m0, begin_q + length_q, DIM_V, BLOCK_V, BLOCK_M, True)
    lse = tl.load(LSE2 + stats + rows)
    delta = tl.load(DELTA + stats + rows)
    share = tl.full([BLOCK_M], 1.0, tl.float32)  # of the keys in the softmax
    if SINKS is not None:
        share -= tl.exp2(tl.load(SINKS + h).to(tl.float32) * LOG2E - lse)
        delta = tl.where(share > 0.0, delta / share, 0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M], tl.float32)
    low, _full_low, _full_high, high = key_ranges(m0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N)
    for n0 in tl.range(low, high, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        k = load_tile(K, None, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, True)
        s, _kept = scores_of(
            product(q, k, PRECISION), rows[:, None], cols[None, :], b, h, shift, length_q, length_kv,
            scale, softcap, slope, BIAS, True,
        )  # fmt: skip
        seen = visible(rows[:, None], cols[None, :], b, h, shift, length_q, length_kv, left, right, MASK, True)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        v = load_tile(V, None, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, True)
        dp = product(dout, v, PRECISION)
        if SEED is not None:
            there = survives(seed, dropout_p, b, h, heads, rows[:, None], cols[None, :])
            dp = tl.where(there, dp / (1.0 - dropout_p), 0.0)
        total += tl.sum(p, 1)
        moved += tl.sum(p * (dp - delta[:, None]), 1)
    delta += tl.where(total > 0.0, moved / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(DELTA + stats + rows, delta * share)


@triton.jit
def in_turn(x, row, PRECISION: tl.constexpr):
    """x, which a loop over rows does not change, as if it did. Else its rounding to TF32 would move to before the loop,
    and hold x in registers all the while instead of in shared memory."""
    if PRECISION == "tf32":
        x = tl.where(row >= 0, x, 0.0)
    return x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv(
    Q, K, V, DOUT, LSE2, DELTA, DK, DV, Q_DESCRIPTOR, K_DESCRIPTOR, V_DESCRIPTOR, DOUT_DESCRIPTOR,
    MASK, BIAS, SLOPES, LENGTHS_Q, LENGTHS_KV, SEED,
    scale, softcap, dropout_p, left, right,
    heads, group, seqlen_q, seqlen_kv, padded_q, stats_rows, tiles, pairs, section,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head, summed over the query heads that share it."""
    tile, pair = place(tiles, pairs, section, False)
    heads_kv = heads // group
    b, h_kv = pair // heads_kv, pair % heads_kv
    entry = 0 if PACKED else b  # packed sequences share one
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
    n0 = tile * BLOCK_N
    if PACKED and n0 >= length_kv:
        return
    end_q = begin_q + length_q
    shift = length_kv - length_q if BOTTOM_RIGHT else 0
    PRECISE: tl.constexpr = Q.data.dtype.element_ty == tl.float32
    seed = None if SEED is None else tl.load(SEED)
    at = stats_begin(begin_q, b, padded_q, PACKED)

    cols = n0 + tl.arange(0, BLOCK_N)
    end_kv = begin_kv + length_kv
    k = load_tile(K, K_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, True)
    v = load_tile(V, V_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, True)
    dk = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    low, high = query_range(n0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N)
    for member in tl.range(0, group):
        h = h_kv * group + member
        slope = None if SLOPES is None else tl.load(head_pointer(SLOPES, b, h))
        stats = tl.cast(h, tl.int64) * stats_rows + at
        for m0 in tl.range(low, high, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            q = load_tile(
                Q, Q_DESCRIPTOR, entry, h, begin_q + m0, end_q, DIM_QK, BLOCK_QK, BLOCK_M, True
            )  # fmt: skip
            s, kept = scores_of(
                product(in_turn(k, m0, PRECISION), q, PRECISION), rows[None, :], cols[:, None], b, h, shift, length_q,
                length_kv, scale, softcap, slope, BIAS, PRECISE,
            )  # fmt: skip
            seen = visible(
                rows[None, :], cols[:, None], b, h, shift, length_q, length_kv, left, right, MASK, True, False
            )  # fmt: skip
            lse = tl.load(LSE2 + (stats + m0) + tl.arange(0, BLOCK_M))  # summed so, it takes the fewest registers
            p = tl.exp2(tl.where(seen, s, float("-inf")) - lse[None, :])
            dout = load_tile(
                DOUT, DOUT_DESCRIPTOR, entry, h, begin_q + m0, end_q, DIM_V, BLOCK_V, BLOCK_M, True
            )  # fmt: skip
            dp = product(in_turn(v, m0, PRECISION), dout, PRECISION)
            weights = p
            if SEED is not None:
                there = survives(seed, dropout_p, b, h, heads, rows[None, :], cols[:, None])
                weights = tl.where(there, p / (1.0 - dropout_p), 0.0)
                dp = tl.where(there, dp / (1.0 - dropout_p), 0.0)
            dv = accumulate(dv, weights, dout, PRECISION)
            ds = p * (dp - tl.load(DELTA + (stats + m0) + tl.arange(0, BLOCK_M))[None, :]) * kept
            dk = accumulate(dk, ds, q, PRECISION)

    end_kv = begin_kv + (length_kv if PACKED else seqlen_kv)
    dk *= scale
    if LENGTHS_KV is not None and not PACKED:  # the padding's gradients are zeros; what was fetched stayed in its row
        real = (cols < length_kv)[:, None]
        dk = tl.where(real, dk, 0.0)
        dv = tl.where(real, dv, 0.0)
    store_tile(DK, entry, h_kv, begin_kv + n0, end_kv, dk, DIM_QK, BLOCK_QK, BLOCK_N)
    store_tile(DV, entry, h_kv, begin_kv + n0, end_kv, dv, DIM_V, BLOCK_V, BLOCK_N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq(
    Q, K, V, DOUT, LSE2, DELTA, DQ, K_DESCRIPTOR, V_DESCRIPTOR,
    MASK, BIAS, SLOPES, LENGTHS_Q, LENGTHS_KV, SEED,
    scale, softcap, dropout_p, left, right,
    heads, group, seqlen_q, seqlen_kv, padded_q, stats_rows, tiles, pairs, section,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LONGEST_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries: the walk of the forward, with the LSE known from the start."""
    tile, pair = place(tiles, pairs, section, LONGEST_FIRST)
    b, h = pair // heads, pair % heads
    h_kv = h // group
    entry = 0 if PACKED else b  # packed sequences share one
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
    m0 = tile * BLOCK_M
    if PACKED and m0 >= length_q:
        return
    end_kv = begin_kv + length_kv
    shift = length_kv - length_q if BOTTOM_RIGHT else 0
    PRECISE: tl.constexpr = Q.data.dtype.element_ty == tl.float32
    slope = None if SLOPES is None else tl.load(head_pointer(SLOPES, b, h))
    seed = None if SEED is None else tl.load(SEED)
    stats = tl.cast(h, tl.int64) * stats_rows + stats_begin(begin_q, b, padded_q, PACKED)

    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_tile(Q, None, entry, h, begin_q + m0, begin_q + length_q, DIM_QK, BLOCK_QK, BLOCK_M, True)
    dout = load_tile(DOUT, None, entry, h, begin_q + m0, begin_q + length_q, DIM_V, BLOCK_V, BLOCK_M, True)
    lse = tl.load(LSE2 + stats + rows)
    delta = tl.load(DELTA + stats + rows)
    acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    low, _full_low, _full_high, high = key_ranges(m0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N)
    for n0 in tl.range(low, high, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        k = load_tile(
            K, K_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, True
        )  # fmt: skip
        s, kept = scores_of(
            product(q, k, PRECISION), rows[:, None], cols[None, :], b, h, shift, length_q, length_kv,
            scale, softcap, slope, BIAS, PRECISE,
        )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        seen = visible(rows[:, None], cols[None, :], b, h, shift, length_q, length_kv, left, right, MASK, True)
        p = tl.where(seen, p, 0.0)
        v = load_tile(V, V_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, True)
        dp = product(dout, v, PRECISION)
        if SEED is not None:
            there = survives(seed, dropout_p, b, h, heads, rows[:, None], cols[None, :])
            dp = tl.where(there, dp / (1.0 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None]) * kept
        acc = accumulate(acc, ds, k, PRECISION)

    end_q = begin_q + (length_q if PACKED else seqlen_q)
    store_tile(DQ, entry, h, begin_q + m0, end_q, acc * scale, DIM_QK, BLOCK_QK, BLOCK_M)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles_m", "tiles_n", "bias_heads"])
def dbias(
    Q, K, V, DOUT, LSE2, DELTA, DBIAS,
    MASK, BIAS, SLOPES, LENGTHS_Q, LENGTHS_KV, SEED,
    scale, softcap, dropout_p, left, right,
    batch, heads, group, seqlen_q, seqlen_kv, padded_q, stats_rows, tiles_m, tiles_n, bias_heads,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_QUERIES: tl.constexpr, OVER_KEYS: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dBias = dS, summed over the dims that the bias is broadcast over (OVER_...: its size there is 1).

    Its own pass, since only here one program can own one tile of the bias: the sum over the batch of a (1, H, Sq, Skv)
    bias would need atomics in the others.
    """
    program = tl.program_id(0)
    tile_m, rest = program % tiles_m, program // tiles_m
    tile_n, rest = rest % tiles_n, rest // tiles_n
    first_h, first_b = rest % bias_heads, rest // bias_heads
    stop_b = batch if OVER_BATCH else first_b + 1
    stop_h = heads if OVER_HEADS else first_h + 1
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    PRECISE: tl.constexpr = Q.data.dtype.element_ty == tl.float32
    seed = None if SEED is None else tl.load(SEED)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(first_b, stop_b):
        entry = 0 if PACKED else b  # packed sequences share one
        begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
        begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
        shift = length_kv - length_q if BOTTOM_RIGHT else 0
        at = stats_begin(begin_q, b, padded_q, PACKED)
        stop_m = length_q if OVER_QUERIES else tl.minimum(length_q, first_m + 1)
        for h in tl.range(first_h, stop_h):
            h_kv = h // group
            slope = None if SLOPES is None else tl.load(head_pointer(SLOPES, b, h))
            for m0 in tl.range(first_m, stop_m, BLOCK_M):
                rows = m0 + tl.arange(0, BLOCK_M)
                q = load_tile(Q, None, entry, h, begin_q + m0, begin_q + length_q, DIM_QK, BLOCK_QK, BLOCK_M, True)
                dout = load_tile(DOUT, None, entry, h, begin_q + m0, begin_q + length_q, DIM_V, BLOCK_V, BLOCK_M, True)
                stats = tl.cast(h, tl.int64) * stats_rows + at + rows
                lse, delta = tl.load(LSE2 + stats), tl.load(DELTA + stats)
                low, _full_low, _full_high, high = key_ranges(
                    m0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N
                )
                low, high = tl.maximum(low, first_n), high if OVER_KEYS else tl.minimum(high, first_n + 1)
                for n0 in tl.range(low, high, BLOCK_N):
                    cols = n0 + tl.arange(0, BLOCK_N)
                    end_kv = begin_kv + length_kv
                    k = load_tile(K, None, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, True)
                    v = load_tile(V, None, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, True)
                    s, _kept = scores_of(
                        product(q, k, PRECISION), rows[:, None], cols[None, :], b, h, shift, length_q,
                        length_kv, scale, softcap, slope, BIAS, PRECISE,
                    )  # fmt: skip
                    p = tl.exp2(s - lse[:, None])
                    seen = visible(
                        rows[:, None], cols[None, :], b, h, shift, length_q, length_kv, left, right, MASK, True
                    )  # fmt: skip
                    dp = product(dout, v, PRECISION)
                    if SEED is not None:
                        there = survives(seed, dropout_p, b, h, heads, rows[:, None], cols[None, :])
                        dp = tl.where(there, dp / (1.0 - dropout_p), 0.0)
                    total += tl.where(seen, p, 0.0) * (dp - delta[:, None])

    rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if OVER_QUERIES:
        total = tl.sum(total, 0, keep_dims=True)
        rows = tl.zeros([1], tl.int32)
    if OVER_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        cols = tl.zeros([1], tl.int32)
    pointers = head_pointer(DBIAS, first_b, first_h) + rows.to(tl.int64)[:, None] * DBIAS.row + cols[None, :]
    mask = (rows < seqlen_q)[:, None] & (cols < seqlen_kv)[None, :]
    tl.store(pointers, total.to(DBIAS.data.dtype.element_ty), mask=mask)
