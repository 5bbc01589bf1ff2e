"""Runs a plan of tiles through the CPU's flash kernel, forward and backward. Tensors are (B, H, S, D) views."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnrt.backends.torch_sdpa.cpu_plan import Tile
from attnrt.request import AttentionRequest
from attnrt.second_order import once_differentiable

_forward = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_ADDED = {d: torch.tensor([0.0, -math.inf], dtype=d, device="cpu") for d in (torch.float32, torch.float64)}
"""What a mask adds to a score that is seen, and to one that is not."""


class Tiled(torch.autograd.Function):
    """(q, k, v, mask, bias, slopes, sinks, request, tiles) -> output (B, Hq, Sq, D), LSE (B, Hq, Sq), -inf if dead.

    mask and bias have four dims. Gradients go to q, k, v and sinks.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*args)
        *tensors, r, tiles = args
        ctx.save_for_backward(*tensors, out, lse)
        ctx.request, ctx.tiles = r, tiles
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad, *ctx.saved_tensors, ctx.request, ctx.tiles, ctx.needs_input_grad[6])
        dq, dk, dv, dsinks = backward(*arguments)
        return dq, dk, dv, None, None, None, dsinks, None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    r: AttentionRequest,
    tiles: list[Tile],
) -> tuple[Tensor, Tensor]:
    """Output and LSE, the latter without the sinks."""
    if whole(tiles, q, k):
        out, lse = _call(r, tiles[0], q, k, v, mask, bias, slopes)
    else:
        wide = torch.float64 if r.dtype == "fp64" else torch.float32
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=wide)
        for tile in tiles:
            part, part_lse = _call(r, tile, _rows(q, tile), _keys(k, tile), _keys(v, tile), mask, bias, slopes)
            _rows(out, tile).copy_(part)
            _rows(lse, tile).copy_(part_lse)
    if sinks is not None:
        # The sinks join the denominator after the fact: rows shrink by exp(lse) / (exp(lse) + exp(sink)).
        out = out.mul_(torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).unsqueeze(-1))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    r: AttentionRequest,
    tiles: list[Tile],
    want_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks. `out` and `lse` may cover more keys than k and v hold."""
    # A dead row's scores are -inf too: the kernel must not meet both.
    total = lse.masked_fill(lse == -math.inf, 0.0)
    dsinks = None
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        total = torch.logaddexp(total, sink)
        if want_sinks:
            rowsum = (grad.to(lse.dtype) * out).sum(-1)
            dsinks = -(torch.exp(sink - total) * rowsum).sum((0, 2)).to(sinks.dtype)
    if whole(tiles, q, k):
        chunk = tile_mask(r, tiles[0], mask, bias, slopes)
        dq, dk, dv = _backward(grad, q, k, v, out, total, 0.0, tiles[0].causal, attn_mask=chunk, scale=r.scale)
        return dq, dk, dv, dsinks
    # Tiles of one sequence share keys: their parts are summed in float32.
    shared = len({tile.piece.batch.start for tile in tiles}) < len(tiles)
    sums = torch.float32 if shared and r.itemsize == 2 else q.dtype
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
    for tile in tiles:
        parts = _backward(
            _rows(grad, tile),
            _rows(q, tile),
            _keys(k, tile),
            _keys(v, tile),
            _rows(out, tile),
            _rows(total, tile),
            0.0,
            tile.causal,
            attn_mask=tile_mask(r, tile, mask, bias, slopes),
            scale=r.scale,
        )
        _rows(dq, tile).copy_(parts[0])
        _keys(dk, tile).add_(parts[1])
        _keys(dv, tile).add_(parts[2])
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


def whole(tiles: list[Tile], q: Tensor, k: Tensor) -> bool:
    """One tile is everything, so nothing needs slicing."""
    if len(tiles) != 1:
        return False
    p, q0, q1, k0, k1, *_ = tiles[0]
    rows = p.rows == slice(0, q.shape[0])
    return rows and (p.start_q + q0, p.start_kv + k0) == (0, 0) and (q1, k1) == (q.shape[2], k.shape[2])


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """The tile's queries of (B, H, Sq, ...)."""
    start = tile.piece.start_q
    return x[tile.piece.rows, :, start + tile.q0 : start + tile.q1]


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """The tile's keys of (B, H, Skv, D)."""
    start = tile.piece.start_kv
    return x[tile.piece.rows, :, start + tile.k0 : start + tile.k1]


def _call(
    r: AttentionRequest,
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chunk = tile_mask(r, tile, mask, bias, slopes)
    out, lse = _forward(q, k, v, 0.0, tile.causal, attn_mask=chunk, scale=r.scale)
    if chunk is not None and (r.needs_grad or r.needs_lse or r.sinks):  # the kernel gives 0 as a dead row's LSE
        lse = lse.masked_fill_(chunk.amax(-1) == -math.inf, -math.inf)
    return out, lse


def tile_mask(
    r: AttentionRequest, tile: Tile, mask: Tensor | None, bias: Tensor | None, slopes: Tensor | None
) -> Tensor | None:
    """What is added to the tile's scores, broadcastable to (b, Hq, rows, keys); None if nothing is."""
    dtype = torch.float64 if r.dtype == "fp64" else torch.float32
    chunk: Tensor | None = None
    if slopes is not None:
        distance = _offsets(tile, dtype).abs_()
        per_head = slopes if slopes.ndim == 1 else slopes[tile.piece.batch]
        chunk = distance * -per_head.to(dtype).view(-1, r.heads_q, 1, 1)
    if bias is not None:
        part = _rectangle(bias, tile)
        chunk = part.to(dtype) if chunk is None else chunk + part  # whose batch may be wider than the slopes'
    hidden: Tensor | None = None
    if mask is not None:
        seen = _rectangle(mask, tile)
        if chunk is None and not tile.banded:
            return torch.where(seen, _ADDED[dtype][0], _ADDED[dtype][1])
        hidden = ~seen
    if tile.banded:
        offsets = _offsets(tile, torch.int32)
        if r.left is not None:
            low = offsets < -r.left
            hidden = low if hidden is None else hidden | low
        if r.right is not None:
            high = offsets > r.right
            hidden = high if hidden is None else hidden | high
    if hidden is None:
        return chunk
    # The kernel takes two dims or four.
    return torch.where(hidden, -math.inf, hidden.new_zeros((), dtype=dtype) if chunk is None else chunk)


def _offsets(tile: Tile, dtype: torch.dtype) -> Tensor:
    """(rows, keys): key position minus query position."""
    keys = torch.arange(tile.k0, tile.k1, dtype=dtype)
    return keys - torch.arange(tile.q0 + tile.shift, tile.q1 + tile.shift, dtype=dtype)[:, None]


def _rectangle(x: Tensor, tile: Tile) -> Tensor:
    """The tile's part of a (1 | B, 1 | Hq, 1 | Sq, 1 | Skv) operand; dims of 1 stay."""
    batch = tile.piece.batch if x.shape[0] > 1 else slice(None)
    rows = slice(tile.q0, tile.q1) if x.shape[2] > 1 else slice(None)
    keys = slice(tile.k0, tile.k1) if x.shape[3] > 1 else slice(None)
    return x[batch, :, rows, keys]
