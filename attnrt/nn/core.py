"""The core attention of a layer: no projections, heads as Transformer Engine and Megatron count and name them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from attnrt.api import attention
from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError
from attnrt.nn.config import AttentionConfig, MaskType, SoftmaxType, divisors
from attnrt.request import check_dropout, check_scale, check_size, check_softcap

FORMATS = ("bshd", "sbhd", "thd")
_BANDS: dict[str, tuple[bool, str | None]] = {
    "no_mask": (False, None),
    "padding": (False, None),
    "arbitrary": (False, None),
    "causal": (True, "top_left"),
    "padding_causal": (True, "top_left"),
    "causal_bottom_right": (True, "bottom_right"),
    "padding_causal_bottom_right": (True, "bottom_right"),
}
"""Mask type -> causal, alignment."""


class DotProductAttention(nn.Module):
    """A drop-in for the core-attention module of Megatron and Transformer Engine.

    It has no weights, unless softmax_type is "learnable": then `softmax_offset`, (heads,), a sink per head.
    """

    softmax_offset: Tensor | None

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_query_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: MaskType = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        softmax_type: SoftmaxType = "vanilla",
        softcap: float | None = None,
        backend: str | None = None,
        policy: str | None = None,
        deterministic: bool | None = None,
    ) -> None:
        """Args as in `AttentionConfig`; `deterministic`, `backend` and `policy` as in `attnrt.attention`.

        Raises:
            ArgumentError, ArgumentTypeError: an argument cannot be right; for num_query_groups with the divisors.
        """
        super().__init__()
        check_size("num_attention_heads", num_attention_heads, at_least=1)
        check_size("kv_channels", kv_channels, at_least=1)
        groups = num_attention_heads if num_query_groups is None else num_query_groups
        if type(groups) is not int:
            raise ArgumentTypeError("num_query_groups", groups, "a number, or None for one group per head, is needed")
        if groups < 1 or num_attention_heads % groups:
            raise ArgumentError(
                "num_query_groups",
                num_query_groups,
                f"must divide num_attention_heads={num_attention_heads}, so be one of {divisors(num_attention_heads)}",
            )
        if softmax_type not in get_args(SoftmaxType):
            raise UnknownNameError("softmax_type", softmax_type, get_args(SoftmaxType))
        self.num_attention_heads, self.num_query_groups, self.kv_channels = num_attention_heads, groups, kv_channels
        self.attention_dropout = check_dropout(attention_dropout)
        self.qkv_format, self.attn_mask_type = _format(qkv_format), _mask_type(attn_mask_type)
        self.window_size, self.window = window_size, _window(window_size)
        self.softmax_scale = check_scale(softmax_scale, kv_channels)
        self.softmax_type, self.softcap = softmax_type, check_softcap(softcap)
        self.has_sinks = softmax_type != "vanilla"
        self.backend, self.policy, self.deterministic = backend, policy, deterministic
        if softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.zeros(num_attention_heads))
        else:
            zeros = torch.zeros(num_attention_heads) if softmax_type == "off-by-one" else None
            self.register_buffer("softmax_offset", zeros, persistent=False)

    @classmethod
    def of(cls, config: AttentionConfig, layer: int = 0) -> DotProductAttention:
        """The core of layer `layer`, counted from 0."""
        return cls(
            config.num_attention_heads,
            config.head_dim,
            config.num_query_groups,
            config.attention_dropout,
            config.qkv_format,
            config.attn_mask_type,
            config.window_of(layer),
            config.softmax_scale,
            config.softmax_type,
            config.softcap,
            config.backend,
            config.policy,
        )

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        *,
        qkv_format: str | None = None,
        attn_mask_type: MaskType | None = None,
        window_size: tuple[int, int] | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        seqlens_q: Tensor | None = None,
        seqlens_kv: Tensor | None = None,
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        page_table: Tensor | None = None,
    ) -> Tensor:
        """Attention of every head.

        Args:
            query_layer: (S, B, heads, D) in "sbhd", (B, S, heads, D) in "bshd", (T, heads, D) in "thd".
            key_layer, value_layer: the same with num_query_groups heads.
            attention_mask: bool, **True = masked out**, the opposite of attnrt.attention's. For the "padding" types
                (B, 1, 1, S), right-padded, or a pair of them for queries and keys, either None; for "arbitrary" any
                shape that broadcasts to (B, heads, Sq, Skv). Other types take none.
            qkv_format, attn_mask_type, window_size: instead of the module's.
            cu_seqlens_q, cu_seqlens_kv: (B + 1,) int32; for "thd", or in place of a padding mask.
            seqlens_q, seqlens_kv: (B,) int32, in place of a padding mask.
            core_attention_bias: added to the scaled scores. alibi_slopes, page_table: as in attnrt.attention.

        Returns:
            The same leading dims, then heads * Dv.

        Raises:
            ArgumentError, ArgumentTypeError: other heads or head dims than the module's, or what `attention` raises.
        """
        layout = self.qkv_format if qkv_format is None else _format(qkv_format)
        mask_type = self.attn_mask_type if attn_mask_type is None else _mask_type(attn_mask_type)
        self._check_heads("query_layer", query_layer, self.num_attention_heads)
        self._check_heads("key_layer", key_layer, self.num_query_groups)
        causal, alignment = _BANDS[mask_type]
        window = self.window if window_size is None else _window(window_size)
        if window is not None and alignment is None:
            alignment = "bottom_right"  # as Transformer Engine without a causal mask
        if layout != "thd" and (cu_seqlens_q is not None or cu_seqlens_kv is not None):
            seqlens_q, seqlens_kv = _lengths((cu_seqlens_q, cu_seqlens_kv), (seqlens_q, seqlens_kv))
            cu_seqlens_q = cu_seqlens_kv = None
        mask = None
        if attention_mask is not None:
            mask, seqlens_q, seqlens_kv = _masked(mask_type, attention_mask, seqlens_q, seqlens_kv)
        elif mask_type == "arbitrary":
            raise ArgumentError("attention_mask", None, "attn_mask_type='arbitrary' needs one")
        elif mask_type.startswith("padding") and layout != "thd" and seqlens_q is None and seqlens_kv is None:
            raise ArgumentError(
                "attention_mask", None, f"attn_mask_type={mask_type!r} needs it, or seqlens_q and seqlens_kv"
            )
        return attention(
            query_layer,
            key_layer,
            value_layer,
            layout=layout,
            causal=causal,
            window=window,
            alignment=alignment,
            mask=mask,
            bias=core_attention_bias,
            alibi_slopes=alibi_slopes,
            softcap=self.softcap,
            sinks=self.softmax_offset if self.has_sinks else None,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            seqlens_q=seqlens_q,
            seqlens_kv=seqlens_kv,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            page_table=page_table,
            deterministic=self.deterministic,
            backend=self.backend,
            policy=self.policy,
        ).flatten(-2)

    def _check_heads(self, name: str, tensor: Tensor, heads: int) -> None:
        """value_layer's heads are key_layer's, which `attention` sees to; its head dim may be another."""
        if isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.shape[-2:] != (heads, self.kv_channels):
            said = f"must end in (heads, head dim) = ({heads}, {self.kv_channels}), as this module was made for"
            raise ArgumentError(name, tensor, said)

    def _apply(self, *args: Any, **kwargs: Any) -> DotProductAttention:
        """Made on the meta device and given memory: the zeros of "off-by-one" are in no checkpoint."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.softmax_type == "off-by-one" and self.softmax_offset is not None:
            self.softmax_offset = torch.zeros_like(self.softmax_offset)
        return self

    def extra_repr(self) -> str:
        kept = ("num_attention_heads", "num_query_groups", "kv_channels", "qkv_format", "attn_mask_type", "window_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in kept)


def _format(value: Any) -> str:
    if value not in FORMATS:
        raise UnknownNameError("qkv_format", value, FORMATS)
    return str(value)


def _mask_type(value: Any) -> str:
    if value not in _BANDS:
        raise UnknownNameError("attn_mask_type", value, _BANDS)
    return str(value)


def _window(size: Any) -> tuple[int | None, int | None] | None:
    """Transformer Engine's (left, right), -1 for unbounded, as attnrt's."""
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2 or any(type(n) is not int or n < -1 for n in size):
        raise ArgumentError("window_size", size, "a pair (left, right) of 0 or more, or -1 for unbounded, is needed")
    left, right = (None if n == -1 else n for n in size)
    return None if left is right is None else (left, right)


def _lengths(
    packed: tuple[Tensor | None, Tensor | None], given: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """(B,) lengths of a padded batch from offsets, one tensor for both sides where the offsets are one."""
    for name, offsets, lengths in zip(("q", "kv"), packed, given, strict=True):
        if offsets is not None and lengths is not None:
            raise ArgumentError(f"seqlens_{name}", lengths, f"cu_seqlens_{name} says the lengths already")
    q, kv = (
        lengths if offsets is None else offsets.diff().to(torch.int32)
        for offsets, lengths in zip(packed, given, strict=True)
    )
    return q, q if packed[0] is packed[1] else kv


def _masked(
    mask_type: str, mask: Any, seqlens_q: Tensor | None, seqlens_kv: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(mask, seqlens_q, seqlens_kv) for attnrt.attention."""
    pair = mask if isinstance(mask, (tuple, list)) else (mask, mask)
    if len(pair) != 2 or all(one is None for one in pair):
        raise ArgumentError("attention_mask", mask, "a mask or a pair of them is needed, (queries', keys')")
    for one in pair:
        if one is not None and (not isinstance(one, Tensor) or one.dtype != torch.bool):
            raise ArgumentTypeError("attention_mask", one, "a bool tensor is needed, True = masked out")
    if mask_type == "arbitrary":
        if pair[0] is None or pair[0] is not pair[1]:
            raise ArgumentError("attention_mask", mask, "attn_mask_type='arbitrary' takes one mask")
        return ~pair[0], seqlens_q, seqlens_kv
    if not mask_type.startswith("padding"):
        raise ArgumentError("attention_mask", mask, f"attn_mask_type={mask_type!r} takes none; leave it out")
    if seqlens_q is not None or seqlens_kv is not None:
        raise ArgumentError("attention_mask", mask, "the lengths are given already")
    lengths_q = _right_padded(pair[0])
    return None, lengths_q, lengths_q if pair[0] is pair[1] else _right_padded(pair[1])


def _right_padded(mask: Tensor | None) -> Tensor | None:
    """(B,) int32 lengths of a (B, 1, 1, S) padding mask. That padding is on the right is seen on the CPU only."""
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ArgumentError("attention_mask", mask, "a padding mask has shape (B, 1, 1, S)")
    mask = mask[:, 0, 0]
    if mask.is_cpu and not torch.compiler.is_compiling() and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ArgumentError("attention_mask", mask, "padding must be on the right; else use attn_mask_type='arbitrary'")
    return (~mask).sum(-1, dtype=torch.int32)
