"""Who computes what when, as data: nothing here knows torch, let alone torch.distributed.

Executors carry a schedule out (`ring.py`, `gather.py`); tests read it: that no pair of query and key is missed or done
twice, that ranks have equal work, that every message sent is one that is received, and that nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Literal, NamedTuple

from attnrt.distributed.blocks import Band, Block, blocks_between
from attnrt.distributed.placement import Piece, Placement, Span

Channel = Literal["kv", "dkv"]


class Post(NamedTuple):
    """Start sending a channel's buffer to a rank, and receiving the next one, for `source`'s keys, from another."""

    channel: Channel
    to: int
    come_from: int
    source: int


class Wait(NamedTuple):
    """Until what was posted last on the channel has arrived. It takes the buffer's place, or joins it."""

    channel: Channel
    joins: bool = False


class Compute(NamedTuple):
    """The blocks of one step, with the keys at hand."""

    step: int


Action = Post | Wait | Compute


@dataclass(frozen=True)
class Ring:
    """Keys travel from rank to rank; at step i rank r has those of rank r - offsets[i].

    `offsets` holds only what some rank needs: with a window, keys skip the ranks that nobody there can see.
    """

    q: Placement
    kv: Placement
    band: Band
    offsets: tuple[int, ...]

    @classmethod
    def plan(cls, q: Placement, kv: Placement, band: Band) -> Ring:
        return cls(q, kv, band, _offsets(q, kv, band))

    @property
    def ranks(self) -> int:
        return self.q.ranks

    def source(self, rank: int, step: int) -> int:
        """Whose keys a rank has at a step."""
        return (rank - self.offsets[step]) % self.ranks

    def blocks(self, rank: int, step: int) -> tuple[Block, ...]:
        """Rows of `q` are the rank's own, rows of `kv` those of the step's source."""
        return blocks_between(self.q.pieces(rank), self.kv.pieces(self.source(rank, step)), self.band)

    def hop(self, step: int) -> int:
        """How many ranks on the keys move after a step; after the last, home."""
        following = self.offsets[step + 1] if step + 1 < len(self.offsets) else self.ranks
        return (following - self.offsets[step]) % self.ranks

    def forward(self, rank: int) -> Iterator[Action]:
        """Each exchange is under way while the step before it is computed."""
        for step in range(len(self.offsets)):
            more = step + 1 < len(self.offsets)
            if more:
                yield self._post("kv", rank, step)
            yield Compute(step)
            if more:
                yield Wait("kv")

    def backward(self, rank: int) -> Iterator[Action]:
        """The keys' gradients follow one step behind the keys, and go home in the end."""
        for step in range(len(self.offsets)):
            more = step + 1 < len(self.offsets)
            if more:
                yield self._post("kv", rank, step)
            yield Compute(step)
            if step:
                yield Wait("dkv", joins=True)
            if self.hop(step):
                yield self._post("dkv", rank, step)
            if more:
                yield Wait("kv")
        if self.hop(len(self.offsets) - 1):
            yield Wait("dkv")

    def _post(self, channel: Channel, rank: int, step: int) -> Post:
        hop = self.hop(step)
        to, come_from = (rank + hop) % self.ranks, (rank - hop) % self.ranks
        return Post(channel, to, come_from, self.source(come_from, step))


def _offsets(q: Placement, kv: Placement, band: Band) -> tuple[int, ...]:
    ranks, needed = q.ranks, {0}
    for rank in range(ranks):
        for piece in q.pieces(rank):
            reach = band.reach(piece.span, kv.length)
            needed |= {(rank - source) % ranks for source, _ in _within(kv, reach)}
        if len(needed) == ranks:
            break
    return tuple(sorted(needed))


def _within(placement: Placement, span: Span) -> Iterator[tuple[int, Span]]:
    """(rank, what it holds of `span`), in the sequence's order."""
    for rank, piece in placement.in_order:
        if piece.span.start >= span.stop:
            return
        part = piece.span.meet(span)
        if part.length > 0:
            yield rank, part


class Part(NamedTuple):
    """Rows of one rank's keys: whose, which rows of its tensor, and where they go in the gathered one."""

    source: int
    rows: Span
    at: int


