"""What cuDNN's fused attention takes, by architecture, feature and library version.

Most of it is cudnn-frontend's own support check, written down so that it can be asked without a GPU; it agrees with
the library's answers for cuDNN 9.19 (tests/backends/test_cudnn_rules.py). Versions known to be broken are advisories,
not rules: a newer version never takes less.
"""

from __future__ import annotations

from collections.abc import Callable

from attnrt.backends.base import Rule, between, needs, needs_nvidia
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

LIBRARY, FRONTEND = "cudnn", "nvidia-cudnn-frontend"
_SURFACE = "cudnn-frontend SDPA support surface"
_ENGINE = "cuDNN 9.19 support check"
_TE = "Transformer Engine fused_attn.cpp"
_MEASURED = "tests/gpu/test_cudnn.py with cuDNN 9.19 on an H200"


def _needs(
    id: str, at_least: str, used: Callable[[AttentionRequest, Environment], bool], what: str, source: str = _SURFACE
) -> Rule:
    remedy = f"pip install 'nvidia-cudnn-cu13>={at_least}' (-cu12 if torch is built for CUDA 12)"
    return needs(id, LIBRARY, at_least, used, what, remedy, source)


def _ampere_class(e: Environment) -> bool:
    """sm8x, and sm12x, which runs the same engines."""
    return between(e, 80, 90) or between(e, 120)


def _bottom_right(r: AttentionRequest) -> bool:
    return r.alignment == "bottom_right" and r.banded


def _own_lengths(r: AttentionRequest) -> bool:
    """Each sequence has its own length, so cuDNN applies its padding mask."""
    return r.padded or r.packed


def _one_query(r: AttentionRequest) -> bool:
    """The graph has one query, and so kernels of its own: not where lengths are in buckets (layouts.shape_of)."""
    return r.seqlen_q == 1 and not r.packed and not (r.padded and r.needs_grad)


def _whole_blocks(r: AttentionRequest) -> bool:
    return r.seqlen_q % 64 == 0 and r.seqlen_kv % 64 == 0


def _bias_grad(r: AttentionRequest) -> bool:
    return r.bias is not None and r.bias.requires_grad


def _forward_256(r: AttentionRequest, e: Environment) -> bool:
    """Dims up to 256 on sm90, which came earlier than large dims elsewhere."""
    return between(e, 90, 100) and r.head_dim <= 256


def _mla(r: AttentionRequest) -> bool:
    return (r.head_dim_qk, r.head_dim_v) == (192, 128)


def _d256(r: AttentionRequest) -> bool:
    return (r.head_dim_qk, r.head_dim_v) == (256, 256)


def _has_backward(r: AttentionRequest, e: Environment) -> bool:
    return (
        r.head_dim <= 128
        or (r.head_dim <= 256 and between(e, 90, 100))
        or (_mla(r) and between(e, 100, 120))
        or (_d256(r) and between(e, 100, 110))
    )


def _backward_256(r: AttentionRequest, e: Environment) -> bool:
    return r.needs_grad and _d256(r) and between(e, 100, 110)


_INSTALLATION = (
    needs_nvidia("CUDNN", "cuDNN"),
    Rule(
        "CUDNN_SCALE",
        lambda r, e: r.scale <= 0,
        "cuDNN hides scores before it scales them, so scale={r.scale} turns hidden ones into NaN or +inf",
        "negate q and pass a scale over 0",
        "measured on PyTorch 2.11's cuDNN 9.19 kernel, H100: NaN at scale 0 under a causal mask",
    ),
    Rule(
        "CUDNN_ARCH",
        lambda r, e: between(e, 0, 80),
        "{e.arch} is older than sm80, the first that cuDNN's attention runs on",
        source=_SURFACE,
    ),
    Rule(
        "CUDNN_INSTALLED",
        lambda r, e: e.version(FRONTEND) is None,
        "nvidia-cudnn-frontend is not installed",
        "pip install 'attnrt[cudnn]'",
    ),
    Rule(
        "CUDNN_LIBRARY",
        lambda r, e: e.version(LIBRARY) is None,
        "there is no cuDNN library here",
        "install a CUDA build of torch, which brings it",
    ),
    Rule(
        "CUDNN_FRONTEND_VERSION",
        lambda r, e: e.lacks(FRONTEND, ">=1.20"),
        "nvidia-cudnn-frontend 1.20 or later is needed; {version} is installed",
        "pip install 'attnrt[cudnn]'",
        "the oldest frontend that our adapter's calls were tried with",
        package=FRONTEND,
    ),
    _needs("CUDNN_VERSION", "9.0", lambda r, e: True, "attention over any sequence length"),
    _needs("CUDNN_SM100_VERSION", "9.7", lambda r, e: between(e, 100, 120), "{e.arch}"),
    _needs("CUDNN_SM120_VERSION", "9.18.1", lambda r, e: between(e, 120), "{e.arch}", _TE),
)

