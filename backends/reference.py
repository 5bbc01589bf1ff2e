"""The reference: every argument of the contract in plain PyTorch, on any device, with the whole score matrix in memory.

It defines what the other backends must compute. Scores are float32 (float64 for fp64 inputs) whatever q's dtype; each
step on them works in place where autograd allows it, so that few score-sized tensors live at once (see `bytes`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnrt.backends.base import FEATURE_NAMES, OPT_IN_NAMES, Backend, Rule
from attnrt.environment import Environment
from attnrt.lengths import dense
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

INFERENCE_SCORES = 1
"""Score-sized float tensors alive at the peak of a forward: the scores, which become the probabilities in place."""
TRAINING_SCORES = 3
"""... of a backward: the saved probabilities, their gradient, and the scores' gradient made from the two."""

_TO_BHSD = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3)}
_FROM_BHSD = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}


class Lengths(NamedTuple):
    """What of the (B, S) slots is real: lengths (B,) and valid (B, S); None where everything is."""

    lengths: Tensor | None
    valid: Tensor | None


class Reference(Backend):
    name = "reference"
    title = "the reference"
    prefix = "REFERENCE"
    fused = False
    supports = FEATURE_NAMES | OPT_IN_NAMES
    rules = (
        Rule(
            "REFERENCE_DTYPE",
            lambda r, e: r.dtype.startswith("fp8"),
            "the reference does not take {r.dtype}: fp8 needs the scales that go with it",
            remedy="cast q, k and v to bf16",
        ),
    )

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Quadratic: the live score-sized tensors, the masks (1 byte an element), and linear copies of the operands."""
        r = request
        wide = 8 if r.dtype == "fp64" else 4
        plane = (r.batch if r.padded or r.packed else 1) * r.seqlen_q * r.seqlen_kv
        masks = (plane if r.banded else 0) + (r.mask.elements if r.mask else 0) + (r.scores if r.dropout_p else 0)
        if r.needs_grad:
            saved = r.scores * wide if r.softcap is not None else 0  # tanh keeps its own output
            return r.scores * wide * TRAINING_SCORES + saved + masks + _linear(r, wide)
        live = r.scores * wide * (INFERENCE_SCORES + (1 if r.dropout_p else 0))
        cast = r.bias.elements * wide if r.bias and r.itemsize < wide else 0
        distances = plane * wide if r.alibi else 0
        return live + max(masks, cast, distances, _linear(r, wide))

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        """The output in q's layout and dtype, and, if the request asks for it, the LSE in float32."""

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            if not torch.amp.is_autocast_available(q.device.type):
                return _attend(request, q, k, v, operands)
            # Inside autocast, matmul would fall back to 16 bits.
            with torch.autocast(q.device.type, enabled=False):
                return _attend(request, q, k, v, operands)

        return run

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        from attnrt.backends.reference_pair import pair

        if request.dropout_p:
            raise NotImplementedError("the reference keeps no dropout mask: its forward has to run again")
        return pair(request)


def _linear(r: AttentionRequest, wide: int) -> int:
    """Copies of q, k, v and the output in the wide dtype, the output itself, and for a backward the gradients."""
    slots_q, slots_kv = r.batch * r.seqlen_q, r.batch * r.seqlen_kv
    q, kv = slots_q * r.heads_q * r.head_dim_qk, slots_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v)
    out = slots_q * r.heads_q * r.head_dim_v
    total = q * wide + (kv * wide if wide != r.itemsize else 0) + out * (wide + r.itemsize)
    if r.padded or r.packed:  # without their garbage
        total += (q + kv + (out if r.padded_q and r.needs_grad else 0)) * r.itemsize
    if r.paged:  # v as it is gathered, before its garbage goes
        total += slots_kv * r.heads_kv * r.head_dim_v * r.itemsize
    return total + (q + kv + out) * wide if r.needs_grad else total


