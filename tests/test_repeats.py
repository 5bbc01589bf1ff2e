"""A call like the last one is recognised at once; nobody can tell from what it gives, whatever changed in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt import api, repeats, runtime
from attnrt.operands import Operands
from attnrt.sharded import CONTEXT_PARALLEL

pytestmark = pytest.mark.usefixtures("fresh")
Made = dict[str, Any]


def call(dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    made: Made = {n: torch.randn(2, 4, 16, 8).to(dtype) for n in "qkv"}
    return {**made, "causal": True, **options}


def last() -> attnrt.Decision:
    decision = attnrt.last_decision()
    assert decision is not None
    return decision


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each call that was looked up by its tensors."""
    seen: list[str] = []

    class Noting(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            seen.append("looked up")
            return runtime.plans.get(key, default)

    monkeypatch.setattr(api, "_plans", Noting())
    return seen


def test_is_recognised(looked_up: list[str]) -> None:
    for mask in (None, torch.ones(16, 16, dtype=torch.bool)):
        first = call(mask=mask)
        for _ in range(3):
            attnrt.attention(**first)
        looked_up.clear()
        for _ in range(3):  # other tensors of the same kind
            other = call(mask=None if mask is None else mask.clone())
            want = attnrt.attention(**other, backend="reference")
            looked_up.clear()
            torch.testing.assert_close(attnrt.attention(**other), want)
            assert not looked_up and last().backend == attnrt.explain(**other).backend


def test_torchs_context_parallel_is_refused_again(monkeypatch: pytest.MonkeyPatch, looked_up: list[str]) -> None:
    """Once its module is there, each call asks whether it is in force."""
    pytest.importorskip(CONTEXT_PARALLEL)
    made = call()
    for _ in range(3):
        attnrt.attention(**made)
    looked_up.clear()
    attnrt.attention(**made)
    assert not looked_up

    def refuse() -> None:
        raise attnrt.ArgumentError("q", "a shard", "in force")

    monkeypatch.setattr("attnrt.sharded.refuse_inside_context_parallel", refuse)
    with pytest.raises(attnrt.ArgumentError, match="in force"):
        attnrt.attention(**made)


@pytest.mark.parametrize("kind", ["one tensor thrice", "lengths on a CPU"])
def test_what_is_never_recognised_is_noted_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = call(seqlens_kv=torch.tensor([3, 16], dtype=torch.int32), alignment="top_left")
    if kind == "one tensor thrice":
        made = call() | dict.fromkeys("qkv", torch.randn(2, 4, 16, 8))
    for _ in range(3):
        attnrt.attention(**made)
    monkeypatch.setattr(runtime, "repeated", lambda *_: pytest.fail("noted again"))
    for _ in range(3):
        attnrt.attention(**made)


def test_without_the_guards(monkeypatch: pytest.MonkeyPatch, looked_up: list[str]) -> None:
    """In a release of torch that nobody looked at yet."""
    monkeypatch.setattr(repeats, "_read", False)
    made = call()
    want = attnrt.attention(**made)
    for n in range(1, 5):
        assert torch.equal(attnrt.attention(**made), want) and len(looked_up) == n + 1


def test_this_release_has_been_looked_at() -> None:
    assert repeats._read


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CHANGES: dict[str, Callable[[Made], Made]] = {
    "batch": lambda m: m | {n: m[n][:1] for n in "qkv"},
    "length of the keys": lambda m: m | {n: m[n][:, :, :9] for n in "kv"} | {"alignment": "top_left"},
    "length": lambda m: m | {n: m[n][:, :, :9] for n in "qkv"},
    "KV heads": lambda m: m | {n: m[n][:, :2] for n in "kv"},
    "head dim of v": lambda m: m | {"v": m["v"][..., :4]},
    "strides": lambda m: m | {"k": swapped(m["k"])},
    "dtype": lambda m: m | {n: m[n].double() for n in "qkv"},
    "gradient": lambda m: m | {"v": m["v"].clone().requires_grad_()},
    "parameter": lambda m: m | {"q": torch.nn.Parameter(m["q"])},
    "one tensor twice": lambda m: m | {"v": m["k"]},
    "conjugation": lambda m: m | {"v": torch._neg_view(m["v"])},
    "causal": lambda m: m | {"causal": False},
    "scale": lambda m: m | {"scale": 0.3},
    "window": lambda m: m | {"window": (3, 0)},
    "softcap": lambda m: m | {"softcap": 3.0},
    "deterministic": lambda m: m | {"deterministic": True},
    "dropout": lambda m: m | {"dropout_p": 0.5},
    "backend": lambda m: m | {"backend": "reference"},
    "policy": lambda m: m | {"policy": "deterministic"},
    "LSE": lambda m: m | {"return_lse": True},
    "layout": lambda m: m | {n: m[n].transpose(1, 2) for n in "qkv"} | {"layout": "bshd"},
    "mask": lambda m: m | {"mask": torch.rand(16, 16) < 0.5},
    "mask for each head": lambda m: m | {"mask": torch.rand(4, 16, 16) < 0.5},
    "bias": lambda m: m | {"bias": torch.randn(16, 16)},
    "bias with a gradient": lambda m: m | {"bias": torch.randn(16, 16).requires_grad_()},
    "lengths": lambda m: m | {"seqlens_kv": torch.tensor([3, 16], dtype=torch.int32), "alignment": "top_left"},
}


@pytest.mark.parametrize("before", [{}, {"mask": torch.ones(1, 1, dtype=torch.bool)}], ids=["plain", "masked"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen(change: str, before: Made) -> None:
    usual = call(**before)
    for _ in range(3):
        attnrt.attention(**usual)
    changed = CHANGES[change](usual)
    for made in (changed, usual, changed, changed, changed, usual):
        torch.manual_seed(0)
        got = attnrt.attention(**made)
        request = last().request
        assert request == attnrt.explain(**made).request and last().backend == attnrt.explain(**made).backend
        if "dropout_p" not in made:
            want = attnrt.attention(**{**made, "backend": "reference"})
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a forced backend": lambda: attnrt.use_backend("reference"),
    "a disabled backend": lambda: attnrt.override(disable=["torch"]),
    "a policy": lambda: attnrt.override(policy="deterministic"),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of a GPU": lambda: torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    "nothing": nullcontext,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_whatever_is_around_is_seen(around: str, grad: bool) -> None:
    made = call()
    made |= {n: made[n].requires_grad_(grad) for n in "qkv"}
    for _ in range(3):
        out = attnrt.attention(**made)
    assert out.requires_grad is grad
    for _ in range(3):
        with SURROUNDINGS[around]():
            for _ in range(2):
                out = attnrt.attention(**made)
                want = attnrt.explain(**made)
                assert (last().backend, last().request) == (want.backend, want.request)
                assert out.dtype == (torch.bfloat16 if around == "autocast" else torch.float32)
                assert out.requires_grad is (grad and around not in ("no_grad", "inference mode"))
        assert attnrt.attention(**made).requires_grad is grad
        assert last().request == attnrt.explain(**made).request


def test_switches_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = call()
    made["q"].requires_grad_()
    for _ in range(3):
        attnrt.attention(**made)
    torch.use_deterministic_algorithms(True)
    try:
        attnrt.attention(**made)
        assert last().request.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    attnrt.attention(**made)
    assert not last().request.deterministic and last().backend == "torch"
    monkeypatch.setenv("ATTNRT_BACKEND", "reference")
    attnrt.attention(**made)
    assert last().backend == "reference"
    monkeypatch.delenv("ATTNRT_BACKEND")
    attnrt.attention(**made)
    assert last().backend == "torch"
    monkeypatch.setenv("ATTNRT_REPORT", "perhaps")
    with pytest.raises(attnrt.VariableError):
        attnrt.attention(**made)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0.0}),
        ({"scale": 1.0}, {"scale": True}),
        ({"window": (1, 0)}, {"window": (True, 0)}),
        ({"window": (1, 0)}, {"window": (1.0, 0)}),
        ({"softcap": 1.0}, {"softcap": True}),
        ({"return_lse": False}, {"return_lse": 0}),
        ({"deterministic": True}, {"deterministic": 1}),
        ({"dropout_p": 0.0}, {"dropout_p": False}),
    ],
)
def test_equal_is_not_the_same(right: Made, wrong: Made) -> None:
    made = call() | right
    for _ in range(3):
        attnrt.attention(**made)
    with pytest.raises((attnrt.ArgumentError, attnrt.ArgumentTypeError)):
        attnrt.attention(**{**made, **wrong})


