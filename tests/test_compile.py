"""attention() in graphs: no break, the choice a constant, one trace for all lengths, and gradients as in eager."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paging import paged
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnrt
from attnrt.operands import Operands


@pytest.fixture(autouse=True)
def traced_anew(fresh: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes or ((2, 4, 16, 8),) * 3]


def last() -> attnrt.Decision:
    decision = attnrt.last_decision()
    assert decision is not None
    return decision


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)  # type: ignore[no-any-return]


def graphs(function: Callable[..., Any], *inputs: Any) -> list[torch.fx.Node]:
    """attnrt's nodes in what dynamo traces of one call."""
    found: list[torch.fx.Node] = []

    def look(module: torch.fx.GraphModule, example: Any) -> Any:
        found.extend(n for n in module.graph.nodes if str(n.target).startswith("attnrt."))
        return module.forward

    torch._dynamo.reset()
    compiled(function, look)(*inputs)
    torch._dynamo.reset()
    return found


def agrees(function: Callable[..., Any], leaves: list[Tensor], backend: str, exact: bool = True) -> None:
    """Output, LSE and gradients of the compiled function are those of the eager one."""
    torch._dynamo.reset()
    want, got = function(*leaves), compiled(function, backend)(*leaves)
    assert last().request.compiled
    want, got = (x if isinstance(x, tuple) else (x,) for x in (want, got))
    tolerance = {} if exact else {"rtol": 1e-4, "atol": 1e-5}
    grad = torch.randn_like(want[0])
    wanting = [t for t in leaves if t.requires_grad]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, **tolerance)
    if wanting:
        grads = (torch.autograd.grad(x[0], wanting, grad) for x in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


CU = torch.tensor([0, 3, 3, 16], dtype=torch.int32)
LENGTHS = torch.tensor([16, 5], dtype=torch.int32)
MASK = torch.rand(2, 1, 16, 16) > 0.3
SLOPES = torch.rand(4)
GQA = ((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8))
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "plain": (lambda q, k, v: attnrt.attention(q, k, v), tensors()),
    "gqa, causal, LSE": (lambda q, k, v: attnrt.attention(q, k, v, causal=True, return_lse=True), tensors(*GQA)),
    "window, bshd": (lambda q, k, v: attnrt.attention(q, k, v, layout="bshd", window=(2, 1)), tensors()),
    "sbhd, other Dv": (
        lambda q, k, v: attnrt.attention(q, k, v, layout="sbhd", causal=True),
        tensors((6, 2, 4, 8), (6, 2, 4, 8), (6, 2, 4, 24)),
    ),
    "mask": (lambda q, k, v: attnrt.attention(q, k, v, mask=MASK), tensors()),
    "padded": (
        lambda q, k, v: attnrt.attention(
            q, k, v, seqlens_q=LENGTHS, seqlens_kv=LENGTHS, causal=True, alignment="bottom_right"
        ),
        tensors(),
    ),
    "packed": (
        lambda q, k, v: attnrt.attention(
            q, k, v, layout="thd", cu_seqlens_q=CU, cu_seqlens_kv=CU, max_seqlen_q=13, max_seqlen_kv=13, causal=True
        ),
        tensors(*((18, 4, 8),) * 3),
    ),
    "packed, longest unknown": (
        lambda q, k, v: attnrt.attention(q, k, v, layout="thd", cu_seqlens_q=CU, cu_seqlens_kv=CU),
        tensors(*((18, 4, 8),) * 3),
    ),
    "alibi, softcap": (lambda q, k, v: attnrt.attention(q, k, v, alibi_slopes=SLOPES, softcap=5.0), tensors()),
    "bf16, scale": (lambda q, k, v: attnrt.attention(q, k, v, scale=0.3), tensors(dtype=torch.bfloat16)),
    "fp64, LSE": (lambda q, k, v: attnrt.attention(q, k, v, return_lse=True), tensors(dtype=torch.float64)),
    "no gradient": (lambda q, k, v: attnrt.attention(q, k, v, return_lse=True), tensors(grad=False)),
    "one gradient": (
        lambda q, k, v: attnrt.attention(q, k, v),
        [t if i else t.detach() for i, t in enumerate(tensors())],
    ),
    "from a qkv": (
        lambda x: attnrt.attention(*(t.transpose(1, 2) for t in x.unbind(2)), causal=True).transpose(1, 2).flatten(2),
        tensors((2, 16, 3, 4, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_eager(name: str) -> None:
    function, leaves = CASES[name]
    agrees(function, leaves, "aot_eager", exact="alibi" not in name)


@pytest.mark.parametrize("name", ["sbhd, other Dv", "from a qkv"])
def test_agrees_with_eager_under_inductor(name: str) -> None:
    function, leaves = CASES[name]
    agrees(function, leaves, "inductor")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_differentiable_input(backend: str) -> None:
    """q, k, v, bias and sinks, in the kernel that takes them all."""
    leaves = tensors(*GQA, (1, 4, 16, 16), (4,))
    agrees(
        lambda q, k, v, bias, sinks: attnrt.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True),
        leaves,
        backend,
        exact=False,
    )


# ---- the choice


def test_the_choice_is_a_constant_of_the_graph() -> None:
    q, k, v = tensors()
    (node,) = graphs(lambda q, k, v: attnrt.attention(q, k, v, causal=True), q, k, v)
    assert attnrt.explain(q, k, v, causal=True).label in node.args
    with attnrt.use_backend("reference"):
        (node,) = graphs(lambda q, k, v: attnrt.attention(q, k, v, causal=True), q, k, v)
    assert any(str(a).startswith("reference | force reference") for a in node.args)


def test_the_report_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_REPORT", "once")
    q, k, v = tensors()
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v, causal=True))
    function(q, k, v)
    printed = capsys.readouterr().err
    assert printed.count("choice") == 1, "at the trace, and not again at the run"
    assert "compiled" in printed and "chosen when the graph was traced" in " ".join(printed.split())
    assert "chosen when the graph was traced" in last().why
    assert last().to_dict()["request"]["compiled"] is True and not last().request.dynamic
    attnrt.attention(q, k, v, causal=True)
    assert not last().request.compiled and "traced" not in last().why


class Short(attnrt.Backend):
    """Takes up to 32 queries, and counts its choices."""

    name, title, prefix = "short", "Short", "SHORT"
    rules = (attnrt.Rule("SHORT_SEQLEN", lambda r, e: r.seqlen_q > 32, "too long"),)

    def prepare(self, request: Any, environment: Any) -> Any:
        return attnrt.registry.backends()["reference"].prepare(request, environment)


def test_one_trace_for_all_lengths_and_the_best_kernel_for_each() -> None:
    attnrt.register_backend(Short())
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v, causal=True), counter, dynamic=True)
    with attnrt.override(prefer="short"):
        function(*tensors((2, 4, 20, 8), (2, 2, 20, 8), (2, 2, 20, 8)))
        traces = counter.frame_count  # PyTorch traces once more for any float that turns out a constant
        for length in (16, 17, 64, 33, 200, 5):
            leaves = tensors((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
            out = function(*leaves)
            assert last().backend == ("short" if length <= 32 else "torch")
            assert last().request.dynamic and "a size is dynamic" in last().why
            want = attnrt.attention(*leaves, causal=True)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
            grad = torch.randn_like(out)
            for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (out, want)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == traces


def test_lengths_that_turn_dynamic_by_themselves() -> None:
    """Static at first, symbolic from the second length on: two traces, not one a length."""
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v), counter)
    for length in (16, 24, 40, 48, 7):
        q, k, v = tensors((1, 2, length, 8), (1, 2, 2 * length, 8), (1, 2, 2 * length, 8), grad=False)
        torch.testing.assert_close(function(q, k, v), attnrt.attention(q, k, v))
    assert counter.frame_count <= 3


