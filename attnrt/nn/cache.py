"""KV caches for a whole model, one length per sequence, for chunked prefill and decode.

A forward begins with `step = cache.extend(tokens)`; each layer writes its new keys and values through `step.write` and
attends with the step's lengths. Query i of a sequence then stands at key i + length - new tokens, with that sequence's
own length: `alignment="bottom_right"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.request import check_size

if TYPE_CHECKING:
    from attnrt.nn.config import ModelConfig


class CacheStep:
    """One forward's place in a cache. It holds until the cache is extended again.

    Attributes:
        positions: (B, S) int64, where each new token stands: for the rotary embedding.
        seqlens_q: (B,) int32, how many of the S tokens are real; None: all.
        seqlens_kv: (B,) int32, each sequence's length with the new tokens; None: all that `write` gives back.
        page_table: (B, pages) int32 for a paged cache, else None.
    """

    def __init__(
        self,
        cache: KVCache | PagedKVCache,
        positions: Tensor,
        seqlens_q: Tensor | None,
        seqlens_kv: Tensor | None,
        page_table: Tensor | None,
        where: Any,
    ) -> None:
        self.cache, self.positions = cache, positions
        self.seqlens_q, self.seqlens_kv, self.page_table = seqlens_q, seqlens_kv, page_table
        self._where = where

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, S, groups, D) keys and values of the new tokens; gives what to attend to, in layout "bshd".

        Raises:
            ArgumentError: another shape, or a gradient is wanted, which a cache does not keep.
        """
        batch, tokens = self.positions.shape
        for name, tensor, pool in (("k", k, self.cache.k), ("v", v, self.cache.v)):
            want = (batch, tokens, *pool.shape[-2:])
            if tuple(tensor.shape) != want:
                raise ArgumentError(name, tensor, f"must have shape (B, S, groups, head dim) = {want}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(name, tensor, "wants a gradient, and a KV cache keeps none; use torch.no_grad()")
        return self.cache._write(layer, k, v, self._where)


class KVCache:
    """Keys and values of every layer in (layers, B, max_length, groups, D) buffers.

    With `fixed_shapes` attention always sees the whole buffer and the lengths as data, so that every decode step has
    the same shapes: what GPUs, CUDA graphs and torch.compile want, and the default off the CPU. Without it, as long as
    all sequences have the same length, it sees a slice of just that length.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        max_length: int,
        groups: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fixed_shapes: bool | None = None,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "max_length": max_length, "groups": groups, "head_dim": head_dim}
        for name, size in sizes.items():
            check_size(name, size, at_least=1)
        self.batch, self.max_length, self.device = batch, max_length, torch.device(device)
        self.fixed_shapes = self.device.type != "cpu" if fixed_shapes is None else fixed_shapes
        # One slot more than asked: tokens that are padding of a ragged chunk go there.
        shape = (layers, batch, max_length + 1, groups)
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=self.device)
        self.v = torch.zeros(*shape, head_dim_v or head_dim, dtype=dtype, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        """Tokens held for each sequence."""
        self._known = [0] * batch
        self._rows = torch.arange(batch, device=self.device)[:, None]

    @classmethod
    def of(cls, config: ModelConfig, batch: int, max_length: int, **options: Any) -> KVCache:
        return cls(config.num_layers, batch, max_length, config.groups, config.head_dim, **options)

    @property
    def uniform(self) -> int | None:
        """The length that all sequences share, or None."""
        return self._known[0] if len(set(self._known)) == 1 else None

    def extend(self, tokens: int, counts: Sequence[int] | None = None) -> CacheStep:
        """Make room for `tokens` more in each sequence.

        Args:
            counts: how many of them are real, for each sequence; the rest is padding on the right. None: all.

        Raises:
            ArgumentError: it would not fit, or a count is out of range.
        """
        counts = _counts(tokens, counts, self.batch)
        before = self.uniform
        ends = [n + c for n, c in zip(self._known, counts, strict=True)]
        if max(ends) > self.max_length:
            full = ends.index(max(ends))
            raise ArgumentError(
                "tokens", tokens, f"sequence {full} holds {self._known[full]} of max_length={self.max_length} already"
            )
        positions = self.lengths.long()[:, None] + torch.arange(tokens, device=self.device)
        ragged = any(c != tokens for c in counts)
        seqlens_q = torch.tensor(counts, dtype=torch.int32, device=self.device) if ragged else None
        self.lengths.add_(tokens if seqlens_q is None else seqlens_q)  # in place: a captured graph goes on counting
        self._known = ends
        if before is not None and not ragged and not self.fixed_shapes:
            return CacheStep(self, positions, None, None, None, slice(before, ends[0]))
        places = positions
        if seqlens_q is not None:
            real = torch.arange(tokens, device=self.device) < seqlens_q[:, None]
            places = torch.where(real, positions, self.max_length)
        return CacheStep(self, positions, seqlens_q, self.lengths, None, (self._rows, places))

    def _write(self, layer: int, k: Tensor, v: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        pool_k, pool_v = self.k[layer], self.v[layer]
        if isinstance(where, slice):
            pool_k[:, where], pool_v[:, where] = k, v
            return pool_k[:, : where.stop], pool_v[:, : where.stop]
        pool_k[where], pool_v[where] = k.to(pool_k.dtype), v.to(pool_v.dtype)
        return pool_k[:, : self.max_length], pool_v[:, : self.max_length]

    def reset(self) -> None:
        """Forget every sequence; the buffers stay."""
        self.lengths.zero_()
        self._known = [0] * self.batch

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence holds beyond a length, as after rejected speculative tokens.

        Raises:
            ArgumentError: a length is not in 0..what the sequence holds.
        """
        lengths = _checked_lengths(lengths, self._known)
        self._known = lengths
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence order[i] was, as in beam search."""
        chosen = torch.tensor(list(order), device=self.device)
        if chosen.numel() != self.batch or not all(0 <= i < self.batch for i in order):
            raise ArgumentError("order", list(order), f"{self.batch} numbers in 0..{self.batch - 1} are needed")
        for pool in (self.k, self.v):
            pool.copy_(pool.index_select(1, chosen))
        self.lengths.copy_(self.lengths.index_select(0, chosen))
        self._known = [self._known[i] for i in order]


class PagedKVCache:
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
        if max_length is not None:
            check_size("max_length", max_length, at_least=1)
        self.batch, self.page_size, self.device = batch, page_size, torch.device(device)
        self.max_length = pages * page_size if max_length is None else max_length
        shape = (layers, pages, page_size, groups)
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=self.device)
        self.v = torch.zeros(*shape, head_dim_v or head_dim, dtype=dtype, device=self.device)
        width = -(-self.max_length // page_size)
        self.page_table = torch.zeros(batch, width, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._known = [0] * batch
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(pages))[::-1]

    @classmethod
    def of(cls, config: ModelConfig, batch: int, pages: int, page_size: int, **options: Any) -> PagedKVCache:
        return cls(config.num_layers, batch, pages, page_size, config.groups, config.head_dim, **options)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def extend(self, tokens: int, counts: Sequence[int] | None = None) -> CacheStep:
        """Make room for `tokens` more in each sequence; see `KVCache.extend`. A count of 0 leaves a sequence alone.

        Raises:
            ArgumentError: a sequence would outgrow max_length, or the pool has too few free pages; nothing is changed.
        """
        counts = _counts(tokens, counts, self.batch)
        ends = [n + c for n, c in zip(self._known, counts, strict=True)]
        if max(ends) > self.max_length:
            full = ends.index(max(ends))
            raise ArgumentError(
                "tokens", tokens, f"sequence {full} holds {self._known[full]} of max_length={self.max_length} already"
            )
        needed = [-(-end // self.page_size) - len(own) for end, own in zip(ends, self._owned, strict=True)]
        if sum(needed) > len(self._free):
            raise ArgumentError("tokens", tokens, f"needs {sum(needed)} pages, and {len(self._free)} are free")
        for row, count in enumerate(needed):
            if count > 0:
                taken = [self._free.pop() for _ in range(count)]
                first = len(self._owned[row])
                self._owned[row] += taken
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
        return CacheStep(self, positions, seqlens_q, self.lengths, self.page_table, (slots, real))

    def _write(self, layer: int, k: Tensor, v: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        slots, real = where
        for pool, new in ((self.k[layer], k), (self.v[layer], v)):
            rows = new.flatten(0, 1)
            pool.view(-1, *pool.shape[2:])[slots] = (rows if real is None else rows[real]).to(pool.dtype)
        return self.k[layer], self.v[layer]

    def release(self, sequence: int) -> None:
        """Give a sequence's pages back; its place in the batch is empty then."""
        check_size("sequence", sequence, at_least=0)
        if sequence >= self.batch:
            raise ArgumentError("sequence", sequence, f"a number in 0..{self.batch - 1} is needed")
        self._free += self._owned[sequence][::-1]
        self._owned[sequence] = []
        self._known[sequence] = 0
        self.lengths[sequence] = 0

    def reset(self) -> None:
        """Give every page back."""
        for sequence in range(self.batch):
            self.release(sequence)


def _counts(tokens: int, counts: Any, batch: int) -> list[int]:
    check_size("tokens", tokens, at_least=1)
    if counts is None:
        return [tokens] * batch
    if isinstance(counts, Tensor) or any(type(c) is not int for c in counts):
        raise ArgumentTypeError("counts", counts, "Python integers are needed, one a sequence")
    if len(counts) != batch or not all(0 <= c <= tokens for c in counts):
        raise ArgumentError("counts", list(counts), f"{batch} numbers in 0..{tokens} are needed")
    return list(counts)


def _checked_lengths(lengths: Sequence[int], held: list[int]) -> list[int]:
    fine = len(lengths) == len(held) and all(
        type(n) is int and 0 <= n <= most for n, most in zip(lengths, held, strict=False)
    )
    if not fine:
        raise ArgumentError("lengths", list(lengths), f"one a sequence is needed, no more than it holds: {held}")
    return list(lengths)
