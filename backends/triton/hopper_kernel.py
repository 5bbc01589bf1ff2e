"""The forward pass for Hopper, in Gluon: what forward.py computes, with the overlap that plain Triton cannot express.

Three teams of warps share a program (warp specialisation; Shah et al., FlashAttention-3, 2024):

    producer     one warp; starts the copies (TMA) of Q and of block after block of K and V into rings of shared memory
    consumers    two warp groups of 64 query rows each; in every step
                     S = Q K_i^T            is started, then
                     O = O + P V_(i-1)      is started behind it; both run in the matrix unit on their own
                     P, m, l from S         as soon as S is there: the exponentials run while the second product does
                     O = O exp(m_old - m)   as soon as O is there

They talk through barriers in shared memory, a "full" and an "empty" one for each slot of a ring. A barrier counts
phases; `wait(barrier, parity)` returns once the phase of that parity is over, and on a fresh barrier parity 1 counts
as over. So use number n of a slot waits for `full` with parity n % 2, and for `empty` with parity (n + 1) % 2: the
first fill waits for nobody.

Keys are visited from last to first: the ragged or causal end comes first, and most blocks need no mask. Gluon is
part of triton but still changes: `available()` is False where it does not import, and the portable kernel serves.
"""

# mypy: ignore-errors

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl

from attnrt.backends.triton.scores import LN2

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # triton 3.8 renamed the copies.
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    MISSING: str | None = None
except (ImportError, AttributeError) as error:
    MISSING = f"triton {triton.__version__} has no Gluon for Hopper as we know it: {error}"
    gluon = SimpleNamespace(jit=lambda *_, **__: lambda kernel: kernel)

ROWS = tl.constexpr(64)
"""Query rows of a consumer: what one wgmma instruction multiplies."""
BLOCK_M = tl.constexpr(128)
"""Query rows of the two consumers, so of a tile."""


# --- Where a tile stands: the three teams must agree on it ---------------------------------------------------------


