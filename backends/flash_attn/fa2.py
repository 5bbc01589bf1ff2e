"""flash-attn 2: compiled ahead for each GPU. -1 is an open side of a window; ALiBi and dropout are here alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends.flash_attn.calls import Call, as_passed, bound, dead_rows, in_layout, stray_tokens, window
from attnrt.backends.flash_attn.common import reads_lse
from attnrt.backends.flash_attn.discovery import KVCACHE, Library
from attnrt.backends.flash_attn.sinks import with_sinks
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run
    from attnrt.backends.flash_attn.tails import Tails


def call(r: AttentionRequest, e: Environment) -> Call:
    """How the request is put to the package. What a call does without is left out: old versions do not know it."""
    fixed: dict[str, Any] = {"softmax_scale": r.scale} | window(r, -1)
    if r.softcap is not None:
        fixed["softcap"] = r.softcap
    tensors = {} if r.alibi is None else {"alibi_slopes": "alibi_slopes"}
    if r.padded:
        if reads_lse(r):
            fixed["return_softmax_lse"] = True
        tensors |= {"cache_seqlens": "seqlens_kv"} | ({"block_table": "page_table"} if r.paged else {})
        return Call(KVCACHE, fixed, tensors, ("q", "k_cache", "v_cache"))
    if r.dropout_p:
        fixed["dropout_p"] = r.dropout_p
    if r.needs_grad and r.deterministic:
        fixed["deterministic"] = True
    if reads_lse(r):
        fixed["return_attn_probs"] = True
    if not r.packed:
        return Call("flash_attn_func", fixed, tensors)
    fixed |= {"max_seqlen_q": r.seqlen_q, "max_seqlen_k": r.seqlen_kv}
    tensors |= {"cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_k": "cu_seqlens_kv"}
    return Call("flash_attn_varlen_func", fixed, tensors)


def extra(r: AttentionRequest, e: Environment) -> dict[str, Tensor]:
    """Tensors that the call needs besides the user's: none."""
    return {}


def prepare(r: AttentionRequest, e: Environment, library: Library) -> Run:
    """The call for every tensor set that matches the request."""
    asked, r = r, as_passed(r)
    how = call(r, e)
    package, tails = bound(library.functions[how.function], how, extra(r, e)), stray_tokens(r)
    if reads_lse(r):
        return in_layout(asked, _with_lse(r, package, tails))
    if tails is None:
        return in_layout(asked, package)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        out = package(q, k, v, operands)
        tails(out, None, operands)
        return out

    return run


def _with_lse(r: AttentionRequest, package: Run, tails: Tails | None) -> Run:
    """The call where the log-sum-exp is wanted, or the sinks are applied by it."""

    def pair(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
        out, lse = package(q, k, v, operands)[:2]
        if tails is not None:
            tails(out, lse, operands)
        return out, lse

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if r.sinks:
            out, lse = with_sinks(pair, lambda raw: _lse(r, raw, operands), q, k, v, operands)
        else:
            out, raw = pair(q, k, v, operands)
            lse = _lse(r, raw.detach(), operands)
        return (out, lse) if r.needs_lse else out

    return run


def _lse(r: AttentionRequest, lse: Tensor, operands: Operands) -> Tensor:
    """As the contract has it. Under a causal mask the package adds slope * key to every row, not slope * (key -
    position): the same softmax, and a log-sum-exp that is larger by slope * position."""
    lse = dead_rows(lse)
    if r.alibi is None or not r.is_causal:
        return lse
    assert operands.alibi_slopes is not None
    position = torch.arange(r.seqlen_q, device=lse.device) - r.seqlen_q
    ends = r.seqlen_kv if operands.seqlens_kv is None else operands.seqlens_kv[:, None, None]
    return lse - operands.alibi_slopes[..., None] * (position + ends)
