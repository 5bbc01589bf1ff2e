"""How much of a batch is real: padded lengths, packed offsets and page tables, checked against the tensors they cut.

Values are read where that waits for nothing: on the CPU, and not while a graph is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.request import check_paged_layout, check_size

if TYPE_CHECKING:
    from attnrt.operands import Operands


def has_values(tensor: Tensor) -> bool:
    """They can be read without waiting for a device. While a graph is traced there are none."""
    return tensor.is_cpu and not isinstance(tensor, FakeTensor)


def check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ArgumentTypeError(f"{name}.layout", tensor.layout, "a dense (strided) tensor is needed: .to_dense()")


def _check_lengths(name: str, tensor: Any, size: int, device: torch.device, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, tensor, f"an int32 tensor of shape ({what},) is needed")
    if tensor.dtype != torch.int32:
        raise ArgumentTypeError(name, tensor, f"must be int32: pass {name}.to(torch.int32)")
    check_strided(name, tensor)
    if size >= 0 and tuple(tensor.shape) != (size,):
        raise ArgumentError(name, tensor, f"must have shape ({what},) = ({size},)")
    if tensor.ndim != 1:
        raise ArgumentError(name, tensor, f"must have shape ({what},)")
    if tensor.device != device:
        raise ArgumentError(name, tensor, f"must be on q's device, {device}")


def check_padding(operands: Operands, batch: int, seqlen_q: int, seqlen_kv: int, device: torch.device) -> bool:
    """`seqlens_*` of a padded batch. Returns whether queries and keys have the same lengths."""
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        if getattr(operands, name) is not None:
            raise ArgumentError(
                name, getattr(operands, name), "only layout='thd' takes it; padded batches use seqlens_*"
            )
    for name, longest in {"seqlens_q": seqlen_q, "seqlens_kv": seqlen_kv}.items():
        if (tensor := getattr(operands, name)) is not None:
            _check_lengths(name, tensor, batch, device, "B")
            check_length_values(name, tensor, longest)
    return same_lengths(operands.seqlens_q, operands.seqlens_kv)


def check_length_values(name: str, tensor: Tensor, longest: int) -> None:
    """Lengths lie in 0..longest. Checked on the CPU only: on a GPU the values are not read, since that would sync."""
    if has_values(tensor) and tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) <= longest):
        raise ArgumentError(name, tensor.tolist(), f"each length must lie in 0..{longest}")


def check_page_values(table: Tensor, seqlens_kv: Tensor, num_pages: int, page_size: int) -> None:
    """Pages that hold a key of their sequence lie in 0..num_pages - 1; the others are never read. CPU only."""
    if not has_values(table) or not has_values(seqlens_kv):
        return
    used = torch.arange(table.shape[1]) * page_size < seqlens_kv[:, None]
    wrong = used & ((table < 0) | (table >= num_pages))
    if wrong.any():
        b, page = wrong.nonzero()[0].tolist()
        said = f"is {int(table[b, page])}, and k and v have pages 0..{num_pages - 1}"
        raise ArgumentError("page_table", table, f"page {page} of sequence {b} {said}")


def check_cu_seqlens_values(name: str, tensor: Tensor, tokens: int) -> None:
    """Start at 0, never fall, end at or before the last token (tokens after it belong to no sequence). CPU only."""
    if has_values(tensor):
        steps = tensor.tolist()
        if steps[0] != 0 or any(a > b for a, b in pairwise(steps)) or steps[-1] > tokens:
            raise ArgumentError(name, steps, f"must start at 0, never fall, and end at no more than {tokens} tokens")


def check_packing(operands: Operands, q: Tensor, k: Tensor) -> tuple[int, bool]:
    """`cu_seqlens_*` of a packed batch. Returns B, and whether queries and keys have the same lengths."""
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
    return batch, same_lengths(operands.cu_seqlens_q, operands.cu_seqlens_kv)


def dense(x: Tensor) -> Tensor:
    """As kernels read lengths, offsets and sinks: with stride 1, which a column of a table has not. One element is
    contiguous with any stride, but flash-attn 4 looks at it."""
    return x if not x.ndim or x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def same_lengths(a: Tensor | None, b: Tensor | None) -> bool:
    """Both given and equal. Equal values of two tensors are seen on the CPU only; elsewhere it must be one tensor."""
    if a is None or b is None:
        return False
    if a is b:
        return True
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return False
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride():
        return True
    return a.is_cpu and b.is_cpu and torch.equal(a, b)


def longest_sequence(name: str, value: Any, source: str, cu_seqlens: Tensor | None) -> int:
    """The longest sequence: as given, or read from cu_seqlens, which on a GPU costs one synchronisation."""
    assert cu_seqlens is not None
    if value is not None:
        check_size(name, value, at_least=0)
        if not has_values(cu_seqlens):
            return int(value)
    actual = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    if value is not None and value < actual:
        raise ArgumentError(name, value, f"{source} has a sequence of {actual} tokens; pass at least that, or None")
    return actual if value is None else int(value)


def check_page_table(operands: Operands, layout: str, q: Tensor, k: Tensor, v: Tensor, grads: Sequence[bool]) -> None:
    """(B, pages) int32, with lengths, and nothing that would need a backward."""
    table = operands.page_table
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        raise ArgumentTypeError("page_table", table, "an int32 tensor of shape (B, pages a sequence) is needed")
    check_strided("page_table", table)
    check_paged_layout("page_table", table, layout)
    if table.ndim != 2 or table.shape[0] != q.shape[0]:
        raise ArgumentError("page_table", table, f"must have shape (B, pages a sequence), B = {q.shape[0]}")
    if table.device != q.device:
        raise ArgumentError("page_table", table, f"must be on q's device, {q.device}")
    if operands.seqlens_kv is None:
        raise ArgumentError("seqlens_kv", None, "page_table needs it: how many keys of each sequence are real")
    page = 1 if layout == "bshd" else 2
    if k.shape[0] != v.shape[0]:
        raise ArgumentError("num_pages", (k.shape[0], v.shape[0]), "k and v must be pools of equally many pages")
    if 0 in (k.shape[page], v.shape[page]):
        raise ArgumentError("page_size", 0, f"a page holds at least one key: k {tuple(k.shape)}, v {tuple(v.shape)}")
    leaves = {"q": q, "k": k, "v": v, "bias": operands.bias, "sinks": operands.sinks}
    for (name, tensor), wants in zip(leaves.items(), grads, strict=True):
        if wants:
            raise ArgumentError(name, tensor, "wants a gradient, and paged KV has no backward: use torch.no_grad()")
