"""Attention layers written again with matrix products, in float64: what the modules are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnrt.nn import AttentionConfig


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """(S, H, D) queries, (T, G, D) keys and values, seen (S, T) bool: (S, H * D). Rows that see nothing are zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    dead = ~seen.any(-1)
    weights = scores.masked_fill(~seen, -math.inf).masked_fill(dead[:, None], 0).softmax(-1)
    out = torch.einsum("hst,thd->shd", weights, v).masked_fill(dead[:, None, None], 0)
    return out.flatten(1)


def causal(length: int, keys: int | None = None, left: int | None = None) -> Tensor:
    keys = length if keys is None else keys
    distance = torch.arange(keys) - (torch.arange(length)[:, None] + keys - length)
    return (distance <= 0) & (distance >= (-keys if left is None else -left))


def turned(x: Tensor, positions: Tensor, config: AttentionConfig) -> Tensor:
    """(S, H, D) with the rotary embedding, as complex numbers."""
    dim = config.rotary_dim
    angles = positions[:, None].double() / config.rotary_base ** (torch.arange(0, dim, 2).double() / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    head, rest = x[..., :dim], x[..., dim:]
    if config.rotary_interleaved:
        pairs = torch.complex(head[..., 0::2], head[..., 1::2]) * turn
        out = torch.stack((pairs.real, pairs.imag), -1).flatten(-2)
    else:
        pairs = torch.complex(head[..., : dim // 2], head[..., dim // 2 :]) * turn
        out = torch.cat((pairs.real, pairs.imag), -1)
    return torch.cat((out, rest), -1)


def separate(weight: Tensor, config: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a fused projection, group by group: the group's queries, its key, its value."""
    dim, per = config.head_dim, config.heads_per_group
    q, k, v = [], [], []
    for g in range(config.groups):
        rows = weight[g * (per + 2) * dim : (g + 1) * (per + 2) * dim]
        q.append(rows[: per * dim])
        k.append(rows[per * dim : (per + 1) * dim])
        v.append(rows[(per + 1) * dim :])
    return torch.cat(q), torch.cat(k), torch.cat(v)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def self_attention(x: Tensor, state: dict[str, Tensor], config: AttentionConfig, seen: Tensor) -> Tensor:
    """One sequence (S, hidden) through a fused layer's weights."""
    parts = separate(state["linear_qkv.weight"], config)
    q, k, v = (x @ w.T for w in parts)
    if "linear_qkv.bias" in state:
        q, k, v = (t + b for t, b in zip((q, k, v), separate(state["linear_qkv.bias"], config), strict=True))
    q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
    if config.qk_layernorm:
        q = rms(q, state["q_layernorm.weight"], config.layernorm_epsilon)
        k = rms(k, state["k_layernorm.weight"], config.layernorm_epsilon)
    if config.position_embedding_type == "rope":
        positions = torch.arange(len(x))
        q, k = turned(q, positions, config), turned(k, positions, config)
    out = attend(q, k, v, seen, config.softmax_scale) @ state["linear_proj.weight"].T
    return out + state["linear_proj.bias"] if "linear_proj.bias" in state else out
