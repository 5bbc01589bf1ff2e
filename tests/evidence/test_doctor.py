"""`attnrt doctor`: what it finds on a machine that is right, and what it says of one that is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from figures import Fails, Planted, SlightlyWrong, WrongGradient, WrongLastHead

import attnrt
from attnrt import registry
from attnrt.cli.report import COMMON
from attnrt.environment import Environment
from attnrt.evidence import checks, doctor

CPU = Environment.detect("cpu")
H100 = replace(Environment.named("h100"), simulated=False)


pytestmark = pytest.mark.usefixtures("cache")


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Two of the cases: the others take as long, and are the accuracy tests' matter."""
    every = doctor.cases(CPU)
    monkeypatch.setattr(doctor, "cases", lambda environment: {n: every[n] for n in names})


def test_every_kernel_here_is_right() -> None:
    found = {v.kernel: v for v in doctor.examine(CPU, COMMON).verdicts}
    for name in ("torch.flash_cpu", "torch.math", "reference"):
        assert found[name].status == "right" and found[name].right >= 7, found[name]
        assert 0 < found[name].nearest < 1
    assert found["reference"].right == len(doctor.cases(CPU))
    assert found["triton.hopper"].status == "not here" and "NVIDIA GPU" in found["triton.hopper"].said()


@pytest.mark.parametrize("kind", [SlightlyWrong, WrongLastHead, WrongGradient, Fails])
def test_a_wrong_backend_is_found(kind: type[Planted], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "causal, training", "packed")
    attnrt.register_backend(kind())
    code, out, _ = command("doctor")
    assert code == 1 and "something is wrong" in out
    (line,) = [line for line in out.splitlines() if line.startswith("planted ")]
    assert ("failed" if kind is Fails else "WRONG") in line
    if kind is WrongGradient:
        assert "the gradient of k" in " ".join(out.split())


