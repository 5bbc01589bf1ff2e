"""The file of a tuned policy: what it holds, read without trust, and written for people to read.

    tuned: 1                     version of this format
    extends: default             the static policy that serves elsewhere, and whose preference stands within the margin
    margin: 0.03
    measured_on: {device: ...}   the evidence: device, driver, versions
    kinds:                       calls by what makes them comparable, each with its figures
      - {dtype: bf16, head_dim: 128, head_dim_v: 128, features: [backward, causal], calls: [...]}
    end: true                    without it the file was cut short

Times are medians in milliseconds on the device, of the forward and, in training, the backward with it. On a GPU,
host_ms is until the call has returned to Python: where it is longer it is what a long row of calls takes, unless a CUDA
graph replays it. Spreads are the distance between the quartiles over the median.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attnrt.errors import PolicyError, shown
from attnrt.policies.kinds import Kind, Place
from attnrt.policies.measured import Machine, Point, Table
from attnrt.policies.plain import plain_data

VERSION = 1
BYTES = 2 << 20
"""A larger file is refused unread."""
CALLS = 4096
DEPTH, NODES = 10, 250_000
MARK = re.compile(r"^tuned:", re.MULTILINE)
"""What tells a tuned policy from a written one."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64})?$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,400}$")]
Size = Annotated[int, Field(ge=0, le=1 << 40)]
Milliseconds = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]


