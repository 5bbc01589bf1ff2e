"""The plans of this process: built once for each graph and GPU, found again by what the graph depends on."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Timer
from typing import Any

from attnrt.backends.cudnn.device import Device, Run, capturing
from attnrt.backends.cudnn.graphs import GraphSpec
from attnrt.backends.cudnn.store import Store

MOST_PLANS = 1024
"""In memory. The one that was asked for longest ago goes first."""
MOST_DRAFTS = 64
"""Graphs that passed the support check and have no plan yet."""
MOST_UNWRITTEN = 64
"""Plans that wait to go to disk."""
WRITE_AFTER = 0.5


class CapturingError(RuntimeError):
    """A plan is missing, and cannot be built or loaded while a CUDA graph is being captured."""


@dataclass(slots=True)
class Counters:
    """Since the process began; seconds."""

    built: int = 0
    loaded: int = 0
    hits: int = 0
    checked: int = 0
    evicted: int = 0
    build_seconds: float = 0.0
    load_seconds: float = 0.0

    def __str__(self) -> str:
        said = f"{self.built} plans built in {self.build_seconds:.2f} s, {self.hits} found again"
        if self.loaded:
            said += f", {self.loaded} loaded from disk in {self.load_seconds:.2f} s"
        return said + (f", {self.evicted} dropped" if self.evicted else "")


class Plan:
    """An executable graph. `run(pointers in the order of uid)` runs it; workspace: bytes."""

    __slots__ = ("graph", "run", "workspace")

    def __init__(self, device: Device, spec: GraphSpec, graph: Any) -> None:
        self.graph = graph  # whose list of plans must not be asked for once it was loaded: frontend 1.28 crashes
        self.workspace = max(0, int(graph.get_workspace_size()))
        self.run: Run = device.runner(graph, [int(u) for u in spec.uids()], self.workspace)


class Plans:
    """Bounded, safe for threads: one plan is built by one thread, and others that want it wait for it.

    write_after: seconds without a build until plans go to disk, so that neither the call that built one waits for that
    nor the next one that builds; the interpreter does, before it exits.
    """

    def __init__(
        self, store: Callable[[], Store | None], most: int = MOST_PLANS, write_after: float = WRITE_AFTER
    ) -> None:
        self.counters = Counters()
        self._store, self._most, self._write_after = store, most, write_after
        self._unwritten: list[tuple[Device, GraphSpec, Any, Store]] = []
        self._built_at = 0.0
        self._plans: OrderedDict[tuple[int, GraphSpec], Plan] = OrderedDict()
        self._drafts: OrderedDict[tuple[int, GraphSpec], Any] = OrderedDict()
        self._building: dict[tuple[int, GraphSpec], Lock] = {}
        self._captured: dict[tuple[int, GraphSpec], Plan] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, device: Device, spec: GraphSpec) -> Plan:
        """The plan of a graph, from memory, from disk, or built now.

        Raises:
            Unsupported: the library refuses it. CapturingError: there is none, and a CUDA graph is being captured.
        """
        key = (device.index, spec)
        captured = capturing()
        if (found := self._find(key)) is None:
            if captured:
                raise CapturingError(
                    "there is no cuDNN plan for this call, and none can be built while a CUDA graph is being "
                    "captured; run the call once before the capture, backward included"
                )
            with self._lock:
                building = self._building.setdefault(key, Lock())
            with building:
                if (found := self._find(key)) is None:
                    found = self._load(device, spec) or self._build(device, spec)
                    self._keep(key, found)
            with self._lock:
                self._building.pop(key, None)
        if captured:  # the captured graph will run the plan's kernel for as long as it lives
            self._captured[key] = found
        return found

    def check(self, device: Device, spec: GraphSpec) -> None:
        """Ask the library whether it takes a graph, unless there is a plan for it in memory or on disk.

        Raises:
            Unsupported: it refuses.
        """
        key = (device.index, spec)
        if self.has(device, spec) or key in self._drafts:
            return
        if (store := self._store()) is not None and store.file(device.versions(), spec).exists():
            return
        draft = device.draw(spec)
        with self._lock:
            self.counters.checked += 1
            self._drafts[key] = draft
            while len(self._drafts) > MOST_DRAFTS:
                self._drafts.popitem(last=False)

    def has(self, device: Device, spec: GraphSpec) -> bool:
        """Whether its plan is in memory."""
        return (device.index, spec) in self._plans

    def clear(self) -> None:
        """Forget the plans in memory; those on disk stay, and so do those that a captured CUDA graph runs."""
        with self._lock:
            self._plans.clear()
            self._drafts.clear()
            self.counters = Counters()

    def _find(self, key: tuple[int, GraphSpec]) -> Plan | None:
        with self._lock:
            if (found := self._plans.get(key)) is not None:
                self._plans.move_to_end(key)
                self.counters.hits += 1
            return found

    def _keep(self, key: tuple[int, GraphSpec], plan: Plan) -> None:
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
                self.counters.evicted += 1

    def _load(self, device: Device, spec: GraphSpec) -> Plan | None:
        store = self._store()
        data = None if store is None else store.read(device.versions(), spec)
        if store is None or data is None:
            return None
        start = time.perf_counter()
        try:
            plan = Plan(device, spec, device.load(data))
        except Exception:  # whatever it is, the plan can be built
            store.drop(device.versions(), spec)
            return None
        with self._lock:
            self.counters.loaded += 1
            self.counters.load_seconds += time.perf_counter() - start
        return plan

    def _build(self, device: Device, spec: GraphSpec) -> Plan:
        start = time.perf_counter()
        with self._lock:
            graph = self._drafts.pop((device.index, spec), None)
        if graph is None:
            graph = device.draw(spec)
        device.build(graph)
        plan = Plan(device, spec, graph)
        with self._lock:
            self.counters.built += 1
            self.counters.build_seconds += time.perf_counter() - start
        if (store := self._store()) is not None:
            with self._lock:
                self._unwritten.append((device, spec, graph, store))
                self._built_at = time.monotonic()
                first = len(self._unwritten) == 1
            if first:
                Timer(self._write_after, self._write_in_a_pause).start()
        return plan

    def _write_in_a_pause(self) -> None:
        while (
            len(self._unwritten) < MOST_UNWRITTEN
            and (left := self._built_at + self._write_after - time.monotonic()) > 0
        ):
            time.sleep(left)
        self.flush()

    def flush(self) -> None:
        """Write to disk what was built and is not there yet."""
        with self._lock:
            unwritten, self._unwritten = self._unwritten, []
        for device, spec, graph, store in unwritten:
            try:
                store.write(device.versions(), spec, bytes(graph.serialize()))
            except Exception as error:  # the plan in memory is as good as before
                warnings.warn(f"attnrt: a cuDNN plan could not be kept on disk: {error}", stacklevel=2)


def default_store() -> Store:
    """In the cache directory that ATTNRT_CACHE_DIR names."""
    from attnrt.runtime import variables

    return Store(variables().cache_dir / "cudnn" / "plans")


PLANS = Plans(default_store)
"""Of this process."""
