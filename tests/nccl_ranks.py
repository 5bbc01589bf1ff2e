"""What ranks do in tests/gpu/test_distributed.py, each on a GPU of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from oracle import ABSOLUTE

import attnrt
from attnrt.distributed import RanksDisagree, context_parallel_attention, shard

CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (300, 0)},
    "memory-efficient": {"backend": "torch"},
}
DTYPES = {"memory-efficient": torch.float32}
"""The only fused kernel of PyTorch that takes it. Otherwise bfloat16."""


def run_all() -> dict[Any, dict[str, tuple[float, float]]]:
    """(call, method, placement) to, for each result, (largest error, what is allowed) against one device in float64."""
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for name, options in CALLS.items():
        torch.manual_seed(0)
        whole = [torch.randn(2, h, 2048, 64, device="cuda", dtype=torch.float64) for h in (8, 4, 4, 8)]
        dtype, math = DTYPES.get(name, torch.bfloat16), options | {"backend": "reference"}
        exact, plain = (results(whole, d, math) for d in (torch.float64, dtype))
        for method in ("gather", "ulysses", "ring"):
            for placement in ("contiguous", "zigzag"):

                def own(x: torch.Tensor, placement: str = placement) -> torch.Tensor:
                    return shard(x, group, 2, placement)

                q, k, v = (own(t.to(dtype)).contiguous().requires_grad_() for t in whole[:3])
                out = context_parallel_attention(q, k, v, mesh=group, method=method, placement=placement, **options)
                grads = torch.autograd.grad(out, (q, k, v), own(whole[3].to(dtype)))
                errors = {}
                for result, got in zip(("out", "q", "k", "v"), (out, *grads), strict=True):
                    want, usual = own(exact[result]), own(plain[result])
                    error = float((got.double() - want).abs().max())
                    least = ABSOLUTE[dtype] * max(1.0, float(want.abs().max()))
                    allowed = 2 * float((usual.double() - want).abs().max()) + least
                    errors[result] = (error, allowed)
                found[name, method, placement] = errors
    return found


def results(whole: list[torch.Tensor], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole call on one device, by the reference."""
    q, k, v = (t.to(dtype).requires_grad_() for t in whole[:3])
    out = attnrt.attention(q, k, v, **options)
    grads = torch.autograd.grad(out, (q, k, v), whole[3].to(dtype))
    return dict(zip(("out", "q", "k", "v"), (out.detach(), *grads), strict=True))


def differ() -> str:
    """Rank 1 asks for something else: what the error says."""
    group = dist.group.WORLD
    assert group is not None
    q, k, v = (torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    try:
        context_parallel_attention(q, k, v, mesh=group, causal=group.rank() == 0)
    except RanksDisagree as error:
        return str(error)
    return ""
