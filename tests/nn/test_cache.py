"""KV caches: chunks and single tokens give what the whole sequence gives, whatever the lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.nn import AttentionConfig, KVCache, ModelConfig, PagedKVCache, SelfAttention

HIDDEN, GROUPS, DIM, LAYERS = 32, 2, 8, 2
Cache = KVCache | PagedKVCache
PAGED = "page_table" in attnrt.attention.__annotations__


def stack(**fields: Any) -> list[SelfAttention]:
    torch.manual_seed(0)
    config = AttentionConfig(**{"hidden_size": HIDDEN, "num_attention_heads": 4, "num_query_groups": GROUPS, **fields})
    return [SelfAttention(config, layer).double().eval() for layer in range(LAYERS)]


def forward(layers: list[SelfAttention], x: Tensor, step: Any = None) -> Tensor:
    for layer in layers:
        x = x + layer(x, step=step)
    return x


def sliced(batch: int) -> Cache:
    return KVCache(LAYERS, batch, 24, GROUPS, DIM, dtype=torch.float64, fixed_shapes=False)


def whole(batch: int) -> Cache:
    return KVCache(LAYERS, batch, 24, GROUPS, DIM, dtype=torch.float64, fixed_shapes=True)


def paged(batch: int) -> Cache:
    return PagedKVCache(LAYERS, batch, 8 * batch, 5, GROUPS, DIM, max_length=24, dtype=torch.float64)


KINDS = [sliced, whole, pytest.param(paged, marks=pytest.mark.skipif(not PAGED, reason="attention has no page_table"))]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "fields", [{}, {"window_size": (4, 0)}, {"qkv_format": "sbhd"}, {"attn_mask_type": "padding_causal"}]
)
@pytest.mark.parametrize("chunks", [(20,), (7, 5, 8), (1,) * 20, (12, 1, 1, 6)])
@torch.no_grad()
def test_chunked_prefill_and_decode(
    make: Callable[[int], Cache], fields: dict[str, Any], chunks: Sequence[int]
) -> None:
    layers, cache = stack(**fields), make(3)
    x = torch.randn(3, 20, HIDDEN).double()
    swap = fields.get("qkv_format") == "sbhd"
    expected = forward(stack(**fields | {"qkv_format": "bshd", "attn_mask_type": "causal"}), x)
    found = []
    for part in x.split(chunks, 1):
        step = cache.extend(part.shape[1])
        out = forward(layers, part.transpose(0, 1) if swap else part, step)
        found.append(out.transpose(0, 1) if swap else out)
    torch.testing.assert_close(torch.cat(found, 1), expected)
    assert cache.lengths.tolist() == [20] * 3


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_sequences_of_their_own_length(make: Callable[[int], Cache]) -> None:
    """Bottom-right alignment counts from each sequence's own length: prompts of 9, 2 and 5, then one token each."""
    layers, cache = stack(), make(3)
    x = torch.randn(3, 14, HIDDEN).double()
    rounds = ([9, 2, 5], [1, 1, 1], [0, 3, 2], [1, 1, 1], [2, 0, 4])
    done, found = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for counts in rounds:
        tokens = max(counts)
        chunk = torch.full((3, tokens, HIDDEN), 1e30).double()  # what is padding must not matter
        for b, n in enumerate(counts):
            chunk[b, :n] = x[b, done[b] : done[b] + n]
        out = forward(layers, chunk, cache.extend(tokens, counts))
        for b, n in enumerate(counts):
            found[b].append(out[b, :n])
            done[b] += n
    assert cache.lengths.tolist() == done
    for b, n in enumerate(done):
        torch.testing.assert_close(torch.cat(found[b]), forward(layers, x[b : b + 1, :n])[0])


@torch.no_grad()
def test_shapes_seen_by_attention() -> None:
    layers, x = stack(), torch.randn(2, 1, HIDDEN).double()
    seen: dict[str, list[int]] = {}
    for name, cache in (("sliced", sliced(2)), ("whole", whole(2))):
        for _ in range(3):
            forward(layers, x, cache.extend(1))
            request = attnrt.last_decision().request  # type: ignore[union-attr]
            assert request.mask is None
            seen.setdefault(name, []).append(request.seqlen_kv)
    assert seen == {"sliced": [1, 2, 3], "whole": [24] * 3}


