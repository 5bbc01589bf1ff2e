"""What the three generations of flash-attn have in common."""

from __future__ import annotations

from attnrt.backends.base import Rule, needs_nvidia
from attnrt.request import AttentionRequest


def cut(r: AttentionRequest) -> bool:
    """Under a top-left causal mask no query sees a key from Sq on, and without those it is the bottom-right mask."""
    return r.alignment == "top_left" and r.right == 0 and r.seqlen_q < r.seqlen_kv and not (r.packed or r.padded)


def reads_lse(r: AttentionRequest) -> bool:
    """The call needs the log-sum-exp: it was asked for, or the sinks are applied by it."""
    return r.needs_lse or r.sinks


def common(prefix: str, title: str, package: str, install: str, next_major: str) -> tuple[Rule, ...]:
    """Device, package, dtype, strides, alignment and padding: the same in each generation.

    next_major: the version from which the package is another generation than the one these rules describe.
    """
    pack = "pack the sequences: layout='thd' with cu_seqlens_q= and cu_seqlens_kv="
    return (
        needs_nvidia(prefix, title),
        Rule(f"{prefix}_INSTALLED", lambda r, e: e.version(package) is None, f"{package} is not installed", install),
        Rule(
            f"{prefix}_TOO_NEW",
            lambda r, e: e.has(package, f">={next_major}.dev0"),
            f"{package} {{version}} is a later generation than {title}, whose functions this adapter calls",
            f"pip install '{package}<{next_major}'",
            "each generation so far has had functions and meanings of its own",
            package,
        ),
        Rule(
            f"{prefix}_DTYPE",
            lambda r, e: r.dtype not in ("fp16", "bf16"),
            f"dtype {{r.dtype}} is not fp16 or bf16, the two that {title} returns in the dtype of q",
            "cast q, k and v to bf16",
            f"{title} interface",
        ),
        Rule(
            f"{prefix}_HEAD_DIM_MULTIPLE",
            lambda r, e: r.head_dim_qk % 8 != 0 or r.head_dim_v % 8 != 0,
            f"head_dim {{r.head_dim_qk}}/{{r.head_dim_v}} is not a multiple of 8, which {title}'s kernels need",
            "pad q, k and v with zeros to a multiple of 8, pass scale=, and slice the output",
            f"{title} interface",
        ),
        Rule(
            f"{prefix}_STRIDED_LAST_DIM",
            lambda r, e: r.strides == "last_dim",
            f"the last dim of q, k or v is not contiguous, so {title} would copy it or fail",
            "call .contiguous() on it",
            f"{title} interface",
        ),
        Rule(
            f"{prefix}_UNALIGNED",
            lambda r, e: not r.aligned,
            f"a pointer or stride of q, k or v is not a multiple of 16 bytes, and {title} loads 16 bytes at a time",
            "call .contiguous() on it",
            f"{title} kernels",
        ),
        Rule(
            f"{prefix}_SCALE",
            lambda r, e: r.scale <= 0,
            f"{title} hides scores before it scales them, so scale={{r.scale}} turns hidden ones into NaN or +inf",
            "negate q and pass a scale over 0",
            "measured on the flash-attn 2 inside PyTorch 2.11, H100: NaN at scale 0 under a causal mask",
        ),
        Rule(
            f"{prefix}_TOP_LEFT",
            lambda r, e: r.alignment == "top_left" and not cut(r),
            f"{title} aligns bottom-right only, which is another mask where Sq={{r.seqlen_q}} and "
            "Skv={r.seqlen_kv} differ or vary (a causal one over Sq < Skv alone can be had)",
            "use alignment='bottom_right' if that is what you mean",
            f"{title} interface",
        ),
        Rule(
            f"{prefix}_PADDING_Q",
            lambda r, e: r.padded_q,
            f"{title} cannot skip padded queries in a dense batch of {{r.batch}}",
            pack,
            f"{title} interface",
        ),
        Rule(
            f"{prefix}_PADDING_BWD",
            lambda r, e: r.padded and r.needs_grad,
            f"{title} leaves the gradients of padding unset, so a dense padded batch can only be used for inference",
            pack,
            "https://github.com/Dao-AILab/flash-attention/issues/2324",
        ),
    )
