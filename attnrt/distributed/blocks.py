"""The kernel calls that make up a rank's part of one attention call: a pure function of lengths and band.

A block is a run of query rows against a run of keys. Rows and keys out of reach are cut off, and what is left of the
band is put into a kernel's own terms, so that a block is an ordinary attention call and no mask is ever made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from attnrt.distributed.placement import Piece, Span

NOTHING = Span(0, 0)


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, by position in the whole sequence.

    Query i stands at key i + shift and sees keys from `left` before it to `right` after; None is unbounded.
    documents_q, documents_kv: for packed sequences where each begins, and the end. They count positions for themselves.
    bottom_right: how a document's queries stand to its keys. padded: lengths vary inside the batch.
    """

    left: int | None = None
    right: int | None = None
    shift: int = 0
    documents_q: tuple[int, ...] | None = None
    documents_kv: tuple[int, ...] | None = None
    bottom_right: bool = False
    padded: bool = False

    def reach(self, q: Span, length_kv: int) -> Span:
        """The keys that some query of `q` may see, out of `length_kv`."""
        if q.length <= 0:
            return Span(0, 0)
        if self.documents_q is not None:
            found = list(_documents(q, Span(0, length_kv), self))
            if not found:
                return Span(0, 0)
            (rows, keys, shift), last = found[0], found[-1][1]
            start = keys.start if self.left is None else max(keys.start, rows.start + shift - self.left)
            return Span(min(start, last.stop), last.stop)
        start = 0 if self.left is None else max(0, q.start + self.shift - self.left)
        stop = length_kv if self.right is None else min(length_kv, q.stop + self.shift + self.right)
        return Span(start, max(start, stop))


@dataclass(frozen=True)
class Block:
    """One kernel call. `q` and `kv` are rows of the tensors at hand; the rest are that call's own arguments.

    cu_q, cu_kv: offsets of a packed call. span_q, span_kv: the same rows by position in the whole sequence; where rows
    of several pieces are one call, from the first to the last.
    """

    q: Span
    kv: Span
    left: int | None = None
    right: int | None = None
    alignment: Literal["top_left", "bottom_right"] | None = None
    cu_q: tuple[int, ...] | None = None
    cu_kv: tuple[int, ...] | None = None
    span_q: Span = NOTHING
    span_kv: Span = NOTHING

    @property
    def full(self) -> bool:
        """Every query sees every key."""
        return self.left is None and self.right is None and (self.cu_q is None or len(self.cu_q) == 2)

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def pairs(self) -> int:
        """(query, key) pairs within the band: the block's work."""
        cu_q, cu_kv = self.cu_q or (0, self.q.length), self.cu_kv or (0, self.kv.length)
        return sum(
            _pairs(q1 - q0, k1 - k0, self.left, self.right, self.alignment == "bottom_right")
            for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_kv), strict=True)
        )


def _pairs(queries: int, keys: int, left: int | None, right: int | None, bottom_right: bool) -> int:
    shift = keys - queries if bottom_right else 0
    return _below(queries, keys, shift, right) - (0 if left is None else _below(queries, keys, shift, -left - 1))


def _below(queries: int, keys: int, shift: int, bound: int | None) -> int:
    """How many (i, j) have j <= i + shift + bound: rows without a key, then rows that grow by one, then full rows."""
    if bound is None:
        return queries * keys
    first = shift + bound + 1  # keys that row 0 sees, before cutting to 0..keys
    empty = min(queries, max(0, -first))
    growing = min(queries, max(0, keys - first)) - empty
    return growing * (first + empty) + growing * (growing - 1) // 2 + (queries - empty - growing) * keys


def blocks_between(q_pieces: Sequence[Piece], kv_pieces: Sequence[Piece], band: Band) -> tuple[Block, ...]:
    """Every call that the queries of `q_pieces` need with the keys of `kv_pieces`; no pair in two of them."""
    if band.documents_q is not None:
        return tuple(block for q in q_pieces for kv in kv_pieces for block in _packed(q, kv, band))
    if not band.padded and q_pieces == kv_pieces and len(q_pieces) > 1 and _plain_causal(band):
        # Own queries and keys of a zigzag placement: cut out of the sequence alike, they are causal among themselves.
        rows = Span(0, sum(piece.span.length for piece in q_pieces))
        spans = Span(q_pieces[0].span.start, q_pieces[-1].span.stop)
        return (Block(rows, rows, right=0, span_q=spans, span_kv=spans),)
    found = [block for q in q_pieces for kv in kv_pieces if (block := _rectangle(q, kv, band))]
    return tuple(found if band.padded else _joined(found))


def _plain_causal(band: Band) -> bool:
    return band.left is None and band.right == 0 and band.shift == 0