# ---- overrides, failures, checks


def test_overrides_at_run_time_count() -> None:
    """Forced means forced, also around a graph that was traced without."""
    q, k, v = tensors()
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v))
    function(q, k, v)
    assert last().backend == "torch"
    with attnrt.use_backend("reference"):
        function(q, k, v)
        assert last().backend == "reference" and "under other overrides" in last().why
    with attnrt.use_backend("cudnn"), pytest.raises(attnrt.BackendUnavailable):
        function(q, k, v)
    function(q, k, v)
    assert last().backend == "torch"


@attnrt.use_backend("reference")
def decorated(q: Tensor) -> Tensor:
    return attnrt.attention(q, q, q)


def test_overrides_inside_a_graph() -> None:
    """Blocks and decorators in the compiled code itself, without a break, within those around it."""
    (q,) = tensors((2, 4, 16, 8))

    def nested(q: Tensor) -> list[str]:
        ran = []
        with attnrt.override(disable=("torch.math", "cudnn"), prefer=["short"]):
            ran.append(attnrt.attention(q, q, q))
            with attnrt.use_backend("reference"):
                ran.append(attnrt.attention(q, q, q))
        ran.append(attnrt.attention(q, q, q))
        with attnrt.use_backend(None):
            ran.append(attnrt.attention(q, q, q))
        return ran

    attnrt.register_backend(Short())
    nodes = graphs(nested, q)
    assert [n.args[-2].partition(" ")[0] for n in nodes] == [
        "short",
        "reference",
        "torch[flash_cpu]",
        "torch[flash_cpu]",
    ]
    with attnrt.use_backend("reference"):
        nodes = graphs(nested, q)
        assert [n.args[-2].partition(" ")[0] for n in nodes] == [*["reference"] * 3, "torch[flash_cpu]"]
    for function in (decorated, lambda q: nested(q)[1]):
        torch._dynamo.reset()
        compiled(function)(q)
    assert not attnrt.settings.traced_blocks
    compiled(decorated)(q)
    assert last().backend == "reference" and last().overrides[0].source == "a context manager"
    attnrt.attention(q, q, q)
    assert last().backend == "torch"


