"""`attnrt tune`: measure calls on this machine, and keep the figures as a policy that serves from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from attnrt.environment import Environment
from attnrt.errors import AttnrtError, DeviceLost
from attnrt.evidence.calls import Call, device_of, flops, tensors
from attnrt.evidence.candidates import every_candidate
from attnrt.evidence.measuring import Measured, measure
from attnrt.evidence.presets import PRESETS, preset_calls
from attnrt.evidence.store import add, known_kernels, read
from attnrt.evidence.timing import Clock, clock_for, said
from attnrt.evidence.trials import Trials, try_calls
from attnrt.policies.kinds import Kind, Place, kind_of, place_of
from attnrt.policies.measured import MANY
from attnrt.policies.tuned import CallEntry, KindEntry
from attnrt.request import AttentionRequest
from attnrt.settings import Settings

MARGIN = 0.03
"""By how much a kernel must be faster before it goes ahead of the static preference."""
BUDGET = 60.0
COMPILING = 0.5
"""Of the budget, what first calls may take before anything is measured."""
SECONDS = {"cpu": 0.15, "cuda": 0.03}
"""What timing one call may take, in each direction."""
SLOWEST = {"cpu": 2e10, "cuda": 2e13}
"""Flops a second that the slowest kernel of a call can be expected to reach: what is left of the budget rules out calls
that would take longer."""


@dataclass
class Tuned:
    """What a run did: calls measured, calls already known, calls left for want of time, and what was wrong."""

    file: Path
    measured: list[tuple[Call, Measured]] = field(default_factory=list)
    known: list[Call] = field(default_factory=list)
    left: list[Call] = field(default_factory=list)
    refused: dict[Call, str] = field(default_factory=dict)
    interrupted: bool = False
    lost: str | None = None
    """Why the GPU could not be used any more, where that ended it."""
    seconds: float = 0.0
    trials: Trials = field(default_factory=Trials)
    """First calls that were made ahead; their seconds are part of all."""


def tune(
    calls: Sequence[Call],
    file: Path,
    environment: Environment,
    settings: Settings,
    *,
    budget: float = BUDGET,
    margin: float = MARGIN,
    again: bool = False,
    seconds: float | None = None,
    trials: Trials | None = None,
    progress: Callable[[Call, Measured | None], None] | None = None,
    compiling: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Measure calls, coarsest first, until the budget is spent, and add each to the file as soon as it is known.

    Ctrl-C keeps what was measured, and a later run goes on where this one stopped. What compiles does so first, in
    processes of its own, for half of the budget at most; a kernel that dies or hangs there is left out.

    Args:
        budget: seconds, about. again: measure also what the file has. seconds: for timing a call, each direction.
        trials: first calls that were made already. progress: called before a call is measured (with None) and after.
        compiling: called with (first calls made, in all).

    Raises:
        ArgumentError: the file holds figures of another machine. OSError: it cannot be written.
    """
    started = time.monotonic()
    device = device_of(environment)
    done = Tuned(file)
    known = set() if again else known_places(file)
    clock: Clock | None = None
    waiting = coarse_first(calls)
    kinds: set[Kind] = set()
    slowest_first = 0.0
    try:
        if trials is None:
            trials = try_calls(
                [call for call in waiting if not _known(call, known)][: int(budget)],  # a second each, at least
                environment,
                settings,
                seconds=COMPILING * budget,
                progress=compiling,
            )
            done.trials = trials
        while waiting:
            call = waiting.pop(0)
            try:
                request = call.request()
            except AttnrtError as error:
                done.refused[call] = str(error)
                continue
            if _known(call, known):
                done.known.append(call)
                continue
            new = kind_of(request) not in kinds
            expected = expected_seconds(request, environment) + (slowest_first if new else 0.0)
            if expected > budget - (time.monotonic() - started):
                done.left.append(call)
                continue
            clock = clock or clock_for(device)
            if progress is not None:
                progress(call, None)
            try:
                given = tensors(call, device)
                found = measure(
                    given,
                    environment,
                    settings,
                    seconds=seconds or SECONDS[device.type],
                    clock=clock,
                    only=worthwhile(request),
                    against=trials.against(call),
                )
            except torch.OutOfMemoryError as error:  # of the tensors themselves, or of the comparison
                done.refused[call] = said(error)
                continue
            kinds.add(kind_of(request))
            if new:  # of another kind everything may compile again
                slowest_first = max(slowest_first, found.first_seconds)
            if found.timings or found.wrong:
                add(file, [entry_of(given.request, found)], environment, margin)
                done.measured.append((call, found))
            else:
                done.refused[call] = _nothing(found, environment)
            del given
            if progress is not None:
                progress(call, found)
    except KeyboardInterrupt:
        done.interrupted = True
        done.left += waiting
    except DeviceLost as error:
        done.lost = str(error)
        done.left += [call, *waiting]
    done.seconds = time.monotonic() - started
    return done


