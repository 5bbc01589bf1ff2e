"""What choosing costs: the time of the kernel that a policy chose over that of the fastest that could have served.

    PYTHONPATH=. python benchmarks/regret.py [--device cpu|cuda] [--quick | --full] [--out FOLDER]

Two sets of calls with no call in common: one is tuned on, as `attnrt tune` does, into a folder of its own; on the other
every kernel that can serve is timed in turn with the others, and with F.scaled_dot_product_attention left to its own
choice. Regret is the ratio of medians, forward and backward together; 1 is the best that could be chosen. Geometric
mean and worst, in all, by class of call, and by line of the default policy, which is what its evidence should say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt import registry, runtime
from attnrt.environment import Environment
from attnrt.evidence.calls import Call, tensors
from attnrt.evidence.machine import machine_entry
from attnrt.evidence.measuring import measure
from attnrt.evidence.results import title
from attnrt.evidence.store import measured_policy, read
from attnrt.evidence.timing import clock_for
from attnrt.evidence.tuning import SECONDS, tune
from attnrt.operands import Operands
from attnrt.policies.preference import load_policy
from attnrt.request import AttentionRequest

SDPA = "F.scaled_dot_product_attention"
POLICIES = ("default", "tuned", SDPA)
REPLAYED = " (replayed)"
"""By the device's time alone, as in a CUDA graph; on a GPU a call's own time is the host's where that is longer."""


@dataclass(frozen=True)
class Grid:
    """Calls of one class: those to tune on, and those to judge by."""

    name: str
    learned: tuple[Call, ...]
    judged: tuple[Call, ...]


@dataclass
class Row:
    """One judged call: milliseconds by kernel, and by policy what it chose and the regret."""

    grid: str
    call: str
    line: str
    ms: dict[str, float]
    device_ms: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    regret: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# ---- calls


def lengths(
    sizes: dict[str, Any], name: str, learned: Iterable[int], judged: Iterable[int], key: str = "seqlen_q"
) -> Grid:
    def calls(values: Iterable[int]) -> tuple[Call, ...]:
        return tuple(Call(**{**sizes, key: n}) for n in values)

    return Grid(name, calls(learned), calls(judged))


def cpu_grids(quick: bool) -> Iterator[Grid]:
    for dtype in ("fp32", "bf16"):
        for head_dim in (64,) if quick else (64, 128):
            heads = {"heads_q": 8, "heads_kv": 2, "head_dim": head_dim, "dtype": dtype, "layout": "bhsd"}
            said = f"{dtype} D{head_dim}"
            for causal in (True, False):
                sizes = {**heads, "causal": causal}
                kind = f"{said} {'causal' if causal else 'full'}"
                yield lengths(sizes, f"prefill {kind}", (32, 128, 512), (64, 96, 256, 384))
                yield lengths({**sizes, "training": True}, f"training {kind}", (32, 64, 128, 512), (48, 96, 256, 384))
            for batch in (1, 8):
                decode = {**heads, "batch": batch, "seqlen_q": 1}
                found = lengths(decode, f"decode {said}", (256, 1024, 4096, 8192), (512, 2048, 6144), "seqlen_kv")
                yield found


def cuda_grids(quick: bool, full: bool) -> Iterator[Grid]:
    gqa: dict[str, Any] = {"heads_q": 32, "heads_kv": 8, "head_dim": 128}
    mha: dict[str, Any] = {"heads_q": 16, "heads_kv": 16, "head_dim": 64, "batch": 4}
    yield lengths({**gqa, "causal": True}, "prefill GQA D128 causal", (512, 2048, 8192), (1024, 4096))
    yield lengths(
        {**gqa, "causal": True, "training": True}, "training GQA D128 causal", (512, 2048, 8192), (1024, 4096)
    )
    for batch, judged in ((1, 4096), (16, 16384)):
        found = lengths(
            {**gqa, "batch": batch, "seqlen_q": 1}, "decode GQA D128", (1024, 8192, 65536), (judged, 32768), "seqlen_kv"
        )
        yield found
    if quick:
        return
    yield lengths({**mha, "causal": True, "training": True}, "training MHA D64 causal", (512, 4096), (1024, 2048))
    yield lengths({**mha}, "prefill MHA D64 full", (256, 1024, 4096), (512, 2048))
    wide = {**gqa, "causal": True, "window": (1023, 0)}
    yield lengths(wide, "prefill GQA D128 window 1k", (4096, 16384), (8192,))
    if not full:
        return
    yield lengths({**gqa, "batch": 4}, "prefill GQA D128 full", (512, 2048, 8192), (1024, 4096))
    yield lengths({**gqa, "causal": True}, "prefill GQA D128 causal, long", (16384, 65536), (32768,))
    yield lengths(
        {**gqa, "causal": True, "training": True, "deterministic": True},
        "training deterministic",
        (1024, 4096),
        (2048,),
    )
    large = {"heads_q": 16, "heads_kv": 8, "head_dim": 256, "causal": True}
    yield lengths({**large, "training": True}, "training D256 causal", (1024, 4096), (2048,))
    yield lengths({**large, "softcap": 50.0}, "prefill D256 softcap", (1024, 4096), (2048,))
    packed = {**gqa, "causal": True, "packed": True, "training": True, "batch": 8}
    yield lengths(packed, "training packed D128 causal", (512, 2048), (1024,))
    mla = {"heads_q": 128, "head_dim": 192, "head_dim_v": 128, "causal": True}
    yield lengths(mla, "prefill MLA 192/128", (1024, 4096), (2048,))
    yield lengths({**mha, "bias": True}, "prefill MHA D64 bias", (512, 2048), (1024,))


# ---- measuring


