"""The modules in one graph, forward and backward, and a decode step that is compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnrt.nn import AttentionConfig, CrossAttention, KVCache, SelfAttention


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(module: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, **fields})


@pytest.mark.parametrize("fields", [{}, {"window_size": (3, 0), "qk_layernorm": True}, {"qkv_format": "sbhd"}])
def test_self_attention(fields: dict[str, Any]) -> None:
    module, x = SelfAttention(config(**fields)), torch.randn(3, 9, 32, requires_grad=True)
    leaves = [x, *module.parameters()]
    want, found = module(x), compiled(module)(x)
    torch.testing.assert_close(found, want)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_lengths() -> None:
    module, x = SelfAttention(config()), torch.randn(3, 9, 32)
    lengths = torch.tensor([9, 3, 5], dtype=torch.int32)
    torch.testing.assert_close(compiled(module)(x, seqlens=lengths), module(x, seqlens=lengths))
    cross = CrossAttention(config())
    torch.testing.assert_close(compiled(cross)(x, x, seqlens_kv=lengths), cross(x, x, seqlens_kv=lengths))


@torch.no_grad()
def test_one_graph_for_every_decode_step() -> None:
    module = SelfAttention(config()).eval()
    caches = [KVCache(1, 2, 16, 2, 8, fixed_shapes=True) for _ in range(2)]
    prompt = torch.randn(2, 5, 32)
    for cache in caches:
        module(prompt, step=cache.extend(5))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(module, fullgraph=True, backend=counter)
    for _ in range(6):
        x = torch.randn(2, 1, 32)
        torch.testing.assert_close(step(x, step=caches[0].extend(1)), module(x, step=caches[1].extend(1)))
    assert counter.frame_count == 1
