"""One cuDNN handle per GPU, and the cheapest way to run a plan on it."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch

from attnrt.backends.cudnn.drawing import draw, finish
from attnrt.backends.cudnn.graphs import GraphSpec

Run = Callable[[Sequence[int]], None]
"""run(pointers in the order of uid)."""
Execute = Callable[[int, int, int, int, int], None]
"""execute(address of the pointers, how many, workspace, handle, which plan of the graph)."""

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""What Triton and Inductor ask too: the stream's address without an object around it."""
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _stream_of(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


current_stream: Callable[[int], int] = _raw_stream or _stream_of


def capturing() -> bool:
    """Whether a CUDA graph is being captured here and now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def create_handle(cudnn: Any, index: int) -> Any:
    """A handle on the current device, which is that one.

    `cudnn.create_handle` of 1.28 does the same and imports cuda.bindings to learn the device's number.
    """
    library, kind = getattr(cudnn, "_pybind_module", None), getattr(cudnn, "Handle", None)
    if library is None or kind is None:
        return cudnn.create_handle()
    raw = library.create_handle()
    return kind(raw, index, library.get_stream(raw))


class Device:
    """A live GPU. Plans run on one handle, whose stream is set each time, under one lock; they are built on another, so
    that building, which takes a second, holds up nobody who has a plan."""

    def __init__(self, index: int) -> None:
        import cudnn

        self.index, self.cudnn = index, cudnn
        properties = torch.cuda.get_device_properties(index)
        self.name, self.sm = properties.name, properties.major * 10 + properties.minor
        self.sm_count = properties.multi_processor_count
        self.torch_device = torch.device("cuda", index)
        self.several = torch.cuda.device_count() > 1
        self.lock, self.build_lock = Lock(), Lock()
        with torch.cuda.device(index):
            self.handle = create_handle(cudnn, index)
        # Before 1.28 a handle is a number.
        self.raw = int(getattr(self.handle, "backend_handle", self.handle))
        self.stream: int | None = None
        self._builder: Any = None

    def builder(self) -> Any:
        """The handle to build with. Hold `build_lock`."""
        if self._builder is None:
            self._builder = create_handle(self.cudnn, self.index)
        return self._builder

    def versions(self) -> tuple[str, ...]:
        """What a stored plan belongs to: libcudnn, the frontend, and the GPU's model and size."""
        library, frontend = self.cudnn.backend_version_string(), self.cudnn.__version__
        return f"cudnn {library}", f"frontend {frontend}", self.name, f"sm{self.sm}", f"{self.sm_count} SMs"

    def draw(self, spec: GraphSpec) -> Any:
        """A graph for this GPU, as far as the support check.

        Raises:
            Unsupported: the library refuses it.
        """
        with self.build_lock, torch.cuda.device(self.index):
            return draw(self.cudnn, spec, handle=self.builder())

    def build(self, graph: Any) -> None:
        """Build the plan of a supported graph: the kernel is compiled and loaded.

        Raises:
            Unsupported: the library cannot.
        """
        with self.build_lock, torch.cuda.device(self.index):
            finish(self.cudnn, graph)

    def load(self, data: bytes) -> Any:
        """A graph with its plan, from what `serialize` gave in an earlier process."""
        with self.lock, torch.cuda.device(self.index):
            graph = self.cudnn.pygraph(name="attnrt", handle=self.handle)
            graph.deserialize(self.handle, bytearray(data))  # as a list it takes milliseconds more
        return graph

    def set_stream(self, stream: int) -> None:
        """Hold the lock. Only a change costs anything."""
        if stream != self.stream:
            self.cudnn.set_stream(handle=self.handle, stream=stream)
            self.stream = stream

    def runner(self, graph: Any, uids: Sequence[int], workspace: int) -> Run:
        """What runs a plan on the current stream, with a workspace of so many bytes from torch's allocator.

        Raises:
            RuntimeError: the plan wants other tensors than the graph was drawn with.
        """
        wanted = _wanted(graph)
        if wanted and wanted != list(uids):
            raise RuntimeError(f"the plan takes tensors {wanted}, the graph has {list(uids)}")
        direct = _direct(graph) if wanted else None
        execute, number = direct or (_by_uid(graph, uids, self.handle), 0)
        index, several, count, raw = self.index, self.several, len(uids), self.raw
        lock, set_stream, where = self.lock, self.set_stream, self.torch_device

        def run(pointers: Sequence[int]) -> None:
            if several and _current_device() != index:
                with torch.cuda.device(index):
                    return run(pointers)
            given, space = array("Q", pointers), 0
            if workspace:
                # It goes back to the allocator at once: whoever gets it next comes later in the stream.
                scratch = torch.empty(workspace, dtype=torch.uint8, device=where)
                space = scratch.data_ptr()
            stream = current_stream(index)
            with lock:
                if stream != self.stream:
                    set_stream(stream)
                execute(given.buffer_info()[0], count, space, raw, number)
            return None

        return run


def _by_uid(graph: Any, uids: Sequence[int], handle: Any) -> Execute:
    """`graph.execute` in the form of the frontend's own last step."""

    def execute(pointers: int, count: int, space: int, raw: int, number: int) -> None:
        given = (ctypes.c_uint64 * count).from_address(pointers)
        graph.execute(dict(zip(uids, given, strict=True)), space, handle=handle)

    return execute


def _direct(graph: Any) -> tuple[Execute, int] | None:
    """The frontend's own last step, where it has it in the form of 1.28: an array of addresses in order of uid, and the
    index of the plan. `graph.execute` arrives there too, many microseconds later."""
    execute = getattr(getattr(graph, "_lowered_graph", None), "_execute_with_raw_ptrs", None)
    if execute is None or getattr(graph, "selected_engine", True) is not None:
        return None
    plans = getattr(graph, "_plans", None)
    if not plans:
        return execute, -1  # a plan that was loaded is the graph's only one
    index = getattr(plans[graph._plan_index], "cpp_index", None)
    return None if index is None else (execute, int(index))


def _wanted(graph: Any) -> list[int]:
    """The tensors that a plan takes, ascending; empty where the frontend does not say."""
    ask = getattr(graph, "_variant_pack_uids", None)
    return [] if ask is None else [int(uid) for uid in ask() or ()]


_devices: dict[int, Device] = {}
_starting = Lock()


def device(index: int) -> Device:
    """The GPU of that index.

    Raises:
        RuntimeError: cuDNN does not start there.
    """
    if (found := _devices.get(index)) is None:
        with _starting:
            found = _devices.get(index) or Device(index)
            _devices[index] = found
    return found


def started(index: int) -> bool:
    """Whether there is a handle already: one cannot be made while a stream is being captured."""
    return index in _devices
