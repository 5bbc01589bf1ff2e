"""One call, measured: every kernel that can serve it checked against float64, then timed in turn with the others."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attnrt.environment import Environment
from attnrt.errors import DeviceLost
from attnrt.evidence.accuracy import truth_of, worst
from attnrt.evidence.calls import Tensors
from attnrt.evidence.candidates import Candidate, Refused, candidates
from attnrt.evidence.timing import Clock, Timed, Timing, clock_for, interleaved, said
from attnrt.selector import size
from attnrt.settings import Settings

FORWARD, BACKWARD = "forward", "backward"
ROOM = 0.7
"""Of the free memory, what all kernels together may take."""


@dataclass
class Measured:
    """What was found for one call, by kernel name, in the order of the registry."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    """Direction -> timing; "backward" only for a call that wants gradients."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Kernels whose results differ from float64, and how."""
    failed: dict[str, str] = field(default_factory=dict)
    """Kernels that raised."""
    unchecked: str | None = None
    """Why nothing was compared."""
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Direction -> most bytes held at once beyond what was there before."""
    first_seconds: float = 0.0
    """Until every kernel had run: what compiles did so then, and the comparison with float64 is in it."""

    def device_seconds(self) -> dict[str, float]:
        """Of a call with its backward on the device, for kernels that were timed and are right."""
        return {n: sum(t.median for t in found.values()) for n, found in self.timings.items() if n not in self.wrong}

    def host_seconds(self) -> dict[str, float]:
        """Until the call and its backward have returned to Python, where that is not the same: on a GPU."""
        return {
            n: sum(t.host or 0.0 for t in found.values())
            for n, found in self.timings.items()
            if n not in self.wrong and any(t.host for t in found.values())
        }

    def seconds(self) -> dict[str, float]:
        """Of a call in a long row of them: whichever of device and host is slower."""
        host = self.host_seconds()
        return {name: max(seconds, host.get(name, 0.0)) for name, seconds in self.device_seconds().items()}

    def spread(self, name: str) -> float:
        """The larger of its directions' spreads."""
        return max(timing.spread for timing in self.timings[name].values())


def measure(
    given: Tensors,
    environment: Environment,
    settings: Settings,
    *,
    seconds: float,
    clock: Clock | None = None,
    only: Iterable[str] | None = None,
    check: bool = True,
    memory: bool = False,
    extra: Mapping[str, Callable[..., Any]] | None = None,
    against: Mapping[str, str] | None = None,
) -> Measured:
    """Every kernel that can serve the request that these tensors make.

    Args:
        seconds: what timing may take, in each direction. clock: one for the device; made if None.
        only: kernel names, instead of all. check: compare with float64 first, and time only what is right.
        memory: also measure the peak. extra: further calls to time, `run(q, k, v, operands)` by name, unchecked.
        against: kernels that are not run, and why: they count as failed.

    Raises:
        DeviceLost: a kernel left the GPU unusable. Everything else that one raises is in what is returned.
    """
    started = time.perf_counter()
    clock = clock or clock_for(given.q.device)
    found = Measured()
    able, found.refused = candidates(given.request, environment, settings)
    wanted = None if only is None else set(only)
    runs: dict[str, Callable[..., Any]] = {}
    room = ROOM * (environment.with_free_memory().free_memory or 1 << 62)
    # For the backward all of them hold what they saved at the same time: the frugal first.
    held = 0
    fits = {}
    for candidate in sorted(able, key=lambda c: c.kernel.bytes(given.request, environment)):
        held += candidate.kernel.bytes(given.request, environment)
        fits[candidate.name] = held <= room
    for candidate in able:
        if wanted is not None and candidate.name not in wanted:
            continue
        found.candidates[candidate.name] = candidate
        if against and candidate.name in against:
            found.failed[candidate.name] = against[candidate.name]
            continue
        if not fits[candidate.name]:
            needed = size(candidate.kernel.bytes(given.request, environment))
            found.failed[candidate.name] = f"not measured: it takes {needed}, too much beside the others"
            continue
        try:
            runs[candidate.name] = candidate.kernel.prepare(given.request, environment)
        except Exception as error:
            _failed(found, candidate.name, error, given.q.device)
    if check:
        _check(given, runs, found)
    runs = {name: run for name, run in runs.items() if name not in found.wrong and name not in found.failed}
    runs |= extra or {}
    calls = _first(given, runs, found)
    found.first_seconds = time.perf_counter() - started
    _time(given, calls, clock, seconds, found)
    if memory:
        for name in found.timings:
            found.bytes[name] = peak_bytes(given, runs[name])
    if given.q.is_cuda:  # what the largest of them took is free for the next call
        torch.cuda.empty_cache()
    return found


