"""What our Triton kernel is written to take. Almost every feature; the limits are dims, dtypes and sm80."""

from __future__ import annotations

from attnrt.backends.base import Rule, needs_nvidia

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
