"""First calls in processes of their own: what they leave on disk, and what becomes of those that raise, die or hang."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import attnrt
from attnrt import runtime
from attnrt.environment import Environment
from attnrt.evidence import doctor, store, trials
from attnrt.evidence.calls import Call
from attnrt.evidence.trials import Trials, planned, try_calls
from attnrt.evidence.tuning import tune

CPU = Environment.detect("cpu")
BASE = Call(heads_q=2, head_dim=16, seqlen_q=16, dtype="fp32", layout="bhsd")
RAISES, DIES, HANGS = 24, 32, 40
PLUGIN = f"""
import os, time
from pathlib import Path

import torch.nn.functional as F
import attnrt


class Compiles(attnrt.Backend):
    name, title, prefix = "compiling", "a kernel that compiles", "COMPILING"
    supports = frozenset({{"backward", "causal"}})
    rules = ()
    compiles = True

    def disk_cache(self):
        return Path(os.environ["COMPILED"])

    def prepare(self, request, environment):
        if request.head_dim_qk == {RAISES}:
            raise RuntimeError("no such instruction\\nsee the log")
        if request.head_dim_qk == {DIES}:
            os.abort()
        if request.head_dim_qk == {HANGS}:
            time.sleep(1000)
        print("libraries print to stdout")
        kept = self.disk_cache() / f"{{request.head_dim_qk}}-{{request.needs_grad}}"
        if not kept.exists():
            time.sleep(0.2)
            kept.write_text(str(os.getpid()))
        given = {{"scale": request.scale, "is_causal": request.is_causal}}
        return lambda q, k, v, operands: F.scaled_dot_product_attention(q, k, v, **given)
"""


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A backend that compiles, installed as a package would be, and the folder in which it keeps what it compiled."""
    (cache / "plugin").mkdir()
    (cache / "plugin" / "a_compiling_backend.py").write_text(PLUGIN)
    info = cache / "plugin" / "a_compiling_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-compiling-backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[attnrt.backends]\ncompiling = a_compiling_backend:Compiles\n")
    folder = cache / "compiled"
    folder.mkdir()
    monkeypatch.setenv("COMPILED", str(folder))
    monkeypatch.syspath_prepend(str(cache / "plugin"))
    monkeypatch.setattr(trials, "WORTH_SECONDS", 0.0)
    attnrt.register_backend(importlib.import_module("a_compiling_backend").Compiles())
    sys.modules.pop("a_compiling_backend")
    return folder


def settings() -> Any:
    return runtime.settings(None, "default")


def test_compiled_elsewhere_and_kept(compiled: Path) -> None:
    calls = [BASE, BASE.changed(training=True), BASE.changed(head_dim=64)]
    seen = []
    found = try_calls(calls, CPU, settings(), seconds=60, processes=2, progress=lambda n, of: seen.append((n, of)))
    assert [t.outcome for t in found.trials] == ["ran"] * 3 and found.processes == 2, found
    assert {f.name for f in compiled.iterdir()} == {"16-False", "16-True", "64-False"}
    assert str(os.getpid()) not in {f.read_text() for f in compiled.iterdir()}
    assert all(found.against(call) == {} for call in calls) and seen[-1][1] == 3
    assert str(found).startswith("3 first calls in ")


def test_one_that_raises_dies_or_hangs_costs_no_other(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "CALL_SECONDS", 2.0)
    calls = [BASE.changed(head_dim=d) for d in (RAISES, DIES, HANGS, 16)]
    found = try_calls(calls, CPU, settings(), seconds=60, processes=1)
    assert [t.outcome for t in found.trials] == ["failed", "died", "hung", "ran"], found.trials
    raised, died, hung, ran = (found.against(call) for call in calls)
    assert raised == {"compiling": "RuntimeError: no such instruction"} and ran == {}
    assert "SIGABRT" in died["compiling"] and "not done after 2 s" in hung["compiling"]
    assert found.against(calls[1].changed(seqlen_q=64)) == died  # of its kind no other length is run here either


def test_the_time_is_kept(compiled: Path) -> None:
    calls = [BASE.changed(head_dim=HANGS), BASE]
    found = try_calls(calls, CPU, settings(), seconds=8, processes=1)
    assert [t.outcome for t in found.trials] == ["left", "left"] and found.seconds < 30
    assert found.against(calls[0]) == {}  # it may have been on its way


def test_nothing_is_started_where_nothing_compiles(cache: Path) -> None:
    assert planned([BASE], CPU, settings()) == [] and try_calls([BASE], CPU, settings(), seconds=60) == Trials()


def test_no_time_tries_nothing(compiled: Path) -> None:
    (found,) = try_calls([BASE], CPU, settings(), seconds=0).trials or [None]
    assert found is not None and found.outcome == "left" and not list(compiled.iterdir())


def test_tune_leaves_out_what_died(compiled: Path) -> None:
    """The kernel would take this process along."""
    calls = [BASE.changed(head_dim=DIES), BASE]
    done = tune(calls, store.file_for(runtime.variables().cache_dir, CPU), CPU, settings(), budget=120, seconds=0.005)
    measured = {call.head_dim: found for call, found in done.measured}
    assert "SIGABRT" in measured[DIES].failed["compiling"] and "torch.flash_cpu" in measured[DIES].timings
    assert "compiling" in measured[16].timings and done.trials.count("ran") == 1


def test_doctor_says_what_died(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cases", lambda environment: {"causal": BASE.changed(head_dim=DIES, causal=True)})
    found = {v.kernel: v for v in doctor.examine(CPU, {}).verdicts}
    assert found["compiling"].status == "failed" and "SIGABRT" in found["compiling"].failed["causal"]
    assert found["reference"].status == "right"


def test_one_that_died_is_not_trusted_where_it_was_not_tried(compiled: Path) -> None:
    dying = BASE.changed(head_dim=DIES)
    calls = [BASE, *(dying.changed(seqlen_q=n) for n in (16, 32, 48)), BASE.changed(head_dim=RAISES)]
    found = try_calls(calls, CPU, settings(), seconds=60, processes=1)
    assert [t.outcome for t in found.trials] == ["ran", "died", "died", "died", "left"]
    assert found.against(BASE.changed(seqlen_q=99)) == {}  # of the kind that ran
    assert "SIGABRT" in found.against(BASE.changed(head_dim=64))["compiling"]
