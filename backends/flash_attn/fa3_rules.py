"""What flash-attn 3 takes: Hopper only, as far as we support it."""

from __future__ import annotations

from attnrt.backends.base import Rule, between, needs
from attnrt.backends.flash_attn.common import common
from attnrt.request import AttentionRequest

PACKAGE = "flash-attn-3"
_API = "flash-attn hopper/flash_api.cpp"


def _head_dims(r: AttentionRequest) -> bool:
    qk, v = r.head_dim_qk, r.head_dim_v
    return qk == v or (128 < qk <= 192 and 96 < v <= 128) or (qk <= 64 and v <= 512)


def tile(r: AttentionRequest) -> tuple[int, int]:
    """Queries and keys in a tile of the forward."""
    dim, dim_v, local = r.head_dim_qk, r.head_dim_v, r.windowed
    if dim <= 64 and dim_v > 256:
        return 64, 64
    if dim <= 64 and dim_v > 128:
        return 128, 96
    if dim <= 64:
        return 192, 128 if r.banded else 192
    if dim <= 96:
        return 192, 128 if local else 144
    if dim <= 128:
        return 128, 128 if r.banded else 176
    if dim <= 192:
        return 128, 96 if local else 128 if dim_v <= 128 else 112
    return 128, 64 if local else 80


def by_whole_tiles(r: AttentionRequest) -> bool:
    """Keys of a KV cache come in whole tiles, not row by row."""
    queries, keys = tile(r)
    return (r.page_size or r.seqlen_kv) % keys == 0 and r.seqlen_q * r.group > queries


RULES = (
    *common(
        "FA3",
        "flash-attn 3",
        PACKAGE,
        "it is not on PyPI: build it from the hopper folder of github.com/Dao-AILab/flash-attention",
        "4",
    ),
    needs(
        "FA3_VERSION",
        PACKAGE,
        "3.0.0b1",
        lambda r, e: True,
        "flash-attn 3, whose first it is",
        "pull and build the hopper folder of github.com/Dao-AILab/flash-attention again",
        "flash-attn hopper/setup.py",
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
        "FA3_PAGED_TILE",
        lambda r, e: r.padded_kv and by_whole_tiles(r),
        "{r.seqlen_q} queries over {r.group} heads a KV head fill a tile, and the pages (or the cache) are whole tiles "
        "of keys, so these are fetched whole: what stands past a sequence's end would reach the output if it is NaN",
        "pack the sequences: layout='thd' with cu_seqlens_q= and cu_seqlens_kv=",
        "flash-attn hopper/flash_api.cpp get_pagedkv_tma",
    ),
    Rule(
        "FA3_DETERMINISTIC_HEAD_DIM",
        lambda r, e: r.needs_grad and r.deterministic and r.head_dim > 192,
        "head_dim {r.head_dim} is over 192, the most flash-attn 3 has a deterministic backward for",
        source=_API,
    ),
)
