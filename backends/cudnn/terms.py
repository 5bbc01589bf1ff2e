"""What cuDNN's rules are said in: where they come from, and conditions that several of them share."""

from __future__ import annotations

from collections.abc import Callable

from attnrt.backends.base import Rule, between, needs
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

LIBRARY, FRONTEND = "cudnn", "nvidia-cudnn-frontend"
SURFACE = "cudnn-frontend SDPA support surface"
ENGINE = "cuDNN 9.19 support check"
TE = "Transformer Engine fused_attn.cpp"
MEASURED = "tests/gpu/test_cudnn.py with cuDNN 9.19 on an H200"


def library_needs(
    id: str, at_least: str, used: Callable[[AttentionRequest, Environment], bool], what: str, source: str = SURFACE
) -> Rule:
    remedy = f"pip install 'nvidia-cudnn-cu13>={at_least}' (-cu12 if torch is built for CUDA 12)"
    return needs(id, LIBRARY, at_least, used, what, remedy, source)


def ampere_class(e: Environment) -> bool:
    """sm8x, and sm12x, which runs the same engines."""
    return between(e, 80, 90) or between(e, 120)


def bottom_right(r: AttentionRequest) -> bool:
    return r.alignment == "bottom_right" and r.banded


def own_lengths(r: AttentionRequest) -> bool:
    """Each sequence has its own length, so cuDNN applies its padding mask."""
    return r.padded or r.packed


def one_query(r: AttentionRequest) -> bool:
    """The graph has one query, and so kernels of its own: not where lengths are in buckets (layouts.shape_of)."""
    return r.seqlen_q == 1 and not r.packed and not (r.padded and r.needs_grad)


def whole_blocks(r: AttentionRequest) -> bool:
    return r.seqlen_q % 64 == 0 and r.seqlen_kv % 64 == 0


def bias_grad(r: AttentionRequest) -> bool:
    return r.bias is not None and r.bias.requires_grad


def forward_256(r: AttentionRequest, e: Environment) -> bool:
    """Dims up to 256 on sm90, which came earlier than large dims elsewhere."""
    return between(e, 90, 100) and r.head_dim <= 256


def mla(r: AttentionRequest) -> bool:
    return (r.head_dim_qk, r.head_dim_v) == (192, 128)


def d256(r: AttentionRequest) -> bool:
    return (r.head_dim_qk, r.head_dim_v) == (256, 256)


def has_backward(r: AttentionRequest, e: Environment) -> bool:
    return (
        r.head_dim <= 128
        or (r.head_dim <= 256 and between(e, 90, 100))
        or (mla(r) and between(e, 100, 120))
        or (d256(r) and between(e, 100, 110))
    )


def backward_256(r: AttentionRequest, e: Environment) -> bool:
    return r.needs_grad and d256(r) and between(e, 100, 110)


def last_offset(r: AttentionRequest) -> int:
    """The last element offset into a packed tensor."""
    return max(r.tokens_q * r.heads_q, r.tokens_kv * r.heads_kv) * r.head_dim
