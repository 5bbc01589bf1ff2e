"""What cuDNN's attention takes of masks, windows, biases, sinks, packed and paged batches, and determinism."""

from __future__ import annotations

from attnrt.backends.base import Rule, between
from attnrt.backends.cudnn.terms import (
    ENGINE,
    MEASURED,
    SURFACE,
    TE,
    ampere_class,
    bias_grad,
    bottom_right,
    last_offset,
    library_needs,
    one_query,
    own_lengths,
    whole_blocks,
)

BAND = (
    library_needs("CUDNN_WINDOW_VERSION", "9.2", lambda r, e: r.windowed, "a sliding window"),
    library_needs(
        "CUDNN_WINDOW_LENGTHS_VERSION",
        "9.6",
        lambda r, e: r.windowed and (own_lengths(r) or bottom_right(r) or r.right not in (None, 0)),
        "a window with a right bound, with lengths that vary or aligned bottom-right",
        TE,
    ),
    library_needs(
        "CUDNN_WINDOW_FEATURES_VERSION",
        "9.10.2",
        lambda r, e: r.left is not None and (r.right != 0 or r.bias is not None or r.dropout_p > 0),
        "a left bound that is not causal, or comes with a bias or dropout",
    ),
    library_needs(
        "CUDNN_WINDOW_SM90_VERSION",
        "9.10.2",
        lambda r, e: (
            r.left is not None
            and bottom_right(r)
            and r.seqlen_q == r.seqlen_kv
            and r.right == 0
            and between(e, 90, 100)
        ),
        "a bottom-right window over Sq = Skv = {r.seqlen_q} of varying lengths on {e.arch}",
    ),
    Rule(
        "CUDNN_WINDOW_ROWS",
        lambda r, e: r.left is not None and r.seqlen_q > r.seqlen_kv and not own_lengths(r),
        "a left bound ({r.left}) needs Sq <= Skv; here {r.seqlen_q} > {r.seqlen_kv}",
        source=SURFACE,
    ),
    library_needs("CUDNN_BOTTOM_RIGHT_VERSION", "9.3", lambda r, e: bottom_right(r), "bottom-right alignment"),
    library_needs(
        "CUDNN_BOTTOM_RIGHT_LENGTHS_VERSION",
        "9.6",
        lambda r, e: bottom_right(r) and (own_lengths(r) or not whole_blocks(r)),
        "bottom-right alignment with lengths that vary or are no multiples of 64 (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_ROWS",
        lambda r, e: bottom_right(r) and r.seqlen_q > r.seqlen_kv and not own_lengths(r),
        "bottom-right alignment needs Sq <= Skv; here {r.seqlen_q} > {r.seqlen_kv}",
        "pass seqlens_q= and seqlens_kv=",
        SURFACE,
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_BIAS",
        lambda r, e: bottom_right(r) and r.bias is not None,
        "a bias cannot be combined with bottom-right alignment (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
        source=SURFACE,
    ),
    Rule(
        "CUDNN_BOTTOM_RIGHT_DROPOUT",
        lambda r, e: bottom_right(r) and r.dropout_p > 0,
        "dropout ({r.dropout_p:g}) cannot be combined with bottom-right alignment (Sq={r.seqlen_q}, Skv={r.seqlen_kv})",
        source=SURFACE,
    ),
)

