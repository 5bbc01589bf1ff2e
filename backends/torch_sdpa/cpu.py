"""PyTorch's flash kernel for the CPU: fused, linear memory, forward and backward, fp16 to fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt.backends.base import FEATURE_NAMES, Kernel, Rule, linear_bytes
from attnrt.backends.torch_sdpa.cpu_plan import MIN_ROWS, dense, mask_bytes, native_causal, pieces, tile_rows, tiles
from attnrt.backends.torch_sdpa.layouts import as_bhsd, four_dims, from_bhsd
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run


class FlashCPU(Kernel):
    name = "flash_cpu"
    title = "PyTorch's CPU flash kernel"
    prefix = "TORCH_FLASH_CPU"
    supports = FEATURE_NAMES - {"softcap", "dropout", "bias_grad", "cuda_graph"}
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
        return _plain(request) if plain(request) else _tiled(request)


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
    sdpa, causal, scale, gqa = F.scaled_dot_product_attention, r.is_causal, r.scale, r.group > 1
    allowed: Callable[[], bool] = torch.backends.cuda.flash_sdp_enabled
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if allowed():
            return sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
        # Inside somebody's sdpa_kernel(...) block that excludes flash: what was reported runs all the same.
        return kernel(q, k, v, 0.0, causal, scale=scale)[0]

    match r.layout:
        case "bhsd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                if allowed():
                    return sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
                return attend(q, k, v)

        case "bshd":

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        case _:

            def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
                q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
                return attend(q, k, v).permute(2, 0, 1, 3)

    return run


def _tiled(r: AttentionRequest) -> Run:
    # Imported late: it needs the CPU kernel's own operators.
    from attnrt.backends.torch_sdpa.cpu_tiles import Tiled

    layout, dim_v = r.layout, r.head_dim_v
    fixed = None if r.packed or r.padded else tiles(r, pieces(r, None, None))

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        q, k, v = (_fit(as_bhsd(t, layout), r.head_dim) for t in (q, k, v))
        plan = fixed
        if plan is None:
            lengths = operands[6:8] if r.packed else operands[4:6]
            plan = tiles(r, pieces(r, *(None if x is None else x.tolist() for x in lengths)))
        mask = None if operands.mask is None else four_dims(operands.mask)
        bias = None if operands.bias is None else four_dims(operands.bias)
        out, lse = Tiled.apply(q, k, v, mask, bias, operands.alibi_slopes, operands.sinks, r, plan)  # type: ignore[no-untyped-call]
        out = from_bhsd(out[..., :dim_v], layout)
        if not r.needs_lse:
            return out
        return out, (lse[0] if r.packed else lse).float()

    return run


def _fit(x: Tensor, head_dim: int) -> Tensor:
    """With head_dim columns, zeros in the new ones, and a contiguous last dim."""
    if x.shape[-1] < head_dim:
        return F.pad(x, (0, head_dim - x.shape[-1]))
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
