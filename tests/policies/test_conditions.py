"""The `when:` language: what holds where, and what its errors say."""

from __future__ import annotations

import timeit
from typing import Any

import pytest

from attnrt.backends.base import FEATURES
from attnrt.environment import Environment
from attnrt.errors import ArgumentError
from attnrt.policies.conditions import FIELDS, compile_when
from attnrt.request import AttentionRequest

H200 = Environment.named("h200")
CPU = Environment.named("cpu")


def request(**changes: Any) -> AttentionRequest:
    shape: dict[str, Any] = {"batch": 2, "heads_q": 32, "heads_kv": 8, "seqlen_q": 192, "head_dim": 128}
    return AttentionRequest.from_shape(**{**shape, "causal": True, **changes})


def holds(when: dict[str, Any], environment: Environment = H200, **changes: Any) -> bool:
    return compile_when(when)(request(**changes), environment)


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        (192, True),
        (191, False),
        ("== 192", True),
        ("==191", False),
        ("!= 192", False),
        ("<192", False),
        ("<= 192", True),
        (">192", False),
        (">=192", True),
        (">= 128, < 256", True),
        (">=128,<192", False),
        ("% 128 == 64", True),
        ("%128==63", False),
        ("% 128 != 0", True),
        (">64, % 64 == 0, !=128", True),
    ],
)
def test_numbers(clause: Any, expected: bool) -> None:
    assert holds({"seqlen_q": clause}) is expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 2),
        ("heads_q", 32),
        ("heads_kv", 8),
        ("group", 4),
        ("seqlen_q", 192),
        ("seqlen_kv", 192),
        ("head_dim", 192),
        ("head_dim_v", 128),
    ],
)
def test_each_number_reads_its_own_field(field: str, value: int) -> None:
    assert holds({field: value}, head_dim=192, head_dim_v=128)
    assert not holds({field: value + 1}, head_dim=192, head_dim_v=128)


@pytest.mark.parametrize(
    ("clause", "sm80", "sm90", "sm100", "sm120"),
    [
        ("sm90", False, True, False, False),
        (">=sm90", False, True, True, True),
        (">=sm90, <sm120", False, True, True, False),
        ("<sm90", True, False, False, False),
        ("!=sm90", True, False, True, True),
    ],
)
def test_arch(clause: str, sm80: bool, sm90: bool, sm100: bool, sm120: bool) -> None:
    archs = {"sm80": sm80, "sm90": sm90, "sm100": sm100, "sm120": sm120}
    assert {a: holds({"arch": clause}, Environment.simulate(a)) for a in archs} == archs


@pytest.mark.parametrize("clause", ["sm90", "!=sm90", "<sm80"])
def test_no_arch_clause_holds_without_compute_capability(clause: str) -> None:
    assert not holds({"arch": clause}, CPU)


def test_device_and_dtype() -> None:
    assert holds({"device": "cpu"}, CPU)
    assert not holds({"device": "cpu"})
    assert holds({"device": ["cpu", "cuda"]})
    assert holds({"dtype": "bf16"})
    assert holds({"dtype": ["fp16", "bfloat16"]})
    assert not holds({"dtype": "fp16"})


def test_flags() -> None:
    assert holds({"training": True}, training=True)
    assert holds({"training": False})
    assert not holds({"training": True})
    assert holds({"varlen": True}, packed=True)
    assert holds({"varlen": True}, padded=True)
    assert holds({"varlen": False})


def test_every_feature_is_a_field() -> None:
    assert {feature.name for feature in FEATURES} <= set(FIELDS)
    for feature in FEATURES:
        assert holds({feature.name: True}) is feature.used(request())
        assert holds({feature.name: False}) is not feature.used(request())


def test_all_fields_must_hold() -> None:
    assert holds({"arch": "sm90", "seqlen_q": "<=192", "causal": True})
    assert not holds({"arch": "sm90", "seqlen_q": "<=192", "causal": False})
    assert holds({})


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"seq_len_q": ">3"}, "unknown field 'seq_len_q' (did you mean seqlen_q?)"),
        ({"quux": 1}, "unknown field 'quux'; valid are batch,"),
        ({"seqlen_q": "=> 3"}, "unknown operator '=>' (did you mean >=?)"),
        ({"seqlen_q": "= 3"}, "unknown operator '=' (did you mean ==?)"),
        ({"seqlen_q": "~ 3"}, "unknown operator '~'; valid are == != < <= > >= and % N == M"),
        ({"seqlen_q": "128"}, "an operator is missing (did you mean == 128?)"),
        ({"seqlen_q": "> 16k"}, "an integer is needed after the operator, not '16k'"),
        ({"seqlen_q": "> -1"}, "an integer is needed after the operator, not '-1'"),
        ({"seqlen_q": ">3,"}, "a clause such as '>=128', or an integer is missing"),
        ({"seqlen_q": "% 128 = 64"}, "write it as '% 128 == 64'"),
        ({"seqlen_q": "% 64 == 64"}, "no number leaves 64 when divided by 64"),
        ({"seqlen_q": "% 0 == 0"}, "no number leaves 0 when divided by 0"),
        ({"seqlen_q": True}, "seqlen_q=True: a clause"),
        ({"seqlen_q": 1.5}, "seqlen_q=1.5: a clause"),
        ({"arch": ">=90"}, "'90' is no compute capability such as sm80, sm90 or sm100 (did you mean sm90?)"),
        ({"arch": "hopper"}, "'hopper' is no compute capability"),
        ({"arch": "=>sm90"}, "unknown operator '=>' (did you mean >=?)"),
        ({"arch": 90}, "a clause such as '>=sm90' or 'sm80' is needed"),
        ({"arch": "% 10 == 0"}, "is no compute capability"),
        ({"device": "cude"}, "unknown device 'cude' (did you mean cuda?)"),
        ({"device": []}, "a name or a list of names is needed"),
        ({"dtype": "fp61"}, "no such name (did you mean fp"),
        ({"dtype": 16}, "a name or a list of names is needed"),
        ({"training": "yes"}, "training='yes': true or false is needed"),
        ({"causal": 1}, "causal=1: true or false is needed"),
    ],
)
def test_errors_name_the_field_and_suggest(when: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        compile_when(when)
    assert message in str(caught.value)
    assert caught.value.argument == next(iter(when))


def test_evaluation_is_cheap() -> None:
    when = {"arch": ">=sm90, <sm100", "seqlen_q": "<=512", "training": False, "dtype": ["fp16", "bf16"]}
    condition, subject = compile_when(when), request()
    assert condition(subject, H200)
    microseconds = min(timeit.repeat(lambda: condition(subject, H200), number=1000, repeat=5)) * 1000
    # About one; generous, as the machine may be busy.
    assert microseconds / len(when) < 10