def _failed(found: Measured, name: str, error: Exception, device: torch.device) -> None:
    """Note it, and go on if the device can."""
    found.failed[name] = said(error)
    if lost(device):
        raise DeviceLost(f"{name} left {device} unusable: {said(error)}") from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lost(device: torch.device) -> bool:
    """An illegal access, for one, is what every later call in the process raises again."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _check(given: Tensors, runs: Mapping[str, Callable[..., Any]], found: Measured) -> None:
    """Compare each with float64."""
    if given.request.dropout_p:
        found.unchecked = "dropout draws other random numbers in each kernel"
        return
    truth = truth_of(given)
    for name, run in runs.items():
        try:
            difference = worst(truth.check(given, run))
        except Exception as error:  # the others still count
            _failed(found, name, error, given.q.device)
            continue
        if difference.wrong:
            found.wrong[name] = str(difference)
    if "reference" in found.wrong:  # it computes in float32 or better: these values cannot be judged
        found.unchecked = f"the reference differs too: {found.wrong['reference']}"
        found.wrong.clear()


def _first(given: Tensors, runs: Mapping[str, Callable[..., Any]], found: Measured) -> dict[str, dict[str, Timed]]:
    """By direction and name, the calls of kernels whose first ones did not raise."""
    calls: dict[str, dict[str, Timed]] = {FORWARD: {}, BACKWARD: {}}
    for name, run in runs.items():
        try:
            forward, backward = first_calls(given, run)
        except Exception as error:
            _failed(found, name, error, given.q.device)
            continue
        calls[FORWARD][name] = forward
        if backward is not None:
            calls[BACKWARD][name] = backward
    return calls


def _time(given: Tensors, calls: dict[str, dict[str, Timed]], clock: Clock, seconds: float, found: Measured) -> None:
    failed: dict[str, str] = {}
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.set_grad_enabled(given.request.needs_grad):
            for direction, by_name in calls.items():
                racing = {name: call for name, call in by_name.items() if name not in failed}
                for name, timing in interleaved(racing, clock, seconds, failed).items():
                    found.timings.setdefault(name, {})[direction] = timing
    finally:
        if enabled:
            gc.enable()
    if failed and lost(given.q.device):
        name, words = next(iter(failed.items()))
        raise DeviceLost(f"{name} left {given.q.device} unusable: {words}")
    found.failed |= failed
    found.timings = {n: found.timings[n] for n in calls[FORWARD] if n in found.timings and n not in failed}


def first_calls(given: Tensors, run: Callable[..., Any]) -> tuple[Timed, Timed | None]:
    """(forward, backward or None), each run once: what compiles does so now, what fails does so now."""
    leaves = list(given.leaves().values())
    forward = partial(run, given.q, given.k, given.v, given.operands)
    with torch.set_grad_enabled(given.request.needs_grad):
        result = forward()
        _wait(given.q.device)
        if not leaves:
            return forward, None
        out = result[0] if isinstance(result, tuple) else result
        backward = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True, allow_unused=True)
        backward()
        _wait(given.q.device)
    return forward, backward


def _wait(device: torch.device) -> None:
    """So that what fails on the device fails here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(given: Tensors, run: Callable[..., Any]) -> dict[str, int]:
    """By direction, the most bytes allocated at once, beyond those before the call; the results count."""
    leaves = list(given.leaves().values())
    held: list[Any] = []

    def forward() -> None:
        held.append(run(given.q, given.k, given.v, given.operands))

    def backward() -> None:
        out = held[-1][0] if isinstance(held[-1], tuple) else held[-1]
        held.append(torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True))

    with torch.set_grad_enabled(given.request.needs_grad):
        found = {FORWARD: _peak(given.q.device, forward)}
        if leaves:
            found[BACKWARD] = _peak(given.q.device, backward)
    return found


def _peak(device: torch.device, call: Timed) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    only_cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=only_cpu, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library writes lines there at each start and stop, whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
