"""What cuDNN itself does at the edges, on the GPU that is here: one line for each question. Nothing is cleared.

    PYTHONPATH=.:tests python tools/cudnn_facts.py [--only nan_in_pages,bias_of_one_row]

The adapter clears what the library leaves undefined; which clearing is needed, and what is fast enough, is seen here.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from oracle import Case
from torch import Tensor

from attnrt.backends.cudnn.adapter import Call, Passed
from attnrt.backends.cudnn.device import device
from attnrt.backends.cudnn.graphs import Uid
from attnrt.backends.cudnn.plans import PLANS
from attnrt.backends.cudnn.rows import lengths
from attnrt.operands import Operands

BF16 = torch.bfloat16
QUESTIONS: list[Callable[[], str]] = []


def question(ask: Callable[[], str]) -> Callable[[], str]:
    QUESTIONS.append(ask)
    return ask


def make(
    q_rows: int, k_rows: int, batch: int = 2, heads: tuple[int, int] = (2, 2), layout: str = "bshd", dim: int = 64,
    training: bool = True, operands: Operands | None = None, **options: Any,
) -> Case:  # fmt: skip
    torch.manual_seed(0)

    def x(h: int, n: int) -> Tensor:
        size = {"bshd": (batch, n, h, dim), "bhsd": (batch, h, n, dim), "thd": (n, h, dim)}[layout]
        return torch.randn(size, device="cuda").to(BF16).requires_grad_(training)

    q, k, v = x(heads[0], q_rows), x(heads[1], k_rows), x(heads[1], k_rows)
    return Case(q, k, v, layout, operands or Operands(), torch.randn_like(q), {"return_lse": True, **options})


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


class Raw(Call):
    """The library's results with nothing done to them, written over NaN."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.request(), device(0))
        self.case, self.may_die, self.clearing = case, False, None

    def go(self) -> tuple[Tensor, Tensor]:
        case, r = self.case, self.request
        launch = self._forward_launch(case.q, case.k, case.v, case.operands)
        self.out = torch.full_like(case.q, math.nan)
        self.stats = self._new_stats(case.q).fill_(math.nan)
        given, self.seed, kept = self._operands(case.operands, case.q.device, pages=launch.spec.pages)
        given |= {
            Uid.Q: case.q.data_ptr(), Uid.K: case.k.data_ptr(), Uid.V: case.v.data_ptr(),
            Uid.O: self.out.data_ptr(), Uid.STATS: self.stats.data_ptr(),
        }  # fmt: skip
        if self.shape.lengths:
            of_padded = None if r.packed else lengths(r, case.operands, case.q.device)
            places = launch.places(case.operands, of_padded, case.q.device)
            given |= places.addresses()
        launch.plan.run([given[u] for u in launch.spec.uids()])
        self.launch = launch
        torch.cuda.synchronize()
        del kept
        return self.out, self._lse(self.stats, case.operands)

    def back(self, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """dq, dk, dv over NaN; `out`: in the place of the forward's."""
        case = self.case
        passed = Passed(self.out if out is None else out, None, self.stats, self.seed, self.launch)
        assert case.grad is not None
        found = self.backward(case.q, case.k, case.v, case.operands, passed, case.grad)
        torch.cuda.synchronize()
        return tuple(x for x in found if x is not None)

    def _gradient(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, clear: bool) -> Tensor:
        return torch.full(size, math.nan, dtype=dtype, device=device)


def seen(x: Tensor) -> str:
    """What is in a tensor, in a word."""
    x = x.detach().float().flatten()
    if not x.numel():
        return "nothing"
    kinds = {
        "NaN": x.isnan(), "zero": x == 0, "-inf": x == -math.inf, "+inf": x == math.inf,
        "numbers": x.isfinite() & (x != 0),
    }  # fmt: skip
    return "+".join(f"{name} {100 * float(m.float().mean()):.0f}%" for name, m in kinds.items() if m.any())


def by_rows(out: Tensor, lse: Tensor, b: int, rows: slice) -> str:
    return f"O {seen(out[b, rows])}, LSE {seen(lse[b, :, rows])}"


@question
def padded_rows_dense() -> str:
    """Rows after a sequence's end, plain strides (bhsd cache shape, inference, one query)."""
    case = make(1, 64, 3, training=False, operands=Operands(seqlens_kv=ints(64, 5, 0)))
    out, lse = Raw(case).go()
    return f"kv 64: {by_rows(out, lse, 0, slice(0, 1))} | kv 0: {by_rows(out, lse, 2, slice(0, 1))}"


@question
def padded_rows_several_queries() -> str:
    table = torch.arange(4, device="cuda", dtype=torch.int32).reshape(2, 2)
    case = make(
        16, 64, 2, training=False, operands=Operands(seqlens_q=ints(16, 5), seqlens_kv=ints(64, 30), page_table=table)
    )
    k, v = (torch.randn(4, 32, 2, 64, device="cuda").to(BF16) for _ in range(2))
    case.k, case.v = k, v
    raw = Raw(case)
    out, lse = raw.go()
    return f"live {by_rows(out, lse, 1, slice(0, 5))} | beyond {by_rows(out, lse, 1, slice(5, 16))}"


def lengths_case(layout: str = "bshd", **options: Any) -> Case:
    operands = Operands(seqlens_q=ints(200, 100, 50, 0), seqlens_kv=ints(200, 60, 0, 30))
    return make(200, 200, 4, layout=layout, operands=operands, **options)


@question
def ragged_forward() -> str:
    out, lse = Raw(lengths_case()).go()
    return (
        f"live {by_rows(out, lse, 1, slice(0, 100))} | beyond {by_rows(out, lse, 1, slice(100, 200))} | "
        f"no key: {by_rows(out, lse, 2, slice(0, 50))}"
    )


@question
def ragged_forward_bottom_right_dead_rows() -> str:
    out, lse = Raw(lengths_case(causal=True, alignment="bottom_right")).go()
    dead, live = (by_rows(out, lse, 1, rows) for rows in (slice(0, 40), slice(40, 100)))
    return f"40 rows before the first key: {dead} | live {live}"


@question
def ragged_backward() -> str:
    raw = Raw(lengths_case())
    raw.go()
    dq, dk, dv = raw.back()
    return (
        f"dq live {seen(dq[1, :100])}, beyond {seen(dq[1, 100:])}, no key {seen(dq[2, :50])} | dk live "
        f"{seen(dk[1, :60])}, beyond {seen(dk[1, 60:])}, no query {seen(dk[3, :30])}, dv no query {seen(dv[3, :30])}"
    )


@question
def ragged_backward_dead_rows() -> str:
    said = []
    for fill in (None, math.inf):
        raw = Raw(lengths_case(causal=True, alignment="bottom_right"))
        raw.go()
        if fill is not None:
            raw.stats[1, :40] = fill
            raw.out[1, :40] = 0
        dq, dk, _ = raw.back()
        said.append(f"LSE {fill}: dq dead {seen(dq[1, :40])} live {seen(dq[1, 40:100])} dk {seen(dk[1, :60])}")
    return " | ".join(said)


@question
def nan_in_padding() -> str:
    said = []
    for name, case in (
        ("ragged", lengths_case()),
        ("bhsd", lengths_case("bhsd")),
        ("cache", make(1, 200, 4, training=False, operands=Operands(seqlens_kv=ints(200, 60, 1, 30)))),
    ):
        with torch.no_grad():
            kv = case.operands.seqlens_kv.tolist()  # type: ignore[union-attr]
            for b, n in enumerate(kv):
                for x in (case.k, case.v):
                    (x[b, :, n:] if case.layout == "bhsd" else x[b, n:]).fill_(math.nan)
        raw = Raw(case)
        out, lse = raw.go()
        row = out[1, :, :100] if case.layout == "bhsd" else out[1, :100]
        line = f"{name}: O {seen(row)}, LSE {seen(lse[1, :, :100])}"
        if name != "cache":
            dq, dk, dv = raw.back()
            part = (lambda x, n: x[1, :, :n]) if case.layout == "bhsd" else (lambda x, n: x[1, :n])
            line += f", dq {seen(part(dq, 100))}, dk {seen(part(dk, 60))}, dv {seen(part(dv, 60))}"
        said.append(line)
    return " | ".join(said)


@question
def nan_in_packed_tail() -> str:
    cu = torch.tensor([0, 100, 130], dtype=torch.int32, device="cuda")
    case = make(
        140,
        140,
        layout="thd",
        operands=Operands(cu_seqlens_q=cu, cu_seqlens_kv=cu),
        max_seqlen_q=100,
        max_seqlen_kv=100,
    )
    with torch.no_grad():
        for x in (case.q, case.k, case.v, case.grad):
            assert x is not None
            x[130:] = math.nan
    raw = Raw(case)
    out, lse = raw.go()
    grads = raw.back()
    return f"O {seen(out[:130])}, tail {seen(out[130:])}; LSE {seen(lse[:, :130])}; " + ", ".join(
        f"{n} {seen(g[:130])} tail {seen(g[130:])}" for n, g in zip(("dq", "dk", "dv"), grads, strict=True)
    )


@question
def bias_rows_of_minus_infinity() -> str:
    said = []
    for fill in (None, math.inf):
        bias = torch.zeros(1, 1, 128, 128, device="cuda", dtype=BF16)
        bias[:, :, 7] = -math.inf
        raw = Raw(make(128, 128, layout="bhsd", operands=Operands(bias=bias)))
        out, lse = raw.go()
        line = f"O {seen(out[:, :, 7])}, LSE {seen(lse[:, :, 7])}"
        if fill is not None:
            raw.stats[:, :, 7] = fill
            raw.out[:, :, 7] = 0
        dq, dk, _ = raw.back()
        said.append(f"LSE {fill}: {line}, dq row {seen(dq[:, :, 7])}, dk {seen(dk)}")
    return " | ".join(said)


@question
def unwritten_outputs() -> str:
    """Does every element of dbias and dsinks get written, or added to what is there?"""
    bias = torch.randn(1, 2, 130, 130, device="cuda").to(BF16).requires_grad_()
    raw = Raw(make(130, 130, operands=Operands(bias=bias)))
    raw.go()
    dbias = raw.back()[3]
    sinks = torch.randn(2, device="cuda", requires_grad=True)
    raw = Raw(make(130, 130, operands=Operands(sinks=sinks)))
    raw.go()
    return f"over NaN: dbias {seen(dbias)}, dsinks {seen(raw.back()[3])}"


@question
def expanded_keys() -> str:
    said = []
    for dim in (0, 2):
        case = make(128, 128, heads=(4, 4), training=False)
        k = case.k.narrow(dim, 0, 1).expand(case.k.shape)
        case.k = k
        out, _ = Raw(case).go()
        case.k = k.contiguous()
        want, _ = Raw(case).go()
        said.append(f"dim {dim}: equal {torch.equal(out, want)}")
    return ", ".join(said)


def timed(call: Callable[[], Any], times: int = 20) -> float:
    """Microseconds on the device, median, L2 flushed."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for _ in range(3):
        call()
    for a, b in events:
        flush.zero_()
        a.record()
        call()
        b.record()
    torch.cuda.synchronize()
    return sorted(1e3 * a.elapsed_time(b) for a, b in events)[times // 2]


@question
def speed_of_lengths() -> str:
    """Full sequences, said to be so: what a padding mask, offsets and a bucket cost."""
    said = []
    for n in (2048, 2100):
        times = {}
        full = ints(*(n,) * 4)
        cu = torch.arange(5, device="cuda", dtype=torch.int32) * n
        for name, options in {
            "plain": {},
            "padded": {"operands": Operands(seqlens_q=full, seqlens_kv=full)},
            "padded bhsd": {"operands": Operands(seqlens_q=full, seqlens_kv=full), "layout": "bhsd"},
            "padded bhsd GQA": {"operands": Operands(seqlens_q=full, seqlens_kv=full), "layout": "bhsd"},
            "padded GQA": {"operands": Operands(seqlens_q=full, seqlens_kv=full)},
            "packed": {"operands": Operands(cu_seqlens_q=cu, cu_seqlens_kv=cu), "layout": "thd"},
        }.items():
            rows = 4 * n if name == "packed" else n
            longest = {"max_seqlen_q": n, "max_seqlen_kv": n} if name == "packed" else {}
            heads = (16, 4 if "GQA" in name else 16)
            case = make(rows, rows, 4, heads=heads, dim=128, causal=True, **options, **longest)  # type: ignore[arg-type]
            call = Call(case.request(), device(0))
            passed = call.forward(case.q, case.k, case.v, case.operands)
            forward = timed(lambda: call.forward(case.q, case.k, case.v, case.operands))  # noqa: B023
            backward = timed(lambda: call.backward(case.q, case.k, case.v, case.operands, passed, case.grad))  # noqa: B023
            times[name] = f"{forward:.0f}/{backward:.0f}"
        said.append(f"S={n} us forward/backward {times}")
    return " | ".join(said)


@question
def host_time() -> str:
    case = make(128, 128, heads=(4, 4), training=False, return_lse=False)
    call = Call(case.request(), device(0))
    launch = call._forward_launch(case.q, case.k, case.v, case.operands)
    out = torch.empty_like(case.q)
    pointers = [x.data_ptr() for x in (case.q, case.k, case.v, out)]

    def loop(f: Callable[[], Any]) -> float:
        for _ in range(50):
            f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            f()
        took = time.perf_counter() - start
        torch.cuda.synchronize()
        return 1e6 * took / 300

    graph, handle = launch.plan.graph, device(0).handle
    pack = dict(zip((1, 2, 3, 4), pointers, strict=True))
    workspace = torch.empty(max(1, launch.plan.workspace), dtype=torch.uint8, device="cuda")
    return (
        f"direct {loop(lambda: launch.plan.run(pointers)):.1f} us, graph.execute "
        f"{loop(lambda: graph.execute(pack, workspace.data_ptr(), handle=handle)):.1f}, adapter forward "
        f"{loop(lambda: call.forward(case.q, case.k, case.v, case.operands)):.1f}"
    )


@question
def host_time_in_autograds_thread() -> str:
    """A backward's execute, called here and from the thread in which autograd runs backwards on a GPU: with the handle
    that this thread uses too, with one of its own, and with nothing to do. Medians; whole: of `torch.autograd.grad`."""
    from array import array

    from attnrt.backends.cudnn.device import _direct, create_handle, current_stream

    case = make(128, 128, heads=(4, 4), return_lse=False, causal=True)
    gpu, call = device(0), Call(case.request(), device(0))
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    out, stats, launch = call.plain_forward(q, k, v)
    assert stats is not None and case.grad is not None
    grads = call.plain_backward(launch, q, k, v, out, stats, case.grad)
    plan = launch.backwards[case.grad.stride()].plan
    pointers = [x.data_ptr() for x in (q, k, v, out, stats, case.grad, *grads)]
    own = create_handle(gpu.cudnn, 0)
    gpu.cudnn.set_stream(handle=own, stream=current_stream(0))
    direct = _direct(plan.graph)
    assert direct is not None
    execute, index = direct
    given = array("Q", pointers)
    workspace = torch.empty(max(1, plan.workspace), dtype=torch.uint8, device="cuda")
    address, count, space = given.buffer_info()[0], len(pointers), workspace.data_ptr()
    ways: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "shared handle": lambda: execute(address, count, space, gpu.raw, index),
        "own handle": lambda: execute(address, count, space, int(getattr(own, "backend_handle", own)), index),
        "plan.run": lambda: plan.run(pointers),
        "workspace alone": lambda: torch.empty(plan.workspace, dtype=torch.uint8, device=gpu.torch_device),
        "three gradients alone": lambda: [torch.empty_like(x) for x in (q, k, v)],
    }

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, way: Callable[[], Any], spent: list[float]) -> Tensor:
            ctx.way, ctx.spent = way, spent
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            start = time.perf_counter()
            ctx.way()
            ctx.spent.append(time.perf_counter() - start)
            return grads[0], None, None

    def median(times: list[float]) -> str:
        return f"{1e6 * sorted(times)[len(times) // 2]:.1f}"

    x, said = torch.zeros(8, device="cuda", requires_grad=True), []
    ones = torch.ones(8, device="cuda")
    for name, way in ways.items():
        here: list[float] = []
        there: list[float] = []
        whole: list[float] = []
        for _ in range(300):
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            here.append(time.perf_counter() - start)
            y = Node.apply(x, way, there)
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(y, x, ones)
            whole.append(time.perf_counter() - start)
        said.append(f"{name}: here {median(here)} us, there {median(there)}, whole {median(whole)}")
    return "\n  " + "\n  ".join(said)


@question
def kernel_cache_across_lengths() -> str:
    """Forward plans that share compiled kernels: seconds for each of five lengths, and whether the numbers hold."""
    from attnrt.backends.cudnn.drawing import Unsupported, draw
    from attnrt.backends.cudnn.graphs import forward_spec

    gpu, times = device(0), []
    shared = gpu.cudnn.create_kernel_cache()
    for n in (1024, 1152, 1000, 2048, 1537):
        case = make(n, n, training=False, causal=True, return_lse=False)
        spec = forward_spec(case.request(), gpu.sm)
        start = time.perf_counter()
        try:
            graph = draw(gpu.cudnn, spec, handle=gpu.builder(), is_dynamic_shape_enabled=True, kernel_cache=shared)
            gpu.build(graph)
        except Unsupported as error:
            return f"refused: {error}"
        took = time.perf_counter() - start
        out = torch.empty_like(case.q)
        pack = dict(zip((1, 2, 3, 4), (x.data_ptr() for x in (case.q, case.k, case.v, out)), strict=True))
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
        gpu.set_stream(torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace.data_ptr(), handle=gpu.handle)
        torch.cuda.synchronize()
        want = Call(case.request(), gpu).forward(case.q, case.k, case.v, case.operands).out
        gap = float((out.float() - want.float()).norm() / want.float().norm())
        times.append(f"{n}: {1e3 * took:.0f} ms, {gap:.1e} apart")
    return ", ".join(times)


def apart(found: Tensor, want: Tensor) -> str:
    found, want = found.double(), want.double()
    bad = (~found.isfinite() & want.isfinite()).double().mean()
    gap = torch.where(found.isfinite() & want.isfinite(), found - want, 0).norm() / want[want.isfinite()].norm()
    return f"{float(gap):.0e}" + (f" and {100 * float(bad):.0f}% not finite" if bad else "")


@cache
def built(spec: Any) -> dict[str, tuple[Any, int] | str]:
    """Every plan that the library has for a graph, by name: its graph and index, or why it does not build."""
    from attnrt.backends.cudnn.drawing import draw

    graph, found = draw(device(0).cudnn, spec, every_engine=True, handle=device(0).handle), {}
    for i in range(graph.get_execution_plan_count()):
        name = f"{i} {graph.get_plan_name_at_index(i)}"
        try:
            graph.build_plan_at_index(i)
            found[name] = (graph, i)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def by_plans(
    spec: Any, tensors: dict[Uid, int], out: Tensor, times: dict[str, float] | None = None
) -> dict[str, Tensor | str]:
    """What each of the library's plans for a graph writes into `out`, by the plan's name; `times`: us on the device."""
    gpu, found = device(0), {}
    pack = {int(u): p for u, p in tensors.items()}
    for name, plan in built(spec).items():
        if isinstance(plan, str):
            found[name] = plan
            continue
        graph, i = plan
        size = max(1, graph.get_workspace_size_plan_at_index(i))
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        gpu.set_stream(torch.cuda.current_stream().cuda_stream)

        def go(graph: Any = graph, i: int = i, workspace: Tensor = workspace) -> None:
            graph.execute_plan_at_index(pack, workspace.data_ptr(), i, handle=gpu.handle)

        if times is not None:
            times[name] = timed(go)
        out.fill_(math.nan)
        go()
        torch.cuda.synchronize()
        found[name] = out.clone()
    return found


@question
def nan_in_pages() -> str:
    """Several queries against pages, by plan: what NaN in unused slots, or in unused pages only, does to live rows, and
    what each takes beside Triton's kernel. drawing.BY_ROWS has the engines that let nothing in."""
    said = []
    for layout, queries, size, causal, longest in (
        ("bhsd", 4, 16, True, 640), ("bshd", 4, 16, True, 640), ("bhsd", 4, 16, False, 640),
        ("bhsd", 4, 128, True, 640), ("bhsd", 200, 64, True, 640), ("bhsd", 1, 16, False, 640),
        ("bshd", 4, 64, True, 16384), ("bshd", 512, 64, True, 16384),
    ):  # fmt: skip
        lengths_kv, pages = (longest, 77, longest // 2 + 13), longest // size
        table = torch.arange(3 * pages, device="cuda", dtype=torch.int32).reshape(3, pages)
        options = {"causal": True, "alignment": "bottom_right"} if causal else {}
        operands = Operands(seqlens_kv=ints(*lengths_kv), page_table=table)
        case = make(
            queries, longest, 3, (16, 4), layout, 128, training=False, operands=operands, return_lse=False, **options
        )
        pool = (3 * pages, 4, size, 128) if layout == "bhsd" else (3 * pages, size, 4, 128)
        whole = [torch.randn(pool, device="cuda").to(BF16) for _ in range(2)]
        kinds: dict[str, dict[str, Tensor | str]] = {}
        times: dict[str, float] = {}
        for kind in ("numbers", "NaN in unused pages", "NaN in unused slots"):
            case.k, case.v = poisoned(whole, layout, lengths_kv, size, kind)
            raw = Raw(case)
            launch = raw._forward_launch(case.q, case.k, case.v, case.operands)
            out = torch.empty_like(case.q)
            given, _, kept = raw._operands(case.operands, case.q.device, pages=launch.spec.pages)
            places = launch.places(case.operands, lengths(raw.request, case.operands, case.q.device), case.q.device)
            given |= {Uid.Q: case.q.data_ptr(), Uid.K: case.k.data_ptr(), Uid.V: case.v.data_ptr()}
            given |= {Uid.O: out.data_ptr(), **places.addresses()}
            tensors = {u: given[u] for u in launch.spec.uids()}
            kinds[kind] = by_plans(launch.spec, tensors, out, times if kind == "numbers" else None)
            del kept
        title = f"{layout} {queries}q p{size} kv{longest} {'causal ' if causal else ''}"
        said.append(f"{title}triton: {by_triton(case)}")
        for name, want in kinds["numbers"].items():
            if isinstance(want, str):
                said.append(f"{title}{name}: {want}")
                continue
            others = {k: found[name] for k, found in kinds.items() if k != "numbers"}
            line = ", ".join(f"{k} {x if isinstance(x, str) else apart(x, want)}" for k, x in others.items())
            said.append(f"{title}plan {name}: {times.get(name, math.nan):.0f} us, {line}")
    return "\n  " + "\n  ".join(said)


def poisoned(whole: list[Tensor], layout: str, lengths_kv: tuple[int, ...], size: int, kind: str) -> list[Tensor]:
    """Pools in which nobody's slots, or only nobody's pages, hold NaN."""
    pools = [x.clone() for x in whole]
    if kind == "numbers":
        return pools
    pages = len(whole[0]) // len(lengths_kv)
    for x in pools:
        for b, n in enumerate(lengths_kv):
            first = b * pages + -(-n // size)
            x[first : (b + 1) * pages] = math.nan
            if kind == "NaN in unused slots" and n % size:
                (x[first - 1, :, n % size :] if layout == "bhsd" else x[first - 1, n % size :]).fill_(math.nan)
    return pools


def by_triton(case: Case) -> str:
    """Device time of the same call by our Triton kernel."""
    import attnrt

    operands = {n: t for n, t in zip(Operands._fields, case.operands, strict=True) if t is not None}
    options = {n: x for n, x in case.options.items() if n != "return_lse"}

    def go() -> Any:
        return attnrt.attention(case.q, case.k, case.v, layout=case.layout, backend="triton", **operands, **options)

    try:
        return f"{timed(go):.0f} us"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"


@question
def bias_of_one_row() -> str:
    """A bias (B, 1, 1, Skv) beside the same one written out, and beside one whose rows have stride 0."""
    bias = torch.randn(2, 1, 1, 384, device="cuda").to(BF16)
    full = bias.expand(2, 1, 384, 384)
    said, want = [], None
    for name, given in (("written out", full.contiguous()), ("one row", bias), ("stride 0", full)):
        case = make(384, 384, heads=(4, 4), dim=128, operands=Operands(bias=given))
        raw = Raw(case)
        if name == "stride 0":
            from attnrt.backends.cudnn import launch as launches

            keep, launches.readable = launches.readable, lambda bias: bias
            import attnrt.backends.cudnn.call as calls

            before, calls.readable = calls.readable, lambda bias: bias
        try:
            out, lse = raw.go()
            found = (out, lse, *raw.back())
        finally:
            if name == "stride 0":
                launches.readable, calls.readable = keep, before
        if want is None:
            want = found
        else:
            pairs = zip(("O", "LSE", "dq", "dk", "dv"), found, want, strict=False)
            said.append(f"{name}: " + ", ".join(f"{n} {apart(x, y)}" for n, x, y in pairs))
    return " | ".join(said)


@question
def packed_single_queries() -> str:
    """A bucket of one query, as it was, beside the bucket of 128 that is used."""
    from attnrt.backends.cudnn import layouts

    said = []
    for heads in ((8, 8), (8, 2)):
        found = []
        for buckets in ((128, 512, 2048), (1, 128, 512, 2048)):
            keep, layouts.LENGTH_BUCKETS = layouts.LENGTH_BUCKETS, buckets
            try:
                cu_q, cu_kv = ints(0, 1, 2, 3), ints(0, 50, 750, 753)
                operands = Operands(cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
                longest = {"max_seqlen_q": 1, "max_seqlen_kv": 700}
                raw = Raw(make(3, 753, heads=heads, layout="thd", dim=128, operands=operands, **longest))
                out, lse = raw.go()
                found.append((out, lse, *raw.back()))
            finally:
                layouts.LENGTH_BUCKETS = keep
        pairs = zip(("O", "LSE", "dq", "dk", "dv"), found[1], found[0], strict=True)
        said.append(f"{heads}: " + ", ".join(f"{n} {apart(x, y)}" for n, x, y in pairs))
    return " | ".join(said)


@question
def plan_times() -> str:
    return f"{PLANS.counters}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="some of " + ", ".join(q.__name__ for q in QUESTIONS))
    only = parser.parse_args().only
    if unknown := set(only.split(",") if only else ()) - {q.__name__ for q in QUESTIONS}:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    start = time.perf_counter()
    gpu = device(0)
    print(f"{', '.join(gpu.versions())}; handle in {1e3 * (time.perf_counter() - start):.0f} ms")
    for ask in QUESTIONS:
        if only and ask.__name__ not in only.split(","):
            continue
        start = time.perf_counter()
        try:
            said = ask()
        except Exception as error:
            said = f"FAILED {type(error).__name__}: {str(error)[:400]}"
            traceback.print_exc(limit=-3)
            if "CUDA error" in said or "illegal" in said:
                print(f"{ask.__name__}: {said}\nthe CUDA context is lost with it; what follows was not asked")
                break
        print(f"{ask.__name__} ({time.perf_counter() - start:.1f} s): {said}", flush=True)


if __name__ == "__main__":
    main()
