"""The Hopper forward on a Hopper GPU, against float64.

Run it by pytest, or as a script: the tests, then a benchmark; --check or --bench for only one of them.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnrt.request import AttentionRequest

hopper = pytest.importorskip("attnrt.backends.triton.hopper")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(not hopper.available(), reason=str(hopper.MISSING)),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 203, 256, 257, 384, 512, 777, 1024, 1300)


def tensor(r: AttentionRequest, heads: int, length: int, view: str) -> Tensor:
    """Random, in the layout; `view` is how it lies in memory: dense, rows (of a wider tensor), or heads (more of
    them, the others NaN)."""
    sizes = {"b": r.batch, "h": heads, "s": length}
    order = {"bhsd": "bhs", "bshd": "bsh", "sbhd": "sbh"}[r.layout]
    options: dict[str, Any] = {"dtype": DTYPES[r.dtype], "device": "cuda"}
    if view == "dense":
        return torch.randn(*(sizes[a] for a in order), r.head_dim_qk, **options)
    if view == "rows":
        wide = torch.randn(*(sizes[a] for a in order), 3 * r.head_dim_qk, **options)
        return wide[..., r.head_dim_qk : -r.head_dim_qk]
    wide = torch.full([sizes[a] + (2 if a in "hs" else 0) for a in order] + [r.head_dim_qk], math.nan, **options)
    inner = wide[tuple(slice(1, -1) if a in "hs" else slice(None) for a in order)]
    return inner.copy_(torch.randn(inner.shape, **options))


MODES: tuple[dict[str, Any], ...] = (
    {},
    {"persistent": False},
    {"persistent": True},
    {"persistent": True, "ping_pong": False},
    {"persistent": False, "ping_pong": False},
    {"persistent": True, "folded": True},
)
"""Ways to launch it, of which the first is the one that calls get."""


def run(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, **mode: Any) -> tuple[Tensor, Tensor]:
    """Poisoned outputs, with a guard of NaN behind each."""
    shape = (r.heads_q, q.shape[0]) if r.packed else (r.batch, r.heads_q, r.seqlen_q)
    out, lse = (
        torch.full((n + 4096,), math.nan, dtype=dtype, device="cuda")
        for n, dtype in ((q.numel(), q.dtype), (math.prod(shape), torch.float32))
    )
    views = out[:-4096].view(q.shape), lse[:-4096].view(shape)
    hopper.launch(q, k, v, *views, r, **mode)
    assert out[-4096:].isnan().all() and lse[-4096:].isnan().all(), "wrote past the end"
    return views


def reference(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in (B, H, S, D) and LSE, in plain PyTorch, from operands in (B, H, S, D)."""
    q, k, v = (x.to(dtype) for x in (q, k.repeat_interleave(r.group, 1), v.repeat_interleave(r.group, 1)))
    seqlen_q, seqlen_kv = q.shape[2], k.shape[2]
    shift = seqlen_kv - seqlen_q if r.alignment == "bottom_right" else 0
    columns, rows = (torch.arange(n, device="cuda") for n in (seqlen_kv, seqlen_q))
    distance = columns - rows[:, None] - shift
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if r.left is not None:
        hidden |= distance < -r.left
    if r.right is not None:
        hidden |= distance > r.right
    scores = (q @ k.mT * r.scale).masked_fill(hidden, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.double().logsumexp(-1)


def bhsd(r: AttentionRequest, x: Tensor) -> Tensor:
    return x.permute(*hopper.AXES[r.layout], 3)


def check(r: AttentionRequest, views: tuple[str, str, str] = ("dense",) * 3, **mode: Any) -> None:
    """The error is at most twice that of plain PyTorch in the same dtype (and a little)."""
    sizes = ((r.heads_q, r.seqlen_q), (r.heads_kv, r.seqlen_kv), (r.heads_kv, r.seqlen_kv))
    q, k, v = (tensor(r, *size, view) for size, view in zip(sizes, views, strict=True))
    out, lse = run(r, q, k, v, **mode)
    again, lse_again = run(r, q, k, v, **mode)
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "two runs differ"
    agree(r, bhsd(r, out), lse, [bhsd(r, x) for x in (q, k, v)])


def agree(r: AttentionRequest, out: Tensor, lse: Tensor, operands: list[Tensor]) -> None:
    """With float64, from (B, H, S, D)."""
    want, want_lse = reference(r, *operands, torch.float64)
    if not want.numel():
        return
    usual = (reference(r, *operands, out.dtype)[0].double() - want).abs().max().item()
    error = (out.double() - want).abs().max().item()
    assert error <= 2 * usual + (1e-2 if r.dtype == "bf16" else 2e-3), f"error {error:.3g}, plain has {usual:.3g}"
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-3)


