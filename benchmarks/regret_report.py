"""What comes of benchmarks/regret.py's rows: means by class and line, a table of calls, sentences for a policy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SDPA = "F.scaled_dot_product_attention"
POLICIES = ("default", "tuned", SDPA)
REPLAYED = " (replayed)"
"""By the device's time alone, as in a CUDA graph; on a GPU a call's own time is the host's where that is longer."""
EXAMPLES = 4
"""Calls that a line's sentence names."""
SHOWN = 3
"""Kernels that are named for a call, fastest first."""


@dataclass
class Row:
    """One judged call: milliseconds by kernel, and by policy what it chose and the regret."""

    grid: str
    call: str
    line: str
    ms: dict[str, float]
    """Whichever of device and host is slower."""
    device_ms: dict[str, float] = field(default_factory=dict)
    """On a GPU: the device's alone."""
    chosen: dict[str, str] = field(default_factory=dict)
    regret: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fastest(self, replayed: bool = False) -> list[tuple[str, float]]:
        """(kernel, ms), without PyTorch's own choice."""
        times = self.device_ms if replayed else self.ms
        return sorted(((n, ms) for n, ms in times.items() if n != SDPA), key=lambda entry: entry[1])


@dataclass(frozen=True)
class Summary:
    """Regret of one policy over some calls."""

    mean: float
    worst: float
    at: str
    calls: int

    def __str__(self) -> str:
        return f"{self.mean:6.3f}  {self.worst:7.3f}  {self.calls:4d}  {self.at}"


def summary(rows: Iterable[Row], policy: str) -> Summary | None:
    found = [(row.regret[policy], row.call) for row in rows if policy in row.regret]
    if not found:
        return None
    worst, at = max(found)
    return Summary(math.exp(sum(math.log(x) for x, _ in found) / len(found)), worst, at, len(found))


def summaries(rows: list[Row]) -> dict[str, dict[str, Summary]]:
    """By "all", by class and by line of the default policy, and then by policy."""
    groups: dict[str, list[Row]] = {"all": rows}
    for prefix, key in (("class", lambda r: r.grid), ("line", lambda r: r.line)):
        members = defaultdict(list)
        for row in rows:
            members[f"{prefix} {key(row)}"].append(row)
        groups |= members
    return {
        name: {
            policy: s
            for policy in (*POLICIES, *(p + REPLAYED for p in POLICIES))
            if (s := summary(members, policy)) is not None
        }
        for name, members in groups.items()
    }


def show(found: dict[str, dict[str, Summary]]) -> str:
    """A line for each policy in each group: geometric mean, worst and where."""
    width = max(map(len, found))
    lines = [f"{'':{width}}  {'policy':41}  {'mean':>6}  {'worst':>7}  {'n':>4}"]
    for name, by_policy in found.items():
        for i, (policy, one) in enumerate(by_policy.items()):
            lines.append(f"{name if not i else '':{width}}  {policy:41}  {one}")
    return "\n".join(lines)


def calls_table(rows: list[Row]) -> str:
    """For each call what the default policy chose, its regret, and the fastest kernels; on a GPU a second line for the
    device's time alone, where another order comes of it."""
    width = max((len(row.call) for row in rows), default=0)
    lines = []
    for row in rows:
        for suffix in ("", REPLAYED) if row.device_ms else ("",):
            fastest = row.fastest(bool(suffix))[:SHOWN]
            if suffix and [n for n, _ in fastest] == [n for n, _ in row.fastest()[:SHOWN]]:
                continue
            regret = [f"{row.regret.get(p + suffix, math.nan):5.2f}" for p in ("default", "tuned")]
            what = f"{row.call:{width}}" if not suffix else f"{'  replayed':{width}}"
            lines.append(f"{what}  {row.chosen['default']:16} {' '.join(regret)}  {figures(fastest)}")
        lines += [f"    {note}" for note in row.notes]
    return "\n".join((f"{'':{width}}  {'default chose':16} regret of default and tuned; fastest, ms", *lines))


def figures(fastest: Iterable[tuple[str, float]]) -> str:
    """'cudnn 0.531 ms, triton.hopper 0.56, ...'."""
    return ", ".join(f"{name} {ms:.3g}{'' if i else ' ms'}" for i, (name, ms) in enumerate(fastest))


def result_of(rows: list[Row], **facts: Any) -> dict[str, Any]:
    """What is kept as JSON."""
    found = summaries(rows) if rows else {}
    return {
        "schema": 2,
        **facts,
        "summary": {name: {p: asdict(s) for p, s in by.items()} for name, by in found.items()},
        "rows": [asdict(r) for r in rows],
    }


def evidence(result: Mapping[str, Any]) -> str:
    """For each line of the default policy that a call fell on, the sentence that its `why` may have."""
    machine = result["machine"]
    packages = machine["packages"]
    here = ", ".join(f"{n} {packages[n]}" for n in ("torch", "cudnn", "triton") if packages.get(n))
    rows = [Row(**row) for row in result["rows"]]
    paragraphs = []
    for line in dict.fromkeys(row.line for row in rows):
        members = [row for row in rows if row.line == line]
        calls = "; ".join(_sentence(row) for row in _examples(members))
        regret = "; ".join(
            f"{said}{one.mean:.3f} over {one.calls} calls, worst {one.worst:.2f} at {one.at}"
            for said, policy in (("", "default"), ("in a CUDA graph ", f"default{REPLAYED}"))
            if (one := summary(members, policy)) is not None
        )
        on = f"{machine['device']}, {here}, {result['date'][:10]}"
        cost = f"Over the fastest kernel, this order's choice took {regret} (benchmarks/regret.py)."
        paragraphs.append(f"{line.removeprefix('default: ')}:\n  {on}, ms: {calls}. {cost}")
    return "\n\n".join(paragraphs)


def _examples(rows: list[Row]) -> list[Row]:
    """The one that the default policy cost most at, and the last of each class, which is its longest call."""
    costly = [row for row in rows if row.regret.get("default", 1.0) > 1]
    found = sorted(costly, key=lambda row: -row.regret["default"])[:1]
    longest = {row.grid: row for row in rows}
    found += [row for row in longest.values() if row not in found]
    return found[:EXAMPLES]


def _sentence(row: Row) -> str:
    """A call and its fastest kernels by the device's time, with the host's where another kernel is first by it."""
    said = f"{row.call.removeprefix('bf16 ')}: "
    if not row.device_ms:
        return said + figures(row.fastest()[:SHOWN])
    fastest = row.fastest(replayed=True)[:SHOWN]
    said += figures(fastest)
    (name, ms), *_ = row.fastest()
    return said + (f" (by the host {name} {ms:.3g})" if fastest and name != fastest[0][0] else "")