_TENSORS = (
    Rule(
        "CUDNN_DTYPE",
        lambda r, e: r.dtype not in ("fp16", "bf16"),
        "dtype {r.dtype} is not fp16 or bf16, the two that cuDNN's attention is documented for",
        "cast q, k and v to bf16",
        "cuDNN attention documentation",
    ),
    Rule(
        "CUDNN_STRIDED_LAST_DIM",
        lambda r, e: r.strides == "last_dim",
        "the last dim of q, k or v is not contiguous, and cuDNN needs its stride to be 1",
        "call .contiguous() on it",
        _SURFACE,
    ),
    Rule(
        "CUDNN_UNALIGNED",
        lambda r, e: not r.aligned,
        "a pointer or stride of q, k or v is not a multiple of 16 bytes, and cuDNN needs that",
        "call .contiguous() on it",
        "cudnn-frontend 1.32 stride check",
    ),
    Rule(
        "CUDNN_EXPANDED",
        lambda r, e: r.expanded,
        "a dim of q, k or v is expanded (stride 0): the support check lets it pass, and the copy engine cannot read it",
        "call .contiguous() on it",
        "CUDA driver API, cuTensorMapEncodeTiled",
    ),
    Rule(
        "CUDNN_HEAD_DIM_MULTIPLE",
        lambda r, e: r.head_dim_qk % 8 != 0 or r.head_dim_v % 8 != 0,
        "head_dim {r.head_dim_qk}/{r.head_dim_v} is not a multiple of 8",
        "pad q, k and v with zeros to a multiple of 8, pass scale=, and slice the output",
        _SURFACE,
    ),
    _needs("CUDNN_HEAD_DIM_SM90", "9.1", lambda r, e: r.head_dim > 128 and _forward_256(r, e), "head_dim {r.head_dim}"),
    _needs(
        "CUDNN_HEAD_DIM_SM100",
        "9.9",
        lambda r, e: r.head_dim > 128 and r.seqlen_q != 1 and between(e, 100, 120),
        "head_dim {r.head_dim} (over 128) on {e.arch}",
    ),
    _needs(
        "CUDNN_HEAD_DIM_LARGE",
        "9.10.2",
        lambda r, e: (
            r.head_dim > 128
            and e.sm is not None
            and not _forward_256(r, e)
            and (r.seqlen_q == 1 or not between(e, 100, 120))
        ),
        "head_dim {r.head_dim} with {r.seqlen_q} queries on {e.arch}",
    ),
    Rule(
        "CUDNN_HEAD_DIM_DECODE",
        lambda r, e: r.head_dim > 128 and _one_query(r) and r.banded and e.sm is not None and not _forward_256(r, e),
        "head_dim {r.head_dim} is over 128, which on {e.arch} excludes causal or window with a single query",
        source=_TE,
    ),
    _needs(
        "CUDNN_DECODE_BAND_VERSION",
        "9.10.2",
        lambda r, e: r.seqlen_q == 1 and r.right is not None,
        "a single query with a causal mask or right bound",
    ),
)