@pytest.mark.parametrize("make", KINDS)
@torch.no_grad()
def test_truncate_and_reorder(make: Callable[[int], Cache]) -> None:
    layers, cache = stack(), make(2)
    x = torch.randn(2, 12, HIDDEN).double()
    expected = forward(layers, x)
    forward(layers, x[:, :8], cache.extend(8))
    forward(layers, torch.randn(2, 4, HIDDEN).double(), cache.extend(4))  # speculation, rejected
    cache.truncate([8, 8])
    cache.reorder([1, 0])
    found = forward(layers, x.flip(0)[:, 8:], cache.extend(4))
    torch.testing.assert_close(found, expected.flip(0)[:, 8:])
    cache.reset()
    torch.testing.assert_close(forward(layers, x, cache.extend(12)), expected)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_order_of_calls(make: Callable[[int], Cache], seed: int) -> None:
    """What each sequence attends to is its own history, whatever was cut off, permuted, repeated or dropped before."""
    layers, cache, chance = stack(), make(4), random.Random(seed)
    histories: list[list[Tensor]] = [[] for _ in range(4)]
    for _ in range(30):
        match chance.choice(["extend", "extend", "extend", "truncate", "reorder"]):
            case "truncate":
                lengths = [chance.randint(max(0, len(h) - 6), len(h)) for h in histories]
                cache.truncate(lengths)
                histories = [h[:n] for h, n in zip(histories, lengths, strict=True)]
            case "reorder":
                order = [chance.randrange(4) for _ in histories]
                cache.reorder(order)
                histories = [list(histories[i]) for i in order]
            case _:
                counts = [min(chance.randint(0, 4), 24 - len(h)) for h in histories]
                chunk = torch.randn(4, max(*counts, 1), HIDDEN).double()
                out = forward(layers, chunk, cache.extend(chunk.shape[1], counts))
                for row, (history, count) in enumerate(zip(histories, counts, strict=True)):
                    history += chunk[row, :count]
                    if count:
                        want = forward(layers, torch.stack(history)[None])[0, -count:]
                        torch.testing.assert_close(out[row, :count], want)
        assert cache.lengths.tolist() == [len(h) for h in histories]
    if isinstance(cache, PagedKVCache):
        cache.reset()
        assert cache.free_pages == 32


def test_beams_share_the_pages_of_their_prompt() -> None:
    cache = PagedKVCache(1, 4, 8, 4, 1, 8, max_length=32)
    cache.extend(10, [10, 0, 0, 0])  # 3 pages, the last one half full
    cache.reorder([0, 0, 0, 0])
    assert cache.free_pages == 5 and cache.lengths.tolist() == [10] * 4
    assert len(set(map(tuple, cache.page_table[:, :3].tolist()))) == 1
    cache.extend(1)  # each beam writes: three copy the half page, the fourth keeps it
    assert cache.free_pages == 2
    table = cache.page_table[:, :3].tolist()
    assert len({tuple(row[:2]) for row in table}) == 1 and len({row[2] for row in table}) == 4
    cache.truncate([8, 8, 8, 11])
    assert cache.free_pages == 5
    cache.reorder([3, 3, 0, 0])
    with pytest.raises(ArgumentError, match="needs 9 pages, and 5 are free"):
        cache.extend(6)  # one copy, and two pages more for each
    assert cache.lengths.tolist() == [11, 11, 8, 8] and cache.free_pages == 5, "nothing was changed"
    cache.extend(4)
    assert cache.free_pages == 0
    cache.reset()
    assert cache.free_pages == 8


@pytest.mark.parametrize("make", [sliced, whole, paged])
def test_a_step_ends_when_the_cache_goes_on(make: Callable[[int], Cache]) -> None:
    ends: list[Callable[[Cache], Any]] = [
        lambda cache: cache.extend(1),
        lambda cache: cache.truncate([1, 2]),
        lambda cache: cache.reorder([1, 1]),
        lambda cache: cache.reset(),
    ]
    k = torch.zeros(2, 3, GROUPS, DIM).double()
    for end in ends:
        cache = make(2)
        step = cache.extend(3)
        step.write(0, k, k)
        end(cache)
        with pytest.raises(ArgumentError, match="is over"):
            step.write(1, k, k)


@pytest.mark.parametrize("make", [sliced, whole, paged])
def test_overflow_is_refused(make: Callable[[int], Cache]) -> None:
    cache = make(2)
    cache.extend(20)
    with pytest.raises(ArgumentError, match="max_length=24"):
        cache.extend(5)
    assert cache.lengths.tolist() == [20, 20], "nothing was changed"
    cache.extend(4)


