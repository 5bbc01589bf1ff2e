"""What flash-attn 3 takes: Hopper only, as far as we support it."""

from __future__ import annotations

from attnrt.backends.base import Rule, between
from attnrt.backends.flash_attn.common import common
from attnrt.request import AttentionRequest

PACKAGE = "flash-attn-3"
_API = "flash-attn hopper/flash_api.cpp"


def _head_dims(r: AttentionRequest) -> bool:
    qk, v = r.head_dim_qk, r.head_dim_v
    return qk == v or (128 < qk <= 192 and 96 < v <= 128) or (qk <= 64 and v <= 512)


RULES = (
    *common(
        "FA3",
        "flash-attn 3",
        PACKAGE,
        "it is not on PyPI: build it from the hopper folder of github.com/Dao-AILab/flash-attention",
    ),
    Rule(
        "FA3_ARCH",
        lambda r, e: e.sm is not None and not between(e, 90, 100),
        "{e.arch} is not sm90 (H100, H200), the one flash-attn 3 was written for",
        source=_API,
    ),
    Rule(
        "FA3_HEAD_DIM",
        lambda r, e: r.head_dim_qk > 256 or (r.head_dim_v > 256 and r.head_dim_qk > 64),
        "head_dim {r.head_dim} is over 256, the most flash-attn 3 has kernels for where head_dim_qk is over 64",
        source=_API,
    ),
    Rule(
        "FA3_UNEQUAL_HEAD_DIMS",
        lambda r, e: not _head_dims(r),
        "head_dim {r.head_dim_qk}/{r.head_dim_v} is none of the unequal pairs it has: 129..192 with 97..128, or up to "
        "64 with up to 512",
        "pad the smaller with zeros to {r.head_dim}, pass scale=, and slice the output",
        _API,
    ),
    Rule(
        "FA3_HEAD_DIM_V_BWD",
        lambda r, e: r.needs_grad and r.head_dim_v > 256,
        "head_dim_v {r.head_dim_v} is over 256, the most flash-attn 3 has a backward for",
        source=_API,
    ),
    Rule(
        "FA3_DETERMINISTIC_HEAD_DIM",
        lambda r, e: r.needs_grad and r.deterministic and r.head_dim > 192,
        "head_dim {r.head_dim} is over 192, the most flash-attn 3 has a deterministic backward for",
        source=_API,
    ),
)