class Entry(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MachineEntry(Entry):
    device: Text
    arch: Text
    sm_count: Size | None = None
    threads: Size | None = None
    attnrt: Text
    driver: Text | None = None
    cuda: Text | None = None
    python: Text | None = None
    packages: dict[Text, Text | None]

    def machine(self) -> Machine:
        return Machine(
            device=self.device,
            arch=self.arch,
            sm_count=self.sm_count,
            threads=self.threads,
            attnrt=self.attnrt,
            packages=tuple(self.packages.items()),
            driver=self.driver,
            cuda=self.cuda,
        )


class CallEntry(Entry):
    """One measured call."""

    batch: Size
    heads_q: Size
    heads_kv: Size
    seqlen_q: Size
    seqlen_kv: Size
    layout: Name
    window: Size = 0
    ms: dict[Name, Milliseconds]
    host_ms: dict[Name, Milliseconds] = {}
    spread: dict[Name, Share] = {}
    wrong: dict[Name, Text] = {}
    date: Text

    @property
    def place(self) -> Place:
        return Place(self.batch, self.heads_q, self.heads_kv, self.seqlen_q, self.seqlen_kv, self.layout, self.window)


class KindEntry(Entry):
    dtype: Name
    head_dim: Size
    head_dim_v: Size
    features: list[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}(\[[bhqk]{0,4}\])?$")]]
    calls: list[CallEntry]

    @property
    def kind(self) -> Kind:
        return Kind(self.dtype, self.head_dim, self.head_dim_v, tuple(sorted(self.features)))


class TunedFile(Entry):
    tuned: Literal[1]
    description: Text = ""
    extends: Name = "default"
    margin: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    measured_on: MachineEntry
    kinds: list[KindEntry]
    end: Literal[True] = True

    def table(self, file: str) -> Table:
        points: dict[Kind, list[Point]] = {}
        for entry in self.kinds:
            for call in entry.calls:
                device = {name: ms * 1e-3 for name, ms in call.ms.items()}
                host = {name: ms * 1e-3 for name, ms in call.host_ms.items() if ms > 0}
                points.setdefault(entry.kind, []).append(Point(call.place, device, call.wrong, call.date, host))
        date = max((c.date for k in self.kinds for c in k.calls), default="")
        kept = {kind: tuple(found) for kind, found in points.items()}
        return Table(file, self.measured_on.machine(), self.margin, date, kept)


def parse(file: str, text: str) -> TunedFile:
    """What a file says.

    Raises:
        PolicyError: it is too large, truncated, no YAML that we read, of another version, or has something else in it.
    """
    if len(text.encode("utf-8", "surrogatepass")) > BYTES:
        raise PolicyError(file, None, f"is larger than the {BYTES} bytes that a tuned policy may have")
    # The C parser where there is one: these files are long.
    data = plain_data(file, text, partial(_check, file), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(data, dict) or "tuned" not in data:
        raise PolicyError(file, None, "is no tuned policy: the key 'tuned' is missing")
    if data["tuned"] != VERSION or isinstance(data["tuned"], bool):
        said = f"has version {shown(data['tuned'])} of the format; this attnrt reads version {VERSION}"
        raise PolicyError(file, None, f"{said}: run `attnrt tune` again")
    if data.get("end") is not True:
        raise PolicyError(file, None, "is cut short: its last line, 'end: true', is missing")
    try:
        found = TunedFile.model_validate(data)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        given = "" if first["type"] == "missing" else f", not {shown(first['input'])}"
        raise PolicyError(file, None, f"{at}: {first['msg'].lower()}{given}") from None
    if (count := sum(len(k.calls) for k in found.kinds)) > CALLS:
        raise PolicyError(file, None, f"has {count} calls, and {CALLS} are allowed")
    return found


def _check(file: str, root: yaml.Node) -> None:
    """No aliases, no great depth, no key that is no text."""
    seen: set[int] = set()
    pending = [(root, 0)]
    while pending:
        node, depth = pending.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise PolicyError(file, line, "aliases are not read")
        seen.add(id(node))
        if depth > DEPTH or len(seen) > NODES:
            raise PolicyError(file, line, "is nested deeper, or holds more, than a tuned policy does")
        if isinstance(node, yaml.SequenceNode):
            pending += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if any(key.tag != "tag:yaml.org,2002:str" for key, _ in node.value) or len(set(keys)) < len(keys):
                raise PolicyError(file, line, "has a key that is not plain text, or one twice")
            pending += [(value, depth + 1) for _, value in node.value]


HEADER = """\
# Measured by `attnrt tune`, and used in place of the static policy on the machine below. Delete it to be rid of it, or
# set ATTNRT_POLICY=default. ms: medians on the device, fastest first; host_ms: until the call returns; spread: distance
# between the quartiles over the median.
"""


def render(content: TunedFile) -> str:
    """The file's text: one line a call."""
    data = content.model_dump(exclude={"end"})
    kinds = data.pop("kinds")
    lines = [HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "kinds:"]
    for kind in kinds:
        calls = kind.pop("calls")
        entries = [f"{name}: {_flow(value)}" for name, value in kind.items()]
        lines.append("  - " + "\n    ".join((*entries, "calls:")))
        lines += [f"      - {_flow(_shortened(call))}" for call in calls]
    return "\n".join((*lines, "end: true")) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return str(text).removesuffix("\n").removesuffix("\n...")


def _shortened(call: dict[str, Any]) -> dict[str, Any]:
    """Figures with four digits, fastest first, without what is empty."""
    call["ms"] = {n: float(f"{ms:.4g}") for n, ms in sorted(call["ms"].items(), key=lambda item: item[1])}
    call["host_ms"] = {n: float(f"{call['host_ms'][n]:.3g}") for n in call["ms"] if n in call["host_ms"]}
    call["spread"] = {n: float(f"{call['spread'][n]:.2g}") for n in call["ms"] if n in call["spread"]}
    return {name: value for name, value in call.items() if value not in ({}, 0) or name in ("ms", "batch")}


def merged(older: Iterable[KindEntry], newer: Iterable[KindEntry]) -> list[KindEntry]:
    """Both, and of a call that is in both the one with the later date."""
    found: dict[Kind, dict[Place, CallEntry]] = {}
    for entry in (*older, *newer):
        calls = found.setdefault(entry.kind, {})
        for call in entry.calls:
            if call.place not in calls or calls[call.place].date <= call.date:
                calls[call.place] = call
    result = []
    for kind in sorted(found):
        calls_ = sorted(found[kind].values(), key=lambda c: c.place)
        result.append(KindEntry(**kind._asdict() | {"features": list(kind.features)}, calls=calls_))
    return result
