"""The operators by themselves: PyTorch's own checks, the oracle's answers, and which kernel a backward belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, given, settings
from oracle import Case, assert_agrees, gradients
from paging import paged
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnrt
from attnrt import execution, halves, operators, recompute, runtime
from attnrt.execution import AT_RUN_TIME
from attnrt.operands import Operands

pytestmark = pytest.mark.usefixtures("fresh")


def tensors(*shape: int, count: int = 3, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape or (2, 4, 16, 8), dtype=dtype).requires_grad_(grad) for _ in range(count)]


def arguments(case: Case, choice: str = AT_RUN_TIME, **changes: Any) -> tuple[Any, ...]:
    """The operator's arguments for a case."""
    names = ("layout", "causal", "left", "right", "alignment", "softcap", "dropout_p", "scale", "longest_q")
    options: dict[str, Any] = dict.fromkeys((*names, "longest_kv", "return_lse", "deterministic", "backend", "policy"))
    window = case.options.get("window") or (None, None)
    options |= {"layout": case.layout, "causal": False, "dropout_p": 0.0, "return_lse": False}
    options |= {n: v for n, v in case.options.items() if n != "window"} | changes
    options["left"], options["right"] = window
    leaves = (case.q, case.k, case.v, case.operands.bias, case.operands.sinks)
    grads = [t is not None and t.requires_grad for t in leaves]
    return (case.q, case.k, case.v, *case.operands, *options.values(), "", choice, grads)


def run(case: Case, **changes: Any) -> dict[str, Tensor]:
    out, lse, _ = operators.FORWARD(*arguments(case, **changes))
    found = {"out": out, **gradients(case, out, case.leaves())}
    return found | ({"lse": lse.float()} if case.options.get("return_lse") else {})


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_agrees_with_the_oracle(case: Case) -> None:
    """Whatever kernel is chosen, forward and backward, every layout, stride and operand."""
    assert_agrees(case, run(case))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_recomputation_agrees_with_the_oracle(case: Case) -> None:
    """The forward and backward of a kernel that has no pair of its own."""
    request = case.request()
    kernel = runtime.registry.backends()["reference"]
    environment = attnrt.Environment.detect("cpu")
    forward, backward = recompute.recomputed(kernel.prepare(request, environment), request)
    out, lse, extra = forward(case.q, case.k, case.v, case.operands)
    found = {"out": out, "lse": lse.float()} if request.needs_lse else {"out": out}
    leaves = {"q": case.q, "k": case.k, "v": case.v, "bias": case.operands.bias, "sinks": case.operands.sinks}
    wanted = [t is not None and t.requires_grad for t in leaves.values()]
    if any(wanted):
        grad = torch.ones_like(out) if case.grad is None else case.grad
        grads = backward(grad, case.q, case.k, case.v, out, lse, extra, case.operands, wanted)
        found |= {name: g for name, g, wants in zip(leaves, grads, wanted, strict=True) if wants and g is not None}
    if not case.options.get("return_lse"):
        found.pop("lse", None)
    assert_agrees(case, found)


BIAS = torch.randn(1, 4, 16, 16)
CU = torch.tensor([0, 3, 16], dtype=torch.int32)
CHECKED: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(*tensors(), "bhsd"),
    "inference with LSE": lambda: Case(*tensors(grad=False), "bhsd", options={"return_lse": True, "causal": True}),
    "bias and sinks": lambda: Case(
        *tensors(),
        "bhsd",
        Operands(bias=BIAS.clone().requires_grad_(), sinks=torch.randn(4, requires_grad=True)),
        options={"return_lse": True},
    ),
    "sbhd, other Dv": lambda: Case(*tensors(5, 2, 4, 8, count=2), torch.randn(5, 2, 4, 24), "sbhd"),
    "bshd, fp64, window": lambda: Case(
        *tensors(2, 5, 4, 8, dtype=torch.float64), "bshd", options={"window": (2, 1), "return_lse": True}
    ),
    "packed": lambda: Case(*tensors(18, 4, 8), "thd", Operands(cu_seqlens_q=CU, cu_seqlens_kv=CU)),
    "transposed": lambda: Case(*(t.detach().transpose(1, 2).requires_grad_() for t in tensors(2, 6, 4, 8)), "bhsd"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_of_the_forward(name: str) -> None:
    torch.library.opcheck(operators.FORWARD, arguments(CHECKED[name]()))


def test_opcheck_of_dropout() -> None:
    """Without the comparison of two runs, which draw different numbers."""
    case = Case(*tensors(), "bhsd", options={"dropout_p": 0.5})
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.FORWARD_DROPOUT, arguments(case), test_utils=checks)


