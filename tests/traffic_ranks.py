"""What ranks do in tests/distributed/test_cost.py: count what collectives receive, and what is allocated."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from running import peak_bytes
from scenarios import SCENARIOS, SEQUENCE, Scenario, cut
from torch.utils._python_dispatch import TorchDispatchMode

from attnrt.distributed import context_parallel_attention, last_decision
from attnrt.distributed.cost import held, received

WATCHED = (
    "full",
    "causal gqa bshd",
    "causal mqa sbhd",
    "uneven full gqa",
    "left window",
    "two-sided window",
    "uneven window",
    "cross full",
    "packed causal gqa",
    "packed left window",
    "inference",
    "float64",
    "bf16",
)


def everything(length: int) -> dict[str, Any]:
    return {"count": count(), "peaks": peaks(length)}


class Counter(TorchDispatchMode):
    """Bytes that reach this rank from others, by the arguments of torch's own operators."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.ranks, self.rank, self.bytes = ranks, rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name == "_c10d_functional::all_gather_into_tensor":
            self.bytes += args[0].nbytes * (self.ranks - 1)
        elif name == "_c10d_functional::reduce_scatter_tensor":
            self.bytes += args[0].nbytes * (self.ranks - 1) // self.ranks
        elif name == "_c10d_functional::all_to_all_single":
            others = sum(n for source, n in enumerate(args[1]) if source != self.rank)
            self.bytes += others * args[0].element_size()
        elif name == "c10d::recv_":
            self.bytes += sum(t.nbytes for t in args[0])
        elif name.startswith(("c10d::", "_c10d_functional::")):
            known = ("allgather_", "send", "wait_tensor", "barrier", "_wrap_tensor_autograd")
            assert name.partition("::")[2] in known, f"{name} is not counted"
        return found


def count() -> dict[Any, Any]:
    """(scenario, method, placement) -> (bytes forward, backward), counted and by the formula."""
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    found = {}
    for scenario in SCENARIOS:
        if scenario.name not in WATCHED:
            continue
        for placement in scenario.placements:
            for method in ("gather", "ulysses", "ring"):
                q, k, v, case, grad = tensors(scenario, placement, ranks, rank)
                given = dict(case.operands._asdict())
                given.pop("page_table", None)
                options = {"mesh": group, "method": method, "placement": placement, "layout": case.layout}
                with Counter(ranks, rank) as forward:
                    out = context_parallel_attention(q, k, v, **options, **given, **case.options)
                with Counter(ranks, rank) as backward:
                    if out.requires_grad:
                        torch.autograd.backward(out, grad)
                decision = last_decision()
                assert decision is not None
                said = received(decision.request, method, rank)  # type: ignore[arg-type]
                found[scenario.name, method, placement] = ((forward.bytes, backward.bytes), said)
    return found


def tensors(scenario: Scenario, placement: str, ranks: int, rank: int) -> Any:
    case = scenario.whole()
    axis = SEQUENCE[case.layout]
    placed_q = scenario.placed(placement, ranks, case.q.shape[axis])
    placed_kv = scenario.placed(placement, ranks, case.k.shape[axis])
    q = cut(case.q.detach(), axis, placed_q, rank).requires_grad_(case.q.requires_grad)
    k, v = (cut(x.detach(), axis, placed_kv, rank).requires_grad_(x.requires_grad) for x in (case.k, case.v))
    assert case.grad is not None
    return q, k, v, case, cut(case.grad, axis, placed_q, rank)


def peaks(length: int) -> dict[Any, Any]:
    """(method, placement, training) -> (bytes measured beyond the shards, bytes by the formula)."""
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for placement in ("contiguous", "zigzag"):
        for training in (False, True):
            for method in ("gather", "ulysses", "ring"):
                torch.manual_seed(group.rank())
                q = torch.randn(1, 12, length // group.size(), 64, requires_grad=training)
                k, v = (torch.randn(1, 6, length // group.size(), 64, requires_grad=training) for _ in range(2))

                def once(q: Any = q, k: Any = k, v: Any = v, method: str = method, placement: str = placement) -> Any:
                    out = context_parallel_attention(
                        q, k, v, mesh=group, method=method, placement=placement, causal=True
                    )
                    if not q.requires_grad:
                        return out
                    return out, torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

                once()
                decision = last_decision()
                assert decision is not None
                workspace = max(d.winner.bytes for d in decision.local.values() if d.winner)
                said = held(decision.request, method, group.rank(), workspace)  # type: ignore[arg-type]
                found[method, placement, training] = (median(settled(once) for _ in range(3)), said)
    return found


def settled(call: Any) -> int:
    """`peak_bytes` once gloo's threads have let go of the buffers of the call before."""
    gc.collect()
    dist.barrier()
    time.sleep(0.02)
    return peak_bytes(call)
