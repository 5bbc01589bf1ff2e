"""The tensors of a call: checked against each other once per new signature, then handed to a backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.request import (
    DTYPES,
    AttentionRequest,
    Operand,
    broadcastable,
    check_flag,
    check_groups,
    check_layout,
    check_size,
)

_LAYOUT_DIMS = {"bhsd": "(B, H, S, D)", "bshd": "(B, S, H, D)", "sbhd": "(S, B, H, D)", "thd": "(T, H, D)"}
_AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3)}
"""Where B, H, S and D stand in each layout."""


class Operands(NamedTuple):
    """The optional tensors of a call, as the user passed them."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_kv: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None


NO_OPERANDS = Operands()


def bind(
    q: Any,
    k: Any,
    v: Any,
    operands: Operands,
    *,
    layout: Any,
    max_seqlen_q: Any,
    max_seqlen_kv: Any,
    deterministic: Any,
    return_lse: Any,
    cast: torch.dtype | None = None,
    **options: Any,
) -> AttentionRequest:
    """Check every argument of a call and freeze it into a request. `cast`: q, k and v will have that dtype by then.

    Raises:
        ArgumentTypeError: a wrong type or dtype. ArgumentError: a wrong shape, value, device or combination.
    """
    check_layout(layout)
    check_flag("return_lse", return_lse)
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _check_tensor(name, tensor, layout)
    dtypes = tuple(t.dtype if cast is None or t.dtype == torch.float64 else cast for t in (q, k, v))
    if len(set(dtypes)) > 1:
        raise ArgumentTypeError("dtype", dtypes, "q, k and v must share one dtype; cast them")
    dtype = dtypes[0]
    if not q.device == k.device == v.device:
        raise ArgumentError("device", (str(q.device), str(k.device), str(v.device)), "q, k and v must share one device")
    packed = layout == "thd"
    if packed:
        (tokens_q, heads_q, dim_qk), (tokens_kv, heads_kv, dim_k), (tokens_v, heads_v, dim_v) = (
            q.shape,
            k.shape,
            v.shape,
        )
        batch_q = batch_kv = batch_v = 0
        seqlen_q, seqlen_kv, seqlen_v = tokens_q, tokens_kv, tokens_v
    else:
        axes = _AXES[layout]
        (
            (batch_q, heads_q, seqlen_q, dim_qk),
            (batch_kv, heads_kv, seqlen_kv, dim_k),
            (batch_v, heads_v, seqlen_v, dim_v),
        ) = ([t.shape[a] for a in axes] for t in (q, k, v))
    _check_shapes(
        q, k, v, (batch_q, batch_kv, batch_v), (heads_q, heads_kv, heads_v), (seqlen_kv, seqlen_v), (dim_qk, dim_k)
    )
    if packed:
        batch_q, same = _check_packing(operands, q, k)
        tokens_q, tokens_kv = seqlen_q, seqlen_kv
        seqlen_q = _longest("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", operands.cu_seqlens_q)
        seqlen_kv = _longest("max_seqlen_kv", max_seqlen_kv, "cu_seqlens_kv", operands.cu_seqlens_kv)
        if same and seqlen_q != seqlen_kv:
            raise ArgumentError("max_seqlen_kv", max_seqlen_kv, f"cu_seqlens are the same, but max_seqlen_q={seqlen_q}")
    else:
        for name, value in {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_kv}.items():
            if value is not None:
                raise ArgumentError(
                    name, value, f"only layout='thd' takes it; with {layout!r} the length is in the shape"
                )
        same = _check_padding(operands, batch_q, seqlen_q, seqlen_kv, q.device)
        tokens_q, tokens_kv = batch_q * seqlen_q, batch_q * seqlen_kv
    full = (batch_q, heads_q, seqlen_q, seqlen_kv)
    mask = _score_operand("mask", operands.mask, full, q, dtype)
    bias = _score_operand("bias", operands.bias, full, q, dtype)
    sinks = _check_sinks(operands.sinks, heads_q, q)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, operands.bias, operands.sinks)
    )
    return AttentionRequest.build(
        dtype=DTYPES[dtype],
        layout=layout,
        batch=batch_q,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        head_dim_qk=dim_qk,
        head_dim_v=dim_v,
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        mask=mask,
        bias=bias,
        alibi=_check_alibi(operands.alibi_slopes, batch_q, heads_q, q),
        sinks=sinks,
        sinks_grad=needs_grad and operands.sinks is not None and operands.sinks.requires_grad,
        padded_q=operands.seqlens_q is not None,
        padded_kv=operands.seqlens_kv is not None,
        same_lengths=same,
        needs_grad=needs_grad,
        needs_lse=return_lse,
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        strides=_stride_class(q, k, v),
        aligned=cast is not None or _aligned(q, k, v),
        expanded=any(n > 1 and s == 0 for t in (q, k, v) for n, s in zip(t.shape, t.stride(), strict=True)),
        capturing=q.is_cuda and torch.cuda.is_current_stream_capturing(),
        compiled=torch.compiler.is_compiling(),
        **options,
    )