@dataclass(frozen=True)
class Gather:
    """Every rank gets the keys that its queries see, in the sequence's order, and computes alone.

    selective: each pair of ranks exchanges only what is needed; otherwise everybody gets everything.
    """

    q: Placement
    kv: Placement
    band: Band
    selective: bool

    @classmethod
    def plan(cls, q: Placement, kv: Placement, band: Band) -> Gather:
        """Selective where no rank would receive more than half of what an all-gather brings it."""
        narrow = cls(q, kv, band, True)
        most = kv.longest * (kv.ranks - 1)
        if band.left is None and band.right is None and band.documents_q is None:
            return cls(q, kv, band, False)
        return narrow if 2 * max(narrow.received(r) for r in range(q.ranks)) <= most else cls(q, kv, band, False)

    @property
    def ranks(self) -> int:
        return self.q.ranks

    def needed(self, rank: int) -> tuple[Span, ...]:
        """What a rank's queries see of the sequence, as runs in order."""
        if not self.selective:
            return (Span(0, self.kv.length),) if self.kv.length else ()
        runs: list[Span] = []
        reached = (self.band.reach(piece.span, self.kv.length) for piece in self.q.pieces(rank))
        for run in sorted(r for r in reached if r.length > 0):
            if runs and run.start <= runs[-1].stop:
                runs[-1] = Span(runs[-1].start, max(runs[-1].stop, run.stop))
            else:
                runs.append(run)
        return tuple(runs)

    def parts(self, rank: int) -> tuple[Part, ...]:
        """What the gathered keys are made of, from the first row to the last."""
        found: list[Part] = []
        at = 0
        for run in self.needed(rank):
            for source, part in _within(self.kv, run):
                piece = next(p for p in self.kv.pieces(source) if p.span.start <= part.start < p.span.stop)
                found.append(Part(source, piece.local(part), at))
                at += part.length
        return tuple(found)

    def sent(self, rank: int, to: int) -> tuple[Span, ...]:
        """The rows that a rank sends to another one, in the order in which they arrive."""
        return tuple(part.rows for part in self.parts(to) if part.source == rank)

    def received(self, rank: int) -> int:
        """Tokens that come from other ranks."""
        if not self.selective:
            return self.kv.longest * (self.ranks - 1)  # shorter shards travel padded
        return sum(part.rows.length for part in self.parts(rank) if part.source != rank)

    def blocks(self, rank: int) -> tuple[Block, ...]:
        """Rows of `q` are the rank's own, rows of `kv` those of the gathered keys; no query is in two blocks."""
        at, pieces = 0, []
        for run in self.needed(rank):
            pieces.append(Piece(run, at))
            at += run.length
        found: list[Block] = []
        for q in self.q.pieces(rank):
            reach = self.band.reach(q.span, self.kv.length)
            for piece in pieces:
                inside = piece.span.meet(reach)
                if inside.length > 0:
                    found += blocks_between([q], [Piece(inside, piece.local(inside).start)], self.band)
        return tuple(found)


@dataclass(frozen=True)
class HeadSplit:
    """Which heads a rank has once it holds the whole sequence.

    KV heads are repeated where that is what makes query heads and KV heads split alike.
    """

    heads_q: int
    heads_kv: int
    ranks: int

    @cached_property
    def queries(self) -> int:
        """Query heads a rank."""
        return self.heads_q // self.ranks

    @cached_property
    def group(self) -> int:
        """Query heads that share one KV head on a rank: the largest number that fits every rank alike."""
        return gcd(self.queries, self.heads_q // self.heads_kv)

    @cached_property
    def keys(self) -> int:
        """KV heads a rank."""
        return self.queries // self.group

    @property
    def copies(self) -> int:
        """KV heads on all ranks together."""
        return self.keys * self.ranks

    def kv_heads(self, rank: int) -> tuple[int, ...]:
        """Which KV head each of the rank's is."""
        first, per_head = rank * self.queries, self.heads_q // self.heads_kv
        return tuple((first + i * self.group) // per_head for i in range(self.keys))
