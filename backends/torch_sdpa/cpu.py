"""PyTorch's flash kernel for the CPU: fused, linear memory, forward and backward, fp16 to fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt.backends.base import FEATURE_NAMES, Kernel, Rule, linear_bytes
from attnrt.backends.torch_sdpa.cpu_plan import (
    MIN_ROWS,
    Tile,
    dense,
    mask_bytes,
    native_causal,
    pieces,
    tile_rows,
    tiles,
)
from attnrt.backends.torch_sdpa.layouts import as_bhsd, four_dims, from_bhsd
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

KERNEL = torch._scaled_dot_product_flash_attention_for_cpu
"""A binding of C++, which takes a quarter less of a small call than the operator's object in torch.ops."""


class FlashCPU(Kernel):
    name = "flash_cpu"
    title = "PyTorch's CPU flash kernel"
    prefix = "TORCH_FLASH_CPU"
    supports = FEATURE_NAMES - {"softcap", "dropout", "bias_grad", "cuda_graph"} | {"lse_backward"}
    rules = (
        Rule(
            "TORCH_FLASH_CPU_DEVICE",
            lambda r, e: e.device_type != "cpu",
            "PyTorch's CPU flash kernel does not run on {e.arch}",
            source="registered for the CPU only",
        ),
        Rule(
            "TORCH_FLASH_CPU_DTYPE",
            lambda r, e: r.dtype.startswith("fp8"),
            "PyTorch's CPU flash kernel does not take {r.dtype}",
            remedy="cast q, k and v to bf16",
        ),
    )

    def runs_on(self, environment: Environment) -> bool:
        return environment.device_type == "cpu"

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Linear: outputs and gradients, the copies that `notes` tells of, and two masks of one tile."""
        r = request
        total = linear_bytes(r) + _scratch(r, environment.threads or 1)
        slots = r.tokens_q * r.heads_q * r.head_dim, r.tokens_kv * r.heads_kv * r.head_dim * 2
        if r.head_dim_qk != r.head_dim_v or r.strides == "last_dim":
            total += sum(slots) * r.itemsize * (2 if r.needs_grad else 1)
        if not plain(r):
            rows = tile_rows(r, r.batch)
            if dense(r) or not native_causal(r) or r.alignment == "bottom_right":
                total += 2 * mask_bytes(r, 1 if rows <= MIN_ROWS else r.batch, rows)
            if r.needs_grad and rows < r.seqlen_q:
                # Tiles write dq where it belongs; dk and dv they sum, in float32 for 16-bit inputs.
                total += (slots[1] if r.itemsize == 2 else 0) * 4 - slots[0] * 4
        return total

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        r = request
        said = []
        if r.head_dim_qk != r.head_dim_v:
            small, name = min((r.head_dim_qk, "head_dim_qk"), (r.head_dim_v, "head_dim_v"))
            said.append(f"pads {name} {small} to {r.head_dim}: a linear copy")
        if r.strides == "last_dim":
            said.append("makes the last dim contiguous: a linear copy")
        if r.packed or r.padded:
            said.append("runs each sequence by itself")
        elif not plain(r) and (plan := tiles(r, pieces(r, None, None))) and len(plan) > 1:
            said.append(f"runs {len(plan)} tiles of up to {plan[0].q1 - plan[0].q0} queries")
        if r.needs_grad and r.itemsize == 2 and r.seqlen_q > MIN_ROWS:
            said.append(f"the kernel sums dk and dv over blocks of queries in {r.dtype}")
        return tuple(said)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        if plain(request):
            return _plain(request)
        return _with_mask(request) if _masked(request) else _tiled(request)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        return _pair(request)


def _scratch(r: AttentionRequest, threads: int) -> int:
    """Each thread's block of scores, in float32, and their gradient: 512 keys by the kernel's own block of queries."""
    queries = 256 if r.seqlen_q >= 768 else 64 if r.seqlen_q >= 192 else 32
    wide = 8 if r.dtype == "fp64" else 4
    return threads * queries * (512 * (2 if r.needs_grad else 1) + r.head_dim) * wide


def plain(r: AttentionRequest) -> bool:
    """F.scaled_dot_product_attention runs it as it stands, on this kernel: every check of its own dispatch passes."""
    varying = r.padded or r.packed or dense(r) or r.sinks or r.needs_lse or r.empty
    banded = r.banded and not (native_causal(r) and r.alignment != "bottom_right")
    return not (varying or banded or r.head_dim_qk != r.head_dim_v or r.strides == "last_dim")


def _plain(r: AttentionRequest) -> Run:
    """As little as possible around PyTorch's own call: its host time is what small calls cost."""
    # Not the name in torch.nn.functional, which `attnrt.patch_sdpa` replaces.
    sdpa, causal, scale, gqa = torch._C._nn.scaled_dot_product_attention, r.is_causal, r.scale, r.group > 1
    if r.compiled:
        # The kernel by itself: amid other work PyTorch's own choice is out of the processor's caches.
        return _alone(r)
    allowed: Callable[[], bool] = torch.backends.cuda.flash_sdp_enabled

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        # So too inside somebody's sdpa_kernel(...) block that excludes flash: what was reported runs all the same.
        if allowed():
            return sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
        return KERNEL(q, k, v, 0.0, causal, scale=scale)[0]

    match r.layout:
        case "bhsd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                if allowed():
                    return sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
                return KERNEL(q, k, v, 0.0, causal, scale=scale)[0]

        case "bshd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        case _:

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
                return attend(q, k, v).permute(2, 0, 1, 3)

    return run


