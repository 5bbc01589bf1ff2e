"""What is remembered between calls, and that nobody can tell from the results."""

from __future__ import annotations

import gc
import inspect
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnrt
from attnrt import environment, runtime

pytestmark = pytest.mark.usefixtures("fresh")


def tensors(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape or (1, 2, 16, 8), dtype=dtype).requires_grad_(grad) for _ in range(3)]


def last() -> attnrt.Decision:
    decision = attnrt.last_decision()
    assert decision is not None
    return decision


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in `count` threads that switch as often as they can, and raise the first error of theirs."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


# ---- plans


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    first = attnrt.attention(q, k, v, causal=True)
    monkeypatch.setattr(runtime, "decide", lambda *a, **b: pytest.fail("decided again"))
    assert torch.equal(attnrt.attention(q, k, v, causal=True), first)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_PLANS", 8)
    q, k, v = tensors()
    for i in range(100):
        attnrt.attention(q, k, v, scale=1.0 + i)
        assert len(runtime.plans) <= 8
        assert list(runtime.plans.values())[-1].decision.request.scale == 1.0 + i, "the newest stays"
    assert len(runtime.plans) >= 6, "the oldest quarter goes, not everything"


def test_a_plan_keeps_no_tensor() -> None:
    q, k, v = tensors()
    bias, mask, sinks = torch.randn(16, 16), torch.ones(16, 16, dtype=torch.bool), torch.zeros(2)
    attnrt.attention(q, k, v, bias=bias, mask=mask, sinks=sinks)
    alive = [weakref.ref(t) for t in (q, k, v, bias, mask, sinks)]
    del q, k, v, bias, mask, sinks
    gc.collect()
    assert runtime.plans and not any(reference() is not None for reference in alive)


def test_refused_calls_are_not_remembered() -> None:
    for _ in range(2):
        with pytest.raises(attnrt.BackendUnavailable):
            attnrt.attention(*tensors(), backend="cudnn")
    assert not runtime.plans


@pytest.mark.parametrize("given", [[3, 0], [3, None]])
def test_a_list_for_window(given: list[int | None]) -> None:
    """Accepted by every check, so it works, the first time and the next."""
    q, k, v = tensors()
    want = attnrt.attention(q, k, v, window=(given[0], given[1]))
    for _ in range(2):
        assert torch.equal(attnrt.attention(q, k, v, window=given), want)  # type: ignore[call-overload]
    assert attnrt.explain(q, k, v, window=given).request == last().request  # type: ignore[arg-type]


# ---- threads


def test_threads_get_their_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shapes, and so few plans that they are made and dropped all the time."""
    monkeypatch.setattr(runtime, "MAX_PLANS", 8)

    def work(i: int) -> None:
        for n in range(40):
            length, causal = 1 + (5 * n + i) % 23, n % 2 == 0
            q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
            out = attnrt.attention(q, k, v, causal=causal, scale=0.5)
            want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5)
            torch.testing.assert_close(out, want)
            assert (last().request.seqlen_q, last().request.causal) == (length, causal)

    in_threads(8, work)
    assert len(runtime.plans) <= 8


def test_refresh_in_another_thread() -> None:
    q, k, v = tensors()
    want = attnrt.attention(q, k, v)
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for _ in range(300):
                attnrt.refresh()
            done.set()
            return
        while not done.is_set():
            torch.testing.assert_close(attnrt.attention(q, k, v), want)

    in_threads(4, work)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = tensors(grad=True)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            out = attnrt.attention(q, k, v, causal=True)
            explained = attnrt.explain(q, k, v, causal=True)
            theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert out.dtype == theirs.dtype == dtype
        assert explained.request == last().request
        assert explained.label == last().label
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    assert attnrt.attention(q, k, v, causal=True).dtype == torch.float32, "outside it nothing is cast"


def test_autocast_leaves_float64() -> None:
    q, k, v = tensors(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attnrt.attention(q, k, v)
        assert attnrt.explain(q, k, v).request == last().request
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_autocast_unites_dtypes() -> None:
    """Projections under autocast give bf16, a cache may be float32."""
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attnrt.attention(q.bfloat16(), k, v).dtype == torch.bfloat16
    with pytest.raises(attnrt.AttnrtError, match="dtype"):
        attnrt.attention(q.bfloat16(), k, v)


def test_autocast_off_inside() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attnrt.attention(q, k, v).dtype == torch.float32


# ---- modes


def test_gradient_modes_decide_for_themselves() -> None:
    q, k, v = tensors(grad=True)
    modes: dict[str, Any] = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    for name in ("grad", "no_grad", "inference_mode", "no_grad", "grad", "inference_mode"):
        with modes[name]():
            out = attnrt.attention(q, k, v)
            assert attnrt.explain(q, k, v).request == last().request
        assert last().request.needs_grad == out.requires_grad == (name == "grad")
    torch.autograd.grad(attnrt.attention(q, k, v).sum(), (q, k, v))
    assert not attnrt.attention(*tensors()).requires_grad


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = tensors()
        inside = attnrt.attention(q, k, v)
    torch.testing.assert_close(attnrt.attention(q, k, v), inside)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("lse", [False, True])
def test_meta_tensors(layout: str, lse: bool) -> None:
    """Shapes and dtypes without data, as in tracing or in sizing a model; the second needs the reference."""
    q, k, v = (t.to(device="meta", dtype=torch.bfloat16) for t in tensors(2, 4, 16, 8))
    assert attnrt.explain(q, k, v, layout=layout, return_lse=lse).environment.name == "meta"
    found = attnrt.attention(q, k, v, layout=layout, causal=True, return_lse=lse)
    out = found[0] if lse else found
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    if lse:
        wanted = {"bhsd": (2, 4, 16), "bshd": (2, 16, 4), "sbhd": (4, 16, 2)}[layout]
        assert (found[1].shape, found[1].dtype, found[1].device.type) == (wanted, torch.float32, "meta")


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_inside_torch_compile(known: bool) -> None:
    """Graph breaks are allowed; other results are not. `known`: the same call was made before, outside."""
    q, k, v = tensors(grad=True)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q * 2, k, v, causal=True) + 1

    want = F.scaled_dot_product_attention(q * 2, k, v, is_causal=True) + 1
    if known:
        torch.testing.assert_close(layer(q, k, v), want)
    fast = compiled(layer)
    for _ in range(2):
        out = fast(q, k, v)
        torch.testing.assert_close(out, want)
    ours, theirs = (torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (out, want))
    torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


# ---- memory


class Memory:
    """Stands for the free memory of this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reads = 64 << 30, 0
        monkeypatch.setattr(environment, "_free_memory", self)

    def __call__(self, device_type: str, index: int | None) -> int:
        self.reads += 1
        return self.free


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory(monkeypatch)
    attnrt.refresh()
    return found