def lean(case: Case, choice: str = AT_RUN_TIME) -> tuple[Any, ...]:
    """The arguments of inference for a case without gradients."""
    given = arguments(case, choice, return_lse=False)
    options = given[operators.TENSORS : -3]
    tensors = [t.detach() if isinstance(t, Tensor) else t for t in given[: operators.TENSORS]]
    return (*tensors, execution.in_words(*options), choice)


LEAN: dict[str, Callable[[], Case]] = {
    "plain": CHECKED["plain"],
    "bias and sinks": lambda: Case(
        *tensors(grad=False), "bhsd", Operands(mask=BIAS > 0, bias=BIAS, sinks=torch.randn(4)), options={"scale": 0.3}
    ),
    "sbhd, other Dv": CHECKED["sbhd, other Dv"],
    "bshd, fp64, window": lambda: Case(
        *tensors(2, 5, 4, 8, dtype=torch.float64), "bshd", options={"window": (2, 1), "causal": True}
    ),
    "packed": CHECKED["packed"],
    "transposed": CHECKED["transposed"],
    "paged": lambda: paged(
        Case(
            *tensors(2, 2, 16, 8, count=3, grad=False),
            "bhsd",
            Operands(seqlens_kv=torch.tensor([16, 7], dtype=torch.int32)),
        ),
        page_size=4,
    ),
}


@pytest.mark.parametrize("name", LEAN)
def test_opcheck_of_inference(name: str) -> None:
    case = LEAN[name]()
    given = lean(case)
    out = operators.INFERENCE(*given)
    torch.library.opcheck(operators.INFERENCE, given)
    torch.testing.assert_close(out, operators.FORWARD(*arguments(case))[0].detach())
    if case.operands == Operands():
        alone = *given[:3], *given[-2:]
        torch.library.opcheck(operators.PLAIN, alone)
        assert torch.equal(operators.PLAIN(*alone), out)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_inference_agrees_with_the_oracle(case: Case) -> None:
    """Every layout and stride, a mask alone and with everything else."""
    given = lean(case)
    q, k, v, *operands = given[: operators.TENSORS]
    options = {name: value for name, value in case.options.items() if name != "return_lse"}
    bare = Case(q, k, v, case.layout, Operands(*operands), options=options)
    assert_agrees(bare, {"out": operators.INFERENCE(*given)})


@pytest.mark.parametrize("name", ["plain", "bias and sinks", "transposed", "packed"])
def test_opcheck_of_the_backward(name: str) -> None:
    given = arguments(CHECKED[name]())
    saved = [t.detach() for t in operators.FORWARD(*given)]
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in given[: operators.TENSORS]]
    wanted = [True, False, *given[-1][2:]]
    torch.library.opcheck(
        operators.BACKWARD, (torch.randn_like(saved[0]), *inputs, *saved, *given[operators.TENSORS :], wanted)
    )


# ---- which kernel a backward belongs to


class Scaled(attnrt.Backend):
    """Attention times `factor`, gradients too: tells in the results which backend ran. Counts its runs."""

    prefix = "SCALED"
    factor = 1.0
    runs: ClassVar[list[str]] = []

    def prepare(self, request: Any, environment: Any) -> Any:
        reference = runtime.registry.backends()["reference"].prepare(request, environment)

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            Scaled.runs.append(self.name)
            result = reference(q, k, v, operands)
            return (self.factor * result[0], result[1]) if request.needs_lse else self.factor * result

        return run


class Three(Scaled):
    name, title, factor = "three", "Three", 3.0


class Five(Scaled):
    name, title, factor = "five", "Five", 5.0


