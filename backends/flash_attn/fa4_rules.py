"""What flash-attn 4 takes: kernels for sm8x (forward only), sm90, sm100 and sm12x, each with limits of its own.

Head dims are those that its kernels were compiled for without a GPU (4.0.0b36), which is less than its own check
lets through: on sm90 that accepts 64/256, which has no registers left.
"""

from __future__ import annotations

from math import gcd

from attnrt.backends.base import Rule, between, needs
from attnrt.backends.flash_attn import fa4_sm90
from attnrt.backends.flash_attn.common import common
from attnrt.backends.flash_attn.fa4_sm90 import up
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

PACKAGE = "flash-attn-4"
_INSTALL = "pip install 'flash-attn-4==4.0.0b36' (every release is a pre-release, so the version must be named)"
API = "flash-attn-4 4.0.0b36 cute/interface.py"
COMPILED = "flash-attn-4 4.0.0b36, compiled for each arch"
_PAGED = "flash-attn-4 4.0.0b36 cute/paged_kv.py, and the machine code that it gives for sm90a"
_SM100_BWD = "flash-attn-4 4.0.0b36 cute/flash_bwd_sm100.py, epilogue_dK_or_dV_tma; not seen on a GPU"
_SM90 = "flash-attn-4 4.0.0b36 cute/flash_fwd_sm90.py and flash_bwd_sm90.py; seen on an H200, 2026-11-28"
BETAS = "<4.0.0rc1"
"""Versions with the limits of `fa4_sm90`. No beta up to 4.0.0b36 is without; narrow it when one is."""
_DQ = "https://github.com/Dao-AILab/flash-attention/pull/2896, not merged yet; seen on an H200, 4.0.0b36, 2026-11-28"
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


def _fits_sm90_bwd(dim: int, dim_v: int) -> bool:
    """Whether the sm90 backward has a layout for these. The gradient of the output lies in shared memory in columns of
    64, 32 or 16, as head_dim_qk allows; over 192, two warpgroups share the gradient of v, 64 columns each at a time.
    """
    if dim <= 128:
        return up(dim_v, 16) % next(width for width in (64, 32, 16) if up(dim, 16) % width == 0) == 0
    return dim <= 192 or up(dim_v, 64) % 128 == 0


def _half(head_dim: int) -> int:
    """Columns of a gradient that one of the two warpgroups of the sm100 backward writes."""
    return up(head_dim, 32) // 2


def _piece(head_dim: int) -> int:
    """Of these, how many at a time."""
    return gcd(32, _half(head_dim))


def _unequal(r: AttentionRequest) -> bool:
    return r.head_dim_qk != r.head_dim_v


def tile_n(r: AttentionRequest, e: Environment) -> int:
    """Keys in a tile of the forward."""
    return fa4_sm90.tile_n(r) if between(e, 90, 100) else 128


def _no_registers(r: AttentionRequest, e: Environment) -> bool:
    return r.head_dim_qk <= 96 and r.head_dim_v > 192 and between(e, 90, 100)


def _sm90(r: AttentionRequest, e: Environment) -> bool:
    """The kernels of `fa4_sm90`, as far as they compile, in a version that has their defects."""
    return between(e, 90, 100) and e.has(PACKAGE, BETAS) and r.head_dim <= 256 and not _no_registers(r, e)


