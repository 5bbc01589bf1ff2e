"""The clock, tune, doctor and first calls in processes of their own, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from figures import Fails, SlightlyWrong

import attnrt
from attnrt import runtime
from attnrt.cli.report import COMMON
from attnrt.environment import Environment
from attnrt.evidence import doctor, store
from attnrt.evidence.calls import Call, tensors
from attnrt.evidence.measuring import measure
from attnrt.evidence.timing import clock_for, interleaved
from attnrt.evidence.trials import try_calls
from attnrt.evidence.tuning import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("cache"),
]
BASE = Call(batch=2, heads_q=8, heads_kv=2, head_dim=64, seqlen_q=256, causal=True)


def test_the_clock() -> None:
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    failed: dict[str, str] = {}
    calls = {"product": lambda: a @ a, "wrong": lambda: a @ a[:3]}
    found = interleaved(calls, clock_for("cuda"), 0.05, failed)
    assert found.keys() == {"product"} and "RuntimeError" in failed["wrong"]
    assert found["product"].low > 0 and (found["product"].host or 0) > 0 and found["product"].samples >= 3


@pytest.mark.parametrize("training", [False, True])
def test_every_kernel_is_timed_and_right(training: bool) -> None:
    environment = Environment.detect("cuda")
    given = tensors(BASE.changed(training=training), "cuda")
    found = measure(given, environment, runtime.settings(None, "default"), seconds=0.02, memory=True)
    assert not found.wrong and not found.failed
    assert {"torch.flash", "torch.math", "reference"} <= found.timings.keys() == found.candidates.keys()
    assert all(len(t) == 1 + training for t in found.timings.values())
    assert all(found.seconds()[n] >= found.device_seconds()[n] > 0 for n in found.timings)
    assert all(peak > 0 for peaks in found.bytes.values() for peak in peaks.values())


def test_first_calls_elsewhere() -> None:
    environment = Environment.detect("cuda")
    found = try_calls([BASE], environment, runtime.settings(None, "default"), seconds=120, processes=2)
    assert found.count("died", "hung", "failed") == 0, found.trials
    assert found.count("ran") >= 1, found.trials


def test_tune_and_what_it_refuses(cache: Path) -> None:
    environment = Environment.detect("cuda")
    attnrt.register_backend(SlightlyWrong())
    file = store.file_for(cache, environment)
    exact = BASE.changed(dtype="fp32")  # the planted 0.1 % is less than bf16 rounds by
    done = tune([exact, exact.changed(seqlen_q=512)], file, environment, runtime.settings(None, "default"), budget=120)
    assert len(done.measured) == 2 and done.lost is None
    assert all("planted" in found.wrong for _, found in done.measured)
    attnrt.refresh()
    q, k, v = (torch.randn(2, h, 384, 64, device="cuda") for h in (8, 2, 2))
    attnrt.attention(q, k, v, causal=True)
    decision = attnrt.last_decision()
    assert decision is not None and decision.policy == "tuned" and "measured at" in decision.evidence


def test_one_that_fails_costs_no_other() -> None:
    attnrt.register_backend(Fails())
    found = measure(tensors(BASE, "cuda"), Environment.detect("cuda"), runtime.settings(None, "default"), seconds=0.01)
    assert "planted" in found.failed and "torch.flash" in found.timings


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment.detect("cuda")
    every = doctor.cases(environment)
    some = {name: every[name] for name in ("causal, training", "decode")}
    monkeypatch.setattr(doctor, "cases", lambda environment: some)
    found = doctor.examine(environment, COMMON)
    assert not [v for v in found.verdicts if v.wrong or v.failed], found.verdicts
    assert {v.kernel for v in found.verdicts if v.right} >= {"torch.flash", "torch.math", "reference"}


def test_measured_at_first_sight() -> None:
    q, k, v = (torch.randn(1, 8, 320, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = attnrt.attention(q, k, v, causal=True, policy="measure")
    decision = attnrt.last_decision()
    assert decision is not None and decision.evidence.startswith("measured on this call's own tensors: ")
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert float((out.double() - want).abs().max()) < 0.02