def test_blocks_of_other_meanings_have_other_words() -> None:
    """An empty preference is not none, and a lifted force is neither."""
    blocks = [attnrt.override(), attnrt.override(prefer=()), attnrt.use_backend(None), attnrt.use_backend("torch")]
    blocks += [attnrt.override(policy="default"), attnrt.override(disable="torch"), attnrt.override(prefer="torch")]
    assert len({block._words for block in blocks}) == len(blocks)
    for block in blocks:
        with attnrt.settings.reentered(block._words):
            inside = attnrt.settings.current_context()
        with block:
            assert attnrt.settings.current_context() is inside


def test_variables_at_run_time_count(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v))
    function(q, k, v)
    monkeypatch.setenv("ATTNRT_BACKEND", "reference")
    function(q, k, v)
    assert last().backend == "reference"


def test_arguments_force_and_name_policies(tmp_path: Path) -> None:
    q, k, v = tensors()
    compiled(lambda q, k, v: attnrt.attention(q, k, v, backend="reference"))(q, k, v)
    assert last().backend == "reference" and "chosen when the graph was traced" in last().why
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\ndescription: Only one.\nlines:\n  - name: all\n    prefer: [reference]\n    why: a test\n"
    )
    loaded = attnrt.policies.preference.load_policy(str(file), attnrt.registry.rankable())
    for policy in ("deterministic", str(file), loaded):
        torch._dynamo.reset()
        compiled(lambda q, k, v, policy=policy: attnrt.attention(q, k, v, policy=policy))(q, k, v)
        assert last().policy == attnrt.explain(q, k, v, policy=policy).policy


def test_a_choice_that_holds_no_more() -> None:
    """The graph's kernel stays although another one would be chosen now; without it, the next one runs."""
    q, k, v = tensors()
    attnrt.register_backend(Short())
    with attnrt.override(prefer="short"):
        function = compiled(lambda q, k, v: attnrt.attention(q, k, v))
        function(q, k, v)
        assert last().backend == "short"
        attnrt.unregister_backend("short")
    function(q, k, v)
    assert last().backend == "torch"


class Broken(attnrt.Backend):
    name, title, prefix = "broken", "Broken", "BROKEN"

    def prepare(self, request: Any, environment: Any) -> Any:
        def run(*tensors: Any) -> Any:
            raise RuntimeError("out of order")

        return run


def test_a_failing_kernel(tmp_path: Path) -> None:
    attnrt.register_backend(Broken())
    q, k, v = tensors()
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v))
    with attnrt.override(prefer="broken"), pytest.raises(attnrt.BackendFailed, match="out of order"):
        function(q, k, v)
    go_on = tmp_path / "go_on.yaml"
    go_on.write_text("name: go_on\ndescription: Goes on.\nextends: default\non_failure: next\n")
    with attnrt.override(prefer="broken", policy=str(go_on)):
        with pytest.warns(attnrt.DemotionWarning, match="out of order"):
            out = function(q, k, v)
        assert last().backend == "torch" and last().verdicts["broken"].reasons[0].rule == "DEMOTED"
    torch.testing.assert_close(out, attnrt.attention(q, k, v))


class Wrong(attnrt.Backend):
    name, title, prefix = "wrong", "Wrong", "WRONG"

    def prepare(self, request: Any, environment: Any) -> Any:
        run = attnrt.registry.backends()["reference"].prepare(request, environment)
        return lambda q, k, v, operands: run(q, k, v * 1.1 - 0.1 * v.detach(), operands)


