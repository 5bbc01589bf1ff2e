"""From what may be seen to arguments of `attnrt.attention`, once per forward.

Letters: position p of query i is q_offset + i, of key j kv_offset + j; shift = q_offset - kv_offset, so query i stands
at key index i + shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrt.integrations.mask_formula import Formula


class Unstructured(Exception):
    """The rules cannot be said in arguments of `attention`; the dense mask can."""


@dataclass(frozen=True)
class Rules:
    """What may be seen, before it is put into arguments."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    formula: Formula
    padding: Tensor | None
    """(B, Skv) bool: the keys that are tokens. None: all."""
    device: torch.device
    dense: Callable[[], Tensor]
    """Makes the (B, 1, Sq, Skv) bool mask, for what has no structured form."""
    readable: bool = True
    """`formula` says everything; else only `dense` does."""


@dataclass
class Packing:
    """Sequences laid one after the other in the flattened batch: (N + 1,) int32 offsets, the longest in tokens."""

    cu_seqlens: Tensor
    longest: int


@dataclass
class Arguments:
    """What `attention` is to be told, beside q, k and v."""

    start: int
    stop: int
    """The keys any query may see, start:stop; the rest need not be looked at."""
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: str | None = None
    mask: Tensor | None = None
    """(B, 1, 1, stop - start) for irregular padding; (B, 1, Sq, Skv) only where no structure would do."""
    seqlens_kv: Tensor | None = None
    packing: Packing | None = None


def blind(device: torch.device) -> bool:
    """Values on the device cannot be read: the code is being traced or captured."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def work_out(rules: Rules) -> Arguments:
    """The arguments. Reads values of the padding, once, unless the code is being traced."""
    found = Arguments(0, rules.kv_length)
    try:
        if not rules.readable:
            raise Unstructured
        if rules.formula.sequences is not None:
            _packed(found, rules)
        elif isinstance(rules.q_offset, Tensor) and not _readable(rules):
            _unread_offset(found, rules)
        else:
            _placed(found, rules, int(rules.q_offset))
    except Unstructured:
        found = Arguments(0, rules.kv_length, mask=rules.dense())
    return found


def _readable(rules: Rules) -> bool:
    """An offset kept in a tensor, as static caches do, is read where that is free, and for a prefill, where an exact
    length is worth the wait."""
    return not blind(rules.device) and not _keeps_shapes(rules)


def _keeps_shapes(rules: Rules) -> bool:
    """A decode step off the CPU: with a static cache every step is to have the same shapes, for graphs and for what
    is compiled per shape."""
    return rules.device.type != "cpu" and rules.q_length == 1


def _placed(found: Arguments, rules: Rules, q_offset: int) -> None:
    """Every offset is known: keys out of reach are left out, and what remains has one of attention's alignments."""
    formula = rules.formula
    start, stop, shift = 0, rules.kv_length, q_offset - rules.kv_offset
    reach = None if formula.right is None else shift + rules.q_length + formula.right
    if formula.right == 0 and 0 <= shift < stop - rules.q_length and not formula.chunks and _keeps_shapes(rules):
        # A static cache that is not full yet.
        return _lengths_as_data(found, rules, torch.full((rules.batch,), shift + rules.q_length, device=rules.device))
    if reach is not None:
        stop = max(0, min(stop, reach))
    if formula.left is not None:
        start = min(max(0, shift - formula.left), stop)
    if formula.chunks is not None:
        start = max(start, _chunk_start(found, rules, q_offset))
        if found.packing is not None:
            return
    if (padding := _all_padding(rules)) is not None:
        start, stop, padding = _trim(found, rules, padding[:, start:stop], start, stop, shift)
        found.mask = None if padding is None else padding[:, None, None, :]
    found.start, found.stop = start, stop
    _align(found, rules, shift - start, stop - start)


def _align(found: Arguments, rules: Rules, shift: int, keys: int) -> None:
    """Says where query i stands among the keys that are left."""
    left, right = rules.formula.left, rules.formula.right
    if left is None and right is None:
        return
    if shift == keys - rules.q_length and found.seqlens_kv is None:
        found.alignment = "bottom_right" if shift else None
    elif shift == 0:
        found.alignment = "top_left"
    else:
        raise Unstructured
    _band(found, left, right)


def _band(found: Arguments, left: int | None, right: int | None) -> None:
    found.causal = right == 0
    if left is not None or right not in (None, 0):
        found.window = (left, right)


def _lengths_as_data(found: Arguments, rules: Rules, lengths: Tensor) -> None:
    """Keys end where the last query stands, by a (B,) tensor, and bottom-right alignment counts from there."""
    found.seqlens_kv = lengths.to(torch.int32)
    found.alignment = "bottom_right"
    _band(found, rules.formula.left, rules.formula.right)
    if (padding := _all_padding(rules)) is None:
        return
    beyond = torch.arange(rules.kv_length, device=rules.device) >= lengths[:1]
    if blind(rules.device) or not bool((padding | beyond).all()):
        found.mask = padding[:, None, None, :]


