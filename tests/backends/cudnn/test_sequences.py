"""Where sequences are, and the rows that no plan writes: the kernels, by Triton's interpreter, beside plain loops."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnrt.backends.cudnn import sequences
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.request import AttentionRequest

ROOT = Path(__file__).resolve().parents[3]
BESIDE = """
import random
import torch
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.backends.cudnn.sequences import Clearing, Offsets, usable
from attnrt.request import AttentionRequest

def launch(kernel, grid, *arguments, **options):
    kernel[grid](*arguments, **options)

def steps(lengths, stride):
    told = torch.full((len(lengths) + 1, stride), -1, dtype=torch.int32)
    told[:, 0] = torch.tensor([0, *lengths]).cumsum(0)
    return told[:, 0]

def seen(r, q, k):
    'The query rows of a sequence that see a key.'
    ahead = k - q if r.alignment == "bottom_right" else 0
    low = 0 if r.left is None else r.left
    stand = range(ahead, ahead + q)
    sees = [(r.left is None or i - r.left < k) and (r.right is None or i + r.right >= 0) for i in stand]
    return [i for i in range(q) if k and sees[i]]

rng = random.Random(SEED)
for number in range(30):
    packed, batch = rng.random() < 0.5, rng.randint(1, 4)
    layout = "thd" if packed else rng.choice(("bhsd", "bshd", "sbhd"))
    alignment = rng.choice(("top_left", "bottom_right"))
    lengths_q, lengths_kv = ([rng.choice((0, 1, 3, 6)) for _ in range(batch)] for _ in "qk")
    longest_q, longest_kv = max(1, *lengths_q), max(1, *lengths_kv)
    stray = rng.choice((0, 3)) if packed else 0
    shape = dict(
        batch=batch, heads_q=4, heads_kv=rng.choice((1, 2, 4)), seqlen_q=longest_q, seqlen_kv=longest_kv,
        head_dim=rng.choice((8, 24)), head_dim_v=rng.choice((8, 16)), dtype="bf16", layout=layout, alignment=alignment,
        window=(rng.choice((None, 0, 2)), rng.choice((None, 0, 1))), packed=packed, padded=not packed, training=True,
    )
    r = AttentionRequest.from_shape(**shape)
    if packed:
        from dataclasses import replace
        r = replace(r, tokens_q=sum(lengths_q) + stray, tokens_kv=sum(lengths_kv) + stray)
    clearing = Clearing(r, shape_of(r, 90))
    clearing.grid = clearing.grid[0], 2  # of which each is interpreted
    lq, lk = (torch.tensor(n, dtype=torch.int32) for n in (lengths_q, lengths_kv))
    cu_q, cu_kv = (steps(lengths_q, 1), steps(lengths_kv, 3)) if packed else (None, None)

    def tensor(heads, rows, tokens, dim):
        size = {"thd": (tokens, heads, dim), "bhsd": (batch, heads, rows, dim), "bshd": (batch, rows, heads, dim),
                "sbhd": (rows, batch, heads, dim)}[layout]
        return torch.full(size, 7.0)

    def row(x, b, s, cu):
        'Row s of sequence b: (H, D).'
        if layout == "thd":
            return x[cu[b] + s]
        return {"bhsd": x[b, :, s] if layout == "bhsd" else None, "bshd": x[b, s] if layout == "bshd" else None,
                "sbhd": x[s, b] if layout == "sbhd" else None}[layout]

    out, want = (tensor(4, r.seqlen_q, r.tokens_q, r.head_dim_v) for _ in "ab")
    first = layout == "bhsd"  # heads are apart
    size = (r.tokens_q, 4) if packed else (batch, 4, r.seqlen_q) if first else (batch, r.seqlen_q, 4)
    stats, want_stats = torch.full(size, 7.0), torch.full(size, 7.0)
    lse = torch.full((4, r.tokens_q) if packed else (batch, 4, r.seqlen_q), 7.0)
    want_lse = lse.clone()
    dq, want_dq = (tensor(4, r.seqlen_q, r.tokens_q, r.head_dim_qk) for _ in "ab")
    dk, want_dk = (tensor(r.heads_kv, r.seqlen_kv, r.tokens_kv, r.head_dim_qk) for _ in "ab")
    dv, want_dv = (tensor(r.heads_kv, r.seqlen_kv, r.tokens_kv, r.head_dim_v) for _ in "ab")
    for b in range(batch):
        live = seen(r, lengths_q[b], lengths_kv[b])
        for s in range(lengths_q[b] if packed else r.seqlen_q):
            if s not in live:
                row(want, b, s, cu_q)[:] = 0
                row(want_dq, b, s, cu_q)[:] = 0
                at = cu_q[b] + s if packed else (b, slice(None), s) if first else (b, s)
                want_stats[at] = torch.inf
                want_lse[(slice(None), cu_q[b] + s) if packed else (b, slice(None), s)] = -torch.inf
        for s in range(lengths_kv[b] if packed else r.seqlen_kv):
            if not lengths_q[b] or s >= lengths_kv[b]:
                row(want_dk, b, s, cu_kv)[:] = 0
                row(want_dv, b, s, cu_kv)[:] = 0
    if packed:
        end_q, end_kv = sum(lengths_q), sum(lengths_kv)
        want[end_q:] = want_dq[end_q:] = want_dk[end_kv:] = want_dv[end_kv:] = 0
        want_stats[end_q:], want_lse[:, end_q:] = torch.inf, -torch.inf
    clearing._output(launch, (lq, lk, cu_q, out, stats, lse))
    clearing._gradient(launch, (lq, lk, cu_q, cu_kv, dq, dk, dv))
    for name, x, y in (("out", out, want), ("stats", stats, want_stats), ("lse", lse, want_lse), ("dq", dq, want_dq),
                       ("dk", dk, want_dk), ("dv", dv, want_dv)):
        assert torch.equal(x, y), (name, shape, lengths_q, lengths_kv, x, y)
    again = tensor(4, r.seqlen_q, r.tokens_q, r.head_dim_v)
    clearing._output(launch, (lq, lk, cu_q, again, None, None))
    assert torch.equal(again, want)

    if packed:
        for wide in (torch.int32, torch.int64):
            for same in (False, True):
                room = 1 << (batch - 1).bit_length()
                steps_q, steps_kv = (64, 1, 1280), () if same else (8, 16)
                made = Offsets(batch, room, steps_q, steps_kv, wide)
                length_q, length_kv = (torch.full((room,), -1, dtype=torch.int32) for _ in "qk")
                table = torch.full((len(steps_q) + len(steps_kv), room + 1), -1, dtype=wide)
                made._body(launch, (cu_q, None if same else cu_kv, length_q, None if same else length_kv, table))
                assert length_q.tolist() == [*lengths_q, *[0] * (room - batch)]
                assert same or length_kv.tolist() == [*lengths_kv, *[0] * (room - batch)]
                for n, step in enumerate((*steps_q, *steps_kv)):
                    cu = (cu_q if n < 3 else cu_kv).tolist()
                    assert table[n].tolist() == [step * x for x in (*cu, *[cu[-1]] * (room - batch))]
