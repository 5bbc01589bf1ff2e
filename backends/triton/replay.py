"""A pass that was launched once is launched again from notes: a few microseconds of host time instead of tens.

What a launch costs the host is Python: views by strides, tensor descriptors, constants, options, and Triton's own look
for the variant. Of all that only pointers change between calls of one plan on tensors of one geometry (strides and
alignments; the plan has the rest). So the first call writes down what reached the C launcher, as a call of it with
nothing open but the pointers. They go in as integers, which also spares the launcher a question to the driver for
each. Tensor maps (TMA) hold a pointer, so each is made anew unless the pointer is the last.

None of this is public in Triton: only releases whose launcher was read are replayed, others are launched each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from attnrt.backends.triton.launch import launch

READ = ("3.6.", "3.7.")
"""Releases in which a launcher's arguments are in the order that `written_out` has them."""

try:
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    _read = triton.__version__.startswith(READ)
except ImportError:
    _read = False

Body = Callable[..., None]
"""body(launch, tensors): makes the launches of a pass, with nothing but `tensors` and views made before as tensors."""
Step = Callable[[Sequence[int], int], None]
"""step(pointers, stream): one launch again."""


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

    def there(self, tensors: Sequence[Tensor | None], body: Body, geometry: Any) -> None:
        """The same on the first tensor's device, whichever is current."""
        if not _several():
            return self(tensors, body, geometry)
        with on(tensors[0]):  # type: ignore[arg-type]  # never None
            return self(tensors, body, geometry)


_several = cache(lambda: torch.cuda.device_count() > 1)


def written_out(compiled: Any, grid: tuple[int, ...], args: Sequence[Any], roles: dict[int, int]) -> Step:
    """One launch as one call, whose constants stand in its code: less than half the time that lists of them take.

    Raises LookupError, AttributeError or TypeError where something is not as expected.
    """
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        raise LookupError("the kernel wants scratch memory")
    raw, descriptions = _unwrapped(run.launch)
    names: dict[str, Any] = {"raw": raw, "kept": compiled}

    def word(value: Any) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"fixed_{len(names)}"
        names[name] = value
        return name

    words: list[str] = []
    metas = iter(descriptions)
    for arg in args:
        if isinstance(arg, Tensor):
            words.append(f"p[{roles[id(arg)]}]")
        elif hasattr(arg, "block_shape"):
            made = Map(arg, next(metas))
            words += [f"{word(made)}(p[{roles[id(arg.base)]}])", *map(word, (*arg.shape, *arg.strides))]
        elif isinstance(arg, tuple) and arg and isinstance(arg[0], Tensor):
            words.append(f"(p[{roles[id(arg[0])]}], {''.join(f'{word(x)}, ' for x in arg[1:])})")
        else:
            words.append(word(arg))
    first = [*map(word, (*grid, 1, 1)[:3]), "stream"]
    first += map(word, (compiled.function, run.launch_cooperative_grid, run.launch_pdl))
    if hasattr(run, "arg_annotations"):  # 3.7: the kernel's arguments are one list, behind their types
        rest = (compiled.packed_metadata, *[None] * 5, run.arg_annotations, run.kernel_signature)
        words = [f"[{', '.join(words)}]"]
    else:
        rest = (None, None, compiled.packed_metadata, None, None, None)
    made_of = ", ".join((*first, *map(word, rest), *words))
    step: Step = eval(f"lambda p, stream: raw({made_of})", names)
    return step


class Map:
    """Tensor maps by pointer. The last one is kept."""

    __slots__ = ("after", "before", "last")

    def __init__(self, description: Any, meta: Any) -> None:
        """Raises LookupError: the hardware does not read such a descriptor."""
        if meta is None or meta["fp4_padded"] or getattr(description, "round_f32_to_tf32", False):
            raise LookupError("a descriptor that the hardware does not read")
        kind = nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        self.before = meta["swizzle"], meta["elem_size"], kind, meta["block_size"]
        self.after = description.shape, description.strides, int(description.padding == "nan")
        self.last: tuple[int, Any] = -1, None

    def __call__(self, pointer: int) -> Any:
        known, made = self.last
        if known != pointer:
            made = _fill(pointer, *self.before, *self.after)
            self.last = pointer, made
        return made


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
        return tuple(written_out(compiled, grid, args, roles) for compiled, grid, args in noted)
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
