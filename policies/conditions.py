"""The `when:` language of policies and advisories: a mapping from field to clause; all must hold.

    seqlen_q: 1                     numbers: an integer, or comma-separated clauses of == != < <= > >= and % N == M
    seqlen_kv: ">= 1024, % 128 == 64"
    arch: ">=sm90, <sm100"          compute capability, same operators; false on a device that has none
    device: cuda                    a name, or a list of names
    dtype: [fp16, bf16]
    training: true                  flags: training, varlen, and every feature of `backends.base.FEATURES`

A mapping is compiled once to a chain of closures; evaluating it costs well under a microsecond a field.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from attnrt.backends.base import FEATURES
from attnrt.environment import Environment
from attnrt.errors import ArgumentError, AttnrtError, nearest
from attnrt.request import AttentionRequest, dtype_name

Condition = Callable[[AttentionRequest, Environment], bool]

NUMBERS: Mapping[str, Callable[[AttentionRequest], int]] = {
    "batch": attrgetter("batch"),
    "heads_q": attrgetter("heads_q"),
    "heads_kv": attrgetter("heads_kv"),
    "group": attrgetter("group"),
    "seqlen_q": attrgetter("seqlen_q"),
    "seqlen_kv": attrgetter("seqlen_kv"),
    "head_dim": attrgetter("head_dim_qk"),
    "head_dim_v": attrgetter("head_dim_v"),
}
FLAGS: Mapping[str, Callable[[AttentionRequest], bool]] = {
    "training": attrgetter("needs_grad"),
    "varlen": lambda r: r.packed or r.padded,
    **{feature.name: feature.used for feature in FEATURES},
}
DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
FIELDS = (*NUMBERS, "arch", "device", "dtype", *FLAGS)

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# difflib finds nothing alike in words of one or two letters.
_MISSPELT = {"=": "==", "===": "==", "=>": ">=", "≥": ">=", "=<": "<=", "≤": "<=", "<>": "!=", "=!": "!=", "!": "!="}
_CLAUSE = re.compile(r"(?P<op>[^\w\s%]*)\s*(?P<value>\S.*)?")
_MODULO = re.compile(r"%\s*(?P<by>\d+)\s*(?P<op>==|!=)\s*(?P<rest>\d+)")
_ARCH = re.compile(r"sm_?(\d{2,3})a?", re.IGNORECASE)


def compile_when(when: Mapping[str, Any]) -> Condition:
    """One predicate for the whole mapping.

    Raises:
        ArgumentError: an unknown field or operator, or a malformed value; its `argument` is the field.
    """
    tests = tuple(test for field, value in when.items() for test in _compile_field(field, value))
    if len(tests) == 1:
        return tests[0]

    def holds(request: AttentionRequest, environment: Environment) -> bool:
        for test in tests:  # noqa: SIM110  a generator would triple the cost
            if not test(request, environment):
                return False
        return True

    return holds


def _compile_field(field: str, value: Any) -> list[Condition]:
    if field in NUMBERS:
        return _compile_number(field, value)
    if field in FLAGS:
        return [_compile_flag(field, value)]
    if field == "arch":
        return [_compile_arch(value, clause) for clause in _clauses(field, value, "such as '>=sm90' or 'sm80'")]
    if field == "device":
        return [_compile_device(value)]
    if field == "dtype":
        return [_compile_dtype(value)]
    raise ArgumentError(
        str(field), value, f"unknown field {field!r}{nearest(field, FIELDS)}; valid are {', '.join(FIELDS)}"
    )


def _compile_number(field: str, value: Any) -> list[Condition]:
    get = NUMBERS[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return [lambda r, e: get(r) == value]
    clauses = _clauses(field, value, "such as '>=128', or an integer")
    return [_number_test(get, field, value, clause) for clause in clauses]


def _number_test(get: Callable[[AttentionRequest], int], field: str, value: Any, clause: str) -> Condition:
    if match := _MODULO.fullmatch(clause):
        by, rest, same = int(match["by"]), int(match["rest"]), match["op"] == "=="
        if rest >= by:
            raise ArgumentError(field, value, f"no number leaves {rest} when divided by {by}")
        return lambda r, e: (get(r) % by == rest) is same
    if clause.startswith("%"):
        raise ArgumentError(field, value, f"{clause!r} is malformed; write it as '% 128 == 64'")
    compare, text = _operator(field, value, clause)
    if not text.isdecimal():
        raise ArgumentError(field, value, f"an integer is needed after the operator, not {text!r}")
    if compare is None:
        raise ArgumentError(field, value, f"an operator is missing (did you mean == {text}?)")
    limit = int(text)
    return lambda r, e: compare(get(r), limit)


def _compile_arch(value: Any, clause: str) -> Condition:
    compare, text = _operator("arch", value, clause)
    if not (match := _ARCH.fullmatch(text)):
        guess = f" (did you mean sm{text}?)" if re.fullmatch(r"\d{2,3}", text) else ""
        raise ArgumentError("arch", value, f"{text!r} is no compute capability such as sm80, sm90 or sm100{guess}")
    number, compare = int(match[1]), compare or operator.eq

    def holds(request: AttentionRequest, environment: Environment) -> bool:
        sm = environment.sm
        return sm is not None and compare(sm, number)

    return holds


def _compile_device(value: Any) -> Condition:
    names = _names("device", value)
    for name in names:
        if name not in DEVICES:
            guess = nearest(name, DEVICES)
            raise ArgumentError("device", value, f"unknown device {name!r}{guess}; valid are {', '.join(DEVICES)}")
    return lambda r, e: e.device_type in names


def _compile_dtype(value: Any) -> Condition:
    try:
        names = frozenset(dtype_name(name) for name in _names("dtype", value))
    except AttnrtError as error:
        raise ArgumentError("dtype", value, str(error).partition(": ")[2]) from None
    return lambda r, e: r.dtype in names


def _compile_flag(field: str, value: Any) -> Condition:
    if not isinstance(value, bool):
        raise ArgumentError(field, value, "true or false is needed")
    used = FLAGS[field]
    return (lambda r, e: used(r)) if value else (lambda r, e: not used(r))


def _names(field: str, value: Any) -> frozenset[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(field, value, "a name or a list of names is needed")
    return frozenset(names)


def _clauses(field: str, value: Any, wanted: str) -> list[str]:
    if not isinstance(value, str):
        raise ArgumentError(field, value, f"a clause {wanted} is needed")
    clauses = [clause.strip() for clause in value.split(",")]
    if not all(clauses):
        raise ArgumentError(field, value, f"a clause {wanted} is missing")
    return clauses


def _operator(field: str, value: Any, clause: str) -> tuple[Callable[[Any, Any], bool] | None, str]:
    """The comparison (None if there is no operator) and the text after it."""
    match = _CLAUSE.fullmatch(clause)
    symbol, text = (match["op"], (match["value"] or "").strip()) if match else ("", clause)
    if not symbol:
        return None, text
    if symbol not in _OPERATORS:
        guess = f" (did you mean {_MISSPELT[symbol]}?)" if symbol in _MISSPELT else ""
        raise ArgumentError(
            field, value, f"unknown operator {symbol!r}{guess}; valid are {' '.join(_OPERATORS)} and % N == M"
        )
    return _OPERATORS[symbol], text
