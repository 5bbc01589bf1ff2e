"""A plan for tensors with certain strides, and the offsets by which it finds each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnrt.backends.cudnn.device import Device
from attnrt.backends.cudnn.graphs import GraphSpec, Plane, Uid
from attnrt.backends.cudnn.layouts import Strides
from attnrt.backends.cudnn.plans import PLANS, Plan
from attnrt.backends.cudnn.rows import CONSTANTS
from attnrt.lengths import dense
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.cudnn.sequences import Offsets

_KEYS = frozenset({Uid.AT_K, Uid.AT_V, Uid.AT_DK, Uid.AT_DV})
_SHARED = frozenset({Uid.AT_K, Uid.AT_V})
"""Read by every query head of a group. Gradients cannot be written by all of them, and are added up after."""


class Places(NamedTuple):
    """Where each sequence is.

    length_q, length_kv: (B,) int32, of the call's sequences. read_q, read_kv: the same as the plan reads them, one for
    each of its own sequences. at: the address of each tensor's offsets, (B' + 1,) in elements, within `kept`.
    """

    length_q: Tensor
    length_kv: Tensor
    read_q: Tensor
    read_kv: Tensor
    at: dict[Uid, int]
    kept: tuple[Tensor, ...] = ()

    def addresses(self) -> dict[Uid, int]:
        return {Uid.LENGTH_Q: self.read_q.data_ptr(), Uid.LENGTH_KV: self.read_kv.data_ptr()} | self.at


class Lane(NamedTuple):
    """How a padded tensor lies, in elements: from a sequence to the next, from a head to the next, and how many of the
    plan's heads read one. Where the plan knows the heads' stride, the latter two are 0 and 1."""

    batch: int
    head: int
    group: int

    def offsets(self, batch: int, heads: int, **where: Any) -> Tensor:
        """(batch * heads + 1,): where each of the plan's sequences begins, and where the last ends."""
        of_head = torch.arange(heads, **where) // self.group * self.head
        starts = torch.arange(batch + 1, **where)[:, None] * self.batch + of_head
        return starts.flatten()[: batch * heads + 1]