_BACKWARD = (
    Rule(
        "CUDNN_HEAD_DIM_BWD",
        lambda r, e: r.needs_grad and e.sm is not None and not _has_backward(r, e),
        "there is no backward for head_dim {r.head_dim_qk}/{r.head_dim_v} on {e.arch}: the limits are 128 everywhere, "
        "256 on sm90, and 192/128 and 256/256 besides on sm100",
        source=_ENGINE,
    ),
    _needs(
        "CUDNN_HEAD_DIM_BWD_SM90",
        "9.5",
        lambda r, e: r.needs_grad and 128 < r.head_dim <= 256 and between(e, 90, 100),
        "the backward for head_dim {r.head_dim} (over 128)",
    ),
    _needs(
        "CUDNN_HEAD_DIM_BWD_192_128",
        "9.11",
        lambda r, e: r.needs_grad and _mla(r) and between(e, 100, 120),
        "the backward for head_dim 192/128 on {e.arch}",
    ),
    _needs("CUDNN_HEAD_DIM_BWD_256", "9.23", _backward_256, "the backward for head_dim 256 on {e.arch}", _TE),
    _needs(
        "CUDNN_HEAD_DIM_BWD_256_PACKED",
        "9.25",
        lambda r, e: _backward_256(r, e) and r.packed,
        "the backward for head_dim 256 with packed sequences on {e.arch}",
        _TE,
    ),
    Rule(
        "CUDNN_HEAD_DIM_BWD_256_FEATURES",
        lambda r, e: (
            _backward_256(r, e) and (r.bias is not None or r.dropout_p > 0 or r.sinks or (r.windowed and r.right != 0))
        ),
        "the backward for head_dim 256 on {e.arch} does not take a bias, dropout, sinks or a window that is not causal",
        source=_TE,
    ),
    Rule(
        "CUDNN_HEAD_DIM_BWD_LENGTHS",
        lambda r, e: r.needs_grad and _own_lengths(r) and r.head_dim_qk != r.head_dim_v and _ampere_class(e),
        "there is no backward on {e.arch} for packed or padded sequences with unequal head_dim "
        "{r.head_dim_qk}/{r.head_dim_v}",
        "pad q, k and v with zeros to one head_dim, pass scale=, and slice the output",
        _ENGINE,
    ),
    Rule(
        "CUDNN_SINGLE_TOKEN_BWD",
        lambda r, e: r.needs_grad and _one_query(r) and r.seqlen_kv == 1,
        "there is no backward for Sq={r.seqlen_q} with Skv={r.seqlen_kv}; one of them must be over 1",
        source=_ENGINE,
    ),
)

_BAND = (
    _needs("CUDNN_WINDOW_VERSION", "9.2", lambda r, e: r.windowed, "a sliding window"),
    _needs(
        "CUDNN_WINDOW_LENGTHS_VERSION",
        "9.6",
        lambda r, e: r.windowed and (_own_lengths(r) or _bottom_right(r) or r.right not in (None, 0)),
        "a window with a right bound, with lengths that vary or aligned bottom-right",
        _TE,
    ),
    _needs(
        "CUDNN_WINDOW_FEATURES_VERSION",
        "9.10.2",
        lambda r, e: r.left is not None and (r.right != 0 or r.bias is not None or r.dropout_p > 0),
        "a left bound that is not causal, or comes with a bias or dropout",
    ),
    _needs(
        "CUDNN_WINDOW_SM90_VERSION",
        "9.10.2",
        lambda r, e: (
            r.left is not None
            and _bottom_right(r)
            and r.seqlen_q == r.seqlen_kv
            and r.right == 0
            and between(e, 90, 100)
        ),
        "a bottom-right window over Sq = Skv = {r.seqlen_q} of varying lengths on {e.arch}",
    ),
    Rule(
        "CUDNN_WINDOW_ROWS",
        lambda r, e: r.left is not None and r.seqlen_q > r.seqlen_kv and not _own_lengths(r),
        "a left bound ({r.left}) needs Sq <= Skv; here {r.seqlen_q} > {r.seqlen_kv}",
        source=_SURFACE,
    ),
    _needs("CUDNN_BOTTOM_RIGHT_VERSION", "9.3", lambda r, e: _bottom_right(r), "bottom-right alignment"),
    _needs(
        "CUDNN_BOTTOM_RIGHT_LENGTHS_VERSION",
        "9.6",
        lambda r, e: _bottom_right(r) and (_own_lengths(r) or not _whole_blocks(r)),
        "bottom-right alignment with lengths that vary or are no multiples of 64 (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_ROWS",
        lambda r, e: _bottom_right(r) and r.seqlen_q > r.seqlen_kv and not _own_lengths(r),
        "bottom-right alignment needs Sq <= Skv; here {r.seqlen_q} > {r.seqlen_kv}",
        "pass seqlens_q= and seqlens_kv=",
        _SURFACE,
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_BIAS",
        lambda r, e: _bottom_right(r) and r.bias is not None,
        "a bias cannot be combined with bottom-right alignment (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
        source=_SURFACE,
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_DROPOUT",
        lambda r, e: _bottom_right(r) and r.dropout_p > 0,
        "dropout ({r.dropout_p:g}) cannot be combined with bottom-right alignment (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
        source=_SURFACE,
    ),
)

