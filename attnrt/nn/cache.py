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
    from attnrt.nn.paged_cache import PagedKVCache


class Turn:
    """What a cache shares with its latest step, so that the step knows when it is over."""

    over = False


class Turns:
    """A cache one of whose steps is valid at a time."""

    def __init__(self) -> None:
        self._turn = Turn()

    def _next_turn(self) -> Turn:
        self._turn.over = True
        self._turn = Turn()
        return self._turn


class CacheStep:
    """One forward's place in a cache. It holds until the cache is extended, truncated, reordered or emptied.

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
        turn: Turn,
    ) -> None:
        self.cache, self.positions = cache, positions
        self.seqlens_q, self.seqlens_kv, self.page_table = seqlens_q, seqlens_kv, page_table
        self._where, self._turn = where, turn

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, S, groups, D) keys and values of the new tokens; gives what to attend to, in layout "bshd".

        Raises:
            ArgumentError: another shape, no such layer, a gradient is wanted, which a cache does not keep, or the step
                is over. ArgumentTypeError: another dtype than the cache's, without autocast.
        """
        if self._turn.over:
            raise ArgumentError("step", self, "is over: the cache went on without it; take what extend() gave last")
        layers = len(self.cache.k)
        if not 0 <= layer < layers:
            raise ArgumentError("layer", layer, f"the cache was made for {layers} layers, from 0")
        batch, tokens = self.positions.shape
        for name, tensor, pool in (("k", k, self.cache.k), ("v", v, self.cache.v)):
            want = (batch, tokens, *pool.shape[-2:])
            if tuple(tensor.shape) != want:
                raise ArgumentError(name, tensor, f"must have shape (B, S, groups, head dim) = {want}")
            if tensor.dtype != pool.dtype and not torch.is_autocast_enabled(tensor.device.type):
                raise ArgumentTypeError(
                    name, tensor, f"the cache holds {pool.dtype}; make it with dtype={tensor.dtype}"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(name, tensor, "wants a gradient, and a KV cache keeps none; use torch.no_grad()")
        return self.cache._write(layer, k, v, self._where)


class KVCache(Turns):
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
        if head_dim_v is not None:
            sizes["head_dim_v"] = head_dim_v
        for name, size in sizes.items():
            check_size(name, size, at_least=1)
        self.batch, self.max_length, self.device = batch, max_length, torch.device(device)
        self.fixed_shapes = self.device.type != "cpu" if fixed_shapes is None else fixed_shapes
        # One slot more than asked: tokens that are padding of a ragged chunk go there.
        shape = (layers, batch, max_length + 1, groups)
        self.k = torch.zeros(*shape, head_dim, dtype=dtype, device=self.device)
        self.v = torch.zeros(*shape, head_dim if head_dim_v is None else head_dim_v, dtype=dtype, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        """Tokens held for each sequence."""
        self._known = [0] * batch
        super().__init__()
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
        counts = checked_counts(tokens, counts, self.batch)
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
            return CacheStep(self, positions, None, None, None, slice(before, ends[0]), self._next_turn())
        places = positions
        if seqlens_q is not None:
            real = torch.arange(tokens, device=self.device) < seqlens_q[:, None]
            places = torch.where(real, positions, self.max_length)
        return CacheStep(self, positions, seqlens_q, self.lengths, None, (self._rows, places), self._next_turn())

    def _write(self, layer: int, k: Tensor, v: Tensor, where: Any) -> tuple[Tensor, Tensor]:
        pool_k, pool_v = self.k[layer], self.v[layer]
        if isinstance(where, slice):
            pool_k[:, where], pool_v[:, where] = k, v
            return pool_k[:, : where.stop], pool_v[:, : where.stop]
        pool_k[where], pool_v[where] = k.to(pool_k.dtype), v.to(pool_v.dtype)
        return pool_k[:, : self.max_length], pool_v[:, : self.max_length]

    def reset(self) -> None:
        """Forget every sequence; the buffers stay."""
        self._next_turn()
        self.lengths.zero_()
        self._known = [0] * self.batch

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence holds beyond a length, as after rejected speculative tokens.

        Args:
            lengths: tokens to keep, one number a sequence. What each holds is read from the device, where a captured
                graph counts it.

        Raises:
            ArgumentError: a length is not in 0..what the sequence holds. ArgumentTypeError: not Python integers.
        """
        self._known = kept_lengths(lengths, self.lengths.tolist())
        self._next_turn()
        self.lengths.copy_(torch.tensor(self._known, dtype=torch.int32))

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence order[i] was, as in beam search. Its keys and values are copied.

        Args:
            order: one number a sequence, in 0..batch - 1; any of them more than once, or not at all.

        Raises:
            ArgumentError: another count, or a number out of range. ArgumentTypeError: not Python integers.
        """
        order = checked_order(order, self.batch)
        self._next_turn()
        self._known = self.lengths.tolist()
        if order == list(range(self.batch)):
            return
        chosen = torch.tensor(order, device=self.device)
        held = slice(max(self._known))
        for pool in (*self.k, *self.v):  # one layer at a time: that is what the copy takes in memory
            pool[:, held] = pool[:, held].index_select(0, chosen)
        self.lengths.copy_(self.lengths.index_select(0, chosen))
        self._known = [self._known[i] for i in order]


def checked_counts(tokens: int, counts: Any, batch: int) -> list[int]:
    check_size("tokens", tokens, at_least=1)
    if counts is None:
        return [tokens] * batch
    found = _integers("counts", counts)
    if len(found) != batch or not all(0 <= c <= tokens for c in found):
        raise ArgumentError("counts", found, f"{batch} numbers in 0..{tokens} are needed")
    return found


def kept_lengths(lengths: Any, held: list[int]) -> list[int]:
    found = _integers("lengths", lengths)
    if len(found) != len(held) or not all(0 <= n <= most for n, most in zip(found, held, strict=True)):
        raise ArgumentError("lengths", found, f"one a sequence is needed, no more than it holds: {held}")
    return found


def checked_order(order: Any, batch: int) -> list[int]:
    found = _integers("order", order)
    if len(found) != batch or not all(0 <= i < batch for i in found):
        raise ArgumentError("order", found, f"{batch} numbers in 0..{batch - 1} are needed")
    return found


def _integers(name: str, values: Any) -> list[int]:
    """Not a tensor: on a GPU, reading it waits, and that is the caller's to say."""
    if not isinstance(values, Sequence) or any(type(n) is not int for n in values):
        hint = "; .tolist() gives them" if isinstance(values, Tensor) else ""
        raise ArgumentTypeError(name, values, f"Python integers are needed, one a sequence{hint}")
    return list(values)
