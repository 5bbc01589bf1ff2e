"""A plan for tensors with certain strides, and the offsets by which it finds each sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrt.backends.cudnn.device import Device
from attnrt.backends.cudnn.graphs import GraphSpec, Plane, Uid
from attnrt.backends.cudnn.layouts import Strides
from attnrt.backends.cudnn.plans import PLANS, Plan
from attnrt.backends.cudnn.rows import CONSTANTS
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

_KEYS = frozenset({Uid.AT_K, Uid.AT_V, Uid.AT_DK, Uid.AT_DV})


class Places(NamedTuple):
    """Where each sequence is: lengths (B',) int32, and the address of each tensor's offsets, (B' + 1,) in elements."""

    length_q: Tensor
    length_kv: Tensor
    at: dict[Uid, int]
    kept: tuple[Tensor, ...] = ()
    """The memory that `at` points into."""

    def addresses(self) -> dict[Uid, int]:
        return {Uid.LENGTH_Q: self.length_q.data_ptr(), Uid.LENGTH_KV: self.length_kv.data_ptr()} | self.at


class Launch:
    """A plan, and its tensors' strides.

    steps: for each ragged tensor, elements from one token to the next (packed) or from one sequence to the next
    (padded), by the uid of its offsets.
    """

    def __init__(self, gpu: Device, request: AttentionRequest, spec: GraphSpec, strides: dict[Uid, Strides]) -> None:
        self.request, self.spec, self.strides = request, spec, strides
        self.plan: Plan = PLANS.get(gpu, spec)
        self.uids = spec.uids()
        self.backwards: dict[tuple[int, ...], Launch] = {}
        """Of a forward: its backwards, by the strides of the output gradient."""
        self.wide = torch.int64 if spec.wide_offsets else torch.int32
        uids = self.uids
        r = request
        steps = {uid: s.row if r.packed else s.batch for uid, s in strides.items() if uid in uids}
        if Uid.AT_STATS in uids:
            steps[Uid.AT_STATS] = r.heads_q * (1 if r.packed else r.seqlen_q)
        self.steps = {uid: step for uid, step in steps.items() if uid in uids}
        # The same cu_seqlens for queries and keys: one product serves both.
        self.together = r.packed and r.same_lengths
        queries = [n for uid, n in self.steps.items() if uid not in _KEYS or self.together]
        self.step_q = tuple(dict.fromkeys(queries))
        self.step_kv = () if self.together else tuple(dict.fromkeys(n for u, n in self.steps.items() if u in _KEYS))

    def places(self, operands: Operands, lengths: tuple[Tensor, Tensor] | None, device: torch.device) -> Places:
        """Lengths and offsets of this call's sequences. lengths: those of a padded batch."""
        batch = self.spec.shape.batch
        if lengths is not None:
            if not self.spec.shape.ragged:
                return Places(*lengths, {})
            table = tuple(tuple(b * n for b in range(batch + 1)) for n in (*self.step_q, *self.step_kv))
            offsets = CONSTANTS.get(table, self.wide, device)
            return Places(*lengths, self._addresses(offsets, None), (offsets,))
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        assert cu_q is not None and cu_kv is not None
        same = self.together
        if batch != self.request.batch:  # sequences of length zero fill the bucket
            first = tuple(min(b, self.request.batch) for b in range(batch + 1))
            index = CONSTANTS.get(first, torch.int32, device)
            cu_q = cu_q.index_select(0, index)
            cu_kv = cu_q if same else cu_kv.index_select(0, index)
        length_q = cu_q[1:] - cu_q[:-1]
        length_kv = length_q if same else cu_kv[1:] - cu_kv[:-1]
        offsets = cu_q * CONSTANTS.get(tuple((n,) for n in self.step_q), self.wide, device)
        if same:
            return Places(length_q, length_kv, self._addresses(offsets, None), (offsets,))
        offsets_kv = cu_kv * CONSTANTS.get(tuple((n,) for n in self.step_kv), self.wide, device)
        return Places(length_q, length_kv, self._addresses(offsets, offsets_kv), (offsets, offsets_kv))

    def _addresses(self, offsets: Tensor, offsets_kv: Tensor | None) -> dict[Uid, int]:
        """Of each tensor's row; without `offsets_kv`, those of the keys follow the queries' in one table."""
        first = offsets.data_ptr()
        step = (self.spec.shape.batch + 1) * offsets.element_size()
        at = {}
        for uid, n in self.steps.items():
            if uid not in _KEYS or self.together:
                at[uid] = first + self.step_q.index(n) * step
            elif offsets_kv is not None:
                at[uid] = offsets_kv.data_ptr() + self.step_kv.index(n) * step
            else:
                at[uid] = first + (len(self.step_q) + self.step_kv.index(n)) * step
        return at


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