@gluon.jit()
def place(index, order, FOLDED: gl.constexpr):
    """Tile number `index` in the order of scores.place: (first row, batch entry, head). FOLDED: a program's turns come
    in twos, the tile so far from the end and then the one so far from the start, which under a causal mask have equally
    many keys together, whichever they are."""
    tiles, pairs, section, heads = order
    levels = tiles
    if FOLDED:
        turn = index // gl.num_programs(0)
        index = index - (turn - turn // 2) * gl.num_programs(0)
        levels = tiles // 2
    first = index // (section * levels) * section
    width = gl.minimum(section, pairs - first)
    within = index - first * levels
    level = within // width
    tile = tiles - 1 - level  # under a causal mask the last are the longest, and go first
    if FOLDED:
        tile = tile - turn % 2 * (tile - level)
    pair = first + within % width
    return tile * BLOCK_M, pair // heads, pair % heads


@gluon.jit()
def tiles_of_program(order, lengths, FOLDED: gl.constexpr):
    """Every so many-th tile; where sequences have lengths of their own, too unlike to be dealt out beforehand, one."""
    first = gl.program_id(0)
    stop = order[0] * order[1]
    stride = gl.num_programs(0)
    if FOLDED:
        stop = first + 2 * ((stop // 2 - first + stride - 1) // stride) * stride
    if lengths[0] is not None:
        stop = first + 1
        stride = 1
    return first, stop, stride


@gluon.jit()
def span(LENGTHS, b, longest, PACKED: gl.constexpr):
    """(first row, length) of sequence b."""
    begin = 0
    length = longest
    if LENGTHS is not None:
        length = gl.load(LENGTHS + b)
        if PACKED:
            begin = length
            length = gl.load(LENGTHS + b + 1) - begin
    return begin, length


@gluon.jit()
def sequence(b, lengths, PACKED: gl.constexpr):
    """Of batch entry b: its first row among the queries and among the keys, and its band."""
    LENGTHS_Q, LENGTHS_KV, longest_q, longest_kv, left, right, shift = lengths
    begin_q, seqlen_q = span(LENGTHS_Q, b, longest_q, PACKED)
    begin_kv, seqlen_kv = span(LENGTHS_KV, b, longest_kv, PACKED)
    if LENGTHS_Q is not None:
        shift = shift * (seqlen_kv - seqlen_q)
    elif LENGTHS_KV is not None:
        shift = shift * (seqlen_kv - seqlen_q)
    return begin_q, begin_kv, (seqlen_q, seqlen_kv, left, right, shift)


@gluon.jit()
def key_blocks(m0, band, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """Key blocks of the tile at row m0, from last to first: (last, count, masked, whole).

    Step i takes block last - i, for i in 0 ... count. Steps from `masked` up to `whole` are seen whole by every row;
    the others need a mask. Step 0 always gets one, and always is: of a tile that sees no key it is hidden whole.
    """
    seqlen_q, seqlen_kv, left, right, shift = band
    last_row = gl.minimum(m0 + BLOCK_M, seqlen_q) - 1 + shift  # as a position among the keys
    high = gl.maximum(gl.minimum(seqlen_kv, last_row + right + 1), 1)
    full_high = gl.maximum(gl.minimum(seqlen_kv, m0 + shift + right + 1), 0)
    last = (high - 1) // BLOCK_N
    first = 0
    full_first = 0
    if LEFT:
        first = gl.minimum(gl.maximum(m0 + shift - left, 0) // BLOCK_N, last)
        full_first = (gl.maximum(last_row - left, 0) + BLOCK_N - 1) // BLOCK_N
    count = last - first + 1
    masked = gl.minimum(gl.maximum(last - full_high // BLOCK_N + 1, 1), count)
    whole = gl.minimum(gl.maximum(last - full_first + 1, masked), count)
    return last, count, masked, whole


# --- The producer ----------------------------------------------------------------------------------------------------


@gluon.jit()
def fetch_tile(
    n, turn, m0, b, h, begin_q, begin_kv, Q, K, V, shared, barriers, band, group,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Everything that one tile reads. Returns how many blocks of keys that were."""
    q, k, v = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    BLOCK_BYTES: gl.constexpr = BLOCK_N * D * 2  # a copy always counts its whole block, past the tensor's end too
    last, count, _, _ = key_blocks(m0, band, BLOCK_N, LEFT)
    for i in range(count):
        slot = (n + i) % STAGES
        parity = (n + i) // STAGES & 1
        row = begin_kv + (last - i) * BLOCK_N
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        mbarrier.expect(k_full.index(slot), BLOCK_BYTES)
        tma_load(K, [b, h // group, row, 0], k_full.index(slot), k.index(slot))
        if i == 0:  # behind the first keys, which need not wait until an earlier tile's output has left
            for c in gl.static_range(2):
                place_q = turn % QUERIES * 2 + c
                mbarrier.wait(q_empty.index(place_q), turn // QUERIES & 1 ^ 1)
                mbarrier.expect(q_full.index(place_q), ROWS * D * 2)
                tma_load(Q, [b, h, begin_q + m0 + c * ROWS, 0], q_full.index(place_q), q.index(place_q))
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        mbarrier.expect(v_full.index(slot), BLOCK_BYTES)
        tma_load(V, [b, h // group, row, 0], v_full.index(slot), v.index(slot))
    return count


@gluon.jit()
def producer(
    Q, K, V, shared, barriers, order, lengths, group,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, LEFT: gl.constexpr,
    PACKED: gl.constexpr, FOLDED: gl.constexpr,
):  # fmt: skip
    n = 0  # blocks so far, of all tiles
    turn = 0  # tiles so far
    first, stop, stride = tiles_of_program(order, lengths, FOLDED)
    for index in range(first, stop, stride):
        m0, b, h = place(index, order, FOLDED)
        begin_q, begin_kv, band = sequence(b, lengths, PACKED)
        entry = b
        if PACKED:
            entry = 0
        if lengths[0] is None:
            n += fetch_tile(
                n, turn, m0, entry, h, begin_q, begin_kv, Q, K, V, shared, barriers, band, group,
                D, BLOCK_N, STAGES, QUERIES, LEFT,
            )  # fmt: skip
            turn += 1
        elif m0 < band[0]:
            n += fetch_tile(
                n, turn, m0, entry, h, begin_q, begin_kv, Q, K, V, shared, barriers, band, group,
                D, BLOCK_N, STAGES, QUERIES, LEFT,
            )  # fmt: skip
            turn += 1


# --- The consumers ---------------------------------------------------------------------------------------------------


@gluon.jit()
def take_turn(barriers, n, WHO: gl.constexpr, PING_PONG: gl.constexpr):
    """Wait until the other consumer has started its products of this round (of the one before, for the first)."""
    if PING_PONG:
        mbarrier.wait(barriers[6].index(WHO), n & 1 ^ (1 - WHO))


@gluon.jit()
def pass_turn(barriers, WHO: gl.constexpr, PING_PONG: gl.constexpr):
    """While our softmax runs, the matrix units are the other consumer's."""
    if PING_PONG:
        mbarrier.arrive(barriers[6].index(1 - WHO), count=1)


@gluon.jit()
def softmax(
    s, m, l, scale, start, limit, floor,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr, SCORES: gl.constexpr, CARRY: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax. Rows see keys up to `limit`, and from `floor` on if LEFT."""
    if MASKED:
        cols = (start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)))[None, :]
        seen = cols <= limit[:, None]
        if LEFT:
            seen = seen & (cols >= floor[:, None])
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    safe = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = gl.exp2(s * scale - safe[:, None])
    rescale = gl.exp2(m - safe)
    return p.to(CARRY), m_new, l * rescale + gl.sum(p, 1), rescale


@gluon.jit()
def step(
    n, start, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
    WHO: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    LEFT: gl.constexpr, PING_PONG: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, CARRY: gl.constexpr,
):  # fmt: skip
    """Block number n, at key `start`, and the second product of block n - 1, whose weights are p."""
    _, _, k_full, k_empty, v_full, v_empty, _ = barriers
    slot = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_full.index(slot), n // STAGES & 1)
    take_turn(barriers, n, WHO, PING_PONG)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    keys = k.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
    products = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
    p = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)
    output = warpgroup_mma(p, v.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
    pass_turn(barriers, WHO, PING_PONG)
    s = warpgroup_mma_wait(1, deps=[products])  # all but the youngest: the keys have been read, the values not yet
    mbarrier.arrive(k_empty.index(slot), count=1)
    weights, m, l, rescale = softmax(s, m, l, scale, start, limit, floor, BLOCK_N, MASKED, LEFT, SCORES, CARRY)
    acc = warpgroup_mma_wait(0, deps=[output])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT), assert_trivial=True)[:, None]
    return weights, acc, m, l


@gluon.jit()
def clear_foreign(v_slot, length, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Zero the rows from `length` on: another sequence's values, or padding, may be NaN, which no weight of 0 hides.

    Both consumers do it, each before its own product; they write the same bytes.
    """
    values = v_slot.reshape([BLOCK_N, D])
    PIECE: gl.constexpr = 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for c in gl.static_range(BLOCK_N // PIECE):
        piece = values.slice(c * PIECE, PIECE)
        rows = c * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, layout))
        kept = gl.where((rows < length)[:, None], piece.load(layout), 0.0)
        piece.store(kept.to(v_slot.dtype))
    fence_async_shared()  # the matrix units read past the caches that plain stores go through


@gluon.jit()
def store_rows(OUT, strides, value, b, h, first, begin, end, D: gl.constexpr, LAYOUT: gl.constexpr):
    """(ROWS, D) `value` to rows first .. of a sequence that starts at row `begin`, up to row `end`."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    at = gl.cast(b, gl.int64) * strides[0] + gl.cast(h, gl.int64) * strides[1]
    at = at + (begin + rows).to(gl.int64) * strides[2]
    pointers = OUT + at[:, None] + dims[None, :]
    gl.store(pointers, value.to(OUT.dtype.element_ty), mask=(rows < end)[:, None])


@gluon.jit()
def leave(O, tile, value, b, h, row, D: gl.constexpr):
    """The output leaves through the queries' memory, which has been read for the last time."""
    tile.reshape([ROWS, D]).store(value.to(tile.dtype))
    fence_async_shared()  # TMA reads past the caches that plain stores go through
    tma_store(O, [b, h, row, 0], tile)
    tma.store_wait(0)


@gluon.jit()
def attend_tile(
    n, turn, m0, sequence_of, h, begin_q, O, OUT, LSE, strides, lse_head, heads, scale, shared, barriers, lengths, band,
    WHO: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    LEFT: gl.constexpr, PACKED: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """One tile's half of rows. Returns how many blocks of keys it took."""
    b = sequence_of
    if PACKED:
        b = 0
    seqlen_q, seqlen_kv, left, right, shift = band
    # Accumulators of wgmma: a warp holds 16 rows, four threads share a row, and a thread has its part of two rows. The
    # row is in the same place whatever the width, so row values move from SCORES to OUTPUT, and weights from SCORES
    # to the first operand of the second product, without leaving the thread's registers (assert_trivial).
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, k_width=2)
    q_ring, k, v = shared
    # Weights wait for the next step in 16 bits where registers are short; to pack and unpack them takes time.
    CARRY: gl.constexpr = gl.float32 if D == 64 else q_ring.dtype
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    place_q = turn % QUERIES * 2 + WHO
    q_tile = q_ring.index(place_q)
    q = q_tile.reshape([ROWS, D])
    first_row = m0 + WHO * ROWS
    last, count, masked, whole = key_blocks(m0, band, BLOCK_N, LEFT)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    limit = gl.minimum(seqlen_kv - 1, rows + (shift + right))
    floor = rows + (shift - left)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)

    mbarrier.wait(q_full.index(place_q), turn // QUERIES & 1)
    slot = n % STAGES
    mbarrier.wait(k_full.index(slot), n // STAGES & 1)
    take_turn(barriers, n, WHO, PING_PONG)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    keys = k.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
    products = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    pass_turn(barriers, WHO, PING_PONG)
    if lengths[1] is not None:
        if last * BLOCK_N + BLOCK_N > seqlen_kv:
            mbarrier.wait(v_full.index(slot), n // STAGES & 1)
            clear_foreign(v.index(slot), seqlen_kv - last * BLOCK_N, D, BLOCK_N)
    s = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, m, l, _ = softmax(s, m, l, scale, last * BLOCK_N, limit, floor, BLOCK_N, True, LEFT, SCORES, CARRY)
    for i in range(1, masked):
        p, acc, m, l = step(
            n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
            WHO, D, BLOCK_N, STAGES, True, LEFT, PING_PONG, SCORES, OUTPUT, WEIGHTS, CARRY,
        )  # fmt: skip
    for i in range(masked, whole):
        p, acc, m, l = step(
            n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
            WHO, D, BLOCK_N, STAGES, False, LEFT, PING_PONG, SCORES, OUTPUT, WEIGHTS, CARRY,
        )  # fmt: skip
    if LEFT:
        for i in range(whole, count):
            p, acc, m, l = step(
                n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
                WHO, D, BLOCK_N, STAGES, True, LEFT, PING_PONG, SCORES, OUTPUT, WEIGHTS, CARRY,
            )  # fmt: skip
    slot = (n + count - 1) % STAGES
    mbarrier.wait(v_full.index(slot), (n + count - 1) // STAGES & 1)
    p = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)
    acc = warpgroup_mma(p, v.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot), count=1)

    if lengths[0] is not None:  # read again rather than held in registers all the while
        begin_q, seqlen_q = span(lengths[0], sequence_of, lengths[2], PACKED)
    if LSE is not None:
        value = (m + gl.log2(l)) * LN2  # of a row that sees no key: log2(0), so -inf
        end = seqlen_q
        if not PACKED:
            end = lengths[2]
            lse_head = lengths[2]
            value = gl.where(rows < seqlen_q, value, float("-inf"))
        at = LSE + gl.cast(b * heads + h, gl.int64) * lse_head + begin_q
        gl.store(at + rows, value, mask=rows < end)
    total = gl.where(l > 0.0, l, 1.0)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUTPUT), assert_trivial=True)[:, None]
    if PACKED:
        if first_row + ROWS <= seqlen_q:
            leave(O, q_tile, acc, b, h, begin_q + first_row, D)
        else:  # TMA would write into the next sequence
            store_rows(OUT, strides, acc, b, h, first_row, begin_q, seqlen_q, D, OUTPUT)
    else:
        if lengths[0] is not None:  # rows of padding are zeros, whatever their queries
            own = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT)) < seqlen_q
            acc = gl.where(own[:, None], acc, 0.0)
        leave(O, q_tile, acc, b, h, first_row, D)
    mbarrier.arrive(q_empty.index(place_q), count=1)
    return count


@gluon.jit()
def consumer(
    writes, shared, barriers, order, lengths,
    WHO: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    LEFT: gl.constexpr, PACKED: gl.constexpr, PING_PONG: gl.constexpr, FOLDED: gl.constexpr,
):  # fmt: skip
    O, OUT, LSE, strides, lse_head, scale = writes
    heads = order[3]
    n = 0  # as in the producer
    turn = 0
    first, stop, stride = tiles_of_program(order, lengths, FOLDED)
    for index in range(first, stop, stride):
        m0, b, h = place(index, order, FOLDED)
        begin_q, _, band = sequence(b, lengths, PACKED)
        if lengths[0] is None:
            n += attend_tile(
                n, turn, m0, b, h, begin_q, O, OUT, LSE, strides, lse_head, heads, scale, shared,
                barriers, lengths, band, WHO, D, BLOCK_N, STAGES, QUERIES, LEFT, PACKED, PING_PONG,
            )  # fmt: skip
            turn += 1
        elif m0 < band[0]:
            n += attend_tile(
                n, turn, m0, b, h, begin_q, O, OUT, LSE, strides, lse_head, heads, scale, shared,
                barriers, lengths, band, WHO, D, BLOCK_N, STAGES, QUERIES, LEFT, PACKED, PING_PONG,
            )  # fmt: skip
            turn += 1
        elif not PACKED:
            blank_tile(OUT, LSE, strides, lengths[2], heads, b, h, m0 + WHO * ROWS, D)


@gluon.jit()
def blank_tile(OUT, LSE, strides, lse_head, heads, b, h, first, D: gl.constexpr):
    """Rows that are padding: zeros, and an LSE of -inf."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    store_rows(OUT, strides, gl.zeros([ROWS, D], gl.float32, LAYOUT), b, h, first, 0, lse_head, D, LAYOUT)
    if LSE is not None:
        rows = first + gl.arange(0, ROWS, ROW)
        at = LSE + gl.cast(b * heads + h, gl.int64) * lse_head
        gl.store(at + rows, gl.full([ROWS], float("-inf"), gl.float32, ROW), mask=rows < lse_head)


# --- The kernel ------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "left", "right", "shift", "heads", "group", "seqlen_q", "seqlen_kv", "out_batch", "out_head", "out_row",
        "lse_head", "tiles", "pairs", "section",
    ]
)  # fmt: skip
def forward(
    Q, K, V, O, OUT, LSE, LENGTHS_Q, LENGTHS_KV, scale, left, right, shift, heads, group, seqlen_q, seqlen_kv,
    out_batch, out_head, out_row, lse_head, tiles, pairs, section,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, LEFT: gl.constexpr,
    PACKED: gl.constexpr, PING_PONG: gl.constexpr, FOLDED: gl.constexpr,
):  # fmt: skip
    """Q, K, V, O: descriptors of (B, H, S, D), and O's pointer OUT with its strides. LSE: float32, `lse_head` rows a
    head, or None. LENGTHS: (B,) or, PACKED, offsets (B + 1,), or None. scale: with log2 e in it. shift: of query 0
    against key 0, or, with LENGTHS, 1 for bottom-right alignment. FOLDED: see `place`; wants even `tiles`."""
    shared = (
        gl.allocate_shared_memory(Q.dtype, [2 * QUERIES, 1, 1, ROWS, D], Q.layout),
        gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BLOCK_N, D], K.layout),
        gl.allocate_shared_memory(V.dtype, [STAGES, 1, 1, BLOCK_N, D], V.layout),
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2 * QUERIES, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * QUERIES, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    # A phase of `full` ends with the producer's one arrival (expect) and the bytes it announced; one of `empty` with an
    # arrival of every reader: both consumers for keys and values, its own for a half of the queries.
    for c in gl.static_range(2 * QUERIES):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for c in gl.static_range(STAGES):
        mbarrier.init(k_full.index(c), count=1)
        mbarrier.init(k_empty.index(c), count=2)
        mbarrier.init(v_full.index(c), count=1)
        mbarrier.init(v_empty.index(c), count=2)
    for c in gl.static_range(2):
        mbarrier.init(turns.index(c), count=1)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    order = (tiles, pairs, section, heads)
    lengths = (LENGTHS_Q, LENGTHS_KV, seqlen_q, seqlen_kv, left, right, shift)
    strides = (out_batch, out_head, out_row)
    writes = (O, OUT, LSE, strides, lse_head, scale)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    # Registers: 65,536 in all. The producer needs few and gives the rest of its share to the consumers.
    gl.warp_specialize(
        [
            (consumer, (
                writes, shared, barriers, order, lengths, zero, D, BLOCK_N, STAGES, QUERIES, LEFT, PACKED, PING_PONG,
                FOLDED,
            )),
            (consumer, (
                writes, shared, barriers, order, lengths, one, D, BLOCK_N, STAGES, QUERIES, LEFT, PACKED, PING_PONG,
                FOLDED,
            )),
            (producer, (
                Q, K, V, shared, barriers, order, lengths, group, D, BLOCK_N, STAGES, QUERIES, LEFT, PACKED, FOLDED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
