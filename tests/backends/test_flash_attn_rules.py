"""The rules of the three flash-attn generations: each one broken alone, and its neighbour clean."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrt.backends.base import Backend, reasons
from attnrt.backends.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4, fa4_sm90
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

FA2, FA3, FA4 = FlashAttention2(), FlashAttention3(), FlashAttention4()
PACKAGE = {"FA2": "flash-attn", "FA3": "flash-attn-3", "FA4": "flash-attn-4"}
BACKENDS: dict[str, Backend] = {"FA2": FA2, "FA3": FA3, "FA4": FA4}


def request(**options: Any) -> AttentionRequest:
    """A request; names with an underscore in front are set on it afterwards."""
    later = {name[1:]: options.pop(name) for name in list(options) if name.startswith("_")}
    sizes = {"batch": 2, "heads_q": 16, "seqlen_q": 1024, "head_dim": 128}
    return replace(AttentionRequest.from_shape(**(sizes | options)), **later)


def environment(backend: Backend, arch: str = "sm90", version: str | None = "") -> Environment:
    """One machine; `version` of the backend's package, "" for the usual one."""
    usual = {"FA2": "2.8.3", "FA3": "3.0.0", "FA4": "4.0.0b36"}[backend.prefix]
    return Environment.simulate(arch, packages={PACKAGE[backend.prefix]: usual if version == "" else version})


def broken(backend: Backend, r: AttentionRequest, e: Environment) -> list[str]:
    return [reason.rule for reason in reasons(backend.all_rules, r, e)]


TRAIN = {"training": True}
DET = {"training": True, "deterministic": True}
TOP_LEFT = {"window": (128, 64), "seqlen_kv": 2048, "alignment": "top_left"}
KV_PADDED = {"_padded_kv": True}
LATER = {"FA2": ("3.0.0", "2.9.0"), "FA3": ("4.0.0", "3.9.0"), "FA4": ("5.0.0b1", "4.9.0")}
"""The next generation's first version, and the last of this one's."""

# rule, request and environment that break it and nothing else, what to change to be just inside
Row = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]


def shared(prefix: str) -> list[Row]:
    return [
        (f"{prefix}_INSTALLED", {}, {"version": None}, {"version": ""}),
        (f"{prefix}_TOO_NEW", {}, {"version": LATER[prefix][0]}, {"version": LATER[prefix][1]}),
        (f"{prefix}_DTYPE", {"dtype": "fp32"}, {}, {"dtype": "fp16"}),
        (f"{prefix}_DTYPE", {"dtype": "fp8_e4m3"}, {}, {"dtype": "bf16"}),
        (f"{prefix}_HEAD_DIM_MULTIPLE", {"head_dim": 100}, {}, {"head_dim": 104}),
        (f"{prefix}_STRIDED_LAST_DIM", {"_strides": "last_dim"}, {}, {"_strides": "strided"}),
        (f"{prefix}_UNALIGNED", {"_aligned": False}, {}, {"_aligned": True}),
        (f"{prefix}_SCALE", {"scale": -0.125}, {}, {"scale": 0.125}),
        (f"{prefix}_TOP_LEFT", TOP_LEFT, {}, {"alignment": "bottom_right"}),
        (f"{prefix}_TOP_LEFT", TOP_LEFT, {}, {"window": (128, 0)}),
        (
            f"{prefix}_TOP_LEFT",
            {"causal": True, "seqlen_q": 2048, "seqlen_kv": 1024, "alignment": "top_left"},
            {},
            {"seqlen_kv": 4096},
        ),
        (f"{prefix}_PADDING_Q", {"_padded_q": True}, {}, KV_PADDED),
        (f"{prefix}_PADDING_BWD", {**KV_PADDED, **TRAIN}, {}, {"training": False}),
        (f"{prefix}_MASK", {"mask": True}, {}, {"mask": False}),
        (f"{prefix}_BIAS", {"bias": True}, {}, {"bias": False}),
        (f"{prefix}_EMPTY", {"seqlen_kv": 0}, {}, {"seqlen_kv": 1}),
    ]


