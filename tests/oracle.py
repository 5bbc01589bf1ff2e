"""What attention must give, written again: a loop over sequences and heads, autograd for the gradients.

Run in float64 it is the truth; run in a case's own dtype it is how far plain PyTorch in that dtype strays from it,
which is the yardstick for a kernel's error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnrt.operands import NO_OPERANDS, Operands, bind
from attnrt.request import AttentionRequest

ORDER = {"bhsd": "bhs", "bshd": "bsh", "sbhd": "sbh"}
ABSOLUTE = {torch.float16: 4e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-6, torch.float64: 1e-12}
"""Error always allowed, relative to the largest value (at least 1): four units in the last place of 1 in half
precision. Of a few numbers PyTorch's math may happen to round none badly."""


@dataclass
class Case:
    """One call: tensors in the layout, operands, and the scalar options as users write them."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: str
    operands: Operands = NO_OPERANDS
    grad: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def request(self) -> AttentionRequest:
        options = {"causal": False, "window": None, "alignment": None, "softcap": None, "dropout_p": 0.0, "scale": None}
        options |= {"max_seqlen_q": None, "max_seqlen_kv": None, "deterministic": False, "return_lse": True}
        return bind(self.q, self.k, self.v, self.operands, layout=self.layout, **(options | self.options))

    def leaves(self) -> dict[str, Tensor]:
        """Tensors that want a gradient."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.operands.bias, "sinks": self.operands.sinks}
        return {n: t for n, t in named.items() if t is not None and t.requires_grad}


