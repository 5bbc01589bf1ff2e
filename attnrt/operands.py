"""The tensors of a call: checked against each other once per new signature, then handed to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.lengths import (
    check_cu_seqlens_values,
    check_length_values,
    check_packing,
    check_padding,
    check_page_table,
    check_page_values,
    check_strided,
    longest_sequence,
    same_lengths,
)
from attnrt.request import (
    DTYPES,
    PAGED_LAYOUTS,
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
_fp32_precision = torch._C._get_fp32_precision_getter
_grad_enabled = torch.is_grad_enabled
_strided = torch.strided


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
    page_table: Tensor | None = None


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
    dropout_p: Any,
    cast: torch.dtype | None = None,
    grads: Sequence[bool] | None = None,
    **options: Any,
) -> AttentionRequest:
    """Check every argument of a call and freeze it into a request.

    Args:
        cast: q, k and v will have that dtype by then. grads: which of q, k, v, bias and sinks want a gradient; None
            asks the tensors and the grad mode.

    Raises:
        ArgumentTypeError: a wrong type or dtype. ArgumentError: a wrong shape, value, device or combination.
    """
    check_flag("return_lse", return_lse)
    if torch._C._get_tracing_state() is not None:
        raise ArgumentError("q", q, "attention is inside torch.jit.trace, which has no sizes; use torch.export")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, tensor, layout)
    if grads is None:
        recording = torch.is_grad_enabled()
        leaves = (q, k, v, operands.bias, operands.sinks)
        grads = [recording and isinstance(t, Tensor) and t.requires_grad for t in leaves]
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
    page_size = None
    if operands.page_table is not None:
        check_page_table(operands, layout, q, k, v, grads)
        page_size = seqlen_kv
    else:
        _check_batch(q, k, v, (batch_q, batch_kv, batch_v))
    _check_shapes(q, k, v, (heads_q, heads_kv, heads_v), (seqlen_kv, seqlen_v), (dim_qk, dim_k))
    if packed:
        batch_q, same = check_packing(operands, q, k)
        tokens_q, tokens_kv = seqlen_q, seqlen_kv
        seqlen_q = longest_sequence("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", operands.cu_seqlens_q)
        seqlen_kv = longest_sequence("max_seqlen_kv", max_seqlen_kv, "cu_seqlens_kv", operands.cu_seqlens_kv)
        if same and seqlen_q != seqlen_kv:
            raise ArgumentError("max_seqlen_kv", max_seqlen_kv, f"cu_seqlens are the same, but max_seqlen_q={seqlen_q}")
    else:
        for name, value in {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_kv}.items():
            if value is not None:
                raise ArgumentError(
                    name, value, f"only layout='thd' takes it; with {layout!r} the length is in the shape"
                )
        if operands.page_table is not None:
            seqlen_kv = operands.page_table.shape[1] * seqlen_kv
        same = check_padding(operands, batch_q, seqlen_q, seqlen_kv, q.device)
        if operands.page_table is not None and operands.seqlens_kv is not None:
            check_page_values(operands.page_table, operands.seqlens_kv, batch_kv, page_size or 1)
        tokens_q, tokens_kv = batch_q * seqlen_q, batch_q * seqlen_kv
    full = (batch_q, heads_q, seqlen_q, seqlen_kv)
    mask = _score_operand("mask", operands.mask, full, q, dtype)
    bias = _score_operand("bias", operands.bias, full, q, dtype)
    sinks = _check_sinks(operands.sinks, heads_q, q)
    if bias is not None:
        bias = replace(bias, requires_grad=grads[3])
    # With dropout always: torch.utils.checkpoint may run the forward without gradients first, and must meet the same
    # kernel, and so the same random numbers, when it runs it again.
    needs_grad = any(grads) or (isinstance(dropout_p, float) and dropout_p > 0 and operands.page_table is None)
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
        sinks_grad=grads[4],
        dropout_p=dropout_p,
        padded_q=operands.seqlens_q is not None,
        padded_kv=operands.seqlens_kv is not None,
        page_size=page_size,
        same_lengths=same,
        needs_grad=needs_grad,
        needs_lse=return_lse,
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        tf32=dtype is torch.float32 and q.is_cuda and tf32_allowed(),
        strides=_stride_class(q, k, v),
        aligned=cast is not None or _aligned(q, k, v),
        expanded=any(n > 1 and s == 0 for t in (q, k, v) for n, s in zip(t.shape, t.stride(), strict=True)),
        capturing=q.is_cuda and torch.cuda.is_current_stream_capturing(),
        **options,
    )


def tf32_allowed() -> bool:
    """PyTorch's switch for float32 matmuls on CUDA, however it was set: `torch.set_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32` (which cannot be read once the third was used), or `.fp32_precision`."""
    return bool(_fp32_precision("cuda", "matmul") == "tf32")


def check_tensor(name: str, tensor: Any, layout: str) -> None:
    check_layout(layout)
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
    check_strided(name, tensor)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_batch(q: Tensor, k: Tensor, v: Tensor, batch: tuple[int, int, int]) -> None:
    if len(set(batch)) > 1:
        said = f"q, k and v must have the same batch size: {_shapes(q, k, v)}; check layout="
        raise ArgumentError("batch", batch, said)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: Any, seqlen: tuple[int, int], dim: tuple[int, int]) -> None:
    shapes = _shapes(q, k, v)
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


