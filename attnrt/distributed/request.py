"""What is asked of a group of ranks: the call as one device would see it, and how its tokens are placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from attnrt.distributed.blocks import Band, Block
from attnrt.distributed.placement import Placement
from attnrt.distributed.schedule import Gather, HeadSplit, Ring
from attnrt.request import AttentionRequest, Operand

Method = Literal["gather", "ulysses", "ring"]
METHODS: tuple[Method, ...] = ("gather", "ulysses", "ring")
CHOICES = ("auto", *METHODS)


@dataclass(frozen=True)
class ParallelRequest:
    """One attention call over several ranks. No tensors, no process group: whoever has the numbers can ask.

    Attributes:
        whole: the call on the whole sequence. q, kv: where its queries and its keys are.
        documents_q, documents_kv: offsets of packed sequences in the whole batch.
    """

    whole: AttentionRequest
    q: Placement
    kv: Placement
    documents_q: tuple[int, ...] | None = None
    documents_kv: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        return self.q.ranks

    @cached_property
    def band(self) -> Band:
        """By position in the whole sequence."""
        r = self.whole
        bottom_right = r.alignment == "bottom_right"
        shift = r.seqlen_kv - r.seqlen_q if bottom_right and not r.packed else 0
        return Band(r.left, r.right, shift, self.documents_q, self.documents_kv, bottom_right, r.padded)

    @cached_property
    def ring(self) -> Ring:
        return Ring.plan(self.q, self.kv, self.band)

    @cached_property
    def gather(self) -> Gather:
        return Gather.plan(self.q, self.kv, self.band)

    @cached_property
    def heads(self) -> HeadSplit:
        return HeadSplit(self.whole.heads_q, self.whole.heads_kv, self.ranks)

    @property
    def row_bytes(self) -> int:
        """Of k and v, one token of every batch row."""
        r = self.whole
        return self.rows * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * r.itemsize

    @property
    def rows(self) -> int:
        """Batch rows; packed sequences are one."""
        return 1 if self.whole.packed else self.whole.batch

    def blocks(self, method: Method, rank: int) -> tuple[Block, ...]:
        """Every kernel call of a rank. Ulysses has one, which is no block: see `local_requests`."""
        if method == "gather":
            return self.gather.blocks(rank)
        return tuple(block for step in range(len(self.ring.offsets)) for block in self.ring.blocks(rank, step))

    def local_requests(self, method: Method, ranks: tuple[int, ...]) -> dict[AttentionRequest, str]:
        """The distinct calls that these ranks' kernels see, each with a name for reports."""
        if method == "ulysses":
            return {self.by_heads: f"the whole sequence, 1/{self.ranks} of the heads"}
        found: dict[AttentionRequest, str] = {}
        for rank in ranks:
            for block in self.blocks(method, rank):
                request = self.by_block(block, method)
                if request not in found:
                    name, same = _name(block), sum(n.startswith(_name(block)) for n in found.values())
                    found[request] = f"{name}, form {same + 1}" if same else name
        return found

    @cached_property
    def by_heads(self) -> AttentionRequest:
        """What Ulysses' local kernel sees."""
        r, heads = self.whole, self.heads
        layout = "thd" if r.packed else "sbhd"

        def operand(given: Operand | None) -> Operand | None:
            if given is None or given.shape[1] == 1:
                return given
            return replace(given, shape=(given.shape[0], heads.queries, *given.shape[2:]))

        return replace(
            r,
            layout=layout,
            heads_q=heads.queries,
            heads_kv=heads.keys,
            mask=operand(r.mask),
            bias=operand(r.bias),
            strides="contiguous",
            aligned=_aligned(r, r.head_dim_qk) and _aligned(r, r.head_dim_v),
            expanded=False,
        )

    def by_block(self, block: Block, method: Method) -> AttentionRequest:
        """What a kernel sees of one block."""
        r = self.whole
        lengths_q = _lengths(block.cu_q) or [block.q.length]
        lengths_kv = _lengths(block.cu_kv) or [block.kv.length]

        def operand(given: Operand | None) -> Operand | None:
            if given is None:
                return None
            rows = block.q.length if given.shape[2] > 1 else 1
            keys = block.kv.length if given.shape[3] > 1 else 1
            return replace(given, shape=(*given.shape[:2], rows, keys), strided=False)

        changes: dict[str, Any] = {
            "batch": len(lengths_q) if r.packed else r.batch,
            "seqlen_q": max(lengths_q),
            "seqlen_kv": max(lengths_kv),
            "tokens_q": block.q.length * self.rows,
            "tokens_kv": block.kv.length * self.rows,
            "causal": block.causal,
            "window": None if block.left is None and block.right in (None, 0) else (block.left, block.right),
            "alignment": self.alignment(block),
            "left": block.left,
            "right": block.right,
            "mask": operand(r.mask),
            "bias": operand(r.bias),
            "same_lengths": r.packed and block.cu_q == block.cu_kv,
            "strides": "strided",
            "aligned": r.aligned and _aligned(r, r.head_dim_qk) and _aligned(r, r.head_dim_v),
            "expanded": False,
        }
        if method == "ring":
            # The sinks join in when all blocks are merged.
            changes |= {"needs_lse": True, "lse_backward": r.needs_grad, "sinks": False, "sinks_grad": False}
        return replace(r, **changes)

    def alignment(self, block: Block) -> Any:
        """Of a block's call; ALiBi counts positions even where no key is cut off."""
        if self.whole.alibi is not None and block.q.length != block.kv.length:
            return "bottom_right"
        return block.alignment


def _lengths(offsets: tuple[int, ...] | None) -> list[int] | None:
    return None if offsets is None else [b - a for a, b in pairwise(offsets)]


def _aligned(r: AttentionRequest, dim: int) -> bool:
    return dim * r.itemsize % 16 == 0


def _name(block: Block) -> str:
    size = f"{block.q.length} x {block.kv.length}"
    if block.cu_q is not None and len(block.cu_q) > 2:
        return f"{size} packed"
    if block.full:
        return f"{size} full"
    return f"{size} {'causal' if block.causal and block.left is None else 'band'}"


def facts(request: ParallelRequest) -> Mapping[str, str]:
    """What of a request a report shows."""
    placed = f"{request.ranks} ranks, {request.q.kind} placement"
    lengths = request.q.lengths
    held = f"{lengths[0]} tokens each" if request.q.is_even else f"{min(lengths)} to {max(lengths)} tokens each"
    return {"call": request.whole.describe(), "ranks": f"{placed}, {held}"}
