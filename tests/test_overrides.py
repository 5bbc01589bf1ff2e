"""Who wins: argument over context over environment over policy; and what happens when the winner fails."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt import registry, settings
from attnrt.decision import Decision
from attnrt.errors import BackendFailed, BackendUnavailable, DemotionWarning, VerificationFailed

NEXT = "name: mine\ndescription: Goes on.\nextends: default\non_failure: next\n"


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def go_on(tmp_path: Path) -> str:
    """A policy that tries the next backend."""
    file = tmp_path / "next.yaml"
    file.write_text(NEXT)
    return str(file)


def on_h100(**changes: Any) -> Decision:
    """Training, where the default policy takes cudnn, then flash_attn_3, 4, 2 and triton."""
    shape: dict[str, Any] = {"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 4096, "head_dim": 128}
    return attnrt.explain_shape(environment="h100", causal=True, training=True, **{**shape, **changes})


def tensors(grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 16, 8).requires_grad_(grad) for _ in range(3)]


def overrides(decision: Decision) -> list[tuple[str, str, str, str | None]]:
    return [(o.what, o.value, o.source, o.beaten_by) for o in decision.overrides]


ARGUMENT, CONTEXT = "the argument backend=", "a context manager"


class Spare(attnrt.Backend):
    """The reference, under a name of its own. Subclasses spoil it."""

    name, title, prefix = "spare", "the spare", "SPARE"

    def prepare(self, request: Any, environment: Any) -> Any:
        return registry.backends()["reference"].prepare(request, environment)


class Broken(Spare):
    """Fails when it runs."""

    name, title, prefix = "broken", "the broken one", "BROKEN"
    error: ClassVar[Exception] = RuntimeError("no such kernel image")

    def prepare(self, request: Any, environment: Any) -> Any:
        def run(*tensors: Any) -> Any:
            raise self.error

        return run


def broken(error: Exception) -> Broken:
    return type("BrokenIn", (Broken,), {"error": error})()


# ---- precedence


def test_force_argument_context_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_h100().backend == "cudnn"
    monkeypatch.setenv("ATTNRT_BACKEND", "triton")
    assert (on_h100().backend, on_h100().forced) == ("triton", "triton")
    with attnrt.use_backend("flash_attn_2"):
        assert on_h100().backend == "flash_attn_2"
        decision = on_h100(backend="flash_attn_4")
    assert decision.backend == "flash_attn_4" and decision.why == f"forced by {ARGUMENT}"
    assert overrides(decision) == [
        ("force", "flash_attn_4", ARGUMENT, None),
        ("force", "flash_attn_2", CONTEXT, ARGUMENT),
        ("force", "triton", "ATTNRT_BACKEND", ARGUMENT),
    ]


def test_prefer_context_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_PREFER", "triton,flash_attn_2")
    assert on_h100().backend == "triton" and on_h100().why == "preferred by ATTNRT_PREFER"
    with attnrt.override(prefer="flash_attn_3"):
        decision = on_h100()
    assert decision.backend == "flash_attn_3"
    assert overrides(decision) == [
        ("prefer", "flash_attn_3", CONTEXT, None),
        ("prefer", "triton, flash_attn_2", "ATTNRT_PREFER", CONTEXT),
    ]


def test_preferring_is_not_forcing() -> None:
    with attnrt.override(prefer=("cudnn", "triton")):
        assert on_h100(softcap=30.0).backend == "triton"
    with attnrt.use_backend("cudnn"):
        assert on_h100(softcap=30.0).backend is None


def test_policy_argument_context_environment(monkeypatch: pytest.MonkeyPatch, go_on: str) -> None:
    monkeypatch.setenv("ATTNRT_POLICY", "no_vendor")
    assert (on_h100().policy, on_h100().backend) == ("no_vendor", "triton")
    with attnrt.override(policy="deterministic"):
        assert on_h100().policy == "deterministic" and on_h100().request.deterministic
        decision = on_h100(policy=go_on)
    assert decision.policy == "mine"
    assert overrides(decision) == [
        ("policy", go_on, "the argument policy=", None),
        ("policy", "deterministic", CONTEXT, "the argument policy="),
        ("policy", "no_vendor", "ATTNRT_POLICY", "the argument policy="),
    ]


def test_disables_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_DISABLE", "cudnn")
    with attnrt.override(disable="flash_attn_3"), attnrt.override(disable=("flash_attn_4",)):
        decision = on_h100()
    assert decision.backend == "torch"
    sources = {n: [r.message for r in v.reasons if r.rule == "DISABLED"] for n, v in decision.verdicts.items()}
    assert sources["cudnn"] == ["turned off by ATTNRT_DISABLE"]
    assert sources["flash_attn_4"] == sources["flash_attn_3"] == [f"turned off by {CONTEXT}"]


@pytest.mark.parametrize(
    ("force", "disable", "served"),
    [
        ("argument", "context", True),
        ("argument", "environment", True),
        ("context", "environment", True),
        ("environment", "environment", False),
        ("environment", "context", False),
        ("context", "inner context", False),
        ("inner context", "context", True),
    ],
)
def test_a_force_lifts_a_lower_disable_only(
    force: str, disable: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"disable": "triton"} if disable == "context" else {"backend": "triton"} if force == "context" else {}
    inner: dict[str, str] = {"disable": "triton"} if disable == "inner context" else {}
    if force == "inner context":
        inner = {"backend": "triton"}
    if force == "environment":
        monkeypatch.setenv("ATTNRT_BACKEND", "triton")
    if disable == "environment":
        monkeypatch.setenv("ATTNRT_DISABLE", "triton")
    with attnrt.override(**outer), attnrt.override(**inner):
        decision = on_h100(backend="triton" if force == "argument" else None)
    assert decision.backend == ("triton" if served else None)
    assert served is not any(r.rule == "DISABLED" for r in decision.verdicts["triton"].reasons)


def test_a_lifted_disable_is_said() -> None:
    with attnrt.override(disable="cudnn"):
        decision = on_h100(backend="cudnn")
    assert ("disable", "cudnn", CONTEXT, ARGUMENT) in overrides(decision)
    assert f"disable cudnn (by {CONTEXT}), overridden by {ARGUMENT}" in str(decision)


# ---- families and kernels


def test_families() -> None:
    assert on_h100(backend="flash_attn").backend == "flash_attn_3"
    assert on_h100(backend="flash_attn").forced == "flash_attn"
    with attnrt.override(disable="flash_attn"):
        decision = on_h100()
        assert decision.verdicts["flash_attn"].reasons[0].rule == "DISABLED"
        assert [n for n, v in decision.verdicts.items() if any(r.rule == "DISABLED" for r in v.reasons)] == [
            n for n in decision.verdicts if n.startswith("flash_attn_")
        ]
    with attnrt.override(disable="flash_attn_3"):
        assert on_h100(backend="flash_attn").backend == "flash_attn_4", "a member that is still on serves its family"
    with attnrt.override(prefer="flash_attn"):
        assert on_h100().backend == "flash_attn_3", "a family goes by the policy's order, forced or preferred"


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attnrt.explain(*tensors(), dropout_p=0.1).label == "torch[math]"
    with attnrt.override(disable="torch.math"):
        decision = attnrt.explain(*tensors(), dropout_p=0.1)
    assert decision.backend == "reference"
    assert "DISABLED" in {r.rule for r in decision.verdicts["torch"].reasons}
    assert on_h100(backend="torch").label == "torch[cudnn]"
    monkeypatch.setenv("ATTNRT_DISABLE", "torch.cudnn, torch.flash")
    assert on_h100(backend="torch", heads_kv=32).label == "torch[efficient]"


# ---- Transformer Engine's variables


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("NVTE_FLASH_ATTN", {"flash_attn_4", "flash_attn_3", "flash_attn_2"}),
        ("NVTE_FUSED_ATTN", {"cudnn"}),
        ("NVTE_UNFUSED_ATTN", {"reference"}),
    ],
)
def test_nvte_switches(name: str, off: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    decision = on_h100()
    disabled = {n: r.message for n, v in decision.verdicts.items() for r in v.reasons if r.rule == "DISABLED"}
    assert set(disabled) == off and set(disabled.values()) == {f"turned off by {name}=0"}
    for other in ("1", "2", ""):
        monkeypatch.setenv(name, other)
        assert on_h100().verdicts == on_h100().verdicts and on_h100().backend == "cudnn"


def test_nvte_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert on_h100(backend="torch").label == "torch[flash]"
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    assert attnrt.explain(*tensors(), dropout_p=0.1).backend is None


def test_nvte_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    decision = on_h100()
    assert decision.request.deterministic
    assert ("deterministic", "True", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0", None) in overrides(decision)
    assert "FA3_NONDETERMINISTIC_UNCONFIRMED" in {said.id for said in decision.verdicts["flash_attn_3"].warnings}
    by_argument = ("deterministic", "True", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0", "the argument deterministic=")
    attnrt.attention(*tensors(), deterministic=False)
    for called in (on_h100(deterministic=False), attnrt.last_decision()):
        assert not called.request.deterministic and by_argument in overrides(called)


def test_determinism_from_torch() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert on_h100().request.deterministic and not on_h100(deterministic=False).request.deterministic
        attnrt.attention(*tensors())
        assert attnrt.last_decision().request.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    attnrt.attention(*tensors())
    assert not attnrt.last_decision().request.deterministic


def test_the_call_outranks_a_deterministic_policy() -> None:
    assert on_h100(policy="deterministic").request.deterministic
    assert not on_h100(policy="deterministic", deterministic=False).request.deterministic


# ---- contexts


OUTER = "an outer context manager"


def test_nested_contexts() -> None:
    with attnrt.override(disable="cudnn", policy="default", prefer="triton"):
        with attnrt.use_backend("flash_attn_2"):
            assert on_h100().backend == "flash_attn_2"
            with attnrt.use_backend(None), attnrt.override(prefer=()):
                assert on_h100().backend == "flash_attn_3", "no force, no preference; cudnn is still off"
                with attnrt.use_backend("cudnn"):
                    assert on_h100().backend == "cudnn"
            assert on_h100().backend == "flash_attn_2"
        assert on_h100().backend == "triton"
    assert on_h100().backend == "cudnn"


def test_use_backend_none_lifts_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_BACKEND", "triton")
    with attnrt.use_backend(None):
        assert on_h100().backend == "cudnn" and on_h100().forced is None
        assert ("force", "triton", "ATTNRT_BACKEND", "use_backend(None)") in overrides(on_h100())


def test_what_inner_blocks_beat_is_said() -> None:
    outer = attnrt.override(backend="triton", prefer="cudnn", policy="default", disable=("reference", "cudnn"))
    with outer, attnrt.override(backend="reference", prefer=(), policy="no_vendor"):
        said = overrides(on_h100())
    beaten = [(what, value) for what, value, source, by in said if (source, by) == (OUTER, "an inner one")]
    assert sorted(beaten) == [
        ("disable", "reference"), ("force", "triton"), ("policy", "default"), ("prefer", "cudnn"),
    ]  # fmt: skip
    assert ("force", "reference", "a context manager", None) in said
    assert ("disable", "cudnn", "a context manager", None) in said


def test_blocks_of_one_meaning_are_one_context() -> None:
    """However deep a decorated function calls itself: each context is a key of the plans' cache."""
    a, b = attnrt.use_backend("reference"), attnrt.use_backend("torch")
    with a:
        once = settings.current_context()
        with a, a:
            assert settings.current_context() is once
        with b, a:
            twice = settings.current_context()
            with b, a:
                assert settings.current_context() is twice


