"""What every pass shares: where a tile stands, how its rows are loaded, and how raw products become scores.

Shapes: M query rows and N keys of a tile, D head dim. Scores are kept in units of log2 (natural scores times log2 e),
since exp2 is the instruction that the hardware has. Tensors come as `Matrix` or `Plane`: a pointer with its strides.
Optional arguments are None where the call does without: Triton then compiles the feature away.
"""

# Kernels are Triton's language in Python's clothes: its types are not Python's.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PART = tl.constexpr(16)


class Matrix(NamedTuple):
    """A (B, H, S, D) tensor in any layout: its last dim is contiguous, the other strides are in elements.

    A packed (T, H, D) tensor is one batch entry; the sequence's first token is added to the row.
    """

    data: Any
    batch: Any
    head: Any
    row: Any


class Plane(NamedTuple):
    """A mask or bias that broadcasts to (B, Hq, Sq, Skv): stride 0 where it does, never expanded."""

    data: Any
    batch: Any
    head: Any
    row: Any
    col: Any


# --- Where a tile stands -----------------------------------------------------------------------------------------


@triton.jit
def place(tiles, heads, section, LONGEST_FIRST: tl.constexpr):
    """Which tile of which (batch, head) pair this program computes: (tile, pair).

    The order of programs is a matter of speed only. Programs that run at the same time should read the same keys, so
    that those come from L2: pairs are taken in sections whose keys fit there, and inside a section one tile of every
    pair after the other. A causal mask makes the last tiles of queries the longest; those go first, so that short
    ones fill the gaps at the end.
    """
    program = tl.program_id(0)
    first = program // (section * tiles) * section
    width = tl.minimum(section, heads - first)
    within = program - first * tiles
    tile = within // width
    if LONGEST_FIRST:
        tile = tiles - 1 - tile
    return tile, first + within % width


@triton.jit
def span(lengths, b, size, PACKED: tl.constexpr):
    """The first row of sequence b in memory, and how many real rows it has.

    `lengths` holds the offsets of packed sequences (B + 1), or the lengths of padded ones (B), or is None.
    """
    begin = 0
    length = size
    if PACKED:
        begin = tl.load(lengths + b)
        length = tl.load(lengths + b + 1) - begin
    elif lengths is not None:
        length = tl.minimum(tl.load(lengths + b), size)
    return begin, length


