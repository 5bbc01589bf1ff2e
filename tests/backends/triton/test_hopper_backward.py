"""The Hopper backward without a Hopper GPU: what the compiler makes of it, and what its three teams do on the CPU."""

from __future__ import annotations

import math
import random
import re
from typing import Any, NamedTuple

import pytest
import teams
import torch
from sm90 import REGISTERS, SHARED_LIMIT, Compiled, compiled
from teams import Pointer, barriers, memory

triton = pytest.importorskip("triton", reason="needs triton")

from attnrt.backends.triton import hopper, hopper_backward, hopper_kernel  # noqa: E402
from attnrt.request import AttentionRequest  # noqa: E402

pytestmark = pytest.mark.skipif(not hopper.backward_available(), reason=str(hopper_backward.MISSING))
ROWS, KEYS, PART = 64, 128, 64
NAMES = (
    *("tile_of_program", "first_row", "query_blocks", "fetch", "producer", "in_order_of_threads", "step", "leave"),
    *("start_dq", "add_up"),
    *("walk", "consumer", "sequence", "span", "clear_foreign", "store_rows"),
)
"""The functions of the kernel."""
PRODUCTS = {64: 4 + 4 + 4 + 4 + 8, 128: 8 + 8 + 4 + 4 + 8}
"""Instructions that multiply in a step: S, dP; dV, dK; dQ in two parts."""


# --- What the compiler makes of it -----------------------------------------------------------------------------------


def compile_for_sm90(dim: int, kind: str, left: bool, lengths: str = "fixed") -> Compiled:
    from triton.experimental.gluon import language as gl

    dtype = gl.bfloat16 if kind == "bf16" else gl.float16
    block = [1, 1, ROWS, dim]
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    swizzled = f"tensordesc<{kind}{block},{gl.NVMMASharedLayout.get_default_for(block, dtype)!r}>"
    types = dict.fromkeys(("Q", "DOUT", "K", "V", "DK", "DV"), swizzled) | {"scale": "fp32"}
    types |= dict.fromkeys(("LSE2", "DELTA"), f"tensordesc<fp32[1, {ROWS}],{plain!r}>")
    types["SUMS"] = f"tensordesc<fp32[{ROWS * PART // 128}, 128],{plain!r}>"
    types |= dict.fromkeys(("DK_ROWS", "DV_ROWS"), f"*{kind}")
    constants: dict[str, Any] = {"D": dim, "LEFT": left, "PACKED": lengths == "packed"}
    return compiled(hopper_backward.backward, types, constants, lengths != "fixed", ("DK_ROWS", "DV_ROWS"))


def loops(sass: str, products: int) -> list[str]:
    """The loops that have every product, from a label to the branch back. (Waits spin in places of their own, and
    branch back into the midst of them.)"""
    lines = [re.sub(r"/\*[^*]*\*/", "", line).strip() for line in sass.splitlines()]
    found: dict[str, str] = {}
    for end, line in enumerate(lines):
        back = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        if back and f"{back[1]}:" in lines[:end]:
            body = "\n".join(lines[lines.index(f"{back[1]}:") : end])
            if body.count("HGMMA") == products and "USETMAXREG" not in body:  # which is between consumers
                found.setdefault(back[1], body)
    return list(found.values())


VARIANTS = [(128, kind, left, "fixed") for kind in ("bf16", "fp16") for left in (False, True)]
VARIANTS += [(64, "bf16", left, lengths) for left in (False, True) for lengths in ("fixed", "packed")]
VARIANTS += [(128, "bf16", left, lengths) for left in (False, True) for lengths in ("padded", "packed")]


