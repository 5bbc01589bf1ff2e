"""The Hopper forward without a Hopper GPU: what the compiler makes of it, and what its three teams do on the CPU.

As a script it prints the table of variants.
"""

from __future__ import annotations

import itertools
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

from attnrt.backends.triton import hopper, hopper_kernel  # noqa: E402
from attnrt.request import AttentionRequest  # noqa: E402

pytestmark = pytest.mark.skipif(not hopper.available(), reason=str(hopper.MISSING))
PING_PONG = True


# --- What the compiler makes of it -----------------------------------------------------------------------------------


class Variant(NamedTuple):
    dim: int
    dtype: str
    left: bool
    lengths: str = "fixed"
    folded: bool = False


DIMS = tuple(hopper.hopper_tiles())
VARIANTS = [v for v in itertools.starmap(Variant, itertools.product(DIMS, ("bf16", "fp16"), (False, True)))
            if not (v.dim == 256 and v.left)]  # fmt: skip
VARIANTS += [Variant(*v) for v in itertools.product(DIMS, ("bf16",), (False,), ("padded", "packed"))]
VARIANTS += [Variant(dim, "bf16", False, folded=True) for dim in DIMS]


def compile_for_sm90(variant: Variant) -> Compiled:
    from triton.experimental.gluon import language as gl

    tile = hopper.hopper_tiles()[variant.dim]
    dtype = gl.bfloat16 if variant.dtype == "bf16" else gl.float16

    def descriptor(rows: int) -> str:
        block = [1, 1, rows, variant.dim]
        return f"tensordesc<{variant.dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, dtype)!r}>"

    types = {"Q": descriptor(64), "K": descriptor(tile.block_n), "V": descriptor(tile.block_n), "OUT": descriptor(64)}
    types = {("O" if n == "OUT" else n): t for n, t in types.items()}
    types |= {"OUT": f"*{variant.dtype}", "LSE": "*fp32", "scale": "fp32"}
    constants = {"D": variant.dim, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "QUERIES": tile.queries}
    constants |= {
        "LEFT": variant.left,
        "PACKED": variant.lengths == "packed",
        "PING_PONG": PING_PONG,
        "FOLDED": variant.folded,
    }
    return compiled(hopper_kernel.forward, types, constants, variant.lengths != "fixed", ("LSE", "OUT"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_codegen(variant: Variant) -> None:
    found = compile_for_sm90(variant)
    assert found.stack == 0 and found.registers <= REGISTERS
    assert found.shared <= SHARED_LIMIT
    assert "wgmma.mma_async" in found.ptx and "cp.async.bulk.tensor.4d.shared" in found.ptx
    assert "cp.async.bulk.tensor.4d.global" in found.ptx
    grown = {int(n) for n in re.findall(r"setmaxnreg\.\w+\S*\s+(\d+)", found.ptx)}
    assert {240, 24} <= grown
    # One product may stay in flight, in what we ask for and in what the assembler left of it (it serialises what it
    # cannot follow): one such wait for each copy of the loop in each consumer.
    loops = 2 * (3 if variant.left else 2)
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", found.ptx).count("1") == loops
    assert len(re.findall(r"gsb0, 0x1\b", found.sass)) == loops


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_all_warps_are_done_before_one_thread_says_so(variant: Variant) -> None:
    """An arrival is one thread's; a barrier of its warp group must stand between it and what every warp waits for."""
    event = r"wgmma\.wait_group|cp\.async\.bulk\.wait_group\.read|bar\.sync|mbarrier\.arrive\.shared|mbarrier\.try_wait"
    waited = synced = False
    arrivals = 0
    for name in re.findall(event, compile_for_sm90(variant).ptx):
        if "wait_group" in name:
            waited, synced = True, False
        elif name == "bar.sync":
            synced = True
        elif name == "mbarrier.arrive.shared":
            assert waited and synced
            arrivals += 1
    assert arrivals >= 2 * 7  # of each consumer: 2 of the first and last block, 2 of each loop, 1 of the output


# --- What its teams do ----------------------------------------------------------------------------------------------


NAMES = (
    *("place", "tiles_of_program", "span", "sequence", "key_blocks", "take_turn", "pass_turn", "softmax", "step"),
    *("clear_foreign", "store_rows", "leave", "attend_tile", "blank_tile", "fetch_tile", "producer", "consumer"),
)
"""The functions of the kernel."""


class Launch(NamedTuple):
    """What a test varies of a launch."""

    programs: int
    section: int
    stages: int
    queries: int = 1
    ping_pong: bool = False
    folded: bool = False


def emulate(r: AttentionRequest, q: Any, k: Any, v: Any, how: Launch, lengths: Any = (None, None)) -> Any:
    """out and LSE of (B, H, S, D) tensors, packed: (1, H, T, D): the kernel's own functions, with a stand-in for the
    language."""
    tiles, pairs = -(-r.seqlen_q // 128), r.batch * r.heads_q
    shift = r.alignment == "bottom_right"
    if lengths == (None, None):
        shift *= r.seqlen_kv - r.seqlen_q
    right = hopper.UNBOUNDED if r.right is None else r.right
    programs = how.programs if lengths[0] is None else tiles * pairs
    order = (tiles, pairs, how.section, r.heads_q)
    folded = how.folded and tiles % 2 == 0 and programs < tiles * pairs
    pointers = tuple(None if x is None else Pointer(x) for x in lengths)
    bounds = (*pointers, r.seqlen_q, r.seqlen_kv, r.left or 0, right, shift)
    dim, block_n = r.head_dim_qk, hopper.hopper_tiles()[r.head_dim_qk].block_n
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:-1], math.nan)
    stages, queries = how.stages, how.queries
    for program in range(programs):
        shared = tuple(
            memory(n, 1, 1, rows, dim, dtype=q.dtype)
            for n, rows in ((2 * queries, 64), (stages, block_n), (stages, block_n))
        )
        bars = barriers((2 * queries, 1), (2 * queries, 1), (stages, 1), (stages, 2), (stages, 1), (stages, 2), (2, 1))
        rest = (shared, bars, order, bounds)
        constants = (dim, block_n, stages, queries, r.left is not None, r.packed)
        strides = tuple(out.stride()[:3])
        writes = (out, Pointer(out.view(-1)), Pointer(lse.view(-1)), strides, q.shape[2], r.scale * math.log2(math.e))
        calls = [("producer", (q, k, v, *rest, r.group, *constants, folded))]
        calls += [("consumer", (writes, *rest, who, *constants, how.ping_pong, folded)) for who in (0, 1)]
        teams.run((hopper_kernel,), NAMES, {"ROWS": 64, "BLOCK_M": 128}, calls, program, programs)
    return out, lse


def reference(r: AttentionRequest, q: Any, k: Any, v: Any) -> Any:
    """Of (B, H, S, D) tensors, in float64: zeros and -inf for a row that sees nothing."""
    q, k, v = (x.double() for x in (q, k.repeat_interleave(r.group, 1), v.repeat_interleave(r.group, 1)))
    seqlen_q, seqlen_kv = q.shape[2], k.shape[2]
    shift = seqlen_kv - seqlen_q if r.alignment == "bottom_right" else 0
    distance = torch.arange(seqlen_kv) - torch.arange(seqlen_q)[:, None] - shift
    seen = torch.ones_like(distance, dtype=torch.bool)
    if r.left is not None:
        seen &= distance >= -r.left
    if r.right is not None:
        seen &= distance <= r.right
    scores = (q @ k.mT * r.scale).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def agree(out: Any, lse: Any, want: Any, want_lse: Any) -> None:
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


def draw_launch(draw: random.Random) -> Launch:
    return Launch(
        draw.choice([1, 2, 5]), draw.choice([1, 2, 7]), draw.choice([2, 3, 4]), draw.choice([1, 2]),
        draw.random() < 0.5, draw.random() < 0.5,
    )  # fmt: skip


def draw_band(draw: random.Random) -> dict[str, Any]:
    window = draw.choice([None, None, (0, 0), (70, 0), (128, None), (200, 33), (300, 300)])
    causal = window is None or draw.random() < 0.3
    return {"causal": causal, "window": window, "alignment": draw.choice(["top_left", "bottom_right"])}


@pytest.mark.parametrize("seed", range(40))
def test_protocol_and_numerics(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    seqlen_q, kv = (draw.choice([1, 63, 64, 65, 127, 128, 129, 200, 256, 300, 385]) for _ in range(2))
    band = draw_band(draw) if draw.random() < 0.7 else {}
    dim = draw.choice([64, 64, 128, 256]) if band.get("window") is None else draw.choice([64, 128])
    heads_kv = draw.choice([1, 2])
    r = AttentionRequest.from_shape(
        batch=draw.choice([1, 2]), heads_q=heads_kv * draw.choice([1, 2, 3]), heads_kv=heads_kv, seqlen_q=seqlen_q,
        seqlen_kv=kv, head_dim=dim, layout="bhsd", return_lse=True, **band,
    )  # fmt: skip
    q = torch.randn(r.batch, r.heads_q, seqlen_q, dim).bfloat16()
    k, v = (torch.randn(r.batch, heads_kv, kv, dim).bfloat16() for _ in range(2))
    agree(*emulate(r, q, k, v, draw_launch(draw)), *reference(r, q, k, v))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(30))
def test_lengths_of_their_own(seed: int, packed: bool) -> None:
    """Sequences in a padded or packed batch, with NaN in the padding and behind the last sequence."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads_kv, batch = draw.choice([1, 2]), draw.choice([1, 3])
    given = [[draw.choice([0, 1, 5, 64, 100, 128, 130, 257]) for _ in range(batch)] for _ in range(2)]
    room = [max(max(x), 1) + draw.choice([0, 3]) for x in given]
    band = draw_band(draw) if draw.random() < 0.7 else {}
    band = band if band.get("window") is None or draw.random() < 0.5 else band | {"window": None, "causal": True}
    dim = draw.choice([64, 128])
    r = AttentionRequest.from_shape(
        batch=batch, heads_q=heads_kv * draw.choice([1, 3]), heads_kv=heads_kv, seqlen_q=room[0], seqlen_kv=room[1],
        head_dim=dim, layout="thd" if packed else "bhsd", packed=packed, padded=not packed, return_lse=True, **band,
    )  # fmt: skip
    heads = (r.heads_q, heads_kv, heads_kv)
    if packed:
        starts = [[sum(x[:i]) for i in range(batch + 1)] for x in given]
        lengths = [torch.tensor(x, dtype=torch.int32) for x in starts]
        sizes = [(1, h, starts[i > 0][-1] + 7, dim) for i, h in enumerate(heads)]
        where = [[(0, slice(x[b], x[b + 1])) for b in range(batch)] for x in starts]
    else:
        lengths = [torch.tensor(x, dtype=torch.int32) for x in given]
        sizes = [(batch, h, room[i > 0], dim) for i, h in enumerate(heads)]
        where = [[(b, slice(0, x[b])) for b in range(batch)] for x in given]
    tensors = [torch.full(size, math.nan).bfloat16() for size in sizes]
    for i, x in enumerate(tensors):
        for b, rows in where[i > 0]:
            x[b, :, rows] = torch.randn(heads[i], rows.stop - rows.start, dim).bfloat16()
    out, lse = emulate(r, *tensors, draw_launch(draw), tuple(lengths))
    unwritten = torch.ones(lse.shape, dtype=torch.bool)
    for b in range(batch):
        (at, rows), (at_kv, rows_kv) = where[0][b], where[1][b]
        operands = tensors[0][at, :, rows][None], *(x[at_kv, :, rows_kv][None] for x in tensors[1:])
        agree(out[at, :, rows][None], lse[at, :, rows][None], *reference(r, *operands))
        unwritten[at, :, rows] = False
    if packed:
        assert out[unwritten].isnan().all() and lse[unwritten].isnan().all()
    else:
        assert (out[unwritten] == 0).all() and lse[unwritten].isneginf().all()


if __name__ == "__main__":
    print(f"triton {triton.__version__}: the Hopper forward on sm90, {hopper.WARPS} warps * 3")
    for each in VARIANTS:
        c = compile_for_sm90(each)
        kind = " window" if each.left else " folded" if each.folded else ""
        name = f"D={each.dim} {each.dtype} {each.lengths}{kind}"
        print(f"{name:20} {c.registers} regs {c.stack} B stack {c.shared:6} B shared")
