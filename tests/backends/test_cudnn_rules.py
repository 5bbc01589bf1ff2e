"""cuDNN's rules: each one broken alone, its neighbour clean, and the table against what cuDNN 9.19 itself answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrt.backends.base import reasons
from attnrt.backends.cudnn import CuDNN
from attnrt.backends.cudnn.memory import workspace
from attnrt.environment import NAMED, Environment
from attnrt.request import AttentionRequest, Operand

BACKEND = CuDNN()
MIB = 1 << 20


def request(**options: Any) -> AttentionRequest:
    """A request; names with an underscore in front are set on it afterwards."""
    later = {name[1:]: options.pop(name) for name in list(options) if name.startswith("_")}
    sizes = {"batch": 2, "heads_q": 16, "seqlen_q": 1024, "head_dim": 128}
    return replace(AttentionRequest.from_shape(**(sizes | options)), **later)


def environment(arch: str = "sm90", cudnn: str | None = "9.19.0", **options: Any) -> Environment:
    packages = {"cudnn": cudnn} | options.pop("packages", {})
    return Environment.simulate(arch, packages=packages, **options)


def broken(r: AttentionRequest, e: Environment) -> list[str]:
    return [reason.rule for reason in reasons(BACKEND.all_rules, r, e)]


TRAIN = {"training": True}
BR = {"alignment": "bottom_right", "seqlen_kv": 2048}
CAUSAL_BR = {"causal": True, **BR}
BIAS_GRAD = {"bias": True, "bias_grad": True, "training": True}
SEVERAL_PAGED = {"padded": True, "page_size": 16, "seqlen_q": 4, "seqlen_kv": 64}
DET = {"training": True, "deterministic": True}
HEADS_64 = {"batch": 1, "heads_q": 64, "heads_kv": 8, "seqlen_q": 8192, "causal": True, "training": True}

# rule, (request, environment) that breaks it and nothing else, what to change to be just inside
ONE_BY_ONE: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("CUDNN_SCALE", {"scale": 0.0}, {}, {"scale": 0.1}),
    ("CUDNN_ARCH", {}, {"arch": "sm75"}, {"arch": "sm80"}),
    ("CUDNN_INSTALLED", {}, {"packages": {"nvidia-cudnn-frontend": None}}, {"packages": {}}),
    ("CUDNN_LIBRARY", {}, {"cudnn": None}, {"cudnn": "9.0"}),
    (
        "CUDNN_FRONTEND_VERSION",
        {},
        {"packages": {"nvidia-cudnn-frontend": "1.19.1"}},
        {"packages": {"nvidia-cudnn-frontend": "1.20.0"}},
    ),
    ("CUDNN_VERSION", {}, {"cudnn": "8.9.7"}, {"cudnn": "9.0.0"}),
    ("CUDNN_SM100_VERSION", {}, {"arch": "sm100", "cudnn": "9.6.0"}, {"cudnn": "9.7.0"}),
    ("CUDNN_SM120_VERSION", {}, {"arch": "sm120", "cudnn": "9.18.0"}, {"cudnn": "9.18.1"}),
    ("CUDNN_DTYPE", {"dtype": "fp32"}, {}, {"dtype": "fp16"}),
    ("CUDNN_DTYPE", {"dtype": "fp8_e4m3"}, {}, {"dtype": "bf16"}),
    ("CUDNN_STRIDED_LAST_DIM", {"_strides": "last_dim"}, {}, {"_strides": "strided"}),
    ("CUDNN_UNALIGNED", {"_aligned": False}, {}, {"_aligned": True}),
    ("CUDNN_EXPANDED", {"_expanded": True}, {}, {"_expanded": False}),
    ("CUDNN_HEAD_DIM_MULTIPLE", {"head_dim": 100}, {}, {"head_dim": 104}),
    ("CUDNN_HEAD_DIM_MULTIPLE", {"head_dim_v": 68}, {}, {"head_dim_v": 72}),
    ("CUDNN_HEAD_DIM_SM90", {"head_dim": 256}, {"cudnn": "9.0"}, {"cudnn": "9.1"}),
    ("CUDNN_HEAD_DIM_SM100", {"head_dim": 136}, {"arch": "sm100", "cudnn": "9.8"}, {"cudnn": "9.9"}),
    ("CUDNN_HEAD_DIM_LARGE", {"head_dim": 136}, {"arch": "sm80", "cudnn": "9.9"}, {"cudnn": "9.10.2"}),
    ("CUDNN_HEAD_DIM_LARGE", {"head_dim": 264}, {"cudnn": "9.9"}, {"head_dim": 256}),
    (
        "CUDNN_HEAD_DIM_LARGE",
        {"head_dim": 256, "seqlen_q": 1, "seqlen_kv": 1024},
        {"arch": "sm100", "cudnn": "9.9"},
        {"seqlen_q": 2},
    ),
    (
        "CUDNN_HEAD_DIM_DECODE",
        {"head_dim": 256, "seqlen_q": 1, "seqlen_kv": 64, "causal": True, "alignment": "top_left"},
        {"arch": "sm80"},
        {"head_dim": 128},
    ),
    (
        "CUDNN_DECODE_BAND_VERSION",
        {"seqlen_q": 1, "seqlen_kv": 64, "causal": True, "alignment": "top_left"},
        {"cudnn": "9.9"},
        {"cudnn": "9.10.2"},
    ),
    ("CUDNN_HEAD_DIM_BWD", {"head_dim": 136, **TRAIN}, {"arch": "sm80"}, {"head_dim": 128}),
    ("CUDNN_HEAD_DIM_BWD", {"head_dim": 136, **TRAIN}, {"arch": "sm100"}, {"training": False}),
    ("CUDNN_HEAD_DIM_BWD", {"head_dim": 264, **TRAIN}, {}, {"head_dim": 256}),
    ("CUDNN_HEAD_DIM_BWD", {"head_dim": 192, "head_dim_v": 128, **TRAIN}, {"arch": "sm120"}, {"arch": "sm103"}),
    ("CUDNN_HEAD_DIM_BWD_SM90", {"head_dim": 192, **TRAIN}, {"cudnn": "9.4"}, {"cudnn": "9.5"}),
    (
        "CUDNN_HEAD_DIM_BWD_192_128",
        {"head_dim": 192, "head_dim_v": 128, **TRAIN},
        {"arch": "sm100", "cudnn": "9.10.2"},
        {"cudnn": "9.11"},
    ),
    ("CUDNN_HEAD_DIM_BWD_256", {"head_dim": 256, **TRAIN}, {"arch": "sm100", "cudnn": "9.22"}, {"cudnn": "9.23"}),
    (
        "CUDNN_HEAD_DIM_BWD_256_PACKED",
        {"head_dim": 256, "packed": True, **TRAIN},
        {"arch": "sm100", "cudnn": "9.24"},
        {"cudnn": "9.25"},
    ),
    (
        "CUDNN_HEAD_DIM_BWD_256_FEATURES",
        {"head_dim": 256, "dropout_p": 0.1, **TRAIN},
        {"arch": "sm100", "cudnn": "9.25"},
        {"dropout_p": 0.0},
    ),
    (
        "CUDNN_HEAD_DIM_BWD_256_FEATURES",
        {"head_dim": 256, "window": (128, 128), **TRAIN},
        {"arch": "sm100", "cudnn": "9.25"},
        {"window": (128, 0)},
    ),
    (
        "CUDNN_HEAD_DIM_BWD_LENGTHS",
        {"head_dim": 64, "head_dim_v": 128, "packed": True, **TRAIN},
        {"arch": "sm80"},
        {"head_dim_v": 64},
    ),
    (
        "CUDNN_HEAD_DIM_BWD_LENGTHS",
        {"head_dim": 128, "head_dim_v": 64, "padded": True, **TRAIN},
        {"arch": "sm120"},
        {"arch": "sm90"},
    ),
    (
        "CUDNN_BIAS_GRAD_HEAD_DIM",
        {**BIAS_GRAD, "head_dim": 192, "head_dim_v": 128, "seqlen_q": 1024},
        {"arch": "sm100"},
        {"arch": "sm90"},
    ),
    ("CUDNN_SINGLE_TOKEN_BWD", {"seqlen_q": 1, **TRAIN}, {}, {"seqlen_q": 2}),
    ("CUDNN_WINDOW_VERSION", {"causal": True, "window": (128, 0)}, {"cudnn": "9.1"}, {"cudnn": "9.2"}),
    ("CUDNN_WINDOW_LENGTHS_VERSION", {"window": (None, 64)}, {"cudnn": "9.5"}, {"cudnn": "9.6"}),
    ("CUDNN_WINDOW_FEATURES_VERSION", {"window": (64, 64)}, {"cudnn": "9.9"}, {"window": (64, 0)}),
    (
        "CUDNN_WINDOW_FEATURES_VERSION",
        {"window": (64, 0), "dropout_p": 0.1},
        {"cudnn": "9.9"},
        {"cudnn": "9.10.2"},
    ),
    (
        "CUDNN_WINDOW_SM90_VERSION",
        {"window": (64, 0), "padded": True, "_same_lengths": False, "_alignment": "bottom_right"},
        {"cudnn": "9.9"},
        {"cudnn": "9.10.2"},
    ),
    (
        "CUDNN_WINDOW_ROWS",
        {"window": (64, 0), "alignment": "top_left", "seqlen_kv": 1016},
        {},
        {"seqlen_kv": 1032},
    ),
    ("CUDNN_BOTTOM_RIGHT_VERSION", CAUSAL_BR, {"cudnn": "9.2"}, {"cudnn": "9.3"}),
    ("CUDNN_BOTTOM_RIGHT_LENGTHS_VERSION", {**CAUSAL_BR, "seqlen_kv": 2056}, {"cudnn": "9.5"}, {"seqlen_kv": 2048}),
    ("CUDNN_BOTTOM_RIGHT_ROWS", {**CAUSAL_BR, "seqlen_kv": 512}, {}, {"padded": True}),
    ("CUDNN_BOTTOM_RIGHT_BIAS", {**CAUSAL_BR, "bias": True}, {}, {"alignment": "top_left"}),
    ("CUDNN_BOTTOM_RIGHT_DROPOUT", {**CAUSAL_BR, "dropout_p": 0.1}, {}, {"alignment": "top_left"}),
    ("CUDNN_MASK", {"mask": True}, {}, {"mask": False}),
    ("CUDNN_ALIBI", {"alibi": True, "causal": True}, {}, {"alibi": False}),
    ("CUDNN_SOFTCAP", {"softcap": 30.0}, {}, {"softcap": None}),
    ("CUDNN_EMPTY", {"batch": 0}, {}, {"batch": 1}),
    ("CUDNN_BIAS_LENGTHS", {"bias": True, "packed": True}, {}, {"packed": False}),
    ("CUDNN_BIAS_SHAPE", {"bias": (1, 1, 1024, 1)}, {}, {"bias": (1, 1, 1024, 1024)}),
    ("CUDNN_BIAS_ROWS", {"bias": (2, 1, 1, 1024), "training": True}, {}, {"training": False}),
    (
        "CUDNN_PAGED_DROPOUT",
        {"padded": True, "page_size": 16, "seqlen_q": 1, "seqlen_kv": 64, "dropout_p": 0.1},
        {},
        {"dropout_p": 0.0},
    ),
    ("CUDNN_PAGED_QUERIES", SEVERAL_PAGED, {"arch": "sm100"}, {"seqlen_q": 1}),
    ("CUDNN_PAGED_QUERIES", {**SEVERAL_PAGED, "sinks": True}, {}, {"sinks": False}),
    ("CUDNN_PAGED_QUERIES", SEVERAL_PAGED, {"arch": "sm80"}, {"arch": "sm90"}),
    ("CUDNN_PAGED_QUERIES_VERSION", SEVERAL_PAGED, {"cudnn": "9.18"}, {"cudnn": "9.19"}),
    (
        "CUDNN_BIAS_GRAD_DTYPE",
        {**BIAS_GRAD, "_bias": Operand((2, 16, 1024, 1024), "fp32", True)},
        {},
        {"_bias": Operand((2, 16, 1024, 1024), "bf16", True)},
    ),
    ("CUDNN_BIAS_GRAD_VERSION", {**BIAS_GRAD, "seqlen_q": 1000}, {"cudnn": "9.4"}, {"cudnn": "9.5"}),
    ("CUDNN_BIAS_GRAD_DROPOUT", {**BIAS_GRAD, "dropout_p": 0.1}, {"arch": "sm100"}, {"bias_grad": False}),
    ("CUDNN_SINKS_VERSION", {"sinks": True}, {"cudnn": "9.13.0"}, {"cudnn": "9.13.1"}),
    ("CUDNN_SINKS_PACKED_VERSION", {"sinks": True, "packed": True}, {"cudnn": "9.17"}, {"cudnn": "9.18"}),
    (
        "CUDNN_SINKS_LENGTHS_GRAD_VERSION",
        {"sinks": True, "packed": True, "training": True},
        {"cudnn": "9.25"},
        {"cudnn": "9.26"},
    ),
    ("CUDNN_SINKS_DECODE", {"sinks": True, "seqlen_q": 1, "seqlen_kv": 64}, {}, {"seqlen_q": 2}),
    ("CUDNN_SINKS_LSE", {"sinks": True, "return_lse": True}, {}, {"return_lse": False}),
    ("CUDNN_PAGED_VERSION", {"page_size": 64, "seqlen_q": 1, "seqlen_kv": 1024}, {"cudnn": "9.4"}, {"cudnn": "9.5"}),
    ("CUDNN_SINKS_DETERMINISTIC", {"sinks": True, **DET}, {}, {"deterministic": False}),
    ("CUDNN_PACKED_VERSION", {"packed": True}, {"cudnn": "9.0"}, {"cudnn": "9.1"}),
    ("CUDNN_PACKED_OFFSETS_VERSION", {"packed": True, "_tokens_q": 1 << 20}, {"cudnn": "9.4"}, {"cudnn": "9.5"}),
    ("CUDNN_PACKED_GQA_VERSION", {"packed": True, "heads_kv": 4}, {"cudnn": "9.5"}, {"cudnn": "9.6"}),
    ("CUDNN_PACKED_SM80_VERSION", {"packed": True}, {"arch": "sm89", "cudnn": "9.18.0"}, {"cudnn": "9.18.1"}),
    ("CUDNN_DETERMINISTIC_PACKED", {"packed": True, **DET}, {"arch": "sm80"}, {"arch": "sm90"}),
    ("CUDNN_DETERMINISTIC_SM100_VERSION", DET, {"arch": "sm100", "cudnn": "9.17"}, {"cudnn": "9.18"}),
    ("CUDNN_DETERMINISTIC_SM100", {"dropout_p": 0.1, **DET}, {"arch": "sm103"}, {"arch": "sm90"}),
    ("CUDNN_DETERMINISTIC_SM120", DET, {"arch": "sm120"}, {"deterministic": False}),
]


@pytest.mark.parametrize(("rule", "asked", "there", "inside"), ONE_BY_ONE)
def test_breaks_one_rule_and_its_neighbour_none(
    rule: str, asked: dict[str, Any], there: dict[str, Any], inside: dict[str, Any]
) -> None:
    assert broken(request(**asked), environment(**there)) == [rule]
    machine = {"arch", "cudnn", "packages"}
    asked = asked | {k: v for k, v in inside.items() if k not in machine}
    there = there | {k: v for k, v in inside.items() if k in machine}
    assert broken(request(**asked), environment(**there)) == []


def test_without_a_gpu_only_what_is_missing_is_said() -> None:
    large = request(head_dim=512, packed=True, **DET)
    assert broken(large, Environment.named("cpu")) == ["CUDNN_DEVICE", "CUDNN_INSTALLED", "CUDNN_LIBRARY"]
    amd = replace(environment(), name="AMD GPU", capability=None)
    assert broken(request(), amd) == ["CUDNN_DEVICE"]


def test_every_rule_is_tried() -> None:
    tried = {rule for rule, *_ in ONE_BY_ONE} | {"CUDNN_DEVICE"}
    assert {rule.id for rule in BACKEND.all_rules} == tried


def test_ids_are_unique_and_prefixed() -> None:
    ids = [rule.id for rule in BACKEND.all_rules]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("CUDNN_") for id in ids)


def test_messages_hold_the_actual_value_and_the_limit() -> None:
    (found,) = reasons(BACKEND.all_rules, request(sinks=True), environment(cudnn="9.12.0"))
    assert found.message == "cudnn 9.13.1 or later is needed for attention sinks; 9.12.0 is installed"
    assert found.remedy is not None
    assert "nvidia-cudnn-cu13>=9.13.1" in found.remedy
    (found,) = reasons(BACKEND.all_rules, request(head_dim=160, training=True), environment("sm80"))
    assert "160/160 on sm80" in found.message


def test_reasons_are_independent() -> None:
    r = request(dtype="fp32", head_dim=100, softcap=30.0, mask=True, alibi=True, causal=True, training=True)
    assert broken(r, environment("sm75", packages={"nvidia-cudnn-frontend": None})) == [
        "CUDNN_SOFTCAP",
        "CUDNN_ARCH",
        "CUDNN_INSTALLED",
        "CUDNN_DTYPE",
        "CUDNN_HEAD_DIM_MULTIPLE",
        "CUDNN_MASK",
        "CUDNN_ALIBI",
    ]


@pytest.mark.parametrize("machine", ["a100", "rtx4090", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flagship_calls_are_clean(machine: str, training: bool, packed: bool) -> None:
    r = request(batch=4, heads_q=32, heads_kv=8, seqlen_q=8192, causal=True, training=training, packed=packed)
    assert broken(r, Environment.named(machine)) == []


# What cuDNN 9.19.0's own support check answers: forward and backward on a100, rtx4090, h200, b200, rtx5090.
# "y" yes, "-" no, "." not asked.
ASKED = ("a100", "rtx4090", "h200", "b200", "rtx5090")
TL = {"alignment": "top_left"}
MEASURED: list[tuple[str, dict[str, Any], str, str]] = [
    ("d40", {"head_dim": 40}, "yyyyy", "yyyyy"),
    ("d64", {"head_dim": 64}, "yyyyy", "yyyyy"),
    ("d72", {"head_dim": 72}, "yyyyy", "yyyyy"),
    ("d96", {"head_dim": 96}, "yyyyy", "yyyyy"),
    ("d128", {}, "yyyyy", "yyyyy"),
    ("fp16", {"dtype": "fp16"}, "yyyyy", "yyyyy"),
    ("d160", {"head_dim": 160}, "yyyyy", "--y--"),
    ("d192", {"head_dim": 192}, "yyyyy", "--y--"),
    ("d192/128", {"head_dim": 192, "head_dim_v": 128}, "yyyyy", "--yy-"),
    ("d256", {"head_dim": 256}, "yyyyy", "--y--"),
    ("d512", {"head_dim": 512}, "yyyyy", "-----"),
    ("d576/512", {"head_dim": 576, "head_dim_v": 512, "heads_q": 128, "heads_kv": 1}, "yyyyy", "-----"),
    ("d100", {"head_dim": 100}, "-----", "-----"),
    ("S=1000", {"seqlen_q": 1000}, "yyyyy", "yyyyy"),
    ("S=17", {"seqlen_q": 17}, "yyyyy", "yyyyy"),
    ("Sq=1", {"seqlen_q": 1, "seqlen_kv": 1024}, "yyyyy", "yyyyy"),
    ("Sq=Skv=1", {"seqlen_q": 1}, "yyyyy", "-----"),
    ("Sq>Skv", {"seqlen_q": 2048, "seqlen_kv": 1024}, "yyyyy", "yyyyy"),
    ("bhsd", {"layout": "bhsd"}, "yyyyy", "yyyyy"),
    ("sbhd", {"layout": "sbhd"}, "yyyyy", "yyyyy"),
    ("causal", {"causal": True}, "yyyyy", "yyyyy"),
    ("causal top-left Sq<Skv", {"causal": True, "seqlen_kv": 2048, **TL}, "yyyyy", "yyyyy"),
    ("causal top-left Sq>Skv", {"causal": True, "seqlen_q": 2048, "seqlen_kv": 1024, **TL}, "yyyyy", "yyyyy"),
    ("causal bottom-right Sq<Skv", CAUSAL_BR, "yyyyy", "yyyyy"),
    ("causal bottom-right Sq>Skv", {**CAUSAL_BR, "seqlen_q": 4096}, "-----", "-----"),
    ("the same with padding", {**CAUSAL_BR, "seqlen_q": 4096, "padded": True}, "yyyyy", "yyyyy"),
    ("causal bottom-right Sq=1", {**CAUSAL_BR, "seqlen_q": 1}, "yyyyy", "....."),
    ("window causal", {"window": (127, 0)}, "yyyyy", "yyyyy"),
    ("window causal bottom-right", {"window": (127, 0), **BR}, "yyyyy", "yyyyy"),
    ("band", {"window": (63, 64)}, "yyyyy", "yyyyy"),
    ("band bottom-right", {"window": (63, 64), **BR}, "yyyyy", "yyyyy"),
    ("left only", {"window": (127, None)}, "yyyyy", "yyyyy"),
    ("right only", {"window": (None, 16)}, "yyyyy", "yyyyy"),
    ("window Sq>Skv", {"window": (127, 0), "seqlen_q": 2048, "seqlen_kv": 1024, **TL}, "-----", "-----"),
    ("bias 1HSS", {"bias": (1, 16, 1024, 1024)}, "yyyyy", "yyyyy"),
    ("bias BHSS", {"bias": True}, "yyyyy", "yyyyy"),
    ("bias causal", {"bias": (1, 16, 1024, 1024), "causal": True}, "yyyyy", "yyyyy"),
    ("bias gradient 1HSS", {"bias": (1, 16, 1024, 1024), "bias_grad": True}, ".....", "yyyyy"),
    ("bias gradient BHSS", {"bias": True, "bias_grad": True}, ".....", "yyyyy"),
    ("dropout", {"dropout_p": 0.1}, "yyyyy", "yyyyy"),
    ("dropout causal", {"dropout_p": 0.1, "causal": True}, "yyyyy", "yyyyy"),
    ("dropout causal bottom-right", {"dropout_p": 0.1, **CAUSAL_BR}, "-----", "-----"),
    ("dropout bias", {"dropout_p": 0.1, "bias": (1, 16, 1024, 1024)}, "yyyyy", "yyyyy"),
    ("padding", {"padded": True}, "yyyyy", "yyyyy"),
    ("packed", {"packed": True}, "yyyyy", "yyyyy"),
    ("packed causal", {"packed": True, "causal": True}, "yyyyy", "yyyyy"),
    ("packed causal bottom-right", {"packed": True, **CAUSAL_BR}, "yyyyy", "yyyyy"),
    ("packed window bottom-right", {"packed": True, "window": (127, 0), **BR}, "yyyyy", "yyyyy"),
    ("packed GQA", {"packed": True, "heads_kv": 4, **CAUSAL_BR}, "yyyyy", "yyyyy"),
    ("packed d256", {"packed": True, "head_dim": 256, **CAUSAL_BR}, "yyyyy", "--y--"),
    ("packed dropout", {"packed": True, "dropout_p": 0.1}, "yyyyy", "yyyyy"),
    ("GQA", {"heads_kv": 4}, "yyyyy", "yyyyy"),
    ("MQA", {"heads_kv": 1}, "yyyyy", "yyyyy"),
    ("d192/128 causal", {"head_dim": 192, "head_dim_v": 128, "causal": True}, "yyyyy", "--yy-"),
    ("d256 GQA causal bottom-right", {"head_dim": 256, "heads_kv": 4, **CAUSAL_BR}, "yyyyy", "--y--"),
    ("sinks causal", {"sinks": True, "causal": True}, "yyyyy", "yyyyy"),
    ("sinks window", {"sinks": True, "window": (127, 0), "head_dim": 64, "heads_kv": 2}, "yyyyy", "yyyyy"),
    ("sinks Sq=1", {"sinks": True, "seqlen_q": 1, "seqlen_kv": 1024}, "-----", "....."),
    # On sm120 cuDNN says yes to a deterministic backward, and we follow Transformer Engine, which does not trust it.
    ("deterministic", {"deterministic": True}, ".....", "yyyy."),
    ("deterministic causal", {"deterministic": True, "causal": True}, ".....", "yyyy."),
    ("deterministic d256", {"deterministic": True, "head_dim": 256}, ".....", "--y--"),
    ("deterministic d192/128", {"deterministic": True, "head_dim": 192, "head_dim_v": 128}, ".....", "--yy-"),
    ("deterministic dropout", {"deterministic": True, "dropout_p": 0.1}, ".....", "yyy-."),
    ("deterministic packed", {"deterministic": True, "packed": True, **CAUSAL_BR}, ".....", "--yy-"),
    ("deterministic bias gradient", {"deterministic": True, "bias": True, "bias_grad": True}, ".....", "yyy-."),
]


@pytest.mark.parametrize(("case", "asked", "forward", "backward"), MEASURED, ids=[m[0] for m in MEASURED])
def test_agrees_with_the_library(case: str, asked: dict[str, Any], forward: str, backward: str) -> None:
    for training, answers in ((False, forward), (True, backward)):
        for machine, answer in zip(ASKED, answers, strict=True):
            if answer != ".":
                found = broken(request(**asked, training=training), Environment.named(machine))
                assert (not found) == (answer == "y"), (machine, training, found)


# (request, arch, MiB): what cuDNN 9.19 reports for the backward's workspace
WORKSPACES: list[tuple[dict[str, Any], str, int]] = [
    (HEADS_64, "sm90", 514),
    (HEADS_64 | {"deterministic": True}, "sm90", 8450),
    (HEADS_64, "sm80", 770),
    (HEADS_64 | {"deterministic": True}, "sm80", 8450),
    (HEADS_64, "sm100", 514),
    (HEADS_64 | {"deterministic": True}, "sm100", 514),
    (HEADS_64 | {"heads_q": 128, "heads_kv": 128, "head_dim": 192, "head_dim_v": 128}, "sm90", 772),
    (
        HEADS_64 | {"heads_q": 128, "heads_kv": 128, "head_dim": 192, "head_dim_v": 128, "deterministic": True},
        "sm90",
        16388,
    ),
    ({"batch": 8, "seqlen_q": 4096, "packed": True, "training": True}, "sm90", 258),
    ({"batch": 8, "seqlen_q": 4096, "packed": True, "training": True}, "sm80", 514),
]


@pytest.mark.parametrize(("asked", "arch", "mib"), WORKSPACES)
def test_workspace_is_what_the_library_reports(asked: dict[str, Any], arch: str, mib: int) -> None:
    assert workspace(request(**asked), environment(arch)) == mib * MIB


def test_bytes_hold_the_workspace_and_the_bias_gradient() -> None:
    plain, grad = (request(bias=True, bias_grad=g, training=True) for g in (False, True))
    matrix = plain.scores * 2
    there = environment()
    assert BACKEND.bytes(grad, there) - BACKEND.bytes(plain, there) == 2 * matrix  # workspace and the gradient itself
    assert BACKEND.bytes(request(), there) == request().tokens_q * 16 * (128 * 2 + 4)


LENGTHS = st.sampled_from([0, 1, 2, 63, 64, 1000, 1024, 4096])
DIMS = st.sampled_from([1, 8, 64, 100, 128, 136, 192, 256, 264, 512])
VERSIONS = (
    "9.0",
    "9.2",
    "9.5",
    "9.6",
    "9.9",
    "9.10.2",
    "9.11",
    "9.13.1",
    "9.18",
    "9.18.1",
    "9.19",
    "9.23",
    "9.25",
    "10.0",
)
ARCHES = st.sampled_from(["cpu", "sm70", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"])


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
        padded=not packed and draw(flag),
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
        _strides=draw(st.sampled_from(["contiguous", "strided", "last_dim"])),
        _aligned=draw(flag),
    )


@settings(max_examples=300, deadline=None)
@given(requests(), ARCHES, st.sampled_from([None, *VERSIONS]), st.sampled_from([None, "1.19", "1.28"]))
def test_every_rule_answers_every_request(
    r: AttentionRequest, arch: str, cudnn: str | None, frontend: str | None
) -> None:
    e = environment(arch, cudnn, packages={"nvidia-cudnn-frontend": frontend})
    for reason in reasons(BACKEND.all_rules, r, e):
        assert "{" not in reason.message
        assert "{" not in (reason.remedy or "")
    assert BACKEND.bytes(r, e) >= 0
    assert BACKEND.notes(r, e)


@settings(max_examples=300, deadline=None)
@given(requests(), ARCHES)
def test_a_newer_version_never_takes_less(r: AttentionRequest, arch: str) -> None:
    found = [set(broken(r, environment(arch, cudnn))) for cudnn in VERSIONS]
    for older, newer in pairwise(found):
        assert newer <= older


@pytest.mark.parametrize("name", NAMED)
def test_every_named_machine_answers(name: str) -> None:
    assert isinstance(broken(request(), Environment.named(name)), list)
