"""Our Triton kernels, interpreted, against the float64 oracle. `test_numerics.py` runs this file.

Tiles are small, so that short sequences have many.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import emulation  # before triton
import numpy as np
import pytest
import tf32
import torch
import triton
import triton.language as tl
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import Answers, Case, _scores, answers, assert_agrees, gradients
from running import run as run_kernel
from torch import Tensor
from triton.runtime.errors import InterpreterError

from attnrt.backends.base import reasons
from attnrt.backends.triton import TritonBackend, adapter, replay, scores
from attnrt.backends.triton.tiles import Tile
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

FULL = os.environ.get("TRITON_TESTS") == "full"
KERNEL = TritonBackend()
HERE = {"pointers": Environment.simulate("sm80"), "descriptors": Environment.simulate("sm90")}
TILES = (Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(case: Case, loads: str = "pointers", tile: Tile = TILES[1]) -> dict[str, Tensor]:
    plain, adapter.tile_for = adapter.tile_for, lambda *_: tile
    try:
        with emulation.poisoned():
            return run_kernel(KERNEL, case, HERE[loads])
    finally:
        adapter.tile_for = plain


def lengths(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def build(
    *features: str, dtype: torch.dtype = torch.float32, seqlen_q: int = 37, seqlen_kv: int = 45, layout: str = "bshd"
) -> Case:
    """A training call with GQA and these features."""
    torch.manual_seed(len(features) + seqlen_q)
    batch, heads, heads_kv, dim, dim_v = 2, 2, 1, 16, 16
    options: dict[str, Any] = {"alignment": "bottom_right"}
    given: dict[str, Any] = {}
    if "dims" in features:
        dim, dim_v = 40, 24
    if "top_left" in features:
        options["alignment"] = "top_left"
    if "causal" in features:
        options["causal"] = True
    if "window" in features:
        options["window"] = (9, 5)
    if "softcap" in features:
        options["softcap"] = 0.7
    if "negative" in features:
        options["scale"] = -0.4
    if "dropout" in features:
        options["dropout_p"] = 0.3
    if "sinks" in features:
        given["sinks"] = torch.randn(heads).requires_grad_()
    if "alibi" in features:
        given["alibi_slopes"] = torch.rand(batch, heads)
    if "bias" in features:
        bias = torch.randn(1, heads, seqlen_q, seqlen_kv)
        bias[torch.rand(bias.shape) < 0.2] = -math.inf
        given["bias"] = bias.to(dtype).requires_grad_()
    if "row_bias" in features:
        given["bias"] = torch.randn(batch, 1, 1, seqlen_kv).requires_grad_()
    if "mask" in features:
        given["mask"] = torch.rand(batch, 1, seqlen_q, seqlen_kv) > 0.4
    front_q, front_kv = {
        "bhsd": ((batch, heads, seqlen_q), (batch, heads_kv, seqlen_kv)),
        "bshd": ((batch, seqlen_q, heads), (batch, seqlen_kv, heads_kv)),
        "sbhd": ((seqlen_q, batch, heads), (seqlen_kv, batch, heads_kv)),
    }[layout]
    if "packed" in features:
        layout, tail = "thd", 3
        given["cu_seqlens_q"] = lengths(0, seqlen_q, seqlen_q + 11)
        given["cu_seqlens_kv"] = lengths(0, 7, 7 + seqlen_kv)
        front_q, front_kv = (seqlen_q + 11 + tail, heads), (7 + seqlen_kv + tail, heads_kv)
    if "padded" in features:
        given["seqlens_q"], given["seqlens_kv"] = lengths(seqlen_q, 20), lengths(seqlen_kv - 8, seqlen_kv)
    q, k, v = (torch.randn(*front, n).to(dtype) for front, n in ((front_q, dim), (front_kv, dim), (front_kv, dim_v)))
    grad = torch.randn(*front_q, dim_v).to(dtype)
    if "packed" in features:
        for x in (q, k, v, grad):
            x[-3:] = math.nan
    if "padded" in features and layout == "bshd":
        q[1, 20:], grad[1, 20:] = math.nan, math.nan
        k[0, -8:], v[0, -8:] = math.nan, math.inf
    for x in (q, k, v):
        x.requires_grad_()
    return Case(q, k, v, layout, Operands(**given), grad, options)


def check(case: Case, found: dict[str, Tensor], answers: Callable[[Case], Answers] = answers) -> None:
    """`assert_agrees`, for an upstream gradient that may be NaN where no row is."""
    if case.grad is not None:
        case = replace(case, grad=case.grad.nan_to_num())
    assert_agrees(case, found, answers(case))


ALONE = (
    *("causal", "window", "softcap", "negative", "sinks", "alibi", "bias", "row_bias", "mask", "dims", "packed"),
    *("padded", "top_left"),
)
LENGTHS = ((1, 1), (1, 70), (15, 16), (16, 15), (17, 33), (64, 64), (70, 21), (65, 129))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ("plain", *ALONE))
def test_alone(feature: str, dtype: torch.dtype) -> None:
    for loads in HERE:
        case = build(feature, dtype=dtype)
        check(case, run(case, loads))


@pytest.mark.parametrize("feature", ["plain", "causal", "window", "padded"])
@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
def test_lengths(sizes: tuple[int, int], feature: str) -> None:
    """Ragged tiles, and with causal masks queries before the first key: dead rows."""
    if feature == "padded" and min(sizes) < 21:
        pytest.skip("too short to pad")
    case = build(feature, seqlen_q=sizes[0], seqlen_kv=sizes[1], dtype=torch.float16)
    check(case, run(case, "descriptors"))


@pytest.mark.parametrize("bound", range(17))
def test_every_edge(bound: int) -> None:
    """The band's edge at each place of a tile, so that one key too many in a block taken as whole shows."""
    for window in ((None, bound), (bound, None), (bound, bound)):
        case = build("plain", seqlen_q=33, seqlen_kv=48)
        case.options["window"] = window
        check(case, run(case, tile=TILES[bound % len(TILES)]))


