"""Which calls of the CPU's flash kernel make up one request: a pure function of the request and the lengths.

A tile is one call: some query rows of one sequence (or of the whole batch) against the keys they can reach. Windows
skip keys out of reach, padding is sliced away, packed sequences get tiles of their own, and a tile's additive mask
covers its own rectangle only. So memory stays linear whatever is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from attnrt.request import AttentionRequest

CHUNK_BYTES = 16 << 20
"""A tile's mask stays within this, unless it has only `MIN_ROWS` rows."""
MIN_ROWS = 64
"""Fewer rows than this starve the kernel, which works on 32 to 256 at a time."""
BAND_ROWS = 1024
"""Rows of a tile under a causal mask or a wide window: more would score too many keys only to hide them."""
NARROW_ROWS = 256
"""... under a narrow window, where a call's own cost starts to matter."""


class Piece(NamedTuple):
    """Sequences that share their lengths: their batch rows in q, k, v and in the mask, and where their tokens are."""

    rows: slice
    """Of q, k and v; a packed batch is a single row there."""
    batch: slice
    """Of a mask, bias or slopes with a batch dim."""
    start_q: int
    len_q: int
    start_kv: int
    len_kv: int


class Tile(NamedTuple):
    """One kernel call: query rows q0:q1 and keys k0:k1 of a piece, counted from the piece's own starts."""

    piece: Piece
    q0: int
    q1: int
    k0: int
    k1: int
    shift: int
    """Query i stands at key position i + shift."""
    causal: bool = False
    """The band is the kernel's own causal mask."""
    banded: bool = False
    """Some pairs of the rectangle are out of the band, so a mask is needed."""


def dense(r: AttentionRequest) -> bool:
    """Something other than the band is added to the scores."""
    return r.mask is not None or r.bias is not None or r.alibi is not None


def native_causal(r: AttentionRequest) -> bool:
    """The kernel's own top-left causal mask may be used. It puts -inf there first and scales after, so 0 makes NaN of
    it and a negative scale +inf."""
    return r.is_causal and r.scale > 0


def pieces(r: AttentionRequest, lengths_q: Sequence[int] | None, lengths_kv: Sequence[int] | None) -> Iterator[Piece]:
    """The batch as pieces: one if nothing varies inside it, else one per sequence.

    `lengths_*` are seqlens, or cu_seqlens when packed, as lists; None where that side is full.
    """
    if r.packed:
        assert lengths_q is not None and lengths_kv is not None
        for b in range(r.batch):
            q, kv = lengths_q[b], lengths_kv[b]
            yield Piece(slice(0, 1), slice(b, b + 1), q, lengths_q[b + 1] - q, kv, lengths_kv[b + 1] - kv)
    elif r.padded or mask_bytes(r, r.batch, MIN_ROWS) > CHUNK_BYTES:
        for b in range(r.batch):
            len_q = r.seqlen_q if lengths_q is None else lengths_q[b]
            len_kv = r.seqlen_kv if lengths_kv is None else lengths_kv[b]
            yield Piece(slice(b, b + 1), slice(b, b + 1), 0, len_q, 0, len_kv)
    elif r.batch:
        yield Piece(slice(0, r.batch), slice(0, r.batch), 0, r.seqlen_q, 0, r.seqlen_kv)


def tiles(r: AttentionRequest, parts: Iterable[Piece]) -> list[Tile]:
    """Every kernel call of a request. Query rows in no tile have nothing to attend to."""
    return [tile for piece in parts if piece.len_q and piece.len_kv for tile in _tiles(r, piece)]


def _tiles(r: AttentionRequest, piece: Piece) -> Iterator[Tile]:
    len_q, len_kv = piece.len_q, piece.len_kv
    shift = len_kv - len_q if r.alignment == "bottom_right" else 0
    if not r.banded and not dense(r):
        yield Tile(piece, 0, len_q, 0, len_kv, shift)
        return
    if native_causal(r) and not shift and not dense(r):
        yield Tile(piece, 0, len_q, 0, min(len_q, len_kv), shift, causal=True)
        return
    rows = tile_rows(r, piece.rows.stop - piece.rows.start)
    for q0 in range(0, len_q, rows):
        q1 = min(q0 + rows, len_q)
        k0 = 0 if r.left is None else max(0, q0 + shift - r.left)
        k1 = len_kv if r.right is None else min(len_kv, q1 + shift + r.right)
        if k0 < k1:
            below = r.left is not None and q1 - 1 + shift - r.left > k0
            above = r.right is not None and q0 + shift + r.right < k1 - 1
            yield Tile(piece, q0, q1, k0, k1, shift, banded=below or above)


def tile_rows(r: AttentionRequest, batch: int) -> int:
    """Query rows per tile: its mask fits the chunk, and a band does not score many keys only to hide them."""
    rows = max(1, r.seqlen_q)
    if r.left is not None and r.right is not None:
        rows = min(rows, max(NARROW_ROWS, min(r.left + r.right, BAND_ROWS)))
    elif r.banded:
        rows = min(rows, BAND_ROWS)
    while rows > MIN_ROWS and mask_bytes(r, batch, rows) > CHUNK_BYTES:
        rows = max(MIN_ROWS, rows // 2)
    return rows


def mask_bytes(r: AttentionRequest, batch: int, rows: int) -> int:
    """Size of the additive mask for `rows` query rows of `batch` sequences; 0 if the call needs none."""
    if not r.banded and not dense(r):
        return 0
    shapes = [o.shape for o in (r.mask, r.bias) if o is not None]
    per_batch = any(shape[0] > 1 for shape in shapes) or r.alibi == "batch_heads"
    per_head = any(shape[1] > 1 for shape in shapes) or r.alibi is not None
    keys = r.seqlen_kv
    if r.left is not None and r.right is not None:
        keys = min(keys, rows + r.left + r.right)
    sheets = (batch if per_batch else 1) * (r.heads_q if per_head else 1)
    return sheets * min(rows, r.seqlen_q) * keys * (8 if r.dtype == "fp64" else 4)