def test_pages_are_taken_and_given_back() -> None:
    cache = PagedKVCache(1, 3, 6, 4, 1, 8)
    cache.extend(7, [7, 4, 0])
    assert cache.free_pages == 3
    assert len(set(cache.page_table[0, :2].tolist() + cache.page_table[1, :1].tolist())) == 3
    with pytest.raises(ArgumentError, match="needs 4 pages, and 3 are free"):
        cache.extend(16, [0, 0, 16])
    assert cache.lengths.tolist() == [7, 4, 0] and cache.free_pages == 3
    cache.release(0)
    assert cache.free_pages == 5 and cache.lengths.tolist() == [0, 4, 0]
    cache.extend(16, [0, 0, 16])
    cache.reset()
    assert cache.free_pages == 6


def test_a_gradient_is_refused() -> None:
    layers, cache = stack(), sliced(1)
    x = torch.randn(1, 3, HIDDEN).double()
    with pytest.raises(ArgumentError, match="no_grad"):
        forward(layers, x, cache.extend(3))


def test_bad_calls() -> None:
    for size in (0, -3):
        for make in (
            lambda n: KVCache(1, 1, 4, 2, 8, head_dim_v=n),
            lambda n: PagedKVCache(1, 1, 4, 4, 2, 8, head_dim_v=n),
        ):
            with pytest.raises(ArgumentError, match="head_dim_v"):
                make(size)
    cache = sliced(2)
    for counts in ([1], [3, 1], [-1, 1]):
        with pytest.raises(ArgumentError, match="counts"):
            cache.extend(2, counts)
    with pytest.raises(ArgumentTypeError, match="counts"):
        cache.extend(2, torch.tensor([1, 1]))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tokens"):
        cache.extend(0)
    with pytest.raises(ArgumentError, match=r"\(2, 3, 2, 8\)"):
        cache.extend(3).write(0, torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8))
    with pytest.raises(ArgumentError, match=r"layer=2.*2 layers"):
        cache.extend(1).write(2, torch.zeros(2, 1, 2, 8), torch.zeros(2, 1, 2, 8))
    with pytest.raises(ArgumentTypeError, match=r"holds torch.float64; make it with dtype=torch.bfloat16"):
        cache.extend(1).write(0, *[torch.zeros(2, 1, 2, 8, dtype=torch.bfloat16)] * 2)
    with pytest.raises(ArgumentError, match="groups"):
        KVCache(1, 1, 8, 0, 8)
    layer = stack()[0]
    with pytest.raises(ArgumentError, match="keeps the lengths"), torch.no_grad():
        layer(torch.zeros(2, 1, HIDDEN).double(), step=cache.extend(1), seqlens=torch.ones(2, dtype=torch.int32))
    for shape in ((2, 3, HIDDEN), (1, 2, HIDDEN)):
        with pytest.raises(ArgumentError, match=r"step=<Tensor \(2, 2\)"), torch.no_grad():
            layer(torch.zeros(shape).double(), step=cache.extend(2))


@torch.no_grad()
def test_a_cache_of_another_dtype_under_autocast() -> None:
    layers = [layer.float() for layer in stack()]
    x = torch.randn(2, 9, HIDDEN)
    want = forward(layers, x)
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(LAYERS, 2, 24, GROUPS, DIM, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [forward(layers, part, cache.extend(part.shape[1])) for part in x.split((6, 1, 1, 1), 1)]
        torch.testing.assert_close(torch.cat(found, 1), want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("make", [sliced, whole, paged])
def test_bad_lengths_and_orders(make: Callable[[int], Cache]) -> None:
    cache = make(2)
    cache.extend(3)
    for lengths in ([4, 3], [3], [-1, 3]):
        with pytest.raises(ArgumentError, match=r"no more than it holds: \[3, 3\]"):
            cache.truncate(lengths)
    for order in ([0, 2], [0], [-1, 0]):
        with pytest.raises(ArgumentError, match=r"order=.*2 numbers in 0\.\.1"):
            cache.reorder(order)
    for wrong in (3, torch.tensor([1, 1]), [1.0, 1.0], [True, False], None):
        with pytest.raises(ArgumentTypeError, match="lengths"):
            cache.truncate(wrong)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError, match="order"):
            cache.reorder(wrong)  # type: ignore[arg-type]
    assert cache.lengths.tolist() == [3, 3]


def test_of_a_model() -> None:
    config = ModelConfig(
        hidden_size=64, num_attention_heads=8, num_query_groups=1, num_layers=3, ffn_hidden_size=8, vocab_size=8
    )
    cache = KVCache.of(config, 2, 10, dtype=torch.bfloat16)
    assert cache.k.shape == (3, 2, 11, 1, 8) and cache.v.dtype == torch.bfloat16
    assert PagedKVCache.of(config, 2, 4, 16).k.shape == (3, 4, 16, 1, 8)
