"""Ranks say what they are about to do before any of them does it, so that a difference is an error and not a hang.

Each call costs one exchange of a few numbers between the hosts. It never waits for a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from attnrt.distributed.wire import reporting
from attnrt.errors import RanksDisagree

Facts = Mapping[str, str]
"""What ranks must have in common, by name: "causal" -> "True"."""

_controls: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


class Word(NamedTuple):
    """What one rank says of a call: how many tokens it has, digests of what it asks for and of what it plans."""

    length_q: int
    length_kv: int
    asks: int
    plans: int


def digest(facts: Facts) -> int:
    """63 bits of it."""
    text = json.dumps(sorted(facts.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def control_of(group: ProcessGroup) -> ProcessGroup:
    """The group itself where it reaches from CPU to CPU; else a gloo group of the same ranks, made on first use."""
    found = _controls.get(group)
    if found is None:
        if "cpu:gloo" in dist.get_backend_config(group):
            found = group
        else:
            ranks = dist.get_process_group_ranks(group)
            with reporting("making a gloo group of the same ranks", group):
                found = dist.new_group(ranks, backend="gloo", timeout=_timeout(group), use_local_synchronization=True)
        _controls[group] = found
    return found


def _timeout(group: ProcessGroup) -> object:
    """The group's own, None (torch's default) where it does not say."""
    try:
        return group._get_backend(torch.device("cuda")).options._timeout
    except (AttributeError, RuntimeError):
        return None


def agree(control: ProcessGroup, word: Word | None, facts: Facts, error: Exception | None = None) -> list[Word]:
    """Every rank's word, once all of them ask for the same.

    Args:
        word: this rank's; None if it cannot take part, for the reason that `error` is. facts: what the word is made of.

    Raises:
        RanksDisagree: the same on every rank: what differs, and where. The rank with the error raises that.
    """
    numbers = (0, 0, 0, 0, 1) if word is None else (*word, 0)
    said = _exchange(control, torch.tensor(numbers, dtype=torch.int64))
    words = [Word(*(int(n) for n in row[:4])) for row in said]
    failed = [bool(row[4]) for row in said]
    if not any(failed) and len({w.asks for w in words}) == 1:
        return words
    text = json.dumps({"error": f"{type(error).__name__}: {error}"} if error is not None else dict(facts))
    raise _disagreement([json.loads(t) for t in _exchange_texts(control, text)], error)


def agree_on_plan(control: ProcessGroup, facts: Facts, error: Exception | None = None) -> None:
    """The same for what was planned once every rank's length was known.

    Raises:
        RanksDisagree: as `agree` does.
    """
    agree(control, None if error is not None else Word(0, 0, digest(facts), 0), facts, error)


def _disagreement(said: list[dict[str, str]], error: Exception | None) -> Exception:
    """The error that this rank raises."""
    ranks = {rank: one["error"] for rank, one in enumerate(said) if "error" in one}
    if ranks and len(ranks) == len(said) and error is not None:
        return error  # everybody's own mistake, and everybody can say it best
    if ranks:
        lines = [f"rank {rank} cannot take part: {why}" for rank, why in ranks.items()]
    else:
        lines = []
        for name in dict.fromkeys(name for one in said for name in one):
            by_value: dict[str, list[int]] = {}
            for rank, one in enumerate(said):
                by_value.setdefault(one.get(name, "nothing"), []).append(rank)
            if len(by_value) > 1:
                groups = (f"{_ranks(where)}: {value}" for value, where in by_value.items())
                lines.append(f"{name} differs: " + "; ".join(groups))
        ranks = {rank: json.dumps(one) for rank, one in enumerate(said)}
    if error is not None:
        error.add_note(f"{_ranks([r for r in range(len(said)) if r not in ranks])} did not run either")
        return error
    return RanksDisagree("the ranks of this call disagree, so none of them ran it:\n  " + "\n  ".join(lines), ranks)


def _ranks(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def _exchange(control: ProcessGroup, row: torch.Tensor) -> list[list[int]]:
    rows = [torch.empty_like(row) for _ in range(control.size())]
    with reporting("agreeing on the call", control):
        dist.all_gather(rows, row, control)
    return [r.tolist() for r in rows]


def _exchange_texts(control: ProcessGroup, text: str) -> list[str]:
    data = text.encode()
    lengths = [row[0] for row in _exchange(control, torch.tensor([len(data)], dtype=torch.int64))]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = [torch.empty_like(padded) for _ in lengths]
    with reporting("agreeing on the call", control):
        dist.all_gather(rows, padded, control)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]
