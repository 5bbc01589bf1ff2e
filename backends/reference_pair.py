"""The reference outside autograd: its backward starts from an output and LSE, so that they may come from elsewhere.

dS = P (dP - rowsum(dO O)) with P = exp(S - LSE); what leads from q, k and bias to the scores S is left to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends import reference
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward


def pair(r: AttentionRequest) -> tuple[Forward, Backward]:
    """The forward and backward of one request; see `Kernel.pair`."""

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with torch.no_grad(), _full_precision(q):
            out, lse = reference.attend(r, q, k, v, operands)
        return out, lse, ()

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
        with _full_precision(q):
            return _gradients(r, grad, (q, k, v), out, lse, operands, wanted)

    return forward, backward


def _full_precision(q: Tensor) -> Any:
    kind = q.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _gradients(
    r: AttentionRequest,
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    operands: Operands,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    wide = torch.float64 if r.dtype == "fp64" else torch.float32
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in tensors)
        bias = None if operands.bias is None else operands.bias.detach().requires_grad_(wanted[3])
        operands = operands._replace(bias=bias)
        (wide_q, wide_k, wide_v), len_q, len_kv = reference.inputs(r, q, k, v, operands)
        scores = reference.scores(r, wide_q.to(wide), wide_k.to(wide), operands, len_q, len_kv)
    sink = None if operands.sinks is None else operands.sinks.to(wide)[:, None]
    grad, out, lse = reference.rows(r, grad, out, lse, operands)
    total = lse.to(wide) if sink is None else torch.logaddexp(lse.to(wide), sink)
    total = total.masked_fill(lse == -math.inf, math.inf)  # so that exp(score - LSE) is 0
    probabilities = torch.exp(scores.detach() - total.unsqueeze(-1))
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    found: list[Tensor | None] = [None] * 5
    if sink is not None and wanted[4]:
        assert operands.sinks is not None
        found[4] = -(torch.exp(sink - total) * delta).sum((0, 2)).to(operands.sinks.dtype)
    group = (r.batch, r.heads_kv, r.group * r.seqlen_q)
    rows = grad.to(wide).reshape(*group, r.head_dim_v)
    d_values = torch.matmul(probabilities.reshape(*group, r.seqlen_kv).mT, rows)
    d_scores = torch.matmul(rows, wide_v.detach().to(wide).mT).reshape(scores.shape)
    d_scores = d_scores.sub_(delta.unsqueeze(-1)).mul_(probabilities)
    leaves = [q, k, *([bias] if bias is not None and wanted[3] else [])]
    from_scores = torch.autograd.grad(scores, leaves, d_scores, allow_unused=True)
    from_values = torch.autograd.grad(wide_v, v, d_values.to(wide_v.dtype), allow_unused=True)
    for i, part in zip((0, 1, 3), from_scores, strict=False):
        found[i] = part
    found[2] = from_values[0]
    return [*(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=False)), *found[3:]]
