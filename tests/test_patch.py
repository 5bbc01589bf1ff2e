"""patch_sdpa: PyTorch's own meaning, nothing silent, and everything back in its place afterwards."""

from __future__ import annotations

import math
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnrt
from attnrt import patch as patching
from attnrt.operands import Operands

C = torch._C._nn
"""Where PyTorch's own function stays. A name of ours for it would be one that patch_sdpa cannot reach, and says so."""


@pytest.fixture(autouse=True)
def put_back(fresh: None) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    for patch in patching._patches:
        patch.undo()
    assert (
        F.scaled_dot_product_attention is C.scaled_dot_product_attention and torch.backends.mha.get_fastpath_enabled()
    )


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) > 0.4
Q, KV, X = (2, 4, 8, 16), (2, 2, 8, 16), (3, 2, 4, 8, 16)
CALLS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "plain": lambda: ((t(*Q), t(*Q), t(*Q)), {}),
    "by name": lambda: ((), {"query": t(*Q), "key": t(*Q), "value": t(*Q)}),
    "causal": lambda: ((t(*Q), t(*Q), t(*Q)), {"is_causal": True}),
    "causal, more keys": lambda: ((t(2, 4, 3, 16), t(*Q), t(*Q)), {"is_causal": True}),
    "causal, fewer keys": lambda: ((t(*Q), t(2, 4, 3, 16), t(2, 4, 3, 16)), {"is_causal": True}),
    "positional": lambda: ((t(*Q), t(*Q), t(*Q), None, 0.0, True), {"scale": 2}),
    "bool mask, dead rows": lambda: ((t(*Q), t(*Q), t(*Q)), {"attn_mask": MASK & (torch.arange(8) > 0)[:, None]}),
    "float mask": lambda: ((t(*Q), t(*Q), t(*Q)), {"attn_mask": t(2, 1, 8, 8)}),
    "mask of one query": lambda: ((t(*Q), t(*Q), t(*Q)), {"attn_mask": t(1, 1, 1, 8)}),
    "float32 mask, bf16": lambda: ([t(*Q, dtype=torch.bfloat16)] * 3, {"attn_mask": t(2, 4, 8, 8)}),  # type: ignore[dict-item]
    "gqa": lambda: ((t(*Q), t(*KV), t(*KV)), {"enable_gqa": True, "is_causal": True}),
    "one kv head broadcasts": lambda: ((t(*Q), t(1, 1, 8, 16), t(1, 1, 8, 16)), {}),
    "one query head broadcasts": lambda: ((t(1, 1, 8, 16), t(*Q), t(*Q)), {}),
    "one value head broadcasts": lambda: ((t(*Q), t(*Q), t(2, 1, 8, 24)), {}),
    "2 dims": lambda: ((t(8, 16), t(8, 16), t(8, 24)), {"attn_mask": MASK}),
    "3 dims": lambda: ((t(3, 8, 16), t(3, 8, 16), t(3, 8, 16)), {"attn_mask": t(3, 8, 8)}),
    "5 dims": lambda: ((t(*X), t(*X), t(*X)), {"is_causal": True}),
    "5 dims broadcast": lambda: ((t(*X), t(1, 2, 4, 8, 16), t(3, 1, 4, 8, 16)), {}),
    "5 dims, mask of 4": lambda: ((t(*X), t(*X), t(*X)), {"attn_mask": t(2, 1, 8, 8)}),
    "5 dims, mask of 5": lambda: ((t(*X), t(*X), t(*X)), {"attn_mask": t(3, 1, 4, 8, 8)}),
    "6 dims, gqa": lambda: ((t(2, *X), t(2, 3, 2, 2, 8, 16), t(2, 3, 2, 2, 8, 16)), {"enable_gqa": True}),
    "no key": lambda: ((t(*Q), t(2, 4, 0, 16), t(2, 4, 0, 16)), {}),
    "fp64": lambda: ([t(*Q, dtype=torch.float64)] * 3, {}),  # type: ignore[dict-item]
}


def outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """Output and gradients of every floating tensor."""
    named = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    keyed = {
        n: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in kwargs.items()
    }
    leaves = [x for x in (*named, *keyed.values()) if isinstance(x, Tensor) and x.requires_grad]
    out = function(*named, **keyed)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), leaves)
    return (out.detach(), *grads)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    wide = 3e-2 if want[0].dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=wide, atol=wide)


