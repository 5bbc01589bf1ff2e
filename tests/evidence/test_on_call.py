"""policy="measure": a request's kernels are timed when it is first seen, and only if that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Planted, SlightlyWrong, entry, write

import attnrt
from attnrt.evidence import on_call
from attnrt.evidence.calls import Call


@pytest.fixture(autouse=True)
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_call, "SECONDS", {"cpu": 0.01})


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that were measured."""
    found: list[Any] = []
    measured = on_call._measured

    def counted(request: Any, *rest: Any) -> Any:
        found.append(request)
        return measured(request, *rest)

    monkeypatch.setattr(on_call, "_measured", counted)
    return found


def tensors(length: int = 24, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 8).requires_grad_(grad) for _ in range(3)]


def test_never_unasked(times: list[Any]) -> None:
    attnrt.attention(*tensors())
    attnrt.explain(*tensors(), policy="measure")
    attnrt.explain_shape(batch=1, heads_q=2, seqlen_q=24, head_dim=8, policy="measure")
    assert times == []


def test_once_for_each_request(times: list[Any]) -> None:
    before = attnrt.explain(*tensors(), policy="measure")
    assert any("not measured yet" in n for n in before.notices)
    for _ in range(3):
        attnrt.attention(*tensors(), policy="measure")
    attnrt.attention(*tensors(32), policy="measure")
    assert [r.seqlen_q for r in times] == [24, 32]
    found = attnrt.explain(*tensors(), policy="measure")
    assert (found.policy, found.line) == ("measure", "measure: this call")
    assert found.evidence.startswith("measured on this call's own tensors: ") and "reference" in found.evidence
    assert attnrt.last_decision().evidence.startswith("measured")  # type: ignore[union-attr]
    attnrt.refresh()
    attnrt.attention(*tensors(), policy="measure")
    assert len(times) == 3


def test_by_variable_and_context(times: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with attnrt.override(policy="measure"):
        attnrt.attention(*tensors())
    monkeypatch.setenv("ATTNRT_POLICY", "measure")
    attnrt.attention(*tensors())
    assert len(times) == 1
    attnrt.attention(*tensors(), policy="default")
    assert attnrt.last_decision().policy == "default"  # type: ignore[union-attr]


def test_it_changes_nothing_else(times: list[Any]) -> None:
    """Results, gradients and the state of the random generator are those of a call that is not measured."""
    q, k, v = tensors(grad=True)
    torch.manual_seed(0)
    want = attnrt.attention(q, k, v)
    grads = torch.autograd.grad(want.sum(), (q, k, v))
    after = torch.rand(1)
    torch.manual_seed(0)
    got = attnrt.attention(q, k, v, policy="measure")
    assert q.grad is None and times[0].needs_grad
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.rand(1) == after


def test_dropout_is_drawn_as_ever(times: list[Any]) -> None:
    q, k, v = tensors()
    torch.manual_seed(3)
    want = attnrt.attention(q, k, v, dropout_p=0.5, backend="reference")
    torch.manual_seed(3)
    with attnrt.override(disable=("torch",)):
        got = attnrt.attention(q, k, v, dropout_p=0.5, policy="measure")
    assert torch.equal(got, want) and len(times) == 1


def test_a_wrong_backend_may_not_win() -> None:
    attnrt.register_backend(SlightlyWrong())
    with attnrt.override(prefer=("planted",), policy="measure"):
        attnrt.attention(*tensors())
        found = attnrt.last_decision()
    assert found is not None and found.backend != "planted"
    assert [r.rule for r in found.verdicts["planted"].reasons] == ["MEASURED_WRONG"]


def test_a_new_backend_is_measured_too(times: list[Any]) -> None:
    attnrt.attention(*tensors(), policy="measure")
    attnrt.register_backend(Planted())
    attnrt.attention(*tensors(), policy="measure")
    assert len(times) == 2 and "planted" in attnrt.last_decision().evidence  # type: ignore[union-attr]


def test_a_forced_backend_is_not_measured(times: list[Any]) -> None:
    attnrt.attention(*tensors(), policy="measure", backend="reference")
    assert times == [] and attnrt.last_decision().backend == "reference"  # type: ignore[union-attr]


def test_what_cannot_be_measured_is_served_and_said(times: list[Any]) -> None:
    attnrt.attention(*(t[:, :, :0] for t in tensors()), policy="measure")
    found = attnrt.last_decision()
    assert times == [] and found is not None and "not measured: there is nothing to compute" in found.notices


def test_numbers_that_are_none_are_nobodys_fault() -> None:
    """NaN in, NaN out: every kernel is served as before, and none is called wrong."""
    q, k, v = tensors()
    k[0, 0, 3] = float("nan")
    out = attnrt.attention(q, k, v, policy="measure")
    found = attnrt.last_decision()
    assert out[:, 0].isnan().all() and not out[:, 1].isnan().any()
    assert found is not None and all(v.eligible for n, v in found.verdicts.items() if n in ("torch", "reference"))


def test_what_goes_wrong_while_measuring_is_not_the_calls_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(on_call, "measure", fails)
    attnrt.attention(*tensors(), policy="measure")
    found = attnrt.last_decision()
    assert found is not None and any("no memory left" in n for n in found.notices)


def test_the_cache_directory_serves_until_then(cache: Path) -> None:
    call = Call(heads_q=2, seqlen_q=24, head_dim=8, dtype="fp32", layout="bhsd")
    write(cache, entry(call, {"reference": 1.0, "torch.flash_cpu": 5.0}))
    attnrt.refresh()
    found = attnrt.explain(*tensors(), policy="measure")
    assert found.backend == "reference" and "tuned policy from" in found.evidence
