"""PyTorch's switch for float32 matmuls on CUDA, as requests and the cache of plans see it. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnrt import attention, execution, last_decision
from attnrt.errors import ArgumentError
from attnrt.execution import device_facts
from attnrt.operands import NO_OPERANDS, bind
from attnrt.request import AttentionRequest

matmul = torch.backends.cuda.matmul
SWITCHES: dict[str, Callable[[bool], None]] = {
    "set_float32_matmul_precision": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    "allow_tf32": lambda on: setattr(matmul, "allow_tf32", on),
    "fp32_precision": lambda on: setattr(matmul, "fp32_precision", "tf32" if on else "ieee"),
}


@pytest.fixture(autouse=True)
def switch_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name in ((torch.cuda, "is_current_stream_capturing"), (execution, "_capturing")):
        monkeypatch.setattr(module, name, lambda: False)
    yield
    torch.set_float32_matmul_precision("highest")


def bound(device: str, dtype: torch.dtype = torch.float32) -> AttentionRequest:
    options: dict[str, Any] = dict.fromkeys(
        ("window", "alignment", "softcap", "scale", "max_seqlen_q", "max_seqlen_kv", "deterministic")
    )
    with FakeTensorMode():
        x = torch.empty(1, 2, 8, 16, device=device, dtype=dtype)
        return bind(x, x, x, NO_OPERANDS, layout="bhsd", causal=True, dropout_p=0.0, return_lse=False, **options)


@pytest.mark.parametrize("how", SWITCHES)
def test_requests_know_the_switch(how: str) -> None:
    for on in (True, False, True):
        SWITCHES[how](on)
        assert bound("cuda").tf32 == on == ("tf32" in bound("cuda").describe().split())
        assert not bound("cpu").tf32
        assert not bound("cuda", torch.bfloat16).tf32


@pytest.mark.parametrize("how", SWITCHES)
def test_plans_are_kept_apart(how: str) -> None:
    """A tensor on a GPU that is not here: what the key of its plan is made of."""

    def facts(dtype: torch.dtype) -> Any:
        x: Any = SimpleNamespace(get_device=lambda: 0, data_ptr=lambda: 0, is_cuda=True, dtype=dtype)
        return device_facts(x, x, x)

    seen = []
    for on in (True, False):
        SWITCHES[how](on)
        seen.append((facts(torch.float32), facts(torch.float16)))
    assert seen[0][0] != seen[1][0] and seen[0][1] == seen[1][1]


def test_calls_on_the_cpu_do_not_care() -> None:
    x = torch.randn(1, 2, 8, 16)
    for on in (True, False):
        SWITCHES["allow_tf32"](on)
        attention(x, x, x)
        decision = last_decision()
        assert decision is not None and not decision.request.tf32


def test_shapes_may_ask_for_it() -> None:
    sizes: dict[str, Any] = {"batch": 1, "heads_q": 2, "seqlen_q": 64, "head_dim": 64}
    assert AttentionRequest.from_shape(dtype="fp32", tf32=True, **sizes).tf32
    assert not AttentionRequest.from_shape(dtype="fp32", **sizes).tf32
    with pytest.raises(ArgumentError, match="tf32"):
        AttentionRequest.from_shape(dtype="bf16", tf32=True, **sizes)
