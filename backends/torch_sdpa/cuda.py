"""PyTorch's three fused CUDA kernels, each called by its own operator.

Not through `torch.nn.attention.sdpa_kernel`: its switches are global to the process, so two threads would fight over
them, and a call inside somebody else's switch would quietly run another kernel than the one reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt.backends.base import Kernel, Rule, linear_bytes
from attnrt.backends.torch_sdpa.cuda_flash import attend as flash_attend
from attnrt.backends.torch_sdpa.cuda_flash import pair as flash_pair
from attnrt.backends.torch_sdpa.cuda_pairs import cudnn_pair, efficient_pair
from attnrt.backends.torch_sdpa.layouts import TORCH_DTYPES, as_bhsd, from_bhsd
from attnrt.backends.torch_sdpa.math import additive_mask
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

SDP_UTILS = "PyTorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"


def _device(prefix: str, title: str, lowest: int, highest: int | None = None) -> Rule:
    span = f"sm{lowest} or newer" if highest is None else f"sm{lowest} to sm{highest}"
    return Rule(
        f"{prefix}_DEVICE",
        lambda r, e: e.sm is None or e.sm < lowest or (highest is not None and e.sm > highest),
        f"{title} runs on NVIDIA GPUs from {span}, not on {{e.arch}}",
        source=SDP_UTILS,
    )


def _half(prefix: str, title: str) -> Rule:
    return Rule(
        f"{prefix}_DTYPE",
        lambda r, e: r.dtype not in ("fp16", "bf16"),
        f"{title} takes fp16 and bf16, not {{r.dtype}}",
        remedy="cast q, k and v to bf16",
        source=SDP_UTILS,
    )


def _scale(prefix: str, title: str) -> Rule:
    return Rule(
        f"{prefix}_SCALE",
        lambda r, e: r.scale <= 0,
        f"{title} takes a scale over 0, not {{r.scale}}: it hides scores before it scales them",
        source="measured: NaN or wrong rows under a causal mask",
    )


class CUDAKernel(Kernel):
    def runs_on(self, environment: Environment) -> bool:
        return environment.device_type == "cuda"


class CuDNN(CUDAKernel):
    """cuDNN through PyTorch. Masks are left to other kernels, which are known to give zeros for dead rows."""

    name = "cudnn"
    title = "PyTorch's cuDNN kernel"
    prefix = "TORCH_CUDNN"
    supports = frozenset({"gqa", "causal", "dropout", "backward", "cuda_graph", "lse", "lse_backward"})
    rules = (
        _device("TORCH_CUDNN", "PyTorch's cuDNN kernel", 80),
        _half("TORCH_CUDNN", "PyTorch's cuDNN kernel"),
        _scale("TORCH_CUDNN", "PyTorch's cuDNN kernel"),
        Rule(
            "TORCH_CUDNN_PREFERENCE",
            lambda r, e: e.sm not in (90, 100, 103) or not e.has("cudnn", ">9.15.0"),
            "PyTorch itself prefers cuDNN only on sm90, sm100 and sm103 with cuDNN over 9.15.0; this is {e.arch}",
            remedy="pip install -U nvidia-cudnn-cu13",
            source="PyTorch, check_prefer_cudnn_attention",
        ),
        Rule(
            "TORCH_CUDNN_HEAD_DIM",
            lambda r, e: r.head_dim_qk % 8 != 0 or r.head_dim_qk > 128,
            "PyTorch's cuDNN kernel takes head dims that are multiples of 8 up to 128, not {r.head_dim_qk}",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_CUDNN_DROPOUT",
            lambda r, e: (r.dropout_p * 16) % 1 != 0 or (r.dropout_p > 0 and e.has("cudnn", ">=9.11,<9.14")),
            "PyTorch's cuDNN kernel takes dropout_p in steps of 1/16, and none on cuDNN 9.11 to 9.13",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_CUDNN_SEQLEN",
            lambda r, e: r.seqlen_kv == 1,
            "PyTorch's cuDNN kernel does not take a single key",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_CUDNN_SIZE",
            lambda r, e: r.batch > 65535 or r.heads_q > 65535,
            "PyTorch's cuDNN kernel takes at most 65535 batch rows and heads",
            source=SDP_UTILS,
        ),
    )

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        r = request
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            q, k, v = as_bhsd(q, r.layout), as_bhsd(k, r.layout), as_bhsd(v, r.layout)
            wants_lse = r.needs_grad or r.needs_lse
            out, lse, *_ = attend(q, k, v, None, wants_lse, r.dropout_p, r.is_causal, False, scale=r.scale)
            out = from_bhsd(out, r.layout)
            return (out, lse.detach().view(q.shape[:3])) if r.needs_lse else out

        return run

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        return cudnn_pair(request)


class Flash(CUDAKernel):
    """The flash-attn 2 inside PyTorch, by the operator under SDPA and varlen_attn: windows, packing, LSE, sinks."""

    name = "flash"
    title = "PyTorch's flash kernel"
    prefix = "TORCH_FLASH"
    supports = frozenset(
        {
            "backward",
            "bottom_right",
            "causal",
            "cuda_graph",
            "dropout",
            "gqa",
            "lse",
            "lse_backward",
            "packed",
            "sinks",
            "window",
        }
    )
    rules = (
        _device("TORCH_FLASH", "PyTorch's flash kernel", 80, 121),
        _half("TORCH_FLASH", "PyTorch's flash kernel"),
        _scale("TORCH_FLASH", "PyTorch's flash kernel"),
        Rule(
            "TORCH_FLASH_HEAD_DIM",
            lambda r, e: r.head_dim_qk % 8 != 0 or r.head_dim_qk > 256,
            "PyTorch's flash kernel takes head dims that are multiples of 8 up to 256, not {r.head_dim_qk}",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_FLASH_BACKWARD_HEAD_DIM",
            lambda r, e: r.needs_grad and r.head_dim_qk > 192 and e.sm in (86, 89, 120, 121),
            "PyTorch's flash backward on {e.arch} takes head dims up to 192, not {r.head_dim_qk}",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_FLASH_PACKED_SINGLE",
            lambda r, e: r.packed and r.group > 1 and r.seqlen_q <= 1,
            "PyTorch's flash kernel folds a packed batch of single queries over {r.group} heads a KV head as if no "
            "sequence were empty",
            source="measured: PyTorch 2.11, H200",
        ),
        Rule(
            "TORCH_FLASH_OPEN_WINDOW",
            # flash-attn 2 stands in Skv for an unbounded right side, which early queries outreach when Sq > Skv.
            lambda r, e: r.windowed and r.seqlen_q > r.seqlen_kv and (r.right is None or r.right >= r.seqlen_kv),
            "PyTorch's flash kernel cuts a window's open right side short when queries outnumber keys",
        ),
    )

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Linear; a backward with shared KV heads makes dk and dv for every query head, then sums them."""
        r = request
        expanded = r.tokens_kv * r.heads_q * r.head_dim_qk * 2 * r.itemsize
        return linear_bytes(r) + (expanded if r.needs_grad and r.group > 1 else 0)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        return ("applies the sinks to its output by the log-sum-exp",) if request.sinks else ()

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        return flash_attend(request)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        return flash_pair(request)


