"""The schedules as data: each pair once, equal work, no message lost, nobody waiting in a circle. No process starts."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnrt.distributed import ParallelRequest, Placement
from attnrt.distributed.blocks import Band, Block, blocks_between
from attnrt.distributed.placement import Piece, Span
from attnrt.distributed.schedule import Compute, Gather, HeadSplit, Post, Ring
from attnrt.errors import ArgumentError, UnknownNameError
from attnrt.request import AttentionRequest

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
KINDS = ("contiguous", "zigzag")


def seen(band: Band, length_q: int, length_kv: int) -> Tensor:
    """(Sq, Skv): which pairs the whole call has, written down from the definition."""
    at, keys = torch.arange(length_q)[:, None], torch.arange(length_kv)
    if band.documents_q is None or band.documents_kv is None:
        return within(keys - at - band.shift, band)
    found = torch.zeros(length_q, length_kv, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(band.documents_q), pairwise(band.documents_kv), strict=True):
        shift = k1 - q1 if band.bottom_right else k0 - q0
        found[q0:q1, k0:k1] = within(keys - at - shift, band)[q0:q1, k0:k1]
    return found


def within(offset: Tensor, band: Any) -> Tensor:
    found = torch.ones_like(offset, dtype=torch.bool)
    if band.left is not None:
        found &= offset >= -band.left
    if band.right is not None:
        found &= offset <= band.right
    return found


def scored(block: Block) -> Tensor:
    """(rows, keys) of a block: which pairs its call scores, by the public contract's own words."""
    found = torch.zeros(block.q.length, block.kv.length, dtype=torch.bool)
    cu_q, cu_kv = block.cu_q or (0, block.q.length), block.cu_kv or (0, block.kv.length)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_kv), strict=True):
        shift = (k1 - k0) - (q1 - q0) if block.alignment == "bottom_right" else 0
        if block.alignment is None and (block.left is not None or block.right is not None):
            assert q1 - q0 == k1 - k0
        offset = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - shift
        found[q0:q1, k0:k1] = within(offset, block)
    assert all(bound is None or bound >= 0 for bound in (block.left, block.right))
    assert block.pairs == int(found.sum())
    return found


def positions(pieces: tuple[Piece, ...]) -> Tensor:
    """Where each row of a rank's tensor stands in the sequence."""
    return torch.cat([torch.arange(*p.span) for p in pieces] or [torch.zeros(0, dtype=torch.long)])


@st.composite
def calls(draw: Any, longest: int = 40) -> tuple[Placement, Placement, Band]:
    """A placement of queries and keys on 1 to 8 ranks, and a band of any form."""
    ranks, kind = draw(st.integers(1, 8)), draw(st.sampled_from(KINDS))
    length_q = draw(st.integers(0, longest))
    length_kv = draw(st.sampled_from((length_q, draw(st.integers(0, longest)))))
    bound = st.one_of(st.none(), st.integers(0, longest))
    left, right = draw(bound), draw(st.sampled_from((None, 0, draw(bound))))
    bottom_right = draw(st.booleans())
    if kind == "contiguous" and draw(st.booleans()):
        shares = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
        length_q = length_kv = sum(shares)
        q = kv = Placement.contiguous(shares)
    else:
        q, kv = Placement.even(kind, length_q, ranks), Placement.even(kind, length_kv, ranks)
    if draw(st.booleans()):
        count = draw(st.integers(1, 5))
        documents = [sorted(draw(st.integers(0, n)) for _ in range(count - 1)) for n in (length_q, length_kv)]
        cu_q, cu_kv = (0, *documents[0], length_q), (0, *documents[1], length_kv)
        if draw(st.booleans()) and length_q == length_kv:
            cu_kv = cu_q
        return q, kv, Band(left, right, 0, cu_q, cu_kv, bottom_right)
    shift = length_kv - length_q if bottom_right else 0
    return q, kv, Band(left, right, shift, padded=shift == 0 and draw(st.booleans()))


@SETTINGS
@given(call=calls())
def test_a_ring_covers_each_pair_once(call: tuple[Placement, Placement, Band]) -> None:
    q, kv, band = call
    ring = Ring.plan(q, kv, band)
    found = torch.zeros(q.length, kv.length, dtype=torch.int64)
    for rank in range(ring.ranks):
        rows = positions(q.pieces(rank))
        for step in range(len(ring.offsets)):
            keys = positions(kv.pieces(ring.source(rank, step)))
            for block in ring.blocks(rank, step):
                where = rows[slice(*block.q)][:, None], keys[slice(*block.kv)]
                found[where] += scored(block)
    assert torch.equal(found, seen(band, q.length, kv.length).long())


