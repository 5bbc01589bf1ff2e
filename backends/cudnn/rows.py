"""Which query rows see nothing, and where each sequence is: worked out on the device, so that nothing waits for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from attnrt.backends.cudnn.device import capturing
from attnrt.lengths import dense
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

MOST_CONSTANTS, MOST_BYTES = 4096, 64 << 20


class Constants:
    """Small tensors of known numbers, by device and value: made once, outside of any capture.

    A CUDA graph that was captured over one reads it at every replay, so such a one is kept for good.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Any, Tensor] = OrderedDict()
        self._captured: dict[Any, Tensor] = {}
        self._bytes = 0
        self._lock = Lock()

    def get(
        self,
        values: tuple[Any, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The numbers as a tensor; rows of a table as tuples of one length. With `make`, which makes it on the device,
        `values` is what stands for them."""
        key = (values, dtype, device)
        found = self._captured.get(key)
        if found is None:
            with self._lock:
                if (found := self._made.get(key)) is not None:
                    self._made.move_to_end(key)
        captured = capturing()
        if found is None:
            if captured:  # numbers of the host cannot be copied now, and nothing may be kept of what is made now
                return _on_device(values, dtype, device) if make is None else make()
            found = torch.tensor(values, dtype=dtype, device=device) if make is None else make()
            with self._lock:
                self._made[key] = found
                self._bytes += found.nbytes
                while len(self._made) > MOST_CONSTANTS or (self._bytes > MOST_BYTES and len(self._made) > 1):
                    self._bytes -= self._made.popitem(last=False)[1].nbytes
        elif captured:
            self._captured[key] = found
        return found


def _on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if values and isinstance(values[0], tuple):
        return torch.stack([_on_device(row, dtype, device) for row in values])
    return torch.stack([torch.full((), n, dtype=dtype, device=device) for n in values])


CONSTANTS = Constants()


def lengths(r: AttentionRequest, operands: Operands, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) int32 each: real queries and keys of every sequence of a padded batch."""

    def known(given: Tensor | None, longest: int) -> Tensor:
        if given is not None:
            return dense(given)
        return CONSTANTS.get((longest,) * r.batch, torch.int32, device)

    return known(operands.seqlens_q, r.seqlen_q), known(operands.seqlens_kv, r.seqlen_kv)


def dead_rows(r: AttentionRequest, length_q: Tensor, length_kv: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
    """True where a query row has no key to attend to, or is no query at all: (B, Sq), or (T,) of a packed batch."""
    if cu_seqlens_q is None:
        return dead_grid(r, length_q, length_kv, r.seqlen_q)
    token = torch.arange(r.tokens_q, device=length_q.device, dtype=torch.int32)
    sequence = torch.searchsorted(dense(cu_seqlens_q[1:]), token, right=True, out_int32=True).clamp_(max=r.batch - 1)
    row = token - cu_seqlens_q[sequence]  # past the end of the last sequence, for tokens of none
    return _sees_nothing(r, row, length_q[sequence], length_kv[sequence])


def dead_grid(r: AttentionRequest, length_q: Tensor, length_kv: Tensor, rows: int) -> Tensor:
    """The same for rows 0, 1, ... of every sequence: (B, rows)."""
    if rows == 1 and not r.padded_q and not r.packed:
        return (length_kv == 0)[:, None]
    row = torch.arange(rows, device=length_q.device, dtype=torch.int32)
    return _sees_nothing(r, row, length_q[:, None], length_kv[:, None])


def _sees_nothing(r: AttentionRequest, row: Tensor, length_q: Tensor, length_kv: Tensor) -> Tensor:
    dead = (row >= length_q) | (length_kv == 0)
    if r.alignment == "bottom_right":
        return dead if r.right is None else dead | (row < length_q - length_kv - r.right)
    return dead if r.left is None else dead | (row >= length_kv + r.left)


def over_rows(mask: Tensor, layout: str) -> Tensor:
    """A (B, S) or (T,) mask, broadcast over heads and head dim of a tensor in that layout."""
    if layout == "thd":
        return mask[:, None, None]
    if layout == "sbhd":
        return mask.t()[:, :, None, None]
    return mask[:, None, :, None] if layout == "bhsd" else mask[:, :, None, None]


def unread_keys(r: AttentionRequest, length_q: Tensor, cu_seqlens_kv: Tensor | None = None) -> Tensor:
    """True for keys of sequences without a query, whose gradient nothing writes: (B, 1), or (T,) of a packed batch."""
    if cu_seqlens_kv is None:
        return (length_q == 0)[:, None]
    token = torch.arange(r.tokens_kv, device=length_q.device, dtype=torch.int32)
    sequence = torch.searchsorted(dense(cu_seqlens_kv[1:]), token, right=True, out_int32=True).clamp_(max=r.batch - 1)
    return length_q[sequence] == 0


def packed_rows(rows: Tensor, cu_seqlens_q: Tensor, tokens: int) -> Tensor:
    """(Hq, T) from (B, Hq, S) numbers of a packed batch's rows; -inf for tokens of no sequence."""
    token = torch.arange(tokens, device=rows.device, dtype=torch.int32)
    sequence = torch.searchsorted(dense(cu_seqlens_q[1:]), token, right=True, out_int32=True)
    sequence = sequence.clamp_(max=cu_seqlens_q.numel() - 2)
    row = (token - cu_seqlens_q[sequence]).clamp_(max=rows.shape[2] - 1)
    found = rows[sequence.long(), :, row.long()].t()
    return found.masked_fill(token >= cu_seqlens_q[-1], -torch.inf)


def heads_last(mask: Tensor, layout: str) -> Tensor:
    """(B, Hq, Sq) in the order that the layout has them."""
    return mask if layout == "bhsd" else mask.transpose(1, 2) if layout == "bshd" else mask.permute(2, 0, 1)


def padded_rows(lse: Tensor, cu_seqlens_q: Tensor, batch: int, rows: int) -> Tensor:
    """(batch, Hq, rows) from a packed batch's (Hq, T) LSE, the other way about; +inf past each sequence's end."""
    first = cu_seqlens_q[:-1, None]
    row = torch.arange(rows, device=lse.device, dtype=torch.int32)
    token = first + row
    found = lse[:, token.clamp(max=lse.shape[1] - 1).long()].transpose(0, 1)
    found = found.masked_fill((token >= cu_seqlens_q[1:, None])[:, None], torch.inf)
    more = batch - found.shape[0]
    return torch.cat([found, found.new_full((more, *found.shape[1:]), torch.inf)]) if more else found.contiguous()
