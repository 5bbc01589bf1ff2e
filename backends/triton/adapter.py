"""From a request to launches: views by strides, outputs, grids. No tensor is copied or moved to another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnrt.backends.triton import backward as passes
from attnrt.backends.triton import hopper as gluon
from attnrt.backends.triton.decode import decode_pass, outputs, slopes_of, split_count
from attnrt.backends.triton.forward import forward
from attnrt.backends.triton.replay import Recording, on
from attnrt.backends.triton.rules import fused_backward
from attnrt.backends.triton.scores import Matrix, Plane
from attnrt.backends.triton.tiles import PASSES, Tile, block_dim, section, tile_for, values_block
from attnrt.environment import Environment
from attnrt.lengths import dense
from attnrt.operands import Operands
from attnrt.request import AttentionRequest
from attnrt.second_order import once_differentiable

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

STATS_ROWS: int = passes.STATS_ROWS.value


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    out: Tensor
    lse: Tensor | None
    seed: Tensor | None


@dataclass(frozen=True)
class Plan:
    """Everything about a request's launches that no tensor changes."""

    request: AttentionRequest
    tiles: dict[str, Tile]
    tma: bool
    """The GPU fetches tiles by descriptor (sm90 and later)."""
    hopper: bool = False
    """The forward is the Gluon kernel."""
    fused: bool = False
    """The backward is the Gluon kernel, where dq, dk and dv are wanted and the hardware can fetch the tensors."""
    whole: bool = True
    """The backward's output and LSE are of the keys that it gets, and not of more (`pair`)."""
    constants: dict[str, Any] = field(init=False)
    """Compile-time constants of every pass."""
    forward: Recording = field(default_factory=Recording)
    backward: dict[tuple[bool, ...], Recording] = field(default_factory=dict)
    """By the gradients that are wanted."""

    def __post_init__(self) -> None:
        r = self.request
        constants = {
            "DIM_QK": r.head_dim_qk,
            "DIM_V": r.head_dim_v,
            "BLOCK_QK": block_dim(r.head_dim_qk),
            "BLOCK_V": values_block(r),
            "PACKED": r.packed,
            "BOTTOM_RIGHT": r.alignment == "bottom_right",
            "PRECISION": "tf32" if r.tf32 else "ieee",
        }
        object.__setattr__(self, "constants", constants)

    @property
    def padded_q(self) -> int:
        """Rows that a sequence's statistics take, whole tiles of them."""
        return -(-self.request.seqlen_q // STATS_ROWS) * STATS_ROWS

    @property
    def longest_first(self) -> bool:
        """The last tiles of queries have the most keys."""
        return self.request.right is not None and self.request.left is None

    def options(self, name: str) -> dict[str, Any]:
        """Constants and launch options of a pass."""
        tile = self.tiles[name]
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return self.constants | blocks | {"num_warps": tile.warps, "num_stages": tile.stages}

    def matrix(self, x: Tensor) -> Matrix:
        if self.request.packed:
            return Matrix(x, 0, x.stride(1), x.stride(0))
        b, h, s = gluon.AXES[self.request.layout]
        return Matrix(x, x.stride(b), x.stride(h), x.stride(s))

    def descriptor(self, x: Tensor, rows: int, dim: int) -> Any:
        """For (1, 1, rows, dim) tiles of (B, H, S, D), or None where the hardware cannot fetch x: it needs addresses
        in whole 16 bytes."""
        m, size = self.matrix(x), x.element_size()
        whole = x.data_ptr() % 16 == 0 and all(s and s * size % 16 == 0 for s in x.stride()[:-1])
        if not self.tma or not whole:
            return None
        if self.request.packed:
            shape, strides = [1, x.shape[1], x.shape[0]], [x.shape[0] * m.row, m.head, m.row]
        else:
            shape, strides = [x.shape[a] for a in gluon.AXES[self.request.layout]], [m.batch, m.head, m.row]
        return TensorDescriptor(x, [*shape, x.shape[-1]], [*strides, 1], [1, 1, rows, dim])

    def row_values(self, x: Tensor) -> Matrix:
        """(B, Hq, Sq), or (Hq, T) when packed: one number for each query row."""
        return Matrix(x, 0, x.stride(0), 1) if x.ndim == 2 else Matrix(x, x.stride(0), x.stride(1), 1)

    def scalars(self) -> tuple[Any, ...]:
        """scale, softcap, dropout_p, left, right: None for what is off."""
        r = self.request
        return r.scale, r.softcap, r.dropout_p or None, r.left, r.right


def plan_for(request: AttentionRequest, environment: Environment, hopper: bool = False, whole: bool = True) -> Plan:
    tiles = {name: tile_for(name, request, environment) for name in PASSES}
    sm = environment.sm or 0
    fused = gluon.backward_available() and fused_backward(request, environment)
    return Plan(request, tiles, tma=sm >= 90, hopper=hopper, fused=fused, whole=whole)


def prepare(request: AttentionRequest, environment: Environment, hopper: bool = False) -> Run:
    """The call for every tensor set that matches the request. hopper: the forward is the Gluon one."""
    plan = plan_for(request, environment, hopper)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if request.needs_grad:
            out, lse = _apply(q, k, v, operands.bias, operands.sinks, operands, plan)
        else:
            out, lse, _ = launch_forward(plan, q, k, v, operands)
        return (out, lse) if request.needs_lse else out

    return run


def pair(request: AttentionRequest, environment: Environment, hopper: bool = False) -> tuple[Forward, Backward]:
    """See `Kernel.pair`."""
    plan = plan_for(request, environment, hopper, whole=False)

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, lse, seed = launch_forward(plan, q, k, v, operands)
        assert lse is not None
        return out, lse, () if seed is None else (seed,)

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extra: tuple[Tensor, ...],
        operands: Operands,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        saved = Saved(out, lse, extra[0] if extra else None)
        return launch_backward(plan, q, k, v, operands, saved, grad, tuple(wanted))

    return forward, backward


def prepare_decode(request: AttentionRequest, environment: Environment) -> Run:
    """The same for few queries over many keys."""
    plan, r = plan_for(request, environment), request
    tile = tile_for("decode", r, environment)
    splits = split_count(r, tile, environment.sm_count or 132, environment.sm)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        tensors = (q, k, v, *outputs(r, splits, q, v), *_given(operands))
        with on(q):
            plan.forward(tensors, body)
        return (tensors[3], tensors[4]) if r.needs_lse else tensors[3]

    body = partial(decode_pass, plan, tile, splits)
    return run


class Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, operands, plan) -> output in q's layout, LSE. Both from the plan's request."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v, _, _, operands, plan = args
        out, lse, seed = launch_forward(plan, q, k, v, operands)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse, seed, *operands)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed, *given = ctx.saved_tensors
        saved = Saved(out, lse, seed)
        grads = launch_backward(ctx.plan, q, k, v, Operands(*given), saved, grad, ctx.needs_input_grad[:5])
        return (*grads, None, None)


