"""What flash-attn 2 takes: sm80-style kernels, run by every later GPU too."""

from __future__ import annotations

from attnrt.backends.base import Rule, between, needs
from attnrt.backends.flash_attn.common import common, reads_lse
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

PACKAGE = "flash-attn"
_API = "flash-attn 2.8.3 flash_api.cpp"
_README = "https://github.com/Dao-AILab/flash-attention/blob/main/README.md"
_TE = "Transformer Engine attention utils"


def _small_shared_memory_bwd(r: AttentionRequest, e: Environment) -> bool:
    """The backward of large heads on GPUs with 99 KB of shared memory a block: sm86, sm89, sm12x."""
    return r.needs_grad and r.head_dim > 192 and (between(e, 86, 90) or between(e, 120))


RULES = (
    *common("FA2", "flash-attn 2", PACKAGE, "pip install 'attnrt[flash]' --no-build-isolation", "3"),
    Rule("FA2_ARCH", lambda r, e: between(e, 0, 80), "{e.arch} is older than sm80, flash-attn 2's first", source=_API),
    needs("FA2_VERSION", PACKAGE, "2.1.1", lambda r, e: True, "bottom-right alignment", source=_TE),
    needs("FA2_SM100_VERSION", PACKAGE, "2.7.3", lambda r, e: between(e, 100), "{e.arch}", source=_TE),
    Rule(
        "FA2_HEAD_DIM",
        lambda r, e: r.head_dim > 256,
        "head_dim {r.head_dim} is over 256, the most flash-attn 2 has kernels for",
        source=_API,
    ),
    Rule(
        "FA2_UNEQUAL_HEAD_DIMS",
        lambda r, e: r.head_dim_qk != r.head_dim_v,
        "head_dim_v {r.head_dim_v} is not head_dim_qk {r.head_dim_qk}",
        "pad the smaller with zeros to {r.head_dim}, pass scale=, and slice the output",
        _API,
    ),
    needs(
        "FA2_HEAD_DIM_BWD_VERSION",
        PACKAGE,
        "2.5.5",
        lambda r, e: _small_shared_memory_bwd(r, e) and r.head_dim > 224,
        "the backward for head_dim {r.head_dim} on {e.arch}",
        source=_README,
    ),
    needs(
        "FA2_HEAD_DIM_BWD_224_VERSION",
        PACKAGE,
        "2.6.2",
        lambda r, e: _small_shared_memory_bwd(r, e) and r.head_dim <= 224,
        "the backward for head_dim {r.head_dim} (over 192, up to 224) on {e.arch}",
        source="flash-attn 2.6.1 and 2.6.2 flash_api.cpp",
    ),
    Rule(
        "FA2_HEAD_DIM_BWD_DROPOUT",
        lambda r, e: _small_shared_memory_bwd(r, e) and r.dropout_p > 0,
        "the backward for head_dim {r.head_dim} (over 192) has no dropout ({r.dropout_p:g}) on {e.arch}",
        source=_README,
    ),
    needs("FA2_WINDOW_VERSION", PACKAGE, "2.3", lambda r, e: r.windowed, "a sliding window", source=_README),
    Rule(
        "FA2_PACKED_SINGLE",
        lambda r, e: r.packed and r.group > 1 and r.seqlen_q <= 1,
        "a packed batch of single queries over {r.group} heads a KV head is folded as if no sequence were empty",
        "use a dense layout for a decode step",
        "measured on the flash-attn 2 inside PyTorch 2.11, H200",
    ),
    Rule(
        "FA2_OPEN_WINDOW",
        lambda r, e: r.windowed and r.seqlen_q > r.seqlen_kv and (r.right is None or r.right >= r.seqlen_kv),
        "Skv={r.seqlen_kv} stands in for a window's open right side, which Sq={r.seqlen_q} queries outreach",
        "use a right bound under Skv, or causal=True",
        "flash-attn 2.8 flash_api.cpp",
    ),
    needs("FA2_ALIBI_VERSION", PACKAGE, "2.4", lambda r, e: r.alibi is not None, "ALiBi", source=_README),
    needs(
        "FA2_DETERMINISTIC_VERSION",
        PACKAGE,
        "2.4.1",
        lambda r, e: r.needs_grad and r.deterministic,
        "a deterministic backward",
        source=_TE,
    ),
    needs("FA2_SOFTCAP_VERSION", PACKAGE, "2.6", lambda r, e: r.softcap is not None, "softcap", source=_README),
    Rule(
        "FA2_SOFTCAP_DROPOUT",
        lambda r, e: r.softcap is not None and r.dropout_p > 0,
        "softcap ({r.softcap:g}) cannot be combined with dropout ({r.dropout_p:g})",
        source=_API,
    ),
    needs(
        "FA2_PACKED_LSE_VERSION",
        PACKAGE,
        "2.6",
        lambda r, e: r.packed and reads_lse(r),
        "the log-sum-exp of packed sequences as (Hq, T), by which sinks are applied too",
        source="flash-attn 2.5.9 and 2.6.0 flash_api.cpp",
    ),
    Rule(
        "FA2_DROPOUT_LSE",
        lambda r, e: r.dropout_p > 0 and reads_lse(r),
        "with dropout ({r.dropout_p:g}) the log-sum-exp, by which sinks are applied too, comes only together with all "
        "B * Hq * Sq * Skv dropped weights",
        source="flash-attn 2.8.3 flash_attn_interface.py",
    ),
    Rule(
        "FA2_ALIBI_PACKED_LSE",
        lambda r, e: r.alibi is not None and r.is_causal and r.packed and reads_lse(r),
        "under a causal mask flash-attn 2 counts ALiBi from key 0, which its log-sum-exp shows: packed sequences are "
        "not corrected for it, nor can sinks be applied by it",
        "use a dense layout, or another backend",
        "flash-attn 2.8.3 alibi.h",
    ),
    needs("FA2_PAGED_VERSION", PACKAGE, "2.5", lambda r, e: r.paged, "a paged KV cache", source=_README),
    Rule(
        "FA2_PAGE_SIZE",
        lambda r, e: r.page_size is not None and r.page_size % 256 != 0,
        "page_size {r.page_size} is not a multiple of 256, which flash-attn 2 needs",
        "use pages of 256 keys",
        _API,
    ),
    needs(
        "FA2_PADDING_VERSION",
        PACKAGE,
        "2.2",
        lambda r, e: r.padded_kv,
        "padded keys (flash_attn_with_kvcache)",
        source=_README,
    ),
    needs(
        "FA2_PADDING_LSE_VERSION",
        PACKAGE,
        "2.6",
        lambda r, e: r.padded_kv and reads_lse(r),
        "the log-sum-exp of padded keys, by which sinks are applied too",
        source="flash-attn 2.6.0 flash_attn_with_kvcache",
    ),
    Rule(
        "FA2_PADDING_DROPOUT",
        lambda r, e: r.padded_kv and r.dropout_p > 0,
        "padded keys (flash_attn_with_kvcache) cannot be combined with dropout ({r.dropout_p:g})",
        "pack the sequences: layout='thd' with cu_seqlens_q= and cu_seqlens_kv=",
        "flash-attn 2.8.3 flash_attn_with_kvcache",
    ),
)