ROWS: dict[str, list[Row]] = {
    "FA2": [
        *shared("FA2"),
        ("FA2_ARCH", {}, {"arch": "sm75"}, {"arch": "sm80"}),
        ("FA2_VERSION", {}, {"version": "2.1.0"}, {"version": "2.1.1"}),
        ("FA2_SM100_VERSION", {}, {"arch": "sm100", "version": "2.7.2"}, {"version": "2.7.3"}),
        ("FA2_SM100_VERSION", {}, {"arch": "sm120", "version": "2.7.2"}, {"arch": "sm90"}),
        ("FA2_HEAD_DIM", {"head_dim": 264}, {}, {"head_dim": 256}),
        ("FA2_UNEQUAL_HEAD_DIMS", {"head_dim": 192, "head_dim_v": 128}, {}, {"head_dim_v": 192}),
        (
            "FA2_HEAD_DIM_BWD_VERSION",
            {"head_dim": 256, **TRAIN},
            {"arch": "sm89", "version": "2.5.4"},
            {"version": "2.5.5"},
        ),
        (
            "FA2_HEAD_DIM_BWD_224_VERSION",
            {"head_dim": 200, **TRAIN},
            {"arch": "sm86", "version": "2.6.1"},
            {"head_dim": 192},
        ),
        ("FA2_HEAD_DIM_BWD_DROPOUT", {"head_dim": 256, "dropout_p": 0.1, **TRAIN}, {"arch": "sm89"}, {"arch": "sm80"}),
        (
            "FA2_HEAD_DIM_BWD_DROPOUT",
            {"head_dim": 256, "dropout_p": 0.1, **TRAIN},
            {"arch": "sm120"},
            {"arch": "sm100"},
        ),
        ("FA2_WINDOW_VERSION", {"window": (128, 0)}, {"version": "2.2.5"}, {"version": "2.3.0"}),
        ("FA2_PACKED_SINGLE", {"packed": True, "heads_kv": 4, "seqlen_q": 1}, {}, {"seqlen_q": 2}),
        (
            "FA2_OPEN_WINDOW",
            {"seqlen_kv": 512, "window": (64, None), "alignment": "bottom_right"},
            {},
            {"window": (64, 100)},
        ),
        ("FA2_ALIBI_VERSION", {"alibi": True}, {"version": "2.3.6"}, {"version": "2.4.0"}),
        ("FA2_DETERMINISTIC_VERSION", DET, {"version": "2.4.0"}, {"version": "2.4.1"}),
        ("FA2_SOFTCAP_VERSION", {"softcap": 30.0}, {"version": "2.5.9"}, {"version": "2.6.0"}),
        ("FA2_SOFTCAP_DROPOUT", {"softcap": 30.0, "dropout_p": 0.1}, {}, {"dropout_p": 0.0}),
        ("FA2_PACKED_LSE_VERSION", {"packed": True, "return_lse": True}, {"version": "2.5.9"}, {"version": "2.6.0"}),
        ("FA2_DROPOUT_LSE", {"dropout_p": 0.1, "return_lse": True}, {}, {"return_lse": False}),
        ("FA2_DROPOUT_LSE", {"dropout_p": 0.1, "sinks": True}, {}, {"sinks": False}),
        (
            "FA2_ALIBI_PACKED_LSE",
            {"packed": True, "alibi": True, "causal": True, "return_lse": True},
            {},
            {"causal": False},
        ),
        ("FA2_PAGED_VERSION", {"page_size": 256}, {"version": "2.4.3"}, {"version": "2.5.0"}),
        ("FA2_PAGE_SIZE", {"page_size": 128}, {}, {"page_size": 512}),
        ("FA2_PADDING_VERSION", KV_PADDED, {"version": "2.1.1"}, {"version": "2.2.0"}),
        ("FA2_PADDING_LSE_VERSION", {**KV_PADDED, "return_lse": True}, {"version": "2.5.9"}, {"return_lse": False}),
        ("FA2_PADDING_DROPOUT", {**KV_PADDED, "dropout_p": 0.1}, {}, {"dropout_p": 0.0}),
    ],
    "FA3": [
        *shared("FA3"),
        ("FA3_VERSION", {}, {"version": "2.8.3"}, {"version": "3.0.0b1"}),
        ("FA3_ALIBI", {"alibi": True}, {}, {"alibi": False}),
        ("FA3_DROPOUT", {"dropout_p": 0.1}, {}, {"dropout_p": 0.0}),
        ("FA3_ARCH", {}, {"arch": "sm89"}, {"arch": "sm90"}),
        ("FA3_ARCH", {}, {"arch": "sm100"}, {"arch": "sm90"}),
        ("FA3_HEAD_DIM", {"head_dim": 264}, {}, {"head_dim": 256}),
        ("FA3_UNEQUAL_HEAD_DIMS", {"head_dim": 192, "head_dim_v": 96}, {}, {"head_dim_v": 104}),
        ("FA3_UNEQUAL_HEAD_DIMS", {"head_dim": 72, "head_dim_v": 256}, {}, {"head_dim": 64}),
        ("FA3_HEAD_DIM_V_BWD", {"head_dim": 64, "head_dim_v": 512, **TRAIN}, {}, {"training": False}),
        (
            "FA3_PAGED_TILE",
            {"page_size": 64, "window": (99, 0), "head_dim": 256, "alignment": "bottom_right"},
            {},
            {"page_size": 16},
        ),
        ("FA3_PAGED_TILE", {"seqlen_q": 192, "seqlen_kv": 352, **KV_PADDED}, {}, {"seqlen_q": 128}),
        ("FA3_DETERMINISTIC_HEAD_DIM", {"head_dim": 200, **DET}, {}, {"head_dim": 192}),
    ],
    "FA4": [
        *shared("FA4"),
        ("FA4_ALIBI", {"alibi": True}, {}, {"alibi": False}),
        ("FA4_DROPOUT", {"dropout_p": 0.1}, {}, {"dropout_p": 0.0}),
        ("FA4_ARCH", {}, {"arch": "sm75"}, {"arch": "sm80"}),
        ("FA4_ARCH", {}, {"arch": "sm130"}, {"arch": "sm121"}),
        ("FA4_ARCH_BWD", TRAIN, {"arch": "sm89"}, {"training": False}),
        ("FA4_VERSION", {}, {"version": "4.0.0b35"}, {"version": "4.0.0"}),
        ("FA4_HEAD_DIM_SM90", {"head_dim": 264}, {}, {"head_dim": 256}),
        ("FA4_HEAD_DIM_SM100", {"head_dim": 192}, {"arch": "sm100"}, {"head_dim_v": 128}),
        ("FA4_HEAD_DIM_SM100", {"head_dim": 136}, {"arch": "sm103"}, {"head_dim": 128}),
        ("FA4_HEAD_DIM_SM80", {"head_dim": 136}, {"arch": "sm120"}, {"head_dim": 128}),
        ("FA4_HEAD_DIM_SM80", {"head_dim": 136}, {"arch": "sm80"}, {"head_dim": 128}),
        ("FA4_HEAD_DIM_V_SM90", {"head_dim": 64, "head_dim_v": 256}, {}, {"head_dim": 128}),
        ("FA4_HEAD_DIM_V_SM90_BWD", {"head_dim_v": 96, **TRAIN}, {}, {"head_dim_v": 64}),
        ("FA4_HEAD_DIM_V_SM90_BWD", {"head_dim": 64, "head_dim_v": 96, **TRAIN}, {}, {"head_dim": 96}),
        ("FA4_HEAD_DIM_V_SM90_BWD", {"head_dim": 96, "head_dim_v": 72, **TRAIN}, {}, {"head_dim_v": 64}),
        ("FA4_HEAD_DIM_V_SM90_BWD", {"head_dim": 256, "head_dim_v": 160, **TRAIN}, {}, {"head_dim": 192}),
        ("FA4_HEAD_DIM_V_SM90_BWD", {"head_dim": 256, "head_dim_v": 64, **TRAIN}, {}, {"head_dim_v": 72}),
        ("FA4_HEAD_DIM_SHARED_SM90", {"head_dim": 96, "head_dim_v": 160}, {}, {"causal": True}),
        ("FA4_HEAD_DIM_SHARED_SM90", {"head_dim": 192, "head_dim_v": 256}, {}, {"head_dim": 160}),
        ("FA4_HEAD_DIM_SHARED_SM90", {"head_dim": 192, "head_dim_v": 256}, {}, {"version": "4.0.0"}),
        ("FA4_HEAD_DIM_OUTPUT_SM90", {"head_dim": 64, "head_dim_v": 192}, {}, {"head_dim_v": 144}),
        ("FA4_HEAD_DIM_OUTPUT_SM90", {"head_dim": 16, "head_dim_v": 48}, {}, {"head_dim_v": 32}),
        ("FA4_HEAD_DIM_SHARED_SM90_BWD", {"head_dim_v": 256, **TRAIN}, {}, {"training": False}),
        ("FA4_HEAD_DIM_SHARED_SM90_BWD", {"head_dim_v": 192, **TRAIN}, {}, {"causal": True}),
        ("FA4_HEAD_DIM_SHARED_SM90_BWD", {"head_dim": 64, "head_dim_v": 128, **TRAIN}, {}, {"head_dim_v": 64}),
        ("FA4_HEAD_DIM_DQ_SM90_BWD", {"head_dim": 16, **TRAIN}, {}, {"head_dim": 24}),
        ("FA4_HEAD_DIM_DQ_SM90_BWD", {"head_dim": 72, "heads_kv": 4, **TRAIN}, {}, {"training": False}),
        ("FA4_HEAD_DIM_DQ_SM90_BWD", {"head_dim": 112, **TRAIN}, {}, {"head_dim": 136}),
        ("FA4_HEAD_DIM_DQ_SM90_BWD", {"head_dim": 80, **TRAIN}, {}, {"arch": "sm100"}),
        ("FA4_HEAD_DIM_V_SM100_BWD", {"head_dim_v": 96, **TRAIN}, {"arch": "sm100"}, {"head_dim_v": 64}),
        (
            "FA4_HEAD_DIM_V_SM100_BWD",
            {"head_dim": 64, "head_dim_v": 32, **TRAIN},
            {"arch": "sm103"},
            {"head_dim": 96},
        ),
        (
            "FA4_GQA_HEAD_DIM_V_SM100_BWD",
            {"heads_kv": 4, "head_dim": 96, "head_dim_v": 128, **TRAIN},
            {"arch": "sm100"},
            {"head_dim": 64},
        ),
        (
            "FA4_GQA_HEAD_DIM_V_SM100_BWD",
            {"heads_kv": 4, "head_dim_v": 64, **TRAIN},
            {"arch": "sm100"},
            {"heads_kv": 16},
        ),
        (
            "FA4_GQA_HEAD_DIM_V_SM100_BWD",
            {"heads_kv": 4, "head_dim_v": 56, **TRAIN},
            {"arch": "sm100"},
            {"head_dim_v": 120},
        ),
        (
            "FA4_GQA_HEAD_DIM_V_BWD",
            {"heads_kv": 4, "head_dim": 192, "head_dim_v": 128, **TRAIN},
            {},
            {"heads_kv": 16},
        ),
        (
            "FA4_GQA_HEAD_DIM_V_BWD",
            {"heads_kv": 4, "head_dim": 192, "head_dim_v": 128, **TRAIN},
            {},
            {"arch": "sm100"},
        ),
        ("FA4_SOFTCAP_256_BWD", {"head_dim": 256, "softcap": 30.0, **TRAIN}, {"arch": "sm100"}, {"training": False}),
        ("FA4_WINDOW_256_BWD", {"head_dim": 256, "window": (128, 0), **TRAIN}, {"arch": "sm100"}, {"arch": "sm90"}),
        ("FA4_LENGTHS_256", {"head_dim": 256, "seqlen_kv": 2048}, {"arch": "sm100"}, {"seqlen_kv": 1024}),
        ("FA4_PAGED_ARCH", {"page_size": 64}, {"arch": "sm120"}, {"arch": "sm100"}),
        ("FA4_PAGED_HEAD_DIM", {"head_dim": 72, **KV_PADDED}, {}, {"head_dim": 80}),
        ("FA4_PAGED_HEAD_DIM", {"head_dim_v": 72, "page_size": 16}, {"arch": "sm100"}, {"head_dim_v": 64}),
        ("FA4_PAGED_TILE", {"page_size": 128}, {}, {"page_size": 64}),
        ("FA4_PAGED_TILE", {"page_size": 128}, {"arch": "sm100"}, {"page_size": 256}),
        ("FA4_PADDED_TILE", {"seqlen_q": 1, "seqlen_kv": 128, **KV_PADDED}, {}, {"seqlen_kv": 136}),
        ("FA4_PADDED_TILE", {"seqlen_kv": 80, "head_dim": 256, **KV_PADDED}, {}, {"seqlen_kv": 96}),
        ("FA4_SINKS_ARCH", {"sinks": True}, {"arch": "sm120"}, {"arch": "sm110"}),
        ("FA4_SINKS_256_BWD", {"head_dim": 256, "sinks": True, **TRAIN}, {"arch": "sm100"}, {"arch": "sm90"}),
        ("FA4_DETERMINISTIC_SM120", DET, {"arch": "sm120"}, {"arch": "sm100"}),
    ],
}
CASES = [(prefix, *row) for prefix, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(
    ("prefix", "rule", "asked", "there", "inside"), CASES, ids=[f"{c[1]}-{n}" for n, c in enumerate(CASES)]
)
def test_breaks_one_rule_and_its_neighbour_none(
    prefix: str, rule: str, asked: dict[str, Any], there: dict[str, Any], inside: dict[str, Any]
) -> None:
    backend = BACKENDS[prefix]
    assert broken(backend, request(**asked), environment(backend, **there)) == [rule]
    machine = {"arch", "version"}
    asked = {k: v for k, v in asked.items() if not (k == "_padded_q" and "_padded_kv" in inside)}
    asked |= {k: v for k, v in inside.items() if k not in machine}
    there = there | {k: v for k, v in inside.items() if k in machine}
    assert broken(backend, request(**asked), environment(backend, **there)) == []


@pytest.mark.parametrize("prefix", BACKENDS)
def test_every_rule_is_tried(prefix: str) -> None:
    tried = {row[0] for row in ROWS[prefix]} | {f"{prefix}_{x}" for x in ("DEVICE", "BIAS_GRAD", "LSE_BACKWARD")}
    ids = [rule.id for rule in BACKENDS[prefix].all_rules]
    assert len(set(ids)) == len(ids)
    assert set(ids) == tried


@pytest.mark.parametrize("prefix", BACKENDS)
def test_without_a_gpu_only_what_is_missing_is_said(prefix: str) -> None:
    r = request(head_dim=192, packed=True, **DET)
    assert broken(BACKENDS[prefix], r, Environment.named("cpu")) == [f"{prefix}_DEVICE", f"{prefix}_INSTALLED"]
    amd = replace(environment(BACKENDS[prefix]), name="AMD GPU", capability=None)
    assert broken(BACKENDS[prefix], request(), amd) == [f"{prefix}_DEVICE"]


def test_shared_memory_as_the_gpu_and_the_package_count_it() -> None:
    """Those two that an H200 refused, and what 4.0.0b36 laid out when it was compiled for others."""
    forward = {(96, 160, False): 240640, (96, 160, True): 218112, (192, 256, False): 250880, (40, 40, False): 68608}
    backward = {(128, 256, False): 306176, (128, 192, True): 231424, (192, 128, True): 219136, (256, 72, False): 197632}
    for count, known in ((fa4_sm90.shared, forward), (fa4_sm90.shared_bwd, backward)):
        for (dim, dim_v, causal), size in known.items():
            assert count(request(head_dim=dim, head_dim_v=dim_v, causal=causal)) == size


def test_a_gradient_for_the_bias_is_a_reason_of_its_own() -> None:
    for prefix, backend in BACKENDS.items():
        found = broken(backend, request(bias=True, bias_grad=True, training=True), environment(backend))
        assert found == [f"{prefix}_BIAS", f"{prefix}_BIAS_GRAD"]


def test_messages_hold_the_actual_value_and_the_limit() -> None:
    (found,) = reasons(FA2.all_rules, request(head_dim=512), environment(FA2))
    assert found.message == "head_dim 512 is over 256, the most flash-attn 2 has kernels for"
    (found,) = reasons(FA2.all_rules, request(softcap=30.0), environment(FA2, version="2.5.9"))
    assert found.message == "flash-attn 2.6 or later is needed for softcap; 2.5.9 is installed"
    assert found.remedy == "pip install 'flash-attn>=2.6'"
    (found,) = reasons(FA3.all_rules, request(**TOP_LEFT), environment(FA3))
    assert "Sq=1024 and Skv=2048" in found.message
    assert found.remedy == "use alignment='bottom_right' if that is what you mean"
    (found,) = reasons(FA4.all_rules, request(), environment(FA4, version=None))
    assert found.message == "flash-attn-4 is not installed"
    assert found.remedy is not None
    assert "flash-attn-4==4.0.0b36" in found.remedy


def test_a_single_decoded_token_is_not_aligned_at_all() -> None:
    r = request(seqlen_q=1, seqlen_kv=4096, causal=True, alignment="bottom_right")
    assert all(broken(backend, r, environment(backend)) == [] for backend in BACKENDS.values())


FLAGSHIP: dict[str, dict[str, tuple[bool, bool]]] = {  # machine: (inference, training) is served
    "FA2": {"a100": (True, True), "rtx4090": (True, True), "h200": (True, True), "b200": (True, True)},
    "FA3": {"a100": (False, False), "rtx4090": (False, False), "h200": (True, True), "b200": (False, False)},
    "FA4": {"a100": (True, False), "rtx4090": (True, False), "h200": (True, True), "b200": (True, True)},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("prefix", "machine"), [(p, m) for p, row in FLAGSHIP.items() for m in row])
def test_flagship_calls(prefix: str, machine: str, packed: bool) -> None:
    for training, served in zip((False, True), FLAGSHIP[prefix][machine], strict=True):
        r = request(batch=4, heads_q=32, heads_kv=8, seqlen_q=8192, causal=True, training=training, packed=packed)
        assert (not broken(BACKENDS[prefix], r, Environment.named(machine))) == served


def test_bytes_count_the_copies_and_the_groups() -> None:
    there = Environment.named("h200")
    plain, det = (request(training=True, deterministic=d) for d in (False, True))
    copy = plain.tokens_q * 16 * 128 * 4
    assert FA2.bytes(det, there) - FA2.bytes(plain, there) == (5 - 1) * copy  # ceil(132 SMs / (2 * 16))
    assert FA2.notes(det, there) == ("a deterministic backward keeps 5 float32 copies of dq",)
    assert FA2.notes(plain, there) == ()
    grouped = request(training=True, heads_kv=4)
    assert FA3.bytes(grouped, there) == FA4.bytes(grouped, there)
    assert FA2.bytes(request(), there) == FA3.bytes(request(), there) == plain.tokens_q * 16 * (128 * 2 + 4)
    assert "compiles" in FA4.notes(plain, there)[0]
    assert FA3.notes(plain, there) == ()


LENGTHS = st.sampled_from([0, 1, 64, 1000, 1024])
DIMS = st.sampled_from([1, 8, 64, 96, 100, 128, 136, 192, 224, 256, 264, 512])
ARCHES = st.sampled_from(
    ["cpu", "sm70", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121", "sm130"]
)
VERSIONS = {
    "FA2": (
        "1.0.9",
        "2.0.4",
        "2.1.1",
        "2.2.0",
        "2.3.0",
        "2.4.0",
        "2.4.1",
        "2.5.5",
        "2.6.0",
        "2.6.2",
        "2.7.3",
        "2.8.3",
        "2.9.0",
    ),
    "FA3": ("3.0.0b1", "3.0.0", "3.1.0"),
    "FA4": ("4.0.0b11", "4.0.0b35", "4.0.0b36", "4.0.0b40", "4.0.0", "4.1.0"),
}


@st.composite
def requests(draw: st.DrawFn) -> AttentionRequest:
    flag = st.booleans()
    bias, packed = draw(flag), draw(flag)
    return request(
        batch=draw(st.sampled_from([0, 1, 4])),
        heads_q=8,
        heads_kv=draw(st.sampled_from([1, 2, 8])),
        seqlen_q=draw(LENGTHS),
        seqlen_kv=draw(LENGTHS),
        head_dim=draw(DIMS),
        head_dim_v=draw(DIMS),
        dtype=draw(st.sampled_from(["fp16", "bf16", "fp32", "fp64", "fp8_e4m3", "fp8_e5m2"])),
        causal=draw(flag),
        window=draw(st.sampled_from([None, (0, 0), (16, None), (None, 16), (64, 64)])),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        packed=packed,
        training=draw(flag),
        mask=draw(flag),
        bias=bias,
        bias_grad=bias and draw(flag),
        alibi=draw(flag),
        softcap=draw(st.sampled_from([None, 30.0])),
        sinks=draw(flag),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        return_lse=draw(flag),
        deterministic=draw(flag),
        _padded_q=not packed and draw(flag),
        _padded_kv=not packed and draw(flag),
        _strides=draw(st.sampled_from(["contiguous", "strided", "last_dim"])),
        _aligned=draw(flag),
    )


@pytest.mark.parametrize("prefix", BACKENDS)
@settings(max_examples=200, deadline=None)
@given(r=requests(), arch=ARCHES, data=st.data())
def test_every_rule_answers_every_request(prefix: str, r: AttentionRequest, arch: str, data: st.DataObject) -> None:
    backend = BACKENDS[prefix]
    e = environment(backend, arch, data.draw(st.sampled_from([None, *VERSIONS[prefix]])))
    for reason in reasons(backend.all_rules, r, e):
        assert "{" not in reason.message
        assert "{" not in (reason.remedy or "")
    assert backend.bytes(r, e) >= 0
    assert isinstance(backend.notes(r, e), tuple)


@pytest.mark.parametrize("prefix", BACKENDS)
@settings(max_examples=200, deadline=None)
@given(r=requests(), arch=ARCHES)
def test_a_newer_version_never_takes_less(prefix: str, r: AttentionRequest, arch: str) -> None:
    backend = BACKENDS[prefix]
    found = [set(broken(backend, r, environment(backend, arch, version))) for version in VERSIONS[prefix]]
    for older, newer in pairwise(found):
        assert newer <= older
