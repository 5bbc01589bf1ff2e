"""Reads a mask function of transformers: what it says of positions, without evaluating it for every pair.

A mask function tells, for index tensors (batch, head, query, key), whether the query sees the key. `read` calls it once
with symbols instead of indices and keeps what it does to them: comparisons of positions, looked-up padding, sequence
numbers and chunks, joined by `&`. Anything else makes it unreadable, and then only the dense mask tells what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Unreadable(Exception):
    """The function does something to its indices that has no structured form."""


@dataclass(frozen=True)
class Chunks:
    """Query and key are in the same chunk: (position - starts[b]) // size is equal for both."""

    size: int
    starts: Tensor | None


@dataclass(frozen=True)
class Formula:
    """A conjunction. A query at position p sees the keys p - left .. p + right (None: unbounded) that are also in its
    sequence, in its chunk and marked in every one of `keys`."""

    left: int | None = None
    right: int | None = None
    positions: Tensor | None = None
    """(B, S): where tokens stand, if not at their own index; with `sequences` only."""
    sequences: Tensor | None = None
    """(B, S): the number of the packed sequence that a token is in."""
    keys: tuple[Tensor, ...] = ()
    """(B, >= Skv) bool each: the keys that exist."""
    chunks: Chunks | None = None

    # What mask functions do with a condition.

    def __and__(self, other: Any) -> Formula:
        if not isinstance(other, Formula):
            raise Unreadable
        banded = [f for f in (self, other) if f.left is not None or f.right is not None]
        if len({id(f.positions) for f in banded}) > 1 or (self.chunks and other.chunks):
            raise Unreadable
        sequences = self.sequences if other.sequences is None else other.sequences
        if self.sequences is not None and other.sequences is not None and self.sequences is not other.sequences:
            raise Unreadable
        return Formula(
            _least(self.left, other.left),
            _least(self.right, other.right),
            banded[0].positions if banded else None,
            sequences,
            self.keys + other.keys,
            self.chunks or other.chunks,
        )

    __rand__ = __and__

    def to(self, *_: Any, **__: Any) -> Formula:
        return self

    @property
    def device(self) -> None:
        return None

    def __bool__(self) -> bool:
        raise Unreadable  # a branch on a symbol


def _least(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)


@dataclass(frozen=True, eq=False)
class Index:
    """A symbol: query * position(q) + key * position(kv) + constant, less `starts[b]` per sequence.

    `table`: positions are looked up there instead of being the index itself. `chunk`: all of it floor-divided by that.
    """

    query: int = 0
    key: int = 0
    constant: int = 0
    table: Tensor | None = None
    starts: Tensor | None = None
    chunk: int | None = None
    absolute: bool = False

    def _plus(self, other: Any, sign: int) -> Index:
        if isinstance(other, Row) and sign == -1 and self.starts is None and self.chunk is None:
            return Index(self.query, self.key, self.constant, self.table, other.table)
        if isinstance(other, int) and not isinstance(other, bool):
            other = Index(constant=other, table=self.table, starts=self.starts)
        self._same_kind(other)
        if self.starts is not other.starts and other.query | other.key:
            raise Unreadable
        starts = None if other.query | other.key else self.starts
        return Index(
            self.query + sign * other.query,
            self.key + sign * other.key,
            self.constant + sign * other.constant,
            self.table,
            starts,
        )

    def _same_kind(self, other: Any) -> None:
        if not isinstance(other, Index) or self.table is not other.table or self.absolute or other.absolute:
            raise Unreadable
        if self.chunk is not None or other.chunk is not None:
            raise Unreadable

    def __add__(self, other: Any) -> Index:
        return self._plus(other, 1)

    def __sub__(self, other: Any) -> Index:
        return self._plus(other, -1)

    def __abs__(self) -> Index:
        if self.chunk is not None or self.starts is not None:
            raise Unreadable
        return Index(self.query, self.key, self.constant, self.table, absolute=True)

    def __floordiv__(self, size: Any) -> Index:
        if not isinstance(size, int) or self.chunk is not None or self.table is not None or self.absolute:
            raise Unreadable
        return Index(self.query, self.key, self.constant, None, self.starts, size)

    def __le__(self, other: Any) -> Formula:
        if self.absolute:
            if not isinstance(other, int) or self.constant or self.query * self.key != -1:
                raise Unreadable
            return Formula(other, other, self.table)
        found: Index = self - other
        return found._at_most_zero()

    def __lt__(self, other: Any) -> Formula:
        return self.__le__(other - 1)

    def __ge__(self, other: Any) -> Formula:
        if isinstance(other, int):
            if other <= 0 and (self.query, self.key) in ((1, 0), (0, 1)) and not self.constant and self.plain:
                return Formula()  # every position is 0 or more
            raise Unreadable
        if not isinstance(other, Index):
            raise Unreadable
        return other.__le__(self)

    def __gt__(self, other: Any) -> Formula:
        if not isinstance(other, Index):
            raise Unreadable
        return (other + 1).__le__(self)

    def __eq__(self, other: Any) -> Formula:  # type: ignore[override]
        if not isinstance(other, Index) or self.constant or other.constant or self.absolute or other.absolute:
            raise Unreadable
        if sorted(((self.query, self.key), (other.query, other.key))) != [(0, 1), (1, 0)]:
            raise Unreadable
        if self.chunk is not None and self.chunk == other.chunk and self.starts is other.starts:
            return Formula(chunks=Chunks(self.chunk, self.starts))
        if self.table is not None and self.table is other.table and self.chunk is None is other.chunk:
            return Formula(sequences=self.table)
        raise Unreadable

    def _at_most_zero(self) -> Formula:
        bound = -self.constant
        if bound < 0:
            raise Unreadable
        match (self.query, self.key):
            case (-1, 1):  # key - query <= bound
                return Formula(None, bound, self.table)
            case (1, -1):  # query - key <= bound
                return Formula(bound, None, self.table)
        raise Unreadable

    @property
    def plain(self) -> bool:
        return self.table is None and self.starts is None and self.chunk is None and not self.absolute

    def __bool__(self) -> bool:
        raise Unreadable

    def new_ones(self, *_: Any, **__: Any) -> Formula:
        """`and_masks` starts from a true tensor."""
        return Formula()


@dataclass(frozen=True)
class Row:
    """A number per sequence: table[batch]."""

    table: Tensor


class Batch:
    """The symbol for the batch index. Usable for looking up, and nothing else."""


class _Lookups(TorchFunctionMode):
    """Answers tensor[batch, query], tensor[batch, key] and tensor[batch] for symbols."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args
            match index:
                case Batch():
                    return Row(table)
                case (Batch(), Index(constant=0) as at) if at.plain:
                    if table.dtype == torch.bool:
                        if (at.query, at.key) != (0, 1):
                            raise Unreadable
                        return Formula(keys=(table,))
                    return Index(at.query, at.key, 0, table)
        return func(*args, **(kwargs or {}))


def read(mask_function: Callable[..., Any]) -> Formula | None:
    """What the function says, or None if it has no structured form that we know."""
    try:
        with _Lookups():
            found = mask_function(Batch(), object(), Index(query=1), Index(key=1))
    except Exception:
        # Any operation that symbols do not have: the function has to be evaluated. A defect of its own shows there.
        return None
    if not isinstance(found, Formula) or (found.positions is not None and found.sequences is None):
        return None
    return found
