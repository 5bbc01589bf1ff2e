"""A KV cache in pages: sequences take them as they grow, give them back as they shrink, and share what is the same.

Two sequences share a page after `reorder`, as the beams of one prompt do. A shared page is only read: a sequence that
is about to write into one takes a copy of its own first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.errors import ArgumentError
from attnrt.nn.cache import CacheStep, Turns, checked_counts, checked_order, kept_lengths
from attnrt.request import check_size

if TYPE_CHECKING:
    from attnrt.nn.config import ModelConfig


class PagedKVCache(Turns):
    """Keys and values in pages that sequences take as they grow and give back when they end.

    Each layer has a pool (pages, page_size, groups, D); a page holds the same tokens in every layer, so there is one
    page table. Attention reads the pool through it: `attnrt.attention(..., page_table=)`.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        pages: int,
        page_size: int,
        groups: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`pages` in the whole pool; `max_length`: of one sequence, in tokens, which sets the table's width; None: as
        many as the pool holds."""
        sizes = {"layers": layers, "batch": batch, "pages": pages, "page_size": page_size}
        for name, size in {**sizes, "groups": groups, "head_dim": head_dim}.items():
            check_size(name, size, at_least=1)
        for name, given in {"max_length": max_length, "head_dim_v": head_dim_v}.items():
            if given is not None:
                check_size(name, given, at_least=1)
        self.batch, self.page_size, self.device = batch, page_size, torch.device(device)
        self.max_length = pages * page_size if max_length is None else max_length
        shape = (layers, pages, page_size, groups)
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=self.device)
        self.v = torch.zeros(*shape, head_dim if head_dim_v is None else head_dim_v, dtype=dtype, device=self.device)
        width = -(-self.max_length // page_size)
        self.page_table = torch.zeros(batch, width, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        """Tokens held for each sequence."""
        self._known = [0] * batch
        self._held: list[list[int]] = [[] for _ in range(batch)]
        """Each sequence's pages."""
        self._free = list(range(pages))[::-1]
        self._holders: Counter[int] = Counter()
        """How many sequences hold a page; none that is free is in it."""
        super().__init__()

    @classmethod
    def of(cls, config: ModelConfig, batch: int, pages: int, page_size: int, **options: Any) -> PagedKVCache:
        return cls(config.num_layers, batch, pages, page_size, config.groups, config.head_dim, **options)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def extend(self, tokens: int, counts: Sequence[int] | None = None) -> CacheStep:
        """Make room for `tokens` more in each sequence; see `KVCache.extend`. A count of 0 leaves a sequence alone.

        Raises:
            ArgumentError: a sequence would outgrow max_length, or the pool has too few free pages (a page that is
                shared, and would be written, needs one for its copy); nothing is changed.
        """
        counts = checked_counts(tokens, counts, self.batch)
        ends = [n + c for n, c in zip(self._known, counts, strict=True)]
        if max(ends) > self.max_length:
            full = ends.index(max(ends))
            raise ArgumentError(
                "tokens", tokens, f"sequence {full} holds {self._known[full]} of max_length={self.max_length} already"
            )
        copying = self._to_copy(counts)
        growth = [-(-end // self.page_size) - len(own) for end, own in zip(ends, self._held, strict=True)]
        needed = sum(growth) + len(copying)
        if needed > len(self._free):
            raise ArgumentError("tokens", tokens, f"needs {needed} pages, and {len(self._free)} are free")
        self._copy_last_pages(copying)
        for row, count in enumerate(growth):
            if count:
                first, taken = len(self._held[row]), [self._take() for _ in range(count)]
                self._held[row] += taken
                at = torch.tensor(taken, dtype=torch.int32, device=self.device)
                self.page_table[row, first : first + count] = at
        positions = self.lengths.long()[:, None] + torch.arange(tokens, device=self.device)
        ragged = any(c != tokens for c in counts)
        seqlens_q = torch.tensor(counts, dtype=torch.int32, device=self.device) if ragged else None
        self.lengths.add_(tokens if seqlens_q is None else seqlens_q)  # in place: a captured graph goes on counting
        self._known = ends
        pages = positions // self.page_size
        slots = self.page_table.long().gather(1, pages.clamp(max=self.page_table.shape[1] - 1)) * self.page_size
        slots = (slots + positions % self.page_size).flatten()
        real = None
        if ragged:
            rows = [row * tokens + i for row, count in enumerate(counts) for i in range(count)]
            real = torch.tensor(rows, dtype=torch.long, device=self.device)
            slots = slots[real]
        return CacheStep(self, positions, seqlens_q, self.lengths, self.page_table, (slots, real), self._next_turn())

    def _to_copy(self, counts: list[int]) -> list[int]:
        """The sequences that would write into a page of others too. The last one to hold a page need not copy it."""
        rows, left = [], Counter[int]()
        for row, count in enumerate(counts):
            if count and self._known[row] % self.page_size:
                page = self._held[row][-1]
                left[page] += 1
                if left[page] < self._holders[page]:
                    rows.append(row)
        return rows

    def _copy_last_pages(self, rows: list[int]) -> None:
        if not rows:
            return
        old, new, places = [], [], []
        for row in rows:
            page = self._held[row][-1]
            old.append(page)
            self._holders[page] -= 1
            self._held[row][-1] = self._take()
            new.append(self._held[row][-1])
            places.append(len(self._held[row]) - 1)
        source, target, at, column = (torch.tensor(n, device=self.device) for n in (old, new, rows, places))
        for pool in (*self.k, *self.v):
            pool[target] = pool[source]
        self.page_table[at, column] = target.int()

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _drop(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)

    def _write(self, layer: int, k: Tensor, v: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        slots, real = where
        for pool, new in ((self.k[layer], k), (self.v[layer], v)):
            rows = new.flatten(0, 1)
            pool.view(-1, *pool.shape[2:])[slots] = (rows if real is None else rows[real]).to(pool.dtype)
        return self.k[layer], self.v[layer]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence holds beyond a length, as after rejected speculative tokens; pages that hold
        nothing else are given back.

        Args:
            lengths: tokens to keep, one number a sequence.

        Raises:
            ArgumentError: a length is not in 0..what the sequence holds. ArgumentTypeError: not Python integers.
        """
        self._known = kept_lengths(lengths, self._known)
        self._next_turn()
        for held, length in zip(self._held, self._known, strict=True):
            keep = -(-length // self.page_size)
            self._drop(held[keep:])
            del held[keep:]
        self.lengths.copy_(torch.tensor(self._known, dtype=torch.int32))

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence order[i] was, as in beam search. No key or value is moved: sequences share
        their pages until one of them writes.

        Args:
            order: one number a sequence, in 0..batch - 1; any of them more than once, or not at all: that sequence's
                pages are given back where nobody shares them.

        Raises:
            ArgumentError: another count, or a number out of range. ArgumentTypeError: not Python integers.
        """
        order = checked_order(order, self.batch)
        self._next_turn()
        if order == list(range(self.batch)):
            return
        before, self._held = self._held, [list(self._held[i]) for i in order]
        for held in self._held:
            self._holders.update(held)
        for held in before:
            self._drop(held)
        self._known = [self._known[i] for i in order]
        chosen = torch.tensor(order, device=self.device)
        for table in (self.page_table, self.lengths):
            table.copy_(table.index_select(0, chosen))

    def release(self, sequence: int) -> None:
        """Give a sequence's pages back; its place in the batch is empty then."""
        check_size("sequence", sequence, at_least=0)
        if sequence >= self.batch:
            raise ArgumentError("sequence", sequence, f"a number in 0..{self.batch - 1} is needed")
        self._next_turn()
        self._drop(self._held[sequence])
        self._held[sequence] = []
        self._known[sequence] = 0
        self.lengths[sequence] = 0

    def reset(self) -> None:
        """Give every page back."""
        for sequence in range(self.batch):
            self.release(sequence)