@SETTINGS
@given(call=calls(), selective=st.booleans())
def test_gather_covers_each_pair_once_and_fetches_what_it_needs(
    call: tuple[Placement, Placement, Band], selective: bool
) -> None:
    q, kv, band = call
    gather = Gather(q, kv, band, selective)
    found = torch.zeros(q.length, kv.length, dtype=torch.int64)
    for rank in range(gather.ranks):
        rows, last = positions(q.pieces(rank)), 0
        parts = gather.parts(rank)
        fetched = [positions(kv.pieces(part.source))[slice(*part.rows)] for part in parts]
        keys = torch.cat([*fetched, torch.zeros(0, dtype=torch.long)])
        assert torch.equal(keys, keys.unique()), "keys are in the sequence's order, each once"
        for block in gather.blocks(rank):
            assert block.q.start >= last, "no query is in two blocks"
            last = block.q.stop
            found[rows[slice(*block.q)][:, None], keys[slice(*block.kv)]] += scored(block)
        others = [part for part in parts if part.source != rank]
        if selective:
            assert gather.received(rank) == sum(part.rows.length for part in others)
            sent = [rows for source in range(gather.ranks) if source != rank for rows in gather.sent(source, rank)]
            assert sorted(sent) == sorted(part.rows for part in others)
    assert torch.equal(found, seen(band, q.length, kv.length).long())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 16, 64])
def test_zigzag_gives_every_rank_the_same_work(ranks: int) -> None:
    placed = Placement.even("zigzag", 2 * ranks * 3, ranks)
    ring = Ring.plan(placed, placed, Band(right=0))
    gather = Gather.plan(placed, placed, Band(right=0))
    for blocks in (
        [[b for step in range(len(ring.offsets)) for b in ring.blocks(rank, step)] for rank in range(ranks)],
        [list(gather.blocks(rank)) for rank in range(ranks)],
    ):
        assert len({sum(block.pairs for block in one) for one in blocks}) == 1
    for step in range(1, ranks):
        assert len({sum(b.pairs for b in ring.blocks(rank, step)) for rank in range(ranks)}) == 1, "in each step too"
        assert all(len(ring.blocks(rank, step)) == 1 for rank in range(ranks)), "by one kernel call"


@SETTINGS
@given(call=calls(longest=24))
@example(call=(Placement.even("zigzag", 24, 4), Placement.even("zigzag", 24, 4), Band(right=0)))
def test_every_message_arrives_and_nobody_waits_in_a_circle(call: tuple[Placement, Placement, Band]) -> None:
    """Ranks carry out their programs in lockstep with a mailbox for each pair and channel, sends never waiting; a wait
    is over once the message it expects was sent. Gradients are sets of who added to them."""
    ring = Ring.plan(*call)
    for backward in (False, True):
        play(ring, backward)


def play(ring: Ring, backward: bool) -> None:
    ranks = range(ring.ranks)
    programs = [deque(ring.backward(r) if backward else ring.forward(r)) for r in ranks]
    mail: dict[Any, deque[Any]] = {}
    kv: list[int] = list(ranks)
    grads: list[tuple[int, set[int]]] = [(r, set()) for r in ranks]
    expected: list[dict[str, Post]] = [{} for _ in ranks]
    steps: list[list[int]] = [[] for _ in ranks]
    while any(programs):
        moved = False
        for rank in ranks:
            while programs[rank]:
                action = programs[rank][0]
                if isinstance(action, Post):
                    held = kv[rank] if action.channel == "kv" else grads[rank]
                    mail.setdefault((rank, action.to, action.channel), deque()).append(held)
                    assert action.channel not in expected[rank], "one exchange of a channel at a time"
                    expected[rank][action.channel] = action
                elif isinstance(action, Compute):
                    assert kv[rank] == ring.source(rank, action.step)
                    steps[rank].append(action.step)
                    grads[rank] = (kv[rank], {rank})
                else:
                    post = expected[rank][action.channel]
                    box = mail.get((post.come_from, rank, action.channel))
                    if not box:
                        break
                    arrived = box.popleft()
                    del expected[rank][action.channel]
                    if action.channel == "kv":
                        assert arrived == post.source
                        kv[rank] = arrived
                    else:
                        source, added = arrived
                        assert source == post.source
                        assert not action.joins or source == grads[rank][0]
                        grads[rank] = (source, added | grads[rank][1]) if action.joins else arrived
                programs[rank].popleft()
                moved = True
        assert moved, "a deadlock"
    assert not any(mail.values()), "a message that nobody took"
    assert all(done == list(range(len(ring.offsets))) for done in steps)
    if backward:
        for rank, (source, added) in enumerate(grads):
            assert source == rank
            assert added == {(rank + offset) % ring.ranks for offset in ring.offsets}


