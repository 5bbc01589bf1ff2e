"""Attention layers with their projections: what a transformer block calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.nn.cache import CacheStep
from attnrt.nn.config import AttentionConfig
from attnrt.nn.core import DotProductAttention
from attnrt.nn.rotary import RotaryEmbedding, apply_rotary


class _Attention(nn.Module):
    """What self- and cross-attention share: the core, the output projection, the norms of q and k."""

    q_layernorm: nn.Module | None
    k_layernorm: nn.Module | None

    def __init__(self, config: AttentionConfig, layer: int = 0) -> None:
        super().__init__()
        if not isinstance(config, AttentionConfig):
            raise ArgumentTypeError("config", config, "an AttentionConfig is needed: AttentionConfig(**fields)")
        self.config, self.layer = config, layer
        self.core_attention = DotProductAttention.of(config, layer)
        inner = config.num_attention_heads * config.head_dim
        self.linear_proj = nn.Linear(inner, config.hidden_size, bias=config.add_bias_linear)
        self.q_layernorm = _norm(config) if config.qk_layernorm else None
        self.k_layernorm = _norm(config) if config.qk_layernorm else None

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_layernorm is None or self.k_layernorm is None:
            return q, k
        return self.q_layernorm(q), self.k_layernorm(k)

    def _format(self, hidden: Tensor, packed: bool) -> str:
        config = self.config
        dims = 2 if packed else 3
        shape = "(T, hidden)" if packed else f"({', '.join(config.qkv_format[:2].upper())}, hidden)"
        if hidden.ndim != dims or hidden.shape[-1] != config.hidden_size:
            raise ArgumentError("hidden", hidden, f"{shape} with hidden={config.hidden_size} is needed here")
        return "thd" if packed else config.qkv_format


class SelfAttention(_Attention):
    """Self-attention of one layer: `linear_qkv` (or `linear_q`, `linear_k`, `linear_v`), rotary, core, `linear_proj`.

    The rows of `linear_qkv.weight` are Megatron's: for each group its heads' queries, its key, its value.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0) -> None:
        """`layer`: which of the model's, from 0: it decides on the window, and where in a cache it writes."""
        super().__init__(config, layer)
        q, kv = config.num_attention_heads * config.head_dim, config.groups * config.head_dim
        if config.fused_qkv:
            self.linear_qkv = nn.Linear(config.hidden_size, q + 2 * kv, bias=config.qkv_bias)
        else:
            self.linear_q = nn.Linear(config.hidden_size, q, bias=config.qkv_bias)
            self.linear_k = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
            self.linear_v = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.rotary = RotaryEmbedding.of(config) if config.position_embedding_type == "rope" else None

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        step: CacheStep | None = None,
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """One layer's attention.

        Args:
            hidden: (B, S, hidden), with qkv_format "sbhd" (S, B, hidden), or with cu_seqlens packed: (T, hidden).
            attention_mask: as in `DotProductAttention`, True = masked out.
            seqlens: (B,) int32: how much of each sequence is real. cu_seqlens: (B + 1,) int32, max_seqlen: the longest.
            positions: (B, S) or (S,), packed (T,): where tokens stand; None: from 0, each sequence, or the step's.
            rotary: cos and sin of the positions, where layers share them: `attention.rotary(positions)`.
            step: of a KV cache; causal masking is then bottom-right, each query seeing all that came before it.

        Returns:
            hidden's shape.
        """
        layout = self._format(hidden, cu_seqlens is not None)
        self._check_unused(seqlens, cu_seqlens, max_seqlen, positions, rotary)
        if step is not None and layout != "thd":
            _check_places("step", step.positions, step.positions.shape, hidden, layout)
        q, k, v = self._project(hidden)
        q, k = self._normed(q, k)
        if self.rotary is not None:
            if rotary is None:
                rotary = self.rotary(_positions(hidden, layout, positions, step, cu_seqlens))
            cos, sin = rotary
            for angles in rotary:
                _check_places("rotary", angles, angles.shape[:-1], hidden, layout)
            if layout == "sbhd" and cos.ndim == 3:
                cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
            elif cos.ndim == 2 and layout != "thd":
                cos, sin = (t[None] if layout == "bshd" else t[:, None] for t in (cos, sin))
            q = apply_rotary(q, cos, sin, self.config.rotary_interleaved)
            k = apply_rotary(k, cos, sin, self.config.rotary_interleaved)
        q = q.flatten(-3, -2)
        options: dict[str, Any] = {"core_attention_bias": core_attention_bias, "alibi_slopes": alibi_slopes}
        if step is not None:
            if cu_seqlens is not None or seqlens is not None or attention_mask is not None:
                raise ArgumentError("step", step, "a cache keeps the lengths; leave out seqlens and masks")
            if self.config.attn_mask_type == "arbitrary":
                raise ArgumentError("step", step, "a cache takes no mask, which attn_mask_type='arbitrary' needs")
            out = self._cached(q, k, v, layout, step, options)
        else:
            if layout == "thd":
                options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
                options |= {"max_seqlen_q": max_seqlen, "max_seqlen_kv": max_seqlen}
            elif seqlens is not None:
                options |= {"seqlens_q": seqlens, "seqlens_kv": seqlens}
            out = self.core_attention(q, k, v, attention_mask, qkv_format=layout, **options)
        projected: Tensor = self.linear_proj(out)
        return projected

    def _check_unused(self, seqlens: Any, cu_seqlens: Any, max_seqlen: Any, positions: Any, rotary: Any) -> None:
        """Nothing that arrives is passed over."""
        if cu_seqlens is None:
            if max_seqlen is not None:
                raise ArgumentError("max_seqlen", max_seqlen, "goes with cu_seqlens; else the length is in the shape")
        elif not isinstance(cu_seqlens, Tensor):
            raise ArgumentTypeError("cu_seqlens", cu_seqlens, "a (B + 1,) int32 tensor is needed")
        elif seqlens is not None:
            raise ArgumentError("seqlens", seqlens, "cu_seqlens says the lengths already")
        if positions is not None and rotary is not None:
            raise ArgumentError("positions", positions, "rotary holds their cos and sin already; give one of them")
        if self.rotary is None:
            for name, value in (("positions", positions), ("rotary", rotary)):
                if value is not None:
                    kind = self.config.position_embedding_type
                    raise ArgumentError(name, value, f"position_embedding_type={kind!r} has no use for it")

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q as (..., groups, heads per group, D), k and v as (..., groups, D)."""
        config = self.config
        lead, per_group, dim = hidden.shape[:-1], config.heads_per_group, config.head_dim
        if config.fused_qkv:
            mixed = self.linear_qkv(hidden).view(*lead, config.groups, per_group + 2, dim)
            return mixed[..., :per_group, :], mixed[..., per_group, :], mixed[..., per_group + 1, :]
        q = self.linear_q(hidden).view(*lead, config.groups, per_group, dim)
        k, v = (linear(hidden).view(*lead, config.groups, dim) for linear in (self.linear_k, self.linear_v))
        return q, k, v

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, layout: str, step: CacheStep, options: dict[str, Any]) -> Tensor:
        swap = layout == "sbhd"
        if swap:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v = step.write(self.layer, k, v)
        options |= {"seqlens_q": step.seqlens_q, "seqlens_kv": step.seqlens_kv, "page_table": step.page_table}
        mask_type = "causal_bottom_right" if "causal" in self.config.attn_mask_type else "no_mask"
        out: Tensor = self.core_attention(q, k, v, qkv_format="bshd", attn_mask_type=mask_type, **options)
        return out.transpose(0, 1) if swap else out


class CrossAttention(_Attention):
    """Attention of one sequence to another: `linear_q`, `linear_kv` (or `linear_k`, `linear_v`), core, `linear_proj`.

    The rows of `linear_kv.weight` are Megatron's: for each group its key, its value. There is no rotary embedding, and
    no causal mask or window, whatever a decoder's own layers use: every query sees the whole context but its padding.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0, context_size: int | None = None) -> None:
        """`context_size`: hidden size of what is attended to; None: the same."""
        super().__init__(config, layer)
        self.core_attention.window_size = self.core_attention.window = None  # a context has no place beside a query
        q, kv = config.num_attention_heads * config.head_dim, config.groups * config.head_dim
        self.context_size = config.hidden_size if context_size is None else context_size
        self.linear_q = nn.Linear(config.hidden_size, q, bias=config.qkv_bias)
        if config.fused_qkv:
            self.linear_kv = nn.Linear(self.context_size, 2 * kv, bias=config.qkv_bias)
        else:
            self.linear_k = nn.Linear(self.context_size, kv, bias=config.qkv_bias)
            self.linear_v = nn.Linear(self.context_size, kv, bias=config.qkv_bias)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of a context, (..., groups, D) each, to be kept while a decoder goes on."""
        if context.shape[-1] != self.context_size:
            raise ArgumentError("context", context, f"its last dim must be {self.context_size}")
        lead, groups, dim = context.shape[:-1], self.config.groups, self.config.head_dim
        if self.config.fused_qkv:
            mixed = self.linear_kv(context).view(*lead, groups, 2, dim)
            k, v = mixed[..., 0, :], mixed[..., 1, :]
        else:
            k, v = (linear(context).view(*lead, groups, dim) for linear in (self.linear_k, self.linear_v))
        return (k if self.k_layernorm is None else self.k_layernorm(k)), v

    def forward(
        self,
        hidden: Tensor,
        context: Tensor | None = None,
        *,
        keys_values: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        seqlens_q: Tensor | None = None,
        seqlens_kv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        core_attention_bias: Tensor | None = None,
    ) -> Tensor:
        """hidden's shape. `context`, or `keys_values` of one; the rest as in `DotProductAttention`.

        A padding mask is a pair, (queries', context's), either None: one alone might mean either.
        """
        if (context is None) == (keys_values is None):
            raise ArgumentError("context", context, "one of context and keys_values is needed")
        layout = self._format(hidden, cu_seqlens_q is not None)
        k, v = self.keys_values(context) if context is not None else keys_values  # type: ignore[misc]
        config = self.config
        q = self.linear_q(hidden).view(*hidden.shape[:-1], config.num_attention_heads, config.head_dim)
        q = q if self.q_layernorm is None else self.q_layernorm(q)
        mask_type = "no_mask"
        if attention_mask is not None:
            mask_type = "arbitrary" if config.attn_mask_type == "arbitrary" else "padding"
            if mask_type == "padding" and isinstance(attention_mask, Tensor):
                said = "a pair of padding masks is needed, (queries', context's), either None; or seqlens_kv"
                raise ArgumentError("attention_mask", attention_mask, said)
        options: dict[str, Any] = {"seqlens_q": seqlens_q, "seqlens_kv": seqlens_kv}
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
        options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_kv}
        out = self.core_attention(
            q,
            k,
            v,
            attention_mask,
            qkv_format=layout,
            attn_mask_type=mask_type,
            core_attention_bias=core_attention_bias,
            **options,
        )
        projected: Tensor = self.linear_proj(out)
        return projected


def _norm(config: AttentionConfig) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.head_dim, eps=config.layernorm_epsilon)


def _positions(
    hidden: Tensor, layout: str, positions: Tensor | None, step: CacheStep | None, cu_seqlens: Tensor | None
) -> Tensor:
    """(B, S), (S,) or (T,): as given, the cache's, or counted from 0 in each sequence."""
    if positions is not None:
        _check_places("positions", positions, positions.shape, hidden, layout)
        return positions
    if step is not None:
        return step.positions
    if cu_seqlens is None:
        return torch.arange(hidden.shape[layout.index("s")], device=hidden.device)
    tokens = torch.arange(hidden.shape[0], device=hidden.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return tokens - cu_seqlens[sequence]


def _check_places(name: str, tensor: Tensor, shape: torch.Size, hidden: Tensor, layout: str) -> None:
    """`shape` has one place for each of hidden's tokens, or for each of a sequence's."""
    want = [hidden.shape[layout.index(c)] for c in ("t" if layout == "thd" else "bs")]
    if list(shape) != want and (layout == "thd" or list(shape) not in (want[1:], [1, want[1]])):
        said = f"(T,) = {want}" if layout == "thd" else f"(B, S) = {want}, or (S,)"
        raise ArgumentError(name, tensor, f"must have the shape {said}, of hidden's tokens")
