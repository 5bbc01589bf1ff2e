"""PyTorch's math kernel: plain matrix products and a softmax, on any device, with the whole score matrix in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends.base import FEATURE_NAMES, Kernel, Rule
from attnrt.backends.torch_sdpa.layouts import TORCH_DTYPES, as_bhsd, from_bhsd
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run

FORWARD_SCORES = 2
"""Score-sized tensors alive at the peak of a forward: the scores and the probabilities made from them."""
BACKWARD_SCORES = 3
"""... of a backward: the saved probabilities, their gradient and the scores' gradient."""


class Math(Kernel):
    name = "math"
    title = "PyTorch's math kernel"
    prefix = "TORCH_MATH"
    fused = False
    supports = FEATURE_NAMES - {
        "alibi",
        "bottom_right",
        "empty",
        "lse",
        "packed",
        "padding",
        "sinks",
        "softcap",
        "window",
    }
    rules = (
        Rule(
            "TORCH_MATH_DTYPE",
            lambda r, e: r.dtype.startswith("fp8"),
            "PyTorch's math kernel does not take {r.dtype}",
            remedy="cast q, k and v to bf16",
        ),
    )

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Quadratic: scores, probabilities and what dropout keeps, float32 for 16-bit inputs; and linear copies."""
        r = request
        wide = max(4, r.itemsize)
        if r.needs_grad:
            return r.scores * wide * (BACKWARD_SCORES + (r.dropout_p > 0)) + _linear(r, wide)
        made = [o.elements for o in (r.mask, r.bias) if o is not None and (o is r.mask or r.mask or r.is_causal)]
        added = max(made, default=0)
        return r.scores * wide * (FORWARD_SCORES + (r.dropout_p > 0)) + added * wide + _linear(r, wide)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        said = [f"holds the score matrix: {request.scores * max(4, request.itemsize):,} bytes, more than once"]
        if request.group > 1:
            said.append(f"repeats k and v {request.group} times: a linear copy")
        return tuple(said)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        r = request
        attend = torch.ops.aten._scaled_dot_product_attention_math
        causal, dtype, layout = r.is_causal, TORCH_DTYPES[r.dtype], r.layout
        combined = r.mask is not None or r.bias is not None

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            added = additive_mask(r, operands, dtype, q.device) if combined else None
            out, _ = attend(
                as_bhsd(q, layout),
                as_bhsd(k, layout),
                as_bhsd(v, layout),
                added,
                r.dropout_p,
                causal and not combined,
                None,
                scale=r.scale,
                enable_gqa=r.group > 1,
            )
            return from_bhsd(out, layout)

        return run


def additive_mask(r: AttentionRequest, operands: Operands, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask, bias and a plain top-left causal mask as one bias, as small as broadcasting allows; the bias keeps its
    gradient."""
    hidden = None if operands.mask is None else ~operands.mask
    if r.is_causal:
        future = torch.ones(r.seqlen_q, r.seqlen_kv, dtype=torch.bool, device=device).triu_(1)
        hidden = future if hidden is None else hidden | future
    if operands.bias is None:
        assert hidden is not None
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    bias = operands.bias.to(dtype)
    return bias if hidden is None else torch.where(hidden, -math.inf, bias)


def _linear(r: AttentionRequest, wide: int) -> int:
    """Scaled copies of q and k, v if it is cast, repeated KV heads, the output; for a backward their gradients."""
    q, k = r.tokens_q * r.heads_q * r.head_dim_qk, r.tokens_kv * r.heads_q * r.head_dim_qk
    v, out = r.tokens_kv * r.heads_q * r.head_dim_v, r.tokens_q * r.heads_q * r.head_dim_v
    total = (q + k) * wide + (v * wide if wide != r.itemsize else 0) + out * (wide + r.itemsize)
    return total + (q + k + v) * wide if r.needs_grad else total
