"""`attnrt explain --ranks N`: the same question for a sequence that N ranks share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attnrt.errors import ArgumentError

Ranks = Annotated[int | None, typer.Option(help="Share the sequence among this many ranks (context parallelism).")]
LinkName = Annotated[
    str, typer.Option("--link", help="With --ranks: inside a host: nvlink, nvlink5, pcie, infiniband, ethernet.")
]
Between = Annotated[str, typer.Option(help="With --ranks: what joins hosts.")]
PerHost = Annotated[int, typer.Option(help="With --ranks: how many a host has.")]
MethodName = Annotated[str, typer.Option("--method", help="With --ranks: auto, gather, ulysses or ring.")]
PlacementName = Annotated[
    str | None, typer.Option("--placement", help="With --ranks: contiguous or zigzag. Default: what balances the mask.")
]


def explain_across(ranks: int, placement: str | None, links: dict[str, Any], shape: dict[str, Any]) -> Any:
    """The choice of a method, with bytes on the wire and memory of each, and of the local kernels.

    Raises:
        ArgumentError: a size, name or combination cannot be right.
    """
    from attnrt.distributed import explain_shape

    if shape.pop("page_size") is not None:
        raise ArgumentError("--page-size", ranks, "a paged KV cache is not cut across ranks; leave --ranks out")
    if placement is None:
        placement = "zigzag" if shape["causal"] and shape["window"] is None and not shape["packed"] else "contiguous"
    return explain_shape(ranks=ranks, placement=placement, **links, **shape)
