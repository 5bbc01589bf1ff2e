"""cuDNN's and the memory-efficient kernel's forward and backward as plain functions, by PyTorch's operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt.backends.torch_sdpa.layouts import as_bhsd, from_bhsd
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward

LSE_ROWS = 32
"""The memory-efficient backward reads the LSE in whole vectors of rows."""


def cudnn_pair(r: AttentionRequest) -> tuple[Forward, Backward]:
    """See `Kernel.pair`. The kernel's LSE is (B, H, Sq, 1)."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    differentiate = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v = (as_bhsd(t, r.layout) for t in (q, k, v))
        found = attend(q, k, v, None, True, r.dropout_p, r.is_causal, False, scale=r.scale)
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        return from_bhsd(out, r.layout), lse.view(q.shape[:3]), (seed, offset)

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extra: tuple[Tensor, ...],
        operands: Operands,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        grad, q, k, v, out = (as_bhsd(t, r.layout) for t in (grad, q, k, v, out))
        lse = lse.contiguous().unsqueeze(-1)
        lengths = None, None, r.seqlen_q, r.seqlen_kv
        grads = differentiate(grad, q, k, v, out, lse, *extra, None, *lengths, r.dropout_p, r.is_causal, scale=r.scale)
        return [*(from_bhsd(t, r.layout) for t in grads), None, None]

    return forward, backward


def efficient_pair(r: AttentionRequest) -> tuple[Forward, Backward]:
    """See `Kernel.pair`. Without mask and bias, which have no LSE here."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
    differentiate = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (as_bhsd(t, r.layout) for t in (q, k, v))
        if r.group > 1:
            k, v = k.repeat_interleave(r.group, 1), v.repeat_interleave(r.group, 1)
        return q, k, v

    def summed(x: Tensor) -> Tensor:
        """(B, Hq, S, D) over the query heads that share a KV head."""
        if r.group == 1:
            return x
        grouped: Tensor = x.unflatten(1, (r.heads_kv, r.group))
        return grouped.sum(2, dtype=torch.float32).to(x.dtype)

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse, seed, offset = attend(*repeated(q, k, v), None, True, r.dropout_p, r.is_causal, scale=r.scale)
        return from_bhsd(out, r.layout), lse[..., : r.seqlen_q], (seed, offset)

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extra: tuple[Tensor, ...],
        operands: Operands,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        grad, out = as_bhsd(grad, r.layout), as_bhsd(out, r.layout)
        # The kernel has no stride for the rows of `out`: it takes them for its own forward's, all heads of one in turn.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        q, k, v = repeated(q, k, v)
        lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=math.inf)
        mask = [True, True, True, False]
        dq, dk, dv, _ = differentiate(
            grad, q, k, v, None, out, lse, *extra, r.dropout_p, mask, r.is_causal, scale=r.scale
        )
        return [*(from_bhsd(t, r.layout) for t in (dq, summed(dk), summed(dv))), None, None]

    return forward, backward
