"""Packages that are not here: plain PyTorch behind the signatures and the conventions of each generation.

For what an adapter does before and after the call: which argument gets what, layouts, windows, log-sum-exps, rows that
kernels leave unset (here NaN). What the kernels compute is for tests/gpu/test_flash_attn.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrt.backends.flash_attn.discovery import GENERATIONS, Library

SIGNATURES: dict[str, dict[str, dict[str, str]]] = {
    package: versions
    for package, versions in json.loads((Path(__file__).parent / "signatures.json").read_text()).items()
    if isinstance(versions, dict)
}


def parameters(package: str, version: str) -> dict[str, dict[str, bool]]:
    """For each function its arguments, and whether they have a default."""
    return {
        function: {name.rstrip("="): name.endswith("=") for name in text.split()}
        for function, text in SIGNATURES[package][version].items()
    }


def library(number: int, version: str) -> Library:
    """A stand-in for one version of one generation."""
    generation = GENERATIONS[number]
    known = parameters(generation.package, version)

    def function(name: str) -> Callable[..., Any]:
        def stand_in(**given: Any) -> Any:
            assert given.keys() <= known[name].keys(), f"{name} has no {given.keys() - known[name].keys()}"
            missing = {n for n, default in known[name].items() if not default} - given.keys()
            assert not missing, f"{name} needs {missing}"
            return CONVENTIONS[number](name, given)

        return stand_in

    functions = {name: function(name) for name in known}
    return Library(generation, version, functions, {name: frozenset(p) for name, p in known.items()})


def fa2(name: str, given: dict[str, Any]) -> Any:
    left, right = given.get("window_size", (-1, -1))
    band = (None if left < 0 else left, None if right < 0 else right)
    decode = name == "flash_attn_with_kvcache"
    out, lse = attend(given, band, dead=math.inf, causal_alibi=given.get("causal", False) and band == (None, None))
    if decode:
        return (out, lse) if given.get("return_softmax_lse") else out
    return (out, lse, None) if given.get("return_attn_probs") else out


def fa3(name: str, given: dict[str, Any]) -> Any:
    left, right = given.get("window_size", (-1, -1))
    out, lse = attend(given, (None if left < 0 else left, None if right < 0 else right))
    return (out, lse) if given.get("return_softmax_lse") or given.get("return_attn_probs") else out


def fa4(name: str, given: dict[str, Any]) -> Any:
    band = given.get("window_size", (None, None))
    assert all(bound is None or bound >= 0 for bound in band), "an open side is None"
    assert given["num_splits"] == 1, "more than one is for sm100"
    out, lse = attend(given, band)
    wanted = given.get("return_lse") or any(given[n].requires_grad for n in ("q", "k", "v"))
    return out, lse if wanted else None


CONVENTIONS = {2: fa2, 3: fa3, 4: fa4}


class Unset(torch.autograd.Function):
    """Gradients of rows that no sequence has are whatever memory held. Without a differentiable log-sum-exp they come
    from what was saved, as the packages' kernels have them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, used: dict[str, Any]) -> Any:
        ctx.used = used
        with torch.enable_grad():
            ctx.leaves = [None if t is None else t.detach().double().requires_grad_() for t in (q, k, v, sink)]
            ctx.out, ctx.lse = compute(*ctx.leaves, **used)
        out, lse = ctx.out.detach().to(q.dtype), ctx.lse.detach().float()
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
        leaves = [t for t in ctx.leaves if t is not None]
        if ctx.used["differentiable_lse"]:
            outputs, grads = [ctx.out], [grad.double()]
            if grad_lse is not None:
                outputs.append(ctx.lse)
                grads.append(grad_lse.double())
        else:
            outputs, grads = [by_formula(*ctx.saved_tensors[3:], grad, *leaves, ctx.used)], [None]
        found = [g.to(grad.dtype) for g in torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]
        for x, offsets in zip(found, (ctx.used["cu_q"], *(ctx.used["cu_k"],) * 2), strict=False):
            if offsets is not None:
                x[int(offsets[-1]) :] = math.nan
        return (*found, *(None,) * (5 - len(found)))


def attend(
    given: dict[str, Any], band: tuple[int | None, int | None], dead: float = -math.inf, causal_alibi: bool = False
) -> tuple[Tensor, Tensor]:
    q = given["q"]
    k, v = (given[n] if n in given else given[f"{n}_cache"] for n in ("k", "v"))
    left, right = band
    used = {
        "scale": given["softmax_scale"],
        "left": left,
        "right": 0 if given.get("causal") else right,
        "softcap": given.get("softcap") or None,
        "alibi": given.get("alibi_slopes"),
        "cu_q": given.get("cu_seqlens_q"),
        "cu_k": given.get("cu_seqlens_k"),
        "lengths": given.get("cache_seqlens", given.get("seqused_k")),
        "table": given.get("page_table", given.get("block_table")),
        "dead": dead,
        "causal_alibi": causal_alibi,
        "differentiable_lse": "num_splits" in given,
    }
    if used["cu_q"] is not None:
        for side, length in (("q", "max_seqlen_q"), ("k", "max_seqlen_k")):
            assert type(given[length]) is int and given[length] >= int(used[f"cu_{side}"].diff().max())
    assert not (used["table"] is not None and used["lengths"] is None)
    found = Unset.apply(q, k, v, given.get("learnable_sink"), used)
    return found  # type: ignore[no-any-return]