SCORES = (
    Rule(
        "CUDNN_MASK",
        lambda r, e: r.mask is not None,
        "cuDNN takes no boolean mask, only an additive bias",
        "say it with causal=, window=, seqlens_* or layout='thd' where one of them means the same",
        SURFACE,
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
        lambda r, e: r.bias is not None and own_lengths(r),
        "a bias cannot be combined with padding by seqlens or packed sequences",
        source=TE,
    ),
    Rule(
        "CUDNN_BIAS_SHAPE",
        lambda r, e: r.bias is not None and r.bias.shape[3] == 1 and r.seqlen_kv > 1,
        "the bias is broadcast along its last dim, and cuDNN needs all {r.seqlen_kv} keys there",
        "expand the last dim of bias and call .contiguous()",
        ENGINE,
    ),
    Rule(
        "CUDNN_BIAS_ROWS",
        lambda r, e: r.needs_grad and r.bias is not None and r.bias.shape[2] == 1 and r.seqlen_q > 1,
        "the bias is broadcast along the queries: the forward is right and the gradients of q, k and v are wrong; all "
        "{r.seqlen_q} rows must be there",
        "expand that dim of bias and call .contiguous(); where it only hides keys, pass seqlens_kv=",
        MEASURED,
    ),
    Rule(
        "CUDNN_BIAS_GRAD_DTYPE",
        lambda r, e: bias_grad(r) and r.bias is not None and r.bias.dtype != r.dtype,
        "a bias that wants a gradient must have q's dtype, {r.dtype}",
        "cast the bias",
        ENGINE,
    ),
    library_needs(
        "CUDNN_BIAS_GRAD_VERSION",
        "9.5",
        lambda r, e: bias_grad(r) and not whole_blocks(r),
        "a gradient for the bias where Sq={r.seqlen_q} or Skv={r.seqlen_kv} is no multiple of 64",
    ),
    Rule(
        "CUDNN_BIAS_GRAD_HEAD_DIM",
        lambda r, e: bias_grad(r) and r.head_dim > 128 and between(e, 100, 120),
        "a gradient for the bias needs head dims up to 128 on {e.arch}; here {r.head_dim_qk}/{r.head_dim_v}",
        source=ENGINE,
    ),
    Rule(
        "CUDNN_BIAS_GRAD_DROPOUT",
        lambda r, e: bias_grad(r) and r.dropout_p > 0 and between(e, 100, 120),
        "a gradient for the bias cannot be combined with dropout ({r.dropout_p:g}) on {e.arch}",
        source=TE,
    ),
    library_needs("CUDNN_SINKS_VERSION", "9.13.1", lambda r, e: r.sinks, "attention sinks"),
    library_needs(
        "CUDNN_SINKS_PACKED_VERSION", "9.18", lambda r, e: r.sinks and r.packed, "sinks in packed sequences", TE
    ),
    Rule(
        "CUDNN_SINKS_DECODE",
        lambda r, e: r.sinks and one_query(r),
        "attention sinks need more than Sq={r.seqlen_q} query",
        source=SURFACE,
    ),
    Rule(
        "CUDNN_SINKS_LSE",
        lambda r, e: r.sinks and r.needs_lse,
        "cuDNN's log-sum-exp has the sinks in it, and where a sink outweighs the keys it cannot be had without them",
        "leave return_lse out",
    ),
    library_needs(
        "CUDNN_SINKS_LENGTHS_GRAD_VERSION",
        "9.26",
        lambda r, e: r.sinks_grad and own_lengths(r),
        "a gradient for the sinks in packed or padded batches (earlier ones add up rows that nobody wrote)",
        "measured on an H200, cuDNN 9.19; the library's notes name 9.26",
    ),
    Rule(
        "CUDNN_SINKS_DETERMINISTIC",
        lambda r, e: r.sinks and r.needs_grad and r.deterministic,
        "the backward with attention sinks is not deterministic",
        source=TE,
    ),
)

PACKED = (
    library_needs("CUDNN_PAGED_VERSION", "9.5", lambda r, e: r.paged, "a paged KV cache"),
    Rule(
        "CUDNN_PAGED_DROPOUT",
        lambda r, e: r.paged and r.dropout_p > 0 and one_query(r),
        "dropout ({r.dropout_p:g}) cannot be combined with a single query against a paged KV cache",
        source=ENGINE,
    ),
    Rule(
        "CUDNN_PAGED_QUERIES",
        lambda r, e: r.paged and r.seqlen_q > 1 and (r.sinks or not between(e, 90, 100)),
        "with {r.seqlen_q} queries against pages some engines let NaN in a slot past a sequence's last key reach the "
        "output; which do not was only looked at on sm90, and without sinks",
        source=MEASURED,
    ),
    library_needs(
        "CUDNN_PAGED_QUERIES_VERSION",
        "9.19",
        lambda r, e: r.paged and r.seqlen_q > 1,
        "{r.seqlen_q} queries against pages, as engines of older ones were not looked at",
        MEASURED,
    ),
    library_needs("CUDNN_PACKED_VERSION", "9.1", lambda r, e: r.packed, "packed sequences"),
    library_needs(
        "CUDNN_PACKED_OFFSETS_VERSION", "9.5", lambda r, e: r.packed and last_offset(r) >= 2**31, "64-bit offsets", TE
    ),
    library_needs(
        "CUDNN_PACKED_GQA_VERSION",
        "9.6",
        lambda r, e: r.packed and r.heads_q != r.heads_kv,
        "packed sequences with {r.heads_q} query and {r.heads_kv} KV heads",
    ),
    library_needs(
        "CUDNN_PACKED_SM80_VERSION",
        "9.18.1",
        lambda r, e: r.packed and between(e, 80, 90),
        "packed sequences on {e.arch}",
    ),
)

DETERMINISM = (
    Rule(
        "CUDNN_DETERMINISTIC_PACKED",
        lambda r, e: r.needs_grad and r.deterministic and own_lengths(r) and ampere_class(e),
        "the backward for packed or padded sequences is not deterministic on {e.arch}",
        source=SURFACE,
    ),
    library_needs(
        "CUDNN_DETERMINISTIC_SM100_VERSION",
        "9.18",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 100, 120),
        "a deterministic backward on {e.arch}",
    ),
    Rule(
        "CUDNN_DETERMINISTIC_SM100",
        lambda r, e: r.needs_grad and r.deterministic and (r.dropout_p > 0 or bias_grad(r)) and between(e, 100, 120),
        "the backward with dropout or a gradient for the bias is not deterministic on {e.arch}",
        source=SURFACE,
    ),
    Rule(
        "CUDNN_DETERMINISTIC_SM120",
        lambda r, e: r.needs_grad and r.deterministic and between(e, 120),
        "there is no deterministic backward that can be relied on for {e.arch}",
        source=TE,
    ),
)
