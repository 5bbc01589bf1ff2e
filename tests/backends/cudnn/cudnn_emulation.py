"""A GPU that is not there: plans are carried out in float64 on the CPU, from nothing but their graph and addresses.

So the adapter's part can be checked without a GPU: which address goes where, strides, offsets, lengths, clearing.
What cuDNN leaves undefined is filled with NaN. Whether cuDNN itself computes this is for tests/gpu/test_cudnn.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from attnrt.backends.cudnn.graphs import GraphSpec, Uid
from attnrt.backends.cudnn.layouts import Strides

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
}
POINTS = {Uid.Q: Uid.AT_Q, Uid.K: Uid.AT_K, Uid.V: Uid.AT_V, Uid.O: Uid.AT_O, Uid.DO: Uid.AT_DO}
POINTS |= {Uid.DQ: Uid.AT_DQ, Uid.DK: Uid.AT_DK, Uid.DV: Uid.AT_DV, Uid.STATS: Uid.AT_STATS}


class EmulatedGraph:
    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def get_workspace_size(self) -> int:
        return 0

    def get_plan_name_at_index(self, index: int) -> str:
        return "emulated"

    def serialize(self) -> list[int]:
        return list(repr(self.spec).encode())


class EmulatedDevice:
    """In the place of `attnrt.backends.cudnn.device.Device`."""

    def __init__(self, sm: int = 90) -> None:
        self.index, self.sm, self.name = 0, sm, "emulated"
        self.torch_device = torch.device("cpu")
        self.cudnn = SimpleNamespace(backend_version_string=lambda: "9.19.0", backend_version=lambda: 91900)
        self.drawn: list[GraphSpec] = []
        self.launched = 0

    def versions(self) -> tuple[str, ...]:
        return ("cudnn 9.19.0", "frontend 1.28.0", self.name, f"sm{self.sm}", "132 SMs")

    def draw(self, spec: GraphSpec) -> EmulatedGraph:
        self.drawn.append(spec)
        return EmulatedGraph(spec)

    def build(self, graph: EmulatedGraph) -> None:
        pass

    def load(self, data: bytes) -> EmulatedGraph:
        raise RuntimeError("nothing can be loaded")

    def runner(self, graph: EmulatedGraph, uids: Sequence[int], workspace: int) -> Callable[[Sequence[int]], None]:
        def run(pointers: Sequence[int]) -> None:
            self.launched += 1
            Execution(graph.spec, {Uid(u): p for u, p in zip(uids, pointers, strict=True)}).run()

        return run


class Execution:
    """One run of a plan over raw memory."""

    def __init__(self, spec: GraphSpec, at: dict[Uid, int]) -> None:
        self.spec, self.at = spec, at
        self.dtype = DTYPES[spec.dtype]

    def memory(
        self, uid: Uid, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], start: int = 0
    ) -> Tensor:
        if 0 in sizes:
            return torch.empty(tuple(sizes), dtype=dtype)
        count = start + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        size = torch.empty((), dtype=dtype).element_size()
        raw = (ctypes.c_uint8 * (count * size)).from_address(self.at[uid])
        return torch.frombuffer(raw, dtype=dtype).as_strided(tuple(sizes), tuple(strides), start)

    def ints(self, uid: Uid, count: int) -> list[int]:
        wide = uid >= Uid.AT_Q and uid not in (Uid.PAGES_K, Uid.PAGES_V) and self.spec.wide_offsets
        return self.memory(uid, torch.int64 if wide else torch.int32, (count,), (1,)).tolist()

    def lengths(self, b: int) -> tuple[int, int]:
        shape = self.spec.shape
        if not shape.lengths:
            return shape.seqlen_q, shape.seqlen_kv
        found = self.ints(Uid.LENGTH_Q, shape.batch)[b], self.ints(Uid.LENGTH_KV, shape.batch)[b]
        assert 0 <= found[0] <= shape.seqlen_q and 0 <= found[1] <= shape.seqlen_kv, (found, shape)
        return found

    def start(self, uid: Uid, b: int, strides: Strides) -> int:
        if self.spec.shape.ragged:
            return self.ints(POINTS[uid], self.spec.shape.batch + 1)[b]
        return b * strides.batch

    def rows(self, uid: Uid, b: int, strides: Strides | None, heads: int, count: int, dim: int) -> Tensor:
        """(heads, count, dim) of sequence b, as they lie in memory."""
        assert strides is not None
        spec = self.spec
        if spec.pages is not None and uid in (Uid.K, Uid.V):
            table_uid = Uid.PAGES_K if uid is Uid.K else Uid.PAGES_V
            pages = spec.pages
            needed = -(-count // pages.size)
            table = self.memory(table_uid, torch.int32, (needed,), (1,), b * pages.table_stride).tolist()
            assert all(0 <= p < pages.total for p in table)
            parts = [
                self.memory(
                    uid, self.dtype, (heads, pages.size, dim), (strides.head, strides.row, 1), p * strides.batch
                )
                for p in table
            ]
            return torch.cat(parts, 1)[:, :count] if parts else torch.empty(heads, 0, dim, dtype=self.dtype)
        start = self.start(uid, b, strides)
        return self.memory(uid, self.dtype, (heads, count, dim), (strides.head, strides.row, 1), start)

    def stats(self, b: int, count: int) -> Tensor:
        heads, shape = self.spec.heads_q, self.spec.shape
        if shape.packed_lse:
            start = self.ints(Uid.AT_STATS, shape.batch + 1)[b]
            return self.memory(Uid.STATS, torch.float32, (heads, count), (1, heads), start)
        start = b * heads * shape.seqlen_q
        return self.memory(Uid.STATS, torch.float32, (heads, count), (shape.seqlen_q, 1), start)

    def plane(self, uid: Uid, b: int, len_q: int, len_kv: int) -> Tensor:
        plane = self.spec.bias
        assert plane is not None
        full = self.memory(uid, DTYPES[plane.dtype], plane.dims, plane.strides)
        return full.expand(self.spec.shape.batch, self.spec.heads_q, len_q, len_kv)[b]

    def scores(self, b: int, q: Tensor, k: Tensor) -> Tensor:
        """(Hq, lq, lk) scaled, biased and masked."""
        spec = self.spec
        found = q @ k.mT * spec.scale
        if spec.bias is not None:
            found = found + self.plane(Uid.BIAS, b, q.shape[1], k.shape[1]).double()
        shift = k.shape[1] - q.shape[1] if spec.bottom_right else 0
        distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + shift)
        if spec.left is not None:
            found = found.masked_fill(distance < -spec.left, -math.inf)
        if spec.right is not None:
            found = found.masked_fill(distance > spec.right, -math.inf)
        return found

    def kept(self, b: int, like: Tensor) -> Tensor:
        """What dropout multiplies the weights by."""
        if not self.spec.dropout_p:
            return torch.ones_like(like)
        seed = self.memory(Uid.SEED, torch.int64, (1,), (1,)).item()
        assert self.memory(Uid.OFFSET, torch.int64, (1,), (1,)).item() == 0
        generator = torch.Generator().manual_seed(int(seed) % 2**31 + b)
        p = self.spec.dropout_p
        return (torch.rand(like.shape, generator=generator) >= p).double() / (1 - p)

    def run(self) -> None:
        spec, shape = self.spec, self.spec.shape
        if spec.backward and spec.sinks_grad:
            self.memory(Uid.DSINKS, torch.float32, (spec.heads_q,), (1,)).zero_()
        if spec.backward and spec.bias_grad:
            assert spec.bias is not None
            self.dbias = torch.zeros(spec.bias.dims, dtype=torch.float64)
        for b in range(shape.batch):
            (self.backward if spec.backward else self.forward)(b)
        if spec.backward and spec.bias_grad and spec.bias is not None:
            dims = spec.bias.dims
            strides = (dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1)
            self.memory(Uid.DBIAS, DTYPES[spec.bias.dtype], dims, strides).copy_(self.dbias)

    def inputs(self, b: int, len_q: int, len_kv: int) -> tuple[Tensor, Tensor, Tensor]:
        spec, group = self.spec, self.spec.heads_q // self.spec.heads_kv
        q = self.rows(Uid.Q, b, spec.q, spec.heads_q, len_q, spec.dim_qk).double()
        k = self.rows(Uid.K, b, spec.k, spec.heads_kv, len_kv, spec.dim_qk).double()
        v = self.rows(Uid.V, b, spec.v, spec.heads_kv, len_kv, spec.dim_v).double()
        return q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)

    def sinks(self) -> Tensor:
        return self.memory(Uid.SINKS, torch.float32, (self.spec.heads_q,), (1,)).double()

    def forward(self, b: int) -> None:
        spec, shape = self.spec, self.spec.shape
        len_q, len_kv = self.lengths(b)
        q, k, v = self.inputs(b, len_q, len_kv)
        scores = self.scores(b, q, k)
        logits = scores
        if spec.sinks:
            logits = torch.cat([scores, self.sinks()[:, None, None].expand(-1, len_q, 1)], 2)
        lse = torch.logsumexp(logits, 2)
        weights = torch.exp(scores - lse[..., None])
        out = (weights * self.kept(b, weights)) @ v
        if spec.bias is None:  # undefined; with a bias the library says zeros and -inf
            none = (scores == -math.inf).all(2)
            out[none], lse[none] = math.nan, math.nan
        else:
            out[lse == -math.inf] = 0
        rows = shape.seqlen_q if shape.lengths and not shape.ragged else len_q
        into = self.rows(Uid.O, b, spec.o, spec.heads_q, rows, spec.dim_v)
        into.fill_(math.nan)
        into[:, :len_q].copy_(out)
        if spec.stats:
            rows = len_q if shape.ragged and shape.packed_lse else shape.seqlen_q
            stats = self.stats(b, rows)
            stats.fill_(math.nan)
            stats[:, :len_q].copy_(lse)

    def backward(self, b: int) -> None:
        spec, group = self.spec, self.spec.heads_q // self.spec.heads_kv
        assert spec.shape.ragged or not spec.shape.lengths
        len_q, len_kv = self.lengths(b)
        q, k, v = self.inputs(b, len_q, len_kv)
        out = self.rows(Uid.O, b, spec.o, spec.heads_q, len_q, spec.dim_v).double()
        grad = self.rows(Uid.DO, b, spec.do, spec.heads_q, len_q, spec.dim_v).double()
        stats = self.stats(b, len_q).double()
        weights = torch.exp(self.scores(b, q, k) - stats[..., None])
        kept = self.kept(b, weights)
        delta = (out * grad).sum(2, keepdim=True)
        dscores = weights * ((grad @ v.mT) * kept - delta)
        dq, dk, dv = dscores @ k * spec.scale, dscores.mT @ q * spec.scale, (weights * kept).mT @ grad
        if len_q == 0:  # undefined
            dk, dv = torch.full_like(dk, math.nan), torch.full_like(dv, math.nan)
        if len_kv == 0:
            dq = torch.full_like(dq, math.nan)
        dk, dv = (x.unflatten(0, (spec.heads_kv, group)).sum(1) for x in (dk, dv))
        self.rows(Uid.DQ, b, spec.dq, spec.heads_q, len_q, spec.dim_qk).copy_(dq)
        self.rows(Uid.DK, b, spec.dk, spec.heads_kv, len_kv, spec.dim_qk).copy_(dk)
        self.rows(Uid.DV, b, spec.dv, spec.heads_kv, len_kv, spec.dim_v).copy_(dv)
        if spec.bias_grad:
            assert spec.bias is not None
            into = self.dbias[b if spec.bias.dims[0] > 1 else 0]
            into += dscores.sum_to_size(into.shape)
        if spec.sinks_grad:
            into = self.memory(Uid.DSINKS, torch.float32, (spec.heads_q,), (1,))
            into -= (torch.exp(self.sinks()[:, None] - stats) * delta[..., 0]).sum(1).float()