def test_a_context_ends_with_its_error() -> None:
    with pytest.raises(KeyError), attnrt.use_backend("reference"):
        raise KeyError("theirs")
    assert attnrt.explain(*tensors()).backend == "torch"


def test_decorator_and_reuse() -> None:
    block = attnrt.use_backend("reference")

    @block
    def ran(depth: int) -> list[str | None]:
        """Docstring."""
        attnrt.attention(*tensors())
        return [attnrt.last_decision().backend, *(ran(depth - 1) if depth else [])]

    assert ran(2) == ["reference"] * 3
    assert (ran.__name__, ran.__doc__) == ("ran", "Docstring.")
    with block, block:
        assert attnrt.explain(*tensors()).backend == "reference"
    assert attnrt.explain(*tensors()).backend == "torch"


def test_threads_do_not_share() -> None:
    barrier, found = threading.Barrier(4), {}

    def work(name: str) -> None:
        with attnrt.use_backend(name) if name != "none" else attnrt.override():
            for _ in range(50):
                barrier.wait()
                attnrt.attention(*tensors())
                found.setdefault(name, set()).add(attnrt.last_decision().backend)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "reference", "none", "spare")]
    attnrt.register_backend(Spare())
    with attnrt.use_backend("reference"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"torch": {"torch"}, "reference": {"reference"}, "none": {"torch"}, "spare": {"spare"}}


