"""The real cuDNN asked about a GPU that is not here: the library's own verdict, on a machine without one.

The frontend lets a GPU be described by its properties. Where there is no NVIDIA driver either, a stand-in for
libcuda.so.1 (stand_in.c, compiled with the system's C compiler) lets libcudnn load and even finish plans; nothing runs.
Needs the wheels of the `cudnn-deviceless` extra. Never part of a call: tests and `attnrt explain --ask-cudnn` use it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from attnrt.backends.base import Reason
from attnrt.backends.cudnn.answers import refusal
from attnrt.backends.cudnn.drawing import Unsupported, draw, finish, plans
from attnrt.backends.cudnn.graphs import GraphSpec, specs
from attnrt.errors import ArgumentError, AttnrtError
from attnrt.request import AttentionRequest

LIBRARIES = ("libnvrtc-builtins.so*", "libnvrtc.so*", "libcublasLt.so*", "libcublas.so*")
"""Loaded before libcudnn, which looks for them by name."""


class DevicelessError(AttnrtError, RuntimeError):
    """cuDNN cannot be asked on this machine; the message says what is missing."""


@dataclass(frozen=True)
class GPU:
    """A GPU by the properties that cuDNN looks at; memory in bytes, clocks in kHz."""

    name: str
    sm: int
    sm_count: int
    shared_memory: int
    """Per block, opted in."""
    l2_bytes: int
    memory: int
    clock: int
    memory_clock: int
    bus_bits: int

    def json(self) -> str:
        return json.dumps(
            {
                "maxGridSize": [2147483647, 65535, 65535],
                "maxBlockSize": [1024, 1024, 64],
                "regsPerBlock": 65536,
                "multiProcessorCount": self.sm_count,
                "warpSize": 32,
                "maxSharedMemoryPerBlock": 49152,
                "maxSharedMemoryPerBlockOptin": self.shared_memory,
                "reservedSharedMemoryPerBlock": 1024,
                "oversizedSharedMemoryPerBlock": 0,
                "maxRegistersPerSM": 65536,
                "maxCtasPerSM": 32,
                "maxThreadsPerBlock": 1024,
                "maxThreadsPerSM": 2048,
                "pciDeviceId": 0,
                "isTccDriver": 0,
                "supportCoopLaunch": 1,
                "totalGlobalMem": self.memory,
                "smClockRateKHz": self.clock,
                "memClockRateKHz": self.memory_clock,
                "memoryBusWidth": self.bus_bits,
                "l2CacheSize": self.l2_bytes,
                "cudaDeviceId": 0,
                "deviceVer": self.sm // 10 * 100 + self.sm % 10 * 10,
                "driverVer": 13000,
                "deviceName": self.name,
                "smCountOrigin": 0,
            }
        )


GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 80, 108, 166912, 41943040, 85 * 10**9, 1410000, 1593000, 5120),
    "l40s": GPU("NVIDIA L40S", 89, 142, 101376, 100663296, 48 * 10**9, 2520000, 9001000, 384),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 89, 128, 101376, 75497472, 25 * 10**9, 2520000, 10501000, 384),
    "h100": GPU("NVIDIA H100 80GB HBM3", 90, 132, 232448, 52428800, 85 * 10**9, 1980000, 2619000, 5120),
    "h200": GPU("NVIDIA H200", 90, 132, 232448, 62914560, 150 * 10**9, 1980000, 3201000, 6144),
    "b200": GPU("NVIDIA B200", 100, 148, 232448, 132644864, 190 * 10**9, 1965000, 3996000, 8192),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 120, 170, 101376, 100663296, 34 * 10**9, 2407000, 14001000, 512),
}
"""As the vendor's data sheets have them. Which engines there are depends on `sm` and the shared memory."""
BY_SM = {80: "a100", 89: "l40s", 90: "h100", 100: "b200", 120: "rtx5090"}
"""A GPU for an arch that is given without a name."""


@dataclass(frozen=True)
class Answer:
    """What the library says about a request on a GPU.

    refusals: in its own words, one for each graph that it refuses (the first stops it: there is no backward without a
    forward). plans: the engine it would run for each graph. workspace: bytes, where the plans were built. seconds: it
    took.
    """

    gpu: str
    library: str
    frontend: str
    refusals: tuple[Reason, ...]
    plans: tuple[str, ...]
    workspace: tuple[int, ...]
    seconds: float

    @property
    def eligible(self) -> bool:
        return not self.refusals