def compute(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, **used: Any) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) or packed; NaN wherever the kernels write nothing."""
    cu_q, cu_k = used["cu_q"], used["cu_k"]
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    packed = cu_q is not None
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype)
    lse = torch.full((heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]), math.nan, dtype=q.dtype)
    pieces, log_pieces = [], []
    spans = list(zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)) if packed else [None] * len(q)
    for b, span in enumerate(spans):
        if span is not None:
            (q0, q1), (k0, k1) = span
            one_q, one_k, one_v = q[q0:q1], k[k0:k1], v[k0:k1]
        else:
            one_q, one_k, one_v = q[b], *_keys(k, v, b, used)
        piece, log_piece = _one(one_q, one_k, one_v, sink, b, group, used)
        pieces.append(piece)
        log_pieces.append(log_piece)
    if packed:
        stray = out[int(cu_q[-1]) :]
        return torch.cat([*pieces, stray]), torch.cat([*log_pieces, lse[:, int(cu_q[-1]) :]], 1)
    return torch.stack(pieces), torch.stack(log_pieces)


def by_formula(out: Tensor, lse: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, used: dict[str, Any]) -> Tensor:
    """What has the gradients that a flash-attention backward gives: weights exp(scores - lse), and the gradient of the
    scores is weights * (grad v - sum(grad * out)), with the output and the log-sum-exp that were saved."""
    total = q.new_zeros(())
    group = q.shape[-2] // k.shape[-2]
    cu_q, cu_k = used["cu_q"], used["cu_k"]
    spans = (
        [
            tuple(slice(*ends) for ends in both)
            for both in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        ]
        if cu_q is not None
        else [(b, b) for b in range(len(q))]
    )
    with torch.enable_grad():
        for b, (rows, keys) in enumerate(spans):
            one_k, one_v = (x[keys].repeat_interleave(group, 1) for x in (k, v))
            scores = _scores(q[rows], one_k, b, used)
            own = (lse[:, rows] if cu_q is not None else lse[rows]).double()[..., None]
            weights = torch.where(scores > -math.inf, torch.exp(scores - own), 0).detach()
            one_grad, one_out = grad[rows].double(), out[rows].double()
            moved = torch.einsum("qhd,khd->hqk", one_grad, one_v) - (one_grad * one_out).sum(-1).T[..., None]
            total = total + (scores.masked_fill(weights == 0, 0) * (weights * moved).detach()).sum()
            total = total + (torch.einsum("hqk,khd->qhd", weights, one_v) * one_grad).sum()
    return total


def _keys(k: Tensor, v: Tensor, b: int, used: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys of one sequence: row by row, none past its end."""
    lengths, table = used["lengths"], used["table"]
    length = k.shape[1] if lengths is None else int(lengths[b])
    if table is None:
        return k[b, :length], v[b, :length]
    size = k.shape[1]
    at = [(int(table[b, i // size]), i % size) for i in range(length)]
    rows = [torch.tensor([x[i] for x in at], dtype=torch.long) for i in range(2)]
    return k[rows[0], rows[1]], v[rows[0], rows[1]]


def _one(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, b: int, group: int, used: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(Sq, H, Dv) and (H, Sq) of one sequence, aligned bottom-right."""
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = _scores(q, k, b, used)
    alive = (scores > -math.inf).any(-1).all(0)
    total = torch.logsumexp(scores[:, alive], -1)
    if sink is not None:
        total = torch.logaddexp(total, sink[:, None])
    weights = torch.exp(scores[:, alive] - total[..., None])
    out = torch.zeros(len(q), q.shape[1], v.shape[-1], dtype=q.dtype)
    out = out.index_put((alive.nonzero().flatten(),), torch.einsum("hqk,khd->qhd", weights, v))
    lse = torch.full((q.shape[1], len(q)), used["dead"], dtype=q.dtype)
    lse = lse.index_put((torch.arange(q.shape[1])[:, None], alive.nonzero().flatten()[None]), total)
    return out, lse


def _scores(q: Tensor, k: Tensor, b: int, used: dict[str, Any]) -> Tensor:
    """(H, Sq, Sk), -inf where a key is hidden."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * used["scale"]
    if used["softcap"]:
        scores = used["softcap"] * torch.tanh(scores / used["softcap"])
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))[None]
    if used["alibi"] is not None:
        slopes = used["alibi"][b] if used["alibi"].ndim == 2 else used["alibi"]
        distance = key.expand(len(q), -1) if used["causal_alibi"] else -(place - key).abs()
        scores = scores + slopes[:, None, None].to(q.dtype) * distance
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if used["left"] is not None:
        seen &= key >= place - used["left"]
    if used["right"] is not None:
        seen &= key <= place + used["right"]
    return scores.masked_fill(~seen, -math.inf)
