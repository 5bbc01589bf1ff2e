"""A padded case as a paged one: the same keys and values scattered over pools of pages, garbage wherever no key is."""

from __future__ import annotations

import dataclasses
import math

import torch
from oracle import Case
from torch import Tensor

NOWHERE = 2**31 - 1
"""What stands in a page table past a sequence's length: following it would be an error anywhere."""


def paged(case: Case, page_size: int, spare: int = 2) -> Case:
    """`case` (layout "bhsd" or "bshd", with seqlens_kv, no gradients) with k and v as pools and a page table.

    Skv must be whole pages. Pages lie in random order among `spare` unused ones; unused keys are NaN.
    """
    lengths = case.operands.seqlens_kv
    assert lengths is not None and case.layout in ("bhsd", "bshd")
    axis = 2 if case.layout == "bhsd" else 1
    batch, pages = case.k.shape[0], case.k.shape[axis] // page_size
    used = [(b, p) for b in range(batch) for p in range(pages) if p * page_size < int(lengths[b])]
    places = torch.randperm(len(used) + spare)[: len(used)].tolist()
    table = torch.full((batch, pages), NOWHERE, dtype=torch.int32)
    for (b, p), place in zip(used, places, strict=True):
        table[b, p] = place

    def pool(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[0], shape[axis] = len(used) + spare, page_size
        made = torch.full(shape, math.nan).to(x.dtype)
        for (b, p), place in zip(used, places, strict=True):
            keys = min(page_size, int(lengths[b]) - p * page_size)
            page = x[b].narrow(axis - 1, p * page_size, keys)
            made[place].narrow(axis - 1, 0, keys).copy_(page)
        return made

    device = case.q.device
    return dataclasses.replace(
        case,
        k=pool(case.k).to(device),
        v=pool(case.v).to(device),
        operands=case.operands._replace(page_table=table.to(device)),
    )
