"""PyTorch's math with TF32, wherever the tests run: the operands of every product are rounded first, as its CUDA
library does where the switch allows it. (That keeps exact products for some small ones, so it is no steady bar.)"""

from __future__ import annotations

from typing import Any

import torch
from oracle import Answers, Case, answer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ABSOLUTE = 1e-4
"""Error always allowed: a tenth of a rounding to TF32, for calls in which plain PyTorch happens to have none."""
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.mv.default,
    torch.ops.aten.dot.default,
}


def rounded(x: Tensor) -> Tensor:
    """To 10 bits after the point, half away from zero, in float32."""
    if x.dtype != torch.float32:
        return x
    kept = ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isfinite(), kept, x)


class RoundedProducts(TorchDispatchMode):
    """While it is open, float32 matrix products round their operands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(rounded(x) for x in args)
        elif func is torch.ops.aten.addmm.default:
            args = (args[0], rounded(args[1]), rounded(args[2]))
        return func(*args, **(kwargs or {}))


def answers(case: Case) -> Answers:
    """As `oracle.answers`, with TF32 in plain PyTorch."""
    truth = answer(case)
    with RoundedProducts():
        return truth, answer(case, case.q.dtype)
