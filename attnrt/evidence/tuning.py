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
from attnrt.errors import AttnrtError
from attnrt.evidence.calls import Call, flops, tensors
from attnrt.evidence.measuring import Measured, measure
from attnrt.evidence.presets import PRESETS, preset_calls
from attnrt.evidence.store import add, read
from attnrt.evidence.timing import Clock, clock_for
from attnrt.policies.kinds import Kind, Place, kind_of, place_of
from attnrt.policies.tuned import CallEntry, KindEntry
from attnrt.request import AttentionRequest
from attnrt.settings import Settings

MARGIN = 0.03
"""By how much a kernel must be faster before it goes ahead of the static preference."""
BUDGET = 60.0
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
    seconds: float = 0.0


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
    progress: Callable[[Call, Measured | None], None] | None = None,
) -> Tuned:
    """Measure calls, coarsest first, until the budget is spent, and add each to the file as soon as it is known.

    Ctrl-C keeps what was measured, and a later run goes on where this one stopped.

    Args:
        budget: seconds, about. again: measure also what the file has. seconds: for timing a call, each direction.
        progress: called before a call is measured (with None) and after.

    Raises:
        ArgumentError: the file holds figures of another machine. OSError: it cannot be written.
    """
    started = time.monotonic()
    device = device_of(environment)
    done = Tuned(file)
    known = set() if again else known_places(file)
    clock: Clock | None = None
    waiting = coarse_first(calls)
    try:
        while waiting:
            call = waiting.pop(0)
            try:
                request = call.request()
            except AttnrtError as error:
                done.refused[call] = str(error)
                continue
            if (kind_of(request), place_of(request)) in known:
                done.known.append(call)
                continue
            if expected_seconds(request, environment) > budget - (time.monotonic() - started):
                done.left.append(call)
                continue
            clock = clock or clock_for(device)
            if progress is not None:
                progress(call, None)
            given = tensors(call, device)
            found = measure(given, environment, settings, seconds=seconds or SECONDS[device.type], clock=clock)
            if found.timings or found.wrong:
                add(file, [entry_of(given.request, found)], environment, margin)
                done.measured.append((call, found))
            else:
                done.refused[call] = _nothing(found)
            del given
            if progress is not None:
                progress(call, found)
    except KeyboardInterrupt:
        done.interrupted = True
        done.left += waiting
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


def known_places(file: Path) -> set[tuple[Kind, Place]]:
    """What a file already has; nothing if it does not exist or cannot be read."""
    try:
        content = read(file)
    except AttnrtError:
        return set()
    return {(kind.kind, call.place) for kind in content.kinds for call in kind.calls}


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


def device_of(environment: Environment) -> torch.device:
    if environment.device_index is None:
        return torch.device(environment.device_type)
    return torch.device(environment.device_type, environment.device_index)


def _nothing(found: Measured) -> str:
    if found.failed:
        return "; ".join(f"{name}: {said}" for name, said in found.failed.items())[:300]
    return "no kernel can serve it: `attnrt explain` has every reason"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:300]