_SCORES = (
    Rule(
        "CUDNN_MASK",
        lambda r, e: r.mask is not None,
        "cuDNN takes no boolean mask, only an additive bias",
        "say it with causal=, window=, seqlens_* or layout='thd' where one of them means the same",
        _SURFACE,
    ),
    Rule(
        "CUDNN_ALIBI",
        lambda r, e: r.alibi is not None,
        "cuDNN makes its own ALiBi slopes from the number of heads and cannot take alibi_slopes",
        "where memory allows, pass the slopes times the distances as bias=",
        "cudnn-frontend get_abili_slope",
    ),
    Rule(
        "CUDNN_BIAS_LENGTHS",
        lambda r, e: r.bias is not None and _own_lengths(r),
        "a bias cannot be combined with padding by seqlens or packed sequences",
        source=_TE,
    ),
    Rule(
        "CUDNN_BIAS_SHAPE",
        lambda r, e: r.bias is not None and r.bias.shape[3] == 1 and r.seqlen_kv > 1,
        "the bias is broadcast along its last dim, and cuDNN needs all {r.seqlen_kv} keys there",
        "expand the last dim of bias and call .contiguous()",
        _ENGINE,
    ),
    Rule(
        "CUDNN_BIAS_ROWS",
        lambda r, e: r.needs_grad and r.bias is not None and r.bias.shape[2] == 1 and r.seqlen_q > 1,
        "the bias is broadcast along the queries: the forward is right and the gradients of q, k and v are wrong; all "
        "{r.seqlen_q} rows must be there",
        "expand that dim of bias and call .contiguous(); where it only hides keys, pass seqlens_kv=",
        _MEASURED,
    ),
    Rule(
        "CUDNN_BIAS_GRAD_DTYPE",
        lambda r, e: _bias_grad(r) and r.bias is not None and r.bias.dtype != r.dtype,
        "a bias that wants a gradient must have q's dtype, {r.dtype}",
        "cast the bias",
        _ENGINE,
    ),
    _needs(
        "CUDNN_BIAS_GRAD_VERSION",
        "9.5",
        lambda r, e: _bias_grad(r) and not _whole_blocks(r),
        "a gradient for the bias where Sq={r.seqlen_q} or Skv={r.seqlen_kv} is no multiple of 64",
    ),
    Rule(
        "CUDNN_BIAS_GRAD_HEAD_DIM",
        lambda r, e: _bias_grad(r) and r.head_dim > 128 and between(e, 100, 120),
        "a gradient for the bias needs head dims up to 128 on {e.arch}; here {r.head_dim_qk}/{r.head_dim_v}",
        source=_ENGINE,
    ),
    Rule(
        "CUDNN_BIAS_GRAD_DROPOUT",
        lambda r, e: _bias_grad(r) and r.dropout_p > 0 and between(e, 100, 120),
        "a gradient for the bias cannot be combined with dropout ({r.dropout_p:g}) on {e.arch}",
        source=_TE,
    ),
    _needs("CUDNN_SINKS_VERSION", "9.13.1", lambda r, e: r.sinks, "attention sinks"),
    _needs("CUDNN_SINKS_PACKED_VERSION", "9.18", lambda r, e: r.sinks and r.packed, "sinks in packed sequences", _TE),
    Rule(
        "CUDNN_SINKS_DECODE",
        lambda r, e: r.sinks and _one_query(r),
        "attention sinks need more than Sq={r.seqlen_q} query",
        source=_SURFACE,
    ),
    Rule(
        "CUDNN_SINKS_LSE",
        lambda r, e: r.sinks and r.needs_lse,
        "cuDNN's log-sum-exp has the sinks in it, and where a sink outweighs the keys it cannot be had without them",
        "leave return_lse out",
    ),
    _needs(
        "CUDNN_SINKS_LENGTHS_GRAD_VERSION",
        "9.26",
        lambda r, e: r.sinks_grad and _own_lengths(r),
        "a gradient for the sinks in packed or padded batches (earlier ones add up rows that nobody wrote)",
        "measured on an H200, cuDNN 9.19; the library's notes name 9.26",
    ),
    Rule(
        "CUDNN_SINKS_DETERMINISTIC",
        lambda r, e: r.sinks and r.needs_grad and r.deterministic,
        "the backward with attention sinks is not deterministic",
        source=_TE,
    ),
)