class Launch:
    """A plan, and where it finds the sequences of tensors with certain strides."""

    def __init__(self, gpu: Device, request: AttentionRequest, spec: GraphSpec, strides: dict[Uid, Strides]) -> None:
        self.request, self.spec, self.strides = request, spec, strides
        self.plan: Plan = PLANS.get(gpu, spec)
        self.uids = spec.uids()
        self.backwards: dict[tuple[int, ...], Launch] = {}
        """Of a forward: its backwards, by the strides of the output gradient."""
        self.wide = torch.int64 if spec.wide_offsets else torch.int32
        self.steps: dict[Uid, Any] = {}
        """Of each ragged tensor: elements from one token to the next (packed), or its `Lane` (padded)."""
        if spec.shape.ragged:
            self._find(strides)

    def _find(self, strides: dict[Uid, Strides]) -> None:
        r, apart = self.request, self.spec.shape.heads_apart
        strides = {uid: s for uid, s in strides.items() if uid in self.uids}
        if r.packed:
            self.steps = {uid: s.row for uid, s in strides.items()}
            stats: Any = r.heads_q
        elif apart:
            group = r.heads_q // r.heads_kv
            self.steps = {uid: Lane(s.batch, s.head, group if uid in _SHARED else 1) for uid, s in strides.items()}
            stats = Lane(r.heads_q * r.seqlen_q, r.seqlen_q, 1)
        else:
            self.steps = {uid: Lane(s.batch, 0, 1) for uid, s in strides.items()}
            stats = Lane(r.heads_q * r.seqlen_q, 0, 1)
        if Uid.AT_STATS in self.uids:
            self.steps[Uid.AT_STATS] = stats
        # One table where lengths are padded, or queries and keys have the same cu_seqlens; else the keys' comes after.
        self.together = not r.packed or r.same_lengths
        queries = [n for uid, n in self.steps.items() if uid not in _KEYS or self.together]
        self.step_q = tuple(dict.fromkeys(queries))
        self.step_kv = () if self.together else tuple(dict.fromkeys(n for u, n in self.steps.items() if u in _KEYS))
        self.rows = {
            uid: len(self.step_q) + self.step_kv.index(n) if self.step_kv and uid in _KEYS else self.step_q.index(n)
            for uid, n in self.steps.items()
        }
        """Of each tensor: its row of the table."""
        self.finds: Offsets | None = None
        if r.packed:
            from attnrt.backends.cudnn import sequences  # imports Triton

            if sequences.usable(self.spec.shape, False):
                room = self.spec.shape.batch
                self.finds = sequences.Offsets(r.batch, room, self.step_q, self.step_kv, self.wide)

    def places(self, operands: Operands, lengths: tuple[Tensor, Tensor] | None, device: torch.device) -> Places:
        """Lengths and offsets of this call's sequences. lengths: those of a padded batch."""
        if lengths is not None:
            return self._padded(*lengths, device)
        batch = self.spec.shape.batch
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        assert cu_q is not None and cu_kv is not None
        if self.finds is not None and cu_q.is_cuda:
            length_q, length_kv, offsets = self.finds(cu_q, None if self.together else cu_kv)
            return Places(length_q, length_kv, length_q, length_kv, self._addresses(offsets), (offsets,))
        cu_q, cu_kv, same = dense(cu_q), dense(cu_kv), self.together
        if batch != self.request.batch:  # sequences of length zero fill the bucket
            first = tuple(min(b, self.request.batch) for b in range(batch + 1))
            index = CONSTANTS.get(first, torch.int32, device)
            cu_q = cu_q.index_select(0, index)
            cu_kv = cu_q if same else cu_kv.index_select(0, index)
        length_q = cu_q[1:] - cu_q[:-1]
        length_kv = length_q if same else cu_kv[1:] - cu_kv[:-1]
        offsets = cu_q * CONSTANTS.get(tuple((n,) for n in self.step_q), self.wide, device)
        if not same:
            offsets_kv = cu_kv * CONSTANTS.get(tuple((n,) for n in self.step_kv), self.wide, device)
            offsets = torch.cat((offsets, offsets_kv))
        return Places(length_q, length_kv, length_q, length_kv, self._addresses(offsets), (offsets,))

    def _padded(self, length_q: Tensor, length_kv: Tensor, device: torch.device) -> Places:
        r, shape = self.request, self.spec.shape
        if not shape.ragged:
            return Places(length_q, length_kv, length_q, length_kv, {})
        heads = r.heads_q if shape.heads_apart else 1

        def make() -> Tensor:
            # In 64 bits first: the stride of a single sequence may be any number.
            return torch.stack([n.offsets(r.batch, heads, device=device) for n in self.step_q]).to(self.wide)

        offsets = CONSTANTS.get(("offsets", r.batch, heads, self.step_q), self.wide, device, make)
        read_q, read_kv = length_q, length_kv
        if shape.heads_apart:
            read_q = length_q[:, None].expand(-1, heads).reshape(-1).contiguous()
            read_kv = read_q if length_kv is length_q else length_kv[:, None].expand(-1, heads).reshape(-1).contiguous()
        return Places(length_q, length_kv, read_q, read_kv, self._addresses(offsets), (offsets,))

    def _addresses(self, offsets: Tensor) -> dict[Uid, int]:
        """Of each tensor's row."""
        first = offsets.data_ptr()
        step = (self.spec.shape.batch + 1) * offsets.element_size()
        return {uid: first + row * step for uid, row in self.rows.items()}


def readable(bias: Tensor) -> Tensor:
    """The bias itself where its rows are contiguous, else a copy."""
    expanded = any(n > 1 and s == 0 for n, s in zip(bias.shape, bias.stride(), strict=True))
    if expanded or (bias.ndim and bias.shape[-1] > 1 and bias.stride(-1) != 1):
        return bias.contiguous()
    return bias


def plane_of(bias: Tensor, r: AttentionRequest) -> Plane:
    """A bias as the graph sees it, in (B, Hq, Sq, Skv)."""
    assert r.bias is not None
    bias = readable(bias)
    dims = r.bias.shape
    given = (0,) * (4 - bias.ndim) + tuple(bias.stride())
    strides, dense = [], 1
    for size, stride in zip(reversed(dims), reversed(given), strict=True):
        strides.append(dense if size == 1 else stride)
        dense = strides[-1] * size
    return Plane(dims, tuple(reversed(strides)), r.bias.dtype)  # type: ignore[arg-type]
