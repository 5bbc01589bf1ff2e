"""The rotary embedding: frequencies, both pairings, and what positions mean."""

from __future__ import annotations

import math

import pytest
import torch
from plain_layers import turned

from attnrt.nn import AttentionConfig, RopeScaling, RotaryEmbedding, apply_rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_turns_pairs(interleaved: bool, percent: float) -> None:
    config = AttentionConfig(
        hidden_size=64, num_attention_heads=4, rotary_interleaved=interleaved, rotary_percent=percent
    )
    x, positions = torch.randn(10, 4, 16).double(), torch.randint(0, 500, (10,))
    cos, sin = RotaryEmbedding.of(config)(positions)
    assert cos.dtype == torch.float32 and cos.shape == (10, config.rotary_dim // 2)
    torch.testing.assert_close(
        apply_rotary(x, cos, sin, interleaved), turned(x, positions, config), rtol=1e-4, atol=1e-4
    )


def test_heads_of_any_number_of_dims() -> None:
    cos, sin = RotaryEmbedding(8)(torch.arange(5)[None])
    x = torch.randn(2, 5, 3, 4, 8)
    torch.testing.assert_close(apply_rotary(x, cos, sin).flatten(2, 3), apply_rotary(x.flatten(2, 3), cos, sin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_exact_angles(dtype: torch.dtype) -> None:
    """Far positions are off by whole turns if an angle or a frequency has 16 bits; every pair is looked at."""
    scaling = RopeScaling(type="llama3", factor=8.0)
    positions = torch.tensor([3, 1000, 100_003])
    layer = torch.nn.Sequential(RotaryEmbedding(64, 5e5, scaling)).to(dtype)
    for cast in (layer[0], layer.float()[0]):
        for got, want in zip(cast(positions), RotaryEmbedding(64, 5e5, scaling)(positions), strict=True):
            assert torch.equal(got, want)


def test_made_on_meta() -> None:
    """As for FSDP2: the frequencies are in no checkpoint, so they must not be what the memory held."""
    with torch.device("meta"):
        rotary = RotaryEmbedding(64)
    assert rotary.inv_freq.is_meta
    rotary.to_empty(device="cpu")
    assert torch.equal(rotary.inv_freq, RotaryEmbedding(64).inv_freq)


def test_linear_scaling() -> None:
    scaled = RotaryEmbedding(8, scaling=RopeScaling(type="linear", factor=4.0))
    for a, b in zip(scaled(torch.tensor([40])), RotaryEmbedding(8)(torch.tensor([10])), strict=True):
        torch.testing.assert_close(a, b)


def test_llama3_scaling() -> None:
    scaling = RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain, scaled = RotaryEmbedding(128, 5e5).inv_freq, RotaryEmbedding(128, 5e5, scaling).inv_freq
    turns = 8192 * plain / (2 * math.pi)
    torch.testing.assert_close(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any() and (scaled <= plain).all() and (scaled >= plain / 8).all()


def test_nothing_to_save() -> None:
    assert not RotaryEmbedding(8).state_dict()
