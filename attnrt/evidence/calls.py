"""One attention call by its sizes, its tensors, and how much work it is."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attnrt.environment import Environment
from attnrt.operands import Operands, bind
from attnrt.request import DTYPES, AttentionRequest

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
BACKWARD = 2.5
"""Flops of a backward over those of its forward: five products of matrices for two."""
_AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}


class Call(BaseModel):
    """Sizes and features, as `AttentionRequest.from_shape` takes them. Hashable, and plain data in a results file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    batch: int = 1
    heads_q: int
    heads_kv: int | None = None
    seqlen_q: int
    seqlen_kv: int | None = None
    head_dim: int = 128
    head_dim_v: int | None = None
    dtype: str = "bf16"
    layout: str | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = Field(default=None, strict=False)
    alignment: Literal["top_left", "bottom_right"] | None = None
    packed: bool = False
    padded: bool | Literal["kv"] = False
    page_size: int | None = None
    training: bool = False
    mask: bool = False
    bias: bool = False
    bias_grad: bool = False
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    return_lse: bool = False
    deterministic: bool = False

    def request(self) -> AttentionRequest:
        """
        Raises:
            ArgumentError, ArgumentTypeError: a size, name or combination cannot be right.
        """
        return AttentionRequest.from_shape(**self.model_dump())

    def sizes(self) -> dict[str, Any]:
        """What was given, and what it leaves out no more: the shortest description that makes it again."""
        return self.model_dump(exclude_defaults=True, mode="json")

    def changed(self, **changes: Any) -> Self:
        return self.model_validate({**self.model_dump(), **changes})

    def __str__(self) -> str:
        return self.request().describe()


