"""Cutting a batch as a method wants it, and putting it together again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnrt.distributed.api import Mesh, group_of
from attnrt.distributed.placement import Placement
from attnrt.distributed.wire import reporting
from attnrt.errors import ArgumentError, ArgumentTypeError


def shard(x: Tensor, mesh: Mesh, dim: int, placement: str = "contiguous") -> Tensor:
    """This rank's tokens of a tensor that every rank has whole. Differentiable; sends nothing.

    Works on anything with one entry a token: token ids, labels, position ids, (B, H, S, D), packed (T, H, D).

    Args:
        dim: which dim counts tokens. placement: "contiguous" or "zigzag"; all tensors of a batch take the same.

    Raises:
        ArgumentError: no such dim. UnknownNameError: no such placement.
    """
    group = group_of(mesh)
    length = _length(x, dim)
    spans = Placement.even(placement, length, group.size()).spans[group.rank()]
    parts = [x.narrow(dim, span.start, span.length) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@torch.no_grad()
def unshard(x: Tensor, mesh: Mesh, dim: int, placement: str = "contiguous") -> Tensor:
    """The whole tensor from every rank's tokens, on every rank: for evaluation, without gradients.

    Every rank calls it. Lengths may differ by rank where the placement is contiguous.

    Raises:
        ArgumentError: no such dim, or lengths that are not those of a zigzag placement. RankFailed: a rank is missing.
    """
    group = group_of(mesh)
    own = torch.tensor([_length(x, dim)], device=x.device)
    lengths = [int(n) for n in _gathered(own, group)]
    placed = Placement.found(placement, lengths, "x")
    rows = x.movedim(dim, 0)
    if rows.shape[0] < placed.longest:
        rows = torch.cat((rows, rows.new_zeros(placed.longest - rows.shape[0], *rows.shape[1:])))
    every = _gathered(rows.contiguous(), group)
    parts = [every[rank][slice(*piece.local(piece.span))] for rank, piece in placed.in_order]
    whole = torch.cat(parts) if parts else rows[:0]
    return whole.movedim(0, dim).contiguous()


def local_positions(
    length: int, mesh: Mesh, placement: str = "contiguous", device: torch.device | str = "cpu"
) -> Tensor:
    """Where this rank's tokens stand in the whole sequence, (S of this rank,) int64: what rotary embeddings go by.

    Raises:
        ArgumentError, ArgumentTypeError: a length that cannot be. UnknownNameError: no such placement.
    """
    group = group_of(mesh)
    spans = Placement.even(placement, length, group.size()).spans[group.rank()]
    return torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])


def _gathered(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    import torch.distributed as dist

    every = [torch.empty_like(x) for _ in range(group.size())]
    with reporting("putting shards together", group):
        dist.all_gather(every, x, group)
    return every


def _length(x: Tensor, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", x, "a torch.Tensor is needed")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ArgumentError("dim", dim, f"a dim of {tuple(x.shape)} is needed: which one counts tokens")
    return x.shape[dim]