RULES = (
    *common("FA4", "flash-attn 4", PACKAGE, _INSTALL, "5"),
    Rule(
        "FA4_ARCH",
        lambda r, e: e.sm is not None and not between(e, 80, 130),
        "{e.arch} is not one of sm80 to sm12x, which flash-attn 4 has kernels for",
        source=API,
    ),
    Rule(
        "FA4_ARCH_BWD",
        lambda r, e: r.needs_grad and between(e, 80, 90),
        "flash-attn 4 has no backward on {e.arch}; sm90 is the first with one",
        source=API,
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
        source=API,
    ),
    Rule(
        "FA4_HEAD_DIM_SM100",
        lambda r, e: (
            _datacenter(e) and r.head_dim > 128 and (r.head_dim_qk, r.head_dim_v) not in ((192, 128), (256, 256))
        ),
        "head_dim {r.head_dim_qk}/{r.head_dim_v} on {e.arch} is over 128 and neither 192/128 nor 256/256",
        source=API,
    ),
    Rule(
        "FA4_HEAD_DIM_SM80",
        lambda r, e: r.head_dim > 128 and _small(e),
        "head_dim {r.head_dim} is over 128, the most that is sure to fit the shared memory of {e.arch}",
        source="tile sizes of " + API,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM90",
        _no_registers,
        "head_dim_v {r.head_dim_v} is over 192, which with head_dim_qk {r.head_dim_qk} (up to 96) has no registers "
        "left on {e.arch}",
        "pad q and k with zeros to 128, and pass scale=",
        COMPILED,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM90_BWD",
        lambda r, e: r.needs_grad and between(e, 90, 100) and not _fits_sm90_bwd(r.head_dim_qk, r.head_dim_v),
        "the backward on {e.arch} has no layout for head_dim {r.head_dim_qk}/{r.head_dim_v}: for a head_dim_qk "
        "up to 128, head_dim_v is a multiple of the largest of 64, 32 and 16 that divides it (both rounded up to 16); "
        "for one over 192, a multiple of 128 (rounded up to 64)",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        COMPILED,
    ),
    Rule(
        "FA4_HEAD_DIM_SHARED_SM90",
        lambda r, e: _sm90(r, e) and fa4_sm90.shared(r) > fa4_sm90.SHARED,
        "the forward for head_dim {r.head_dim_qk}/{r.head_dim_v} asks for more shared memory than {e.arch} has",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        _SM90,
    ),
    Rule(
        "FA4_HEAD_DIM_OUTPUT_SM90",
        lambda r, e: _sm90(r, e) and fa4_sm90.output_overruns(r),
        "the output of head_dim {r.head_dim_qk}/{r.head_dim_v} is written over the tiles of q and k in shared memory "
        "and past their end, an illegal address on {e.arch}",
        "pad q and k with zeros to {r.head_dim}, and pass scale=",
        _SM90,
    ),
    Rule(
        "FA4_HEAD_DIM_SHARED_SM90_BWD",
        lambda r, e: r.needs_grad and _sm90(r, e) and fa4_sm90.shared_bwd(r) > fa4_sm90.SHARED,
        "the backward for head_dim {r.head_dim_qk}/{r.head_dim_v} asks for more shared memory than {e.arch} has",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        _SM90,
    ),
    Rule(
        "FA4_HEAD_DIM_DQ_SM90_BWD",
        lambda r, e: r.needs_grad and _sm90(r, e) and fa4_sm90.dq_misread(r),
        "the backward of flash-attn-4 {version} on {e.arch} gives a wrong dq for head_dim {r.head_dim_qk}, as for all "
        "up to 128 that round up to an odd multiple of 16",
        "pad q, k and v with zeros to a multiple of 32, pass scale=, and slice the output",
        _DQ,
        PACKAGE,
    ),
    Rule(
        "FA4_HEAD_DIM_V_SM100_BWD",
        lambda r, e: r.needs_grad and _datacenter(e) and _half(r.head_dim_v) % _piece(r.head_dim_qk) != 0,
        "the backward on {e.arch} writes the gradient of v in pieces whose width goes by head_dim_qk, and those do not "
        "add up to head_dim {r.head_dim_qk}/{r.head_dim_v}",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        _SM100_BWD,
    ),
    Rule(
        "FA4_GQA_HEAD_DIM_V_SM100_BWD",
        lambda r, e: (
            r.needs_grad
            and r.heads_q != r.heads_kv
            and _datacenter(e)
            and (
                _piece(r.head_dim_v) != _piece(r.head_dim_qk)
                or (r.head_dim_qk == r.head_dim == 128 and _half(r.head_dim_v) < 64)
            )
        ),
        "the backward on {e.arch} with {r.heads_q} query and {r.heads_kv} KV heads adds up float32 gradients of v in "
        "the pieces it has for k, in which those of head_dim {r.head_dim_qk}/{r.head_dim_v} do not fit",
        "pad q, k and v with zeros to {r.head_dim}, pass scale=, and slice the output",
        _SM100_BWD,
    ),
    Rule(
        "FA4_GQA_HEAD_DIM_V_BWD",
        lambda r, e: r.needs_grad and _unequal(r) and r.heads_q != r.heads_kv and between(e, 90, 100),
        "the backward on {e.arch} with {r.heads_q} query and {r.heads_kv} KV heads needs equal head dims, not "
        "{r.head_dim_qk}/{r.head_dim_v}",
        "pad v with zeros to {r.head_dim_qk}, and slice the output",
        API,
    ),
    Rule(
        "FA4_SOFTCAP_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.softcap is not None,
        "the backward for head_dim 256 on {e.arch} does not take softcap ({r.softcap:g})",
        source=API,
    ),
    Rule(
        "FA4_WINDOW_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.windowed,
        "the backward for head_dim 256 on {e.arch} does not take a window",
        source=COMPILED,
    ),
    Rule(
        "FA4_LENGTHS_256",
        lambda r, e: _d256(r) and r.seqlen_q != r.seqlen_kv and _datacenter(e),
        "head_dim 256 on {e.arch} is for Sq = Skv; here Sq={r.seqlen_q} and Skv={r.seqlen_kv}",
        source=_TE,
    ),
    Rule(
        "FA4_PAGED_ARCH",
        lambda r, e: r.paged and _small(e),
        "the kernel for {e.arch} has no paged KV cache; those for sm90 to sm110 do",
        source=API,
    ),
    Rule(
        "FA4_PAGED_HEAD_DIM",
        lambda r, e: r.padded_kv and not _small(e) and (r.head_dim_qk % 16 != 0 or r.head_dim_v % 16 != 0),
        "head_dim {r.head_dim_qk}/{r.head_dim_v} is not a multiple of 16, in which keys of a KV cache are fetched",
        "pad q, k and v with zeros to a multiple of 16, pass scale=, and slice the output",
        _PAGED,
    ),
    Rule(
        "FA4_PAGED_TILE",
        lambda r, e: r.paged and not _small(e) and r.page_size == tile_n(r, e),
        "pages of {r.page_size} keys are fetched whole, as that is one tile here: what stands in a page past its "
        "sequence's end would reach the output if it is NaN",
        "use pages of another size",
        _PAGED,
    ),
    Rule(
        "FA4_PADDED_TILE",
        lambda r, e: r.padded_kv and not r.paged and not _small(e) and r.seqlen_kv == tile_n(r, e),
        "a cache of {r.seqlen_kv} keys is fetched whole, as that is one tile here: what stands past its sequence's end "
        "would reach the output if it is NaN",
        "use a longer cache",
        _PAGED,
    ),
    Rule(
        "FA4_SINKS_ARCH",
        lambda r, e: r.sinks and _small(e),
        "the kernel for {e.arch} has no attention sinks; those for sm90 to sm110 do",
        source=COMPILED,
    ),
    Rule(
        "FA4_SINKS_256_BWD",
        lambda r, e: _d256_bwd(r, e) and r.sinks,
        "the backward for head_dim 256 on {e.arch} does not take attention sinks",
        source=API,
    ),
    Rule(
        "FA4_DETERMINISTIC_SM120",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 120, 130),
        "flash-attn 4 has no deterministic backward on {e.arch}",
        source=API,
    ),
)