def test_tasks_do_not_share() -> None:
    async def work(name: str) -> set[str | None]:
        found = set()
        with attnrt.use_backend(name):
            for _ in range(5):
                attnrt.attention(*tensors())
                await asyncio.sleep(0)
                found.add(attnrt.explain(*tensors()).backend)
                found.add(attnrt.last_decision().backend)
        return found

    async def both() -> Any:
        return await asyncio.gather(work("torch"), work("reference"))

    assert asyncio.run(both()) == [{"torch"}, {"reference"}]


def test_last_decision() -> None:
    seen: list[Decision | None] = []
    thread = threading.Thread(target=lambda: seen.append(attnrt.last_decision()))
    attnrt.attention(*tensors(), causal=True)
    first = attnrt.last_decision()
    attnrt.explain(*tensors(), backend="reference")
    assert attnrt.last_decision() is first, "explain runs nothing"
    assert first.backend == "torch" and first.request.causal and not first.simulated
    thread.start()
    thread.join()
    assert seen == [None], "another thread has made no call"


def test_a_changed_variable_holds_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran() -> str | None:
        attnrt.attention(*tensors())
        return attnrt.last_decision().backend

    assert ran() == "torch"
    monkeypatch.setenv("ATTNRT_BACKEND", "reference")
    assert ran() == "reference"
    monkeypatch.setenv("ATTNRT_BACKEND", "torch")
    assert ran() == "torch"
    monkeypatch.delenv("ATTNRT_BACKEND")
    monkeypatch.setenv("ATTNRT_DISABLE", "torch")
    assert ran() == "reference"
    monkeypatch.delenv("ATTNRT_DISABLE")
    assert ran() == "torch"