def _unread_offset(found: Arguments, rules: Rules) -> None:
    formula = rules.formula
    if formula.left is None and formula.right is None and formula.chunks is None:  # positions do not count
        padding = _all_padding(rules)
        found.mask = None if padding is None else padding[:, None, None, :]
        return
    if formula.right != 0 or formula.chunks is not None or rules.kv_offset:
        raise Unstructured
    assert isinstance(rules.q_offset, Tensor)
    _lengths_as_data(found, rules, (rules.q_offset.reshape(1) + rules.q_length).expand(rules.batch))


def _all_padding(rules: Rules) -> Tensor | None:
    """The batch's padding and what the mask function itself looks up, as one (B, Skv) tensor."""
    padding = rules.padding
    for table in rules.formula.keys:
        looked_up = table[:, rules.kv_offset : rules.kv_offset + rules.kv_length]
        if looked_up.shape[1] != rules.kv_length:
            raise Unstructured
        padding = looked_up if padding is None else padding & looked_up
    return padding


def _trim(
    found: Arguments, rules: Rules, padding: Tensor, start: int, stop: int, shift: int
) -> tuple[int, int, Tensor | None]:
    """Turns padding into a narrower range of keys or into lengths, where that says the same; else gives it back."""
    count = stop - start
    if blind(rules.device) or not count or not rules.batch:
        return start, stop, padding
    slots = torch.arange(count, device=padding.device)
    lengths = padding.sum(-1)
    first = padding.int().argmax(-1)
    gapless = (padding == ((slots >= first[:, None]) & (slots < (first + lengths)[:, None]))).all()
    facts = torch.stack([first.min(), first.max(), lengths.min(), lengths.max(), gapless.long()]).tolist()
    low, high, shortest, longest, whole = facts  # the one time that values come from the device
    if shortest == count:
        return start, stop, None
    banded = rules.formula.left is not None or rules.formula.right is not None
    if whole and low == high and shortest == longest and shortest:
        # The same keys for every sequence: a narrower range, if queries still have a place by it.
        moved = shift - start - low
        if not banded or moved == 0 or moved == shortest - rules.q_length:
            return start + low, start + low + shortest, None
    if whole and high == 0 and (not banded or shift - start == 0):
        found.seqlens_kv = lengths.to(torch.int32)
        return start, stop, None
    return start, stop, padding


def _chunk_start(found: Arguments, rules: Rules, q_offset: int) -> int:
    """First key index that the chunks leave in reach; packs a prefill of several chunks as sequences of their own."""
    chunks = rules.formula.chunks
    assert chunks is not None
    size, last = chunks.size, q_offset + rules.q_length - 1
    starts = [0]
    if chunks.starts is not None:
        if blind(rules.device):
            raise Unstructured
        starts = chunks.starts.tolist()
    if all(last - s < size for s in starts):
        return 0  # nothing has left the first chunk
    if any(starts):
        raise Unstructured
    if q_offset // size == last // size:
        return max(0, q_offset // size * size - rules.kv_offset)
    whole = q_offset == rules.kv_offset == 0 and rules.q_length == rules.kv_length
    if not whole or rules.padding is not None or rules.formula.keys:
        raise Unstructured
    ends = [*range(0, rules.q_length, size)]
    offsets = [row * rules.q_length + end for row in range(rules.batch) for end in ends]
    offsets.append(rules.batch * rules.q_length)
    _pack(found, rules, torch.tensor(offsets, dtype=torch.int32, device=rules.device), min(size, rules.q_length))
    return 0


def _packed(found: Arguments, rules: Rules) -> None:
    """Sequences laid one after the other in each row become the sequences of one packed batch."""
    formula, length = rules.formula, rules.q_length
    sequences = formula.sequences
    assert sequences is not None
    whole = rules.q_length == rules.kv_length and rules.kv_offset == 0 and not isinstance(rules.q_offset, Tensor)
    if not whole or rules.q_offset or rules.padding is not None or formula.keys or formula.chunks:
        raise Unstructured
    if blind(rules.device):  # how many there are is data, and a graph has to know it
        raise Unstructured
    sequences = sequences.expand(rules.batch, length)
    steps = sequences.diff(dim=-1)
    begins = torch.ones(rules.batch, length, dtype=torch.bool, device=rules.device)
    begins[:, 1:] = steps != 0
    ordered = (steps >= 0).all()
    if formula.positions is not None:
        consecutive = formula.positions.expand(rules.batch, length).diff(dim=-1) == 1
        ordered = ordered & (consecutive | begins[:, 1:]).all()
    offsets = begins.flatten().nonzero().flatten()
    offsets = torch.cat([offsets, offsets.new_full((1,), rules.batch * length)])
    fine, longest = torch.stack([ordered.long(), offsets.diff().max()]).tolist()
    if not fine:
        raise Unstructured
    _pack(found, rules, offsets.to(torch.int32), longest)


def _pack(found: Arguments, rules: Rules, cu_seqlens: Tensor, longest: int) -> None:
    found.packing = Packing(cu_seqlens, longest)
    _band(found, rules.formula.left, rules.formula.right)
