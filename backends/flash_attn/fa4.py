"""flash-attn 4: `flash_attn.cute`, which compiles at the first call of each kind. It always returns (out, lse)."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends.base import between
from attnrt.backends.flash_attn.calls import Call, as_passed, in_layout, stray_tokens, window, with_extra
from attnrt.backends.flash_attn.discovery import Library
from attnrt.backends.flash_attn.sinks import per_row, share
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run

SINK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COMPILED = 0.3
"""A first call that took longer, in seconds, has compiled; one that finds its kernel takes a hundredth of that."""
MOST_FIRST_CALLS = 1024
first_calls: dict[AttentionRequest, dict[str, float]] = {}
"""Seconds that the first "call" and the first "backward" took in this process, where they compiled."""


def by_rows(r: AttentionRequest, e: Environment) -> bool:
    """A padded KV cache goes as pages, one for each sequence. Keys in pages are fetched row by row and none past a
    sequence's end; of a dense tensor whole tiles are, and a NaN in the padding of v would reach the output.
    """
    return r.padded_kv and not r.paged and between(e, 90, 120)


def sinks_by_lse(r: AttentionRequest) -> bool:
    """The package's LSE has the sinks in it and ours has not, so a call that wants both applies them to the output."""
    return r.sinks and r.needs_lse


def splits(r: AttentionRequest, e: Environment) -> int:
    """Parts that the keys are cut into: 0 lets the package choose, which on sm90 may fail."""
    few = r.seqlen_q <= 16 and not (r.needs_grad or r.sinks or r.packed)
    return 0 if few and between(e, 100, 120) else 1


def call(r: AttentionRequest, e: Environment) -> Call:
    """How the request is put to the package."""
    fixed: dict[str, Any] = {"softmax_scale": r.scale, "num_splits": splits(r, e)} | window(r, None)
    if r.softcap is not None:
        fixed["softcap"] = r.softcap
    if r.needs_grad:
        fixed["deterministic"] = r.deterministic
    if r.needs_lse:
        fixed["return_lse"] = True
    tensors = {"learnable_sink": "sinks"} if r.sinks and not sinks_by_lse(r) else {}
    if not (r.packed or r.padded):
        return Call("flash_attn_func", fixed, tensors)
    fixed |= {"max_seqlen_q": r.seqlen_q, "max_seqlen_k": r.seqlen_kv}
    if r.packed:
        tensors |= {"cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_k": "cu_seqlens_kv"}
    else:
        tensors |= {"seqused_k": "seqlens_kv"} | ({"page_table": "page_table"} if r.paged else {})
    return Call("flash_attn_varlen_func", fixed, tensors)


def prepare(r: AttentionRequest, e: Environment, library: Library) -> Run:
    """The call for every tensor set that matches the request."""
    asked, r = r, as_passed(r)
    attention, tails = attend(r, e, library), stray_tokens(r)
    sunk, needs_lse, awaited = sinks_by_lse(r), r.needs_lse, {"call", "backward"} if r.needs_grad else {"call"}

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if awaited:
            out, lse = _timed(asked, awaited, attention, q, k, v, operands)
        else:
            out, lse = attention(q, k, v, operands)
        if tails is not None:
            tails(out, lse, operands)
        if sunk:
            out = _with_sinks(out, lse, operands)
        return (out, lse.detach()) if needs_lse else out

    return in_layout(asked, run if torch.cuda.device_count() < 2 else _on_device(run))


def attend(r: AttentionRequest, e: Environment, library: Library) -> Run:
    """The package's function with its arguments in place: (q, k, v, operands) in (B, S, H, D) gives (out, LSE)."""
    how = call(r, e)
    function = library.functions[how.function]
    if "learnable_sink" not in how.tensors:
        return with_extra(r, e, function, how, extra)

    def readable(learnable_sink: Tensor, **rest: Any) -> Any:
        sinks = learnable_sink if learnable_sink.dtype in SINK_DTYPES else learnable_sink.float()
        return function(learnable_sink=sinks, **rest)

    return with_extra(r, e, readable, how, extra)


def _on_device(run: Run) -> Run:
    """It launches on the current device, so that must be the tensors'."""

    def there(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if not q.is_cuda or q.get_device() == torch.cuda.current_device():
            return run(q, k, v, operands)
        with torch.cuda.device(q.device):
            return run(q, k, v, operands)

    return there


def _with_sinks(out: Tensor, lse: Tensor, operands: Operands) -> Tensor:
    """Each output row times the share of the denominator that its keys have. The LSE is differentiable here."""
    assert operands.sinks is not None
    return (out * per_row(share(lse, operands.sinks))).to(out.dtype)


def extra(r: AttentionRequest, e: Environment) -> dict[str, Tensor]:
    """Tensors that the call needs besides the user's: the table of a cache that is read as one page each."""
    if not by_rows(r, e):
        return {}
    device = torch.device(e.device_type, e.device_index or 0)
    return {"page_table": torch.arange(r.batch, dtype=torch.int32, device=device).view(-1, 1)}


def _timed(
    r: AttentionRequest, awaited: set[str], attention: Run, q: Tensor, k: Tensor, v: Tensor, operands: Operands
) -> tuple[Tensor, Any]:
    """The call, with what it is the first of noted and taken off `awaited`."""
    start = perf_counter()
    out, lse = attention(q, k, v, operands)
    if "call" in awaited:
        awaited.discard("call")
        _remember(r, "call", perf_counter() - start)
    if "backward" in awaited and out.grad_fn is not None:
        awaited.discard("backward")
        _time_backward(r, out.grad_fn)
    return out, lse


def _time_backward(r: AttentionRequest, node: Any) -> None:
    """The host's time in the package's backward, the first time that it runs: long if it compiled."""
    started: list[float] = []
    # Autograd's own thread runs them, one after the other.
    node.register_prehook(lambda grads: started.append(perf_counter()))
    node.register_hook(lambda inputs, outputs: _remember(r, "backward", perf_counter() - started[-1]))


def _remember(r: AttentionRequest, half: str, seconds: float) -> None:
    if seconds > COMPILED and (r in first_calls or len(first_calls) < MOST_FIRST_CALLS):
        first_calls.setdefault(r, {})[half] = seconds
