"""Triton's interpreter, repaired and watched. Import it before anything that imports triton.

The interpreter runs a kernel on CPU tensors, one program after another, in numpy. Here it also checks that no address
leaves the tensors of a launch, and that no index overflows 32 bits.
"""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "triton decides on import whether it interprets"
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from attnrt.backends.triton import replay  # noqa: E402

Builder = interpreter.InterpreterBuilder
_dot, _launch = Builder.create_dot, replay.launch
_patch = interpreter._patch_lang
_allowed: list[tuple[int, int]] = []
_patched: set[int] = set()


def _dot_with_bf16(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """tl.dot multiplies the bit patterns of bf16 numbers (triton issue 11584): multiply the numbers."""
    if tl.bfloat16 not in (a.dtype, b.dtype):
        return _dot(self, a, b, d, *rest)
    left, right = ((x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    return interpreter.TensorHandle((left @ right).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _dot_in_order(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """As a GPU does it in float32: one multiply-add after the other, each of them rounded."""
    if a.data.dtype != np.float32:
        return _dot_with_bf16(self, a, b, d, *rest)
    left, right, found = a.data.astype(np.float64), b.data.astype(np.float64), d.data
    for i in range(left.shape[-1]):
        found = (found + left[..., i : i + 1] * right[..., i : i + 1, :]).astype(np.float32)
    return interpreter.TensorHandle(found, d.dtype.scalar)


def _patch_once(fn: Any) -> Any:
    """Every call of one kernel function by another patches all of triton.language again: a third of the time."""
    if id(fn.__globals__) in _patched:
        return interpreter._LangPatchScope()
    _patched.add(id(fn.__globals__))
    return _patch(fn)


def _checked(name: str, mask_at: int) -> None:
    plain = getattr(Builder, name)

    def access(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
        mask = np.broadcast_to(rest[mask_at].data, pointers.data.shape).astype(bool)
        found = pointers.data[mask].astype(np.uint64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        ok = np.zeros(found.shape, bool)
        for low, high in _allowed:
            ok |= (found >= low) & (found + np.uint64(size) <= high)
        if not ok.all():
            raise IndexError(f"{name}: {int((~ok).sum())} of {found.size} addresses lie outside every tensor")
        return plain(self, pointers, *rest, **options)

    setattr(Builder, name, access)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


def _span(x: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _watched_launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> Any:
    _allowed[:] = {_span(x) for x in _tensors(args)}
    _patched.clear()
    return _launch(kernel, grid, *args, **options)


Builder.create_dot = _dot_with_bf16
interpreter._patch_lang = _patch_once
_checked("create_masked_load", 0)
_checked("create_masked_store", 1)
replay.launch = _watched_launch
builder = interpreter.interpreter_builder
builder.options = replace(builder.options, debug=True)  # int32 overflow raises


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def dots_in_order() -> Iterator[None]:
    """float32 products are summed as on a GPU; numpy's blocks round less."""
    Builder.create_dot = _dot_in_order
    try:
        yield
    finally:
        Builder.create_dot = _dot_with_bf16