def gradients(case: Case, out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not leaves:
        return {}
    grad = torch.ones_like(out) if case.grad is None else case.grad.to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def answer(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """out, lse and each gradient, computed in `dtype`."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in case.leaves().items()}
    q, k, v = (leaves.get(n, t.detach().to(dtype)) for n, t in (("q", case.q), ("k", case.k), ("v", case.v)))
    bias, sinks = case.operands.bias, case.operands.sinks
    bias = leaves.get("bias", None if bias is None else bias.detach().to(dtype))
    sinks = leaves.get("sinks", None if sinks is None else sinks.detach().to(dtype))
    out, lse = _attend(case, q, k, v, bias, sinks)
    return {"out": out.detach(), "lse": lse, **gradients(case, out, leaves)}


def _attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    packed = case.layout == "thd"
    heads_q, heads_kv = q.shape[-2 if case.layout != "bhsd" else 1], k.shape[-2 if case.layout != "bhsd" else 1]
    pieces, places, spans = [], [], _spans(case)
    longest_q = max((b - a for (a, b), _ in spans), default=0) if packed else _sizes(case)[1]
    longest_kv = max((b - a for _, (a, b) in spans), default=0) if packed else _sizes(case)[2]
    full = (len(spans), heads_q, longest_q, longest_kv)
    lse = torch.full((heads_q, q.shape[0]) if packed else full[:3], -math.inf, dtype=torch.float64)
    for b, (span_q, span_kv) in enumerate(spans):
        for h in range(heads_q):
            one_q, one_k = _one(case, q, b, h, span_q), _one(case, k, b, h * heads_kv // heads_q, span_kv)
            one_v = _one(case, v, b, h * heads_kv // heads_q, span_kv)
            if not len(one_q) or not len(one_k):
                continue
            scores = _scores(case, one_q, one_k, b, h, heads_q, None if bias is None else bias.expand(full))
            live = (scores > -math.inf).any(1).nonzero().flatten()
            if not len(live):
                continue
            logits = scores[live]
            row_lse = torch.logsumexp(logits.detach(), 1)
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].expand(len(live), 1)], 1)
            pieces.append(torch.softmax(logits, 1)[:, : len(one_k)] @ one_v)
            places.append((b, h, live + span_q[0]))
            if packed:
                lse[h, live + span_q[0]] = row_lse.double()
            else:
                lse[b, h, live] = row_lse.double()
    shape = (*q.shape[:-1], v.shape[-1])
    out = torch.zeros(shape, dtype=q.dtype) + 0 * sum(t.nan_to_num().sum() for t in (q, k, v))
    for piece, (b, h, rows) in zip(pieces, places, strict=True):
        match case.layout:
            case "bhsd":
                index: Any = (b, h, rows)
            case "bshd":
                index = (b, rows, h)
            case "sbhd":
                index = (rows, b, h)
            case _:
                index = (rows, h)
        index = tuple(i if isinstance(i, Tensor) else torch.tensor(i) for i in index)
        out = out.index_put(index, piece)
    return out, lse


def _scores(case: Case, q: Tensor, k: Tensor, b: int, h: int, heads: int, bias: Tensor | None) -> Tensor:
    """(lq, lk) scaled, capped, biased and masked scores of one head of one sequence."""
    options, operands = case.options, case.operands
    len_q, len_k = len(q), len(k)
    scale = options.get("scale")
    scores = (q @ k.T) * (1 / math.sqrt(q.shape[1]) if scale is None else scale)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    shift = len_k - len_q if options.get("alignment") == "bottom_right" else 0
    distance = torch.arange(len_k).repeat(len_q, 1) - (torch.arange(len_q)[:, None] + shift)
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.expand(len(_spans(case)), heads)
        scores = scores - slopes[b, h].to(q.dtype) * distance.abs()
    if bias is not None:
        scores = scores + bias[b, h, :len_q, :len_k]
    seen = torch.ones(len_q, len_k, dtype=torch.bool)
    if operands.mask is not None:
        batch = len(_spans(case))
        mask = operands.mask
        mask = mask.expand(
            batch, heads, *(n if n > 1 else m for n, m in zip(mask.shape[-2:], (len_q, len_k), strict=True))
        )
        seen &= mask[b, h, :len_q, :len_k]
    left, right = options.get("window") or (None, None)
    if options.get("causal"):
        right = 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return torch.where(seen, scores, -math.inf)


def _sizes(case: Case) -> tuple[int, int, int]:
    """B, Sq and Skv of a batch that is not packed."""
    order = ORDER[case.layout]
    return case.q.shape[order.index("b")], case.q.shape[order.index("s")], case.k.shape[order.index("s")]


def _spans(case: Case) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """For each sequence, where its real queries and keys begin and end."""
    o = case.operands
    if case.layout == "thd":
        cu_q, cu_kv = o.cu_seqlens_q.tolist(), o.cu_seqlens_kv.tolist()  # type: ignore[union-attr]
        return list(zip(pairwise(cu_q), pairwise(cu_kv), strict=True))
    batch, len_q, len_kv = _sizes(case)
    ends_q = [len_q] * batch if o.seqlens_q is None else o.seqlens_q.tolist()
    ends_kv = [len_kv] * batch if o.seqlens_kv is None else o.seqlens_kv.tolist()
    return [((0, q), (0, kv)) for q, kv in zip(ends_q, ends_kv, strict=True)]


def _one(case: Case, x: Tensor, b: int, h: int, span: tuple[int, int]) -> Tensor:
    """(length, D): one head of one sequence."""
    rows = slice(*span)
    match case.layout:
        case "bhsd":
            return x[b, h, rows]
        case "bshd":
            return x[b, rows, h]
        case "sbhd":
            return x[rows, b, h]
    return x[rows, h]


Answers = tuple[dict[str, Tensor], dict[str, Tensor]]


def answers(case: Case) -> Answers:
    """The truth, and how plain PyTorch in the case's dtype has it."""
    return answer(case), answer(case, case.q.dtype)


def assert_agrees(
    case: Case,
    found: dict[str, Tensor],
    known: Answers | None = None,
    absolute: float = 0.0,
) -> None:
    """Each output's error is at most twice that of plain PyTorch in the same dtype, and no NaN appears anywhere.

    `known`: the case's `answers`, where several results are checked against them. `absolute`: error always allowed, if
    more than `ABSOLUTE` has.
    """
    truth, plain = known or answers(case)
    if "lse" not in found:
        truth = {name: value for name, value in truth.items() if name != "lse"}
    assert found.keys() == truth.keys(), (found.keys(), truth.keys())
    for name, want in truth.items():
        got = found[name].detach()
        assert got.shape == want.shape, (name, got.shape, want.shape)
        assert not got.isnan().any(), f"{name} has NaN"
        assert torch.equal(got == -math.inf, want == -math.inf), f"{name} is -inf in other places"
        if not want.numel():
            continue
        # The LSE is float32 whatever the inputs; sinks and bias may be too.
        least = max(ABSOLUTE[case.q.dtype], ABSOLUTE[got.dtype], absolute)
        finite = want > -math.inf
        want, got, low = (torch.where(finite, x.double(), 0) for x in (want, got, plain[name]))
        error, usual = (got - want).abs().max().item(), (low - want).abs().max().item()
        allowed = 2 * usual + least * max(1.0, want.abs().max().item())
        assert error <= allowed, (
            f"{name}: error {error:.3g}, plain {case.q.dtype} has {usual:.3g}, allowed {allowed:.3g}"
        )