def test_the_command(command: Command, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    only(monkeypatch, "decode")
    code, out, err = command("doctor")
    assert (code, err) == (0, "") and "nothing is wrong" in out and torch.__version__ in out and str(cache) in out
    code, out, _ = command("doctor --json")
    found = json.loads(out)
    assert code == 0 and found["healthy"] and found["schema"] == 1
    assert {k["kernel"]: k["status"] for k in found["kernels"]}["reference"] == "right"
    code, out, _ = command("doctor --markdown")
    assert code == 0 and out.startswith("### attnrt doctor") and "| reference | right |" in out
    code, out, _ = command("doctor --no-run --json")
    assert code == 0 and json.loads(out)["kernels"] == []


def test_a_bad_variable(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor is for when things are wrong, so it must not stop at that."""
    monkeypatch.setenv("ATTNRT_REPORT", "loud")
    code, out, _ = command("doctor --no-run")
    assert code == 1 and "ATTNRT_REPORT='loud'" in " ".join(out.split())


def test_a_tuned_policy_that_is_damaged(command: Command, cache: Path) -> None:
    (cache / "tuned").mkdir()
    (cache / "tuned" / "bad.yaml").write_text("tuned: 1\n")
    attnrt.refresh()
    code, out, _ = command("doctor --no-run")
    assert code == 0 and "cut short" in " ".join(out.split()) and "bad.yaml" in out


def test_overrides_are_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_PREFER", "reference")
    assert "prefer reference (by ATTNRT_PREFER)" in command("doctor --no-run").out


def test_a_cache_directory_that_cannot_be_written(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_CACHE_DIR", "/proc/nowhere")
    code, out, _ = command("doctor --no-run")
    assert code == 0 and "cannot be written" in out


# ---- packages


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", None),
        ("raise ImportError('libfoo.so.3: cannot open shared object file')", "libfoo.so.3: cannot open"),
        ("import os; os.abort()", "died of signal 6"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    ],
)
def test_installs_that_are_broken(
    source: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cudnn.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = tuple({**dict(CPU.packages), "nvidia-cudnn-frontend": "1.28.0"}.items())
    (found,) = checks.packages(replace(CPU, packages=packages))
    assert (found.subject, found.status) == ("nvidia-cudnn-frontend", "failed" if said else "ok")
    assert said is None or said in found.said


def test_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(version: str | None) -> checks.Check:
        monkeypatch.setattr(checks, "driver_version", lambda: version)
        return next(c for c in checks.device(H100) if c.subject == "driver")

    assert driver("580.65.06").status == "ok"
    assert driver("550.54.15").status == "warning" and "580" in (driver("550.54.15").remedy or "")
    assert driver(None).status == "note"


@pytest.mark.parametrize(
    ("sm", "archs", "covered"),
    [
        (90, ["sm_80", "sm_90"], True),
        (89, ["sm_80", "sm_86"], True),
        (120, ["sm_80", "sm_90"], False),
        (120, ["sm_90", "compute_90"], True),
        (75, ["sm_80"], False),
        (90, ["sm_90a"], True),
    ],
)
def test_archs(sm: int, archs: list[str], covered: bool) -> None:
    assert checks._covered(sm, archs) is covered


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "driver_version", lambda: "580.65.06")
    found = next(iter(checks.device(CPU)))
    assert found.status == "warning" and "torch sees no GPU" in found.said


def test_advisories_are_those_of_this_machine() -> None:
    here = {c.subject: c for c in checks.advisories(H100)}
    assert "CUDNN_BWD_NAN_MASK_SKV_64" in here and "CUDNN_FEW_KV_HEADS_SM100" not in here
    assert here["CUDNN_BWD_NAN_MASK_SKV_64"].status == "note" and "https://" in here["CUDNN_BWD_NAN_MASK_SKV_64"].said
    newer = replace(H100, packages=tuple({**dict(H100.packages), "cudnn": "9.26.0"}.items()))
    assert "CUDNN_BWD_NAN_MASK_SKV_64" not in {c.subject for c in checks.advisories(newer)}
    assert not list(checks.advisories(CPU))


# ---- what to install


def bare(environment: Environment, **installed: str) -> Environment:
    """Nothing but torch and its libcudnn."""
    names = {n.replace("-", "_"): n for n, _ in environment.packages}
    keep = {"torch": environment.version("torch"), "cudnn": environment.version("cudnn")}
    packages = {n: keep.get(n) for n, _ in environment.packages} | {names[n]: v for n, v in installed.items()}
    return replace(environment, packages=tuple(packages.items()))


def test_advice() -> None:
    found = {a.package: a for a in doctor.advise(bare(H100), COMMON)}
    assert "nvidia-cudnn-frontend" in found and "pip install" in found["nvidia-cudnn-frontend"].how
    assert set(found["nvidia-cudnn-frontend"].calls) <= set(COMMON)
    ampere = {a.package: a for a in doctor.advise(bare(replace(Environment.named("a100"), simulated=False)), COMMON)}
    assert "flash-attn" in ampere and ampere["flash-attn"].kernel == "flash_attn_2"
    assert doctor.advise(H100, COMMON) == [] or all(
        H100.version(a.package) is None for a in doctor.advise(H100, COMMON)
    )
    assert doctor.advise(CPU, COMMON) == []


def test_estimates_come_from_one_setting_each() -> None:
    said = doctor.estimate("sm90", "cudnn", "torch.flash")
    assert said.startswith("2.13x as fast as torch.flash forward (") and "regret" in said
    assert "no published comparison" in doctor.estimate("sm90", "cudnn", "torch.efficient")
    assert doctor.estimate("sm90", "cudnn", None) == "nothing serves them now"
    known: set[Any] = set(registry.names()) | set(registry.kernel_names())
    for setting in doctor.speeds():
        assert set(setting["forward"]) <= known and setting["source"] and setting["name"]
