"""Random calls for hypothesis: every argument of the contract, by itself and together."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import Case
from torch import Tensor

from attnrt.operands import Operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("bhsd", "bshd", "sbhd", "thd")
STRIDES = ("contiguous", "sliced", "transposed", "expanded", "last_dim")
AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}


@st.composite
def cases(
    draw: Any,
    without: frozenset[str] = frozenset(),
    longest: int = 40,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    dims: tuple[int, ...] = (8, 16, 20),
) -> Case:
    """A call. `without` names features to leave out: softcap, bias_grad, alibi, sinks, padding, packed, window,
    bottom_right, unequal_head_dims, empty, lse, gqa, or a kind of strides."""

    def maybe(feature: str, odds: int = 3) -> bool:
        return feature not in without and draw(st.integers(1, odds)) == 1

    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from([x for x in LAYOUTS if x != "thd" or "packed" not in without]))
    heads_kv, group = (2, 1) if "gqa" in without else draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (1, 3))))
    heads = heads_kv * group
    batch = draw(st.integers(1, 3))
    dim = draw(st.sampled_from(dims))
    dim_v = draw(st.sampled_from((8, 24))) if maybe("unequal_head_dims") else dim
    lowest = 0 if maybe("empty", 8) else 1
    len_q = draw(st.integers(lowest, longest))
    len_kv = len_q if draw(st.booleans()) else draw(st.integers(lowest, longest))
    strides = draw(st.sampled_from([x for x in STRIDES if x not in without]))
    training = draw(st.integers(0, 3)) > 0
    operands: dict[str, Tensor] = {}
    packed, padded = layout == "thd", False
    shape_q, shape_kv = (batch, heads, len_q), (batch, heads_kv, len_kv)
    if packed:
        lengths_q = _lengths(batch, len_q)
        lengths_kv = lengths_q if len_q == len_kv else _lengths(batch, len_kv)
        tail = draw(st.sampled_from((0, 3)))
        operands["cu_seqlens_q"], operands["cu_seqlens_kv"] = _offsets(lengths_q), _offsets(lengths_kv)
        len_q, len_kv = int(lengths_q.max()), int(lengths_kv.max())
        shape_q = (1, heads, int(lengths_q.sum()) + tail)
        shape_kv = (1, heads_kv, int(lengths_kv.sum()) + tail)
    elif padded := maybe("padding"):
        if draw(st.booleans()):
            operands["seqlens_q"] = _lengths(batch, len_q)
        if "seqlens_q" not in operands or draw(st.booleans()):
            operands["seqlens_kv"] = _lengths(batch, len_kv)
    q = _tensor((*shape_q, dim), dtype, layout, strides)
    k = _tensor((*shape_kv, dim), dtype, layout, strides)
    v = _tensor((*shape_kv, dim_v), dtype, layout, strides)
    if packed or padded:
        _spoil(q, layout, operands.get("seqlens_q"), operands.get("cu_seqlens_q"), strides)
        for t in (k, v):
            _spoil(t, layout, operands.get("seqlens_kv"), operands.get("cu_seqlens_kv"), strides)
    full = (batch, heads, len_q, len_kv)
    if maybe("mask"):
        mask = torch.rand(_part(draw, full)) > 0.4
        if mask.shape[-2] > 1:
            mask[..., 0, :] = False
        operands["mask"] = mask
    if maybe("bias"):
        bias = torch.randn(_part(draw, full)).to(draw(st.sampled_from((dtype, torch.float32))))
        bias[torch.rand(bias.shape) < 0.2] = -math.inf
        operands["bias"] = bias.requires_grad_(training and maybe("bias_grad", 2))
    if maybe("alibi"):
        operands["alibi_slopes"] = torch.rand(draw(st.sampled_from(((heads,), (batch, heads)))))
    if maybe("sinks"):
        sinks_dtype = draw(st.sampled_from((dtype, torch.float32)))
        operands["sinks"] = torch.randn(heads).to(sinks_dtype).requires_grad_(training)
    options: dict[str, Any] = {"causal": maybe("causal"), "alignment": "top_left"}
    if maybe("window"):
        bounds = st.one_of(st.none(), st.integers(0, longest))
        options["window"] = (draw(bounds), draw(bounds))
    if "bottom_right" not in without:
        options["alignment"] = draw(st.sampled_from(("top_left", "bottom_right")))
    options["return_lse"] = "lse" not in without and draw(st.booleans())
    options["scale"] = draw(st.sampled_from((None, None, None, 0.0, -0.3, 0.7)))
    if maybe("softcap", 4):
        options["softcap"] = draw(st.sampled_from((0.5, 30.0)))
    for t in (q, k, v):
        t.requires_grad_(training)
    grad = torch.randn(*q.shape[:-1], dim_v).to(dtype)
    if torch.rand(()) < 0.3:  # by the seed, which is drawn
        operands |= {name: _every_second(t) for name, t in operands.items() if name not in ("mask", "bias")}
    return Case(q, k, v, layout, Operands(**operands), grad, options)


def _lengths(batch: int, longest: int) -> Tensor:
    """Some empty, one full."""
    lengths = torch.randint(0, longest + 1, (batch,), dtype=torch.int32)
    lengths[torch.rand(batch) < 0.2] = 0
    lengths[torch.randint(batch, ())] = longest
    return lengths


def _every_second(x: Tensor) -> Tensor:
    """The same values, as a column of a wider table."""
    table = x.detach().unsqueeze(-1).repeat(*[1] * x.ndim, 2)
    table[..., 1] = 1000
    return table[..., 0].requires_grad_(x.requires_grad)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def _part(draw: Any, full: tuple[int, int, int, int]) -> tuple[int, ...]:
    """A shape that broadcasts to `full`, of 2 to 4 dims."""
    dims = draw(st.integers(2, 4))
    return tuple(draw(st.sampled_from((1, n))) if i < 2 or n < 2 else n for i, n in enumerate(full))[4 - dims :]


def _tensor(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, strides: str) -> Tensor:
    """(B, H, S, D) numbers in the layout, stored as `strides` says."""
    if layout == "thd":
        shape = (shape[2], shape[1], 1, shape[3])
        dims: tuple[int, ...] = (shape[0], shape[1], shape[3])
    else:
        dims = tuple(shape[i] for i in AXES[layout])
    match strides:
        case "sliced":  # as q is in one qkv tensor
            return torch.randn(*dims[:-1], 3, dims[-1]).to(dtype)[..., 1, :]
        case "transposed":
            return torch.randn(dims[1], dims[0], *dims[2:]).to(dtype).transpose(0, 1)
        case "expanded":
            return torch.randn(*dims[:-2], 1, dims[-1]).to(dtype).expand(dims)
        case "last_dim":
            return torch.randn(*dims[:-1], 2 * dims[-1]).to(dtype)[..., ::2]
    return torch.randn(dims).to(dtype)


def _spoil(x: Tensor, layout: str, seqlens: Tensor | None, cu_seqlens: Tensor | None, strides: str) -> None:
    """NaN and inf where no token is."""
    if strides == "expanded":
        return
    if cu_seqlens is not None:
        x[int(cu_seqlens[-1]) :] = math.nan
    for b, n in enumerate([] if seqlens is None else seqlens.tolist()):
        sequence = {"bhsd": x[b : b + 1, :, n:], "bshd": x[b : b + 1, n:]}.get(layout, x[n:, b : b + 1])
        sequence.fill_(math.nan if b % 2 else math.inf)
