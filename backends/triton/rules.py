"""What our Triton kernel is written to take. Almost every feature; the limits are dims, dtypes and sm80."""

from __future__ import annotations

from attnrt.backends.base import Rule, between, needs_nvidia
from attnrt.backends.triton.tiles import hopper_has
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

_DESIGN = "the kernel's design: tiles of one head, fp32 accumulation"


def _tile_dim(dim: int) -> bool:
    return dim % 8 == 0 and 16 <= dim <= 256


RULES = (
    needs_nvidia("TRITON", "the Triton kernel"),
    Rule(
        "TRITON_ARCH",
        lambda r, e: e.sm is not None and e.sm < 80,
        "{e.arch} is older than sm80, the first with bf16 and asynchronous copies",
        source=_DESIGN,
    ),
    Rule(
        "TRITON_INSTALLED",
        lambda r, e: e.version("triton") is None,
        "triton is not installed",
        "pip install 'attnrt[triton]'",
    ),
    Rule(
        "TRITON_VERSION",
        lambda r, e: e.lacks("triton", ">=3.6"),
        "triton 3.6 or later is needed; {version} is installed",
        "pip install 'triton>=3.6'",
        "the oldest triton that the kernel is compiled and tested with",
        package="triton",
    ),
    Rule(
        "TRITON_DTYPE",
        lambda r, e: r.dtype not in ("fp16", "bf16", "fp32"),
        "dtype {r.dtype} is not fp16, bf16 or fp32",
        "cast q, k and v to one of them",
        _DESIGN,
    ),
    Rule(
        "TRITON_HEAD_DIM",
        lambda r, e: not (_tile_dim(r.head_dim_qk) and _tile_dim(r.head_dim_v)),
        "head_dim {r.head_dim_qk}/{r.head_dim_v} is not a multiple of 8 from 16 to 256",
        "pad smaller or odd dims with zeros, pass scale=, and slice the output",
        _DESIGN,
    ),
    Rule(
        "TRITON_STRIDED_LAST_DIM",
        lambda r, e: r.strides == "last_dim",
        "the last dim of q, k or v is not contiguous, and the kernel loads rows",
        "call .contiguous() on it",
        _DESIGN,
    ),
)

DECODE_ROWS = 64
"""Most rows (query tokens times the query heads of a KV head) that the decode kernel packs into its tiles."""
HOPPER_DIMS = (64, 128, 256)
_GLUON = "Gluon as triton 3.6 to 3.9 ship it"


def few_rows(r: AttentionRequest) -> bool:
    """One query a sequence, or so few that a KV head's group fits in one tile: the keys are what takes time."""
    return r.seqlen_q == 1 or r.seqlen_q * r.group <= DECODE_ROWS


DECODE_RULES = (
    Rule(
        "TRITON_DECODE_ROWS",
        lambda r, e: not few_rows(r),
        f"{{r.seqlen_q}} queries times {{r.group}} heads a KV head are over {DECODE_ROWS} rows: not a decode step",
    ),
)
HOPPER_RULES = (
    Rule("TRITON_HOPPER_ARCH", lambda r, e: not between(e, 90, 100), "the Hopper kernel is for sm90, this is {e.arch}"),
    Rule(
        "TRITON_HOPPER_VERSION",
        lambda r, e: e.lacks("triton", ">=3.6,<3.10"),
        "the Hopper kernel is written in Gluon as of triton 3.6 to 3.9; {version} is installed",
        source=_GLUON,
        package="triton",
    ),
    Rule(
        "TRITON_HOPPER_DTYPE",
        lambda r, e: r.dtype not in ("fp16", "bf16"),
        "the Hopper kernel takes fp16 and bf16, not {r.dtype}",
    ),
    Rule(
        "TRITON_HOPPER_HEAD_DIM",
        lambda r, e: r.head_dim_qk not in HOPPER_DIMS,
        "the Hopper kernel takes head_dim 64, 128 and 256, not {r.head_dim_qk}",
    ),
    Rule(
        "TRITON_HOPPER_SLOWER",
        lambda r, e: r.head_dim_qk in HOPPER_DIMS and not hopper_has("queries", r),
        "the portable kernel is the faster one at head_dim {r.head_dim_qk} with this mask and {r.seqlen_q} queries",
        source="configs/triton/hopper.yaml, by benchmarks/kernels.py on an H200",
    ),
    Rule(
        "TRITON_HOPPER_WINDOW",
        lambda r, e: r.left is not None and r.head_dim_qk == 256,
        "the Hopper kernel has no registers left for a left window bound at head_dim 256",
    ),
    Rule("TRITON_HOPPER_SCALE", lambda r, e: r.scale <= 0, "the Hopper kernel takes a scale over 0, not {r.scale}"),
    Rule(
        "TRITON_HOPPER_EXPANDED",
        lambda r, e: r.expanded,
        "an expanded dim (stride 0) cannot be copied by the hardware, as the Hopper kernel does",
    ),
)


FUSED_DIMS = (64, 128)


def fusible(r: AttentionRequest, e: Environment) -> bool:
    """The Hopper backward (hopper_backward.py) is written for this call: no feature but a band and sinks, and sums of
    dq whose order changes from run to run."""
    here = between(e, 90, 100) and not e.lacks("triton", ">=3.6,<3.10")
    plain = r.dtype in ("fp16", "bf16") and r.head_dim_qk == r.head_dim_v and r.head_dim_qk in FUSED_DIMS
    return here and plain and not (r.bias or r.mask or r.alibi or r.softcap or r.dropout_p or r.deterministic)


def fused_backward(r: AttentionRequest, e: Environment) -> bool:
    """The backward is the Hopper one: written for the call, and the faster one there."""
    return fusible(r, e) and hopper_has("backward", r)