def _rectangle(q: Piece, kv: Piece, band: Band) -> Block | None:
    """The part of q x kv within the band, or None."""
    rows, keys, shift = q.span, kv.span, band.shift
    if band.left is not None:
        keys = Span(max(keys.start, rows.start + shift - band.left), keys.stop)
        rows = Span(rows.start, min(rows.stop, kv.span.stop - shift + band.left))
    if band.right is not None:
        keys = Span(keys.start, min(keys.stop, rows.stop + shift + band.right))
        rows = Span(max(rows.start, kv.span.start - shift - band.right), rows.stop)
    if rows.length <= 0 or keys.length <= 0:
        return None
    base = Block(q.local(rows), kv.local(keys), span_q=rows, span_kv=keys)
    return _bounded(base, rows, keys, shift, band)


def _bounded(base: Block, rows: Span, keys: Span, shift: int, band: Band) -> Block:
    """The block with what the band still cuts off, in the terms of the call: see `AttentionRequest.left`."""
    at = rows.start + shift - keys.start  # row i stands at key i + at of the block
    left, right = band.left, band.right
    if left is not None and rows.length - 1 + at - left <= 0:
        left = None
    if right is not None and at + right >= keys.length - 1:
        right = None
    if left is None and right is None:
        return base
    corner = keys.length - rows.length
    if band.padded or not corner:
        # Top-left: row i stands at key i.
        moved = 0 - at
        alignment: Literal["top_left", "bottom_right"] | None = "top_left" if corner or band.padded else None
    else:
        moved = corner - at
        alignment = "bottom_right"
    left = None if left is None else left + moved
    right = None if right is None else right - moved
    return replace(base, left=left, right=right, alignment=alignment)


def _joined(blocks: list[Block]) -> list[Block]:
    """Full blocks that are side by side become one call."""
    found: list[Block] = []
    for block in blocks:
        last = found[-1] if found else None
        if last and last.full and block.full and last.q == block.q and last.kv.stop == block.kv.start:
            found[-1] = replace(last, kv=Span(last.kv.start, block.kv.stop), span_kv=_hull(last.span_kv, block.span_kv))
        else:
            found.append(block)
    stacked: list[Block] = []
    for block in found:
        last = stacked[-1] if stacked else None
        if last and last.full and block.full and last.kv == block.kv and last.q.stop == block.q.start:
            stacked[-1] = replace(last, q=Span(last.q.start, block.q.stop), span_q=_hull(last.span_q, block.span_q))
        else:
            stacked.append(block)
    return stacked


def _hull(a: Span, b: Span) -> Span:
    return Span(min(a.start, b.start), max(a.stop, b.stop))


def _packed(q: Piece, kv: Piece, band: Band) -> Iterator[Block]:
    """Documents whose queries end where their keys do go into one packed call; another one is a call by itself."""
    banded = band.left is not None or band.right is not None
    group: list[tuple[Span, Span]] = []
    for rows, keys, shift in _documents(q.span, kv.span, band):
        if banded and rows.stop + shift != keys.stop:
            # Seen from its last key the band is moved: a call of its own.
            if group:
                yield _grouped(q, kv, group, band)
                group = []
            alone = replace(band, shift=shift, documents_q=None, documents_kv=None)
            block = _rectangle(Piece(rows, q.local(rows).start), Piece(keys, kv.local(keys).start), alone)
            if block is not None:
                yield replace(block, cu_q=(0, block.q.length), cu_kv=(0, block.kv.length))
            continue
        if group and (group[-1][0].stop != rows.start or group[-1][1].stop != keys.start):
            yield _grouped(q, kv, group, band)
            group = []
        group.append((rows, keys))
    if group:
        yield _grouped(q, kv, group, band)


def _documents(rows: Span, keys: Span, band: Band) -> Iterator[tuple[Span, Span, int]]:
    """Each document's part of the rows and, up to the last one in reach, of the keys; and its own shift."""
    starts, ends = band.documents_q, band.documents_kv
    assert starts is not None and ends is not None
    for d in range(max(0, bisect_right(starts, rows.start) - 1), len(starts) - 1):
        if starts[d] >= rows.stop:
            return
        q, kv = Span(*starts[d : d + 2]).meet(rows), Span(*ends[d : d + 2]).meet(keys)
        shift = ends[d + 1] - starts[d + 1] if band.bottom_right else ends[d] - starts[d]
        if band.right is not None:
            kv = Span(kv.start, min(kv.stop, q.stop + shift + band.right))
        if q.length > 0 and kv.length > 0:
            yield q, kv, shift


def _grouped(q: Piece, kv: Piece, group: list[tuple[Span, Span]], band: Band) -> Block:
    rows, keys = (Span(group[0][side].start, group[-1][side].stop) for side in (0, 1))
    cu_q = (*(g[0].start - rows.start for g in group), rows.length)
    cu_kv = (*(g[1].start - keys.start for g in group), keys.length)
    banded = band.left is not None or band.right is not None
    return Block(
        q.local(rows),
        kv.local(keys),
        band.left,
        band.right,
        "bottom_right" if banded and cu_q != cu_kv else None,
        cu_q,
        cu_kv,
        rows,
        keys,
    )
