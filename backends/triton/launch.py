"""What a launch costs the host: a third of what `kernel[grid](...)` does with argument lists as long as ours.

Triton compiles a variant of a kernel for every combination of what it specialises on: dtypes, which pointers, sizes and
strides are multiples of 16, which integers are 1 or need 64 bits, which arguments are None, the constants, the launch
options and the device. On each launch it writes all of that down to find the variant. Here its own function tells those
properties of all arguments at once (so they are the right ones, tuples and descriptors included), and a dictionary has
the variant. What is called then is the launcher that Triton itself ends in.

None of this is public. Only releases whose code was read take the short way; others, and the interpreter, do not.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

READ = ("3.6.", "3.7.", "3.8.", "3.9.")
"""Releases in which `specialize`, `device_caches` and the order of a launcher's arguments are as this file has them."""

try:
    from triton import knobs
    from triton._C.libtriton import native_specialize_impl as specialize
    from triton.runtime import driver

    _short = triton.__version__.startswith(READ)
except ImportError:
    _short = False


@triton.jit
def _nothing(n):  # type: ignore[no-untyped-def]
    pass


@cache
def working() -> bool:
    """Whether a kernel can be launched on this machine, for what can do without: Triton needs a driver, and a C
    compiler the first time. Tried once, by one that does nothing; if it cannot, a warning says why."""
    try:
        _nothing[(1,)](2)
    except Exception as error:
        said = (
            f"attnrt: Triton cannot launch a kernel here ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        )
        text = f"{said}; packed and padded calls of other backends take longer without"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False
    return True


def launchable(capturing: bool) -> bool:
    """Whether what can do without kernels may launch them. Nothing is tried during a capture."""
    return torch.cuda.is_available() and (capturing or working())


class Variant(NamedTuple):
    """A compiled kernel, loaded."""

    compiled: Any
    run: Any
    function: Any
    metadata: Any


class Site(NamedTuple):
    """One kernel with one set of constants and options on one device."""

    kernel: Any
    """Kept alive, since the site is found by its id."""
    backend: Any
    constants: tuple[Any, ...]
    """The parameters after the arguments: a launcher wants them all."""
    variants: dict[Any, Variant]


_sites: dict[tuple[Any, ...], Site | None] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """`kernel[grid](*args, **options)`: arguments by position, constants and launch options by name.

    Returns the compiled kernel. A constant must not be now True and now 1: they are one key of a dictionary.
    """
    if not _short or type(kernel) is not JITFunction:
        return kernel[grid](*args, **options)
    active = driver.active
    device = active.get_current_device()
    key = (id(kernel), device, len(args), *options.items())
    try:
        site = _sites[key]
    except KeyError:
        site = _sites[key] = _site(kernel, device, len(args), options)
    runtime = knobs.runtime
    if site is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks:
        return kernel[grid](*args, **options)  # not as expected, or a profiler looks on
    # Asked as if every integer were specialised: finer than the kernel's own `do_not_specialize`, so never wrong, and
    # one call. Of named tuples Triton would build named tuples of properties, in Python: plain ones are cheaper.
    plain = tuple([tuple(x) if isinstance(x, tuple) else x for x in args])
    properties = specialize(site.backend, plain, False, True, True)
    variant = site.variants.get(properties)
    if variant is None:
        compiled = kernel[grid](*args, **options)
        if compiled is not None:
            site.variants[properties] = Variant(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return compiled
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    variant.run(x, y, z, stream, variant.function, variant.metadata, None, None, None, *args, *site.constants)
    return variant.compiled


def _site(kernel: Any, device: Any, count: int, options: dict[str, Any]) -> Site | None:
    """None where a call is not of the form that `launch` asks for, or Triton not what this file expects."""
    try:
        given, rest = kernel.params[:count], kernel.params[count:]
        if any(p.is_constexpr for p in given) or not all(p.is_constexpr for p in rest):
            return None
        constants = tuple(options.get(p.name, p.default) for p in rest)
        backend = kernel.device_caches[device][3]
        specialize(backend, (16, None), False, True, True)
        _ = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls, kernel.pre_run_hooks
    except (AttributeError, IndexError, TypeError):
        return None
    return Site(kernel, backend, constants, {})