@pytest.mark.parametrize("name", CALLS)
def test_pytorchs_meaning(name: str) -> None:
    args, kwargs = CALLS[name]()
    want = outcome(C.scaled_dot_product_attention, args, kwargs)
    with attnrt.patch_sdpa() as patch:
        same(outcome(F.scaled_dot_product_attention, args, kwargs), want)
    assert sum(patch.served.values()) == 1 and not patch.passed_through


@pytest.mark.parametrize("name", ["causal", "gqa", "5 dims, mask of 4", "3 dims", "one value head broadcasts"])
def test_compiled(name: str) -> None:
    args, kwargs = CALLS[name]()
    want = outcome(C.scaled_dot_product_attention, args, kwargs)
    torch._dynamo.reset()
    function = torch.compile(
        lambda *a, **k: F.scaled_dot_product_attention(*a, **k), fullgraph=True, backend="aot_eager"
    )
    with attnrt.patch_sdpa():
        same(outcome(function, args, kwargs), want)
        decision = attnrt.last_decision()
        assert decision is not None and decision.request.compiled
    same(outcome(function, args, kwargs), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype: torch.dtype) -> None:
    q, mask = t(*Q, dtype=dtype), t(8, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = C.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        with attnrt.patch_sdpa() as patch:
            got = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert got.dtype == want.dtype and patch.served
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_dropout_is_always_applied() -> None:
    q, v = t(1, 2, 64, 16), torch.eye(64).expand(1, 2, 64, 64)
    with attnrt.patch_sdpa(), torch.no_grad():
        weights = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
    assert 0.4 < (weights == 0).double().mean() < 0.6


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(training: bool, need_weights: bool) -> None:
    """In training, and in inference, where PyTorch's fast path would step past the function."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x, padding = t(2, 8, 32), torch.arange(8) > torch.tensor([[8], [5]])
    causal = nn.Transformer.generate_square_subsequent_mask(8)
    calls: list[dict[str, Any]] = [{}, {"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True}]
    for options in calls:
        with torch.set_grad_enabled(training):
            want = module(x, x, x, need_weights=need_weights, **options)[0]
            with attnrt.patch_sdpa() as patch:
                got = module(x, x, x, need_weights=need_weights, **options)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert bool(patch.served) != need_weights and not patch.passed_through


def test_an_unmodified_model() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), t(2, 8, 32)
    want = model(x)
    with attnrt.patch_sdpa(backend="reference") as patch:
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert patch.served == {"reference": 2} and "2 calls by reference" in repr(patch)


# ---- what attnrt does not serve


class Subclass(Tensor):
    pass


PASSED: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], str]] = {
    "mask and is_causal": (lambda: ([t(*Q)] * 3, {"attn_mask": MASK, "is_causal": True}), "together with is_causal"),
    "all dropped": (lambda: ([t(*Q)] * 3, {"dropout_p": 1.0}), "dropout_p is not a number in"),
    "a subclass": (lambda: ((t(*Q).as_subclass(Subclass), t(*Q), t(*Q)), {}), "query is a Subclass"),
    "scale without an end": (lambda: ([t(*Q)] * 3, {"scale": math.inf}), "scale is not finite"),
    "scale as a tensor": (lambda: ([t(*Q)] * 3, {"scale": torch.tensor(0.5)}), "not a plain Python value"),
    "heads of key and value": (
        lambda: ((t(*Q), t(*KV), t(2, 1, 8, 16)), {"enable_gqa": True}),
        "heads of key and value differ",
    ),
    "no head dim": (lambda: ((t(2, 4, 8, 0), t(2, 4, 8, 0), t(*Q)), {}), "head dims"),
}
REFUSED: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "heads": lambda: ((t(*Q), t(*KV), t(*KV)), {}),
    "dims": lambda: ((t(*Q), t(3, 8, 16), t(3, 8, 16)), {}),
    "gqa of 2 dims": lambda: ([t(8, 16)] * 3, {"enable_gqa": True}),
    "dtypes": lambda: ((t(*Q).half(), t(*Q), t(*Q)), {}),
    "is_causal": lambda: ([t(*Q)] * 3, {"is_causal": 1}),
    "dropout_p": lambda: ([t(*Q)] * 3, {"dropout_p": 1.5}),
    "mask dtype": lambda: ([t(*Q)] * 3, {"attn_mask": t(8, 8, dtype=torch.float64)}),
    "mask shape": lambda: ([t(*Q)] * 3, {"attn_mask": t(3, 3)}),
    "mask dims": lambda: ([t(*Q)] * 3, {"attn_mask": t(8)}),
    "no tensor": lambda: (([1.0], t(*Q), t(*Q)), {}),
    "None": lambda: ((t(*Q), None, t(*Q)), {}),
}


@pytest.mark.parametrize("name", PASSED)
def test_passed_on_and_said_so(name: str) -> None:
    make, says = PASSED[name]
    args, kwargs = make()
    want = C.scaled_dot_product_attention(*args, **kwargs)
    with attnrt.patch_sdpa() as patch:
        with pytest.warns(attnrt.PassThroughWarning, match=says):
            torch.testing.assert_close(
                F.scaled_dot_product_attention(*args, **kwargs), want, rtol=0, atol=0, equal_nan=True
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once for each reason
            F.scaled_dot_product_attention(*args, **kwargs)
    (passed,) = patch.passed_through
    assert says in passed.reason and passed.times == 2 and "query" in passed.call and not patch.served
    assert "2 calls passed to PyTorch" in repr(patch)


@pytest.mark.parametrize("name", PASSED)
def test_strict(name: str) -> None:
    make, says = PASSED[name]
    args, kwargs = make()
    with attnrt.patch_sdpa(strict=True), pytest.raises(attnrt.ArgumentError, match=says):
        F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_calls_get_pytorchs_own_error(name: str) -> None:
    args, kwargs = REFUSED[name]()
    with pytest.raises((RuntimeError, TypeError, IndexError)) as theirs:
        C.scaled_dot_product_attention(*args, **kwargs)
    with attnrt.patch_sdpa(), warnings.catch_warnings():
        warnings.simplefilter("ignore", attnrt.PassThroughWarning)
        with pytest.raises(theirs.type) as ours:
            F.scaled_dot_product_attention(*args, **kwargs)
    assert str(ours.value)[:30] == str(theirs.value)[:30]


def test_a_compiled_graph_says_at_the_trace_what_it_passes_on() -> None:
    q = t(*Q)
    torch._dynamo.reset()
    function = torch.compile(
        lambda q: F.scaled_dot_product_attention(q, q, q, MASK, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    with attnrt.patch_sdpa() as patch:
        with pytest.warns(attnrt.PassThroughWarning, match="together with is_causal"):
            out = function(q)
        function(q)
    assert torch.allclose(out, C.scaled_dot_product_attention(q, q, q, MASK, is_causal=True), atol=1e-6)
    assert [p.call for p in patch.passed_through] == ["in a compiled graph, counted once"]
    torch._dynamo.reset()


def test_transforms_are_passed_on() -> None:
    q = t(3, *Q)
    with attnrt.patch_sdpa() as patch, pytest.warns(attnrt.PassThroughWarning, match=r"torch\.func"):
        got = torch.func.vmap(lambda q: F.scaled_dot_product_attention(q, q, q))(q)
    torch.testing.assert_close(got, C.scaled_dot_product_attention(q, q, q), rtol=1e-4, atol=1e-5)
    assert patch.passed_through


def test_no_backend_left() -> None:
    """Passed on where the user only turned things off; an error where one was forced."""
    q = t(*Q)
    with attnrt.patch_sdpa(), attnrt.override(disable=("torch", "reference")):
        with pytest.warns(attnrt.PassThroughWarning, match="no backend of attnrt"):
            F.scaled_dot_product_attention(q, q, q)
        with attnrt.patch_sdpa(strict=True), pytest.raises(attnrt.BackendUnavailable):
            F.scaled_dot_product_attention(q, q, q)
    with attnrt.patch_sdpa(), attnrt.use_backend("cudnn"), pytest.raises(attnrt.BackendUnavailable):
        F.scaled_dot_product_attention(q, q, q)
    with attnrt.patch_sdpa(backend="cudnn"), pytest.raises(attnrt.BackendUnavailable):
        F.scaled_dot_product_attention(q, q, q)


def test_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNRT_REPORT", "each")
    with attnrt.patch_sdpa(), pytest.warns(attnrt.PassThroughWarning):
        F.scaled_dot_product_attention(*[t(*Q)] * 3, dropout_p=1.0)
    assert "passed on to PyTorch: dropout_p" in capsys.readouterr().err


class OnTop(attnrt.Backend):
    """Built on the very function that is patched."""

    name, title, prefix = "on_top", "On top", "ON_TOP"

    def prepare(self, request: Any, environment: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Tensor:
            return 2 * F.scaled_dot_product_attention(q, k, v)  # type: ignore[no-any-return]

        return run


def test_a_backend_on_top_of_pytorchs_function() -> None:
    attnrt.register_backend(OnTop())
    q = t(*Q)
    with attnrt.patch_sdpa(backend="on_top") as patch:
        got = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(got, 2 * C.scaled_dot_product_attention(q, q, q)) and patch.served == {"on_top": 1}


# ---- in place and back


def test_function_with_undo() -> None:
    patch = attnrt.patch_sdpa()
    assert patch.active and F.scaled_dot_product_attention is not C.scaled_dot_product_attention
    patch.undo()
    patch.undo()
    assert not patch.active and F.scaled_dot_product_attention is C.scaled_dot_product_attention


def test_entered_again() -> None:
    """A block is in force to its end, whatever was entered and left before or inside."""
    patch, q = attnrt.patch_sdpa(backend="reference"), t(*Q)
    for _ in range(2):
        with patch:
            with patch:
                assert patch.active
            F.scaled_dot_product_attention(q, q, q)
        assert not patch.active and F.scaled_dot_product_attention is C.scaled_dot_product_attention
    assert patch.served == {"reference": 2}


def test_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), attnrt.patch_sdpa():
        raise ZeroDivisionError
    with pytest.raises(attnrt.UnknownNameError):
        attnrt.patch_sdpa(backend="tritn")
    assert F.scaled_dot_product_attention is C.scaled_dot_product_attention


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_in_any_order(order: tuple[int, int, int]) -> None:
    """The innermost one left decides."""
    names = ["torch", "reference", "torch"]
    patches, q = [attnrt.patch_sdpa(backend=n) for n in names], t(*Q)
    left = [0, 1, 2]
    for i in order:
        F.scaled_dot_product_attention(q, q, q)
        decision = attnrt.last_decision()
        assert decision is not None and decision.backend == names[left[-1]]
        patches[i].undo()
        left.remove(i)
    assert F.scaled_dot_product_attention is C.scaled_dot_product_attention


def test_threads() -> None:
    """All threads see a patch, and the function is back when the last of many is undone."""
    q, errors = t(*Q), []
    want = C.scaled_dot_product_attention(q, q, q)

    def enter_and_leave() -> None:
        try:
            for _ in range(30):
                with attnrt.patch_sdpa():
                    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=enter_and_leave) for _ in range(6)]
    with attnrt.patch_sdpa() as patch:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert patch.active
    assert not errors and F.scaled_dot_product_attention is C.scaled_dot_product_attention


@pytest.fixture
def early() -> Iterator[types.ModuleType]:
    """A module that took the function by its name before any patch."""
    module = types.ModuleType("early_bird")
    module.attend = C.scaled_dot_product_attention  # type: ignore[attr-defined]
    sys.modules["early_bird"] = module
    yield module
    del sys.modules["early_bird"]


def test_modules_out_of_reach_are_named(early: types.ModuleType) -> None:
    with pytest.warns(attnrt.PassThroughWarning, match=r"early_bird.*modules=") as caught:
        attnrt.patch_sdpa().undo()
    assert not any("torch." in str(w.message).partition(" hold ")[0] for w in caught)
    for modules in ([early], "all"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with attnrt.patch_sdpa(modules=modules) as patch:
                early.attend(*[t(*Q)] * 3)
        assert patch.served and early.attend is C.scaled_dot_product_attention


@pytest.mark.parametrize("modules", ["early_bird", sys, [3], [sys]], ids=str)
def test_modules_that_cannot_be(modules: Any) -> None:
    with pytest.raises((attnrt.ArgumentError, attnrt.ArgumentTypeError), match="modules="):
        attnrt.patch_sdpa(modules=modules)
    assert F.scaled_dot_product_attention is C.scaled_dot_product_attention


def test_somebody_elses_patch_is_left_alone() -> None:
    """Before ours: it gets what is passed on. After ours: it stays."""

    def before(*args: Any, **kwargs: Any) -> Tensor:
        return C.scaled_dot_product_attention(*args, **kwargs) + 1  # type: ignore[no-any-return]

    def after(*args: Any, **kwargs: Any) -> None:
        return None

    try:
        F.scaled_dot_product_attention = before  # type: ignore[assignment]
        patch = attnrt.patch_sdpa()
        with pytest.warns(attnrt.PassThroughWarning):
            assert (F.scaled_dot_product_attention(*[t(*Q)] * 3, dropout_p=1.0) == 1).all()
        F.scaled_dot_product_attention = after  # type: ignore[assignment]
        with pytest.warns(attnrt.PassThroughWarning, match="replaced by somebody else"):
            patch.undo()
        assert F.scaled_dot_product_attention is after
    finally:
        F.scaled_dot_product_attention = C.scaled_dot_product_attention