def sdpa(request: AttentionRequest) -> Callable[..., Tensor] | None:
    """PyTorch's own choice for the call; None where its arguments cannot say it."""
    r = request
    if r.windowed or r.alibi or r.sinks or r.softcap or r.packed or r.padded or r.needs_lse or (r.mask and r.bias):
        return None
    if r.is_causal and (r.alignment == "bottom_right" or r.mask or r.bias):
        return None
    axes = {"bhsd": None, "bshd": (1, 2), "sbhd": None}[r.layout]
    if r.layout == "sbhd":
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Tensor:
        if axes is not None:
            q, k, v = (t.transpose(*axes) for t in (q, k, v))
        mask = operands.mask if operands.mask is not None else operands.bias
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, r.is_causal, scale=r.scale, enable_gqa=r.group > 1)
        return out if axes is None else out.transpose(*axes)

    return run


def judge(
    grid: Grid, call: Call, environment: Environment, policies: dict[str, Any], seconds: float, clock: Any
) -> Row:
    given = tensors(call, environment.device_type)
    extra = sdpa(given.request)
    found = measure(
        given,
        environment,
        runtime.settings(None, "default"),
        seconds=seconds,
        clock=clock,
        check=False,
        extra=None if extra is None else {SDPA: extra},
    )
    times = found.seconds()
    decisions = {n: runtime.choose(given.request, environment, runtime.settings(None, p)) for n, p in policies.items()}
    row = Row(grid.name, title(call), decisions["default"].line, {n: s * 1e3 for n, s in times.items()})
    row.notes = [f"{n}: {said}" for n, said in found.failed.items()]
    best = min((s for n, s in times.items() if n != SDPA), default=math.nan)
    for policy, decision in decisions.items():
        row.chosen[policy] = f"{decision.backend}.{decision.kernel}" if decision.kernel else str(decision.backend)
        if row.chosen[policy] in times:
            row.regret[policy] = times[row.chosen[policy]] / best
    if SDPA in times:
        row.chosen[SDPA], row.regret[SDPA] = SDPA, times[SDPA] / best
    if found.host_seconds():
        _replayed(row, given.request, environment, policies, found.device_seconds())
    return row


def _replayed(
    row: Row, request: AttentionRequest, environment: Environment, policies: dict[str, Any], times: dict[str, float]
) -> None:
    """The same by the device's time: the static choice as it is, the tuned one as it would be in a graph."""
    row.device_ms = {n: s * 1e3 for n, s in times.items()}
    best = min(s for n, s in times.items() if n != SDPA)
    order = policies["tuned"].rank(replace(request, capturing=True), environment).order
    chosen = {**row.chosen, "tuned": next((n for n in order if n in times), row.chosen["tuned"])}
    for policy, name in chosen.items():
        if name in times:
            row.chosen[policy + REPLAYED], row.regret[policy + REPLAYED] = name, times[name] / best


# ---- what comes of it


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
    width = max(map(len, found))
    lines = [f"{'':{width}}  {'policy':41}  {'mean':>6}  {'worst':>7}  {'n':>4}"]
    for name, by_policy in found.items():
        for i, (policy, one) in enumerate(by_policy.items()):
            lines.append(f"{name if not i else '':{width}}  {policy:41}  {one}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the commonest classes only")
    parser.add_argument("--full", action="store_true", help="every class; on a GPU about ten minutes")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 is steadiest on a shared machine")
    parser.add_argument("--seconds", type=float, help="for timing one call, in each direction")
    parser.add_argument("--out", type=Path, help="folder for regret.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    environment = Environment.detect(options.device)
    cpu = environment.device_type == "cpu"
    grids = list(cpu_grids(options.quick) if cpu else cuda_grids(options.quick, options.full))
    seconds = options.seconds or SECONDS[environment.device_type]
    clock = clock_for(options.device)
    learned = [call for grid in grids for call in grid.learned]
    judged = [(grid, call) for grid in grids for call in grid.judged]
    assert not {c.request() for c in learned} & {c.request() for _, c in judged}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "regret.yaml"
        done = tune(learned, file, environment, runtime.settings(None, "default"), budget=1e9, seconds=seconds)
        static = load_policy("default", registry.rankable())
        policies = {"default": static, "tuned": measured_policy([read(file).table(str(file))], static, automatic=False)}
        evidence = file.read_text()
    wrong = {f"{n} at {title(c)}": said for c, m in done.measured for n, said in m.wrong.items()}
    print(
        f"tuned on {len(done.measured)} calls in {done.seconds:.0f} s",
        *(f"WRONG {n}: {s}" for n, s in wrong.items()),
        sep="\n",
    )
    rows = []
    for grid, call in judged:
        row = judge(grid, call, environment, policies, seconds, clock)
        rows.append(row)
        chosen = "  ".join(
            f"{p[:7]} {row.chosen[p]} {row.regret.get(p, math.nan):.3f}" for p in POLICIES if p in row.chosen
        )
        print(f"{row.call:44} {chosen}", *(f"    {n}" for n in row.notes), sep="\n", flush=True)
    found = summaries(rows)
    entry = machine_entry(environment)
    print(
        f"\n{entry.device}, torch {torch.__version__}, {len(rows)} calls, {time.monotonic() - started:.0f} s",
        show(found),
        sep="\n",
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {
            "schema": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv[1:],
            "machine": entry.model_dump(),
            "summary": {name: {p: asdict(s) for p, s in by.items()} for name, by in found.items()},
            "wrong": wrong,
            "rows": [asdict(r) for r in rows],
        }
        (options.out / "regret.json").write_text(json.dumps(result, indent=1))
        (options.out / "tuned.yaml").write_text(evidence)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