@triton.jit
def key_ranges(m0, length_q, length_kv, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What of the keys the queries m0 ... m0 + BLOCK_M see: (low, full_low, full_high, high).

    Blocks outside low ... high are never loaded. Blocks inside full_low ... full_high are seen whole by every row, so
    they need no mask.
    """
    low = 0
    full_low = 0
    high = length_kv
    full_high = length_kv
    last = tl.minimum(m0 + BLOCK_M, length_q) - 1 + shift  # where the last query stands
    if right is not None:
        high = tl.minimum(high, last + right + 1)
        full_high = tl.minimum(full_high, m0 + shift + right + 1)
    if left is not None:
        low = tl.maximum(m0 + shift - left, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    high = tl.where(m0 < length_q, high, 0)
    full_high = tl.maximum(tl.minimum(full_high, high), 0) // BLOCK_N * BLOCK_N
    full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high


@triton.jit
def query_range(n0, length_q, length_kv, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which queries see any of the keys n0 ... n0 + BLOCK_N: (low, high)."""
    low = 0
    high = length_q
    if right is not None:
        low = tl.maximum(n0 - right - shift, 0) // BLOCK_M * BLOCK_M
    if left is not None:
        high = tl.minimum(high, tl.minimum(n0 + BLOCK_N, length_kv) + left - shift)
    return low, tl.where(n0 < length_kv, high, 0)


# --- Loads and stores --------------------------------------------------------------------------------------------


@triton.jit
def head_pointer(x, b, h):
    return x.data + tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head


@triton.jit
def tile_pointers(x, b, h, rows, BLOCK_D: tl.constexpr):
    """(len(rows), BLOCK_D) pointers. Rows times their stride pass 2^31, so that product has 64 bits."""
    return (head_pointer(x, b, h) + rows.to(tl.int64) * x.row)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def inside(rows, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """True where a tile holds real elements: rows before `end`, and dims before DIM where that is no power of two."""
    mask = (rows < end)[:, None]
    if BLOCK_D != DIM:
        dims = (tl.arange(0, BLOCK_D) < DIM)[None, :]
        mask = mask & dims if CHECK_ROWS else dims
    return mask


@triton.jit
def load_tile(
    x, descriptor, b, h, row, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr,
    FOREIGN: tl.constexpr = False,
):  # fmt: skip
    """(BLOCK, BLOCK_D) of rows row, row + 1, ..., zeros from row `end` on: whatever lies there, NaN included.

    A descriptor lets the hardware fetch the tile (TMA). It gives zeros past the tensor's own end; rows that do exist
    but belong to padding or to the next sequence (FOREIGN) are cleared here. CHECK=False promises row + BLOCK <= end.
    """
    rows = row + tl.arange(0, BLOCK)
    if descriptor is not None:
        tile = descriptor.load([b, h, row, 0]).reshape(BLOCK, BLOCK_D)
        if CHECK and FOREIGN:
            tile = tl.where((rows < end)[:, None], tile, 0.0)
    else:
        pointers = tile_pointers(x, b, h, rows, BLOCK_D)
        if CHECK or BLOCK_D != DIM:
            tile = tl.load(pointers, mask=inside(rows, end, DIM, BLOCK_D, CHECK), other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(x, b, h, row, end, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    rows = row + tl.arange(0, BLOCK)
    mask = inside(rows, end, DIM, BLOCK_D, True)
    tl.store(tile_pointers(x, b, h, rows, BLOCK_D), tile.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def load_plane(x, b, h, rows, cols, length_q, length_kv):
    """The part of a mask or bias under a tile; zeros outside the sequence. rows and cols broadcast to the tile, either
    way round."""
    pointers = head_pointer(x, b, h) + rows.to(tl.int64) * x.row + cols.to(tl.int64) * x.col
    return tl.load(pointers, mask=(rows < length_q) & (cols < length_kv), other=0)


# --- Products, and scores from them ------------------------------------------------------------------------------


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """A float32 rounded to TF32, half away from zero as PyTorch's library does; anything else as it is.

    The matrix units would cut the last 13 bits off instead. That errs to one side, so that in sums it does not average
    out: gradients were off by 3 to 8 times as much (simulated).
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN of all ones would become a zero
    return x


@triton.jit
def accumulate(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b of (M, K) and (K, N); a in the dtype of b."""
    return tl.dot(rounded(a.to(b.dtype), PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b^T of (M, D) and (N, D).

    Exact float32 products run outside the matrix units, one after the other: in parts of 16 dims they round less, as
    the sums of PyTorch's math do, and threads that share out the parts hold less of a and b in registers. The parts are
    added two by two, so that the order, and with it every bit of the result, is the same in any tile: the passes of the
    backward take differences of such products.
    """
    DIM: tl.constexpr = a.shape[1]
    if a.dtype == tl.float32 and PRECISION == "ieee" and DIM > PART:
        x = a.reshape(a.shape[0], DIM // PART, PART).permute(1, 0, 2)
        y = b.reshape(b.shape[0], DIM // PART, PART).permute(1, 2, 0)
        found = tl.dot(x, y, input_precision=PRECISION)
        for _ in tl.static_range(4):
            if found.shape[0] > 1:
                found = tl.sum(found.reshape(2, found.shape[0] // 2, found.shape[1], found.shape[2]), 0)
        found = found.reshape(a.shape[0], b.shape[0])
    else:
        found = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION).T, input_precision=PRECISION)
    return found


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh x and its slope 1 - tanh^2 x, by t = e^-2x: (1 - t) / (1 + t) and 4 t / (1 + t)^2.

    From tanh x itself the slope would cancel to nothing where tanh x is near 1.
    """
    t = tl.exp2(tl.minimum(x * (-2.0 * LOG2E), 80.0))  # bounded, so that no inf meets a 0
    r = 1.0 / (1.0 + t)
    y = (1.0 - t) * r
    if PRECISE:  # 1 - t cancels near 0, which float32 inputs can see: there a polynomial (minimax up to 0.55, 2^-23)
        z = x * x
        series = ((-0.00627424 * z + 0.02107168) * z - 0.05385231) * z + 0.13332586
        series = (series * z - 0.33333316) * z
        y = tl.where(tl.abs(x) < 0.55, x + x * series, y)
    return y, 4.0 * (t * r) * r


@triton.jit
def scores_of(
    products, rows, cols, b, h, shift, length_q, length_kv, scale, softcap, slope, BIAS, PRECISE: tl.constexpr
):  # fmt: skip
    """Scores in log2 units of raw products q k^T, and the slope d(score)/d(product) that the softcap leaves of `scale`.

    rows and cols are the positions in the sequence, shaped to broadcast to the tile.
    """
    if softcap is not None:
        capped, kept = tanh(products * (scale / softcap), PRECISE)
        scores = capped * (softcap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
        kept = 1.0
    if slope is not None:  # ALiBi
        scores -= (slope * LOG2E) * tl.abs(rows + shift - cols).to(tl.float32)
    if BIAS is not None:
        scores += load_plane(BIAS, b, h, rows, cols, length_q, length_kv).to(tl.float32) * LOG2E
    return scores, kept


@triton.jit
def visible(
    rows, cols, b, h, shift, length_q, length_kv, left, right, MASK, EDGE: tl.constexpr, END: tl.constexpr = True
):  # fmt: skip
    """True where a query sees a key. EDGE=False promises that band and length hide nothing in this tile, END=False that
    it does not matter what keys past the end come to."""
    seen = (cols < length_kv) | (rows < 0) if END else rows * 0 + cols * 0 == 0
    if EDGE:
        if left is not None:
            seen = seen & (cols >= rows + shift - left)
        if right is not None:
            seen = seen & (cols <= rows + shift + right)
    if MASK is not None:
        chosen = load_plane(MASK, b, h, rows, cols, length_q, length_kv) != 0
        seen = seen & chosen if EDGE else chosen
    return seen


@triton.jit
def survives(seed, dropout_p, b, h, heads, rows, cols):
    """True where dropout keeps a weight. The Philox counter is (key, query, head): whatever the tiles of a pass are,
    the backward draws what the forward drew."""
    key = (cols + rows * 0).to(tl.uint32)
    query = (rows + cols * 0).to(tl.uint32)
    pair = tl.cast(b * heads + h, tl.uint32)
    random, _, _, _ = tl.philox(seed, key, query, pair + key * 0, key * 0)
    return tl.random.uint_to_uniform_float(random) >= dropout_p