@pytest.mark.parametrize(("dim", "kind", "left", "lengths"), VARIANTS)
def test_machine_code(dim: int, kind: str, left: bool, lengths: str) -> None:
    found = compile_for_sm90(dim, kind, left, lengths)
    assert found.registers <= REGISTERS and found.shared <= SHARED_LIMIT
    # A few words that the assembler of triton 3.6 to 3.8 keeps around a tile's work (3.9: none); in the loop, none.
    assert found.stack <= 40
    inner = loops(found.sass, PRODUCTS[dim])
    assert len(inner) == 2, "a loop for each consumer"
    for body in inner:
        assert not re.search(r"\b(STL|LDL)\b", body), "spills in the loop"
        assert "UTMAREDG" in body
    # Two products in flight behind S, and dQ behind dV and dK; in what we ask for and in what the assembler left.
    asked = {64: ["0", "0", "0", "1"], 128: ["0", "2", "0", "1"]}[dim]
    assert sorted(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", found.ptx)) == sorted(asked * 2)
    assert len(re.findall(r"gsb0, 0x[12]\b", found.sass)) == 2 * sum(n != "0" for n in asked)


def test_all_warps_are_done_before_one_thread_says_so() -> None:
    """An arrival is one thread's: a barrier of its warp group must stand between it and what every warp stored, or
    waited for."""
    event = r"wgmma\.wait_group|stmatrix|st\.shared|bar\.sync|mbarrier\.arrive\.shared|cp\.reduce"
    synced, announced = True, 0
    for name in re.findall(event, compile_for_sm90(128, "bf16", False).ptx):
        if name == "bar.sync":
            synced = True
        elif name in ("mbarrier.arrive.shared", "cp.reduce"):
            assert synced, name
            announced += 1
        else:
            synced = False
    assert announced == 2 * 4  # of each consumer: its dS, a block of queries, a block of dO; its part of dQ


# --- What its teams do -----------------------------------------------------------------------------------------------


class Sequence(NamedTuple):
    """Of a batch: its entry in the tensors, its rows there, and where its statistics begin."""

    entry: int
    queries: slice
    keys: slice
    stats: int


def whole_tiles(n: int) -> int:
    return -(-n // 128) * 128


def batch_of(r: AttentionRequest) -> list[Sequence]:
    """Sequences that are all as long as the tensors."""
    rows = whole_tiles(r.seqlen_q)
    return [Sequence(b, slice(0, r.seqlen_q), slice(0, r.seqlen_kv), b * rows) for b in range(r.batch)]


def emulate(
    r: AttentionRequest, batch: list[Sequence], tensors: list[Any], section: int, lengths: Any = (None, None)
) -> tuple[Any, Any, Any]:
    """dq (a sequence after the other, from row `stats` on), dk and dv, of q, k, v and the output's gradient: tensors
    (B, H, S, D), packed: (1, H, T, D). By the kernel's own functions."""
    q, k, v, grad = tensors
    dim = r.head_dim_qk
    rows = whole_tiles(batch[-1].stats + r.seqlen_q + 128)
    lse2, delta = torch.full((r.heads_q, rows), math.inf), torch.zeros(r.heads_q, rows)
    for b in batch:  # as backward.preprocess leaves them
        own = [x[b.entry, :, at][None].double() for x, at in zip(tensors, (b.queries, b.keys, b.keys), strict=False)]
        out, lse = (x[0] for x in reference(r, *own))
        at = slice(b.stats, b.stats + lse.shape[-1])
        dead = lse.isneginf()
        lse2[:, at] = torch.where(dead, math.inf, lse * math.log2(math.e)).float()
        delta[:, at] = torch.where(dead, 0.0, (grad[b.entry, :, b.queries].double() * out).sum(-1)).float()
    sums = torch.zeros(r.heads_q * rows * dim // 128, 128)
    dk, dv = (torch.full(x.shape, math.nan, dtype=x.dtype) for x in (k, v))
    tiles, pairs = -(-r.seqlen_kv // KEYS), r.batch * r.heads_kv
    shift = int(r.alignment == "bottom_right") * (r.seqlen_kv - r.seqlen_q if lengths[1] is None else 1)
    order, stats = (tiles, pairs, section, r.heads_kv), (whole_tiles(r.seqlen_q), rows)
    pointers = tuple(None if x is None else Pointer(x) for x in lengths)
    right = hopper.UNBOUNDED if r.right is None else r.right
    bounds = (*pointers, r.seqlen_q, r.seqlen_kv, r.left or 0, right, shift)
    constants = (dim, r.left is not None, r.packed)
    made = (*(Pointer(x.view(-1)) for x in (dk, dv)), *(tuple(x.stride()[:3]) for x in (dk, dv)))
    for program in range(tiles * pairs):
        shared = (
            *(memory(2, 1, 1, ROWS, dim, dtype=q.dtype) for _ in range(4)),
            *(memory(2, 1, ROWS, dtype=torch.float32) for _ in range(2)),
            memory(4, ROWS, ROWS, dtype=q.dtype),
            memory(2, ROWS * PART // 128, 128, dtype=torch.float32),
        )
        bars = barriers((2, 1), (2, 1), (2, 2), (2, 1), (2, 2), (2, 2))
        rest = (shared, bars, order, r.group, bounds, stats)
        lines = (lse2.view(-1, ROWS), delta.view(-1, ROWS))
        scale = r.scale * math.log2(math.e)
        calls: list[Any] = [("producer", (q, grad, k, v, *lines, *rest, *constants))]
        calls += [("consumer", (dk, dv, made, sums, *rest, scale, who, *constants)) for who in (0, 1)]
        world = {"ROWS": ROWS, "KEYS": KEYS, "STAGES": 2, "LINE": 128, "PART": 64, "STATS_ROWS": 128}
        teams.run((hopper_backward, hopper_kernel), NAMES, world, calls, program, tiles * pairs)
    return r.scale * in_order_of_rows(sums, dim).view(r.heads_q, rows, dim), dk, dv


def in_order_of_rows(sums: torch.Tensor, dim: int) -> torch.Tensor:
    """What hopper_backward.finish_dq does: (half, half of 16 rows, pair of columns, warp, row, quad, which, which)."""
    parts = sums.view(-1, dim // PART, 2, PART // 16, 4, 8, 4, 2, 2)  # of a block: part of the columns, ...
    return parts.permute(0, 4, 2, 5, 1, 3, 7, 6, 8).reshape(-1, ROWS, dim)


def reference(r: AttentionRequest, q: Any, k: Any, v: Any) -> Any:
    """Output and LSE of (B, H, S, D) tensors: zeros and -inf for a row that sees nothing."""
    k, v = (x.repeat_interleave(r.group, 1) for x in (k, v))
    seqlen_q, seqlen_kv = q.shape[2], k.shape[2]
    shift = seqlen_kv - seqlen_q if r.alignment == "bottom_right" else 0
    distance = torch.arange(seqlen_kv) - torch.arange(seqlen_q)[:, None] - shift
    seen = torch.ones_like(distance, dtype=torch.bool)
    if r.left is not None:
        seen &= distance >= -r.left
    if r.right is not None:
        seen &= distance <= r.right
    scores = (q @ k.mT * r.scale).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None], 0.0)
    return weights @ v, scores.logsumexp(-1)


def agree(r: AttentionRequest, batch: list[Sequence], tensors: list[Any], found: tuple[Any, Any, Any]) -> None:
    dq, dk, dv = found
    for b in batch:
        own = [x[b.entry, :, at][None] for x, at in zip(tensors, (b.queries, b.keys, b.keys), strict=False)]
        exact = [x.double().requires_grad_() for x in own]
        grad = tensors[3][b.entry, :, b.queries][None].double()
        wanted = torch.autograd.grad(reference(r, *exact)[0], exact, grad)
        mine = dq[:, b.stats : b.stats + grad.shape[2]], dk[b.entry, :, b.keys], dv[b.entry, :, b.keys]
        for one, want in zip(mine, wanted, strict=True):
            torch.testing.assert_close(one.double(), want[0], rtol=3e-2, atol=3e-2)


def draw_band(draw: random.Random) -> dict[str, Any]:
    window = draw.choice([None, None, (0, 0), (70, 0), (128, None), (200, 33), (300, 300)])
    causal = window is None or draw.random() < 0.3
    return {"causal": causal, "window": window, "alignment": draw.choice(["top_left", "bottom_right"])}


@pytest.mark.parametrize("seed", range(40))
def test_protocol_and_numerics(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    seqlen_q, seqlen_kv = (draw.choice([1, 63, 64, 65, 127, 128, 129, 200, 256, 300]) for _ in range(2))
    heads_kv, dim = draw.choice([1, 2]), draw.choice([64, 128])
    r = AttentionRequest.from_shape(
        batch=draw.choice([1, 2]), heads_q=heads_kv * draw.choice([1, 2, 3]), heads_kv=heads_kv, seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv, head_dim=dim, layout="bhsd", return_lse=True,
        **(draw_band(draw) if draw.random() < 0.7 else {}),
    )  # fmt: skip
    q, grad = (torch.randn(r.batch, r.heads_q, seqlen_q, dim).bfloat16() for _ in range(2))
    k, v = (torch.randn(r.batch, heads_kv, seqlen_kv, dim).bfloat16() for _ in range(2))
    found = emulate(r, batch_of(r), [q, k, v, grad], draw.choice([1, 2, 7]))
    agree(r, batch_of(r), [q, k, v, grad], found)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(30))
def test_lengths_of_their_own(seed: int, packed: bool) -> None:
    """Sequences in a padded or packed batch, with NaN in the padding and behind the last sequence."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads_kv, count, dim = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([64, 128])
    given = [[draw.choice([0, 1, 5, 64, 100, 128, 130, 257]) for _ in range(count)] for _ in range(2)]
    room = [max(max(x), 1) + draw.choice([0, 3, 130]) for x in given]
    r = AttentionRequest.from_shape(
        batch=count, heads_q=heads_kv * draw.choice([1, 3]), heads_kv=heads_kv, seqlen_q=room[0], seqlen_kv=room[1],
        head_dim=dim, layout="thd" if packed else "bhsd", packed=packed, padded=not packed, return_lse=True,
        **(draw_band(draw) if draw.random() < 0.7 else {}),
    )  # fmt: skip
    starts = [[sum(x[:i]) for i in range(count + 1)] for x in given]
    if packed:
        spans = [[slice(*x[b : b + 2]) for b in range(count)] for x in starts]
        stats = [(starts[0][b] + 128 * b) // 128 * 128 for b in range(count)]
        sizes = [(1, starts[i][-1] + 7) for i in (0, 1)]
    else:
        spans = [[slice(0, n) for n in x] for x in given]
        stats = [b * whole_tiles(room[0]) for b in range(count)]
        sizes = [(count, room[i]) for i in (0, 1)]
    batch = [Sequence(0 if packed else b, spans[0][b], spans[1][b], stats[b]) for b in range(count)]
    tensors = []
    for side, heads in ((0, r.heads_q), (1, heads_kv), (1, heads_kv), (0, r.heads_q)):
        x = torch.full((sizes[side][0], heads, sizes[side][1], dim), math.nan).bfloat16()
        for b in batch:
            at = b.keys if side else b.queries
            x[b.entry, :, at] = torch.randn(heads, at.stop - at.start, dim).bfloat16()
        tensors.append(x)
    lengths = tuple(torch.tensor(x, dtype=torch.int32) for x in (starts if packed else given))
    found = emulate(r, batch, tensors, draw.choice([1, 2, 7]), lengths)
    agree(r, batch, tensors, found)
    unwritten = torch.ones(found[1].shape[0], found[1].shape[2], dtype=torch.bool)
    for b in batch:
        unwritten[b.entry, b.keys] = False
    for grad in found[1:]:  # padding is zeros; what is no sequence's is left alone
        left = grad.transpose(1, 2)[unwritten]
        assert left.isnan().all() if packed else (left == 0).all()