def request(**changes: Any) -> AttentionRequest:
    given = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 300, "head_dim": 128, "layout": "bshd"}
    return AttentionRequest.from_shape(**(given | {"return_lse": True} | changes))


@pytest.mark.parametrize("dim", hopper.hopper_tiles())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths(dim: int, causal: bool, seqlen: int) -> None:
    for mode in MODES:
        check(request(head_dim=dim, seqlen_q=seqlen, causal=causal), **mode)


@pytest.mark.parametrize("layout", hopper.AXES)
@pytest.mark.parametrize("views", [("dense",) * 3, ("rows",) * 3, ("heads",) * 3, ("dense", "rows", "heads")])
def test_layouts(layout: str, views: tuple[str, str, str]) -> None:
    check(request(layout=layout, causal=True), views)


@pytest.mark.parametrize("seed", range(200))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    seqlen_q, seqlen_kv = draw.choice(LENGTHS), draw.choice(LENGTHS)
    band = draw.choice(["none", "causal", "causal", "window"])
    options: dict[str, Any] = {}
    if band != "none":
        options = {"causal": band == "causal", "alignment": draw.choice(["top_left", "bottom_right"])}
    if band == "window":
        options["window"] = draw.choice([(0, 0), (100, 0), (128, None), (None, 70), (300, 300)])
    heads_kv = draw.choice([1, 2, 3])
    r = request(
        batch=draw.choice([1, 2, 3]), heads_kv=heads_kv, heads_q=heads_kv * draw.choice([1, 2, 4, 7]),
        seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, head_dim=draw.choice([64, 128] if band == "window" else [64, 128, 256]),
        layout=draw.choice(list(hopper.AXES)), dtype=draw.choice(list(DTYPES)), scale=draw.choice([None, 0.3, 1e-3]),
        **options,
    )  # fmt: skip
    views = [draw.choice(["dense", "rows", "heads"]) for _ in range(3)]
    check(r, (views[0], views[1], views[2]), **draw.choice(MODES))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(60))