class Efficient(CUDAKernel):
    """The memory-efficient kernel: fp32, masks and biases, unequal head dims."""

    name = "efficient"
    title = "PyTorch's memory-efficient kernel"
    prefix = "TORCH_EFFICIENT"
    supports = frozenset(
        {
            "backward",
            "bias",
            "bias_grad",
            "causal",
            "cuda_graph",
            "dropout",
            "gqa",
            "lse",
            "lse_backward",
            "mask",
            "top_left",
            "unequal_head_dims",
        }
    )
    rules = (
        _device("TORCH_EFFICIENT", "PyTorch's memory-efficient kernel", 50),
        Rule(
            "TORCH_EFFICIENT_DTYPE",
            lambda r, e: r.dtype not in ("fp16", "bf16", "fp32") or (r.dtype == "bf16" and (e.sm or 0) < 80),
            "PyTorch's memory-efficient kernel takes fp16, fp32 and, from sm80, bf16, not {r.dtype} on {e.arch}",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_EFFICIENT_HEAD_DIM",
            lambda r, e: any(d * r.itemsize % 16 for d in (r.head_dim_qk, r.head_dim_v)),
            "PyTorch's memory-efficient kernel takes head dims of whole 16 bytes, not {r.head_dim_qk} / {r.head_dim_v}",
            source=SDP_UTILS,
        ),
        Rule(
            "TORCH_EFFICIENT_LSE",
            lambda r, e: r.needs_lse and (r.mask is not None or r.bias is not None),
            "PyTorch's memory-efficient kernel gives no exact LSE to rows that a mask or bias leaves without a key",
        ),
    )

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Linear, but for an additive mask of the shape of the user's own, and the bias's gradient in full."""
        r = request
        added = max((o.elements for o in (r.mask, r.bias) if o is not None), default=0)
        if added and r.is_causal:
            added = max(added, r.seqlen_q * r.seqlen_kv)
        grad = r.scores * r.itemsize if r.bias is not None and r.bias.requires_grad else 0
        repeated = r.tokens_kv * r.heads_q * (r.head_dim_qk + r.head_dim_v) * r.itemsize if r.group > 1 else 0
        return linear_bytes(r) + 2 * added * r.itemsize + grad + repeated * (2 if r.needs_grad else 1)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        said = []
        if request.mask is not None or (request.bias is not None and request.is_causal):
            said.append("makes one additive mask of those given: a copy as large as they are")
        if request.group > 1:
            said.append(f"repeats k and v {request.group} times: a linear copy")
        return tuple(said)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        r = request
        attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
        combined = r.mask is not None or r.bias is not None
        causal, dtype = r.is_causal and not combined, TORCH_DTYPES[r.dtype]

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            added = _aligned(r, additive_mask(r, operands, dtype, q.device)) if combined else None
            q, k, v = as_bhsd(q, r.layout), as_bhsd(k, r.layout), as_bhsd(v, r.layout)
            if r.group > 1:
                k, v = k.repeat_interleave(r.group, 1), v.repeat_interleave(r.group, 1)
            wants_lse = r.needs_grad or r.needs_lse
            out, lse, *_ = attend(q, k, v, added, wants_lse, r.dropout_p, causal, scale=r.scale)
            out = from_bhsd(out, r.layout)
            return (out, lse.detach()[..., : r.seqlen_q]) if r.needs_lse else out

        return run

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        if request.mask is not None or request.bias is not None:
            raise NotImplementedError("a pair of PyTorch's memory-efficient kernel takes no mask or bias")
        return efficient_pair(request)


def _aligned(r: AttentionRequest, added: Tensor) -> Tensor:
    """As the kernel reads it: (B, Hq, Sq, Skv), the first three by stride 0 if need be, rows of whole 16 bytes."""
    shape = (r.batch, r.heads_q, r.seqlen_q, r.seqlen_kv)
    added = added.expand(*added.shape[:-1], r.seqlen_kv)
    if r.seqlen_kv % 8:
        added = F.pad(added, (0, -r.seqlen_kv % 8))[..., : r.seqlen_kv]
    else:
        added = added.contiguous()
    return added.expand(shape)
