"""Compiling our Triton kernels ahead of their timing, in other processes: their machine code is then on disk, in
triton's own cache."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from attnrt.backends.triton import TritonBackend

ROOT = Path(__file__).resolve().parent.parent


def codegen() -> Any:
    """tools/codegen.py as a module."""
    if (name := "attnrt_tools_codegen") not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "codegen.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def processes(jobs: int | None = None) -> ProcessPoolExecutor:
    """That compile; two cores are left to who waits for them."""
    jobs = jobs or max(1, (os.cpu_count() or 2) - 2)
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def compile_call(arch: str, name: str, options: Mapping[str, Any]) -> str:
    """Compile every pass of one call (tools/codegen.py says how it is described) by our kernel `name`; what went wrong,
    or ""."""
    tools = codegen()
    kernel = next(k for k in TritonBackend().kernels if k.name == name)
    rest = dict(options)
    try:
        with tools.recorded(int(arch[2:])) as found:
            tools.run_call(arch, rest.pop("dims"), kernel=kernel, **rest)
    except Exception as error:
        return f"{name}, {options}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for _, compiled in found:
        build_launcher(compiled)
    return ""


def build_launcher(compiled: Any) -> None:
    """The C function that starts it, which some releases compile for each signature; nothing where CUDA is not."""
    from triton.backends.nvidia.driver import CudaLauncher

    try:
        CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # no libcuda, no C compiler: the first launch says so
        return


def compile_ahead(arch: str, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Each (kernel, call) once, all at a time."""
    started = time.monotonic()
    wanted = {repr(call): call for call in calls}
    with processes() as pool:
        waiting = [pool.submit(compile_call, arch, *call) for call in wanted.values()]
        for future in waiting:
            try:
                said = future.result()
            except Exception as error:  # the compiler took its process down
                said = f"{type(error).__name__}: {error}"
            if said:
                print(f"compiling ahead: {said}")
    print(f"{len(wanted)} calls compiled in {time.monotonic() - started:.0f} s", flush=True)
