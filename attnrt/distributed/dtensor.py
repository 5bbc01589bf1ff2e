"""`attnrt.attention` of DTensors: heads and batch rows on each rank by itself, a cut sequence by context parallelism.

Nothing is redistributed behind the user's back: what would need it is refused, with the placement that would be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from attnrt import runtime
from attnrt.api import attention
from attnrt.decision import Decision
from attnrt.distributed.api import context_parallel_attention
from attnrt.distributed.placement import Span
from attnrt.distributed.schedule import HeadSplit
from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.operands import Operands
from attnrt.request import check_groups, check_layout

DIMS = {"bhsd": "bhsd", "bshd": "bshd", "sbhd": "sbhd", "thd": "shd"}
"""What each dim of a layout counts; a packed batch's tokens are its sequence."""
LSE = {"bhsd": "bhs", "bshd": "bhs", "sbhd": "bhs", "thd": "hs"}


class Cut:
    """How q, k and v lie on the mesh, checked: which of its dims cut the batch, the heads, the sequence."""

    def __init__(self, q: Any, k: Any, v: Any, layout: str) -> None:
        for name, t in {"q": q, "k": k, "v": v}.items():
            if not isinstance(t, DTensor):
                raise ArgumentTypeError(name, t, "q, k and v must all be DTensors, or none of them")
        self.mesh: DeviceMesh = q.device_mesh
        if not q.device_mesh == k.device_mesh == v.device_mesh:
            raise ArgumentError("mesh", (q.device_mesh, k.device_mesh), "q, k and v must be on one device mesh")
        self.layout = check_layout(layout)
        dims = len(DIMS[layout])
        for name, t in {"q": q, "k": k, "v": v}.items():
            if t.ndim != dims:
                raise ArgumentError(f"{name}.shape", tuple(t.shape), f"layout={layout!r} has {dims} dims")
        self.kinds: list[str] = []
        """By mesh dim: "b", "h", "s", or "" where nothing is cut."""
        self.lone_heads: list[bool] = []
        """By mesh dim: the query heads are cut and the KV heads are whole."""
        for i in range(self.mesh.ndim):
            self._check(i, q, k, v)
        if self.kinds.count("s") > 1:
            raise ArgumentError("q.placements", q.placements, "the sequence may be cut along one mesh dim only")
        self._check_heads(q, k)

    def _check(self, i: int, q: DTensor, k: DTensor, v: DTensor) -> None:
        placements = [t.placements[i] for t in (q, k, v)]
        if self.mesh.size(i) == 1:
            self.kinds.append("")
            self.lone_heads.append(False)
            return
        names = [self._kind(name, p, i) for name, p in zip("qkv", placements, strict=True)]
        lone = names == ["h", "", ""]
        if len(set(names)) > 1 and not lone:
            said = f"along mesh dim {i} q, k and v must be cut alike, or only q's heads: redistribute() them"
            raise ArgumentError("placements", tuple(placements), said)
        self.kinds.append(names[0])
        self.lone_heads.append(lone)

    def _kind(self, name: str, placement: Placement, i: int) -> str:
        if isinstance(placement, Replicate):
            return ""
        counted = DIMS[self.layout]
        if isinstance(placement, Shard) and type(placement) is Shard:
            kind = counted[placement.dim % len(counted)]
            if kind != "d":
                return kind
        where = f"Shard of its {'tokens' if self.layout == 'thd' else 'batch, sequence'} or heads, or Replicate()"
        raise ArgumentError(f"{name}.placements[{i}]", placement, f"{where} is needed: redistribute() it")

    def _check_heads(self, q: DTensor, k: DTensor) -> None:
        at = DIMS[self.layout].index("h")
        heads_q, heads_kv = q.shape[at], k.shape[at]
        check_groups(heads_q, heads_kv)
        cuts = [i for i, kind in enumerate(self.kinds) if kind == "h"]
        if len({self.lone_heads[i] for i in cuts}) > 1:
            raise ArgumentError(
                "k.placements", k.placements, "KV heads must be cut along all the mesh dims of q's, or none"
            )
        ranks = 1
        for i in cuts:
            ranks *= self.mesh.size(i)
        for name, heads in (("heads_q", heads_q), ("heads_kv", heads_kv)):
            if heads % ranks and not (name == "heads_kv" and cuts and self.lone_heads[cuts[0]]):
                raise ArgumentError(name, heads, f"must divide among the {ranks} ranks that share them")

    def span(self, letter: str, length: int) -> Span:
        """Which part of a batch or of the heads, counted over the whole, this rank has."""
        start = 0
        for i, kind in enumerate(self.kinds):
            if kind == letter:
                each = -(-length // self.mesh.size(i))
                rank = self.mesh.get_local_rank(i)
                begin = min(rank * each, length)
                start, length = start + begin, min(begin + each, length) - begin
        return Span(start, start + length)

    def shared(self) -> list[Placement]:
        """How gradients of what every rank has whole are spread: each rank has its share, or all have the same."""
        return [Partial() if kind else Replicate() for kind in self.kinds]


def attend(q: Any, k: Any, v: Any, operands: Operands, options: dict[str, Any]) -> Any:
    """`attnrt.attention` where q, k or v is a DTensor: DTensors placed as q is.

    Other tensors are whole on every rank, plain or DTensors.

    Raises:
        ArgumentError, ArgumentTypeError: placements that would need tensors to be moved first.
    """
    cut = Cut(q, k, v, options["layout"])
    local, given, passed = _local(cut, q, k, v, operands, options)
    if "s" in cut.kinds:
        found = _across(cut, local, given, passed)
    else:
        attend_now: Any = attention  # its overloads ask for a literal return_lse
        found = attend_now(*local, **given, **passed)
    if not options["return_lse"]:
        return _whole(cut, found, q, v)
    out, lse = found
    return _whole(cut, out, q, v), _whole_lse(cut, lse, q)


def explain(q: Any, k: Any, v: Any, operands: Operands, options: dict[str, Any]) -> Decision:
    """What this rank's own call would run.

    Raises:
        ArgumentError: the sequence is cut, so that more than one call answers it.
    """
    cut = Cut(q, k, v, options["layout"])
    if "s" in cut.kinds:
        said = "the sequence is cut across ranks: attnrt.distributed.explain tells what they do together"
        raise ArgumentError("q.placements", q.placements, said)
    local, given, passed = _local(cut, q, k, v, operands, options)
    return runtime.decide(local[0], local[1], local[2], Operands(**given), every=True, **passed)


def _local(
    cut: Cut, q: DTensor, k: DTensor, v: DTensor, operands: Operands, options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Any]]:
    """(this rank's q, k and v, its part of the other tensors, the options)."""
    if operands.page_table is not None:
        raise ArgumentError(
            "page_table", operands.page_table, "k and v are pools of pages, which DTensors cannot be here"
        )
    keys = [Partial() if lone else p for lone, p in zip(cut.lone_heads, k.placements, strict=True)]
    local_q = q.to_local()
    local_k, local_v = (t.to_local(grad_placements=keys) for t in (k, v))
    at = DIMS[cut.layout].index("h")
    heads = cut.span("h", q.shape[at])
    if any(cut.lone_heads):
        split = HeadSplit(q.shape[at], k.shape[at], q.shape[at] // heads.length)
        mine = torch.tensor(split.kv_heads(heads.start // heads.length), device=local_k.device)
        local_k, local_v = (t.index_select(at, mine) for t in (local_k, local_v))
    batch = Span(0, 0) if cut.layout == "thd" else cut.span("b", q.shape[DIMS[cut.layout].index("b")])
    given = {name: _part(cut, name, x, batch, heads) for name, x in operands._asdict().items() if x is not None}
    return [local_q, local_k, local_v], given, options


def _part(cut: Cut, name: str, x: Any, batch: Span, heads: Span) -> Any:
    """This rank's share of a mask, bias, slopes, sinks or lengths that every rank has whole."""
    if isinstance(x, DTensor):
        whole = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)
        x = whole.to_local(grad_placements=cut.shared())
    if name in ("mask", "bias"):
        if x.ndim >= 4 and x.shape[-4] > 1:
            x = x[batch.start : batch.stop]
        return x[..., heads.start : heads.stop, :, :] if x.ndim >= 3 and x.shape[-3] > 1 else x
    if name == "sinks":
        return x[heads.start : heads.stop]
    if name == "alibi_slopes":
        x = x[batch.start : batch.stop] if x.ndim == 2 and cut.layout != "thd" else x
        return x[..., heads.start : heads.stop].contiguous()
    return x if name.startswith("cu_") else x[batch.start : batch.stop]


def _across(cut: Cut, local: Sequence[Tensor], given: dict[str, Any], options: dict[str, Any]) -> Any:
    """Context parallelism along the mesh dim that cuts the sequence."""
    dim = cut.kinds.index("s")
    for name in ("mask", "bias"):
        x = given.get(name)
        if x is not None and x.ndim > 1 and x.shape[-2] > 1:
            said = "with the sequence cut across ranks, its rows have to be cut too: call context_parallel_attention"
            raise ArgumentError(name, x, said)
    longest = ("max_seqlen_q", "max_seqlen_kv")
    passed = {name: value for name, value in options.items() if name not in longest}
    attend_across: Any = context_parallel_attention
    return attend_across(*local, mesh=cut.mesh.get_group(dim), **given, **passed)


def _whole(cut: Cut, out: Tensor, q: DTensor, v: DTensor) -> DTensor:
    shape = torch.Size((*q.shape[:-1], v.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(out, cut.mesh, q.placements, run_check=False, shape=shape, stride=stride)


def _whole_lse(cut: Cut, lse: Tensor, q: DTensor) -> DTensor:
    letters = DIMS[cut.layout]
    shape = torch.Size(q.shape[letters.index(c)] for c in LSE[cut.layout])
    placements = [Shard(LSE[cut.layout].index(kind)) if kind else Replicate() for kind in cut.kinds]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(lse, cut.mesh, placements, run_check=False, shape=shape, stride=stride)