def test_lengths_of_their_own(seed: int, packed: bool) -> None:
    """Sequences in a padded or packed batch, with NaN in the padding and behind the last sequence."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads_kv, batch = draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    given = [[draw.choice([0, *LENGTHS]) for _ in range(batch)] for _ in range(2)]
    if draw.random() < 0.5:
        given[1] = given[0]
    room = [max(max(x), 1) + draw.choice([0, 3]) for x in given]
    band: dict[str, Any] = {}
    if draw.random() < 0.7:
        window = draw.choice([None, None, (100, 0), (128, None), (300, 300)])
        band = {"causal": window is None, "window": window, "alignment": draw.choice(["top_left", "bottom_right"])}
    r = AttentionRequest.from_shape(
        batch=batch, heads_q=heads_kv * draw.choice([1, 2, 4]), heads_kv=heads_kv, seqlen_q=room[0], seqlen_kv=room[1],
        head_dim=draw.choice([64, 128, 128, 256]) if not band.get("window") else draw.choice([64, 128]),
        dtype=draw.choice(list(DTYPES)), layout="thd" if packed else draw.choice(list(hopper.AXES)), packed=packed,
        padded=not packed, return_lse=True, **band,
    )  # fmt: skip
    heads, where, tensors = (r.heads_q, heads_kv, heads_kv), [], []
    for x in given:
        starts = [sum(x[:i]) for i in range(batch + 1)]
        where.append([slice(*starts[b : b + 2]) if packed else slice(0, x[b]) for b in range(batch)])
    lengths = tuple(
        torch.tensor([sum(x[:i]) for i in range(batch + 1)] if packed else x, dtype=torch.int32, device="cuda")
        for x in given
    )
    for i, h in enumerate(heads):
        side = i > 0
        dims = {"b": batch, "h": h, "s": room[side], "t": sum(given[side]) + 5}
        order = "th" if packed else {"bhsd": "bhs", "bshd": "bsh", "sbhd": "sbh"}[r.layout]
        x = torch.full((*(dims[a] for a in order), r.head_dim_qk), math.nan, dtype=DTYPES[r.dtype], device="cuda")
        seen = x.permute(1, 0, 2)[None] if packed else bhsd(r, x)
        for b, rows in enumerate(where[side]):
            seen[0 if packed else b, :, rows] = torch.randn(h, rows.stop - rows.start, r.head_dim_qk)
        tensors.append((x, seen))
    out, lse = run(r, *(x for x, _ in tensors), lengths=lengths, **draw.choice(MODES))
    out, lse = (out.permute(1, 0, 2)[None], lse[None]) if packed else (bhsd(r, out), lse)
    left = torch.ones(lse.shape, dtype=torch.bool, device="cuda")
    for b in range(batch):
        at, rows = 0 if packed else b, (where[0][b], where[1][b], where[1][b])
        own = [seen[at, :, s][None] for (_, seen), s in zip(tensors, rows, strict=True)]
        agree(r, out[at, :, rows[0]][None], lse[at, :, rows[0]][None], own)
        left[at, :, rows[0]] = False
    if packed:
        assert out[left].isnan().all() and lse[left].isnan().all()
    else:
        assert (out[left] == 0).all() and lse[left].isneginf().all()


def test_many_tiles() -> None:
    """More tiles than multiprocessors, again and again: a race would show."""
    r = request(batch=4, heads_q=16, heads_kv=4, seqlen_q=2048, causal=True)
    q, k, v = (tensor(r, h, 2048, "dense") for h in (16, 4, 4))
    for mode in MODES:
        first = run(r, q, k, v, **mode)
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first, run(r, q, k, v, **mode), strict=True))


def test_large_scores() -> None:
    """Logits in the thousands: the running maximum keeps every exponential finite."""
    r = request(scale=30.0, seqlen_q=513, causal=True)
    q, k, v = (tensor(r, h, 513, "dense") for h in (4, 2, 2))
    out, lse = run(r, q, k, v)
    want = reference(r, *(bhsd(r, x) for x in (q, k, v)), torch.float64)[0]
    assert not out.isnan().any() and lse.isfinite().all()
    torch.testing.assert_close(bhsd(r, out).double(), want, rtol=3e-2, atol=3e-2)


# --- Benchmark -------------------------------------------------------------------------------------------------------


def benchmark(dims: tuple[int, ...] = (64, 128, 256), lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)) -> None:
    """TFLOP/s at 16k tokens and heads * head_dim = 2048, bf16, against PyTorch's kernels in the same run."""
    from triton.testing import do_bench

    def rate(work: float, function: Callable[[], Any]) -> float:
        try:
            return work / (statistics.median(do_bench(function, rep=60, return_mode="median") for _ in range(3)) * 1e9)
        except RuntimeError as error:
            print(f"    {str(error).splitlines()[0][:100]}", file=sys.stderr)
            return math.nan

    print(torch.cuda.get_device_name(), torch.__version__, "| TFLOP/s, and ours over the best of PyTorch's")
    print(
        f"{'':24}{'cudnn':>8}{'flash':>8}{'chosen':>8}{'tiles':>8}{'persist':>8}{'pers-pp':>8}{'tile-pp':>8}{'folded':>8}{'ratio':>8}"
    )
    for dim in dims:
        for causal in (False, True):
            for seqlen in lengths:
                batch, heads = 16384 // seqlen, 2048 // dim
                r = request(batch=batch, heads_q=heads, heads_kv=heads, seqlen_q=seqlen, head_dim=dim, causal=causal)
                q, k, v = (tensor(r, heads, seqlen, "dense") for _ in range(3))
                out, lse = torch.empty_like(q), torch.empty(batch, heads, seqlen, device="cuda")
                work = 4.0 * batch * heads * seqlen**2 * dim / (2 if causal else 1)
                a, b, c = (x.transpose(1, 2) for x in (q, k, v))
                rates = []
                for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                    with sdpa_kernel(backend):
                        rates.append(rate(work, lambda: F.scaled_dot_product_attention(a, b, c, is_causal=causal)))  # noqa: B023
                rates += [rate(work, lambda m=m: hopper.launch(q, k, v, out, lse, r, **m)) for m in MODES]  # noqa: B023
                theirs, ours = ([x for x in pair if x == x] or [math.nan] for pair in (rates[:2], rates[2:]))
                name = f"D={dim} {'causal' if causal else 'full':6} S={seqlen}"
                row = "".join(f"{x:8.0f}" for x in rates)
                print(f"{name:24}{row}{max(ours) / max(theirs):8.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", action="store_true", help="only the benchmark")
    parser.add_argument("--check", action="store_true", help="only the tests")
    given = parser.parse_args()
    if not ON_HOPPER:
        sys.exit("needs a Hopper GPU")
    if not hopper.available():
        sys.exit(hopper.MISSING)
    status = 0 if given.bench else int(pytest.main([__file__, "-q", "-x", "-p", "no:cacheprovider"]))
    if not given.check:
        benchmark()
    sys.exit(status)
