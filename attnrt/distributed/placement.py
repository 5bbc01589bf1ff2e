"""Which tokens of a sequence lie on which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

from attnrt.errors import ArgumentError, UnknownNameError
from attnrt.request import check_size

Kind = Literal["contiguous", "zigzag"]
KINDS: tuple[str, ...] = get_args(Kind)


class Span(NamedTuple):
    """start <= i < stop."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def meet(self, other: Span) -> Span:
        """What both have; its stop is at most its start if that is nothing."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))

    def moved(self, by: int) -> Span:
        return Span(self.start + by, self.stop + by)


class Piece(NamedTuple):
    """A run of consecutive tokens: where it lies in the sequence, and where in its rank's tensor."""

    span: Span
    at: int

    def local(self, span: Span) -> Span:
        """The rows of the rank's tensor that hold `span` of the sequence."""
        return span.moved(self.at - self.span.start)


@dataclass(frozen=True)
class Placement:
    """A sequence cut into pieces, and for each rank the pieces that it holds, in their order in its tensor.

    contiguous: rank r holds the r-th run of tokens. zigzag: of 2 n chunks rank r holds chunk r and chunk 2 n - 1 - r,
    so that a causal mask leaves every rank the same work.
    """

    kind: Kind
    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def even(cls, kind: str, length: int, ranks: int) -> Placement:
        """Cut as evenly as whole tokens allow; the first chunks are the longer ones.

        Raises:
            UnknownNameError: no such kind. ArgumentError, ArgumentTypeError: a size that cannot be.
        """
        check_size("length", length, at_least=0)
        check_size("ranks", ranks, at_least=1)
        if kind == "contiguous":
            return cls.contiguous(_even(length, ranks))
        if kind == "zigzag":
            chunks = _spans(_even(length, 2 * ranks))
            return cls("zigzag", tuple((chunks[r], chunks[2 * ranks - 1 - r]) for r in range(ranks)))
        raise UnknownNameError("placement", kind, KINDS)

    @classmethod
    def contiguous(cls, lengths: Sequence[int]) -> Placement:
        """Rank after rank, each with so many tokens."""
        return cls("contiguous", tuple((span,) for span in _spans(lengths)))

    @classmethod
    def found(cls, kind: str, lengths: Sequence[int], name: str) -> Placement:
        """The placement of tensors with these local lengths. `name`: whose, for the error.

        Raises:
            ArgumentError: zigzag chunks have to be even, and these are not.
        """
        if kind == "contiguous":
            return cls.contiguous(lengths)
        made = cls.even(kind, sum(lengths), len(lengths))
        if made.lengths != tuple(lengths):
            said = f"a zigzag placement of {sum(lengths)} tokens has {list(made.lengths)} of them: use shard()"
            raise ArgumentError(f"length of {name} by rank", list(lengths), said)
        return made

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens by rank."""
        return tuple(sum(span.length for span in spans) for spans in self.spans)

    @cached_property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Every rank holds as many."""
        return len(set(self.lengths)) == 1

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """A rank's tokens, without empty runs; runs that follow each other are one."""
        found: list[Piece] = []
        at = 0
        for span in self.spans[rank]:
            if found and found[-1].span.stop == span.start:
                found[-1] = Piece(Span(found[-1].span.start, span.stop), found[-1].at)
            else:
                found.append(Piece(span, at))
            at += span.length
        return tuple(piece for piece in found if piece.span.length)

    @cached_property
    def in_order(self) -> tuple[tuple[int, Piece], ...]:
        """(rank, piece) from the first token to the last."""
        every = [(rank, piece) for rank in range(self.ranks) for piece in self.pieces(rank)]
        return tuple(sorted(every, key=lambda entry: entry[1].span))


def _even(length: int, parts: int) -> list[int]:
    return [length // parts + (i < length % parts) for i in range(parts)]


def _spans(lengths: Sequence[int]) -> list[Span]:
    return [Span(*ends) for ends in pairwise(accumulate(lengths, initial=0))]
