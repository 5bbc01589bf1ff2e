"""tools/venv.py: gigabytes of CUDA libraries never come down by accident."""

from __future__ import annotations

import json
import platform
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "venv.py"
PLAIN = ["filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", 'optree>=0.13.0; extra == "optree"']
HERE = f'platform_system == "{platform.system()}"'
NOT_HERE = 'platform_system == "Plan9"'


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


class Pip:
    """Stands for `pip install --dry-run --report -`: the wheel that pip would take, and what else it would install."""

    def __init__(self, needs: list[str] | None, others: tuple[str, ...] = (), error: str = "") -> None:
        metadata: dict[str, Any] = {"name": "torch", "version": "2.13.0"}
        if needs is not None:
            metadata["requires_dist"] = needs
        installs = [{"metadata": metadata}, *({"metadata": {"name": name, "version": "1"}} for name in others)]
        self.report = json.dumps({"version": "1", "install": installs, "environment": {}})
        self.error, self.commands = error, list[list[str]]()

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        return subprocess.CompletedProcess(command, 0, self.report, "")


def refuse(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pip: Pip) -> None:
    monkeypatch.setattr(subprocess, "run", pip)
    tool["refuse_cuda"](["pip"], "torch==2.13.0", ["--extra-index-url", "https://index"])


@pytest.mark.parametrize(
    "need",
    ["nvidia-cudnn-cu13==9.20.0.48", f"cuda-bindings<14,>=13.0.3; {HERE}", f"cuda-toolkit[cublas]==13.0.3; {HERE}"],
)
def test_a_cuda_build_is_refused(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch, need: str) -> None:
    name = need.partition("=")[0].partition("<")[0].partition("[")[0]
    pip = Pip([*PLAIN, need], others=(name,))
    with pytest.raises(SystemExit) as stop:
        refuse(tool, monkeypatch, pip)
    assert "torch==2.13.0 from here is a CUDA build" in str(stop.value.code)
    assert "TORCH_INDEX=" in str(stop.value.code) and "CUDA=1" in str(stop.value.code)
    (command,) = pip.commands
    assert "--dry-run" in command, "nothing is installed to find out"
    assert command[-2:] == ["--extra-index-url", "https://index"]


@pytest.mark.parametrize("needs", [PLAIN, [], None])
def test_a_cpu_build_passes(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch, needs: list[str] | None) -> None:
    refuse(tool, monkeypatch, Pip(needs))


def test_needs_of_other_platforms_do_not_count(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's macOS wheels list the nvidia packages too, for Linux."""
    others = [f"nvidia-cudnn-cu13==9.20.0.48; {NOT_HERE}", f"cuda-toolkit[cublas]==13.0.3; {NOT_HERE}"]
    refuse(tool, monkeypatch, Pip([*PLAIN, *others]))


def test_what_pip_cannot_find_is_named(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        refuse(tool, monkeypatch, Pip(PLAIN, error="ERROR: No matching distribution found"))
    assert "pip cannot find torch==2.13.0: ERROR: No matching distribution found" in str(stop.value.code)
    assert "TORCH=" in str(stop.value.code)
