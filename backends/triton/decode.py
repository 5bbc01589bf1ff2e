"""Decoding: a few queries, such as one new token, over a long cache of keys (flash-decoding, Dao et al., 2023).

Such a call computes next to nothing: its time is that of reading K and V once. So

1. keys are split: a batch of 1 has too few (batch, head) pairs to keep every multiprocessor loading, so that several
   programs share one, each with its own range of keys. Each leaves its own softmax: an output and an LSE.
2. the parts are merged by their LSEs. A part weighs exp(LSE of the part - LSE of the whole):

       O = sum_s O_s exp(LSE_s - LSE),   LSE = log sum_s exp(LSE_s)

3. query heads that share a KV head are the rows of one tile, so that K and V are read once for all of them. Row r of a
   tile is query r // group of head r % group.

Shapes: M rows, N keys of a tile, D head dim, S splits.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnrt.backends.triton.scores import (
    LN2,
    LOG2E,
    Matrix,
    accumulate,
    inside,
    key_ranges,
    load_tile,
    rounded,
    scores_of,
    span,
    visible,
)
from attnrt.backends.triton.tiles import Tile, arch_class, block_dim, values_block
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.triton.adapter import Plan

MIN_KEYS = 256
"""Of a split: reading fewer takes less time than starting a program and merging its part."""
MAX_SPLITS = 256
"""Parts that a program of the merge holds at once."""
SHARED_BYTES = {"sm80": 163 << 10, "sm86": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10}
"""Of a multiprocessor, for the blocks of K and V in flight. It needs about 40 KiB in flight to draw its share of 4.8
TB/s at a latency of 1 us, and has twice that with the shipped tiles."""
MERGE_ELEMENTS = 8192
"""Of the parts in the registers of one merging program: 64 for each of its 128 threads."""


@triton.jit
def row_pointers(x, b, heads, queries, dims):
    """Pointers to (query, head) rows: each row has its own head."""
    start = tl.cast(b, tl.int64) * x.batch + heads.to(tl.int64) * x.head + queries.to(tl.int64) * x.row
    return x.data + start[:, None] + dims[None, :]


@triton.jit
def store_lse(LSE, b, heads, queries, mask, lse2):
    """log2 units to natural ones; -inf stays."""
    pointers = row_pointers(LSE, b, heads, queries, tl.arange(0, 1))
    tl.store(pointers, (lse2 * LN2)[:, None], mask=mask[:, None])


@triton.jit(do_not_specialize=["left", "right", "heads_kv", "group", "seqlen_q", "seqlen_kv", "splits", "tiles"])
def attend_split(
    # scores.Matrix; the descriptors are None where the GPU does not fetch by them. LSE may be None
    Q, K, V, OUT, LSE, K_DESCRIPTOR, V_DESCRIPTOR,
    # (B, Hkv, S, rows, Dv) and (B, Hkv, S, rows), float32: None where one split is all, and its output the answer
    PART, PART_LSE,
    # None where the call does without: (B, Hq) Matrix, (Hq,), (B + 1) or (B,) twice
    SLOPES, SINKS, LENGTHS_Q, LENGTHS_KV,
    scale, softcap, left, right,
    heads_kv, group, seqlen_q, seqlen_kv, splits, tiles,
    DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one (batch, KV head) pair: the loop of the forward kernel over its own range."""
    # Programs that run side by side read neighbouring heads, which most caches keep side by side.
    program = tl.program_id(0)
    tile = program % tiles
    h_kv = program // tiles % heads_kv
    split = program // tiles // heads_kv % splits
    b = program // tiles // heads_kv // splits
    entry = 0 if PACKED else b
    # Lengths are read here and not on the host, which would have to wait for the GPU to know them.
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
    begin_kv, length_kv = span(LENGTHS_KV, b, seqlen_kv, PACKED)
    end_kv = begin_kv + length_kv
    shift = length_kv - length_q if BOTTOM_RIGHT else 0
    FOREIGN: tl.constexpr = PACKED or LENGTHS_KV is not None
    PRECISE: tl.constexpr = Q.data.dtype.element_ty == tl.float32
    LINEAR: tl.constexpr = POSITIVE_SCALE and softcap is None and SLOPES is None
    factor = scale * LOG2E if LINEAR else 1.0

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = row // group
    heads = h_kv * group + row % group
    dims = tl.arange(0, BLOCK_QK)
    pointers = row_pointers(Q, entry, heads, begin_q + queries, dims)
    q = tl.load(pointers, mask=inside(queries, length_q, DIM_QK, BLOCK_QK, True), other=0.0)
    slope = None
    if SLOPES is not None:
        pointers = SLOPES.data + tl.cast(b, tl.int64) * SLOPES.batch + heads.to(tl.int64) * SLOPES.head
        slope = tl.load(pointers, mask=queries < length_q, other=0.0)[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # The keys that any row sees, in whole blocks, dealt out evenly: splits differ by one block.
    m0 = tile * BLOCK_M // group
    low, full_low, full_high, high = key_ranges(m0, length_q, length_kv, shift, left, right, BLOCK_M, BLOCK_N)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    begin = low + blocks * split // splits * BLOCK_N
    end = tl.minimum(low + blocks * (split + 1) // splits * BLOCK_N, high)
    for part in tl.static_range(0 if left is not None else 1, 3):  # as in the forward kernel: part 1 needs no mask
        if part == 0:
            first, stop = begin, tl.minimum(full_low, end)
        elif part == 1:
            first, stop = tl.maximum(begin, full_low), tl.minimum(full_high, end)
        else:
            first, stop = tl.maximum(begin, full_high), end
        for n0 in tl.range(first, stop, BLOCK_N, num_stages=STAGES if part == 1 else 1):
            cols = n0 + tl.arange(0, BLOCK_N)
            k = load_tile(
                K, K_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_QK, BLOCK_QK, BLOCK_N, part != 1
            )  # fmt: skip
            s = tl.dot(rounded(q, PRECISION), rounded(k, PRECISION).T, input_precision=PRECISION)
            if not LINEAR:
                s, _ = scores_of(
                    s, queries[:, None], cols[None, :], b, h_kv, shift, length_q, length_kv, scale, softcap, slope,
                    None, PRECISE,
                )  # fmt: skip
            if part != 1:
                seen = visible(
                    queries[:, None], cols[None, :], b, h_kv, shift, length_q, length_kv, left, right, None, True
                )  # fmt: skip
                s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * factor)
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * factor - safe[:, None])
            rescale = tl.exp2(m - safe)
            l = l * rescale + tl.sum(p, 1)
            v = load_tile(
                V, V_DESCRIPTOR, entry, h_kv, begin_kv + n0, end_kv, DIM_V, BLOCK_V, BLOCK_N, part != 1, FOREIGN
            )  # fmt: skip
            acc = accumulate(acc * rescale[:, None], p, v, PRECISION)
            m = m_new

    live = (l > 0.0) & (queries < length_q)
    total = tl.where(live, l, 1.0)
    lse2 = tl.where(live, m + tl.log2(total), float("-inf"))
    if SINKS is not None and PART is None:
        sink = tl.load(SINKS + heads, mask=queries < length_q, other=0.0).to(tl.float32) * LOG2E
        total += tl.exp2(sink - tl.where(live, m, 0.0))
    out = tl.where(live[:, None], acc / total[:, None], 0.0)
    if PART is not None:
        rows = seqlen_q * group
        at = (tl.cast(b * heads_kv + h_kv, tl.int64) * splits + split) * rows + row
        tl.store(PART_LSE + at, lse2, mask=row < rows)
        # Of a part that saw no key the merge reads the LSE only.
        pointers = PART + at[:, None] * DIM_V + tl.arange(0, BLOCK_V)[None, :]
        tl.store(pointers, out, mask=live[:, None] & (tl.arange(0, BLOCK_V) < DIM_V)[None, :])
    else:
        end_q = length_q if PACKED else seqlen_q  # rows past a padded sequence's end are zeros
        pointers = row_pointers(OUT, entry, heads, begin_q + queries, tl.arange(0, BLOCK_V))
        tl.store(
            pointers, out.to(OUT.data.dtype.element_ty), mask=inside(queries, end_q, DIM_V, BLOCK_V, True)
        )  # fmt: skip
        if LSE is not None:
            store_lse(LSE, entry, heads, begin_q + queries, queries < end_q, lse2)