def _check_tensor(name: str, tensor: Any, layout: str) -> None:
    dims = len(_LAYOUT_DIMS[layout].split(","))
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, tensor, f"a torch.Tensor of shape {_LAYOUT_DIMS[layout]} is needed")
    if tensor.dtype not in DTYPES:
        raise ArgumentTypeError(f"{name}.dtype", tensor.dtype, f"must be one of {', '.join(str(d) for d in DTYPES)}")
    if tensor.ndim != dims:
        hint = "; packed sequences are layout='thd'" if tensor.ndim == 3 else ""
        raise ArgumentError(
            f"{name}.shape", tuple(tensor.shape), f"layout={layout!r} has {dims} dims {_LAYOUT_DIMS[layout]}{hint}"
        )
    _check_strided(name, tensor)


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ArgumentTypeError(f"{name}.layout", tensor.layout, "a dense (strided) tensor is needed: .to_dense()")


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, batch: Any, heads: Any, seqlen: tuple[int, int], dim: tuple[int, int]
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if len(set(batch)) > 1:
        raise ArgumentError("batch", batch, f"q, k and v must have the same batch size: {shapes}; check layout=")
    if heads[1] != heads[2]:
        raise ArgumentError("heads_kv", heads[1:], f"k and v must have the same number of heads: {shapes}")
    if seqlen[0] != seqlen[1]:
        raise ArgumentError("seqlen_kv", seqlen, f"k and v must have the same length: {shapes}; check layout=")
    if dim[0] != dim[1]:
        raise ArgumentError("head_dim", dim, f"q and k must have the same head dim: {shapes}")
    for name, size in {
        "heads_q": heads[0],
        "heads_kv": heads[1],
        "head_dim": dim[0],
        "head_dim_v": v.shape[-1],
    }.items():
        check_size(name, size, at_least=1)
    check_groups(heads[0], heads[1])


def _check_lengths(name: str, tensor: Any, size: int, device: torch.device, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, tensor, f"an int32 tensor of shape ({what},) is needed")
    if tensor.dtype != torch.int32:
        raise ArgumentTypeError(name, tensor, f"must be int32: pass {name}.to(torch.int32)")
    _check_strided(name, tensor)
    if size >= 0 and tuple(tensor.shape) != (size,):
        raise ArgumentError(name, tensor, f"must have shape ({what},) = ({size},)")
    if tensor.ndim != 1:
        raise ArgumentError(name, tensor, f"must have shape ({what},)")
    if tensor.device != device:
        raise ArgumentError(name, tensor, f"must be on q's device, {device}")


