"""The calls that the cuDNN benchmarks compare: ours, and PyTorch's under `sdpa_kernel(CUDNN_ATTENTION)`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnrt


def tensors(batch: int, heads: int, length: int, dim: int, training: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    size = (batch, heads, length, dim)
    made = [torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3)]
    return [x.requires_grad_(training) for x in made]


def ours(qkv: list[Tensor], causal: bool) -> Tensor:
    out = attnrt.attention(*qkv, causal=causal, backend="cudnn")
    assert isinstance(out, Tensor)
    return out


def theirs(qkv: list[Tensor], causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, is_causal=causal)


def device(index: int) -> Any:
    from attnrt.backends.cudnn.device import device

    return device(index)


def plans() -> Any:
    from attnrt.backends.cudnn.plans import PLANS

    return PLANS
