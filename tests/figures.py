"""Tuned policies with figures made up, to ask what is chosen by them; and backends that give wrong results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import attnrt
from attnrt import registry
from attnrt.environment import Environment
from attnrt.evidence.calls import Call
from attnrt.evidence.machine import machine_entry
from attnrt.policies.kinds import kind_of, place_of
from attnrt.policies.tuned import CallEntry, KindEntry, TunedFile, merged, render

DATE = "2026-11-20T12:00:00+00:00"


def entry(
    call: Call,
    ms: Mapping[str, float],
    wrong: Mapping[str, str] | None = None,
    date: str = DATE,
    host_ms: Mapping[str, float] | None = None,
) -> KindEntry:
    """One call's figures."""
    request = call.request()
    kind = kind_of(request)._asdict()
    place = place_of(request)._asdict()
    rest = {"spread": dict.fromkeys(ms, 0.01), "wrong": dict(wrong or {}), "host_ms": dict(host_ms or {})}
    found = CallEntry(**place, ms=dict(ms), date=date, **rest)
    return KindEntry(**{**kind, "features": list(kind["features"])}, calls=[found])


def content(*entries: KindEntry, environment: Environment | None = None, **changes: Any) -> TunedFile:
    """A file with these, measured here or on `environment`."""
    machine = machine_entry(environment or Environment.detect("cpu"))
    machine = machine.model_copy(update={n: changes.pop(n) for n in list(changes) if n in type(machine).model_fields})
    made = TunedFile(tuned=1, margin=0.03, measured_on=machine, kinds=merged([], entries))
    return made.model_copy(update=changes)


def write(cache_dir: Path, *entries: KindEntry, name: str = "here.yaml", **changes: Any) -> Path:
    """Put a tuned policy where it is found."""
    file = cache_dir / "tuned" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(content(*entries, **changes)))
    return file


class Planted(attnrt.Backend):
    """The reference under another name, spoiled by its subclasses; takes what they say."""

    name, title, prefix = "planted", "the planted backend", "PLANTED"

    def prepare(self, request: Any, environment: Any) -> Any:
        return registry.backends()["reference"].prepare(request, environment)


class SlightlyWrong(Planted):
    """Every output 0.1% too large."""

    def prepare(self, request: Any, environment: Any) -> Any:
        right = super().prepare(request, environment)

        def run(*tensors: Any) -> Any:
            found = right(*tensors)
            return (found[0] * 1.001, found[1]) if isinstance(found, tuple) else found * 1.001

        return run


class WrongLastHead(Planted):
    """The last head of every output is another head's."""

    def prepare(self, request: Any, environment: Any) -> Any:
        right = super().prepare(request, environment)
        axis = {"bhsd": 1, "bshd": 2, "sbhd": 2, "thd": 1}[request.layout]

        def run(*tensors: Any) -> Any:
            found = right(*tensors)
            out = found[0] if isinstance(found, tuple) else found
            out = out.clone()
            out.select(axis, -1).copy_(out.select(axis, 0))
            return (out, found[1]) if isinstance(found, tuple) else out

        return run


class WrongGradient(Planted):
    """The gradient of k is 2% too large."""

    def prepare(self, request: Any, environment: Any) -> Any:
        right = super().prepare(request, environment)

        def run(q: Tensor, k: Tensor, v: Tensor, operands: Any) -> Any:
            return right(q, k + (k - k.detach()) * 0.02, v, operands)

        return run


class Fails(Planted):
    """Raises when it runs."""

    def prepare(self, request: Any, environment: Any) -> Any:
        def run(*tensors: Any) -> Any:
            raise RuntimeError("no such kernel image")

        return run
