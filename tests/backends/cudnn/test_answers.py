"""What the library itself says, through `explain` and `attention`: its refusal is a verdict, and the choice goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cudnn_emulation import EmulatedDevice, EmulatedGraph

import attnrt
from attnrt.backends.cudnn import answers, launch
from attnrt.backends.cudnn import device as devices
from attnrt.backends.cudnn.drawing import Unsupported
from attnrt.backends.cudnn.graphs import GraphSpec
from attnrt.backends.cudnn.plans import Plans
from attnrt.environment import Environment
from attnrt.errors import BackendFailed, BackendUnavailable

SAID = "No valid engine configs"


class Device(EmulatedDevice):
    """Refuses what it is told to, in the support check or later, when the plan is built."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: Callable[[GraphSpec], bool] = lambda spec: False
        self.breaks = False

    def draw(self, spec: GraphSpec) -> EmulatedGraph:
        if self.refuses(spec):
            raise Unsupported(SAID)
        return super().draw(spec)

    def build(self, graph: EmulatedGraph) -> None:
        if self.breaks:
            raise Unsupported("the kernel did not compile")


@pytest.fixture
def gpu(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """CPU tensors on what is said to be an H100 with cuDNN; numbers come from the emulation."""
    device, plans = Device(), Plans(lambda: None)
    simulated = replace(Environment.named("h100"), simulated=False)
    monkeypatch.setattr(Environment, "detect", lambda *args, **kwargs: simulated)
    monkeypatch.setattr(devices, "_devices", {0: device})
    monkeypatch.setattr(launch, "PLANS", plans)
    monkeypatch.setattr(answers, "PLANS", plans)
    monkeypatch.setattr(answers, "device", lambda index: device)
    monkeypatch.setattr(answers, "_other_library", lambda gpu: None)
    monkeypatch.setattr(answers, "_refused", type(answers._refused)())
    yield device
    attnrt.refresh()


def qkv(training: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, 32, 16).bfloat16().requires_grad_(training) for _ in range(3)]


def test_what_the_library_refuses_goes_to_the_next(gpu: Device) -> None:
    assert attnrt.explain(*qkv()).backend == "cudnn"
    gpu.refuses = lambda spec: spec.right == 0
    report = attnrt.explain(*qkv(), causal=True)
    assert report.backend != "cudnn"
    (reason,) = report.verdicts["cudnn"].reasons
    assert reason.rule == "CUDNN_SUPPORT" and reason.message == f"cuDNN 9.19.0 refuses the forward: {SAID}"
    assert SAID in str(report)


def test_a_forced_backend_that_refuses_is_an_error_with_its_words(gpu: Device) -> None:
    gpu.refuses = lambda spec: spec.backward
    out = attnrt.attention(*qkv(), causal=True, backend="cudnn")
    assert torch.isfinite(out).all()
    with pytest.raises(BackendUnavailable, match=r"No valid\s+engine\s+configs"):
        attnrt.attention(*qkv(training=True), causal=True, backend="cudnn")


def test_a_plan_that_cannot_be_built_is_a_demotion(gpu: Device) -> None:
    gpu.breaks = True
    with pytest.raises(BackendFailed, match="the kernel did not compile"):
        attnrt.attention(*qkv(), causal=True, backend="cudnn")


def test_the_answer_is_asked_for_once(gpu: Device) -> None:
    for _ in range(3):
        attnrt.explain(*qkv(training=True), causal=True)
    assert len(gpu.drawn) == 2  # forward and backward


def test_a_simulated_machine_is_not_asked(gpu: Device) -> None:
    attnrt.explain_shape(environment="h100", batch=2, heads_q=4, seqlen_q=32, head_dim=16)
    assert not gpu.drawn