LONG = (1, 1, 4200, 8)
"""Scores of 67 MiB: from 64 MiB on the free memory is read at each call."""


def test_free_memory_is_read_again(memory: Memory) -> None:
    q, k, v = tensors(*LONG)
    attnrt.attention(q, k, v, backend="reference")
    memory.free = 1 << 20
    with pytest.raises(attnrt.BackendUnavailable) as error:
        attnrt.attention(q, k, v, backend="reference")
    (reason,) = error.value.report.verdicts["reference"].reasons
    assert reason.rule == "UNFUSED_MEMORY" and reason.message.endswith("and 1 MiB is free")
    (needed,) = re.findall(r"\(([0-9]+) bytes\)", reason.message)
    assert int(needed) >= 4200 * 4200 * 4
    memory.free = 64 << 30
    assert attnrt.attention(q, k, v, backend="reference").shape == q.shape


def test_another_backend_takes_over_when_memory_shrinks(memory: Memory) -> None:
    q, k, v = tensors(*LONG)
    with attnrt.override(prefer="reference"):
        attnrt.attention(q, k, v)
        assert last().backend == "reference"
        memory.free = 1 << 20
        out = attnrt.attention(q, k, v)
        assert attnrt.explain(q, k, v).backend == "torch"
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert last().backend == "torch", "what ran, not what was remembered"
    assert [r.rule for r in last().verdicts["reference"].reasons] == ["UNFUSED_MEMORY"]


def test_short_calls_do_not_read_it(memory: Memory) -> None:
    q, k, v = tensors()
    attnrt.attention(q, k, v, backend="reference")
    reads = memory.reads
    for _ in range(5):
        attnrt.attention(q, k, v, backend="reference")
    assert memory.reads == reads


def test_the_limit_outranks_what_is_free(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", "1KiB")
    with pytest.raises(attnrt.BackendUnavailable, match="ATTNRT_UNFUSED_LIMIT allows 1 KiB"):
        attnrt.attention(*tensors(), backend="reference")


# ---- explain runs nothing


class Operations(TorchDispatchMode):
    """Every operation on a tensor while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        self.sizes += [a.numel() for a in args if isinstance(a, Tensor)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [None, "reference", "cudnn"])
@pytest.mark.parametrize("operand", [None, "mask", "bias", "sinks", "alibi_slopes"])
def test_explain_runs_nothing(backend: str | None, operand: str | None) -> None:
    q, k, v = tensors(grad=True)
    made = {"mask": torch.ones(16, 16, dtype=torch.bool), "bias": torch.zeros(16, 16)}
    options: dict[str, Any] = {} if operand is None else {operand: made.get(operand, torch.ones(2))}
    with Operations() as operations:
        attnrt.explain(q, k, v, causal=True, backend=backend, **options)
    assert operations.seen == []
    assert attnrt.explain(q, k, v).backend and not runtime.plans, "and remembers nothing"


def test_explain_runs_nothing_under_autocast() -> None:
    q, k, v = tensors()
    with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
        assert attnrt.explain(q, k, v).request.dtype == "bf16"
    assert operations.seen == [], "the dtype can be known without casting"


def test_explain_reads_only_lengths() -> None:
    lengths = torch.tensor([3, 16], dtype=torch.int32)
    q, k, v = tensors(2, 2, 16, 8)
    with Operations() as operations:
        attnrt.explain(q, k, v, seqlens_q=lengths, seqlens_kv=lengths)
    assert max(operations.sizes, default=0) <= 2


def test_explain_leaves_the_last_decision() -> None:
    attnrt.attention(*tensors(), backend="reference")
    attnrt.explain(*tensors())
    assert last().backend == "reference"


def test_nothing_is_printed_or_warned(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnrt.attention(*tensors())
    assert capsys.readouterr() == ("", "")


def test_everything_after_q_k_and_v_goes_by_name() -> None:
    """As the signature says, though `attention` is not written with a bare *, which is slower."""
    x = torch.ones(1, 1, 2, 8)
    for extra in ("bhsd", None, False):
        with pytest.raises(TypeError, match="3 positional arguments"):
            attnrt.attention(x, x, x, extra)  # type: ignore[call-overload]
    parameters = inspect.signature(attnrt.attention).parameters
    explained = inspect.signature(attnrt.explain).parameters
    assert [(p.name, p.kind, p.default) for p in parameters.values()] == [
        (p.name, p.kind, p.default) for p in explained.values()
    ]
    assert list(parameters)[:3] == ["q", "k", "v"] and parameters["layout"].kind is inspect.Parameter.KEYWORD_ONLY
    assert torch.equal(attnrt.attention(q=x, k=x, v=x), attnrt.attention(x, x, x))
