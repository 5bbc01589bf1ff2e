"""The four layouts as views of (B, H, S, D), and back."""

from __future__ import annotations

import torch
from torch import Tensor

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def as_bhsd(x: Tensor, layout: str) -> Tensor:
    """A view as (B, H, S, D); a packed (T, H, D) becomes one row of T tokens, (1, H, T, D)."""
    match layout:
        case "bshd":
            return x.transpose(1, 2)
        case "sbhd":
            return x.permute(1, 2, 0, 3)
        case "thd":
            return x.transpose(0, 1).unsqueeze(0)
    return x


def from_bhsd(x: Tensor, layout: str) -> Tensor:
    """The view in the layout, of (B, H, S, D)."""
    match layout:
        case "bshd":
            return x.transpose(1, 2)
        case "sbhd":
            return x.permute(2, 0, 1, 3)
        case "thd":
            return x.squeeze(0).transpose(0, 1)
    return x


def four_dims(x: Tensor) -> Tensor:
    """A mask or bias with ones put on the left until it has four dims."""
    return x.view((1,) * (4 - x.ndim) + tuple(x.shape)) if x.ndim < 4 else x