def test_verified_gradients_included(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    attnrt.register_backend(Wrong())
    q, k, v = tensors()
    compiled(lambda q, k, v: attnrt.attention(q, k, v))(q, k, v)
    with pytest.raises(attnrt.VerificationFailed, match="gradient of v"):
        compiled(lambda q, k, v: attnrt.attention(q, k, v, backend="wrong"))(q, k, v)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"causal": True}, attnrt.ArgumentError, "alignment=None"),
        ({"softcap": -1.0}, attnrt.ArgumentError, "softcap=-1.0"),
        ({"backend": "tritn"}, attnrt.UnknownNameError, "did you mean triton"),
        ({"policy": "fastest"}, attnrt.UnknownNameError, "fastest"),
        ({"backend": "cudnn"}, attnrt.BackendUnavailable, "CUDNN_DEVICE"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, attnrt.ArgumentError, "mask="),
        ({"seqlens_kv": torch.tensor([99, 1], dtype=torch.int32)}, attnrt.ArgumentError, "99"),
    ],
)
def test_errors_arrive_as_they_are(options: dict[str, Any], error: type[Exception], says: str) -> None:
    q, k, v = tensors((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    with pytest.raises(error, match=says):
        compiled(lambda q, k, v: attnrt.attention(q, k, v, **options))(q, k, v)


def test_what_cannot_be_traced_is_said_at_the_trace() -> None:
    q, k, v = tensors()
    with pytest.raises(Exception, match=r"q\.shape.*4 dims"):
        compiled(lambda q: attnrt.attention(q[0], q[0], q[0]))(q)
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(Exception, match="alibi_slopes"):
        compiled(lambda q, k, v: attnrt.attention(q, k, v, alibi_slopes=slopes))(q, k, v)


# ---- the company it keeps


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast(backend: str) -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attnrt.attention(q, k, v)

    q, k, v = tensors()
    want = inside(q, k, v)
    out = compiled(inside, backend)(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want) and last().request.dtype == "bf16"
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    around = compiled(lambda q, k, v: attnrt.attention(q, k, v), backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert around(q, k, v).dtype == torch.bfloat16
    assert around(q, k, v).dtype == torch.float32


def test_inference_mode_and_no_grad() -> None:
    q, k, v = tensors()
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v))
    want = attnrt.attention(q, k, v)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(function(q, k, v), want)
        assert not last().request.needs_grad
    assert function(q, k, v).requires_grad and last().request.needs_grad


def test_paged() -> None:
    from test_paged import padded

    case = paged(padded("bshd"), 8)
    table, lengths = case.operands.page_table, case.operands.seqlens_kv

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnrt.attention(q, k, v, layout="bshd", page_table=table, seqlens_kv=lengths)

    agrees(function, [case.q, case.k, case.v], "aot_eager")
    with pytest.raises(attnrt.ArgumentError, match="no backward"):
        compiled(function)(case.q.clone().requires_grad_(), case.k, case.v)


class Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnrt.attention(q, k, v, causal=True, return_lse=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    q, k, v = tensors(grad=False)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"q": {2: length}, "k": {2: length}, "v": {2: length}}
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=shapes, strict=strict)
    assert sum(str(n.target).startswith("attnrt.") for n in program.graph.nodes) == 1
    q, k, v = tensors(*((2, 4, 33, 8),) * 3, grad=False)
    for got, want in zip(
        program.module()(q, k, v), attnrt.attention(q, k, v, causal=True, return_lse=True), strict=True
    ):
        torch.testing.assert_close(got, want)


class Projected(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)) for t in self.qkv(x).chunk(3, -1))
        return attnrt.attention(q, k, v, layout="bshd", causal=True)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_kept_and_compiled(strict: bool, recording: bool) -> None:
    """The choice leaves nothing of its own in the graph. What was exported without gradients refuses to train."""
    module, x = Projected(), torch.randn(2, 16, 32)
    with torch.set_grad_enabled(recording):
        program = torch.export.export(module, (x,), strict=strict)
    targets = [str(n.target) for n in program.graph.nodes]
    assert f"attnrt.attention_{'forward' if recording else 'plain'}.default" in targets
    assert not any("empty" in t or "set_grad" in t for t in targets)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), module(x))
    if recording:
        loaded(x).sum().backward()
    else:
        with pytest.raises(attnrt.GradientError, match="nothing wanted a gradient"):
            loaded(x).sum().backward()


