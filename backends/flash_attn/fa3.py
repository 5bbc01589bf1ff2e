"""flash-attn 3: compiled ahead for sm90. Older builds always return (out, lse), newer ones when they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends.base import Reason
from attnrt.backends.flash_attn.calls import Call, as_passed, in_layout, stray_tokens, window, with_extra
from attnrt.backends.flash_attn.common import reads_lse
from attnrt.backends.flash_attn.discovery import KVCACHE, Library
from attnrt.backends.flash_attn.sinks import with_sinks
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run

FEW = 16
"""Queries up to which the keys are cut into as many parts as the package thinks best."""
HEAD_DIMS = (64, 96, 128, 192, 256)
"""Sizes that it has kernels for; others take the next that was built."""


def by_rows(r: AttentionRequest) -> bool:
    """As for flash-attn 4: a padded cache goes as pages, one for each sequence, so that no padding is read."""
    return r.padded_kv and not r.paged


def call(r: AttentionRequest, e: Environment) -> Call:
    """How the request is put to the package."""
    fixed: dict[str, Any] = {"softmax_scale": r.scale} | window(r, -1)
    if r.softcap is not None:
        fixed["softcap"] = r.softcap
    if r.padded:
        if reads_lse(r):
            fixed["return_softmax_lse"] = True
        tensors = {"cache_seqlens": "seqlens_kv"} | ({"page_table": "page_table"} if r.paged else {})
        return Call(KVCACHE, fixed, tensors, ("q", "k_cache", "v_cache"))
    if r.needs_grad:
        fixed["deterministic"] = r.deterministic
    if not r.packed:
        if r.seqlen_q <= FEW and not r.needs_grad:
            fixed["num_splits"] = 0
        return Call("flash_attn_func", fixed | _with_lse(r))
    # The two None have no default in old builds.
    fixed |= {"max_seqlen_q": r.seqlen_q, "max_seqlen_k": r.seqlen_kv, "seqused_q": None, "seqused_k": None}
    tensors = {"cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_k": "cu_seqlens_kv"}
    return Call("flash_attn_varlen_func", fixed | _with_lse(r), tensors)


def _with_lse(r: AttentionRequest) -> dict[str, Any]:
    return {"return_attn_probs": True} if reads_lse(r) else {}


def optional(how: Call, library: Library) -> Call:
    """Without what an older build need not be told: it returns the log-sum-exp unasked."""
    known = library.parameters[how.function]
    fixed = {n: x for n, x in how.fixed.items() if n != "return_attn_probs" or n in known}
    return Call(how.function, fixed, how.tensors, how.inputs)


def extra(r: AttentionRequest, e: Environment) -> dict[str, Tensor]:
    """Tensors that the call needs besides the user's: the table of a cache that is read as one page each."""
    if not by_rows(r):
        return {}
    device = torch.device(e.device_type, e.device_index or 0)
    return {"page_table": torch.arange(r.batch, dtype=torch.int32, device=device).view(-1, 1)}


def prepare(r: AttentionRequest, e: Environment, library: Library) -> Run:
    """The call for every tensor set that matches the request."""
    asked, r = r, as_passed(r)
    how = optional(call(r, e), library)
    package = with_extra(r, e, library.functions[how.function], how, extra)
    tails, needs_lse = stray_tokens(r), r.needs_lse
    if tails is None and not reads_lse(r) and _gives_output_alone(how, library):
        return in_layout(asked, package)

    def pair(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Any]:
        found = package(q, k, v, operands)
        out, lse = found[:2] if isinstance(found, tuple) else (found, None)
        if tails is not None:
            tails(out, lse, operands)
        return out, lse

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        out, lse = pair(q, k, v, operands)
        return (out, lse.detach()) if needs_lse else out

    def run_with_sinks(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        out, lse = with_sinks(pair, torch.clone, q, k, v, operands)
        return (out, lse.detach()) if needs_lse else out

    return in_layout(asked, run_with_sinks if r.sinks else run)


def _gives_output_alone(how: Call, library: Library) -> bool:
    """Not asked for the log-sum-exp, that is: builds that can be, do as they are told."""
    return how.function == KVCACHE or "return_attn_probs" in library.parameters[how.function]


def left_out(r: AttentionRequest, library: Library) -> tuple[Reason, ...]:
    """What this build was made without. The package writes it down and does not look: without a kernel for a head dim
    it ends the process, and by one whose values are narrower it gives wrong numbers (3.0.0 on an H200)."""
    flags = _build_flags(library)

    def off(flag: str) -> bool:
        return bool(flags.get(flag) or flags.get(flag.replace("FLASHATTENTION", "FLASH_ATTENTION")))

    wants = {
        "FLASHATTENTION_DISABLE_BACKWARD": (r.needs_grad, "a backward"),
        "FLASHATTENTION_DISABLE_LOCAL": (r.windowed, "sliding windows"),
        "FLASHATTENTION_DISABLE_SOFTCAP": (r.softcap is not None, "softcap"),
        "FLASHATTENTION_DISABLE_FP16": (r.dtype == "fp16", "fp16"),
        "FLASHATTENTION_DISABLE_VARLEN": (r.packed or r.padded, "sequences of different lengths"),
        "FLASHATTENTION_DISABLE_PAGEDKV": (r.paged or by_rows(r), "a paged KV cache"),
        "FLASHATTENTION_DISABLE_HDIMDIFF64": (r.head_dim_qk <= 64 < r.head_dim_v, "head_dim_v over 64 with 64"),
        "FLASHATTENTION_DISABLE_HDIMDIFF192": (r.head_dim_v <= 128 < r.head_dim_qk, "head dims 192/128"),
    }
    for least in dict.fromkeys((r.head_dim_qk, r.head_dim if r.needs_grad else r.head_dim_qk)):
        larger = [d for d in HEAD_DIMS if d >= least]
        # With unequal head dims the forward's kernel is one of a pair's, for that size alone. The backward for 256 is
        # never deterministic.
        usable = larger if r.head_dim_qk == r.head_dim_v else larger[:1]
        usable = [d for d in usable if d < 256 or not (r.needs_grad and r.deterministic)]
        if all(off(f"FLASHATTENTION_DISABLE_HDIM{d}") for d in usable):
            wants[f"FLASHATTENTION_DISABLE_HDIM{larger[0]}"] = True, f"kernels for head_dim {least} or more"
    return tuple(
        Reason(
            "FA3_LEFT_OUT",
            f"flash-attn-3 {library.version} here was built without {what} ({flag})",
            f"build it again without {flag}",
        )
        for flag, (used, what) in wants.items()
        if used and off(flag)
    )


def _build_flags(library: Library) -> Mapping[str, bool]:
    for name in ("flash_attn_config", "flash_attn_3.flash_attn_config"):
        try:
            flags: Mapping[str, bool] = import_module(name).CONFIG["build_flags"]
            return flags
        except Exception:  # older builds have none: they are taken at their word
            continue
    return {}