@pytest.mark.parametrize("name", "qkv")
def test_no_tensor(name: str) -> None:
    made = call()
    for _ in range(3):
        attnrt.attention(**made)
    for garbage in (None, 3, [1.0], "q"):
        with pytest.raises(attnrt.ArgumentTypeError, match=name):
            attnrt.attention(**{**made, name: garbage})


def test_lengths_are_read_each_time() -> None:
    lengths = torch.tensor([3, 16], dtype=torch.int32)
    made = call(seqlens_kv=lengths, alignment="top_left")
    for _ in range(3):
        attnrt.attention(**made)
    lengths[0] = 17
    with pytest.raises(attnrt.ArgumentError, match="seqlens_kv"):
        attnrt.attention(**made)


def steps(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def operand_sets() -> dict[str, Operands]:
    """No two of them may be taken for the same, as no value is read of lengths on a GPU but where they stand."""
    mine, other, wide = steps(0, 3, 9), steps(0, 2, 9), steps(0, 0, 2, 2, 9, 9)
    return {
        "cu_seqlens, one tensor": Operands(cu_seqlens_q=mine, cu_seqlens_kv=mine),
        "cu_seqlens, two views": Operands(cu_seqlens_q=mine, cu_seqlens_kv=mine.view(-1)),
        "cu_seqlens, two": Operands(cu_seqlens_q=mine, cu_seqlens_kv=other),
        "cu_seqlens, int64": Operands(cu_seqlens_q=mine, cu_seqlens_kv=other.long()),
        "cu_seqlens of three": Operands(cu_seqlens_q=steps(0, 1, 2, 9), cu_seqlens_kv=steps(0, 1, 3, 9)),
        "a column of a table": Operands(cu_seqlens_q=mine, cu_seqlens_kv=wide.view(3, 2)[:, 0]),
        "lengths of queries": Operands(seqlens_q=mine),
        "lengths of keys": Operands(seqlens_kv=mine),
        "lengths of both, one tensor": Operands(seqlens_q=mine, seqlens_kv=mine),
        "lengths of both": Operands(seqlens_q=mine, seqlens_kv=other),
        "a table of pages": Operands(seqlens_kv=mine, page_table=steps(0, 1, 2).view(3, 1)),
        "lengths and sinks": Operands(seqlens_kv=mine, sinks=torch.zeros(4)),
        "sinks": Operands(sinks=torch.zeros(4)),
        "sinks with a gradient": Operands(sinks=torch.zeros(4, requires_grad=True)),
        "a mask": Operands(mask=torch.ones(16, 16, dtype=torch.bool)),
        "a bias": Operands(bias=torch.ones(16, 16)),
    }


@pytest.mark.parametrize("name", operand_sets())
def test_operands_are_told_apart(name: str) -> None:
    """As on a GPU, where none of their values is read."""
    qkv, sets = [torch.randn(9, 4, 8) for _ in "qkv"], operand_sets()
    same_with = repeats._with_operands(*qkv, sets[name])
    assert [other for other, operands in sets.items() if same_with(*qkv, operands)] == [name]
    assert not same_with(qkv[0], qkv[1][:, :2], qkv[2], sets[name])
    # Other numbers, alike in all else.
    others = {id(t): like(t) for t in sets[name] if t is not None}
    operands = Operands(*[None if t is None else others[id(t)] for t in sets[name]])
    if name == "cu_seqlens, two views":
        assert not same_with(*qkv, operands)
        assert operands.cu_seqlens_q is not None
        operands = operands._replace(cu_seqlens_kv=operands.cu_seqlens_q.view(-1))
    assert same_with(*qkv, operands)


def like(t: Tensor) -> Tensor:
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    return made.random_(0, 2).requires_grad_(t.requires_grad)


def test_a_forgotten_plan_is_not_run() -> None:
    made = call()
    for _ in range(3):
        attnrt.attention(**made)
    assert runtime.repeats
    attnrt.refresh()
    assert not runtime.repeats and not runtime.plans
    attnrt.attention(**made)
    assert runtime.plans


def test_torch_func_is_seen() -> None:
    made = call()
    for _ in range(3):
        attnrt.attention(**made)
    q = made.pop("q")
    with pytest.raises(attnrt.ArgumentError, match="vmap"):
        torch.func.vmap(lambda x: attnrt.attention(x, made["k"], made["v"], causal=True))(q[None])
    grad = torch.func.grad(lambda x: attnrt.attention(x, made["k"], made["v"], causal=True).square().sum())(q)
    leaf = q.clone().requires_grad_()
    attnrt.attention(leaf, made["k"], made["v"], causal=True).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_they_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_REPEATS", 8)
    made = call()
    for i in range(40):
        for _ in range(3):
            attnrt.attention(**made, scale=1.0 + i)
        assert 0 < len(runtime.repeats) <= 8


def test_a_new_variable_is_seen_whatever_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call looks only whether the newest variable is still the newest one."""
    made = call()
    for last_one, value in (("Z", "zz"), ("ZZ", "z"), ("ZZ", ""), ("ZZ", "zz"), ("Z", "z"), ("Z", "")):
        monkeypatch.setenv(last_one, value)
        for _ in range(4):
            attnrt.attention(**made)
        assert last().backend == "torch"
        monkeypatch.setenv("ATTNRT_BACKEND", "reference")
        monkeypatch.delenv(last_one)
        monkeypatch.setenv(last_one, value)
        attnrt.attention(**made)
        assert last().backend == "reference"
        monkeypatch.delenv("ATTNRT_BACKEND")
        attnrt.attention(**made)
        assert last().backend == "torch"
        monkeypatch.delenv(last_one)
        attnrt.attention(**made)


@pytest.mark.parametrize(("name", "value"), [("SOMETHING", "else"), ("SOMETHING", "1"), ("_", "/bin/python")])
def test_a_variable_of_no_interest_costs_one_look(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, looked_up: list[str]
) -> None:
    monkeypatch.delenv(name, raising=False)
    made = call()
    for _ in range(3):
        attnrt.attention(**made)
    monkeypatch.setenv(name, value)
    looked_up.clear()
    for _ in range(3):
        attnrt.attention(**made)
    assert len(looked_up) == 1


@pytest.mark.parametrize("given", ["q", "kv", "both", "one", "alike"])
def test_lengths_of_both_sides(given: str) -> None:
    """On a meta device no length is read, and a call with them is recognised by what they are like."""
    lengths = torch.full((2,), 16, dtype=torch.int32)
    same = {"q": lengths, "kv": lengths} if given == "one" else {"q": lengths, "kv": lengths.clone()}
    if given == "alike":
        same["kv"] = lengths[:]
    usual = {f"seqlens_{n}": same[n] for n in ("q", "kv") if given not in "qkv" or n == given}
    made = call(**usual, alignment="top_left")
    want = attnrt.attention(**made, backend="reference")
    for _ in range(4):
        torch.testing.assert_close(attnrt.attention(**made), want)
        assert last().request == attnrt.explain(**made).request
