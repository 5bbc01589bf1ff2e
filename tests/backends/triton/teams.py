"""A stand-in for Gluon and its machine: threads for warps, torch for wgmma, memory that is overwritten as soon as it
may be and read as late as it may be. The Hopper kernels' own functions run in it, on the CPU."""

from __future__ import annotations

import math
import threading
import time
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch


class Barrier:
    """mbarrier: a phase ends when all arrivals are in and all announced bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0
            if self.pending == self.bytes == 0:
                self.pending = self.count
                self.phase += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, timeout=20), "deadlock"


def barriers(*kinds: tuple[int, int]) -> tuple[Any, ...]:
    """(slots, arrivals of a phase) of each."""
    return tuple(SimpleNamespace(index=[Barrier(count) for _ in range(n)].__getitem__) for n, count in kinds)


def arrive(barrier: Barrier, count: int) -> None:
    barrier.update(count, 0)
    time.sleep(1e-3)  # whoever waited for this goes first, and overwrites what it may


class Memory:
    """Shared memory: a ring, a slot of it, or a view of a slot."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, slot: int) -> Memory:
        return Memory(self.data[slot])

    def reshape(self, shape: list[Any]) -> Memory:
        return Memory(self.data.view([int(n) for n in shape]))

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.data.narrow(dim, int(start), int(length)))

    def load(self, _: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        self.data.copy_(value)


def memory(*shape: int, dtype: torch.dtype) -> Memory:
    return Memory(torch.full(shape, math.nan, dtype=dtype))


class Pointer(NamedTuple):
    data: torch.Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:  # type: ignore[override]
        return Pointer(self.data, self.at + offset)


class Products(threading.local):
    """Products of a warp group in flight. They run when they are waited for, the latest that they may."""

    def __init__(self) -> None:
        self.queue: list[SimpleNamespace] = []

    def start(self, a: Any, b: Memory, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        self.queue.append(SimpleNamespace(a=a, b=b, acc=acc if use_acc else 0))
        return self.queue[-1]

    def wait(self, outstanding: int, deps: list[Any]) -> Any:
        while len(self.queue) > outstanding:
            one = self.queue.pop(0)
            a = one.a.data if isinstance(one.a, Memory) else one.a
            assert a.dtype == one.b.dtype
            acc = one.acc.value if isinstance(one.acc, SimpleNamespace) else one.acc  # of a product before it
            one.value = acc + a.float() @ one.b.data.float()
        values = tuple(one.value for one in deps)
        return values if len(values) > 1 else values[0]


def tile_at(x: torch.Tensor, at: list[int], rows: int) -> torch.Tensor:
    """(rows, D) of a tensor, cut off where it ends."""
    *outer, row, _ = at
    return x[tuple(outer)][row : row + rows]


def load(x: torch.Tensor, at: list[int], barrier: Barrier, to: Memory) -> None:
    found = tile_at(x, at, to.shape[-2])
    to.data.zero_()
    to.data.view(to.shape[-2:])[: len(found)] = found
    barrier.update(0, -to.data.nbytes)


class Copies(threading.local):
    """What leaves shared memory by tensor map. Like products, as late as it may."""

    ADDING = threading.Lock()

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, Memory, bool]] = []

    def store(self, x: torch.Tensor, at: list[int], source: Memory) -> None:
        self.queue.append((tile_at(x, at, source.shape[-2]), source, False))

    def add(self, x: torch.Tensor, at: list[int], source: Memory) -> None:
        self.queue.append((tile_at(x, at, source.shape[-2]), source, True))

    def wait(self, outstanding: int) -> None:
        while len(self.queue) > outstanding:
            to, source, adds = self.queue.pop(0)
            value = source.data.view(source.shape[-2:])[: len(to)]
            with self.ADDING:
                to.add_(value) if adds else to.copy_(value)


def scatter(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    mask = mask.expand(pointer.at.shape)
    pointer.data[pointer.at[mask]] = value[mask]


def lowest(choose: Any) -> Any:
    def of(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return choose(torch.as_tensor(a), torch.as_tensor(b))
        return a if choose(torch.tensor(a), torch.tensor(b)) == a else b

    return of


def run(
    modules: tuple[ModuleType, ...],
    names: tuple[str, ...],
    constants: dict[str, Any],
    calls: list[tuple[str, tuple[Any, ...]]],
    program: int,
    programs: int,
) -> None:
    """One program: the functions `names` of a kernel, each written in one of `modules`; `calls` of them are its teams,
    side by side."""
    layouts = dict.fromkeys(
        ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout"), lambda *_, **__: None
    )
    gl = SimpleNamespace(
        **layouts, float32=torch.float32, int64=torch.int64, int32=torch.int32, static_range=range,
        program_id=lambda _: program, num_programs=lambda _: programs,
        inline_asm_elementwise=lambda *_, **__: program,  # which asks for it, and for nothing else
        minimum=lowest(torch.minimum), maximum=lowest(torch.maximum), where=torch.where,
        exp2=torch.exp2, log2=torch.log2, max=torch.amax, sum=torch.sum, cast=lambda x, _: x, store=scatter,
        load=lambda pointer: int(pointer.data[pointer.at]),
        arange=lambda a, b, _: torch.arange(int(a), int(b)), convert_layout=lambda x, *_, **__: x,
        zeros=lambda shape, dtype, _: torch.zeros([int(n) for n in shape]),
        full=lambda shape, value, dtype, _: torch.full([int(n) for n in shape], value),
    )  # fmt: skip
    products, copies = Products(), Copies()
    world: dict[str, Any] = constants | {
        "gl": gl, "LN2": math.log(2), "float": float, "range": range,
        "mbarrier": SimpleNamespace(
            wait=lambda bar, parity: bar.wait(parity), expect=lambda bar, size: bar.update(1, size), arrive=arrive,
        ),
        "tma": SimpleNamespace(store_wait=copies.wait),
        "tma_load": load, "tma_store": copies.store, "tma_add": copies.add,
        "fence_async_shared": lambda: None, "warpgroup_mma": products.start, "warpgroup_mma_wait": products.wait,
    }  # fmt: skip
    for name in names:
        found = (vars(m)[name].fn for m in modules if name in vars(m))
        own = next(f for f in found if f.__module__ in {m.__name__ for m in modules})
        world[name] = FunctionType(own.__code__, world)
    errors: list[BaseException] = []

    def guarded(name: str, args: tuple[Any, ...]) -> None:
        try:
            world[name](*args)
            assert not products.queue and not copies.queue, "left before its work was done"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
