"""Backends of the user's own: what registering one changes, and that gradients are never lost to a cached plan."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt

ROOT = Path(__file__).resolve().parent.parent


class Constant(attnrt.Backend):
    """Returns its own number, so that a test sees which object ran."""

    name, title, prefix = "constant", "the constant backend", "CONSTANT"
    supports = frozenset({"gqa"})

    def __init__(self, number: float) -> None:
        self.number = number

    def prepare(self, request: Any, environment: Any) -> Any:
        return lambda q, k, v, operands: torch.full_like(q, self.number)


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    with contextlib.suppress(attnrt.UnknownNameError):
        attnrt.unregister_backend("constant")
    attnrt.refresh()


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8)


def test_registering_again_replaces_what_was_remembered() -> None:
    attnrt.register_backend(Constant(1.0))
    assert attnrt.attention(*qkv(), backend="constant").unique().tolist() == [1.0]
    attnrt.register_backend(Constant(2.0))
    assert attnrt.attention(*qkv(), backend="constant").unique().tolist() == [2.0]
    attnrt.unregister_backend("constant")
    with pytest.raises(attnrt.UnknownNameError, match="constant"):
        attnrt.attention(*qkv(), backend="constant")


def test_a_context_with_a_name_that_went_away_says_so() -> None:
    attnrt.register_backend(Constant(1.0))
    with attnrt.use_backend("constant"):
        assert attnrt.attention(*qkv()).unique().tolist() == [1.0]
        attnrt.unregister_backend("constant")
        with pytest.raises(attnrt.AttnrtError, match="constant"):
            attnrt.attention(*qkv())


def test_what_it_does_not_declare_is_refused_by_a_rule() -> None:
    attnrt.register_backend(Constant(1.0))
    report = attnrt.explain(*qkv(), softcap=30.0, sinks=torch.zeros(2))
    assert {"CONSTANT_SOFTCAP", "CONSTANT_SINKS"} <= {r.rule for r in report.verdicts["constant"].reasons}


@pytest.mark.parametrize("learned", ["bias", "sinks"])
def test_a_plan_made_without_gradients_does_not_serve_with_them(learned: str) -> None:
    q, k, v = qkv()
    parameter = torch.zeros((4, 4) if learned == "bias" else (2,), requires_grad=True)
    with torch.no_grad():
        attnrt.attention(q, k, v, **{learned: parameter})
    out = attnrt.attention(q * torch.arange(8.0), k, v * torch.arange(4.0)[:, None], **{learned: parameter})
    assert out.requires_grad
    (gradient,) = torch.autograd.grad(out.sum(), parameter)
    assert gradient.abs().sum() > 0


PLUGIN = """
import attnrt

class Constant(attnrt.Backend):
    name, title, prefix = "constant", "the constant backend", "CONSTANT"
"""


@pytest.mark.parametrize("group", ["attnrt.backends", "attnrt.backends.more", "other"])
def test_a_package_that_declares_a_backend(tmp_path: Path, group: str) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[console_scripts]\nx = plugin:x\n\n[{group}]\nconstant = plugin:Constant\n"
    )
    code = "from attnrt import registry; print('constant' in registry.names())"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout == f"{group == 'attnrt.backends'}\n", done.stderr
