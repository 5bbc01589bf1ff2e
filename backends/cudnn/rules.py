"""What cuDNN's fused attention takes, by architecture, feature and library version.

Most of it is cudnn-frontend's own support check, written down so that it can be asked without a GPU; it agrees with
the library's answers for cuDNN 9.19 (tests/backends/test_cudnn_rules.py). Versions known to be broken are advisories,
not rules: a newer version never takes less.
"""

from __future__ import annotations

from attnrt.backends.base import Rule, between, needs_nvidia
from attnrt.backends.cudnn.feature_rules import BAND, DETERMINISM, PACKED, SCORES
from attnrt.backends.cudnn.terms import (
    ENGINE,
    FRONTEND,
    LIBRARY,
    SURFACE,
    TE,
    ampere_class,
    backward_256,
    forward_256,
    has_backward,
    library_needs,
    mla,
    one_query,
    own_lengths,
)

INSTALLATION = (
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
        source=SURFACE,
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
    library_needs("CUDNN_VERSION", "9.0", lambda r, e: True, "attention over any sequence length"),
    library_needs("CUDNN_SM100_VERSION", "9.7", lambda r, e: between(e, 100, 120), "{e.arch}"),
    library_needs("CUDNN_SM120_VERSION", "9.18.1", lambda r, e: between(e, 120), "{e.arch}", TE),
)

TENSORS = (
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
        SURFACE,
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
        SURFACE,
    ),
    library_needs(
        "CUDNN_HEAD_DIM_SM90", "9.1", lambda r, e: r.head_dim > 128 and forward_256(r, e), "head_dim {r.head_dim}"
    ),
    library_needs(
        "CUDNN_HEAD_DIM_SM100",
        "9.9",
        lambda r, e: r.head_dim > 128 and r.seqlen_q != 1 and between(e, 100, 120),
        "head_dim {r.head_dim} (over 128) on {e.arch}",
    ),
    library_needs(
        "CUDNN_HEAD_DIM_LARGE",
        "9.10.2",
        lambda r, e: (
            r.head_dim > 128
            and e.sm is not None
            and not forward_256(r, e)
            and (r.seqlen_q == 1 or not between(e, 100, 120))
        ),
        "head_dim {r.head_dim} with {r.seqlen_q} queries on {e.arch}",
    ),
    Rule(
        "CUDNN_HEAD_DIM_DECODE",
        lambda r, e: r.head_dim > 128 and one_query(r) and r.banded and e.sm is not None and not forward_256(r, e),
        "head_dim {r.head_dim} is over 128, which on {e.arch} excludes causal or window with a single query",
        source=TE,
    ),
    library_needs(
        "CUDNN_DECODE_BAND_VERSION",
        "9.10.2",
        lambda r, e: r.seqlen_q == 1 and r.right is not None,
        "a single query with a causal mask or right bound",
    ),
)

BACKWARD = (
    Rule(
        "CUDNN_HEAD_DIM_BWD",
        lambda r, e: r.needs_grad and e.sm is not None and not has_backward(r, e),
        "there is no backward for head_dim {r.head_dim_qk}/{r.head_dim_v} on {e.arch}: the limits are 128 everywhere, "
        "256 on sm90, and 192/128 and 256/256 besides on sm100",
        source=ENGINE,
    ),
    library_needs(
        "CUDNN_HEAD_DIM_BWD_SM90",
        "9.5",
        lambda r, e: r.needs_grad and 128 < r.head_dim <= 256 and between(e, 90, 100),
        "the backward for head_dim {r.head_dim} (over 128)",
    ),
    library_needs(
        "CUDNN_HEAD_DIM_BWD_192_128",
        "9.11",
        lambda r, e: r.needs_grad and mla(r) and between(e, 100, 120),
        "the backward for head_dim 192/128 on {e.arch}",
    ),
    library_needs("CUDNN_HEAD_DIM_BWD_256", "9.23", backward_256, "the backward for head_dim 256 on {e.arch}", TE),
    library_needs(
        "CUDNN_HEAD_DIM_BWD_256_PACKED",
        "9.25",
        lambda r, e: backward_256(r, e) and r.packed,
        "the backward for head_dim 256 with packed sequences on {e.arch}",
        TE,
    ),
    Rule(
        "CUDNN_HEAD_DIM_BWD_256_FEATURES",
        lambda r, e: (
            backward_256(r, e) and (r.bias is not None or r.dropout_p > 0 or r.sinks or (r.windowed and r.right != 0))
        ),
        "the backward for head_dim 256 on {e.arch} does not take a bias, dropout, sinks or a window that is not causal",
        source=TE,
    ),
    Rule(
        "CUDNN_HEAD_DIM_BWD_LENGTHS",
        lambda r, e: r.needs_grad and own_lengths(r) and r.head_dim_qk != r.head_dim_v and ampere_class(e),
        "there is no backward on {e.arch} for packed or padded sequences with unequal head_dim "
        "{r.head_dim_qk}/{r.head_dim_v}",
        "pad q, k and v with zeros to one head_dim, pass scale=, and slice the output",
        ENGINE,
    ),
    Rule(
        "CUDNN_SINGLE_TOKEN_BWD",
        lambda r, e: r.needs_grad and one_query(r) and r.seqlen_kv == 1,
        "there is no backward for Sq={r.seqlen_q} with Skv={r.seqlen_kv}; one of them must be over 1",
        source=ENGINE,
    ),
)

RULES = (*INSTALLATION, *TENSORS, *BACKWARD, *BAND, *SCORES, *PACKED, *DETERMINISM)
