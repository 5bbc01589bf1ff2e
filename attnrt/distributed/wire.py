"""What goes from rank to rank: collectives on flat buffers, and one error for all the ways in which they fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from attnrt.distributed.schedule import Post
from attnrt.errors import RankFailed

# torch 2.13 renamed both.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
TAGS = {"kv": 1, "dkv": 2}
AXES = {"bhsd": (2, 0, 1, 3), "bshd": (1, 0, 2, 3), "sbhd": (0, 1, 2, 3)}
"""Where S, B, H and D stand in each layout: as a buffer for the wire has them, so that tokens are its rows."""
SEQUENCE = {"bhsd": 2, "bshd": 1, "sbhd": 0, "thd": 0}


@contextmanager
def reporting(what: str, group: ProcessGroup) -> Iterator[None]:
    """Names the exchange that failed. Only exchanges belong inside, no kernels."""
    try:
        yield
    except RuntimeError as error:
        rank, ranks = group.rank(), group.size()
        raise RankFailed(
            f"rank {rank} of {ranks}: {what} failed: {str(error).strip()}. A rank of this group has died, raised, or "
            "makes another call; the first error among the ranks' own outputs says which"
        ) from error


def to_rows(x: Tensor, layout: str) -> Tensor:
    """(S, B, H, D) of a tensor in a layout; a packed batch is one row of tokens, (T, 1, H, D)."""
    return x.unsqueeze(1) if layout == "thd" else x.permute(AXES[layout])


def from_rows(x: Tensor, layout: str) -> Tensor:
    """The view in a layout of (S, B, H, D)."""
    if layout == "thd":
        return x.squeeze(1)
    axes = AXES[layout]
    return x.permute([axes.index(i) for i in range(4)])


def pack(k: Tensor, v: Tensor, layout: str) -> Tensor:
    """k and v as one contiguous buffer (S, B, Hkv, Dqk + Dv)."""
    return torch.cat((to_rows(k, layout), to_rows(v, layout)), -1)


def unpack(buffer: Tensor, dim_k: int, layout: str) -> tuple[Tensor, Tensor]:
    """Views of k and v in the layout."""
    return from_rows(buffer[..., :dim_k], layout), from_rows(buffer[..., dim_k:], layout)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks * N, ...) from every rank's (N, ...)."""
    with reporting("all-gathering keys and values", group):
        return functional.wait_tensor(_all_gather(x, 0, group))  # type: ignore[no-any-return]


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """(N, ...): the sum over ranks of this rank's part of (ranks * N, ...)."""
    with reporting("reducing the gradients of keys and values", group):
        return functional.wait_tensor(_reduce_scatter(x, "sum", 0, group))  # type: ignore[no-any-return]


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup, what: str) -> Tensor:
    """Flat: `send[p]` elements of x go to rank p, `receive[p]` come from it, in order of rank."""
    with reporting(what, group):
        found = functional.all_to_all_single(x, list(receive), list(send), group)
        return functional.wait_tensor(found)  # type: ignore[no-any-return]


class Exchange:
    """Point to point, under way from when it is made until `wait`."""

    def __init__(self, post: Post, outgoing: Tensor, incoming: Tensor, group: ProcessGroup) -> None:
        self._outgoing, self.incoming, self._group = outgoing, incoming, group
        self._what = f"passing {post.channel} on to rank {post.to} and receiving it from rank {post.come_from}"
        messages: list[Any] = []
        tag = TAGS[post.channel]
        if outgoing.numel():
            peer = dist.get_global_rank(group, post.to)
            messages.append(dist.P2POp(dist.isend, outgoing, peer, group, tag))
        if incoming.numel():
            peer = dist.get_global_rank(group, post.come_from)
            messages.append(dist.P2POp(dist.irecv, incoming, peer, group, tag))
        with reporting(self._what, group):
            self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Tensor:
        """What arrived."""
        with reporting(self._what, self._group):
            for work in self._works:
                work.wait()
        return self.incoming
