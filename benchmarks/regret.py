"""What choosing costs: the time of the kernel that a policy chose over that of the fastest that could have served.

    PYTHONPATH=. python benchmarks/regret.py [--device cpu|cuda] [--quick] [--seconds 200] [--out FOLDER]
    PYTHONPATH=. python benchmarks/regret.py --evidence FOLDER/regret.json

Two sets of calls with no call in common: one is tuned on, as `attnrt tune` does, into a file of its own; on the other
every kernel that can serve is timed in turn with the others, and with F.scaled_dot_product_attention left to its own
choice. Regret is the ratio of medians, forward and backward together; 1 is the best that could be chosen. Geometric
mean and worst, in all, by class of call, and by line of the default policy, which is what its evidence should say:
--evidence prints the sentences. Class by class, the commonest first, so that a run that is cut short has those whole;
what is known is written after each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from regret_calls import Grid, cpu_grids, cuda_grids
from regret_report import REPLAYED, SDPA, Row, calls_table, evidence, result_of, show, summaries
from torch import Tensor

from attnrt import registry, runtime
from attnrt.environment import Environment
from attnrt.errors import DeviceLost, PolicyError
from attnrt.evidence.calls import Call, device_of, tensors
from attnrt.evidence.machine import machine_entry
from attnrt.evidence.measuring import Measured, measure
from attnrt.evidence.results import title
from attnrt.evidence.store import measured_policy, read
from attnrt.evidence.timing import Clock, clock_for
from attnrt.evidence.trials import Trials, try_calls
from attnrt.evidence.tuning import SECONDS, coarse_first, expected_seconds, tune, worthwhile
from attnrt.operands import Operands
from attnrt.policies.base import Policy
from attnrt.policies.preference import load_policy
from attnrt.request import AttentionRequest

COMPILING = (0.4, 150.0)
"""For first calls: this part of --seconds, and no more than so many."""
JUDGING = 2.0
"""Times as long as for tuning, a call is timed that is judged by."""


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
        out = F.scaled_dot_product_attention(
            q, k, v, mask, r.dropout_p, r.is_causal, scale=r.scale, enable_gqa=r.group > 1
        )
        return out if axes is None else out.transpose(*axes)

    return run


def label(call: Call) -> str:
    return title(call) + " training" * call.training


class Run:
    """One run: what it may take, what it has."""

    def __init__(self, environment: Environment, seconds: float, sample: float | None) -> None:
        self.environment, self.cpu = environment, environment.device_type == "cpu"
        self.started, self.seconds = time.monotonic(), seconds
        self.sample = sample or SECONDS[environment.device_type]
        self.rows: list[Row] = []
        self.wrong: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.left: list[str] = []
        self.learned = 0
        self.trials = Trials()
        self.static: Policy = load_policy("default", registry.rankable())

    def remaining(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def compile(self, grids: list[Grid]) -> None:
        calls = coarse_first(call for grid in grids for call in (*grid.learned, *grid.judged))
        print(f"--- first calls of what compiles, {len(calls)} calls", flush=True)
        limit = min(COMPILING[0] * self.seconds, COMPILING[1])
        self.trials = try_calls(calls, self.environment, runtime.settings(None, "default"), seconds=limit)
        if self.trials.processes:
            print(f"compiled: {self.trials}", flush=True)
        faults = {(t.kernel, t.said): t for t in self.trials.trials if t.outcome in ("failed", "died", "hung")}
        for trial in faults.values():
            print(f"    {trial.outcome} {trial.kernel} at {label(trial.call)}: {trial.said}")

    def grid(self, grid: Grid, file: Path, clock: Clock) -> None:
        """Tune on a class's calls, and judge by its others."""
        done = tune(
            grid.learned,
            file,
            self.environment,
            runtime.settings(None, "default"),
            budget=max(0.0, self.remaining()),
            seconds=self.sample,
            trials=self.trials,
        )
        self.learned += len(done.measured)
        for call, found in done.measured:
            self._note(call, found)
        self.failed |= {label(call): said for call, said in done.refused.items()}
        self.left += [f"learning {label(call)}" for call in done.left]
        if done.lost is not None:
            raise DeviceLost(done.lost)
        policies = {"default": self.static, "tuned": self._tuned(file)}
        for call in grid.judged:
            if expected_seconds(call.request(), self.environment) > self.remaining():
                self.left.append(f"judging {label(call)}")
                continue
            try:
                self.rows.append(self._judge(grid, call, policies, clock))
            except torch.OutOfMemoryError as error:
                self.failed[label(call)] = str(error).partition("\n")[0]
                continue
            print(calls_table(self.rows[-1:]).partition("\n")[2], flush=True)

    def _note(self, call: Call, found: Measured) -> None:
        self.wrong |= {f"{name} at {label(call)}": said for name, said in found.wrong.items()}
        self.failed |= {f"{name} at {label(call)}": said for name, said in found.failed.items()}

    def _tuned(self, file: Path) -> Policy:
        try:
            return measured_policy([read(file).table(str(file))], self.static, automatic=False)
        except PolicyError:  # nothing could be measured yet
            return self.static

    def _judge(self, grid: Grid, call: Call, policies: dict[str, Policy], clock: Clock) -> Row:
        given = tensors(call, device_of(self.environment))
        own = sdpa(given.request)
        found = measure(
            given,
            self.environment,
            runtime.settings(None, "default"),
            seconds=JUDGING * self.sample,
            clock=clock,
            only=worthwhile(given.request),
            check=not self.cpu,  # it takes no time there, and a wrong kernel is not the best
            extra=None if own is None else {SDPA: own},
            against=self.trials.against(call),
        )
        self._note(call, found)
        return judged(grid.name, call, given.request, self.environment, policies, found)