print("the same")
"""


COMPILES = """
import itertools
import codegen
import torch
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.backends.cudnn.sequences import Clearing, Offsets
from attnrt.request import AttentionRequest

def launch(kernel, grid, *arguments, **options):
    kernel[grid](*arguments, **options)

with codegen.recorded(ARCH) as found:
    for layout, dims, alignment, window in itertools.product(
        ("thd", "bhsd", "sbhd"), ((128, 128), (80, 64)), ("top_left", "bottom_right"), ((None, None), (3, 1))
    ):
        packed = layout == "thd"
        r = AttentionRequest.from_shape(
            batch=3, heads_q=4, heads_kv=2, seqlen_q=37, seqlen_kv=37, head_dim=dims[0], head_dim_v=dims[1],
            dtype="bf16", layout=layout, alignment=alignment, window=window, packed=packed, padded=not packed,
            training=True,
        )
        clearing = Clearing(r, shape_of(r, ARCH))
        size = {"thd": (111, 4), "bhsd": (3, 4, 37), "sbhd": (37, 3, 4)}[layout]
        dq, dv = (torch.zeros((*size, d), dtype=torch.bfloat16) for d in dims)
        stats = torch.zeros((111, 4) if packed else (3, 4, 37) if layout == "bhsd" else (3, 37, 4))
        lse = torch.zeros((4, 111) if packed else (3, 4, 37))
        lengths = torch.zeros(3, dtype=torch.int32)
        cu = torch.zeros(4, dtype=torch.int32) if packed else None
        for a, b in ((stats, lse), (stats, None), (None, None)):
            clearing._output(launch, (lengths, lengths, cu, dv, a, b))
        clearing._gradient(launch, (lengths, lengths, cu, cu, dq, dq, dv))
    cu = torch.zeros(4, dtype=torch.int32)
    for wide in (torch.int32, torch.int64):
        table = torch.zeros(5, 5, dtype=wide)
        Offsets(3, 4, (64, 1, 4096), (8, 2), wide)._body(launch, (cu, cu, lengths, lengths, table))
        Offsets(3, 4, (512,), (), wide)._body(launch, (cu, None, lengths, None, table))