def test_vmap_is_refused() -> None:
    (x,) = tensors((3, 2, 4, 16, 8))
    over = torch.func.vmap(lambda q: attnrt.attention(q, q, q))
    with pytest.raises(attnrt.ArgumentError, match=r"vmap.*part of the batch"):
        over(x)
    with pytest.raises(Exception, match="part of the batch"):
        compiled(over)(x)
    bias = torch.zeros(3, 16, 16)
    with pytest.raises(attnrt.ArgumentError, match="vmap"):
        torch.func.vmap(lambda b: attnrt.attention(x[0], x[0], x[0], bias=b))(bias)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_functional_gradients(backend: str) -> None:
    q, k, v = tensors()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q, k, v, window=(3, 0), backend=backend).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in (q, k, v)))
    for a, b in zip(got, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    assert not last().request.compiled
    with pytest.raises(attnrt.ArgumentError, match="vmap"):
        torch.func.jacrev(loss)(q.detach(), k.detach(), v.detach())
    with pytest.raises(attnrt.GradientError, match="forward-mode"):
        torch.func.jvp(lambda q: loss(q, k.detach(), v.detach()), (q.detach(),), (q.detach(),))


def test_functional_gradients_around_which_a_graph_is_traced() -> None:
    q, k, v = (t.detach() for t in tensors())

    def loss(q: Tensor) -> Tensor:
        return attnrt.attention(q, k, v, causal=True).square().sum()

    def step(q: Tensor) -> Tensor:
        return 2 * torch.func.grad(loss)(q)

    want = step(q)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(q), want)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="gradients of attention cannot be traced"):
        compiled(step)(q)


def test_jit_trace_is_refused() -> None:
    q, k, v = tensors(grad=False)
    with pytest.raises(attnrt.ArgumentError, match=r"torch\.jit\.trace"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda q, k, v: attnrt.attention(q, k, v), (q, k, v))


def test_eager_stays_eager_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's flag is one for all threads."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    attnrt.attention(*tensors())
    assert not last().request.compiled


# ---- random numbers


def drawn(function: Callable[..., Any], leaves: list[Tensor], seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients from one seed; the backward comes after other numbers were drawn."""
    for t in leaves:
        t.grad = None
    torch.manual_seed(seed)
    out = function(*leaves)
    torch.manual_seed(99)
    out.backward(torch.ones_like(out).cos())
    return out.detach(), [t.grad.clone() for t in leaves if t.grad is not None]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout(backend: str) -> None:
    """The backward drops what the forward dropped: the output is linear in v. Each run draws anew."""
    leaves = tensors(*((2, 4, 64, 8),) * 3)
    function = compiled(lambda q, k, v: attnrt.attention(q, k, v, dropout_p=0.5, backend=backend))
    out, grads = drawn(function, leaves)
    torch.testing.assert_close((out * torch.ones_like(out).cos()).sum(), (leaves[2] * grads[2]).sum())
    again, grads_again = drawn(function, leaves)
    assert torch.equal(out, again) and all(map(torch.equal, grads, grads_again))
    assert not torch.equal(out, drawn(function, leaves, seed=4)[0])
    assert not torch.equal(function(*leaves), function(*leaves))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"window": (3, 0)}], ids=str)
def test_checkpoint(options: dict[str, Any], reentrant: bool, dropout_p: float) -> None:
    """Reentrant ones run the forward without gradients first, and must draw the same numbers when they run it again."""
    if dropout_p and "window" in options:
        pytest.skip("the reference is the only one that takes both")

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q * 1.5, k, v * 2, dropout_p=dropout_p, **options)

    leaves = tensors(*GQA)
    want, grads = drawn(block, leaves)
    out, again = drawn(lambda *t: checkpoint(block, *t, use_reentrant=reentrant), leaves)
    assert torch.equal(out, want) and all(map(torch.equal, grads, again))


@pytest.mark.parametrize(("backend", "dropout_p"), [("aot_eager", 0.0), ("aot_eager", 0.5), ("inductor", 0.5)])
def test_compiled_checkpoint(backend: str, dropout_p: float) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q * 1.5, k, v * 2, dropout_p=dropout_p).sin()

    leaves = tensors(*GQA)
    out, grads = drawn(compiled(lambda *t: checkpoint(block, *t, use_reentrant=False), backend), leaves)
    torch._dynamo.reset()
    want, without = drawn(compiled(block, backend), leaves)
    torch.testing.assert_close(out, want)
    for a, b in zip(grads, without, strict=True):
        torch.testing.assert_close(a, b)


def test_operands_are_ours() -> None:
    """Every optional tensor has its place in the operators' schemas, in its order."""
    from attnrt import operators

    names = [a.name for a in operators.FORWARD._schema.arguments]
    assert names[: operators.TENSORS] == ["q", "k", "v", *Operands._fields]
    assert len(names) == operators.TENSORS + operators.OPTIONS
