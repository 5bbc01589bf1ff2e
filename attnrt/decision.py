"""A choice and everything that led to it: the object that reports, errors and JSON are views of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnrt import registry
from attnrt.backends.base import Reason
from attnrt.environment import Environment
from attnrt.request import AttentionRequest
from attnrt.settings import Override

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnrt.advisories import Advisory


@dataclass(frozen=True)
class Verdict:
    """What one backend can do with a call.

    Attributes:
        reasons: every rule that refuses it; empty if it is eligible.
        kernel: which of its kernels would run ("flash_cpu"), None if it has only one or none is eligible.
        fused: it never holds the whole score matrix.
        bytes: estimated peak extra memory of the call: outputs, gradients and workspace. quadratic_bytes: how much of
            it grows with Sq * Skv.
        rank: place in the order of preference, 0 first; None if the policy does not list it.
        passed_over: why the backend's better kernels do not serve, where it has several.
        notes: copies and other things it does to serve the call. warnings: known defects that may touch it.
    """

    backend: str
    eligible: bool
    reasons: tuple[Reason, ...] = ()
    kernel: str | None = None
    fused: bool = True
    bytes: int = 0
    quadratic_bytes: int = 0
    rank: int | None = None
    passed_over: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[Advisory, ...] = ()

    @property
    def label(self) -> str:
        """'torch[flash_cpu]', or the bare name."""
        return f"{self.backend}[{self.kernel}]" if self.kernel else self.backend

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "kernel": self.kernel,
            "eligible": self.eligible,
            "fused": self.fused,
            "bytes": self.bytes,
            "quadratic_bytes": self.quadratic_bytes,
            "rank": self.rank,
            "reasons": [r._asdict() for r in self.reasons],
            "passed_over": [r._asdict() for r in self.passed_over],
            "notes": list(self.notes),
            "warnings": [
                {"id": a.id, "effect": a.effect, "remedy": a.remedy, "source": a.source} for a in self.warnings
            ],
        }


class Verdicts(Mapping[str, Verdict]):
    """Verdicts by backend, in order of rank. A family's name gives the verdict of its best member."""

    def __init__(self, verdicts: tuple[Verdict, ...]) -> None:
        self._by_name = {v.backend: v for v in sorted(verdicts, key=lambda v: (v.rank is None, v.rank or 0))}

    def __getitem__(self, name: str) -> Verdict:
        if name in self._by_name:
            return self._by_name[name]
        members = [self._by_name[n] for n in registry.families().get(name, ()) if n in self._by_name]
        if not members:
            raise KeyError(name)
        ranked = sorted(members, key=lambda v: (not v.eligible, v.rank is None, v.rank or 0))
        return ranked[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


@dataclass(frozen=True)
class Decision:
    """The choice for one call on one machine. `print` it, or use `to_json()` or `to_markdown()`.

    Attributes:
        backend: the winner's name, None if nothing (or not the forced backend) can serve the call.
        why: one sentence naming the policy line or the override that made it win.
        verdicts: every backend's `Verdict`, by name.
        policy, line, evidence: the policy, which of its lines ranked the backends, and what that line rests on.
        overrides: what the user asked for, and what overrode what.
        notices: what the policy left out of account, and why: figures of another version, a file that is damaged.
        simulated: made for an `Environment` written by hand, where nothing can run.
    """

    request: AttentionRequest
    environment: Environment
    backend: str | None
    why: str
    verdicts: Verdicts
    policy: str
    line: str
    evidence: str
    on_failure: str
    forced: str | None = None
    overrides: tuple[Override, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def winner(self) -> Verdict | None:
        return self.verdicts[self.backend] if self.backend else None

    @property
    def kernel(self) -> str | None:
        """Which of the winner's kernels, such as "flash_cpu" of "torch"."""
        return self.winner.kernel if self.winner else None

    @property
    def label(self) -> str:
        """'torch[flash_cpu]', the bare name, or 'none'."""
        return self.winner.label if self.winner else "none"

    @property
    def simulated(self) -> bool:
        return self.environment.simulated

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in docs/report.schema.json."""
        found = {
            "schema": 1,
            "backend": self.backend,
            "kernel": self.kernel,
            "why": self.why,
            "policy": self.policy,
            "line": self.line,
            "evidence": self.evidence,
            "on_failure": self.on_failure,
            "forced": self.forced,
            "request": self.request.to_dict(),
            "environment": self.environment.to_dict(),
            "overrides": [
                {"what": o.what, "value": o.value, "source": o.source, "beaten_by": o.beaten_by} for o in self.overrides
            ],
            "verdicts": [v.to_dict() for v in self.verdicts.values()],
        }
        return found | {"notices": list(self.notices)} if self.notices else found

    def to_json(self, indent: int | None = 2) -> str:
        """The whole decision as JSON, of the schema in docs/report.schema.json."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """For a bug report."""
        from attnrt.report import markdown

        return markdown(self)

    def __str__(self) -> str:
        import sys

        from attnrt.report import text

        return text(self, sys.stdout)

    def __rich__(self) -> RenderableType:
        from attnrt.report import renderable

        return renderable(self)
