"""A pass that was launched once is launched again from notes: a few microseconds of host time instead of tens.

What a launch costs the host is Python: views by strides, tensor descriptors, constants, options, and Triton's own look
for the variant. Of all that only pointers change between calls of one plan on tensors of one geometry (strides and
alignments; the plan has the rest). So the first call writes down what reached the C launcher, with the place of every
pointer, and later ones copy that list and fill in theirs. Pointers go in as integers, which also spares the launcher a
question to the driver for each. Tensor maps (TMA) hold a pointer, so each is made anew unless the pointer is the last.

None of this is public in Triton: only releases whose launcher was read are replayed, others are launched each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnrt.backends.triton.launch import launch

READ = ("3.6.", "3.7.")
"""Releases in which a launcher's arguments are in the order that `Step` has them."""

try:
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    _read = triton.__version__.startswith(READ)
except ImportError:
    _read = False

Body = Callable[..., None]
"""body(launch, tensors): makes the launches of a pass, with nothing but `tensors` and views made before as tensors."""


class Recording:
    """What the launches of one pass were, by geometry. One for each pass of a plan."""

    __slots__ = ("notes",)

    def __init__(self) -> None:
        self.notes: dict[Any, tuple[Step, ...] | None] = {}

    def __call__(self, tensors: Sequence[Tensor | None], body: Body, geometry: Any = None) -> None:
        """`body(launch, tensors)`, or the same from notes. The current device is that of the tensors.

        geometry: what stands for theirs where the caller knows that little of it varies; None: all of it is read.
        """
        if not _read or not tensors[0].is_cuda:  # type: ignore[union-attr]  # the first is q
            return body(launch, tensors)
        device, pointers = tensors[0].get_device(), [0 if t is None else t.data_ptr() for t in tensors]  # type: ignore[union-attr]
        if geometry is None:
            geometry = tuple(
                [None if t is None else (t.stride(), p & 15, t.dtype) for t, p in zip(tensors, pointers, strict=True)]
            )
        key = device, geometry
        try:
            steps = self.notes[key]
        except KeyError:
            self.notes[key] = _record(tensors, body)
            return None
        runtime = knobs.runtime
        if steps is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            return body(launch, tensors)  # not as expected, or a profiler looks on
        stream = driver.active.get_current_stream(device)
        for step in steps:
            step(pointers, stream)
        return None


STREAM = 3
"""Its place in a launcher's arguments."""


class Fetch(NamedTuple):
    """A tensor map: where it stands among the arguments, whose pointer it holds, and the rest of what makes it."""

    at: int
    role: int
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    last: list[Any]
    """[pointer, map] of the last call."""


class Step:
    """One launch. Calls the launcher that Triton compiled, with pointers in their places."""

    __slots__ = ("fetches", "flat", "in_one", "keep", "line", "matrices", "pointers", "raw")

    def __init__(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any], roles: dict[int, int]) -> None:
        """Raises LookupError, AttributeError or TypeError where something is not as expected."""
        run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            raise LookupError("the kernel wants scratch memory")
        self.keep = compiled
        self.raw, descriptions = _unwrapped(run.launch)
        self.flat: list[Any] = []
        """The kernel's arguments."""
        self.pointers: list[tuple[int, int]] = []
        self.matrices: list[tuple[int, int, tuple[Any, ...]]] = []
        self.fetches: list[Fetch] = []
        metas = iter(descriptions)
        for arg in args:
            at = len(self.flat)
            if isinstance(arg, Tensor):
                self.pointers.append((at, roles[id(arg)]))
                self.flat.append(0)
            elif hasattr(arg, "block_shape"):
                meta = next(metas)
                if meta is None or meta["fp4_padded"] or getattr(arg, "round_f32_to_tf32", False):
                    raise LookupError("a descriptor that the hardware does not read")
                kind = nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
                before = (meta["swizzle"], meta["elem_size"], kind, meta["block_size"])
                after = (arg.shape, arg.strides, int(arg.padding == "nan"))
                self.fetches.append(Fetch(at, roles[id(arg.base)], before[:4], after, [None, None]))
                self.flat += [None, *arg.shape, *arg.strides]
            elif isinstance(arg, tuple) and arg and isinstance(arg[0], Tensor):
                self.matrices.append((at, roles[id(arg[0])], tuple(arg[1:])))
                self.flat.append(None)
            else:
                self.flat.append(arg)
        # What comes before those: the grid, the stream, the function, and more by the release.
        how = run.launch_cooperative_grid, run.launch_pdl
        self.line: list[Any] = [*(*grid, 1, 1)[:STREAM], 0, compiled.function, *how]
        self.in_one = hasattr(run, "arg_annotations")  # 3.7: the kernel's arguments are one, behind their types
        if self.in_one:
            self.line += [compiled.packed_metadata, *[None] * 5, run.arg_annotations, run.kernel_signature]
        else:
            self.line += [None, None, compiled.packed_metadata, None, None, None]

    def __call__(self, pointers: list[int], stream: int) -> None:
        flat = self.flat.copy()
        for at, role in self.pointers:
            flat[at] = pointers[role]
        for at, role, rest in self.matrices:
            flat[at] = (pointers[role], *rest)
        for at, role, before, after, last in self.fetches:
            pointer = pointers[role]
            known, made = last
            if known != pointer:
                made = _fill(pointer, *before, *after)
                last[:] = pointer, made
            flat[at] = made
        line = self.line.copy()
        line[STREAM] = stream
        if self.in_one:
            self.raw(*line, flat)
        else:
            self.raw(*line, *flat)


def _fill(*args: Any) -> Any:
    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    return fill(*args)


def _unwrapped(outer: Any) -> tuple[Any, Sequence[Any]]:
    """The launcher in C, and what it says of each descriptor: Triton wraps it in a function that expands those."""
    code = getattr(outer, "__code__", None)
    if code is None:
        return outer, ()
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in outer.__closure__), strict=True))
    return inside["launcher"], inside["tensordesc_meta"]


def _record(tensors: Sequence[Tensor | None], body: Body) -> tuple[Step, ...] | None:
    """Launch, and note what was launched; None if it cannot be replayed."""
    # Of its own for every place, even where one tensor is passed twice: another call may pass two.
    views = [None if t is None else t.detach() for t in tensors]
    roles = {id(view): i for i, view in enumerate(views)}
    noted: list[tuple[Any, ...]] = []

    def noting(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        compiled = launch(kernel, grid, *args, **options)
        rest = [options.get(p.name, p.default) for p in kernel.params[len(args) :]]
        noted.append((compiled, grid, (*args, *rest)))
        return compiled

    body(noting, views)
    try:
        return tuple(Step(compiled, grid, args, roles) for compiled, grid, args in noted)
    except (LookupError, AttributeError, TypeError, StopIteration):
        return None


def on(x: Tensor) -> Any:
    """Make x's device the current one, at no cost where it is: Triton launches there."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device(x.device)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_nothing = _Nothing()
