"""One request carried out: pointers in the order of the plan, outputs, and what the contract asks beyond the library.

No tensor is copied to another layout: strides are part of the plan. Where sequences have lengths of their own, a plan
reads at run time where each begins and how long it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnrt.backends.cudnn.device import Device
from attnrt.backends.cudnn.graphs import Pages, Uid, backward_spec, forward_spec
from attnrt.backends.cudnn.launch import Launch, Places, plane_of, readable
from attnrt.backends.cudnn.layouts import contiguous, strides_of, takes
from attnrt.backends.cudnn.rows import (
    CONSTANTS,
    dead_grid,
    dead_rows,
    heads_last,
    lengths,
    over_rows,
    packed_rows,
    padded_rows,
    unread_keys,
)
from attnrt.operands import NO_OPERANDS, Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.cudnn.sequences import Clearing

_empty_like, _empty_strided = torch.empty_like, torch.empty_strided
_dense, _float32 = torch.contiguous_format, torch.float32


class Passed(NamedTuple):
    """What a forward gives: the call's results, and what its backward needs besides the inputs."""

    out: Tensor
    lse: Tensor | None
    stats: Tensor | None
    seed: Tensor | None
    launch: Launch | None


class Call:
    """One request on one GPU: its plans by the strides that come along."""

    def __init__(self, request: AttentionRequest, gpu: Device) -> None:
        r = self.request = request
        self.device = gpu
        spec = forward_spec(r, gpu.sm)
        self.shape, self.stats = spec.shape, spec.stats
        self.plain = spec.uids() in ((Uid.Q, Uid.K, Uid.V, Uid.O), (Uid.Q, Uid.K, Uid.V, Uid.O, Uid.STATS))
        clean = self.shape.ragged and r.same_lengths and (self.shape.packed_lse or r.packed or not r.needs_lse)
        self.may_die = self.shape.lengths and not clean
        """A query may see no key, or lie where a kernel leaves anything at all."""
        self.clearing: Clearing | None = None
        if self.shape.lengths:
            from attnrt.backends.cudnn import sequences  # imports Triton

            self.clearing = sequences.Clearing(r, self.shape) if sequences.usable(self.shape, self.stats) else None
        self._forwards: dict[Any, Launch] = {}
        self._equal_dims = r.head_dim_qk == r.head_dim_v
        self._stats_size = (r.batch, r.heads_q, r.seqlen_q)
        self._stats_strides = (r.heads_q * r.seqlen_q, r.seqlen_q, 1)
        self._only: Launch | None = None
        """Of contiguous q, k and v."""

    # --- Forward -------------------------------------------------------------------------------------------------

    def plain_forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, Launch]:
        """The output, the LSE if anything wants it, and the plan that made them. Every line here costs each call."""
        # A request may say contiguous and stand for views of it, as the blocks of a ring are.
        contiguous = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        launch = self._only if contiguous else None
        if launch is None:
            launch = self._forwards.get((q.stride(), k.stride(), v.stride()))
            if launch is None:
                launch = self._forward_launch(q, k, v, NO_OPERANDS)
            if contiguous:
                self._only = launch
        if self._equal_dims:
            out = _empty_like(q) if contiguous else _empty_like(q, memory_format=_dense)
        else:
            out = q.new_empty((*q.shape[:-1], self.request.head_dim_v))
        if self.stats:
            # Two thirds of the price of new_empty.
            where = self.device.torch_device
            stats = _empty_strided(self._stats_size, self._stats_strides, dtype=_float32, device=where)
            pointers = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), stats.data_ptr()]
            launch.plan.run(pointers)
            return out, stats, launch
        launch.plan.run([q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()])
        return out, None, launch

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Passed:
        r = self.request
        if r.paged and not k.shape[0]:
            return self._nothing(q)
        if self.plain:
            out, stats, launch = self.plain_forward(q, k, v)
            return Passed(out, stats if r.needs_lse else None, stats, None, launch)
        launch = self._forward_launch(q, k, v, operands)
        out = self._result((*q.shape[:-1], r.head_dim_v), q)
        stats = self._new_stats(q) if self.stats else None
        given, seed, kept = self._operands(operands, q.device, pages=launch.spec.pages)
        given |= {Uid.Q: q.data_ptr(), Uid.K: k.data_ptr(), Uid.V: v.data_ptr(), Uid.O: out.data_ptr()}
        if stats is not None:
            given[Uid.STATS] = stats.data_ptr()
        places = self._places(launch, operands, q.device)
        if places is not None:
            given |= places.addresses()
        launch.plan.run([given[uid] for uid in launch.uids])
        del kept
        lse = self._finish(out, stats, operands, places)
        return Passed(out, lse, stats, seed, launch)

    def _places(self, launch: Launch, operands: Operands, device: torch.device) -> Places | None:
        if not self.shape.lengths:
            return None
        of_padded = None if self.request.packed else lengths(self.request, operands, device)
        return launch.places(operands, of_padded, device)

    def _forward_launch(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Launch:
        r, table = self.request, operands.page_table
        plane = None if operands.bias is None else plane_of(operands.bias, r)
        key: Any = (q.stride(), k.stride(), v.stride())
        pages = None
        if table is not None:
            pages = Pages(int(k.shape[0]), r.page_size or 1, int(table.shape[1]), int(table.shape[1]))
        if not self.plain:
            key = (*key, plane, pages)
        if (found := self._forwards.get(key)) is None:
            sq, sk, sv = (strides_of(x, r.layout) for x in (q, k, v))
            spec = forward_spec(r, self.device.sm, sq, sk, sv, plane, pages)
            of = {Uid.AT_Q: sq, Uid.AT_K: sk, Uid.AT_V: sv}
            of[Uid.AT_O] = contiguous(r.layout, r.heads_q, r.seqlen_q, r.head_dim_v, r.batch)
            found = self._forwards[key] = Launch(self.device, r, spec, of)
        return found

    def _nothing(self, q: Tensor) -> Passed:
        """Of a paged cache without a page."""
        lse = q.new_full((*q.shape[:-1],), -torch.inf, dtype=torch.float32) if self.request.needs_lse else None
        if lse is not None and self.request.layout == "bshd":
            lse = lse.transpose(1, 2)
        return Passed(q.new_zeros((*q.shape[:-1], self.request.head_dim_v)), lse, None, None, None)

    def _new_stats(self, q: Tensor) -> Tensor:
        """The LSE as the plan writes it, -inf where it does not."""
        r, shape = self.request, self.shape
        if not shape.ragged:
            return torch.empty((r.batch, r.heads_q, r.seqlen_q), dtype=torch.float32, device=q.device)
        size: tuple[int, ...] = (shape.batch, r.heads_q, shape.seqlen_q)
        if shape.heads_apart:
            size = (r.batch, r.heads_q, r.seqlen_q if shape.packed_lse else shape.seqlen_q)
        elif shape.packed_lse:
            size = (q.shape[0], r.heads_q) if r.packed else (r.batch, r.seqlen_q, r.heads_q)
        return torch.full(size, -torch.inf, dtype=torch.float32, device=q.device)

    def _operands(
        self, operands: Operands, device: torch.device, seed: Tensor | None = None, pages: Pages | None = None
    ) -> tuple[dict[Uid, int], Tensor | None, list[Tensor]]:
        """Addresses of the optional tensors, the seed of the dropout, and what must live until the launch."""
        given: dict[Uid, int] = {}
        kept: list[Tensor] = []

        def give(uid: Uid, x: Tensor) -> None:
            given[uid] = x.data_ptr()
            kept.append(x)

        if operands.bias is not None:
            give(Uid.BIAS, readable(operands.bias))
        if self.request.dropout_p:
            if seed is None:  # drawn on the device: nothing waits
                seed = torch.randint(2**62, (1,), device=device)
            give(Uid.SEED, seed)
            give(Uid.OFFSET, CONSTANTS.get((0,), torch.int64, device))
        if operands.sinks is not None:
            give(Uid.SINKS, operands.sinks.detach().float().contiguous())
        if operands.page_table is not None and pages is not None:
            # A tile may reach past a sequence's last page, where the table may hold anything.
            table = operands.page_table.clamp(0, pages.total - 1).contiguous()
            give(Uid.PAGES_K, table)
            give(Uid.PAGES_V, table)
        return given, seed, kept

    def _finish(self, out: Tensor, stats: Tensor | None, operands: Operands, places: Places | None) -> Tensor | None:
        """Zeros and -inf for rows that see nothing; the LSE as the contract has it. `stats` is made fit for the
        backward, where +inf gives such rows the weight zero."""
        r = self.request
        lse = self._lse(stats, operands) if stats is not None and r.needs_lse else None
        dying = places is not None and self.may_die
        blinded = stats if dying and r.needs_grad else None
        if places is not None and self.clearing is not None and out.is_cuda:
            if lse is not None and blinded is not None:
                lse = lse.clone()
            lengths = places.length_q, places.length_kv
            self.clearing.output(lengths, operands.cu_seqlens_q, out, blinded, lse if dying else None)
        elif places is not None and dying:
            dead = dead_rows(r, places.length_q, places.length_kv, operands.cu_seqlens_q)
            out.masked_fill_(over_rows(dead, r.layout), 0)
            if lse is not None:
                lse = lse.masked_fill(dead if r.packed else dead[:, None], -torch.inf)
            if blinded is not None:
                self._blind(blinded, dead, places)
        if not dying and r.bias is not None and stats is not None:
            dead = stats == -torch.inf  # all that the row could see has a bias of -inf
            out.masked_fill_(heads_last(dead, r.layout)[..., None], 0)
            if r.needs_grad:
                lse = None if lse is None else lse.clone()
                stats.masked_fill_(dead, torch.inf)
        return lse

    def _lse(self, stats: Tensor, operands: Operands) -> Tensor:
        """(B, Hq, Sq), or (Hq, T) of a packed batch."""
        r, shape = self.request, self.shape
        if not shape.ragged:
            return stats
        if shape.packed_lse and not shape.heads_apart:
            return stats.t() if r.packed else stats.transpose(1, 2)
        if r.packed:
            assert operands.cu_seqlens_q is not None
            return packed_rows(stats, operands.cu_seqlens_q, r.tokens_q)
        return stats[:, :, : r.seqlen_q]

    def _blind(self, stats: Tensor, dead: Tensor, places: Places) -> None:
        if self.shape.packed_lse and not self.shape.heads_apart:
            stats.masked_fill_(dead[..., None], torch.inf)
        else:
            grid = dead_grid(self.request, places.length_q, places.length_kv, stats.shape[-1])
            stats.masked_fill_(grid[:, None], torch.inf)

    # --- Backward ------------------------------------------------------------------------------------------------

    def plain_backward(
        self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; contiguous in the call's layout."""
        back, pointer = launch.backwards.get(grad.stride()), grad.data_ptr()
        if back is None or pointer & 15:
            grad = grad if takes(grad) else grad.contiguous()
            back, pointer = self._backward_launch(launch, grad), grad.data_ptr()
        if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
            dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
        else:
            dq, dk, dv = [_empty_like(x, memory_format=_dense) for x in (q, k, v)]
        back.plan.run(
            [
                q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), stats.data_ptr(), pointer,
                dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
            ]
        )  # fmt: skip
        return dq, dk, dv

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, passed: Passed, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dbias, dsinks; contiguous in the call's layout."""
        r, shape = self.request, self.shape
        assert passed.launch is not None and passed.stats is not None
        if self.plain:
            return (*self.plain_backward(passed.launch, q, k, v, passed.out, passed.stats, grad), None, None)
        if not takes(grad):
            grad = grad.contiguous()
        launch = self._backward_launch(passed.launch, grad)
        spec = launch.spec
        heads = r.heads_q if shape.heads_apart else r.heads_kv
        sizes = (q.shape, *(self._with_heads(x, heads) for x in (k, v)))
        dq, dk, dv = (self._result(size, q) for size in sizes)
        given, _, kept = self._operands(operands, q.device, passed.seed)
        given |= {
            Uid.Q: q.data_ptr(), Uid.K: k.data_ptr(), Uid.V: v.data_ptr(), Uid.O: passed.out.data_ptr(),
            Uid.STATS: passed.stats.data_ptr(), Uid.DO: grad.data_ptr(), Uid.DQ: dq.data_ptr(),
            Uid.DK: dk.data_ptr(), Uid.DV: dv.data_ptr(),
        }  # fmt: skip
        dbias = dsinks = None
        if spec.bias_grad and operands.bias is not None:
            dbias = torch.zeros(operands.bias.shape, dtype=operands.bias.dtype, device=q.device)
            given[Uid.DBIAS] = dbias.data_ptr()
        if spec.sinks_grad and operands.sinks is not None:
            dsinks = torch.zeros((r.heads_q,), dtype=torch.float32, device=q.device)
            given[Uid.DSINKS] = dsinks.data_ptr()
        places = self._places(launch, operands, q.device)
        if places is not None:
            given |= places.addresses()
        launch.plan.run([given[uid] for uid in launch.uids])
        del kept
        if heads != r.heads_kv:
            dk, dv = (x.unflatten(1, (r.heads_kv, -1)).sum(2) for x in (dk, dv))
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        if places is not None and self.clearing is not None and dq.is_cuda:
            self.clearing.gradient((places.length_q, places.length_kv), cu_q, cu_kv, dq, dk, dv)
        elif places is not None and self.may_die:
            dq.masked_fill_(over_rows(dead_rows(r, places.length_q, places.length_kv, cu_q), r.layout), 0)
            unread = over_rows(unread_keys(r, places.length_q, cu_kv), r.layout)
            dk.masked_fill_(unread, 0)
            dv.masked_fill_(unread, 0)
        if dsinks is not None and operands.sinks is not None:
            dsinks = dsinks.to(operands.sinks.dtype)
        return dq, dk, dv, dbias, dsinks

    def merged_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        seed: Tensor | None,
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """`backward` from the output and LSE of the contract, which may be of more keys than k and v hold."""
        out = out.contiguous()
        passed = Passed(out, None, self._stats_of(lse, operands), seed, self._forward_launch(q, k, v, operands))
        return self.backward(q, k, v, operands, passed, grad)

    def _stats_of(self, lse: Tensor, operands: Operands) -> Tensor:
        """The LSE as the plan reads it; a row that sees nothing has +inf, which makes its weights zero."""
        r, shape = self.request, self.shape
        lse = lse.float()
        if self.shape.lengths or r.bias is not None or r.lse_backward:
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        if not shape.ragged:
            return lse.contiguous()
        if shape.packed_lse and shape.heads_apart:
            return lse.contiguous()
        if shape.packed_lse:
            return (lse.t() if r.packed else lse.transpose(1, 2)).contiguous()
        if r.packed:
            assert operands.cu_seqlens_q is not None
            return padded_rows(lse, operands.cu_seqlens_q, shape.batch, shape.seqlen_q)
        return torch.nn.functional.pad(lse, (0, shape.seqlen_q - r.seqlen_q), value=torch.inf)

    def _with_heads(self, x: Tensor, heads: int) -> tuple[int, ...]:
        """The size of k or v with another number of heads."""
        if heads == self.request.heads_kv:
            return x.shape
        return x.shape[0], heads, *x.shape[2:]  # heads are apart in "bhsd" only

    def _result(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """For a plan to write, which leaves rows and tokens outside every sequence as they are: zeros, unless those
        are set afterwards."""
        unwritten = self.shape.ragged and (self.clearing is None or not like.is_cuda)
        return (like.new_zeros if unwritten else like.new_empty)(size)

    def _backward_launch(self, forward: Launch, grad: Tensor) -> Launch:
        if (found := forward.backwards.get(grad.stride())) is None:
            r = self.request
            do = strides_of(grad, r.layout)
            spec = backward_spec(forward.spec, r, do)
            of = {**forward.strides, Uid.AT_DO: do}
            heads_kv = r.heads_q if self.shape.heads_apart else r.heads_kv
            sizes = (
                (Uid.AT_DQ, r.heads_q, r.seqlen_q, r.head_dim_qk),
                (Uid.AT_DK, heads_kv, r.seqlen_kv, r.head_dim_qk),
            )
            for uid, heads, seqlen, dim in (*sizes, (Uid.AT_DV, heads_kv, r.seqlen_kv, r.head_dim_v)):
                of[uid] = contiguous(r.layout, heads, seqlen, dim, r.batch)
            found = forward.backwards[grad.stride()] = Launch(self.device, r, spec, of)
        return found