class Tensors(NamedTuple):
    """The tensors of a call, and the request that they make."""

    q: Tensor
    k: Tensor
    v: Tensor
    operands: Operands
    request: AttentionRequest

    def leaves(self) -> dict[str, Tensor]:
        """Those that want a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.operands.bias, "sinks": self.operands.sinks}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def device_of(environment: Environment) -> torch.device:
    """The device that it describes."""
    if environment.device_index is None:
        return torch.device(environment.device_type)
    return torch.device(environment.device_type, environment.device_index)


def tensors(call: Call, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    """Normal random q, k, v and operands of the call. Padded lengths lie between half and all of the slots."""
    r = call.request()
    device = torch.device(device)
    random = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"device": device, "generator": random}
    dtype = TORCH_DTYPES[r.dtype]

    def normal(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=device, generator=random).to(dtype).requires_grad_(grad)

    def lengths(slots: int) -> Tensor:
        found: Tensor = torch.randint(max(1, slots // 2), slots + 1, (r.batch,), dtype=torch.int32, **on)
        found[-1:] = slots
        return found

    def offsets(slots: int) -> Tensor:
        return (torch.arange(r.batch + 1, device=device) * slots).to(torch.int32)

    def shape(heads: int, slots: int, dim: int) -> tuple[int, ...]:
        if r.packed:
            return (r.batch * slots, heads, dim)
        full = (r.batch, heads, slots, dim)
        return tuple(full[axis] for axis in _AXES[r.layout])

    operands: dict[str, Tensor] = {}
    q = normal(*shape(r.heads_q, r.seqlen_q, r.head_dim_qk), grad=r.needs_grad)
    if r.page_size is not None:
        pages = r.seqlen_kv // r.page_size
        table = torch.randperm(r.batch * pages, **on).reshape(r.batch, pages)
        operands["page_table"] = table.to(torch.int32)
        pool = (r.batch * pages, r.page_size, r.heads_kv), (r.batch * pages, r.heads_kv, r.page_size)
        shape_kv = pool[r.layout == "bhsd"]
        k, v = normal(*shape_kv, r.head_dim_qk), normal(*shape_kv, r.head_dim_v)
    else:
        k = normal(*shape(r.heads_kv, r.seqlen_kv, r.head_dim_qk), grad=r.needs_grad)
        v = normal(*shape(r.heads_kv, r.seqlen_kv, r.head_dim_v), grad=r.needs_grad)
    if r.packed:
        operands["cu_seqlens_q"] = offsets(r.seqlen_q)
        same = r.seqlen_q == r.seqlen_kv
        operands["cu_seqlens_kv"] = operands["cu_seqlens_q"] if same else offsets(r.seqlen_kv)
    if r.padded_q:
        operands["seqlens_q"] = lengths(r.seqlen_q)
    if r.padded_kv:
        operands["seqlens_kv"] = operands["seqlens_q"] if r.same_lengths else lengths(r.seqlen_kv)
    if r.mask is not None:
        mask = torch.rand(r.mask.shape, **on) > 0.1
        mask[..., 0] = True
        operands["mask"] = mask
    if r.bias is not None:
        operands["bias"] = normal(*r.bias.shape, grad=r.bias.requires_grad)
    if r.alibi is not None:
        operands["alibi_slopes"] = torch.rand(r.heads_q, **on)
    if r.sinks:
        operands["sinks"] = normal(r.heads_q, grad=r.sinks_grad)
    bound = Operands(**operands)
    return Tensors(q, k, v, bound, _bound(r, q, k, v, bound))


def _bound(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> AttentionRequest:
    """The request that these tensors make, strides and alignment of their pointers included."""
    longest = (r.seqlen_q, r.seqlen_kv) if r.packed else (None, None)
    with torch.set_grad_enabled(r.needs_grad):
        return bind(
            q,
            k,
            v,
            operands,
            layout=r.layout,
            causal=r.causal and r.banded,  # a bound that excludes nothing has no alignment any more
            window=r.window if r.banded else None,
            alignment=r.alignment,
            softcap=r.softcap,
            dropout_p=r.dropout_p,
            scale=r.scale,
            max_seqlen_q=longest[0],
            max_seqlen_kv=longest[1],
            deterministic=r.deterministic,
            return_lse=r.needs_lse,
        )


def pairs(r: AttentionRequest) -> float:
    """Pairs of a query and a key it sees, over the batch, for one head. Padding and masks are not known to it."""
    batch = r.tokens_q / max(1, r.seqlen_q)
    if not r.banded:
        return batch * r.seqlen_q * r.seqlen_kv
    at = torch.arange(r.seqlen_q, dtype=torch.float64)
    if r.alignment == "bottom_right":
        at += r.seqlen_kv - r.seqlen_q
    last = torch.full_like(at, r.seqlen_kv - 1) if r.right is None else (at + r.right).clamp(max=r.seqlen_kv - 1)
    first = torch.zeros_like(at) if r.left is None else (at - r.left).clamp(min=0)
    return batch * float((last - first + 1).clamp(min=0).sum())


def flops(r: AttentionRequest, direction: str = "forward") -> float:
    """Of the two products of matrices of a forward, over the pairs that are seen; a backward has five."""
    forward = 2 * (r.head_dim_qk + r.head_dim_v) * r.heads_q * pairs(r)
    return forward * {"forward": 1.0, "backward": BACKWARD, "both": 1 + BACKWARD}[direction]


def _seen(r: AttentionRequest) -> float:
    """Of a sequence's keys, the part from the first that any query sees to the last."""
    if not r.banded or not r.seqlen_q or not r.seqlen_kv:
        return 1.0
    shift = r.seqlen_kv - r.seqlen_q if r.alignment == "bottom_right" else 0
    first = 0 if r.left is None else max(0, shift - r.left)
    last = r.seqlen_kv - 1 if r.right is None else min(r.seqlen_kv - 1, r.seqlen_q - 1 + shift + r.right)
    return max(0, last - first + 1) / r.seqlen_kv


def traffic(r: AttentionRequest, direction: str = "forward") -> int:
    """Bytes that have to be read or written at least once: q, the output, and k and v as far as a query sees them; for
    a backward also the output's gradient, and those of q, k and v."""
    q = r.tokens_q * r.heads_q * r.head_dim_qk
    out = r.tokens_q * r.heads_q * r.head_dim_v
    every = r.heads_kv * (r.head_dim_qk + r.head_dim_v)
    kv, kv_grad = round(r.tokens_kv * _seen(r)) * every, r.tokens_kv * every
    extra = sum(o.elements for o in (r.bias, r.mask) if o is not None)
    forward = (q + kv + out + extra) * r.itemsize
    backward = (2 * (q + out) + kv + kv_grad + extra) * r.itemsize
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]
