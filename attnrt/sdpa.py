"""What F.scaled_dot_product_attention means, in attention()'s words. dynamo reads this too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from attnrt import operators

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def against(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, gqa: Any) -> str | None:
    """Why attnrt cannot serve the call with PyTorch's meaning; None if it can. Also of calls that are plain wrong:
    PyTorch's own error is the right one for those."""
    for name, t in (("query", q), ("key", k), ("value", v), ("attn_mask", mask)):
        if type(t) not in _PLAIN and (t is not None or name != "attn_mask"):
            return f"{name} is a {type(t).__name__}, not a plain tensor"
        if isinstance(t, Tensor) and t.layout != torch.strided:
            return f"{name} is not a dense tensor"
    if not q.ndim == k.ndim == v.ndim or q.ndim < 2:
        return "query, key and value do not have the same number of dims, or fewer than 2"
    if type(is_causal) is not bool or type(gqa) is not bool or not (scale is None or type(scale) in (int, float)):
        return "is_causal, scale or enable_gqa is not a plain Python value"
    if scale is not None and not math.isfinite(scale):
        return "scale is not finite"
    if type(dropout_p) not in (int, float) or not 0 <= dropout_p < 1:
        return "dropout_p is not a number in [0, 1)"
    if mask is not None and is_causal:
        return "attn_mask comes together with is_causal, which PyTorch's versions take differently"
    if not torch.compiler.is_compiling():
        if operators.transform() is not None or torch.autograd.forward_ad._current_level >= 0:
            return "it is inside a torch.func transform or forward-mode differentiation"
        if torch._C._get_tracing_state() is not None:
            return "it is inside torch.jit.trace"
    autocast = _autocast_dtype(q.device.type)
    if autocast is None and not q.dtype == k.dtype == v.dtype:
        return "query, key and value do not have one dtype"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "query is not fp16, bf16, fp32 or fp64"
    if not q.device == k.device == v.device or (mask is not None and mask.device != q.device):
        return "the tensors are not on one device"
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or 0 in (q.shape[-1], v.shape[-1]):
        return "the head dims of query and key, or the lengths of key and value, do not fit together"
    return _heads_against(q, k, v, gqa) or _mask_against(q, k, v, mask, autocast)


def _heads_against(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> str | None:
    if q.ndim == 2:
        return "enable_gqa needs a dim of heads" if gqa else None
    heads, heads_k, heads_v = q.shape[-3], k.shape[-3], v.shape[-3]
    if 0 in (heads, heads_k, heads_v):
        return "there is no head"
    if gqa and (heads_k != heads_v or heads % heads_k != 0):
        return "the heads of key and value differ, or do not divide those of query"
    batches = (q.shape[:-3], k.shape[:-3], v.shape[:-3])
    widest = [max(sizes) for sizes in zip(*batches, strict=True)]
    for sizes in batches if gqa else ((*b, h) for b, h in zip(batches, (heads, heads_k, heads_v), strict=True)):
        want = widest if gqa else [*widest, max(heads, heads_k, heads_v)]
        for size, full in zip(sizes, want, strict=True):
            if size != 1 and size != full:
                return "the batch dims, or the heads without enable_gqa, do not broadcast"
    return None


def _mask_against(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, autocast: torch.dtype | None) -> str | None:
    if mask is None:
        return None
    if mask.ndim < 2 or mask.ndim > max(q.ndim, 4):
        return "attn_mask has fewer than 2 dims, or more than query"
    if mask.dtype != torch.bool and mask.dtype not in (q.dtype, torch.float32) and autocast is None:
        return "attn_mask is neither bool nor float32 nor of query's dtype"
    full = (*(max(sizes) for sizes in zip(q.shape[:-2], k.shape[:-2], v.shape[:-2], strict=True)),)
    full = (*full, q.shape[-2], k.shape[-2])
    full = (1,) * (mask.ndim - len(full)) + full
    for size, want in zip(mask.shape, full[len(full) - mask.ndim :], strict=True):
        if size != 1 and size != want:
            return "attn_mask is wider than query, key and value, or does not broadcast to the scores"
    return None


def four_dims(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, gqa: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k and v as (B, H, S, D), and the mask as attention's mask= or bias=. Only for calls with nothing `against`."""
    dims, batch = q.ndim, _batch(q, k, v)
    if dims > 2 and not gqa:
        heads = max(q.shape[-3], k.shape[-3], v.shape[-3])
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
        if not k.shape[-3] == v.shape[-3] == 1:  # one KV head for all is what attention() takes it for
            k, v = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (k, v))
    autocast = _autocast_dtype(q.device.type)
    doubles = torch.float64 in (q.dtype, None if mask is None else mask.dtype)
    q, k, v = (_flat(t, batch) for t in (q, k, v))
    if mask is None:
        return q, k, v, {}
    if mask.ndim > 4:
        mask = _flat(mask, batch)
    elif dims > 4 and mask.ndim == 4:
        mask = _flat(mask[None], batch)
    if mask.dtype == torch.bool:
        return q, k, v, {"mask": mask}
    return q, k, v, {"bias": mask if autocast is None or doubles else mask.to(autocast)}


def as_called(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention's output with the dims of the call."""
    dims = q.ndim
    if dims > 4:
        return out.reshape(*_batch(q, k, v), *out.shape[1:])
    return out if dims == 4 else out[0] if dims == 3 else out[0, 0]


def _batch(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    return [max(sizes) for sizes in zip(q.shape[:-3], k.shape[:-3], v.shape[:-3], strict=True)]


def _flat(x: Tensor, batch: list[int]) -> Tensor:
    """(..., H, S, D) with its batch dims broadcast to `batch` and made one; fewer dims are heads and lengths."""
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    x = x.expand(*batch, *x.shape[-3:])
    return x if x.ndim == 4 else x.flatten(0, -4)


def _autocast_dtype(kind: str) -> torch.dtype | None:
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def described(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, causal: Any, scale: Any, gqa: Any) -> str:
    tensors = {"query": q, "key": k, "value": v, "attn_mask": mask}
    words = [
        f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}".replace(", ", ",")
        for name, t in tensors.items()
        if isinstance(t, Tensor) and not t.is_nested
    ]
    options = {"dropout_p": dropout_p or None, "is_causal": causal or None, "scale": scale, "enable_gqa": gqa or None}
    return ", ".join(words + [f"{name}={value}" for name, value in options.items() if value is not None])
