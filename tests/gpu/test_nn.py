"""Modules and caches on a GPU: constant shapes, pages, a captured decode step; transformers if it is there."""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

import attnrt
from attnrt.integrations.transformers import SUPPORTED
from attnrt.nn import AttentionConfig, KVCache, PagedKVCache, SelfAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
HIDDEN, HEADS, GROUPS, DIM, LAYERS, LENGTH = 256, 8, 2, 64, 2, 96


def has_transformers() -> bool:
    try:
        return version("transformers") in SpecifierSet(SUPPORTED)
    except PackageNotFoundError:
        return False


def stack(dtype: torch.dtype, **fields: Any) -> list[SelfAttention]:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_query_groups": GROUPS, "kv_channels": DIM}
    config = AttentionConfig(**{**sizes, **fields})
    return [SelfAttention(config, layer).to("cuda", dtype).eval() for layer in range(LAYERS)]


def forward(layers: list[SelfAttention], x: Tensor, step: Any = None) -> Tensor:
    for layer in layers:
        x = x + layer(x, step=step)
    return x


def exactly(layers: list[SelfAttention], x: Tensor) -> Tensor:
    """In float64 on the CPU."""
    return forward([copy.deepcopy(layer).cpu().double() for layer in layers], x.cpu().double())


def cache_of(kind: str, batch: int, dtype: torch.dtype) -> KVCache | PagedKVCache:
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    if kind == "paged":
        return PagedKVCache(LAYERS, batch, batch * LENGTH // 16, 16, GROUPS, DIM, max_length=LENGTH, **options)
    return KVCache(LAYERS, batch, LENGTH, GROUPS, DIM, fixed_shapes=kind == "fixed", **options)


@pytest.mark.parametrize("fields", [{}, {"window_size": (17, 0)}])
@pytest.mark.parametrize("kind", ["sliced", "fixed", "paged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_chunked_prefill_and_decode(dtype: torch.dtype, kind: str, fields: dict[str, Any]) -> None:
    layers, cache = stack(dtype, **fields), cache_of(kind, 3, dtype)
    x = torch.randn(3, 80, HIDDEN, device="cuda", dtype=dtype)
    want = exactly(layers, x)
    low = (forward(layers, x).cpu().double() - want).abs().max()
    found = [forward(layers, part, cache.extend(part.shape[1])) for part in x.split((33, 40, 1, 1, 1, 4), 1)]
    error = (torch.cat(found, 1).cpu().double() - want).abs().max()
    assert error <= 2 * low + 1e-2, (error, low, attnrt.last_decision().label)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["fixed", "paged"])
@torch.no_grad()
def test_sequences_of_their_own_length(kind: str) -> None:
    dtype = torch.bfloat16
    layers, cache = stack(dtype), cache_of(kind, 3, dtype)
    x = torch.randn(3, 40, HIDDEN, device="cuda", dtype=dtype)
    done, found = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for counts in ([33, 2, 17], [1, 1, 1], [0, 7, 3], [1, 1, 1]):
        chunk = torch.randn(3, max(counts), HIDDEN, device="cuda", dtype=dtype)
        for b, n in enumerate(counts):
            chunk[b, :n] = x[b, done[b] : done[b] + n]
        out = forward(layers, chunk, cache.extend(max(counts), counts))
        for b, n in enumerate(counts):
            found[b].append(out[b, :n])
            done[b] += n
    for b, n in enumerate(done):
        want = exactly(layers, x[b : b + 1, :n])[0]
        torch.testing.assert_close(torch.cat(found[b]).cpu().double(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("kind", ["fixed", "paged"])
@torch.no_grad()
def test_beams_and_rejected_tokens(kind: str) -> None:
    """One prompt becomes three beams, which part, are cut back and permuted."""
    dtype = torch.bfloat16
    layers, cache = stack(dtype), cache_of(kind, 3, dtype)
    x = torch.randn(3, 44, HIDDEN, device="cuda", dtype=dtype)
    x[1:, :37] = x[0, :37]
    forward(layers, x[:, :37], cache.extend(37, [37, 0, 0]))
    cache.reorder([0, 0, 0])
    forward(layers, torch.randn_like(x[:, :4]), cache.extend(4))
    cache.truncate([37, 37, 37])
    forward(layers, x[:, 37:41], cache.extend(4))
    cache.reorder([2, 0, 1])
    found = forward(layers, x[[2, 0, 1], 41:], cache.extend(3))
    want = exactly(layers, x)[[2, 0, 1], 41:]
    torch.testing.assert_close(found.cpu().double(), want, rtol=2e-2, atol=4e-2)


@torch.no_grad()
def test_a_captured_decode_step() -> None:
    """One CUDA graph replayed for every token: the cache's length is data."""
    dtype = torch.bfloat16
    layers = stack(dtype)
    x = torch.randn(2, 40, HIDDEN, device="cuda", dtype=dtype)
    plain, captured = cache_of("fixed", 2, dtype), cache_of("fixed", 2, dtype)
    for cache in (plain, captured):
        forward(layers, x[:, :32], cache.extend(32))
    token = x[:, 32:33].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is chosen and compiled, is so here
        warm = cache_of("fixed", 2, dtype)
        forward(layers, x[:, :32], warm.extend(32))
        forward(layers, token, warm.extend(1))
    torch.cuda.current_stream().wait_stream(side)
    before = captured.lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(layers, token, captured.extend(1))
    captured.lengths.copy_(before)  # capturing runs nothing
    for i in range(32, 40):
        token.copy_(x[:, i : i + 1])
        graph.replay()
        want = forward(layers, x[:, i : i + 1], plain.extend(1))
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert captured.lengths.tolist() == [40, 40]
    captured.truncate([39, 38])  # of what the replays counted
    assert captured.lengths.tolist() == [39, 38]


@pytest.mark.skipif(not has_transformers(), reason=f"transformers {SUPPORTED} is not installed")
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_transformers(cache: str | None) -> None:
    import transformers

    from attnrt.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=24,
        pad_token_id=0,
    )
    model = transformers.MistralForCausalLM(config).to("cuda").eval()
    ids = torch.randint(3, 512, (3, 33), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": cache} if cache else {}
    tokens = {}
    for name in ("eager", "attnrt"):
        model.set_attn_implementation(name)
        tokens[name] = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(tokens["attnrt"], tokens["eager"])
