"""A rank's own kernel calls: which ones, chosen as any other call is, and their arguments cut to the block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnrt import registry, runtime
from attnrt.api import attention
from attnrt.backends.base import Kernel
from attnrt.decision import Decision
from attnrt.distributed.blocks import Block
from attnrt.distributed.placement import Span
from attnrt.distributed.wire import SEQUENCE
from attnrt.environment import Environment
from attnrt.errors import AttnrtError, BackendFailed, BackendUnavailable
from attnrt.operands import Operands
from attnrt.report import text
from attnrt.request import AttentionRequest
from attnrt.settings import Settings

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run
    from attnrt.distributed.choice import ParallelDecision
    from attnrt.distributed.request import Method, ParallelRequest


@dataclass(frozen=True)
class Call:
    """What a rank was given: its shards, the optional tensors, and the options that every local call gets."""

    q: Tensor
    k: Tensor
    v: Tensor
    operands: Operands
    layout: str
    return_lse: bool
    passed: Mapping[str, Any]
    """softcap, scale, deterministic, backend, policy."""

    def rows(self, span: Span) -> Tensor:
        """Queries of a block."""
        return rows_of(self.q, span, self.layout)


@dataclass(eq=False)
class Plan:
    """One signature's choice and everything that follows from it; kept from call to call."""

    request: ParallelRequest
    decision: ParallelDecision
    method: Method
    group: ProcessGroup
    rank: int
    device: torch.device
    environment: Environment
    settings: Settings
    _offsets: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _kernels: dict[AttentionRequest, BlockKernel] = field(default_factory=dict)

    @cached_property
    def steps(self) -> tuple[tuple[Block, ...], ...]:
        """The ring's blocks by step."""
        ring = self.request.ring
        return tuple(ring.blocks(self.rank, step) for step in range(len(ring.offsets)))

    @cached_property
    def gathered(self) -> tuple[Block, ...]:
        return self.request.gather.blocks(self.rank)

    def offsets(self, numbers: tuple[int, ...]) -> Tensor:
        """cu_seqlens on the device, moved there once."""
        if numbers not in self._offsets:
            self._offsets[numbers] = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        return self._offsets[numbers]

    def choose(self, request: AttentionRequest) -> Decision:
        """The ordinary choice for a local kernel call."""
        return choose(request, self.environment, self.settings)

    def kernel(self, block: Block) -> BlockKernel:
        """The kernel of a ring's block."""
        request = self.request.by_block(block, "ring")
        if request not in self._kernels:
            self._kernels[request] = BlockKernel(self.choose(request))
        return self._kernels[request]


def choose(request: AttentionRequest, environment: Environment, settings: Settings) -> Decision:
    """The ordinary choice, for the shape that the local kernel will see."""
    if request.scores * 4 > runtime.BIG:
        environment = environment.with_free_memory()
    return runtime.choose(request, environment, settings)


class BlockKernel:
    """What was chosen for one kind of block, as functions that autograd does not see."""

    def __init__(self, decision: Decision) -> None:
        if decision.backend is None:
            raise BackendUnavailable(text(decision), decision)
        self.decision = decision
        backend = registry.backends()[decision.backend]
        self._kernel: Kernel = next((k for k in backend.kernels if k.name == decision.kernel), backend)

    @cached_property
    def _pair(self) -> tuple[Forward, Backward]:
        return self._kernel.pair(self.decision.request, self.decision.environment)

    @cached_property
    def _run(self) -> Run:
        return self._kernel.prepare(self.decision.request, self.decision.environment)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(out, lse, what the backward wants)."""
        if self.decision.request.lse_backward:
            found: tuple[Tensor, Tensor, tuple[Tensor, ...]] = self._guarded(lambda: self._pair[0](q, k, v, operands))
            return found
        out, lse = self._guarded(lambda: self._run(q, k, v, operands))
        return out, lse, ()

    def backward(self, *args: Any) -> Sequence[Tensor | None]:
        """See `Kernel.pair`."""
        found: Sequence[Tensor | None] = self._guarded(lambda: self._pair[1](*args))
        return found

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """A ring cannot go on with the next candidate: the other ranks would not know."""
        try:
            return run()
        except (AttnrtError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            label = self.decision.label
            raise BackendFailed(
                f"{label} failed in a ring: {type(error).__name__}: {error}; disable it on every rank to go on without",
                self.decision,
            ) from error


def rows_of(x: Tensor, span: Span, layout: str) -> Tensor:
    """A view of some tokens of a tensor in a layout."""
    axis = SEQUENCE[layout]
    return x if span == (0, x.shape[axis]) else x.narrow(axis, span.start, span.length)


def lse_rows(lse: Tensor, span: Span) -> Tensor:
    """The same of (B, H, S) or (H, T)."""
    return lse if span == (0, lse.shape[-1]) else lse.narrow(-1, span.start, span.length)


def lse_beside(lse: Tensor, layout: str) -> Tensor:
    """A view of the LSE with its dims in the order of an output in the layout."""
    match layout:
        case "bshd":
            return lse.transpose(1, 2)
        case "sbhd":
            return lse.permute(2, 0, 1)
        case "thd":
            return lse.mT
    return lse


def cut(call: Call, plan: Plan, block: Block) -> Operands:
    """The optional tensors as one block sees them."""
    o = call.operands

    def lengths(seqlens: Tensor | None, span: Span) -> Tensor | None:
        """How much of the block's rows is real."""
        return None if seqlens is None else (seqlens - span.start).clamp_(0, span.length)

    def rectangle(x: Tensor | None) -> Tensor | None:
        """Own rows, the whole sequence's keys."""
        if x is None:
            return None
        if x.ndim > 1 and x.shape[-2] > 1:
            x = x.narrow(-2, block.q.start, block.q.length)
        return x.narrow(-1, block.span_kv.start, block.span_kv.length) if x.ndim and x.shape[-1] > 1 else x

    return Operands(
        mask=rectangle(o.mask),
        bias=rectangle(o.bias),
        alibi_slopes=o.alibi_slopes,
        sinks=o.sinks,
        seqlens_q=lengths(o.seqlens_q, block.span_q),
        seqlens_kv=lengths(o.seqlens_kv, block.span_kv),
        cu_seqlens_q=None if block.cu_q is None else plan.offsets(block.cu_q),
        cu_seqlens_kv=None if block.cu_kv is None else plan.offsets(block.cu_kv),
    )


def attend(call: Call, plan: Plan, block: Block, k: Tensor, v: Tensor) -> Any:
    """One block by the public call: chosen, run, reported and differentiated like any other."""
    packed = call.layout == "thd"
    operands = cut(call, plan, block)._asdict()
    operands.pop("page_table", None)
    window = None if block.left is None and block.right in (None, 0) else (block.left, block.right)
    attend_now: Any = attention  # its overloads ask for a literal return_lse
    return attend_now(
        call.rows(block.q),
        k,
        v,
        layout=call.layout,
        causal=block.causal,
        window=window,
        alignment=plan.request.alignment(block),
        max_seqlen_q=_longest(block.cu_q) if packed else None,
        max_seqlen_kv=_longest(block.cu_kv) if packed else None,
        return_lse=call.return_lse,
        **operands,
        **call.passed,
    )


def _longest(offsets: tuple[int, ...] | None) -> int:
    assert offsets is not None
    return max(b - a for a, b in pairwise(offsets))
