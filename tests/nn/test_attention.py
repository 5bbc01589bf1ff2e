"""SelfAttention and CrossAttention against the same layers written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_layers import attend, causal, self_attention, separate
from torch import Tensor

import attnrt
from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.nn import AttentionConfig, CrossAttention, DotProductAttention, KVCache, SelfAttention, split_kv

HIDDEN = 48


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"hidden_size": HIDDEN, "num_attention_heads": 6, "num_query_groups": 2, **fields})


def layer(**fields: Any) -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(config(**fields)).double().eval()
    for parameter in module.parameters():  # norms begin at ones, biases near zero
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def want(module: SelfAttention, x: Tensor, left: int | None = None) -> Tensor:
    state = dict(module.named_parameters())
    return torch.stack([self_attention(row, state, module.config, causal(len(row), left=left)) for row in x])


def close(got: Tensor, expected: Tensor) -> None:
    # cos and sin are float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_bias_linear": True},
        {"add_qkv_bias": True, "rotary_interleaved": True},
        {"rotary_percent": 0.5, "rotary_base": 500.0},
        {"qk_layernorm": True, "kv_channels": 12},
        {"position_embedding_type": "none", "softmax_scale": 0.2},
    ],
)
def test_self_attention(groups: int | None, fields: dict[str, Any]) -> None:
    module = layer(num_query_groups=groups, **fields)
    x = torch.randn(2, 11, HIDDEN).double().requires_grad_()
    got, expected = module(x), want(module, x)
    close(got, expected)
    grad, leaves = torch.randn_like(got), [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        close(a, b)


def test_window_by_layer() -> None:
    x = torch.randn(1, 20, HIDDEN).double()
    for index, left in ((0, 4), (1, None)):
        torch.manual_seed(0)
        module = SelfAttention(config(window_size=(4, 0), window_attn_skip_freq=2), index).double()
        close(module(x), want(module, x, left))


def test_separate_projections_are_the_same_layer() -> None:
    fused = layer(add_qkv_bias=True)
    split = SelfAttention(config(add_qkv_bias=True, fused_qkv=False)).double()
    for kind in ("weight", "bias"):
        parts = separate(getattr(fused.linear_qkv, kind), fused.config)
        for name, part in zip("qkv", parts, strict=True):
            getattr(getattr(split, f"linear_{name}"), kind).data.copy_(part)
    split.linear_proj.load_state_dict(fused.linear_proj.state_dict())
    x = torch.randn(2, 7, HIDDEN).double()
    torch.testing.assert_close(split(x), fused(x))


def test_sbhd_and_packed() -> None:
    module, x = layer(), torch.randn(3, 9, HIDDEN).double()
    expected = module(x)
    swapped = SelfAttention(config(qkv_format="sbhd")).double()
    swapped.load_state_dict(module.state_dict())
    torch.testing.assert_close(swapped(x.transpose(0, 1)), expected.transpose(0, 1))
    positions = torch.arange(9).expand(3, 9)
    torch.testing.assert_close(swapped(x.transpose(0, 1), positions=positions), expected.transpose(0, 1))
    lengths = [9, 4, 6]
    cu = torch.tensor([0, 9, 13, 19], dtype=torch.int32)
    packed = module(torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]), cu_seqlens=cu)
    for part, row, n in zip(packed.split(lengths), x, lengths, strict=True):
        torch.testing.assert_close(part, module(row[None, :n])[0])


def test_padded_batch() -> None:
    module, x = layer(), torch.randn(3, 9, HIDDEN).double()
    lengths = torch.tensor([9, 4, 1], dtype=torch.int32)
    got = module(x, seqlens=lengths)
    for row, one, n in zip(got, x, lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:n], module(one[None, :n])[0])
    by_mask = layer(attn_mask_type="padding_causal")
    mask = (torch.arange(9) >= lengths[:, None])[:, None, None]
    torch.testing.assert_close(by_mask(x, attention_mask=mask), got)


def test_shared_rotary() -> None:
    module, x = layer(), torch.randn(2, 9, HIDDEN).double()
    assert module.rotary is not None
    torch.testing.assert_close(module(x, rotary=module.rotary(torch.arange(9))), module(x))
    shifted = module(x, positions=torch.arange(9) + 50)  # only differences of positions count
    torch.testing.assert_close(shifted, module(x), rtol=1e-4, atol=1e-4)


def test_dropout_in_training_only() -> None:
    module, x = layer(attention_dropout=0.3), torch.randn(1, 16, HIDDEN).double()
    torch.testing.assert_close(module(x), module(x))
    module.train()
    assert not torch.allclose(module(x), module(x))


def test_the_core_can_be_exchanged() -> None:
    module = layer()
    assert isinstance(module.core_attention, DotProductAttention)
    module.core_attention = DotProductAttention(6, 8, 2, qkv_format="bshd", backend="reference")
    module(torch.randn(1, 4, HIDDEN).double())
    assert attnrt.last_decision().backend == "reference"  # type: ignore[union-attr]


@pytest.mark.parametrize("fused", [True, False])
def test_cross_attention(fused: bool) -> None:
    torch.manual_seed(0)
    windowed = config(fused_qkv=fused, qk_layernorm=True, window_size=(2, 0))  # of the self-attention beside it
    module = CrossAttention(windowed, context_size=40).double()
    x, context = torch.randn(2, 5, HIDDEN).double(), torch.randn(2, 13, 40).double()
    if fused:
        weight_k, weight_v = split_kv(module.linear_kv.weight, 2)
    else:
        weight_k, weight_v = module.linear_k.weight, module.linear_v.weight
    q = module.q_layernorm(module.linear_q(x).unflatten(-1, (6, 8)))  # type: ignore[misc]
    k = module.k_layernorm((context @ weight_k.T).unflatten(-1, (2, 8)))  # type: ignore[misc]
    v = (context @ weight_v.T).unflatten(-1, (2, 8))

    def expected(lengths: list[int]) -> Tensor:
        rows = [attend(q[b], k[b, :n], v[b, :n], torch.ones(5, n, dtype=torch.bool)) for b, n in enumerate(lengths)]
        return module.linear_proj(torch.stack(rows))

    torch.testing.assert_close(module(x, context), expected([13, 13]))
    torch.testing.assert_close(module(x, keys_values=module.keys_values(context)), expected([13, 13]))
    lengths = torch.tensor([13, 6], dtype=torch.int32)
    torch.testing.assert_close(module(x, context, seqlens_kv=lengths), expected([13, 6]))
    masks = torch.zeros(2, 1, 1, 5, dtype=torch.bool), (torch.arange(13) >= lengths[:, None])[:, None, None]
    torch.testing.assert_close(module(x, context, attention_mask=masks), expected([13, 6]))


def test_bad_calls() -> None:
    module = layer()
    with pytest.raises(ArgumentError, match="hidden"):
        module(torch.randn(2, 5, 40).double())
    with pytest.raises(ArgumentError, match=r"\(T, hidden\)"):
        module(torch.randn(2, 5, HIDDEN).double(), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ArgumentError, match="rotary"):
        layer(position_embedding_type="none")(torch.randn(1, 2, HIDDEN).double(), rotary=(torch.ones(2, 4),) * 2)
    x = torch.randn(2, 5, HIDDEN).double()
    for places in (torch.arange(1), torch.zeros(5, 2), torch.zeros(3, 5)):  # some would broadcast
        with pytest.raises(ArgumentError, match=r"positions=.*\(B, S\) = \[2, 5\]"):
            module(x, positions=places)
        with pytest.raises(ArgumentError, match="rotary="):
            module(x, rotary=module.rotary(places))
    with pytest.raises(ArgumentError, match="positions="):
        module(x[0], positions=torch.arange(1), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    arbitrary = layer(attn_mask_type="arbitrary")  # its mask would be left out
    with torch.no_grad(), pytest.raises(ArgumentError, match="arbitrary"):
        arbitrary(torch.randn(1, 2, HIDDEN).double(), step=KVCache(1, 1, 4, 2, 8, dtype=torch.float64).extend(2))
    packed, offsets = x[0], torch.tensor([0, 5], dtype=torch.int32)
    for name, given in {
        "seqlens": (packed, {"cu_seqlens": offsets, "seqlens": offsets[1:]}),
        "max_seqlen": (x, {"max_seqlen": 5}),
        "positions": (x, {"positions": torch.arange(5), "rotary": module.rotary(torch.arange(5))}),
        "cu_seqlens": (packed, {"cu_seqlens": [0, 5]}),
    }.items():
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"{name}="):
            module(given[0], **given[1])
    with pytest.raises(ArgumentError, match="positions="):
        layer(position_embedding_type="none")(x, positions=torch.arange(5))
    with pytest.raises(ArgumentTypeError, match="config="):
        SelfAttention({"hidden_size": 64})  # type: ignore[arg-type]
    cross = CrossAttention(config())
    with pytest.raises(ArgumentError, match="a pair of padding masks"):
        cross(x.float(), x.float(), attention_mask=torch.zeros(2, 1, 1, 5, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="keys_values"):
        cross(torch.randn(1, 2, HIDDEN))
    with pytest.raises(ArgumentError, match="context"):
        cross(torch.randn(1, 2, HIDDEN), torch.randn(1, 2, 47))