def judged(
    name: str,
    call: Call,
    request: AttentionRequest,
    environment: Environment,
    policies: dict[str, Policy],
    found: Measured,
) -> Row:
    """What each policy chooses for the request, beside what was measured."""
    times = found.seconds()
    decisions = {n: runtime.choose(request, environment, runtime.settings(None, p)) for n, p in policies.items()}
    row = Row(name, label(call), decisions["default"].line, {n: s * 1e3 for n, s in times.items()})
    row.notes = [f"{n}: {said}" for n, said in (found.failed | found.wrong).items()]
    best = min((s for n, s in times.items() if n != SDPA), default=math.nan)
    for policy, decision in decisions.items():
        row.chosen[policy] = f"{decision.backend}.{decision.kernel}" if decision.kernel else str(decision.backend)
        if row.chosen[policy] in times:
            row.regret[policy] = times[row.chosen[policy]] / best
        else:
            row.notes.append(f"{policy} chose {row.chosen[policy]}, which was not timed")
    if SDPA in times and not math.isnan(best):
        row.chosen[SDPA], row.regret[SDPA] = SDPA, times[SDPA] / best
    if found.host_seconds() and not math.isnan(best):
        _replayed(row, request, environment, policies, found.device_seconds())
    return row


def _replayed(
    row: Row, request: AttentionRequest, environment: Environment, policies: dict[str, Policy], times: dict[str, float]
) -> None:
    """The same by the device's time: the static choice as it is, the tuned one as it would be in a graph."""
    row.device_ms = {n: s * 1e3 for n, s in times.items()}
    best = min(s for n, s in times.items() if n != SDPA)
    order = policies["tuned"].rank(replace(request, capturing=True), environment).order
    chosen = {**row.chosen, "tuned": next((n for n in order if n in times), row.chosen["tuned"])}
    for policy, name in chosen.items():
        if name in times:
            row.chosen[policy + REPLAYED], row.regret[policy + REPLAYED] = name, times[name] / best


def save(run: Run, folder: Path | None, file: Path) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    result = result_of(
        run.rows,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv[1:],
        seconds=round(time.monotonic() - run.started, 1),
        machine=machine_entry(run.environment).model_dump(),
        learned=run.learned,
        compiling={"seconds": round(run.trials.seconds, 1), "said": str(run.trials)},
        wrong=run.wrong,
        failed=run.failed,
        left=run.left,
    )
    (folder / "regret.json").write_text(json.dumps(result, indent=1))
    if file.exists():
        (folder / "tuned.yaml").write_text(file.read_text())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the commonest classes only")
    parser.add_argument("--only", help="classes with this in their name")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 is steadiest on a shared machine")
    parser.add_argument("--seconds", type=float, default=1e9, help="in all, about; what is not come to is said")
    parser.add_argument("--sample-seconds", type=float, help="for timing one call, in each direction")
    parser.add_argument("--out", type=Path, help="folder for regret.json and tuned.yaml")
    parser.add_argument(
        "--evidence", type=Path, metavar="JSON", help="measure nothing: what such a file says of a line"
    )
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.evidence:
        print(evidence(json.loads(options.evidence.read_text())))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = Environment.detect(options.device)
    run = Run(environment, options.seconds, options.sample_seconds)
    grids = list(cpu_grids(options.quick) if run.cpu else cuda_grids(options.quick))
    grids = [grid for grid in grids if options.only is None or options.only in grid.name]
    run.compile(grids)
    clock = clock_for(options.device)
    ended = None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "regret.yaml"
        try:
            for grid in grids:
                print(f"--- {grid.name}, {time.monotonic() - run.started:.0f} s", flush=True)
                run.grid(grid, file, clock)
                save(run, options.out, file)
        except DeviceLost as error:
            ended = str(error)
        save(run, options.out, file)
    device = machine_entry(environment).device
    took = time.monotonic() - run.started
    print(f"\n{device}, torch {torch.__version__}: {run.learned} calls learned, {len(run.rows)} judged in {took:.0f} s")
    print(*(f"WRONG   {n}: {said}" for n, said in run.wrong.items()), sep="\n")
    print(*(f"failed  {n}: {said}" for n, said in run.failed.items()), sep="\n")
    if run.left:
        print(f"not come to: {len(run.left)}, {'; '.join(run.left)}"[:600])
    if run.rows:
        print("", calls_table(run.rows), "", show(summaries(run.rows)), sep="\n")
    if options.out is not None:
        print(f"wrote {options.out}")
    if ended is not None:
        sys.exit(f"ended early: {ended}")
    if not run.rows:
        sys.exit("nothing was judged")


if __name__ == "__main__":
    main()