@triton.jit(do_not_specialize=["heads_kv", "group", "seqlen_q", "splits"])
def merge(
    PART, PART_LSE, OUT, LSE, SINKS, LENGTHS_Q, heads_kv, group, seqlen_q, splits,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, CHUNKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row, BLOCK_V of its dims: all parts at once, since one after the other each would wait for memory."""
    rows = seqlen_q * group
    program = tl.program_id(0)
    chunk = program % CHUNKS
    row = program // CHUNKS % rows
    pair = program // CHUNKS // rows
    b = pair // heads_kv
    query = row // group + tl.zeros([1], tl.int32)
    head = pair % heads_kv * group + row % group + tl.zeros([1], tl.int32)
    begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)

    part = tl.arange(0, BLOCK_S)
    at = (tl.cast(pair, tl.int64) * splits + part) * rows + row
    lse2 = tl.load(PART_LSE + at, mask=part < splits, other=float("-inf"))
    top = tl.max(lse2, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)  # a dead row: exp2(-inf - 0) = 0, and no -inf - -inf
    weights = tl.exp2(lse2 - safe)
    total = tl.sum(weights, 0)
    live = total > 0.0
    dims = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers = PART + at[:, None] * DIM_V + dims[None, :]
    parts = tl.load(pointers, mask=(weights > 0.0)[:, None] & (dims < DIM_V)[None, :], other=0.0)
    out = tl.sum(parts * weights[:, None], 0)
    lse2 = tl.where(live, safe + tl.log2(tl.where(live, total, 1.0)), float("-inf"))
    if SINKS is not None:
        total += tl.exp2(tl.load(SINKS + head).to(tl.float32) * LOG2E - safe)
    else:
        total += tl.zeros([1], tl.float32)
    out = tl.where(live, out[None, :] / tl.where(live, total, 1.0)[:, None], 0.0)

    entry = 0 if PACKED else b
    here = query < (length_q if PACKED else seqlen_q)
    pointers = row_pointers(OUT, entry, head, begin_q + query, dims)
    tl.store(pointers, out.to(OUT.data.dtype.element_ty), mask=here[:, None] & (dims < DIM_V)[None, :])
    if LSE is not None:
        store_lse(LSE, entry, head, begin_q + query, here & (chunk == 0), lse2 + tl.zeros([1], tl.float32))


def resident(request: AttentionRequest, tile: Tile, sm: int | None) -> int:
    """Programs that a multiprocessor runs at once: what their shared memory leaves room for."""
    r = request
    block = tile.block_n * (block_dim(r.head_dim_qk) + values_block(r)) * r.itemsize
    return max(1, min(4, SHARED_BYTES[arch_class(sm)] // (tile.stages * block)))


def split_count(request: AttentionRequest, tile: Tile, sm_count: int, sm: int | None = 90) -> int:
    """The fewest splits that keep the multiprocessors busy to within 10 % of what any number of splits would.

    Programs start in waves of `resident` for each multiprocessor; the last wave is rarely full, and the call takes as
    long as the waves it starts.
    """
    r = request
    keys = r.seqlen_kv
    if r.left is not None and r.alignment == "bottom_right":  # a window at the end of the cache
        keys = min(keys, r.left + r.seqlen_q)
    programs = r.batch * r.heads_kv * -(-r.seqlen_q * r.group // tile.block_m)
    slots = resident(r, tile, sm) * sm_count
    most = min(MAX_SPLITS, max(1, keys // max(MIN_KEYS, tile.block_n)))
    busy = [programs * s / (slots * -(-programs * s // slots)) for s in range(1, most + 1)]
    return next(s for s, part in enumerate(busy, 1) if part >= 0.9 * max(busy))


def slopes_of(x: Tensor | None) -> Matrix | None:
    """ALiBi slopes, (Hq,) or (B, Hq), as the kernels take them."""
    return None if x is None else Matrix(x, x.stride(0) if x.ndim == 2 else 0, x.stride(-1), 0)


def outputs(r: AttentionRequest, splits: int, q: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Output, LSE if asked for, and what the splits leave for the merge: their outputs and LSEs."""
    # A packed batch may hold tokens of no sequence, which no program visits.
    out = (torch.zeros if r.packed else torch.empty)((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = part = part_lse = None
    if r.needs_lse and r.packed:
        lse = q.new_full((r.heads_q, q.shape[0]), -torch.inf, dtype=torch.float32)
    elif r.needs_lse:
        lse = torch.empty((r.batch, r.heads_q, r.seqlen_q), dtype=torch.float32, device=q.device)
    if splits > 1:
        rows = r.batch * r.heads_q * r.seqlen_q * splits
        part = torch.empty(rows * r.head_dim_v, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    return out, lse, part, part_lse


def decode_pass(plan: Plan, tile: Tile, splits: int, launch: Any, tensors: Sequence[Any]) -> None:
    """`launch` starts a kernel: (kernel, grid, *args, **options). tensors: q, k, v, `outputs`, the call's others."""
    r, c = plan.request, plan.constants
    q, k, v, out, lse, part, part_lse, *given = tensors
    _, _, slopes, sinks, *lengths = given
    slopes = slopes_of(slopes)
    rows, pairs = r.seqlen_q * r.group, r.batch * r.heads_kv
    block_m = min(tile.block_m, max(16, 1 << (rows - 1).bit_length()))  # 16: the least of a matrix product
    tiles = -(-rows // block_m)
    out_, lse_ = plan.matrix(out), None if lse is None else plan.row_values(lse)
    launch(
        attend_split,
        (tiles * pairs * splits,),
        *(*(plan.matrix(x) for x in (q, k, v)), out_, lse_),
        *(None, None),
        *(part, part_lse, slopes, sinks, *lengths, r.scale, r.softcap, r.left, r.right),
        *(r.heads_kv, r.group, r.seqlen_q, r.seqlen_kv, splits, tiles),
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.stages,
        POSITIVE_SCALE=r.scale > 0,
        num_warps=tile.warps,
        **c,
    )
    if part is not None:
        block_s = 1 << (splits - 1).bit_length()
        block_v = min(c["BLOCK_V"], max(16, MERGE_ELEMENTS // block_s))
        chunks = -(-r.head_dim_v // block_v)
        launch(
            merge,
            (chunks * rows * pairs,),
            *(part, part_lse, out_, lse_, sinks, lengths[0], r.heads_kv, r.group, r.seqlen_q, splits),
            DIM_V=r.head_dim_v,
            BLOCK_V=block_v,
            BLOCK_S=block_s,
            CHUNKS=chunks,
            PACKED=r.packed,
            num_warps=4,
        )
