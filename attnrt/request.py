"""What is asked: one attention call as a frozen, hashable value with no tensors in it.

Letters used in every docstring: B batch (or packed sequences), Hq / Hkv query and KV heads, Sq / Skv query and key
lengths, Dqk / Dv head dims, T total tokens of a packed batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch

from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}
ITEMSIZE = {"fp8_e4m3": 1, "fp8_e5m2": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
LAYOUTS = ("bhsd", "bshd", "sbhd", "thd")
PAGED_LAYOUTS = ("bshd", "bhsd")
ALIGNMENTS = ("top_left", "bottom_right")
_DTYPE_ALIASES = {str(d).removeprefix("torch."): name for d, name in DTYPES.items()} | {
    "half": "fp16",
    "float": "fp32",
    "double": "fp64",
}


@dataclass(frozen=True, slots=True)
class Operand:
    """A mask or bias: its shape broadcastable to (B, Hq, Sq, Skv), padded with ones on the left to four dims."""

    shape: tuple[int, int, int, int]
    dtype: str
    requires_grad: bool = False
    strided: bool = False
    """Its last dim is expanded or strided, so a kernel that reads rows must copy it."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """Everything a choice may depend on. Build it with `from_shape`, or from tensors through `attnrt.explain`."""

    dtype: str
    layout: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    """Query length; of the longest sequence when packed."""
    seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    scale: float
    tokens_q: int
    """Query tokens in all: B * Sq, or the packed total."""
    tokens_kv: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: Literal["top_left", "bottom_right"] | None = None
    """None where both mean the same or nothing counts positions."""
    left: int | None = None
    """Effective bound: a query at position p sees keys from p - left on. None: all. Derived from causal and window."""
    right: int | None = None
    """Effective bound: ... up to p + right."""
    mask: Operand | None = None
    bias: Operand | None = None
    alibi: Literal["heads", "batch_heads"] | None = None
    softcap: float | None = None
    sinks: bool = False
    sinks_grad: bool = False
    dropout_p: float = 0.0
    padded_q: bool = False
    padded_kv: bool = False
    page_size: int | None = None
    """Keys a page, where k and v are pools of pages; `seqlen_kv` is then the pages of a sequence times this."""
    same_lengths: bool = False
    """Padded or packed with the same lengths for queries and keys."""
    needs_grad: bool = False
    """Something wants a gradient. Also set for every `attention` call with dropout: a checkpoint's pass without
    gradients must meet the kernel, and so the random numbers, of the pass that repeats it."""
    needs_lse: bool = False
    lse_backward: bool = False
    """The backward starts from an output and LSE that were merged over more keys than these (ring attention)."""
    deterministic: bool = False
    tf32: bool = False
    """fp32 products may round their inputs to TF32's 10 bits: PyTorch's own switch for matmuls, on CUDA."""
    strides: Literal["contiguous", "strided", "last_dim"] = "contiguous"
    """Of q, k and v: contiguous in their layout; other strides with a contiguous last dim; last dim strided too."""
    aligned: bool = True
    """Every pointer and stride of q, k, v is a multiple of 16 bytes."""
    expanded: bool = False
    """Some dim of q, k or v is expanded: stride 0, so no copy engine can address it."""
    may_pad: bool = False
    """The policy allows a kernel to copy q, k and v into larger head dims, with zeros behind them."""
    capturing: bool = False
    compiled: bool = False
    """Inside a graph that torch.compile or torch.export traced."""
    dynamic: bool = False
    """... with a size that varies from run to run, so the choice is made at run time, not when the graph is traced."""

    @property
    def packed(self) -> bool:
        return self.layout == "thd"

    @property
    def padded(self) -> bool:
        return self.padded_q or self.padded_kv

    @property
    def paged(self) -> bool:
        """k and v are pools of pages, (pages in all, page_size, Hkv, D) in "bshd", and a table says whose is which."""
        return self.page_size is not None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads_q // self.heads_kv

    @property
    def head_dim(self) -> int:
        return max(self.head_dim_qk, self.head_dim_v)

    @property
    def banded(self) -> bool:
        """Some keys are out of reach by position (causal or window)."""
        return self.left is not None or self.right is not None

    @property
    def windowed(self) -> bool:
        """Banded by more than a plain causal mask."""
        return self.left is not None or self.right not in (None, 0)

    @property
    def is_causal(self) -> bool:
        """The band is the plain causal one."""
        return self.right == 0 and self.left is None

    @property
    def empty(self) -> bool:
        """No query or no key at all."""
        return 0 in (self.batch, self.heads_q, self.seqlen_q, self.seqlen_kv, self.tokens_q, self.tokens_kv)

    @property
    def scores(self) -> int:
        """Elements of the full score matrix, B * Hq * Sq * Skv."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_kv

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def describe(self) -> str:
        """The call in one line, features that are off left out."""
        heads = f"Hq={self.heads_q} Hkv={self.heads_kv}" + (f" ({self.kind})" if self.kind != "MHA" else "")
        dims = f"D={self.head_dim_qk}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim_qk else "")
        lengths = f"Sq={self.seqlen_q} Skv={self.seqlen_kv}"
        if self.packed:
            lengths = f"T={self.tokens_q}" + (f"/{self.tokens_kv}" if self.tokens_kv != self.tokens_q else "")
            lengths += f" longest {self.seqlen_q}" + (f"/{self.seqlen_kv}" if self.seqlen_kv != self.seqlen_q else "")
        parts = [self.dtype, self.layout, f"B={self.batch}", heads, lengths, dims, *self.features()]
        return " ".join(parts)

    @property
    def kind(self) -> Literal["MHA", "GQA", "MQA"]:
        return "MHA" if self.heads_kv == self.heads_q else "MQA" if self.heads_kv == 1 else "GQA"

    def features(self) -> list[str]:
        """The features in use, as words for a report."""
        words = ["training" if self.needs_grad else "inference"]
        if self.causal:
            words.append("causal")
        if self.window:
            words.append(f"window={self.window}".replace(" ", ""))
        if self.alignment:
            words.append(self.alignment)
        if self.mask:
            words.append(f"mask={list(self.mask.shape)}".replace(" ", ""))
        if self.bias:
            words.append(
                f"bias={list(self.bias.shape)}".replace(" ", "") + ("+grad" if self.bias.requires_grad else "")
            )
        if self.softcap is not None:
            words.append(f"softcap={self.softcap:g}")
        if self.dropout_p:
            words.append(f"dropout={self.dropout_p:g}")
        if self.page_size is not None:
            words.append(f"pages={self.page_size}")
        flags = {
            "alibi": self.alibi is not None,
            "sinks": self.sinks,
            "padded": self.padded,
            "lse": self.needs_lse,
            "lse_backward": self.lse_backward,
            "deterministic": self.deterministic,
            "tf32": self.tf32,
            "strided": self.strides != "contiguous",
            "unaligned": not self.aligned,
            "expanded": self.expanded,
            "capturing": self.capturing,
            "compiled": self.compiled,
            "dynamic": self.dynamic,
        }
        return words + [name for name, on in flags.items() if on]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("mask", "bias"):
            if (operand := values[name]) is not None:
                values[name] = {f.name: getattr(operand, f.name) for f in fields(operand)}
        return values

    @classmethod
    def from_shape(
        cls,
        *,
        batch: int,
        heads_q: int,
        seqlen_q: int,
        head_dim: int,
        heads_kv: int | None = None,
        seqlen_kv: int | None = None,
        head_dim_v: int | None = None,
        dtype: str | torch.dtype = "bf16",
        layout: str | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        alignment: str | None = None,
        packed: bool = False,
        padded: bool | Literal["kv"] = False,
        page_size: int | None = None,
        training: bool = False,
        mask: bool | tuple[int, ...] = False,
        bias: bool | tuple[int, ...] = False,
        bias_grad: bool = False,
        alibi: bool = False,
        softcap: float | None = None,
        sinks: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
        deterministic: bool = False,
        tf32: bool = False,
        capturing: bool = False,
        compiled: bool = False,
    ) -> Self:
        """A request from sizes alone.

        Args:
            batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v: sizes in elements; `heads_kv`,
                `seqlen_kv`, `head_dim_v` default to their query twins. When `packed`, the lengths are those of every
                sequence, and queries and keys share them if they are equal.
            dtype: "fp16", "bf16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2", or a torch dtype.
            mask, bias: True for the full (B, Hq, Sq, Skv) shape, or a shape broadcastable to it.
            bias_grad: the bias wants a gradient. padded: `seqlens_q` and `seqlens_kv` are given, or with "kv" only the
                latter, as for a KV cache.
            tf32: fp32 products may be made in TF32, as torch.set_float32_matmul_precision("high") allows.
            page_size: keys a page of a paged KV cache, as `page_table` makes it. It brings `seqlens_kv` with it, and
                `seqlen_kv` is whole pages.

        Raises:
            ArgumentError, ArgumentTypeError: a size, name or combination cannot be right.
        """
        heads_kv = heads_q if heads_kv is None else heads_kv
        seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "heads_q": heads_q, "heads_kv": heads_kv, "seqlen_q": seqlen_q}
        sizes |= {"seqlen_kv": seqlen_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
        for name, size in sizes.items():
            check_size(name, size, at_least=0 if name in ("batch", "seqlen_q", "seqlen_kv") else 1)
        check_groups(heads_q, heads_kv)
        if padded != "kv":
            check_flag("padded", padded)
        flags = {"packed": packed, "training": training, "bias_grad": bias_grad, "alibi": alibi}
        flags |= {"sinks": sinks, "return_lse": return_lse, "tf32": tf32, "capturing": capturing, "compiled": compiled}
        for name, flag in flags.items():
            check_flag(name, flag)
        layout = check_layout(("thd" if packed else "bshd") if layout is None else layout)
        if packed != (layout == "thd"):
            raise ArgumentError("layout", layout, "packed sequences have layout 'thd', and only they do")
        if packed and padded:
            raise ArgumentError("padded", padded, "a packed batch has no padding; use one of packed and padded")
        if page_size is not None:
            check_size("page_size", page_size, at_least=1)
            check_paged_layout("page_size", page_size, layout)
            if training:
                raise ArgumentError("training", training, "a paged KV cache has no backward: leave page_size out")
            if seqlen_kv % page_size:
                whole = -(-seqlen_kv // page_size) * page_size
                raise ArgumentError("seqlen_kv", seqlen_kv, f"is whole pages of page_size={page_size}: {whole}")
            padded = padded or "kv"
        full = (batch, heads_q, seqlen_q, seqlen_kv)
        if bias_grad and not bias:
            raise ArgumentError("bias_grad", bias_grad, "there is no bias; pass bias=True or its shape")
        name = dtype_name(dtype)
        if tf32 and name != "fp32":
            raise ArgumentError("tf32", tf32, f"only fp32 products can be rounded to TF32, and dtype is {name}")
        return cls.build(
            dtype=name,
            layout=layout,
            batch=batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            head_dim_qk=head_dim,
            head_dim_v=head_dim_v,
            tokens_q=batch * seqlen_q,
            tokens_kv=batch * seqlen_kv,
            causal=causal,
            window=window,
            alignment=alignment,
            mask=None if mask is False else Operand(broadcastable("mask", mask, full), "bool"),
            bias=None if bias is False else Operand(broadcastable("bias", bias, full), name, bias_grad),
            alibi="heads" if alibi else None,
            softcap=softcap,
            sinks=sinks,
            sinks_grad=sinks and training,
            dropout_p=dropout_p,
            padded_q=padded is True,
            padded_kv=bool(padded),
            page_size=page_size,
            same_lengths=(packed or padded is True) and seqlen_q == seqlen_kv,
            needs_grad=training,
            needs_lse=return_lse,
            deterministic=deterministic,
            scale=scale,
            tf32=tf32,
            capturing=capturing,
            compiled=compiled,
        )

    @classmethod
    def build(
        cls,
        *,
        causal: bool,
        window: Any,
        alignment: Any,
        softcap: Any,
        dropout_p: Any,
        scale: Any,
        deterministic: Any,
        **rest: Any,
    ) -> Self:
        """Check the scalar options, settle alignment and band, and freeze. Shapes must have been checked."""
        check_flag("causal", causal)
        check_flag("deterministic", deterministic)
        window = check_window(window)
        seqlen_q, seqlen_kv = rest["seqlen_q"], rest["seqlen_kv"]
        varying = rest["layout"] == "thd" or rest["padded_q"] or rest["padded_kv"]
        agree = seqlen_q == seqlen_kv and (rest["same_lengths"] or not varying)
        positional = [n for n, on in (("causal", causal), ("window", window), ("alibi_slopes", rest["alibi"])) if on]
        alignment = check_alignment(alignment, agree, positional, seqlen_q, seqlen_kv, varying)
        left, right = band(causal, window, alignment, seqlen_q, seqlen_kv)
        if left is None and right is None and not rest["alibi"]:
            alignment = None
        return cls(
            causal=causal,
            window=window,
            alignment=alignment,
            left=left,
            right=right,
            softcap=check_softcap(softcap),
            dropout_p=check_dropout(dropout_p),
            scale=check_scale(scale, rest["head_dim_qk"]),
            deterministic=deterministic,
            **rest,
        )


def band(
    causal: bool,
    window: tuple[int | None, int | None] | None,
    alignment: str | None,
    seqlen_q: int,
    seqlen_kv: int,
) -> tuple[int | None, int | None]:
    """(left, right) bounds that really exclude a key; None where a bound is missing or too wide to matter.

    Query i stands at p = i (top-left) or i + Skv - Sq (bottom-right) and sees keys p - left .. p + right. With
    lengths that vary inside the batch, Sq and Skv are the longest, so a bound dropped here excludes nothing anywhere.
    """
    left, right = window or (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    reach_left, reach_right = (seqlen_q, seqlen_kv) if alignment == "top_left" else (seqlen_kv, seqlen_q)
    if left is not None and left >= reach_left - 1:
        left = None
    if right is not None and right >= reach_right - 1:
        right = None
    return left, right


def broadcastable(name: str, shape: Any, full: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """`shape` left-padded to four dims, checked to broadcast to (B, Hq, Sq, Skv). True stands for the full shape."""
    if shape is True:
        return full
    if not isinstance(shape, (tuple, list)) or any(type(n) is not int for n in shape):
        raise ArgumentTypeError(name, shape, f"a shape broadcastable to (B, Hq, Sq, Skv) = {full} is needed")
    dims: tuple[int, ...] = tuple(shape)
    padded = (1,) * (4 - len(dims)) + dims
    if len(dims) > 4 or any(n not in (1, want) for n, want in zip(padded, full, strict=False)):
        raise ArgumentError(name, dims, f"its shape must be broadcastable to (B, Hq, Sq, Skv) = {full}")
    return padded  # type: ignore[return-value]


def dtype_name(dtype: str | torch.dtype) -> str:
    name = DTYPES.get(dtype) if isinstance(dtype, torch.dtype) else _DTYPE_ALIASES.get(str(dtype), str(dtype))
    if name not in ITEMSIZE:
        raise UnknownNameError("dtype", dtype, ITEMSIZE)
    return name


def check_size(name: str, size: Any, at_least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise ArgumentTypeError(name, size, "an integer is needed")
    if size < at_least:
        raise ArgumentError(name, size, f"at least {at_least} is needed")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(name, value, "True or False is needed")


def check_groups(heads_q: int, heads_kv: int) -> None:
    if heads_q % heads_kv:
        divisors = [n for n in range(1, heads_q + 1) if heads_q % n == 0]
        raise ArgumentError("heads_kv", heads_kv, f"must divide heads_q={heads_q}, so be one of {divisors}")


def check_layout(layout: Any) -> str:
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    return str(layout)


def check_paged_layout(name: str, value: Any, layout: str) -> None:
    if layout not in PAGED_LAYOUTS:
        pools = "'bshd' (num_pages, page_size, Hkv, D) or 'bhsd' (num_pages, Hkv, page_size, D)"
        raise ArgumentError(name, value, f"layout={layout!r} has no pages: k and v are pools, {pools}")


def check_window(window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentTypeError("window", window, "a pair (left, right) is needed, with None for an unbounded side")
    for bound in window:
        if bound is None:
            continue
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise ArgumentTypeError("window", window, "each bound is an integer number of keys, or None")
        if bound < 0:
            raise ArgumentError("window", window, "a bound is 0 or more; an unbounded side is None here, not -1")
    return None if tuple(window) == (None, None) else (window[0], window[1])


def check_alignment(
    alignment: Any, agree: bool, positional: list[str], seqlen_q: int, seqlen_kv: int, varying: bool
) -> Literal["top_left", "bottom_right"] | None:
    if alignment is not None and (not isinstance(alignment, str) or alignment not in ALIGNMENTS):
        raise UnknownNameError("alignment", alignment, ALIGNMENTS)
    if agree or not positional:
        return None
    if alignment is None:
        lengths = "lengths that vary inside the batch" if varying else f"Sq={seqlen_q} and Skv={seqlen_kv}"
        remedy = " (for self-attention pass the same tensor for queries and keys)" if varying else ""
        raise ArgumentError(
            "alignment",
            None,
            f"{' and '.join(positional)} with {lengths} has two meanings, and libraries silently disagree: "
            "'top_left' puts query i at key i (PyTorch, ONNX), 'bottom_right' at key i + Skv - Sq "
            f"(flash-attn); say which{remedy}",
        )
    return "top_left" if alignment == "top_left" else "bottom_right"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(name, value, "a Python number is needed")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ArgumentError(name, value, "a finite number is needed")
    return number


def check_softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    if (number := _number("softcap", softcap)) <= 0:
        raise ArgumentError("softcap", softcap, "must be over 0; None turns it off")
    return number


def check_dropout(dropout_p: Any) -> float:
    if not 0 <= (number := _number("dropout_p", dropout_p)) < 1:
        raise ArgumentError("dropout_p", dropout_p, "a probability in [0, 1) is needed")
    return number


def check_scale(scale: Any, head_dim_qk: int) -> float:
    return 1 / math.sqrt(head_dim_qk) if scale is None else _number("scale", scale)