def _check_padding(operands: Operands, batch: int, seqlen_q: int, seqlen_kv: int, device: torch.device) -> bool:
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        if getattr(operands, name) is not None:
            raise ArgumentError(
                name, getattr(operands, name), "only layout='thd' takes it; padded batches use seqlens_*"
            )
    for name, longest in {"seqlens_q": seqlen_q, "seqlens_kv": seqlen_kv}.items():
        if (tensor := getattr(operands, name)) is not None:
            _check_lengths(name, tensor, batch, device, "B")
            check_length_values(name, tensor, longest)
    return _same(operands.seqlens_q, operands.seqlens_kv)


def check_length_values(name: str, tensor: Tensor, longest: int) -> None:
    """Lengths lie in 0..longest. Checked on the CPU only: on a GPU the values are not read, since that would sync."""
    if tensor.is_cpu and tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) <= longest):
        raise ArgumentError(name, tensor.tolist(), f"each length must lie in 0..{longest}")


def check_cu_seqlens_values(name: str, tensor: Tensor, tokens: int) -> None:
    """Start at 0, never fall, end at or before the last token (tokens after it belong to no sequence). CPU only."""
    if tensor.is_cpu:
        steps = tensor.tolist()
        if steps[0] != 0 or any(a > b for a, b in pairwise(steps)) or steps[-1] > tokens:
            raise ArgumentError(name, steps, f"must start at 0, never fall, and end at no more than {tokens} tokens")


