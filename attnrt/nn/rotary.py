"""Rotary position embedding (Su et al. 2021): pairs of a head's dims, turned by an angle that grows with position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnrt.nn.config import AttentionConfig, RopeScaling


class RotaryEmbedding(nn.Module):
    """Angles for positions. One module serves every layer: call it once a forward and hand the result on.

    `inv_freq` stays float32 when the module is cast: in 16 bits an angle is off by turns from a few hundred positions.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, base: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        """`dim`: how many dims of a head are turned, an even number."""
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        self.register_buffer("inv_freq", frequencies(dim, base, scaling), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> RotaryEmbedding:
        """Moved or cast, or made on the meta device and given memory: the frequencies are worked out again."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.inv_freq = frequencies(self.dim, self.base, self.scaling).to(self.inv_freq.device)
        return self

    @classmethod
    def of(cls, config: AttentionConfig) -> RotaryEmbedding:
        return cls(config.rotary_dim, config.rotary_base, config.rope_scaling)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each positions.shape + (dim / 2,), float32."""
        angles = positions[..., None].float() * self.inv_freq.float()
        return angles.cos(), angles.sin()


def frequencies(dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """(dim / 2,) float32: radians per position of each pair."""
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    # Llama 3.1: pairs that turn often within the training's context keep their speed, slow ones are stretched by the
    # factor, and in between it is a blend.
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - blend) + plain * blend


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first 2 * cos.shape[-1] dims of each head.

    Args:
        x: (..., heads..., D), one or more dims of heads. cos, sin: (..., dim / 2), x's leading dims, or 1 for B.
        interleaved: pairs are dims (0, 1), (2, 3), ... (GPT-J); else dim i goes with dim i + dim / 2 (NeoX, Llama).
    """
    heads = x.ndim - cos.ndim
    shape = (*cos.shape[:-1], *(1,) * heads, cos.shape[-1])
    cos, sin = cos.to(x.dtype).view(shape), sin.to(x.dtype).view(shape)
    turned = 2 * cos.shape[-1]
    rest = x[..., turned:]
    if interleaved:
        a, b = x[..., 0:turned:2], x[..., 1:turned:2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out