def _attend(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
    out, lse = attend(r, q, k, v, operands)
    return (out, lse.float()) if r.needs_lse else out


def attend(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """The output, and the LSE in the scores' dtype."""
    (q, k, v), len_q, len_kv = inputs(r, q, k, v, operands)
    out, lse = _core(r, q, k, v, operands, len_q, len_kv)
    out = out.to(dtype=_dtype(r))
    if r.needs_grad and len_q.valid is not None and not r.packed:
        out = _clean(out, len_q)  # NaN in the gradient of padding would meet a weight of 0
    if r.packed:
        return _repack(out, lse, operands.cu_seqlens_q, r.tokens_q)
    return out.permute(_FROM_BHSD[r.layout]).contiguous(), lse


def inputs(
    r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, operands: Operands
) -> tuple[tuple[Tensor, Tensor, Tensor], Lengths, Lengths]:
    """q, k and v as (B, H, S, D) without garbage, and what of the queries and of the keys is real."""
    if r.packed:
        q, len_q = _unpack(q, operands.cu_seqlens_q, r.seqlen_q)
        k, len_kv = _unpack(k, operands.cu_seqlens_kv, r.seqlen_kv)
        v, _ = _unpack(v, operands.cu_seqlens_kv, r.seqlen_kv)
        return (q, k, v), len_q, len_kv
    len_q, len_kv = _padding(operands.seqlens_q, r.seqlen_q), _padding(operands.seqlens_kv, r.seqlen_kv)
    # Whatever lies in the padding, NaN included, is replaced before it meets a product.
    q = _clean(q.permute(_TO_BHSD[r.layout]), len_q)
    k, v = (_clean(_gather(r, t, operands) if r.paged else t.permute(_TO_BHSD[r.layout]), len_kv) for t in (k, v))
    return (q, k, v), len_q, len_kv


def rows(r: AttentionRequest, grad: Tensor, out: Tensor, lse: Tensor, operands: Operands) -> tuple[Tensor, ...]:
    """The output's gradient, the output and its LSE as (B, H, S, ...), for the backward."""
    if not r.packed:
        clean = _padding(operands.seqlens_q, r.seqlen_q)
        return *(_clean(t.permute(_TO_BHSD[r.layout]), clean) for t in (grad, out)), lse
    unpacked = (_unpack(t, operands.cu_seqlens_q, r.seqlen_q)[0] for t in (grad, out, lse.mT.unsqueeze(-1)))
    grad, out, lse = unpacked
    return grad, out, lse.squeeze(-1)


def _core(
    r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, operands: Operands, len_q: Lengths, len_kv: Lengths
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Sq, Dv) and LSE (B, Hq, Sq) in the scores' dtype, from bhsd tensors without garbage."""
    wide = torch.float64 if r.dtype == "fp64" else torch.float32
    logits = scores(r, q.to(wide), k.to(wide), operands, len_q, len_kv)

    # exp(s - max) / sum, the division left to the output's rows. max is a constant shift: it needs no gradient.
    live = logits.detach()
    peak = live.amax(-1, keepdim=True) if r.seqlen_kv else live.new_full((*live.shape[:-1], 1), -math.inf)
    peak = peak.masked_fill_(peak == -math.inf, 0.0)
    probabilities = logits.sub_(peak).exp_()
    total = probabilities.sum(-1, keepdim=True)
    dead = total.detach() == 0
    total = total.masked_fill(dead, 1.0)
    kept = probabilities
    if r.dropout_p:
        drop = torch.empty_like(live, dtype=torch.bool).bernoulli_(r.dropout_p)
        kept = probabilities.masked_fill(drop, 0.0)
    group = r.group * r.seqlen_q
    out = torch.matmul(kept.reshape(r.batch, r.heads_kv, group, r.seqlen_kv), v.to(wide))
    out = out.reshape(r.batch, r.heads_q, r.seqlen_q, r.head_dim_v) / (total * (1 - r.dropout_p))
    lse = peak + total.log()
    if operands.sinks is not None:
        # A sink scales a row by exp(lse) / (exp(lse) + exp(sink)); the LSE returned does not count it.
        out = out * torch.sigmoid(lse - operands.sinks.to(wide)[:, None, None])
    return out, lse.detach().masked_fill(dead, -math.inf).squeeze(-1)


def scores(r: AttentionRequest, q: Tensor, k: Tensor, operands: Operands, len_q: Lengths, len_kv: Lengths) -> Tensor:
    """(B, Hq, Sq, Skv): scaled, capped, biased and masked."""
    found = _scores(r, q, k)
    in_place = not found.requires_grad
    if r.softcap is not None:
        found = found.tanh_()
        found = found.mul_(r.softcap) if in_place else found * r.softcap
    return _positions(r, found, operands.alibi_slopes, operands, len_q, len_kv)


def _scores(r: AttentionRequest, q: Tensor, k: Tensor) -> Tensor:
    """scale * q k^T (over softcap, if there is one) as (B, Hq, Sq, Skv). A group's query heads are rows of one
    product, so KV heads are never repeated."""
    scale = r.scale if r.softcap is None else r.scale / r.softcap
    rows = (q * scale).reshape(r.batch, r.heads_kv, r.group * r.seqlen_q, r.head_dim_qk)
    scores = torch.matmul(rows, k.transpose(-1, -2))
    # An ordinary view would make every in-place step below copy its gradient.
    return torch.ops.aten._unsafe_view(scores, (r.batch, r.heads_q, r.seqlen_q, r.seqlen_kv))  # type: ignore[no-any-return]


def _positions(
    r: AttentionRequest, scores: Tensor, slopes: Tensor | None, operands: Operands, len_q: Lengths, len_kv: Lengths
) -> Tensor:
    """ALiBi, bias, mask, band and lengths, in that order, each in place."""
    keys = torch.arange(r.seqlen_kv, device=scores.device)
    queries = torch.arange(r.seqlen_q, device=scores.device)[:, None]
    if r.alignment == "bottom_right":
        ends_kv = r.seqlen_kv if len_kv.lengths is None else len_kv.lengths.view(-1, 1, 1, 1)
        ends_q = r.seqlen_q if len_q.lengths is None else len_q.lengths.view(-1, 1, 1, 1)
        queries = queries + (ends_kv - ends_q)
    if slopes is not None:
        distance = keys.to(scores.dtype).sub(queries).abs_()
        per_head = slopes.to(scores.dtype).view(-1, r.heads_q, 1, 1)
        scores = scores.addcmul_(per_head, distance.expand(1, 1, -1, -1) if distance.ndim == 2 else distance, value=-1)
    if operands.bias is not None:
        scores = scores.add_(operands.bias)
    if operands.mask is not None:
        scores = scores.masked_fill_(~operands.mask, -math.inf)
    if r.left is not None:
        scores = scores.masked_fill_(keys < queries - r.left, -math.inf)
    if r.right is not None:
        scores = scores.masked_fill_(keys > queries + r.right, -math.inf)
    if len_kv.valid is not None:
        scores = scores.masked_fill_(~len_kv.valid[:, None, None, :], -math.inf)
    if len_q.valid is not None:
        scores = scores.masked_fill_(~len_q.valid[:, None, :, None], -math.inf)
    return scores


def _padding(seqlens: Tensor | None, longest: int) -> Lengths:
    if seqlens is None:
        return Lengths(None, None)
    return Lengths(seqlens, torch.arange(longest, device=seqlens.device) < seqlens[:, None])


def _clean(x: Tensor, lengths: Lengths) -> Tensor:
    """(B, H, S, D) with zeros outside the lengths; nothing there gets a gradient."""
    return x if lengths.valid is None else torch.where(lengths.valid[:, None, :, None], x, 0)


def _gather(r: AttentionRequest, pool: Tensor, operands: Operands) -> Tensor:
    """(B, Hkv, Skv, D) from a pool of pages. Entries past a sequence's length are not followed."""
    table, lengths = operands.page_table, operands.seqlens_kv
    assert table is not None and lengths is not None and r.page_size is not None
    if not pool.shape[0]:  # then no sequence has a key
        return pool.new_zeros(r.batch, r.heads_kv, r.seqlen_kv, pool.shape[-1])
    used = torch.arange(table.shape[1], device=table.device) * r.page_size < lengths[:, None]
    pages = pool.index_select(0, torch.where(used, table, 0).flatten())
    if r.layout == "bshd":
        return pages.reshape(r.batch, r.seqlen_kv, r.heads_kv, pool.shape[-1]).transpose(1, 2)
    pages = pages.reshape(r.batch, table.shape[1], r.heads_kv, r.page_size, pool.shape[-1]).transpose(1, 2)
    return pages.reshape(r.batch, r.heads_kv, r.seqlen_kv, pool.shape[-1])


def _unpack(x: Tensor, cu_seqlens: Tensor | None, longest: int) -> tuple[Tensor, Lengths]:
    """(T, H, D) to (B, H, longest, D) with zeros after each sequence, without waiting for the device."""
    assert cu_seqlens is not None
    lengths = cu_seqlens.diff()
    slots = torch.arange(longest, device=x.device)
    valid = slots < lengths[:, None]
    if not x.shape[0]:  # no token to point the empty slots at
        return x.new_zeros(lengths.numel(), x.shape[1], longest, x.shape[2]) + x.sum(), Lengths(lengths, valid)
    tokens = torch.where(valid, cu_seqlens[:-1, None] + slots, 0)
    padded = x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:]).transpose(1, 2)
    return torch.where(valid[:, None, :, None], padded, 0), Lengths(lengths, valid)


def _repack(out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """(B, Hq, longest, Dv) and (B, Hq, longest) to (T, Hq, Dv) and (Hq, T). Tokens of no sequence are dead rows."""
    assert cu_seqlens is not None
    batch, heads, longest, dim = out.shape
    if not batch or not longest:
        empty = out.new_zeros(tokens, heads, dim) + out.sum()
        return empty, lse.new_full((heads, tokens), -math.inf)
    token = torch.arange(tokens, device=out.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(dense(cu_seqlens), token, right=True) - 1
    inside = sequence.clamp(max=batch - 1)
    slot = token - cu_seqlens[inside]
    valid = (sequence < batch) & (slot < longest)
    index = torch.where(valid, inside * longest + slot, 0)
    rows = out.transpose(1, 2).reshape(batch * longest, heads, dim).index_select(0, index)
    lse_rows = lse.transpose(0, 1).reshape(heads, batch * longest).index_select(1, index)
    return torch.where(valid[:, None, None], rows, 0), lse_rows.masked_fill(~valid, -math.inf)


def _dtype(r: AttentionRequest) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[r.dtype]