def test_overrides_are_in_every_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_BACKEND", "triton")
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", "1GiB")
    with attnrt.override(disable="torch.math"):
        decision = on_h100(backend="flash_attn")
    said = {str(o) for o in decision.overrides}
    assert said == {
        f"force flash_attn (by {ARGUMENT})",
        f"force triton (by ATTNRT_BACKEND), overridden by {ARGUMENT}",
        f"disable torch.math (by {CONTEXT})",
        "unfused_limit 1073741824 bytes (by ATTNRT_UNFUSED_LIMIT)",
    }
    assert all(text in str(decision) and text in decision.to_markdown() for text in said)
    assert [tuple(o.values()) for o in json.loads(decision.to_json())["overrides"]] == overrides(decision)


# ---- failures


def test_unavailable_carries_its_report() -> None:
    with pytest.raises(BackendUnavailable, match="TRITON_DEVICE") as caught:
        attnrt.attention(*tensors(), backend="triton")
    report = caught.value.report
    assert report.backend is None and report.forced == "triton"
    assert report.verdicts["torch"].eligible and not report.verdicts["triton"].eligible
    assert str(report) in str(caught.value)


@pytest.mark.filterwarnings("default::attnrt.errors.DemotionWarning")
@pytest.mark.parametrize("stage", ["prepare", "run", "a later run"])
def test_next_candidate(stage: str, go_on: str) -> None:
    class Fails(Broken):
        runs = 0

        def prepare(self, request: Any, environment: Any) -> Any:
            if stage == "prepare":
                raise ImportError("no such package")
            good = super(Broken, self).prepare(request, environment)

            def run(*tensors: Any) -> Any:
                Fails.runs += 1
                if stage == "run" or Fails.runs > 1:
                    raise RuntimeError("no such kernel image")
                return good(*tensors)

            return run

    attnrt.register_backend(Fails())
    q, k, v = tensors()
    expected = attnrt.attention(q, k, v, backend="reference")
    with attnrt.override(prefer="broken", policy=go_on):
        if stage == "a later run":
            attnrt.attention(q, k, v)
            assert attnrt.last_decision().backend == "broken"
        with pytest.warns(DemotionWarning, match=r"broken failed: \w+Error: no such .*; trying the next") as caught:
            torch.testing.assert_close(attnrt.attention(q, k, v), expected)
        assert len([w for w in caught if w.category is DemotionWarning]) == 1
        decision = attnrt.last_decision()
        assert decision.backend == "torch" and decision.on_failure == "next"
        (reason,) = decision.verdicts["broken"].reasons
        assert reason.rule == "DEMOTED" and "no such" in reason.message and "refresh()" in reason.remedy
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attnrt.attention(q, k, v)
        assert attnrt.last_decision().backend == "torch"
        assert attnrt.explain(q, k, v).verdicts["broken"].reasons == (reason,)
        assert attnrt.explain(q, k, v, causal=True).backend == "broken", "another request is not demoted"
        attnrt.refresh()
        assert attnrt.explain(q, k, v).backend == "broken"