def test_a_window_needs_neighbours_only() -> None:
    placed = Placement.even("contiguous", 8 * 100, 8)
    band = Band(left=50, right=0)
    assert Ring.plan(placed, placed, band).offsets == (0, 1)
    gather = Gather.plan(placed, placed, band)
    assert gather.selective and [gather.received(r) for r in range(8)] == [0] + [50] * 7
    both = Band(left=50, right=50)
    assert Ring.plan(placed, placed, both).offsets == (0, 1, 7)
    assert not Gather.plan(placed, placed, Band(right=0)).selective


def test_documents_that_end_with_a_rank_need_nobody() -> None:
    placed = Placement.even("contiguous", 40, 4)
    band = Band(right=0, documents_q=(0, 10, 20, 30, 40), documents_kv=(0, 10, 20, 30, 40))
    assert Ring.plan(placed, placed, band).offsets == (0,)
    assert all(Gather.plan(placed, placed, band).received(rank) == 0 for rank in range(4))


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize(("heads", "heads_kv"), [(12, 12), (24, 4), (16, 1), (60, 12), (24, 6)])
def test_heads_keep_their_kv_head(ranks: int, heads: int, heads_kv: int) -> None:
    if heads % ranks:
        return
    split = HeadSplit(heads, heads_kv, ranks)
    for rank in range(ranks):
        mine = [split.kv_heads(rank)[i // split.group] for i in range(split.queries)]
        assert mine == [(rank * split.queries + i) * heads_kv // heads for i in range(split.queries)]
    if heads_kv % ranks == 0:
        assert split.copies == heads_kv, "no copy where none is needed"
    elif ranks % heads_kv == 0:
        assert split.keys == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 5, 16, 33])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_placement_holds_each_token_once(kind: str, length: int, ranks: int) -> None:
    placed = Placement.even(kind, length, ranks)
    held = torch.cat([positions(placed.pieces(rank)) for rank in range(ranks)])
    assert torch.equal(held.sort().values, torch.arange(length))
    assert sum(placed.lengths) == length and max(placed.lengths) - min(placed.lengths) <= 2
    assert [p.span.start for _, p in placed.in_order] == sorted(p.span.start for _, p in placed.in_order)
    assert Placement.found(kind, placed.lengths, "q").spans == placed.spans


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"length of q by rank=\[5, 3\].*has \[4, 4\]"):
        Placement.found("zigzag", [5, 3], "q")
    with pytest.raises(UnknownNameError, match=r"placement='stripes'.*contiguous, zigzag"):
        Placement.even("stripes", 8, 2)
    with pytest.raises(ArgumentError, match="ranks=0"):
        Placement.even("zigzag", 8, 0)


def test_blocks_beyond_reach_are_no_blocks() -> None:
    early, late = [Piece(Span(0, 10), 0)], [Piece(Span(10, 20), 0)]
    assert blocks_between(early, late, Band(right=0)) == ()
    (block,) = blocks_between(late, early, Band(right=0))
    assert block.full and block.pairs == 100
    (near,) = blocks_between(late, early, Band(left=3, right=0))
    assert (near.q, near.kv) == (Span(0, 3), Span(7, 10)), "rows and keys out of reach are cut off"


def test_ranks_see_few_kinds_of_calls() -> None:
    """So that few kernels are chosen, and compiled."""
    whole = AttentionRequest.from_shape(batch=1, heads_q=8, seqlen_q=1024, head_dim=64, causal=True, training=True)
    for kind, expected in (("zigzag", 3), ("contiguous", 2)):
        placed = Placement.even(kind, 1024, 8)
        request = ParallelRequest(whole, placed, placed)
        kinds = request.local_requests("ring", tuple(range(8)))
        assert len(kinds) == expected, kinds.values()
        assert kinds.keys() == request.local_requests("ring", (0, 7)).keys(), "the first and last rank have them all"
