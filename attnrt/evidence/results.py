"""What `attnrt bench` found: rows, kept in a JSON file from which a run goes on, and shown as a table or as CSV."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnrt.errors import ArgumentError
from attnrt.evidence.calls import Call, flops, traffic
from attnrt.evidence.ceiling import Ceiling
from attnrt.evidence.measuring import Measured
from attnrt.evidence.store import replace
from attnrt.evidence.timing import Timing
from attnrt.policies.kinds import kind_of, place_of, short
from attnrt.policies.tuned import MachineEntry
from attnrt.request import AttentionRequest
from attnrt.selector import size

Direction = Literal["forward", "backward"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One kernel on one call in one direction. Without `ms`, `note` says why there is none."""

    call: Call
    kernel: str
    direction: Direction
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    host_us: float | None = Field(default=None, description="Until the call returns to Python, on a GPU.")
    tflops: float | None = None
    gbs: float | None = None
    share: float | None = Field(default=None, description="Of the measured ceiling: the roofline at this call.")
    bound: Literal["compute", "memory"] | None = Field(default=None, description="What the ceiling is made of.")
    peak_mib: float | None = Field(default=None, description="Most memory held beyond what was there before the call.")
    note: str | None = None

    @property
    def spread(self) -> float:
        if not self.ms or self.low_ms is None or self.high_ms is None:
            return 0.0
        return (self.high_ms - self.low_ms) / self.ms


class Results(_Strict):
    """A run, or several that went on with each other."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    date: str
    machine: MachineEntry
    ceiling: Ceiling | None = None
    rows: tuple[Row, ...] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def calls(self) -> list[Call]:
        """Each once, in the order they were measured."""
        return list(dict.fromkeys(row.call for row in self.rows))

    def with_rows(self, rows: list[Row]) -> Results:
        return self.model_copy(update={"rows": (*self.rows, *rows), "date": _now()})

    def fastest(self) -> dict[tuple[Call, str], str]:
        """Kernel by call and direction."""
        best: dict[tuple[Call, str], Row] = {}
        for row in self.rows:
            at = (row.call, row.direction)
            if row.ms is not None and (at not in best or row.ms < (best[at].ms or 0)):
                best[at] = row
        return {at: row.kernel for at, row in best.items()}

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True, exclude_defaults=False) + "\n"

    def to_csv(self) -> str:
        """One line a row; the call's sizes as columns of their own."""
        sizes = list(Call.model_fields)
        figures = [name for name in Row.model_fields if name != "call"]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*sizes, *figures])
        for row in self.rows:
            request = row.call.request()
            call = {**row.call.model_dump(), "heads_kv": request.heads_kv, "seqlen_kv": request.seqlen_kv}
            call |= {"head_dim_v": request.head_dim_v, "layout": request.layout}
            writer.writerow([_cell(call[n]) for n in sizes] + [_cell(getattr(row, n)) for n in figures])
        return out.getvalue()

    def save(self, file: Path) -> None:
        """Replace the file whole: a run that dies leaves the rows it had."""
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, self.to_json())


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_results(machine: MachineEntry) -> Results:
    return Results(date=_now(), machine=machine)