def _check_packing(operands: Operands, q: Tensor, k: Tensor) -> tuple[int, bool]:
    for name in ("seqlens_q", "seqlens_kv"):
        if getattr(operands, name) is not None:
            raise ArgumentError(
                name, getattr(operands, name), "layout='thd' gives lengths by cu_seqlens_*, not seqlens_*"
            )
    batch = -1
    for name, tokens in {"cu_seqlens_q": q.shape[0], "cu_seqlens_kv": k.shape[0]}.items():
        tensor = getattr(operands, name)
        if tensor is None:
            raise ArgumentError(
                name, None, "layout='thd' needs cu_seqlens_q and cu_seqlens_kv (the same tensor for self-attention)"
            )
        _check_lengths(name, tensor, batch + 1 if batch >= 0 else -1, q.device, "B+1")
        if not tensor.numel():
            raise ArgumentError(name, tensor, "must hold B + 1 offsets, the first of them 0")
        batch = tensor.numel() - 1
        check_cu_seqlens_values(name, tensor, tokens)
    return batch, _same(operands.cu_seqlens_q, operands.cu_seqlens_kv)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Both given and equal. Equal values of two tensors are seen on the CPU only; elsewhere it must be one tensor."""
    if a is None or b is None:
        return False
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    return a.is_cpu and b.is_cpu and torch.equal(a, b)


def _longest(name: str, value: Any, source: str, cu_seqlens: Tensor | None) -> int:
    """The longest sequence: as given, or read from cu_seqlens, which on a GPU costs one synchronisation."""
    assert cu_seqlens is not None
    if value is not None:
        check_size(name, value, at_least=0)
        if not cu_seqlens.is_cpu:
            return int(value)
    actual = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    if value is not None and value < actual:
        raise ArgumentError(name, value, f"{source} has a sequence of {actual} tokens; pass at least that, or None")
    return actual if value is None else int(value)


def signature(operands: Operands, layout: str, q: Tensor, k: Tensor, longest: tuple[Any, Any]) -> tuple[Any, ...]:
    """What of the optional tensors a choice depends on, for a cache key; lengths on a CPU are checked on the way."""
    if any(t is not None and t.layout != torch.strided for t in operands):
        return (None,)  # nothing is ever kept under this key: `bind` refuses it
    grad = torch.is_grad_enabled()
    parts = tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, grad and t.requires_grad) for t in operands
    )
    dims = len(_LAYOUT_DIMS[layout].split(","))
    if (
        q.ndim != dims
        or k.ndim != dims
        or any(t.dtype != torch.int32 or t.ndim != 1 for t in operands[4:] if t is not None)
    ):
        return parts
    if layout == "thd":
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        for name, cu, tokens in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_kv", cu_kv, k.shape[0])):
            if cu is not None and cu.numel():
                check_cu_seqlens_values(name, cu, tokens)
        if cu_q is None or cu_kv is None or not cu_q.numel() or not cu_kv.numel():
            return parts
        longest_q = _longest("max_seqlen_q", longest[0], "cu_seqlens_q", cu_q)
        longest_kv = _longest("max_seqlen_kv", longest[1], "cu_seqlens_kv", cu_kv)
        return (*parts, _same(cu_q, cu_kv), longest_q, longest_kv)
    if operands.seqlens_q is None and operands.seqlens_kv is None:
        return parts
    length_axis = _AXES[layout][2]
    if operands.seqlens_q is not None:
        check_length_values("seqlens_q", operands.seqlens_q, q.shape[length_axis])
    if operands.seqlens_kv is not None:
        check_length_values("seqlens_kv", operands.seqlens_kv, k.shape[length_axis])
    return (*parts, _same(operands.seqlens_q, operands.seqlens_kv))


def _score_operand(
    name: str, tensor: Any, full: tuple[int, int, int, int], q: Tensor, dtype: torch.dtype
) -> Operand | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, tensor, "a torch.Tensor is needed")
    _check_strided(name, tensor)
    if name == "mask" and tensor.dtype != torch.bool:
        raise ArgumentTypeError(name, tensor, "must be bool, True = attend; an additive mask is bias=")
    if name == "bias" and tensor.dtype not in (dtype, torch.float32):
        raise ArgumentTypeError(name, tensor, f"must have q's dtype {dtype} or float32; a bool mask is mask=")
    if tensor.device != q.device:
        raise ArgumentError(name, tensor, f"must be on q's device, {q.device}")
    shape = broadcastable(name, tuple(tensor.shape), full)
    strided = tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    requires_grad = torch.is_grad_enabled() and tensor.requires_grad
    return Operand(shape, "bool" if name == "mask" else DTYPES[tensor.dtype], requires_grad, strided)


def _check_alibi(slopes: Any, batch: int, heads_q: int, q: Tensor) -> Any:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
        raise ArgumentTypeError("alibi_slopes", slopes, "a float32 tensor of shape (Hq,) or (B, Hq) is needed")
    if tuple(slopes.shape) not in ((heads_q,), (batch, heads_q)):
        raise ArgumentError(
            "alibi_slopes", slopes, f"must have shape (Hq,) = ({heads_q},) or (B, Hq) = ({batch}, {heads_q})"
        )
    _check_strided("alibi_slopes", slopes)
    if slopes.device != q.device:
        raise ArgumentError("alibi_slopes", slopes, f"must be on q's device, {q.device}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "alibi_slopes", slopes, "has no gradient here; detach it, or pass learnable slopes as bias="
        )
    return "heads" if slopes.ndim == 1 else "batch_heads"


def _check_sinks(sinks: Any, heads_q: int, q: Tensor) -> bool:
    if sinks is None:
        return False
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise ArgumentTypeError("sinks", sinks, "a floating-point tensor of shape (Hq,) is needed")
    _check_strided("sinks", sinks)
    if tuple(sinks.shape) != (heads_q,):
        raise ArgumentError("sinks", sinks, f"must have shape (Hq,) = ({heads_q},)")
    if sinks.device != q.device:
        raise ArgumentError("sinks", sinks, f"must be on q's device, {q.device}")
    return True


def _stride_class(*tensors: Tensor) -> Any:
    if all(t.is_contiguous() for t in tensors):
        return "contiguous"
    return "strided" if all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors) else "last_dim"


def _aligned(*tensors: Tensor) -> bool:
    """Looked at only where a kernel could mind: a CPU tensor counts as aligned."""
    if tensors[0].is_cpu or torch.compiler.is_compiling():
        return True
    for t in tensors:
        size = t.element_size()
        if t.data_ptr() % 16 or any(s * size % 16 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1):
            return False
    return True
