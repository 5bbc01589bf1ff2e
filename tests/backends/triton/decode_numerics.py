"""Our decode kernels, interpreted, against the float64 oracle. `test_decode.py` runs this file."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import emulation  # before triton
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Case, assert_agrees
from running import run as run_kernel
from torch import Tensor

from attnrt.backends.base import reasons
from attnrt.backends.triton import Decode, TritonBackend, adapter
from attnrt.backends.triton.tiles import Tile
from attnrt.environment import Environment
from attnrt.operands import Operands

FULL = os.environ.get("TRITON_TESTS") == "full"
KERNEL = TritonBackend()
HERE = Environment.simulate("sm90")
TILES = (Tile(16, 16, 4, 3), Tile(64, 32, 4, 3))
SPLITS = (1, 2, 3, 7)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("bhsd", "bshd", "sbhd", "thd")
AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}
"""From (B, H, S, D) to the layout."""


def run(case: Case, splits: int = 3, tile: Tile = TILES[0]) -> dict[str, Tensor]:
    assert not reasons(Decode().all_rules, case.request(), Environment.simulate("sm90"))
    plain = adapter.tile_for, adapter.split_count
    adapter.tile_for, adapter.split_count = lambda *_: tile, lambda *_: splits
    try:
        with emulation.poisoned():
            return run_kernel(KERNEL, case, HERE)
    finally:
        adapter.tile_for, adapter.split_count = plain


def lengths(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def build(
    *features: str,
    heads: tuple[int, int] = (4, 2),
    seqlen_q: int = 1,
    caches: tuple[int, ...] = (45, 31),
    capacity: int | None = None,
    dims: tuple[int, int] = (16, 16),
    layout: str = "bshd",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """New tokens and caches of these lengths, with NaN where a cache of `capacity` holds no token."""
    torch.manual_seed(sum(caches) + seqlen_q)
    batch, (heads_q, heads_kv), size = len(caches), heads, max(caches) if capacity is None else capacity
    operands: dict[str, Any] = {}
    options: dict[str, Any] = {"alignment": "bottom_right", "causal": "causal" in features}
    options |= {"window": (9, 3)} if "window" in features else {}
    options |= {"window": (5, None), "causal": True} if "left" in features else {}
    options |= {"softcap": 0.7} if "softcap" in features else {}
    options |= {"scale": -0.4} if "negative" in features else {}
    options |= {"alignment": "top_left"} if "top_left" in features else {}
    options |= {"return_lse": False} if "out" in features else {}
    if "sinks" in features:
        operands["sinks"] = torch.randn(heads_q)
    if "alibi" in features:
        operands["alibi_slopes"] = torch.rand(batch, heads_q)
    if "queries" in features and layout != "thd":
        operands["seqlens_q"] = lengths([seqlen_q - b % (seqlen_q + 1) for b in range(batch)])
    if layout == "thd":
        operands["cu_seqlens_q"] = lengths([b * seqlen_q for b in range(batch + 1)])
        operands["cu_seqlens_kv"] = lengths([sum(caches[:b]) for b in range(batch + 1)])
        shapes = [(batch * seqlen_q + 2, heads_q), (sum(caches) + 3, heads_kv), (sum(caches) + 3, heads_kv)]
        q, k, v = (torch.randn(*s, d).to(dtype) for s, d in zip(shapes, (dims[0], *dims), strict=True))
        q[-2:], k[-3:], v[-3:] = math.nan, math.nan, math.inf
        return Case(q, k, v, layout, Operands(**operands), None, options)
    q, k = torch.randn(batch, heads_q, seqlen_q, dims[0]), torch.randn(batch, heads_kv, size, dims[0])
    v = torch.randn(batch, heads_kv, size, dims[1])
    if min(caches) < size:
        operands["seqlens_kv"] = lengths(list(caches))
        for b, n in enumerate(caches):
            k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    q, k, v = (x.to(dtype).permute(AXES[layout]).contiguous() for x in (q, k, v))
    return Case(q, k, v, layout, Operands(**operands), None, options)


FEATURES = ("plain", "causal", "window", "left", "softcap", "negative", "sinks", "alibi", "top_left", "queries", "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_alone(feature: str, dtype: torch.dtype) -> None:
    for splits in SPLITS:
        case = build(feature, seqlen_q=3, dtype=dtype)
        assert_agrees(case, run(case, splits))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 1), (6, 2), (5, 1), (71, 1)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 8])
def test_packed_heads(heads: tuple[int, int], seqlen_q: int) -> None:
    """Heads of a group are rows of a tile; with more rows than a tile has, there are several."""
    case = build("causal", "sinks", "alibi", heads=heads, seqlen_q=1 if heads[0] == 71 else seqlen_q)
    for tile in TILES:
        assert_agrees(case, run(case, 2, tile))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("caches", [(1,), (0, 33), (64, 17, 1), (5, 0, 100)], ids=str)
def test_caches(caches: tuple[int, ...], layout: str) -> None:
    """Lengths of 0, and shorter than the new tokens: dead rows give zeros and an LSE of -inf. Splits without keys."""
    for seqlen_q in (1, 4):
        case = build("causal", "sinks", caches=caches, seqlen_q=seqlen_q, capacity=max(caches) + 20, layout=layout)
        for splits in SPLITS:
            found = run(case, splits)
            assert_agrees(case, found)
    dead = build(caches=(0, 4), capacity=70)
    found = run(dead, 7)
    assert not found["out"][0].any() and (found["lse"][0] == -math.inf).all()


@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (40, 24), (128, 64)], ids=str)
def test_dims(dims: tuple[int, int]) -> None:
    for splits in (1, 5):
        case = build("causal", dims=dims, dtype=torch.float16)
        assert_agrees(case, run(case, splits))


def test_many_splits() -> None:
    case = build("sinks", caches=(600, 37), capacity=640, dims=(16, 64))
    for splits in (33, 256):
        assert_agrees(case, run(case, splits))


def test_strides() -> None:
    """K and V of one cache, heads not side by side, queries cut from a wider tensor."""
    case = build("causal", "sinks", seqlen_q=2)
    wide = torch.full((2, 60, 2, 5, 16), math.nan)
    wide[:, :45, :, 1], wide[:, :45, :, 3] = case.k, case.v
    qkv = torch.randn(2, 2, 3, 4, 16)
    moved = replace(case, q=qkv[:, :, 1], k=wide[:, :45, :, 1], v=wide[:, :45, :, 3])
    assert_agrees(moved, run(moved))


def test_offsets_past_32_bits() -> None:
    """Rows so far apart that the last lie beyond 2^31 elements; the memory between is never touched."""
    rows, stride = 20, 1 << 27
    far = torch.empty(rows * stride, dtype=torch.float16).as_strided((1, 1, rows, 32), (0, 0, stride, 1))
    far.copy_(torch.randn(1, 1, rows, 32))
    case = Case(torch.randn(1, 2, 1, 16).half(), far[..., :16], far[..., 16:], "bhsd")
    plain, adapter.split_count = adapter.split_count, lambda *_: 2
    try:
        assert_agrees(case, run_kernel(KERNEL, case, HERE))
    finally:
        adapter.split_count = plain


@settings(max_examples=80 if FULL else 12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random(data: st.DataObject) -> None:
    draw = data.draw
    heads_kv, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 4), (1, 8))))
    caches = tuple(draw(st.lists(st.integers(0, 90), min_size=1, max_size=3)))
    case = build(
        *draw(st.sets(st.sampled_from(FEATURES))),
        heads=(heads_kv * group, heads_kv),
        seqlen_q=draw(st.integers(1, 8)),
        caches=caches,
        capacity=max(1, max(caches)) + draw(st.sampled_from((0, 0, 7, 40))),
        dims=draw(st.sampled_from(((16, 16), (24, 16), (16, 40)))),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    assert_agrees(case, run(case, draw(st.sampled_from(SPLITS)), draw(st.sampled_from(TILES))))