def load_results(file: Path, machine: MachineEntry) -> Results:
    """What a file has, to go on with; empty if there is none.

    Raises:
        ArgumentError: it is no results file, or of another machine or other versions.
    """
    if not file.exists():
        return new_results(machine)
    try:
        found = Results.model_validate_json(file.read_text("utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        said = str(error).partition("\n")[0]
        raise ArgumentError("--out", str(file), f"is no results file of this version ({said}); name another") from None
    if found.machine != machine:
        before, now = found.machine.model_dump(), machine.model_dump()
        differs = [f"{name} {before[name]} then, {now[name]} here" for name in now if before[name] != now[name]]
        said = f"was measured on another machine or versions ({'; '.join(differs)}); name another, or --fresh"
        raise ArgumentError("--out", str(file), said[:600])
    return found


def rows_of(call: Call, request: AttentionRequest, found: Measured, ceiling: Ceiling | None) -> list[Row]:
    """The rows of one measured call, in the order of the registry; what failed or was wrong says so."""
    rows = []
    for name in (*found.candidates, *(n for n in found.timings if n not in found.candidates)):
        if note := found.wrong.get(name) or found.failed.get(name):
            said = f"wrong: {note}" if name in found.wrong else note
            rows.append(Row(call=call, kernel=name, direction="forward", note=said))
            continue
        for direction, timing in found.timings.get(name, {}).items():
            peak = found.bytes.get(name, {}).get(direction)
            rows.append(_row(call, request, name, direction, timing, peak, ceiling))
    return rows


def _row(
    call: Call,
    request: AttentionRequest,
    kernel: str,
    direction: Any,
    timing: Timing,
    peak: int | None,
    ceiling: Ceiling | None,
) -> Row:
    work, moved = flops(request, direction), traffic(request, direction)
    least, bound = (
        ceiling.at(request.dtype, work, moved) if ceiling and request.dtype in ceiling.tflops else (None, None)
    )
    return Row(
        call=call,
        kernel=kernel,
        direction=direction,
        ms=timing.median * 1e3,
        low_ms=timing.low * 1e3,
        high_ms=timing.high * 1e3,
        samples=timing.samples,
        host_us=None if timing.host is None else timing.host * 1e6,
        tflops=work / timing.median / 1e12,
        gbs=moved / timing.median / 1e9,
        share=None if least is None else least / timing.median,
        bound=bound,
        peak_mib=None if peak is None else peak / 2**20,
    )


def title(call: Call) -> str:
    """A call for a column of a table: 'B1 32/8 S4k D128 causal'."""
    request = call.request()
    place, kind = place_of(request), kind_of(request)
    heads = f"{place.heads_q}" if place.heads_q == place.heads_kv else f"{place.heads_q}/{place.heads_kv}"
    words = [f for f in kind.features if f not in ("backward", "causal", "padding") or f == "causal"]
    dims = str(kind.head_dim) if kind.head_dim == kind.head_dim_v else f"{kind.head_dim}/{kind.head_dim_v}"
    span = [f"window {short(place.window)}"] if place.window else []
    words = [w for w in words if w != "window"] + span
    return " ".join([kind.dtype, f"B{place.batch}", f"H{heads}", f"S{place.lengths}", f"D{dims}", *words])


def table(results: Results) -> Any:
    """For rich: a block of rows for each call and direction, its fastest kernel in bold. Rates are TFLOP/s where the
    ceiling is the product of matrices, GB/s where it is the copy."""
    from rich.table import Table
    from rich.text import Text

    gpu = any(row.host_us is not None for row in results.rows)
    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("call", "", "kernel", "median", "spread", "rate", "ceiling", "peak", *(["host"] if gpu else [])):
        body.add_column(name, justify="left" if name in ("call", "", "kernel") else "right", no_wrap=True)
    fastest = results.fastest()
    order = {call: i for i, call in enumerate(results.calls())}
    previous: object = None
    for row in sorted(results.rows, key=lambda r: (order[r.call], r.direction == "backward")):
        at = (row.call, row.direction)
        first = [title(row.call), "fwd" if row.direction == "forward" else "bwd"] if at != previous else ["", ""]
        previous = at
        if row.ms is None:
            body.add_row(*first, row.kernel, Text(row.note or "", style="red", overflow="ellipsis"))
            continue
        cells = [
            row.kernel,
            duration(row.ms),
            f"{row.spread:.0%}",
            rate(row),
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.peak_mib is None else size(int(row.peak_mib * 2**20)),
            *([] if row.host_us is None else [f"{row.host_us:.0f} us"]),
        ]
        style = "bold green" if fastest.get(at) == row.kernel else ""
        body.add_row(*first, *(Text(cell, style=style) for cell in cells))
    return body


def rate(row: Row) -> str:
    """What bounds the call, in the unit that fits."""
    if row.bound == "memory":
        return f"{row.gbs:.4g} GB/s"
    tflops = row.tflops or 0.0
    return f"{tflops:.4g} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:.4g} GFLOP/s"


def duration(ms: float) -> str:
    """'12.3 us', '4.56 ms'."""
    return f"{ms * 1e3:.3g} us" if ms < 0.9995 else f"{ms:.4g} ms" if ms < 1000 else f"{ms / 1e3:.4g} s"