def test_raise_is_the_default() -> None:
    attnrt.register_backend(Broken())
    with attnrt.override(prefer="broken"), pytest.raises(BackendFailed, match="no such kernel image") as caught:
        attnrt.attention(*tensors())
    assert caught.value.__cause__ is Broken.error
    assert caught.value.report.backend == "broken" and "on_failure" in str(caught.value)
    assert attnrt.explain(*tensors()).verdicts["broken"].eligible, "nothing is remembered"


def test_forced_never_goes_on(go_on: str) -> None:
    attnrt.register_backend(Broken())
    with pytest.raises(BackendFailed, match="it was forced"):
        attnrt.attention(*tensors(), backend="broken", policy=go_on)


def test_out_of_memory_passes_through() -> None:
    error = torch.OutOfMemoryError("tried to allocate 2 GiB")
    attnrt.register_backend(broken(error))
    with attnrt.override(prefer="broken"), pytest.raises(torch.OutOfMemoryError) as caught:
        attnrt.attention(*tensors())
    assert caught.value is error and "broken" in error.__notes__[0]


@pytest.mark.parametrize("stage", ["prepare", "run", "a later run"])
def test_out_of_memory_counts_for_one_call(stage: str, go_on: str) -> None:
    """The next backend serves this call, the report says why, and the next call tries the first again."""
    full = {"now": stage != "a later run"}

    class Greedy(Broken):
        name = "greedy"

        def prepare(self, request: Any, environment: Any) -> Any:
            def run(*tensors: Any) -> Any:
                if full["now"]:
                    raise torch.OutOfMemoryError("tried to allocate 2 GiB")
                return good(*tensors)

            if stage == "prepare" and full["now"]:
                raise torch.OutOfMemoryError("no room for the workspace")
            good = registry.backends()["reference"].prepare(request, environment)
            return run

    attnrt.register_backend(Greedy())
    q, k, v = tensors()
    want = attnrt.attention(q, k, v, backend="reference")
    with attnrt.override(prefer="greedy", policy=go_on):
        if stage == "a later run":
            attnrt.attention(q, k, v)
            full["now"] = True
        for _ in range(2):
            with pytest.warns(DemotionWarning, match=r"trying the next backend in this call"):
                torch.testing.assert_close(attnrt.attention(q, k, v), want)
            decision = attnrt.last_decision()
            (reason,) = decision.verdicts["greedy"].reasons
            assert decision.backend == "torch" and reason.rule == "OUT_OF_MEMORY" and "next call" in reason.remedy
            assert attnrt.explain(q, k, v).backend == "greedy", "nothing is remembered"
        full["now"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attnrt.attention(q, k, v)
        assert attnrt.last_decision().backend == "greedy"


def test_an_interrupt_passes_through() -> None:
    attnrt.register_backend(broken(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        attnrt.attention(*tensors(), backend="broken")


# ---- the other variables


def test_report_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNRT_REPORT", "once")
    attnrt.attention(*tensors())
    first = capsys.readouterr()
    assert first.out == "" and "torch[flash_cpu]" in first.err and "CUDNN_DEVICE" in first.err
    attnrt.attention(*tensors())
    assert capsys.readouterr().err == ""
    attnrt.attention(*tensors(), causal=True)
    assert "causal" in capsys.readouterr().err


def test_report_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNRT_REPORT", "each")
    attnrt.attention(*tensors())
    assert "CUDNN_DEVICE" in capsys.readouterr().err
    for _ in range(2):
        attnrt.attention(*tensors())
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("attnrt: torch[flash_cpu] for fp32 bhsd B=1")
    monkeypatch.delenv("ATTNRT_REPORT")
    attnrt.attention(*tensors())
    assert capsys.readouterr().err == ""


def test_unfused_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    attnrt.attention(*tensors(), backend="reference")
    needed = attnrt.last_decision().winner.bytes
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", str(needed - 1))
    with pytest.raises(BackendUnavailable, match="UNFUSED_MEMORY") as caught:
        attnrt.attention(*tensors(), backend="reference")
    (reason,) = caught.value.report.verdicts["reference"].reasons
    assert reason.rule == "UNFUSED_MEMORY" and f"({needed} bytes)" in reason.message
    attnrt.attention(*tensors())
    assert attnrt.last_decision().backend == "torch", "what is fused does not mind"
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", str(needed))
    attnrt.attention(*tensors(), backend="reference")
    assert attnrt.last_decision().backend == "reference"


class WrongOutput(Spare):
    def prepare(self, request: Any, environment: Any) -> Any:
        right = super().prepare(request, environment)
        return lambda *tensors: right(*tensors) * 1.001


class WrongGradient(Spare):
    def prepare(self, request: Any, environment: Any) -> Any:
        right = super().prepare(request, environment)

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Any) -> Any:
            return right(q, k + (k - k.detach()) * 0.01, v, operands)

        return run


@pytest.mark.parametrize(
    ("backend", "grad", "what"),
    [
        (WrongOutput, False, "the output"),
        (WrongGradient, True, "the gradient of k"),
        (WrongGradient, False, None),
        (Spare, True, None),
    ],
)
def test_verify(backend: type[Spare], grad: bool, what: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attnrt.register_backend(backend())
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    if what is None:
        assert attnrt.attention(*tensors(grad), backend="spare").shape == (1, 2, 16, 8)
        return
    with pytest.raises(VerificationFailed, match=f"spare differs from the reference in {what}") as caught:
        attnrt.attention(*tensors(grad), backend="spare")
    assert caught.value.report.backend == "spare"


def test_verify_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever catches the error and calls again must not be given the wrong result."""
    attnrt.register_backend(WrongOutput())
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    for _ in range(2):
        with pytest.raises(VerificationFailed):
            attnrt.attention(*tensors(), backend="spare")


def test_verify_leaves_the_callers_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    q, k, v = tensors(grad=True)
    attnrt.attention(q, k, v).sum().backward()
    wanted = q.grad.clone()
    q.grad = None
    monkeypatch.delenv("ATTNRT_VERIFY")
    attnrt.attention(q, k, v).sum().backward()
    torch.testing.assert_close(q.grad, wanted)
