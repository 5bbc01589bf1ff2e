"""The policies and advisories that ship with attnrt, read without pydantic: the first call of a process waits for them.

Nothing is checked here beyond what building the objects takes. A file that is not as it left us is read again by
`policies.loading`, which says what is wrong with it; tests read every one that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attnrt.advisories import Advisory
from attnrt.configs import parse
from attnrt.errors import ArgumentError
from attnrt.policies.base import REST
from attnrt.policies.conditions import compile_when
from attnrt.policies.preference import Line, PreferencePolicy

_ODD = (ArgumentError, AttributeError, KeyError, TypeError, ValueError)


def policy(
    file: str, text: str, known: Iterable[str], load: Callable[[str, Iterable[str]], PreferencePolicy]
) -> PreferencePolicy | None:
    """As `loading.read_policy`; None if that has to look at it."""
    try:
        entry = dict(parse(text))
        base = load(extends, known) if (extends := entry.pop("extends", None)) else None
        lines = tuple(_line(**line) for line in entry.pop("lines", ()))
        if base is not None:
            inherited = {"on_failure": base.on_failure, "deterministic": base.deterministic}
            entry, lines = inherited | entry, lines or base.lines
        read = PreferencePolicy(lines=lines, source=file, **entry)
    except _ODD:
        return None
    return None if read.names.difference(known, (REST,)) else read


def advisories(text: str) -> tuple[Advisory, ...] | None:
    """As `loading.read_advisories`; None if that has to look at them."""
    try:
        return tuple(_advisory(**entry) for entry in parse(text)["advisories"])
    except _ODD:
        return None


def _line(name: str, prefer: list[str], why: str, when: dict[str, Any] | None = None) -> Line:
    holds = compile_when(when) if when else None
    return Line(name=name, order=tuple(prefer), why=" ".join(why.split()), when=when or {}, holds=holds)


def _advisory(
    backends: list[str], packages: dict[str, str] | None = None, when: dict[str, Any] | None = None, **texts: Any
) -> Advisory:
    when = when or {}
    return Advisory(
        backends=tuple(backends), packages=tuple((packages or {}).items()), when=when, holds=compile_when(when), **texts
    )
