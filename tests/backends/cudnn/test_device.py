"""How a plan is handed its pointers, with a stand-in for the frontend's graph that writes them down."""

from __future__ import annotations

import ctypes
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest

from attnrt.backends.cudnn import device as module
from attnrt.backends.cudnn.device import Device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Without a library or a GPU behind it; stream 5 is the current one."""
    made = object.__new__(Device)
    made.index, made.several, made.raw, made.lock, made.stream, made.handle = 0, False, 11, Lock(), None, "handle"
    made.torch_device = module.torch.device("cpu")
    made.cudnn = SimpleNamespace(set_stream=lambda handle, stream: streams.append((handle, stream)))
    streams: list[Any] = []
    made.streams = streams  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "current_stream", lambda index: 5)
    return made


class OldGraph:
    """Of a frontend that takes pointers by uid alone."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def execute(self, pointers: dict[int, int], workspace: int, handle: Any) -> None:
        self.seen.append((pointers, bool(workspace), handle))


class NewGraph(OldGraph):
    """Of 1.28: an array of addresses in order of uid."""

    selected_engine = None

    def __init__(self, index: int | None) -> None:
        super().__init__()
        self._plans = [] if index is None else [SimpleNamespace(cpp_index=7), SimpleNamespace(cpp_index=index)]
        self._plan_index = 1
        self._lowered_graph = SimpleNamespace(_execute_with_raw_ptrs=self._execute)

    def _variant_pack_uids(self) -> list[int]:
        return [1, 2, 30]

    def _execute(self, address: int, count: int, workspace: int, handle: int, plan: int) -> None:
        given = list((ctypes.c_uint64 * count).from_address(address))
        self.seen.append((given, bool(workspace), handle, plan))


@pytest.mark.parametrize("workspace", [0, 64])
def test_pointers_by_uid(gpu: Device, workspace: int) -> None:
    graph = OldGraph()
    run = gpu.runner(graph, [1, 2, 30], workspace)
    high = 2**63 + 16
    for pointers in ([100, 200, 300], [high, 0, 8]):
        run(pointers)
        assert graph.seen.pop() == (dict(zip((1, 2, 30), pointers, strict=True)), workspace > 0, "handle")
    assert gpu.streams == [("handle", 5)]  # type: ignore[attr-defined]  # once, as it did not change


@pytest.mark.parametrize(("index", "plan"), [(3, 3), (None, -1)], ids=["built", "loaded"])
def test_pointers_as_an_array(gpu: Device, index: int | None, plan: int) -> None:
    graph = NewGraph(index)
    gpu.runner(graph, [1, 2, 30], 64)([100, 2**63, 300])
    assert graph.seen == [([100, 2**63, 300], True, 11, plan)]


def test_a_plan_that_wants_other_tensors_is_refused(gpu: Device) -> None:
    with pytest.raises(RuntimeError, match="30"):
        gpu.runner(NewGraph(3), [1, 2, 4], 0)