assert {name for name, _ in found} == {"_find", "_clear_output", "_clear_gradients"}
for name, kernel in found:  # rows are zeroed 16 bytes at a time
    assert name == "_find" or "st.global.v4.b32" in kernel.asm["ptx"], kernel.asm["ptx"]
print("compiled")
"""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(script: str, **more: str) -> str:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "tests", Path(__file__).parent)))
    environ = os.environ | {"PYTHONPATH": path} | more
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    assert not done.returncode, done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_do_what_loops_do(seed: int) -> None:
    assert run(BESIDE.replace("SEED", str(seed)), TRITON_INTERPRET="1") == "the same\n"


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_they_compile(arch: int) -> None:
    """What the interpreter runs need not."""
    assert run(COMPILES.replace("ARCH", str(arch))) == "compiled\n"


DENSE = """
import sys
from attnrt.backends.cudnn.call import Call
from attnrt.request import AttentionRequest
from cudnn_emulation import EmulatedDevice
Call(AttentionRequest.from_shape(batch=2, heads_q=4, seqlen_q=64, head_dim=64, training=True), EmulatedDevice())
assert "attnrt.backends.cudnn.sequences" not in sys.modules and "triton" not in sys.modules
Call(AttentionRequest.from_shape(batch=2, heads_q=4, seqlen_q=64, head_dim=64, packed=True), EmulatedDevice())
assert "attnrt.backends.cudnn.sequences" in sys.modules
print("not imported")
"""


def test_a_dense_call_does_not_wait_for_triton() -> None:
    """Importing it takes longer than the rest of a process's first call."""
    assert run(DENSE) == "not imported\n"


@needs_triton
@pytest.mark.parametrize("works", [True, False])
def test_without_a_triton_that_works_operators_do_it(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("attnrt.backends.triton.launch.working", lambda: (asked.append("asked"), works)[1])
    request = AttentionRequest.from_shape(batch=2, heads_q=4, seqlen_q=64, head_dim=64, packed=True)
    shape = shape_of(request, 90)
    assert not sequences.usable(shape, False) and not asked  # on a CPU
    monkeypatch.setattr(sequences.torch.cuda, "is_available", lambda: True)
    assert sequences.usable(shape, False) is works and asked
    asked.clear()
    monkeypatch.setattr(sequences, "capturing", lambda: True)
    assert sequences.usable(shape, False) and not asked
    assert not sequences.usable(shape_of(request, 80), True)  # whose LSE is padded


@needs_triton
def test_a_dense_call_has_no_use_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnrt.backends.triton.launch.working", lambda: pytest.fail("tried"))
    monkeypatch.setattr(sequences.torch.cuda, "is_available", lambda: True)
    request = AttentionRequest.from_shape(batch=2, heads_q=4, seqlen_q=64, head_dim=64)
    assert not sequences.usable(shape_of(request, 90), False)
