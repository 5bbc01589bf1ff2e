"""What flash-attn 4 takes: kernels for sm8x (forward only), sm90, sm100 and sm12x, each with limits of its own.

Head dims are those that its kernels were compiled for without a GPU (4.0.0b36), which is less than its own check
lets through: on sm90 that accepts 64/256, which has no registers left.
"""

from __future__ import annotations

from math import ceil

from attnrt.backends.base import Rule, between, needs
from attnrt.backends.flash_attn.common import common
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

PACKAGE = "flash-attn-4"
_INSTALL = "pip install 'flash-attn-4==4.0.0b36' (every release is a pre-release, so the version must be named)"
_API = "flash-attn-4 4.0.0b36 cute/interface.py"
_COMPILED = "flash-attn-4 4.0.0b36, compiled for each arch"
_TE = "Transformer Engine attention utils"


def _datacenter(e: Environment) -> bool:
    """sm100, sm103 and sm110: the kernels with tensor memory."""
    return between(e, 100, 120)


def _small(e: Environment) -> bool:
    """sm8x and sm12x run sm80-style kernels; 99 KB of shared memory is what most of these GPUs have."""
    return between(e, 80, 90) or between(e, 120)


def _d256(r: AttentionRequest) -> bool:
    return (r.head_dim_qk, r.head_dim_v) == (256, 256)


def _d256_bwd(r: AttentionRequest, e: Environment) -> bool:
    return r.needs_grad and _d256(r) and _datacenter(e)


def _unequal(r: AttentionRequest) -> bool:
    return r.head_dim_qk != r.head_dim_v


RULES = (
    *common("FA4", "flash-attn 4", PACKAGE, _INSTALL),
    Rule(
        "FA4_ARCH",
        lambda r, e: e.sm is not None and not between(e, 80, 130),
        "{e.arch} is not one of sm80 to sm12x, which flash-attn 4 has kernels for",
        source=_API,
    ),
    Rule(
        "FA4_ARCH_BWD",
        lambda r, e: r.needs_grad and between(e, 80, 90),
        "flash-attn 4 has no backward on {e.arch}; sm90 is the first with one",
        source=_API,
    ),
    needs(
        "FA4_VERSION",
        PACKAGE,
        "4.0.0b36",
        lambda r, e: True,
        "the limits that our rules describe",
        remedy=_INSTALL,
        source="earlier betas read windows and head_dim 256 differently",
    ),
    Rule(
        "FA4_HEAD_DIM_SM90",
        lambda r, e: r.head_dim > 256 and between(e, 90, 100),
        "head_dim {r.head_dim} is over 256, the most flash-attn 4 has kernels for on {e.arch}",
        source=_API,
    ),
    Rule(
        "FA4_HEAD_DIM_SM100",
        lambda r, e: (
            _datacenter(e) and r.head_dim > 128 and (r.head_dim_qk, r.head_dim_v) not in ((192, 128), (256, 256))
        ),
        "head_dim {r.head_dim_qk}/{r.head_dim_v} on {e.arch} is over 128 and neither 192/128 nor 256/256",
        source=_API,
    ),
    Rule(
        "FA4_HEAD_DIM_SM80",
        lambda r, e: r.head_dim > 128 and _small(e),
        "head_dim {r.head_dim} is over 128, the most that is sure to fit the shared memory of {e.arch}",
        source="tile sizes of " + _API,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM90",
        lambda r, e: r.head_dim_qk <= 96 and r.head_dim_v > 192 and between(e, 90, 100),
        "head_dim_v {r.head_dim_v} is over 192, which with head_dim_qk {r.head_dim_qk} (up to 96) has no registers "
        "left on {e.arch}",
        "pad q and k with zeros to 128, and pass scale=",
        _COMPILED,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM90_BWD",
        lambda r, e: r.needs_grad and _unequal(r) and r.head_dim_v not in (64, 128) and between(e, 90, 100),
        "the backward on {e.arch} compiles for a head_dim_v other than head_dim_qk if it is 64 or 128, not "
        "{r.head_dim_v}",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        _COMPILED,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM100_BWD",
        lambda r, e: (
            r.needs_grad
            and _unequal(r)
            and r.head_dim_qk == r.head_dim == 128
            and ceil(r.head_dim_v / 16) * 16 % 64 != 0
            and _datacenter(e)
        ),
        "the backward on {e.arch} with head_dim 128/{r.head_dim_v} is one that Transformer Engine refuses: head_dim_v, "
        "rounded up to 16, is no multiple of 64",
        "pad v with zeros to 128, and slice the output",
        _TE,
    ),
    Rule(
        "FA4_GQA_HEAD_DIM_V_BWD",
        lambda r, e: r.needs_grad and _unequal(r) and r.heads_q != r.heads_kv and between(e, 90, 100),
        "the backward on {e.arch} with {r.heads_q} query and {r.heads_kv} KV heads needs equal head dims, not "
        "{r.head_dim_qk}/{r.head_dim_v}",
        "pad v with zeros to {r.head_dim_qk}, and slice the output",
        _API,
    ),
    Rule(
        "FA4_SOFTCAP_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.softcap is not None,
        "the backward for head_dim 256 on {e.arch} does not take softcap ({r.softcap:g})",
        source=_API,
    ),
    Rule(
        "FA4_WINDOW_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.windowed,
        "the backward for head_dim 256 on {e.arch} does not take a window",
        source=_COMPILED,
    ),
    Rule(
        "FA4_LENGTHS_256",
        lambda r, e: _d256(r) and r.seqlen_q != r.seqlen_kv and _datacenter(e),
        "head_dim 256 on {e.arch} is for Sq = Skv; here Sq={r.seqlen_q} and Skv={r.seqlen_kv}",
        source=_TE,
    ),
    Rule(
        "FA4_SINKS_ARCH",
        lambda r, e: r.sinks and _small(e),
        "the kernel for {e.arch} has no attention sinks; those for sm90 to sm110 do",
        source=_COMPILED,
    ),
    Rule(
        "FA4_SINKS_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.sinks,
        "the backward for head_dim 256 on {e.arch} does not take attention sinks",
        source=_API,
    ),
    Rule(
        "FA4_DETERMINISTIC_SM120",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 120, 130),
        "flash-attn 4 has no deterministic backward on {e.arch}",
        source=_API,
    ),
)
