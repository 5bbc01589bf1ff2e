"""Megatron's checkpoint layout, there and back, sharded and old."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnrt.errors import ArgumentError
from attnrt.nn import (
    AttentionConfig,
    CrossAttention,
    SelfAttention,
    fuse_kv,
    fuse_qkv,
    load_megatron,
    megatron_state,
    merge_tensor_parallel,
    split_kv,
    split_qkv,
    split_tensor_parallel,
)


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, **fields})


def layer(cls: Any = SelfAttention, **fields: Any) -> Any:
    module = cls(config(**fields))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_rows_of_the_fused_projection() -> None:
    """4 heads in 2 groups, head dim 1: q0 q1 k0 v0, q2 q3 k1 v1."""
    q, k, v = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    fused = fuse_qkv(q, k, v, 2)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for got, want in zip(split_qkv(fused, 4, 2), (q, k, v), strict=True):
        assert torch.equal(got, want)
    assert fuse_kv(k, v, 2).tolist() == [10, 20, 11, 21]
    for got, want in zip(split_kv(fuse_kv(k, v, 2), 2), (k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 1), (6, 3)])
def test_fusing_is_undone_by_splitting(heads: int, groups: int) -> None:
    q, k, v = torch.randn(heads * 8, 5), torch.randn(groups * 8, 5), torch.randn(groups * 8, 5)
    for got, want in zip(split_qkv(fuse_qkv(q, k, v, groups), heads, groups), (q, k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("cls", [SelfAttention, CrossAttention])
@pytest.mark.parametrize("fields", [{}, {"add_bias_linear": True, "qk_layernorm": True, "softmax_type": "learnable"}])
def test_fused_and_separate_load_the_same_checkpoint(cls: Any, fields: dict[str, Any]) -> None:
    fused, split = layer(cls, **fields), layer(cls, fused_qkv=False, **fields)
    state = megatron_state(fused, "decoder.layers.0.self_attention.")
    state["decoder.layers.0.self_attention.linear_proj._extra_state"] = torch.empty(0)
    state["decoder.layers.0.mlp.linear_fc1.weight"] = torch.empty(3)
    assert load_megatron(split, state, "decoder.layers.0.self_attention.") == ()
    again = layer(cls, **fields)
    load_megatron(again, megatron_state(split))
    assert same(again, fused)
    if cls is SelfAttention:
        x = torch.randn(2, 7, 32)
        torch.testing.assert_close(split(x), fused(x))


@pytest.mark.parametrize("groups", [None, 2, 1])
def test_tensor_parallel_shards(groups: int | None) -> None:
    module = layer(num_query_groups=groups, add_bias_linear=True, qk_layernorm=True)
    state = megatron_state(module)
    shards = split_tensor_parallel(state, 2)
    assert shards[0]["linear_proj.weight"].shape == (32, 16)
    assert shards[0]["linear_qkv.weight"].shape[0] * 2 == state["linear_qkv.weight"].shape[0]
    if groups == 2:  # a rank holds whole groups: 2 query heads, a key, a value, of 8 rows each
        assert torch.equal(shards[1]["linear_qkv.weight"], state["linear_qkv.weight"][32:])
    merged = merge_tensor_parallel(shards)
    assert all(torch.equal(merged[name], state[name]) for name in state)
    separate = layer(num_query_groups=groups, add_bias_linear=True, fused_qkv=False).state_dict()
    apart = split_tensor_parallel(separate, 2)
    for name in ("linear_q", "linear_k", "linear_v"):
        for kind in ("weight", "bias"):
            assert apart[0][f"{name}.{kind}"].shape[0] * 2 == separate[f"{name}.{kind}"].shape[0]
    assert all(torch.equal(t, separate[name]) for name, t in merge_tensor_parallel(apart).items())
    shards[1]["linear_proj.bias"] = shards[1]["linear_proj.bias"] + 1
    with pytest.raises(ArgumentError, match=r"linear_proj\.bias"):
        merge_tensor_parallel(shards)
    with pytest.raises(ArgumentError, match="other names"):
        merge_tensor_parallel([shards[0], {}])


@pytest.mark.parametrize("version", [0, 1.0])
def test_checkpoints_before_groups(version: float) -> None:
    """Rows (3, heads, D) in version 0 and (heads, D, 3) in version 1; (heads, 3, D) since."""
    module = layer(num_query_groups=None, add_bias_linear=True)
    state = megatron_state(module)
    old = {"dense.weight": state["linear_proj.weight"], "dense.bias": state["linear_proj.bias"]}
    for kind in ("weight", "bias"):
        rows = state[f"linear_qkv.{kind}"].unflatten(0, (4, 3, 8))
        rows = rows.transpose(0, 1) if version == 0 else rows.transpose(1, 2)
        old[f"query_key_value.{kind}"] = rows.flatten(0, 2)
    loaded = layer(num_query_groups=None, add_bias_linear=True)
    load_megatron(loaded, old, version=version)
    assert same(loaded, module)
    with pytest.raises(ArgumentError, match="version"):
        load_megatron(layer(), old, version=version)


def test_what_does_not_fit_is_refused() -> None:
    state = megatron_state(layer())
    with pytest.raises(ArgumentError, match=r"linear_proj\.weight"):
        load_megatron(layer(), {"linear_qkv.weight": state["linear_qkv.weight"]})
    more = {**state, "linear_qkv.layer_norm_weight": torch.ones(32)}
    with pytest.raises(ArgumentError, match="layer_norm_weight"):
        load_megatron(layer(), more)
    assert load_megatron(layer(), more, strict=False) == ("linear_qkv.layer_norm_weight",)
    separate = layer(fused_qkv=False)
    assert load_megatron(separate, more, strict=False) == ("linear_qkv.layer_norm_weight",)
    with pytest.raises(ArgumentError, match=r"linear_qkv\.weight"):
        load_megatron(layer(num_query_groups=4), state)
    with pytest.raises(ArgumentError, match=r"\[1, 2, 4, 8\]"):
        split_qkv(torch.zeros(9, 2), 8, 3)
    weight = torch.zeros(12, 2)
    for nothing in (0, -1):
        for call in (
            lambda n: split_qkv(weight, 4, n),
            lambda n: split_kv(weight, n),
            lambda n: fuse_qkv(weight, weight, weight, n),
            lambda n: split_tensor_parallel(state, n),
        ):
            with pytest.raises(ArgumentError, match="at least 1"):
                call(nothing)
    with pytest.raises(ArgumentError, match="multiple of"):
        split_qkv(torch.zeros(9, 2), 4, 2)
    with pytest.raises(ArgumentError, match="do not go together"):
        fuse_qkv(torch.zeros(8, 2), torch.zeros(4, 2), torch.zeros(6, 2), 2)
