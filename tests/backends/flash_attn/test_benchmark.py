"""benchmarks/flash_attention.py compares like with like: both of its ways hand the package the same call."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from installing import VERSION, Install, module
from standin import SIGNATURES

import attnrt
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4
from attnrt.environment import Environment

GENERATIONS: dict[int, FlashAttention] = {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}
PATH = Path(__file__).parents[3] / "benchmarks" / "flash_attention.py"


FUNCTION = """
import torch

calls = []


class Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.zeros_like(q)

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.zeros_like, ctx.saved_tensors))
"""


def written(number: int) -> str:
    """A package whose functions note what they are called with, and give zeros."""
    *_, known = SIGNATURES[GENERATIONS[number].package].values()
    lines = [FUNCTION]
    for name, text in known.items():
        arguments = ", ".join(a + ("None" if a.endswith("=") else "") for a in text.split())
        lines += [
            f"def {name}({arguments}):",
            "    given = dict(locals())",
            f"    calls.append(({name!r}, given))",
            "    out = Zeros.apply(q, *(given.get(n + '_cache', given.get(n)) for n in 'kv'))",
            f"    return (out, None) if {number == 4} else out",
        ]
    return "\n".join(lines)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("flash_attention_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)  # dataclasses look for it there
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(loaded, "DEVICE", "cpu")
    yield loaded
    attnrt.refresh()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", GENERATIONS)
def test_both_ways_are_one_call(
    number: int, training: bool, install: Install, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, package = GENERATIONS[number], GENERATIONS[number].package
    install(number, VERSION[number], {module(number): written(number)})
    there = replace(Environment.simulate("sm90", packages={package: VERSION[number]}), simulated=False)
    monkeypatch.setattr(Environment, "detect", staticmethod(lambda device=None: there))
    adapter = kernel.adapter()
    monkeypatch.setattr(adapter, "extra", lambda r, e, real=adapter.extra: real(r, replace(e, device_type="cpu")))
    attnrt.refresh()
    for shape in (*script.SHAPES, *script.SMALL):
        if shape.cache and training:
            continue
        lengths = {name: min(16, getattr(shape, name)) for name in ("seqlen_q", "seqlen_kv")}
        small = replace(shape, batch=min(2, shape.batch), heads_q=8, heads_kv=8 // shape.group, **lengths)
        made = script.ways(kernel, small, training)
        assert made is not None, shape.name
        calls = sys.modules[module(number).removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")].calls
        direct, ours, inputs = made
        both = (direct, ours) if not training else tuple(script.backward_of(f, inputs) for f in (direct, ours))
        script.check([call() for call in both])
        (name, given), (our_name, our_given) = calls[-2:]
        assert name == our_name and _same(given, our_given), shape.name


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(x, b[n]) for n, x in a.items())


def _equal(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