def signature(operands: Operands, layout: str, q: Tensor, k: Tensor, longest: tuple[Any, Any]) -> tuple[Any, ...]:
    """What of the optional tensors a choice depends on, for a cache key; lengths on a CPU are checked on the way."""
    grad = _grad_enabled()
    parts: list[Any] = []
    before, to_read = None, False
    for t in operands:
        if t is None:
            parts.append(None)
        elif t is before:  # as cu_seqlens of self-attention
            parts.append(parts[-1])
        elif t.layout is not _strided:
            return (None,)  # nothing is ever kept under this key: `bind` refuses it
        elif t.is_cuda:  # a number: devices take thrice as long to compare
            parts.append((t.shape, t.stride(), t.dtype, t.get_device(), grad and t.requires_grad))
        else:
            to_read = True
            parts.append((t.shape, t.stride(), t.dtype, t.device, grad and t.requires_grad))
        before = t
    _, _, _, _, lengths_q, lengths_kv, cu_q, cu_kv, _ = operands
    if not to_read and (layout != "thd" or (longest[0].__class__ is int and longest[1].__class__ is int)):
        # On a GPU no value is looked at, and whatever else could be wrong is in the key: `bind` refused it.
        return (*parts, same_lengths(lengths_q, lengths_kv) or same_lengths(cu_q, cu_kv))
    if layout.__class__ is not str:  # an array, say, which is not equal to anything
        return (None,)
    dims = 3 if layout == "thd" else 4
    if q.ndim != dims or k.ndim != dims:
        return tuple(parts)
    for t in operands[4:8]:
        if t is not None and (t.dtype != torch.int32 or t.ndim != 1):
            return tuple(parts)
    if layout == "thd":
        for name, cu, tokens in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_kv", cu_kv, k.shape[0])):
            if cu is not None and cu.numel():
                check_cu_seqlens_values(name, cu, tokens)
        if cu_q is None or cu_kv is None or not cu_q.numel() or not cu_kv.numel():
            return tuple(parts)
        longest_q = longest_sequence("max_seqlen_q", longest[0], "cu_seqlens_q", cu_q)
        longest_kv = longest_sequence("max_seqlen_kv", longest[1], "cu_seqlens_kv", cu_kv)
        return (*parts, same_lengths(cu_q, cu_kv), longest_q, longest_kv)
    if operands.seqlens_q is None and operands.seqlens_kv is None:
        return tuple(parts)
    length_axis = _AXES[layout][2]
    if operands.seqlens_q is not None:
        check_length_values("seqlens_q", operands.seqlens_q, q.shape[length_axis])
    if operands.seqlens_kv is not None:
        length, table = k.shape[length_axis], operands.page_table
        if table is None:
            check_length_values("seqlens_kv", operands.seqlens_kv, length)
        elif layout in PAGED_LAYOUTS and length and table.ndim == 2 and len(table) == len(operands.seqlens_kv):
            check_length_values("seqlens_kv", operands.seqlens_kv, length * table.shape[1])
            check_page_values(table, operands.seqlens_kv, k.shape[0], length)
    return (*parts, same_lengths(operands.seqlens_q, operands.seqlens_kv))


def _score_operand(
    name: str, tensor: Any, full: tuple[int, int, int, int], q: Tensor, dtype: torch.dtype
) -> Operand | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, tensor, "a torch.Tensor is needed")
    check_strided(name, tensor)
    if name == "mask" and tensor.dtype != torch.bool:
        raise ArgumentTypeError(name, tensor, "must be bool, True = attend; an additive mask is bias=")
    if name == "bias" and tensor.dtype not in (dtype, torch.float32):
        raise ArgumentTypeError(name, tensor, f"must have q's dtype {dtype} or float32; a bool mask is mask=")
    if tensor.device != q.device:
        raise ArgumentError(name, tensor, f"must be on q's device, {q.device}")
    shape = broadcastable(name, tuple(tensor.shape), full)
    strided = tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    return Operand(shape, "bool" if name == "mask" else DTYPES[tensor.dtype], strided=strided)


def _check_alibi(slopes: Any, batch: int, heads_q: int, q: Tensor) -> Any:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
        raise ArgumentTypeError("alibi_slopes", slopes, "a float32 tensor of shape (Hq,) or (B, Hq) is needed")
    if tuple(slopes.shape) not in ((heads_q,), (batch, heads_q)):
        raise ArgumentError(
            "alibi_slopes", slopes, f"must have shape (Hq,) = ({heads_q},) or (B, Hq) = ({batch}, {heads_q})"
        )
    check_strided("alibi_slopes", slopes)
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
    check_strided("sinks", sinks)
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
    """Looked at only where a kernel could mind: a CPU tensor counts as aligned, and so does one without memory."""
    if tensors[0].is_cpu or isinstance(tensors[0], FakeTensor):
        return True
    for t in tensors:
        size = t.element_size()
        if t.data_ptr() % 16 or any(s * size % 16 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1):
            return False
    return True