_PACKED = (
    _needs("CUDNN_PAGED_VERSION", "9.5", lambda r, e: r.paged, "a paged KV cache"),
    Rule(
        "CUDNN_PAGED_DROPOUT",
        lambda r, e: r.paged and r.dropout_p > 0 and _one_query(r),
        "dropout ({r.dropout_p:g}) cannot be combined with a single query against a paged KV cache",
        source=_ENGINE,
    ),
    Rule(
        "CUDNN_PAGED_QUERIES",
        lambda r, e: r.paged and r.seqlen_q > 1,
        "with {r.seqlen_q} queries against pages, the engine that the library puts first lets NaN in a slot past a "
        "sequence's last key reach the output; with one query it does not",
        source=_MEASURED,
    ),
    _needs("CUDNN_PACKED_VERSION", "9.1", lambda r, e: r.packed, "packed sequences"),
    _needs("CUDNN_PACKED_OFFSETS_VERSION", "9.5", lambda r, e: r.packed and _offset(r) >= 2**31, "64-bit offsets", _TE),
    _needs(
        "CUDNN_PACKED_GQA_VERSION",
        "9.6",
        lambda r, e: r.packed and r.heads_q != r.heads_kv,
        "packed sequences with {r.heads_q} query and {r.heads_kv} KV heads",
    ),
    _needs(
        "CUDNN_PACKED_SM80_VERSION",
        "9.18.1",
        lambda r, e: r.packed and between(e, 80, 90),
        "packed sequences on {e.arch}",
    ),
)

_DETERMINISM = (
    Rule(
        "CUDNN_DETERMINISTIC_PACKED",
        lambda r, e: r.needs_grad and r.deterministic and _own_lengths(r) and _ampere_class(e),
        "the backward for packed or padded sequences is not deterministic on {e.arch}",
        source=_SURFACE,
    ),
    _needs(
        "CUDNN_DETERMINISTIC_SM100_VERSION",
        "9.18",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 100, 120),
        "a deterministic backward on {e.arch}",
    ),
    Rule(
        "CUDNN_DETERMINISTIC_SM100",
        lambda r, e: r.needs_grad and r.deterministic and (r.dropout_p > 0 or _bias_grad(r)) and between(e, 100, 120),
        "the backward with dropout or a gradient for the bias is not deterministic on {e.arch}",
        source=_SURFACE,
    ),
    Rule(
        "CUDNN_DETERMINISTIC_SM120",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 120),
        "there is no deterministic backward that can be relied on for {e.arch}",
        source=_TE,
    ),
)

RULES = (*_INSTALLATION, *_TENSORS, *_BACKWARD, *_BAND, *_SCORES, *_PACKED, *_DETERMINISM)


def _offset(r: AttentionRequest) -> int:
    """The last element offset into a packed tensor."""
    return max(r.tokens_q * r.heads_q, r.tokens_kv * r.heads_kv) * r.head_dim


def _full_matrix_dq(r: AttentionRequest, e: Environment) -> bool:
    """A deterministic dq is summed from a matrix of partial results, but for the engines of sm100."""
    return r.needs_grad and r.deterministic and not between(e, 100, 120)


def full_matrix_bytes(r: AttentionRequest, e: Environment) -> int:
    """The part of the backward's workspace that is as large as the scores."""
    if not (_full_matrix_dq(r, e) or (r.needs_grad and _bias_grad(r))):
        return 0
    shape = shape_of(r, e.sm or 90)  # as large as the buckets, not as the sequences
    heads = 1 if shape.heads_apart else r.heads_q
    return 2 * (shape.batch * heads * shape.seqlen_q * shape.seqlen_kv if shape.ragged else r.scores)


def workspace(r: AttentionRequest, e: Environment) -> int:
    """Bytes of the backward's workspace, as cuDNN 9.19 reports them. The forward's is next to nothing."""
    if not r.needs_grad:
        return 0
    shape = shape_of(r, e.sm or 90)
    heads = 1 if shape.heads_apart else r.heads_q
    tokens = shape.most_tokens_q or shape.batch * _whole(shape.seqlen_q)
    total = tokens * heads * 4 + full_matrix_bytes(r, e)
    if not _full_matrix_dq(r, e):
        total += tokens * heads * r.head_dim_qk * 4 * (2 if _ampere_class(e) else 1)
    if r.heads_q != r.heads_kv and not shape.heads_apart:
        tokens_kv = shape.most_tokens_kv or shape.batch * _whole(shape.seqlen_kv)
        total += tokens_kv * r.heads_q * (r.head_dim_qk + r.head_dim_v) * r.itemsize
    return total


def apart_bytes(r: AttentionRequest, e: Environment) -> int:
    """Of the gradients of k and v by query head, where heads are sequences of their own."""
    if not r.needs_grad or r.heads_q == r.heads_kv or not shape_of(r, e.sm or 90).heads_apart:
        return 0
    return r.tokens_kv * r.heads_q * (r.head_dim_qk + r.head_dim_v) * r.itemsize


def _whole(length: int) -> int:
    """In whole tiles."""
    return -(-length // 128) * 128