def _alone(r: AttentionRequest) -> Run:
    kernel, causal, scale = KERNEL, r.is_causal, r.scale
    match r.layout:
        case "bhsd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                return kernel(q, k, v, 0.0, causal, scale=scale)[0]

        case "bshd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                return kernel(q, k, v, 0.0, causal, scale=scale)[0].transpose(1, 2)

        case _:

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
                return kernel(q, k, v, 0.0, causal, scale=scale)[0].permute(2, 0, 1, 3)

    return run


def _masked(r: AttentionRequest) -> bool:
    """A mask and nothing else, in one call of the kernel."""
    if r.mask is None or r.needs_grad or r.needs_lse or r.sinks or r.banded or r.bias is not None:
        return False
    if r.alibi is not None or r.padded or r.packed or r.empty:
        return False
    if r.head_dim_qk != r.head_dim_v or r.strides == "last_dim":
        return False
    plan = tiles(r, pieces(r, None, None))
    return len(plan) == 1 and plan[0].piece.rows == slice(0, r.batch)


def _with_mask(r: AttentionRequest) -> Run:
    """What the one tile would come to."""
    kernel, scale, layout = KERNEL, r.scale, r.layout
    dtype = torch.float64 if r.dtype == "fp64" else torch.float32
    seen, hidden = torch.zeros((), dtype=dtype, device="cpu"), torch.full((), -math.inf, dtype=dtype, device="cpu")

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        mask: Any = operands.mask
        added = torch.where(mask if mask.ndim == 4 else four_dims(mask), seen, hidden)
        q, k, v = as_bhsd(q, layout), as_bhsd(k, layout), as_bhsd(v, layout)
        return from_bhsd(kernel(q, k, v, 0.0, False, attn_mask=added, scale=scale)[0], layout)

    return run


def _tiled(r: AttentionRequest) -> Run:
    # Imported late: it needs the CPU kernel's own operators.
    from attnrt.backends.torch_sdpa.cpu_tiles import Tiled, forward

    layout, dim_v, plan = r.layout, r.head_dim_v, _planned(r)
    attend: Callable[..., tuple[Tensor, Tensor]] = Tiled.apply if r.needs_grad else forward

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        q, k, v = (_fit(as_bhsd(t, layout), r.head_dim) for t in (q, k, v))
        out, lse = attend(q, k, v, *_added(operands), r, plan(operands))
        out = from_bhsd(out[..., :dim_v], layout)
        if not r.needs_lse:
            return out
        return out, (lse[0] if r.packed else lse).float()

    return run


def _pair(r: AttentionRequest) -> tuple[Forward, Backward]:
    from attnrt.backends.torch_sdpa import cpu_tiles

    plan = _planned(r)

    def fit(*tensors: Tensor) -> list[Tensor]:
        return [_fit(as_bhsd(t, r.layout), r.head_dim) for t in tensors]

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        arguments: tuple[Any, ...] = (*fit(q, k, v), *_added(operands), r, plan(operands))
        out, lse = cpu_tiles.forward(*arguments)
        return from_bhsd(out[..., : r.head_dim_v], r.layout), lse[0] if r.packed else lse, ()

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
        grad, q_, k_, v_, out = fit(grad, q, k, v, out)
        lse = lse[None] if r.packed else lse
        arguments: tuple[Any, ...] = (grad, q_, k_, v_, *_added(operands), out, lse, r, plan(operands), wanted[4])
        dq, dk, dv, dsinks = cpu_tiles.backward(*arguments)
        grads = (from_bhsd(d[..., : x.shape[-1]], r.layout) for d, x in ((dq, q), (dk, k), (dv, v)))
        return [*grads, None, dsinks]

    return forward, backward


def _planned(r: AttentionRequest) -> Callable[[Operands], list[Tile]]:
    """The tiles for a call's lengths; made once if there are none."""
    if not (r.packed or r.padded):
        fixed = tiles(r, pieces(r, None, None))
        return lambda operands: fixed

    def plan(operands: Operands) -> list[Tile]:
        lengths = operands[6:8] if r.packed else operands[4:6]
        return tiles(r, pieces(r, *(None if x is None else x.tolist() for x in lengths)))

    return plan


def _added(operands: Operands) -> tuple[Tensor | None, ...]:
    """mask, bias, ALiBi slopes and sinks as the tiles take them."""
    mask, bias = (None if x is None else four_dims(x) for x in (operands.mask, operands.bias))
    return mask, bias, operands.alibi_slopes, operands.sinks


def _fit(x: Tensor, head_dim: int) -> Tensor:
    """With head_dim columns, zeros in the new ones, and a contiguous last dim."""
    if x.shape[-1] < head_dim:
        return F.pad(x, (0, head_dim - x.shape[-1]))
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