class Paired(Three):
    """With a pair, and state that only its own forward leaves."""

    name, title = "paired", "Paired"

    def pair(self, request: Any, environment: Any) -> Any:
        forward, backward = runtime.registry.backends()["reference"].pair(request, environment)

        def ours(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            Scaled.runs.append("paired forward")
            out, lse, _ = forward(q, k, v, operands)
            return out * self.factor, lse, (torch.tensor([self.factor]), torch.tensor(7, dtype=torch.uint8))

        def back(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, extra: Any, *rest: Any) -> Any:
            Scaled.runs.append("paired backward")
            factor, seven = extra
            assert seven == 7 and seven.dtype == torch.uint8
            return backward(grad * factor, q, k, v, out / factor, lse, (), *rest)

        return ours, back


class Stateful(Paired):
    """Leaves more than an operator can hand on."""

    name, title = "stateful", "Stateful"

    def pair(self, request: Any, environment: Any) -> Any:
        forward, backward = super().pair(request, environment)

        def ours(*arguments: Any) -> Any:
            out, lse, _ = forward(*arguments)
            return out, lse, (torch.zeros(1000),)

        return ours, backward


@pytest.fixture
def scaled(fresh: None) -> None:
    Scaled.runs.clear()
    for backend in (Three(), Five(), Paired(), Stateful()):
        attnrt.register_backend(backend)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients without any factor."""
    out = attnrt.attention(q, k, v, backend="reference")
    return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))


def scaled_by(factor: float, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("scaled")
def test_outstanding_backwards_keep_their_kernels() -> None:
    """Two forwards of one signature under other overrides; both backwards come later, and outside."""
    q, k, v = tensors()
    want = plain(q, k, v)
    given = arguments(Case(q, k, v, "bhsd"))
    outs = []
    for name in ("three", "five", "three", "paired"):
        with attnrt.use_backend(name):
            outs.append(operators.FORWARD(*given)[0])
    for out, factor in zip(outs, (3.0, 5.0, 3.0, 3.0), strict=True):
        scaled_by(factor, (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))), want)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("factor", [3.0])
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("three", ["three", "three"]),
        ("paired", ["paired forward", "paired backward"]),
        ("stateful", ["paired forward", "stateful", "stateful"]),
    ],
)
def test_a_forward_runs_again_only_without_a_pair(name: str, runs: list[str], factor: float) -> None:
    q, k, v = tensors()
    out = operators.FORWARD(*arguments(Case(q, k, v, "bhsd"), backend=name))[0]
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert Scaled.runs == runs
    scaled_by(factor, (out.detach(), *grads), plain(q, k, v))


@pytest.mark.usefixtures("scaled")
def test_a_backward_after_everything_was_forgotten() -> None:
    q, k, v = tensors()
    want = plain(q, k, v)
    out = operators.FORWARD(*arguments(Case(q, k, v, "bhsd"), backend="paired"))[0]
    attnrt.refresh()
    halves.ran.clear()
    halves.known.clear()
    scaled_by(3.0, (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))), want)


def test_gradients_only_where_they_were_announced() -> None:
    q, k, v = tensors()
    given = (*arguments(Case(q, k, v, "bhsd"))[:-1], [False] * 5)
    out = operators.FORWARD(*given)[0]
    with pytest.raises(attnrt.GradientError, match="nothing wanted a gradient"):
        out.sum().backward()


def test_inference_loses_no_gradient_in_silence() -> None:
    q, k, v = tensors()
    given = lean(Case(q, k, v, "bhsd"))
    for which in range(3):
        leaves = [t.detach().requires_grad_(i == which) for i, t in enumerate((q, k, v))]
        for out in (operators.INFERENCE(*leaves, *given[3:]), operators.PLAIN(*leaves, *given[-2:])):
            assert out.requires_grad
            with pytest.raises(attnrt.GradientError, match="nothing wanted a gradient"):
                out.sum().backward()
        with torch.no_grad():
            assert not operators.INFERENCE(*leaves, *given[3:]).requires_grad


class Seen(TorchDispatchMode):
    """What reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("recording", [False, True])
def test_modes_see_the_operators(recording: bool) -> None:
    """Selective checkpointing, counters of operations, fake tensors: none of them is passed by."""
    q, k, v = tensors(grad=recording)
    seen = Seen()
    with seen:
        out = operators.FORWARD(*arguments(Case(q, k, v, "bhsd")))[0]
        if recording:
            out.sum().backward()
        given = lean(Case(q, k, v, "bhsd"))
        operators.INFERENCE(*given)
        operators.PLAIN(*given[:3], *given[-2:])
    wanted = [operators.FORWARD, *([operators.BACKWARD] if recording else []), operators.INFERENCE, operators.PLAIN]
    assert [o for o in seen.operators if o.namespace == "attnrt"] == wanted
    with FakeTensorMode() as mode:
        out = operators.INFERENCE(*(mode.from_tensor(t) for t in given[:3]), *given[3:])
    assert isinstance(out, FakeTensor) and out.shape == q.shape


def test_no_second_derivative() -> None:
    q, k, v = tensors()
    out = operators.FORWARD(*arguments(Case(q, k, v, "bhsd")))[0]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(attnrt.GradientError, match="no second derivative"):
        dq.sum().backward()


def test_state_holds_what_was_packed() -> None:
    extra = (
        torch.tensor([2**62 + 1]),
        torch.tensor(5, dtype=torch.uint8),
        torch.empty(0),
        torch.tensor([1.5, -2.5], dtype=torch.float32),
        torch.tensor([True, False, True]),
    )
    state = recompute.pack(9, extra, torch.device("cpu"))
    assert state is not None and state.shape == (recompute.SLOTS,) and state[0] == 9
    for got, want in zip(recompute.unpack(state, recompute.specs(extra)), extra, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert recompute.pack(0, (torch.zeros(8, dtype=torch.int64),), torch.device("cpu")) is None