_apply: Any = super(torch.autograd.Function, Attention).apply
"""`Attention.apply` without its Python part, which is for torch.func: attnrt's operators stand before that."""


def launch_forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Saved:
    r = plan.request
    # A packed batch may hold tokens of no sequence, which no program visits.
    out = (torch.zeros if r.packed else torch.empty)((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = None
    if r.packed and (r.needs_lse or r.needs_grad):
        lse = q.new_full((r.heads_q, q.shape[0]), -torch.inf, dtype=torch.float32)
    elif r.needs_lse or r.needs_grad:
        lse = torch.empty((r.batch, r.heads_q, r.seqlen_q), dtype=torch.float32, device=q.device)
    seed = torch.randint(2**62, (1,), device=q.device) if r.dropout_p else None  # drawn on the device: no wait
    with on(q):
        plan.forward((q, k, v, out, lse, seed, *_given(operands)), partial(_forward_pass, plan))
    return Saved(out, lse, seed)


def _forward_pass(plan: Plan, launch: Any, tensors: Sequence[Any]) -> None:
    r = plan.request
    q, k, v, out, lse, seed, *given = tensors
    sinks, *lengths = given[3:]
    if plan.hopper:
        return gluon.launch(q, k, v, out, lse, r, tuple(lengths), launch=launch)
    tile, c = plan.tiles["forward"], plan.constants
    tiles = -(-r.seqlen_q // tile.block_m)
    pairs = r.batch * r.heads_q
    launch(
        forward,
        (tiles * pairs,),
        *(plan.matrix(x) for x in (q, k, v, out)),
        *_row_values(lse),
        plan.descriptor(k, tile.block_n, c["BLOCK_QK"]),
        plan.descriptor(v, tile.block_n, c["BLOCK_V"]),
        *score_operands(r, given),
        *(sinks, *lengths, seed),
        *plan.scalars(),
        *(r.heads_q, r.group, r.seqlen_q, r.seqlen_kv, tiles, pairs, min(pairs, section(r, r.group))),
        LONGEST_FIRST=plan.longest_first,
        POSITIVE_SCALE=r.scale > 0,
        SPLIT=True,
        **plan.options("forward"),
    )
    return None


def launch_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    saved: Saved,
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of q, k, v, bias and sinks; None for those not `wanted`."""
    r = plan.request
    if grad.stride(-1) != 1 and grad.shape[-1] != 1:  # such as the expanded ones that sum() sends
        grad = grad.contiguous()
    assert saved.lse is not None
    # dk and dv come from one kernel. As in the forward, packed tensors may have tokens that no program visits.
    both = wanted[1] or wanted[2]
    dq, dk, dv = (
        (torch.zeros if r.packed else torch.empty)(x.shape, dtype=x.dtype, device=x.device) if wants else None
        for x, wants in ((q, wanted[0]), (k, both), (v, both))
    )
    bias = operands.bias
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if bias is not None and wanted[3] else None

    padded_q = plan.padded_q
    tokens = q.shape[0] + STATS_ROWS * (r.batch + 1) if r.packed else r.batch * padded_q
    stats_rows = -(-tokens // STATS_ROWS) * STATS_ROWS
    stats = torch.empty((2, r.heads_q, stats_rows), dtype=torch.float32, device=q.device)
    row_tiles = padded_q // STATS_ROWS
    dsinks = torch.empty((r.batch, r.heads_q, row_tiles), device=q.device) if wanted[4] else None
    fused = plan.fused and all(wanted[:3]) and all(gluon.fetchable(x) for x in (q, k, v, grad))
    sums = q.new_zeros((r.heads_q, stats_rows, r.head_dim_qk), dtype=torch.float32) if fused else None
    made = (*stats.unbind(), sums, dq, dk, dv, dbias, dsinks)
    tensors = (q, k, v, saved.out, saved.lse, saved.seed, grad, *made, *_given(operands))
    with on(q):
        recording = plan.backward.get(wanted)
        if recording is None:
            recording = plan.backward[wanted] = Recording()
        recording(tensors, partial(_backward_pass, plan))
    total = None if dsinks is None or operands.sinks is None else dsinks.sum((0, 2)).to(operands.sinks.dtype)
    return [dq, dk if wanted[1] else None, dv if wanted[2] else None, dbias, total]


def _backward_pass(plan: Plan, launch: Any, tensors: Sequence[Any]) -> None:
    r = plan.request
    q, k, v, out, lse, seed, grad, lse2, delta, sums, dq, dk, dv, dbias, dsinks, *given = tensors
    sinks, *lengths = given[3:]
    stats, stats_rows, padded_q, pairs = (lse2, delta), lse2.shape[1], plan.padded_q, r.batch * r.heads_q
    q_, k_, v_, dout = (plan.matrix(x) for x in (q, k, v, grad))
    dim_qk, dim_v = plan.constants["BLOCK_QK"], plan.constants["BLOCK_V"]
    sizes = (r.heads_q, r.group, r.seqlen_q, r.seqlen_kv, padded_q, stats_rows)
    rest = (*score_operands(r, given), *lengths, seed, *plan.scalars())
    launch(
        passes.preprocess,
        (padded_q // STATS_ROWS, pairs),
        *(plan.matrix(out), dout, *_row_values(lse), *stats),
        *(sinks, dsinks, lengths[0], r.heads_q, r.seqlen_q, padded_q, stats_rows),
        **{n: plan.constants[n] for n in ("DIM_V", "BLOCK_V", "PACKED")},
        num_warps=4,
    )
    if r.dtype == "fp32" and plan.whole and (dq is not None or dk is not None or dbias is not None):
        tile = plan.tiles["dq"]
        tiles = -(-r.seqlen_q // tile.block_m)
        launch(
            passes.balance,
            (tiles * pairs,),
            *(q_, k_, v_, dout, *stats, sinks, *rest, *sizes, tiles, pairs, min(pairs, section(r, r.group))),
            LONGEST_FIRST=plan.longest_first,
            **plan.options("dq"),
        )
    if sums is not None:
        made = (plan.matrix(dq), dk, dv)
        return gluon.launch_backward((q, k, v, grad), stats, sums, made, r, padded_q, tuple(lengths), launch)
    if dk is not None:
        tile = plan.tiles["dkdv"]
        tiles = -(-r.seqlen_kv // tile.block_n)
        shared_q = r.packed or r.padded_q  # foreign rows must be masked as they are loaded: see load_tile
        fetch = [
            None if shared_q else plan.descriptor(q, tile.block_m, dim_qk),
            plan.descriptor(k, tile.block_n, dim_qk),
            plan.descriptor(v, tile.block_n, dim_v),
            None if shared_q else plan.descriptor(grad, tile.block_m, dim_v),
        ]
        pairs_kv = r.batch * r.heads_kv
        where = (tiles, pairs_kv, min(pairs_kv, section(r, 1)))
        launch(
            passes.dkdv,
            (tiles * pairs_kv,),
            *(q_, k_, v_, dout, *stats, plan.matrix(dk), plan.matrix(dv), *fetch, *rest, *sizes, *where),
            **plan.options("dkdv"),
        )
    if dq is not None:
        tile = plan.tiles["dq"]
        tiles = -(-r.seqlen_q // tile.block_m)
        shapes = ((k, tile.block_n, dim_qk), (v, tile.block_n, dim_v))
        fetch = [None if r.packed or r.padded_kv else plan.descriptor(*x) for x in shapes]
        where = (tiles, pairs, min(pairs, section(r, r.group)))
        launch(
            passes.dq,
            (tiles * pairs,),
            *(q_, k_, v_, dout, *stats, plan.matrix(dq), *fetch, *rest, *sizes, *where),
            LONGEST_FIRST=plan.longest_first,
            **plan.options("dq"),
        )
    if dbias is not None:
        _dbias_pass(plan, launch, (q_, k_, v_, dout, *stats), dbias, (rest, sizes))


def _dbias_pass(plan: Plan, launch: Any, tensors: tuple[Any, ...], dbias: Tensor, others: tuple[Any, Any]) -> None:
    r, tile, (rest, sizes) = plan.request, plan.tiles["dbias"], others
    assert r.bias is not None
    batch, heads, queries, keys = r.bias.shape
    tiles_m, tiles_n = -(-queries // tile.block_m), -(-keys // tile.block_n)
    launch(
        passes.dbias,
        (tiles_m * tiles_n * heads * batch,),
        *(*tensors, _plane(dbias, (batch, heads, queries, keys)), *rest, r.batch, *sizes, tiles_m, tiles_n, heads),
        OVER_BATCH=batch == 1,
        OVER_HEADS=heads == 1,
        OVER_QUERIES=queries == 1,
        OVER_KEYS=keys == 1,
        **plan.options("dbias"),
    )


def _row_values(x: Tensor | None) -> tuple[Any, int, int]:
    """One number for each query row, with its strides over batch and heads."""
    return (None, 0, 0) if x is None else (x, 0 if x.ndim == 2 else x.stride(0), x.stride(-2))


def _given(o: Operands) -> tuple[Tensor | None, ...]:
    """The optional tensors as passes take them: mask (bytes), bias, slopes, sinks, lengths of queries and keys. The
    last three are read with stride 1."""
    return (
        None if o.mask is None else o.mask.view(torch.uint8),
        *(o.bias, o.alibi_slopes),
        *[
            None if x is None else dense(x)
            for x in (
                o.sinks,
                o.seqlens_q if o.cu_seqlens_q is None else o.cu_seqlens_q,
                o.seqlens_kv if o.cu_seqlens_kv is None else o.cu_seqlens_kv,
            )
        ],
    )


def score_operands(
    r: AttentionRequest, given: Sequence[Tensor | None]
) -> tuple[Plane | None, Plane | None, Matrix | None]:
    """mask, bias and ALiBi slopes as the kernels take them, from `_given`."""
    mask, bias, slopes = given[:3]
    return (
        None if mask is None or r.mask is None else _plane(mask, r.mask.shape),
        None if bias is None or r.bias is None else _plane(bias, r.bias.shape),
        slopes_of(slopes),
    )


def _plane(x: Tensor, shape: tuple[int, int, int, int]) -> Plane:
    """Strides over (B, Hq, Sq, Skv): 0 where the tensor has one element, or no such dim."""
    strides = (0,) * (4 - x.ndim) + tuple(x.stride())
    return Plane(x, *(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)))