def gpu_named(name: str) -> GPU:
    """One of `GPUS`, or the one that stands for an arch such as "sm90".

    Raises:
        ArgumentError: there is none.
    """
    if name in GPUS:
        return GPUS[name]
    digits = name.lower().removeprefix("sm").removeprefix("_").rstrip("a")
    if digits.isdigit() and int(digits) in BY_SM:
        return GPUS[BY_SM[int(digits)]]
    arches = ", ".join(f"sm{sm}" for sm in BY_SM)
    raise ArgumentError("gpu", name, f"cuDNN can be asked about {', '.join(GPUS)}, or {arches}")


def ask(request: AttentionRequest, gpu: str | GPU, build: bool = False) -> Answer:
    """What the real cuDNN says about a request with contiguous tensors on that GPU.

    Args:
        gpu: a name in `GPUS`, an arch such as "sm90", or a `GPU`. build: also build every plan (about a second each)
            rather than only ask whether there is one.

    Raises:
        DevicelessError: the library or the compiler for the stand-in is missing.
    """
    described = gpu if isinstance(gpu, GPU) else gpu_named(gpu)
    cudnn = library()
    start = time.perf_counter()
    refusals: list[Reason] = []
    names: list[str] = []
    workspace: list[int] = []
    for spec in specs(request, described.sm):
        try:
            graph = described_graph(spec, described)
            if build:
                finish(cudnn, graph)
                workspace.append(int(graph.get_workspace_size()))
        except Unsupported as error:
            refusals.append(refusal(cudnn.backend_version_string(), spec, str(error)))
            break
        names.append(plans(graph, spec)[0])
    return Answer(
        described.name,
        cudnn.backend_version_string(),
        cudnn.__version__,
        tuple(refusals),
        tuple(names),
        tuple(workspace),
        time.perf_counter() - start,
    )


def described_graph(spec: GraphSpec, gpu: GPU) -> Any:
    """A graph for a GPU that is described, as far as the support check.

    Raises:
        Unsupported: the library refuses it.
    """
    return draw(library(), spec, sm_version=gpu.sm, device_property=_properties(gpu))


@cache
def _properties(gpu: GPU) -> Any:
    return library().create_device_properties(gpu.json())


@cache
def library() -> Any:
    """The frontend's module, with libcudnn loaded: over the stand-in driver where there is no NVIDIA driver.

    Raises:
        DevicelessError: what is missing.
    """
    if importlib.util.find_spec("cudnn") is None:
        raise DevicelessError("nvidia-cudnn-frontend is not installed: pip install 'attnrt[cudnn-deviceless]'")
    if "cudnn" not in sys.modules:
        if not has_driver():
            ctypes.CDLL(str(stand_in()), mode=ctypes.RTLD_GLOBAL)
        wheels = Path(sysconfig.get_path("purelib"), "nvidia")
        for pattern in LIBRARIES:
            for file in sorted(wheels.glob(f"*/lib/{pattern}")):
                if ".alt." not in file.name:
                    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    import cudnn

    try:
        cudnn.backend_version()
    except RuntimeError as error:
        raise DevicelessError(f"libcudnn does not load: {error}; pip install 'attnrt[cudnn-deviceless]'") from error
    return cudnn


def has_driver() -> bool:
    """Whether there is an NVIDIA driver, so that no stand-in is needed, or wanted."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def stand_in() -> Path:
    """The compiled stand-in, made once for each version of its source.

    Raises:
        DevicelessError: there is no C compiler.
    """
    from attnrt.variables import read_variables

    source = (resources.files("attnrt.backends.cudnn") / "stand_in.c").read_bytes()
    folder = read_variables().cache_dir / "cudnn" / "stand-in" / hashlib.sha256(source).hexdigest()[:16]
    made = folder / "libcuda.so.1"
    if made.exists():
        return made
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise DevicelessError("asking cuDNN without a driver needs a C compiler (cc) for the stand-in libcuda.so.1")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written, partial = Path(scratch, "stand_in.c"), Path(scratch, "libcuda.so.1")
        written.write_bytes(source)
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(partial), str(written)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DevicelessError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        partial.replace(made)
    return made
