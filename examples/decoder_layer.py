"""The attention calls of a decoder layer, on whatever is here: what ran, how right it is, and why it was chosen.

Prefill, one decode step and a padded batch, for multi-head, grouped-query and multi-query attention. Each output is
compared with the same formula in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import attnrt

BATCH, HEADS, HEAD_DIM, PROMPT = 2, 8, 64, 192


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, bottom-right causal, layout (B, H, S, D)."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    columns = torch.arange(k.shape[2], device=q.device)
    seen = columns <= rows if causal else torch.ones_like(scores[0, 0], dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        seen = seen & real[:, None, None, :] & real[:, None, :, None]
    dead = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -math.inf).masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
    return weights @ v


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"attnrt {attnrt.__version__} on {attnrt.Environment.detect(device).name}, {dtype}\n")
    worst = 0.0
    for kind, heads_kv in (("MHA", HEADS), ("GQA", HEADS // 4), ("MQA", 1)):

        def tensor(heads: int, length: int) -> Tensor:
            return torch.randn(BATCH, heads, length, HEAD_DIM, device=device, dtype=dtype)

        cache_k, cache_v = tensor(heads_kv, PROMPT + 1), tensor(heads_kv, PROMPT + 1)
        q, k, v = tensor(HEADS, PROMPT), cache_k[:, :, :PROMPT], cache_v[:, :, :PROMPT]
        step = tensor(HEADS, 1)
        lengths = torch.tensor([PROMPT, PROMPT // 3], dtype=torch.int32, device=device)
        calls = {
            "prefill, causal": (
                attnrt.attention(q, k, v, causal=True),
                exact(q, k, v, causal=True),
                attnrt.last_decision(),
            ),
            "decode, one token": (
                attnrt.attention(step, cache_k, cache_v, causal=True, alignment="bottom_right"),
                exact(step, cache_k, cache_v, causal=True),
                attnrt.last_decision(),
            ),
            "padded batch, causal": (
                attnrt.attention(q, k, v, causal=True, seqlens_q=lengths, seqlens_kv=lengths),
                exact(q, k, v, causal=True, lengths=lengths),
                attnrt.last_decision(),
            ),
        }
        for name, (got, want, decision) in calls.items():
            assert decision is not None
            error = float((got.double() - want).abs().max())
            worst = max(worst, error / torch.finfo(dtype).eps)
            print(f"{'=' * 100}\n{kind} {name}: ran {decision.label}, largest error against float64 {error:.2g}\n")
            print(decision, "\n")
    limit = 64
    print(f"{'=' * 100}\nworst error {worst:.1f} units of {dtype} rounding: {'agrees' if worst < limit else 'WRONG'}")
    if worst >= limit:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
