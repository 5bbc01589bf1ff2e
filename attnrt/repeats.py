"""A call like the last one with its options, recognised by torch's guards instead of by reading its tensors in Python.

A model makes one call for each layer, all on tensors of one geometry. What a plan depends on is some twenty properties
of three tensors; behind a kernel's launch, with Python out of the processor's caches, reading them takes three times
what it does in a loop. The guards with which torch.compile checks its graphs compare the same properties in one call:
Python type, dispatch keys (kind of device, layout, conjugation, inference, autocast, torch.func), dtype, device, sizes,
strides, requires_grad, and that no tensor is passed twice.

They are not public in PyTorch: only releases whose guards were read are asked, and elsewhere, or where they say no,
each call reads its tensors as before. Either way it finds the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.lengths import same_lengths
from attnrt.operands import NO_OPERANDS, Operands

if TYPE_CHECKING:
    from attnrt.runtime import Plan
    from attnrt.settings import Context

READ = ("2.11.", "2.12.", "2.13.")
"""Releases of torch whose guards compare what is said above."""
try:
    from torch._C._dynamo.guards import TensorGuards

    _read = torch.__version__.startswith(READ)
except ImportError:
    _read = False
_KV_SIDE = (Operands._fields.index("seqlens_kv"), Operands._fields.index("cu_seqlens_kv"))


class Repeat:
    """What the last call with some options was like. Never changed: another thread may be looking at it.

    Attributes:
        made: its plan. never: calls with that plan cannot be recognised. same: whether q, k and v are like its own,
        where it had no operands. same_with: whether they and the operands are. aligned: the low bits of q's, k's and
        v's addresses on a GPU, None elsewhere. capturing: a CUDA graph, there. grad: the gradients' mode.
    """

    __slots__ = ("aligned", "capturing", "context", "deterministic", "grad", "made", "never", "same", "same_with")

    def __init__(self, made: Plan) -> None:
        """Of a call that was made once: its plan alone."""
        self.made = made
        self.same: Callable[..., bool] = _no
        self.same_with: Callable[..., bool] = _no
        self.context: Context | None = None
        self.aligned: int | None = None
        self.capturing = self.grad = self.deterministic = self.never = False

    @classmethod
    def of(
        cls,
        made: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Operands,
        longest: tuple[int | None, int | None],
        context: Context,
    ) -> Repeat:
        """Of a call that was made twice. Some are never recognised. longest: `max_seqlen_q` and `max_seqlen_kv`."""
        self = cls(made)
        if not _read or (q.is_cuda and q.dtype is torch.float32):  # where TF32 may be switched
            self.never = True
            return self
        self.context, self.grad = context, torch.is_grad_enabled()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        if q.is_cuda:
            self.aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
            self.capturing = torch.cuda.is_current_stream_capturing()
        if operands is NO_OPERANDS:
            self.same = _guards(q, k, v).check
        elif _unread(operands) and (operands.cu_seqlens_q is None or None not in longest):
            self.same_with = _with_operands(q, k, v, operands)
        self.never = self.same is self.same_with
        return self


def noted(
    repeat: Repeat | None,
    made: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    longest: tuple[int | None, int | None],
    context: Context,
) -> Repeat | None:
    """What to note of a call whose plan was looked up, after `repeat`: nothing where no later call would gain."""
    if repeat is None or repeat.made is not made:
        return Repeat(made)
    if repeat.never or q is k or k is v or q is v:
        return None
    return Repeat.of(made, q, k, v, operands, longest, context)


def _no(*tensors: Any) -> bool:
    return False


def _guards(*tensors: Tensor) -> Any:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _unread(operands: Operands) -> bool:
    """Nothing looks at their values: lengths on a CPU are checked in each call."""
    return all(t is None or t.is_cuda for t in operands[_KV_SIDE[0] - 1 :])


def _with_operands(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Callable[..., bool]:
    """Whether q, k, v and operands are like these, as far as their `signature` goes.

    Written out as one expression, since loops over nine operands take twice as long as the guards.
    """
    absent = [f"o[{i}]" for i, t in enumerate(operands) if t is None]
    checked, tests = [], []
    for i, t in enumerate(operands):
        if t is None:
            continue
        before = operands[i - 1] if i in _KV_SIDE else None
        if before is None:
            checked.append(i)
        elif t is before:  # a guard takes no tensor in two places
            tests.append(f"o[{i}] is o[{i - 1}]")
        else:
            checked.append(i)
            place = "==" if same_lengths(t, before) else "!="
            tests.append(f"o[{i}] is not o[{i - 1}] and o[{i}].data_ptr() {place} o[{i - 1}].data_ptr()")
    places = ", ".join(f"o[{i}]" for i in checked)
    tests = [f"{' is '.join(absent)} is None", f"check(q, k, v, {places})", *tests]
    check = _guards(q, k, v, *[t for i in checked if (t := operands[i]) is not None]).check
    same_with: Callable[..., bool] = eval(f"lambda q, k, v, o: {' and '.join(tests)}", {"check": check})
    return same_with
