"""Attention over a set of keys from attention over its parts, by their log-sum-exps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold one part into a running result, in place.

    Rows without a key in either are zeros with an LSE of -inf before and after; nothing turns into NaN.

    Args:
        out: (..., D) what was found so far, float32 (float64 for fp64). lse: (...), its natural log-sum-exp.
        part: (..., D) in any dtype. part_lse: (...).
    """
    top = torch.maximum(lse, part_lse)
    top = top.masked_fill_(top == -math.inf, 0.0)
    before, after = torch.exp(lse - top), torch.exp(part_lse - top)
    both = before + after  # 0 where there is no key at all
    lse.copy_(top + both.log())
    # Divided by their own sum, so that weights add up to 1 however large the LSEs are.
    both = both.masked_fill_(both == 0, 1.0)
    out.mul_((before / both).unsqueeze(-1)).addcmul_(part.to(out.dtype), (after / both).unsqueeze(-1).to(out.dtype))
