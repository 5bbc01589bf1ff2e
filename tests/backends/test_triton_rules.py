"""The rules of our Triton kernel: each one broken alone, and everything else taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrt.backends.base import reasons
from attnrt.backends.triton import TritonBackend
from attnrt.backends.triton.rules import fused_backward
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

BACKEND = TritonBackend()


def request(**options: Any) -> AttentionRequest:
    """A request; names with an underscore in front are set on it afterwards."""
    later = {name[1:]: options.pop(name) for name in list(options) if name.startswith("_")}
    sizes = {"batch": 2, "heads_q": 16, "seqlen_q": 1024, "head_dim": 128}
    return replace(AttentionRequest.from_shape(**(sizes | options)), **later)


def environment(arch: str = "sm90", version: str | None = "3.6.0") -> Environment:
    return Environment.simulate(arch, packages={"triton": version})


def broken(r: AttentionRequest, e: Environment) -> list[str]:
    return [reason.rule for reason in reasons(BACKEND.all_rules, r, e)]


# rule, request and environment that break it and nothing else, what to change to be just inside
ONE_BY_ONE: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("TRITON_ARCH", {}, {"arch": "sm75"}, {"arch": "sm80"}),
    ("TRITON_INSTALLED", {}, {"version": None}, {"version": "3.6.0"}),
    ("TRITON_VERSION", {}, {"version": "3.5.1"}, {"version": "3.9.0"}),
    ("TRITON_DTYPE", {"dtype": "fp64"}, {}, {"dtype": "fp32"}),
    ("TRITON_DTYPE", {"dtype": "fp8_e4m3"}, {}, {"dtype": "fp16"}),
    ("TRITON_HEAD_DIM", {"head_dim": 100}, {}, {"head_dim": 104}),
    ("TRITON_HEAD_DIM", {"head_dim": 264}, {}, {"head_dim": 256}),
    ("TRITON_HEAD_DIM", {"head_dim": 8}, {}, {"head_dim": 16}),
    ("TRITON_HEAD_DIM", {"head_dim_v": 512}, {}, {"head_dim_v": 64}),
    ("TRITON_STRIDED_LAST_DIM", {"_strides": "last_dim"}, {}, {"_strides": "strided"}),
    ("TRITON_EMPTY", {"seqlen_q": 0}, {}, {"seqlen_q": 1}),
    ("TRITON_PAGED", {"padded": "kv", "page_size": 64}, {}, {"page_size": None}),
]


@pytest.mark.parametrize(("rule", "asked", "there", "inside"), ONE_BY_ONE)
def test_breaks_one_rule_and_its_neighbour_none(
    rule: str, asked: dict[str, Any], there: dict[str, Any], inside: dict[str, Any]
) -> None:
    assert broken(request(**asked), environment(**there)) == [rule]
    machine = {"arch", "version"}
    asked = asked | {k: v for k, v in inside.items() if k not in machine}
    there = there | {k: v for k, v in inside.items() if k in machine}
    assert broken(request(**asked), environment(**there)) == []


def test_every_rule_is_tried() -> None:
    tried = {rule for rule, *_ in ONE_BY_ONE} | {"TRITON_DEVICE"}
    ids = [rule.id for rule in BACKEND.all_rules]
    assert len(set(ids)) == len(ids)
    assert set(ids) == tried


def test_without_a_gpu_only_what_is_missing_is_said() -> None:
    assert broken(request(training=True), Environment.named("cpu")) == ["TRITON_DEVICE", "TRITON_INSTALLED"]
    amd = replace(environment(), name="AMD GPU", capability=None)
    assert broken(request(), amd) == ["TRITON_DEVICE"]


def test_messages_hold_the_actual_value_and_the_limit() -> None:
    (found,) = reasons(BACKEND.all_rules, request(head_dim=264), environment())
    assert found.message == "head_dim 264/264 is not a multiple of 8 from 16 to 256"
    (found,) = reasons(BACKEND.all_rules, request(), environment(version="3.5.1"))
    assert found.message == "triton 3.6 or later is needed; 3.5.1 is installed"


TAKEN: list[dict[str, Any]] = [
    {"heads_kv": 4},
    {"heads_kv": 1},
    {"head_dim": 192, "head_dim_v": 128},
    {"causal": True, "seqlen_kv": 2048, "alignment": "top_left"},
    {"causal": True, "seqlen_kv": 512, "alignment": "bottom_right"},
    {"window": (128, 64)},
    {"mask": True},
    {"bias": (1, 1, 1, 1024)},
    {"alibi": True},
    {"softcap": 30.0},
    {"sinks": True},
    {"dropout_p": 0.1},
    {"padded": True},
    {"packed": True, "heads_kv": 4},
    {"return_lse": True},
    {"deterministic": True},
    {"capturing": True},
    {"_aligned": False},
    {"_strides": "strided"},
    {"seqlen_q": 1, "seqlen_kv": 1},
]


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("asked", TAKEN, ids=str)
def test_takes_every_feature_forwards_and_backwards(asked: dict[str, Any], arch: str) -> None:
    for training in (False, True):
        assert broken(request(**asked, training=training), environment(arch)) == []


def test_takes_all_features_at_once() -> None:
    r = request(
        heads_kv=4,
        seqlen_kv=2048,
        causal=True,
        window=(128, 0),
        alignment="bottom_right",
        mask=True,
        bias=True,
        bias_grad=True,
        alibi=True,
        softcap=30.0,
        sinks=True,
        dropout_p=0.1,
        padded=True,
        training=True,
        deterministic=True,
        return_lse=True,
    )
    assert broken(r, environment()) == []


@pytest.mark.parametrize("machine", ["a100", "rtx4090", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flagship_calls_are_clean(machine: str, training: bool, packed: bool) -> None:
    r = request(batch=4, heads_q=32, heads_kv=8, seqlen_q=8192, causal=True, training=training, packed=packed)
    assert broken(r, Environment.named(machine)) == []


def test_bytes_count_the_bias_gradient() -> None:
    plain, grad = (request(bias=True, bias_grad=g, training=True) for g in (False, True))
    there = environment()
    assert BACKEND.bytes(grad, there) - BACKEND.bytes(plain, there) == plain.scores * 4
    assert BACKEND.notes(plain, there) == ()


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ({"deterministic": True}, {}),
        ({"dtype": "fp32"}, {}),
        ({"head_dim": 256}, {}),
        ({"head_dim": 96}, {}),
        ({"head_dim_v": 64}, {}),
        ({"softcap": 30.0}, {}),
        ({"alibi": True}, {}),
        ({"bias": True}, {}),
        ({"mask": True}, {}),
        ({"dropout_p": 0.1}, {}),
        ({"causal": True, "seqlen_q": 512}, {}),
        ({}, {"arch": "sm80"}),
        ({}, {"arch": "sm100"}),
        ({}, {"version": "3.10.0"}),
    ],
)
def test_the_hopper_backward_is_for_plain_calls_on_hopper(asked: dict[str, Any], there: dict[str, Any]) -> None:
    """And for those whose dq may differ in its last bits."""
    plain, here = {"training": True}, environment()
    for taken in ({}, {"causal": True}, {"window": (100, 0)}, {"sinks": True}, {"packed": True}, {"padded": True}):
        r = request(**plain, **taken)
        assert fused_backward(r, here)
        assert "order" in BACKEND.notes(r, here)[0] and not BACKEND.notes(replace(r, needs_grad=False), here)
    r, there_ = request(**plain, **asked), environment(**there)
    assert not fused_backward(r, there_) and not BACKEND.notes(r, there_)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.tuples(*[st.sampled_from([0, 1, 1000])] * 2),
    dims=st.tuples(*[st.sampled_from([1, 8, 16, 100, 256, 512])] * 2),
    batch=st.sampled_from([0, 1, 4]),
    dtype=st.sampled_from(["fp16", "bf16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2"]),
    flags=st.fixed_dictionaries(
        {n: st.booleans() for n in ("causal", "packed", "training", "mask", "bias", "alibi", "sinks", "deterministic")}
    ),
    arch=st.sampled_from(["cpu", "sm70", "sm80", "sm90", "sm100", "sm121"]),
)
def test_every_rule_answers_and_a_newer_version_never_takes_less(
    lengths: tuple[int, int],
    dims: tuple[int, int],
    batch: int,
    dtype: str,
    flags: dict[str, bool],
    arch: str,
) -> None:
    r = request(
        batch=batch,
        seqlen_q=lengths[0],
        seqlen_kv=lengths[1],
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=dtype,
        alignment="bottom_right",
        **flags,
    )
    found = [set(broken(r, environment(arch, version))) for version in ("2.3.1", "3.5.1", "3.6.0", "3.9.0", "4.0")]
    for older, newer in pairwise(found):
        assert newer <= older
    assert "TRITON_INSTALLED" in broken(r, environment(arch, None))
    assert BACKEND.bytes(r, environment(arch)) >= 0