def _pairs() -> list[tuple[str, str]]:
    clash = {("bias", "row_bias"), ("packed", "padded")}
    return [pair for pair in combinations(ALONE, 2) if pair not in clash]


@pytest.mark.parametrize("pair", _pairs(), ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    number = _pairs().index(pair)
    case = build(*pair, dtype=DTYPES[number % 3], seqlen_q=23, seqlen_kv=35 if number % 2 else 18)
    check(case, run(case, list(HERE)[number % 2], TILES[number % len(TILES)]))


@settings(max_examples=60 if FULL else 12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    case=cases(without=frozenset({"empty", "last_dim"}), dtypes=DTYPES, dims=(16, 24, 40)),
    tile=st.sampled_from(TILES),
    loads=st.sampled_from(list(HERE)),
)
def test_random(case: Case, tile: Tile, loads: str) -> None:
    assume(not reasons(KERNEL.all_rules, case.request(), HERE[loads]))
    check(case, run(case, loads, tile))


# --- Softcap -----------------------------------------------------------------------------------------------------


@triton.jit
def tanhs(x, value, slope, SIZE: tl.constexpr, PRECISE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    y, kept = scores.tanh(tl.load(x + at), PRECISE)
    tl.store(value + at, y)
    tl.store(slope + at, kept)


@pytest.mark.parametrize("precise", [True, False])
def test_tanh(precise: bool) -> None:
    """To a few roundings, its slope too, however near to 0 that is. Without PRECISE tanh x is right to 2^-22 only."""
    x = torch.cat([torch.logspace(-6, 1.6, 2047), torch.linspace(0.5, 0.6, 2048), torch.tensor([1e4])])
    x = torch.cat([-x, x])
    value, slope = torch.empty(2, 8192)
    replay.launch(tanhs, (1,), x, value, slope, SIZE=8192, PRECISE=precise)
    want = x.double().tanh()
    relative = want.abs() if precise else 1
    assert ((value.double() - want).abs() / relative).max() < 2**-22
    small = x.abs() < 27  # then the slope is over 2^-80
    want = 1 / x[small].double().cosh() ** 2
    error = (slope[small].double() - want).abs() / want / (1 + x[small].abs())
    assert error.max() < 2**-20
    assert (slope[~small] < 2**-75).all() and (slope >= 0).all()


@pytest.mark.parametrize("dim", [64, 256])
def test_small_softcap_in_float32(dim: int) -> None:
    """Scores far beyond the cap: their gradients are next to nothing, not the rounding of 1 - tanh^2."""
    with emulation.dots_in_order():
        for number in range(16):
            torch.manual_seed(number)
            lengths_q, lengths_kv = (1, 3, 9)[number % 3], (2, 5, 17)[number // 3 % 3]
            q, k, v = (torch.randn(1, 1, n, dim).requires_grad_() for n in (lengths_q, lengths_kv, lengths_kv))
            options = {"softcap": 0.5, "scale": (None, -0.3, 0.4)[number % 3], "return_lse": True}
            case = Case(q, k, v, "bhsd", Operands(), torch.randn(1, 1, lengths_q, dim), options)
            check(case, run(case, tile=TILES[0]))


@pytest.mark.parametrize("number", range(20))
def test_few_keys_in_float32(number: int) -> None:
    """dP - delta cancels, exactly where there is one key: dq and dk then keep to the bar of everything else."""
    torch.manual_seed(number)
    lengths_q, lengths_kv = (1, 3, 9, 40)[number % 4], (1, 2, 5, 17)[number // 4 % 4]
    q, k, v = (torch.randn(1, 1, n, (64, 256)[number % 2]) for n in (lengths_q, lengths_kv, lengths_kv))
    sinks = Operands(sinks=torch.randn(1).requires_grad_()) if number % 5 == 4 else Operands()
    options = {"scale": (0.7, -0.3, None)[number % 3], "return_lse": True}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    case = Case(*leaves, "bhsd", sinks, torch.randn_like(q), options)
    with emulation.dots_in_order():
        check(case, run(case, tile=TILES[number % 3]))


@triton.jit
def products(a, b, out, SIZE: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, dims = tl.arange(0, SIZE)[:, None], tl.arange(0, DIM)[None, :]
    found = scores.product(tl.load(a + rows * DIM + dims), tl.load(b + rows * DIM + dims), "ieee")
    tl.store(out + rows * SIZE + tl.arange(0, SIZE)[None, :], found)


def test_exact_products_round_less_than_one_long_sum() -> None:
    torch.manual_seed(0)
    a, b, found = torch.randn(64, 256), torch.randn(64, 256), torch.empty(64, 64)
    with emulation.dots_in_order():
        replay.launch(products, (1,), a, b, found, SIZE=64, DIM=256)
    one = torch.zeros(64, 64)
    for x, y in zip(a.T.double(), b.T.double(), strict=True):
        one = (one + x[:, None] * y).float()
    want = a.double() @ b.double().T
    assert (found - want).norm() < 0.5 * (one - want).norm()


class Tf32(Case):
    """The same call where PyTorch's switch allows TF32."""

    def request(self) -> AttentionRequest:
        return replace(super().request(), tf32=True)


def test_tf32() -> None:
    """The kernels round every operand themselves, so that the interpreter shows it too."""
    for loads in HERE:
        for features in (("causal", "bias", "sinks"), ("gqa", "padded")):
            case = build(*features)
            found = run(Tf32(case.q, case.k, case.v, case.layout, case.operands, case.grad, case.options), loads)
            check(case, found, tf32.answers)
            with pytest.raises(AssertionError, match="error"):  # of exact products that would be too much
                check(case, found)


# --- Dropout -----------------------------------------------------------------------------------------------------


def philox(seed: int, keys: np.ndarray, queries: np.ndarray, pair: int) -> np.ndarray:
    """The first word of Philox 4x32-10 (Salmon et al., 2011) at counter (key, query, pair, 0)."""
    word, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    c = [np.broadcast_to(np.uint64(x), np.broadcast_shapes(keys.shape, queries.shape)) for x in (0, 0, pair, 0)]
    c[0], c[1] = keys.astype(np.uint64) + c[3], queries.astype(np.uint64) + c[3]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> word) ^ c[1] ^ k0, b & low, (a >> word) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c[0].astype(np.uint32)


def survivors(case: Case, seed: int) -> Tensor:
    """(B, Hq, Sq, Skv): which weights dropout must keep."""
    r = case.request()
    keys, queries = np.arange(r.seqlen_kv)[None, :], np.arange(r.seqlen_q)[:, None]
    random = [philox(seed, keys, queries, pair).view(np.int32).astype(np.int64) for pair in range(r.batch * r.heads_q)]
    uniform = [np.where(x < 0, -x - 1, x) * 4.6566127342e-10 for x in random]
    return torch.tensor(np.stack(uniform)).view(r.batch, r.heads_q, r.seqlen_q, r.seqlen_kv) >= r.dropout_p


def answer_with_dropout(case: Case, kept: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64 of a "bhsd" case without padding, by autograd."""
    leaves = {n: t.detach().double().requires_grad_() for n, t in case.leaves().items()}
    q, k, v, bias, sinks = (leaves.get(n) for n in ("q", "k", "v", "bias", "sinks"))
    assert q is not None and k is not None and v is not None
    batch, heads = q.shape[:2]
    heads_out = []
    for b in range(batch):
        for h in range(heads):
            h_kv = h * k.shape[1] // heads
            full = None if bias is None else bias.expand(kept.shape)
            s = _scores(case, q[b, h], k[b, h_kv], b, h, heads, full)
            dead = (s == -math.inf).all(1, keepdim=True)
            if sinks is not None:
                s = torch.cat([s, sinks[h].expand(len(s), 1)], 1)
            weights = torch.softmax(torch.where(dead, 0, s), 1)[:, : k.shape[2]]
            weights = weights * kept[b, h] / (1 - case.options["dropout_p"])
            heads_out.append(torch.where(dead, 0, weights @ v[b, h_kv]))
    out = torch.stack(heads_out).view(batch, heads, *heads_out[0].shape)
    return {"out": out.detach(), **gradients(case, out, leaves)}


@pytest.mark.parametrize(
    "feature", ["plain", "causal", "window", "softcap", "sinks", "alibi", "bias", "row_bias", "mask"]
)
@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_dropout(feature: str, tile: Tile) -> None:
    """The weights that Philox names are dropped, forwards and backwards, whatever the tile."""
    case = build("dropout", feature, layout="bhsd", seqlen_q=33, seqlen_kv=20)
    case.options["return_lse"] = False
    torch.manual_seed(5)
    found = run(case, "pointers", tile)
    torch.manual_seed(5)
    want = answer_with_dropout(case, survivors(case, int(torch.randint(2**62, (1,)))))
    assert found.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(found[name].double(), x, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_in_packed_and_padded_batches() -> None:
    """No oracle here: the output is linear in v, so the gradient of v must be the same linear map."""
    for feature in ("packed", "padded"):
        case = build("dropout", feature)
        torch.manual_seed(5)
        first = run(case)
        moved = replace(case, v=(case.v.detach() * 2).requires_grad_())
        torch.manual_seed(5)
        second = run(moved)
        assert case.grad is not None
        grad = case.grad.nan_to_num()
        assert not any(x.isnan().any() for x in first.values())
        change = ((second["out"] - first["out"]) * grad).sum()
        torch.testing.assert_close((first["v"] * case.v.nan_to_num(posinf=0)).sum(), change, rtol=1e-4, atol=1e-4)


# --- The watch itself --------------------------------------------------------------------------------------------


@triton.jit
def reads(x, out, rows, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index * stride, mask=index < rows, other=0.0))


def test_the_watch_sees_a_stray_address_and_an_overflow() -> None:
    x, out = torch.ones(12), torch.empty(16)
    replay.launch(reads, (1,), x, out, 12, 1, BLOCK=16)
    with pytest.raises(InterpreterError, match="lie outside every tensor"):
        replay.launch(reads, (1,), x, out, 13, 1, BLOCK=16)
    with pytest.raises(InterpreterError, match="overflow"):
        replay.launch(reads, (1,), x, out, 0, 1 << 28, BLOCK=16)


# --- Memory ------------------------------------------------------------------------------------------------------


def test_offsets_past_32_bits() -> None:
    """Rows so far apart that the last lie beyond 2^31 elements; the memory between is never touched."""
    rows, stride = 20, 1 << 27
    far = torch.empty(rows * stride, dtype=torch.float16).as_strided((1, 1, rows, 64), (0, 0, stride, 1))
    far.copy_(torch.randn(1, 1, rows, 64))
    q, k, v = (far[..., i * 16 : i * 16 + 16].detach().requires_grad_() for i in range(3))
    bias = far[..., 44:64].detach().requires_grad_()
    case = Case(q, k, v, "bhsd", Operands(bias=bias), far[..., 8:24].detach(), {"causal": True})
    plain, adapter.tile_for = adapter.tile_for, lambda *_: TILES[0]
    try:
        found = run_kernel(KERNEL, case, HERE["pointers"])
    finally:
        adapter.tile_for = plain
    near = replace(case, q=q.detach().clone().requires_grad_(), k=k.detach().clone().requires_grad_())
    assert_agrees(near, found)


def test_gradients_that_arrive_expanded_or_transposed() -> None:
    for grad in (torch.ones(()).expand(2, 37, 2, 16), torch.randn(37, 2, 16, 2).permute(3, 0, 1, 2)):
        case = replace(build("causal"), grad=grad)
        check(case, run(case))


def test_only_the_gradients_asked_for() -> None:
    case = build("sinks", "bias")
    for name in ("q", "k", "v", "bias", "sinks"):
        leaves = {"q": case.q, "k": case.k, "v": case.v, **case.operands._asdict()}
        for n, t in leaves.items():
            if t is not None and t.is_floating_point():
                leaves[n] = t.detach().requires_grad_(n == name)
        q, k, v = (leaves.pop(n) for n in "qkv")
        one = replace(case, q=q, k=k, v=v, operands=Operands(**leaves))
        check(one, run(one))


def test_runs_are_identical() -> None:
    case = build("causal", "bias", "sinks", dtype=torch.float16)
    first, second = run(case), run(case)
    assert all(torch.equal(first[n], second[n]) for n in first)


# --- Tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "varied", "tf32"])
def test_tuning_compares_answers_and_times(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/tune_triton.py on small calls: a tile that gives the answer is timed, one that does not is dropped."""
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "tune_triton.py"
    spec = importlib.util.spec_from_file_location("attnrt_tune_triton", path)
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, spec.name, tune := importlib.util.module_from_spec(spec))
    monkeypatch.syspath_prepend(path.parent)  # it imports from there
    spec.loader.exec_module(tune)
    small = {"DEVICE": "cpu", "WIDTH": 32, "LENGTH": 40, "BATCH": 1, "LENGTHS": (17, 40)}
    for name, value in small.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "median_ms", lambda call: float(len(call())))
    for name in tune.CANDIDATES:
        row, truth = tune.Row(16, kind, name), {}
        first = tune.time_candidate(row, None, truth, {})
        assert set(first.ms) == set(tune.TIMED[kind]) == set(truth), first.dropped
        assert tune.time_candidate(row, TILES[0], truth, first.ms).ms == first.ms
        wrong = {call: tuple(x + 1 for x in parts) for call, parts in truth.items()}
        assert tune.time_candidate(row, TILES[0], wrong, first.ms).dropped.startswith("WRONG")
        fast = dict.fromkeys(first.ms, 0.1)
        assert tune.time_candidate(row, TILES[0], truth, fast).dropped.startswith("slow")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_the_hopper_backward_are_put_in_order(packed: bool, dim: int) -> None:
    """hopper_backward.finish_dq undoes the order in which threads held dQ (`in_order_of_threads`, of 64 columns)."""
    from attnrt.backends.triton import hopper_backward

    lengths_of, heads, rows = [100, 7], 3, 512
    begins = [0, 128]  # of the statistics: (100 + 128) // 128 * 128, which is that of a second sequence of 128 rows too
    torch.manual_seed(0)
    dq = torch.randn(heads, rows, dim)
    parts = dq.view(heads * rows // 64, 64, dim // 64, 64).transpose(1, 2)
    parts = parts.reshape(-1, 4, 2, 8, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 6, 5, 7)
    sums = parts.reshape(heads, rows, dim).contiguous()
    shape = (1, sum(lengths_of) + 3, heads, dim) if packed else (2, 100, heads, dim)
    found = torch.full(shape, math.nan)
    to = scores.Matrix(found, 0 if packed else found.stride(0), found.stride(2), found.stride(1))
    offsets = lengths(0, 100, 107) if packed else None
    replay.launch(
        hopper_backward.finish_dq, (2, 2 * heads), sums, to, offsets, 0.5, heads, 100, 128, rows,
        DIM=dim, BLOCK=64, PACKED=packed, num_warps=4,
    )  # fmt: skip
    for b, begin in enumerate(begins):
        own = found[0, sum(lengths_of[:b]) :][: lengths_of[b]] if packed else found[b]
        assert torch.equal(own, 0.5 * dq[:, begin : begin + len(own)].transpose(0, 1))
    if packed:
        assert found[0, 107:].isnan().all()