def entry_of(request: AttentionRequest, found: Measured) -> KindEntry:
    """The figures of one call, as the file has them."""
    kind, place = kind_of(request), place_of(request)
    seconds = found.device_seconds()
    call = CallEntry(
        **place._asdict(),
        ms={name: value * 1e3 for name, value in seconds.items()},
        host_ms={name: value * 1e3 for name, value in found.host_seconds().items()},
        spread={name: found.spread(name) for name in seconds},
        wrong={name: _printable(said) for name, said in found.wrong.items()},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return KindEntry(**kind._asdict() | {"features": list(kind.features)}, calls=[call])


def worthwhile(request: AttentionRequest) -> list[str] | None:
    """Kernels that may win; None is all. One that holds many scores is no choice by its speed (`MeasuredPolicy`), and
    takes longest to be measured; where every other one is refused there is nothing to measure."""
    if request.scores * 4 <= MANY:
        return None
    return [name for name, kernel in known_kernels().items() if kernel.fused]


def known_places(file: Path) -> set[tuple[Kind, Place]]:
    """What a file already has; nothing if it does not exist or cannot be read."""
    try:
        content = read(file)
    except AttnrtError:
        return set()
    return {(kind.kind, call.place) for kind in content.kinds for call in kind.calls}


def _known(call: Call, known: set[tuple[Kind, Place]]) -> bool:
    try:
        request = call.request()
    except AttnrtError:
        return False
    return (kind_of(request), place_of(request)) in known


def coarse_first(calls: Iterable[Call]) -> list[Call]:
    """Each once, the kinds in turn, of each kind the ends before the middle: a short run has a bit of everything."""
    kinds: dict[object, list[Call]] = {}
    for call in dict.fromkeys(calls):
        try:
            kinds.setdefault(kind_of(call.request()), []).append(call)
        except AttnrtError:
            kinds.setdefault(call, []).append(call)
    spread = [_ends_first(sorted(members, key=_size)) for members in kinds.values()]
    return [call for row in zip_longest(*spread) for call in row if call is not None]


def _size(call: Call) -> tuple[int, int, int]:
    return call.seqlen_q, call.seqlen_kv or call.seqlen_q, call.batch * call.heads_q


def _ends_first(calls: list[Call]) -> list[Call]:
    """The first, the last, the middle, the quarters and so on."""
    found: dict[int, None] = dict.fromkeys((0, len(calls) - 1))
    steps = len(calls) - 1
    while steps > 1:
        steps = (steps + 1) // 2
        found |= dict.fromkeys((*range(0, len(calls), steps),))
    return [calls[i] for i in (*found, *(i for i in range(len(calls)) if i not in found))]


def default_calls(environment: Environment) -> list[Call]:
    """What is measured if nothing is said: on a GPU the presets' common shapes, on a CPU small ones."""
    if environment.device_type == "cuda":
        lengths = (512, 2048, 8192)
        names = [name for name in PRESETS if name != "deepseek-mla"]
        calls = preset_calls(names, ("prefill", "training"), lengths=lengths)
        return calls + preset_calls(names, ("decode",), lengths=(2048, 16384, 65536), batches=(1, 16))
    calls = []
    for dtype in ("fp32", "bf16"):
        for head_dim in (64, 128):
            for heads_q, heads_kv in ((8, 8), (8, 2)):
                sizes: dict[str, Any] = {"heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim}
                sizes |= {"dtype": dtype, "layout": "bhsd"}
                for length in (32, 128, 512, 1024):
                    for causal in (True, False):
                        for training in (False, True):
                            calls.append(Call(**sizes, seqlen_q=length, causal=causal, training=training))
                for length in (256, 1024, 4096):
                    calls += [Call(**sizes, batch=batch, seqlen_q=1, seqlen_kv=length) for batch in (1, 8)]
    return calls


def expected_seconds(request: AttentionRequest, environment: Environment) -> float:
    """About what measuring a call takes at worst: a few calls of its slowest kernel."""
    work = flops(request, "both" if request.needs_grad else "forward")
    return 5 * work / SLOWEST.get(environment.device_type, 1e10)


def _nothing(found: Measured, environment: Environment) -> str:
    if found.failed:
        return "; ".join(f"{name}: {said}" for name, said in found.failed.items())[:300]
    if len(found.refused) < len(every_candidate(environment)):
        return "the kernels that can serve it hold all scores, and none of those goes ahead by its speed"
    return "no kernel can serve it: `attnrt explain` has every reason"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:300]
